"""Scores of pairs along the checkpoints of a run."""

from __future__ import annotations

from lightning_influence.scores.along.diff_in import diff_in_scores
from lightning_influence.scores.along.dropout_masks import ip_ensemble
from lightning_influence.scores.along.source import source_scores
from lightning_influence.scores.along.tracin import tracin_scores
from lightning_influence.scores.along.z0 import z0_scores

__all__ = [
    "diff_in_scores",
    "ip_ensemble",
    "source_scores",
    "tracin_scores",
    "z0_scores",
]
