"""The exact Hessian, by products."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from lightning_influence.curvature.products.product import CurvatureProduct, objective
from lightning_influence.objective.terms import BatchLoss


class HessianProduct(CurvatureProduct):
    """The Hessian of the mean loss, by differentiating the gradient once more (Pearlmutter 1994).

    Any loss will do, also one with penalties on the weights. It is indefinite unless the model is convex:
    ``spectrum.require_positive_definite`` tells whether a damping makes up for that.
    """

    semidefinite: ClassVar[bool] = False

    def _outputs(self, loss: BatchLoss) -> tuple[list[Tensor], list[Tensor]]:
        return objective(loss)

    def _linearise(self, loss: BatchLoss) -> Callable[[Tensor], Tensor]:
        gradient = self._twice.gradient(*objective(loss), create_graph=True)
        if not gradient.requires_grad:  # the loss is linear in the parameters
            return torch.zeros_like
        return lambda v: self._twice.gradients([gradient], [v])
