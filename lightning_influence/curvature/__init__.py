"""Curvature approximations, from the identity to the exact Hessian, behind one contract."""

from lightning_influence.curvature.blocks.block import CurvatureBlock
from lightning_influence.curvature.blocks.ekfac import EKFACBlock
from lightning_influence.curvature.blocks.identity import IdentityBlock
from lightning_influence.curvature.blocks.kfac import KFACBlock
from lightning_influence.curvature.blocks.kronecker import KroneckerBlock
from lightning_influence.curvature.choices import (
    FactorExamples,
    Fisher,
    Solver,
    check_labels,
    check_solver,
    choose_labels,
    choose_solver,
    factor_examples,
    random_subset,
)
from lightning_influence.curvature.coordinates import BlockCoordinates
from lightning_influence.curvature.curvature import BlockCurvature, Curvature
from lightning_influence.curvature.damping import Damping, DampingChoice, choose_damping
from lightning_influence.curvature.fit import check_curvature, fit
from lightning_influence.curvature.products.flat import FlatParameters
from lightning_influence.curvature.products.ggn import GGNProduct
from lightning_influence.curvature.products.hessian import HessianProduct
from lightning_influence.curvature.registry import (
    BLOCKS,
    LADDER,
    CurvatureName,
    decompositions,
    fitted_bytes,
)
from lightning_influence.curvature.saved import restored
from lightning_influence.curvature.solve.solution import SolverError
from lightning_influence.curvature.solve.solvers import SOLVERS
from lightning_influence.curvature.solve.spectrum import IndefiniteError
from lightning_influence.training.step_sizes import OptimizerHistory

__all__ = [
    "BLOCKS",
    "LADDER",
    "SOLVERS",
    "BlockCoordinates",
    "BlockCurvature",
    "Curvature",
    "CurvatureBlock",
    "CurvatureName",
    "Damping",
    "DampingChoice",
    "EKFACBlock",
    "FactorExamples",
    "Fisher",
    "FlatParameters",
    "GGNProduct",
    "HessianProduct",
    "IdentityBlock",
    "IndefiniteError",
    "KFACBlock",
    "KroneckerBlock",
    "OptimizerHistory",
    "Solver",
    "SolverError",
    "check_curvature",
    "check_solver",
    "check_labels",
    "choose_damping",
    "choose_labels",
    "choose_solver",
    "decompositions",
    "factor_examples",
    "fit",
    "fitted_bytes",
    "random_subset",
    "restored",
]
