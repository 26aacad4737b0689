"""What a run that is resumed takes over: what was recorded, whoever recorded it, and an audit that was cut."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from lightning_influence.callbacks import bridge
from lightning_influence.training.recording import Recording

# Arguments that TracIn depends on while it is recorded; all the rest is as well recorded with others.
_OF_TRACIN = ("tracin", "layers", "uncovered", "task")


@dataclass(frozen=True)
class Restored:
    """The state of an audit in a checkpoint.

    Attributes:
        state: As ``Recording.state_dict`` gives it.
        unlike: Arguments that TracIn depends on and that were others then.
    """

    state: Mapping[str, Any]
    unlike: tuple[str, ...] = ()


def state_for(own: str, states: Mapping[Any, Any]) -> Restored | None:
    """Find the state of an audit that had other arguments; None if there is none, or it is found by its key.

    That of those with the most of its settings of TracIn: everything but TracIn is the same in all of them.

    Args:
        own: Key of the audit.
        states: Of all the checkpoint's callbacks, by key.
    """
    kind = own.partition("{")[0] + "{"
    keys = [key for key, state in states.items() if isinstance(key, str) and key.startswith(kind) and state]
    if own in keys or not keys:
        return None
    unlike, key = min(((_unlike(own, key), key) for key in keys), key=lambda found: len(found[0]))
    return Restored(states[key], unlike)


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
