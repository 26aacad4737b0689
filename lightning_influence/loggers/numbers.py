"""Numbers of all examples as histograms and precision-recall curves."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lightning_influence.audit.columns import Columns, scored
from lightning_influence.core.ranks import average_ranks
from lightning_influence.loggers.exhibits import Curve, Histogram

# The dashboard draws 30 bars whatever it is given; somewhat more source bins keep its re-binning smooth.
_BINS = 40


def log_histogram(tag: str, values: NDArray[Any]) -> tuple[list[Histogram], dict[str, int]]:
    """Return the histogram of log10 of the positive finite values, and how many values have no logarithm.

    Influence scores span many decades: a plain histogram is a single bar at zero.

    Args:
        tag: The quantity, for example ``influence/self_influence``; the histogram is ``<tag>/log10``.
        values: ``[n]``, may be empty.

    Returns:
        The histogram, none if there is no positive finite value; numbers of values that are ``zero``, ``negative`` and
        ``non-finite``, those only that are not 0.
    """
    values = np.asarray(values, dtype=np.float64)
    finite = values[np.isfinite(values)]
    left_out = {"zero": (finite == 0).sum(), "negative": (finite < 0).sum(), "non-finite": values.size - finite.size}
    logs = np.log10(finite[finite > 0])
    drawn = [Histogram(f"{tag}/log10", logs, _bin_edges(logs))] if logs.size else []
    return drawn, {reason: int(count) for reason, count in left_out.items() if count}


def detection_curves(columns: Columns, mislabelled: NDArray[np.bool_]) -> Iterator[Curve]:
    """Yield how well every score column finds known label noise, ``influence/detection/<column>``.

    The thresholds of a curve are not scores but ``1 - sqrt(share of the ranking above)``: TensorBoard offers 127
    evenly spaced ones, and with a few percent of label noise everything of interest happens at the top of the ranking.

    Args:
        columns: The scores table, ``n`` rows. NaN scores rank last.
        mislabelled: ``[n]``, true where the label is known to be wrong.
    """
    count = len(mislabelled)
    for name, scores in scored(columns).items():
        ranks = average_ranks(torch.from_numpy(np.nan_to_num(scores, nan=-np.inf, posinf=np.inf, neginf=-np.inf)))
        predictions = 1 - ((count - ranks) / (count - 1)).sqrt()
        yield Curve(f"influence/detection/{name}", mislabelled, predictions.numpy())


def _bin_edges(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return edges on multiples of a round width, so that histograms of several steps share them."""
    low, high = float(values.min()), float(values.max())
    # Equal values still get a bin of a hundredth of a decade instead of an infinitely thin one.
    wanted = max((high - low) / _BINS, 0.01)
    power = 10.0 ** math.floor(math.log10(wanted))
    width = power * next(step for step in (1, 2, 5, 10) if step * power >= wanted * (1 - 1e-9))
    return np.arange(math.floor(low / width), math.floor(high / width) + 2, dtype=np.float64) * width
