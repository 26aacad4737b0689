"""Where an audit goes: directory, TensorBoard, other loggers, and the lines a user reads."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from numpy.typing import NDArray
from torch import Tensor

from lightning_influence.audit import report as audit
from lightning_influence.audit.report import AuditReport
from lightning_influence.audit.store.store import AuditStore, StoreError
from lightning_influence.callbacks import bridge
from lightning_influence.callbacks.display import TolerantWriter, tolerated
from lightning_influence.callbacks.manifest import audit_described, detection_of, notes_of
from lightning_influence.callbacks.query_report import QueryReport
from lightning_influence.curvature import Curvature, fitted_bytes
from lightning_influence.gradients.passes import ExampleGradients
from lightning_influence.gradients.verify import Inspection
from lightning_influence.scores.plan import InfluencePlan, InfluenceScores
from lightning_influence.tensorboard import summary
from lightning_influence.training.checkpoints import Checkpoint
from lightning_influence.training.recording import Recording
from lightning_influence.training.settings import TracIn

Columns = dict[str, NDArray[Any]]

# Partial tables may take this share of the time at most.
_PARTIAL_SHARE = 0.05


class Reporter:
    """Writes what an audit finds; on other ranks than zero, and in a dry run, to nowhere.

    Args:
        store: The audit directory, None to write nothing.
        arguments: The callback's arguments, for the manifest.
        known_noise: Dataset indices of labels known to be wrong.
        queries: What the audit is asked about.

    Attributes:
        seconds_per_example: Of a pass over the training data, once one was timed.
    """

    def __init__(
        self,
        store: AuditStore | None,
        arguments: dict[str, Any],
        known_noise: NDArray[Any] | None = None,
        queries: QueryReport | None = None,
    ) -> None:
        self.store = store
        self.known_noise = known_noise
        self.queries = queries
        self.seconds_per_example: float | None = None
        self._said: set[str] = set()  # what has been said to have failed
        self._partial = 0.0, 0.0  # when the last partial table was written, and how long it took
        self._manifest: dict[str, Any] = {
            "status": "recording",
            "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "arguments": arguments,
            "versions": {
                "python": platform.python_version(),
                **{name: version(name) for name in ("lightning-influence", "lightning", "torch")},
            },
        }

    @property
    def directory(self) -> Path | None:
        """Where the audit lies."""
        return None if self.store is None else self.store.directory

    def tell(self, line: Callable[[], str]) -> None:
        """Print a line for who watches."""
        with tolerated("printing", self._said):
            rank_zero_info(line())

    def announce(
        self, plan: InfluencePlan, gradients: ExampleGradients, inspection: Inspection, examples: int, queries: int
    ) -> str:
        """Return the line before a long wait: what will be done, and about how long and how much memory it takes."""
        draws = inspection.exact_draws or 1
        work = plan.gradient_passes(gradients.coverage, examples, queries, draws)
        rate = self.seconds_per_example or inspection.seconds / inspection.examples
        seconds = work * rate + plan.decomposition_seconds(gradients.coverage)
        memory = fitted_bytes(plan.curvature, gradients.coverage.blocks) + inspection.batch_bytes
        return (
            f"influence audit: {plan.curvature} on {len(gradients.coverage.blocks)} layers, {examples:,} training "
            f"examples{f', {queries:,} validation examples' if queries else ''}; about {_duration(seconds)} and "
            f"{_size(memory)} of extra memory"
        )

    def write_partial(
        self, columns: Callable[[], Columns], status: str, *, error: str | None = None, due: bool = True
    ) -> None:
        """Write what there is so far, so that a killed run leaves a readable audit; training goes on if that fails.

        Args:
            columns: Returns the table.
            status: Of the audit.
            error: What has ended it.
            due: Whether it has to be written; else only where that takes a small share of the time.
        """
        start = time.perf_counter()
        written, took = self._partial
        if self.store is None or not (due or took <= _PARTIAL_SHARE * (start - written)):
            return
        with tolerated(f"writing the table so far to {self.directory}", self._said):
            table = columns()
            try:
                table = audit.rank(table)
            except ValueError:  # nothing to rank by yet: the columns alone are worth keeping
                table = table | {
                    "rank": np.arange(1, len(table["index"]) + 1),
                    "candidate": np.zeros(len(table["index"]), dtype=bool),
                }
            self.store.write_scores(table)
            self.store.write_manifest(self._manifest | {"status": status, "error": error})
        self._partial = time.perf_counter(), time.perf_counter() - start

    def log_tracin(self, trainer: Trainer, scores: Tensor) -> None:
        """Write the histogram of TracIn at the end of an epoch: of this checkpoint, or in flight of all so far."""
        for writer in self._writers(trainer):
            with tolerated("the histogram of tracin", self._said):
                summary.write_histogram(writer, "influence/tracin_epoch", scores.cpu(), trainer.global_step)

    def keep_checkpoint(self, checkpoint: Checkpoint, tracin: TracIn, recording: Recording) -> None:
        """Keep a checkpoint within the budget, and note it if that can't be."""
        if self.store is None or not tracin.keep_checkpoints:
            return
        if recording.carried is not None:
            checkpoint = checkpoint.standing_for(recording.carried)
        note = (
            f"no checkpoints were kept for scores of pairs: one takes {_size(checkpoint.bytes)}, more than "
            f"keep_bytes={tracin.keep_bytes:,}"
        )
        try:
            kept = self.store.keep_checkpoint(checkpoint, tracin.keep_checkpoints, tracin.keep_bytes)
            recording.carried = None
        except StoreError as error:
            note, kept = f"the checkpoint of step {checkpoint.step} was not kept: {error}", False
            written = checkpoint.step in self.store.checkpoint_steps()
            recording.carried = None if written else checkpoint.outline()
        if not kept and note not in recording.notes:
            recording.notes.append(note)
        with tolerated("reading the kept checkpoints", self._said):
            recording.kept = [each.outline() for each in self.store.checkpoints().outlines]

    def take_over_checkpoints(self, tracin: TracIn, recording: Recording, step: int) -> None:
        """Copy the checkpoints that a resumed run has kept in the directory it had before.

        Since then that run may have dropped some for later ones, which are none of this run: the next of those that
        are left stands for their steps.
        """
        before, recording.directory = recording.directory, str(self.directory or "")
        if self.store is None or not before or before == recording.directory or not tracin.keep_checkpoints:
            return
        kept, lost = [each for each in recording.kept if each.step <= step], recording.carried
        try:
            old = AuditStore.open(before)
            if not kept:  # noted by an earlier version
                kept = [each.outline() for each in old.checkpoints().outlines if each.step <= step]
            stored = set(old.checkpoint_steps())
        except StoreError as error:
            old, stored = None, set()
            if kept:
                recording.notes.append(f"checkpoints of the run before it was resumed are missing: {error}")
        carried: Checkpoint | None = None
        for each in kept:
            about = each if carried is None else each.standing_for(carried)
            carried = about
            if old is None or about.step not in stored:
                continue
            try:
                whole = replace(old.read_checkpoint(about.step), step_sizes=about.step_sizes, steps=about.steps)
                self.store.keep_checkpoint(whole, tracin.keep_checkpoints, tracin.keep_bytes)
                carried = None
            except StoreError as error:
                recording.notes.append(f"the checkpoint of step {about.step} was not taken over: {error}")
        if lost is not None:
            carried = lost if carried is None else lost.standing_for(carried)
        recording.carried = carried

    def log_dynamics(self, trainer: Trainer, columns: dict[str, Tensor]) -> None:
        """Write means of the training dynamics."""
        means = {
            f"dynamics/{name}": float(columns[name].double().nanmean())
            for name in ("loss_mean", "aum", "el2n", "prob_margin", "forgetting")
            if name in columns and bool(torch.isfinite(columns[name]).any())
        }
        if "prob_margin" in columns:
            means["dynamics/contradicted_labels"] = float((columns["prob_margin"] < 0).sum())
        self._log_scalars(trainer, means)

    def report(
        self,
        step: int,
        gradients: ExampleGradients,
        plan: InfluencePlan,
        inspection: Inspection,
        result: InfluenceScores,
        columns: Columns,
        recording: Recording,
    ) -> AuditReport:
        """Rank, and put everything together."""
        ranked = audit.rank(columns)
        manifest = self._manifest | {"status": "complete", "step": step}
        manifest |= audit_described(gradients, plan, inspection, result, ranked)
        manifest["tracin_steps"] = recording.tracin.checkpoints
        manifest["notes"] = result.notes + notes_of(inspection, recording, gradients)
        pairs = None if self.queries is None else self.queries.pairs
        if self.queries is not None:
            manifest["notes"] += self.queries.notes
        if pairs is not None:
            manifest["queries"] = pairs.about
        mislabelled = self._known_mask(ranked["index"])
        if mislabelled is not None:
            manifest["detection"] = detection_of(ranked, mislabelled)
        return AuditReport(ranked, manifest, self.directory, None if pairs is None else pairs.table)

    def publish(
        self, trainer: Trainer, gradients: ExampleGradients, report: AuditReport, curvature: Curvature | None
    ) -> None:
        """Write every file, then to every logger, then the summary; what fails is said, and stops nothing else."""
        self._write(gradients, report, curvature)
        self._log_report(trainer, gradients, report)
        self.tell(lambda: f"\n{report}")

    def _write(self, gradients: ExampleGradients, report: AuditReport, curvature: Curvature | None) -> None:
        store = self.store
        if store is None:
            return
        names = None
        with tolerated("reading the class names", self._said):
            names = _usable_names(bridge.label_names(gradients.source.dataset), report.columns)
        files = report.files(names)
        if curvature is not None:
            files = {"factors": lambda store: _write_factors(store, curvature)} | files
        failures = {}
        for file, write in files.items():
            try:
                write(store)
            except Exception as error:
                failures[file] = f"{file}: {error}"
        # Last: only a directory whose every file is in place calls itself complete.
        manifest = dict(report.manifest) if "scores" not in failures else self._manifest
        if failures:
            manifest |= {"status": "interrupted", "error": "; ".join(failures.values())}
        try:
            store.write_manifest(manifest)
        except Exception as error:
            failures["manifest"] = f"manifest: {error}"
        if failures:
            rank_zero_warn(
                f"the influence audit is done, but parts of it could not be written to {store.directory}: "
                f"{'; '.join(failures.values())} The whole audit is in memory: "
                "`InfluenceAudit.report.save(directory)` writes it to another directory."
            )

    def _log_report(self, trainer: Trainer, gradients: ExampleGradients, report: AuditReport) -> None:
        step = trainer.global_step
        dataset = gradients.source.dataset
        mislabelled = self._known_mask(report.columns["index"])
        writers = self._writers(trainer)
        for writer in writers:
            for name in ("self_influence", "tracin", "grad_norm_squared"):
                if name in report.columns:
                    method = f"/{report.manifest['curvature']['name']}" if name == "self_influence" else ""
                    with tolerated(f"the histogram of {name}", self._said):
                        summary.write_histogram(writer, f"influence/{name}{method}", report.columns[name], step)
            with tolerated("the candidates in TensorBoard", self._said):
                images = None
                with tolerated("fetching the candidates' images", self._said):
                    shown = [int(report.columns["index"][row]) for row in summary.top_candidates(report.columns)]
                    images = bridge.example_images(dataset, shown)
                names = bridge.label_names(dataset)
                summary.write_candidates(writer, report.columns, images=images, label_names=names, step=step)
            if mislabelled is not None:
                with tolerated("the detection curves", self._said):
                    summary.write_detection(writer, report.columns, mislabelled, step)
        if self.queries is not None:
            with tolerated("the queries in TensorBoard", self._said):
                self.queries.write(writers, gradients, step)
        scalars = {f"seconds/{name.replace(' ', '_')}": value for name, value in report.manifest["seconds"].items()}
        scalars |= {
            "coverage": report.manifest["coverage"]["share"],
            # Not "candidates": TensorBoard serves one kind of data per tag, and the images have that one.
            "candidate_count": len(report.candidates),
            "nonfinite_count": len(report.nonfinite),
        }
        detection = report.manifest.get("detection", {})
        aurocs = {f"detection/{name}_auroc": values["auroc"] for name, values in detection.items()}
        self._log_scalars(trainer, scalars, aurocs)

    def _writers(self, trainer: Trainer) -> list[TolerantWriter]:
        """Return the event-file writers of the TensorBoard loggers (rank zero only)."""
        loggers = bridge.real_loggers(trainer) if trainer.is_global_zero else []
        return [TolerantWriter(logger, self._said) for logger in loggers if isinstance(logger, TensorBoardLogger)]

    def _log_scalars(
        self, trainer: Trainer, scalars: dict[str, float], elsewhere: dict[str, float] | None = None
    ) -> None:
        """Write scalars to every logger, those of ``elsewhere`` only to loggers other than TensorBoard."""
        if not trainer.is_global_zero:
            return
        for writer in self._writers(trainer):
            with tolerated("writing scalars", self._said):
                summary.write_scalars(writer, scalars, trainer.global_step)
        for logger in bridge.real_loggers(trainer):
            if not isinstance(logger, TensorBoardLogger):
                everything = scalars | (elsewhere or {})
                finite = {f"influence/{name}": value for name, value in everything.items() if np.isfinite(value)}
                with tolerated(f"logging to {type(logger).__name__}", self._said):
                    logger.log_metrics(finite, step=trainer.global_step)

    def _known_mask(self, indices: NDArray[Any]) -> NDArray[Any] | None:
        if self.known_noise is None:
            return None
        mask = np.isin(indices, self.known_noise)
        return mask if mask.any() and not mask.all() else None


def _write_factors(store: AuditStore, curvature: Curvature) -> None:
    for name, (tensors, about) in curvature.tensors().items():
        store.write_factors(name, tensors, about)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _size(size: int) -> str:
    return f"{size / 2**20:.0f} MB" if size < 2**30 else f"{size / 2**30:.1f} GB"


def _usable_names(names: list[str] | None, columns: Mapping[str, NDArray[Any]]) -> list[str] | None:
    """Class names only if there is one for every label in the table."""
    if names is None:
        return None
    labels = [int(columns[name].max()) for name in ("label", "predicted", "suggested") if name in columns]
    return names if max(labels, default=-1) < len(names) else None
