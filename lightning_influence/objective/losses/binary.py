"""Losses of yes-or-no decisions, one for each output."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_influence.objective.losses.base import ElementwiseLoss, decisions, single

# What F.binary_cross_entropy takes for the smallest p (1 - p) in its own gradient.
_SMALLEST = 1e-12


@dataclass(frozen=True, eq=False)
class _Binary(ElementwiseLoss):
    """Outputs that are probabilities or logits of them, ``input`` and ``target``: ``[r, ...]``."""

    @abstractmethod
    def probabilities(self) -> Tensor:
        """Return the probabilities, in working precision, detached."""

    @abstractmethod
    def logits(self) -> Tensor:
        """Return the logits, in working precision, detached."""

    @abstractmethod
    def slope(self) -> Tensor | float:
        """Return what ``p - t`` is multiplied with in the gradient, unweighted, detached."""

    def sampled_gradient(self, scale: Tensor, noise: Tensor) -> Tensor:
        """Return the gradient for outcomes drawn from the model, times the square root of ``scale`` and weights."""
        probabilities = self.probabilities()
        sampled = (self.at_elements(noise).to(probabilities) < probabilities).to(probabilities.dtype)
        return (probabilities - sampled) * self.slope() * self._root(scale)

    @abstractmethod
    def graph_logits(self) -> Tensor:
        """Return the logits in the graph."""

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
        counted = self._counted()
        plain = F.binary_cross_entropy_with_logits(logits, target.to(logits), reduction="none")
        result = {
            "loss": self._mean(plain, counted, n),
            "margin": self._mean(logits * (2 * target - 1), counted, n),
            # times sqrt(2): the distance of the two-class probability vectors, as for softmax
            "el2n": self._mean((probabilities - target).abs() * math.sqrt(2), counted, n),
            "wrong": self._mean(((logits > 0) != (target > 0.5)).to(logits.dtype), counted, n),
        }
        shares = self.shares(n)
        if single(shares.shape):
            found = {
                "predicted": (logits > 0).long(),
                "label": (target > 0.5).long().masked_fill(~counted, -1),
                "probabilities": torch.stack([1 - probabilities, probabilities], -1),
            }
            result |= decisions(found, shares)
        return result


@dataclass(frozen=True, eq=False)
class BinaryCrossEntropy(_Binary):
    """``F.binary_cross_entropy_with_logits``."""

    pos_weight: Tensor | None = None

    def plain(self) -> Tensor:
        """Return ``[r, ...]``."""
        return F.binary_cross_entropy_with_logits(self.input, self.target, pos_weight=self.pos_weight, reduction="none")

    def probabilities(self) -> Tensor:
        """Return ``sigmoid(input)``."""
        return self.values().sigmoid()

    def logits(self) -> Tensor:
        """Return the input."""
        return self.values()

    def graph_logits(self) -> Tensor:
        """Return the input."""
        return self.input

    def slope(self) -> float:
        """Return 1."""
        return 1.0

    def curvature(self) -> Tensor:
        """Return ``p (1 - p)``."""
        probabilities = self.probabilities()
        return probabilities * (1 - probabilities)

    def _counted(self) -> Tensor:
        counted = super()._counted()
        if self.pos_weight is None:
            return counted
        return counted & (self.pos_weight * self.target + 1 - self.target != 0)

    def _root(self, values: Tensor) -> Tensor:
        if self.pos_weight is not None:
            values = values * (self.pos_weight * self.target + 1 - self.target)
        return super()._root(values)


@dataclass(frozen=True, eq=False)
class BinaryProbabilities(_Binary):
    """``F.binary_cross_entropy``: ``input`` are probabilities.

    The curvature is the Fisher information ``1 / (p (1 - p))``: the Hessian by the probability depends on the label
    and counts the sigmoid before it for curved. Carried back through a sigmoid it is that of the logistic loss.
    """

    def plain(self) -> Tensor:
        """Return ``[r, ...]``."""
        return F.binary_cross_entropy(self.input, self.target, reduction="none")

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
