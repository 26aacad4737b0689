"""Per-example gradients themselves, a few at a time, and their sum."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lightning_influence.layers.rows import Joined, OneHot, Rows, added

# Scalars of formed gradients held at a time: 16 MiB in float32.
_CHUNK_ELEMENTS = 2**22
# The same where they are used up at once: they stay in a processor's cache.
_CACHED_ELEMENTS = 2**20


def at_a_time(scalars: int, *, cached: bool = False) -> int:
    """Return how many things of so many scalars each are held at a time; ``cached`` ones are used up at once."""
    return max(1, (_CACHED_ELEMENTS if cached else _CHUNK_ELEMENTS) // scalars)


def end_to_end(parts: Sequence[Tensor]) -> Tensor:
    """Join parts of a batch; the only one is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def gradients(x: Tensor, g: Rows, *, cached: bool = True) -> Iterator[Tensor]:
    """Yield the per-example gradients a few examples at a time, each ``[k, m, o, i]`` and new, in order.

    Args:
        x: Activations ``[k, n, s, i]``.
        g: Output gradients ``[k, n, s, o]``.
        cached: Whether they are used up at once, and had better stay in a processor's cache.
    """
    k, n, _, i = x.shape
    o = g.shape[3]
    step = at_a_time(k * i * o, cached=cached and x.device.type == "cpu")
    if isinstance(g, Tensor):
        for start in range(0, n, step):
            # kmso, kmsi -> kmoi
            yield g[:, start : start + step].transpose(-1, -2) @ x[:, start : start + step]
        return
    onehot, first, second = (g, x, None) if isinstance(g, OneHot) else (g.onehot, *g.split(x))
    for start in range(0, n, step):
        ids = onehot.indices[start : start + step]
        offset = torch.arange(len(ids), device=ids.device).unsqueeze(1) * o
        if second is None or isinstance(g, OneHot):
            chunk = x.new_zeros((1, len(ids), o, i))
        else:
            chunk = g.dense[:, start : start + step].transpose(-1, -2) @ second[:, start : start + step]
        chunk.view(-1, i).index_add_(0, (ids + offset).reshape(-1), first[0, start : start + step].reshape(-1, i))
        yield chunk


def formed(x: Tensor, g: Rows) -> Tensor:
    """Return all per-example gradients at once, ``[n, k, o, i]``; for queries and small networks."""
    if isinstance(g, Tensor) and x.shape[2] == 1:
        # knso, knsi -> knoi: in one go, as putting chunks together takes a copy
        return (g.transpose(-1, -2) @ x).transpose(0, 1).contiguous()
    return torch.cat([chunk.transpose(0, 1) for chunk in gradients(x, g)])


def summed_gradient(x: Tensor, g: Rows) -> Tensor:
    """Return the sum over examples of their gradients, ``[k, o, i]``."""
    if isinstance(g, OneHot):
        return scattered(x, g)
    if isinstance(g, Joined):
        first, second = g.split(x)
        return scattered(first, g.onehot) + summed_gradient(second, g.dense)
    if x.shape[2] == 1:
        return g[:, :, 0].transpose(-1, -2) @ x[:, :, 0]
    # One product per example instead of one over all rows: patches lie transposed in memory, and a copy costs more.
    return added(chunk.sum(1) for chunk in gradients(x, g))


def scattered(x: Tensor, g: OneHot) -> Tensor:
    """Return ``Σ_ns e_id x_nsᵀ``, ``[1, o, i]``."""
    i = x.shape[3]
    return x.new_zeros((1, g.size, i)).index_add_(1, g.indices.reshape(-1), x.reshape(1, -1, i))
