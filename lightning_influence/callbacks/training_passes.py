"""Extra passes over the data of a training run."""

from __future__ import annotations

from dataclasses import dataclass

from lightning.pytorch import LightningModule, Trainer

from lightning_influence.callbacks import bridge
from lightning_influence.coverage import Layers, Uncovered, cover
from lightning_influence.passes import ExampleGradients
from lightning_influence.source import ExampleSource
from lightning_influence.task import Task
from lightning_influence.trace import Trace


@dataclass(eq=False)
class TrainingPasses:
    """What passes over the training data have in common, whenever in the run they take place.

    Attributes:
        source: The training data.
        task: What gives the loss of a batch.
        trace: How the model uses its parameters.
        layers: Layers to cover, as the callback's argument.
        uncovered: What to do about parameters without a closed form, as the callback's argument.
        references: The scale of losses that depend on their batch, once a pass has measured it. Labels and weights of
            classes stay, so one look per run is enough.
    """

    source: ExampleSource
    task: Task
    trace: Trace
    layers: Layers = None
    uncovered: Uncovered = "report"
    references: dict[int, float] | None = None

    def gradients(self, trainer: Trainer, module: LightningModule) -> ExampleGradients:
        """Return passes at the weights of the moment."""
        # Anew each time: callbacks that thaw a backbone change what there is to cover.
        coverage = cover(module, self.layers, trace=self.trace, uncovered=self.uncovered)
        gradients = bridge.example_gradients(trainer, module, self.task, self.source, coverage)
        gradients.references = self.references
        return gradients
