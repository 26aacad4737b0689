"""A module that is asked for its trainer as if it were still training, at the step that is run again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lightning_influence.core.containers import map_tensors
from lightning_influence.core.origin import is_lightnings
from lightning_influence.replay.record import ReplayError


class _Silent:
    """A logger that swallows all that is written to it."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self


# What a trainer of one process says.
_ALONE: dict[str, Any] = {
    "is_global_zero": True,
    "global_rank": 0,
    "local_rank": 0,
    "world_size": 1,
    "progress_bar_callback": None,
}


class _Then:
    """Stands in for the trainer of a module.

    Args:
        real: The trainer, if the module has one.
        at: Epoch and step of the moment.
    """

    def __init__(self, real: Any, at: Callable[[], tuple[int, int]]) -> None:
        self._real, self._at = real, at
        self.logger, self.loggers = _Silent(), [_Silent()]
        self.training, self.sanity_checking = True, False
        self.validating = self.testing = self.predicting = self.evaluating = False

    @property
    def current_epoch(self) -> int:
        return self._at()[0]

    @property
    def global_step(self) -> int:
        return self._at()[1]

    def __getattr__(self, name: str) -> Any:
        if self._real is None:
            if name in _ALONE:
                return _ALONE[name]
            raise ReplayError(
                f"the training step asks for `trainer.{name}`, and the model has no trainer by now. What it needs of "
                "the trainer has to be an attribute of the model, or a buffer."
            )
        return getattr(self._real, name)


@contextmanager
def as_trained(module: nn.Module, at: Callable[[], tuple[int, int]]) -> Iterator[None]:
    """Let ``self.trainer``, ``self.current_epoch`` and ``self.global_step`` be those of the run, logging nothing.

    Args:
        module: The model; of modules that know no trainer, nothing is changed.
        at: Returns epoch and step of the moment.
    """
    asked = [each for each in module.modules() if "_trainer" in each.__dict__]
    before = [each.__dict__["_trainer"] for each in asked]
    try:
        for each in asked:
            each.__dict__["_trainer"] = _Then(trainer_of(each), at)
        yield
    finally:
        for each, real in zip(asked, before, strict=True):
            each.__dict__["_trainer"] = real


def trainer_of(module: nn.Module) -> Any:
    """Return the trainer that a module still has; None if it has none, or one that is gone."""
    found = module.__dict__.get("_trainer")
    found = found._real if isinstance(found, _Then) else found
    try:
        return found if found else None
    except ReferenceError:  # modules hold their trainer weakly
        return None


def moved(module: nn.Module, precision: str, batch: Any, data_module: Any = None) -> Any:
    """Return what ``training_step`` gets of a batch of the loader, as the trainer makes it.

    Args:
        module: The model.
        precision: As the trainer names it.
        batch: The batch.
        data_module: Whose own hooks come before those of the model.
    """
    place = next(module.parameters(), torch.empty(0)).device
    if precision.endswith("-true") and precision != "32-true":
        kind = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.get_default_dtype())
        batch = map_tensors(lambda tensor: tensor.to(kind) if tensor.is_floating_point() else tensor, batch)
    own: Any = module
    if not hasattr(own, "transfer_batch_to_device"):
        return map_tensors(lambda tensor: tensor.to(place), batch)
    if trainer_of(module) is not None:  # who knows whether a data module has hooks of its own
        batch = own._on_before_batch_transfer(batch, dataloader_idx=0)
        return own._apply_batch_transfer_handler(batch, device=place, dataloader_idx=0)

    def hook(name: str) -> Callable[..., Any]:
        made = getattr(type(data_module), name, None)
        found: Callable[..., Any] = getattr(
            own if made is None or is_lightnings(made.__module__) else data_module, name
        )
        return found

    batch = hook("on_before_batch_transfer")(batch, 0)
    return hook("on_after_batch_transfer")(hook("transfer_batch_to_device")(batch, place, 0), 0)
