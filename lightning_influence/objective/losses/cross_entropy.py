"""Losses of class decisions: softmax cross-entropy in its forms.

Index legend: ``n`` examples, ``r`` rows of the logits, ``c`` classes, ``...`` further positions such as pixels of a
segmentation map.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_influence.core.precision import working
from lightning_influence.objective.losses.base import LossCall, decisions, root_of, single


@dataclass(frozen=True, eq=False)
class CrossEntropy(LossCall):
    """``F.cross_entropy`` on logits or ``F.nll_loss`` on log-probabilities, ``input: [r, c, ...]``.

    Covers class weights, ``ignore_index``, label smoothing and probability targets.
    """

    class_weights: Tensor | None = None
    ignore_index: int = -100
    label_smoothing: float = 0.0
    log_probabilities: bool = False

    @property
    def element_shape(self) -> torch.Size:
        """``[r, ...]``; nothing for a single example that comes as ``[c]``."""
        return torch.Size((self.input.shape[0], *self.input.shape[2:])) if self.input.ndim >= 2 else torch.Size()

    def _element_dim(self, dim: int) -> int | None:
        return None if dim == 1 else max(dim - 1, 0)

    def elements(self) -> Tensor:
        """Return ``[r, ...]``."""
        if self.log_probabilities and not self._soft:
            return F.nll_loss(
                self.input, self.target, self.class_weights, ignore_index=self.ignore_index, reduction="none"
            )
        if self.log_probabilities:
            return -torch.where(self.target > 0, self.input * self.target, 0).sum(1)
        return F.cross_entropy(
            self.input,
            self.target,
            self.class_weights,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            reduction="none",
        )

    def weights(self) -> Tensor:
        """Return ``[r, ...]``: class weight of the target, 0 where ignored."""
        if self._soft:  # torch divides by the number of elements here, whatever the class weights
            return torch.ones_like(self.input[:, 0])
        kept = self._kept
        if self.class_weights is None:
            return kept.to(self.input.dtype)
        return self.class_weights[self.target.where(kept, 0)] * kept

    def scale_varies(self, n: int) -> bool:
        """Tell whether the same example would weigh differently in another batch: weights, ignored targets, sums."""
        plain = self.class_weights is None and self.target.numel() == n and single(self.noise_shape(n))
        uneven = self.reduction == "mean" and not self._soft and not plain
        return uneven or super().scale_varies(n)

    def steady_divisor(self, n: int, *, alone: bool) -> float | None:
        """Return 1; None where some labels may be ignored, which matters beside other terms."""
        return super().steady_divisor(n, alone=alone) if alone or self._soft else None

    def counting(self, counted: Tensor) -> CrossEntropy:
        """Return the same call without labels for the elements that do not count."""
        labels = torch.where(counted.unsqueeze(1), self.target, 0) if self._soft else None
        return replace(self, target=self.target.where(counted, self.ignore_index) if labels is None else labels)

    def sampled_gradient(self, scale: Tensor, noise: Tensor) -> Tensor:
        """Return ``± sqrt(scale * mass * p_c / q_c) * (p - onehot(c))``, class ``c`` drawn with probability ``q_c``.

        Classes are drawn in proportion to their part of the trace of ``diag(p) - p pᵀ``, ``p_c ‖p - onehot(c)‖²``, and
        weighted back. For a model that is sure of itself, labels drawn from ``p`` (Kunstner et al. 2019, 1905.12558)
        nearly always give a gradient of nearly nothing, and rarely a large one; these have the same second moment and
        always the same length. The sign makes their mean zero, so that several decisions of an example stay
        independent.
        """
        probabilities = self._probabilities()
        # One number makes both choices: its first bit the sign, the others the class.
        doubled = 2 * noise
        sign = self.at_elements(torch.where(doubled < 1, -1.0, 1.0)).unsqueeze(1)
        uniform = self.at_elements(torch.where(doubled < 1, doubled, doubled - 1)).unsqueeze(1)
        lengths = 1 - 2 * probabilities + probabilities.square().sum(1, keepdim=True)
        shares = probabilities * lengths.clamp(min=0)
        cumulative = shares.cumsum(1)
        # The last class takes what rounding leaves below 1.
        drawn = (cumulative < uniform * cumulative[:, -1:]).sum(1, keepdim=True)
        drawn = drawn.clamp_(max=self.input.shape[1] - 1)
        # p_c / q_c, where the model leaves anything open.
        length = lengths.gather(1, drawn)
        weight = torch.where(length > 0, cumulative[:, -1:] / length, 0).sqrt()
        gradient = probabilities.scatter_add(1, drawn, -torch.ones_like(probabilities))
        return gradient * (sign * weight * self._root(scale).unsqueeze(1))

    def exact_draws(self, n: int) -> int | None:
        """Return ``c`` if each example makes one decision at most."""
        return self.input.shape[1] if single(self.noise_shape(n)) else None

    def exact_gradients(self, scale: Tensor, n: int) -> Iterator[Tensor]:
        """Yield ``sqrt(scale * mass * p_c) * (p - onehot(c))`` for every class ``c``."""
        probabilities = self._probabilities()
        root = self._root(scale)
        for c in range(probabilities.shape[1]):
            column = probabilities.clone()
            column[:, c] -= 1
            yield column * (root * probabilities[:, c].sqrt()).unsqueeze(1)

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
        plain = self.input.ndim == 2 and len(self.input) == n and self.target.ndim == 1 and not self._soft
        return plain and self.picking() is None

    def copied(self) -> CrossEntropy:
        """Return the call with copies of logits and labels, outside of the graph: what follows may overwrite them."""
        return replace(self, output=self.output.detach(), input=self.input.detach().clone(), target=self.target.clone())

    def alike(self, other: CrossEntropy) -> bool:
        """Tell whether the rows of another call can be joined with this one's."""
        same = self.input.shape[1:] == other.input.shape[1:] and self.input.dtype == other.input.dtype
        same = same and self.ignore_index == other.ignore_index and self.class_weights is other.class_weights
        return same and (self.label_smoothing, self.log_probabilities, self.input.device) == (
            other.label_smoothing, other.log_probabilities, other.input.device
        )  # fmt: skip

    def statistics(self, n: int) -> dict[str, Tensor]:
        """Return loss, margin (target logit minus the largest other), EL2N, wrong and the class decision."""
        logits, target = working(self.input.detach()), self.target.detach()
        log_probabilities = self._log_probabilities()
        probabilities = log_probabilities.exp()
        kept, label = self._kept, self._hard_target()
        others = logits.scatter(1, label.unsqueeze(1), -math.inf).amax(1)
        margin = logits.gather(1, label.unsqueeze(1)).squeeze(1) - others
        predicted = logits.argmax(1)
        if self._soft:
            difference = probabilities - target
            # A class that is impossible (log-probability -inf) and not the target adds nothing.
            unweighted = -torch.where(target > 0, log_probabilities * target, 0).sum(1)
        else:  # without a one-hot tensor: logits may be as large as anything in training
            one = torch.ones_like(label, dtype=probabilities.dtype).unsqueeze(1)
            difference = probabilities.scatter_add(1, label.unsqueeze(1), -one)
            unweighted = -log_probabilities.gather(1, label.unsqueeze(1)).squeeze(1)
        result = {
            "loss": self._mean(unweighted, kept, n),
            "margin": self._mean(margin, kept, n),
            "el2n": self._mean(difference.norm(dim=1), kept, n),
            "wrong": self._mean((predicted != label).to(logits.dtype), kept, n),
        }
        shares = self.shares(n)
        if single(shares.shape):
            found = {
                "predicted": predicted,
                "label": label.masked_fill(~kept, -1),
                "probabilities": probabilities.movedim(1, -1),
            }
            result |= decisions(found, shares)
        return result

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
        logits = working(self.input.detach())
        return logits if self.log_probabilities else logits.log_softmax(1)

    def _probabilities(self) -> Tensor:
        return self._log_probabilities().exp()

    def _root(self, scale: Tensor) -> Tensor:
        """Square root of each element's factor in front of ``diag(p) - p pᵀ``."""
        smoothing, classes = self.label_smoothing, self.input.shape[1]
        smooth = self.target * (1 - smoothing) + smoothing / classes if self._soft else self.target
        if self.class_weights is None:
            mass = smooth.sum(1) if self._soft else self._kept.to(self.input.dtype)
        elif self._soft:
            mass = torch.einsum("rc...,c->r...", smooth.to(self.class_weights.dtype), self.class_weights)
        else:
            own = self.class_weights[self._hard_target()]
            mass = ((1 - smoothing) * own + smoothing * self.class_weights.mean()) * self._kept
        return root_of(scale * mass)


@dataclass(frozen=True, eq=False)
class Divergence(LossCall):
    """``F.kl_div`` of log-probabilities ``input: [r, c, ...]`` and probabilities ``target`` of the same shape.

    In the log-probabilities it is linear; its curvature is that of the softmax before them, as for ``nll_loss``.

    Attributes:
        class_dim: Where the classes were in the call; ``input`` and ``target`` have them in dimension 1.
        rows: Size of the first dimension of the call if the mean was over that alone (``"batchmean"``).
    """

    class_dim: int = 1
    rows: int | None = None

    @property
    def element_shape(self) -> torch.Size:
        """``[r, ...]``: a divergence per distribution."""
        return torch.Size((self.input.shape[0], *self.input.shape[2:]))

    def _element_dim(self, dim: int) -> int | None:
        return None if dim == 1 else max(dim - 1, 0)

    def elements(self) -> Tensor:
        """Return ``[r, c, ...]``: ``t (log t - input)``."""
        return F.kl_div(self.input, self.target, reduction="none")

    def weights(self) -> Tensor:
        """Return equal weights ``[r, c, ...]`` that add up to what the mean divides by."""
        total = self.input.numel() if self.rows is None else self.rows
        return torch.full_like(self.input, total / max(self.input.numel(), 1))

    def per_row(self, values: Tensor) -> Tensor:
        """``[r, c, ...]`` or ``[r, ...] -> [r, ...]``: sums over the classes."""
        return values.sum(1) if values.ndim == self.input.ndim else values

    def scale(self, coefficient: Tensor, n: int, reference: float | None = None) -> Tensor:
        """Return the weight of each element; see ``LossCall.scale``."""
        whole = super().scale(coefficient, n, reference)
        return whole if self.reduction != "none" else whole.movedim(self.class_dim, 1)

    def steady_divisor(self, n: int, *, alone: bool) -> float | None:
        """Return what the mean divides by, per example."""
        found = super().steady_divisor(n, alone=alone)
        return None if found is None else (self.input.numel() if self.rows is None else self.rows) / n

    def counting(self, counted: Tensor) -> Divergence:
        """Return the same call without targets for the elements that do not count."""
        return replace(self, target=torch.where(counted.movedim(self.class_dim, 1), self.target, 0))

    def sampled_gradient(self, scale: Tensor, noise: Tensor) -> Tensor:
        """Return ``sqrt(Σ_c scale t_c) * (p - onehot(sampled))``."""
        return self._decision(scale).sampled_gradient(torch.ones((), device=self.input.device), noise)

    def exact_draws(self, n: int) -> int | None:
        """Return ``c`` if each example has one distribution at most."""
        return self._decision().exact_draws(n)

    def exact_gradients(self, scale: Tensor, n: int) -> Iterator[Tensor]:
        """Yield ``sqrt(Σ_c scale t_c p_c) * (p - onehot(c))`` for every class."""
        yield from self._decision(scale).exact_gradients(torch.ones((), device=self.input.device), n)

    def statistics(self, n: int) -> dict[str, Tensor]:
        """Return the divergence, and the rest as for cross-entropy with soft labels."""
        target = working(self.target.detach())
        divergence = F.kl_div(working(self.input.detach()), target, reduction="none").sum(1)
        found = self._decision().statistics(n)
        return found | {"loss": self._mean(divergence, (target != 0).any(1), n)}

    def _decision(self, scale: Tensor | None = None) -> CrossEntropy:
        """The same as cross-entropy with soft labels, weighted by ``scale``."""
        target = self.target.detach() if scale is None else self.target.detach() * scale
        return CrossEntropy(
            self.output,
            self.input,
            target,
            self.reduction,
            layout=self.layout,
            follow=self.follow,
            log_probabilities=True,
        )
