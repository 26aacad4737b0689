"""The identity: influence without curvature (grad-dot)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from lightning_influence.curvature.blocks.block import CurvatureBlock, Measure, Shape, Sides
from lightning_influence.layers import per_sample
from lightning_influence.layers.rows import Rows


class IdentityBlock(CurvatureBlock):
    """``C = I``. Damping only rescales: ``(1 + λ)⁻¹``."""

    measures: ClassVar[tuple[Measure, ...]] = ()
    title: ClassVar[str] = "identity"

    @classmethod
    def fitted_shapes(cls, shape: Shape, dense: Sides) -> dict[str, tuple[int, ...]]:
        """Nothing is fitted."""
        return {}

    @property
    def eigenvalues(self) -> Tensor:
        """Ones, ``[k, o, i]``; no data have told a type."""
        return torch.ones(()).expand(self.shape)

    def damping(self, relative: float = 0.0) -> float:
        """Return 0: the identity needs no damping, and scores are then plain inner products."""
        return 0.0

    def matvec(self, v: Tensor) -> Tensor:
        """Return ``v``."""
        return v

    def solve(self, v: Tensor, damping: float) -> Tensor:
        """Return ``v / (1 + damping)``."""
        self.check_damping(damping)
        return v / (1 + damping)

    def apply(self, function: Callable[[Tensor], Tensor], v: Tensor) -> Tensor:
        """Return ``f(1) v``."""
        return self._scaled(v, function(v.new_ones(())))

    def diagonal(self) -> Tensor:
        """Return ones, ``[k, o, i]``."""
        return self.eigenvalues

    def self_influences(self, x: Tensor, g: Rows, dampings: Sequence[float]) -> Tensor:
        """Return ``‖G_n‖² / (1 + damping)`` for every damping, ``[n, d]``."""
        for damping in dampings:
            self.check_damping(damping)
        norms = per_sample.squared_norms(x, g)
        return torch.stack([norms / (1 + damping) for damping in dampings], 1)

    def scores(
        self, x: Tensor, g: Rows, damping: float, query: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return squared gradient norm, self-influence, and inner product with ``query``, each ``[n]``."""
        influence = self.self_influence(x, g, damping)
        inner = None if query is None else per_sample.inner_products(x, g, query)
        return influence * (1 + damping), influence, inner

    def _scaled(self, v: Tensor, scales: Tensor) -> Tensor:
        return v * scales

    def _contributions(self, xs: Sequence[Tensor], gs: Sequence[Rows], examples: int) -> dict[str, Tensor]:
        return {}

    def _finish(self, sums: dict[str, Tensor]) -> None:
        return None
