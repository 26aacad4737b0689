"""How much each approximation gives away: Hessian, GGN, block GGN, EK-FAC, K-FAC, side by side.

Each rung of the ladder drops something of the one above: the Hessian's second derivatives of the network (GGN), the
correlations between layers (block GGN), all but a Kronecker-factored eigenbasis (EK-FAC), the eigenvalues measured in
it (K-FAC). "Better Hessians Matter" (2509.23437) asks which of these steps costs how much; here it is for any network
small enough for dense matrices.

Index legend: ``p`` parameters, ``r`` leading eigenvectors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

from lightning_influence.core.memory import available_bytes, fits, readable
from lightning_influence.core.precision import exact
from lightning_influence.curvature.coordinates import BlockCoordinates
from lightning_influence.curvature.curvature import BlockCurvature
from lightning_influence.curvature.dense import in_blocks
from lightning_influence.curvature.fit import FactorExamples, fit
from lightning_influence.curvature.products.ggn import GGNProduct
from lightning_influence.curvature.products.hessian import HessianProduct
from lightning_influence.curvature.products.product import CurvatureProduct
from lightning_influence.gradients.passes import ExampleGradients, Labels

TITLES = {"hessian": "Hessian", "ggn": "GGN", "block_ggn": "block GGN", "ekfac": "EK-FAC", "kfac": "K-FAC"}
"""The rungs that a ``Chain`` compares, from the exact one down, with their names for people."""
# Five float64 matrices, and what their products and decompositions take.
_BYTES = 8 * 9
# Leading eigenvectors hold this share of a block's trace.
_ENERGY = 0.9


@dataclass(frozen=True)
class ChainStep:
    """What is lost from one rung to the next.

    Attributes:
        start: The better curvature ``A``.
        end: The coarser one ``B``.
        error: ``‖A - B‖ / ‖A‖`` (Frobenius).
        eigenvalue_overlap: By block, ``1 - ‖λ_B - λ_A‖ / ‖λ_A‖`` of the sorted eigenvalues; 1 if they agree.
        eigenbasis_overlap: By block, ``‖U_Aᵀ U_B‖² / r`` of the ``r`` leading eigenvectors that hold 90 % of the trace
            of ``A``: the share of one leading subspace that lies in the other, 1 if they agree.
    """

    start: str
    end: str
    error: float
    eigenvalue_overlap: Mapping[str, float]
    eigenbasis_overlap: Mapping[str, float]


@dataclass(frozen=True, eq=False)
class Chain:
    """Dense curvatures of one network, from the exact one down.

    Attributes:
        matrices: Name to ``[p, p]`` float64, in block coordinates.
        blocks: Where each layer lies in them.
        steps: What each step loses.
        off_block_energy: Name to the share of ``‖C‖²`` outside of the layers' own blocks.
    """

    matrices: Mapping[str, Tensor]
    blocks: Mapping[str, slice]
    steps: tuple[ChainStep, ...]
    off_block_energy: Mapping[str, float]

    def __repr__(self) -> str:
        lines = [f"{'step':<24}{'error':>8}{'eigenvalues':>13}{'eigenbasis':>12}"]
        for step in self.steps:
            name = f"{TITLES[step.start]} -> {TITLES[step.end]}"
            values, basis = fmean(step.eigenvalue_overlap.values()), fmean(step.eigenbasis_overlap.values())
            lines.append(f"{name:<24}{step.error:>8.3f}{values:>13.3f}{basis:>12.3f}")
        energy = ", ".join(f"{TITLES[name]} {self.off_block_energy[name]:.1%}" for name in ("hessian", "ggn"))
        return "\n".join([*lines, f"energy outside of the layers' blocks: {energy}"])


def curvature_chain(gradients: ExampleGradients, indices: Sequence[int], *, labels: Labels = "exact") -> Chain:
    """Compute all rungs over the covered parameters as dense matrices, and compare each with the next.

    Args:
        gradients: The passes.
        indices: Dataset indices of the examples.
        labels: Of K-FAC and EK-FAC; with the exact expectation nothing is lost to sampling.

    Raises:
        ValueError: If the matrices do not fit into memory.
        TaskError: If the loss has no GGN, or the model can't be differentiated twice.
    """
    coordinates = BlockCoordinates(gradients.coverage.blocks)
    size, device = coordinates.size, gradients.device
    needed = _BYTES * size * size
    if not fits(needed, device):
        raise ValueError(
            f"the chain of {size:,} parameters takes dense matrices of {readable(needed)}, and "
            f"{readable(available_bytes(device) or 0)} are available on {device}; choose fewer layers "
            "(`layers=` of `Influence`)."
        )
    kinds: dict[str, type[CurvatureProduct]] = {"hessian": HessianProduct, "ggn": GGNProduct}
    parameters = coordinates.parameters
    matrices = {
        name: exact(in_blocks(kind(gradients, indices, parameters=parameters), coordinates))
        for name, kind in kinds.items()
    }
    blocks = coordinates.slices()
    matrices["block_ggn"] = torch.block_diag(*(matrices["ggn"][part, part] for part in blocks.values()))
    every = FactorExamples(len(indices), len(indices))
    for name in ("ekfac", "kfac"):
        fitted = fit(gradients, name, indices, examples=every, labels=(labels, labels))
        assert isinstance(fitted, BlockCurvature)
        own = [group for layer in blocks for group in exact(fitted.blocks[layer].to_dense())]
        matrices[name] = torch.block_diag(*own)
    names = list(matrices)
    spectra = {name: {b: _spectrum(matrices[name][s, s]) for b, s in blocks.items()} for name in names}
    steps = [
        ChainStep(
            start,
            end,
            float((matrices[start] - matrices[end]).norm() / matrices[start].norm()),
            {b: _eigenvalue_overlap(spectra[start][b][0], spectra[end][b][0]) for b in blocks},
            {b: _eigenbasis_overlap(*spectra[start][b], spectra[end][b][1]) for b in blocks},
        )
        for start, end in zip(names, names[1:], strict=False)
    ]
    energy = {name: _off_block_energy(matrix, blocks) for name, matrix in matrices.items()}
    return Chain(matrices, blocks, tuple(steps), energy)


def _spectrum(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues, the largest first, and eigenvectors in columns."""
    values, vectors = torch.linalg.eigh(matrix)
    return values.flip(0), vectors.flip(1)


def _eigenvalue_overlap(better: Tensor, coarser: Tensor) -> float:
    scale = float(better.norm())
    return 1 - float((better - coarser).norm()) / scale if scale else float(not bool(coarser.any()))


def _eigenbasis_overlap(values: Tensor, better: Tensor, coarser: Tensor) -> float:
    energy = values.cpu().clamp(min=0).cumsum(0)  # of floats CUDA has no sum that is deterministic
    if not float(energy[-1]):
        return 1.0
    rank = int((energy < _ENERGY * energy[-1]).sum()) + 1
    return float((better[:, :rank].T @ coarser[:, :rank]).square().sum()) / rank


def _off_block_energy(matrix: Tensor, blocks: Mapping[str, slice]) -> float:
    inside = sum(float(matrix[part, part].square().sum()) for part in blocks.values())
    total = float(matrix.square().sum())
    return 1 - inside / total if total else 0.0
