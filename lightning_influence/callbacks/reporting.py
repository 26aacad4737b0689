"""Where an audit goes: directory, TensorBoard, other loggers, and the lines a user reads."""

from __future__ import annotations

import hashlib
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from numpy.typing import NDArray
from torch import Tensor

from lightning_influence import audit, isolation
from lightning_influence.audit import AuditReport
from lightning_influence.callbacks import bridge
from lightning_influence.callbacks.query_report import QueryReport
from lightning_influence.callbacks.recording import Recording
from lightning_influence.checkpoints import Checkpoint
from lightning_influence.columns import LOW_IS_SUSPICIOUS, SCORE_COLUMNS
from lightning_influence.curvature import Curvature, fitted_bytes
from lightning_influence.influence import InfluencePlan, InfluenceScores
from lightning_influence.metrics import mislabel_detection
from lightning_influence.passes import ExampleGradients
from lightning_influence.store import AuditStore, StoreError
from lightning_influence.tensorboard import summary
from lightning_influence.tracin import TracIn
from lightning_influence.verify import Inspection

Columns = dict[str, NDArray[Any]]

# Of what a step changes, so many are named.
_MOST_PATHS = 6


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

    def announce(
        self, plan: InfluencePlan, gradients: ExampleGradients, inspection: Inspection, examples: int, queries: int
    ) -> str:
        """Return the line before a long wait: what will be done, and about how long and how much memory it takes."""
        draws = inspection.exact_draws or 1
        work = plan.gradient_passes(gradients.coverage, examples, queries, draws)
        if self.queries is not None:  # their pairs take one more pass over the training data
            work += examples
        rate = self.seconds_per_example or inspection.seconds / inspection.examples
        seconds = work * rate + plan.decomposition_seconds(gradients.coverage)
        memory = fitted_bytes(plan.curvature, gradients.coverage.blocks) + inspection.batch_bytes
        return (
            f"influence audit: {plan.curvature} on {len(gradients.coverage.blocks)} layers, {examples:,} training "
            f"examples{f', {queries:,} validation examples' if queries else ''}; about {_duration(seconds)} and "
            f"{_size(memory)} of extra memory"
        )

    def write_partial(self, columns: Columns, status: str, *, error: str | None = None) -> None:
        """Write what there is so far, so that a killed run leaves a readable audit."""
        if self.store is None:
            return
        try:
            columns = audit.rank(columns)
        except ValueError:  # nothing to rank by yet: the columns alone are worth keeping
            columns = columns | {
                "rank": np.arange(1, len(columns["index"]) + 1),
                "candidate": np.zeros(len(columns["index"]), dtype=bool),
            }
        self.store.write_scores(columns)
        self.store.write_manifest(self._manifest | {"status": status, "error": error})

    def log_tracin(self, trainer: Trainer, scores: Tensor) -> None:
        """Write the histogram of TracIn at the end of an epoch: of this checkpoint, or in flight of all so far."""
        for writer in bridge.tensorboard_writers(trainer):
            summary.write_histogram(writer, "influence/tracin_epoch", scores.cpu(), trainer.global_step)

    def keep_checkpoint(self, checkpoint: Checkpoint, tracin: TracIn, recording: Recording) -> None:
        """Keep a checkpoint within the budget, and note it if that can't be."""
        if self.store is None or not tracin.keep_checkpoints:
            return
        recording.checkpoint_directory = str(self.store.directory)
        note = (
            f"no checkpoints were kept for scores of pairs: one takes {_size(checkpoint.bytes)}, more than "
            f"keep_bytes={tracin.keep_bytes:,}"
        )
        kept = self.store.keep_checkpoint(checkpoint, tracin.keep_checkpoints, tracin.keep_bytes)
        if not kept and note not in recording.notes:
            recording.notes.append(note)

    def take_over_checkpoints(self, tracin: TracIn, recording: Recording, step: int) -> None:
        """Copy the checkpoints that a resumed run has kept in the directory it had before."""
        before = recording.checkpoint_directory
        if self.store is None or not before or before == str(self.store.directory):
            return
        try:
            kept = [c for c in AuditStore.open(before).checkpoints() if c.step <= step]
            for checkpoint in kept:
                self.store.keep_checkpoint(checkpoint, tracin.keep_checkpoints, tracin.keep_bytes)
        except StoreError as error:
            recording.notes.append(f"checkpoints of the run before it was resumed are missing: {error}")
        recording.checkpoint_directory = str(self.store.directory)

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

    def finish(
        self,
        trainer: Trainer,
        gradients: ExampleGradients,
        plan: InfluencePlan,
        inspection: Inspection,
        result: InfluenceScores,
        columns: Columns,
        recording: Recording,
    ) -> AuditReport:
        """Rank, write everything, and return the report."""
        ranked = audit.rank(columns)
        manifest = self._manifest | {"status": "complete"} | _about(gradients, plan, inspection, result, ranked)
        manifest["tracin_steps"] = recording.tracin.checkpoints
        manifest["notes"] = result.notes + _notes(inspection, recording) + _put_back(gradients)
        pairs = None if self.queries is None else self.queries.pairs
        if self.queries is not None:
            manifest["notes"] += self.queries.notes
        if pairs is not None:
            manifest["queries"] = pairs.about
        mislabelled = self._known_mask(ranked["index"])
        if mislabelled is not None:
            manifest["detection"] = _detection(ranked, mislabelled)
        if self.store is not None:
            names = _usable_names(bridge.label_names(gradients.source.dataset), ranked)
            if result.curvature is not None:
                for name, (tensors, about) in result.curvature.tensors().items():
                    self.store.write_factors(name, tensors, about)
            self.store.write_scores(ranked)
            self.store.write_candidates(ranked, label_names=names)
            if pairs is not None:
                self.store.write_pairs(pairs.table)
            # Last: only a directory whose every file is in place calls itself complete.
            self.store.write_manifest(manifest)
        report = AuditReport(ranked, manifest, self.directory, None if pairs is None else pairs.table)
        self._log_report(trainer, gradients, report, mislabelled)
        return report

    def _log_report(
        self, trainer: Trainer, gradients: ExampleGradients, report: AuditReport, mislabelled: NDArray[Any] | None
    ) -> None:
        step = trainer.global_step
        dataset = gradients.source.dataset
        for writer in bridge.tensorboard_writers(trainer):
            for name in ("self_influence", "tracin", "grad_norm_squared"):
                if name in report.columns:
                    method = f"/{report.manifest['curvature']['name']}" if name == "self_influence" else ""
                    summary.write_histogram(writer, f"influence/{name}{method}", report.columns[name], step)
            shown = [int(report.columns["index"][row]) for row in summary.top_candidates(report.columns)]
            summary.write_candidates(
                writer,
                report.columns,
                images=bridge.example_images(dataset, shown),
                label_names=bridge.label_names(dataset),
                step=step,
            )
            if mislabelled is not None:
                summary.write_detection(writer, report.columns, mislabelled, step)
        if self.queries is not None:
            self.queries.write(bridge.tensorboard_writers(trainer), gradients, step)
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

    def _log_scalars(
        self, trainer: Trainer, scalars: dict[str, float], elsewhere: dict[str, float] | None = None
    ) -> None:
        """Write scalars to every logger, those of ``elsewhere`` only to loggers other than TensorBoard."""
        if not trainer.is_global_zero:
            return
        for writer in bridge.tensorboard_writers(trainer):
            summary.write_scalars(writer, scalars, trainer.global_step)
        for logger in bridge.real_loggers(trainer):
            if not isinstance(logger, TensorBoardLogger):
                everything = scalars | (elsewhere or {})
                finite = {f"influence/{name}": value for name, value in everything.items() if np.isfinite(value)}
                logger.log_metrics(finite, step=trainer.global_step)

    def _known_mask(self, indices: NDArray[Any]) -> NDArray[Any] | None:
        if self.known_noise is None:
            return None
        mask = np.isin(indices, self.known_noise)
        return mask if mask.any() and not mask.all() else None


def _about(
    gradients: ExampleGradients, plan: InfluencePlan, inspection: Inspection, result: InfluenceScores, columns: Columns
) -> dict[str, Any]:
    """Return what the manifest says about data, model and scores."""
    coverage, curvature, sweep = gradients.coverage, result.curvature, result.sweep
    about: dict[str, Any] = {
        "examples": len(columns["index"]),
        "dataset_size": len(gradients.source),
        "nonfinite": columns["index"][~columns["finite"]],
        "fingerprint": _fingerprint(gradients, columns),
        "ranked_by": list(audit.ingredients(columns)),
        "coverage": {
            "share": coverage.share,
            "summary": coverage.describe(),
            "covered": {name: list(block.parameters) for name, block in coverage.blocks.items()},
            "uncovered": coverage.uncovered,
        },
        "curvature": {"name": plan.curvature, "damping_rule": plan.damping.rule}
        | ({} if curvature is None else _described(curvature)),
        "verification_error": inspection.largest_error,
        "seconds": result.seconds,
    }
    if sweep is not None:
        about["damping_sweep"] = {
            "factors": sweep.factors,
            "stability": sweep.stability,
            "overlap": sweep.overlap,
            "examples": len(sweep.indices),
        }
        about["layer_shares"] = sweep.layer_shares
    return about


def _detection(columns: Columns, mislabelled: NDArray[Any]) -> dict[str, dict[str, float]]:
    result = {}
    truth = torch.from_numpy(mislabelled)
    for name in SCORE_COLUMNS:
        if name in columns and np.isfinite(columns[name]).any():
            scores = torch.from_numpy(columns[name].astype(np.float64))
            result[name] = mislabel_detection(-scores if name in LOW_IS_SUSPICIOUS else scores, truth)
    return result


def _fingerprint(gradients: ExampleGradients, columns: Columns) -> dict[str, str]:
    """Tell which model and data an audit is about: digests of parameter names and shapes, and of indices and labels."""
    shapes = [(name, tuple(p.shape)) for name, p in gradients.module.named_parameters()]
    labels = columns["label"].tobytes() if "label" in columns else b""
    return {
        "model": f"{type(gradients.module).__name__} {hashlib.sha256(repr(shapes).encode()).hexdigest()[:16]}",
        "data": f"{type(gradients.source.dataset).__name__} "
        f"{hashlib.sha256(columns['index'].tobytes() + labels).hexdigest()[:16]}",
    }


def _described(curvature: Curvature) -> dict[str, Any]:
    """Return what the manifest keeps about a fitted curvature."""
    described: dict[str, Any] = {
        "labels": curvature.labels,
        "examples": curvature.examples,
        "damping": dict(curvature.dampings),
    }
    if curvature.solves:
        described["solves"] = [
            {
                "systems": len(solve.steps),
                "converged": int(solve.converged.sum()),
                "steps": int(solve.steps.max()),
                "residual": float(solve.residual.max()),
                "products": solve.products,
            }
            for solve in curvature.solves
            if len(solve.steps)
        ]
    return described


def _notes(inspection: Inspection, recording: Recording) -> list[str]:
    notes = []
    if not inspection.tapped:
        notes.append(
            "no known loss call (F.cross_entropy, F.nll_loss, F.binary_cross_entropy_with_logits, F.mse_loss) "
            "accounts for the whole loss: empirical Fisher, and no predictions, margins or suggested labels from it"
        )
    notes += recording.remarks()
    if inspection.random:
        notes.append(
            "`training_step` draws random numbers in eval mode: scores hold for one draw, and depend on batches"
        )
    return notes


def _put_back(gradients: ExampleGradients) -> list[str]:
    """Return what extra passes would have changed."""
    found = (
        ("the step", isolation.changes_in(gradients.module), "every batch starts where training stood"),
        ("fetching examples", list(gradients.source.changed), "training does not notice"),
    )
    return [
        f"{who} changes {', '.join(paths[:_MOST_PATHS])}{f' and {more} more' if more > 0 else ''}: extra passes put "
        f"that back, so that {purpose}"
        for who, paths, purpose in found
        if paths
        for more in (len(paths) - _MOST_PATHS,)
    ]


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _size(size: int) -> str:
    return f"{size / 2**20:.0f} MB" if size < 2**30 else f"{size / 2**30:.1f} GB"


def _usable_names(names: list[str] | None, columns: Columns) -> list[str] | None:
    """Class names only if there is one for every label in the table."""
    if names is None:
        return None
    labels = [int(columns[name].max()) for name in ("label", "predicted", "suggested") if name in columns]
    return names if max(labels, default=-1) < len(names) else None
