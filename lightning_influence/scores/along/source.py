"""SOURCE: influence through the steps of training, by segments (Bae et al. 2024, 2405.12186).

Training is cut into segments; within one, the curvature ``C`` and the examples' gradients stand still, and gradient
descent with the step sizes ``τ = Σ η / (1 - momentum)`` has a closed form. An example left out in segment ``l`` moves
the weights by ``1/N r_l`` there, and what comes after turns that into ``1/N Π_{m > l} S_m r_l``:

``score(z → q) = g_qᵀ Σ_l (Π_{m > l} S_m) r_l(z)`` with ``S = exp(-τ C)`` and ``r(z) = (I - exp(-τ C)) C⁻¹ ḡ_z``.

One segment with a large τ gives the influence function ``g_qᵀ C⁻¹ g_z``, a small one ``τ g_qᵀ g_z``, TracIn. There is
no damping: directions without curvature count ``τ``. An L2 term of the loss is curvature, ``C + wd``.

Adam and its kin multiply gradients by a diagonal ``P``, known at the checkpoints. With ``τ = Σ η P`` a diagonal,
``S = exp(-τ C)`` and ``r = τ^½ φ(τ^½ C τ^½) τ^½ ḡ``, ``φ(x) = (1 - exp(-x)) / x``: products with ``C`` are enough for
that (``solve.chebyshev``), and no eigenbasis has to fit both. That ``P`` itself depends on the example is left out.

Measured (LDS on digits, ``benchmarks/lds.py``): one segment .553, three .577, five and ten no more; gradients at the
averaged weights .570; labels sampled once for both passes of EK-FAC .561, true labels .457; block GGN instead of EK-FAC
.668, above its influence function (.641). After Adam (``docs/curvature.md``) one number for ``P`` in each layer, or its
best approximation by a row and a column, came out within .02 of the whole diagonal.

Index legend: ``q`` queries, ``n`` training examples, ``k, o, i`` a block's groups, outputs, inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_influence.core.errors import check_count, short
from lightning_influence.core.precision import wide
from lightning_influence.curvature import BLOCKS, BlockCurvature, Curvature, CurvatureName, FactorExamples, fit
from lightning_influence.curvature.damping import block_means
from lightning_influence.curvature.solve.chebyshev import exponential_mean, matrix_exponential_mean
from lightning_influence.gradients.passes import ExampleGradients, Labels
from lightning_influence.scores.pairs import PairSum, PairwiseScores
from lightning_influence.training.checkpoints import Checkpoint, steps_taken
from lightning_influence.training.step_sizes import StepSize, block_step_sizes

At = Literal["checkpoints", "average"]


@dataclass(frozen=True, eq=False)
class Segment:
    """A stretch of training.

    Attributes:
        checkpoints: Its checkpoints, in the order of training.
        shares: Of its steps, by checkpoint.
        average: Their mean, each weighing as many steps as it stands for, with the step sizes of all.
    """

    checkpoints: tuple[Checkpoint, ...]
    shares: tuple[float, ...]
    average: Checkpoint


def training_segments(moved: Sequence[Checkpoint], count: int) -> list[Segment]:
    """Cut a run into segments of as equally many checkpoints as can be.

    Args:
        moved: See ``steps_taken``.
        count: Number of segments.

    Raises:
        ValueError: If ``count`` is less than 1, or there are fewer checkpoints than segments.
    """
    if check_count("segments", count) > len(moved):
        raise ValueError(
            f"segments={count} with {len(moved)} checkpoints that stand for steps; expected at least 1 segment, and at "
            "least one checkpoint for each."
        )
    ends = [round(len(moved) * (number + 1) / count) for number in range(count)]
    return [_segment(moved[start:end]) for start, end in zip([0, *ends], ends, strict=False)]


def source_scores(
    gradients: ExampleGradients,
    indices: Sequence[int],
    queries: ExampleGradients,
    query_indices: Sequence[int],
    checkpoints: Sequence[Checkpoint],
    *,
    labels: tuple[Labels, Labels],
    segments: int = 3,
    curvature: CurvatureName = "ekfac",
    examples: FactorExamples | None = None,
    weight_decay: float | Mapping[str, float] = 0.0,
    at: At = "checkpoints",
) -> PairwiseScores:
    """Score every query with every training example through the steps of training.

    The curvature of a segment is fitted at its averaged weights. A query's gradient is that at the last checkpoint; it
    is pulled back from segment to segment once, and of it there are two vectors at a time.

    Args:
        gradients: Passes over the training data.
        indices: The training examples; one that is named twice counts once.
        queries: Passes over the queries' data, with the model and coverage of the training data.
        query_indices: The queries.
        checkpoints: Of one run, in the order of training, the last at its end; with their ``preconditioner`` unless the
            optimizer was SGD.
        labels: Of the curvature's passes, see ``curvature.choose_labels``.
        segments: Number of segments.
        curvature: A block-diagonal approximation.
        examples: Number of examples that the curvature is fitted on; all of them by default.
        weight_decay: Coefficient of an L2 term in the loss, or one by parameter name
            (``OptimizerHistory.weight_decay``).
        at: Where the examples' gradients are taken. ``"checkpoints"``: averaged over the segment's checkpoints, one
            pass over the training data for each, as in the paper. ``"average"``: at the segment's averaged weights,
            one pass for each segment (its "fast" form).

    Returns:
        All scores, on the host; the same on every process. Positive for proponents: to first order, removing ``z`` from
        the ``N`` training examples raises the loss of ``q`` by ``score / N``.

    Raises:
        CheckpointError: If the checkpoints are of another model, or do not tell what the optimizer multiplied gradients
            with.
        ValueError: If training data and queries do not go together, there are too few checkpoints, or the curvature is
            not block-diagonal.
        QueryError: If the training task can't be run on the queries.
    """
    if at not in get_args(At):
        raise ValueError(f"at={short(at)}; expected one of {', '.join(map(repr, get_args(At)))}.")
    if curvature not in BLOCKS:
        raise ValueError(f"curvature={curvature!r} is not block-diagonal; expected one of {', '.join(BLOCKS)}.")
    stretches = training_segments(steps_taken(checkpoints, gradients.module, adaptive=True), segments)
    total = PairSum(gradients, indices, queries, query_indices)
    examples = examples or FactorExamples(len(indices), len(indices))
    fitted = partial(fit, gradients, curvature, indices, examples=examples, labels=labels)
    maps = [_Maps(gradients, segment, fitted, weight_decay) for segment in stretches]
    with checkpoints[-1].loaded(gradients.module):
        for rows, asked in total.prepared():
            for segment, maps_of_segment in zip(reversed(stretches), reversed(maps), strict=True):
                moved = maps_of_segment.response(asked.vectors)
                responses = asked.turned(moved)
                places = zip(segment.checkpoints, segment.shares, strict=True)
                for checkpoint, share in places if at == "checkpoints" else [(segment.average, 1.0)]:
                    with checkpoint.loaded(gradients.module):
                        total.add(rows, responses, share)
                asked = asked.turned(maps_of_segment.decayed(asked.vectors, moved))
                del responses, moved
    return total.result(notes=[note for each in maps for note in each.curvature.notes])


class _Maps:
    """What a segment does to a vector over the covered parameters.

    Args:
        gradients: Passes over the training data.
        segment: The segment.
        fitted: Fits the curvature at the weights that the model has then.
        weight_decay: See ``source_scores``.
    """

    def __init__(
        self,
        gradients: ExampleGradients,
        segment: Segment,
        fitted: Callable[[], Curvature],
        weight_decay: float | Mapping[str, float],
    ) -> None:
        blocks = gradients.coverage.blocks
        if not isinstance(weight_decay, Mapping):
            weight_decay = {p: weight_decay for block in blocks.values() for p in block.parameters}
        with segment.average.loaded(gradients.module):
            curvature = fitted()
        assert isinstance(curvature, BlockCurvature)
        self.curvature = curvature
        self._step_sizes: dict[str, StepSize] = dict.fromkeys(blocks, 0.0)
        for each in segment.checkpoints:
            sizes = block_step_sizes(blocks, each.step_sizes, gradients.module, each.preconditioner)
            self._step_sizes = {name: size + sizes[name] for name, size in self._step_sizes.items()}
        self._weight_decay = block_means(blocks, weight_decay)

    def response(self, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return ``τ^½ φ(τ^½ C τ^½) τ^½ v`` by block; for τ C → 0 that is ``τ v``."""
        return {name: self._moved(name, vector) for name, vector in vectors.items()}

    def decayed(self, vectors: Mapping[str, Tensor], responses: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return ``exp(-C τ) v`` by block: what the responses to ``v`` leave of it."""
        return {name: vector - self._curved(name, responses[name]) for name, vector in vectors.items()}

    def _curved(self, name: str, vector: Tensor) -> Tensor:
        return self.curvature.blocks[name].matvec(vector) + self._weight_decay[name] * vector

    def _moved(self, name: str, vector: Tensor) -> Tensor:
        size, decay = self._step_sizes[name], self._weight_decay[name]
        if not isinstance(size, Tensor):
            return self.curvature.blocks[name].apply(lambda x: size * exponential_mean(size * (x + decay)), vector)
        root = size.to(vector).sqrt()

        def matvec(flat: Tensor) -> Tensor:
            inner = flat.reshape(-1, *root.shape)
            return (root * self._curved(name, root * inner)).flatten(1)

        return root * matrix_exponential_mean(matvec, (root * vector).flatten(1)).reshape(vector.shape)


def _segment(checkpoints: Sequence[Checkpoint]) -> Segment:
    last, steps = checkpoints[-1], sum(c.steps for c in checkpoints)
    shares = tuple(c.steps / steps for c in checkpoints)

    def mean(values: Sequence[Tensor]) -> Tensor:
        # Counters of a batch norm are not averaged.
        if not values[-1].is_floating_point():
            return values[-1]
        total = wide(torch.zeros_like(values[-1]))
        for share, value in zip(shares, values, strict=True):
            total += share * value
        return total.to(values[-1])

    whole = reduce(lambda earlier, later: later.standing_for(earlier), checkpoints)
    average = replace(
        whole,
        parameters={name: mean([c.parameters[name] for c in checkpoints]) for name in last.parameters},
        buffers={name: mean([c.buffers[name] for c in checkpoints]) for name in last.buffers},
    )
    return Segment(tuple(checkpoints), shares, average)
