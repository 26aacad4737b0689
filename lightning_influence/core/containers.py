"""Nested containers: what arguments, results, batches and examples are made of."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

Path: TypeAlias = tuple[Any, ...]
"""Keys and positions that lead to a value in nested mappings, tuples and lists."""

_DEEPEST = 16  # a list may hold itself


def children(node: Any) -> Iterable[tuple[Any, Any]] | None:
    """Return keys and items of a mapping, list or tuple; None for anything else."""
    if isinstance(node, (tuple, list)):
        return enumerate(node)
    return node.items() if isinstance(node, Mapping) else None


def leaves(node: Any, path: Path = (), depth: int = _DEEPEST) -> Iterator[tuple[Path, Any]]:
    """Yield what is no container, with its path; containers beyond a depth are not looked into."""
    items = children(node) if depth else None
    if items is None:
        yield path, node
    else:
        for key, item in items:
            yield from leaves(item, (*path, key), depth - 1)


def tensors_in(node: Any) -> Iterator[Tensor]:
    """Yield the tensors in arguments or results."""
    if isinstance(node, Tensor):  # a step asks this of every call: directly, which takes half the time
        yield node
    else:
        for _, item in children(node) or ():
            yield from tensors_in(item)


def map_tensors(function: Callable[[Tensor], Tensor], node: Any) -> Any:
    """Return nested containers with every tensor replaced, in the order of ``tensors_in``."""
    if isinstance(node, Tensor):
        return function(node)
    items = children(node)
    if items is None:
        return node
    return rebuilt(node, {key: map_tensors(function, item) for key, item in items})


def rebuilt(node: Any, items: dict[Any, Any]) -> Any:
    """Return a mapping, list or tuple of the same kind, with other items; see ``children``."""
    if isinstance(node, Mapping):
        if type(node) is dict or not isinstance(node, MutableMapping):
            return items
        result = copy.copy(node)  # a `BatchEncoding` is asked by attributes, too
        result.update(items)
        return result
    return type(node)(*items.values()) if hasattr(node, "_fields") else type(node)(list(items.values()))


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device. The host does not wait: what is computed there waits for the copy by itself."""
    return tensor.to(device, non_blocking=tensor.device.type == "cpu" and device.type not in ("cpu", "mps"))


def mover(module: nn.Module) -> Callable[[Any], Any]:
    """Return what moves the tensors of a batch to the device of a module; without parameters they stay."""

    def moved(batch: Any) -> Any:
        place = next(module.parameters(), None)
        return batch if place is None else map_tensors(lambda tensor: sent(tensor, place.device), batch)

    return moved
