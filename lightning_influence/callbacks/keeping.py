"""Which checkpoints and curves an audit keeps: within its budget, whatever fails, and across a run that is resumed."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from lightning_influence.audit.store.atomic import StoreError
from lightning_influence.audit.store.store import AuditStore
from lightning_influence.callbacks.lightning import LightningModule, Trainer
from lightning_influence.core.memory import readable
from lightning_influence.gradients.coverage import listed
from lightning_influence.training.checkpoints import Checkpoint
from lightning_influence.training.optimizers import preconditioners
from lightning_influence.training.recording import Recording
from lightning_influence.training.settings import TracIn


def take_checkpoint(
    store: AuditStore | None, trainer: Trainer, module: LightningModule, recording: Recording, tracin: TracIn
) -> Checkpoint:
    """Take a checkpoint that stands for the steps since the last one, and keep it."""
    taken, scales = recording.step_sizes, preconditioners(trainer.optimizers, module)
    checkpoint = Checkpoint.of(
        module,
        trainer.global_step,
        steps=taken.steps,  # before they are taken
        step_sizes=taken.take(scales),
        preconditioner=scales,
        optimizer=", ".join(sorted(taken.optimizers)),
    )
    _keep(store, checkpoint, tracin, recording)
    return checkpoint


def _keep(store: AuditStore | None, checkpoint: Checkpoint, tracin: TracIn, recording: Recording) -> None:
    """Keep a checkpoint within the budget, and note it if that can't be."""
    if store is None or not tracin.keep_checkpoints:
        return
    if recording.carried is not None:
        checkpoint = checkpoint.standing_for(recording.carried)
    kept, note = store.checkpoints(), ""
    try:
        if not kept.keep(checkpoint, tracin.keep_checkpoints, tracin.keep_bytes):
            note = (
                f"no checkpoints were kept for scores of pairs: one takes {readable(checkpoint.bytes)}, more than "
                f"keep_bytes={tracin.keep_bytes:,}"
            )
        recording.carried = None
    except StoreError as error:
        note = f"the checkpoint of step {checkpoint.step} was not kept: {error}"
        recording.carried = None if checkpoint.step in kept.steps() else checkpoint.outline()
    if note and note not in recording.notes:
        recording.notes.append(note)
    with suppress(StoreError):  # what is damaged says so when it is asked for
        recording.kept = [each.outline() for each in kept.outlines]


def keep_curves(store: AuditStore | None, recording: Recording) -> None:
    """Write the curves of the epochs so far, of which a checkpoint holds the numbers alone."""
    if store is not None:
        try:
            store.curves.write(lasting := recording.curves.lasting(), lasting.__getitem__)
        except StoreError as error:
            recording.note(f"curves were not kept while training went on: {error}")


def take_over_curves(recording: Recording) -> None:
    """Read the curves that a resumed run has kept in the directory it had before."""
    wanted, before = recording.curves.missing, recording.directory
    lost = recording.curves.restore(AuditStore(Path(before)).curves.read() if before and wanted else {})
    if lost:
        where = before or "memory, which nobody has any more"
        recording.note(f"curves lack the epochs {listed(lost)} before training was resumed: they were kept in {where}")


def take_over_checkpoints(store: AuditStore | None, tracin: TracIn, recording: Recording, step: int) -> None:
    """Copy the checkpoints that a resumed run has kept in the directory it had before.

    Since then that run may have dropped some for later ones, which are none of this run: the next of those that are
    left stands for their steps.
    """
    before, recording.directory = recording.directory, "" if store is None else str(store.directory)
    if store is None or before in ("", recording.directory) or not tracin.keep_checkpoints:
        return
    old, lost = AuditStore(Path(before)).checkpoints(), recording.carried
    stored, carried = set(old.steps()), None
    kept = [each for each in recording.kept if each.step <= step]
    if kept and not stored:
        recording.notes.append(f"the checkpoints that the run had kept before are missing in {before}")
    for each in (*kept, *([] if lost is None else [lost])):
        about = each if carried is None else each.standing_for(carried)
        carried = about
        if each is lost or about.step not in stored:
            continue
        try:
            whole = replace(old.read(about.step), step_sizes=about.step_sizes, steps=about.steps)
            store.checkpoints().keep(whole, tracin.keep_checkpoints, tracin.keep_bytes)
            carried = None
        except StoreError as error:
            recording.notes.append(f"the checkpoint of step {about.step} was not taken over: {error}")
    recording.carried = carried
