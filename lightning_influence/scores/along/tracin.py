"""TracIn of pairs: influence of training examples on queries, summed over kept checkpoints (Pruthi et al. 2020).

``score(z → q) = Σ_t ∇ℓ(q; θ_t)ᵀ η_t P_t ∇ℓ(z; θ_t)`` with the step sizes ``η_t`` of every parameter and what an
adaptive optimizer multiplies gradients with, ``P_t`` (see ``tracin``). In place of an inverse curvature, the gradient
of a query is multiplied with ``η_t P_t``; all else is a pass of pairwise scores at the weights of each checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_influence.core.precision import wide
from lightning_influence.curvature.curvature import Curvature, Scorer
from lightning_influence.gradients.capture import LayerIO
from lightning_influence.gradients.passes import ExampleGradients
from lightning_influence.layers import per_sample
from lightning_influence.layers.blocks import ParameterBlock
from lightning_influence.scores.pairs import PairwiseScores, pairwise_scores
from lightning_influence.training import step_sizes as tracin
from lightning_influence.training.checkpoints import Checkpoint, check_together
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
    total: PairwiseScores | None = None
    notes: dict[str, None] = {}
    for checkpoint in checkpoints:
        with checkpoint.loaded(gradients.module):
            steps = Steps.of(checkpoint, gradients)
            scores = pairwise_scores(gradients, indices, steps, queries, query_indices, by_layer=by_layer)
        notes |= dict.fromkeys(scores.notes)
        if total is None:
            total = scores
            continue
        total.scores.add_(scores.scores)
        for name, part in (total.parts or {}).items():
            part.add_((scores.parts or {})[name])
    assert total is not None
    total.notes[:] = notes
    return total


class Steps(Curvature):
    """The step sizes of one checkpoint in the place of an inverse curvature: ``(C + λ)⁻¹ = η P``.

    Args:
        blocks: The covered parameters.
        step_sizes: Of every block.
    """

    def __init__(self, blocks: Mapping[str, ParameterBlock], step_sizes: Mapping[str, StepSize]) -> None:
        super().__init__("tracin", dict.fromkeys(blocks, 0.0), ("true",), (0,))
        self._blocks = dict(blocks)
        self._step_sizes = dict(step_sizes)

    @classmethod
    def of(cls, checkpoint: Checkpoint, gradients: ExampleGradients) -> Steps:
        """Return the steps that a checkpoint stands for.

        Args:
            checkpoint: The checkpoint.
            gradients: Passes over the model.
        """
        blocks, device = gradients.coverage.blocks, gradients.device
        scales = {name: value.to(device) for name, value in checkpoint.preconditioner.items()}
        return cls(blocks, block_step_sizes(blocks, checkpoint.step_sizes, gradients.module, scales))

    @property
    def blockwise(self) -> None:
        """None: there is no curvature to speak of."""
        return None

    def solve(self, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return ``η P v``, block by block: name -> ``[..., k, o, i]``."""
        return {name: self._multiplied(name, v) for name, v in vectors.items()}

    def scorer(self, n: int) -> Scorer:
        """Return what adds up ``gᵀ η P g`` of ``n`` examples."""
        return _StepScorer(self, n)

    def tensors(self) -> dict[str, tuple[dict[str, Tensor], dict[str, str]]]:
        """Return nothing: the checkpoint is in the store."""
        return {}

    def self_influence(self, io: LayerIO, norms: Tensor) -> Tensor:
        """Return one block's part of ``gᵀ η P g``, ``[n]``."""
        return tracin.self_influence(io, norms, self._blocks[io.name].bias_columns, self._step_sizes[io.name])

    def _multiplied(self, name: str, v: Tensor) -> Tensor:
        size, bias = self._step_sizes[name], self._blocks[name].bias_columns
        if isinstance(size, Tensor):
            return v * size.to(v)
        result = v * size[0]
        if bias is not None:
            result[..., bias] = v[..., bias] * size[1]
        return result


class _StepScorer(Scorer):
    def __init__(self, steps: Steps, n: int) -> None:
        self._steps, self._n = steps, n
        self._parts: dict[str, Tensor] = {}

    def add(self, io: LayerIO, query: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        norms = per_sample.squared_norms(io.activations[0] if query is None else io.x, io.gs[0])
        self._parts[io.name] = self._steps.self_influence(io, norms)
        return norms, None if query is None else per_sample.inner_products(io.x, io.gs[0], query)

    def self_influence(self) -> Tensor:
        parts = [wide(part) for part in self._parts.values()]
        return torch.stack(parts).sum(0) if parts else torch.zeros(self._n, dtype=torch.float64)

    def parts(self) -> dict[str, Tensor]:
        return dict(self._parts)
