"""The numbers of an audit as a whole: the few that runs are compared by, and a table of all."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lightning_influence.audit.words import number_text
from lightning_influence.loggers.exhibits import Table


def compared_numbers(manifest: Mapping[str, Any], candidates: int) -> dict[str, float]:
    """Return what a person compares over runs, for the loggers' own way with numbers: unknown ones are left out.

    Args:
        manifest: Of the audit.
        candidates: How many examples are proposed for review.
    """
    detected = manifest.get("detection", {}).get("suspicion", {})
    numbers = {
        "coverage": manifest["coverage"]["share"],
        # Not "candidates": TensorBoard serves one kind of data per tag, and the pictures have that one.
        "candidate_count": candidates,
        "noise_rate": manifest.get("labels", {}).get("noise_rate"),
        "detection/suspicion_auroc": detected.get("auroc"),
    }
    return {name: float(value) for name, value in numbers.items() if value is not None and math.isfinite(value)}


def summary_table(manifest: Mapping[str, Any], numbers: Mapping[str, float]) -> Table:
    """Return everything that there is one number of.

    Args:
        manifest: Of the audit.
        numbers: What else to list.
    """
    labels, curvature = manifest.get("labels", {}), manifest["curvature"]
    told = {name: number_text(value) for name, value in numbers.items()}
    told |= {
        f"noise_rate, {name}": number_text(labels[end])
        for name, end in (("at least", "low"), ("at most", "high"))
        if labels.get(end) is not None
    }
    told |= {"curvature": str(curvature["name"]), "damping": str(curvature["damping_rule"])}
    told |= {f"seconds, {name}": number_text(value) for name, value in manifest["seconds"].items()}
    return Table("influence/summary", ("quantity", "value"), list(told.items()), "**The audit in numbers**")


def detection_table(manifest: Mapping[str, Any]) -> Table:
    """Return how well each column finds the labels that are known to be wrong."""
    keys = {"auroc": "AUROC", "average_precision": "average precision", "recall_at": "recall in the first 10 %"}
    rows = [[name, *(float(found[key]) for key in keys)] for name, found in manifest["detection"].items()]
    head = "**Against the known label noise**"
    return Table("influence/detection", ("column", *keys.values()), rows, head)
