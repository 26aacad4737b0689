"""A GGN made of some of the gradients that it is the mean square of, and its inverse.

The GGN is ``1/N Σ_n Σ_d v_nd v_ndᵀ`` with a few gradients ``v`` for every example (one per class). Where a network has
learnt its data most of them are tiny. A gradient is taken with probability ``min(1, c ‖v‖²)`` and weighed by one over
it: the sum stays right on average, the large ones are in it as they are. ``r`` of them are inverted exactly
(Woodbury), at the price of two passes over the data, ``r² p`` and ``r³``; a product with the GGN sends every vector
through the network.

Index legend: ``n`` examples, ``d`` draws (gradients of an example), ``r`` gradients taken, ``q`` vectors, ``p``
parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing

import torch
from torch import Tensor

from lightning_influence.core import distributed
from lightning_influence.core.memory import available_bytes
from lightning_influence.core.precision import wide
from lightning_influence.curvature.coordinates import BlockCoordinates
from lightning_influence.curvature.solve.solution import SolverError
from lightning_influence.curvature.solve.spectrum import Matvec
from lightning_influence.gradients.capture import LayerIO
from lightning_influence.gradients.passes import ExampleGradients, Labels
from lightning_influence.layers import per_sample
from lightning_influence.layers.rows import Rows, added, some

# Gradients taken at most, and the share of the memory that they may take.
_MOST = 4096
_SHARE = 0.25
# With more gradients an example, one is drawn.
_EXACT = 32


def sampled_inverse(
    gradients: ExampleGradients, indices: Sequence[int], coordinates: BlockCoordinates, damping: Tensor
) -> Matvec:
    """Return a product with the inverse of a sampled GGN with damping, ``[q, p] -> [q, p]`` in block coordinates.

    Args:
        gradients: The passes.
        indices: Examples ``N`` that the GGN is the mean over.
        coordinates: The blocks.
        damping: ``[p]``, positive.

    Raises:
        SolverError: If the damping is lost in the rounding of the gradients' products.
    """
    labels, lengths, where = _squared_norms(gradients, indices)
    available = min(distributed.gather_objects(available_bytes(damping.device) or 2**33))
    room = available * _SHARE / (len(damping) * damping.element_size())
    chances = _chances(lengths, max(1, min(_MOST, int(room))))
    generator = torch.Generator().manual_seed(0)  # the same on every process
    taken = torch.rand(chances.shape, generator=generator, dtype=torch.float64) < chances
    rows = damping.new_zeros((int(taken.sum()), len(damping)))
    weights, start, places = chances.rsqrt() / len(where) ** 0.5, 0, coordinates.slices()
    chosen = [index for index, any_taken in zip(where, taken.any(1).tolist(), strict=True) if any_taken]
    number = {index: row for row, index in enumerate(where)}
    with closing(gradients.run(chosen, labels, title="sampled GGN", everywhere=True)) as batches:
        for batch in batches:
            own = [number[index] for index in batch.indices]
            wanted = taken[own]
            end = start + int(wanted.sum())
            with batch.attempt:
                # In the order of `_formed`: draw by draw.
                factors = weights[own].T[wanted.T].to(rows).unsqueeze(1)
                for io in batch.drained():
                    rows[start:end, places[io.name]] = _formed(io, wanted.to(damping.device)).mul_(factors)
                start = end
    return _woodbury(rows, damping)


def _squared_norms(gradients: ExampleGradients, indices: Sequence[int]) -> tuple[Labels, Tensor, list[int]]:
    """Return which labels there are gradients of, their squared norms ``[n, d]`` on the host, and of which examples."""
    labels: Labels = "exact"
    found: list[Tensor] = []
    where: list[int] = []
    with closing(gradients.losses(indices[:1], everywhere=True)) as losses:
        draws = [loss.exact_draws() for _, loss in losses]
    if any(number is None or number > _EXACT for number in draws):
        labels = "sampled"
    with closing(gradients.run(indices, labels, title="sizes of gradients", everywhere=True)) as batches:
        for batch in batches:
            with batch.attempt:
                by_draw = ([per_sample.squared_norms(x, g) for x, g in _draws(io)] for io in batch.drained())
                found.append(added(wide(torch.stack(draws, 1)) for draws in by_draw).cpu())
                where += batch.indices
    return labels, torch.cat(found).double(), where


def _draws(io: LayerIO) -> list[tuple[Tensor, Rows]]:
    count = max(len(io.xs), len(io.gs))
    return [(io.xs[draw % len(io.xs)], io.gs[draw % len(io.gs)]) for draw in range(count)]


def _formed(io: LayerIO, wanted: Tensor) -> Tensor:
    """Return a layer's gradients of a batch that are wanted (``[n, d]``), ``[r, k·o·i]``, draw by draw."""
    every = _draws(io)
    if len(every) < wanted.shape[1]:  # one for all draws
        every *= wanted.shape[1]
    examples = [wanted[:, draw].nonzero()[:, 0] for draw in range(wanted.shape[1])]
    parts = [
        per_sample.formed(some(x, which), some(g, which)).flatten(1)
        for (x, g), which in zip(every, examples, strict=True)
        if len(which)
    ]
    return torch.cat(parts)


def _chances(lengths: Tensor, count: int) -> Tensor:
    """Return ``min(1, c · lengths)`` that add up to ``count``, or 1 for all that are not zero."""
    ordered = lengths.flatten().sort(descending=True).values
    rest = ordered.flip(0).cumsum(0).flip(0)  # of those that are not surely taken
    if int((ordered > 0).sum()) <= count:
        return (lengths > 0).double()
    # The first place from which on nothing exceeds 1.
    sure = torch.arange(count, dtype=torch.float64)
    factors = (count - sure) / rest[:count]
    first = int((factors * ordered[:count] <= 1).nonzero()[0]) if bool((factors * ordered[:count] <= 1).any()) else 0
    return (lengths * factors[first]).clamp(max=1)


def _woodbury(rows: Tensor, damping: Tensor) -> Matvec:
    """Return ``v -> (RᵀR + diag(damping))⁻¹ v``; ``rows`` are overwritten."""
    roots = damping.rsqrt()
    rows *= roots
    small = wide(rows @ rows.T)
    small.diagonal().add_(1)
    factor, failed = torch.linalg.cholesky_ex(small)
    if int(failed):
        raise SolverError(
            f"woodbury: the GGN is not positive definite within the rounding of {rows.dtype}: the damping (least: "
            f"{float(damping.min()):.3g}) is too small for it. Raise `damping`, compute in float64, or take another "
            "`solver`."
        )

    def inverse(v: Tensor) -> Tensor:
        scaled = v * roots
        inner = torch.cholesky_solve(wide(rows @ scaled.T), factor).to(scaled)
        result: Tensor = (scaled - inner.T @ rows) * roots
        return result

    return inverse
