"""Curvature approximations behind one block contract."""

from lightning_influence.curvature.block import CurvatureBlock
from lightning_influence.curvature.diagonal import DiagonalBlock
from lightning_influence.curvature.ekfac import EKFACBlock
from lightning_influence.curvature.fit import (
    BLOCKS,
    Curvature,
    CurvatureName,
    FactorExamples,
    Fisher,
    choose_labels,
    factor_examples,
    fit,
    random_subset,
)
from lightning_influence.curvature.identity import IdentityBlock
from lightning_influence.curvature.kfac import KFACBlock, KroneckerBlock

__all__ = [
    "BLOCKS",
    "Curvature",
    "CurvatureBlock",
    "CurvatureName",
    "DiagonalBlock",
    "EKFACBlock",
    "FactorExamples",
    "Fisher",
    "IdentityBlock",
    "KFACBlock",
    "KroneckerBlock",
    "choose_labels",
    "factor_examples",
    "fit",
    "random_subset",
]
