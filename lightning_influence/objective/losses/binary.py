"""Losses of yes-or-no decisions, one for each output."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_influence.objective.losses.base import single
from lightning_influence.objective.losses.elementwise import ElementwiseLoss
from lightning_influence.objective.losses.registry import reads

# What F.binary_cross_entropy takes for the smallest p (1 - p) in its own gradient.
_SMALLEST = 1e-12


@reads(F.binary_cross_entropy_with_logits)
@dataclass(frozen=True, eq=False)
class BinaryCrossEntropy(ElementwiseLoss):
    """``F.binary_cross_entropy_with_logits`` of logits ``input`` and ``target``, both ``[r, ...]``."""

    pos_weight: Tensor | None = None

    def losses(self, predictions: Tensor) -> Tensor:
        """Return ``[r, ...]``."""
        weight = self.pos_weight
        return F.binary_cross_entropy_with_logits(predictions, self.target, pos_weight=weight, reduction="none")

    def probabilities(self) -> Tensor:
        """Return the probabilities, in working precision, detached."""
        return self.values().sigmoid()

    def logits(self) -> Tensor:
        """Return the logits, in working precision, detached."""
        return self.values()

    def graph_logits(self) -> Tensor:
        """Return the logits in the graph."""
        return self.input

    def slope(self) -> Tensor | float:
        """Return what ``p - t`` is multiplied with in the gradient, unweighted, detached."""
        return 1.0

    def curvature(self) -> Tensor:
        """Return ``p (1 - p)``."""
        probabilities = self.probabilities()
        return probabilities * (1 - probabilities)

    def factors(self) -> Tensor | None:
        """Return the element weights times those of the labels."""
        if self.pos_weight is None:
            return self.element_weights
        of_labels = self.pos_weight * self.target + 1 - self.target
        return of_labels if self.element_weights is None else of_labels * self.element_weights

    def sampled_gradient(self, scale: Tensor, noise: Tensor) -> Tensor:
        """Return the gradient for outcomes drawn from the model, times the square root of ``scale`` and weights."""
        probabilities = self.probabilities()
        sampled = (self.at_elements(noise).to(probabilities) < probabilities).to(probabilities.dtype)
        return (probabilities - sampled) * self.slope() * self.root(scale)

    def log_odds(self, n: int, positive: int | None = None) -> Tensor | None:
        """Return the logit of the given label, or of class 0 or 1."""
        shares = self.shares(n)
        if not single(shares.shape):
            return None
        if positive not in (None, 0, 1):
            raise ValueError(f"there is no class {positive} in a loss of yes-or-no decisions; expected 0 or 1.")
        logits = self.graph_logits()
        upwards = self.target.detach() > 0.5 if positive is None else torch.tensor(bool(positive), device=logits.device)
        return shares.gather(torch.where(upwards, logits, -logits)).flatten()

    def statistics(self, n: int) -> dict[str, Tensor]:
        """Return means over the example's outputs, and the class decision if it has just one output."""
        logits, probabilities, target = self.logits(), self.probabilities(), self.target.detach()
        counted, given = self.counted(), target > 0.5
        values = {
            "loss": F.binary_cross_entropy_with_logits(logits, target.to(logits), reduction="none"),
            "margin": logits * (2 * target - 1),
            # times sqrt(2): the distance of the two-class probability vectors, as for softmax
            "el2n": (probabilities - target).abs() * math.sqrt(2),
            "wrong": ((logits > 0) != given).to(logits.dtype),
            "probability": torch.where(given, probabilities, 1 - probabilities),
        }
        decided = self._decision() | {"probabilities": torch.stack([1 - probabilities, probabilities], -1)}
        return self._averaged(n, counted, values, decided)

    def decided(self, n: int) -> dict[str, Tensor]:
        """Return the class decision alone, if there is just one output."""
        return self._of_decisions(n, self._decision()) if single(self.shares(n).shape) else {}

    def _decision(self) -> dict[str, Tensor]:
        label = (self.target.detach() > 0.5).long().masked_fill(~self.counted(), -1)
        return {"predicted": (self.logits() > 0).long(), "label": label}


@reads(F.binary_cross_entropy)
@dataclass(frozen=True, eq=False)
class BinaryProbabilities(BinaryCrossEntropy):
    """``F.binary_cross_entropy``: ``input`` are probabilities.

    The curvature is the Fisher information ``1 / (p (1 - p))``: the Hessian by the probability depends on the label
    and counts the sigmoid before it for curved. Carried back through a sigmoid it is that of the logistic loss.
    """

    def losses(self, predictions: Tensor) -> Tensor:
        """Return ``[r, ...]``."""
        return F.binary_cross_entropy(predictions, self.target, reduction="none")

    def probabilities(self) -> Tensor:
        """Return the input."""
        return self.values()

    def logits(self) -> Tensor:
        """Return ``log p - log(1 - p)``, at most 100 as in the loss itself."""
        probabilities = self.values()
        return (probabilities.log() - (-probabilities).log1p()).clamp(-100, 100)

    def graph_logits(self) -> Tensor:
        """Return ``log p / (1 - p)``; probabilities that round to 0 or 1 have a flat one."""
        return self.input.logit(torch.finfo(self.input.dtype).eps)

    def slope(self) -> Tensor:
        """Return ``1 / (p (1 - p))``."""
        probabilities = self.values()
        return 1 / (probabilities * (1 - probabilities)).clamp(min=_SMALLEST)

    def curvature(self) -> Tensor:
        """Return ``1 / (p (1 - p))``."""
        return self.slope()
