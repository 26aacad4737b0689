"""What examples and batches hold: parts of nested containers, rows of columns, and their digest."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_influence.core.containers import Path, children

_DEEPEST, _WIDEST = 4, 64
_DEEPEST_TOLD = 16  # an object may hold itself
_NUMBERS = (bool, int, float, np.number, np.bool_)


def at(node: Any, path: Path) -> Any:
    """Return what lies at a path, None if there is no such thing."""
    try:
        for step in path:
            node = node[step] if isinstance(node, (Mapping, list, tuple)) else vars(node)[step]
    except (KeyError, IndexError, TypeError):
        return None
    return node


def array_at(node: Any, path: Path = ()) -> NDArray[Any] | None:
    """Return numbers or text at a path as an array, None for anything else."""
    value = at(node, path)
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.is_nested or value.is_quantized:
            return None
        try:
            return value.numpy(force=True)
        except TypeError:  # bfloat16
            return np.asarray(value.float().numpy(force=True))
    if isinstance(value, np.ndarray):
        return value
    if isinstance(value, (str, bytes, *_NUMBERS)) or (
        isinstance(value, list) and value and all(isinstance(entry, _NUMBERS) for entry in value)
    ):
        return np.asarray(value)
    return None


def _held_by(node: Any) -> list[tuple[Any, Any]]:
    """Return the entries of a container, or the attributes of an object."""
    is_object = hasattr(node, "__dict__") and not isinstance(node, (type, Tensor, np.ndarray, torch.nn.Module))
    items = children(node)
    return list(items if items is not None else vars(node).items() if is_object else ())


def parts(node: Any, depth: int = _DEEPEST) -> Iterator[Path]:
    """Yield the paths to everything that can be compared."""
    if array_at(node) is not None:
        yield ()
    elif depth:
        for key, child in _held_by(node)[:_WIDEST]:
            yield from ((key, *rest) for rest in parts(child, depth - 1))


def columns(batch: Any, depth: int = _DEEPEST) -> Iterator[tuple[Path, Path]]:
    """Yield the paths to everything that may have a row for each example, and for lists what is in a row."""
    if isinstance(batch, (Tensor, np.ndarray)):
        if batch.ndim:
            yield (), ()
    elif depth:
        if isinstance(batch, (list, tuple)) and batch:
            yield from (((), within) for within in parts(batch[0]))
        for key, child in _held_by(batch)[:_WIDEST]:
            yield from (((key, *path), within) for path, within in columns(child, depth - 1))


def rows_of(batch: Any, path: Path, within: Path = ()) -> list[NDArray[Any] | None] | None:
    """Return what the rows of a column hold, None if there is no such column."""
    column = at(batch, path)
    if isinstance(column, (list, tuple)):
        return [array_at(row, within) for row in column]
    array = array_at(column)
    return None if array is None or not array.ndim or within else [np.asarray(row) for row in array]


def copied(node: Any) -> Any:
    """Return an example that shares nothing with the data set, as far as it can be copied."""
    try:
        return copy.deepcopy(node)
    except Exception:  # something in a graph, or with a file of its own
        if isinstance(node, dict):
            result = node.copy()
            result.update({key: copied(value) for key, value in node.items()})
            return result
        return [copied(value) for value in node] if type(node) is list else node


def digest(node: Any) -> bytes:
    """Return what an example holds in short: equal for examples that are the same bit by bit, as far as can be seen."""
    found = hashlib.sha256()
    _tell(node, found.update, _DEEPEST_TOLD)
    return found.digest()


def _tell(node: Any, tell: Callable[[bytes], None], depth: int) -> None:
    tell(type(node).__qualname__.encode())
    if isinstance(node, Tensor):
        tell(str(node.dtype).encode())
        node = node if node.layout == torch.strided or node.is_nested else node.detach().to_dense()
    if isinstance(node, Tensor) or hasattr(node, "__array_interface__"):  # an array, an image
        array = array_at(node) if isinstance(node, Tensor) else np.asarray(node)
        if array is not None and array.dtype.hasobject:
            _tell(array.tolist(), tell, depth)
        elif array is not None:
            tell(f"{array.dtype}{array.shape}".encode() + array.tobytes())
    elif isinstance(node, (str, bytes, complex, *_NUMBERS)):
        tell(repr(node).encode(errors="surrogatepass"))
    elif depth:
        held = _held_by(node)
        tell(str(len(held)).encode())
        for key, value in held:
            tell(repr(key).encode(errors="surrogatepass"))
            _tell(value, tell, depth - 1)
