"""EK-FAC: K-FAC's eigenbasis with the right eigenvalues (George et al. 2018, 1806.03884; Grosse et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from lightning_influence.curvature.blocks.block import Measure
from lightning_influence.curvature.blocks.kfac import KroneckerBlock
from lightning_influence.layers import per_sample
from lightning_influence.layers.patches import Activations, laid_out
from lightning_influence.layers.rows import Rows


class EKFACBlock(KroneckerBlock):
    """K-FAC's basis, with eigenvalues re-measured in it: ``lam = mean over examples of (Q_Bᵀ G_n Q_A)²``.

    The diagonal of the curvature in that basis is exact. The second pass must not reuse the label draw of the
    first: the eigenvectors have adapted to it, and eigenvalues measured with it come out biased.
    """

    passes: ClassVar[int] = 2
    title: ClassVar[str] = "EK-FAC"
    measures: ClassVar[tuple[Measure, ...]] = ("covariances", "eigenvalues")

    def _contributions(self, xs: Sequence[Activations], gs: Sequence[Rows], examples: int) -> dict[str, Tensor]:
        if not self._finished_passes:
            return super()._contributions(xs, gs, examples)
        return {"squares": per_sample.rotated_squares(laid_out(xs), gs, *self.basis)}

    def _finish(self, sums: dict[str, Tensor]) -> None:
        if not self._finished_passes:
            super()._finish(sums)
        else:
            squares = sums["squares"]
            self._result["eigenvalues"] = squares / sums["examples"].to(squares.dtype)
