"""An audit that an environment variable has put into every Trainer: it is in nobody's way."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from lightning_influence.callbacks.influence_audit import InfluenceAudit
from lightning_influence.callbacks.lightning import LightningModule, MisconfigurationException, Trainer, rank_zero_warn
from lightning_influence.core import distributed
from lightning_influence.training.settings import TracIn

VARIABLE = "LIGHTNING_INFLUENCE"


class UninvitedAudit(InfluenceAudit):
    """An ``InfluenceAudit`` that leaves the Trainer, with a warning, where another one would refuse to train.

    It also leaves if the Trainer has an audit of its own.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule | None = None, stage: str = "fit") -> None:
        """As ``InfluenceAudit``."""
        others = [each for each in trainer.callbacks if isinstance(each, InfluenceAudit) and each is not self]  # type: ignore[union-attr]
        if others:
            self._leave(trainer)
        else:
            self._try(trainer, lambda: super(UninvitedAudit, self).setup(trainer, pl_module, stage))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As ``InfluenceAudit``."""
        self._try(trainer, lambda: super(UninvitedAudit, self).on_train_start(trainer, pl_module))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """As ``InfluenceAudit``."""
        start = super().on_train_batch_start
        self._try(trainer, lambda: start(trainer, pl_module, batch, batch_idx))

    def _try(self, trainer: Trainer, hook: Callable[[], None]) -> None:
        try:
            hook()
        except MisconfigurationException as error:
            if distributed.world_size() > 1:
                raise  # other processes may not have met it, and would wait for this one
            rank_zero_warn(f"{VARIABLE}: this training is not audited. {error}")
            self._no_report = str(error)
            self._leave(trainer)

    def _leave(self, trainer: Trainer) -> None:
        self._recorder.detach()
        # Another list: the trainer is going through this one.
        trainer.callbacks = [each for each in trainer.callbacks if each is not self]  # type: ignore[union-attr]


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
