"""What every known loss call has to tell."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from lightning_influence.core.precision import working_dtype
from lightning_influence.objective.losses.output_curvature import OutputCurvature
from lightning_influence.objective.losses.tapped_call import TappedCall

_Call = TypeVar("_Call", bound="LossCall")


@dataclass(frozen=True, eq=False)
class LossCall(TappedCall, ABC):
    """One call of a known loss function, and all that it says. A loss is a subclass of its own, see ``reads``."""

    @classmethod
    @abstractmethod
    def read(cls, output: Tensor, arguments: dict[str, Any]) -> LossCall | None:
        """Return a call with these arguments; None for a form that is not understood."""

    @abstractmethod
    def elements(self) -> Tensor:
        """Return the loss terms before reduction, rows first (class weights included)."""

    @abstractmethod
    def weights(self) -> Tensor:
        """Return each element's share of the denominator of a mean reduction, shaped like ``elements()``."""

    @abstractmethod
    def curvatures(self, scale: Tensor) -> list[OutputCurvature]:
        """Return the Hessian of the loss in its predictions, or where that is none to use the Fisher information.

        Args:
            scale: Weight of each element in its example's own loss, broadcastable to ``elements()``.
        """

    @abstractmethod
    def sampled(self, scale: Tensor, noise: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return predictions and gradients with respect to them whose outer product has ``curvatures`` as its mean.

        Args:
            scale: See ``curvatures``.
            noise: Uniform float64 numbers in (0, 1), ``[n, *noise_shape]``, independent for each example.

        Returns:
            Each prediction with a gradient of its shape. For the logistic loss it is the gradient for a label drawn
            from the model times the square root of the element's weight.
        """

    @abstractmethod
    def exact_draws(self, n: int) -> int | None:
        """Return the number of columns of ``exact``, or None if they are too many."""

    @abstractmethod
    def statistics(self, n: int) -> dict[str, Tensor]:
        """Return what the training dynamics record, each ``[n]`` (``probabilities``: ``[n, c]``), detached.

        ``loss`` is the mean over the example's own elements without class weights in its scale; ``margin``, ``el2n``,
        ``wrong`` and ``probability`` (of the given label) likewise; ``predicted`` and ``label`` (integers, -1 if
        ignored) and ``probabilities`` only if there is one class decision per example.
        """

    def decided(self, n: int) -> dict[str, Tensor]:
        """Return ``predicted`` and ``label`` of ``statistics`` alone, if there is one class decision per example."""
        return {}

    @abstractmethod
    def counting(self: _Call, counted: Tensor) -> _Call:
        """Return the same call in which only some elements count, the others being ignored as by ``ignore_index``.

        Args:
            counted: Bool, shaped like what the call returned with ``reduction="none"``.
        """

    def log_odds(self, n: int, positive: int | None = None) -> Tensor | None:
        """Return ``log p / (1 - p)`` of one class for every example, ``[n]``, in the graph.

        Args:
            n: Number of examples.
            positive: The class; None is each example's given label.

        Returns:
            NaN for examples without a label, where it is asked for; None unless every example makes one class decision.

        Raises:
            ValueError: If there is no such class.
        """
        return None

    def exact(self, scale: Tensor, n: int) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """Yield the columns of a square root of the curvature of every example, as predictions and their gradients."""
        for curvature in self.curvatures(scale):
            for column in curvature.columns(self.shares(n)):
                yield [(tensor, sign * column) for tensor, sign in curvature.tensors]

    def gradients(self, curvatures: Sequence[OutputCurvature], scale: Tensor) -> list[Tensor]:
        """Return the gradient in what each of ``curvatures(scale)`` is about, computed anew from the predictions."""
        about = [curvature.tensors[0] for curvature in curvatures]
        with torch.enable_grad():
            whole = (self.elements() * scale.detach()).sum()
        found = torch.autograd.grad(whole, [tensor for tensor, _ in about])
        return [sign * gradient for (_, sign), gradient in zip(about, found, strict=True)]

    # -------------------------------------------------------------------------------------- rows of several batches

    def single_rows(self, n: int) -> bool:
        """Tell whether the rows are those of ``n`` examples, one each and in their order, with one label each."""
        return False

    def copied(self: _Call) -> _Call:
        """Return the call with copies of logits and labels, outside of the graph: what follows may overwrite them."""
        return replace(self, output=self.output.detach(), input=self.input.detach().clone(), target=self.target.clone())

    def alike(self, other: LossCall) -> bool:
        """Tell whether the rows of another call can be joined with this one's."""
        if type(self) is not type(other) or self.input.shape[1:] != other.input.shape[1:]:
            return False
        if self.input.dtype != other.input.dtype or self.input.device != other.input.device:
            return False
        settings = [(getattr(self, name), getattr(other, name)) for name in _settings(type(self))]
        return all([a is b or (not isinstance(a, Tensor) and a == b) for a, b in settings])

    # ------------------------------------------------------------------------------------------------------ weights

    def scale(self, coefficient: Tensor, n: int, reference: float | None = None) -> Tensor:
        """Return the weight of each element in its example's own loss ``ℓ``, where the batch loss is the mean of ℓ.

        Args:
            coefficient: Derivative of the batch loss with respect to ``output``.
            n: Number of examples in the batch.
            reference: Of a mean, the mean weight per example of the whole training set; by default that of this batch.

        Returns:
            Scalar, or one weight per element for ``reduction="none"``.
        """
        if self.reduction != "mean":
            return n * coefficient
        return coefficient / (self.mean_weight(n) if reference is None else reference)

    def mean_weight(self, n: int) -> float:
        """Return the sum of weights per example, which a mean divides by (1 for plain cross-entropy)."""
        return float(self.weight()) / n

    def weight(self) -> Tensor:
        """Return the sum of weights."""
        weights = self.weights()
        return weights.sum(dtype=working_dtype(weights.dtype))

    def steady_divisor(self, n: int, *, alone: bool) -> float | None:
        """Return ``mean_weight`` of a mean if it follows from shapes alone, and can't be another in other batches.

        A mean over weights or ignored targets can; so can one over positions, whose number may depend on the longest
        example of the batch.

        Args:
            n: Number of examples in the batch.
            alone: Whether the loss is made of nothing else.
        """
        shape = self.element_shape
        one_row_each = len(shape) <= 2 and math.prod(shape[:1]) == n
        return math.prod(shape) / n if self.reduction == "mean" and one_row_each and self.rows_match(n) else None

    def _averaged(
        self, n: int, counted: Tensor, values: dict[str, Tensor], decided: dict[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Average element values over each example's own counted elements.

        Args:
            n: Number of examples.
            counted: Bool, which elements count.
            values: ``[r, ...]``.
            decided: Of class decisions, ``[r, ...]`` or ``[r, ..., c]``; left out unless each example makes at most
                one. Examples without have -1 (NaN in fractions). Where an example makes several, the largest loss
                of one of them is ``worst``.
        """
        number = self.per_example(counted.to(working_dtype(self.input.dtype)), n)
        result = {name: self.per_example(torch.where(counted, v, 0), n) / number for name, v in values.items()}
        shares = self.shares(n)
        if single(shares.shape):
            result |= self._of_decisions(n, decided or {})
        elif decided and math.prod(shares.shape):
            worst = shares.gather(torch.where(counted, values["loss"], -math.inf), -math.inf).flatten(1).amax(1)
            result["worst"] = torch.where(number > 0, worst, math.nan)
        return result

    def _of_decisions(self, n: int, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Bring what is known of the one decision of every example from its element, ``[n, ...]``."""
        shares, result = self.shares(n), {}
        for name, value in values.items():
            parts = shares.gather(value, math.nan if value.is_floating_point() else -1)
            result[name] = parts.reshape(n, *parts.shape[1 + len(shares.shape) :])
        return result


@cache
def _settings(kind: type[LossCall]) -> list[str]:
    """Return the fields that a loss has of its own."""
    return [field.name for field in fields(kind)[len(fields(TappedCall)) :]]


def single(shape: Sequence[int]) -> bool:
    """Tell whether shares of this shape hold one element."""
    return math.prod(shape) == 1


def reduction_of(arguments: dict[str, Any]) -> str:
    """Return the reduction that a call asks for."""
    if arguments.get("size_average") is None and arguments.get("reduce") is None:
        return str(arguments["reduction"])
    # size_average/reduce are deprecated but still obeyed by torch, whatever `reduction` says.
    if arguments["reduce"] is False:
        return "none"
    return "sum" if arguments["size_average"] is False else "mean"
