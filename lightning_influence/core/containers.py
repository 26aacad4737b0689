"""Tensors in nested containers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar, cast

import torch
from torch import Tensor


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in arguments or results: in sequences and mappings, too."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Return arguments with every tensor replaced, in the order of ``tensors_in``."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
        return type(value)([map_tensors(function, item) for item in value])
    if isinstance(value, Mapping):
        return {key: map_tensors(function, item) for key, item in value.items()}
    return value


_T = TypeVar("_T")


def _moved(batch: _T, device: torch.device) -> _T:
    moved: Any = batch
    if isinstance(batch, Tensor):
        moved = batch.to(device)
    elif isinstance(batch, Mapping):
        moved = {key: _moved(value, device) for key, value in batch.items()}
    elif isinstance(batch, tuple) and hasattr(batch, "_fields"):
        moved = type(batch)(*(_moved(value, device) for value in batch))
    elif isinstance(batch, (list, tuple)):
        moved = type(batch)(_moved(value, device) for value in batch)
    return cast("_T", moved)
