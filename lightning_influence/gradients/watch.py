"""Watching every call of a torch function, from the outside and from within attention."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_influence.core.containers import tensors_in
from lightning_influence.core.torch_private import visible_attention
from lightning_influence.layers.registry import IN_PLACE
from lightning_influence.objective.losses import all_arguments


class FunctionWatch(TorchFunctionMode, ABC):
    """Sees every call of a torch function while it is active, from the outside and from within attention."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run the call unchanged and look at it."""
        kwargs = all_arguments(func, kwargs or {})
        if func == F.multi_head_attention_forward:
            # Its linear maps are the layers. This copy does not ask the mode again, so the mode can see what it calls.
            with self:
                return visible_attention(*args, **kwargs)
        before: tuple[Any, ...] | None = None
        if func in IN_PLACE and any(id(tensor) in self.followed for tensor in tensors_in((args, kwargs))):
            before = (args[0].detach().clone(), *args[1:])
        output = func(*args, **kwargs)
        self.after(func, args, kwargs, output, before)
        return output

    @property
    @abstractmethod
    def followed(self) -> Container[int]:
        """Ids of the tensors to follow: what an in-place call with one of them overwrites is copied before."""

    @abstractmethod
    def after(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
        before: tuple[Any, ...] | None,
    ) -> None:
        """Look at a finished call.

        Args:
            func: The function.
            args: Its positional arguments.
            kwargs: Its keyword arguments.
            output: What it returned.
            before: The positional arguments with a copy of what the call has overwritten, if it has.
        """


class PrecisionWatch(FunctionWatch):
    """Notes the lowest precision that takes part in a forward pass: a model of float64 may normalise in float32.

    Attributes:
        lowest: The type of lowest precision so far.
    """

    followed = ()

    def __init__(self) -> None:
        super().__init__()
        self.lowest = torch.float64

    def after(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
        before: tuple[Any, ...] | None,
    ) -> None:
        """Look at what the call made, unless it only hands on what the batch holds: that is exact in any type."""
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


def lower_precision(one: torch.dtype, other: torch.dtype) -> torch.dtype:
    """Return the less precise of two real types; integers have no say."""
    other = other.to_real() if other.is_complex else other
    coarser = other.is_floating_point and torch.finfo(other).eps > torch.finfo(one).eps
    return other if coarser else one


def outputs_of(func: Callable[..., Any], args: Sequence[Any], output: Any) -> list[Tensor]:
    """Return the tensors that a call made or changed."""
    if func == Tensor.__setitem__:
        return [args[0]]
    return list(tensors_in(output))


def name_of(function: Callable[..., Any]) -> str:
    """Return the name that a torch function goes by in messages."""
    return getattr(function, "__name__", repr(function))
