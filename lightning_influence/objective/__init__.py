"""What training minimises: the task, the tap on its losses, their terms and the scale of these."""

from __future__ import annotations

from lightning_influence.objective.scale import LossScale, NoLossError, ScaleError, TaskError
from lightning_influence.objective.task import Task, TrainingStepTask
from lightning_influence.objective.terms import BatchLoss

__all__ = [
    "BatchLoss",
    "LossScale",
    "NoLossError",
    "ScaleError",
    "Task",
    "TaskError",
    "TrainingStepTask",
]
