"""The negative log-likelihood of normal variables with a predicted variance."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_influence.core.precision import working
from lightning_influence.objective.losses.base import LossCall, reduction_of
from lightning_influence.objective.losses.elementwise import ElementwiseLoss
from lightning_influence.objective.losses.output_curvature import Diagonal, OutputCurvature, root_of
from lightning_influence.objective.losses.registry import reads


@reads(F.gaussian_nll_loss)
@dataclass(frozen=True, eq=False)
class NormalLikelihood(ElementwiseLoss):
    """``F.gaussian_nll_loss``, ``input`` and ``target``: ``[r, ...]``.

    The Hessian by mean and variance depends on the target and can be negative; the curvature is the Fisher
    information, ``1 / v`` for a mean and ``1 / (2 v²)`` for a variance, without cross terms.

    Attributes:
        variance: As it was passed: shaped like ``input``, with one number for the last dimension, or without that.
        full: Whether the loss has its constant term.
        eps: Smallest variance.
    """

    variance: Tensor = field(kw_only=True)
    full: bool = False
    eps: float = 1e-6

    @classmethod
    def read(cls, output: Tensor, arguments: dict[str, Any]) -> LossCall | None:
        """Return the call, unless examples share a variance or broadcasting pairs them with others."""
        mean, target, variance = arguments["input"], arguments["target"], arguments["var"]
        if isinstance(variance, float):
            variance = torch.full_like(mean, variance, requires_grad=False)
        if mean.shape != target.shape or variance.shape not in (mean.shape, (*mean.shape[:-1], 1), mean.shape[:-1]):
            return None
        full, eps = arguments["full"], arguments["eps"]
        return cls(output, mean, target, reduction_of(arguments), variance=variance, full=full, eps=eps)

    @property
    def predictions(self) -> tuple[Tensor, ...]:
        """Means and variances."""
        return self.input, self.variance

    def losses(self, predictions: Tensor) -> Tensor:
        """Return ``[r, ...]``."""
        return F.gaussian_nll_loss(
            predictions, self.target, self.variance, full=self.full, eps=self.eps, reduction="none"
        )

    def curvature(self) -> Tensor:
        """Return ``1 / v``, the Fisher information of the means."""
        return 1 / self._variance()

    def curvatures(self, scale: Tensor) -> list[OutputCurvature]:
        """Return the information of means and of variances, as far as they take part in a gradient."""
        found = super().curvatures(scale) if self.input.requires_grad else []
        if self.variance.requires_grad:
            information = (scale / (2 * self._variance().square())).expand_as(self.input)
            found.append(Diagonal([(self.variance, 1.0)], root_of(self._summed(information))))
        return found

    def sampled(self, scale: Tensor, noise: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return the gradients of means and variances for targets drawn from the model."""
        result = super().sampled(scale, noise)
        if self.variance.requires_grad:
            spread = (1 - self.normal(noise).square()) / (2 * self._variance()) * self.root(scale)
            result.append((self.variance, self._summed(spread).view(self.variance.shape)))
        return result

    def exact_draws(self, n: int) -> int | None:
        """Return the number of means and variances of one example, as far as they take part in a gradient."""
        groups = [(self.input, self.input), (self.variance, self._column())]
        learned = [values for tensor, values in groups if tensor.requires_grad]
        return sum(self.shares(n).gather(values).flatten(1).shape[1] for values in learned)

    def _column(self) -> Tensor:
        """The variances as passed, with as many dimensions as the input."""
        passed = working(self.variance.detach())
        return passed if passed.ndim == self.input.ndim else passed.unsqueeze(-1)

    def _variance(self) -> Tensor:
        return self._column().clamp(min=self.eps).expand_as(self.input)

    def _summed(self, values: Tensor) -> Tensor:
        """Sum over the elements that share a variance."""
        return values.sum_to_size(self._column().shape)
