"""Which batches to measure: one of every so many, few enough for a budget of time."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Mapping
from typing import Any

# The first batches of a run warm up; then as many are timed with and without a measurement: together so many that what
# is computed once for many batches is among it. A few in a row, the first of which do not count: what a measurement
# holds more of the memory, the next batch has to ask for again, and would look slower than the measured one.
_WARM_UP = 16
_TIMED = 24
IN_A_ROW, SETTLING = 8, 2
# Of the budget, if the training dynamics leave less of it.
_LEAST_ROOM = 0.1


class Pace:
    """Decides which batches are measured.

    Of ``every`` consecutive batches one is drawn at random, from a stream that depends on its number alone: a resumed
    run draws the same ones, and no random stream of the training is touched.

    Args:
        every: Length of those runs, at least.
        budget: Largest share of the training time that recording may add, the training dynamics included; None takes
            ``every`` as it is.

    Attributes:
        dynamics: What the dynamics add to every batch, as a share of the time of a plain one; None until it is known.
        added: What a measurement adds to its batch, likewise.
    """

    def __init__(self, every: int = 1, budget: float | None = None) -> None:
        self.every = every
        self.budget = budget
        self.dynamics: float | None = None
        self.added: float | None = None
        self._batches = 0
        # Seconds of a batch, and those that recording took in between.
        self._times: dict[bool, list[tuple[float, float]]] = {True: [], False: []}

    @property
    def timing(self) -> bool:
        """Whether batches are still to be timed."""
        return self.budget is not None and self.added is None

    def due(self) -> bool:
        """Tell whether the next batch is measured."""
        number = self._batches
        self._batches += 1
        if self.timing:
            return number // IN_A_ROW % 2 == 0
        run, place = divmod(number, self.every)
        return self.every == 1 or random.Random(run).randrange(self.every) == place

    def took(self, measured: bool, seconds: float, recording: float = 0.0) -> None:
        """Note how long a batch took, and choose the pace once enough is known.

        Args:
            measured: Whether it was measured.
            seconds: From its start to its end, the optimizer's step included.
            recording: Those of them in which training stood still while something was recorded.
        """
        settling = (self._batches - 1) % IN_A_ROW < SETTLING
        if not self.timing or self.budget is None or self._batches <= _WARM_UP or settling:
            return
        self._times[measured].append((seconds, recording))
        if min(map(len, self._times.values())) < _TIMED:
            return
        others = self._times[False]
        plain = statistics.median(seconds - recording for seconds, recording in others)
        # A mean: what is computed for many batches at once takes long, and seldom.
        self.dynamics = statistics.mean(recording for _, recording in others) / plain
        longer = statistics.median(seconds for seconds, _ in self._times[True])
        self.added = max(0.0, (longer - statistics.median(seconds for seconds, _ in others)) / plain)
        room = max(self.budget - self.dynamics, _LEAST_ROOM * self.budget)
        self.every = max(self.every, math.ceil(self.added / room - 1e-9))
        self._times = {True: [], False: []}

    def note(self) -> str | None:
        """Return what a reader of the scores should know, if anything."""
        if self.added is None:
            if self.timing:
                return "TracIn in flight: training was too short to time it, so about half of the batches were measured"
            return None if self.every == 1 else f"TracIn in flight: one of {self.every} batches was measured"
        chosen = "every batch was" if self.every == 1 else f"one of {self.every} was"
        dynamics = f"the training dynamics added {self.dynamics or 0:.1%} to the time of a step"
        if self.budget is not None and (self.dynamics or 0) > (1 - _LEAST_ROOM) * self.budget:
            dynamics += " (hardly any room is left)"
        return (
            f"TracIn in flight: {dynamics}, measuring every batch {self.added:.1%}; {chosen} measured, for a budget of "
            f"{self.budget or 0:.1%}"
        )

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, in primitives."""
        return {"every": self.every, "dynamics": self.dynamics, "added": self.added, "batches": self._batches}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint, at its pace: another machine's may be another."""
        self.every, self.added, self._batches = state["every"], state["added"], state["batches"]
        self.dynamics = state.get("dynamics")
