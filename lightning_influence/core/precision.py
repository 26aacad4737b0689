"""The precision that numbers are computed in: float32 at least, and wider for sums and decompositions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

_PRECISE = (torch.float32, torch.float64)


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the type itself, or float32 for real types of lower precision."""
    return dtype if dtype in _PRECISE or dtype.is_complex else torch.float32


def working(tensor: Tensor) -> Tensor:
    """Return a tensor in its working precision."""
    return tensor.to(working_dtype(tensor.dtype))


def wide_dtype(device: torch.device) -> torch.dtype:
    """Return the type that sums are kept in: float64, or float32 on devices without it (Apple's MPS, some XPUs)."""
    return torch.float64 if _has_float64(device.type) else torch.float32


def wide(tensor: Tensor) -> Tensor:
    """Return a tensor in the type that sums are kept in on its device."""
    return tensor.to(wide_dtype(tensor.device))


def wide_zeros(shape: int | tuple[int, ...], device: torch.device) -> Tensor:
    """Return zeros to add up in."""
    return torch.zeros(shape, dtype=wide_dtype(device), device=device)


def summed(parts: Sequence[Tensor]) -> Tensor:
    """Return the sum of tensors of one shape, in the type that sums are kept in."""
    device = parts[0].device
    stacked = torch.stack([part.to(device) for part in parts])  # cat promotes
    return stacked.sum(0, dtype=wide_dtype(device))


def exact(tensor: Tensor, *, copy: bool = False) -> Tensor:
    """Return a tensor in float64, on the host if its device has none: for decompositions, which lack there, too."""
    device = tensor.device if _has_float64(tensor.device.type) else torch.device("cpu")
    return tensor.to(device, torch.float64, copy=copy)


def wait_for(device: torch.device) -> None:
    """Wait for what was left to an accelerator, of whatever kind: before that a clock tells nothing of it."""
    if device.type != "cpu":
        torch.zeros((), device=device).item()


@cache
def _has_float64(kind: str) -> bool:
    """Tell whether a kind of device has float64, by trying."""
    try:
        torch.zeros(1, dtype=torch.float64, device=kind)
    except (TypeError, RuntimeError):
        return False
    return True


def largest_norm(dtype: torch.dtype) -> float:
    """Return the norm up to which a gradient can be squared, and a hundred such squares added, without overflow."""
    return float((torch.finfo(working_dtype(dtype)).max / 128) ** 0.5)
