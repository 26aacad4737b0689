"""What a recorded run is asked once the audit is done: the column ``harm_exact``, and the audit's queries."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np

from lightning_influence.audit.report import AuditReport
from lightning_influence.audit.store.atomic import StoreError
from lightning_influence.callbacks import bridge
from lightning_influence.callbacks.lightning import LightningModule, Trainer, rank_zero_info, rank_zero_warn
from lightning_influence.callbacks.run import AuditRun
from lightning_influence.objective.task import TrainingStepTask
from lightning_influence.replay import ReplayError, Rerun, TrainingRecord
from lightning_influence.replay.attribution import Replay
from lightning_influence.replay.step import CONSTANT
from lightning_influence.scores.measurements import MeasurementError
from lightning_influence.scores.pairs import PairwiseScores

_NAME = "harm_exact"


def with_replayed(
    report: AuditReport,
    run: AuditRun,
    record: TrainingRecord,
    trainer: Trainer,
    module: LightningModule,
    max_cost: float | None,
) -> AuditReport:
    """Return a finished report with the column and with further lists of its queries, also on the disk and in loggers.

    Args:
        report: Of the run; what fails is left out of it, and the reason noted.
        run: The run.
        record: Of its training.
        trainer: The trainer, at the end of training.
        module: The model.
        max_cost: Seconds that each of the two may take.
    """
    for what, more in ((_NAME, _with_exact_harm), ("lists of queries by replay", _with_queries)):
        try:
            report = more(report, run, record, trainer, module, max_cost)
        except (ReplayError, MeasurementError) as error:
            report = _noted(report, run, f"no {what}: {error}")
        except Exception as error:  # the audit is done: nothing may cost it
            told = f"{type(error).__name__}: {error}"
            rank_zero_warn(f"influence audit: no {what}, all else is there ({told})")
            report = _noted(report, run, f"no {what}: {told}")
    return report


def _with_exact_harm(
    report: AuditReport,
    run: AuditRun,
    record: TrainingRecord,
    trainer: Trainer,
    module: LightningModule,
    max_cost: float | None,
) -> AuditReport:
    if run.make_influence is None:
        return report
    training = run.make_influence().training
    validation = bridge.validation_queries(trainer, training)
    if not validation:
        return report
    with _replay(run, record, trainer, module, _NAME) as replay:
        found = replay.together(validation, max_cost=max_cost, self_test="if doubtful")
    index, known = report.columns["index"], found.indices.numpy()
    places = np.searchsorted(known, index).clip(max=len(known) - 1)
    values = np.where(known[places] == index, -found.scores.numpy()[places], np.nan)
    doubts = [note for note in found.notes if note.startswith(CONSTANT)]
    doubts += [] if found.trust is None else [str(found.trust)]
    return _noted(
        replace(report, columns={**report.columns, _NAME: values}), run, *(f"{_NAME}: {doubt}" for doubt in doubts)
    )


def _with_queries(
    report: AuditReport,
    run: AuditRun,
    record: TrainingRecord,
    trainer: Trainer,
    module: LightningModule,
    max_cost: float | None,
) -> AuditReport:
    queries = run.queries
    if queries is None or queries.pairs is None or queries.asked.method != "replay" or run.make_influence is None:
        return report
    table, notes = queries.pairs.table, list[str]()
    training = run.make_influence().training
    sets = queries.sets(trainer, training, bridge.validation_queries(trainer, training))
    scores: dict[int, PairwiseScores] = {}
    with _replay(run, record, trainer, module, "queries by replay") as replay:
        for number in np.unique(table["query_set"]).tolist():
            asked = np.unique(table["query"][table["query_set"] == number]).tolist()
            found = replay.pairs(sets[number][0], asked, queries.asked.statistic, max_cost=max_cost, self_test="auto")
            scores[number] = found
            notes += found.notes
    report.manifest["notes"].extend(f"queries by replay: {note}" for note in notes)
    report = replace(report, pairs=queries.add_replayed(scores, report.columns, run.reporter.names))
    run.reporter.publish_queries(trainer, report)
    return report


@contextmanager
def _replay(
    run: AuditRun, record: TrainingRecord, trainer: Trainer, module: LightningModule, what: str
) -> Iterator[Replay]:
    with bridge.aside(trainer):
        rerun = Rerun(record, module, TrainingStepTask(), run.passes.source)
        yield Replay(rerun, run.passes.task, told=lambda cost: rank_zero_info(f"{what}: {cost}."))


def _noted(report: AuditReport, run: AuditRun, *notes: str) -> AuditReport:
    """Write what has changed to the disk."""
    report.manifest["notes"].extend(notes)
    store = run.reporter.store
    if store is None:
        return report
    try:
        if _NAME in report.columns:
            store.write_scores(report.columns)
            store.write_glossary(report.glossary())
        store.write_manifest({**report.manifest, "status": report.status})
    except StoreError as error:
        rank_zero_warn(f"influence audit: what replay has told is in memory alone ({error})")
    return report
