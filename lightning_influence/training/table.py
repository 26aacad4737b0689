"""The table of a run: one row per example, one column per score that training and the passes tell."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from lightning_influence.core.indices import Indices
from lightning_influence.core.precision import exact
from lightning_influence.gradients.visitors import ExampleScores
from lightning_influence.training.class_shares import ClassShares
from lightning_influence.training.dynamics import TrainingDynamics, margin_of_label
from lightning_influence.training.evidence import LabelEvidence
from lightning_influence.training.example_sums import in_blocks
from lightning_influence.training.neighbours import NeighbourRecord, nearest_examples
from lightning_influence.training.tracin import TracInScores, VisitSums


def table(
    indices: Indices,
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
    rows = torch.as_tensor(indices, dtype=torch.long)
    columns: dict[str, Tensor] = {"index": rows}
    columns |= dynamics.columns(rows)
    finite = torch.ones(len(rows), dtype=torch.bool)
    if tracin.checkpoints:
        columns["tracin"] = tracin.values[rows]
        finite &= torch.isfinite(columns["tracin"])
    if visits is not None:
        columns["tracin"] = visits.values()[rows]
        finite &= torch.isfinite(columns["tracin"]) | visits.unmeasured[rows]
    if (disagreement := neighbours.disagreement) is not None:
        columns["neighbour_disagreement"] = disagreement[rows]
    if dynamics.probabilities.classes:
        late = None if evidence is None else evidence.late
        columns["support"], columns["suggested"] = _supported(rows, columns["label"], dynamics, neighbours, late)
    if "nonfinite" in dynamics.sums:
        finite &= dynamics.sums["nonfinite"][rows] == 0
    if scores is not None:
        final = {
            name: (exact(values) if values.is_floating_point() else values).cpu()
            for name, values in scores.columns.items()
            if name != "tracin"
        }
        finite &= final.pop("finite")
        columns |= final
        if "suggested" not in columns and "predicted" in columns:
            # Of what training has said nothing was heard: the final prediction will have to do.
            contradicts = columns["predicted"] != columns["label"]
            columns["suggested"] = torch.where(contradicts, columns["predicted"], -1)
    columns["finite"] = finite
    return {name: np.asarray(values) for name, values in columns.items()}


def nearest_columns(scores: ExampleScores) -> dict[str, NDArray[Any]]:
    """Return what the features of the final pass tell of near duplicates; they are not needed any more then."""
    if scores.features is None:
        return {}
    near, cosines, copies = nearest_examples(scores.features, device=scores.indices.device)
    nearest = torch.where(near >= 0, scores.indices.cpu()[near], -1)
    return {"nearest": nearest.numpy(), "nearest_cosine": cosines.numpy(), "near_duplicate": copies.numpy()}


def _supported(
    rows: Tensor, labels: Tensor, dynamics: TrainingDynamics, neighbours: NeighbourRecord, late: ClassShares | None
) -> tuple[Tensor, Tensor]:
    """Return how far the run and the neighbours are for the given labels, and the best of the other classes.

    Where a network soon knows wrong labels by heart, its mean prediction stands up for them; its features are slower to
    forget what the examples look like.
    """
    margins, best = torch.empty(len(rows), dtype=torch.float64), torch.empty_like(labels)
    places = torch.arange(len(rows))
    for at, given, place, margin, other in in_blocks(rows, labels, places, margins, best):
        probabilities = dynamics.mean_probabilities(at)
        assert probabilities is not None
        told = neighbours.votes(probabilities.shape[1], at)
        shares = told[:, :0] if late is None else late[place][:, : told.shape[1]].to(told)  # as labels name
        known = shares.sum(1) > 0
        told[known] = F.pad(shares, (0, told.shape[1] - shares.shape[1]))[known]
        for column, values in zip((margin, other), margin_of_label(probabilities + told, given), strict=True):
            column.copy_(values)
    return margins, best
