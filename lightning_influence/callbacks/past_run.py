"""A training run that is over: its checkpoints, and the audit that they allow."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lightning_influence.audit.store.store import AuditStore, StoreError
from lightning_influence.callbacks import bridge, no_training, preparing
from lightning_influence.callbacks.arguments import Arguments
from lightning_influence.callbacks.beginning import begun
from lightning_influence.callbacks.checkpoint_files import (
    StrPath,
    TrainerCheckpoint,
    folder_of_run,
    found,
)
from lightning_influence.callbacks.lightning import (
    LightningModule,
    MisconfigurationException,
    Trainer,
    rank_zero_warn,
)
from lightning_influence.callbacks.loaders import train_loader
from lightning_influence.callbacks.resuming import Restored, restore, state_for
from lightning_influence.callbacks.run import AuditRun
from lightning_influence.core import distributed
from lightning_influence.core.meeting import together
from lightning_influence.data.source import ExampleSource
from lightning_influence.data.stream import StreamSource
from lightning_influence.training.features import look_at_labels
from lightning_influence.training.gaps import Gaps
from lightning_influence.training.optimizers import preconditioners
from lightning_influence.training.recording import Recording
from lightning_influence.training.settings import TracIn

if TYPE_CHECKING:
    from lightning_influence.audit.report import AuditReport

# Later features carry the labels that they were told.
_EARLY_EPOCHS = 3
# Share of examples with another label than training had, beyond which these are other data, and how many are asked.
_OTHERS, _ASKED = 0.2, 512
_WITHOUT = "labels are told from what the first epochs have learnt"
_WITH = "pass checkpoints of the first epochs as `ckpt_paths=`, or train with the callback"


@dataclass(frozen=True, eq=False)
class RunFiles:
    """Checkpoints of a run.

    Attributes:
        audited: The one whose weights are audited; None for those that the model has.
        along: Paths and steps of those that the run is followed along, in order.
    """

    audited: TrainerCheckpoint | None
    along: Sequence[tuple[int, str]] = ()

    @classmethod
    def of(
        cls, module: LightningModule, trainer: Trainer | None, path: StrPath | None, paths: Sequence[StrPath]
    ) -> RunFiles:
        """Find and read them.

        Raises:
            CheckpointFileError: If one of them can't be found or read.
            ValueError: If those of a run do not tell their steps.
        """
        if isinstance(paths, (str, os.PathLike)):
            raise ValueError(f"ckpt_paths={paths!r}; expected a list of paths.")
        one = found(path, trainer)
        audited = None if one is None else TrainerCheckpoint.read(one, module)
        # Of two of one step, the one that is audited.
        steps = {} if audited is None or not paths else {audited.step: audited.path}
        for each in (found(each, trainer) for each in paths):
            file = TrainerCheckpoint.read(str(each), module)
            if not {"global_step", "epoch"} <= file.content.keys():
                raise ValueError(
                    f"ckpt_paths: {each} does not tell which step of training it is of; expected checkpoints that a "
                    "Trainer has saved."
                )
            steps.setdefault(file.step, file.path)
        along = sorted(steps.items())
        if audited is None and along:
            audited = TrainerCheckpoint.read(along[-1][1], module)
        return cls(audited, along)

    @property
    def told(self) -> dict[str, Any]:
        """Which weights are audited, for the manifest."""
        if (file := self.audited) is None:
            return {"which": "given", "told": "those that the model had when it was handed in"}
        which = "averaged" if file.averaged else "checkpoint"
        told = f"those of {file.name}{', averaged' if file.averaged else ''}"
        told += f", step {file.step:,}" if file.step else ""
        return {"which": which, "step": file.step, "file": file.path, "told": told}


class PastRun:
    """One audit of a model that was trained before, within a fit that trains nothing.

    Args:
        arguments: Those of the callback.
        key: Its state key in checkpoints.
        files: The checkpoints.
        module: The model.
        trainer: The trainer.
        lent: Whether it is the user's.

    Attributes:
        run: The run, once it has begun.
        recording: What is known of it.
        report: The audit, once it is complete; None on other ranks than zero.
    """

    def __init__(
        self, arguments: Arguments, key: str, files: RunFiles, module: LightningModule, trainer: Trainer, lent: bool
    ) -> None:
        self.files, self.module, self.trainer = files, module, trainer
        where = None if files.audited is None else folder_of_run(files.audited.path)
        if arguments.dirpath is None and where is not None and not (lent and trainer.loggers):
            arguments = replace(arguments, dirpath=os.path.join(where, "influence"))
        # A checkpoint's weights are those that are asked for.
        self.arguments = replace(arguments, weights="last")
        self.before = trainer.current_epoch, trainer.global_step
        self.run: AuditRun | None = None
        self.recording: Recording | None = None
        self.report: AuditReport | None = None
        self._notes: list[str] = []
        self._key = key

    @together()
    def audit(self) -> None:
        """Do it; to be called once the trainer has set up everything."""
        trainer: Any = self.trainer
        module, file = self.module, self.files.audited
        if file is not None:
            file.load_into(module)
        with preparing.errors_as_misconfiguration():
            bridge.check_strategy(trainer)
            preparing.check_optimization(module, self.arguments.task, None)
            preparing.check_queries(trainer, module, self.arguments.queries)
            if file is not None:
                state = file.content.get(type(trainer.datamodule).__qualname__)
                if state is not None and trainer.datamodule is not None:
                    trainer.datamodule.load_state_dict(state)
            no_training.go_to(trainer, *(self.before if file is None else (file.epochs, file.step)))
            no_training.set_up_data(trainer)
            source, restored = self._data()
            arguments = self._arguments(restored)
            size = len(source) if restored is None else restored.state["size"]  # streams are given room
            recording = self.recording = Recording(size, module, arguments.tracin)
            recording.stream = source if isinstance(source, StreamSource) else None
            if restored is not None:
                restore(recording, restored, trainer)
                self._notes += no_training.taken_as_plain(recording.step_sizes, self._go_to(file))
            # What training was limited to is in its records, or not known.
            limit = file.batches if file is not None and recording.seen_indices() else math.inf
            trainer.fit_loop.max_batches, trainer.overfit_batches = limit, 0.0
            no_training.call_hooks(trainer, module)
            run = self.run = begun(arguments, trainer, module, source, recording)
            _tell_directory(run, trainer)
            run.take_over(trainer)
            run.reporter.weights = self.files.told
            if restored is not None and self._of_other_data(run):
                restored = None
            if restored is None:
                self._follow(run)
        for note in self._notes:
            recording.note(note)
        finished = run.finish(trainer, module)
        if finished is None:
            raise MisconfigurationException(f"InfluenceAudit: there is nothing to audit: {run.failure}.")
        self.report, publish = finished
        if self.report is not None:
            directory = "" if restored is None else str(restored.state.get("directory", ""))
            _compare(self.report, self.files.audited, directory)
        publish()

    def _go_to(self, file: TrainerCheckpoint | None) -> str:
        """Let trainer and optimizers stand where training has stood; return why optimizers can't, if so."""
        if file is None:
            no_training.go_to(self.trainer, *self.before)
            return "there is no checkpoint"
        no_training.go_to(self.trainer, file.epochs, file.step)
        return no_training.restore_optimizers(self.trainer, file)

    def _data(self) -> tuple[ExampleSource, Restored | None]:
        """Return the training data, and what the checkpoint holds of an audit's records, if they are of these data."""
        trainer: Any = self.trainer
        name, sample_id = self.arguments.loader, self.arguments.sample_id
        loader = train_loader(trainer, name)
        source = ExampleSource.from_loader(loader) if sample_id is None else StreamSource(loader, sample_id)
        bridge.in_company(trainer, name, source)
        preparing.check_indices("known_noise", self.arguments.known_noise, source)
        preparing.check_indices("trusted", self.arguments.trusted, source)
        restored = self._restored()
        stream = isinstance(source, StreamSource)
        if restored is not None and restored.of_stream != stream:
            filed = "the ids of a stream" if restored.of_stream else "index"
            self._warn(
                f"what training said of each example is left out: it is filed by {filed}, and these data are not"
            )
            restored = None
        if not isinstance(source, StreamSource):
            if restored is not None and (size := restored.state["size"]) != len(source):
                self._others(f"it had {size:,} examples, these are {len(source):,}")
                restored = None
            return source, restored
        if restored is not None:
            source.load_state_dict(restored.state["stream"])
            known = len(source)
            if source.at_hand and (new := len(source) - known):
                self._others(f"it had {known:,} examples, and {new} of the first batch are none of these")
                source, restored = StreamSource(loader, sample_id), None
                bridge.in_company(trainer, name, source)
        if restored is None:
            source.counted(trainer.num_training_batches)
        source.whole = True
        return source, restored

    def _others(self, told: str) -> None:
        self._warn(f"the training data are not those of the training: {told}; what it said of each is left out")

    def _restored(self) -> Restored | None:
        """Return what the checkpoint holds of an audit's records."""
        callbacks = {} if self.files.audited is None else self.files.audited.content.get("callbacks") or {}
        own = callbacks.get(self._key)
        found = Restored(own) if own else state_for(self._key, self.arguments.described(), callbacks)
        if found is not None and "parts" not in found.state:
            self._warn("what an earlier version of lightning-influence has recorded of the training is left out")
            return None
        return found

    def _arguments(self, restored: Restored | None) -> Arguments:
        tracin = self.arguments.tracin
        if restored is None and tracin is not None:
            # There are passes at the checkpoints, or nothing at all.
            keep = {name: getattr(tracin, name) for name in ("keep_checkpoints", "keep_bytes")}
            tracin = TracIn(**keep) if self.files.along else None
        return replace(self.arguments, tracin=tracin)

    def _of_other_data(self, run: AuditRun) -> bool:
        """Tell whether the examples have other labels than in training; then what it said of them is forgotten."""
        asked = run.recording.seen_indices()
        asked = asked[:: max(1, len(asked) // _ASKED)]
        with bridge.aside(self.trainer):
            seen = look_at_labels(run.passes.gradients(self.trainer, self.module), asked, title="labels")
        if seen is None or "label" not in seen.columns:
            return False
        other = set(run.recording.dynamics.relabelled(seen.indices.cpu(), seen.columns["label"].cpu()))
        missing = run.passes.source.missing
        if len(other - missing.keys()) <= _OTHERS * len(asked):
            return False
        self._others(f"{len(other - missing.keys())} of {len(asked)} examples had another label there")
        recording = run.recording
        recording.start_again(recording.size, self.trainer.current_epoch)
        recording.visits, recording.wants_tracin, recording.gaps = None, False, Gaps()
        run.flight, run.arguments = None, replace(run.arguments, tracin=None)
        return True

    def _follow(self, run: AuditRun) -> None:
        """Look at the examples along the checkpoints, as far as there are some."""
        recording, files = run.recording, self.files
        recording.labels.unknown = f"{_WITHOUT}; {_WITH}"
        left_out = bool(self._notes)
        why = "" if files.audited is None or left_out else f", and {files.audited.name} holds no record of one"
        self._notes.append(f"no training dynamics: the audit was made after training{why}")
        steps = epochs = 0
        for step, path in files.along:
            of_audited = files.audited is not None and path == files.audited.path
            file = files.audited if of_audited else TrainerCheckpoint.read(path, self.module)
            assert file is not None
            last = of_audited and step == files.along[-1][0] and not file.averaged
            with nullcontext() if last else file.loaded(self.module, trained=True):
                self._stand_for(recording, file, file.step - steps, file.epochs - epochs)
                recording.labels.heard_of = step > 0
                self._look(run, file, epochs, last=last)
            steps, epochs = file.step, file.epochs
        if files.audited is None:
            self._go_to(None)
        elif files.along:
            self._go_to(files.audited)
        else:  # what a damping asks for that follows the learning rates
            self._stand_for(recording, files.audited, files.audited.step, files.audited.epochs)
            taken = recording.step_sizes.take(preconditioners(self.trainer.optimizers, self.module))
            if taken and _follows_rates(self.arguments):
                self._notes.append(
                    f"the damping follows learning rates of which {files.audited.name} tells the last ones alone"
                )

    def _stand_for(self, recording: Recording, file: TrainerCheckpoint, steps: int, epochs: int) -> None:
        """Go to a checkpoint, and note the learning rates of the steps on the way there.

        Epoch-wise schedules have moved on when a checkpoint is saved at the end of an epoch: the rates before it are
        those of the checkpoint before. On a longer way, or with rates that change at every step, both count by half.
        """
        later = steps // 2 if epochs > 1 or file.scheduled_by_step else 0
        self._record(recording, steps - later)
        reason = self._go_to(file)
        self._record(recording, later)
        if not recording.wants_tracin or not steps:
            return
        if bridge.trained(self.trainer, self.module) is None:
            self._notes.append(f"no tracin: learning rates are not known, {reason or 'there is no optimizer'}")
        elif reason:
            self._notes.append(f"tracin has the learning rates that configure_optimizers starts with: {reason}")

    def _record(self, recording: Recording, steps: int) -> None:
        optimizers = self.trainer.optimizers
        if bridge.trained(self.trainer, self.module) is not None and steps:
            for optimizer in optimizers:
                recording.record_step(optimizer, steps // len(optimizers))

    def _look(self, run: AuditRun, file: TrainerCheckpoint, before: int, *, last: bool) -> None:
        """Add what the weights of a checkpoint say; of the last one, the final pass adds it.

        Args:
            run: The run.
            file: The checkpoint.
            before: Epochs by the checkpoint before.
            last: Whether it is the last one.
        """
        evidence, recording = run.recording.labels.evidence, run.recording
        if file.epochs > _EARLY_EPOCHS and file.epochs > before + 1:
            if not before:
                recording.labels.unknown = (
                    f"{_WITHOUT}, and the earliest checkpoint, {file.name}, was taken after {file.epochs} epochs; "
                    f"{_WITH}"
                )
                evidence.close()
            evidence.end_early()
        if last:
            return
        if run.arguments.tracin is not None and recording.step_sizes.steps:
            run.score_checkpoint(self.trainer, self.module, run.arguments.tracin)
        elif not distributed.from_first(lambda: evidence.closed):
            with bridge.aside(self.trainer):
                indices = bridge.drawn_from(train_loader(self.trainer, self.arguments.loader), recording.size)
                seen = look_at_labels(run.passes.gradients(self.trainer, self.module), indices)
            if seen is not None:
                recording.add_snapshot(seen)

    def _warn(self, told: str) -> None:
        rank_zero_warn(f"InfluenceAudit: {told}.")
        self._notes.append(told)


def _follows_rates(arguments: Arguments) -> bool:
    rule, curvature = arguments.damping, arguments.curvature
    return rule == "trainer" or (rule == "auto" and curvature in ("block_ggn", "ggn", "hessian"))


def _tell_directory(run: AuditRun, trainer: Trainer) -> None:
    """Say where the audit goes if nothing that was passed names a folder."""
    directory = run.reporter.directory
    if run.arguments.dirpath is None and directory is not None and not bridge.real_loggers(trainer):
        rank_zero_warn(
            f"no logger, and no checkpoint of a run: the influence audit goes to {directory}; "
            "`InfluenceAudit(dirpath=...)` names another directory"
        )


def _compare(report: AuditReport, audited: TrainerCheckpoint | None, directory: str) -> None:
    """Warn if an audit that the same run has left is about other data."""
    places = [directory] if directory else []
    if audited is not None and (run := folder_of_run(audited.path)):
        places.append(os.path.join(run, "influence"))
    for place in places:
        try:
            then: Mapping[str, Any] = AuditStore.open(place).manifest
        except StoreError:
            continue
        now = report.manifest
        if then.get("status") != "complete" or place == str(report.directory):
            continue
        told = _unlike(then, now)
        if told:
            rank_zero_warn(f"InfluenceAudit: the data are not those of the audit in {place}: {told}.")
            report.manifest["notes"].append(f"the data are not those of the audit in {place}: {told}")
        return


def _unlike(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return how the data of an audit differ from those of another, by their manifests; empty if they do not."""
    if then.get("dataset_size") != now.get("dataset_size"):
        return f"{then.get('dataset_size')} examples then, {now.get('dataset_size')} now"
    if then.get("examples") != now.get("examples"):  # others of the same data may have been audited
        return ""
    prints = [each.get("fingerprint", {}).get("data") for each in (then, now)]
    if prints[0] != prints[1]:
        return f"other labels or another class, {prints[0]} then, {prints[1]} now"
    held = zip(then.get("examples_hold") or (), now.get("examples_hold") or (), strict=False)
    return "examples hold something else" if any(a and b and a != b for a, b in held) else ""
