"""The approximations by name, from the identity to the exact Hessian, and what each one takes.

One of your own is an entry in ``LADDER``, and in ``BLOCKS`` if it is block-diagonal and ``SOURCE`` should take it, too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from lightning_influence.core import distributed
from lightning_influence.core.memory import available_bytes, readable
from lightning_influence.curvature.blocks.block import KEPT_INVERSES, CurvatureBlock
from lightning_influence.curvature.blocks.block_ggn import BlockGGN
from lightning_influence.curvature.blocks.diagonal import DiagonalBlock
from lightning_influence.curvature.blocks.ekfac import EKFACBlock
from lightning_influence.curvature.blocks.identity import IdentityBlock
from lightning_influence.curvature.blocks.kfac import KFACBlock
from lightning_influence.curvature.damping import DampingRule
from lightning_influence.curvature.products.ggn import GGNProduct
from lightning_influence.curvature.products.hessian import HessianProduct
from lightning_influence.curvature.products.product import CurvatureProduct
from lightning_influence.gradients.coverage import Coverage

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


def kept_shapes(name: str, coverage: Coverage) -> dict[str, dict[str, tuple[int, ...]]]:
    """Return by layer what is fitted and kept, see ``CurvatureBlock``: what layers share, by the first."""
    kind, shared = LADDER[name].block, coverage.shared_inputs
    shapes = {layer: kind.fitted_shapes(block.shape, block.dense) for layer, block in coverage.blocks.items()}
    return {
        layer: {key: shape for key, shape in each.items() if key != "activation_basis" or layer not in shared}
        for layer, each in shapes.items()
    }


def decompositions(name: str, coverage: Coverage) -> dict[str, list[tuple[int, int]]]:
    """Return by layer ``(k, m)`` for every ``k`` matrices ``[m, m]`` that fitting it decomposes."""
    return {
        layer: [(shape[0], shape[-1]) for key, shape in shapes.items() if key.endswith("basis")]
        for layer, shapes in kept_shapes(name, coverage).items()
    }


def fitted_bytes(name: str, coverage: Coverage) -> int:
    """Return the most memory that a curvature takes, in float32, while it is fitted and while it scores.

    One block is decomposed after the other. Scoring keeps ``1 / (eigenvalues + damping)`` of each that is not large,
    and works on the others one at a time.
    """
    kept, working, inverses = _bytes(name, coverage)
    return sum(kept.values()) + max(*working.values(), sum(inverses.values()), 0)


def check_memory(name: str, coverage: Coverage) -> None:
    """Refuse a curvature that does not fit into memory, before anything is computed.

    Raises:
        ValueError: With the largest layers and the way out.
    """
    blocks = coverage.blocks
    device = next((p.device for block in blocks.values() for p in block.parameters.values()), None)
    available = None if device is None else available_bytes(device)
    needed = fitted_bytes(name, coverage)
    if not distributed.any_process(available is not None and needed > available):
        return
    kept, working, inverses = _bytes(name, coverage)
    sizes = {layer: kept[layer] + max(working[layer], inverses[layer]) for layer in blocks}
    by_size = sorted(blocks, key=lambda layer: -sizes[layer])
    largest = ", ".join(f"{layer} ({readable(sizes[layer])})" for layer in by_size[:3])
    raise ValueError(
        f"curvature={name!r} needs {readable(needed)} for {len(blocks)} layers, and {readable(available or 0)} are "
        f'available on {device}; the largest: {largest}. Use `curvature="diagonal"` (in the place of "block_ggn" also '
        '"ekfac"), or leave layers out by `layers=`.'
    )


def _bytes(name: str, coverage: Coverage) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
    """Return what each block keeps (bases stand in the place of moments), what decomposing and what scoring takes."""
    shapes = kept_shapes(name, coverage)
    kept = {layer: 4 * sum(map(math.prod, each.values())) for layer, each in shapes.items()}
    sizes = {layer: math.prod(each.get("eigenvalues", (0,))) for layer, each in shapes.items()}
    # In float64 one matrix, its eigenvectors, LAPACK's two more.
    working = {
        layer: max((16 * (k + 1) * size**2 for k, size in each), default=4 * sizes[layer])
        for layer, each in decompositions(name, coverage).items()
    }
    return kept, working, {layer: 4 * size * (size <= KEPT_INVERSES) for layer, size in sizes.items()}
