"""The approximations by name, from the identity to the exact Hessian, and what each one takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from lightning_influence.core.memory import available_bytes, readable
from lightning_influence.curvature.blocks.block import CurvatureBlock
from lightning_influence.curvature.blocks.block_ggn import BlockGGN
from lightning_influence.curvature.blocks.diagonal import DiagonalBlock
from lightning_influence.curvature.blocks.ekfac import EKFACBlock
from lightning_influence.curvature.blocks.identity import IdentityBlock
from lightning_influence.curvature.blocks.kfac import KFACBlock
from lightning_influence.curvature.products.ggn import GGNProduct
from lightning_influence.curvature.products.hessian import HessianProduct
from lightning_influence.curvature.products.product import CurvatureProduct
from lightning_influence.layers.blocks import ParameterBlock

CurvatureName = Literal["ekfac", "kfac", "diagonal", "identity", "block_ggn", "ggn", "hessian"]


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
    damping: Literal["relative", "trainer"] = "relative"


LADDER: dict[str, Rung] = {
    "identity": Rung(IdentityBlock),
    "diagonal": Rung(DiagonalBlock),
    "kfac": Rung(KFACBlock),
    "ekfac": Rung(EKFACBlock),
    "block_ggn": Rung(BlockGGN, damping="trainer"),
    "ggn": Rung(EKFACBlock, GGNProduct, "trainer"),
    "hessian": Rung(EKFACBlock, HessianProduct, "trainer"),
}

BLOCKS: dict[str, type[CurvatureBlock]] = {name: rung.block for name, rung in LADDER.items() if rung.product is None}
"""The block-diagonal approximations."""


def fitted_bytes(name: str, blocks: Mapping[str, ParameterBlock]) -> int:
    """Return the memory that a curvature takes while it is fitted, the work of its decompositions included."""
    kind = LADDER[name].block
    sizes = [kind.fitted_bytes(block.shape, block.dense) for block in blocks.values()]
    return sum(kept for kept, _ in sizes) + max((working for _, working in sizes), default=0)


def check_memory(name: str, blocks: Mapping[str, ParameterBlock]) -> None:
    """Refuse a curvature that does not fit into memory, before anything is computed.

    Raises:
        ValueError: With the largest layers and the way out.
    """
    device = next((p.device for block in blocks.values() for p in block.parameters.values()), None)
    available = None if device is None else available_bytes(device)
    needed = fitted_bytes(name, blocks)
    if available is None or needed <= available:
        return
    kind = LADDER[name].block
    by_size = sorted(blocks, key=lambda block: -sum(kind.fitted_bytes(blocks[block].shape, blocks[block].dense)))
    largest = ", ".join(
        f"{block} ({readable(sum(kind.fitted_bytes(blocks[block].shape, blocks[block].dense)))})"
        for block in by_size[:3]
    )
    raise ValueError(
        f"curvature={name!r} needs {readable(needed)} for {len(blocks)} layers, and {readable(available)} are "
        f'available on {device}; the largest: {largest}. Use `curvature="ggn"` (products only) or "diagonal", or leave '
        "layers out by `layers=`."
    )
