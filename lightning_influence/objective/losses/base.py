"""What every known loss call has to tell."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from lightning_influence.core.layout import BatchLayout
from lightning_influence.core.precision import working, working_dtype
from lightning_influence.objective.losses.picking import Picking, find_picking
from lightning_influence.objective.losses.shares import SIDE_BY_SIDE, Shares, picked_shares, share_out

_Call = TypeVar("_Call", bound="LossCall")
_Elementwise = TypeVar("_Elementwise", bound="ElementwiseLoss")


@dataclass(frozen=True, eq=False)
class LossCall(ABC):
    """One call of a known loss function, as seen by the tap.

    Attributes:
        output: What the call returned: a scalar for ``mean``/``sum``, one value per element for ``none``.
        input: Logits (log-probabilities for ``nll_loss``, predictions for ``mse_loss``), still in the graph.
        target: Targets of the call.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        layout: Where the examples are among the elements; if the batch picked the rows, in the tensor that they were
            picked from. None if that is not known.
        follow: Whether to follow rows to the tensor that they were picked from; not if that is one and the same for
            every batch (a table made from parameters).
        place: Where it was called, see ``loss_scale.calling_place``.
    """

    output: Tensor
    input: Tensor
    target: Tensor
    reduction: str
    layout: BatchLayout | None = field(default=SIDE_BY_SIDE, kw_only=True)
    follow: bool = field(default=True, kw_only=True)
    place: tuple[tuple[str, int, int], ...] = field(default=(), kw_only=True)
    _found: dict[int, Shares | None] = field(default_factory=dict, init=False, repr=False)

    @abstractmethod
    def elements(self) -> Tensor:
        """Return the loss terms before reduction, rows first (class weights included)."""

    @abstractmethod
    def weights(self) -> Tensor:
        """Return each element's share of the denominator of a mean reduction, shaped like ``elements()``."""

    @abstractmethod
    def sampled_gradient(self, scale: Tensor, noise: Tensor) -> Tensor:
        """Return a gradient with respect to ``input`` whose outer product has the loss Hessian as its mean.

        Args:
            scale: Weight of each element in its example's own loss, broadcastable to ``elements()``.
            noise: Uniform float64 numbers in (0, 1), ``[n, *noise_shape]``, independent for each example.

        Returns:
            Tensor shaped like ``input``. For the softmax and logistic losses this is the gradient for a label
            drawn from the model times the square root of the element's weight.
        """

    @abstractmethod
    def exact_draws(self, n: int) -> int | None:
        """Return how many columns the exact square root of an example's loss Hessian has, or None if too many."""

    @abstractmethod
    def exact_gradients(self, scale: Tensor, n: int) -> Iterator[Tensor]:
        """Yield the columns of a square root of every example's loss Hessian, each shaped like ``input``."""

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

    def sampled(self, scale: Tensor, noise: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return the tensors that ``sampled_gradient`` is about, each with its gradient: ``input`` and no other."""
        return [(self.input, self.sampled_gradient(scale, noise))]

    def exact(self, scale: Tensor, n: int) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """Yield the columns of ``exact_gradients``, each as tensors and their gradients."""
        for column in self.exact_gradients(scale, n):
            yield [(self.input, column)]

    @property
    def in_graph(self) -> bool:
        """Whether what the curvature is about takes part in a gradient."""
        return self.input.requires_grad

    # ------------------------------------------------------------------------------------------- whose is what

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

    def at_elements(self, noise: Tensor) -> Tensor:
        """Bring numbers ``[n, *noise_shape]`` from the host to the places of the elements, in working precision."""
        return self.shares(len(noise)).scatter(noise.to(self.input.device, working_dtype(self.input.dtype)))

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
        return find_picking(self.input)

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
        picking = self.picking() if self.follow else None
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

    def per_example(self, values: Tensor, n: int) -> Tensor:
        """Sum element values over each example's own rows and positions: ``[r, ...] -> [n]``."""
        return self.shares(n).gather(self.per_row(values)).flatten(1).sum(1)

    def per_row(self, values: Tensor) -> Tensor:
        """Bring element values to the dimensions that the examples share: here they have no others."""
        return values

    # -------------------------------------------------------------------------------------------------- weights

    def scale(self, coefficient: Tensor, n: int, reference: float | None = None) -> Tensor:
        """Return the weight of each element in its example's own loss ``ℓ``, where the batch loss is the mean of ℓ.

        Args:
            coefficient: Derivative of the batch loss with respect to ``output``.
            n: Number of examples in the batch.
            reference: Mean weight per example (``mean``) or batch size (``sum``) of the whole training set; by
                default that of this batch. See ``batch_reference``.

        Returns:
            Scalar, or one weight per element for ``reduction="none"``.
        """
        if self.reduction == "none":
            return n * coefficient
        value = self.batch_reference(n) if reference is None else reference
        return coefficient * value if self.reduction == "sum" else coefficient / value

    def batch_reference(self, n: int) -> float:
        """Return the number that makes this call's scale depend on the batch it was made with.

        For ``mean`` it is the sum of weights per example (1 for plain cross-entropy), for ``sum`` the batch size.
        """
        if self.reduction == "sum":
            return float(n)
        return float(self.weights().sum()) / n if self.reduction == "mean" else 1.0

    def scale_varies(self, n: int) -> bool:
        """Tell whether the same example would weigh differently in another batch.

        A sum grows with the batch; a mean is over weights, or over positions whose number may depend on the longest
        example of the batch.
        """
        return self.reduction == "sum" or (self.reduction == "mean" and self._positions_vary(n))

    def steady_divisor(self, n: int, *, alone: bool) -> float | None:
        """Return ``batch_reference`` of a mean if it follows from shapes alone, and can't be another in other batches.

        Args:
            n: Number of examples in the batch.
            alone: Whether the loss is made of nothing else.
        """
        known = self.reduction == "mean" and self.rows_match(n) and not self.scale_varies(n)
        return math.prod(self.element_shape) / n if known else None

    def _positions_vary(self, n: int) -> bool:
        shape = self.element_shape
        return len(shape) > 2 or math.prod(shape[:1]) != n

    def _mean(self, values: Tensor, mask: Tensor, n: int) -> Tensor:
        """Average element values over each example's own counted elements."""
        mask = mask.to(values.dtype)
        return self.per_example(torch.where(mask > 0, values, 0) * mask, n) / self.per_example(mask, n)


@dataclass(frozen=True, eq=False)
class ElementwiseLoss(LossCall):
    """A loss of each element of ``input`` and ``target``, of the same shape: ``[r, ...]``; its Hessian is diagonal.

    Attributes:
        element_weights: Weights of the elements, broadcastable to ``input``.
    """

    element_weights: Tensor | None = None

    weighted_mean: ClassVar[bool] = False
    """Whether a mean is over the weights (else over the elements)."""

    @abstractmethod
    def plain(self) -> Tensor:
        """Return the loss terms without the element weights."""

    @abstractmethod
    def curvature(self) -> Tensor:
        """Return the second derivative (or Fisher information) of every element, unweighted, detached."""

    def counting(self: _Elementwise, counted: Tensor) -> _Elementwise:
        """Return the same call with weights of 0 for the elements that do not count."""
        weights = torch.ones((), device=counted.device) if self.element_weights is None else self.element_weights
        return replace(self, element_weights=torch.where(counted, weights.to(self.input.dtype), 0))

    def elements(self) -> Tensor:
        """Return ``[r, ...]``."""
        return self.plain() if self.element_weights is None else self.plain() * self.element_weights

    def weights(self) -> Tensor:
        """Return the element weights if a mean is over them, else ones."""
        if self.weighted_mean and self.element_weights is not None:
            return self.element_weights.expand_as(self.input)
        return torch.ones_like(self.input)

    def sampled_gradient(self, scale: Tensor, noise: Tensor) -> Tensor:
        """Return normal noise times the square root of ``scale`` times the Hessian."""
        return self.normal(noise) * self._root(scale * self.curvature())

    def exact_draws(self, n: int) -> int | None:
        """Return the number of outputs of one example."""
        return math.prod(self.noise_shape(n))

    def exact_gradients(self, scale: Tensor, n: int) -> Iterator[Tensor]:
        """Yield one column per output."""
        yield from self._columns(self._root(scale * self.curvature()), n)

    def scale_varies(self, n: int) -> bool:
        """Tell whether the same example would weigh differently in another batch."""
        weighted = self.reduction == "mean" and self.weighted_mean and self.element_weights is not None
        return weighted or super().scale_varies(n)

    def normal(self, noise: Tensor) -> Tensor:
        """Turn uniform noise into standard normal numbers at the places of the elements."""
        # In the noise's own float64: rounded to float32, a uniform number can be 1 and the normal one infinite.
        return self.at_elements(torch.special.ndtri(noise))

    def values(self) -> Tensor:
        """Return the input in working precision, detached."""
        return working(self.input.detach())

    def _root(self, values: Tensor) -> Tensor:
        """Square root of the elements' factors, the weights included."""
        whole = values.expand_as(self.input)
        return root_of(whole if self.element_weights is None else whole * self.element_weights)

    def _columns(self, diagonal: Tensor, n: int) -> Iterator[Tensor]:
        """Yield, for each entry of one example's part of ``diagonal: [r, ...]``, a tensor with everything else 0."""
        shares = self.shares(n)
        parts = shares.gather(diagonal)
        flat = parts.flatten(1)
        for k in range(flat.shape[1]):
            column = torch.zeros_like(flat)
            column[:, k] = flat[:, k]
            yield shares.scatter(column.view(parts.shape))

    def _counted(self) -> Tensor:
        """Elements that have a weight: others (padding) are no part of the statistics."""
        if self.element_weights is None:
            return torch.ones_like(self.input, dtype=torch.bool)
        return (self.element_weights > 0).expand_as(self.input)

    def _distance(self, difference: Tensor, n: int) -> Tensor:
        """Length of each example's vector of differences."""
        return self.per_example(torch.where(self._counted(), difference, 0).square(), n).sqrt()


def root_of(values: Tensor) -> Tensor:
    """Return square roots of weights.

    Raises:
        ValueError: If one is negative.
    """
    if bool((values < 0).any()):
        raise ValueError(
            f"a loss term enters the batch loss with a negative weight ({float(values.min()):.3g}); the Fisher and the "
            'GGN need weights >= 0. Pass `fisher="empirical"`, or a `task=` whose loss leaves that term out.'
        )
    return values.sqrt()


def decisions(values: dict[str, Tensor], shares: Shares) -> dict[str, Tensor]:
    """Bring values of class decisions ``[r, ...]`` (``[r, ..., c]``), at most one per example, to ``[n]`` (``[n, c]``).

    Examples without a decision have -1 in it (NaN in fractions).
    """
    result: dict[str, Tensor] = {}
    for name, value in values.items():
        parts = shares.gather(value, math.nan if value.is_floating_point() else -1)
        result[name] = parts.reshape(len(parts), *parts.shape[1 + len(shares.shape) :])
    return result


def single(shape: Sequence[int]) -> bool:
    """Tell whether shares of this shape hold one element."""
    return math.prod(shape) == 1
