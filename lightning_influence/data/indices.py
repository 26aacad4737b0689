"""Dataset indices as callers give them: lists, arrays, tensors."""

from __future__ import annotations

import operator
from collections.abc import Container, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Indices = Sequence[int] | Tensor | NDArray[Any]


def integers(indices: int | Indices) -> list[int]:
    """Return one index or many as integers.

    Raises:
        ValueError: If some are none.
    """
    values: Any = indices.tolist() if isinstance(indices, (Tensor, np.ndarray, np.generic)) else indices
    if isinstance(values, (str, bytes, Mapping)):
        raise ValueError(f"indices must be integers, got a {type(values).__name__}; pass a list of them.")
    values = list(values) if hasattr(values, "__iter__") else [values]
    odd = [value for value in values if isinstance(value, bool) or not hasattr(value, "__index__")]
    if odd:
        raise ValueError(f"indices must be integers, got {odd[:5]}; a mask becomes indices by `mask.nonzero()`.")
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
    if strangers or len(set(chosen)) != len(chosen):
        what = f"{strangers[:10]} are {otherwise}" if strangers else "some are named twice"
        raise ValueError(f"indices: {what}; expected distinct {expected}.")
    return chosen
