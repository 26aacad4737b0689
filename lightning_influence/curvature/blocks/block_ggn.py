"""The dense curvature of one block: the block GGN, without any Kronecker structure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from lightning_influence.core.precision import exact, wide
from lightning_influence.curvature.blocks.block import RELATIVE_DAMPING, CurvatureBlock, Measure, Shape, Sides
from lightning_influence.curvature.blocks.eigenvectors import eigendecomposition
from lightning_influence.layers import per_sample
from lightning_influence.layers.rows import Rows

# Scalars of per-example gradients that are rotated at a time.
_CHUNK = 2**22


class BlockGGN(CurvatureBlock):
    """``C = mean over examples of Σ_draws vec(G) vec(G)ᵀ``, all correlations within the block.

    With the exact expectation over labels this is the block of the generalised Gauss-Newton matrix for softmax
    cross-entropy, squared and binary losses. ``[k, o·i, o·i]``: it grows with the square of the layer, its
    eigendecomposition with the cube; ``registry.fitted_bytes`` tells before.
    """

    title: ClassVar[str] = "block GGN"
    measures: ClassVar[tuple[Measure, ...]] = ("eigenvalues",)

    @classmethod
    def fitted_shapes(cls, shape: Shape, dense: Sides) -> dict[str, tuple[int, ...]]:
        """Return those of eigenvalues and eigenvectors."""
        k, o, i = shape
        return {"eigenvalues": (k, o * i), "basis": (k, o * i, o * i)}

    @property
    def basis(self) -> Tensor:
        """``Q: [k, o·i, o·i]``, eigenvectors in columns."""
        return self.tensors["basis"]

    def diagonal(self) -> Tensor:
        """Return the diagonal in the parameter basis, ``[k, o, i]``."""
        return (self.basis.square() @ self.eigenvalues.unsqueeze(-1)).reshape(self.shape)

    def damping(self, relative: float = RELATIVE_DAMPING) -> float:
        """Return ``relative`` times the mean eigenvalue, each weighted with itself: most are about zero."""
        eigenvalues = wide(self.eigenvalues)
        return relative * float(eigenvalues.square().sum() / eigenvalues.sum().clamp(min=1e-300))

    def self_influences(self, x: Tensor, g: Rows, dampings: Sequence[float]) -> Tensor:
        """Return ``Σ (Qᵀ vec(G_n))² / (lam + damping)`` for every damping, ``[n, d]``: the rotation is done once."""
        inverses = torch.stack([self._inverse(damping) for damping in dampings], -1)  # kpd
        parts = [(square @ inverses).sum(0) for square in self._rotated_squares(x, g)]  # knp, kpd -> knd
        return torch.cat(parts)

    def _rotated_squares(self, x: Tensor, g: Rows) -> Iterator[Tensor]:
        """Yield ``(Qᵀ vec(G))²`` of a few examples at a time, ``[k, m, o·i]``."""
        for chunk in per_sample.gradients(x, g):
            for part in chunk.flatten(2).split(max(1, _CHUNK // chunk[:, 0].numel()), 1):
                yield (part @ self.basis).square()

    def _scaled(self, v: Tensor, scales: Tensor) -> Tensor:
        # Rows of vectors: [..., k, p] -> [k, q, p]
        rows = v.flatten(-2).reshape(-1, v.shape[-3], scales.shape[-1]).transpose(0, 1)
        rotated = (rows @ self.basis) * scales.unsqueeze(1)
        return (rotated @ self.basis.transpose(-1, -2)).transpose(0, 1).reshape(v.shape)

    def _contributions(self, xs: Sequence[Tensor], gs: Sequence[Rows], examples: int) -> dict[str, Tensor]:
        draws = max(len(xs), len(gs))
        total = None
        for draw in range(draws):
            x, g = xs[draw if len(xs) > 1 else 0], gs[draw if len(gs) > 1 else 0]
            for chunk in per_sample.gradients(x, g):
                rows = chunk.flatten(2)
                # knp, knr -> kpr
                moment = rows.transpose(-1, -2) @ rows
                total = moment if total is None else total.add_(moment)
        return {} if total is None else {"moment": total}

    def _decompositions(self, sums: dict[str, Tensor]) -> dict[str, Callable[[], dict[str, Tensor]]]:
        def decompose() -> dict[str, Tensor]:
            kept = sums["moment"].new_empty(0)  # device and type of what is kept
            eigenvalues, basis = eigendecomposition(exact(sums.pop("moment")).div_(exact(sums["examples"])))
            return {"eigenvalues": eigenvalues.clamp(min=0).to(kept), "basis": basis.to(kept).contiguous()}

        return {"moment": decompose}

    def _finish(self, sums: dict[str, Tensor]) -> None:
        self.tensors = {"eigenvalues": sums["eigenvalues"], "basis": sums["basis"]}
