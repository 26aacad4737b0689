"""TracIn of pairs: influence of training examples on queries, summed over kept checkpoints (Pruthi et al. 2020).

``score(z → q) = Σ_t ∇ℓ(q; θ_t)ᵀ η_t P_t ∇ℓ(z; θ_t)`` with the step sizes ``η_t`` of every parameter and what an
adaptive optimizer multiplies gradients with, ``P_t`` (see ``step_sizes``). In place of an inverse curvature, the
gradient of a query is multiplied with ``η_t P_t``; all else is a pass of pairs at the weights of each checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lightning_influence.gradients.passes import ExampleGradients
from lightning_influence.layers.blocks import ParameterBlock
from lightning_influence.scores.pairs import PairSum, PairwiseScores
from lightning_influence.training.checkpoints import Checkpoint, check_step_sizes, check_together
from lightning_influence.training.step_sizes import StepSize, block_step_sizes


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
            sizes = checkpoint_step_sizes(checkpoint, gradients)
            for rows, asked in total.prepared():
                steps = {name: _step(blocks[name], sizes[name], vector) for name, vector in asked.vectors.items()}
                total.add(rows, asked.turned(steps))
    return total.result()


def checkpoint_step_sizes(checkpoint: Checkpoint, gradients: ExampleGradients) -> dict[str, StepSize]:
    """Return ``η P`` of every block for the steps that a checkpoint stands for, see ``block_step_sizes``.

    Args:
        checkpoint: The checkpoint.
        gradients: Passes over the model.
    """
    scales = {name: value.to(gradients.device) for name, value in checkpoint.preconditioner.items()}
    return block_step_sizes(gradients.coverage.blocks, checkpoint.step_sizes, gradients.module, scales)


def _step(block: ParameterBlock, size: StepSize, vector: Tensor) -> Tensor:
    """Return ``η P v`` of a block, ``[q, k, o, i]``."""
    if isinstance(size, Tensor):
        return vector * size.to(vector)
    result = vector * size[0]
    if block.bias_columns is not None:
        result[..., block.bias_columns] = vector[..., block.bias_columns] * size[1]
    return result
