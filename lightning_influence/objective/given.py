"""A model and its loss as a user hands them in, without a Trainer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.nn import UninitializedParameter

from lightning_influence.objective.task import Task, TrainingStepTask
from lightning_influence.objective.terms import TaskError

Loss: TypeAlias = "Task | nn.Module | Callable[..., Tensor]"

LOSSES = (
    "a function (model, batch) -> loss, a torch loss such as `nn.CrossEntropyLoss()` or `F.cross_entropy` for batches "
    "(inputs, targets), or None for the model's own `training_step`"
)


@dataclass(frozen=True)
class LossOfOutputs:
    """``loss(model(inputs), targets)`` of batches ``(inputs, targets)``, as a task."""

    loss: Callable[..., Tensor]

    def __call__(self, module: Any, batch: Any) -> Tensor:
        """Return the loss of a batch."""
        if not isinstance(batch, (list, tuple)) or len(batch) != 2:
            what = type(batch).__name__ + (f" of {len(batch)}" if hasattr(batch, "__len__") else "")
            raise TaskError(
                f"{_name(self.loss)} is applied to batches (inputs, targets), and this one is a {what}; pass a "
                "function (model, batch) -> loss instead."
            )
        return self.loss(module(batch[0]), batch[1])


def check_model(model: object) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless this is a module whose parameters have values."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"the model is a {type(model).__name__}; expected a torch module.")
    parameters = dict(model.named_parameters())
    if not parameters:
        raise TypeError(
            f"the model, {type(model).__name__}, has no parameters; expected the trained model first, then the loss, "
            "then the training data."
        )
    if empty := [name for name, parameter in parameters.items() if parameter.is_meta]:
        raise ValueError(
            f"the parameters {empty[:3]} of {type(model).__name__} are on the meta device, without values: "
            '`model.to_empty(device="cpu")`, then load the trained weights.'
        )
    trained = {
        name: p for name, p in parameters.items() if p.requires_grad and not isinstance(p, UninitializedParameter)
    }
    if odd := [name for name, parameter in trained.items() if not bool(parameter.detach().isfinite().all())]:
        raise ValueError(
            f"the parameters {odd[:3]} of {type(model).__name__} hold numbers that are not finite: training has "
            "diverged. Pass the model with the weights of a checkpoint from before."
        )


def task_of(model: nn.Module, loss: Loss | None) -> Task:
    """Return the task that a loss stands for.

    Raises:
        TypeError: If it is none, or there is none.
    """
    if loss is None and not callable(getattr(model, "training_step", None)):
        raise TypeError(f"{type(model).__name__} has no `training_step` to take the loss from; pass {LOSSES}.")
    if loss is None:
        return TrainingStepTask()
    if isinstance(loss, type) or not callable(loss):
        told = f"the class {loss.__name__}" if isinstance(loss, type) else f"a {type(loss).__name__}"
        raise TypeError(f"the loss is {told}; expected {LOSSES}.")
    inner = loss.func if isinstance(loss, partial) else loss
    if isinstance(loss, nn.Module) or getattr(inner, "__module__", "") == "torch.nn.functional":
        return LossOfOutputs(loss)
    return loss


def _name(loss: Any) -> str:
    return str(getattr(loss, "__name__", type(loss).__name__))
