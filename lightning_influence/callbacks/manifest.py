"""What a manifest says about an audit: data, model, scores, and what a reader should know."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from numpy.typing import NDArray

from lightning_influence.audit.columns import scored
from lightning_influence.audit.ranking import ingredients
from lightning_influence.core import isolation
from lightning_influence.core.weights import parameters_of
from lightning_influence.curvature import Curvature
from lightning_influence.data.stream import StreamSource
from lightning_influence.gradients.coverage import listed
from lightning_influence.gradients.passes import ExampleGradients
from lightning_influence.gradients.verify import Inspection
from lightning_influence.influence.directory import fitted_on
from lightning_influence.influence.examined import ExaminedModel
from lightning_influence.metrics import mislabel_detection
from lightning_influence.scores.plan import InfluencePlan, InfluenceScores

Columns = dict[str, NDArray[Any]]

# Which hook of the module is running, and the loggers that stand in for the user's.
_OF_LIGHTNING = ("_current_fx_name", "trainer['_loggers']")


def audit_described(
    gradients: ExampleGradients, plan: InfluencePlan, inspection: Inspection, result: InfluenceScores, columns: Columns
) -> dict[str, Any]:
    """Return what the manifest says about data, model and scores."""
    coverage, curvature, sweep = gradients.coverage, result.curvature, result.sweep
    about: dict[str, Any] = {
        "examples": len(columns["index"]),
        "dataset_size": len(gradients.source),
        "nonfinite": columns["index"][~columns["finite"]],
        "fingerprint": _fingerprint(gradients, columns),
        "ranked_by": list(ingredients(columns)),
        "coverage": {
            "share": coverage.share,
            "summary": coverage.describe(),
            "covered": {name: list(block.parameters) for name, block in coverage.blocks.items()},
            "uncovered": coverage.uncovered,
        },
        "curvature": {
            "name": plan.curvature,
            "damping_rule": plan.damping.rule,
            "damping_from": plan.damping.source,
        }
        | ({} if curvature is None else _described(curvature)),
        "verification_error": inspection.largest_error,
        "seconds": result.seconds,
    } | fitted_on(ExaminedModel.of(gradients, inspection, columns["index"].tolist()))
    if isinstance(gradients.source, StreamSource):
        about["stream"] = True  # indices say in which order examples came
    if sweep is not None:
        about["damping_sweep"] = {
            "factors": sweep.factors,
            "stability": sweep.stability,
            "overlap": sweep.overlap,
            "examples": len(sweep.indices),
        }
        about["layer_shares"] = sweep.layer_shares
    return about


def detection_of(columns: Columns, mislabelled: NDArray[Any]) -> dict[str, dict[str, float]]:
    """Tell how well each score finds the labels that are known to be wrong."""
    truth = torch.from_numpy(mislabelled)
    return {name: mislabel_detection(torch.from_numpy(scores), truth) for name, scores in scored(columns).items()}


def _fingerprint(gradients: ExampleGradients, columns: Columns) -> dict[str, str]:
    """Tell which model and data an audit is about: digests of parameter names and shapes, and of indices and labels."""
    shapes = [(name, tuple(p.shape)) for name, p in parameters_of(gradients.module).items()]
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


def put_back(gradients: ExampleGradients) -> list[str]:
    """Return what extra passes would have changed."""
    own = [path for path in isolation.changes_in(gradients.module) if not path.endswith(_OF_LIGHTNING)]
    found = (
        ("the step", own, "every batch starts where training stood"),
        ("fetching examples", list(gradients.source.changed), "training does not notice"),
    )
    return [
        f"{who} changes {listed(paths)}: extra passes put that back, so that {purpose}"
        for who, paths, purpose in found
        if paths
    ]
