"""The negative log-likelihood of counts."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from lightning_influence.objective.losses.elementwise import ElementwiseLoss
from lightning_influence.objective.losses.registry import reads


@reads(F.poisson_nll_loss)
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

    def losses(self, predictions: Tensor) -> Tensor:
        """Return ``[r, ...]``."""
        return F.poisson_nll_loss(
            predictions, self.target, log_input=self.log_input, full=self.full, eps=self.eps, reduction="none"
        )

    def curvature(self) -> Tensor:
        """Return the rate (of logarithms) or one over it."""
        values = self.values()
        return values.exp() if self.log_input else values.clamp(min=0) / (values + self.eps).square()

    def mean_target(self) -> Tensor:
        """Return the rate."""
        return self.values().exp() if self.log_input else self.values()
