"""The precision that numbers are computed in: float32 at least."""

from __future__ import annotations

import torch
from torch import Tensor

_PRECISE = (torch.float32, torch.float64)


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the type itself, or float32 for real types of lower precision."""
    return dtype if dtype in _PRECISE or dtype.is_complex else torch.float32


def working(tensor: Tensor) -> Tensor:
    """Return a tensor in its working precision."""
    return tensor.to(working_dtype(tensor.dtype))


def largest_norm(dtype: torch.dtype) -> float:
    """Return the norm up to which a gradient can be squared, and a hundred such squares added, without overflow."""
    return float((torch.finfo(working_dtype(dtype)).max / 128) ** 0.5)
