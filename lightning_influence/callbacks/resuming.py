"""What a run that is resumed takes over: what was recorded, whoever recorded it, and an audit that was cut."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from lightning_influence.callbacks import bridge
from lightning_influence.callbacks.lightning import LightningModule, Trainer, rank_zero_warn
from lightning_influence.callbacks.run import AuditRun
from lightning_influence.core.errors import Forgiving, examples
from lightning_influence.core.meeting import together
from lightning_influence.training.features import look_at_labels
from lightning_influence.training.recording import Recording

# So many examples are looked at, at most.
_ASKED = 512

# Whoever put an audit into a trainer: what is recorded is the same.
_KINDS = ("InfluenceAudit", "UninvitedAudit")


@dataclass(frozen=True)
class Restored:
    """The state of an audit in a checkpoint.

    Attributes:
        state: As ``Recording.state_dict`` gives it.
        unlike: Arguments that TracIn depends on and that were others then.
    """

    state: Mapping[str, Any]
    unlike: tuple[str, ...] = ()

    @property
    def of_stream(self) -> bool:
        """Whether its examples are numbered in the order in which they came."""
        return "stream" in self.state


def state_for(own: str, arguments: Mapping[str, Any], states: Mapping[Any, Any]) -> Restored | None:
    """Find the state of an audit that had other arguments; None if there is none, or it is found by its key.

    That of those with the most of its settings of TracIn: everything but TracIn is the same in all of them.

    Args:
        own: Key of the audit.
        arguments: Its arguments.
        states: Of all the checkpoint's callbacks, by key.
    """
    kinds, settings = {own.partition("{")[0], *_KINDS}, _of_tracin(arguments)
    others = {key: state for key, state in states.items() if str(key).partition("{")[0] in kinds and state}
    # What is recorded is about the examples of a loader.
    own_loader = arguments.get("loader")
    others = {key: s for key, s in others.items() if s.get("arguments", {}).get("loader") == own_loader}
    if own in others or not others:
        return None
    found = []
    for state in others.values():
        theirs = _of_tracin(state.get("arguments", {}))
        found.append(Restored(state, tuple(name for name in settings if settings[name] != theirs[name])))
    return min(found, key=lambda each: len(each.unlike))


def _of_tracin(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return what TracIn depends on while it is recorded; all the rest is as well recorded with others."""
    tracin = arguments.get("tracin") or {}
    layers = tracin.get("layers") or arguments.get("layers")
    in_flight = tracin.get("mode") == "step"
    # In flight it is training's own loss, and only what has a closed form.
    mode = tracin.get("mode")
    told = {"tracin": "epoch" if mode == "auto" else mode, "layers": layers}  # passes at ends of epochs, both
    return told | {name: None if in_flight else arguments.get(name) for name in ("uncovered", "task")}


def restore(recording: Recording, restored: Restored | None, trainer: Trainer) -> None:
    """Take over what a checkpoint holds, and note what the columns will lack.

    Raises:
        ValueError: If it was written for a data set of another size or kind, or by a version that kept it otherwise.
    """
    step, epoch = trainer.global_step, trainer.current_epoch
    if restored is not None:
        stream = recording.stream is not None
        if "parts" in restored.state and restored.of_stream != stream:
            then, now = ("by ids of a stream" if one else "by index" for one in (restored.of_stream, stream))
            raise ValueError(
                f"what the checkpoint holds of each example is filed {then}, and these data are filed {now}: which is "
                "whose is not known. Go on with the data and the `sample_id=` of the training, or without an audit."
            )
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


def warn_of_other_labels(run: AuditRun, trainer: Trainer, module: LightningModule) -> None:
    """Warn if examples have other labels than before training was resumed: of their batches nothing is recorded."""
    recording = run.recording
    asked = recording.seen_indices()
    if recording.stream is not None or not asked or "label" not in recording.dynamics.sums:
        return
    asked = asked[:: -(-len(asked) // _ASKED)]
    with Forgiving(), together(), bridge.aside(trainer):
        seen = look_at_labels(run.passes.gradients(trainer, module), asked, title="labels")
        if seen is None or "label" not in seen.columns:
            return
        other = recording.dynamics.relabelled(seen.indices.cpu(), seen.columns["label"].cpu())
        if other:
            rank_zero_warn(
                f"InfluenceAudit: {len(other)} of {len(asked)} examples that were looked at have another label than "
                f"before training was resumed ({examples(other)}): batches with such examples count for nobody, and "
                "if there are many, what training says of each example is left out. For an audit of the new labels, "
                "train from the start."
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
