"""TracIn in flight along a Trainer: which batches are measured, at which scale, with which learning rates."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from lightning.pytorch import LightningModule, Trainer

from lightning_influence import optimizers
from lightning_influence.callbacks import bridge
from lightning_influence.callbacks.recording import Recording
from lightning_influence.coverage import Coverage
from lightning_influence.in_flight import Flight, Visit
from lightning_influence.task import LossTap


class FlightRecorder:
    """Measures batches as training goes by them, and files what they say once the optimizer has stepped.

    Args:
        recording: Where to file it.
        cover: Returns the layers to measure, as they are at the time.
        batch_size: Of the loader, if the loss is a sum over examples; None if it is a mean.
    """

    def __init__(self, recording: Recording, cover: Callable[[], Coverage], batch_size: int | None = None) -> None:
        self._recording = recording
        self._cover = cover
        self._batch_size = batch_size
        self._flight: Flight | None = None
        self._trainable: list[int] = []
        # Visits of the batches since the last step: it is theirs.
        self._pending: list[tuple[Sequence[int], Visit | None]] = []
        self._due = self._measuring = False  # the running batch; until the end of its first backward pass
        self._started: float | None = None

    def tap(self, trainer: Trainer, module: LightningModule, indices: Sequence[int]) -> LossTap:
        """Return a loss tap for the next batch, which watches its layers if the batch is measured."""
        self._started = time.perf_counter()
        self._due = self._measuring = self._recording.pace.due() and not self._recording.failed
        if not self._due:
            return LossTap()
        groups = [group for optimizer in trainer.optimizers for group in optimizers.inner(optimizer).param_groups]
        trainable = [id(p) for group in groups for p in group["params"] if p.requires_grad]
        if self._flight is None or trainable != self._trainable:  # callbacks thaw layers during training
            self._flight, self._trainable = Flight(self._cover(), trainer.optimizers), trainable
        return self._flight.tap(len(indices))

    def before_backward(self, trainer: Trainer, indices: Sequence[int]) -> None:
        """Get ready for the backward pass of a batch."""
        if self._measuring and self._flight is not None:
            n = len(indices) if self._batch_size is None else self._batch_size
            self._flight.start(indices, n * trainer.accumulate_grad_batches / bridge.loss_scale(trainer))
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
            (number, place): rate
            for number, stepping in enumerate(trainer.optimizers)
            for place, (rate, _) in enumerate(optimizers.rates(stepping))
            if optimizers.inner(stepping) is optimizers.inner(optimizer)
        }
        for indices, visit in pending:
            scores = None if visit is None else visit.score(rates)
            if scores is not None and bridge.has_loss_scaler(trainer) and not bool(torch.isfinite(scores).all()):
                scores = None  # a gradient scaler that reached too high: this step is not taken
            self._recording.record_visit(indices, scores)

    def batch_ended(self) -> None:
        """Note how long the batch took."""
        if self._started is not None:
            self._recording.pace.took(self._due, time.perf_counter() - self._started)
        self._started, self._measuring = None, False
        if self._flight is not None:
            self._flight.clear()

    def notes(self) -> list[str]:
        """Return what a reader of the scores should know."""
        found = [self._recording.pace.note()]
        if self._flight is None:
            return [note for note in found if note]
        missing, share = self._flight.missing, self._flight.share
        if missing:
            listed = [f"{name} ({reason})" for name, reason in missing.items()]
            more = f" and {len(listed) - 6} more" if len(listed) > 6 else ""
            found.append(
                f"TracIn in flight covers {share:.1%} of the trainable parameters; it lacks "
                f"{'; '.join(listed[:6])}{more}"
            )
        elif share < 1:
            found.append(f"TracIn in flight covers {share:.1%} of the trainable parameters, as `layers` ask for")
        return [note for note in found if note]
