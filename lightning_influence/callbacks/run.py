"""One training run under audit: what happens at its batches, its steps, the ends of its epochs and its end."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lightning_influence.audit.report import AuditReport
from lightning_influence.callbacks import bridge
from lightning_influence.callbacks.arguments import Arguments
from lightning_influence.callbacks.budget import RunBudget
from lightning_influence.callbacks.chosen_weights import chosen
from lightning_influence.callbacks.index_report import IndexReport
from lightning_influence.callbacks.keeping import keep_curves, take_checkpoint, take_over_checkpoints, take_over_curves
from lightning_influence.callbacks.lightning import LightningModule, Trainer, rank_zero_warn
from lightning_influence.callbacks.listening import BatchListener
from lightning_influence.callbacks.loaders import LoaderName, train_loader
from lightning_influence.callbacks.query_report import QueryReport
from lightning_influence.callbacks.reporting import Reporter
from lightning_influence.callbacks.sharded import refuse_later
from lightning_influence.callbacks.tracin_flight import FlightRecorder
from lightning_influence.callbacks.training_passes import TrainingPasses
from lightning_influence.core import distributed
from lightning_influence.core.meeting import together
from lightning_influence.core.sharding import is_split, whole
from lightning_influence.data.source import ExampleSource, same_data
from lightning_influence.data.stream import StreamSource
from lightning_influence.gradients.coverage import Coverage, listed
from lightning_influence.gradients.verify import Inspection
from lightning_influence.gradients.visitors import ExampleScores
from lightning_influence.influence import Influence
from lightning_influence.scores.examples import score_examples
from lightning_influence.scores.plan import influence_scores
from lightning_influence.training.checkpoints import Checkpoint
from lightning_influence.training.evidence import LabelEvidence
from lightning_influence.training.features import look_at_labels
from lightning_influence.training.optimizers import preconditioners
from lightning_influence.training.recording import Recording
from lightning_influence.training.settings import TracIn
from lightning_influence.training.step_sizes import StepSize, block_step_sizes
from lightning_influence.training.table import nearest_columns

Finished = tuple[AuditReport | None, Callable[[], None]]
"""The audit, None on other ranks than zero, and what writes it to files and loggers."""


@dataclass(eq=False)
class AuditRun:
    """What an audit does between the first and the last step of one ``fit``.

    The trainer is handed in each time: callbacks are copied, and a copy must not take the trainer along.

    Attributes:
        recording: What training has said about each example so far.
        passes: Extra passes over the training data.
        inspection: What one batch showed before the first step.
        reporter: Where the audit goes.
        arguments: Those of the callback.
        flight: TracIn in flight, if that is how.
        queries: What the audit is asked about.
        make_influence: Returns what the finished audit can still do, once it is: nothing is held but references.
        finished: Whether it is, and its report computed.
        failure: Why there is no report of a run that has ended.
        digests: What a few examples hold, if the data may be loaded again.
        listener: Hears the batches.
    """

    recording: Recording
    passes: TrainingPasses
    inspection: Inspection
    reporter: Reporter
    arguments: Arguments
    flight: FlightRecorder | None = None
    queries: QueryReport | None = None
    make_influence: Callable[[], Influence] | None = None
    finished: bool = False
    failure: str = ""
    digests: Sequence[bytes | None] = ()

    def __post_init__(self) -> None:
        self.listener = BatchListener(self.recording, self.passes, self.flight)
        self.budget = RunBudget(self.listener, self.passes, self.inspection, self.arguments, self.reporter)

    def take_over(self, trainer: Trainer) -> None:
        """Take over the checkpoints and curves that a run which is resumed has kept."""
        self.recording.curves.begin(trainer.current_epoch)
        if trainer.is_global_zero:
            take_over_curves(self.recording)
        if self.arguments.tracin is not None:
            take_over_checkpoints(self.reporter.store, self.arguments.tracin, self.recording, trainer.global_step)
        self.recording.directory = str(self.reporter.directory or "")

    def catch_up(self, trainer: Trainer, module: LightningModule) -> None:
        """Make the last pass that a run which is resumed for more steps has postponed."""
        if self.recording.postponed != trainer.global_step:
            return
        with bridge.at_epoch(trainer, trainer.current_epoch - 1), _tolerated(self.recording, trainer):
            tracin = self.arguments.tracin
            if tracin and not self.flight and self.budget.due(trainer) and self.recording.step_sizes.steps:
                self.score_checkpoint(trainer, module, tracin)
            else:
                self.look(trainer, module)

    def take_data(self, source: ExampleSource, epoch: int) -> None:
        """Go on with the examples of a loader that was loaded again, and say so if they are others."""
        passes = self.passes
        self.recording.curves.begin(epoch)
        if source is passes.source:
            return
        if distributed.any_process(not same_data(passes.source, self.digests or passes.source.digests(), source)):
            passes.take(source)
            self.digests = source.digests()
            self.reporter.names = self.reporter.names.of(source.dataset)
            self.recording.start_again(len(source), epoch)

    def look(self, trainer: Trainer, module: LightningModule) -> None:
        """Look at the features of all examples, forward only, as long as their labels are not learnt by heart."""
        evidence = self.recording.labels.evidence
        with _tolerated(self.recording, trainer):
            indices = _audited(self, trainer, last=False)  # of a limited run, none before its first batch
            able = indices and not bridge.is_dry_run(trainer) and self.passes.any_time
            if not able or distributed.from_first(lambda: evidence.complete):
                return
            start = time.perf_counter()
            with bridge.aside(trainer):
                seen = look_at_labels(self.passes.gradients(trainer, module), indices)
                if seen is not None:  # else it has ended with the first examples
                    self.budget.went_over(time.perf_counter() - start, len(indices))
            evidence.close() if seen is None else self.recording.add_snapshot(seen)
            self.budget.looked(time.perf_counter() - start)

    # --------------------------------------------------------------- an epoch

    def epoch_ended(self, trainer: Trainer, module: LightningModule) -> None:
        """Add a TracIn checkpoint, if one is due; training goes on if that fails."""
        self.listener.stop()  # a batch that `on_train_batch_start` skipped has no end
        if bridge.is_dry_run(trainer):
            return
        with _tolerated(self.recording, trainer):
            self._end_epoch(trainer, module)

    def _end_epoch(self, trainer: Trainer, module: LightningModule) -> None:
        recording, tracin = self.recording, self.arguments.tracin
        recording.synchronise()
        recording.curves.end(trainer.current_epoch)
        keep_curves(self.reporter.store, recording)
        self.budget.decide(trainer, module)
        due = self.budget.due(trainer)
        last = bridge.is_last_epoch(trainer) and self.arguments.weights == "last"
        # The final pass looks by the way; a run that is resumed for more epochs has to catch up.
        recording.postponed = trainer.global_step if last else -1
        if not (due and self.flight is None) and not last and self.budget.look_due(trainer):
            self.look(trainer, module)  # other passes look by the way
        if tracin is not None and due and recording.step_sizes.steps:
            if self.flight is not None:
                take_checkpoint(self.reporter.store, trainer, module, recording, tracin)
            elif not last and self.passes.any_time:
                self.score_checkpoint(trainer, module, tracin)
        if recording.visits is not None:
            visits = recording.visits.values()
            self.reporter.log_tracin(trainer, visits[visits.isfinite()])  # NaN: not measured so far
        if trainer.is_global_zero:
            self.reporter.log_dynamics(trainer, recording.dynamics.columns())
        self.reporter.write_partial(trainer, recording, "recording", ended_epochs=trainer.current_epoch + 1)

    def score_checkpoint(self, trainer: Trainer, module: LightningModule, tracin: TracIn) -> None:
        """Add what every example says at the weights of the moment, for the steps since the checkpoint before."""
        indices = _audited(self, trainer, last=False)
        start = time.perf_counter()
        with bridge.aside(trainer):
            # Weighed as training weighs: by what it has drawn, not by what it could draw.
            drawn = self.recording.seen_indices() or indices
            gradients = self.passes.scaled(trainer, module, drawn, self.recording.losses.terms)
            checkpoint = take_checkpoint(self.reporter.store, trainer, module, self.recording, tracin).outline()
            scores = score_examples(
                gradients,
                indices,
                step_sizes=_step_sizes(checkpoint, gradients.coverage, trainer, module),
                features=True,
                title=f"TracIn, step {trainer.global_step}",
            )
        self.recording.add_pass(trainer.global_step, scores)
        self.budget.passed(time.perf_counter() - start, len(indices))
        self.reporter.log_tracin(trainer, scores.columns["tracin"])

    # ---------------------------------------------------------------- the end

    def finish_or_warn(self, trainer: Trainer, module: LightningModule) -> Finished | None:
        """Fit the curvature and score every example; None if there is nothing to audit, or if that fails."""
        try:
            with together():
                return self.finish(trainer, module)
        except Exception as error:
            # The training that has just ended is worth more than the audit.
            self.failure = f"the audit failed ({error!r}); what was recorded is kept in {self.reporter.directory}"
            self.interrupt(trainer, repr(error))
            rank_zero_warn(
                f"the influence audit failed; training is not affected, and what was recorded until then is kept in "
                f"{self.reporter.directory}.\n{traceback.format_exc()}"
            )
            return None

    def finish(self, trainer: Trainer, module: LightningModule) -> Finished | None:
        """Fit the curvature and score every example, at the weights that are asked for; None if there is nothing."""
        self.reporter.write_partial(trainer, self.recording, "recording")
        with bridge.at_epoch(trainer, trainer.current_epoch - 1), whole(module):
            alone = self.arguments.weights != "last" and (self.passes.any_time or self.flight is not None)
            tracin = self.arguments.tracin if alone else None
            if tracin is not None and self.recording.step_sizes.steps and not bridge.is_dry_run(trainer):
                self.recording.synchronise()  # it is no part of the final pass, which is about other weights
                if self.flight is None:
                    self.score_checkpoint(trainer, module, tracin)
                else:
                    take_checkpoint(self.reporter.store, trainer, module, self.recording, tracin)
            with chosen(trainer, module, self.arguments.weights) as about:
                self.reporter.weights = about | self.reporter.weights
                return self._finish(trainer, module)

    def _finish(self, trainer: Trainer, module: LightningModule) -> Finished | None:
        self.recording.synchronise()
        audited = _audited(self, trainer, last=True)
        if bridge.is_dry_run(trainer):
            audited = (audited or list(range(len(self.passes.source))))[: self.passes.source.batch_size]
        indices = _unmissed(self.passes.source, audited)
        if not indices:
            self.failure = "no training batch was seen"
            rank_zero_warn(f"no influence audit: {self.failure}.")
            return None
        recording, reporter, inspection = self.recording, self.reporter, self.inspection
        start = time.perf_counter()
        gradients = self.passes.scaled(trainer, module, indices, recording.losses.terms)
        indices = _unmissed(self.passes.source, indices)
        scaling = time.perf_counter() - start
        history = recording.step_sizes.history(preconditioners(trainer.optimizers, module))
        plan = Influence.of(gradients, inspection, indices, history=history).plan(**self.arguments.fitting)
        bridge.set_up_validation(trainer)
        validation = bridge.validation_queries(trainer, gradients)
        asked = sum(len(examples) for _, examples in validation)
        reporter.tell(lambda: self.budget.announced(plan, gradients.coverage, len(indices), asked))
        sizes = self._last_step_sizes(trainer, module, gradients.coverage)
        with bridge.aside(trainer):
            index = IndexReport(self.arguments.index, gradients, indices, reporter.directory)
            guests = index.beside(self.queries and self.queries.begin(trainer, gradients, indices, validation))
            result = influence_scores(gradients, indices, plan, queries=validation, step_sizes=sizes, companions=guests)
            index.finish(result)
        result.seconds["loss scale"] = scaling
        recording.add_pass(trainer.global_step, result.scores)
        result.notes += [*(self.flight.notes() if self.flight else ()), *self.budget.notes(trainer)]
        scored = result.scores.indices.cpu()
        result.notes.extend(_data_notes(trainer, self.passes, self.arguments.loader, audited, scored))
        columns, evidence = _columns(recording, result.scores)
        result = replace(result, scores=replace(result.scores, features=None))  # what takes memory
        later = bridge.after_training(trainer, gradients)
        of, labels = columns["index"], columns.get("label", np.zeros(0, np.int64))
        self.make_influence = lambda: Influence.of(
            later, inspection, of.tolist(), history=history, labels=_known(of, labels)
        )
        self.make_influence = refuse_later if is_split(module) else self.make_influence
        if self.queries is not None:
            with bridge.aside(trainer):
                columns |= self.queries.find(columns, result.seconds, self.reporter.names)
        self.finished = True
        if not trainer.is_global_zero:
            return None, lambda: None
        report = reporter.report(trainer.global_step, gradients, plan, inspection, result, columns, evidence, recording)
        return report, (lambda: reporter.publish(trainer, report, result.curvature))

    def _last_step_sizes(
        self, trainer: Trainer, module: LightningModule, coverage: Coverage
    ) -> Mapping[str, StepSize] | None:
        """Keep the last checkpoint; return its step sizes if the final pass is to add to TracIn."""
        if self.arguments.tracin is None or not self.recording.step_sizes.steps:
            return None
        checkpoint = take_checkpoint(self.reporter.store, trainer, module, self.recording, self.arguments.tracin)
        return _step_sizes(checkpoint, coverage, trainer, module) if self.flight is None else None

    def interrupt(self, trainer: Trainer, error: str) -> None:
        """Keep what was recorded so far."""
        if trainer.is_global_zero:
            # Local numbers only: other processes may be gone, and a collective would wait for them for ever.
            self.reporter.write_partial(trainer, self.recording, "interrupted", error=error)


def _unmissed(source: ExampleSource, indices: list[int]) -> list[int]:
    return [k for k in indices if distributed.world_size() > 1 or k not in source.missing]


def _audited(run: AuditRun, trainer: Trainer, *, last: bool) -> list[int]:
    seen = run.recording.seen_indices()
    return bridge.audited_indices(trainer, run.arguments.loader, seen, run.passes.source, last=last)


def _columns(recording: Recording, scores: ExampleScores) -> tuple[dict[str, NDArray[Any]], LabelEvidence | None]:
    """Return the table and the evidence on the labels; on other ranks than zero, which lack some, the scores alone."""
    indices = scores.indices.cpu()
    if distributed.rank():
        return {"index": indices.numpy()} | {name: each.cpu().numpy() for name, each in scores.columns.items()}, None
    near, evidence = nearest_columns(scores), recording.label_evidence(indices)
    return recording.columns(indices, scores, evidence) | near, evidence


@contextmanager
def _tolerated(recording: Recording, trainer: Trainer) -> Iterator[None]:
    try:
        with together():
            yield
    except Exception:
        recording.gaps.failed_passes.append(trainer.current_epoch)
        rank_zero_warn(
            f"the influence audit's pass at the end of epoch {trainer.current_epoch} failed; training goes on.\n"
            f"{traceback.format_exc()}"
        )


def _data_notes(
    trainer: Trainer, passes: TrainingPasses, loader: LoaderName, audited: list[int], scored: Tensor
) -> list[str]:
    """Return what a reader should know of the data: how batches are made, and who is not in the report."""
    source = passes.source
    notes = [source.collation.note] if source.collation.note else []
    if source.company is not None and source.company.others:
        others, trace = ", ".join(map(repr, source.company.others)), passes.trace
        part = f"their part of the loss; the curvature is that of all of it, with examples of {others}"
        left_out = trace.left_out and trace.own is not None
        if trace.own is None or not (left_out or any(trace.own.get(key) != "all" for key in trace.forms)):
            part = f"a loss that does not depend on those of {others}"
        notes.append(f"this is about the examples of the loader {source.company.loader!r}, and {part}")
        if left_out:
            notes.append(
                "their losses lack what is no known loss call (a penalty on the weights, or a part written by hand): "
                "it was not about these examples in the first batch. Where it has come to be, pass `task=`"
            )
    notes += [*source.room.notes(), *(source.notes() if isinstance(source, StreamSource) else ())]
    if missing := np.setdiff1d(audited, scored).tolist():
        reasons = "; ".join(dict.fromkeys(source.missing[k] for k in missing if k in source.missing))
        named = source.book[missing].tolist() if isinstance(source, StreamSource) else missing
        notes.append(f"{len(missing)} of {len(audited)} examples are not scored: {listed(named, 10)} ({reasons})")
    if lacking := ", ".join(sorted(map(str, passes.lacking))):
        notes.append(f"training has had terms of the loss that the passes, in eval mode, have not: {lacking}")
    if bridge.is_dry_run(trainer):
        notes.append(f"`fast_dev_run`: {len(audited)} examples alone were looked at, and nothing is written")
    elif not isinstance(source, StreamSource):
        never = len(bridge.drawn_from(train_loader(trainer, loader), len(source))) - len(audited)
        notes += [f"{never} examples of the data set were never drawn, and are not audited"] if never else []
    return notes


def _known(indices: NDArray[np.int64], labels: NDArray[np.int64]) -> dict[int, int]:
    return {k: label for k, label in zip(indices.tolist(), labels.tolist(), strict=False) if label >= 0}


def _step_sizes(
    checkpoint: Checkpoint, coverage: Coverage, trainer: Trainer, module: LightningModule
) -> Mapping[str, StepSize]:
    """Return the step sizes that a checkpoint of the moment stands for, by layer."""
    scales = preconditioners(trainer.optimizers, module)
    # What processes hold parts of they put together at the same time, and their batches are not at the same time.
    return block_step_sizes(
        coverage.blocks, checkpoint.step_sizes, module, dict(scales) if is_split(module) else scales
    )
