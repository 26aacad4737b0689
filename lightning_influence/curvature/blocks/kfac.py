"""K-FAC: the Fisher of a layer as a Kronecker product (Martens & Grosse 2015, 1503.05671)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from lightning_influence.core.precision import exact, wide_dtype
from lightning_influence.curvature.blocks.block import Eigenbasis, EigenBlock, Measure
from lightning_influence.layers import per_sample
from lightning_influence.layers.patches import Activations, Patches, laid_out
from lightning_influence.layers.rows import Joined, OneHot, Rows, added, second_moment


class KroneckerBlock(EigenBlock):
    """``C = (Q_B ⊗ Q_A) diag(lam) (Q_B ⊗ Q_A)ᵀ``: everything that lives in a Kronecker eigenbasis.

    The bases are the eigenvectors of ``A = 1/N Σ_n Σ_s x xᵀ`` and ``B = 1/(N S) Σ_n Σ_s g gᵀ``. With this scaling
    ``B ⊗ A`` has the size of the Fisher itself for layers that share weights over positions (Grosse & Martens 2016,
    1602.01407; "KFAC-expand" in Eschenhagen et al. 2023, 2311.00636).

    A side without a dense basis has the identity, and of its moment the diagonal alone: embeddings, whose one-hot rows
    have a diagonal moment anyway, and sides too large for an eigendecomposition. A parameter that is both an embedding
    and a linear layer (tied) has the sum of two Kronecker products, ``Σ_u B_u ⊗ A_u``; its basis is that of the sums
    ``Σ_u tr(B_u) A_u`` and ``Σ_u tr(A_u) B_u``, its eigenvalues the diagonal of the sum in it.
    """

    passes: ClassVar[int] = 1
    title: ClassVar[str] = "K-FAC"
    measures: ClassVar[tuple[Measure, ...]] = ("covariances",)

    @property
    def basis(self) -> tuple[Tensor | None, Tensor | None]:
        """``(Q_A: [k, i, i], Q_B: [k, o, o])``, eigenvectors in columns; None is the identity."""
        if not self._finished_passes:
            self._check_fitted()
        return self._result.get("activation_basis"), self._result.get("gradient_basis")

    def eigenbasis(self, damping: float) -> Eigenbasis:
        """Return the bases, and what ``solve`` scales by between rotating and rotating back."""
        return Eigenbasis(*self.basis, self._inverse(damping))

    def diagonal(self) -> Tensor:
        """Return the diagonal in the parameter basis, ``[k, o, i]``."""
        basis_x, basis_g = self.basis
        result = self.eigenvalues if basis_g is None else basis_g.square() @ self.eigenvalues
        return result if basis_x is None else result @ basis_x.square().transpose(-1, -2)

    def self_influence(self, x: Tensor, g: Rows, damping: float) -> Tensor:
        """Return ``Σ (Q_Bᵀ G_n Q_A)² / (lam + damping)``."""
        basis_x, basis_g = self.basis
        return per_sample.weighted_rotated_squares(x, g, basis_x, basis_g, self._inverse(damping))

    def self_influences(self, x: Tensor, g: Rows, dampings: Sequence[float]) -> Tensor:
        """Return self-influence for many dampings, ``[n, d]``: gradients are rotated once."""
        basis_x, basis_g = self.basis
        inverses = torch.stack([self._inverse(damping) for damping in dampings])
        return per_sample.weighted_rotated_squares(x, g, basis_x, basis_g, inverses)

    def scores(
        self, x: Tensor, g: Rows, damping: float, query: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return squared gradient norm, self-influence, and inner product with ``query``, each ``[n]``."""
        basis_x, basis_g = self.basis
        return per_sample.rotated_scores(x, g, basis_x, basis_g, self._inverse(damping), query)

    @classmethod
    def fitted_shapes(cls, shape: tuple[int, int, int], dense: tuple[bool, bool]) -> dict[str, tuple[int, ...]]:
        """Return those of eigenvalues and dense bases."""
        k, o, i = shape
        shapes: dict[str, tuple[int, ...]] = {"eigenvalues": shape}
        if dense[0]:
            shapes["gradient_basis"] = (k, o, o)
        if dense[1]:
            shapes["activation_basis"] = (k, i, i)
        return shapes

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

    def _contributions(self, xs: Sequence[Activations], gs: Sequence[Rows], examples: int) -> dict[str, Tensor]:
        sums: dict[str, Tensor] = {}
        for use, use_xs, use_gs in _by_use(xs, gs):
            rows = float(examples * use_xs[0].shape[2])
            sums |= {
                f"activation.{use}": self._moment(use_xs, self.dense[1]),
                f"gradient.{use}": self._moment(use_gs, self.dense[0]),
                f"rows.{use}": torch.tensor(rows, dtype=wide_dtype(use_xs[0].device), device=use_xs[0].device),
            }
        return sums

    @staticmethod
    def _moment(draws: Sequence[Rows | Patches], dense: bool) -> Tensor:
        return added(second_moment(rows, diagonal=not dense) for rows in draws)

    def _finish(self, sums: dict[str, Tensor]) -> None:
        uses = sorted(name.removeprefix("rows.") for name in sums if name.startswith("rows."))
        kept = sums[f"activation.{uses[-1]}"].new_empty(0)  # device and type of what is kept
        counts = {
            "activation": [exact(sums["examples"])] * len(uses),
            # 0 if the layer was never reached
            "gradient": [exact(sums[f"rows.{use}"]).clamp(min=1) for use in uses],
        }
        traces = {
            side: [_trace(sums[f"{side}.{use}"]) / count for use, count in zip(uses, of_side, strict=True)]
            for side, of_side in counts.items()
        }
        diagonals: dict[str, list[Tensor]] = {}
        # A basis takes the place of its moment before the next is decomposed: memory for one of the two.
        for side, other, dense in (
            ("activation", "gradient", self.dense[1]),
            ("gradient", "activation", self.dense[0]),
        ):
            counted = zip(uses, counts[side], strict=True)
            moments = [exact(sums.pop(f"{side}.{use}")).div_(count) for use, count in counted]
            basis = None
            if dense:
                whole = moments[0]
                if len(uses) > 1:  # each use in proportion to the size of its other factor
                    whole = added(trace * moment for trace, moment in zip(traces[other], moments, strict=True))
                basis = eigenvectors(whole)
                self._result[f"{side}_basis"] = basis.to(kept).contiguous()
            if self.passes == 1:
                diagonals[side] = [_diagonal_in(moment, basis) for moment in moments]
        if diagonals:  # otherwise they are measured
            pairs = zip(diagonals["gradient"], diagonals["activation"], strict=True)
            self._result["eigenvalues"] = added(y.unsqueeze(-1) * x.unsqueeze(-2) for y, x in pairs).to(kept)


class KFACBlock(KroneckerBlock):
    """``C = B ⊗ A``: eigenvalues are products of those of the factors."""


def _by_use(
    xs: Sequence[Activations], gs: Sequence[Rows]
) -> Iterator[tuple[str, Sequence[Activations], Sequence[Rows]]]:
    """Yield the rows of each kind of use: name, activations and output gradients by draw."""
    joined = [g for g in gs if isinstance(g, Joined)]
    if not joined:
        yield ("embedding" if isinstance(gs[0], OneHot) else "linear"), xs, gs
        return
    splits = [joined[0].split(x) for x in laid_out(xs)]
    yield "embedding", [first for first, _ in splits], [joined[0].onehot]
    # Looked-up vectors have gradients that depend on the labels; the activations of a linear map do not.
    yield "linear", [splits[0][1]], [g.dense for g in joined]


def _trace(moment: Tensor) -> Tensor:
    """Return the traces of ``[k, m, m]``, or of diagonals ``[k, m]``, shaped to scale another moment."""
    diagonal = moment if moment.ndim == 2 else moment.diagonal(dim1=-2, dim2=-1)
    return exact(diagonal).sum()


def _diagonal_in(moment: Tensor, basis: Tensor | None) -> Tensor:
    """Return the diagonal ``[k, m]`` of a moment in a basis, never negative."""
    if basis is None:
        return moment if moment.ndim == 2 else moment.diagonal(dim1=-2, dim2=-1)
    return ((moment @ basis) * basis).sum(-2).clamp(min=0)


def eigendecomposition(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues ``[k, m]`` and orthonormal eigenvectors in columns of symmetric ``[k, m, m]``.

    Only the lower triangle is read: rounding that leaves a moment not quite symmetric does not matter.

    Raises:
        LinAlgError: If LAPACK does not converge even on the slightly shifted matrix.
    """
    try:
        values, vectors = torch.linalg.eigh(matrices)
    except torch.linalg.LinAlgError:
        # A tiny multiple of the identity separates clustered eigenvalues and leaves the eigenvectors alone.
        size = matrices.shape[-1]
        shift = 1e-8 * matrices.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
        shifted = matrices + shift * torch.eye(size, dtype=matrices.dtype, device=matrices.device)
        try:
            values, vectors = torch.linalg.eigh(shifted)
        except torch.linalg.LinAlgError as error:
            largest, finite = float(matrices.abs().max()), bool(torch.isfinite(matrices).all())
            raise torch.linalg.LinAlgError(
                f"no convergence for {size} rows, {'all finite' if finite else 'some of them non-finite'}, the largest "
                f"entry {largest:.3g}, nor with 1e-8 of the mean eigenvalue added."
            ) from error
    return values, vectors


def eigenvectors(matrices: Tensor) -> Tensor:
    """Return orthonormal eigenvectors of symmetric ``[k, m, m]`` in columns, see ``eigendecomposition``.

    Rows and columns of zeros (pixels that are always black, dead units) are eigenvectors already, with eigenvalue 0:
    only the rest is decomposed. They come first, where the smallest eigenvalues are.
    """
    live = (matrices != 0).any(-1).any(0)
    count = int(live.sum())
    size = len(live)
    if count == size:
        return eigendecomposition(matrices)[1]
    vectors = torch.zeros_like(matrices)
    (dead,), (rest,) = (~live).nonzero(as_tuple=True), live.nonzero(as_tuple=True)
    vectors[:, dead, torch.arange(size - count, device=dead.device)] = 1
    if count:
        inner = matrices[:, rest][:, :, rest]
        vectors[:, rest, size - count :] = eigendecomposition(inner)[1]
    return vectors
