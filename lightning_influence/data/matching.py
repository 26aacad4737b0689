"""Whether the rows of a batch are those of examples: as they were, padded, cut, or laid end to end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

_Array: TypeAlias = NDArray[Any]


def pair_scores(values: Sequence[_Array | None], rows: Sequence[_Array | None]) -> NDArray[np.int64]:
    """Return how many scalars each row has in common with each value, ``[rows, n]``, see ``agreeing``."""
    scores = np.full((len(rows), len(values)), -1, np.int64)
    own, theirs = ([(k, x) for k, x in enumerate(arrays) if x is not None] for arrays in (values, rows))
    for a, b in np.argwhere(_candidates([x for _, x in own], [x for _, x in theirs])).tolist():
        scores[theirs[a][0], own[b][0]] = agreeing(own[b][1], theirs[a][1])
    return scores


def joined_scores(values: Sequence[_Array | None], column: _Array | None) -> NDArray[np.int64] | None:
    """Cut a column up into the values that lie end to end in it, ``[rows, n]`` as ``pair_scores``, if it can be."""
    if column is None or not column.ndim:
        return None
    places: dict[tuple[int, bytes], list[int]] = {}
    for k, value in enumerate(values):
        if value is None or not value.ndim or not len(value) or value.shape[1:] != column.shape[1:]:
            continue
        if np.can_cast(value.dtype, column.dtype, "same_kind"):
            places.setdefault((len(value), value.astype(column.dtype).tobytes()), []).append(k)
    lengths = {length for length, _ in places}
    start, rows = 0, []
    while start < len(column):
        found = [(own[0], own, n) for n in lengths if (own := places.get((n, column[start : start + n].tobytes())))]
        if not found:
            return None
        k, own, length = min(found)
        own.remove(k)
        start += length
        rows.append(np.where(np.arange(len(values)) == k, length * math.prod(column.shape[1:]), -1))
    return np.stack(rows) if rows else None


def agreeing(value: NDArray[Any] | None, row: NDArray[Any] | None) -> int:
    """Return how many scalars a row has in common with the value that it may have been padded or cut from.

    Returns:
        -1 if it has not been made from that value.
    """
    if value is None or row is None or value.ndim != row.ndim or (value.dtype.kind in "US") != (row.dtype.kind in "US"):
        return -1
    if value.dtype != row.dtype and row.dtype.kind == "f":
        value = value.astype(row.dtype)  # as collating has rounded it
    if value.shape == row.shape:
        return value.size if _equal(value, row) else -1
    common = tuple(min(a, b) for a, b in zip(value.shape, row.shape, strict=True))
    if 0 in common:
        return 0 if value.size == 0 else -1
    for part in (tuple(slice(0, size) for size in common), tuple(slice(-size, None) for size in common)):
        if _equal(value[part], row[part]):
            if common != value.shape:  # cut
                return int(np.prod(common))
            outside = np.ones(row.shape, bool)
            outside[part] = False
            padding = row[outside]
            if _equal(padding, np.full_like(padding, padding[0])):
                return value.size
    return -1


def _equal(a: NDArray[Any], b: NDArray[Any]) -> bool:
    if a.dtype.kind == "f":
        return bool(((a == b) | ((a != a) & (b != b))).all())
    return bool(np.array_equal(a, b))


def _candidates(values: Sequence[_Array], rows: Sequence[_Array]) -> NDArray[np.bool_]:
    """Tell which rows may agree with which values, ``[rows, n]``: those that begin or end alike.

    By checksums of all beginnings: comparing each with each takes seconds for a large batch.
    """
    own, theirs = (list(map(np.atleast_1d, arrays)) for arrays in (values, rows))
    kinds, like = {x.dtype.kind for x in [*own, *theirs]}, {x.dtype for x in theirs}
    rounded = kinds <= set("biuf") and len(like) == 1 and next(iter(like)).kind == "f"
    comparable = rounded or kinds <= set("biu") or kinds <= set("U")
    if not (own and theirs and comparable) or len({x.shape[1:] for x in [*own, *theirs]}) > 1:
        return np.ones((len(rows), len(values)), bool)
    of_values, of_rows = (
        [_words(x, next(iter(like)) if rounded else None) for x in arrays] for arrays in (own, theirs)
    )
    lengths, length = np.unique([len(x) for x in of_values], return_inverse=True)
    widths, width = np.unique([len(x) for x in of_rows], return_inverse=True)
    alike = np.zeros((len(rows), len(values)), bool)
    for step in (1, -1):
        a = np.stack([_beginnings(x[::step], widths) for x in of_values])
        b = np.stack([_beginnings(x[::step], lengths) for x in of_rows])
        alike |= b[:, length] == a[:, width].T
    return alike


def _words(array: _Array, rounded: np.dtype[Any] | None) -> NDArray[np.uint64]:
    """Return a number for each entry along the first dimension; equal ones have the same."""
    if rounded is not None:  # as collating has done; zeros get one sign
        array = (array.astype(rounded) + 0).astype(np.float64).view(np.uint64)
    elif array.dtype.kind == "U":
        array = np.array([hash(text) for text in array.ravel().tolist()], np.int64).reshape(array.shape)
    flat = array.astype(np.uint64).reshape(len(array), math.prod(array.shape[1:]))
    return flat @ _weights(flat.shape[1])


def _beginnings(words: NDArray[np.uint64], lengths: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Return checksums of the first so many of some words."""
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(words * _weights(len(words)), dtype=np.uint64)])
    return sums[np.minimum(lengths, len(words))]


def _weights(count: int) -> NDArray[np.uint64]:
    return np.cumprod(np.full(count, 0x9E3779B97F4A7C15, np.uint64), dtype=np.uint64)
