"""The divergence of predicted from given distributions over classes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_influence.core.precision import working
from lightning_influence.objective.losses.base import LossCall, reduction_of
from lightning_influence.objective.losses.cross_entropy import CrossEntropy
from lightning_influence.objective.losses.registry import reads


@reads(F.kl_div)
@dataclass(frozen=True, eq=False)
class Divergence(CrossEntropy):
    """``F.kl_div`` of log-probabilities ``input: [r, c, ...]`` and probabilities ``target`` of the same shape.

    It is the cross-entropy of soft labels but for their own entropy, and has an element for every class.

    Attributes:
        class_dim: Where the classes were in the call; ``input`` and ``target`` have them in dimension 1.
        rows: Size of the first dimension of the call if the mean was over that alone (``"batchmean"``).
    """

    class_dim: int = 1
    rows: int | None = None

    @classmethod
    def read(cls, output: Tensor, arguments: dict[str, Any], *, log_probabilities: bool = True) -> LossCall | None:
        """Return the call, unless the input is no distribution."""
        log_p, target = arguments["input"], arguments["target"]
        if log_p.shape != target.shape or log_p.ndim < 2:
            return None
        # The call does not say where the classes are; the probabilities add up to 1 along them.
        for dim in (log_p.ndim - 1, 1):
            if float(log_p.detach().float().logsumexp(dim).abs().amax()) < 1e-2:
                break
        else:
            return None
        target = target.exp() if arguments["log_target"] else target
        reduction = reduction_of(arguments)
        rows = len(log_p) if reduction == "batchmean" else None
        reduction = "mean" if rows is not None else reduction
        moved = log_p.movedim(dim, 1), target.movedim(dim, 1)
        return cls(output, *moved, reduction, log_probabilities=log_probabilities, class_dim=dim, rows=rows)

    def elements(self) -> Tensor:
        """Return ``[r, c, ...]``: ``t (log t - input)``."""
        return F.kl_div(self.input, self.target, reduction="none")

    def weights(self) -> Tensor:
        """Return equal weights ``[r, c, ...]`` that add up to what the mean divides by."""
        return torch.full_like(self.input, self._divisor / max(self.input.numel(), 1))

    @property
    def _divisor(self) -> int:
        return self.input.numel() if self.rows is None else self.rows

    def per_row(self, values: Tensor) -> Tensor:
        """``[r, c, ...]`` or ``[r, ...] -> [r, ...]``: sums over the classes."""
        return values.sum(1) if values.ndim == self.input.ndim else values

    def scale(self, coefficient: Tensor, n: int, reference: float | None = None) -> Tensor:
        """Return the weight of each element; see ``LossCall.scale``."""
        whole = super().scale(coefficient, n, reference)
        return whole if self.reduction != "none" else whole.movedim(self.class_dim, 1)

    def steady_divisor(self, n: int, *, alone: bool) -> float | None:
        """Return what the mean divides by, per example."""
        return None if super().steady_divisor(n, alone=alone) is None else self._divisor / n

    def counting(self, counted: Tensor) -> Divergence:
        """Return the same call without targets for the elements that do not count."""
        return replace(self, target=torch.where(counted.movedim(self.class_dim, 1), self.target, 0))

    def _plain_loss(self, log_probabilities: Tensor) -> Tensor:
        return F.kl_div(log_probabilities, working(self.target.detach()), reduction="none").sum(1)

    def _mass(self, scale: Tensor) -> Tensor:
        return (working(self.target.detach()) * scale).sum(1)
