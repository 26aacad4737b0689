"""What is known of one training batch, from its start to its end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_influence.data.tagging import Drawn
    from lightning_influence.objective.tap import TrainingTap
    from lightning_influence.training.flight.flight import Visit


@dataclass(eq=False)
class BatchRecord:
    """One training batch: made at its start, and handed along.

    Attributes:
        indices: Dataset indices of its examples, in their order; None if they are not known.
        reason: Why not.
        ragged: Whether its examples have several lengths and lie end to end.
        tap: What listens to its loss; None if nothing has to.
        measured: Whether its gradients are measured in flight.
        visit: What its backward pass says of them, until the step that it goes into.
        started: When it started, in seconds; None if it is not timed.
        paused: For how many of them training stood still while something was recorded.
        filed: Whether its loss was filed: a second backward pass of the same step is not a second visit.
        contradicted: Whether its examples had other labels before: it holds others than it seems.
        drawn: What was drawn for it, if that is known.
    """

    indices: tuple[int, ...] | None
    reason: str = ""
    ragged: bool = False
    tap: TrainingTap | None = None
    measured: bool = False
    visit: Visit | None = None
    started: float | None = None
    paused: float = 0.0
    filed: bool = False
    contradicted: bool = False
    drawn: Drawn | None = None

    def let_go(self) -> None:
        """Stop listening, and forget what was heard: it holds the graph of the batch."""
        if self.tap is not None:
            self.tap.stop()
            self.tap.forget()
            self.tap = None
