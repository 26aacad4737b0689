"""Numbers of all examples as histograms and precision-recall curves.

A ``writer`` is a TensorBoard ``SummaryWriter``.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lightning_influence.audit.columns import Columns, scored
from lightning_influence.core.ranks import average_ranks

# The dashboard draws 30 bars whatever it is given; somewhat more source bins keep its re-binning smooth.
_BINS = 40


def write_histogram(writer: Any, tag: str, values: NDArray[Any], step: int) -> None:
    """Write the histogram of log10 of the positive finite values under ``<tag>/log10``.

    Influence scores span many decades: a plain histogram is a single bar at zero. Values that have no logarithm are
    counted in scalars ``<tag>/zero``, ``<tag>/negative`` and ``<tag>/non_finite``, each written only when it is not 0.
    With no positive finite value there is no histogram.

    Args:
        writer: Event file writer.
        tag: The quantity, for example ``influence/self_influence``.
        values: ``[n]``, may be empty.
        step: Global step.
    """
    values = np.asarray(values, dtype=np.float64)
    finite = values[np.isfinite(values)]
    left_out = {"zero": (finite == 0).sum(), "negative": (finite < 0).sum(), "non_finite": values.size - finite.size}
    for reason, count in left_out.items():
        if count:
            writer.add_scalar(f"{tag}/{reason}", float(count), step)
    logs = np.log10(finite[finite > 0])
    if logs.size:
        writer.add_histogram(f"{tag}/log10", logs, step, _bin_edges(logs))


def write_detection(writer: Any, columns: Columns, mislabelled: NDArray[np.bool_], step: int) -> None:
    """Write how well every score column finds known label noise: a precision-recall curve ``influence/detection/<c>``.

    The thresholds of a curve are not scores but ``1 - sqrt(share of the ranking above)``: the dashboard offers 127
    evenly spaced ones, and with a few percent of label noise everything of interest happens at the top of the ranking.

    Args:
        writer: Event file writer.
        columns: The scores table, ``n`` rows. NaN scores rank last.
        mislabelled: ``[n]``, true where the label is known to be wrong.
        step: Global step.
    """
    count = len(mislabelled)
    for name, scores in scored(columns).items():
        ranks = average_ranks(torch.from_numpy(np.nan_to_num(scores, nan=-np.inf, posinf=np.inf, neginf=-np.inf)))
        predictions = 1 - ((count - ranks) / (count - 1)).sqrt()
        writer.add_pr_curve(f"influence/detection/{name}", mislabelled, predictions.numpy(), step)


def _bin_edges(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return edges on multiples of a round width, so that histograms of several steps share them."""
    low, high = float(values.min()), float(values.max())
    # Equal values still get a bin of a hundredth of a decade instead of an infinitely thin one.
    wanted = max((high - low) / _BINS, 0.01)
    power = 10.0 ** math.floor(math.log10(wanted))
    width = power * next(step for step in (1, 2, 5, 10) if step * power >= wanted * (1 - 1e-9))
    return np.arange(math.floor(low / width), math.floor(high / width) + 2, dtype=np.float64) * width
