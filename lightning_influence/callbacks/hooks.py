"""What training does, handed on to the run under audit."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from torch import Tensor

from lightning_influence.callbacks.answers import Answers
from lightning_influence.callbacks.arguments import Arguments
from lightning_influence.callbacks.batch_indices import BatchIndexRecorder
from lightning_influence.callbacks.lightning import LightningModule, Trainer, rank_zero_info
from lightning_influence.callbacks.recording_run import RunRecorder
from lightning_influence.callbacks.resuming import Restored, state_for
from lightning_influence.callbacks.run import AuditRun
from lightning_influence.replay.record import TrainingRecord
from lightning_influence.training.recording import Recording


class RunHooks(Answers):
    """The hooks between the first and the last step of a fit, and what its checkpoints keep."""

    arguments: Arguments

    def __init__(self) -> None:
        super().__init__()
        self._recorder = BatchIndexRecorder()
        self._replay = RunRecorder()
        # What checkpoints keep: from a checkpoint until the size of the data is known, then of the run.
        self._restored: Restored | None = None
        self._recording: Recording | None = None

    @property
    def training_record(self) -> TrainingRecord:
        """The run as it was recorded (``record=True``), once training has ended.

        Raises:
            RuntimeError: If there is none, with the reason.
        """
        return self._replay.recorded()

    @abstractmethod
    def _prepare(self, trainer: Trainer, module: LightningModule) -> AuditRun:
        """Look at one batch, and begin the run."""

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look whether the data were loaded again."""
        if self._run is not None and (source := self._recorder.source_of_epoch(trainer)) is not None:
            self._run.take_data(source, trainer.current_epoch)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Note which examples come, and listen for their loss."""
        known = self._recorder.next()
        if self._run is None:
            self._prepare(trainer, pl_module).catch_up(trainer, pl_module)
        self._replay.batch_started(trainer, batch_idx, self._run)
        if self._run is not None:
            self._run.listener.batch_started(trainer, pl_module, known)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """File what the training pass itself said about each example."""
        self._replay.differentiated(loss)
        if self._run is not None:
            self._run.listener.before_backward(trainer, loss)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take what the backward pass said about each example's gradient."""
        if self._run is not None:
            self._run.listener.after_backward()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop listening if there was no backward pass."""
        self._replay.batch_ended()
        if self._run is not None:
            self._run.listener.batch_ended()
            self._run.budget.batch_ended(trainer, batch_idx)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Note the learning rates that are really used."""
        self._replay.stepping()
        if self._run is not None:
            self._run.listener.before_step(trainer, optimizer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Time training without it."""
        if self._run is not None:
            self._run.budget.validation(begins=True)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Time training again."""
        if self._run is not None:
            self._run.budget.validation(begins=False)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add a TracIn checkpoint; the last one is part of the final pass."""
        if self._run is not None:
            self._run.epoch_ended(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Undo everything and keep what was recorded so far."""
        self._recorder.detach()
        self._replay.end(f"the run ended with {type(exception).__name__}: {exception}")
        if self._report is None:
            self._no_report = f"the run ended with {type(exception).__name__}: {exception}"
        if self._run is not None:
            self._run.listener.stop()
            of_fit = trainer.state.fn == "fit" and self._run.reporter.directory is not None
            if self._report is None and of_fit:
                self._run.interrupt(trainer, repr(exception))
                rank_zero_info(
                    f"influence audit: interrupted; what was recorded is kept in {self._run.reporter.directory}. "
                    "Resume training from a checkpoint (`ckpt_path=`) to go on with it."
                )
        if trainer.is_global_zero:
            self._child.leave(self._report, self._no_report)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Undo everything."""
        self._recorder.detach()
        if self._run is not None:
            self._run.listener.stop()
        if stage == "fit" and trainer.is_global_zero:
            self._child.leave(self._report, self._no_report)

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs: tensors and primitives."""
        if self._recording is None:
            return {}
        return self._recording.state_dict() | {"arguments": self.arguments.described()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until the size of the data set is known."""
        self._restored = Restored(state_dict) if state_dict else None
        self._recorder.known = state_dict.get("stream")

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take over what an audit with other arguments has recorded: nearly all of it does not depend on them."""
        self._restored = state_for(self.state_key, self.arguments.described(), checkpoint.get("callbacks") or {})
        if self._restored is not None:  # Lightning has just said that it is not
            self._recorder.known = self._restored.state.get("stream")
            rank_zero_info("influence audit: what an audit with other arguments has recorded is taken over.")
