"""Listening to training, from the start of each batch to its end."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

from torch import Tensor

from lightning_influence.callbacks.lightning import LightningModule, Trainer
from lightning_influence.callbacks.tracin_flight import FlightRecorder
from lightning_influence.callbacks.training_passes import TrainingPasses
from lightning_influence.objective.tap import TrainingTap
from lightning_influence.training.batch_record import BatchRecord
from lightning_influence.training.recording import Recording

_Hook = TypeVar("_Hook", bound=Callable[..., None])


def _timed(hook: _Hook) -> _Hook:
    """Let budgets of time know how long training stood still; once they have decided nothing is timed."""

    @wraps(hook)
    def timed(self: BatchListener, *args: Any) -> None:
        pace = self.recording.pace
        if not pace.timing and self.recording.schedule.decided:
            hook(self, *args)
            return
        start = pace.clock()
        hook(self, *args)
        took = pace.clock() - start
        self.paused += took
        if self.batch is not None:
            self.batch.paused += took

    return cast(_Hook, timed)


class BatchListener:
    """Hands every batch on to the recording, and to TracIn in flight.

    Args:
        recording: What training has said so far.
        passes: Extra passes over the same data.
        flight: TracIn in flight, if that is how it is computed.

    Attributes:
        batch: The running batch.
        flight: See the arguments.
        paused: Seconds that training stood still, as long as budgets ask.
    """

    def __init__(self, recording: Recording, passes: TrainingPasses, flight: FlightRecorder | None) -> None:
        self.recording = recording
        self.batch: BatchRecord | None = None
        self._passes = passes
        self.flight = flight
        self.paused = 0.0
        self._tap = TrainingTap()

    @_timed
    def batch_started(self, trainer: Trainer, module: LightningModule, batch: BatchRecord) -> None:
        """Listen for the losses of the examples, if it is known which they are."""
        self.stop()
        self.batch = batch
        if batch.filed:  # it holds none of the examples, as loaders of other lengths go
            return
        self.recording.gaps.batches += 1
        if batch.indices is None:
            self.recording.record_lost(batch)
            return
        # What the trace has seen has one length, which rows of several may be mistaken for.
        misread = batch.ragged and self._passes.source.collation.few_lengths
        if self.flight is not None and not misread:
            self.flight.batch_started(trainer, module, batch)
        if batch.tap is None and self.recording.losses.needs_tap(trainer.current_epoch):
            batch.tap = self._tap
        if batch.tap is not None:
            batch.tap.start()

    def stop(self) -> None:
        """Leave training alone again, and forget the batch: it may have no end."""
        if self.batch is not None:
            self.batch.let_go()
        self.batch = None

    @_timed
    def before_backward(self, trainer: Trainer, loss: Tensor) -> None:
        """File what the training pass itself said about each example."""
        batch = self.batch
        if batch is None or batch.filed or batch.indices is None:
            return
        batch.filed, calls = True, None
        if batch.tap is not None:
            batch.tap.stop()
            calls = batch.tap.taken()
        self.recording.record_batch(batch, loss, calls, self._passes.trace.forms)
        batch.let_go()
        if self.flight is not None:
            self.flight.before_backward(trainer, batch)

    @_timed
    def after_backward(self) -> None:
        """Take what the backward pass said about each example's gradient."""
        if self.flight is not None and self.batch is not None:
            self.flight.after_backward(self.batch)

    @_timed
    def before_step(self, trainer: Trainer, optimizer: object) -> None:
        """Note the learning rates that are really used."""
        if self.batch is None or self.batch.indices != ():
            self.recording.record_step(optimizer)
        if self.flight is not None:
            self.flight.before_step(trainer, optimizer)

    def batch_ended(self) -> None:
        """Note a batch without a backward pass: the step may have returned no loss."""
        batch = self.batch
        self.stop()
        if batch is None:
            return
        if batch.indices is not None and not batch.filed:
            self.recording.record_lost(batch)
        if self.flight is not None:
            self.flight.batch_ended(batch)
