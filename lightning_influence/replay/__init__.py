"""Replay: the training run once more, bit for bit, and the derivative of its end by the weight of every example.

Influence functions ask at a fixed point; this asks the run itself (MAGIC: Engstrom et al. 2025, 2503.13751; Ilyas and
Engstrom 2025, 2504.16430).
"""

from lightning_influence.replay.record import ReplayError, TrainingRecord
from lightning_influence.replay.recorder import Recorder
from lightning_influence.replay.rerun import Rerun
from lightning_influence.replay.scores import replay_measurement, replay_scores

__all__ = ["Recorder", "ReplayError", "Rerun", "TrainingRecord", "replay_measurement", "replay_scores"]
