"""Curvature approximations, from the identity to the exact Hessian, behind one contract."""

from __future__ import annotations

from lightning_influence.curvature.blocks.block import CurvatureBlock
from lightning_influence.curvature.blocks.eigenvectors import eigendecomposition
from lightning_influence.curvature.blocks.ekfac import EKFACBlock
from lightning_influence.curvature.blocks.identity import IdentityBlock
from lightning_influence.curvature.blocks.kfac import KFACBlock
from lightning_influence.curvature.blocks.kronecker import KroneckerBlock
from lightning_influence.curvature.chain import TITLES, Chain, curvature_chain
from lightning_influence.curvature.choices import FactorExamples, Fisher, Solver
from lightning_influence.curvature.coordinates import BlockCoordinates
from lightning_influence.curvature.curvature import BlockCurvature, Curvature
from lightning_influence.curvature.damping import Damping
from lightning_influence.curvature.fit import fit
from lightning_influence.curvature.products.flat import FlatParameters
from lightning_influence.curvature.products.ggn import GGNProduct
from lightning_influence.curvature.products.hessian import HessianProduct
from lightning_influence.curvature.registry import BLOCKS, LADDER, CurvatureName, Rung
from lightning_influence.curvature.solve.cg import cg
from lightning_influence.curvature.solve.lissa import lissa
from lightning_influence.curvature.solve.nystrom import nystrom_preconditioner
from lightning_influence.curvature.solve.solution import SOLVED, UNSOLVED, Run, Solution, SolverError
from lightning_influence.curvature.solve.solvers import SOLVERS, IterativeSolver, System
from lightning_influence.curvature.solve.spectrum import IndefiniteError, row_norms, row_products
from lightning_influence.curvature.sweep import DampingSweep, damping_sweep

__all__ = [
    "BLOCKS",
    "LADDER",
    "SOLVED",
    "SOLVERS",
    "TITLES",
    "UNSOLVED",
    "BlockCoordinates",
    "BlockCurvature",
    "Chain",
    "Curvature",
    "CurvatureBlock",
    "CurvatureName",
    "Damping",
    "DampingSweep",
    "EKFACBlock",
    "FactorExamples",
    "Fisher",
    "FlatParameters",
    "GGNProduct",
    "HessianProduct",
    "IdentityBlock",
    "IndefiniteError",
    "IterativeSolver",
    "KFACBlock",
    "KroneckerBlock",
    "Run",
    "Rung",
    "Solution",
    "Solver",
    "SolverError",
    "System",
    "cg",
    "curvature_chain",
    "damping_sweep",
    "eigendecomposition",
    "fit",
    "lissa",
    "nystrom_preconditioner",
    "row_norms",
    "row_products",
]
