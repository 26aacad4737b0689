"""Every example's gradient, in passes over data that leave no trace."""

from __future__ import annotations

from lightning_influence.gradients.capture import LayerIO
from lightning_influence.gradients.coverage import Coverage, Layers, Uncovered
from lightning_influence.gradients.discover import TraceError, discover
from lightning_influence.gradients.passes import BatchGradients, ExampleGradients, Labels
from lightning_influence.gradients.verify import Inspection, VerificationError, inspect
from lightning_influence.gradients.visitors import ExampleColumns, ExampleScores, Visitor, visit

__all__ = [
    "BatchGradients",
    "Coverage",
    "ExampleColumns",
    "ExampleGradients",
    "ExampleScores",
    "Inspection",
    "Labels",
    "LayerIO",
    "Layers",
    "TraceError",
    "Uncovered",
    "VerificationError",
    "Visitor",
    "discover",
    "inspect",
    "visit",
]
