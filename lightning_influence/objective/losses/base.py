"""What every known loss call has to tell."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from lightning_influence.core.layout import BatchLayout
from lightning_influence.core.precision import working, working_dtype
from lightning_influence.objective.losses.output_curvature import OutputCurvature
from lightning_influence.objective.losses.picking import Picking, find_picking
from lightning_influence.objective.losses.shares import SIDE_BY_SIDE, Shares, picked_shares, share_out

_Call = TypeVar("_Call", bound="LossCall")
# What is another in every batch.
_OF_A_BATCH = {"output", "input", "target", "layout", "follow", "place", "_found"}


@dataclass(frozen=True, eq=False)
class LossCall(ABC):
    """One call of a known loss function, as seen by the tap. A loss is a subclass in a file of its own, see ``reads``.

    Attributes:
        output: What the call returned: a scalar for ``mean``/``sum``, one value per element for ``none``.
        input: Logits (log-probabilities for ``nll_loss``, predictions for ``mse_loss``), still in the graph.
        target: Targets of the call.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        layout: Where the examples are among the elements; if the batch picked the rows, in the tensor that they were
            picked from. None if that is not known.
        follow: Whether to follow rows to the tensor that they were picked from; not if that is one and the same for
            every batch (a table made from parameters).
        place: Where it was called, see ``scale.calling_place``.
    """

    output: Tensor
    input: Tensor
    target: Tensor
    reduction: str
    layout: BatchLayout | None = field(default=SIDE_BY_SIDE, kw_only=True)
    follow: bool = field(default=True, kw_only=True)
    place: tuple[tuple[str, int, int], ...] = field(default=(), kw_only=True)
    _found: dict[int, Shares | None] = field(default_factory=dict, init=False, repr=False)

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

        ``loss`` is the mean over the example's own elements without class weights in its scale; ``margin``, ``el2n``
        and ``wrong`` likewise; ``predicted`` and ``label`` (integers, -1 if ignored) and ``probabilities`` only if
        there is one class decision per example.
        """

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

    @property
    def predictions(self) -> tuple[Tensor, ...]:
        """The arguments that the curvature is about."""
        return (self.input,)

    @property
    def in_graph(self) -> bool:
        """Whether a prediction takes part in a gradient."""
        return any(tensor.requires_grad for tensor in self.predictions)

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
        if (self.input.dtype, self.input.device) != (other.input.dtype, other.input.device):
            return False
        settings = [(getattr(self, f.name), getattr(other, f.name)) for f in fields(self) if f.name not in _OF_A_BATCH]
        return all(a is b or (not isinstance(a, Tensor) and a == b) for a, b in settings)

    # ------------------------------------------------------------------------------------------------ whose is what

    def placed(self: _Call, layout: BatchLayout | None, *, follow: bool = True) -> _Call:
        """Return the same call with its examples elsewhere."""
        same = self.layout == layout and self.follow == follow
        return self if same else replace(self, layout=layout, follow=follow)

    @property
    def element_shape(self) -> torch.Size:
        """Shape of ``elements()``."""
        return self.input.shape

    def rows_match(self, n: int) -> bool:
        """Tell whether the rows of ``input`` can be shared out over ``n`` examples."""
        return self._located(n) is not None

    def shares(self, n: int) -> Shares:
        """Return which elements belong to which of ``n`` examples.

        Raises:
            ValueError: If that is not known, see ``rows_match``.
        """
        found = self._located(n)
        if found is None:
            raise ValueError(
                f"the {self.element_shape[0] if self.element_shape else 1} rows of a loss can't be shared out over a "
                f"batch of {n} examples."
            )
        return found

    def picking(self) -> Picking | None:
        """Return where the rows were picked from, if the batch picked them by index or mask."""
        return self._picking

    @cached_property
    def _picking(self) -> Picking | None:
        return find_picking(next((tensor for tensor in self.predictions if tensor.requires_grad), self.input))

    def _located(self, n: int) -> Shares | None:
        # Remembered, as a graph tells its indices only until it is freed.
        if n not in self._found:
            self._found[n] = self._locate(n)
        return self._found[n]

    def _locate(self, n: int) -> Shares | None:
        if n == 1:
            return share_out(self.element_shape, SIDE_BY_SIDE, n)
        if self.layout is None:
            return None
        picking = self._picking if self.follow else None
        if picking is None:
            return share_out(self.element_shape, self.layout, n)
        found = picking.owners(self.layout, n)
        dim = None if found is None else self._element_dim(found[0])
        if found is None or dim is None:
            return None
        return picked_shares(dim, found[1], self.element_shape, n, self.input.device)

    def _element_dim(self, dim: int) -> int | None:
        """Dimension of ``elements()`` that a dimension of ``input`` is."""
        return dim

    def noise_shape(self, n: int) -> tuple[int, ...]:
        """Return the shape of the uniform noise that one example's pseudo-label needs: one number per element."""
        return self.shares(n).shape

    def at_elements(self, noise: Tensor) -> Tensor:
        """Bring numbers ``[n, *noise_shape]`` from the host to the places of the elements, in working precision."""
        return self.shares(len(noise)).scatter(noise.to(self.input.device, working_dtype(self.input.dtype)))

    def per_example(self, values: Tensor, n: int) -> Tensor:
        """Sum element values over each example's own rows and positions: ``[r, ...] -> [n]``."""
        return self.shares(n).gather(self.per_row(values)).flatten(1).sum(1)

    def per_row(self, values: Tensor) -> Tensor:
        """Bring element values to the dimensions that the examples share: here they have no others."""
        return values

    def values(self) -> Tensor:
        """Return the input in working precision, detached."""
        return working(self.input.detach())

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
        return float(self.weights().sum()) / n

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
                one. Examples without have -1 (NaN in fractions).
        """
        number = self.per_example(counted.to(working_dtype(self.input.dtype)), n)
        result = {name: self.per_example(torch.where(counted, v, 0), n) / number for name, v in values.items()}
        shares = self.shares(n)
        if single(shares.shape):
            for name, value in (decided or {}).items():
                parts = shares.gather(value, math.nan if value.is_floating_point() else -1)
                result[name] = parts.reshape(n, *parts.shape[1 + len(shares.shape) :])
        return result


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
