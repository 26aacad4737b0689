"""The precision that a forward pass really computes in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from lightning_influence.core.containers import tensors_in
from lightning_influence.objective.losses import all_arguments


class PrecisionWatch(TorchFunctionMode):
    """Notes the lowest precision that takes part in a forward pass: a model of float64 may normalise in float32.

    Attributes:
        lowest: The type of lowest precision so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lowest = torch.float64

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Look at what the call made, unless it only hands on what the batch holds: that is exact in any type."""
        kwargs = all_arguments(func, kwargs or {})
        output = func(*args, **kwargs)
        for made in tensors_in(output):
            dtype = lower_precision(self.lowest, made.dtype)
            if dtype != self.lowest and (
                made.requires_grad
                or any(
                    isinstance(given, nn.Parameter) or (given.is_floating_point() and given.dtype != dtype)
                    for given in tensors_in((args, kwargs))
                )
            ):
                self.lowest = dtype
        return output


def lower_precision(one: torch.dtype, other: torch.dtype) -> torch.dtype:
    """Return the less precise of two real types; integers have no say."""
    other = other.to_real() if other.is_complex else other
    coarser = other.is_floating_point and torch.finfo(other).eps > torch.finfo(one).eps
    return other if coarser else one
