"""An audit that an environment variable has put into every Trainer: it is in nobody's way."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from lightning_influence.callbacks.influence_audit import InfluenceAudit
from lightning_influence.callbacks.lightning import (
    LightningModule,
    MisconfigurationException,
    Trainer,
    callbacks_of,
    rank_zero_warn,
)
from lightning_influence.core import distributed
from lightning_influence.training.settings import TracIn

VARIABLE = "LIGHTNING_INFLUENCE"


class UninvitedAudit(InfluenceAudit):
    """An ``InfluenceAudit`` that leaves the Trainer, with a warning, where another one would refuse to train.

    It also leaves if the Trainer has an audit of its own.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule | None = None, stage: str = "fit") -> None:
        """As ``InfluenceAudit``."""
        if any(isinstance(each, InfluenceAudit) and each is not self for each in callbacks_of(trainer)):
            self._leave(trainer)
            return
        with self._in_nobodys_way(trainer):
            super().setup(trainer, pl_module, stage)
            if stage == "fit":  # once more: what the recorder meets between the hooks must not end a training, either
                self._recorder.attach(trainer, partial(self._in_nobodys_way, trainer))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As ``InfluenceAudit``."""
        with self._in_nobodys_way(trainer):
            super().on_train_start(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """As ``InfluenceAudit``."""
        with self._in_nobodys_way(trainer):
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    @contextmanager
    def _in_nobodys_way(self, trainer: Trainer) -> Iterator[None]:
        """Leave the trainer after an error of whatever kind: nothing of training itself runs in here."""
        try:
            yield
        except Exception as error:
            if distributed.world_size() > 1:
                raise  # other processes may not have met it, and would wait for this one
            told = str(error) if isinstance(error, MisconfigurationException) else repr(error)
            rank_zero_warn(f"{VARIABLE}: this training is not audited. {told}")
            self._no_report = told
            if self._run is not None:
                self._run.listener.stop()
                self._run.interrupt(trainer, told)
            self._leave(trainer)

    def _leave(self, trainer: Any) -> None:
        self._recorder.detach()
        # Another list: the trainer is going through this one.
        trainer.callbacks = [each for each in callbacks_of(trainer) if each is not self]


def audit_of(path: str) -> UninvitedAudit:
    """Return the audit that a YAML file describes: a mapping of arguments of ``InfluenceAudit``; empty for defaults.

    Raises:
        ValueError: If the file can't be read, is no such mapping, or an argument is out of range.
    """
    try:
        arguments = yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(
            f"{VARIABLE}={path} can't be read: {error}. Expected a YAML file with arguments of InfluenceAudit, such "
            "as `curvature: ekfac`; unset the variable to train without an audit."
        ) from error
    known = list(inspect.signature(InfluenceAudit).parameters)
    if not isinstance(arguments, dict) or (unknown := [name for name in arguments if name not in known]):
        found = f"has {', '.join(map(str, unknown))}" if isinstance(arguments, dict) else "is no mapping"
        raise ValueError(f"{VARIABLE}={path} {found}; expected arguments of InfluenceAudit: {', '.join(known)}.")
    try:
        if isinstance(arguments.get("tracin"), dict):
            arguments["tracin"] = TracIn(**arguments["tracin"])
        return UninvitedAudit(**arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{VARIABLE}={path}: {error}") from error
