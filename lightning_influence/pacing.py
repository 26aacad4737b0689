"""Which batches to measure: one of every so many, few enough for a budget of time."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Mapping
from typing import Any

# The first batches of a run warm up; then as many are timed with and without a measurement, in turn.
_WARM_UP = 6
_TIMED = 20


class Pace:
    """Decides which batches are measured.

    Of ``every`` consecutive batches one is drawn at random, from a stream that depends on its number alone: a resumed
    run draws the same ones, and no random stream of the training is touched.

    Args:
        every: Length of those runs, at least.
        budget: Largest share of the training time that measuring may add; None takes ``every`` as it is.
    """

    def __init__(self, every: int = 1, budget: float | None = None) -> None:
        self.every = every
        self.budget = budget
        self.added: float | None = None
        self._batches = 0
        self._times: dict[bool, list[float]] = {True: [], False: []}

    @property
    def timing(self) -> bool:
        """Whether batches are still to be timed."""
        return self.budget is not None and self.added is None

    def due(self) -> bool:
        """Tell whether the next batch is measured."""
        number = self._batches
        self._batches += 1
        if self.timing:
            return number % 2 == 0
        run, place = divmod(number, self.every)
        return self.every == 1 or random.Random(run).randrange(self.every) == place

    def took(self, measured: bool, seconds: float) -> None:
        """Note how long a batch took, and choose the pace once enough is known.

        Args:
            measured: Whether it was measured.
            seconds: From its start to its end, the optimizer's step included.
        """
        if not self.timing or self.budget is None or self._batches <= _WARM_UP:
            return
        self._times[measured].append(seconds)
        if min(map(len, self._times.values())) < _TIMED:
            return
        plain = statistics.median(self._times[False])
        self.added = max(0.0, statistics.median(self._times[True]) / plain - 1)
        self.every = max(self.every, math.ceil(self.added / self.budget - 1e-9))

    def note(self) -> str | None:
        """Return what a reader of the scores should know, if anything."""
        if self.added is None:
            if self.timing:
                return "TracIn in flight: training was too short to time it, so every other batch was measured"
            return None if self.every == 1 else f"TracIn in flight: one of {self.every} batches was measured"
        chosen = "every batch was" if self.every == 1 else f"one of {self.every} was"
        return (
            f"TracIn in flight: measuring every batch added {self.added:.1%} to the time of a step; {chosen} measured, "
            f"for a budget of {self.budget:.1%}"
        )

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, in primitives."""
        return {"every": self.every, "added": self.added, "batches": self._batches}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint, at its pace: another machine's may be another."""
        self.every, self.added, self._batches = state["every"], state["added"], state["batches"]
