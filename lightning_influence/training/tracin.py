"""TracIn: influence traced along the run (Pruthi et al. 2020, 2002.08484).

``TracIn(z, z) = Σ_t η_t ∇ℓ(z; θ_t)ᵀ P_t ∇ℓ(z; θ_t)``. A checkpoint stands for the optimizer steps since the one before
it, so ``η_t`` is the sum of the learning rates that those steps really used, per parameter, divided by
``1 - momentum`` (a constant gradient moves the weights by that much). ``P_t`` is what an adaptive optimizer multiplies
gradients with, elementwise, from its state (see ``optimizers``), and the identity for plain gradient steps; an
optimizer whose update is not known counts as plain, with its learning rate.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, groupby

import numpy as np
import torch
from torch import Tensor

# Batches of scores in flight that wait for being added up.
_FLUSH_EVERY = 64


class TracInScores:
    """Running TracIn self-influence of every example.

    Args:
        size: Number of examples of the data set.
    """

    def __init__(self, size: int) -> None:
        self.values = torch.zeros(size, dtype=torch.float64)
        self.checkpoints: list[int] = []

    def add(self, step: int, indices: Iterable[int], increments: Tensor) -> bool:
        """Add one checkpoint's part; a step that was added before (a resumed run) is left alone.

        Returns:
            Whether it was added.
        """
        if step in self.checkpoints:
            return False
        self.checkpoints.append(step)
        self.values[torch.as_tensor(list(indices))] += increments.cpu().double()
        return True


@dataclass(frozen=True, eq=False)
class Increments:
    """What a batch adds in flight: ``Σ η s + Σ g² (η x² + η')`` per example, not yet added up.

    Attributes:
        n: Number of examples.
        squares: Squared norms ``s: [n]``, each with its ``η``.
        lengths: Of linear maps with a row per example: lengths of inputs and output gradients, ``[n]`` each, and ``η``
            of weight and bias.
    """

    n: int
    squares: Sequence[tuple[Tensor, float]]
    lengths: Sequence[tuple[Tensor, Tensor, float, float]]

    @staticmethod
    def joined(batches: Sequence[Increments]) -> Tensor:
        """Add up each of several batches, and lay them end to end, float64; one by one it takes as long as a step."""
        parts = []
        for n, run in groupby(batches, lambda batch: batch.n):
            alike = list(run)
            total = torch.zeros(len(alike), n, dtype=torch.float64)
            if squares := [(k, *entry) for k, batch in enumerate(alike) for entry in batch.squares]:
                of, s, rates = zip(*squares, strict=True)
                total.index_add_(0, torch.tensor(of), _stacked(s) * _column(rates))
            if lengths := [(k, *entry) for k, batch in enumerate(alike) for entry in batch.lengths]:
                of, x, g, weights, biases = zip(*lengths, strict=True)
                inner = _stacked(x).square_().mul_(_column(weights)).add_(_column(biases))
                total.index_add_(0, torch.tensor(of), inner.mul_(_stacked(g).square_()))
            parts.append(total.flatten())
        return torch.cat(parts)


def _stacked(rows: Sequence[Tensor]) -> Tensor:
    return torch.stack(tuple(rows)).cpu().double()


def _column(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).unsqueeze(1)


class VisitSums:
    """Running TracIn in flight of every example: a sum over the times it was trained on.

    Where only some of the batches are measured, the sum over an example's measured visits is multiplied by its number
    of visits over that of the measured ones: the mean is taken for that of all, so that scores do not depend on how
    often chance has measured an example.

    Args:
        size: Number of examples of the data set.
    """

    def __init__(self, size: int) -> None:
        self.sums = {
            name: torch.zeros(size, dtype=torch.float64) for name in ("tracin", "tracin_visits", "tracin_measured")
        }
        # What all processes knew when they last told each other; the rest of the sums is this process's own.
        self._common = {name: value.clone() for name, value in self.sums.items()}
        # Increments wait on their device: copying each one at once would make a GPU wait in every step.
        self._waiting: list[tuple[Sequence[int], Increments | None]] = []

    def add(self, indices: Sequence[int], increments: Increments | None) -> None:
        """Add one batch.

        Args:
            indices: Dataset indices; one that is there twice was trained on twice.
            increments: ``η ‖g‖²``; None if the batch was not measured.
        """
        self._waiting.append((indices, increments))
        if len(self._waiting) >= _FLUSH_EVERY:
            self.flush()

    def flush(self) -> None:
        """Add the waiting batches to the sums."""
        waiting, self._waiting = self._waiting, []
        measured = [(rows, values) for rows, values in waiting if values is not None]
        for name, batches in (
            ("tracin_visits", [rows for rows, _ in waiting]),
            ("tracin_measured", [r for r, _ in measured]),
        ):
            rows = torch.from_numpy(np.fromiter(chain.from_iterable(batches), np.int64))
            self.sums[name].index_add_(0, rows, torch.ones(len(rows), dtype=torch.float64))
        if measured:
            # The rows of the measured batches: those of the last round of the loop.
            self.sums["tracin"].index_add_(0, rows, Increments.joined([values for _, values in measured]))

    def addends(self) -> list[Tensor]:
        """Return what is to be summed over the processes, each of which has seen its own part of the batches."""
        self.flush()
        return [value - self._common[name] for name, value in sorted(self.sums.items())]

    def take(self, totals: Sequence[Tensor]) -> None:
        """Take over what all processes have seen: the sums of their ``addends``."""
        added = zip(sorted(self.sums), totals, strict=True)
        self.load_state_dict({name: self._common[name] + total for name, total in added})

    def values(self) -> Tensor:
        """Return the scores, ``[size]``; NaN for examples that were trained on but never measured."""
        self.flush()
        visits, measured = self.sums["tracin_visits"], self.sums["tracin_measured"]
        return torch.where(visits > 0, self.sums["tracin"] * visits / measured, 0.0)

    @property
    def unmeasured(self) -> Tensor:
        """Examples that were trained on but never measured, ``[size]`` bool."""
        return (self.sums["tracin_visits"] > 0) & (self.sums["tracin_measured"] == 0)

    def state_dict(self) -> dict[str, Tensor]:
        """Return tensors only, for a Lightning checkpoint."""
        self.flush()
        return {name: value.clone() for name, value in self.sums.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a checkpoint."""
        self.sums = {name: state[name].clone() for name in self.sums}
        self._common = {name: value.clone() for name, value in self.sums.items()}
        self._waiting = []
