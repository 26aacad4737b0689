"""Batches taken apart by rows, and put together again: of streams, nothing smaller than a batch can be asked for."""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_influence.core.containers import Path, children, rebuilt

_ATOMS = (str, bytes, int, float, complex, bool, type(None), np.generic)
_DEEPEST = 8


class UnlikeError(ValueError):
    """Rows of batches that can't be put together: other lengths, keys, or values that they have in common."""


class Row(NamedTuple):
    """One example of a batch, which is held as a whole.

    Attributes:
        batch: As the loader has handed it out.
        place: Of the example in it.
        size: Number of its examples.
        whole: Where there is something without a row for each example, see ``without_rows``.
    """

    batch: Any
    place: int
    size: int
    whole: Collection[Path] = ()

    def example(self) -> Any:
        """Return what the batch holds of the example, as a data set would."""
        return _single(self.batch, self)


def sizes_of(batch: Any) -> Counter[int]:
    """Count how often parts of a batch have which length: its tensors, arrays and lists."""
    return Counter(_lengths(batch, _DEEPEST))


def without_rows(batch: Any, size: int) -> Iterator[Path]:
    """Yield the paths to tensors, arrays and lists that are longer or shorter than a batch has examples.

    Weights of classes may happen to have one for each example; a batch of another size tells.
    """
    waiting: list[tuple[Path, Any]] = [((), batch)]
    while waiting:
        path, node = waiting.pop()
        listed = isinstance(node, (list, tuple)) and not hasattr(node, "_fields")
        if (listed or (_is_array(node) and node.ndim)) and len(node) != size:
            yield path
        if len(path) < _DEEPEST and not _is_array(node) and not _has_rows(node, size):
            waiting += [((*path, key), value) for key, value in (_parts_of(node) or {}).items()]


class Cutting:
    """How the batches of a loader are cut: what has no row for each example is learnt from those of other sizes."""

    def __init__(self) -> None:
        self._whole, self._sizes = set[Path](), set[int]()

    def learn(self, batch: Any, size: int) -> None:
        """Look at a batch of another size than those before."""
        if size not in self._sizes:
            self._sizes.add(size)
            self._whole.update(without_rows(batch, size))

    def rows(self, batch: Any, size: int, places: Iterable[int] | None = None) -> list[Row]:
        """Return some rows of a batch, by default all."""
        return [Row(batch, place, size, self._whole) for place in (range(size) if places is None else places)]

    def picked(self, batch: Any, size: int, places: Sequence[int]) -> list[Row]:
        """Return the same; of few of them no more is held than they are."""
        rows = self.rows(batch, size, places)
        return self.rows(joined(rows), len(rows)) if 0 < len(rows) < size else rows


def joined(rows: Sequence[Row]) -> Any:
    """Return a batch of rows, in their order; nothing of it shares memory with the batches that they are of.

    What has a row for each example is cut: tensors and arrays by their first dimension, lists with one entry for each.
    The rest is handed on as it is, and has to be the same in all the batches.

    Raises:
        UnlikeError: If batches differ in more than their rows.
    """
    parts: list[_Part] = []
    for row in rows:
        if not parts or parts[-1].batch is not row.batch:
            parts.append(_Part(row.batch, [], row.size, row.whole))
        parts[-1].places.append(row.place)
    return _join([part.batch for part in parts], parts)


class _Part(NamedTuple):
    batch: Any
    places: list[int]
    size: int
    whole: Collection[Path]


def _is_array(node: Any) -> bool:
    return isinstance(node, (Tensor, np.ndarray))


def _has_rows(node: Any, size: int) -> bool:
    """Tell whether a tensor, an array or a list has an entry for each example, rather than a column in each entry."""
    if _is_array(node):
        return node.ndim > 0 and len(node) == size
    if not isinstance(node, (list, tuple)) or len(node) != size or hasattr(node, "_fields"):
        return False
    held = [entry for entry in node if not isinstance(entry, _ATOMS)]
    return not held or not all(isinstance(entry, Mapping) or _spans(entry, size) for entry in held) or _alike(held)


def _spans(node: Any, size: int) -> bool:
    return hasattr(node, "__len__") and bool(getattr(node, "ndim", 1)) and len(node) == size


def _alike(held: Sequence[Any]) -> bool:
    """Tell whether entries are examples, each with names of its own parts."""
    return all(isinstance(entry, Mapping) and entry.keys() == held[0].keys() for entry in held)


def _parts_of(node: Any) -> dict[Any, Any] | None:
    """Return the entries of a container or the attributes of an object, None for anything else."""
    items = children(node)
    if items is not None:
        return dict(items)
    is_object = hasattr(node, "__dict__") and not isinstance(node, (type, torch.nn.Module)) and not callable(node)
    return dict(vars(node)) if is_object else None


def _rebuilt(node: Any, parts: dict[Any, Any]) -> Any:
    if children(node) is not None:
        return rebuilt(node, parts)
    result = copy.copy(node)
    for name, value in parts.items():
        object.__setattr__(result, name, value)  # of frozen dataclasses, too
    return result


def _join(nodes: list[Any], parts: list[_Part], path: Path = ()) -> Any:
    first = nodes[0]
    if all(path not in part.whole and _has_rows(node, part.size) for node, part in zip(nodes, parts, strict=True)):
        return _join_rows(nodes, parts)
    held = [_parts_of(node) for node in nodes] if len(path) < _DEEPEST and not _is_array(first) else [None]
    if held[0] is None:
        if not all(_same(first, node) for node in nodes[1:]):
            raise UnlikeError("batches differ in what their examples have in common")
        return copy.deepcopy(first) if _is_array(first) else first
    if any(type(node) is not type(first) for node in nodes) or any(
        other is None or other.keys() != held[0].keys() for other in held
    ):
        raise UnlikeError("batches have other keys")
    own = {key: _join([other[key] for other in held if other is not None], parts, (*path, key)) for key in held[0]}
    return _rebuilt(first, own)


def _join_rows(nodes: list[Any], parts: list[_Part]) -> Any:
    first = nodes[0]
    if not _is_array(first):
        rows = [node[place] for node, part in zip(nodes, parts, strict=True) for place in part.places]
        return type(first)(rows)
    if any(type(n) is not type(first) or n.dtype != first.dtype or n.shape[1:] != first.shape[1:] for n in nodes):
        raise UnlikeError("batches have other lengths")
    picked = [node[part.places] for node, part in zip(nodes, parts, strict=True)]
    if len(picked) == 1:
        return picked[0]
    return torch.cat(picked) if isinstance(first, Tensor) else np.concatenate(picked)


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and torch.equal(a, b)
    if _is_array(a) or _is_array(b):
        return bool(np.array_equal(a, b))
    return type(a) is type(b) and bool(a == b)


def _single(node: Any, row: Row, path: Path = ()) -> Any:
    if path not in row.whole and _has_rows(node, row.size):
        return copy.deepcopy(node[row.place])
    parts = _parts_of(node) if len(path) < _DEEPEST and not _is_array(node) else None
    if parts is None:
        return node
    own = {key: _single(value, row, (*path, key)) for key, value in parts.items()}
    return own if dataclasses.is_dataclass(node) else _rebuilt(node, own)


def _lengths(node: Any, depth: int) -> Iterator[int]:
    if _is_array(node):
        if node.ndim:
            yield len(node)
        return
    if isinstance(node, (list, tuple)) and not hasattr(node, "_fields"):
        yield len(node)
    for value in (_parts_of(node) or {}).values() if depth else ():
        yield from _lengths(value, depth - 1)


def described(batch: Any) -> str:
    """Return what a batch is, as messages name it: its kind, and its keys."""
    kind = type(batch).__name__
    if isinstance(batch, Mapping):
        return f"a {kind} with {', '.join(repr(key) for key in list(batch)[:12])}" if batch else f"an empty {kind}"
    if isinstance(batch, (list, tuple)) and not hasattr(batch, "_fields"):
        return f"a {kind} of {', '.join(type(part).__name__ for part in batch[:6])}{', …' if len(batch) > 6 else ''}"
    if isinstance(batch, Tensor):
        return f"a tensor of shape {tuple(batch.shape)}"
    names: list[str] = list(vars(batch)) if hasattr(batch, "__dict__") else list(getattr(batch, "_fields", ()))
    return f"a {kind}" + (f" with {', '.join(map(repr, names[:12]))}" if names else "")
