"""Z0-Inf: influence from losses at successive checkpoints, forward passes only (Kokhlikyan et al. 2025, 2510.11832).

From one checkpoint to the next the weights move by ``Δ_t`` and the loss of an example by ``δ_t(z)``. The smallest
gradient that explains both is ``ĝ_t(z) = δ_t(z) Δ_t / ‖Δ_t‖²``, and TracIn with it in place of the gradient is

``score(z → q) = Σ_t η_t ĝ_t(q)·ĝ_t(z) = Σ_t η_t δ_t(q) δ_t(z) / ‖Δ_t‖²``.

This is a reconstruction from the paper's idea, not its code. The step sizes are our addition, as TracIn has them; where
they differ between parameters, or an Adam-like optimizer scales each entry, ``‖Δ_t‖² / η_t`` becomes
``Σ_p Δ_p² / (η_p P_p)``. All that is seen of a gradient is its part along the path of training.

Index legend: ``t`` checkpoints, ``q`` queries, ``n`` training examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from itertools import pairwise

import torch
from torch import Tensor

from lightning_influence.core.precision import exact
from lightning_influence.gradients.attempts import Attempt
from lightning_influence.gradients.passes import ExampleGradients
from lightning_influence.gradients.visitors import ExampleColumns, in_order
from lightning_influence.objective.terms import TaskError
from lightning_influence.scores.pairs import PairwiseScores, distinct
from lightning_influence.scores.queries import check_pairs
from lightning_influence.training.checkpoints import Checkpoint, CheckpointError, check_together


def z0_scores(
    gradients: ExampleGradients,
    indices: Sequence[int],
    queries: ExampleGradients,
    query_indices: Sequence[int],
    checkpoints: Sequence[Checkpoint],
) -> PairwiseScores:
    """Score every query with every training example by how their losses move together.

    Args:
        gradients: Passes over the training data; no gradient is computed.
        indices: The training examples; one that is named twice counts once.
        queries: Passes over the queries' data, with the model and coverage of the training data.
        query_indices: The queries.
        checkpoints: Of one run, in the order of training, two at least; the starting weights may be the first.

    Returns:
        All scores, on the host; the same on every process; positive for proponents; NaN where a loss is not finite.

    Raises:
        CheckpointError: If the checkpoints are of another model or run, or two successive ones hold the same weights.
        TaskError: If the task does not tell the losses of examples apart.
        ValueError: If training data and queries do not go together.
    """
    check_pairs(gradients, indices, queries, query_indices)
    check_together(checkpoints, gradients.module)
    weights = _weights(checkpoints)
    _, own = loss_paths(gradients, indices, checkpoints)
    asked = torch.tensor(list(query_indices), dtype=torch.long)
    order, theirs = loss_paths(queries.like(gradients), query_indices, checkpoints)
    moves = theirs.diff(dim=0)[:, torch.searchsorted(order, asked)]  # tq
    scores = (weights.unsqueeze(1) * moves).T @ own.diff(dim=0)
    # NaN only where a loss is unknown: a product of infinite moves would be one, or an infinite score.
    unknown = ~torch.isfinite(moves).all(0).unsqueeze(1) | ~torch.isfinite(own).all(0)
    return PairwiseScores(asked, distinct(indices), scores.masked_fill(unknown, torch.nan))


def loss_paths(
    gradients: ExampleGradients, indices: Sequence[int], checkpoints: Sequence[Checkpoint]
) -> tuple[Tensor, Tensor]:
    """Return dataset indices ``[n]``, sorted, each once, and the examples' losses at every checkpoint ``[t, n]``.

    Raises:
        TaskError: If the task does not tell the losses of examples apart.
    """
    examples, rows = distinct(indices), []
    for checkpoint in checkpoints:
        columns = ExampleColumns(examples.tolist(), torch.device("cpu"))
        attempt = Attempt()
        passes = gradients.losses(examples.tolist(), title="losses", attempt=attempt)
        with checkpoint.loaded(gradients.module), closing(passes) as batches:
            for own, loss in batches:
                if loss.values is None:
                    raise TaskError(
                        "the losses of the examples are not known: the task returns one number for the batch, and no "
                        "known loss call that it is made of was seen. Pass a task that returns one loss per example."
                    )
                with attempt:
                    columns.add(own, {"losses": loss.values.detach().cpu().double()})
        found, gathered = columns.gathered()
        rows.append(in_order(examples.tolist(), found, gathered["losses"]))
    return examples, torch.stack(rows)


def _weights(checkpoints: Sequence[Checkpoint]) -> Tensor:
    """Return ``η_t / ‖Δ_t‖²`` of successive checkpoints, ``[t]``; the later one knows the steps between them."""
    if len(checkpoints) < 2:
        raise CheckpointError(
            f"{len(checkpoints)} checkpoints; expected two at least, for the way from one to the next."
        )
    return torch.tensor([1 / _squared_length(a, b) for a, b in pairwise(checkpoints)], dtype=torch.float64)


def _squared_length(before: Checkpoint, after: Checkpoint) -> float:
    """Return ``Σ_p Δ_p² / (η_p P_p)``; without step sizes, ``‖Δ‖²``."""
    total = 0.0
    for name, value in after.parameters.items():
        size = after.step_sizes.get(name, 0.0) if after.step_sizes else 1.0
        if size <= 0:  # no optimizer moved it
            continue
        squares = (exact(value) - exact(before.parameters[name])).square()
        if name in after.preconditioner:
            squares = squares / exact(after.preconditioner[name])
        total += float(squares.sum()) / size
    if not total > 0:
        raise CheckpointError(
            f"the checkpoints of the steps {before.step} and {after.step} hold the same weights; leave one of them out."
        )
    return total
