"""Recording a run for replay: what the trainer does, told to a ``Recorder``."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_influence.audit.store.atomic import StoreError
from lightning_influence.audit.store.kept_run import KeptRun
from lightning_influence.callbacks import bridge
from lightning_influence.callbacks.batch_indices import BatchIndexRecorder
from lightning_influence.callbacks.lightning import (
    LightningModule,
    MisconfigurationException,
    Trainer,
    callbacks_of,
    is_a,
    overrides,
    rank_zero_warn,
)
from lightning_influence.callbacks.run import AuditRun
from lightning_influence.replay.kept_states import KeptStates
from lightning_influence.replay.record import ReplayError, TrainingRecord
from lightning_influence.replay.recorder import Recorder
from lightning_influence.replay.settings import Record, can_be_fetched_again
from lightning_influence.replay.streams import StreamReader
from lightning_influence.training.batch_record import BatchRecord
from lightning_influence.training.optimizers import inner

_Hook = TypeVar("_Hook", bound=Callable[..., None])

_NOT_ASKED = "`InfluenceAudit(record=True)` records a run, and this one was trained without"
_PRECISIONS = ("32-true", "64-true", "bf16-true", "16-true", "bf16-mixed")
# Hooks with which a module does more in a step than the recipe tells.
_OF_A_STEP = ("optimizer_step", "configure_gradient_clipping", "backward", "optimizer_zero_grad")
_OTHER_WEIGHTS = {
    "StochasticWeightAveraging": "averages weights",
    "WeightAveraging": "averages weights",
    "ModelPruning": "prunes weights",
    "GradientAccumulationScheduler": "changes the number of batches of a step",
}


def _tolerated(hook: _Hook) -> _Hook:
    """Let a recording that fails end by itself: training goes on."""

    @wraps(hook)
    def tolerated(self: RunRecorder, *args: Any) -> None:
        try:
            hook(self, *args)
        except MisconfigurationException:
            raise
        except Exception as error:
            self.fail(f"recording it failed: {type(error).__name__}: {error}")

    return cast(_Hook, tolerated)


class RunRecorder:
    """Tells a recorder what the trainer does; nothing, where nothing is to be recorded.

    The trainer is handed in each time: callbacks are copied, and a copy must not take the trainer along.
    """

    def __init__(self) -> None:
        self._settings: Record | None = None  # as long as something is recorded
        self._recorder: Recorder | None = None
        self._record: TrainingRecord | None = None
        self._started = False
        self._why = _NOT_ASKED

    def attach(
        self, trainer: Trainer, module: LightningModule, batches: BatchIndexRecorder, settings: Record | None
    ) -> None:
        """Begin with a fit. Call in ``setup``, before ``batches`` is attached.

        Raises:
            MisconfigurationException: If such a run can't be replayed.
        """
        self._settings, self._recorder, self._record, self._started = settings, None, None, False
        batches.before_fetch = batches.on_batch = None
        self._why = _NOT_ASKED
        if settings is None:
            return
        self._why = "training has not ended yet"
        if reason := _unlike_a_recipe(trainer, module, batches):
            raise _refused(reason)
        batches.before_fetch = StreamReader()
        batches.on_batch = self._fetched

    def start(self) -> None:
        """Begin with training; what was fetched before was for those who try out learning rates or batch sizes."""
        self._started = True

    @_tolerated
    def _fetched(self, trainer: Trainer, batch: Any, known: BatchRecord) -> None:
        """Note a batch as it comes from the loader; the first one begins the recording."""
        if self._recorder is None and self._settings is not None and self._started:
            self._begin(trainer)
        recorder = self._recorder
        if recorder is None:
            return
        if known.indices is None or known.drawn is None:
            recorder.stop(f"it is not known which examples a batch of epoch {trainer.current_epoch} holds")
            return
        drawn = np.frombuffer(known.drawn.indices, np.int64).tolist()
        recorder.fetched(batch, known.indices, known.drawn.before, drawn)

    def _begin(self, trainer: Trainer) -> None:
        settings, module = cast(Record, self._settings), trainer.lightning_module
        if trainer.global_step:
            self.fail(
                f"the record begins after {trainer.global_step} steps, as training was resumed: replay needs all of "
                "them. Train without a break to replay a run"
            )
            return
        loader = trainer.train_dataloader
        if not isinstance(loader, DataLoader):
            raise _refused(f"training goes over a {type(loader).__name__}; expected one torch `DataLoader`")
        if len(trainer.optimizers) != 1:
            raise _refused(f"there are {len(trainer.optimizers)} optimizers; expected one")
        keep = settings.keep_batches
        if keep == "auto":
            indices = bridge.drawn_from(loader, len(cast(Any, loader.dataset)))
            keep = not can_be_fetched_again(loader.dataset, loader.collate_fn, indices, loader.num_workers)
        steps = trainer.estimated_stepping_batches
        try:
            self._recorder = Recorder(
                module,
                inner(trainer.optimizers[0]),
                examples=len(cast(Any, loader.dataset)),
                accumulation=trainer.accumulate_grad_batches,
                clip=trainer.gradient_clip_val or None,
                clip_by=str(getattr(trainer.gradient_clip_algorithm, "value", None) or "norm"),
                precision=trainer.precision,
                keep_batches=keep,
                max_bytes=settings.max_bytes,
                states=KeptStates(int(steps) if math.isfinite(steps) and steps > 0 else None),
            )
        except ReplayError as error:
            raise _refused(str(error).rstrip(".")) from error

    # ------------------------------------------------------------------ hooks

    @_tolerated
    def batch_started(self, trainer: Trainer, number: int, run: AuditRun | None) -> None:
        """Note the start of a batch."""
        if self._recorder is not None:
            if run is not None and run.reporter.store is not None:
                self._recorder.states.shelf = KeptRun.beside(run.reporter.store.directory)
            if not number and self._recorder.accumulated:
                epoch = trainer.current_epoch - 1
                self.fail(f"epoch {epoch} ended before the step that {self._recorder.accumulated} batches were for")
                return
            self._recorder.begin(number, trainer.current_epoch)

    @_tolerated
    def differentiated(self, loss: Tensor) -> None:
        """Note a backward pass."""
        if self._recorder is not None:
            self._recorder.differentiated(loss)

    @_tolerated
    def stepping(self) -> None:
        """Note an optimizer step."""
        if self._recorder is not None:
            self._recorder.stepping()

    @_tolerated
    def batch_ended(self) -> None:
        """Note the end of a batch."""
        if self._recorder is not None:
            self._recorder.ended()
            if self._recorder.why:
                self.fail(self._recorder.why)

    def finish(self, run: AuditRun) -> None:
        """Note the end of training, and write the record."""
        self._finish()
        self._settings = self._recorder = None
        if self._record is not None and run.reporter.store is not None:
            try:
                KeptRun.beside(run.reporter.store.directory).write(self._record)
            except (StoreError, ValueError) as error:
                run.recording.note(f"the record of the training is in memory alone: {error}")
                rank_zero_warn(f"InfluenceAudit: the record of the training is in memory alone: {error}")
        if self._record is None and self._why != _NOT_ASKED:
            run.recording.note(f"this run can't be replayed: {self._why}")

    @_tolerated
    def _finish(self) -> None:
        if self._recorder is not None:
            try:
                self._record = self._recorder.finish()
            except ReplayError:
                self.fail(self._recorder.why)

    def end(self, why: str) -> None:
        """Record nothing more, without a word."""
        if self._settings is not None:
            if self._recorder is not None:
                self._recorder.stop(why)
            self._settings, self._recorder, self._why = None, None, why

    def fail(self, why: str) -> None:
        """Record nothing more, and say so."""
        self.end(why)
        rank_zero_warn(f"InfluenceAudit: this run can't be replayed, and is not recorded any further: {why}.")

    @property
    def record(self) -> TrainingRecord | None:
        """The record of the run that has ended, if there is one."""
        return self._record

    def recorded(self) -> TrainingRecord:
        """Return the record of the run that has ended.

        Raises:
            RuntimeError: If there is none, with the reason.
        """
        if self._record is None:
            raise RuntimeError(f"there is no record of the training: {self._why}.")
        return self._record


def _refused(reason: str) -> MisconfigurationException:
    return MisconfigurationException(
        f"InfluenceAudit(record=True): this run can't be replayed: {reason}. Leave out `record=`, and `method=` of "
        "`Queries`, for an audit without."
    )


def _unlike_a_recipe(trainer: Trainer, module: LightningModule, batches: BatchIndexRecorder) -> str:
    """Return why steps are no function of what is recorded, as far as it is known before training; "" if they are."""
    name = type(module).__name__
    if not module.automatic_optimization:
        return f"{name} optimizes manually, and what it does in a step is known to it alone"
    if batches.sample_id is not None:
        return "it is trained on a stream, whose examples have no index to be fetched by once more"
    if batches.loader is not None:
        return "it is trained on several loaders at once; expected one"
    if trainer.world_size > 1:
        return f"{trainer.world_size} processes share each step; expected one, `Trainer(devices=1)`"
    if is_a(trainer.strategy, "ModelParallelStrategy"):
        return "its parameters are shards; expected plain ones, `Trainer(devices=1)` without a strategy"
    if bridge.has_loss_scaler(trainer) or trainer.precision not in _PRECISIONS:
        return f"its precision is {trainer.precision!r}; expected one of {', '.join(map(repr, _PRECISIONS))}"
    if own := [hook for hook in _OF_A_STEP if overrides(hook, module)]:
        return f"{name} has its own `{own[0]}`, and what that does in a step is not recorded"
    for callback in callbacks_of(trainer):
        if kind := next((kind for kind in _OTHER_WEIGHTS if is_a(callback, kind)), None):
            return f"{type(callback).__name__} {_OTHER_WEIGHTS[kind]}"
    return ""
