"""The curvature of all covered parameters at once as a matrix, correlations between layers included: small networks.

Index legend: ``n`` examples of a batch, ``p`` parameters, ``k, o, i`` a block's groups, outputs, inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from functools import partial

import torch
from torch import Tensor

from lightning_influence.core import distributed
from lightning_influence.core.precision import exact, wide_zeros
from lightning_influence.curvature.coordinates import BlockCoordinates, joined_gradients
from lightning_influence.curvature.curvature import Curvature
from lightning_influence.curvature.products.product import CurvatureProduct
from lightning_influence.curvature.solve.spectrum import IndefiniteError, factorised, indefinite_reason
from lightning_influence.gradients.capture import LayerIO
from lightning_influence.gradients.passes import ExampleGradients
from lightning_influence.layers import per_sample


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

    def scores(self, io: LayerIO, query: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return squared gradient norms, the gradients themselves, and inner products with ``query``."""
        formed = per_sample.formed(io.x, io.gs[0])
        flat = formed.flatten(1)
        inner = None if query is None else flat @ query.flatten().to(flat.dtype)
        return flat.square().sum(1), formed, inner

    def self_influence(self, parts: Mapping[str, Tensor], n: int) -> Tensor:
        """Return ``‖L⁻¹ g‖²`` of every example, where ``C + λ = L Lᵀ``."""
        gradients = self.coordinates.join_rows(parts, n, self.matrix)
        solved: Tensor = torch.linalg.solve_triangular(self._factor, exact(gradients).T, upper=False)
        return solved.square().sum(0)

    def tensors(self) -> dict[str, tuple[dict[str, Tensor], dict[str, str]]]:
        """Return the matrix and what its coordinates are."""
        about = self.about(self.dampings) | {"coordinates": repr(self.coordinates.shapes)}
        return {self.name: ({"matrix": self.matrix}, about)}


def dense_matrix(
    product: CurvatureProduct, gradients: ExampleGradients, indices: Sequence[int], coordinates: BlockCoordinates
) -> Tensor:
    """Return ``[p, p]`` in block coordinates: outer products of gradients where that is cheaper, or products."""
    if product.semidefinite:
        found = _outer_products(gradients, indices, coordinates, product.gradient)
        if found is not None:
            return found
    return in_blocks(product, coordinates)


def in_blocks(product: CurvatureProduct, coordinates: BlockCoordinates) -> Tensor:
    """Return the matrix ``[p, p]`` of products, in block coordinates."""
    places = coordinates.places_in(product.flat)
    return product.to_dense()[places][:, places]


def _outer_products(
    gradients: ExampleGradients, indices: Sequence[int], coordinates: BlockCoordinates, like: Tensor
) -> Tensor | None:
    """Return the GGN ``[p, p]`` as the mean of outer products of per-example gradients, where that is the cheaper way.

    The exact expectation over labels makes it, ``Σ_draws v vᵀ``, at ``2 d p²`` operations an example for ``d`` draws.
    Products with ``p`` unit vectors cost about eight passes forward, ``8 p Σ_l s_l p_l`` for layers that share ``p_l``
    parameters over ``s_l`` positions, so that convolutions are better off with outer products.
    """
    draws, forward = 0, 0
    # The same example on every process: they all have to decide alike.
    with closing(gradients.run(indices[:1], everywhere=True)) as batches:
        for batch in batches:
            draws = batch.loss.exact_draws() or 0
            forward = sum(io.x.shape[2] * coordinates.sizes[io.name] for io in batch.layers())
    if not draws or draws * coordinates.size > 4 * forward:
        return None
    total = like.new_zeros((coordinates.size, coordinates.size))
    count = wide_zeros((), like.device)
    with closing(gradients.run(indices, "exact", title="GGN")) as batches:
        for batch in batches:
            with batch.attempt:
                for draw in range(draws):
                    rows = joined_gradients(batch, coordinates, draw)
                    # np, nr -> pr
                    batch.attempt.once(draw, partial(total.addmm_, rows.T, rows))
                count += batch.counted
    summed, examples = distributed.sum_across_processes([total, count])
    return summed / examples.to(summed.dtype)
