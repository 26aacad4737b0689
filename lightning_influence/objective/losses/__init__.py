"""Known losses: what a tapped loss call says about each example.

A call of ``F.cross_entropy(logits, targets, ...)`` tells everything attribution needs: every example's own loss,
its prediction and margin, the gradient for labels sampled from the model (true Fisher), and a square root of the
loss Hessian (generalised Gauss-Newton matrix, GGN). One class per loss; nobody else looks at the kind.
"""

from __future__ import annotations

from lightning_influence.objective.losses.base import ElementwiseLoss, LossCall, single
from lightning_influence.objective.losses.binary import BinaryCrossEntropy, BinaryProbabilities
from lightning_influence.objective.losses.cross_entropy import CrossEntropy, Divergence
from lightning_influence.objective.losses.likelihood import NormalLikelihood, PoissonLikelihood
from lightning_influence.objective.losses.registry import all_arguments, known_loss, known_losses, read_call
from lightning_influence.objective.losses.regression import AbsoluteError, HuberError, SmoothAbsoluteError, SquaredError

__all__ = [
    "AbsoluteError",
    "BinaryCrossEntropy",
    "BinaryProbabilities",
    "CrossEntropy",
    "Divergence",
    "ElementwiseLoss",
    "HuberError",
    "LossCall",
    "NormalLikelihood",
    "PoissonLikelihood",
    "SmoothAbsoluteError",
    "SquaredError",
    "all_arguments",
    "known_loss",
    "known_losses",
    "read_call",
    "single",
]
