"""Fitting curvature: which examples, which labels, how many passes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_influence.capture import LayerIO
from lightning_influence.coverage import Coverage
from lightning_influence.curvature.block import RELATIVE_DAMPING, CurvatureBlock
from lightning_influence.curvature.diagonal import DiagonalBlock
from lightning_influence.curvature.ekfac import EKFACBlock
from lightning_influence.curvature.identity import IdentityBlock
from lightning_influence.curvature.kfac import KFACBlock
from lightning_influence.passes import BatchGradients, ExampleGradients, Labels
from lightning_influence.precision import working_dtype

CurvatureName = Literal["ekfac", "kfac", "diagonal", "identity"]
Fisher = Literal["auto", "exact", "sampled", "empirical"]

BLOCKS: dict[str, type[CurvatureBlock]] = {
    "ekfac": EKFACBlock,
    "kfac": KFACBlock,
    "diagonal": DiagonalBlock,
    "identity": IdentityBlock,
}

# Up to so many backward passes per batch the exact expectation over labels is worth its price.
_EXACT_DRAWS = 20


@dataclass(frozen=True)
class FactorExamples:
    """How many examples each pass over the data sees.

    Attributes:
        covariances: For the eigenvectors (first pass).
        eigenvalues: For what is measured in the eigenbasis (second pass).
    """

    covariances: int
    eigenvalues: int


def factor_examples(coverage: Coverage, positions: Mapping[str, int], draws: int, size: int) -> FactorExamples:
    """Return subset sizes that give every factor enough rows and do not grow with the data.

    A covariance of dimension ``m`` gets at least ``2 m`` rows, an example giving ``s`` of them (sides that keep the
    identity as their basis do not count); eigenvalues get 4,096
    labelled gradients. On a digits CNN, factors from 200 of 1,000 examples lost .004 of .287 LDS.

    Args:
        coverage: The layers.
        positions: Layer name to number of positions ``s``.
        draws: Labels per example in the second pass.
        size: Number of training examples.
    """
    rows = max(
        (math.ceil(2 * max(block.basis_sizes) / positions.get(name, 1)) for name, block in coverage.blocks.items()),
        default=0,
    )
    eigenvalues = min(size, max(256, 4096 // max(draws, 1)))
    # At least as many for the basis: outside of what it has seen, there is nothing to measure the eigenvalues in.
    return FactorExamples(min(size, max(512, rows, eigenvalues)), eigenvalues)


@dataclass(frozen=True, eq=False)
class Curvature:
    """Fitted curvature of all covered layers.

    Attributes:
        name: Which approximation.
        blocks: Layer name to block.
        dampings: Layer name to absolute damping λ.
        labels: Which labels each pass used.
        examples: Number of examples each pass saw.
    """

    name: str
    blocks: Mapping[str, CurvatureBlock]
    dampings: Mapping[str, float]
    labels: tuple[str, ...]
    examples: tuple[int, ...]

    def scores(self, io: LayerIO, query: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return one layer's part of ``‖g‖²``, of ``gᵀ (C + λ)⁻¹ g`` and of ``queryᵀ g`` for every example, ``[n]``."""
        return self.blocks[io.name].scores(io.x, io.gs[0], self.dampings[io.name], query)

    def solve(self, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return ``(C + λ)⁻¹ v``, layer by layer: name -> ``[..., k, o, i]``."""
        return {name: self.blocks[name].solve(v, self.dampings[name]) for name, v in vectors.items()}


def choose_labels(fisher: Fisher, draws: int | None, tapped: bool) -> tuple[Labels, Labels]:
    """Return the labels of the covariance pass and of the eigenvalue pass.

    What matters most, measured (LDS on digits): one draw used for both passes .481, a fresh draw for the eigenvalues
    .531, exact eigenvalues with sampled covariances .576, all exact .579.

    Args:
        fisher: ``"auto"`` samples the covariances and takes exact eigenvalues for up to 20 classes.
        draws: Labels of the exact expectation, None without a closed form.
        tapped: Whether the loss is known at all.
    """
    if fisher == "empirical" or (fisher == "auto" and not tapped):
        return "true", "true"
    if fisher == "exact":
        return "exact", "exact"
    exact = fisher == "auto" and draws is not None and draws <= _EXACT_DRAWS
    return "sampled", "exact" if exact else "sampled"


def fit(
    gradients: ExampleGradients,
    name: CurvatureName,
    indices: Sequence[int],
    *,
    examples: FactorExamples,
    labels: tuple[Labels, Labels],
    damping: float | None = None,
    seed: int = 0,
) -> Curvature:
    """Fit one curvature approximation.

    Args:
        gradients: The passes.
        name: ``"ekfac"``, ``"kfac"``, ``"diagonal"`` or ``"identity"``.
        indices: The training examples; random subsets of them are used.
        examples: Subset sizes.
        labels: Labels of the covariance and eigenvalue passes; approximations with one pass in the parameter basis
            take the latter.
        damping: Absolute λ for every block; by default 0.1 times the mean eigenvalue of each.
        seed: Seed of the subsets.

    Returns:
        The fitted curvature.

    Raises:
        ValueError: If ``damping`` leaves a block singular, or no example has finite gradients.
    """
    kind = BLOCKS[name]
    covered = gradients.coverage.blocks
    blocks = {name: kind(block.shape, block.dense) for name, block in covered.items()}
    sizes = (examples.covariances, examples.eigenvalues)
    single = issubclass(kind, DiagonalBlock)
    chosen = (labels[1:], sizes[1:]) if single else (labels, sizes)
    titles = {"ekfac": ("EK-FAC covariances", "EK-FAC eigenvalues"), "kfac": ("K-FAC covariances",)}.get(
        name, (f"{name} curvature",)
    )
    used = []
    for number in range(kind.passes):
        subset = random_subset(indices, chosen[1][number], seed)
        used.append(len(subset))
        run = gradients.run(subset, chosen[0][number], draw=1 + number, title=titles[number])
        with closing(run) as batches:
            counted = _update(blocks, batches)
        # Layers that the forward pass never reached have an all-zero gradient: their curvature is zero too.
        for layer, block in blocks.items():
            for x, g in covered[layer].no_rows(*_kind_of_tensor(gradients)):
                block.update(x, [g], 0)
            block.end_pass(counted)
    dampings = {}
    for layer, block in blocks.items():
        value = block.damping(RELATIVE_DAMPING) if damping is None else damping
        # A layer without any gradient has no scale of its own; its scores are zero with any damping.
        if damping is not None:
            block.check_damping(damping)
        dampings[layer] = value if value > 0 or damping is not None or name == "identity" else 1.0
    return Curvature(name, blocks, dampings, tuple(chosen[0][: kind.passes]), tuple(used))


def random_subset(indices: Sequence[int], size: int, seed: int) -> list[int]:
    """Return ``size`` of the indices at random, in their own order; which ones depends on neither order nor process."""
    if size >= len(indices):
        return list(indices)
    generator = torch.Generator().manual_seed(seed)
    ranked = sorted(indices)
    chosen = {ranked[position] for position in torch.randperm(len(ranked), generator=generator)[:size].tolist()}
    return [index for index in indices if index in chosen]


def _update(blocks: Mapping[str, CurvatureBlock], batches: Iterator[BatchGradients]) -> int:
    total = 0
    for batch in batches:
        counted = batch.counted
        total += counted
        for io in batch.layers():
            blocks[io.name].update(io.xs, io.gs, counted)
    return total


def _kind_of_tensor(gradients: ExampleGradients) -> tuple[torch.dtype, torch.device]:
    like = next(p for p in gradients.module.parameters() if p.is_floating_point())
    return working_dtype(like.dtype), like.device
