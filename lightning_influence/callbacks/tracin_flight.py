"""TracIn in flight along a Trainer: which batches are measured, at which scale, with which learning rates."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_influence.callbacks import bridge
from lightning_influence.gradients.coverage import Layers, cover, listed_reasons
from lightning_influence.gradients.trace import Trace
from lightning_influence.objective.tap import TrainingTap
from lightning_influence.training import optimizers
from lightning_influence.training.flight.flight import Flight, Visit
from lightning_influence.training.recording import Recording
from lightning_influence.training.tracin import Increments


class FlightRecorder:
    """Measures batches as training goes by them, and files what they say once the optimizer has stepped.

    Args:
        recording: Where to file it.
        trainer: The trainer.
        module: The model.
        layers: Layers to measure, as the argument of ``TracIn``.
        trace: How the model uses its parameters.

    Attributes:
        spent: Seconds that all recording has taken in the running batch, in between what training does.

    Raises:
        LayerError: If there are no such layers.
    """

    def __init__(
        self, recording: Recording, trainer: Trainer, module: LightningModule, layers: Layers, trace: Trace
    ) -> None:
        # Only to find out now; which of them are trained may change.
        cover(module, layers, trace=trace, trained=bridge.trained(trainer, module))
        self._recording = recording
        self._layers = layers
        self._trace = trace
        self._flight: Flight | None = None
        self._trainable: list[int] = []
        # Visits of the batches since the last step: it is theirs.
        self._pending: list[tuple[Sequence[int], Visit | None]] = []
        self._due = self._measuring = False  # the running batch; until the end of its first backward pass
        self._started: float | None = None
        self.spent = 0.0

    def tap(
        self, trainer: Trainer, module: LightningModule, indices: Sequence[int], *, listens: bool
    ) -> TrainingTap | None:
        """Return a loss tap that watches the layers in the next batch.

        None if the batch is not measured, or its graph will tell.

        Args:
            trainer: The trainer.
            module: The model.
            indices: Of the examples of the batch.
            listens: Whether there is a tap anyway.
        """
        self._started = time.perf_counter()
        self._due = self._measuring = self._recording.pace.due() and not self._recording.failed
        if not self._due:
            return None
        groups = [group for optimizer in trainer.optimizers for group in optimizers.inner(optimizer).param_groups]
        trainable = [id(p) for group in groups for p in group["params"] if p.requires_grad]
        if self._flight is None or trainable != self._trainable:  # callbacks thaw layers during training
            trained = bridge.trained(trainer, module)
            coverage = cover(module, self._layers, trace=self._trace, trained=trained)
            self._flight, self._trainable = Flight(coverage, trainer.optimizers), trainable
        if listens or self._flight.needs_tap:
            return self._flight.tap(len(indices))
        self._flight.without_tap(len(indices))
        return None

    def before_backward(self, trainer: Trainer, indices: Sequence[int], loss: Tensor) -> None:
        """Get ready for the backward pass of a batch."""
        if self._measuring and self._flight is not None:
            # Gradients of a sum are those of the examples' own losses, those of a mean a part of them.
            n = 1 if self._trace.sums else len(indices)
            scale = n * trainer.accumulate_grad_batches / bridge.loss_scale(trainer)
            try:
                self._flight.start(indices, scale, loss)
            except Exception as error:  # training goes on
                self._recording.fail("TracIn in flight is incomplete", error)
        self._pending.append((indices, None))

    def after_backward(self) -> None:
        """Take what the backward pass has told."""
        if not self._measuring or self._flight is None:
            return
        self._measuring = False
        try:
            visit = self._flight.finish()
        except Exception as error:
            self._recording.fail("TracIn in flight is incomplete", error)
            return
        if self._pending and visit is not None and visit.complete:
            self._pending[-1] = (self._pending[-1][0], visit)

    def before_step(self, trainer: Trainer, optimizer: object) -> None:
        """File the batches that the next step of the optimizer is made of."""
        pending, self._pending = self._pending, []
        if self._flight is not None:
            self._flight.stepped()
        if not pending or not self._recording.first_time(trainer.global_step):
            return
        rates = {
            (number, place): rate * self._recording.step_sizes.summed
            for number, stepping in enumerate(trainer.optimizers)
            for place, (rate, _) in enumerate(optimizers.rates(stepping))
            if optimizers.inner(stepping) is optimizers.inner(optimizer)
        }
        for indices, visit in pending:
            found = None if visit is None else visit.increments(rates)
            if found is not None and bridge.has_loss_scaler(trainer):
                # A gradient scaler that reached too high: this step is not taken.
                found = found if bool(torch.isfinite(Increments.joined([found])).all()) else None
            self._recording.record_visit(indices, found)

    def batch_ended(self) -> None:
        """Note how long the batch took."""
        if self._started is not None and not self._recording.failed:
            self._recording.pace.took(self._due, time.perf_counter() - self._started, self.spent)
        self._started, self._measuring, self.spent = None, False, 0.0
        if self._flight is not None:
            self._flight.clear()

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
