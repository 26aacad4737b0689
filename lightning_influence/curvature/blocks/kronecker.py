"""Blocks in a Kronecker eigenbasis: the algebra of K-FAC, EK-FAC and, in the basis of the parameters, the diagonal."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_influence.core.containers import sent
from lightning_influence.curvature.blocks.block import KEPT_INVERSES, CurvatureBlock, Eigenbasis, Shape, Sides
from lightning_influence.layers import per_sample
from lightning_influence.layers.rows import Rows


class KroneckerBlock(CurvatureBlock):
    """``C = (Q_B ⊗ Q_A) diag(lam) (Q_B ⊗ Q_A)ᵀ``; a side without a dense basis has the identity.

    Unless a kind finds other eigenvalues, they are measured: ``lam = mean over examples of (Q_Bᵀ G_n Q_A)²``.
    """

    @classmethod
    def fitted_shapes(cls, shape: Shape, dense: Sides) -> dict[str, tuple[int, ...]]:
        """Return those of eigenvalues and dense bases."""
        k, o, i = shape
        shapes: dict[str, tuple[int, ...]] = {"eigenvalues": shape}
        if dense[0]:
            shapes["gradient_basis"] = (k, o, o)
        if dense[1]:
            shapes["activation_basis"] = (k, i, i)
        return shapes

    @property
    def basis(self) -> tuple[Tensor | None, Tensor | None]:
        """``(Q_A: [k, i, i], Q_B: [k, o, o])``, eigenvectors in columns; None is the identity."""
        return self.tensors.get("activation_basis"), self.tensors.get("gradient_basis")

    def eigenbasis(self, damping: float) -> Eigenbasis:
        """Return the bases, and what ``solve`` scales by between rotating and rotating back."""
        return Eigenbasis(*self.basis, self._inverse(damping))

    def diagonal(self) -> Tensor:
        """Return the diagonal in the parameter basis, ``[k, o, i]``."""
        basis_x, basis_g = self.basis
        result = self.eigenvalues if basis_g is None else basis_g.square() @ self.eigenvalues
        return result if basis_x is None else result @ basis_x.square().transpose(-1, -2)

    def self_influences(self, x: Tensor, g: Rows, dampings: Sequence[float]) -> Tensor:
        """Return ``Σ (Q_Bᵀ G_n Q_A)² / (lam + damping)`` for every damping, ``[n, d]``: gradients are rotated once."""
        return per_sample.weighted_rotated_squares(x, g, *self.basis, self._inverses(dampings))

    def _inverses(self, dampings: Sequence[float]) -> per_sample.Weights:
        own = self.eigenvalues
        if len(dampings) == 1 and own.numel() <= KEPT_INVERSES:
            return self._inverse(dampings[0]).unsqueeze(0)
        for damping in dampings:
            self.check_damping(damping)
        return per_sample.Inverses(own, sent(torch.tensor(list(dampings), dtype=own.dtype), own.device))

    def scores(
        self, x: Tensor, g: Rows, damping: float, query: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return squared gradient norm, self-influence, and inner product with ``query``, each ``[n]``."""
        return per_sample.rotated_scores(x, g, *self.basis, self._inverses([damping]), query)

    def _scaled(self, v: Tensor, scales: Tensor) -> Tensor:
        basis_x, basis_g = self.basis
        if basis_x is not None:
            v = v @ basis_x
        if basis_g is not None:
            v = basis_g.transpose(-1, -2) @ v
        v = v * scales
        if basis_x is not None:
            v = v @ basis_x.transpose(-1, -2)
        return v if basis_g is None else basis_g @ v

    def _contributions(self, xs: Sequence[Tensor], gs: Sequence[Rows], examples: int) -> dict[str, Tensor]:
        return {"squares": per_sample.rotated_squares(xs, gs, *self.basis)}

    def _finish(self, sums: dict[str, Tensor]) -> None:
        self.tensors["eigenvalues"] = sums["squares"] / sums["examples"].to(sums["squares"].dtype)
