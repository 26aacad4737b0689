"""Which batches to measure: one of every so many, few enough for a budget of time."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch

from lightning_influence.core.precision import wait_for

# The first batches of a run warm up, and are listened to, which later ones may do without. Then as many turns are timed
# with a measurement as without: together so many batches that what is computed once for many is among them. The first
# of a turn do not count: what a measurement holds more of the memory, the next batch has to ask for again, and would
# look slower than the measured one.
_WARM_UP = 32
_TURNS = 4
IN_A_ROW, SETTLING = 8, 2
_TIMED = IN_A_ROW - SETTLING
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
        device: Where batches run.
    """

    def __init__(self, every: int = 1, budget: float | None = None) -> None:
        self.every = every
        self.budget = budget
        self.dynamics: float | None = None
        self.added: float | None = None
        self.device = torch.device("cpu")
        self._batches = 0
        # Of batches in a row, all of them measured or none: seconds, and those of them spent on recording.
        self._turns: list[tuple[bool, list[tuple[float, float]]]] = []

    @property
    def timing(self) -> bool:
        """Whether batches are still to be timed."""
        return self.budget is not None and self.added is None

    def clock(self) -> float:
        """Return the time in seconds, while batches are timed when the device has done all that it was given."""
        if self.timing:
            wait_for(self.device)
        return time.perf_counter()

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
        if not self._turns or self._turns[-1][0] is not measured:
            self._turns.append((measured, []))
        self._turns[-1][1].append((seconds, recording))
        others = [turn for measured, turn in self._turns if not measured]
        if min(len(others), len(self._turns) - len(others)) < _TURNS or len(self._turns[-1][1]) < _TIMED:
            return
        plain = statistics.median(seconds - recording for turn in others for seconds, recording in turn)
        # A mean: what is computed for many batches at once takes long, and seldom.
        self.dynamics = statistics.mean(recording for turn in others for _, recording in turn) / plain
        self.added = max(0.0, self._longer() / plain)
        room = max(self.budget - self.dynamics, _LEAST_ROOM * self.budget)
        self.every = max(self.every, math.ceil(self.added / room - 1e-9))
        self._turns = []

    def _longer(self) -> float:
        """Return by how many seconds a measured batch is longer.

        Each turn is compared with its neighbours, as machines are faster at one time than at another, and the upper
        quartile taken: where they disagree, the budget is to be kept.
        """
        medians = [statistics.median(seconds for seconds, _ in turn) for _, turn in self._turns]
        differences = [
            medians[place] - statistics.mean(medians[max(0, place - 1) : place] + medians[place + 1 : place + 2])
            for place, (measured, _) in enumerate(self._turns)
            if measured
        ]
        return statistics.quantiles(differences, n=4)[-1]

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
        self.every, self.dynamics, self.added, self._batches = (
            state[name] for name in ("every", "dynamics", "added", "batches")
        )
