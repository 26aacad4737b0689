"""The curvature of all covered parameters at once by its products, correlations between layers included.

Solving takes an iterative solver, at the price of passes over the data for every solve.

Index legend: ``q`` vectors, ``p`` parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cache, partial

import torch
from torch import Tensor

from lightning_influence.core.precision import wide
from lightning_influence.curvature.coordinates import BlockCoordinates
from lightning_influence.curvature.curvature import BlockCurvature, Curvature
from lightning_influence.curvature.products.product import CurvatureProduct
from lightning_influence.curvature.sampled import Effort
from lightning_influence.curvature.solve.solution import SolverError
from lightning_influence.curvature.solve.solvers import SOLVERS, System, cheapest
from lightning_influence.curvature.solve.spectrum import Matvec, require_positive_definite
from lightning_influence.gradients.capture import LayerIO

# A solution that missed its tolerance but not this one is used, and the scores' notes say so.
_ACCEPTED = 0.1
# Examples in a random batch.
_BATCH = 64
# Products spent on looking for negative eigenvalues of a Hessian.
_LOOKS = 50
# Random vectors that estimate the trace: the relative error is about 1 / sqrt(vectors · effective rank).
_PROBES = 16


class ImplicitCurvature(Curvature):
    """Products only; ``solve`` runs an iterative solver, and ``solves`` tells how it fared.

    Args:
        name: Which curvature.
        product: Products with ``C``.
        coordinates: The blocks.
        dampings: Block name to λ.
        solver: Which of ``SOLVERS``; ``"auto"`` for the cheapest.
        blocks: A block-diagonal curvature with the same damping, for self-influence, and as a preconditioner.
        sample: Makes what multiplies by the inverse of some of the data's gradients, see ``sampled``.
        effort: Estimates what products and ``sample`` take.

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
        solver: str,
        blocks: BlockCurvature,
        sample: Callable[[Mapping[str, float], Tensor], Matvec],
        effort: Callable[[Tensor], Effort],
    ) -> None:
        super().__init__(name, dampings, blocks.labels, [product.examples, *blocks.examples])
        self.coordinates = coordinates
        self.blocks = blocks
        self._product = product
        self._solver = solver
        self._places = coordinates.places_in(product.flat)
        like = product.gradient.new_zeros(product.flat.size)
        # One damping for each block is the smallest of them for all, and the rest as part of the curvature.
        least = min(self.dampings.values())
        whole = coordinates.spread(self.dampings, like)
        self._rest = whole - least
        if not product.semidefinite:
            require_positive_definite(self.matvec, like, least, max_steps=_LOOKS)
        self._system = System(
            self.matvec, least, self._block_inverse, self._random_batches, partial(sample, self.dampings, like), like
        )
        self._effort = cache(partial(effort, like))

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
        name = cheapest(self._system, self._effort(), len(systems)) if self._solver == "auto" else self._solver
        solver = SOLVERS[name]
        found = solver.solve(self._system, torch.where(finite, systems, 0), solver.tolerance, solver.steps)
        self.solves.append(replace(found, solution=found.solution.new_empty((0, line.shape[-1]))))  # not to keep [q, p]
        worst = float(found.residual.max()) if len(found.residual) else 0.0
        if worst > _ACCEPTED:
            raise SolverError(f"{self.name} with {name}: {found.reason}")
        about = f"to a relative residual of {worst:.2g} only" if found.reason else found.about
        note = f"{self.name} was solved with {name} {about}"
        if about and note not in self.notes:
            self.notes.append(note)
        return self.coordinates.split(found.solution.reshape(line.shape))

    def scores(self, io: LayerIO, query: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the scores of one block; self-influence is that of the block-diagonal curvature."""
        return self.blocks.scores(io, query)

    def tensors(self) -> dict[str, tuple[dict[str, Tensor], dict[str, str]]]:
        """Return the state of the block-diagonal curvature, and whose stand-in it is: there is no other."""
        stored = self.blocks.tensors().items()
        return {name: (tensors, about | {"curvature": self.name}) for name, (tensors, about) in stored}

    def _block_inverse(self, v: Tensor) -> Tensor:
        return self.coordinates.join(self.blocks.solve(self.coordinates.split(v)))

    def _random_batches(self) -> Iterator[Matvec]:
        products = self._product.random_batches(min(_BATCH, self._product.examples))
        return (partial(self._in_blocks, product) for product in products)

    def _in_blocks(self, product: Matvec, v: Tensor) -> Tensor:
        flat = torch.empty_like(v)
        flat[..., self._places] = v
        return product(flat)[..., self._places] + self._rest * v


def mean_eigenvalues(product: Callable[[Tensor], Tensor], like: Tensor, *, seed: int = 0) -> tuple[float, float]:
    """Estimate the mean of the eigenvalues and of their squares with random signs (Hutchinson 1990), by one product.

    Args:
        product: Multiplies ``[q, p]``.
        like: ``[p]``, for dtype and device.
        seed: Seed of the signs, the same on every process.
    """
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (_PROBES, like.shape[-1]), generator=generator).mul_(2).sub_(1).to(like)
    found = product(signs)
    return float(wide(signs * found).mean()), float(wide(found).square().mean())
