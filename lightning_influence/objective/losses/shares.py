"""Which elements of a loss belong to which example.

Rows are shared out evenly where a ``BatchLayout`` says how: side by side, or one of each example in turn. Of rows that
the batch picks (``logits[mask]``, a packed sequence, see ``picking``) every example may have another number.

Index legend: ``n`` examples, ``m`` rows of one example, ``...`` further positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from lightning_influence.core.layout import BatchLayout

SIDE_BY_SIDE = BatchLayout(0, "major")
"""Rows first, those of one example side by side; one row per example is the plain case."""


@dataclass(frozen=True)
class EvenShares:
    """The same number of rows for every example.

    Attributes:
        layout: Where the examples are among the elements.
        elements: Shape of the elements.
        n: Number of examples.
    """

    layout: BatchLayout
    elements: torch.Size
    n: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape ``[m, ...]`` of one example's share."""
        rest = [size for dim, size in enumerate(self.elements) if dim != self.layout.dim]
        return (self.elements[self.layout.dim] // self.n, *rest)

    def gather(self, values: Tensor, fill: float = 0) -> Tensor:
        """Bring element values to their examples, ``[n, m, ...]``; nothing is missing, so ``fill`` is not used."""
        return self.layout.by_example(values, self.n)

    def scatter(self, parts: Tensor) -> Tensor:
        """Bring ``[n, m, ...]`` to the places of the elements."""
        rows = parts.transpose(0, 1) if self.layout.order == "minor" else parts
        return rows.flatten(0, 1).movedim(0, self.layout.dim)


@dataclass(frozen=True, eq=False)
class PickedShares:
    """Rows that were picked, any number for each example.

    Attributes:
        dim: Dimension of the elements that holds the rows.
        owner: Example of every row.
        place: Number of every row within its example's share.
        elements: Shape of the elements.
        n: Number of examples.
    """

    dim: int
    owner: Tensor
    place: Tensor
    elements: torch.Size
    n: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape ``[m, ...]`` of the largest share."""
        rest = [size for dim, size in enumerate(self.elements) if dim != self.dim]
        return (int(self.place.max()) + 1 if len(self.place) else 0, *rest)

    def gather(self, values: Tensor, fill: float = 0) -> Tensor:
        """Bring element values to their examples, ``[n, m, ...]``; smaller shares are filled up."""
        moved = values.movedim(self.dim, 0)
        parts = moved.new_full((self.n, self.shape[0], *moved.shape[1:]), fill)
        return parts.index_put((self.owner, self.place), moved)

    def scatter(self, parts: Tensor) -> Tensor:
        """Bring ``[n, m, ...]`` to the places of the elements."""
        return parts[self.owner, self.place].movedim(0, self.dim)


Shares: TypeAlias = EvenShares | PickedShares


def share_out(elements: torch.Size, layout: BatchLayout, n: int) -> EvenShares | None:
    """Return even shares, or None if elements of this shape can't be shared out so."""
    fits = layout.fits(elements, n) and elements[layout.dim] > 0
    return EvenShares(layout, elements, n) if fits else None


def picked_shares(dim: int, owner: Tensor, elements: torch.Size, n: int, device: torch.device) -> Shares | None:
    """Return the shares of rows with the given owners; even ones if they are."""
    if dim >= len(elements) or len(owner) != elements[dim]:
        return None
    rows, rest = divmod(len(owner), n)
    if rows and not rest and torch.equal(owner, torch.arange(n).repeat_interleave(rows)):
        return EvenShares(BatchLayout(dim, "major"), elements, n)
    order = owner.argsort(stable=True)
    counts = torch.bincount(owner, minlength=n)
    starts = counts.cumsum(0) - counts
    place = torch.empty_like(owner)
    place[order] = torch.arange(len(owner)) - starts[owner[order]]
    return PickedShares(dim, owner.to(device), place.to(device), elements, n)
