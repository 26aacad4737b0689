"""The approximations by name, from the identity to the exact Hessian, and what each one takes.

One of your own is an entry in ``LADDER``, and in ``BLOCKS`` if it is block-diagonal and ``SOURCE`` should take it, too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from lightning_influence.core import distributed
from lightning_influence.core.memory import available_bytes, readable
from lightning_influence.curvature.blocks.block import CurvatureBlock
from lightning_influence.curvature.blocks.block_ggn import BlockGGN
from lightning_influence.curvature.blocks.diagonal import DiagonalBlock
from lightning_influence.curvature.blocks.ekfac import EKFACBlock
from lightning_influence.curvature.blocks.identity import IdentityBlock
from lightning_influence.curvature.blocks.kfac import KFACBlock
from lightning_influence.curvature.damping import DampingRule
from lightning_influence.curvature.products.ggn import GGNProduct
from lightning_influence.curvature.products.hessian import HessianProduct
from lightning_influence.curvature.products.product import CurvatureProduct
from lightning_influence.layers.blocks import ParameterBlock

CurvatureName = Literal["ekfac", "kfac", "diagonal", "identity", "block_ggn", "ggn", "hessian"]
"""The approximations that come with the package."""


@dataclass(frozen=True)
class Rung:
    """One approximation.

    Attributes:
        block: Curvature of one block; for the full ones what stands in where it would take too many solves.
        product: Products with the curvature of all parameters, None for block-diagonal ones.
        damping: The rule unless another is asked for.
    """

    block: type[CurvatureBlock]
    product: type[CurvatureProduct] | None = None
    damping: DampingRule = "relative"


LADDER: dict[str, Rung] = {
    "identity": Rung(IdentityBlock),
    "diagonal": Rung(DiagonalBlock),
    "kfac": Rung(KFACBlock, damping="bounded"),
    "ekfac": Rung(EKFACBlock, damping="bounded"),
    "block_ggn": Rung(BlockGGN, damping="trainer"),
    "ggn": Rung(EKFACBlock, GGNProduct, "trainer"),
    "hessian": Rung(EKFACBlock, HessianProduct, "trainer"),
}
"""All approximations by name; an entry adds one."""

BLOCKS: dict[str, type[CurvatureBlock]] = {name: rung.block for name, rung in LADDER.items() if rung.product is None}
"""The block-diagonal approximations."""


def decompositions(name: str, block: ParameterBlock) -> list[tuple[int, int]]:
    """Return ``(k, m)`` for every ``k`` matrices ``[m, m]`` that fitting a block decomposes."""
    shapes = LADDER[name].block.fitted_shapes(block.shape, block.dense)
    return [(shape[0], shape[-1]) for key, shape in shapes.items() if key.endswith("basis")]


def fitted_bytes(name: str, blocks: Mapping[str, ParameterBlock]) -> int:
    """Return the memory that a curvature takes in float32 while it is fitted, the work of its decompositions included.

    One block is decomposed after the other.
    """
    kept, working = _bytes(name, blocks)
    return sum(kept.values()) + max(working.values(), default=0)


def check_memory(name: str, blocks: Mapping[str, ParameterBlock]) -> None:
    """Refuse a curvature that does not fit into memory, before anything is computed.

    Raises:
        ValueError: With the largest layers and the way out.
    """
    device = next((p.device for block in blocks.values() for p in block.parameters.values()), None)
    available = None if device is None else available_bytes(device)
    needed = fitted_bytes(name, blocks)
    if not distributed.any_process(available is not None and needed > available):
        return
    kept, working = _bytes(name, blocks)
    sizes = {layer: kept[layer] + working[layer] for layer in blocks}
    by_size = sorted(blocks, key=lambda layer: -sizes[layer])
    largest = ", ".join(f"{layer} ({readable(sizes[layer])})" for layer in by_size[:3])
    raise ValueError(
        f"curvature={name!r} needs {readable(needed)} for {len(blocks)} layers, and {readable(available or 0)} are "
        f'available on {device}; the largest: {largest}. Use `curvature="diagonal"` (in the place of "block_ggn" also '
        '"ekfac"), or leave layers out by `layers=`.'
    )


def _bytes(name: str, blocks: Mapping[str, ParameterBlock]) -> tuple[dict[str, int], dict[str, int]]:
    """Return what each block keeps (bases stand in the place of moments), and what its decomposition takes besides."""
    kind = LADDER[name].block
    shapes = {layer: kind.fitted_shapes(block.shape, block.dense) for layer, block in blocks.items()}
    kept = {layer: 4 * sum(map(math.prod, each.values())) for layer, each in shapes.items()}
    # In float64 one matrix, its eigenvectors, LAPACK's two more.
    working = {
        layer: max((16 * (k + 1) * size**2 for k, size in decompositions(name, block)), default=0)
        for layer, block in blocks.items()
    }
    return kept, working
