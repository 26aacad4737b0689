"""The diagonal of the Fisher in the parameter basis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from lightning_influence.curvature.blocks.block import EigenBlock, Measure
from lightning_influence.layers import per_sample
from lightning_influence.layers.patches import Activations, laid_out
from lightning_influence.layers.rows import Rows


class DiagonalBlock(EigenBlock):
    """``C = diag(mean over examples of G²)``."""

    passes: ClassVar[int] = 1
    title: ClassVar[str] = "diagonal"
    measures: ClassVar[tuple[Measure, ...]] = ("eigenvalues",)

    @classmethod
    def fitted_shapes(cls, shape: tuple[int, int, int], dense: tuple[bool, bool]) -> dict[str, tuple[int, ...]]:
        """Return that of the diagonal, which is the eigenvalues."""
        return {"eigenvalues": shape}

    def diagonal(self) -> Tensor:
        """Return the same."""
        return self.eigenvalues

    def self_influence(self, x: Tensor, g: Rows, damping: float) -> Tensor:
        """Return ``Σ G_n² / (diagonal + damping)``."""
        return per_sample.weighted_squares(x, g, self._inverse(damping))

    def self_influences(self, x: Tensor, g: Rows, dampings: Sequence[float]) -> Tensor:
        """Return self-influence for many dampings, ``[n, d]``: gradients are formed once."""
        return per_sample.weighted_squares(x, g, torch.stack([self._inverse(damping) for damping in dampings]))

    def _scaled(self, v: Tensor, scales: Tensor) -> Tensor:
        return v * scales

    def _contributions(self, xs: Sequence[Activations], gs: Sequence[Rows], examples: int) -> dict[str, Tensor]:
        return {"squares": per_sample.summed_squares(laid_out(xs), gs)}

    def _finish(self, sums: dict[str, Tensor]) -> None:
        self._result = {"eigenvalues": sums["squares"] / sums["examples"].to(sums["squares"].dtype)}
