"""An audit of a model that was trained before, as the callback makes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

from lightning_influence.audit.report import AuditReport
from lightning_influence.callbacks import no_training
from lightning_influence.callbacks.checkpoint_files import StrPath, precision_of
from lightning_influence.callbacks.hooks import RunHooks
from lightning_influence.callbacks.lightning import (
    LightningModule,
    Trainer,
    is_a,
    is_running,
    overrides,
    rank_zero_warn,
)
from lightning_influence.callbacks.past_run import PastRun, RunFiles
from lightning_influence.callbacks.sharded import check_afterwards
from lightning_influence.core import distributed
from lightning_influence.core.errors import short


class Afterwards(RunHooks):
    """What needs no fit with this callback."""

    @overload
    def audit(
        self,
        model: LightningModule,
        data: Any = None,
        *,
        ckpt_path: StrPath | None = None,
        ckpt_paths: Sequence[StrPath] = (),
        val_dataloaders: Any = None,
        trainer: None = None,
    ) -> AuditReport: ...

    @overload
    def audit(
        self,
        model: LightningModule,
        data: Any = None,
        *,
        ckpt_path: StrPath | None = None,
        ckpt_paths: Sequence[StrPath] = (),
        val_dataloaders: Any = None,
        trainer: Trainer,
    ) -> AuditReport | None: ...

    def audit(
        self,
        model: LightningModule,
        data: Any = None,
        *,
        ckpt_path: StrPath | None = None,
        ckpt_paths: Sequence[StrPath] = (),
        val_dataloaders: Any = None,
        trainer: Trainer | None = None,
    ) -> AuditReport | None:
        """Audit a model that was trained before, by its own ``training_step`` and data; see ``docs/afterwards.md``.

        Nothing is trained. What training alone can tell (dynamics) is there if the checkpoint was saved with this
        callback; else the report says what it lacks.

        Args:
            model: The model; it keeps the checkpoint's weights.
            data: The training data: a data module, or a ``DataLoader``; by default those of the model or the trainer.
            ckpt_path: A checkpoint of a Trainer, or a file with the model's ``state_dict()``; a directory that holds
                one; ``"best"`` or ``"last"`` of ``trainer``. None for the weights that the model has.
            ckpt_paths: Checkpoints of the same run, for ``tracin``, and if they are of its first epochs for what to
                believe of the labels. Without ``ckpt_path``, the last of them is audited.
            val_dataloaders: Validation data, for ``harm`` and ``queries``.
            trainer: For device, precision and loggers; by default one device, and no logger. The audit then lies
                beside the checkpoint, without one in the working directory.

        Returns:
            The report, also in ``report``; None on other ranks than zero, which only a ``trainer`` has.

        Raises:
            CheckpointFileError, ValueError: If a checkpoint or the data can't be used.
            RuntimeError: While the model is trained or evaluated.
            MisconfigurationException: As during ``fit``.

        Example:
            >>> report = InfluenceAudit().audit(model, datamodule, ckpt_path="lightning_logs/version_0")
        """
        if not self.has_report:
            self._no_report = "the last audit has failed"
        if not is_a(model, "LightningModule"):
            raise TypeError(f"the model is {short(model)}; expected the LightningModule that was trained.")
        if any(is_running(each) for each in (trainer, getattr(model, "_trainer", None))):
            raise RuntimeError(
                f"{type(model).__name__} or its trainer is in the middle of a run, in whose place the audit would be. "
                "Call `audit` once that has ended, or audit a `copy.deepcopy(model)` without `trainer=`."
            )
        if trainer is None and distributed.world_size() > 1:
            raise ValueError(
                f"this is one of {distributed.world_size()} processes, which share an audit: pass their `trainer=` and "
                "call `audit` on all of them, or audit a checkpoint in a process of its own."
            )
        if self.arguments.queries is not None and self.arguments.queries.method == "replay":
            rank_zero_warn(
                "InfluenceAudit.audit: queries have no lists by replay, which asks a training that was recorded, and "
                "nothing is trained here; `report.replay` asks that of a report whose training was."
            )
        if trainer is not None:
            check_afterwards(trainer)
        if ckpt_path is None and not ckpt_paths and trainer is not None and self.arguments.weights == "best":
            ckpt_path = "best"
        files = RunFiles.of(model, trainer, ckpt_path, ckpt_paths)
        loaders = _data(model, data, val_dataloaders, trainer)
        weights = model.state_dict() if files.audited is None else files.audited.weights
        used = trainer or no_training.evaluating_trainer(model, precision_of(weights))
        done = PastRun(self.arguments, self.state_key, files, model, used, lent=trainer is not None)
        try:
            no_training.fit_in_name(used, model, done.audit, **loaders)
        finally:  # what the model does at the end of a fit may fail; a finished audit is there all the same
            if done.run is not None and done.run.finished:
                self._report, self._run = done.report, done.run
                self._no_report = "it is that of rank zero"
        return self._report


def _data(model: LightningModule, data: Any, val_dataloaders: Any, trainer: Any) -> dict[str, Any]:
    """Return the data as ``fit`` takes them; by default those of the trainer's last fit, or of the model."""
    if data is None and trainer is not None and trainer.datamodule is not None:
        data = trainer.datamodule
    if is_a(data, "LightningDataModule"):
        if val_dataloaders is not None:
            raise ValueError(
                f"val_dataloaders beside the data module {type(data).__name__}, which has its own; pass loaders alone, "
                "or the data module alone."
            )
        return {"datamodule": data}
    if data is None and trainer is not None:
        # By identity: a stream has no length that would make it true.
        data = trainer.train_dataloader
        val_dataloaders = trainer.val_dataloaders if val_dataloaders is None else val_dataloaders
    if data is None and not overrides("train_dataloader", model):
        raise ValueError(
            f"there are no training data: pass the DataLoader or LightningDataModule that {type(model).__name__} was "
            "trained with."
        )
    return {"train_dataloaders": data, "val_dataloaders": val_dataloaders}
