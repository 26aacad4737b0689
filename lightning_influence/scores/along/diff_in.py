"""Diff-In: how influence changes from step to step, to second order (2508.14648).

An example left out of every step of gradient descent from the start moves the weights by ``η/N g_z`` at each. Up to
step ``t`` that has added up to ``t η/N g_z``, which the curvature of the next step acts on (``H_B g_z``), while the
example's gradient has changed along the path (``H_z g_B``). The influence that this adds, as a mean over ``m``
checkpoints, is

``score(z → q) = 1/m Σ_t -t η_t² g_qᵀ (H_B g_z + H_z g_B)``

with mean gradient ``g_B`` and Hessian ``H_B`` of a batch of training examples. Positive for proponents; to this order
``score / N`` is what leaving the example out adds to the loss of ``q``. It is the second-order part only: TracIn is the
first. Where the step size differs between parameters, it is a diagonal matrix ``D``, and ``η² g_qᵀ H g`` becomes
``g_qᵀ D H D g``.

Hessians are multiplied by finite differences of gradients: two passes over the batch for every query (``H_B``), and two
over the training data for all of them together (``H_z``), at every checkpoint.

Index legend: ``q`` queries, ``n`` training examples, ``k, o, i`` a block's groups, outputs, inputs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lightning_influence.core.errors import check_count, is_number, short
from lightning_influence.core.precision import wide
from lightning_influence.curvature.choices import random_subset
from lightning_influence.gradients.passes import ExampleGradients
from lightning_influence.scores.measurements import mean_gradient
from lightning_influence.scores.pairs import PairSum, PairwiseScores
from lightning_influence.training.checkpoints import Checkpoint, steps_taken

# How far the weights are moved to differentiate: along a direction of length one, so that it does not matter how large
# gradients are. In float32 the error of the difference is about 1e-7 / 1e-3 of a gradient.
_STEP = 1e-3

Vectors = Mapping[str, Tensor]


def diff_in_scores(
    gradients: ExampleGradients,
    indices: Sequence[int],
    queries: ExampleGradients,
    query_indices: Sequence[int],
    checkpoints: Sequence[Checkpoint],
    *,
    batch: int = 256,
    step: float = _STEP,
    seed: int = 0,
) -> PairwiseScores:
    """Score every query with every training example by the change of influence along the run.

    Args:
        gradients: Passes over the training data.
        indices: The training examples; one that is named twice counts once.
        queries: Passes over the queries' data, with the model and coverage of the training data.
        query_indices: The queries.
        checkpoints: Of one run with SGD, in the order of training. One that stands for no steps (the starting weights)
            is left out.
        batch: Number of training examples ``B``, drawn at random; the same ones at every checkpoint.
        step: Length ``ε`` of the step that derivatives are taken with.
        seed: Seed of the batch.

    Returns:
        All scores, on the host; the same on every process.

    Raises:
        CheckpointError: If the checkpoints are of another model, or of an optimizer other than SGD.
        ValueError: If training data and queries do not go together, ``batch`` is less than 1, ``step`` is not positive,
            or no example of the batch has a finite gradient.
        QueryError: If the training task can't be run on the queries.
    """
    check_count("batch", batch)
    check_count("seed", seed, least=0)
    if not is_number(step, above=0):
        raise ValueError(f"step={short(step)}; expected a finite number > 0.")
    moved = steps_taken(checkpoints, gradients.module)
    total = PairSum(gradients, indices, queries, query_indices)
    chosen = random_subset(list(indices), batch, seed)
    for checkpoint in moved:
        weight = -checkpoint.step / len(moved)
        along = _Derivative(gradients, checkpoint, step)
        with checkpoint.loaded(gradients.module):
            mean = _scaled(along.sizes, mean_gradient(gradients, chosen, title="batch gradient"))
            for rows, asked in total.prepared():
                vectors = _scaled(along.sizes, asked.vectors)
                total.add(rows, asked.turned(_scaled(along.sizes, along.of_mean(chosen, vectors))), weight)
                for point, share in along.points(mean):
                    with point.loaded(gradients.module):
                        total.add(rows, asked.turned(vectors), weight * share)
    return total.result()


class _Derivative:
    """Derivatives of gradients along directions, at a checkpoint.

    Attributes:
        sizes: Step size ``η`` of one step for every scalar, by block, ``[k, o, i]``.
    """

    def __init__(self, gradients: ExampleGradients, checkpoint: Checkpoint, step: float) -> None:
        self._gradients = gradients
        self._checkpoint = checkpoint
        self._step = step
        self._blocks = gradients.coverage.blocks
        self.sizes = {
            name: block.from_parameters(
                {
                    own: torch.full_like(p, checkpoint.step_sizes.get(own, 0.0) / checkpoint.steps)
                    for own, p in block.parameters.items()
                }
            )
            for name, block in self._blocks.items()
        }

    def points(self, direction: Vectors) -> list[tuple[Checkpoint, float]]:
        """Return weights and factors: the derivative along ``direction`` is the sum of factor times value there."""
        length = math.sqrt(sum(float(wide(part).square().sum()) for part in direction.values()))
        if not (length > 0 and math.isfinite(length)):
            return []
        return [
            (self._moved(direction, sign * self._step / length), sign * length / (2 * self._step)) for sign in (1, -1)
        ]

    def of_mean(self, indices: Sequence[int], directions: Vectors) -> dict[str, Tensor]:
        """Return the Hessian of the mean loss times every direction, ``[q, k, o, i]``; zero where it is not finite."""
        result = {name: torch.zeros_like(part) for name, part in directions.items()}
        for q in range(len(next(iter(directions.values())))):
            for point, factor in self.points({name: part[q] for name, part in directions.items()}):
                with point.loaded(self._gradients.module):
                    found = mean_gradient(self._gradients, indices, title="")
                for name, part in found.items():
                    result[name][q] += factor * part
        return result

    def _moved(self, direction: Vectors, distance: float) -> Checkpoint:
        parameters = dict(self._checkpoint.parameters)
        for name, block in self._blocks.items():
            for own, change in block.to_parameters(direction[name]).items():
                parameters[own] = parameters[own] + distance * change.to(parameters[own])
        return replace(self._checkpoint, parameters=parameters)


def _scaled(sizes: Vectors, vectors: Vectors) -> dict[str, Tensor]:
    return {name: sizes[name].to(vector) * vector for name, vector in vectors.items()}
