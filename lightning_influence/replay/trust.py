"""How far scores by replay can be trusted: what they foretell of trainings without some examples, and what these bring.

The run is trained again a few times, from the same start and in the same order, each time with the weight 0 for a few
random examples. Where the trajectory bends within that distance (a hot learning rate, ReLU, max pooling), derivatives
at the run itself say little of it.

Index legend: ``t`` trials, ``q`` queries, ``n`` training examples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_influence.core.errors import check_count
from lightning_influence.core.torch_private import ahead_of, eagerly
from lightning_influence.core.weights import places_of, swapped
from lightning_influence.objective.scale import NoLossError
from lightning_influence.objective.task import Task
from lightning_influence.replay.differentiable_calls import statistics_of
from lightning_influence.replay.record import RunState, StepInput, Streams
from lightning_influence.replay.rerun import Rerun, clip, forward_context, optimizer_of
from lightning_influence.replay.weighting import Weighting
from lightning_influence.scores.measurements import Measurement, MeasurementError
from lightning_influence.scores.measurements.base import QuerySets

SHARE = 0.05
"""Of the training examples, left out in each trial."""
FEWEST = 3
"""Trials that a correlation takes."""

# Mean correlation of predicted and actual changes.
_RELIABLE, _RANKING = 0.95, 0.9
# Nodes of the graph whose derivative jumps, and what is smooth in their place.
_KINKS = {
    "smooth activations (GELU, SiLU) in place of ReLU": ("Relu", "LeakyRelu", "Prelu", "Hard", "Rrelu", "Threshold"),
    "average pooling in place of max pooling": ("MaxPool", "AdaptiveMaxPool", "FractionalMaxPool", "MkldnnMaxPool"),
}


@dataclass(frozen=True, eq=False)
class Trust:
    """What a self-test has shown.

    Attributes:
        predicted: Changes of the measurement as the scores foretell them ``[t, q]``.
        actual: Its changes in the trainings without some examples ``[t, q]``.
        left_out: Number of examples that were left out in each trial.
        helps: What in the recipe would bring the two closer.
        notes: What else a reader should know.
    """

    predicted: Tensor
    actual: Tensor
    left_out: int
    helps: Sequence[str] = ()
    notes: Sequence[str] = ()

    @property
    def correlations(self) -> Tensor:
        """Correlation of predicted and actual changes over the trials, ``[q]``; NaN where nothing changes."""
        one, other = (each.double() - each.double().mean(0) for each in (self.predicted, self.actual))
        lengths: Tensor = one.norm(dim=0) * other.norm(dim=0)
        return (one * other).sum(0) / lengths

    @property
    def correlation(self) -> float:
        """Its mean over the queries; NaN if nothing changes for any of them."""
        return float(self.correlations.nanmean())

    @property
    def word(self) -> str:
        """``"reliable"``, ``"for ranking"``, ``"not for removals"``; ``"unknown"`` if nothing changes."""
        found = self.correlation
        if math.isnan(found):
            return "unknown"
        return "reliable" if found >= _RELIABLE else "for ranking" if found >= _RANKING else "not for removals"

    def __str__(self) -> str:
        """Return it as a person reads it."""
        trials, queries = self.actual.shape
        told = (
            f"self-test: {self.word}. In {trials} trainings without {self.left_out:,} random examples, predicted and "
            f"actual changes correlate by {self.correlation:.3f} (mean over {queries:,} "
            f"{'query' if queries == 1 else 'queries'})"
        )
        if constant := int(self.correlations.isnan().sum()):
            told += f", {constant:,} of which did not change"
        return told if self.word == "reliable" else f"{told}. What would help: {'; '.join(self.helps)}"

    def __repr__(self) -> str:
        return f"Trust({self.correlation:.3f}, {self.word!r})"


def check_trials(self_test: Any) -> int:
    """Return the number of trials; raise ``ValueError`` if that is none."""
    if self_test is False or (type(self_test) is int and self_test == 0):
        return 0
    return check_count("self_test", self_test, "0 for none", least=FEWEST)


def self_test(
    rerun: Rerun,
    way: Weighting,
    ends: Sequence[tuple[Measurement, QuerySets]],
    scores: tuple[Tensor, Tensor],
    *,
    trials: int = 5,
    task: Task | None = None,
    advance: Callable[[int], None] = lambda steps: None,
    seed: int = 0,
) -> Trust:
    """Train a run again without some examples, and compare with what the scores foretell.

    Args:
        rerun: The run; it has been verified.
        way: How its examples are weighted.
        ends: Measurements, each with what it is made on.
        scores: Training examples ``[n]``, and all scores ``[q, n]``.
        trials: Number of trainings.
        task: The loss by example, by default that of the run.
        advance: Called after each step.
        seed: Of the choice of examples.
    """
    examples, found = scores
    n, steps = len(examples), len(rerun.record.steps)
    left_out = max(1, round(SHARE * n))
    generator, retraining = torch.Generator().manual_seed(seed), Retraining(rerun, way, task or rerun.task)
    before = _values(rerun, rerun.record.states[steps], ends)
    predicted, actual = [], []
    for _ in range(trials):
        out = torch.randperm(n, generator=generator)[:left_out]
        weights = torch.ones(n)
        weights[out] = 0
        predicted.append(found[:, out].double().sum(1) / rerun.record.recipe.examples)
        actual.append(_values(rerun, retraining.end(examples, weights, advance), ends) - before)
    rate = max(float(group["lr"]) for step in rerun.record.steps for group in step.groups)
    return Trust(
        torch.stack(predicted),
        torch.stack(actual),
        left_out,
        [f"a cooler learning rate (it went up to {rate:.3g})", *retraining.smoother()],
        ["examples that are left out still take part in batch statistics"] if statistics_of(rerun.module) else [],
    )


class Retraining:
    """Runs a recorded training with other weights of its examples.

    Args:
        rerun: The run.
        way: How its examples are weighted.
        task: The loss by example.
    """

    def __init__(self, rerun: Rerun, way: Weighting, task: Task) -> None:
        self._rerun, self._way, self._task = rerun, way, task
        self._met: set[str] = set()  # kinds of nodes in the graph of the loss

    def smoother(self) -> list[str]:
        """Return what is smooth in the place of what the loss has been computed with."""
        return [told for told, kinds in _KINKS.items() if any(name.startswith(kinds) for name in self._met)]

    def end(self, examples: Tensor, weights: Tensor, advance: Callable[[int], None] = lambda steps: None) -> RunState:
        """Return parameters and buffers at the end.

        Args:
            examples: Dataset indices, sorted ``[n]``.
            weights: That multiply the examples' parts of the loss ``[n]``.
            advance: Called after each step.
        """
        rerun = self._rerun
        record, module = rerun.record, rerun.module
        first = record.states[0]
        with rerun.standing(), eagerly():
            places = places_of(module)
            own: dict[str, Any] = {name: places[name] for name in first.parameters}
            optimizer = optimizer_of(record.recipe, own)
            for number, step in enumerate(record.steps):
                for parameter in own.values():
                    parameter.grad = None
                batches, streams = list[Any](), list[Streams]()
                moment = StepInput(RunState(number, {}), step, batches, streams)
                for place, batch in enumerate(step.batches):
                    found, before = rerun.batch(number, batch)
                    batches.append(found)
                    streams.append(before)
                    rerun.stand(moment, place)
                    rows = torch.searchsorted(examples, torch.as_tensor(batch.indices, dtype=torch.long))
                    self._differentiate(found, weights[rows], batch.loss, own)
                clip(record.recipe, optimizer)
                for group, scalars in zip(optimizer.param_groups, step.groups, strict=True):
                    group.update(scalars)
                optimizer.step()
                advance(1)
            ended = {name: places[name].detach().clone() for name in [*own, *first.buffers]}
        return RunState(
            len(record.steps),
            {name: ended[name] for name in own},
            {name: ended[name] for name in first.buffers},
        )

    def _differentiate(self, batch: Any, weights: Tensor, loss: float | None, own: Mapping[str, Any]) -> None:
        """Add the gradient of a batch to those of the parameters."""
        recipe, module = self._rerun.record.recipe, self._rerun.module
        parameters = list(own.values())
        weights = weights.to(parameters[0]).requires_grad_(True)
        with forward_context(recipe, module):
            if loss is None:
                with suppress(NoLossError):
                    self._task(module, batch)
                return
            weighted, logits = self._way.loss(self._task, module, batch, weights)
        if not self._met:
            self._met = _kinds_of(weighted)
        parts = self._way.gradient(weighted / recipe.accumulation, logits, weights, parameters)
        for parameter, part in zip(parameters, parts, strict=True):
            if part is not None:
                part = part.detach()
                parameter.grad = part if parameter.grad is None else parameter.grad + part


def _values(rerun: Rerun, state: RunState, ends: Sequence[tuple[Measurement, QuerySets]]) -> Tensor:
    """Return what is measured at a state, ``[q]``; NaN where it is not finite."""
    values = []
    with swapped(places_of(rerun.module), {**state.parameters, **state.buffers}):
        for measurement, sets in ends:
            try:
                values.append(measurement.measure(sets, gradient=False).value)
            except MeasurementError:
                values.append(math.nan)
    return torch.tensor(values, dtype=torch.float64)


def _kinds_of(loss: Tensor) -> set[str]:
    """Return the kinds of nodes in a graph."""
    found, waiting, seen = set[str](), [loss.grad_fn], set[int]()
    while waiting:
        node = waiting.pop()
        if node is None or id(node) in seen:
            continue
        seen.add(id(node))
        found.add(type(node).__name__)
        waiting += [ahead for ahead, _ in ahead_of(node)]
    return found
