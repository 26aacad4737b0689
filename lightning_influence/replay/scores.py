"""Scores by replay: what every training example did, in this very run, to a query at its end.

``score(z → q) = -N ∂f_q(θ_T)/∂w_z``, where ``w_z`` multiplies the example's part of the loss in every step that it is
in: to first order, leaving it out of this run adds ``score / N`` to the query's measurement (MAGIC: 2503.13751).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_influence.core.errors import is_number, short
from lightning_influence.core.isolation import untouched
from lightning_influence.core.memory import is_out_of_memory
from lightning_influence.core.torch_private import eagerly
from lightning_influence.core.weights import places_of, swapped, write
from lightning_influence.gradients.passes import ExampleGradients
from lightning_influence.objective.tap import Heard, LossTap
from lightning_influence.objective.task import Task, run_tapped
from lightning_influence.objective.terms import BatchLoss
from lightning_influence.replay.backward import Cost, check_record, example_derivatives
from lightning_influence.replay.detached import DetachedValues
from lightning_influence.replay.differentiable_calls import DifferentiableCalls
from lightning_influence.replay.record import ReplayError, StepInput
from lightning_influence.replay.rerun import Rerun, forward_context
from lightning_influence.replay.step import Cotangents, StepDerivative
from lightning_influence.replay.weighting import Forms, Weighting, weighting
from lightning_influence.scores.measurements import (
    AnyMeasurement,
    Loss,
    Measured,
    Measurement,
    MeasurementError,
    MeasurementScores,
    Statistic,
    as_measurement,
)
from lightning_influence.scores.measurements.base import QuerySets
from lightning_influence.scores.pairs import PairwiseScores


def replay_scores(
    rerun: Rerun,
    queries: ExampleGradients,
    query_indices: Sequence[int],
    measurement: AnyMeasurement = "loss",
    *,
    task: Task | None = None,
    max_cost: float | None = None,
    told: Callable[[Cost], None] = lambda cost: None,
    advance: Callable[[int], None] = lambda steps: None,
) -> PairwiseScores:
    """Score every query with every training example.

    Args:
        rerun: The run.
        queries: Passes over the queries' data; the loss is scaled as that of the training data.
        query_indices: The queries.
        measurement: What is measured of each, ``"loss"`` or ``"margin"``, or a ``Statistic`` of single examples.
        task: The loss that was trained on, by example where the run's own does not tell their parts.
        max_cost: Seconds that it may take; known after a few steps.
        told: Called with the cost.
        advance: Called after each step.

    Returns:
        All scores; an example that no step was taken on has 0.

    Raises:
        ReplayError: If the run can't be differentiated, the queries do not fit into memory, or it takes too long.
        MeasurementError: If the measurement is not defined for the queries.
    """
    found = as_measurement(measurement)
    if not isinstance(found, Statistic) or not found.per_query:
        raise MeasurementError(f"{found.name} is of a whole set; `replay_measurement` takes it.")
    if not query_indices:
        raise ValueError("there is no query; pass at least one index.")
    ends = [(found, [(queries, [index])]) for index in query_indices]
    examples, scores, _, constants = _replayed(rerun, queries, ends, task, max_cost, told, advance)
    unknown = torch.tensor(list(query_indices))[scores.isnan().all(1)].tolist()
    notes = [f"queries whose loss or gradient is not finite have no scores: {unknown}"] if unknown else []
    notes += constants
    return PairwiseScores(torch.tensor(list(query_indices), dtype=torch.long), examples, scores, notes=notes)


def replay_measurement(
    rerun: Rerun,
    sets: QuerySets,
    measurement: AnyMeasurement = "loss",
    *,
    task: Task | None = None,
    max_cost: float | None = None,
    told: Callable[[Cost], None] = lambda cost: None,
    advance: Callable[[int], None] = lambda steps: None,
) -> MeasurementScores:
    """Score training examples by what they did to a measurement of sets of queries, taken as one.

    Args:
        rerun: The run.
        sets: Passes over the data of each set, and which of its examples to take.
        measurement: What is measured, see ``as_measurement``.
        task: As for ``replay_scores``, like the others.
        max_cost: Seconds.
        told: Called with the cost.
        advance: Called after each step.

    Raises:
        ReplayError, MeasurementError: As ``replay_scores``.
    """
    found = as_measurement(measurement)
    examples, scores, values, constants = _replayed(rerun, sets[0][0], [(found, sets)], task, max_cost, told, advance)
    if bool(scores.isnan().any()):
        raise MeasurementError(f"{found.name}: its gradient is not finite; leave out the examples that make it so.")
    count = sum(len(indices) for _, indices in sets)
    return MeasurementScores(examples, scores[0], Measured(values[0], {}, {"all": count}), constants)


def _replayed(
    rerun: Rerun,
    queries: ExampleGradients,
    ends: Sequence[tuple[Any, QuerySets]],
    task: Task | None,
    max_cost: float | None,
    told: Callable[[Cost], None],
    advance: Callable[[int], None],
) -> tuple[Tensor, Tensor, list[float], list[str]]:
    """Return examples ``[n]``, scores ``[q, n]``, the values at the end, and notes on what has counted as constant."""
    if max_cost is not None and not is_number(max_cost, above=0):
        raise ValueError(f"max_cost={short(max_cost)}; expected a number of seconds > 0, or None.")
    record, task = rerun.record, rerun.task if task is None else task
    check_record(record)
    with rerun.standing(), eagerly():
        way = weighting_of(rerun, task, queries.coverage.trace.forms)
        derivative = StepDerivative(
            rerun.module,
            task,
            record,
            way,
            stand=rerun.stand,
            forward_context=lambda: forward_context(record.recipe, rerun.module),
        )
    end, values = end_cotangents(derivative, rerun, ends)
    usable = end.parameters.isfinite().all(1)
    for part in end.statistics.values():
        usable &= part.isfinite().flatten(1).all(1)
    kept = Cotangents(end.parameters[usable], {}, {name: part[usable] for name, part in end.statistics.items()})
    with rerun.standing(), eagerly():
        examples, found = example_derivatives(
            derivative, record, rerun.segment, kept, max_cost=max_cost, told=told, advance=advance
        )
    scores = torch.full((len(usable), len(examples)), torch.nan, dtype=torch.float64)
    scores[usable.cpu()] = -record.recipe.examples * found
    return examples, scores, values, derivative.constants


@dataclass(frozen=True)
class _WholeLoss(Loss):
    """The loss of the training task, with what its terms are multiplied with."""

    def outputs(self, loss: BatchLoss) -> tuple[list[Tensor], list[Tensor]]:
        """Return the loss of the batch, at the scale of the values."""
        if loss.remainder or loss.values is None or not bool(loss.loss.detach()):
            return super().outputs(loss)
        return [loss.loss], [loss.values.sum().to(loss.loss) / loss.loss.detach()]


def end_cotangents(
    derivative: StepDerivative, rerun: Rerun, ends: Sequence[tuple[Any, QuerySets]]
) -> tuple[Cotangents, list[float]]:
    """Return the derivatives of measurements by the state at the end of the run, and their values.

    Evaluation mode computes with running statistics: they are a part of that state.

    Args:
        derivative: Of the run's steps.
        rerun: The run.
        ends: Measurements, each with what it is made on.
    """
    module, last = rerun.module, rerun.record.states[len(rerun.record.steps)]
    for _, sets in ends[:1]:
        for passes, _ in sets:
            _ = passes.scale  # measured before anything is frozen
    rows, values = list[list[Tensor]](), list[float]()
    with swapped(places_of(module), {**last.parameters, **last.buffers}), untouched(module, rerun.task):
        for parameter in derivative.parameters:
            parameter.requires_grad_(True)
        calls = DifferentiableCalls(derivative.statistics)
        wanted = [*derivative.parameters, *calls.leaves.values()]
        for measurement, sets in ends:
            value, parts = _differentiated(derivative, calls, measurement, sets, wanted)
            values.append(value)
            rows.append([part.detach() for part in parts])
    k = len(derivative.parameters)
    parameters = torch.stack([torch.cat([part.reshape(-1) for part in row[:k]]) for row in rows])
    statistics = {name: torch.stack([row[k + j] for row in rows]) for j, name in enumerate(calls.leaves)}
    return Cotangents(parameters, {}, statistics), values


def _differentiated(
    derivative: StepDerivative,
    calls: DifferentiableCalls,
    measurement: Measurement,
    sets: QuerySets,
    wanted: Sequence[Tensor],
) -> tuple[float, list[Tensor]]:
    """Return a measurement and its derivatives, through what its loss detaches, too, if that can be followed."""
    detached = DetachedValues(derivative.module)

    @contextmanager
    def followed() -> Iterator[None]:
        detached.follow = False  # what a loss is made of is told by gradients as training has them
        with detached, calls:
            yield
        detached.follow = True

    within = [(passes.within(followed), indices) for passes, indices in sets]
    try:
        value, parts = measurement.differentiated(within, wanted)
        if detached.met and type(measurement) is Loss:
            _, parts = _WholeLoss().differentiated(within, wanted)
        return value, parts
    except Exception as error:
        if not detached.met or is_out_of_memory(error):
            raise
        found = measurement.differentiated([(passes.within(lambda: calls), each) for passes, each in sets], wanted)
        derivative.unfollowed = str(error).partition("\n")[0]
        return found


def weighting_of(rerun: Rerun, task: Task, forms: Forms) -> Weighting:
    """Find out on the run's last steps how its loss is weighted; call within ``rerun.standing``."""
    steps = len(rerun.record.steps)
    chosen: list[tuple[StepInput, int]] = []
    sets: list[set[int]] = []
    for step in rerun.segment(max(steps - 2, 0), steps):
        for place, batch in enumerate(step.record.batches):
            own = set(map(int, batch.indices))
            if batch.loss is not None and own not in sets and len(chosen) < 2:
                chosen.append((step, place))
                sets.append(own)
    if not chosen:
        raise ReplayError("the last steps of the run had no loss; expected one that can be attributed.")

    def run(number: int, tap: LossTap | None) -> tuple[Tensor, Heard]:
        step, place = chosen[number]
        write(places_of(rerun.module), {**chosen[0][0].state.parameters, **chosen[0][0].state.buffers})
        rerun.stand(step, place)
        with forward_context(rerun.record.recipe, rerun.module):
            return run_tapped(task, rerun.module, step.batches[place], tap)

    return weighting(run, [len(step.record.batches[place].indices) for step, place in chosen], forms)
