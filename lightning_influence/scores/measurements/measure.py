"""Measuring a set of queries, and the influence of training examples on what is measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from lightning_influence.core.errors import short
from lightning_influence.curvature.curvature import Curvature
from lightning_influence.gradients.attempts import Attempt
from lightning_influence.gradients.passes import ExampleGradients
from lightning_influence.gradients.visitors import ExampleColumns, Visitor, in_order, visit
from lightning_influence.objective.terms import BatchLoss
from lightning_influence.scores.examples import score_examples
from lightning_influence.scores.measurements.base import (
    GroupMeans,
    Measured,
    Measurement,
    MeasurementError,
    QuerySets,
    Statistic,
)
from lightning_influence.scores.measurements.custom import Custom
from lightning_influence.scores.measurements.examples import Loss, Margin

MeasurementName = Literal["loss", "margin"]
"""Measurements that go by a word."""
AnyMeasurement: TypeAlias = "Measurement | MeasurementName | Callable[[Any, Any], Tensor]"
"""What ``as_measurement`` takes: one, its name, or a function ``(module, batch) -> number`` of the whole set."""


@dataclass(frozen=True, eq=False)
class MeasurementScores:
    """Influence of training examples on a measurement; the same on every process.

    Attributes:
        indices: Dataset indices of the training examples ``[n]``, sorted.
        scores: ``g_mᵀ (C + λ)⁻¹ g_z``, ``[n]`` float64; NaN where the example's gradient is not finite. Positive:
            training on the example lowers the measurement. Removing it from ``N`` training examples raises the
            measurement by about the score over ``N``, so those to remove for a smaller gap or adversarial loss are the
            most negative ones.
        measured: Value and gradient of the measurement.
        notes: What a reader should know.
    """

    indices: Tensor
    scores: Tensor
    measured: Measured
    notes: list[str] = field(default_factory=list)

    def __repr__(self) -> str:
        counts = ", ".join(f"{count:,} in {group}" for group, count in self.measured.counts.items())
        return f"MeasurementScores({len(self.indices):,} examples; measured {self.measured.value:.4g} of {counts})"


def as_measurement(measurement: AnyMeasurement) -> Measurement:
    """Return a measurement by name, or made of a function ``(module, batch) -> number`` of the whole set.

    Raises:
        ValueError: If it is neither.
    """
    if isinstance(measurement, Measurement):
        return measurement
    if measurement == "loss":
        return Loss()
    if measurement == "margin":
        return Margin()
    if isinstance(measurement, str) or not callable(measurement) or isinstance(measurement, type):
        raise ValueError(
            f"measurement={short(measurement)}; expected "
            f"{' or '.join(map(repr, get_args(MeasurementName)))}, an instance "
            "of a measurement, or a function (module, batch) -> number of the whole set."
        )
    return Custom(measurement)


def measurement_value(queries: ExampleGradients, indices: Sequence[int], measurement: AnyMeasurement) -> float:
    """Measure a set of examples: forward passes only.

    Args:
        queries: Passes over the examples' data.
        indices: The examples.
        measurement: What to measure, see ``as_measurement``.

    Raises:
        MeasurementError: If the measurement is not defined for these examples, or is not a finite number.
    """
    return _measured([(queries, indices)], measurement, gradient=False).value


def measurement_gradient(
    queries: ExampleGradients, indices: Sequence[int], measurement: AnyMeasurement
) -> dict[str, Tensor]:
    """Return the gradient of a measurement of the whole set, by block, ``[k, o, i]``.

    Exact whatever the batch size and the number of processes: of a gap between groups, too.

    Args:
        queries: Passes over the examples' data.
        indices: The examples.
        measurement: What to measure, see ``as_measurement``.

    Raises:
        MeasurementError: As ``measurement_value``, and if it does not depend on the covered parameters.

    Example:
        >>> gap = DemographicParityGap(group=is_black)
        >>> query = curvature.solve(measurement_gradient(queries, range(500), gap))
        >>> harm = score_examples(gradients, indices, query=query).columns["harm"]  # positive: raises the gap
    """
    return _measured([(queries, indices)], measurement).gradient


def measurement_scores(
    gradients: ExampleGradients,
    indices: Sequence[int],
    curvature: Curvature,
    queries: ExampleGradients | QuerySets,
    query_indices: Sequence[int] | None = None,
    measurement: AnyMeasurement = "loss",
) -> MeasurementScores:
    """Score training examples by their influence on a measurement of a set of queries.

    Args:
        gradients: Passes over the training data.
        indices: The training examples.
        curvature: The curvature, fitted on the training data.
        queries: Passes over the queries' data, with the model and coverage of the training data; the loss is scaled as
            theirs. Or several, each with its indices, taken as one set.
        query_indices: The queries, if there is one set.
        measurement: What to measure, see ``as_measurement``.

    Returns:
        The scores; their sign is that of all scores, see ``MeasurementScores``.

    Raises:
        MeasurementError: As ``measurement_gradient``.
        SolverError: If an iterative solver did not reach its tolerance.
    """
    sets = (
        [(queries, [] if query_indices is None else query_indices)]
        if isinstance(queries, ExampleGradients)
        else queries
    )
    measured = _measured([(passes.like(gradients), chosen) for passes, chosen in sets], measurement)
    found = score_examples(gradients, indices, query=curvature.solve(measured.gradient), title="influence")
    return MeasurementScores(found.indices, -found.columns["harm"], measured)


def mean_gradient(gradients: ExampleGradients, indices: Sequence[int], *, title: str = "queries") -> dict[str, Tensor]:
    """Return the mean gradient of the examples' losses, by layer, ``[k, o, i]``; non-finite examples are left out.

    Raises:
        ValueError: If no example has a finite gradient.
    """
    return mean_loss_gradient([(gradients, indices)], title=title)


def mean_loss_gradient(
    sets: QuerySets, *, title: str, watching: Callable[[int], Sequence[Visitor]] = lambda number: ()
) -> dict[str, Tensor]:
    """Return the same of several sets as one; ``watching`` gives by number who looks at the pass over a set, too."""
    means = GroupMeans(Loss(), sets[0][0])
    for number, (queries, indices) in enumerate(sets):
        visit(queries, indices, [means, *watching(number)], title=title)
    _, counts, gradients = means.gathered()
    if not int(counts[0]):
        raise ValueError("no query has a finite gradient.")
    return {name: value[0] / counts[0] for name, value in gradients.items()}


def measured_values(queries: ExampleGradients, indices: Sequence[int], statistic: Statistic) -> Tensor:
    """Return the value of every example by itself, ``[n]`` float64 on the host, in the order of the indices.

    Raises:
        MeasurementError: If only means over batches are known.
    """
    columns = ExampleColumns(indices, torch.device("cpu"))
    attempt = Attempt()
    with closing(queries.measuring(statistic).losses(indices, title="queries", attempt=attempt)) as losses:
        for own, loss in losses:
            with attempt:
                columns.add(own, {"values": single_values(statistic, loss).detach().cpu().double()})
    found, gathered = columns.gathered()
    return in_order(indices, found, gathered["values"])


def single_values(statistic: Statistic, loss: BatchLoss) -> Tensor:
    """Return the value of every example of a batch, ``[n]``.

    Raises:
        MeasurementError: If only the mean is known.
    """
    values = statistic.values(loss)
    if values is None:
        raise MeasurementError(
            f"the {statistic.name} of single examples is not known: the task returns the mean of the batch, and no "
            "known loss call accounts for it. Pass a `task=` (`loss=` of `Influence`) that returns one loss per "
            "example, or choose the queries yourself."
        )
    return values


def _measured(sets: QuerySets, measurement: AnyMeasurement, *, gradient: bool = True) -> Measured:
    if not sum(len(indices) for _, indices in sets):
        raise MeasurementError("there is no query to measure; pass at least one index.")
    return as_measurement(measurement).measure(sets, gradient=gradient)
