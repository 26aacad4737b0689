"""From the callback's arguments to a run under audit: a look at one batch, and what follows from it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import cast

from lightning_influence.audit.naming import ExampleNames, Ids
from lightning_influence.callbacks import bridge, preparing
from lightning_influence.callbacks.arguments import Arguments
from lightning_influence.callbacks.lightning import LightningModule, Trainer, version_of
from lightning_influence.callbacks.loaders import train_loader
from lightning_influence.callbacks.query_report import QueryReport
from lightning_influence.callbacks.reporting import Reporter
from lightning_influence.callbacks.run import AuditRun
from lightning_influence.callbacks.sharded import check_shards
from lightning_influence.callbacks.tracin_flight import FlightRecorder
from lightning_influence.callbacks.training_passes import TrainingPasses
from lightning_influence.curvature.choices import check_labels
from lightning_influence.curvature.fit import check_curvature
from lightning_influence.data.source import ExampleSource
from lightning_influence.data.stream import StreamSource
from lightning_influence.gradients.discover import trace_model
from lightning_influence.gradients.new_paths import NewUseError
from lightning_influence.gradients.verify import roomy_batch_size
from lightning_influence.objective.scale import NoLossError
from lightning_influence.objective.standard_task import StandardTask
from lightning_influence.objective.task import Task, TrainingStepTask
from lightning_influence.scores.leverage import check_known
from lightning_influence.training.recording import Recording


def begun(
    arguments: Arguments, trainer: Trainer, module: LightningModule, source: ExampleSource, recording: Recording
) -> AuditRun:
    """Look at some examples before the first step, and return the run.

    Args:
        arguments: Those of the callback.
        trainer: The trainer.
        module: The model.
        source: The training data.
        recording: Where the run is recorded.
    """
    start = time.perf_counter()
    if isinstance(source, StreamSource):
        drawn, ids = source.at_hand, cast(Ids, source.book)
    else:
        drawn, ids = bridge.drawn_from(train_loader(trainer, arguments.loader), len(source)), arguments.ids
    preparing.check_company(source, arguments.tracin)
    check_shards(trainer, module, arguments.tracin)
    first = preparing.some_of(drawn, source.batch_size)
    names = ExampleNames(source.dataset, ids, arguments.describe)
    if trainer.is_global_zero:
        names.try_out(first[:1])
    try:
        run = _begun(arguments, trainer, module, source, recording, names, first)
    except NoLossError:
        first = preparing.with_loss(trainer, module, _task(arguments, source), source, first)
        run = _begun(arguments, trainer, module, source, recording, names, first)
    run.budget.prepared(time.perf_counter() - start)
    return run


def _task(arguments: Arguments, source: ExampleSource) -> Task:
    task = arguments.task or TrainingStepTask()
    if isinstance(task, StandardTask) and source.company is not None:
        return StandardTask(task.name, source.company.own)
    return task


def _begun(
    arguments: Arguments,
    trainer: Trainer,
    module: LightningModule,
    source: ExampleSource,
    recording: Recording,
    names: ExampleNames,
    first: Sequence[int],
) -> AuditRun:
    task, tracin = _task(arguments, source), arguments.tracin
    queries = None if arguments.queries is None else QueryReport(arguments.queries)
    with bridge.aside(trainer):
        trace = trace_model(module, task, source, indices=first, **bridge.surroundings(trainer, module))
        passes = TrainingPasses(source, task, trace, arguments.layers, arguments.uncovered)
        gradients = passes.gradients(trainer, module)
        recording.losses.own = (
            preparing.own_terms_of_step(gradients, first)
            if arguments.task is not None
            else preparing.own_terms(gradients)
        )
        start, over = time.perf_counter(), 0
        try:
            over = preparing.look_for_paths(gradients, first)
        except NewUseError as error:  # it counts as not understood, as if the first batch had had it
            trace.add(error.trace)
            gradients = passes.gradients(trainer, module)
        took = time.perf_counter() - start
        recording.losses.compiled = bool(preparing.compiled_parts(gradients, first, tracin))
        recording.step_sizes.summed = source.batch_size if trace.sums else 1
        if arguments.layers is None:
            preparing.warn_of_gaps(gradients.coverage)
        check_curvature(gradients, arguments.curvature, first)
        if arguments.task is not None:
            recording.losses.task_apart = True
            recording.note(preparing.told_of_task(gradients, first))
        inspection = preparing.looked_at(gradients, first, recording, verify=arguments.verify)
        check_labels(arguments.curvature, arguments.fisher, inspection.tapped, inspection.exact_draws)
        if preparing.labels_vary(gradients, first, inspection):
            recording.dynamics.checks_labels = False
            recording.note("examples have other labels each time: whether batches hold theirs was not checked")
        if arguments.task is None and preparing.depends_on_batch_idx(gradients, first):
            recording.note(
                "the loss depends on `batch_idx`, which is 0 in all passes: they are about the loss of batch 0; "
                "`task=` can take another one"
            )
        if queries is not None:
            if queries.asked.normalise == "leverage":
                check_known(inspection.tapped)
            queries.check(trainer, gradients, bridge.validation_queries(trainer, gradients))
    source.pass_batch_size = roomy_batch_size(inspection, source, module.device)
    flight = None
    if tracin is not None and tracin.mode == "step":
        layers = arguments.layers if tracin.layers is None else tracin.layers
        flight = FlightRecorder(recording, trainer, module, layers, trace)
    # Last: what can't be audited leaves no directory behind.
    store = preparing.open_store(trainer, arguments.dirpath)
    known_noise, trusted = (
        None if known is None else known.numpy() for known in (arguments.known_noise, arguments.trusted)
    )
    run = AuditRun(
        recording,
        passes,
        inspection,
        Reporter(store, arguments.described(), known_noise, queries, names, trusted, version_of(trainer)),
        arguments,
        flight=flight,
        queries=queries,
        digests=source.digests() if getattr(trainer, "reload_dataloaders_every_n_epochs", 0) else (),
    )
    run.budget.went_over(took, over)
    return run
