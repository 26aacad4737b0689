"""What a cell of ``make detection`` is judged by: numbers, given the labels that are right."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import torch
from detection_cells import Cell
from detection_data import Noisy, noisy
from numpy.typing import NDArray
from torch.utils.data import TensorDataset

from lightning_influence import AuditReport
from lightning_influence.audit.columns import scored
from lightning_influence.metrics import mislabel_detection

Mask = NDArray[np.bool_]
Scores = dict[str, Any]

# What the ranking is, under other names: no rivals of it.
_OWN = {"suspicion", "support", "rank", "wrong_probability"}
_BINS = 15


def average_precision(scores: NDArray[Any], wrong: Mask) -> float:
    """Return the average precision of scores that are high for wrong labels; NaN without any or with nothing else."""
    if wrong.all() or not wrong.any():
        return math.nan
    return mislabel_detection(torch.from_numpy(scores), torch.from_numpy(wrong))["average_precision"]


def found(flagged: Mask, wrong: Mask) -> Scores:
    """Return how many are flagged, precision, recall, F1, and the share of the right labels that are flagged.

    Without wrong labels there is no recall and no F1; without flags no precision, and the F1 is 0.

    >>> found(np.array([True, True, False, False]), np.array([True, False, True, False]))
    {'n': 2, 'precision': 0.5, 'recall': 0.5, 'f1': 0.5, 'false_alarms': 0.5}
    """
    hits, n, truly = int((flagged & wrong).sum()), int(flagged.sum()), int(wrong.sum())
    return {
        "n": n,
        "precision": hits / n if n else math.nan,
        "recall": hits / truly if truly else math.nan,
        "f1": 2 * hits / (n + truly) if truly else math.nan,
        "false_alarms": (n - hits) / max(1, len(wrong) - truly),
    }


def calibration(probability: NDArray[np.float64], wrong: Mask) -> tuple[float, float]:
    """Return the expected calibration error, in 15 bins of equal width, and the Brier score; NaNs are left out.

    >>> calibration(np.array([0.0, 0.5, 0.5, 1.0]), np.array([False, False, True, True]))
    (0.0, 0.125)
    """
    known = np.isfinite(probability)
    p, y = probability[known], wrong[known].astype(float)
    bins = np.minimum((p * _BINS).astype(int), _BINS - 1)
    gaps = np.bincount(bins, p, _BINS) - np.bincount(bins, y, _BINS)
    return float(np.abs(gaps).sum() / max(1, len(p))), float(((p - y) ** 2).mean()) if len(p) else math.nan


def damage(labels: NDArray[np.int64], data: Noisy) -> float:
    """Return the share of right labels with other labels minus the share before: below 0 they did harm."""
    return float((labels == data.true).mean() - (data.given == data.true).mean())


def missed(suspicion: NDArray[Any], wrong: Mask, rate: float) -> float:
    """Return the share of the wrong labels that are not among the ``rate`` most suspicious ones."""
    top = np.argsort(-suspicion, kind="stable")[: round(rate * len(wrong))]
    return 1 - float(wrong[top].sum()) / int(wrong.sum()) if wrong.any() else math.nan


def of_audit(report: AuditReport, data: Noisy, train: TensorDataset) -> Scores:
    """Return what the audit of a cell is worth.

    Args:
        report: The audit.
        data: With the true labels.
        train: What was audited.
    """
    columns, told = report.columns, report.manifest.get("labels") or {}
    wrong = data.wrong
    if not np.array_equal(columns["index"], np.arange(len(wrong))):
        raise ValueError(f"the audit has {len(columns['index'])} examples, the training data {len(wrong)}")
    precisions = {k: average_precision(v, wrong) for k, v in scored(columns).items() if k not in _OWN}
    best = max(precisions, key=lambda name: precisions[name]) if wrong.any() else ""
    flagged = columns["candidate"].astype(bool)
    suspicion = -columns["rank"].astype(float)
    result = {
        "examples": len(wrong),
        "wrong": int(wrong.sum()),
        "ap": average_precision(suspicion, wrong),
        "best_column": best,
        "best_column_ap": precisions.get(best, math.nan),
        "f1_true_number": 1 - missed(suspicion, wrong, float(wrong.mean())),
        "verdict": told.get("verdict", ""),
        "reason": told.get("reason", ""),
    } | found(flagged, wrong)
    for name in ("noise_rate", "noise_rate_low", "noise_rate_high"):
        result[name] = math.nan if told.get(name) is None else float(told[name])
    rate = result["noise_rate"]
    result["fnr"] = missed(suspicion, wrong, rate) if math.isfinite(rate) else math.nan
    true = flagged & wrong
    right = columns["suggested"][true] == data.true[true]
    result["suggested_right"] = float(right.mean()) if true.any() else math.nan
    result["ece"], result["brier"] = math.nan, math.nan
    if "wrong_probability" in columns:
        result["ece"], result["brier"] = calibration(columns["wrong_probability"].astype(float), wrong)
    return result | _acting(report, data, train)


def _acting(report: AuditReport, data: Noisy, train: TensorDataset) -> Scores:
    """Return what acting on the report by default does to the labels."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        relabelled = report.relabelled(train)
        kept = np.asarray(report.clean_indices(), dtype=np.int64)
    labels = np.asarray([int(relabelled[i][1]) for i in range(len(data.given))])
    dropped = np.ones(len(labels), dtype=bool)
    dropped[kept] = False
    right = ~data.wrong
    return {
        "damage": damage(labels, data),
        "relabelled": int((labels != data.given).sum()),
        "dropped": int(dropped.sum()),
        "right_dropped": float((dropped & right).sum() / right.sum()),
        "damage_dropping": float(right[kept].mean() - right.mean()) if len(kept) else math.nan,
    }


def of_cleanlab(probabilities: NDArray[Any], cell: Cell, seed: int) -> Scores:
    """Return what cleanlab makes of out-of-sample probabilities, with its defaults.

    Args:
        probabilities: ``[n, classes]``, of networks that have not seen the example.
        cell: Whose data were predicted.
        seed: Of the data.
    """
    from cleanlab.count import estimate_joint
    from cleanlab.filter import find_label_issues
    from cleanlab.rank import get_label_quality_scores

    data = noisy(cell, seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        flagged = np.asarray(find_label_issues(data.given, probabilities, n_jobs=1), dtype=bool)
        joint = estimate_joint(data.given, probabilities)
        quality = get_label_quality_scores(data.given, probabilities)
    predicted = probabilities.argmax(1)
    true = flagged & data.wrong
    return {
        "ap": average_precision(-quality, data.wrong),
        "noise_rate": 1 - float(np.trace(joint)),
        "damage": damage(np.where(flagged, predicted, data.given), data),
        "suggested_right": float((predicted[true] == data.true[true]).mean()) if true.any() else math.nan,
    } | found(flagged, data.wrong)
