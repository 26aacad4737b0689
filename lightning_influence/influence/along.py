"""Influence along a training run, from its checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, overload

import torch
from torch import Tensor

from lightning_influence.curvature import CurvatureName, Fisher
from lightning_influence.data.given import Data, Indices
from lightning_influence.influence.examined import ExaminedModel
from lightning_influence.influence.inputs import aligned, check_factor_examples
from lightning_influence.objective.task import TrainingStepTask
from lightning_influence.replay import Rerun, TrainingRecord
from lightning_influence.replay.attribution import Replay, ReplayedMeasurement, ReplayedPairs
from lightning_influence.scores.along.diff_in import diff_in_scores
from lightning_influence.scores.along.source import At, source_scores
from lightning_influence.scores.along.tracin import tracin_scores
from lightning_influence.scores.along.z0 import z0_scores
from lightning_influence.scores.examples import score_examples
from lightning_influence.scores.measurements import AnyMeasurement
from lightning_influence.scores.pairs import PairwiseScores
from lightning_influence.training.checkpoints import Checkpoint, check_step_sizes, check_together
from lightning_influence.training.step_sizes import block_step_sizes


class AlongTraining:
    """Scores along the checkpoints of a run; get it from ``Influence.along``.

    Every method puts the checkpoints' weights into the model one after the other, and the model's own back. Test sets
    and indices are as for ``Influence.pairs``; scores ``[q, n]`` are positive for proponents.

    Args:
        examined: The model and its training data.
        checkpoints: Of one run, in order.

    Raises:
        CheckpointError: If there is none, or they are not those of one run of this model.
    """

    def __init__(self, examined: ExaminedModel, checkpoints: Sequence[Checkpoint]) -> None:
        check_together(checkpoints, examined.model)
        self._examined = examined
        self.checkpoints = checkpoints

    def tracin(self, test_set: Data, indices: Indices | None = None, *, by_layer: bool = False) -> PairwiseScores:
        """Return TracIn of pairs, ``Σ_t η_t ⟨∇ℓ_t(q), P_t ∇ℓ_t(z)⟩``; see ``tracin_scores``."""
        return tracin_scores(*self._examined.paired(test_set, indices), self.checkpoints, by_layer=by_layer)

    def self_influence(self) -> Tensor:
        """Return TracIn of every training example on itself, ``Σ_t η_t ∇ℓ_tᵀ P_t ∇ℓ_t``, ``[n]``."""
        check_step_sizes(self.checkpoints)
        training, examples = self._examined.training, self._examined.examples
        total = torch.zeros(len(examples), dtype=torch.float64)
        for checkpoint in self.checkpoints:
            with checkpoint.loaded(training.module):
                sizes = block_step_sizes(
                    training.coverage.blocks, checkpoint.step_sizes, training.module, checkpoint.preconditioner
                )
                found = score_examples(training, examples, step_sizes=sizes, title="TracIn")
            total += aligned(found, "tracin", examples)
        return total

    def source(
        self,
        test_set: Data,
        indices: Indices | None = None,
        *,
        segments: int = 3,
        curvature: CurvatureName = "ekfac",
        fisher: Fisher = "auto",
        factor_examples: int | Literal["auto"] | None = "auto",
        weight_decay: float | Mapping[str, float] | None = None,
        at: At = "checkpoints",
    ) -> PairwiseScores:
        """Return SOURCE: influence through the steps of training, by segments; see ``source_scores``.

        Args:
            test_set: The queries' data.
            indices: Which of them; all by default.
            segments: Number of segments, at most that of the checkpoints that stand for steps.
            curvature: A block-diagonal approximation, fitted at the averaged weights of each segment.
            fisher: Labels for it, as for ``Influence.fit``.
            factor_examples: Number of examples for it, as for ``Influence.fit``.
            weight_decay: Coefficient of an L2 term in the loss, or one by parameter name; by default that of the run,
                as far as an audit or the ``history`` of ``fit`` tells.
            at: Where the gradients of examples are taken: at the ``"checkpoints"``, or at their ``"average"``, one pass
                a segment.
        """
        check_factor_examples(factor_examples)
        plan = self._examined.plan(curvature, fisher=fisher, factor_examples=factor_examples)
        return source_scores(
            *self._examined.paired(test_set, indices),
            self.checkpoints,
            labels=plan.labels,
            segments=segments,
            curvature=curvature,
            examples=plan.examples,
            weight_decay=self._examined.decay(weight_decay),
            at=at,
        )

    def z0(self, test_set: Data, indices: Indices | None = None) -> PairwiseScores:
        """Return Z0-Inf, from losses alone, forward passes only; see ``z0_scores``."""
        return z0_scores(*self._examined.paired(test_set, indices), self.checkpoints)

    def diff_in(
        self, test_set: Data, indices: Indices | None = None, *, batch: int = 256, seed: int = 0
    ) -> PairwiseScores:
        """Return Diff-In, how influence changes from step to step; for SGD, see ``diff_in_scores``.

        Args:
            test_set: The queries' data.
            indices: Which of them; all by default.
            batch: Number of training examples, drawn at random, that the curvature of a step is measured on.
            seed: Seed of the draw.
        """
        return diff_in_scores(*self._examined.paired(test_set, indices), self.checkpoints, batch=batch, seed=seed)

    def __repr__(self) -> str:
        steps = [checkpoint.step for checkpoint in getattr(self.checkpoints, "outlines", self.checkpoints)]
        return f"AlongTraining({len(steps)} checkpoints, steps {steps[0]:,} to {steps[-1]:,})"


class AlongRecord:
    """Scores by replay of a recorded run; get it from ``Influence.along``.

    Args:
        examined: The model and its training data.
        record: Of its training: ``report.training_record()``, or ``Recorder.finish()`` of a loop of your own.

    Raises:
        ReplayError: If it is the record of another model.
    """

    def __init__(self, examined: ExaminedModel, record: TrainingRecord) -> None:
        passes, model = examined.training, examined.model
        # A trainer has called the model's own step, whatever stands in for it here.
        task = TrainingStepTask() if callable(getattr(model, "training_step", None)) else passes.task
        self._examined, self.record = examined, record
        self._replay = Replay(Rerun(record, model, task, passes.source), passes.task)

    @overload
    def replay(
        self,
        test_set: Data,
        indices: Indices | None = None,
        *,
        measurement: AnyMeasurement = "loss",
        together: Literal[False] = False,
        max_cost: float | None = None,
        self_test: int = 5,
    ) -> ReplayedPairs: ...

    @overload
    def replay(
        self,
        test_set: Data,
        indices: Indices | None = None,
        *,
        measurement: AnyMeasurement = "loss",
        together: Literal[True],
        max_cost: float | None = None,
        self_test: int = 5,
    ) -> ReplayedMeasurement: ...

    def replay(
        self,
        test_set: Data,
        indices: Indices | None = None,
        *,
        measurement: AnyMeasurement = "loss",
        together: bool = False,
        max_cost: float | None = None,
        self_test: int = 5,
    ) -> ReplayedPairs | ReplayedMeasurement:
        """Return what every training example did, in this run, to queries at its end: ``-N ∂f_q/∂w_z``.

        The training is run again to the last bit and gone back through (MAGIC, 2503.13751), then run a few times
        without some examples; see ``docs/replay.md``.

        Args:
            test_set: The queries' data.
            indices: Which of them; all by default.
            measurement: ``"loss"``, ``"margin"``, a gap, an attack's loss, or a function ``(model, batch) -> number``.
            together: Whether to measure the queries as one set, which costs as much as one query, instead of each.
            max_cost: Seconds that it may take; told before most of them are spent.
            self_test: Number of trainings without 5 % of the examples that tell how far to trust the scores; 0: none.

        Raises:
            ReplayError: If the run can't be replayed, with the reason.
            MeasurementError: If the measurement is one of whole sets, and ``together`` is not asked for.
        """
        queries, chosen = self._examined.queries(test_set, indices)
        return self._replay.asked(
            queries, chosen, measurement, together=together, max_cost=max_cost, self_test=self_test
        )

    def __repr__(self) -> str:
        return f"AlongRecord({len(self.record.steps):,} steps)"
