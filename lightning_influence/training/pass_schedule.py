"""At which ends of epochs there is a pass for TracIn, so that an audit stays within its budget of time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lightning_influence.training.settings import TracIn

# Passes of a run, the last one included. Rank correlation with passes after all epochs: .86, .80, .68; .60 for the last
# alone (docs/tracin.md). Few choices, so that a run which is timed a little differently is seldom another.
_PASSES = 8, 4, 2


class PassSchedule:
    """Every n-th end of an epoch, n as small as the budget allows; the last one is part of the final pass.

    Args:
        tracin: How TracIn is computed; time decides in mode ``"auto"`` alone.

    Attributes:
        overhead: Largest share of the training time that the whole audit may add; None for a pass at every end.
        always: What the audit adds without these passes, as a multiple of the time of an epoch of training; None until
            it is known, and until then every end has its pass.
        each: What it adds to each epoch, as a share of that: what is recorded in steps, and shown meanwhile.
        one: What a pass adds, as ``always``.
    """

    def __init__(self, tracin: TracIn | None) -> None:
        self.overhead = tracin.overhead if tracin is not None and tracin.mode == "auto" else None
        self.always: float | None = None
        self.each = self.one = 0.0

    @property
    def decided(self) -> bool:
        """Whether it is known what fits."""
        return self.overhead is None or self.always is not None

    def decide(self, always: float, each: float, one: float) -> None:
        """Take what was measured, see the attributes."""
        # Numbers of numpy (from those of examples) would make the Trainer's checkpoint unreadable with `weights_only`.
        self.always, self.each, self.one = float(always), float(each), float(one)

    def spacing(self, epochs: int) -> int | None:
        """Return n for a training of so many epochs; None if the budget has room for the last pass alone."""
        if self.overhead is None or self.always is None:
            return 1
        for passes in _PASSES:
            n = math.ceil(epochs / passes)
            before_last = (epochs - 1) // n
            if before_last and self.always + self.one * before_last <= (self.overhead - self.each) * epochs:
                return n
        return None

    def due(self, ended: int, epochs: int) -> bool:
        """Tell whether there is a pass at the end of an epoch.

        Args:
            ended: Epochs that have ended, this one included.
            epochs: Those of the whole training, as far as is known by now.
        """
        n = self.spacing(epochs)
        return n is not None and ended % n == 0

    def share(self, epochs: int) -> float:
        """Return what the whole audit adds, as a share of the training time."""
        n = self.spacing(epochs)
        return self.each + ((self.always or 0.0) + self.one * (0 if n is None else (epochs - 1) // n)) / epochs

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, in primitives."""
        return {"overhead": self.overhead, "always": self.always, "each": self.each, "one": self.one}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on at the same rhythm, for the same budget: another machine's, or another time's, may be another."""
        if state["overhead"] == self.overhead:
            self.always, self.each, self.one = state["always"], state.get("each", 0.0), state["one"]
