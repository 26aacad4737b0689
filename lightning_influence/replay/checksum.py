"""What tells one batch from another, fast enough to be asked for at every step."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_influence.core.containers import leaves


def checksum(batch: Any) -> int:
    """Return what tells a batch from others, in a tenth of the time that a CRC takes; of objects, their kind alone."""
    result = 0
    for path, leaf in leaves(batch):
        found = leaf if isinstance(leaf, Tensor) else torch.from_numpy(leaf) if _is_numbers(leaf) else None
        if found is None or found.layout != torch.strided or found.is_nested or found.is_quantized:
            plain = isinstance(leaf, (str, bytes, int, float, complex, bool, type(None)))
            told = repr(leaf) if plain else type(leaf).__name__
            own = zlib.crc32(told.encode(errors="surrogatepass"))
        else:
            own = _sum_of(found.detach())
        result = (result * 1_000_003 + own + len(path)) % 2**32
    return result


def _is_numbers(leaf: Any) -> bool:
    return isinstance(leaf, np.ndarray) and leaf.dtype.kind in "biuf" and leaf.dtype.isnative and leaf.flags.writeable


_WEIGHTS: dict[tuple[torch.device, int], Tensor] = {}


def _sum_of(tensor: Tensor) -> int:
    """Return a weighted sum of a tensor's bits, as integers: their order counts."""
    tensor = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor.resolve_neg()
    line = tensor.contiguous().reshape(-1).view(torch.uint8)
    whole = line.numel() // 4
    result = zlib.crc32(bytes(line[4 * whole :].tolist())) if line.numel() % 4 else 0
    if whole:
        words = line[: 4 * whole]
        words = (words.clone() if words.storage_offset() % 4 else words).view(torch.int32)
        weights = _weights(line.device, whole)
        on_host = line.device.type == "cpu"
        result += int(torch.dot(words, weights)) if on_host else int((words * weights).sum())
    return result % 2**32


def _weights(device: torch.device, size: int) -> Tensor:
    """Return odd numbers, of which the largest vector asked for so far is kept."""
    known = _WEIGHTS.get((device, 0))
    if known is None or known.numel() < size:
        known = _WEIGHTS[device, 0] = torch.arange(1, 2 * size, 2, dtype=torch.int32, device=device)
    return known[:size]
