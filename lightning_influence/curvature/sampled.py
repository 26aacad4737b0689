"""A GGN made of some of the gradients that it is the mean square of, and its inverse.

The GGN is ``1/N Σ_n Σ_d v_nd v_ndᵀ`` with a few gradients ``v`` for every example (one per class). Where a network has
learnt its data most of them are tiny. A gradient is taken with probability ``min(1, c ‖v‖²)`` and weighed by one over
it: the sum stays right on average, the large ones are in it as they are. ``r`` of them are inverted exactly
(Woodbury), at the price of two passes over the data, ``r²`` inner products and ``r³``; a product with the GGN sends
every vector through the network. A layer's gradients are kept as its activations and output gradients where these are
smaller, as they are in large layers: a gradient of 10⁷ parameters then takes kilobytes.

Index legend: ``n`` examples, ``d`` draws (gradients of an example), ``r`` gradients taken, ``q`` vectors, ``p``
parameters; ``k, s, o, i`` a block's groups, positions, outputs, inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_influence.core import distributed
from lightning_influence.core.memory import available_bytes
from lightning_influence.core.precision import wide, wide_zeros
from lightning_influence.curvature.coordinates import BlockCoordinates
from lightning_influence.curvature.solve.solution import SolverError
from lightning_influence.curvature.solve.spectrum import Matvec
from lightning_influence.gradients.capture import LayerIO
from lightning_influence.gradients.passes import ExampleGradients, Labels
from lightning_influence.layers import per_sample
from lightning_influence.layers.rows import OneHot, Rows, added, some

# Gradients taken at most, and the share of the memory that they may take.
_MOST = 4096
_SHARE = 0.25
# With more gradients an example, one is drawn.
_EXACT = 32
# Passes forward that a product of one vector with the GGN takes.
_PRODUCT = 8
# Scalars of gradients formed at a time.
_FORMED = 2**25


@dataclass(frozen=True)
class Effort:
    """What a sampled inverse and a product with the GGN take, in multiplications (with an addition each).

    Attributes:
        exact: Whether gradients of the exact expectation over labels are taken, or of one drawn for each example.
        count: Gradients taken, ``r``.
        product: Of one vector with the GGN.
        once: Of making the inverse.
        each: Of applying it to a vector.
    """

    exact: bool
    count: int
    product: float
    once: float
    each: float

    @classmethod
    def of(
        cls, gradients: ExampleGradients, indices: Sequence[int], coordinates: BlockCoordinates, like: Tensor
    ) -> Effort:
        """Estimate it from one example, the same on every process; the arguments are those of ``sampled_inverse``."""
        inner, kept, forward = 0, 0, 0
        draws: int | None = None
        with closing(gradients.run(indices[:1], everywhere=True)) as batches:
            for batch in batches:
                draws = batch.loss.exact_draws()
                for io in batch.layers():
                    formed, scalars = _smaller(io)
                    kept += scalars
                    inner += coordinates.sizes[io.name] if formed or io.x.shape[2] > 1 else scalars
                    forward += io.x.shape[2] * coordinates.sizes[io.name]
        exact = draws is not None and draws <= _EXACT
        every = len(indices) * (draws or 1 if exact else 1)
        available = min(distributed.gather_objects(available_bytes(like.device) or 2**33))
        count = max(1, min(_MOST, every, int(available * _SHARE / (max(1, kept) * like.element_size()))))
        passes = 2 * (every + len(indices)) * forward
        return cls(
            exact,
            count,
            _PRODUCT * len(indices) * forward,
            passes + count * (count * (inner + count) + forward),
            2 * count * coordinates.size,
        )


def sampled_inverse(
    gradients: ExampleGradients,
    indices: Sequence[int],
    coordinates: BlockCoordinates,
    dampings: Mapping[str, float],
    like: Tensor,
) -> Matvec:
    """Return a product with the inverse of a sampled GGN with damping, ``[q, p] -> [q, p]`` in block coordinates.

    Args:
        gradients: The passes.
        indices: Examples ``N`` that the GGN is the mean over.
        coordinates: The blocks.
        dampings: Block name to λ, positive.
        like: For dtype and device.

    Raises:
        SolverError: If the damping is lost in the rounding of the gradients' products.
    """
    effort = Effort.of(gradients, indices, coordinates, like)
    labels: Labels = "exact" if effort.exact else "sampled"
    lengths, where, formed = _squared_norms(gradients, indices, labels)
    chances = _chances(lengths, effort.count)
    generator = torch.Generator().manual_seed(0)  # the same on every process
    taken = torch.rand(chances.shape, generator=generator, dtype=torch.float64) < chances
    weights, start, count = chances.rsqrt() / len(where) ** 0.5, 0, int(taken.sum())
    kept = {name: _Kept(formed[name], count) for name in coordinates.blocks if name in formed}
    chosen = [index for index, any_taken in zip(where, taken.any(1).tolist(), strict=True) if any_taken]
    number = {index: row for row, index in enumerate(where)}
    with closing(gradients.run(chosen, labels, title="sampled GGN", everywhere=True)) as batches:
        for batch in batches:
            own = [number[index] for index in batch.indices]
            wanted, factors = taken[own].to(like.device), weights[own].to(like)
            with batch.attempt:
                parts = {io.name: kept[io.name].cut(io, start, wanted, factors) for io in batch.drained()}
                for name, found in parts.items():
                    kept[name].parts += found
                start += int(wanted.sum())
    for each in kept.values():
        each.join()
    return _woodbury(kept, count, coordinates, dampings, like)


def _squared_norms(
    gradients: ExampleGradients, indices: Sequence[int], labels: Labels
) -> tuple[Tensor, list[int], dict[str, bool]]:
    """Return the squared norms ``[n, d]`` of gradients, on the host, of which examples, and which layers to form."""
    found: list[Tensor] = []
    where: list[int] = []
    formed = dict[str, bool]()

    def norms(io: LayerIO) -> Tensor:
        formed[io.name] = formed.get(io.name, False) or _smaller(io)[0]
        return torch.stack([per_sample.squared_norms(x, g) for x, g in _draws(io)], 1)

    with closing(gradients.run(indices, labels, title="sizes of gradients", everywhere=True)) as batches:
        for batch in batches:
            with batch.attempt:
                found.append(added(wide(norms(io)) for io in batch.drained()).cpu())
                where += batch.indices
    return torch.cat(found).double(), where, formed


def _draws(io: LayerIO) -> list[tuple[Tensor, Rows]]:
    count = max(len(io.xs), len(io.gs))
    return [(io.xs[draw % len(io.xs)], io.gs[draw % len(io.gs)]) for draw in range(count)]


def _smaller(io: LayerIO) -> tuple[bool, int]:
    """Return whether a gradient is smaller formed than what it is formed of, and how many scalars it then has."""
    (k, _, s, i), g = io.x.shape, io.gs[0]
    whole, factors = k * g.shape[3] * i, k * s * (i + (1 if isinstance(g, OneHot) else g.shape[3]))
    return whole <= factors, min(whole, factors)


class _Kept:
    """The gradients taken of one block, each times a factor.

    Args:
        formed: Whether they are kept as they are: as outer products with a single output.
        count: ``r``.

    Attributes:
        parts: The number of the first gradient, activations and output gradients, as they come.
    """

    def __init__(self, formed: bool, count: int) -> None:
        self._formed, self._count = formed, count
        self._outer: tuple[Tensor, Tensor] | None = None
        self.parts: list[tuple[int, Tensor, Rows]] = []

    def cut(self, io: LayerIO, start: int, wanted: Tensor, factors: Tensor) -> list[tuple[int, Tensor, Rows]]:
        """Return what to keep of a batch: the gradients that are wanted (``[n, d]``), draw by draw."""
        found, every = list[tuple[int, Tensor, Rows]](), _draws(io)
        for draw, column in enumerate(wanted.T):
            which = column.nonzero()[:, 0]
            scale = factors[which, draw].view(1, -1, 1, 1)
            x, g = every[draw % len(every)]  # there may be one for all draws
            a, b = some(x, which), some(g, which)
            if self._formed and len(which):
                found.append((start, per_sample.formed(a, b).flatten(1)[None, :, None], scale))
            elif len(which):
                found.append((start, a * scale, b))
            start += len(which)
        return found

    def join(self) -> None:
        """Lay the parts end to end if a gradient is one outer product; where a batch lacked the layer it is zero."""
        dense = [(start, x, g) for start, x, g in self.parts if isinstance(g, Tensor) and x.shape[2] == 1]
        if dense and len(dense) == len(self.parts):
            x, g = (some.new_zeros((len(some), self._count, some.shape[3])) for some in dense[0][1:])
            for start, a, b in dense:
                x[:, start : start + a.shape[1]], g[:, start : start + a.shape[1]] = a[:, :, 0], b[:, :, 0]
            self._outer, self.parts = (x, g), [(0, x.unsqueeze(2), g.unsqueeze(2))]

    def inner_products(self) -> Iterator[Tensor]:
        """Yield what adds up to the inner products of all gradients, ``[r, r]``."""
        if self._outer is not None:
            yield from ((a @ a.T).mul_(b @ b.T) for a, b in zip(*self._outer, strict=True))
            return
        for _, rows in self._columns():
            flat = rows.flatten(1)
            yield flat @ flat.T

    def products(self, v: Tensor) -> Tensor:
        """Return inner products with vectors ``[q, k, o, i]``, ``[r, q]``."""
        found = v.new_zeros((self._count, len(v)))
        for start, x, g in self.parts:
            found[start : start + x.shape[1]] = per_sample.products(x, g, self._shaped(v))
        return found

    def subtract(self, coefficients: Tensor, v: Tensor) -> None:
        """Subtract sums of all gradients, with coefficients ``[q, r]``, from ``v: [q, k, o, i]``."""
        if self._outer is None:
            for columns, rows in self._columns():
                v[..., columns] -= torch.einsum("qr,rkoi->qkoi", coefficients, rows)
            return
        step = max(1, _FORMED // self._outer[1].numel())
        for own, some_of in zip(coefficients.split(step), self._shaped(v).split(step), strict=True):
            for a, b, target in zip(*self._outer, some_of.unbind(1), strict=True):
                # qr, ro, ri -> qoi
                target -= ((own.unsqueeze(1) * b.T).flatten(0, 1) @ a).view_as(target)

    def _shaped(self, v: Tensor) -> Tensor:
        return v.flatten(1)[:, None, None] if self._formed else v

    def _columns(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield all gradients ``[r, k, o, i']`` for some inputs at a time."""
        if not self.parts:
            return
        (k, _, _, i), o = self.parts[0][1].shape, self.parts[0][2].shape[3]
        step = max(1, _FORMED // (self._count * k * o))
        for first in range(0, i, step):
            columns = slice(first, min(first + step, i))
            rows = self.parts[0][1].new_zeros((self._count, k, o, columns.stop - first))
            for start, x, g in self.parts:
                rows[start : start + x.shape[1]] = per_sample.formed(x[..., columns], g)
            yield columns, rows


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


def _woodbury(
    kept: Mapping[str, _Kept], count: int, coordinates: BlockCoordinates, dampings: Mapping[str, float], like: Tensor
) -> Matvec:
    """Return ``v -> (RᵀR + λ)⁻¹ v`` with the gradients taken as the rows of ``R``."""
    small = wide_zeros((count, count), like.device)
    for name, block in kept.items():
        for part in block.inner_products():
            small.add_(part, alpha=1 / dampings[name])
    small.diagonal().add_(1)
    factor, failed = torch.linalg.cholesky_ex(small)
    if int(failed):
        raise SolverError(
            f"woodbury: the GGN is not positive definite within the rounding of {like.dtype}: the damping (least: "
            f"{min(dampings.values()):.3g}) is too small for it. Raise `damping`, compute in float64, or take another "
            "`solver`."
        )

    def inverse(v: Tensor) -> Tensor:
        inner, result = wide_zeros((count, len(v)), v.device), v.clone()
        own, parts = coordinates.split(v), coordinates.split(result)
        for name, block in kept.items():
            inner.add_(block.products(own[name]), alpha=1 / dampings[name])
        coefficients = torch.cholesky_solve(inner, factor).T.to(v)
        for name, part in parts.items():
            if name in kept:
                kept[name].subtract(coefficients, part)
            part /= dampings[name]
        return result

    return inverse
