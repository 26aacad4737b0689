"""What a run that is resumed takes over: what was recorded, whoever recorded it, and an audit that was cut."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from lightning.pytorch import LightningModule, Trainer

from lightning_influence.audit.report import AuditReport
from lightning_influence.audit.store.store import AuditStore, StoreError, jsonable
from lightning_influence.callbacks import bridge
from lightning_influence.training.recording import Recording

# Arguments that TracIn depends on while it is recorded; all the rest is as well recorded with others.
_OF_TRACIN = ("tracin", "layers", "uncovered", "task")


class Audit(Protocol):
    """The part of ``InfluenceAudit`` that is used here."""

    @property
    def state_key(self) -> str:
        """Key of its state."""
        ...


@dataclass(frozen=True)
class Restored:
    """The state of an audit in a checkpoint.

    Attributes:
        state: As ``Recording.state_dict`` gives it.
        unlike: Arguments that TracIn depends on and that were others then.
    """

    state: Mapping[str, Any]
    unlike: tuple[str, ...] = ()


def state_for(audit: Audit, audits: Sequence[Audit], states: Mapping[Any, Any]) -> Restored | None:
    """Find the state of an audit that had other arguments; None if there is none, or it is found by its key.

    States whose audits are here go to those. Of the others, audits take those with the same settings of TracIn first,
    then any: everything but TracIn is the same in all of them.

    Args:
        audit: Whose state is looked for.
        audits: All of the trainer, in order.
        states: Of all the checkpoint's callbacks, by key.
    """
    kind = type(audit).__qualname__ + "{"
    keys = [key for key, state in states.items() if isinstance(key, str) and key.startswith(kind) and state]
    waiting = [each for each in audits if each.state_key not in keys]
    keys = [key for key in keys if key not in {each.state_key for each in audits}]
    for alike in (True, False):
        for each in list(waiting):
            unlike = {key: _unlike(each.state_key, key) for key in keys}
            key = next((key for key in keys if not (alike and unlike[key])), None)
            if key is None:
                continue
            if each is audit:
                return Restored(states[key], unlike[key])
            waiting.remove(each)
            keys.remove(key)
    return None


def _unlike(one: str, other: str) -> tuple[str, ...]:
    """Return the settings of TracIn in which two keys differ."""
    try:
        settings, others = (ast.literal_eval(key[key.index("{") :]) for key in (one, other))
    except (ValueError, SyntaxError):
        return _OF_TRACIN
    settings, others = _of_tracin(settings), _of_tracin(others)
    return tuple(name for name in _OF_TRACIN if settings[name] != others[name])


def _of_tracin(arguments: Mapping[str, Any]) -> dict[str, Any]:
    tracin = arguments.get("tracin") or {}
    layers = tracin.get("layers") or arguments.get("layers")
    in_flight = tracin.get("mode") == "step"
    # In flight it is training's own loss, and only what has a closed form.
    told = {"tracin": tracin.get("mode"), "layers": layers}
    return told | {name: None if in_flight else arguments.get(name) for name in ("uncovered", "task")}


def restore(recording: Recording, restored: Restored | None, trainer: Trainer) -> None:
    """Take over what a checkpoint holds, and note what the columns will lack.

    Raises:
        ValueError: If it was written for a data set of another size, or by a version that kept it otherwise.
    """
    step, epoch = trainer.global_step, trainer.current_epoch
    if restored is not None:
        if "parts" not in restored.state:
            raise ValueError(
                "the checkpoint holds what an earlier version of lightning-influence has recorded. Resume with that "
                "version, start a new run, or train on without an audit."
            )
        recording.load_state_dict(restored.state, tracin=not restored.unlike)
        if restored.unlike and recording.wants_tracin:
            recording.notes.append(
                f"tracin lacks the {step} steps before training was resumed: they were recorded with another "
                f"{', '.join(restored.unlike)}"
            )
    elif step:
        epochs = "" if not epoch else "epoch 0 and " if epoch == 1 else f"the epochs 0 to {epoch - 1} and "
        recording.notes.append(
            f"recording began after {step} steps, in epoch {epoch}: {epochs}the steps before it are missing in the "
            "training dynamics, tracin, and a damping that follows the trainer's learning rates"
        )


def finished_report(
    restored: Restored | None, arguments: Mapping[str, Any], step: int, *, detects: bool
) -> AuditReport | None:
    """Return the complete audit of a run that is resumed after its end, if it was made with the same arguments.

    Args:
        restored: The state of the audit in the checkpoint.
        arguments: Those of now.
        step: Number of steps of the run.
        detects: Whether labels are now known to be wrong: a report without their detection is not the one asked for.
    """
    if restored is None or not restored.state.get("directory"):
        return None
    try:
        report = AuditReport.load(AuditStore.open(restored.state["directory"]).directory)
    except StoreError:
        return None
    manifest = report.manifest
    same = manifest.get("arguments") == jsonable(arguments) and manifest.get("step") == step
    same = same and (not detects or "detection" in manifest)
    return report if same and report.status == "complete" else None


@contextmanager
def as_at_the_end_of_training(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Bring back what a trainer with nothing left to train has not set up, or has put away."""
    device = module.device
    bridge.set_up_validation(trainer)
    module.to(trainer.strategy.root_device)
    try:
        yield
    finally:
        module.to(device)
