"""The diagonal of the Fisher in the parameter basis."""

from __future__ import annotations

from typing import ClassVar

from lightning_influence.curvature.blocks.block import Measure, Shape, Sides
from lightning_influence.curvature.blocks.kronecker import KroneckerBlock


class DiagonalBlock(KroneckerBlock):
    """``C = diag(mean over examples of G²)``: eigenvalues measured in the basis of the parameters."""

    measures: ClassVar[tuple[Measure, ...]] = ("eigenvalues",)
    title: ClassVar[str] = "diagonal"

    @classmethod
    def fitted_shapes(cls, shape: Shape, dense: Sides) -> dict[str, tuple[int, ...]]:
        """Return that of the eigenvalues; there is no other basis."""
        return {"eigenvalues": shape}
