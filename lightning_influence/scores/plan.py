"""Influence at the final weights, start to end: loss scale, curvature, validation query, scores."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from lightning_influence.core import distributed
from lightning_influence.core.meeting import together
from lightning_influence.core.memory import is_out_of_memory, let_go
from lightning_influence.core.precision import wait_for
from lightning_influence.curvature import (
    LADDER,
    Curvature,
    CurvatureName,
    Damping,
    FactorExamples,
    Fisher,
    IndefiniteError,
    Solver,
    SolverError,
    fit,
)
from lightning_influence.curvature.choices import choose_labels, choose_solver, factor_examples, random_subset
from lightning_influence.curvature.damping import DampingChoice, choose_damping
from lightning_influence.curvature.registry import decompositions
from lightning_influence.curvature.sweep import DampingSweep, Sweeper
from lightning_influence.gradients.coverage import Coverage
from lightning_influence.gradients.passes import ExampleGradients, Labels
from lightning_influence.gradients.verify import Inspection
from lightning_influence.gradients.visitors import ExampleScores, Guest, Visitor, visit
from lightning_influence.scores.examples import ExampleScorer
from lightning_influence.scores.measurements import QuerySets, mean_loss_gradient
from lightning_influence.training.step_sizes import OptimizerHistory, StepSize

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
        directions: Of one example's output gradient, for a bounded damping; None where it is not known.
    """

    curvature: CurvatureName
    labels: tuple[Labels, Labels]
    examples: FactorExamples
    damping: DampingChoice = DampingChoice()
    solver: Solver = "auto"
    directions: int | None = None

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
        # A softmax over c classes leaves c - 1.
        known = choice.rule == "bounded" and inspection.exact_draws is not None
        directions = max(1, (inspection.exact_draws or 1) - 1) if known else None
        return cls(curvature, labels, sizes, choice, solver, directions)

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
            directions=self.directions,
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
        each = decompositions(self.curvature, coverage).values()
        return sum(1.6e-10 * k * size**3 for of_layer in each for k, size in of_layer)


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


class Companion(Protocol):
    """Has visitors of its own in the passes that scores at the end of training take."""

    def on_validation(self, number: int) -> Sequence[Visitor]:
        """Return who looks at the pass over the validation set of that number; there may be no such pass."""
        ...

    def on_training(self, curvature: Curvature | None, own: ExampleScorer) -> Sequence[Guest]:
        """Return who looks at the pass over the training data, after who scores it, with the curvature if there is."""
        ...


def influence_scores(
    gradients: ExampleGradients,
    indices: Sequence[int],
    plan: InfluencePlan,
    *,
    queries: QuerySets = (),
    step_sizes: Mapping[str, StepSize] | None = None,
    features: bool = True,
    companions: Sequence[Companion] = (),
) -> InfluenceScores:
    """Fit the curvature and score every training example.

    Validation and training data are passed over once each, beside what fitting takes; whoever has something to find
    out looks at the same passes.

    Args:
        gradients: Passes over the training data.
        indices: The training examples.
        plan: What to compute.
        queries: Validation data whose mean loss the ``harm`` column is about, with the indices to take.
        step_sizes: For a last TracIn checkpoint in the same pass, see ``step_sizes.block_step_sizes``.
        features: Whether to keep the inputs of the last layer.
        companions: Who else looks at the passes.

    Returns:
        Scores, curvature, timings, notes.

    Raises:
        ValueError: If no example has finite gradients, or the damping leaves a block singular.
    """
    seconds: dict[str, float] = {}
    notes = list(plan.damping.notes)
    with _timed(seconds, "loss scale", gradients.device):
        gradients = gradients.calibrate(indices)
    curvature = None
    with _timed(seconds, "factors", gradients.device):
        try:
            with together():
                curvature = plan.fit(gradients, indices)
            notes += curvature.notes
        # What does not need this curvature is still worth having.
        except Exception as error:
            if not isinstance(error, (IndefiniteError, torch.linalg.LinAlgError)) and not is_out_of_memory(error):
                raise
            notes.append(f"no self_influence and no harm: {error}")
    query: dict[str, Tensor] | None = None
    if queries and curvature is not None:
        sets = [(passes.like(gradients), chosen) for passes, chosen in queries]
        with _timed(seconds, "validation gradient", gradients.device):
            query, found = _validation_query(curvature, sets, companions)
        notes += [note for note in found if note not in notes]
    scorer = ExampleScorer(gradients, indices, curvature, query, step_sizes, features=features)
    more: list[Guest] = []
    if companions:
        with _timed(seconds, "queries", gradients.device):
            more += [visitor for each in companions for visitor in each.on_training(curvature, scorer)]
    with _timed(seconds, "scores", gradients.device):
        sweeper = _sweeper(gradients, indices, curvature)
        guest = None if sweeper is None else Guest(sweeper)
        lost = None
        try:
            visit(gradients, indices, [scorer, *([guest] if guest else []), *more], title="self-influence")
        except Exception as error:
            if curvature is None or not _is_lost(error):
                raise
            lost = error.with_traceback(None)
        if lost is not None:
            notes.append(f"no self_influence, no harm and no queries: {lost}")
            curvature = query = sweeper = None
            for each in more:
                each.leave(lost)
            scorer = ExampleScorer(gradients, indices, step_sizes=step_sizes, features=features)
            let_go()
            visit(gradients, indices, [scorer], title="gradients")
        elif guest is not None and guest.error is not None:
            notes.append(f"no damping sweep: {guest.error}")
            sweeper = None
        scores = scorer.result()
    sweep = None
    if sweeper is not None and int(scores.columns["finite"].sum()) >= _FEWEST_TO_SWEEP:
        try:
            sweep = sweeper.result()
        except ValueError as error:
            notes.append(f"no damping sweep: {error}")
    return InfluenceScores(scores, curvature, sweep, seconds, notes)


def _validation_query(
    curvature: Curvature, sets: QuerySets, companions: Sequence[Companion]
) -> tuple[dict[str, Tensor] | None, list[str]]:
    """Return the preconditioned mean gradient of the validation loss, or None and why there is none."""
    try:
        with together():
            mean = mean_loss_gradient(
                sets,
                title="validation gradient",
                watching=lambda number: [visitor for each in companions for visitor in each.on_validation(number)],
            )
    # Anything can go wrong in a user's training_step that meets another kind of batch.
    except Exception as error:
        if is_out_of_memory(error):
            raise
        reason = "the loss of the training task can't be computed on the validation batches"
        return None, [f"no harm column: {reason} ({type(error).__name__}: {error})"]
    try:
        return curvature.solve(mean), curvature.notes
    except SolverError as error:
        return None, [f"no harm column: {error}"]


def _is_lost(error: Exception) -> bool:
    """Tell whether memory does not suffice, and nothing waits for this process."""
    return is_out_of_memory(error) and distributed.world_size() == 1


def _sweeper(gradients: ExampleGradients, indices: Sequence[int], curvature: Curvature | None) -> Sweeper | None:
    """Return what tries other dampings on some examples; None where each would take another factorisation."""
    own = None if curvature is None else curvature.blockwise
    if own is None or not LADDER[own.name].block.measures or len(indices) < _FEWEST_TO_SWEEP:
        return None
    return Sweeper(random_subset(sorted(set(indices)), _SWEPT, 0), own, gradients.device)


@contextmanager
def _timed(seconds: dict[str, float], stage: str, device: torch.device) -> Iterator[None]:
    start = time.perf_counter()
    try:
        yield
    finally:
        wait_for(device)
        seconds[stage] = time.perf_counter() - start
