"""What the training run itself says about each example, without a pass of its own."""

from __future__ import annotations

from lightning_influence.training.checkpoints import Checkpoint, CheckpointError
from lightning_influence.training.neighbours import disagreement, nearest_labels
from lightning_influence.training.settings import TracIn
from lightning_influence.training.step_sizes import OptimizerHistory, StepSize, StepSizes, block_step_sizes

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "OptimizerHistory",
    "StepSize",
    "StepSizes",
    "TracIn",
    "block_step_sizes",
    "disagreement",
    "nearest_labels",
]
