"""TracIn of pairs: influence of training examples on queries, summed over kept checkpoints (Pruthi et al. 2020).

``score(z → q) = Σ_t ∇ℓ(q; θ_t)ᵀ η_t P_t ∇ℓ(z; θ_t)`` with the step sizes ``η_t`` of every parameter and what an
adaptive optimizer multiplies gradients with, ``P_t`` (see ``step_sizes``). In place of an inverse curvature, the
gradient of a query is multiplied with ``η_t P_t``; all else is a pass of pairs at the weights of each checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence

from lightning_influence.gradients.passes import ExampleGradients
from lightning_influence.scores.pairs import PairSum, PairwiseScores
from lightning_influence.training.checkpoints import Checkpoint, check_step_sizes, check_together
from lightning_influence.training.step_sizes import block_step_sizes


def tracin_scores(
    gradients: ExampleGradients,
    indices: Sequence[int],
    queries: ExampleGradients,
    query_indices: Sequence[int],
    checkpoints: Sequence[Checkpoint],
    *,
    by_layer: bool = False,
) -> PairwiseScores:
    """Score every query with every training example, along the training.

    Every checkpoint takes a pass over the queries and one over the training data.

    Args:
        gradients: Passes over the training data, of the trained model; its weights are put back afterwards.
        indices: The training examples; one that is named twice counts once.
        queries: Passes over the queries' data, with the model and coverage of the training data; the loss is scaled
            as theirs.
        query_indices: The queries.
        checkpoints: Of the run, see ``AuditReport.checkpoints``; read one at a time.
        by_layer: Whether to give each layer's part of the scores, too.

    Returns:
        All scores, on the host; the same on every process. Positive for proponents, whose steps have lowered the
        query's loss; the diagonal of a query among the training examples is TracIn's self-influence.

    Raises:
        CheckpointError: If there is no checkpoint, or they are not of one run of this model.
        ValueError: As ``pairwise_scores``.
        QueryError: If the training task can't be run on the queries.

    Example:
        >>> report = AuditReport.load("lightning_logs/version_0/influence")
        >>> tracin_scores(training, range(1000), validation, range(10), report.checkpoints())
    """
    check_together(checkpoints, gradients.module)
    check_step_sizes(checkpoints)
    blocks = gradients.coverage.blocks
    total = PairSum(gradients, indices, queries, query_indices, layers=list(blocks) if by_layer else ())
    for checkpoint in checkpoints:
        with checkpoint.loaded(gradients.module):
            sizes = block_step_sizes(blocks, checkpoint.step_sizes, gradients.module, checkpoint.preconditioner)
            for rows, asked in total.prepared():
                total.add(rows, asked.turned({name: v * sizes[name] for name, v in asked.vectors.items()}))
    return total.result()
