"""K-FAC: the Fisher of a layer as a Kronecker product (Martens & Grosse 2015, 1503.05671)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from lightning_influence import per_sample
from lightning_influence.curvature.block import CurvatureBlock


class KroneckerBlock(CurvatureBlock):
    """``C = (Q_B ⊗ Q_A) diag(lam) (Q_B ⊗ Q_A)ᵀ``: everything that lives in a Kronecker eigenbasis.

    The bases are the eigenvectors of ``A = 1/N Σ_n Σ_s x xᵀ`` and ``B = 1/(N S) Σ_n Σ_s g gᵀ``. With this scaling
    ``B ⊗ A`` has the size of the Fisher itself for layers that share weights over positions (Grosse & Martens 2016,
    1602.01407; "KFAC-expand" in Eschenhagen et al. 2023, 2311.00636).
    """

    passes: ClassVar[int] = 1

    @property
    def eigenvalues(self) -> Tensor:
        """``lam: [k, o, i]``."""
        self._check_fitted()
        return self._result["eigenvalues"]

    @property
    def basis(self) -> tuple[Tensor, Tensor]:
        """``(Q_A: [k, i, i], Q_B: [k, o, o])``, eigenvectors in columns."""
        if not self._finished_passes:
            self._check_fitted()
        return self._result["activation_basis"], self._result["gradient_basis"]

    def damping(self, relative: float = 0.1) -> float:
        """Return ``relative`` times the mean eigenvalue of the block."""
        return relative * float(self.eigenvalues.double().mean())

    def matvec(self, v: Tensor) -> Tensor:
        """Rotate, scale, rotate back."""
        return self._scaled(v, self.eigenvalues)

    def solve(self, v: Tensor, damping: float) -> Tensor:
        """Rotate, divide by ``lam + damping``, rotate back."""
        return self._scaled(v, self._inverse(damping))

    def diagonal(self) -> Tensor:
        """Return the diagonal in the parameter basis, ``[k, o, i]``."""
        basis_x, basis_g = self.basis
        return basis_g.square() @ self.eigenvalues @ basis_x.square().transpose(-1, -2)

    def self_influence(self, x: Tensor, g: Tensor, damping: float) -> Tensor:
        """Return ``Σ (Q_Bᵀ G_n Q_A)² / (lam + damping)``."""
        basis_x, basis_g = self.basis
        return per_sample.weighted_rotated_squares(x, g, basis_x, basis_g, self._inverse(damping))

    def check_damping(self, damping: float) -> None:
        """Raise ``ValueError`` if ``damping`` is no number >= 0, or leaves the curvature singular."""
        self._check_damping(damping, self.eigenvalues)

    def scores(
        self, x: Tensor, g: Tensor, damping: float, query: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return squared gradient norm, self-influence, and inner product with ``query``, each ``[n]``."""
        basis_x, basis_g = self.basis
        return per_sample.rotated_scores(x, g, basis_x, basis_g, self._inverse(damping), query)

    def _inverse(self, damping: float) -> Tensor:
        if self._cached is None or self._cached[0] != damping:
            eigenvalues = self.eigenvalues
            self._check_damping(damping, eigenvalues)
            self._cached = damping, 1 / (eigenvalues + damping)
        return self._cached[1]

    def _scaled(self, v: Tensor, scales: Tensor) -> Tensor:
        basis_x, basis_g = self.basis
        rotated = basis_g.transpose(-1, -2) @ v @ basis_x
        return basis_g @ (rotated * scales) @ basis_x.transpose(-1, -2)

    def _contributions(self, x: Tensor, gs: Sequence[Tensor], examples: int) -> dict[str, Tensor]:
        rows = torch.tensor(float(examples * x.shape[2]), dtype=torch.float64, device=x.device)
        return {
            "activation": per_sample.second_moment(x),
            "gradient": torch.stack([per_sample.second_moment(g) for g in gs]).sum(0),
            "rows": rows,
        }

    def _finish(self, sums: dict[str, Tensor]) -> None:
        dtype = sums["activation"].dtype
        activation = sums["activation"].double() / sums["examples"]
        gradient = sums["gradient"].double() / sums["rows"].clamp(min=1)  # 0 if the layer was never reached
        a, basis_x = _eigh(activation)
        b, basis_g = _eigh(gradient)
        self._result = {
            "activation_covariance": activation.to(dtype),
            "gradient_covariance": gradient.to(dtype),
            "activation_basis": basis_x.to(dtype),
            "gradient_basis": basis_g.to(dtype),
            "eigenvalues": (b.unsqueeze(-1) * a.unsqueeze(-2)).to(dtype),
        }


class KFACBlock(KroneckerBlock):
    """``C = B ⊗ A``: eigenvalues are products of those of the factors."""


def _eigh(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Eigendecomposition of ``[k, m, m]`` in float64, eigenvalues clamped at 0.

    Raises:
        RuntimeError: If LAPACK does not converge even on the slightly shifted matrix.
    """
    symmetric = (matrices + matrices.transpose(-1, -2)) / 2
    try:
        values, vectors = torch.linalg.eigh(symmetric)
    except torch.linalg.LinAlgError:
        # A tiny multiple of the identity separates clustered eigenvalues and leaves the eigenvectors alone.
        size = symmetric.shape[-1]
        shift = 1e-8 * symmetric.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
        shifted = symmetric + shift * torch.eye(size, dtype=symmetric.dtype, device=symmetric.device)
        values, vectors = torch.linalg.eigh(shifted)
        values = values - shift.squeeze(-1)
    return values.clamp(min=0), vectors
