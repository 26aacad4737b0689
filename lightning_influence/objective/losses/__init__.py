"""Known losses: what a tapped loss call says about each example.

A call of ``F.cross_entropy(logits, targets, ...)`` tells everything attribution needs: every example's own loss,
its prediction and margin, the gradient for labels sampled from the model (true Fisher), and the loss Hessian in the
logits (generalised Gauss-Newton matrix, GGN). One class per loss; nobody else looks at the kind.
"""

from __future__ import annotations

# Each of them enters its losses into the table.
from lightning_influence.objective.losses import binary, cross_entropy, divergence, normal, poisson, regression  # noqa: F401
from lightning_influence.objective.losses.base import LossCall, single
from lightning_influence.objective.losses.cross_entropy import CrossEntropy
from lightning_influence.objective.losses.elementwise import ElementwiseLoss
from lightning_influence.objective.losses.output_curvature import OutputCurvature
from lightning_influence.objective.losses.registry import known_loss, known_losses, read_call, reads
from lightning_influence.objective.losses.regression import all_arguments

__all__ = [
    "CrossEntropy",
    "ElementwiseLoss",
    "LossCall",
    "OutputCurvature",
    "all_arguments",
    "known_loss",
    "known_losses",
    "read_call",
    "reads",
    "single",
]
