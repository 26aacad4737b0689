"""The diagonal of the Fisher in the parameter basis."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from lightning_influence import per_sample
from lightning_influence.curvature.block import CurvatureBlock, Measure
from lightning_influence.patches import Activations, laid_out
from lightning_influence.rows import Rows


class DiagonalBlock(CurvatureBlock):
    """``C = diag(mean over examples of G²)``."""

    passes: ClassVar[int] = 1
    title: ClassVar[str] = "diagonal"
    measures: ClassVar[tuple[Measure, ...]] = ("eigenvalues",)

    def matvec(self, v: Tensor) -> Tensor:
        """Multiply elementwise."""
        return v * self.diagonal()

    def solve(self, v: Tensor, damping: float) -> Tensor:
        """Divide elementwise by ``diagonal + damping``."""
        return v * self._inverse(damping)

    def apply(self, function: Callable[[Tensor], Tensor], v: Tensor) -> Tensor:
        """Multiply elementwise by the function of the diagonal."""
        return v * function(self.diagonal())

    def diagonal(self) -> Tensor:
        """Return the mean squared gradients, ``[k, o, i]``."""
        self._check_fitted()
        return self._result["diagonal"]

    def self_influence(self, x: Tensor, g: Rows, damping: float) -> Tensor:
        """Return ``Σ G_n² / (diagonal + damping)``."""
        return per_sample.weighted_squares(x, g, self._inverse(damping))

    def self_influences(self, x: Tensor, g: Rows, dampings: Sequence[float]) -> Tensor:
        """Return self-influence for many dampings, ``[n, d]``: gradients are formed once."""
        return per_sample.weighted_squares(x, g, torch.stack([self._inverse(damping) for damping in dampings]))

    def _inverse(self, damping: float) -> Tensor:
        if self._cached is None or self._cached[0] != damping:
            diagonal = self.diagonal()
            self._check_damping(damping, diagonal)
            self._cached = damping, 1 / (diagonal + damping)
        return self._cached[1]

    def _contributions(self, xs: Sequence[Activations], gs: Sequence[Rows], examples: int) -> dict[str, Tensor]:
        return {"squares": per_sample.summed_squares(laid_out(xs), gs)}

    def _finish(self, sums: dict[str, Tensor]) -> None:
        self._result = {"diagonal": sums["squares"] / sums["examples"].to(sums["squares"].dtype)}
