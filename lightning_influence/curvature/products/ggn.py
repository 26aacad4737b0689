"""The generalised Gauss-Newton matrix, by products.

Index legend: ``q`` vectors multiplied at a time, ``n`` examples of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_influence.core.precision import working
from lightning_influence.curvature.products.product import CurvatureProduct
from lightning_influence.objective.losses import (
    AbsoluteError,
    CrossEntropy,
    Divergence,
    ElementwiseLoss,
    HuberError,
    NormalLikelihood,
    SmoothAbsoluteError,
    SquaredError,
)
from lightning_influence.objective.terms import BatchLoss, LossTerm, TaskError


class GGNProduct(CurvatureProduct):
    """The generalised Gauss-Newton matrix ``1/N Σ Jᵀ H J`` (Schraudolph 2002): positive semidefinite.

    ``J`` is the Jacobian of the inputs of the loss calls (logits, predictions) with respect to the parameters, ``H``
    the Hessian of the example's own loss in them; for log-probabilities that of the logits they came from. Several
    calls add up. For softmax cross-entropy and squared errors it is the Fisher of the model.

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
                f"{part}. Leave penalties to the optimizer's weight decay and the damping, pass a `task=` with the "
                "plain loss, or use the Hessian."
            )

    def _outputs(self, loss: BatchLoss) -> tuple[list[Tensor], list[Tensor]]:
        outputs = [tensor for term in loss.terms for bend in _bends(term, loss.n) for tensor, _ in bend.tensors]
        return outputs, [torch.randn_like(output) for output in outputs]

    def _linearise(self, loss: BatchLoss) -> Callable[[Tensor], Tensor]:
        tensors = list(self.flat.parameters.values())
        bends = [bend for term in loss.terms for bend in _bends(term, loss.n)]
        outputs = [tensor for bend in bends for tensor, _ in bend.tensors]
        # Jᵀu is linear in u, so its derivative with respect to u is J, wherever u is.
        dummies = [torch.zeros_like(output, requires_grad=True) for output in outputs]
        pulled = self._line(
            torch.autograd.grad(outputs, tensors, dummies, create_graph=True, allow_unused=True, materialize_grads=True)
        )
        if not pulled.requires_grad:  # no output depends on the chosen parameters
            return torch.zeros_like

        def multiply(v: Tensor) -> Tensor:
            pushed = iter(self._pull_back([pulled], dummies, [v]))
            bent: list[Tensor] = []
            for bend in bends:
                own = [(next(pushed), sign) for _, sign in bend.tensors]
                change = torch.stack([working(value) * sign for value, sign in own]).sum(0)
                product = bend.multiply(change, self._pull_back)
                bent += [(product * sign).to(value.dtype) for value, sign in own]
            return self._line(self._pull_back(outputs, tensors, bent), 1)

        return multiply


_PullBack = Callable[[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]], tuple[Tensor, ...]]
# Losses of ``input - target``, either of which may be the prediction.
_RESIDUALS = (AbsoluteError, HuberError, SmoothAbsoluteError, SquaredError)


@dataclass(frozen=True, eq=False)
class _Bend:
    """The curvature of a loss term in a signed sum of tensors of one shape.

    Attributes:
        tensors: The tensors, in the graph of the model, and their signs.
        multiply: Turns changes of the sum ``[q, *shape]`` into changes of the slope, for all examples of the batch.
    """

    tensors: list[tuple[Tensor, float]]
    multiply: Callable[[Tensor, _PullBack], Tensor]


def _bends(term: LossTerm, n: int) -> list[_Bend]:
    """Return the curvature of a term as its loss defines it: the Hessian in the logits, or the Fisher information.

    Raises:
        TaskError: If a target that has to be fixed depends on the parameters.
        ValueError: If a weight is negative.
    """
    call, scale = term.call, term.scale(n).detach()
    if bool((scale < 0).any()):
        raise ValueError(
            f"a loss term enters the batch loss with a negative weight ({float(scale.min()):.3g}); the GGN needs "
            "weights >= 0. Use the Hessian, or a `task=` whose loss leaves that term out."
        )
    if call.target.requires_grad and not isinstance(call, _RESIDUALS):
        raise TaskError(
            "the target of a loss call depends on the parameters: the GGN is defined for fixed targets only. Detach "
            "it, or use the Hessian."
        )
    if not isinstance(call, ElementwiseLoss):
        return [_Bend([(call.input, 1.0)], _softmax_bend(term, scale))]
    bends = []
    either = [(call.input, 1.0), *([(call.target, -1.0)] if isinstance(call, _RESIDUALS) else [])]
    in_graph = [(tensor, sign) for tensor, sign in either if tensor.requires_grad]
    if in_graph:
        bends.append(_Bend(in_graph, _diagonal_bend(call._root(scale * call.curvature()).square())))
    if isinstance(call, NormalLikelihood) and call.variance is not None and call.variance.requires_grad:
        passed = working(call.variance.detach())
        column = passed if passed.ndim == call.input.ndim else passed.unsqueeze(-1)
        information = scale / (2 * column.clamp(min=call.eps).expand_as(call.input).square())
        shared = information.expand_as(call.input).sum_to_size(column.shape).view(passed.shape)
        bends.append(_Bend([(call.variance, 1.0)], _diagonal_bend(shared)))
    return bends


def _diagonal_bend(factor: Tensor) -> Callable[[Tensor, _PullBack], Tensor]:
    return lambda change, _: change * factor


def _softmax_bend(term: LossTerm, scale: Tensor) -> Callable[[Tensor, _PullBack], Tensor]:
    """Return the product with the Hessian in the logits, by differentiating the loss twice in them."""
    call = term.call
    at = working(call.input.detach()).requires_grad_(True)
    if isinstance(call, CrossEntropy):
        # In log-probabilities the loss is linear. But they are logits, too, of the same distribution.
        target = working(call.target) if call.target.is_floating_point() else call.target
        weights = None if call.class_weights is None else working(call.class_weights)
        logits = replace(call, input=at, target=target, class_weights=weights, log_probabilities=False)
        values = logits.elements() * scale
    elif isinstance(call, Divergence):
        values = F.cross_entropy(at, working(call.target) * scale, reduction="none")
    else:
        raise TaskError(f"the GGN of {type(call).__name__} is not known; use the Hessian.")
    (slope,) = torch.autograd.grad(values.sum(), at, create_graph=True)
    return lambda change, pull_back: pull_back([slope], [at], [change.to(at.dtype)])[0]
