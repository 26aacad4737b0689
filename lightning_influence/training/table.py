"""The table of a run: one row per example, one column per score that training and the passes tell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from lightning_influence.core.precision import exact
from lightning_influence.gradients.visitors import ExampleScores
from lightning_influence.training.dynamics import TrainingDynamics, margin_of_label
from lightning_influence.training.evidence import LabelEvidence
from lightning_influence.training.neighbours import NeighbourRecord, nearest_examples
from lightning_influence.training.tracin import TracInScores, VisitSums


def table(
    indices: Sequence[int],
    dynamics: TrainingDynamics,
    tracin: TracInScores,
    visits: VisitSums | None,
    neighbours: NeighbourRecord,
    evidence: LabelEvidence | None = None,
    scores: ExampleScores | None = None,
) -> dict[str, NDArray[Any]]:
    """Return all columns for some examples.

    Args:
        indices: Dataset indices, ``n`` of them.
        dynamics: Of the run.
        tracin: From passes at checkpoints.
        visits: In flight, if that is how TracIn is computed.
        neighbours: What they have said.
        evidence: What they have said of these examples in the first epochs.
        scores: Of the final pass, over the same examples.

    Returns:
        Column name to ``[n]``.
    """
    rows = torch.as_tensor(list(indices), dtype=torch.long)
    columns: dict[str, Tensor] = {"index": rows}
    columns |= {name: values[rows] for name, values in dynamics.columns().items()}
    finite = torch.ones(len(rows), dtype=torch.bool)
    if tracin.checkpoints:
        columns["tracin"] = tracin.values[rows]
        finite &= torch.isfinite(columns["tracin"])
    if visits is not None:
        columns["tracin"] = visits.values()[rows]
        finite &= torch.isfinite(columns["tracin"]) | visits.unmeasured[rows]
    if (disagreement := neighbours.disagreement) is not None:
        columns["neighbour_disagreement"] = disagreement[rows]
    if (probabilities := dynamics.mean_probabilities()) is not None:
        # Where a network soon knows wrong labels by heart, its mean prediction stands up for them; its features
        # are slower to forget what the examples look like.
        told = neighbours.votes(probabilities.shape[1])[rows]
        if evidence is not None:
            late = evidence.late[:, : told.shape[1]].to(told)  # of as many classes as labels name
            known = late.sum(1) > 0
            told[known] = F.pad(late, (0, told.shape[1] - late.shape[1]))[known]
        shares = probabilities[rows] + told
        columns["support"], columns["suggested"] = margin_of_label(shares, columns["label"])
    if "nonfinite" in dynamics.sums:
        finite &= dynamics.sums["nonfinite"][rows] == 0
    if scores is not None:
        final = {
            name: (exact(values) if values.is_floating_point() else values).cpu()
            for name, values in scores.columns.items()
            if name != "tracin"
        }
        finite &= final.pop("finite")
        if scores.features is not None:
            near, cosines, copies = nearest_examples(scores.features)
            columns["nearest"] = torch.where(near >= 0, rows[near], -1)
            columns |= {"nearest_cosine": cosines, "near_duplicate": copies}
        columns |= final
        if "suggested" not in columns and "predicted" in columns:
            # No mean over the run was kept (too many classes): the final prediction will have to do.
            contradicts = columns["predicted"] != columns["label"]
            columns["suggested"] = torch.where(contradicts, columns["predicted"], -1)
    columns["finite"] = finite
    return {name: np.asarray(values) for name, values in columns.items()}
