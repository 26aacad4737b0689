"""What labels that are known to be right tell of the others.

A mistake that the network shares is contradicted by nobody. Yet among labels that a person has checked, as few are
suspicious as right ones are; where more of the others are, the surplus is wrong. Two samples are compared, so that
nothing is assumed of the noise or the task: only that those of each class were checked at random.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

# Standard errors by which the share of right labels above each threshold is taken larger than it was counted.
_CAUTION = 1.6
_ROUNDS = 20


def wrong_beside_trusted(suspicion: Floats, trusted: NDArray[np.bool_], labels: NDArray[np.int64]) -> Floats:
    """Return the probability that each label is wrong, given some that are right.

    Of the ``n`` others, ``k`` are at least as suspicious as a threshold; were they right, ``n`` times the share of the
    trusted that are so would be. The surplus as a function of ``k``, made concave, has these probabilities as slopes.
    Classes differ in how suspicious their right labels are: the trusted of each weigh as much as its others.

    Args:
        suspicion: ``[n]``, high is suspicious; finite.
        trusted: Which of the labels are right.
        labels: The labels, from 0, ``[n]``.

    Returns:
        ``[n]``; 0 for the trusted, NaN for the labels of classes of which none is trusted.
    """
    right = np.flatnonzero(trusted)
    checked = np.bincount(labels[right], minlength=int(labels.max()) + 1)
    others = np.flatnonzero(~trusted & (checked[labels] > 0))
    order = others[np.argsort(-suspicion[others], kind="stable")]
    right, n = right[np.argsort(-suspicion[right], kind="stable")], len(order)
    sizes = np.bincount(labels[order], minlength=len(checked))
    weights = (sizes / np.maximum(checked, 1))[labels[right]] / max(n, 1)  # their sum is 1
    # One more than were seen, of the weightiest: what was not seen may be of any class.
    most = weights.max(initial=0.0)
    above = np.searchsorted(-suspicion[right], -suspicion[order], side="right")
    counted = most + np.concatenate([[0.0], np.cumsum(weights)])[above]
    error = np.sqrt(most**2 + np.concatenate([[0.0], np.cumsum(weights**2)])[above])
    share = np.minimum((counted + _CAUTION * error) / (1 + most), 1.0)
    wrong, rate = np.zeros(n), 0.0
    for _ in range(_ROUNDS):
        surplus = np.maximum(np.arange(1, n + 1) - n * (1 - rate) * share, 0.0)
        wrong = _slopes(np.concatenate([[0.0], np.maximum.accumulate(surplus)]))
        before, rate = rate, float(wrong.mean()) if n else 0.0
        if abs(rate - before) < 1e-4:
            break
    result = np.where(trusted, 0.0, np.nan)
    result[order] = wrong
    return result


def _slopes(heights: Floats) -> Floats:
    """Return the slopes of the least concave line above points at 0, 1, ..., between 0 and 1."""
    corners = [0]
    for at in range(1, len(heights)):
        while len(corners) > 1:
            last, before = corners[-1], corners[-2]
            if (heights[last] - heights[before]) * (at - last) > (heights[at] - heights[last]) * (last - before):
                break
            corners.pop()
        corners.append(at)
    steps = np.diff(corners)
    return np.clip(np.repeat(np.diff(heights[corners]) / np.maximum(steps, 1), steps), 0.0, 1.0)
