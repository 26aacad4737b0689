"""A recorded run, asked what its examples did: run again to the last bit, gone back through, and put to the test."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from torch import Tensor

from lightning_influence.core.errors import check_flag, is_number, short
from lightning_influence.core.progress import say, shown
from lightning_influence.core.torch_private import eagerly
from lightning_influence.core.weights import parameters_of
from lightning_influence.gradients.passes import ExampleGradients, Progress
from lightning_influence.objective.task import Task
from lightning_influence.replay.backward import Cost, check_memory, check_record
from lightning_influence.replay.mixing import check_rows
from lightning_influence.replay.record import ReplayError, StepInput
from lightning_influence.replay.rerun import Rerun
from lightning_influence.replay.scores import replay_measurement, replay_scores, weighting_of
from lightning_influence.replay.trust import FEWEST, Trust, check_trials, self_test
from lightning_influence.replay.weighting import Weighting
from lightning_influence.scores.measurements import (
    AnyMeasurement,
    Measurement,
    MeasurementError,
    MeasurementScores,
    Statistic,
    as_measurement,
)
from lightning_influence.scores.measurements.base import QuerySets
from lightning_influence.scores.pairs import PairwiseScores

# Steps that are timed, and what a step of a trial takes over one of the run: its gradient is taken with its graph.
_TIMED, _TRIAL = 3, 1.5
# Of the last steps, and of those before: not every one has to mix its examples.
_LOOKED_AT = 8
_IN_STEPS = partial(shown, unit="step")


@dataclass(frozen=True, eq=False, repr=False)
class ReplayedPairs(PairwiseScores):
    """Scores of all pairs by replay, ``-N ∂f_q/∂w_z``: leaving ``z`` out of this run adds ``score / N`` to ``f_q``.

    Attributes:
        trust: How well they foretell trainings without some examples; None without a self-test.
    """

    trust: Trust | None = None

    def __repr__(self) -> str:
        told = "no self-test" if self.trust is None else repr(self.trust)
        return f"ReplayedPairs({len(self.queries):,} queries x {len(self.examples):,} examples; {told})"


@dataclass(frozen=True, eq=False, repr=False)
class ReplayedMeasurement(MeasurementScores):
    """Scores of training examples for one measurement of a whole set, by replay.

    Attributes:
        trust: As for ``ReplayedPairs``.
    """

    trust: Trust | None = None


@dataclass(eq=False)
class _Bill:
    """What a replay takes in all, told as soon as it is known, and held against a limit."""

    steps: int
    trials: int
    most: float | None
    tell: Callable[[str], None]
    verified: float = 0.0
    _began: float = field(default_factory=time.perf_counter)
    _first: float = 0.0
    _done: int = 0

    def __post_init__(self) -> None:
        if self.most is not None and not is_number(self.most, above=0):
            raise ValueError(f"max_cost={short(self.most)}; expected a number of seconds > 0, or None.")

    def running_again(self) -> None:
        """Count a step of the run that is being verified; after a few, the rest of the run is known to take as long."""
        self._done += 1
        if self._done == 1:
            self._first = time.perf_counter()
        if self._done == min(1 + _TIMED, self.steps):
            again = self.steps * (time.perf_counter() - self._first) / _TIMED
            self._check(again * (2 + _TRIAL * self.trials), "at least ")

    def left(self) -> float:
        """Return the seconds that are left."""
        return math.inf if self.most is None else self.most - (time.perf_counter() - self._began)

    def told(self, cost: Cost) -> None:
        """Note what going back takes."""
        test = self.trials * _TRIAL * self.verified
        total = self.verified + cost.seconds + test
        tested = f", {test:.3g} for the self-test" if self.trials else ""
        self.tell(
            f"about {total:.3g} seconds in all, {self.verified:.3g} to run the training again, {cost.seconds:.3g} to "
            f"go back through it{tested}"
        )
        self._check(total)

    def _check(self, seconds: float, least: str = "") -> None:
        if self.most is not None and seconds > self.most:
            without = ", leave out the self-test (`self_test=0`)" if self.trials else ""
            raise ReplayError(
                f"the replay would take {least}{seconds:.3g} seconds for {self.steps:,} steps, more than max_cost="
                f"{self.most:g}; allow more, take fewer queries{without}, or replay a shorter run."
            )


class Replay:
    """Asks a recorded run.

    Args:
        rerun: The run.
        task: The loss by example; by default that of the run.
        progress: Shows how far it is.
        told: Called with the cost, in words, after a few steps on the way back.
    """

    def __init__(
        self,
        rerun: Rerun,
        task: Task | None = None,
        progress: Progress = _IN_STEPS,
        told: Callable[[str], None] = lambda cost: say(f"replay: {cost}"),
    ) -> None:
        self._rerun, self._task, self._progress, self._told = rerun, task or rerun.task, progress, told

    def asked(
        self,
        queries: ExampleGradients,
        indices: Sequence[int],
        measurement: AnyMeasurement = "loss",
        *,
        together: bool = False,
        **settings: Any,
    ) -> ReplayedPairs | ReplayedMeasurement:
        """Return ``together`` or ``pairs``."""
        check_flag("together", together)
        if together:
            return self.together([(queries, indices)], measurement, **settings)
        return self.pairs(queries, indices, measurement, **settings)

    def pairs(
        self,
        queries: ExampleGradients,
        indices: Sequence[int],
        measurement: AnyMeasurement = "loss",
        *,
        max_cost: float | None = None,
        self_test: int | Literal["auto"] = 5,
    ) -> ReplayedPairs:
        """Score every query with every training example.

        Args:
            queries: Passes over the queries' data; the loss is scaled as that of the training data.
            indices: The queries.
            measurement: What is measured of each.
            max_cost: Seconds that all may take, the self-test included.
            self_test: Number of trainings without some examples that tell how far to trust the scores, see ``trust``;
                0 for none, ``"auto"`` for as few as can be if there is time for them.

        Raises:
            ReplayError: If the run can't be replayed or differentiated, does not come out the same, or takes too long.
            MeasurementError: If the measurement is not one of single queries, or not defined for these.
        """
        found = as_measurement(measurement)
        if not isinstance(found, Statistic) or not found.per_query:
            raise MeasurementError(f"{found.name} is measured on a set of queries as a whole: pass `together=True`.")
        ends = [(found, [(queries, [index])]) for index in indices]

        def scored(**shown: Any) -> tuple[PairwiseScores, Tensor, Tensor]:
            scores = replay_scores(self._rerun, queries, indices, found, task=self._task, **shown)
            return scores, scores.examples, scores.scores

        scores, trust, notes = self._asked(ends, scored, max_cost, self_test)
        return ReplayedPairs(scores.queries, scores.examples, scores.scores, None, scores.notes + notes, trust)

    def together(
        self,
        sets: QuerySets,
        measurement: AnyMeasurement = "loss",
        *,
        max_cost: float | None = None,
        self_test: int | Literal["if doubtful"] = 5,
    ) -> ReplayedMeasurement:
        """Score training examples by what they did to a measurement of sets of queries, taken as one.

        Args:
            sets: Passes over the data of each set, and which of its examples to take.
            measurement: What is measured.
            max_cost: As for ``pairs``, like the other.
            self_test: Number of trainings; ``"if doubtful"`` for as few as can be, if something counts as constant that
                need not be one and there is time for it.

        Raises:
            ReplayError, MeasurementError: As ``pairs``.
        """
        found = as_measurement(measurement)

        def scored(**shown: Any) -> tuple[MeasurementScores, Tensor, Tensor]:
            scores = replay_measurement(self._rerun, sets, found, task=self._task, **shown)
            return scores, scores.indices, scores.scores.unsqueeze(0)

        scores, trust, notes = self._asked([(found, sets)], scored, max_cost, self_test)
        return ReplayedMeasurement(scores.indices, scores.scores, scores.measured, scores.notes + notes, trust)

    def _asked(
        self,
        ends: Sequence[tuple[Measurement, QuerySets]],
        scored: Callable[..., tuple[Any, Tensor, Tensor]],
        max_cost: float | None,
        trials: int | Literal["auto", "if doubtful"],
    ) -> tuple[Any, Trust | None, list[str]]:
        """Verify, score, and test; return the scores, the test, and notes."""
        rerun, wanted = self._rerun, trials
        trials = 0 if wanted in ("auto", "if doubtful") else check_trials(wanted)
        if not ends or not all(indices for _, sets in ends for _, indices in sets):
            raise ValueError("there is no query; pass at least one index.")
        check_record(rerun.record)
        known, trained = parameters_of(rerun.module), rerun.record.states[0].parameters
        check_memory([known[name] for name in trained], rerun.record, len(ends))
        steps = len(rerun.record.steps)
        bill, began = _Bill(steps, trials, max_cost, self._told), time.perf_counter()
        way = self._weighting(ends[0][1][0][0])
        with self._progress("replay", steps * (2 + trials)) as advance:

            def again(count: int) -> None:
                bill.running_again()
                advance(count)

            began_again = time.perf_counter()
            rerun.verify(again)
            bill.verified = time.perf_counter() - began_again
            scores, examples, values = scored(told=bill.told, advance=advance)
            asked = wanted == "auto" or (wanted == "if doubtful" and scores.notes)
            if asked and bill.left() > FEWEST * _TRIAL * bill.verified:
                trials = FEWEST
            trust = None
            if trials:
                trust = self_test(rerun, way, ends, (examples, values), trials=trials, task=self._task, advance=advance)
        notes = [f"about this very run: same start, same order, {steps:,} steps; run again, it ended in the same bits"]
        notes += ["no self-test: how far to trust the scores is not known"] if trust is None else [str(trust)]
        notes += [] if trust is None else trust.notes
        notes.append(f"the replay took {time.perf_counter() - began:.3g} seconds")
        return scores, trust, notes

    def _weighting(self, queries: ExampleGradients) -> Weighting:
        """Find out how the loss is weighted: a refusal is not to wait for the whole run."""
        rerun, steps = self._rerun, len(self._rerun.record.steps)
        last = self._met(max(steps - _LOOKED_AT, 0), steps)
        with rerun.standing(), eagerly():
            way = weighting_of(rerun, self._task, queries.coverage.trace.forms)
            for step in last:
                check_rows(rerun, way, self._task, step)
        # Mixing may have ended with the first epochs. From a state that is kept, a step takes its batch alone.
        known = [step for step in rerun.record.states if step < steps - _LOOKED_AT]
        for start in known[:: math.ceil(len(known) / _LOOKED_AT) or 1]:
            (step,) = self._met(start, start + 1)
            with rerun.standing(), eagerly():
                check_rows(rerun, way, self._task, step)
        return way

    def _met(self, start: int, stop: int) -> list[StepInput]:
        try:
            return self._rerun.segment(start, stop)
        except ReplayError:
            self._rerun.verify()  # names the first step that differs
            raise
