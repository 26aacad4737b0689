"""Negative log-likelihoods of counts and of normal variables with a predicted variance."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from lightning_influence.core.precision import working
from lightning_influence.objective.losses.base import ElementwiseLoss, root_of
from lightning_influence.objective.losses.picking import Picking, find_picking


@dataclass(frozen=True, eq=False)
class PoissonLikelihood(ElementwiseLoss):
    """``F.poisson_nll_loss``, ``input`` and ``target``: ``[r, ...]``.

    For logarithms of rates the Hessian is the rate. For rates it depends on the count; the curvature is its mean over
    counts drawn from the model, ``1 / rate``, which is the same when carried back to the logarithm.

    Attributes:
        log_input: Whether ``input`` is the logarithm of the rate.
        full: Whether the loss has Stirling's term, which does not depend on the input.
        eps: What is added to a rate under the logarithm.
    """

    log_input: bool = True
    full: bool = False
    eps: float = 1e-8

    def plain(self) -> Tensor:
        """Return ``[r, ...]``."""
        return self._loss(self.input)

    def curvature(self) -> Tensor:
        """Return the rate (of logarithms) or one over it."""
        values = self.values()
        return values.exp() if self.log_input else values.clamp(min=0) / (values + self.eps).square()

    def statistics(self, n: int) -> dict[str, Tensor]:
        """Return the loss and the size of the difference of count and rate (as EL2N)."""
        values, counted = self.values(), self._counted()
        rate = values.exp() if self.log_input else values
        return {
            "loss": self._mean(self._loss(values), counted, n),
            "el2n": self._distance(rate - self.target.detach(), n),
        }

    def _loss(self, values: Tensor) -> Tensor:
        return F.poisson_nll_loss(
            values, self.target, log_input=self.log_input, full=self.full, eps=self.eps, reduction="none"
        )


@dataclass(frozen=True, eq=False)
class NormalLikelihood(ElementwiseLoss):
    """``F.gaussian_nll_loss``, ``input`` and ``target``: ``[r, ...]``.

    The Hessian by mean and variance depends on the target and can be negative; the curvature is the Fisher
    information, ``1 / v`` for a mean and ``1 / (2 v²)`` for a variance, without cross terms.

    Attributes:
        variance: As it was passed: shaped like ``input``, with one number for the last dimension, or without that.
        full: Whether the loss has its constant term.
        eps: Smallest variance.
    """

    variance: Tensor | None = None
    full: bool = False
    eps: float = 1e-6

    def plain(self) -> Tensor:
        """Return ``[r, ...]``."""
        return self._loss(self.input)

    def curvature(self) -> Tensor:
        """Return ``1 / v``, the Fisher information of the means."""
        return 1 / self._variance()

    def sampled(self, scale: Tensor, noise: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return the gradients of means and variances for targets drawn from the model."""
        result = [(self.input, self.sampled_gradient(scale, noise))]
        if self._learns_variance:
            variance = self._variance()
            spread = (1 - self.normal(noise).square()) / (2 * variance) * self._root(scale)
            result.append((self._passed(), self._reduced(spread)))
        return result

    @property
    def in_graph(self) -> bool:
        """Whether means or variances take part in a gradient."""
        return self.input.requires_grad or self._learns_variance

    def picking(self) -> Picking | None:
        """Return where the rows were picked from."""
        return find_picking(self.input if self.input.requires_grad else self._passed())

    def exact_draws(self, n: int) -> int | None:
        """Return the number of means and variances of one example, as far as they take part in a gradient."""
        means = math.prod(self.noise_shape(n)) if self.input.requires_grad else 0
        if not self._learns_variance:
            return means
        return means + self.shares(n).gather(self._variance_of_passed()).flatten(1).shape[1]

    def exact(self, scale: Tensor, n: int) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """Yield one column per mean, then one per variance."""
        if self.input.requires_grad:
            yield from super().exact(scale, n)
        if self._learns_variance:
            information = (scale / (2 * self._variance().square())).expand_as(self.input)
            reduced = information.sum_to_size(self._variance_of_passed().shape)
            for column in self._columns(root_of(reduced), n):
                yield [(self._passed(), column.view(self._passed().shape))]

    def statistics(self, n: int) -> dict[str, Tensor]:
        """Return the loss and the size of the residual (as EL2N)."""
        values, counted = self.values(), self._counted()
        return {
            "loss": self._mean(self._loss(values).detach(), counted, n),
            "el2n": self._distance(values - self.target.detach(), n),
        }

    @property
    def _learns_variance(self) -> bool:
        return self.variance is not None and self.variance.requires_grad

    def _passed(self) -> Tensor:
        assert self.variance is not None
        return self.variance

    def _variance_of_passed(self) -> Tensor:
        """The variances as passed, with as many dimensions as the input."""
        passed = working(self._passed().detach())
        return passed if passed.ndim == self.input.ndim else passed.unsqueeze(-1)

    def _variance(self) -> Tensor:
        return self._variance_of_passed().clamp(min=self.eps).expand_as(self.input)

    def _reduced(self, gradient: Tensor) -> Tensor:
        return gradient.sum_to_size(self._variance_of_passed().shape).view(self._passed().shape)

    def _loss(self, values: Tensor) -> Tensor:
        return F.gaussian_nll_loss(values, self.target, self._passed(), full=self.full, eps=self.eps, reduction="none")
