"""The public door: influence of training examples, without a Trainer."""

from lightning_influence.influence.along import AlongTraining
from lightning_influence.influence.directory import open_index
from lightning_influence.influence.influence import Influence

__all__ = ["AlongTraining", "Influence", "open_index"]
