"""Losses of differences between predictions and targets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_influence.core.torch_private import argument_of_caller
from lightning_influence.objective.losses.base import LossCall
from lightning_influence.objective.losses.elementwise import ElementwiseLoss
from lightning_influence.objective.losses.registry import reads


@dataclass(frozen=True, eq=False)
class _Residual(ElementwiseLoss):
    """A function of ``input - target``, both ``[r, ...]``; either may be the prediction, or both."""

    @property
    def predictions(self) -> tuple[Tensor, ...]:
        """Input and target."""
        return self.input, self.target

    def signed(self) -> list[tuple[Tensor, float]]:
        """Return input and target: opposite ones."""
        return [(self.input, 1.0), (self.target, -1.0)]

    def residual(self) -> Tensor:
        """Return ``input - target``, in working precision, detached."""
        return self.values() - self.target.detach()


@reads(F.mse_loss)
@dataclass(frozen=True, eq=False)
class SquaredError(_Residual):
    """``F.mse_loss``. Its Hessian is 2 per element (not 1), the Fisher that of normal noise of variance 1/2."""

    weighted_mean: ClassVar[bool] = True

    def losses(self, predictions: Tensor) -> Tensor:
        """Return ``[r, ...]``."""
        return (predictions - self.target).square()

    def curvature(self) -> Tensor:
        """Return 2."""
        return torch.full_like(self.values(), 2)


@reads(F.l1_loss)
@dataclass(frozen=True, eq=False)
class AbsoluteError(_Residual):
    """``F.l1_loss``.

    Its Hessian is 0 wherever there is one, so a GGN would leave nothing but the damping. The curvature is the Fisher
    information of the distribution that the loss is the negative log-likelihood of, a Laplace distribution of scale 1
    around the prediction: 1 per element, the mean square of its gradient ``± 1``.
    """

    weighted_mean: ClassVar[bool] = True

    def losses(self, predictions: Tensor) -> Tensor:
        """Return ``[r, ...]``."""
        return (predictions - self.target).abs()

    def curvature(self) -> Tensor:
        """Return 1."""
        return torch.ones_like(self.values())

    def sampled_gradient(self, scale: Tensor, noise: Tensor) -> Tensor:
        """Return ``± sqrt(scale)``: the target is above or below the prediction with probability 1/2 each."""
        return self.at_elements(torch.where(noise < 0.5, -1.0, 1.0)) * self.root(scale)


@reads(F.huber_loss)
@dataclass(frozen=True, eq=False)
class HuberError(_Residual):
    """``F.huber_loss``: squared up to ``delta``, linear beyond.

    Beyond, the Hessian is 0: an outlier has no curvature.
    """

    delta: float = 1.0

    def losses(self, predictions: Tensor) -> Tensor:
        """Return ``[r, ...]``."""
        residual = predictions - self.target
        return F.huber_loss(residual, torch.zeros_like(residual), reduction="none", delta=self.delta)

    def curvature(self) -> Tensor:
        """Return 1 up to ``delta``, 0 beyond."""
        residual = self.residual()
        return (residual.abs() <= self.delta).to(residual.dtype)


@reads(F.smooth_l1_loss)
@dataclass(frozen=True, eq=False)
class SmoothAbsoluteError(_Residual):
    """``F.smooth_l1_loss`` with ``beta > 0``: the Huber loss over ``beta``."""

    beta: float = 1.0

    @classmethod
    def read(cls, output: Tensor, arguments: dict[str, Any]) -> LossCall | None:
        """Return the call; with ``beta=0`` torch takes it for the absolute error."""
        return super().read(output, arguments) if arguments["beta"] else AbsoluteError.read(output, arguments)

    def losses(self, predictions: Tensor) -> Tensor:
        """Return ``[r, ...]``."""
        residual = predictions - self.target
        return F.smooth_l1_loss(residual, torch.zeros_like(residual), reduction="none", beta=self.beta)

    def curvature(self) -> Tensor:
        """Return ``1 / beta`` up to ``beta``, 0 beyond."""
        residual = self.residual()
        return (residual.abs() < self.beta).to(residual.dtype) / self.beta


def all_arguments(function: Callable[..., Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments of a call that a torch function mode has intercepted, with the one torch loses.

    ``F.l1_loss`` of torch 2.13 hands its ``weight`` to no mode: the mode would run it without. It still stands in the
    frame of the intercepted call.
    """
    if function is not F.l1_loss or "weight" in kwargs:
        return kwargs
    weight = argument_of_caller(F.l1_loss, "weight")
    return kwargs if weight is None else {**kwargs, "weight": weight}
