"""The curvature of a loss in the predictions, from which labels, columns and products follow.

Index legend: ``q`` changes multiplied at a time, ``r`` rows, ``c`` classes, ``...`` further positions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_influence.objective.losses.shares import Shares


@dataclass(frozen=True, eq=False)
class OutputCurvature(ABC):
    """Curvature of the examples' own losses in a signed sum of tensors of one shape, no two examples of it together.

    Attributes:
        tensors: The tensors, in the graph of the model, and their signs.
    """

    tensors: list[tuple[Tensor, float]]

    @abstractmethod
    def multiply(self, change: Tensor) -> Tensor:
        """Multiply changes of the sum, ``[q, *shape]``."""

    @abstractmethod
    def columns(self, shares: Shares) -> Iterator[Tensor]:
        """Yield the columns of a square root of every example's part, each shaped like the sum."""

    @abstractmethod
    def per_example(self, values: Tensor, shares: Shares) -> Tensor:
        """Add up values, shaped like the sum of tensors, over what belongs to each example, ``[n]``."""


@dataclass(frozen=True, eq=False)
class Diagonal(OutputCurvature):
    """A number for each element.

    Attributes:
        root: Its square root, with a dimension for each of the elements of the loss.
    """

    root: Tensor

    def multiply(self, change: Tensor) -> Tensor:
        """Multiply ``[q, *shape]``."""
        return change * self.root.square().view(change.shape[1:])

    def columns(self, shares: Shares) -> Iterator[Tensor]:
        """Yield one column for each element of an example, everything else 0 in it."""
        parts = shares.gather(self.root)
        flat = parts.flatten(1)
        for k in range(flat.shape[1]):
            column = torch.zeros_like(flat)
            column[:, k] = flat[:, k]
            yield shares.scatter(column.view(parts.shape)).view(self.tensors[0][0].shape)

    def per_example(self, values: Tensor, shares: Shares) -> Tensor:
        """Return ``[n]``."""
        return shares.gather(values.reshape(self.root.shape)).flatten(1).sum(1)


@dataclass(frozen=True, eq=False)
class Softmax(OutputCurvature):
    """``m (diag(p) - p pᵀ)`` for each decision.

    Attributes:
        probabilities: ``p: [r, c, ...]``.
        root: Square root of ``m: [r, ...]``.
    """

    probabilities: Tensor
    root: Tensor

    def multiply(self, change: Tensor) -> Tensor:
        """Multiply ``[q, r, c, ...]``."""
        p = self.probabilities
        return p * (change - (p * change).sum(2, keepdim=True)) * self.root.square().unsqueeze(1)

    def columns(self, shares: Shares) -> Iterator[Tensor]:
        """Yield ``sqrt(m p_c) (p - onehot(c))`` for every class ``c``, where each example makes one decision."""
        for c in range(self.probabilities.shape[1]):
            column = self.probabilities.clone()
            column[:, c] -= 1
            yield column * (self.root * self.probabilities[:, c].sqrt()).unsqueeze(1)

    def per_example(self, values: Tensor, shares: Shares) -> Tensor:
        """Return ``[n]``."""
        return shares.gather(values.sum(1)).flatten(1).sum(1)

    def drawn(self, sign: Tensor, uniform: Tensor) -> Tensor:
        """Return ``sign sqrt(m p_c / q_c) (p - onehot(c))``, class ``c`` drawn with probability ``q_c``.

        Classes are drawn in proportion to their part of the trace of ``diag(p) - p pᵀ``, ``p_c ‖p - onehot(c)‖²``, and
        weighted back. For a model that is sure of itself, labels drawn from ``p`` (Kunstner et al. 2019, 1905.12558)
        nearly always give a gradient of nearly nothing, and rarely a large one; these have the same second moment and
        always the same length.

        Args:
            sign: ``[r, ...]``, makes the mean zero, so that several decisions of an example stay independent.
            uniform: In (0, 1), ``[r, ...]``.
        """
        p = self.probabilities
        lengths = 1 - 2 * p + p.square().sum(1, keepdim=True)
        cumulative = _running_sums(p * lengths.clamp(min=0))
        # The last class takes what rounding leaves below 1.
        label = (cumulative < uniform.unsqueeze(1) * cumulative[:, -1:]).sum(1, keepdim=True).clamp_(max=p.shape[1] - 1)
        # p_c / q_c, where the model leaves anything open.
        length = lengths.gather(1, label)
        weight = torch.where(length > 0, cumulative[:, -1:] / length, 0).sqrt()
        gradient = p.scatter_add(1, label, -torch.ones_like(p))
        return gradient * (sign.unsqueeze(1) * weight * self.root.unsqueeze(1))


def _running_sums(parts: Tensor) -> Tensor:
    """Return sums of the classes up to each, of parts that add up to 2 at most."""
    if parts.device.type == "cpu" or not torch.are_deterministic_algorithms_enabled():
        return parts.cumsum(1)
    # CUDA adds up floats in any order, and refuses to where that must not be. Whole numbers have one sum.
    return (parts * 2.0**60).long().cumsum(1).to(parts.dtype).mul_(2.0**-60)


def root_of(values: Tensor) -> Tensor:
    """Return square roots of weights.

    Raises:
        ValueError: If one is negative, on the host.
    """
    # The host does not wait for a device: what weighs a whole term it knows, see `BatchLoss.least_weight`.
    if values.device.type == "cpu" and bool((values < 0).any()):
        raise negative_weight(float(values.min()))
    return values.sqrt()


def negative_weight(least: float) -> ValueError:
    """Return what to say of a term that lowers the loss."""
    return ValueError(
        f"a loss term enters the batch loss with a negative weight ({least:.3g}); the Fisher and the GGN need weights "
        '>= 0. Use `fisher="empirical"` or the Hessian, or a `task=` (`loss=` of `Influence`) whose loss leaves that '
        "term out."
    )
