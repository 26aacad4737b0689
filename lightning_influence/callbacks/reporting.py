"""Where an audit goes: directory, loggers, and the lines a user reads."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_influence.audit.columns import shown_in
from lightning_influence.audit.curves import Curves
from lightning_influence.audit.health import FIRST_LOOK
from lightning_influence.audit.naming import ExampleNames
from lightning_influence.audit.ranking import judged, rank
from lightning_influence.audit.report import AuditReport
from lightning_influence.audit.store.store import AuditStore
from lightning_influence.audit.summary import brief
from lightning_influence.callbacks import bridge
from lightning_influence.callbacks.display import tolerated
from lightning_influence.callbacks.lightning import Trainer, rank_zero_info, rank_zero_warn
from lightning_influence.callbacks.manifest import audit_described, detection_of, put_back
from lightning_influence.callbacks.page_writer import PageWriter
from lightning_influence.callbacks.query_report import QueryReport
from lightning_influence.callbacks.showing import Showing, Watched
from lightning_influence.core.progress import is_terminal
from lightning_influence.curvature import Curvature
from lightning_influence.gradients.passes import ExampleGradients
from lightning_influence.gradients.verify import Inspection
from lightning_influence.influence.inputs import notes_of
from lightning_influence.loggers.candidate_sheets import candidates
from lightning_influence.loggers.exhibits import Exhibit, Histogram
from lightning_influence.loggers.numbers import detection_curves, log_histogram
from lightning_influence.loggers.summary import compared_numbers, detection_table, summary_table
from lightning_influence.scores.plan import InfluencePlan, InfluenceScores
from lightning_influence.training.evidence import LabelEvidence
from lightning_influence.training.recording import Recording

Columns = dict[str, NDArray[Any]]


class Reporter:
    """Writes what an audit finds; on other ranks than zero, and in a dry run, to nowhere.

    Args:
        store: The audit directory, None to write nothing.
        arguments: The callback's arguments, for the manifest.
        known_noise: Dataset indices of labels known to be wrong.
        queries: What the audit is asked about.
        names: What the training examples are called.
        trusted: Dataset indices of labels known to be right.
        lightning: Which package of Lightning the run is of, and its version.

    Attributes:
        weights: Which ones are audited, for the manifest.
    """

    def __init__(
        self,
        store: AuditStore | None,
        arguments: dict[str, Any],
        known_noise: NDArray[Any] | None = None,
        queries: QueryReport | None = None,
        names: ExampleNames | None = None,
        trusted: NDArray[Any] | None = None,
        lightning: Mapping[str, str] | None = None,
    ) -> None:
        self.store = store
        self._trusted = trusted
        self.known_noise = known_noise
        self.queries = queries
        self.names = names or ExampleNames(())
        self.weights: dict[str, Any] = {}
        self._said: set[str] = set()  # what has been said to have failed
        self._showing = Showing(self._said)
        self._page = PageWriter(store, self._showing, self._said)
        self._watched = Watched()
        self._manifest: dict[str, Any] = {
            "status": "recording",
            "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "arguments": arguments,
            "versions": {
                "python": platform.python_version(),
                **{name: version(name) for name in ("lightning-influence", "torch")},
                **(lightning or {}),
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

    def write_partial(
        self,
        trainer: Trainer,
        recording: Recording,
        status: str,
        *,
        error: str | None = None,
        ended_epochs: int | None = None,
    ) -> None:
        """Write what there is so far, so that a killed run leaves a readable audit; training goes on if that fails.

        Args:
            trainer: The trainer.
            recording: What there is.
            status: Of the audit.
            error: What has ended it.
            ended_epochs: At the end of an epoch, how many are over; it is written if that is due, see ``Watched``, the
                table of the first one in any case.
        """
        due = error is not None or self._watched.due
        if self.store is None or not (ended_epochs is None or due or self._watched.first):
            return
        with self._watched.taking(whole=due), tolerated(f"writing the table so far to {self.directory}", self._said):
            columns, manifest = rank(self._named(recording.local_columns())), self._manifest
            manifest = manifest | {"status": status, "error": error}
            self.store.write_scores(columns)
            self.store.write_manifest(manifest)
            if due:
                curves = Curves.of(recording.curves.kept, columns)
                report, ended = AuditReport(columns, manifest, self.directory, curves=curves), trainer.current_epoch
                self._page.write_partial(trainer, report, ended if ended_epochs is None else ended_epochs)

    def _named(self, columns: Columns) -> Columns:
        """Return the columns and what the examples are called."""
        names: Columns = {}
        with tolerated("naming the examples", self._said):
            names = self.names.columns(columns["index"])
        return columns | names

    def log_tracin(self, trainer: Trainer, scores: Tensor) -> None:
        """Show the histogram of TracIn at the end of an epoch: of this checkpoint, or in flight of all so far."""

        def histogram() -> Iterator[Histogram]:
            yield from log_histogram("influence/tracin_epoch", scores.cpu().double().numpy())[0]

        self._showing.show(trainer, "the histogram of tracin", histogram)

    def log_dynamics(self, trainer: Trainer, columns: dict[str, Tensor]) -> None:
        """Write means of the training dynamics."""
        known = {name: values for name, values in columns.items() if bool(torch.isfinite(values).any())}
        means = {f"dynamics/{name}": float(known[name].double().nanmean()) for name in shown_in("scalar", known)}
        if "prob_margin" in columns:
            means["dynamics/contradicted_labels"] = float((columns["prob_margin"] < 0).sum())
        self._showing.numbers(trainer, means)

    def report(
        self,
        step: int,
        gradients: ExampleGradients,
        plan: InfluencePlan,
        inspection: Inspection,
        result: InfluenceScores,
        columns: Columns,
        evidence: LabelEvidence | None,
        recording: Recording,
    ) -> AuditReport:
        """Rank, and put everything together."""
        ranked, beliefs = judged(self._named(columns), evidence, trusted=self._trusted)
        if evidence is None and recording.labels.unknown and not beliefs.told and "label" in ranked:
            beliefs = replace(beliefs, reason=recording.labels.unknown)
        manifest = self._manifest | {"status": "complete", "step": step, "labels": beliefs.described()}
        manifest["audited_weights"] = self.weights
        manifest |= audit_described(gradients, plan, inspection, result, ranked)
        with tolerated("reading the class names", self._said):
            if (names := bridge.label_names(gradients.source.dataset)) is not None:
                manifest["label_names"] = names
        manifest["tracin_steps"] = recording.tracin.checkpoints
        manifest["notes"] = [*result.notes, *notes_of(inspection), *recording.remarks(), *put_back(gradients)]
        if self.known_noise is not None:
            mislabelled = np.isin(ranked["index"], self.known_noise)
            if mislabelled.any() and not mislabelled.all():
                manifest["detection"] = detection_of(ranked, mislabelled)
        curves = Curves() if recording.gaps.misplaced else Curves.of(recording.curves.kept, ranked)
        report = AuditReport(ranked, manifest, self.directory, curves=curves)
        with tolerated("describing the candidates", self._said):
            report = _with_texts(report, self.names)
        if self.queries is not None:
            manifest["notes"] += self.queries.notes
            with tolerated("naming the queries", self._said):
                self.queries.name(self.names)
            if (pairs := self.queries.pairs) is not None:
                manifest["queries"] = pairs.about
                report = replace(report, pairs=pairs.table)
        return report

    def publish(self, trainer: Trainer, report: AuditReport, curvature: Curvature | None) -> None:
        """Write every file, then to every logger, then the summary; what fails is said, and stops nothing else."""
        self._write(report, curvature)
        self._log_report(trainer, report)
        self._write_page(trainer, report)
        # All of it where it is read as it comes; elsewhere it would bury what else a log or a notebook has.
        self.tell(lambda: f"\n{report}" if is_terminal() else brief(report.columns, report.manifest, report.directory))

    def publish_queries(self, trainer: Trainer, report: AuditReport) -> None:
        """Write and show once more what has to do with queries, of which more is known by now."""
        self._write(report, None)
        self._show_queries(trainer, report)
        self._write_page(trainer, report)

    def _write_page(self, trainer: Trainer, report: AuditReport) -> None:
        query_sets = () if self.queries is None else self.queries.datasets
        self._page.write(trainer, report, self.names, query_sets, trainer.current_epoch)

    def _write(self, report: AuditReport, curvature: Curvature | None) -> None:
        store = self.store
        if store is None:
            return
        files = report.files()
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

    def _log_report(self, trainer: Trainer, report: AuditReport) -> None:
        columns, manifest = report.columns, report.manifest
        label_names = manifest.get("label_names")
        left_out: dict[str, int] = {}
        shown = self._showing
        compared = compared_numbers(manifest, len(report.candidates))
        shown.numbers(trainer, compared)

        def histograms() -> Iterator[Histogram]:
            for name in shown_in("histogram", columns):
                tag = f"influence/{name}" + (f"/{manifest['curvature']['name']}" if name == "self_influence" else "")
                drawn, without = log_histogram(tag, columns[name])
                left_out.update({f"{name}, {reason}": count for reason, count in without.items()})
                yield from drawn

        def detection() -> Iterator[Exhibit]:
            yield detection_table(manifest)
            yield from detection_curves(columns, np.isin(columns["index"], np.asarray(self.known_noise)))

        shown.show(trainer, "the histograms", histograms)
        every = compared | {"nonfinite_count": len(report.nonfinite)} | left_out
        shown.show(trainer, "the summary", lambda: [summary_table(manifest, every)])
        shown.show(
            trainer, "the candidates", lambda: candidates(columns, images=self.names.shown, label_names=label_names)
        )
        if "detection" in manifest:
            shown.show(trainer, "the detection of known label noise", detection)
        self._show_queries(trainer, report)
        shown.tell_lacking(trainer)

    def _show_queries(self, trainer: Trainer, report: AuditReport) -> None:
        if (queries := self.queries) is not None:
            names = report.manifest.get("label_names")
            self._showing.show(trainer, "the queries", lambda: queries.exhibits(self.names, names))


def _with_texts(report: AuditReport, names: ExampleNames) -> AuditReport:
    """Return the report with what is said, if anything is, of those whom a person will look at."""
    columns = report.columns
    first = columns["rank"] <= max(report.health().inspect, FIRST_LOOK)
    rows = np.flatnonzero(first | columns["candidate"])
    rows = rows[np.argsort(columns["rank"][rows])]
    texts = names.texts(columns["index"][rows].tolist())
    if texts is None:
        return report
    column = np.full(len(report), "", dtype=object)
    column[rows] = texts
    return replace(report, columns={**columns, "text": column})


def _write_factors(store: AuditStore, curvature: Curvature) -> None:
    for name, (tensors, about) in curvature.tensors().items():
        store.write_factors(name, tensors, about)
