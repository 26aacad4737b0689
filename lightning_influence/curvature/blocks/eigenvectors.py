"""Eigendecompositions that cope with what data bring: clustered eigenvalues, rows and columns of zeros."""

from __future__ import annotations

import torch
from torch import Tensor


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


def eigenvectors(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues ``[k, m]`` and orthonormal eigenvectors in columns of semidefinite ``[k, m, m]``.

    Rows and columns of zeros (pixels that are always black, dead units) are eigenvectors already, with eigenvalue 0:
    only the rest is decomposed, see ``eigendecomposition``. They come first, where the smallest eigenvalues are.
    """
    live = (matrices != 0).any(-1).any(0)
    count = int(live.sum())
    size = len(live)
    if count == size:
        return eigendecomposition(matrices)
    values, vectors = torch.zeros_like(matrices[..., 0]), torch.zeros_like(matrices)
    (dead,), (rest,) = (~live).nonzero(as_tuple=True), live.nonzero(as_tuple=True)
    vectors[:, dead, torch.arange(size - count, device=dead.device)] = 1
    if count:
        inner = matrices[:, rest][:, :, rest]
        values[:, size - count :], vectors[:, rest, size - count :] = eigendecomposition(inner)
    return values, vectors


def null_columns(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Tell which eigenvalues ``[k, m]`` of semidefinite matrices are rounding, their entries computed in ``dtype``.

    Their eigenvectors are some basis of a null space (fewer rows than dimensions): which one, rounding decides.
    """
    size = values.shape[-1]
    return values <= size * torch.finfo(dtype).eps * values.amax(-1, keepdim=True)


def averaged(values: Tensor, null: Tensor) -> Tensor:
    """Put the mean over the null columns in the place of each of them: ``[k, ..., m]`` with ``null: [k, m]``."""
    null = null[:, None]
    mean = values.where(null, 0).sum(-1, keepdim=True) / null.sum(-1, keepdim=True).clamp(min=1)
    return torch.where(null, mean, values)
