"""Dataset indices as callers give them: lists, arrays, tensors."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Indices = Sequence[int] | Tensor | NDArray[Any]


def integers(indices: int | Indices) -> list[int]:
    """Return one index or many as integers.

    Raises:
        ValueError: If some are none, or they are a mapping or a set: what goes with an index has to be in its order.
    """
    if isinstance(indices, Mapping):
        raise ValueError(
            f"indices={_cut(indices)}: the values of a mapping would be ignored; pass its keys, `list(...)`."
        )
    if isinstance(indices, (set, frozenset)):
        raise ValueError(f"indices={_cut(indices)}: a set has no order; pass `sorted(...)` of it.")
    values: Any = _plain(indices)
    values = list(values) if hasattr(values, "__iter__") and not isinstance(values, (str, bytes)) else [values]
    values = [_plain(value) for value in values]
    odd = [value for value in values if isinstance(value, bool) or not hasattr(value, "__index__")]
    if odd:
        raise ValueError(f"indices must be integers, got {odd[:5]}; a mask becomes indices by `np.flatnonzero(mask)`.")
    return [operator.index(value) for value in values]


def distinct(indices: Indices, known: Container[int], otherwise: str, expected: str) -> list[int]:
    """Return indices as integers.

    Args:
        indices: What was asked for.
        known: Indices that there are.
        otherwise: What others are: ``"out of range"``.
        expected: What they should be.

    Raises:
        ValueError: If some are no integers, not known, or named twice.
    """
    chosen = integers(indices)
    strangers = [index for index in chosen if index not in known]
    repeated = [index for index, times in Counter(chosen).items() if times > 1]
    if strangers or repeated:
        what = f"{strangers[:10]} are {otherwise}" if strangers else f"some are named twice: {repeated[:10]}"
        raise ValueError(f"indices: {what}; expected distinct {expected}.")
    return chosen


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, (Tensor, np.ndarray, np.generic)) else value


def _cut(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:39] + "…"
