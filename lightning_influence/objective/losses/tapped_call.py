"""A tapped call of a loss function, and which of its elements belong to which example."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor

from lightning_influence.core.containers import sent
from lightning_influence.core.layout import BatchLayout
from lightning_influence.core.precision import working, working_dtype
from lightning_influence.objective.losses.picking import Picking, find_picking
from lightning_influence.objective.losses.shares import SIDE_BY_SIDE, Shares, picked_shares, share_out

_Call = TypeVar("_Call", bound="TappedCall")


@dataclass(frozen=True, eq=False)
class TappedCall:
    """A call as the tap saw it. Index legend: ``n`` examples, ``r`` rows of the input, ``...`` further positions.

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

    @property
    def predictions(self) -> tuple[Tensor, ...]:
        """The arguments that the curvature is about."""
        return (self.input,)

    @property
    def in_graph(self) -> bool:
        """Whether a prediction takes part in a gradient."""
        return any(tensor.requires_grad for tensor in self.predictions)

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

    @cached_property
    def picking(self) -> Picking | None:
        """Where the rows were picked from, if the batch picked them by index or mask."""
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
        picking = self.picking if self.follow else None
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
        there = noise.to(working_dtype(self.input.dtype))
        return self.shares(len(noise)).scatter(sent(there, self.input.device))

    def per_example(self, values: Tensor, n: int) -> Tensor:
        """Sum element values over each example's own rows and positions: ``[r, ...] -> [n]``."""
        return self.shares(n).gather(self.per_row(values)).flatten(1).sum(1)

    def per_row(self, values: Tensor) -> Tensor:
        """Bring element values to the dimensions that the examples share: here they have no others."""
        return values

    def values(self) -> Tensor:
        """Return the input in working precision, detached."""
        return working(self.input.detach())
