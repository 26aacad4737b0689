"""The precision that numbers are computed in: float32 at least."""

from __future__ import annotations

import torch
from torch import Tensor


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return float32 or float64: itself, or float32 for anything of lower precision."""
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32


def working(tensor: Tensor) -> Tensor:
    """Return a tensor in its working precision."""
    return tensor.to(working_dtype(tensor.dtype))
