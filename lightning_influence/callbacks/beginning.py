"""From the callback's arguments to a run under audit: checks, a look at one batch, and what follows from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, get_args

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_influence.audit.report import AuditReport
from lightning_influence.callbacks import bridge, preparing
from lightning_influence.callbacks.arguments import check_damping, check_task
from lightning_influence.callbacks.query_report import QueryReport, described
from lightning_influence.callbacks.reporting import Reporter
from lightning_influence.callbacks.resuming import Restored, finished_report
from lightning_influence.callbacks.run import AuditRun
from lightning_influence.callbacks.tracin_flight import FlightRecorder
from lightning_influence.callbacks.training_passes import TrainingPasses
from lightning_influence.core import distributed
from lightning_influence.curvature import (
    SOLVERS,
    CurvatureName,
    Fisher,
    check_curvature,
    check_labels,
    check_solver,
)
from lightning_influence.data.source import ExampleSource
from lightning_influence.gradients.coverage import Uncovered, listed_layers
from lightning_influence.gradients.discover import trace_model
from lightning_influence.gradients.passes import ExampleGradients
from lightning_influence.gradients.verify import Inspection, inspect, roomy_batch_size
from lightning_influence.influence.inputs import check_choice, check_factor_examples, check_layers
from lightning_influence.objective.scale import NoLossError
from lightning_influence.objective.task import Task, TrainingStepTask
from lightning_influence.scores.plan import InfluencePlan
from lightning_influence.training.recording import Recording

if TYPE_CHECKING:
    from lightning_influence.callbacks.influence_audit import InfluenceAudit


def check_arguments(audit: InfluenceAudit) -> None:
    """Raise ``ValueError`` if an argument is out of range."""
    check_choice("curvature", audit.curvature, get_args(CurvatureName))
    check_choice("fisher", audit.fisher, get_args(Fisher))
    check_choice("uncovered", audit.uncovered, get_args(Uncovered))
    check_layers(audit.layers)
    check_damping(audit.damping)
    check_choice("solver", audit.solver, ("auto", "dense", *SOLVERS))
    check_solver(audit.curvature, audit.solver)
    check_factor_examples(audit.factor_examples)
    check_task(audit.task)


def described_arguments(audit: InfluenceAudit) -> dict[str, Any]:
    """Return the arguments in terms of JSON."""
    layers, task = audit.layers, audit.task
    return {
        "curvature": audit.curvature,
        "fisher": audit.fisher,
        "damping": audit.damping,
        "solver": audit.solver,
        "factor_examples": audit.factor_examples,
        "tracin": None if audit.tracin is None else audit.tracin.described(),
        "layers": None if layers is None else [getattr(each, "__name__", each) for each in listed_layers(layers)],
        "uncovered": audit.uncovered,
        "queries": described(audit.queries),
        "task": None if task is None else getattr(task, "__name__", type(task).__name__),
        "verify": audit.verify,
    }


def begun(
    audit: InfluenceAudit, trainer: Trainer, module: LightningModule, source: ExampleSource, recording: Recording
) -> AuditRun:
    """Look at some examples before the first step, and return the run.

    Args:
        audit: The callback.
        trainer: The trainer.
        module: The model.
        source: The training data.
        recording: Where the run is recorded.
    """
    first = preparing.some_of(bridge.drawn_from(trainer, len(source)), source.batch_size)
    try:
        return _begun(audit, trainer, module, source, recording, first)
    except NoLossError:
        first = preparing.with_loss(trainer, module, audit.task or TrainingStepTask(), source, first)
        return _begun(audit, trainer, module, source, recording, first)


def _begun(
    audit: InfluenceAudit,
    trainer: Trainer,
    module: LightningModule,
    source: ExampleSource,
    recording: Recording,
    first: Sequence[int],
) -> AuditRun:
    task, tracin = audit.task or TrainingStepTask(), audit.tracin
    queries = None if audit.queries is None else QueryReport(audit.queries)
    around = bridge.surroundings(trainer, module)
    with bridge.aside(trainer):
        recording.losses.compiled = bool(preparing.compiled_parts(module, task, source, first, tracin, around))
        trace = trace_model(module, task, source, indices=first, **around)
        passes = TrainingPasses(source, task, trace, audit.layers, audit.uncovered)
        gradients = passes.gradients(trainer, module)
        recording.step_sizes.summed = source.batch_size if trace.sums else 1
        if audit.layers is None:
            preparing.warn_of_gaps(gradients.coverage)
        check_curvature(gradients, audit.curvature, first)
        inspection = inspect(gradients, first, verify=audit.verify)
        check_labels(audit.curvature, audit.fisher, inspection.tapped, inspection.exact_draws)
        _note_what_varies(recording, gradients, first, inspection, around, audit.task)
        if queries is not None:
            queries.check(trainer, gradients, bridge.validation_queries(trainer, gradients))
    source.pass_batch_size = roomy_batch_size(inspection)
    flight = None
    if tracin is not None and tracin.mode == "step":
        layers = audit.layers if tracin.layers is None else tracin.layers
        flight = FlightRecorder(recording, trainer, module, layers, trace)
    # Last: what can't be audited leaves no directory behind.
    store = preparing.open_store(trainer, audit.dirpath)
    known_noise = None if audit.known_noise is None else audit.known_noise.numpy()
    return AuditRun(
        recording,
        passes,
        inspection,
        Reporter(store, described_arguments(audit), known_noise, queries),
        audit.curvature,
        partial(
            InfluencePlan.make,
            fisher=audit.fisher,
            damping=audit.damping,
            examples=audit.factor_examples,
            solver=audit.solver,
        ),
        tracin=tracin,
        flight=flight,
        queries=queries,
        digests=source.digests() if getattr(trainer, "reload_dataloaders_every_n_epochs", 0) else (),
    )


def _note_what_varies(
    recording: Recording,
    gradients: ExampleGradients,
    indices: Sequence[int],
    inspection: Inspection,
    around: bridge.Surroundings,
    task: Task | None,
) -> None:
    """Note losses that depend on more than the example."""
    if preparing.labels_vary(gradients, indices, inspection):
        recording.dynamics.checks_labels = False
        recording.note("examples have other labels each time: whether batches hold theirs was not checked")
    module: Any = gradients.module
    if task is None and preparing.depends_on_batch_idx(module, gradients.source, indices, around):
        recording.note(
            "the loss depends on `batch_idx`, which is 0 in all passes: they are about the loss of batch 0; `task=` "
            "can take another one"
        )


def complete_before(
    restored: Restored | None, trainer: Trainer, arguments: Mapping[str, Any], detects: bool
) -> tuple[bool, AuditReport | None]:
    """Tell whether the audit was complete before training was resumed, and return it on rank zero.

    Args:
        restored: What the checkpoint holds of the audit.
        trainer: The trainer.
        arguments: The callback's arguments.
        detects: Whether there are labels that are known to be wrong.
    """
    report: AuditReport | None = None
    if trainer.is_global_zero:
        report = finished_report(restored, arguments, trainer.global_step, detects=detects)
    complete = distributed.any_process(report is not None)
    if complete:
        rank_zero_info(f"influence audit: it was complete before training was resumed.\n{report}")
    return complete, report
