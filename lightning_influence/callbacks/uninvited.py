"""An audit that an environment variable has put into every Trainer: it is in nobody's way."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial, wraps
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
from lightning_influence.core.meeting import together
from lightning_influence.training.settings import TracIn

VARIABLE = "LIGHTNING_INFLUENCE"


# Hooks in which processes meet: none of them may be missing there.
_TOGETHER = ("on_train_start", "on_train_epoch_start", "on_train_epoch_end", "on_train_end", "on_fit_end")


class UninvitedAudit(InfluenceAudit):
    """An ``InfluenceAudit`` that leaves the Trainer, with a warning, where another one would refuse to train, or fail.

    It also leaves if the Trainer has an audit of its own. All of its hooks go through ``_guarded``.
    """

    _failed: Exception | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule | None = None, stage: str = "fit") -> None:
        """As ``InfluenceAudit``."""
        if any(isinstance(each, InfluenceAudit) and each is not self for each in callbacks_of(trainer)):
            self._leave(trainer)
            return
        super().setup(trainer, pl_module, stage)
        if stage == "fit":  # once more: what the recorder meets between the hooks must not end a training, either
            self._recorder.attach(trainer, partial(self._in_nobodys_way, trainer))

    def state_dict(self) -> dict[str, Any]:
        """As ``InfluenceAudit``; nothing if that fails."""
        try:
            return super().state_dict()
        except Exception as error:
            self._failed = error
            return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As ``InfluenceAudit``; the next hook tells if that fails."""
        try:
            super().load_state_dict(state_dict)
        except Exception as error:
            self._failed = error

    @contextmanager
    def _in_nobodys_way(self, trainer: Trainer, *, meeting: bool = False) -> Iterator[None]:
        """Leave the trainer after an error of whatever kind: nothing of training itself runs in here."""
        try:
            with together() if meeting else nullcontext():
                yield
        except Exception as error:
            self._stop(trainer, error)
            if meeting or distributed.world_size() == 1 or isinstance(error, MisconfigurationException):
                self._leave(trainer)  # else once all processes meet

    def _stop(self, trainer: Trainer, error: Exception) -> None:
        """Do nothing more, and say so."""
        told = str(error) if isinstance(error, MisconfigurationException) else repr(error)
        if self._no_report != told:
            lost = (
                "this training is not audited" if not self.has_report else "the audit of this training may lack a part"
            )
            rank_zero_warn(f"{VARIABLE}: {lost}. {told}")
        self._failed, self._no_report = error, told
        self._recorder.detach()
        if self._run is not None:
            self._run.listener.stop()
            if not self.has_report:
                self._run.interrupt(trainer, told)

    def _leave(self, trainer: Any) -> None:
        self._recorder.detach()
        if trainer.is_global_zero:  # no `teardown` is going to
            self._child.leave(self._report, self._no_report)
        # Another list: the trainer is going through this one.
        trainer.callbacks = [each for each in callbacks_of(trainer) if each is not self]


def _guarded(name: str) -> Callable[..., None]:
    """Return a hook of the audit in which nothing can end a training."""
    hook = getattr(UninvitedAudit, name)

    @wraps(hook)
    def guarded(self: UninvitedAudit, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        meeting = name in _TOGETHER or (self._run is None and name == "on_train_batch_start")  # which may begin the run
        with self._in_nobodys_way(trainer, meeting=meeting):
            asked = name in _TOGETHER or distributed.world_size() == 1
            if asked and distributed.any_process(self._failed is not None):
                raise MisconfigurationException(
                    repr(self._failed) if self._failed else "it has failed in another process"
                )
            if self._failed is None:
                hook(self, trainer, *args, **kwargs)

    return guarded


for _name in dir(UninvitedAudit):
    ours = any(_name in vars(kind) for kind in UninvitedAudit.__mro__ if kind.__module__.startswith(__package__))
    if ours and (_name.startswith("on_") or _name in ("setup", "teardown")):
        setattr(UninvitedAudit, _name, _guarded(_name))


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
