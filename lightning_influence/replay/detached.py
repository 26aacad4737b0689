"""Values that training takes for constants: ``detach``, ``no_grad``. What they are depends on the weights all the same.

A focal loss with a detached weight, a detached teacher or a straight-through estimator has a gradient that leaves out
how such a value moves with the weights. The step as taken depends on it: where the gradient itself is differentiated,
these values are followed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_influence.core.containers import map_tensors, tensors_in
from lightning_influence.core.origin import is_users

_REQUIRES_GRAD, _DATA = (cast(Any, each).__get__ for each in (Tensor.requires_grad, Tensor.data))
_DETACHING = frozenset({Tensor.detach, torch.detach, _DATA})
# What leaves the graph for good: a number that may come back into the loss.
_READING = frozenset(
    {Tensor.item, Tensor.__float__, Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.__deepcopy__}
)
_OF_TENSOR = frozenset({Tensor.detach_, torch.detach_})
_SETTING_GRAD = frozenset({Tensor.requires_grad_, cast(Any, Tensor.requires_grad).__set__})
_IN_PLACE = frozenset(
    f"__{name}__" for name in ("setitem", "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow")
)
_HELD = "_lightning_influence_constant"


class DetachedValues(TorchFunctionMode):
    """A context for forward passes: gradients that are taken of them are training's, but know what they depend on.

    Args:
        module: The model. What a step writes to its parameters and buffers is no part of a graph.

    Attributes:
        follow: Whether derivatives go through detached values, from now on.
        met: Whether a value was detached.
        lost: Whether a number was read out of the graph, which may have come back.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._state = {id(tensor) for tensor in (*module.parameters(), *module.buffers())}
        self.follow = self.met = self.lost = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the call; what training takes for constants looks like one."""
        kwargs = kwargs or {}
        used = [tensor for tensor in tensors_in((args, kwargs)) if tensor.requires_grad]
        if not used:
            return func(*args, **kwargs)
        if func is _REQUIRES_GRAD:
            return not _held(args[0])
        if func in _DETACHING:
            return self._held(args[0])
        turned_off = func in _SETTING_GRAD and not (*args[1:], *kwargs.values(), True)[0]
        if turned_off or func in _OF_TENSOR:
            self.met = True
            raise RuntimeError("`detach_` or `requires_grad_(False)` changes a tensor of the graph itself")
        if func in _READING:
            self.lost |= used[0].is_floating_point() and _asked_by_user()
            return func(args[0].detach(), *args[1:], **kwargs)
        name = func.__name__
        in_place = name in _IN_PLACE or (name.endswith("_") and not name.endswith("__")) or "out" in kwargs
        changed = [args[0]] if in_place and args else []
        if changed and (id(changed[0]) in self._state or not (torch.is_grad_enabled() or _held(changed[0]))):
            with torch.no_grad():
                return func(*args, **kwargs)
        if not torch.is_grad_enabled():
            args, kwargs = map_tensors(self._held, (args, kwargs))
            with torch.enable_grad():
                return self._noted(func(*args, **kwargs), changed, constant=True)
        return self._noted(func(*args, **kwargs), changed, constant=all(map(_held, used)))

    def _held(self, tensor: Tensor) -> Tensor:
        """Return a value as a constant."""
        if not tensor.requires_grad or _held(tensor):
            return tensor
        self.met = True
        with torch.enable_grad():
            found: Tensor = _Held.apply(tensor, self)
        setattr(found, _HELD, True)
        return found

    def _noted(self, output: Any, changed: list[Any], *, constant: bool) -> Any:
        for tensor in tensors_in((output, changed)):
            if tensor.requires_grad and _held(tensor) != constant:
                setattr(tensor, _HELD, constant)
        return output


def _asked_by_user() -> bool:
    """Tell whether it is the user's own code that reads a number: Lightning does so to log it, taps to check it."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code.co_name == "__torch_function__":  # of other modes
        frame = frame.f_back
    return frame is not None and is_users(str(frame.f_globals.get("__name__")))


def _held(tensor: Tensor) -> bool:
    return bool(getattr(tensor, _HELD, False))


class _Held(torch.autograd.Function):
    """The same values; no derivative but where they are followed."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, owner: DetachedValues) -> Tensor:
        ctx.owner = owner
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None]:
        return gradient if ctx.owner.follow else None, None
