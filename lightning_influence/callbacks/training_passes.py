"""Extra passes over the data of a training run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from lightning_influence.callbacks import bridge
from lightning_influence.callbacks.display import progress_of
from lightning_influence.callbacks.lightning import LightningModule, Trainer
from lightning_influence.core import distributed
from lightning_influence.core.sharding import standing_in
from lightning_influence.data.source import ExampleSource
from lightning_influence.data.stream import StreamSource
from lightning_influence.gradients.coverage import Layers, Uncovered, cover
from lightning_influence.gradients.discover import trace_model
from lightning_influence.gradients.passes import ExampleGradients
from lightning_influence.gradients.trace import Trace
from lightning_influence.objective.scale import HeardTerms, LossScale, NoLossError, TaskError, TermKey
from lightning_influence.objective.task import Task, TrainingStepTask


@dataclass(eq=False)
class TrainingPasses:
    """What passes over the training data have in common, whenever in the run they take place.

    Attributes:
        source: The training data.
        task: What gives the loss of a batch.
        trace: How the model uses its parameters.
        layers: Layers to cover, as the callback's argument.
        uncovered: What to do about parameters without a closed form, as the callback's argument.
        lacking: Terms of the loss that training has had and these passes have not.
    """

    source: ExampleSource
    task: Task
    trace: Trace
    layers: Layers = None
    uncovered: Uncovered = "report"
    lacking: set[TermKey] = field(default_factory=set, init=False)
    # Labels and weights of classes stay, so one look at the same examples is enough.
    _measured: tuple[list[int], LossScale | None] = field(default=([], None), init=False)
    _heard: set[TermKey] = field(default_factory=set, init=False)  # by then

    @property
    def any_time(self) -> bool:
        """Whether they can take place while training goes on."""
        return not isinstance(self.source, StreamSource) or self.source.reads_apart

    def take(self, source: ExampleSource) -> None:
        """Go on with other data."""
        source.pass_batch_size = self.source.pass_batch_size
        self.source, self._measured = source, ([], None)

    def gradients(self, trainer: Trainer, module: LightningModule, scale: LossScale | None = None) -> ExampleGradients:
        """Return passes at the weights of the moment."""
        # Anew each time: callbacks that thaw a backbone change what there is to cover.
        with standing_in(module):
            coverage = cover(
                module, self.layers, trace=self.trace, uncovered=self.uncovered, trained=bridge.trained(trainer, module)
            )
        around = bridge.surroundings(trainer, module)
        progress = progress_of(trainer)
        return ExampleGradients(module, self.task, self.source, coverage, progress=progress, scale=scale, **around)

    def scaled(
        self, trainer: Trainer, module: LightningModule, indices: Sequence[int], heard: HeardTerms
    ) -> ExampleGradients:
        """Return passes with the loss scale of the training examples.

        Args:
            trainer: The trainer.
            module: The model.
            indices: The training examples.
            heard: What the training batches have told of it: if that settles it, no pass is needed.
        """
        self._tell_parts(trainer, module, indices)
        told, of_mean = HeardTerms.joined(distributed.gather_objects(heard)), not self.trace.sums
        own = isinstance(self.task, TrainingStepTask)  # else what was heard is something else
        settled = told.scale(self.source.batch_size, of_mean=of_mean) if own else None
        examples, scale = self._measured
        if settled is not None and settled.keys() == self.trace.forms.keys():  # passes are in evaluation mode
            scale = settled
        elif examples != list(indices) or not told.terms <= self._heard:  # the step has other terms by now
            with bridge.aside(trainer):
                scale = self.gradients(trainer, module).calibrate(indices, of_mean=of_mean).scale
            self._measured, self._heard = (list(indices), scale), set(told.terms)
        self.lacking = told.terms - scale.keys() if own and scale is not None else set()
        return self.gradients(trainer, module, scale)

    def _tell_parts(self, trainer: Trainer, module: LightningModule, indices: Sequence[int]) -> None:
        """Look again at what the loss has of each loader: parts that are no known loss may have joined in."""
        source, trace = self.source, self.trace
        if source.company is None or not source.company.others or not indices:
            return
        chosen = source.at_hand if isinstance(source, StreamSource) else indices
        try:
            with bridge.aside(trainer):
                now = trace_model(module, self.task, source, indices=chosen, **bridge.surroundings(trainer, module))
        except NoLossError:
            return
        except TaskError:
            if trace.own is None:
                raise
            return  # such parts are left out, which `left_out` tells
        whole = now.own is None and (trace.own is None or trace.own.keys() >= trace.forms.keys())
        trace.add(now)
        trace.own = None if whole else trace.own
