"""Curvature approximations, from the identity to the exact Hessian, behind one contract."""

from lightning_influence.curvature.blocks.block import CurvatureBlock, Eigenbasis
from lightning_influence.curvature.blocks.block_ggn import BlockGGN
from lightning_influence.curvature.blocks.diagonal import DiagonalBlock
from lightning_influence.curvature.blocks.ekfac import EKFACBlock
from lightning_influence.curvature.blocks.identity import IdentityBlock
from lightning_influence.curvature.blocks.kfac import KFACBlock, KroneckerBlock
from lightning_influence.curvature.choices import (
    FactorExamples,
    Fisher,
    check_labels,
    check_solver,
    choose_labels,
    choose_solver,
    factor_examples,
    random_subset,
)
from lightning_influence.curvature.coordinates import BlockCoordinates
from lightning_influence.curvature.curvature import BlockCurvature, Curvature, Scorer
from lightning_influence.curvature.damping import Damping, DampingChoice, choose_damping
from lightning_influence.curvature.fit import check_curvature, fit
from lightning_influence.curvature.full import DenseCurvature, ImplicitCurvature, IterativeSolver, Solver
from lightning_influence.curvature.products.flat import FlatParameters
from lightning_influence.curvature.products.ggn import GGNProduct
from lightning_influence.curvature.products.hessian import HessianProduct
from lightning_influence.curvature.products.product import CurvatureProduct
from lightning_influence.curvature.registry import BLOCKS, LADDER, CurvatureName, check_memory, fitted_bytes
from lightning_influence.curvature.solve.cg import Solution, SolverError
from lightning_influence.curvature.solve.spectrum import IndefiniteError
from lightning_influence.training.step_sizes import OptimizerHistory

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
