"""Batches that stay in memory from one pass to the next, and what the graph of one takes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lightning_influence.core.containers import children, map_tensors


def copied(batch: Any) -> Any:
    """Return a copy of a batch."""
    return map_tensors(torch.clone, batch)


def bytes_of(batch: Any) -> float:
    """Return the size of a batch of tensors in plain containers, infinity for what might not be copied well."""
    if type(batch) is Tensor and batch.layout == torch.strided:
        return batch.numel() * batch.element_size()
    if batch is None or isinstance(batch, (str, bytes, int, float)):
        return 0
    plain = type(batch) in (dict, list, tuple) or (isinstance(batch, tuple) and hasattr(batch, "_fields"))
    return sum(bytes_of(item) for _, item in children(batch) or ()) if plain else math.inf


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
