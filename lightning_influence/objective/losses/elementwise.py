"""Losses of each element of predictions and targets of the same shape, ``[r, ...]``; their curvature is diagonal."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from lightning_influence.objective.losses.base import LossCall, reduction_of
from lightning_influence.objective.losses.output_curvature import Diagonal, OutputCurvature, root_of

_Elementwise = TypeVar("_Elementwise", bound="ElementwiseLoss")


@dataclass(frozen=True, eq=False)
class ElementwiseLoss(LossCall):
    """A loss of each element of ``input`` and ``target``. Fields of a subclass are arguments of its function.

    Attributes:
        element_weights: Weights of the elements, broadcastable to ``input``.
    """

    element_weights: Tensor | None = None

    weighted_mean: ClassVar[bool] = False
    """Whether a mean is over the weights (else over the elements)."""

    @classmethod
    def read(cls, output: Tensor, arguments: dict[str, Any]) -> LossCall | None:
        """Return the call, unless broadcasting pairs predictions with the targets of other examples."""
        pair = _paired(arguments["input"], arguments["target"])
        if pair is None:
            return None
        own = {field.name for field in fields(cls)[len(fields(ElementwiseLoss)) :]}
        options = {name: value for name, value in arguments.items() if name in own}
        return cls(output, *pair, reduction_of(arguments), element_weights=arguments.get("weight"), **options)

    @abstractmethod
    def losses(self, predictions: Tensor) -> Tensor:
        """Return the loss terms of given predictions, ``[r, ...]``, without the element weights."""

    @abstractmethod
    def curvature(self) -> Tensor:
        """Return the second derivative (or Fisher information) of every element, unweighted, detached."""

    def mean_target(self) -> Tensor:
        """Return the target that the model expects, ``[r, ...]``, detached."""
        return self.values()

    def signed(self) -> list[tuple[Tensor, float]]:
        """Return the tensors whose signed sum the loss is a function of."""
        return [(self.input, 1.0)]

    def counting(self: _Elementwise, counted: Tensor) -> _Elementwise:
        """Return the same call with weights of 0 for the elements that do not count."""
        weights = torch.ones((), device=counted.device) if self.element_weights is None else self.element_weights
        return replace(self, element_weights=torch.where(counted, weights.to(self.input.dtype), 0))

    def elements(self) -> Tensor:
        """Return ``[r, ...]``."""
        losses = self.losses(self.input)
        return losses if self.element_weights is None else losses * self.element_weights

    def weights(self) -> Tensor:
        """Return the element weights if a mean is over them, else ones."""
        if self.weighted_mean and self.element_weights is not None:
            return self.element_weights.expand_as(self.input)
        return torch.ones_like(self.input)

    def steady_divisor(self, n: int, *, alone: bool) -> float | None:
        """Return 1 if a mean is over elements and not over weights."""
        weighted = self.weighted_mean and self.element_weights is not None
        return None if weighted else super().steady_divisor(n, alone=alone)

    def curvatures(self, scale: Tensor) -> list[OutputCurvature]:
        """Return the diagonal in the prediction, or in the difference of two."""
        return [Diagonal(self.signed(), self.root(scale * self.curvature()))]

    def sampled(self, scale: Tensor, noise: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return the gradient with respect to the prediction, or opposite ones with respect to two."""
        gradient = self.sampled_gradient(scale, noise)
        return [(tensor, sign * gradient) for tensor, sign in self.signed()]

    def sampled_gradient(self, scale: Tensor, noise: Tensor) -> Tensor:
        """Return normal noise times the square root of ``scale`` times the curvature."""
        return self.normal(noise) * self.root(scale * self.curvature())

    def exact_draws(self, n: int) -> int | None:
        """Return the number of outputs of one example."""
        return math.prod(self.noise_shape(n))

    def statistics(self, n: int) -> dict[str, Tensor]:
        """Return the loss and the distance of target and prediction (as EL2N)."""
        difference = torch.where(self.counted(), self.mean_target() - self.target.detach(), 0)
        averaged = self._averaged(n, self.counted(), {"loss": self.losses(self.values()).detach()})
        return averaged | {"el2n": self.per_example(difference.square(), n).sqrt()}

    def normal(self, noise: Tensor) -> Tensor:
        """Turn uniform noise into standard normal numbers at the places of the elements."""
        # In the noise's own float64: rounded to float32, a uniform number can be 1 and the normal one infinite.
        return self.at_elements(torch.special.ndtri(noise))

    def root(self, values: Tensor) -> Tensor:
        """Return the square root of the elements' factors, the weights included."""
        whole, weights = values.expand_as(self.input), self.factors()
        return root_of(whole if weights is None else whole * weights)

    def factors(self) -> Tensor | None:
        """Return the weights of the elements, all that there are."""
        return self.element_weights

    def counted(self) -> Tensor:
        """Return which elements have a weight: others (padding) are no part of the statistics."""
        weights = self.factors()
        if weights is None:
            return torch.ones_like(self.input, dtype=torch.bool)
        return (weights > 0).expand_as(self.input)


def _paired(prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor] | None:
    """Broadcast input and target, if that leaves every example with its own target.

    ``[n, 1]`` and ``[n]`` make ``[n, n]``, every prediction with every target: nothing that examples could share out.
    """
    if prediction.shape == target.shape:
        return prediction, target
    if prediction.ndim == 0:
        return None
    rows_agree = prediction.ndim == target.ndim and prediction.shape[0] == target.shape[0]
    shape = torch.broadcast_shapes(prediction.shape, target.shape)
    if shape != prediction.shape and not rows_agree:
        return None
    return prediction.expand(shape), target.expand(shape)
