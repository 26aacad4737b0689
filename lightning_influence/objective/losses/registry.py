"""Recognising calls of loss functions."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_influence.objective.losses.base import LossCall
from lightning_influence.objective.losses.binary import BinaryCrossEntropy, BinaryProbabilities
from lightning_influence.objective.losses.cross_entropy import CrossEntropy, Divergence
from lightning_influence.objective.losses.likelihood import NormalLikelihood, PoissonLikelihood
from lightning_influence.objective.losses.regression import AbsoluteError, HuberError, SmoothAbsoluteError, SquaredError

_Reader: TypeAlias = Callable[[Tensor, dict[str, Any]], LossCall | None]


def known_loss(function: Callable[..., Any]) -> bool:
    """Tell whether calls of ``function`` are understood."""
    return function in _READERS


def known_losses() -> str:
    """Return the names of the functions that are understood, for messages."""
    return ", ".join(f"F.{function.__name__}" for function in _READERS)


def all_arguments(function: Callable[..., Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments of a call that a torch function mode has intercepted, with the one torch loses.

    ``F.l1_loss`` of torch 2.13 hands its ``weight`` to no mode: the mode would run it without. It still stands in the
    frame of the intercepted call.
    """
    if function is not F.l1_loss or "weight" in kwargs:
        return kwargs
    frame = sys._getframe()
    while frame.f_back is not None and frame.f_code is not F.l1_loss.__code__:
        frame = frame.f_back
    weight = frame.f_locals.get("weight") if frame.f_code is F.l1_loss.__code__ else None
    return kwargs if weight is None else {**kwargs, "weight": weight}


def read_call(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
) -> LossCall | None:
    """Turn one call of a known loss function into a ``LossCall``.

    Args:
        function: A function for which ``known_loss`` is true.
        args: Positional arguments of the call.
        kwargs: Keyword arguments of the call.
        output: What the call returned.

    Returns:
        The call, its logits still attached to the graph; None for a form that is not understood: predictions that
        broadcasting pairs with the targets of other examples, a divergence of what is no distribution.
    """
    bound = _SIGNATURES[function].bind(*args, **kwargs)
    bound.apply_defaults()
    return _READERS[function](output, bound.arguments)


def _reduction(arguments: dict[str, Any]) -> str:
    if arguments.get("size_average") is None and arguments.get("reduce") is None:
        return str(arguments["reduction"])
    # size_average/reduce are deprecated but still obeyed by torch, whatever `reduction` says.
    if arguments["reduce"] is False:
        return "none"
    return "sum" if arguments["size_average"] is False else "mean"


def _read_cross_entropy(output: Tensor, a: dict[str, Any], *, log_probabilities: bool = False) -> LossCall:
    return CrossEntropy(
        output,
        a["input"],
        a["target"],
        _reduction(a),
        class_weights=a["weight"],
        ignore_index=a["ignore_index"],
        label_smoothing=a.get("label_smoothing", 0.0),
        log_probabilities=log_probabilities,
    )


def _read_bce(output: Tensor, a: dict[str, Any]) -> LossCall:
    return BinaryCrossEntropy(
        output,
        a["input"],
        a["target"],
        _reduction(a),
        element_weights=a["weight"],
        pos_weight=a["pos_weight"],
    )


def _read_bce_of_probabilities(output: Tensor, a: dict[str, Any]) -> LossCall:
    return BinaryProbabilities(output, a["input"], a["target"], _reduction(a), element_weights=a["weight"])


def _pair(a: dict[str, Any]) -> tuple[Tensor, Tensor] | None:
    """Broadcast input and target, if that leaves every example with its own target.

    ``[n, 1]`` and ``[n]`` make ``[n, n]``, every prediction with every target: nothing that examples could share out.
    """
    prediction, target = a["input"], a["target"]
    if prediction.shape == target.shape:
        return prediction, target
    if prediction.ndim == 0:
        return None
    rows_agree = prediction.ndim == target.ndim and prediction.shape[0] == target.shape[0]
    shape = torch.broadcast_shapes(prediction.shape, target.shape)
    if shape != prediction.shape and not rows_agree:
        return None
    return prediction.expand(shape), target.expand(shape)


def _elementwise(kind: Callable[..., LossCall], *options: str) -> _Reader:
    """Return the reader of a function of predictions and targets, with these arguments besides."""

    def read(output: Tensor, a: dict[str, Any]) -> LossCall | None:
        pair, own = _pair(a), {name: a[name] for name in options}
        return None if pair is None else kind(output, *pair, _reduction(a), element_weights=a.get("weight"), **own)

    return read


def _read_smooth_l1(output: Tensor, a: dict[str, Any]) -> LossCall | None:
    # With `beta=0` torch takes it for the absolute error.
    read = _elementwise(SmoothAbsoluteError, "beta") if a["beta"] else _elementwise(AbsoluteError)
    return read(output, a)


def _read_normal(output: Tensor, a: dict[str, Any]) -> LossCall | None:
    mean, target, variance = a["input"], a["target"], a["var"]
    if isinstance(variance, float):
        variance = torch.full_like(mean, variance, requires_grad=False)
    shapes = (mean.shape, (*mean.shape[:-1], 1), mean.shape[:-1])
    if mean.shape != target.shape or tuple(variance.shape) not in map(tuple, shapes):
        return None
    return NormalLikelihood(output, mean, target, _reduction(a), variance=variance, full=a["full"], eps=a["eps"])


def _read_divergence(output: Tensor, a: dict[str, Any]) -> LossCall | None:
    log_p, target = a["input"], a["target"]
    if log_p.shape != target.shape or log_p.ndim < 2:
        return None
    # The call does not say where the classes are; the probabilities add up to 1 along them.
    totals = [log_p.detach().float().logsumexp(dim).abs().amax() for dim in (log_p.ndim - 1, 1)]
    class_dim = next((dim for dim, off in zip((log_p.ndim - 1, 1), totals, strict=True) if float(off) < 1e-2), None)
    if class_dim is None:
        return None
    target = target.exp() if a["log_target"] else target
    reduction = _reduction(a)
    return Divergence(
        output,
        log_p.movedim(class_dim, 1),
        target.movedim(class_dim, 1),
        "mean" if reduction == "batchmean" else reduction,
        class_dim=class_dim,
        rows=len(log_p) if reduction == "batchmean" else None,
    )


_READERS: dict[Callable[..., Any], _Reader] = {
    F.cross_entropy: _read_cross_entropy,
    F.nll_loss: partial(_read_cross_entropy, log_probabilities=True),
    F.binary_cross_entropy_with_logits: _read_bce,
    F.binary_cross_entropy: _read_bce_of_probabilities,
    F.mse_loss: _elementwise(SquaredError),
    F.l1_loss: _elementwise(AbsoluteError),
    F.smooth_l1_loss: _read_smooth_l1,
    F.huber_loss: _elementwise(HuberError, "delta"),
    F.poisson_nll_loss: _elementwise(PoissonLikelihood, "log_input", "full", "eps"),
    F.gaussian_nll_loss: _read_normal,
    F.kl_div: _read_divergence,
}
_SIGNATURES = {function: inspect.signature(function) for function in _READERS}
