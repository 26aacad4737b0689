"""TracIn: influence traced along the run (Pruthi et al. 2020, 2002.08484).

``TracIn(z, z) = Σ_t η_t ∇ℓ(z; θ_t)ᵀ P_t ∇ℓ(z; θ_t)``. A checkpoint stands for the optimizer steps since the one before
it, so ``η_t`` is the sum of the learning rates that those steps really used, per parameter, divided by
``1 - momentum`` (a constant gradient moves the weights by that much). ``P_t`` is what an adaptive optimizer multiplies
gradients with, elementwise, from its state (see ``optimizers``), and the identity for plain gradient steps; an
optimizer whose update is not known counts as plain, with its learning rate.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_influence.training.batch_record import BatchRecord
from lightning_influence.training.example_sums import ExampleSums, lengthened


class TracInScores:
    """Running TracIn self-influence of every example, from passes at checkpoints.

    Args:
        size: Number of examples of the data set.

    Attributes:
        late: Number of examples that came in a later pass than the first.
    """

    def __init__(self, size: int) -> None:
        self.values = torch.zeros(size, dtype=torch.float64)
        self.checkpoints: list[int] = []
        self._fewest = 0  # examples that a pass has scored
        self.late = 0

    def add(self, step: int, indices: Iterable[int], increments: Tensor) -> bool:
        """Add one checkpoint's part; a step that was added before (a resumed run) is left alone.

        Returns:
            Whether it was added.
        """
        self._fewest = min(self._fewest or len(increments), len(increments))
        self.late = max(self.late, len(increments) - self._fewest)
        if step in self.checkpoints:
            return False
        self.checkpoints.append(step)
        self.values[torch.as_tensor(list(indices))] += increments.cpu().double()
        return True

    def grow(self, size: int) -> None:
        """Have room for more examples."""
        self.values = lengthened(self.values, size)

    def state_dict(self) -> dict[str, Any]:
        """Return the sums and what they are of."""
        return {
            "values": self.values.clone(),
            "checkpoints": list(self.checkpoints),
            "fewest": self._fewest,
            "late": self.late,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.values, self.checkpoints = state["values"].clone(), list(state["checkpoints"])
        self._fewest, self.late = state["fewest"], state["late"]


class VisitSums:
    """Running TracIn in flight of every example: a sum over the times it was trained on.

    Where only some of the batches are measured, the sum over an example's measured visits is multiplied by its number
    of visits over that of the measured ones: the mean is taken for that of all, so that scores do not depend on how
    often chance has measured an example.

    Args:
        size: Number of examples of the data set.
    """

    def __init__(self, size: int) -> None:
        self.sums = ExampleSums(size, "tracin", "visits", "measured", whole=("visits", "measured"))
        self._next_step = 0  # optimizer steps before this one are in the sums
        # They wait on their device: copying each one at once would make a GPU wait in every step.
        self._waiting: list[tuple[BatchRecord, Tensor | None]] = []

    def first_time(self, step: int) -> bool:
        """Tell whether the sums lack an optimizer step, which is in them from now on."""
        new = step >= self._next_step
        self._next_step = max(self._next_step, step + 1)
        return new

    def add(self, batch: BatchRecord, increments: Tensor | None) -> None:
        """Add one batch, once it is known whether it is contradicted.

        Args:
            batch: An example that is in it twice was trained on twice.
            increments: ``η ‖g‖²``, ``[n]``; None if the batch was not measured.
        """
        self._waiting.append((batch, increments))

    def flush(self) -> None:
        """Add the waiting batches to the sums, but for those that hold other examples, as their labels have told."""
        waiting, self._waiting = self._waiting, []
        visits = [(batch.indices or (), values) for batch, values in waiting if not batch.contradicted]
        measured = [(indices, values) for indices, values in visits if values is not None]
        for name, batches in (("visits", visits), ("measured", measured)):
            rows = torch.from_numpy(np.fromiter(chain.from_iterable(indices for indices, _ in batches), np.int64))
            self.sums.add(name, rows, torch.ones(len(rows)))
        if measured:  # whose rows are those of the last round of the loop
            self.sums.add("tracin", rows, torch.cat([values.cpu() for _, values in measured]))

    def values(self) -> Tensor:
        """Return the scores, ``[size]``; NaN for examples that were trained on but never measured."""
        self.flush()
        visits, measured = self.sums["visits"], self.sums["measured"]
        return torch.where(visits > 0, self.sums["tracin"] * visits / measured, 0.0)

    @property
    def unmeasured(self) -> Tensor:
        """Examples that were trained on but never measured, ``[size]`` bool."""
        return (self.sums["visits"] > 0) & (self.sums["measured"] == 0)

    def grow(self, size: int) -> None:
        """Have room for more examples."""
        self.sums.grow(size)

    def state_dict(self) -> dict[str, Any]:
        """Return the sums, and how far they go."""
        return {"sums": self.sums.state_dict(), "next_step": self._next_step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.sums.load_state_dict(state["sums"])
        self._next_step = state["next_step"]
