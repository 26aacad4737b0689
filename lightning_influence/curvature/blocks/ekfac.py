"""EK-FAC: K-FAC's eigenbasis with the right eigenvalues (George et al. 2018, 1806.03884; Grosse et al. 2023)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

from torch import Tensor

from lightning_influence.curvature.blocks.block import Measure
from lightning_influence.curvature.blocks.eigenvectors import averaged
from lightning_influence.curvature.blocks.kfac import KFACBlock
from lightning_influence.curvature.blocks.kronecker import KroneckerBlock
from lightning_influence.layers.rows import Rows


class EKFACBlock(KFACBlock):
    """K-FAC's basis, with eigenvalues re-measured in it: the diagonal of the curvature in that basis is exact.

    The second pass must not reuse the label draw of the first: the eigenvectors have adapted to it, and eigenvalues
    measured with it come out biased. That leaves something to measure where the first pass has seen nothing: in a null
    space of a factor (fewer rows than dimensions) eigenvalues are the mean over its columns.
    """

    measures: ClassVar[tuple[Measure, ...]] = ("covariances", "eigenvalues")
    title: ClassVar[str] = "EK-FAC"

    def _contributions(self, xs: Sequence[Tensor], gs: Sequence[Rows], examples: int) -> dict[str, Tensor]:
        kind = KroneckerBlock if self._finished_passes else KFACBlock
        return kind._contributions(self, xs, gs, examples)

    def _decompositions(self, sums: dict[str, Tensor]) -> dict[str, Callable[[], dict[str, Tensor]]]:
        return {} if self._finished_passes else super()._decompositions(sums)

    def _finish(self, sums: dict[str, Tensor]) -> None:
        if not self._finished_passes:
            KFACBlock._finish(self, sums)
            return
        KroneckerBlock._finish(self, sums)
        # Which basis of a null space came out is a matter of rounding: no score may depend on it.
        eigenvalues = self.tensors["eigenvalues"]
        if "activation" in self._null:
            eigenvalues = averaged(eigenvalues, self._null["activation"])
        if "gradient" in self._null:
            eigenvalues = averaged(eigenvalues.mT, self._null["gradient"]).mT
        self.tensors["eigenvalues"] = eigenvalues.contiguous()
