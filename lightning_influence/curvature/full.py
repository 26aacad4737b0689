"""The curvature of all covered parameters at once, correlations between layers included: GGN and Hessian.

Two forms: ``DenseCurvature`` holds the matrix and solves exactly, for small networks; ``ImplicitCurvature`` has its
products only and solves with an iterative solver, at the price of passes over the data for every solve.

Index legend: ``q`` vectors, ``n`` examples of a batch, ``p`` parameters, ``k, o, i`` a block's groups, outputs, inputs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from lightning_influence.core.precision import exact, wide
from lightning_influence.curvature.coordinates import BlockCoordinates
from lightning_influence.curvature.curvature import BlockCurvature, Curvature, Scorer
from lightning_influence.curvature.products.product import CurvatureProduct
from lightning_influence.curvature.solve.cg import Solution, SolverError, cg, lissa
from lightning_influence.curvature.solve.nystrom import nystrom_preconditioner
from lightning_influence.curvature.solve.spectrum import (
    IndefiniteError,
    Matvec,
    factorised,
    indefinite_reason,
    require_positive_definite,
)
from lightning_influence.gradients.capture import LayerIO
from lightning_influence.layers import per_sample

IterativeSolver = Literal["cg", "nystrom", "pcg", "lissa"]
Solver = Literal["auto", "dense"] | IterativeSolver

# Relative residuals to stop at. Influence scores need no more, and random batches (LiSSA) do not reach as far.
_TOLERANCES: dict[str, float] = {"cg": 1e-4, "nystrom": 1e-4, "pcg": 1e-4, "lissa": 1e-2}
# A solution that missed its tolerance but not this one is used, and the scores' notes say so.
_ACCEPTED = 0.1
_MOST_STEPS: dict[str, int] = {"cg": 1000, "nystrom": 1000, "pcg": 1000, "lissa": 2000}
_LISSA_BATCH = 64
# Products spent on looking for negative eigenvalues of a Hessian.
_LOOKS = 50
# A sketch of so many vectors pays from so many systems on: it costs a product of that many vectors, and on a digits
# network (trainer damping) it took 13 steps a system where plain CG took 35.
_RANK = 80
_WORTH_A_SKETCH = 8
# Random vectors that estimate the trace: the relative error is about 1 / sqrt(vectors · effective rank).
_PROBES = 16


class DenseCurvature(Curvature):
    """The matrix itself, factorised: exact solves and exact self-influence.

    Args:
        name: Which curvature.
        matrix: ``C: [p, p]`` in block coordinates.
        coordinates: The blocks.
        dampings: Block name to λ.
        labels: For the record.
        examples: For the record.

    Raises:
        IndefiniteError: If ``C + λ`` is not positive definite, or singular within rounding; the message gives its
            smallest eigenvalue.
    """

    def __init__(
        self,
        name: str,
        matrix: Tensor,
        coordinates: BlockCoordinates,
        dampings: Mapping[str, float],
        labels: Sequence[str],
        examples: Sequence[int],
    ) -> None:
        super().__init__(name, dampings, labels, examples)
        self.coordinates = coordinates
        self.matrix = matrix
        damped = exact(matrix, copy=True)
        damped.diagonal().add_(coordinates.spread(self.dampings, damped))
        self._factor, singular = factorised(damped, matrix.dtype)
        if singular is not None:
            # Of the damped matrix: with one damping per block that is the number that counts.
            (smallest, noise), least = singular, min(self.dampings.values())
            raise IndefiniteError(indefinite_reason(smallest - least, least, noise))

    @property
    def blockwise(self) -> None:
        """There is none: self-influence is no sum over blocks."""
        return None

    def solve(self, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return ``(C + λ)⁻¹ v``, block by block: name -> ``[..., k, o, i]``."""
        line = self.coordinates.join(vectors)
        columns = exact(line.reshape(-1, line.shape[-1])).T
        solved = torch.cholesky_solve(columns, self._factor).T.reshape(line.shape)
        return self.coordinates.split(solved.to(line))

    def scorer(self, n: int) -> Scorer:
        """Return what adds up the scores of one batch of ``n`` examples."""
        return _DenseScorer(self, n)

    def half_solved(self, gradients: Tensor) -> Tensor:
        """Return ``L⁻¹ g`` for ``g: [n, p]``, where ``C + λ = L Lᵀ``: its squared norm is the self-influence."""
        solved: Tensor = torch.linalg.solve_triangular(self._factor, exact(gradients).T, upper=False)
        return solved.T

    def tensors(self) -> dict[str, tuple[dict[str, Tensor], dict[str, str]]]:
        """Return the matrix and what its coordinates are."""
        about = self.about(json.dumps(self.dampings), json.dumps(self.weights))
        return {self.name: ({"matrix": self.matrix}, about | {"coordinates": repr(self.coordinates.shapes)})}


class ImplicitCurvature(Curvature):
    """Products only; ``solve`` runs an iterative solver, and ``solves`` tells how it fared.

    Args:
        name: Which curvature.
        product: Products with ``C``.
        coordinates: The blocks.
        dampings: Block name to λ.
        solver: Which solver.
        blocks: A block-diagonal curvature with the same damping, for self-influence, and to precondition ``"pcg"``.
        labels: For the record.
        examples: For the record.
        seed: Seed of LiSSA's random batches.

    Raises:
        IndefiniteError: If the curvature has a negative eigenvalue below ``-λ``, as far as was looked.
    """

    def __init__(
        self,
        name: str,
        product: CurvatureProduct,
        coordinates: BlockCoordinates,
        dampings: Mapping[str, float],
        *,
        solver: IterativeSolver,
        blocks: BlockCurvature,
        labels: Sequence[str],
        examples: Sequence[int],
        seed: int = 0,
    ) -> None:
        super().__init__(name, dampings, labels, examples)
        self.coordinates = coordinates
        self.blocks = blocks
        self._sketch: Matvec | None = None
        self._product = product
        self._solver = solver
        self._seed = seed
        self._places = coordinates.places_in(product.flat)
        like = product.gradient[:0].new_zeros(product.flat.size)
        # One damping for each block is the smallest of them for all, and the rest as part of the curvature.
        self._least = min(self.dampings.values())
        self._rest = coordinates.spread(self.dampings, like) - self._least
        if not product.semidefinite:
            require_positive_definite(self.matvec, like, self._least, max_steps=_LOOKS, seed=seed)

    @property
    def blockwise(self) -> BlockCurvature:
        """The curvature that stands in where it would take a solve for every example."""
        return self.blocks

    def matvec(self, v: Tensor) -> Tensor:
        """Multiply ``[..., p]`` in block coordinates by ``C`` and what dampings differ by."""
        return self._in_blocks(self._product, v)

    def solve(self, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return ``(C + λ)⁻¹ v``, block by block: name -> ``[..., k, o, i]``.

        Raises:
            SolverError: If a system was not solved to a relative residual of 0.1.
        """
        line = self.coordinates.join(vectors)
        systems = line.reshape(-1, line.shape[-1])
        # Queries with non-finite gradients get no score anyway, and one would spoil the others.
        finite = torch.isfinite(systems).all(1, keepdim=True)
        found = self._run(torch.where(finite, systems, 0))
        self.solves.append(found)
        worst = float(found.residual.max()) if len(found.residual) else 0.0
        if worst > _ACCEPTED:
            raise SolverError(f"{self.name} with {self._solver}: {found.reason}")
        if found.reason:
            self._note(f"{self.name} was solved with {self._solver} to a relative residual of {worst:.2g} only")
        return self.coordinates.split(found.solution.reshape(line.shape))

    def scorer(self, n: int) -> Scorer:
        """Return what adds up the scores of one batch; self-influence is that of the block-diagonal curvature."""
        return self.blocks.scorer(n)

    def tensors(self) -> dict[str, tuple[dict[str, Tensor], dict[str, str]]]:
        """Return the state of the block-diagonal curvature, and whose stand-in it is: there is no other."""
        return {
            name: (tensors, about | {"curvature": self.name})
            for name, (tensors, about) in self.blocks.tensors().items()
        }

    def _run(self, systems: Tensor) -> Solution:
        tolerance, steps = _TOLERANCES[self._solver], _MOST_STEPS[self._solver]
        if self._solver == "lissa":
            size = min(_LISSA_BATCH, self._product.examples)
            batches = (
                partial(self._in_blocks, product) for product in self._product.random_batches(size, seed=self._seed)
            )
            return lissa(batches, systems, self._least, matvec=self.matvec, steps=steps, tolerance=tolerance)
        preconditioner: Matvec | None = self._block_inverse if self._solver == "pcg" else None
        if self._solver == "nystrom" and len(systems) >= _WORTH_A_SKETCH:
            if self._sketch is None:
                self._sketch = nystrom_preconditioner(self.matvec, systems, _RANK, self._least, seed=self._seed)
            preconditioner = self._sketch
        return cg(
            self.matvec, systems, self._least, preconditioner=preconditioner, tolerance=tolerance, max_steps=steps
        )

    def _block_inverse(self, v: Tensor) -> Tensor:
        return self.coordinates.join(self.blocks.solve(self.coordinates.split(v)))

    def _in_blocks(self, product: Matvec, v: Tensor) -> Tensor:
        flat = torch.empty_like(v)
        flat[..., self._places] = v
        return product(flat)[..., self._places] + self._rest * v

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


class _DenseScorer(Scorer):
    def __init__(self, curvature: DenseCurvature, n: int) -> None:
        self._curvature = curvature
        self._n = n
        self._rows: dict[str, Tensor] = {}

    def add(self, io: LayerIO, query: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        formed = per_sample.formed(io.x, io.gs[0])
        self._rows[io.name] = formed
        flat = formed.flatten(1)
        inner = None if query is None else flat @ query.flatten().to(flat.dtype)
        return flat.square().sum(1), inner

    def self_influence(self) -> Tensor:
        curvature = self._curvature
        missing = curvature.matrix.new_zeros(())
        rows = {
            name: self._rows.get(name, missing.expand(self._n, *shape))
            for name, shape in curvature.coordinates.shapes.items()
        }
        return curvature.half_solved(curvature.coordinates.join(rows)).square().sum(1)

    def parts(self) -> dict[str, Tensor]:
        return {}


def mean_eigenvalue(product: Callable[[Tensor], Tensor], like: Tensor, *, seed: int = 0) -> float:
    """Estimate ``trace / p`` with random signs (Hutchinson 1990), one product of 16 vectors.

    Args:
        product: Multiplies ``[q, p]``.
        like: ``[p]``, for dtype and device.
        seed: Seed of the signs, the same on every process.
    """
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (_PROBES, like.shape[-1]), generator=generator).mul_(2).sub_(1).to(like)
    return float(wide(signs * product(signs)).sum()) / signs.numel()
