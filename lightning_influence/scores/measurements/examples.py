"""Measurements that every example has by itself; of a set, their mean."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_influence.core.containers import map_tensors, tensors_in
from lightning_influence.core.errors import check_count, is_number, short
from lightning_influence.objective.losses import known_losses
from lightning_influence.objective.terms import BatchLoss
from lightning_influence.scores.measurements.base import MeasurementError, Statistic

# Madry et al. (1706.06083) take steps that reach the border of the ball with some to spare.
_REACH = 2.5


@dataclass(frozen=True)
class Loss(Statistic):
    """The loss of the training task."""

    per_query: ClassVar[bool] = True

    @property
    def name(self) -> str:
        """``"loss"``."""
        return "loss"

    def values(self, loss: BatchLoss) -> Tensor | None:
        """Return the examples' own losses."""
        return loss.values

    def outputs(self, loss: BatchLoss) -> tuple[list[Tensor], list[Tensor]]:
        """Return where training itself would run backward from: values that are known have lost their graph."""
        return loss.true_outputs()


@dataclass(frozen=True)
class Margin(Statistic):
    """Log-odds of the given label, ``log p / (1 - p)``: the more, the surer the model is of it (Park et al. 2023).

    Training is meant to raise it. A positive score of a training example then says that training on it lowers the
    margin.
    """

    per_query: ClassVar[bool] = True
    higher_is_better: ClassVar[bool] = True

    @property
    def name(self) -> str:
        """``"margin"``."""
        return "margin"

    def values(self, loss: BatchLoss) -> Tensor:
        """Return the log-odds."""
        return log_odds(self.name, loss)


@dataclass(frozen=True, eq=False)
class AdversarialLoss(Loss):
    """The loss at inputs that an attacker has changed by up to ``epsilon`` in every entry.

    The attack climbs along the sign of the input's gradient, against the model in eval mode: one step of ``epsilon`` is
    FGSM (Goodfellow et al. 2015, 1412.6572), several smaller ones are PGD (Madry et al. 2018, 1706.06083), here started
    at the input itself, so that nothing is random. The loss is then differentiated by the parameters at these inputs,
    which are held fixed (Danskin's theorem: for the worst inputs, that is all).

    Args:
        epsilon: Largest change of an entry, in the units of the model's input.
        steps: Number of steps: of ``epsilon`` for one, of ``2.5 epsilon / steps`` for several.
        bounds: Least and largest entry that an input may have, in the same units (a normalised image has others than
            0 and 1); numbers, or tensors that broadcast.
        inputs: Picks the tensor to attack from a batch; by default the first of floating-point numbers in it.

    Raises:
        ValueError: If a number is out of range.
    """

    epsilon: float
    steps: int = 1
    bounds: tuple[float | Tensor, float | Tensor] | None = None
    inputs: Callable[[Any], Tensor] | None = None

    def __post_init__(self) -> None:
        if not is_number(self.epsilon, above=0):
            raise ValueError(f"epsilon={short(self.epsilon)}; expected a finite number > 0.")
        check_count("steps", self.steps)

    @classmethod
    def fgsm(cls, epsilon: float, **options: Any) -> AdversarialLoss:
        """Return the loss under one step of ``epsilon``."""
        return cls(epsilon, **options)

    @classmethod
    def pgd(cls, epsilon: float, steps: int = 10, **options: Any) -> AdversarialLoss:
        """Return the loss under several steps."""
        return cls(epsilon, steps, **options)

    @property
    def name(self) -> str:
        """``"fgsm_loss"`` or ``"pgd_loss"``."""
        return "fgsm_loss" if self.steps == 1 else "pgd_loss"

    def altered(self, batch: Any, run: Callable[[Any], BatchLoss]) -> Any:
        """Return the batch with the attacked inputs."""
        clean = self._attacked(batch)
        step = self.epsilon if self.steps == 1 else _REACH * self.epsilon / self.steps
        changed = clean.detach()
        for _ in range(self.steps):
            changed = changed.detach().requires_grad_(True)
            loss = run(_replaced(batch, clean, changed)).loss
            (gradient,) = torch.autograd.grad(loss, changed, allow_unused=True)
            if gradient is None:
                raise MeasurementError(
                    f"{self.name}: the loss does not depend on the tensor of shape {list(clean.shape)} that is "
                    "attacked; pick the model's input with `inputs=`, a function of the batch."
                )
            changed = changed.detach() + step * gradient.sign()
            changed = changed.clamp(clean - self.epsilon, clean + self.epsilon)
            if self.bounds is not None:
                low, high = (torch.as_tensor(bound).to(changed) for bound in self.bounds)
                changed = changed.clamp(low, high)
        return _replaced(batch, clean, changed.detach())

    def _attacked(self, batch: Any) -> Tensor:
        held = list(tensors_in(batch))
        found = self.inputs(batch) if self.inputs is not None else next(filter(Tensor.is_floating_point, held), None)
        if not isinstance(found, Tensor) or not found.is_floating_point() or not any(found is own for own in held):
            raise MeasurementError(
                f"{self.name}: found no tensor to attack in a batch of type {type(batch).__name__}; expected a tensor "
                "of floating-point numbers in it, within lists, tuples or dicts. `inputs=` may say which of several."
            )
        return found


def log_odds(name: str, loss: BatchLoss, positive: int | None = None) -> Tensor:
    """Return ``log p / (1 - p)`` of the given labels or of a class, ``[n]``, in the graph.

    Raises:
        MeasurementError: If the loss tells no class decision of every example.
    """
    try:
        found = None if loss.primary is None else loss.primary.log_odds(loss.n, positive)
    except ValueError as error:
        raise MeasurementError(f"{name}: {error}") from error
    if found is None:
        raise MeasurementError(
            f"{name} needs one class decision for each example, and the loss shows none: no known loss call "
            f"({known_losses()}) with one row of logits for each example was seen. Pass a function "
            "(module, batch) -> number instead."
        )
    return found


def _replaced(batch: Any, old: Tensor, new: Tensor) -> Any:
    return map_tensors(lambda tensor: new if tensor is old else tensor, batch)
