"""Columns of scores, one row per example."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class ExampleScores:
    """Scores of a set of examples, sorted by dataset index; the same on every process.

    Attributes:
        indices: Dataset indices ``[n]``.
        columns: Column name to ``[n]``; NaN (or -1) where the loss or a gradient is non-finite.
        features: Inputs of the last layer ``[n, d]`` (mean over positions), if asked for.
    """

    indices: Tensor
    columns: dict[str, Tensor]
    features: Tensor | None

    def __repr__(self) -> str:
        return f"ExampleScores({len(self.indices):,} examples: {', '.join(self.columns)})"
