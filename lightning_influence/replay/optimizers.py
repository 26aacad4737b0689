"""What torch's optimizers do to weights, as functions that can be differentiated.

All of them work entry by entry: parameters that are stepped alike are one vector here. Names are those of
``torch.optim``: ``p`` parameters, ``g`` gradient, ``buf`` momentum.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lightning_influence.replay.record import ReplayError

Slots: TypeAlias = "dict[str, Tensor]"
"""The optimizer's state by its names there (``exp_avg``, ...), vectors like the parameters."""
Rule: TypeAlias = "Callable[[Tensor, Tensor, Slots, Mapping[str, Any], int], tuple[Tensor, Slots]]"
"""``(p, g, slots, group, steps before this one) -> (p, slots)`` after the step."""


def _sgd(p: Tensor, g: Tensor, slots: Slots, group: Mapping[str, Any], before: int) -> tuple[Tensor, Slots]:
    g = _with_l2(p, g, group)
    momentum = group["momentum"]
    if not momentum:
        return p - group["lr"] * g, {}
    # The first step takes the gradient as it is, whatever the dampening.
    buf = momentum * slots["momentum_buffer"] + (1 - group["dampening"]) * g if before else g
    return p - group["lr"] * (g + momentum * buf if group["nesterov"] else buf), {"momentum_buffer": buf}


def _adam(p: Tensor, g: Tensor, slots: Slots, group: Mapping[str, Any], before: int) -> tuple[Tensor, Slots]:
    if group.get("decoupled_weight_decay"):
        p, g = p * (1 - group["lr"] * group["weight_decay"]), -g if group.get("maximize") else g
    else:
        g = _with_l2(p, g, group)
    (first, second), step = (float(beta) for beta in group["betas"]), before + 1
    m = first * slots["exp_avg"] + (1 - first) * g
    v = second * slots["exp_avg_sq"] + (1 - second) * g.square()
    size = group["lr"] / (1 - first**step)
    return p - size * m / (_root(v) / (1 - second**step) ** 0.5 + group["eps"]), {"exp_avg": m, "exp_avg_sq": v}


def _adamw(p: Tensor, g: Tensor, slots: Slots, group: Mapping[str, Any], before: int) -> tuple[Tensor, Slots]:
    return _adam(p, g, slots, {**group, "decoupled_weight_decay": True}, before)


def _rmsprop(p: Tensor, g: Tensor, slots: Slots, group: Mapping[str, Any], before: int) -> tuple[Tensor, Slots]:
    g, alpha, new = _with_l2(p, g, group), group["alpha"], dict[str, Tensor]()
    v = new["square_avg"] = alpha * slots["square_avg"] + (1 - alpha) * g.square()
    if group["centered"]:
        mean = new["grad_avg"] = alpha * slots["grad_avg"] + (1 - alpha) * g
        v = v - mean.square()
    step = g / (_root(v) + group["eps"])
    if group["momentum"]:
        step = new["momentum_buffer"] = group["momentum"] * slots["momentum_buffer"] + step
    return p - group["lr"] * step, new


def _with_l2(p: Tensor, g: Tensor, group: Mapping[str, Any]) -> Tensor:
    g = -g if group.get("maximize") else g
    return g + group["weight_decay"] * p if group["weight_decay"] else g


def _root(v: Tensor) -> Tensor:
    """Return ``√v``, whose derivative is taken for 0 at 0, where no gradient has been yet."""
    positive = v > 0
    return torch.where(positive, torch.where(positive, v, 1).sqrt(), 0)


RULES: dict[str, Rule] = {"SGD": _sgd, "Adam": _adam, "AdamW": _adamw, "RMSprop": _rmsprop}
"""Optimizers whose steps are differentiated, by their names in ``torch.optim``."""


def rule_of(optimizer: str, group: Mapping[str, Any]) -> Rule:
    """Return what an optimizer does to the members of a group.

    Raises:
        ReplayError: If its steps are not differentiated.
    """
    if optimizer not in RULES:
        raise ReplayError(
            f"the run was trained by {optimizer}; its steps can't be differentiated here, only those of "
            f"{', '.join(RULES)}. Train by one of them, or ask for the influence at the end (`report.queries`)."
        )
    if group.get("amsgrad"):
        raise ReplayError(
            f"{optimizer} was run with amsgrad=True, whose maximum over steps has no useful derivative; train with "
            "amsgrad=False to replay the run."
        )
    return RULES[optimizer]


def slots_of(optimizer: str, group: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of the vectors that an optimizer keeps for the members of a group."""
    momentum = ("momentum_buffer",) if group.get("momentum") else ()
    if optimizer == "RMSprop":
        return ("square_avg", *(("grad_avg",) if group["centered"] else ()), *momentum)
    return momentum if optimizer == "SGD" else ("exp_avg", "exp_avg_sq")


def clipped(g: Tensor, clip: float, by: str) -> Tensor:
    """Return a gradient as ``torch.nn.utils`` clips it, all parameters in one vector."""
    if by == "value":
        return g.clamp(-clip, clip)
    # At a gradient of zero the norm has no derivative, and is not clipped.
    return g * (clip / (g.norm() + 1e-6)).clamp(max=1.0) if bool(g.any()) else g
