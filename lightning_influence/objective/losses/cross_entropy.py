"""Losses of class decisions: softmax cross-entropy on logits or log-probabilities.

Index legend: ``n`` examples, ``r`` rows of the logits, ``c`` classes, ``...`` further positions such as pixels of a
segmentation map.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_influence.core.precision import working
from lightning_influence.objective.losses.base import LossCall, reduction_of, single
from lightning_influence.objective.losses.output_curvature import OutputCurvature, Softmax, root_of
from lightning_influence.objective.losses.registry import reads

_Call = TypeVar("_Call", bound="CrossEntropy")

# Of logits, what is computed beside them in as many parts; no part is smaller than so many numbers.
_PARTS, _PART = 32, 2**19
_DECIDED = {"predicted", "label", "probabilities"}


@reads(F.cross_entropy)
@reads(F.nll_loss, log_probabilities=True)
@dataclass(frozen=True, eq=False)
class CrossEntropy(LossCall):
    """``F.cross_entropy`` on logits or ``F.nll_loss`` on log-probabilities, ``input: [r, c, ...]``.

    Covers class weights, ``ignore_index``, label smoothing and probability targets. In log-probabilities the loss is
    linear; but they are logits, too, of the same distribution: the curvature is that in the logits they came from.
    """

    class_weights: Tensor | None = None
    ignore_index: int = -100
    label_smoothing: float = 0.0
    log_probabilities: bool = False

    @classmethod
    def read(cls, output: Tensor, arguments: dict[str, Any], *, log_probabilities: bool = False) -> LossCall | None:
        """Return the call."""
        a, smoothing = arguments, arguments.get("label_smoothing", 0.0)
        settings = a["weight"], a["ignore_index"], smoothing, log_probabilities
        return cls(output, a["input"], a["target"], reduction_of(a), *settings)

    @property
    def element_shape(self) -> torch.Size:
        """``[r, ...]``; nothing for a single example that comes as ``[c]``."""
        return torch.Size((self.input.shape[0], *self.input.shape[2:])) if self.input.ndim >= 2 else torch.Size()

    def _element_dim(self, dim: int) -> int | None:
        return None if dim == 1 else max(dim - 1, 0)

    def elements(self) -> Tensor:
        """Return ``[r, ...]``."""
        parts = [self] if torch.is_grad_enabled() else self._in_parts()
        return _end_to_end([part._elements() for part in parts])

    def _elements(self) -> Tensor:
        weight, ignored = self.class_weights, self.ignore_index
        if self.log_probabilities:
            return F.nll_loss(self.input, self.target, weight, ignore_index=ignored, reduction="none")
        smoothing = self.label_smoothing
        return F.cross_entropy(
            self.input, self.target, weight, ignore_index=ignored, label_smoothing=smoothing, reduction="none"
        )

    def weights(self) -> Tensor:
        """Return ``[r, ...]``: class weight of the target, 0 where ignored."""
        if self._soft:  # torch divides by the number of elements here, whatever the class weights
            return torch.ones_like(self.input[:, 0])
        kept = self._kept
        if self.class_weights is None:
            return kept.to(self.input.dtype)
        return self.class_weights[self.target.where(kept, 0)] * kept

    def steady_divisor(self, n: int, *, alone: bool) -> float | None:
        """Return 1; None where class weights or ignored labels change it, or may do so beside other terms."""
        found = super().steady_divisor(n, alone=alone)
        plain = alone and self.class_weights is None and self.target.numel() == n
        return found if self._soft or (plain and found is not None and single(self.noise_shape(n))) else None

    def counting(self: _Call, counted: Tensor) -> _Call:
        """Return the same call without labels for the elements that do not count."""
        soft = torch.where(counted.unsqueeze(1), self.target, 0) if self._soft else None
        return replace(self, target=self.target.where(counted, self.ignore_index) if soft is None else soft)

    def curvatures(self, scale: Tensor) -> list[OutputCurvature]:
        """Return ``diag(p) - p pᵀ`` of each decision, in the logits."""
        return [self._softmax(scale)]

    def gradients(self, curvatures: Sequence[OutputCurvature], scale: Tensor) -> list[Tensor]:
        """Return the gradient in the logits; log-probabilities are those of their own softmax."""
        found = super().gradients(curvatures, scale)
        if not self.log_probabilities:
            return found
        return [gradient - self.input.detach().exp() * gradient.sum(1, keepdim=True) for gradient in found]

    def sampled(self, scale: Tensor, noise: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return the gradient for classes drawn by their part of the curvature, see ``Softmax.drawn``."""
        # One number makes both choices: its first bit the sign, the others the class.
        doubled = 2 * noise
        both = torch.stack([torch.where(doubled < 1, -1.0, 1.0), torch.where(doubled < 1, doubled, doubled - 1)])
        choices = map(self.at_elements, both)
        parts = self._in_parts()
        if len(parts) == 1:
            return [(self.input, self._softmax(scale).drawn(*choices))]
        sizes = [len(part.input) for part in parts]
        each = [rows.split(sizes) for rows in (*choices, scale.expand(self.element_shape))]
        gradient = torch.empty_like(self.values())
        for part, rows, sign, uniform, weight in zip(parts, gradient.split(sizes), *each, strict=True):
            rows.copy_(part._softmax(weight).drawn(sign, uniform))
        return [(self.input, gradient)]

    def exact_draws(self, n: int) -> int | None:
        """Return ``c`` if each example makes one decision at most."""
        return self.input.shape[1] if single(self.noise_shape(n)) else None

    def log_odds(self, n: int, positive: int | None = None) -> Tensor | None:
        """Return the logit of the class minus the ``logsumexp`` of all others."""
        shares = self.shares(n)
        if self.input.ndim < 2 or not single(shares.shape):
            return None
        classes = self.input.shape[1]
        if positive is not None and not 0 <= positive < classes:
            raise ValueError(f"there is no class {positive} among {classes}; expected 0 to {classes - 1}.")
        whole = torch.full(self.element_shape, positive or 0, device=self.input.device)
        label = (self._hard_target() if positive is None else whole).unsqueeze(1)
        own = torch.zeros_like(self.input, dtype=torch.bool).scatter(1, label, True)
        odds = self.input.gather(1, label).squeeze(1) - self.input.masked_fill(own, -math.inf).logsumexp(1)
        if positive is None:
            # Times and not `where`: the gradients of ignored examples are to be seen as missing, not as 0.
            odds = odds * torch.ones_like(odds).masked_fill(~self._kept, math.nan)
        return shares.gather(odds, math.nan).flatten()

    def single_rows(self, n: int) -> bool:
        """Tell whether the rows are those of ``n`` examples, one each and in their order, with one label each."""
        shape = self.input.shape
        plain = len(shape) == 2 and shape[0] == n and self.target.ndim == 1 and not self._soft
        return plain and self.picking is None

    def statistics(self, n: int) -> dict[str, Tensor]:
        """Return loss, margin (target logit minus the largest other), EL2N, wrong and the class decision.

        Logits may be as large as anything in training: copies are made of a few rows at a time.
        """
        alone = single(self.shares(n).shape)
        parts = [part._by_row(probabilities=alone) for part in self._in_parts()]
        found = {name: _end_to_end([part[name] for part in parts]) for name in parts[0]}
        values = {name: value for name, value in found.items() if name not in _DECIDED}
        return self._averaged(n, self._kept, values, {name: found[name] for name in _DECIDED & found.keys()})

    def decided(self, n: int) -> dict[str, Tensor]:
        """Return the class decision alone."""
        if not single(self.shares(n).shape):
            return {}
        return self._of_decisions(n, {"predicted": self.input.detach().argmax(1), "label": self._label()})

    def _in_parts(self: _Call) -> list[_Call]:
        """Return the call in parts of a few rows."""
        rows = len(self.input) if self.input.ndim > 1 else 1
        size = max(rows // _PARTS, _PART * rows // max(self.input.numel(), 1), 1)
        if size >= rows:
            return [self]
        pairs = zip(self.input.detach().split(size), self.target.split(size), strict=True)
        return [replace(self, input=logits, target=target) for logits, target in pairs]

    def _by_row(self, *, probabilities: bool) -> dict[str, Tensor]:
        """Return what each row tells, ``[r, ...]``, and on demand its ``probabilities``, ``[r, ..., c]``."""
        logits, log_probabilities = self.values(), self._log_probabilities()
        found, label = log_probabilities.exp(), self._hard_target()
        column, predicted = label.unsqueeze(1), logits.argmax(1)
        if self._soft:
            difference = found - self.target.detach()
        else:  # without a one-hot tensor
            difference = found.scatter_add(1, column, -torch.ones_like(column, dtype=found.dtype))
        return {
            "loss": self._plain_loss(log_probabilities),
            "margin": logits.gather(1, column).squeeze(1) - logits.scatter(1, column, -math.inf).amax(1),
            "el2n": difference.norm(dim=1),
            "wrong": (predicted != label).to(logits.dtype),
            "probability": found.gather(1, column).squeeze(1),
            "predicted": predicted,
            "label": self._label(),
            **({"probabilities": found.movedim(1, -1)} if probabilities else {}),
        }

    def _label(self) -> Tensor:
        """Return each row's label, -1 without one."""
        return self._hard_target().masked_fill(~self._kept, -1)

    def _plain_loss(self, log_probabilities: Tensor) -> Tensor:
        """Loss of every decision without class weights."""
        if not self._soft:
            return -log_probabilities.gather(1, self._hard_target().unsqueeze(1)).squeeze(1)
        target = self.target.detach()
        # A class that is impossible (log-probability -inf) and not the target adds nothing.
        return -torch.where(target > 0, log_probabilities * target, 0).sum(1)

    @property
    def _soft(self) -> bool:
        return self.target.is_floating_point()

    @property
    def _kept(self) -> Tensor:
        if self._soft:
            return (self.target != 0).any(1)
        kept = self.target != self.ignore_index
        if self.class_weights is None or self.label_smoothing:  # smoothed, other classes have weights, too
            return kept
        return kept & (self.class_weights[self.target.where(kept, 0)] != 0)

    def _hard_target(self) -> Tensor:
        return self.target.argmax(1) if self._soft else self.target.where(self._kept, 0)

    def _log_probabilities(self) -> Tensor:
        return self.values() if self.log_probabilities else self.values().log_softmax(1)

    def _softmax(self, scale: Tensor) -> Softmax:
        return Softmax([(self.input, 1.0)], self._log_probabilities().exp(), root_of(self._mass(scale)))

    def _mass(self, scale: Tensor) -> Tensor:
        """Each decision's factor in front of ``diag(p) - p pᵀ``, ``[r, ...]``."""
        smoothing, classes = self.label_smoothing, self.input.shape[1]
        weights = None if self.class_weights is None else working(self.class_weights)
        if self._soft:
            smooth = working(self.target.detach()) * (1 - smoothing) + smoothing / classes
            if weights is None:
                return scale * smooth.sum(1)
            return scale * torch.einsum("rc...,c->r...", smooth.to(weights.dtype), weights)
        if weights is None:
            return scale * self._kept.to(self.input.dtype)
        return scale * (((1 - smoothing) * weights[self._hard_target()] + smoothing * weights.mean()) * self._kept)


def _end_to_end(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
