"""Influence at the final weights, start to end: loss scale, curvature, validation query, scores."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from lightning_influence.curvature import (
    LADDER,
    Curvature,
    CurvatureName,
    Damping,
    DampingChoice,
    FactorExamples,
    Fisher,
    IndefiniteError,
    OptimizerHistory,
    Solver,
    SolverError,
    choose_damping,
    choose_labels,
    choose_solver,
    decompositions,
    factor_examples,
    fit,
    random_subset,
)
from lightning_influence.curvature.sweep import DampingSweep, damping_sweep
from lightning_influence.gradients.coverage import Coverage
from lightning_influence.gradients.example_scores import ExampleScores
from lightning_influence.gradients.passes import ExampleGradients, Labels
from lightning_influence.gradients.verify import Inspection
from lightning_influence.scores.examples import mean_gradient, score_examples
from lightning_influence.training.step_sizes import StepSize

# Passes forward and backward that one product of one vector takes, and steps that a solver usually does.
_PRODUCT_COST = 2.0
_USUAL_STEPS = 40
# Examples that tell whether the damping matters for the ranking; fewer than ten would tell nothing.
_SWEPT = 256
_FEWEST_TO_SWEEP = 10


@dataclass(frozen=True)
class InfluencePlan:
    """What will be computed, decided before the first pass.

    Attributes:
        curvature: Which approximation.
        labels: Labels of the covariance and the eigenvalue pass.
        examples: Number of examples of these passes.
        damping: λ, or how it follows from the curvature.
        solver: For GGN and Hessian, see ``curvature.fit``.
    """

    curvature: CurvatureName
    labels: tuple[Labels, Labels]
    examples: FactorExamples
    damping: DampingChoice = DampingChoice()
    solver: Solver = "auto"

    @classmethod
    def make(
        cls,
        coverage: Coverage,
        inspection: Inspection,
        size: int,
        *,
        curvature: CurvatureName = "ekfac",
        fisher: Fisher = "auto",
        damping: Damping = "auto",
        examples: int | Literal["auto"] | None = "auto",
        history: OptimizerHistory | None = None,
        solver: Solver = "auto",
    ) -> InfluencePlan:
        """Decide labels, damping and subset sizes.

        Args:
            coverage: The layers.
            inspection: What one batch showed.
            size: Number of training examples.
            curvature: Which approximation.
            fisher: Which labels, see ``curvature.choose_labels``.
            damping: A number or a rule, see ``curvature.damping``.
            examples: Number of examples for the factors; ``"auto"`` see ``curvature.factor_examples``; None for all.
            history: What the optimizers did, for the rule.
            solver: For GGN and Hessian.
        """
        labels = choose_labels(fisher, inspection.tapped)
        draws = (inspection.exact_draws or 1) if labels[1] == "exact" else 1
        if examples == "auto":
            sizes = factor_examples(coverage, inspection.positions, draws, size)
        else:
            count = size if examples is None else min(size, examples)
            sizes = FactorExamples(count, count, count)
        choice = choose_damping(damping, LADDER[curvature].damping, coverage.blocks, history)
        return cls(curvature, labels, sizes, choice, solver)

    def fit(self, gradients: ExampleGradients, indices: Sequence[int]) -> Curvature:
        """Fit the curvature on the training examples, see ``curvature.fit``.

        Args:
            gradients: Passes over the training data.
            indices: The training examples.
        """
        return fit(
            gradients,
            self.curvature,
            indices,
            examples=self.examples,
            labels=self.labels,
            damping=self.damping.absolute,
            solver=self.solver,
        )

    def gradient_passes(self, coverage: Coverage, size: int, queries: int, draws: int) -> float:
        """Return the work in numbers of per-example gradients (one forward and backward pass each)."""
        rung = LADDER[self.curvature]
        work = float(size + queries)
        by_measure = {
            "covariances": self.examples.covariances * (draws if self.labels[0] == "exact" else 1),
            "eigenvalues": self.examples.eigenvalues * (draws if self.labels[1] == "exact" else 1),
        }
        if rung.product is None:
            return work + sum(by_measure[measure] for measure in rung.block.measures)
        chosen, _ = choose_solver(self.solver, coverage.covered_parameters, torch.device("cpu"))
        vectors = coverage.covered_parameters if chosen == "dense" else _USUAL_STEPS
        work += _PRODUCT_COST * vectors * (self.examples.products or size)
        return work if chosen == "dense" else work + sum(by_measure.values())

    def decomposition_seconds(self, coverage: Coverage) -> float:
        """Return a guess of the time of the eigendecompositions: cubic, and 0.6 s for 1,569 rows on two CPU cores."""
        blocks = coverage.blocks.values()
        return sum(1.6e-10 * k * size**3 for block in blocks for k, size in decompositions(self.curvature, block))


@dataclass(eq=False)
class InfluenceScores:
    """Scores at the final weights and how they came about.

    Attributes:
        scores: Columns by example.
        curvature: The fitted curvature; None if there is none, and the notes say why.
        seconds: Wall time by stage.
        sweep: How much self-influence depends on the damping, from a few hundred examples; None where that would take
            another factorisation for each.
        notes: What a reader of the scores should know.
    """

    scores: ExampleScores
    curvature: Curvature | None
    sweep: DampingSweep | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def influence_scores(
    gradients: ExampleGradients,
    indices: Sequence[int],
    plan: InfluencePlan,
    *,
    queries: Sequence[tuple[ExampleGradients, Sequence[int]]] = (),
    step_sizes: Mapping[str, StepSize] | None = None,
    features: bool = True,
) -> InfluenceScores:
    """Fit the curvature and score every training example.

    Args:
        gradients: Passes over the training data.
        indices: The training examples.
        plan: What to compute.
        queries: Validation data whose mean loss the ``harm`` column is about, with the indices to take.
        step_sizes: For a last TracIn checkpoint in the same pass, see ``tracin.block_step_sizes``.
        features: Whether to keep the inputs of the last layer.

    Returns:
        Scores, curvature, timings, notes.

    Raises:
        ValueError: If no example has finite gradients, or the damping leaves a block singular.
    """
    seconds: dict[str, float] = {}
    notes: list[str] = []
    with _timed(seconds, "loss scale", gradients.device):
        gradients = gradients.calibrate(indices)
    notes += plan.damping.notes
    curvature = None
    with _timed(seconds, "factors", gradients.device):
        try:
            curvature = plan.fit(gradients, indices)
            notes += curvature.notes
        # What does not need this curvature is still worth having.
        except (IndefiniteError, torch.linalg.LinAlgError) as error:
            notes.append(f"no self_influence and no harm: {error}")
    query: dict[str, Tensor] | None = None
    if queries and curvature is not None:
        with _timed(seconds, "validation gradient", gradients.device):
            try:
                query = curvature.solve(_mean_query([(q.like(gradients), chosen) for q, chosen in queries]))
                notes += [note for note in curvature.notes if note not in notes]
            except SolverError as error:
                notes.append(f"no harm column: {error}")
            except _NotTheTask as error:
                notes.append(
                    "no harm column: the loss of the training task can't be computed on the validation batches "
                    f"({type(error.__cause__).__name__}: {error.__cause__})"
                )
    with _timed(seconds, "scores", gradients.device):
        scores = score_examples(
            gradients,
            indices,
            curvature=curvature,
            query=query,
            step_sizes=step_sizes,
            features=features,
            title="self-influence",
        )
    sweep = None
    own = None if curvature is None else curvature.blockwise
    finite = scores.indices[scores.columns["finite"]].tolist()
    if own is not None and LADDER[own.name].block.measures and len(finite) >= _FEWEST_TO_SWEEP:
        with _timed(seconds, "damping sweep", gradients.device):
            try:
                sweep = damping_sweep(gradients, random_subset(finite, _SWEPT, 0), own)
            except ValueError as error:
                notes.append(f"no damping sweep: {error}")
    return InfluenceScores(scores, curvature, sweep, seconds, notes)


class _NotTheTask(Exception):
    """The validation batches do not fit the training task."""


def _mean_query(queries: Sequence[tuple[ExampleGradients, Sequence[int]]]) -> dict[str, Tensor]:
    """Mean gradient over several sets of queries, each example counting once."""
    total = sum(len(chosen) for _, chosen in queries)
    result: dict[str, Tensor] = {}
    for gradients, chosen in queries:
        try:
            mean = mean_gradient(gradients, chosen, title="validation gradient")
        except torch.OutOfMemoryError:
            raise
        # Anything can go wrong in a user's training_step that meets another kind of batch.
        except Exception as error:
            raise _NotTheTask(str(error)) from error
        for name, value in mean.items():
            part = value * (len(chosen) / total)
            result[name] = result[name] + part if name in result else part
    return result


@contextmanager
def _timed(seconds: dict[str, float], stage: str, device: torch.device) -> Iterator[None]:
    start = time.perf_counter()
    try:
        yield
    finally:
        torch.zeros((), device=device).item()  # waits for what the stage left to the device, of whatever kind
        seconds[stage] = time.perf_counter() - start
