"""Batches that stay in memory from one pass to the next, and what the graph of one takes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lightning_influence.core.containers import map_tensors


class HeldBatches:
    """Copies of batches, as long as all of them together take no more than so many bytes.

    Attributes:
        complete: Whether none was too much, or of a kind that might not be copied well.
    """

    def __init__(self, limit: int) -> None:
        self.complete = True
        self._left = limit
        self._batches: list[tuple[int, Any]] = []

    def add(self, n: int, batch: Any) -> None:
        """Copy a batch of ``n`` examples, if it fits; else let go of all."""
        size = _bytes(batch)
        self.complete = self.complete and size is not None and size <= self._left
        if self.complete:
            self._left -= size or 0
            self._batches.append((n, map_tensors(torch.clone, batch)))
        else:
            self._batches.clear()

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        """Yield numbers of examples and copies of the batches: a step may change what it is given."""
        return ((n, map_tensors(torch.clone, batch)) for n, batch in self._batches)


def _bytes(batch: Any) -> int | None:
    """Return the size of a batch of tensors in plain containers, None for anything that might not be copied well."""
    if type(batch) is Tensor:
        return batch.numel() * batch.element_size() if batch.layout == torch.strided else None
    if batch is None or isinstance(batch, (str, bytes, int, float)):
        return 0
    if type(batch) not in (dict, list, tuple) and not (isinstance(batch, tuple) and hasattr(batch, "_fields")):
        return None
    parts = [_bytes(value) for value in (batch.values() if isinstance(batch, dict) else batch)]
    return None if None in parts else sum(part or 0 for part in parts)


@contextmanager
def saved_bytes(parameters: Iterable[Tensor]) -> Iterator[dict[int, int]]:
    """Count what operations save for the way back, by storage, without the parameters."""
    sizes: dict[int, int] = {}
    known = {parameter.untyped_storage().data_ptr() for parameter in parameters}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
        # The tensor itself would make a cycle with the operation that it comes from.
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield sizes
