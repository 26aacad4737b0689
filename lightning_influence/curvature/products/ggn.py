"""The generalised Gauss-Newton matrix, by products.

Index legend: ``q`` vectors multiplied at a time, ``n`` examples of a batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from lightning_influence.core.precision import working
from lightning_influence.curvature.products.product import CurvatureProduct
from lightning_influence.objective.losses import OutputCurvature
from lightning_influence.objective.terms import BatchLoss, TaskError


class GGNProduct(CurvatureProduct):
    """The generalised Gauss-Newton matrix ``1/N Σ Jᵀ H J`` (Schraudolph 2002): positive semidefinite.

    ``J`` is the Jacobian of the inputs of the loss calls (logits, predictions) with respect to the parameters, ``H``
    the Hessian of the example's own loss in them, see ``LossCall.curvatures``; for log-probabilities that of the logits
    they came from. Several calls add up. For softmax cross-entropy and squared errors it is the Fisher of the model.

    Raises:
        TaskError: If the loss is not made of known calls alone, or a target depends on the parameters.
        ValueError: If a call enters the loss with a negative weight.
    """

    semidefinite: ClassVar[bool] = True

    def _check(self, loss: BatchLoss) -> None:
        if not loss.tapped:
            part = "has a part besides them (a penalty, an unknown loss)" if loss.terms else "has none of them"
            raise TaskError(
                "the GGN needs a loss made of known calls (F.cross_entropy, F.mse_loss and the like); this one "
                f"{part}. Leave penalties to the optimizer's weight decay and the damping, pass a `task=` (`loss=` of "
                "`Influence`) with the plain loss, or use the Hessian."
            )

    def _outputs(self, loss: BatchLoss) -> tuple[list[Tensor], list[Tensor]]:
        outputs = [tensor for curvature in _curvatures(loss) for tensor, _ in _in_graph(curvature)]
        return outputs, [torch.randn_like(output) for output in outputs]

    def _linearise(self, loss: BatchLoss) -> Callable[[Tensor], Tensor]:
        curvatures = _curvatures(loss)
        outputs = [tensor for curvature in curvatures for tensor, _ in _in_graph(curvature)]
        # Jᵀu is linear in u, so its derivative with respect to u is J, wherever u is.
        dummies = [torch.zeros_like(output, requires_grad=True) for output in outputs]
        pulled = self._twice.gradient(outputs, dummies, create_graph=True)
        if not pulled.requires_grad:  # no output depends on the chosen parameters
            return torch.zeros_like

        def multiply(v: Tensor) -> Tensor:
            pushed = iter(self._twice.pull_back([pulled], dummies, [v]))
            bent: list[Tensor] = []
            for curvature in curvatures:
                own = [(next(pushed), sign) for _, sign in _in_graph(curvature)]
                product = curvature.multiply(torch.stack([working(value) * sign for value, sign in own]).sum(0))
                bent += [(product * sign).to(value.dtype) for value, sign in own]
            return self._twice.gradients(outputs, bent)

        return multiply


def _curvatures(loss: BatchLoss) -> list[OutputCurvature]:
    """Return the curvature of every term in its predictions, as far as these are in the graph of the model.

    Raises:
        TaskError: If a target that has to be fixed depends on the parameters.
        ValueError: If a weight is negative.
    """
    found: list[OutputCurvature] = []
    for term in loss.terms:
        call = term.call
        if call.target.requires_grad and not any(call.target is tensor for tensor in call.predictions):
            raise TaskError(
                "the target of a loss call depends on the parameters: the GGN is defined for fixed targets only. "
                "Detach it, or use the Hessian."
            )
        found += call.curvatures(term.scale(loss.n).detach())
    return [curvature for curvature in found if _in_graph(curvature)]


def _in_graph(curvature: OutputCurvature) -> list[tuple[Tensor, float]]:
    return [(tensor, sign) for tensor, sign in curvature.tensors if tensor.requires_grad]
