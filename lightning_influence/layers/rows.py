"""Rows of activations or output gradients, one-hot ones without their zeros.

An embedding is a linear layer on one-hot rows: the gradient of example ``n`` is ``Σ_s e_id x_sᵀ``, where ``x_s`` is the
gradient that reached the looked-up vector. A parameter used both as an embedding and as a linear layer has rows of
both kinds.

Index legend: ``k`` groups, ``n`` examples, ``s`` positions, ``o`` size of a row.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias, overload

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, eq=False)
class OneHot:
    """Rows ``[1, n, s, o]`` that are 1 at one place and 0 elsewhere.

    Attributes:
        indices: Where the 1 is, ``[n, s]``.
        size: Length ``o`` of a row.
        distinct: Whether no two positions of an example share an index.
        kept: ``[n, s]`` bool; the other rows are all zero (padding), and so are their activations. None keeps all.
    """

    indices: Tensor
    size: int
    distinct: bool = False
    kept: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        """``[1, n, s, o]``."""
        return torch.Size((1, *self.indices.shape, self.size))

    def keep(self, examples: Tensor) -> OneHot:
        """Zero the rows of the examples that ``[n]`` bool leaves out."""
        kept = examples.unsqueeze(1).expand_as(self.indices)
        return OneHot(self.indices, self.size, self.distinct, kept if self.kept is None else kept & self.kept)


@dataclass(frozen=True, eq=False)
class Joined:
    """One-hot rows followed, along the positions, by dense ones ``[1, n, s, o]``."""

    onehot: OneHot
    dense: Tensor

    @property
    def shape(self) -> torch.Size:
        """``[1, n, s, o]``, the positions of both counted."""
        k, n, s, o = self.dense.shape
        return torch.Size((k, n, s + self.onehot.shape[2], o))

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Split the activations ``[1, n, s, i]`` that belong to these rows into those of the two parts."""
        first = self.onehot.shape[2]
        return x[:, :, :first], x[:, :, first:]


Rows: TypeAlias = "Tensor | OneHot | Joined"
"""Output gradients ``[k, n, s, o]`` of a block, dense or one-hot."""


def join(rows: Sequence[Tensor | OneHot]) -> Rows:
    """Lay rows end to end along the positions; one-hot rows have to come first."""
    dense = [part for part in rows if isinstance(part, Tensor)]
    onehot = [part for part in rows if isinstance(part, OneHot)]
    if not onehot:
        return dense[0] if len(dense) == 1 else torch.cat(dense, 2)
    first = onehot[0]
    if len(onehot) > 1:
        all_kept = all(part.kept is None for part in onehot)
        kept = [torch.ones_like(part.indices, dtype=torch.bool) if part.kept is None else part.kept for part in onehot]
        indices = torch.cat([part.indices for part in onehot], 1)
        first = OneHot(indices, first.size, kept=None if all_kept else torch.cat(kept, 1))
    return Joined(first, dense[0] if len(dense) == 1 else torch.cat(dense, 2)) if dense else first


@overload
def some(rows: Tensor, examples: Tensor) -> Tensor: ...
@overload
def some(rows: Rows, examples: Tensor) -> Rows: ...
def some(rows: Rows, examples: Tensor) -> Rows:
    """Return the rows of some examples, by their places ``[m]``."""
    if isinstance(rows, Joined):
        return Joined(_some(rows.onehot, examples), rows.dense[:, examples])
    return _some(rows, examples) if isinstance(rows, OneHot) else rows[:, examples]


def _some(rows: OneHot, examples: Tensor) -> OneHot:
    kept = None if rows.kept is None else rows.kept[examples]
    return OneHot(rows.indices[examples], rows.size, rows.distinct, kept)


def of_outputs(x: Tensor, rows: Rows, start: int, stop: int) -> tuple[Tensor, Rows]:
    """Return the rows of some of the outputs, with activations ``[k, n, s, i]`` that fit them."""
    if isinstance(rows, Tensor):
        return x, rows[..., start:stop]
    if isinstance(rows, Joined):
        first, second = rows.split(x)
        some_x, onehot = of_outputs(first, rows.onehot, start, stop)
        assert isinstance(onehot, OneHot)
        return torch.cat([some_x, second], 2), Joined(onehot, rows.dense[..., start:stop])
    inside = (rows.indices >= start) & (rows.indices < stop)
    indices = (rows.indices - start).where(inside, 0)
    kept = inside if rows.kept is None else inside & rows.kept
    return torch.where(inside[None, ..., None], x, 0), OneHot(indices, stop - start, kept=kept)


def added(parts: Iterable[Tensor]) -> Tensor:
    """Return the sum of tensors as large as parameters, holding two of them at a time; at least one is needed."""
    total: Tensor | None = None
    for part in parts:
        total = part if total is None else total.add_(part)
    assert total is not None
    return total


def compact(x: Tensor, rows: OneHot) -> Tensor:
    """Add up the activations of positions with the same index: each sum stands at the first of them, zeros elsewhere.

    Afterwards no two non-zero rows of an example touch the same entries of its gradient, so that squares can be taken
    row by row.

    Args:
        x: ``[1, n, s, i]``.
        rows: The one-hot rows of the same positions.

    Returns:
        ``[1, n, s, i]``.
    """
    if rows.distinct or x.shape[2] == 1:
        return x
    # Sorted, equal indices are neighbours: comparing every two positions would take the square of their number.
    ids, order = rows.indices.sort(dim=1, stable=True)
    starts = F.pad(ids[:, 1:] != ids[:, :-1], (1, 0), value=True)
    starts = torch.where(starts, torch.arange(ids.shape[1], device=ids.device), 0).cummax(1).values
    first = torch.empty_like(order).scatter_(1, order, order.gather(1, starts))
    place = first.view(1, *first.shape, 1).expand_as(x)
    return torch.zeros_like(x).scatter_add_(2, place, x)


def second_moment(rows: Rows, *, diagonal: bool = False) -> Tensor:
    """Return ``Σ_ns v_ns v_nsᵀ`` for rows ``[k, n, s, o]``: ``[k, o, o]``, or only its diagonal ``[k, o]``."""
    if isinstance(rows, Joined):
        onehot = second_moment(rows.onehot, diagonal=diagonal)
        return onehot.to(rows.dense.dtype) + second_moment(rows.dense, diagonal=diagonal)
    if isinstance(rows, OneHot):
        indices = rows.indices.reshape(-1) if rows.kept is None else rows.indices[rows.kept]
        counts = torch.bincount(indices, minlength=rows.size).unsqueeze(0).float()
        return counts if diagonal else torch.diag_embed(counts)
    if diagonal:
        return rows.square().sum((1, 2))
    columns = rows.flatten(1, 2)
    return columns.mT @ columns


def rotate(rows: Tensor, basis: Tensor | None) -> Tensor:
    """Multiply every row by a matrix, ``[k, n, s, i]`` times ``[k, i, j]``; None is the identity."""
    if basis is None:
        return rows
    k, n, s, i = rows.shape
    if s == 1 or rows.is_contiguous():
        return torch.bmm(rows.reshape(k, n * s, i), basis).view(k, n, s, -1)
    # Patches and a convolution's output gradients lie with the positions last: multiply from the left, without a copy.
    return (basis.transpose(-1, -2).unsqueeze(1) @ rows.transpose(-1, -2)).transpose(-1, -2)
