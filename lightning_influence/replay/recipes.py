"""Which optimizers a run may have, and what else its last bit depends on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_influence.core.weights import parameters_of
from lightning_influence.replay.record import ReplayError

OPTIMIZERS = ("SGD", "Adam", "AdamW", "RMSprop")
"""Whose steps can be replayed."""


def type_of(optimizer: Any) -> str | None:
    """Return the name of the class in ``torch.optim`` whose steps an optimizer takes, None for all but four."""
    kind = type(optimizer)
    return kind.__name__ if kind in [getattr(torch.optim, name) for name in OPTIMIZERS] else None


def check_optimizer(module: nn.Module, optimizer: Any) -> list[list[str]]:
    """Return the names of the parameters of an optimizer's groups.

    Raises:
        ReplayError: If its steps can't be replayed.
    """
    if type_of(optimizer) is None:
        kind = type(optimizer)
        raise ReplayError(f"the optimizer is {kind.__module__}.{kind.__qualname__}; expected {', '.join(OPTIMIZERS)}.")
    names = {id(p): name for name, p in parameters_of(module).items()}
    for number, group in enumerate(optimizer.param_groups):
        for name in ("amsgrad", "maximize", "capturable", "differentiable", "centered"):
            if group.get(name):
                raise ReplayError(
                    f"{type(optimizer).__name__} has {name}=True in group {number}; replay knows its steps without."
                )
        if isinstance(group["lr"], Tensor):
            raise ReplayError("the learning rate is a tensor; expected a number.")
        if any(id(p) not in names for p in group["params"]):
            raise ReplayError(
                f"{type(optimizer).__name__} holds parameters that {type(module).__name__} does not list "
                "(`named_parameters`): they have no name to be noted under."
            )
    if optimizer.state:
        raise ReplayError("the optimizer has taken steps before: recording has to begin before the first.")
    return [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]


def environment_of(module: nn.Module) -> dict[str, str]:
    """Return what the last bit of a step depends on beside the step itself."""
    place = next(module.parameters(), torch.empty(0)).device
    name = torch.cuda.get_device_name(place) if place.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    return {
        "torch": str(torch.__version__),
        "device": f"{place.type} ({name})",
        "threads": str(torch.get_num_threads()),
    }
