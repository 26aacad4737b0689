"""Losses of differences between predictions and targets."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_influence.objective.losses.base import ElementwiseLoss
from lightning_influence.objective.losses.picking import Picking, find_picking


@dataclass(frozen=True, eq=False)
class _Residual(ElementwiseLoss):
    """A function of ``input - target``, both ``[r, ...]``."""

    @property
    def in_graph(self) -> bool:
        """Whether input or target takes part in a gradient: either may be the prediction, or both."""
        return self.input.requires_grad or self.target.requires_grad

    def picking(self) -> Picking | None:
        """Return where the rows were picked from."""
        return find_picking(self.input if self.input.requires_grad else self.target)

    def sampled(self, scale: Tensor, noise: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return the gradients of input and target: opposite ones."""
        gradient = self.sampled_gradient(scale, noise)
        return [(self.input, gradient), (self.target, -gradient)]

    def exact(self, scale: Tensor, n: int) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """Yield the columns of ``exact_gradients`` for input and target."""
        for column in self.exact_gradients(scale, n):
            yield [(self.input, column), (self.target, -column)]

    def residual(self) -> Tensor:
        """Return ``input - target``, in working precision, detached."""
        return self.values() - self.target.detach()

    @abstractmethod
    def of_residual(self, residual: Tensor) -> Tensor:
        """Return the loss terms ``[r, ...]`` of given residuals."""

    def plain(self) -> Tensor:
        """Return ``[r, ...]``."""
        return self.of_residual(self.input - self.target)

    def statistics(self, n: int) -> dict[str, Tensor]:
        """Return the loss and the size of the residual (as EL2N)."""
        residual = self.residual()
        return {
            "loss": self._mean(self.of_residual(residual), self._counted(), n),
            "el2n": self._distance(residual, n),
        }


@dataclass(frozen=True, eq=False)
class SquaredError(_Residual):
    """``F.mse_loss``. Its Hessian is 2 per element (not 1), the Fisher that of normal noise of variance 1/2."""

    weighted_mean: ClassVar[bool] = True

    def of_residual(self, residual: Tensor) -> Tensor:
        """Return ``[r, ...]``."""
        return residual.square()

    def curvature(self) -> Tensor:
        """Return 2."""
        return torch.full_like(self.values(), 2)


@dataclass(frozen=True, eq=False)
class AbsoluteError(_Residual):
    """``F.l1_loss``.

    Its Hessian is 0 wherever there is one, so a GGN would leave nothing but the damping. The curvature is the Fisher
    information of the distribution that the loss is the negative log-likelihood of, a Laplace distribution of scale 1
    around the prediction: 1 per element, the mean square of its gradient ``± 1``.
    """

    weighted_mean: ClassVar[bool] = True

    def of_residual(self, residual: Tensor) -> Tensor:
        """Return ``[r, ...]``."""
        return residual.abs()

    def curvature(self) -> Tensor:
        """Return 1."""
        return torch.ones_like(self.values())

    def sampled_gradient(self, scale: Tensor, noise: Tensor) -> Tensor:
        """Return ``± sqrt(scale)``: the target is above or below the prediction with probability 1/2 each."""
        return self.at_elements(torch.where(noise < 0.5, -1.0, 1.0)) * self._root(scale)


@dataclass(frozen=True, eq=False)
class HuberError(_Residual):
    """``F.huber_loss``: squared up to ``delta``, linear beyond.

    Beyond, the Hessian is 0: an outlier has no curvature.
    """

    delta: float = 1.0

    def of_residual(self, residual: Tensor) -> Tensor:
        """Return ``[r, ...]``."""
        return F.huber_loss(residual, torch.zeros_like(residual), reduction="none", delta=self.delta)

    def curvature(self) -> Tensor:
        """Return 1 up to ``delta``, 0 beyond."""
        residual = self.residual()
        return (residual.abs() <= self.delta).to(residual.dtype)


@dataclass(frozen=True, eq=False)
class SmoothAbsoluteError(_Residual):
    """``F.smooth_l1_loss`` with ``beta > 0``: the Huber loss over ``beta``."""

    beta: float = 1.0

    def of_residual(self, residual: Tensor) -> Tensor:
        """Return ``[r, ...]``."""
        return F.smooth_l1_loss(residual, torch.zeros_like(residual), reduction="none", beta=self.beta)

    def curvature(self) -> Tensor:
        """Return ``1 / beta`` up to ``beta``, 0 beyond."""
        residual = self.residual()
        return (residual.abs() < self.beta).to(residual.dtype) / self.beta
