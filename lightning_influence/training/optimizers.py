"""What torch's optimizers do with a gradient: how far it moves the weights, and how it is scaled elementwise.

A constant gradient ``g`` moves the weights by ``rate · P g`` per step, once momentum has built up. For gradient descent
``P`` is the identity and the rate is ``η (1 - dampening) / (1 - momentum)``; for Adam (Kingma & Ba 2015, 1412.6980)
``P = 1 / (√v̂ + ε)`` and the rate is ``η``: its mean of gradients is normalised. Weight decay moves the weights, too,
but not according to any example.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_influence.core.sharding import gathered, names_of

# Optimizers whose `weight_decay` is added to the gradient.
_L2_OPTIMIZERS = (
    torch.optim.SGD,
    torch.optim.ASGD,
    torch.optim.Adam,
    torch.optim.Adamax,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.Adagrad,
    torch.optim.Adadelta,
    torch.optim.RMSprop,
)


def inner(optimizer: Any) -> Any:
    """Return the torch optimizer within a wrapper (Lightning's, an accelerator's)."""
    return getattr(optimizer, "optimizer", optimizer)


def name_of(optimizer: Any) -> str:
    """Return the name that an optimizer goes by in messages and checkpoints."""
    return type(inner(optimizer)).__name__


def is_understood(optimizer: Any) -> bool:
    """Tell whether it is known how the optimizer turns a gradient into a step: if not, plain steps are assumed.

    A subclass with a ``step`` of its own may do anything.
    """
    return _kind(inner(optimizer)) is not None


def rate(group: Mapping[str, Any]) -> float:
    """Return how far a constant gradient (times ``P``) moves the parameters of a group per step."""
    momentum, dampening = float(group.get("momentum") or 0.0), float(group.get("dampening") or 0.0)
    return float(group["lr"]) * (1 - dampening * (momentum > 0)) / (1 - momentum)


def l2_coefficient(optimizer: Any, group: Mapping[str, Any]) -> float:
    """Return the coefficient of the L2 term that an optimizer adds to the loss; decoupled decay adds none."""
    if not isinstance(optimizer, _L2_OPTIMIZERS) or isinstance(optimizer, torch.optim.AdamW):
        return 0.0
    return 0.0 if group.get("decoupled_weight_decay") else float(group.get("weight_decay") or 0.0)


def is_preconditioned(optimizer: Any) -> bool:
    """Tell whether the optimizer scales gradients elementwise, in a way that is understood."""
    return _kind(inner(optimizer)) in _PRECONDITIONERS


def preconditioners(optimizers: Iterable[Any], module: nn.Module) -> Mapping[str, Tensor]:
    """Return what the optimizers multiply gradients with, elementwise, according to their state when it is asked for.

    All together they are as large as the model: each is computed anew whenever it is asked for, and not kept.

    Args:
        optimizers: The optimizers of the run.
        module: The model, for the names of its parameters.

    Returns:
        Parameter name to ``P``, shaped like the parameter; without the parameters of optimizers that take plain steps
        (or are not understood), and without those that have not been stepped yet.
    """
    return _Preconditioners(optimizers, module)


class _Preconditioners(Mapping[str, Tensor]):
    def __init__(self, optimizers: Iterable[Any], module: nn.Module) -> None:
        names = names_of(module)
        self._found: dict[str, tuple[Any, Mapping[str, Any], Tensor]] = {
            names[id(parameter)]: (optimizer, group, parameter)
            for optimizer in map(inner, optimizers)
            for group in optimizer.param_groups
            for parameter in group["params"]
            if id(parameter) in names and _is_scaled(optimizer, parameter)
        }

    def __getitem__(self, name: str) -> Tensor:
        scale = preconditioner(*self._found[name])
        assert scale is not None
        return scale

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)


def preconditioner(optimizer: Any, group: Mapping[str, Any], parameter: Tensor) -> Tensor | None:
    """Return what one parameter's gradient is multiplied with, None if that is nothing or not known yet.

    Args:
        optimizer: The optimizer.
        group: Its parameter group.
        parameter: The parameter.
    """
    optimizer = inner(optimizer)
    if not _is_scaled(optimizer, parameter):
        return None
    return _PRECONDITIONERS[_kind(optimizer) or ""](optimizer.state[parameter], group)


def _is_scaled(optimizer: Any, parameter: Tensor) -> bool:
    """Tell whether it is known what an optimizer multiplies a parameter's gradient with."""
    state = optimizer.state.get(parameter)
    return _kind(optimizer) in _PRECONDITIONERS and bool(state) and _has_stepped(state)


def _has_stepped(state: Mapping[str, Any]) -> bool:
    """Tell whether there is a scale yet: Adagrad has a state before its first step, fused ones after a skipped one."""
    step = state.get("step", 1)
    # A count on the device is not read: that would wait for it.
    return (isinstance(step, Tensor) and step.device.type != "cpu") or float(step) > 0


def _adam(state: Mapping[str, Any], group: Mapping[str, Any]) -> Tensor:
    second = state["max_exp_avg_sq"] if group.get("amsgrad") else state["exp_avg_sq"]
    beta, step = float(group["betas"][1]), state["step"]
    if isinstance(step, Tensor) and step.device.type != "cpu" and beta:
        # Fused and capturable optimizers count on the device: to read it would wait for the device, once a parameter.
        return _inverse(second, -torch.expm1(step * math.log(beta)), float(group["eps"]))
    return _inverse(second, 1 - beta ** float(step), float(group["eps"]))


def _rmsprop(state: Mapping[str, Any], group: Mapping[str, Any]) -> Tensor:
    second = state["square_avg"]
    if group.get("centered"):
        second = second - state["grad_avg"].square()
    return _inverse(second, 1.0, float(group["eps"]))


def _adagrad(state: Mapping[str, Any], group: Mapping[str, Any]) -> Tensor:
    scale, decay, step = _inverse(state["sum"], 1.0, float(group["eps"])), group.get("lr_decay"), state["step"]
    if not decay:
        return scale
    # It is not in the group's `lr`. A count on the device stays there.
    return scale.div_(1 + ((step if isinstance(step, Tensor) else float(step)) - 1) * float(decay))


def _inverse(second: Tensor, correction: float | Tensor, eps: float) -> Tensor:
    """Return ``1 / (√(second / correction) + ε)``, and 0 for an entry that no step has moved yet.

    With its ``1/ε`` the first example with a rare word would outweigh all others.
    """
    second = gathered(second)
    scale = second.detach().sqrt().mul_(correction**-0.5).add_(eps).reciprocal_()
    return scale.masked_fill_(second == 0, 0.0)


_Scale = Callable[[Mapping[str, Any], Mapping[str, Any]], Tensor]
_PRECONDITIONERS: dict[str, _Scale] = {"Adam": _adam, "RMSprop": _rmsprop, "Adagrad": _adagrad}
_PLAIN = ("SGD",)
KINDS = (*_PLAIN, *_PRECONDITIONERS, "AdamW")
"""Names of the optimizers of torch that are understood."""


def _kind(optimizer: Any) -> str | None:
    """Return the name of the torch optimizer whose ``step`` this one takes, if it is one of those understood."""
    return _kind_of_type(type(optimizer))  # type: ignore[arg-type]


@functools.cache
def _kind_of_type(cls: Any) -> str | None:
    # Profiling hooks wrap `step` on every class that is made an optimizer of.
    step = inspect.unwrap(cls.step)
    for name in (*_PLAIN, *_PRECONDITIONERS):
        if step is inspect.unwrap(getattr(torch.optim, name).step):
            return name
    return "Adam" if step is inspect.unwrap(torch.optim.AdamW.step) else None
