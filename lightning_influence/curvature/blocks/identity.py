"""The identity: influence without curvature (grad-dot)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from lightning_influence.curvature.blocks.block import CurvatureBlock, Measure
from lightning_influence.layers import per_sample
from lightning_influence.layers.patches import Activations
from lightning_influence.layers.rows import Rows


class IdentityBlock(CurvatureBlock):
    """``C = I``. Damping only rescales: ``(1 + λ)⁻¹``."""

    passes: ClassVar[int] = 0
    title: ClassVar[str] = "identity"
    measures: ClassVar[tuple[Measure, ...]] = ()

    @classmethod
    def fitted_shapes(cls, shape: tuple[int, int, int], dense: tuple[bool, bool]) -> dict[str, tuple[int, ...]]:
        """Nothing is fitted."""
        return {}

    def damping(self, relative: float = 0.0) -> float:
        """Return 0: the identity needs no damping, and scores are then plain inner products."""
        return 0.0

    def matvec(self, v: Tensor) -> Tensor:
        """Return ``v``."""
        return v

    def solve(self, v: Tensor, damping: float) -> Tensor:
        """Return ``v / (1 + damping)``."""
        self._check_damping(damping, torch.ones(1))
        return v / (1 + damping)

    def apply(self, function: Callable[[Tensor], Tensor], v: Tensor) -> Tensor:
        """Return ``f(1) v``."""
        return v * function(v.new_ones(()))

    def diagonal(self) -> Tensor:
        """Return ones, ``[k, o, i]``."""
        return torch.ones(self.shape)

    def self_influence(self, x: Tensor, g: Rows, damping: float) -> Tensor:
        """Return ``‖G_n‖² / (1 + damping)``."""
        self._check_damping(damping, torch.ones(1))
        return per_sample.squared_norms(x, g) / (1 + damping)

    def self_influences(self, x: Tensor, g: Rows, dampings: Sequence[float]) -> Tensor:
        """Return self-influence for many dampings, ``[n, d]``."""
        norms = self.self_influence(x, g, 0.0)
        return torch.stack([norms / (1 + damping) for damping in dampings], 1)

    def _contributions(self, xs: Sequence[Activations], gs: Sequence[Rows], examples: int) -> dict[str, Tensor]:
        return {}

    def _finish(self, sums: dict[str, Tensor]) -> None:
        return None
