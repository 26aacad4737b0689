"""What is decided before anything is fitted: labels, numbers of examples, the solver."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from lightning_influence.core.memory import available_bytes, fits, readable
from lightning_influence.curvature.registry import LADDER, CurvatureName
from lightning_influence.curvature.solve.solvers import SOLVERS
from lightning_influence.gradients.coverage import Coverage
from lightning_influence.gradients.passes import Labels
from lightning_influence.gradients.starts import NO_EXACT_LABELS
from lightning_influence.objective.losses import known_losses
from lightning_influence.objective.terms import TaskError

Solver = Literal["auto", "dense", "cg", "nystrom", "pcg", "lissa", "woodbury"]
"""How systems with GGN or Hessian are solved, see ``fit``."""
Fisher = Literal["auto", "exact", "sampled", "empirical"]
"""Labels that a Fisher is fitted on: the model's own, in expectation or drawn, or the given ones."""

# Up to so many parameters the matrix is formed (float64: 134 MB), which gives exact self-influence of all examples.
_DENSE_BY_ITSELF = 4096
# A dense matrix in float32, made symmetric, in block order, in float64, and its factor.
_DENSE_BYTES = 28
# Products with more examples than this estimate the curvature hardly better, and cost a pass each.
_PRODUCT_EXAMPLES = 8192


@dataclass(frozen=True)
class FactorExamples:
    """How many examples each pass over the data sees.

    Attributes:
        covariances: For the eigenvectors (first pass).
        eigenvalues: For what is measured in the eigenbasis (second pass).
        products: For products with GGN or Hessian; None for all.
    """

    covariances: int
    eigenvalues: int
    products: int | None = None


def factor_examples(coverage: Coverage, positions: Mapping[str, int], draws: int, size: int) -> FactorExamples:
    """Return subset sizes that give every factor enough rows and do not grow with the data.

    A covariance of dimension ``m`` gets at least ``2 m`` rows, an example giving ``s`` of them (sides that keep the
    identity as their basis do not count). Beyond that both passes see 1,024 examples, or 512 where weights are shared
    over positions, which make an example worth more; exact labels make them worth more, too. LDS with all examples,
    1,024 and 512: .570, .567 and .560 (digits, MLP), .171, .167 and .169 (MNIST, CNN).

    Args:
        coverage: The layers.
        positions: Layer name to number of positions ``s``.
        draws: Labels per example in the second pass.
        size: Number of training examples.
    """
    rows = max(
        (math.ceil(2 * max(block.basis_sizes) / positions.get(name, 1)) for name, block in coverage.blocks.items()),
        default=0,
    )
    least = 512 if any(s > 1 for s in positions.values()) else 1024
    eigenvalues = min(size, least if draws <= 1 else max(256, 4096 // draws))
    # At least as many for the basis: outside of what it has seen, there is nothing to measure the eigenvalues in.
    return FactorExamples(min(size, max(least, rows, eigenvalues)), eigenvalues, min(size, _PRODUCT_EXAMPLES))


def choose_labels(fisher: Fisher, tapped: bool) -> tuple[Labels, Labels]:
    """Return the labels of the covariance pass and of the eigenvalue pass.

    Sampled labels are drawn by their part of the curvature (``losses``), which leaves little to gain from the exact
    expectation at a backward pass for every class. Measured (LDS on digits): labels drawn from the model itself .550,
    with exact eigenvalues .575; drawn by their part of the curvature .570; all exact .572.

    Args:
        fisher: ``"auto"`` samples, if there is anything to sample from.
        tapped: Whether the loss is known at all.
    """
    if fisher == "empirical" or (fisher == "auto" and not tapped):
        return "true", "true"
    return ("exact", "exact") if fisher == "exact" else ("sampled", "sampled")


def check_labels(name: CurvatureName, fisher: Fisher, tapped: bool, exact_draws: int | None) -> None:
    """Find out before training whether a curvature can have the labels that are asked for.

    Args:
        name: Which approximation.
        fisher: Which labels.
        tapped: Whether the loss is known at all.
        exact_draws: Those of one example, None where the expectation over labels has no closed form.

    Raises:
        TaskError: If it is the exact expectation, and that has none.
    """
    if fisher == "exact" and exact_draws is None and (LADDER[name].block.measures or LADDER[name].product):
        unknown = f'no known loss call was seen ({known_losses()}); use `fisher="empirical"`.'
        raise TaskError(f'fisher="exact": {NO_EXACT_LABELS if tapped else unknown}')


def random_subset(indices: Sequence[int], size: int, seed: int) -> list[int]:
    """Return ``size`` of the indices at random, in their own order; which ones depends on neither order nor process."""
    if size >= len(indices):
        return list(indices)
    generator = torch.Generator().manual_seed(seed)
    ranked = sorted(indices)
    chosen = {ranked[position] for position in torch.randperm(len(ranked), generator=generator)[:size].tolist()}
    return [index for index in indices if index in chosen]


def check_solver(name: str, solver: Solver) -> None:
    """Refuse a solver that can't be had with a curvature.

    One beside a curvature that takes none passes: an audit may fit another curvature later.

    Raises:
        ValueError: For Nyström on what may have negative eigenvalues.
    """
    product = LADDER[name].product
    needs = solver in SOLVERS and SOLVERS[solver].semidefinite
    if needs and product is not None and not product.semidefinite:
        raise ValueError(
            f'solver="{solver}" needs a curvature without negative eigenvalues, curvature={name!r} may have some: pass '
            '`solver="cg"` or "pcg", or `curvature="ggn"`.'
        )


def choose_solver(
    solver: Solver, size: int, device: torch.device, *, semidefinite: bool = True
) -> tuple[str, list[str]]:
    """Return the solver to take for ``size`` parameters, and what to say about it."""
    needed = _DENSE_BYTES * size * size
    iterative = "auto" if semidefinite else "cg"  # which of them, the number of systems tells
    if solver == "auto":
        return ("dense" if size <= _DENSE_BY_ITSELF and fits(needed, device) else iterative), []
    if solver != "dense" or fits(needed, device):
        return solver, []
    note = (
        f"a dense matrix of {size:,} parameters takes {readable(needed)}, and {readable(available_bytes(device) or 0)} "
        f"are available: an iterative solver was taken instead."
    )
    return iterative, [note]
