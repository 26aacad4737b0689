"""The gradients of all blocks as one vector."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_influence.curvature.products.flat import FlatParameters
from lightning_influence.gradients.passes import BatchGradients
from lightning_influence.layers import per_sample
from lightning_influence.layers.blocks import ParameterBlock


class BlockCoordinates:
    """Vectors over all blocks as one: ``{name: [..., k, o, i]}`` to ``[..., p]``, block after block.

    Args:
        blocks: The covered parameters, by block name.
    """

    def __init__(self, blocks: Mapping[str, ParameterBlock]) -> None:
        self.blocks = dict(blocks)
        self.shapes = {name: block.shape for name, block in blocks.items()}
        self.sizes = {name: k * o * i for name, (k, o, i) in self.shapes.items()}

    @property
    def size(self) -> int:
        """Number of coordinates ``p``."""
        return sum(self.sizes.values())

    @property
    def parameters(self) -> list[str]:
        """Full names of the parameters, in the order of the blocks."""
        return [name for block in self.blocks.values() for name in block.parameters]

    def slices(self) -> dict[str, slice]:
        """Return where each block lies."""
        result, start = {}, 0
        for name, size in self.sizes.items():
            result[name] = slice(start, start + size)
            start += size
        return result

    def join(self, vectors: Mapping[str, Tensor]) -> Tensor:
        """Put blocks ``[..., k, o, i]`` in line: ``[..., p]``."""
        return torch.cat([vectors[name].flatten(-3) for name in self.blocks], -1)

    def join_rows(self, rows: Mapping[str, Tensor], n: int, like: Tensor) -> Tensor:
        """Put per-example gradients ``[n, k, o, i]`` in line: ``[n, p]``; those of layers that are missing are zero."""
        sizes = self.sizes.items()
        parts = [rows[name].flatten(1) if name in rows else like.new_zeros((n, size)) for name, size in sizes]
        return torch.cat(parts, 1)

    def split(self, line: Tensor) -> dict[str, Tensor]:
        """Cut ``[..., p]`` up into views ``[..., k, o, i]``."""
        parts = line.split(list(self.sizes.values()), -1)
        return {name: part.unflatten(-1, self.shapes[name]) for name, part in zip(self.sizes, parts, strict=True)}

    def spread(self, values: Mapping[str, float], like: Tensor) -> Tensor:
        """Return ``[p]`` with one value for all coordinates of a block."""
        return torch.cat([like.new_full((size,), values[name]) for name, size in self.sizes.items()])

    def places_in(self, flat: FlatParameters) -> Tensor:
        """Return where each coordinate lies in the flat vector of the same parameters, ``[p]`` int64."""
        numbers = flat.unflatten(torch.arange(flat.size, dtype=torch.float64))  # exact, also beyond 2²⁴
        blocks = {name: block.from_parameters(numbers) for name, block in self.blocks.items()}
        return self.join(blocks).round().long().to(flat.device)


def joined_gradients(batch: BatchGradients, coordinates: BlockCoordinates, draw: int = 0) -> Tensor:
    """Return per-example gradients in one line each, ``[n, p]``, of one draw of labels."""
    formed = {
        # Activations and output gradients may each be one for all draws, see `rows`.
        io.name: per_sample.formed(io.xs[draw % len(io.xs)], io.gs[draw % len(io.gs)])
        for io in batch.layers()
    }
    return coordinates.join_rows(formed, batch.loss.n, next(iter(formed.values())))
