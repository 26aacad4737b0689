"""TracIn in flight along a Trainer: which batches are measured, at which scale, with which learning rates."""

from __future__ import annotations

import torch

from lightning_influence.callbacks import bridge
from lightning_influence.callbacks.lightning import LightningModule, Trainer
from lightning_influence.gradients.coverage import Layers, cover, listed_reasons
from lightning_influence.gradients.trace import Trace
from lightning_influence.layers.blocks import LayerError
from lightning_influence.training import optimizers
from lightning_influence.training.batch_record import BatchRecord
from lightning_influence.training.flight.flight import Flight
from lightning_influence.training.recording import Recording


class FlightRecorder:
    """Measures batches as training goes by them, and files what they say once the optimizer has stepped.

    Args:
        recording: Where to file it.
        trainer: The trainer.
        module: The model.
        layers: Layers to measure, as the argument of ``TracIn``.
        trace: How the model uses its parameters.

    Raises:
        LayerError: If there are no such layers, or none that can be measured.
    """

    def __init__(
        self, recording: Recording, trainer: Trainer, module: LightningModule, layers: Layers, trace: Trace
    ) -> None:
        # Only to find out now; which of them are trained may change.
        flight = Flight(cover(module, layers, trace=trace, trained=bridge.trained(trainer, module)), ())
        if not flight.owners:
            raise LayerError(
                "TracIn in flight would be 0 for every example: it can measure none of the trainable parameters, "
                f'{listed_reasons(flight.unseen, 4)}. Pass `tracin="epoch"`.'
            )
        self._recording = recording
        recording.pace.device = trainer.strategy.root_device
        self._layers = layers
        self._trace = trace
        self._flight: Flight | None = None
        self._groups: list[list[int]] = []  # ids of the parameters that it was made for
        self._pending: list[BatchRecord] = []  # since the last step: it is theirs

    def batch_started(self, trainer: Trainer, module: LightningModule, batch: BatchRecord) -> None:
        """Have the layers watched in a batch, if it is to be measured."""
        batch.started = self._recording.pace.clock()
        batch.measured = self._recording.pace.due() and not self._recording.gaps.failures
        if batch.measured and batch.indices is not None:
            batch.visit, batch.tap = self._current(trainer, module).watch(len(batch.indices))

    def _current(self, trainer: Trainer, module: LightningModule) -> Flight:
        groups = [group["params"] for o in trainer.optimizers for group in optimizers.inner(o).param_groups]
        trained = [[id(parameter) for parameter in group if parameter.requires_grad] for group in groups]
        if self._flight is None or trained != self._groups:  # callbacks thaw layers during training
            coverage = cover(module, self._layers, trace=self._trace, trained=bridge.trained(trainer, module))
            self._flight, self._groups = Flight(coverage, trainer.optimizers), trained
        return self._flight

    def before_backward(self, trainer: Trainer, batch: BatchRecord) -> None:
        """Get ready for the backward pass of a batch."""
        if batch.visit is not None:
            # Gradients of a sum are those of the examples' own losses, those of a mean a part of them.
            n = 1 if self._trace.sums else batch.visit.n
            batch.visit.start(n * trainer.accumulate_grad_batches / bridge.loss_scale(trainer))
        self._pending.append(batch)

    def after_backward(self, batch: BatchRecord) -> None:
        """Take what the backward pass has told."""
        if batch.visit is None:
            return
        try:
            batch.visit.finish()
        except Exception as error:  # training goes on
            batch.visit = None
            self._recording.fail("TracIn in flight is incomplete", error)

    def before_step(self, trainer: Trainer, optimizer: object) -> None:
        """File the batches that the next step of the optimizer is made of."""
        pending, self._pending = self._pending, []
        visits = self._recording.visits
        if not pending or visits is None or not visits.first_time(trainer.global_step):
            return
        rates = {
            (number, place): optimizers.rate(group) * self._recording.step_sizes.summed
            for number, stepping in enumerate(map(optimizers.inner, trainer.optimizers))
            for place, group in enumerate(stepping.param_groups)
            if stepping is optimizers.inner(optimizer)
        }
        for batch in pending:
            found = batch.visit.increments(rates) if batch.visit is not None and batch.visit.complete else None
            batch.visit = None
            # A gradient scaler that reached too high: this step is not taken.
            if found is not None and bridge.has_loss_scaler(trainer) and not bool(torch.isfinite(found).all()):
                found = None
            visits.add(batch, found)

    def batch_ended(self, batch: BatchRecord) -> None:
        """Note how long the batch took."""
        if batch.started is not None and not self._recording.gaps.failures:
            pace = self._recording.pace
            pace.took(batch.measured, pace.clock() - batch.started, batch.paused)
        if batch.visit is not None:
            batch.visit.let_go()

    def notes(self) -> list[str]:
        """Return what a reader of the scores should know."""
        pace = self._recording.pace.note()
        found = [pace] if pace else []
        if self._flight is None:
            return found
        missing, share = self._flight.missing, self._flight.share
        if missing:
            found.append(
                f"TracIn in flight covers {share:.1%} of the trainable parameters; it lacks "
                f"{listed_reasons(missing, 6)}"
            )
        elif share < 1:
            found.append(f"TracIn in flight covers {share:.1%} of the trainable parameters, as `layers` ask for")
        return found
