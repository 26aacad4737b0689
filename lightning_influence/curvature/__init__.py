"""Curvature approximations, from the identity to the exact Hessian, behind one contract."""

from lightning_influence.curvature.block import CurvatureBlock, Eigenbasis
from lightning_influence.curvature.block_ggn import BlockGGN
from lightning_influence.curvature.damping import Damping, DampingChoice, OptimizerHistory, choose_damping
from lightning_influence.curvature.diagonal import DiagonalBlock
from lightning_influence.curvature.ekfac import EKFACBlock
from lightning_influence.curvature.fit import (
    FactorExamples,
    Fisher,
    check_curvature,
    check_labels,
    check_solver,
    choose_labels,
    choose_solver,
    factor_examples,
    fit,
    random_subset,
)
from lightning_influence.curvature.fitted import BlockCurvature, Curvature, Scorer
from lightning_influence.curvature.flat import FlatParameters
from lightning_influence.curvature.full import (
    BlockCoordinates,
    DenseCurvature,
    ImplicitCurvature,
    IterativeSolver,
    Solver,
)
from lightning_influence.curvature.ggn import GGNProduct
from lightning_influence.curvature.hessian import HessianProduct
from lightning_influence.curvature.identity import IdentityBlock
from lightning_influence.curvature.kfac import KFACBlock, KroneckerBlock
from lightning_influence.curvature.ladder import BLOCKS, LADDER, CurvatureName, check_memory, fitted_bytes
from lightning_influence.curvature.products import CurvatureProduct
from lightning_influence.curvature.solvers import Solution, SolverError
from lightning_influence.curvature.spectrum import IndefiniteError

__all__ = [
    "BLOCKS",
    "LADDER",
    "BlockCoordinates",
    "BlockCurvature",
    "BlockGGN",
    "Curvature",
    "CurvatureBlock",
    "CurvatureName",
    "CurvatureProduct",
    "Damping",
    "DampingChoice",
    "DenseCurvature",
    "DiagonalBlock",
    "EKFACBlock",
    "Eigenbasis",
    "FactorExamples",
    "Fisher",
    "FlatParameters",
    "GGNProduct",
    "HessianProduct",
    "IdentityBlock",
    "ImplicitCurvature",
    "IndefiniteError",
    "IterativeSolver",
    "KFACBlock",
    "KroneckerBlock",
    "OptimizerHistory",
    "Scorer",
    "Solution",
    "Solver",
    "SolverError",
    "check_curvature",
    "check_solver",
    "check_labels",
    "check_memory",
    "choose_damping",
    "choose_labels",
    "choose_solver",
    "factor_examples",
    "fit",
    "fitted_bytes",
    "random_subset",
]
