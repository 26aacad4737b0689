"""Losses of class decisions that a task has written by hand, known by what they do to the logits.

Whoever writes ``-log_softmax(z)[range(n), y]``, ``logsumexp(z) - z_y``, ``(one_hot * log_softmax).sum()`` or a focal
loss takes a softmax (or a sigmoid) on the way, and the tap notes of what. A loss that looks at the logits ``z`` of a
row only through the probability of one class ``y`` has the gradient ``w (p - e_y)`` there, which no other loss has: it
tells the label and the weight. Nothing is taken for granted: the gradient has to be this one in all rows of the batch,
and where that is little evidence (two classes, few rows, soft labels, a sigmoid) the loss has to be ``Σ w CE(z, y)``,
too.

Index legend: ``r`` rows (decisions), ``c`` classes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_influence.core.precision import working
from lightning_influence.core.torch_private import ahead_of, has_hooks, saved, version
from lightning_influence.objective.losses import LossCall
from lightning_influence.objective.losses.binary import BinaryCrossEntropy
from lightning_influence.objective.losses.cross_entropy import CrossEntropy
from lightning_influence.objective.scale import Place

_SOFTMAX: frozenset[Callable[..., Any]] = frozenset(
    {
        *(F.log_softmax, torch.log_softmax, Tensor.log_softmax, torch.special.log_softmax),
        *(F.softmax, torch.softmax, Tensor.softmax, torch.special.softmax),
        *(torch.logsumexp, Tensor.logsumexp, torch.special.logsumexp),
    }
)
_SIGMOID: frozenset[Callable[..., Any]] = frozenset(
    {F.logsigmoid, F.softplus, F.sigmoid, torch.sigmoid, Tensor.sigmoid, torch.special.expit}
)
DECIDING = _SOFTMAX | _SIGMOID | {torch.exp, Tensor.exp}
"""Functions whose input may be logits."""

# Only the last ones of a step: those before are inside the model, and gradients that reach them cost.
MOST = 8
# Share of a row's gradient that may be something else: half precision rounds to 0.4 %.
_CLOSE = 1e-2
# Steps back from the input of a sigmoid, on which the sign of a margin may have come in.
_HOPS = 6
# Equations beyond which the direction of the gradient alone is taken for evidence.
_ENOUGH = 8


class Decision(NamedTuple):
    """What a softmax or a sigmoid was taken of.

    Attributes:
        logits: In the graph.
        dim: Of the classes; None for yes-or-no decisions.
        version: Of the logits at the time.
        place: Where, see ``scale.calling_place``.
        after: How many known losses were computed before.
    """

    logits: Tensor
    dim: int | None
    version: int
    place: Place
    after: int = 0


class HandWritten(NamedTuple):
    """A loss that was written by hand.

    Attributes:
        call: The call of torch's own loss that it is, with ``reduction="none"``.
        weight: Of every element in the loss.
        logits: What a softmax or a sigmoid was taken of.
        after: How many known losses were computed before.
    """

    call: LossCall
    weight: Tensor
    logits: Tensor
    after: int


class HandWrittenCrossEntropy(CrossEntropy):
    """A softmax cross-entropy that a task has written by hand."""


class HandWrittenBinary(BinaryCrossEntropy):
    """A logistic loss that a task has written by hand."""


HAND_WRITTEN = frozenset({HandWrittenCrossEntropy.__name__, HandWrittenBinary.__name__})
"""Their kinds in a ``TermKey``."""


def decision(
    function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[Tensor, int | None] | None:
    """Return the input of one of ``DECIDING`` and the dimension of the classes; None if it can't be logits."""
    z = args[0] if args else kwargs.get("input")
    if not isinstance(z, Tensor) or not z.requires_grad or z.grad_fn is None:
        return None
    if function in _SIGMOID:
        return z, None
    given = kwargs.get("dim", args[1] if len(args) > 1 else None) if function in _SOFTMAX else -1
    dim = given[0] if isinstance(given, (tuple, list)) and len(given) == 1 else 1 if given is None else given
    if not isinstance(dim, int) or z.ndim < 2:
        return None
    dim %= z.ndim
    # Scores of attention have more dimensions, and are of no use here.
    return (z, dim) if dim and z.shape[dim] > 1 and (dim == 1 or z.ndim == 3) else None


def handwritten(
    loss: Tensor, decisions: Sequence[Decision], known: Collection[LossCall] = (), *, sure: bool = False
) -> list[HandWritten]:
    """Return the losses written by hand that a loss is made of.

    Args:
        loss: A number, in the graph. What is run backward is the little between it and the logits.
        decisions: What was heard on the way.
        known: Known calls that the loss is made of as well: their part of it, and of its gradient, is left out.
        sure: Whether these decisions are known to be those of such a loss, in other batches.
    """
    candidates: list[Decision] = []
    for each in decisions:
        new = all(each.logits is not other.logits for other in candidates)
        if new and version(each.logits) == each.version and not has_hooks(each.logits):
            candidates.append(each)
    if not candidates or loss.numel() != 1:
        return []
    gradients, rest = _besides(loss, [each.logits for each in candidates], known)
    found = list[HandWritten]()
    for each, gradient in zip(candidates, gradients, strict=True):
        if gradient is None:
            continue
        read = _yes_or_no(each, gradient, rest) if each.dim is None else _choice(each, gradient, rest, sure)
        # A softmax of log-probabilities tells once more what that of the logits has told.
        if read is not None and not any(_same(read[0], other.call) for other in found):
            found.append(HandWritten(*read, each.logits, each.after))
    return found


def _besides(
    loss: Tensor, logits: Sequence[Tensor], known: Collection[LossCall]
) -> tuple[Sequence[Tensor | None], float]:
    """Return the gradient at the logits, None for none, and the value of what a loss has besides known calls."""
    outputs = [call.output for call in known]
    found = torch.autograd.grad(loss, [*logits, *outputs], retain_graph=True, allow_unused=True)
    gradients, coefficients = found[: len(logits)], found[len(logits) :]
    used = [(output, c) for output, c in zip(outputs, coefficients, strict=True) if c is not None]
    rest = float(loss.detach()) - sum(float((c * output.detach()).sum()) for output, c in used)
    if not used:
        return gradients, rest
    through = torch.autograd.grad(
        [output for output, _ in used], logits, [c for _, c in used], retain_graph=True, allow_unused=True
    )
    return [_difference(*pair) for pair in zip(gradients, through, strict=True)], rest


def _difference(gradient: Tensor | None, part: Tensor | None) -> Tensor | None:
    """Return a gradient without a part of it; None if that is all but rounding."""
    if gradient is None or part is None:
        return gradient
    rest = gradient - part
    return rest if bool(rest.norm() > 64 * torch.finfo(rest.dtype).eps * gradient.norm()) else None


def _choice(of: Decision, gradient: Tensor, total: float, sure: bool) -> tuple[LossCall, Tensor] | None:
    """Read a choice between classes."""
    assert of.dim is not None
    with torch.no_grad():
        z, g = (working(t.detach()).movedim(of.dim, -1) for t in (of.logits, gradient))
        shape, (z, g) = z.shape[:-1], (t.reshape(-1, t.shape[-1]) for t in (z, g))
        p = z.softmax(1)
        hard = _hard(p, g)
        if hard is not None:
            label, weight = hard
            ce = F.cross_entropy(z, label, reduction="none")
            classes, rows = z.shape[1], int((weight > 0).sum())
            plain = classes > 2 and (sure or rows * (classes - 2) >= _ENOUGH)
            if not (plain or _is(float((weight * ce).sum()), total, z.dtype)):
                return None
            target = label.masked_fill(weight == 0, -100).reshape(shape)
        else:
            soft = _soft(z, p, g, total)
            if soft is None:
                return None
            target, weight = soft
    logits = of.logits.movedim(of.dim, 1)
    settings: dict[str, Any] = {}
    if hard is None:
        smoothed = _smoothed(target)
        settings = {} if smoothed is None else {"label_smoothing": smoothed[1]}
        soft_target = target.reshape(*shape, -1).movedim(-1, 1).to(logits.dtype)
        target = soft_target if smoothed is None else smoothed[0].reshape(shape)
    output = F.cross_entropy(logits, target, reduction="none", **settings)
    call = HandWrittenCrossEntropy(output, logits, target, "none", place=of.place, **settings)
    return call, weight.reshape(shape).to(output.dtype)


def _hard(p: Tensor, g: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return the label and the weight of every row, 0 where it has no gradient, if the gradient is ``w (p - e_y)``."""
    # Where the label is as good as sure, its own part has rounded to zero as others have, which are impossible then.
    lowest = g == g.amin(1, keepdim=True)
    label = torch.where(lowest, p, -1).argmax(1, keepdim=True)
    active = g.abs().amax(1) > 0
    others = p.scatter(1, label, 0)
    unit = others / others.amax(1, keepdim=True).clamp(min=torch.finfo(p.dtype).tiny)  # its squares do not vanish
    off = g.scatter(1, label, 0)
    weight = (off * unit).sum(1) / (others * unit).sum(1)
    weight = torch.where(active, weight, 0)
    if not bool(active.any()) or not bool((torch.isfinite(weight) & (weight >= 0)).all()):
        return None
    expected = weight.unsqueeze(1) * others.scatter(1, label, -others.sum(1, keepdim=True))
    error, size = (g - expected).norm(dim=1), g.norm(dim=1)
    rounding = 8 * torch.finfo(p.dtype).eps * weight.max()
    if not bool((error <= _CLOSE * size + rounding).all()):
        return None
    size = torch.where(active, expected.square().sum(1), 0)
    mean = (g * expected).sum() / (size / weight.clamp(min=torch.finfo(p.dtype).tiny)).sum()
    # One weight for all is not left to the rounding of every row.
    alike = (weight - mean).abs() <= _CLOSE * mean
    return label.squeeze(1), torch.where(active, mean, 0) if bool((alike | ~active).all()) else weight


def _soft(z: Tensor, p: Tensor, g: Tensor, total: float) -> tuple[Tensor, Tensor] | None:
    """Return the distributions ``t`` and one weight, if the gradient is ``w (p - t)`` and the loss ``w Σ CE(z, t)``."""
    if bool((g.sum(1).abs() > 1e-3 * g.abs().sum(1)).any()):  # no difference of two distributions
        return None
    entropy = float(torch.distributions.Categorical(logits=z).entropy().sum())
    # The one weight with which the loss is right; a mean's or a sum's, or that of a trainer that divides or scales it.
    weight = (total - float((z * g).sum())) / entropy if entropy else 0.0
    times = weight * len(z)
    whole = [value for value in (times, 1 / times if times else 0, weight, 1 / weight if weight else 0) if value > 0.5]
    if weight <= 0 or not any(abs(value - round(value)) <= 1e-4 * value and round(value) <= 64 for value in whole):
        return None
    target = p - g / weight
    if bool((target < -1e-3).any()):
        return None
    target = torch.where(target > 1e-5, target, 0)
    return target / target.sum(1, keepdim=True), torch.full_like(z[:, 0], weight)


def _smoothed(target: Tensor) -> tuple[Tensor, float] | None:
    """Return labels and smoothing, if distributions ``[r, c]`` are smoothed labels."""
    largest, label = target.max(1, keepdim=True)
    rest = (1 - largest) / (target.shape[1] - 1)
    by = float(rest.mean()) * target.shape[1]
    expected = torch.full_like(target, by / target.shape[1]).scatter(1, label, 1 - by + by / target.shape[1])
    return (label.squeeze(1), by) if by < 1 and torch.allclose(target, expected, atol=1e-4) else None


def _yes_or_no(of: Decision, gradient: Tensor, total: float) -> tuple[LossCall, Tensor] | None:
    """Read yes-or-no decisions: the loss has to be what their labels and weights say."""
    signs = _signs(of.logits)
    if signs is None:
        return None
    logits = of.logits if bool((signs == 1).all()) else of.logits * signs
    with torch.no_grad():
        z, g = working(logits.detach()), working(gradient) * signs
        label = (g < 0).to(z.dtype)
        slope = (z * (1 - 2 * label)).sigmoid()  # |σ(z) - y|
        weight = torch.where(g != 0, g.abs() / slope, 0)
        if not bool(torch.isfinite(weight).all()) or not bool((weight > 0).any()):
            return None
        counted = weight > 0
        mean = g.abs().sum() / slope[counted].sum()
        if bool(((weight - mean).abs() <= _CLOSE * mean)[counted].all()):
            weight = torch.where(counted, mean, 0)
        if not _is(
            float((weight * F.binary_cross_entropy_with_logits(z, label, reduction="none")).sum()), total, z.dtype
        ):
            return None
    target = label.to(logits.dtype)
    output = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    call = HandWrittenBinary(output, logits, target, "none", place=of.place)
    return call.counting(counted), weight.to(output.dtype)


def _signs(logits: Tensor) -> Tensor | None:
    """Return the signs with which logits come as margins: ``softplus(-s z)``, where the label is in ``s``; else ones.

    None where the logits were chosen by something else that may be the label.
    """
    signs, node = torch.ones_like(logits, requires_grad=False), logits.grad_fn
    for _ in range(_HOPS):
        name = "" if node is None else node.name()
        if name == "NegBackward0":
            signs = -signs
        elif name in ("MulBackward0", "DivBackward0"):
            factor = next((t for t in (saved(node, "other"), saved(node, "self")) if t is not None), None)
            if factor is None or factor.requires_grad or factor.numel() not in (1, logits.numel()):
                return signs
            own = factor.detach().sign()
            if factor.numel() > 1 and not (torch.equal(own, factor.detach()) and bool(own.all())):
                return None
            signs = signs * (own.reshape(logits.shape) if factor.numel() > 1 else own.reshape(()))
        elif name.startswith(("Where", "Index", "Gather", "MaskedFill")):
            return None
        elif not name.startswith(
            ("View", "Squeeze", "Unsqueeze", "Reshape", "ToCopy", "UnsafeView", "Select", "Expand")
        ):
            return signs
        node = next((following for following, _ in ahead_of(node) if following is not None), None)
    return signs


def _is(value: float, total: float, dtype: torch.dtype) -> bool:
    return abs(value - total) <= max(1e-4, 16 * torch.finfo(dtype).eps) * max(abs(total), 1e-8)


def _same(call: LossCall, other: LossCall) -> bool:
    if type(call) is not type(other) or call.input.shape != other.input.shape:
        return False
    if call.target.shape != other.target.shape or not torch.equal(call.target, other.target):
        return False
    return torch.allclose(call.output.detach(), other.output.detach(), rtol=1e-3, atol=1e-6)
