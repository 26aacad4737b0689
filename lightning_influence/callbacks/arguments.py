"""Checks of the callback's arguments: each error names the value and what is allowed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, get_args

import torch
from torch import Tensor

from lightning_influence.training.settings import Mode, TracIn


def check_damping(damping: Any) -> None:
    """Raise ``ValueError`` unless the damping is a finite number > 0 or a rule."""
    if isinstance(damping, str) and damping in ("auto", "relative", "trainer"):
        return
    is_number = isinstance(damping, (int, float)) and not isinstance(damping, bool)
    if not is_number or not math.isfinite(damping) or damping <= 0:
        raise ValueError(
            f'damping={damping!r}; expected a number > 0, "relative" (0.1 times the mean eigenvalue), "trainer" '
            '(1 / sum of step sizes) or "auto".'
        )


def check_task(task: object) -> None:
    """Raise ``ValueError`` unless the task, if any, can be called."""
    if task is not None and not callable(task):
        raise ValueError(f"task={task!r} is not callable; expected a function (module, batch) -> loss.")


def checked_tracin(value: object) -> TracIn | None:
    """Return the settings that a word stands for; raise ``ValueError`` for anything else."""
    if value is None or isinstance(value, TracIn):
        return value
    if value not in get_args(Mode):
        raise ValueError(
            f'tracin={value!r}; expected "epoch" (a pass at epoch ends), "step" (in flight), None, or TracIn(...).'
        )
    return TracIn(mode=value)  # type: ignore[arg-type]


def checked_indices(indices: Sequence[int] | Tensor | None) -> Tensor | None:
    """Return distinct dataset indices as a tensor; raise ``ValueError`` for anything else."""
    if indices is None:
        return None
    values = torch.as_tensor(indices)
    if values.ndim != 1 or not len(values) or values.is_floating_point() or values.dtype == torch.bool:
        raise ValueError(
            f"known_noise has the shape {tuple(values.shape)} and dtype {values.dtype}; expected the dataset indices "
            "of the wrong labels, a non-empty list of integers."
        )
    values = values.long().cpu()
    if int(values.min()) < 0 or len(values.unique()) != len(values):
        raise ValueError("known_noise holds negative or repeated indices; expected distinct dataset indices >= 0.")
    return values
