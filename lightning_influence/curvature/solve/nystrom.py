"""A preconditioner made of one product: the randomised Nyström approximation (Frangella et al. 2021, 2110.02820).

The GGN of a trained network has a few dozen large eigenvalues, whose directions run across layers. Block-diagonal
approximations miss them, and as preconditioners make conjugate gradients slower rather than faster; a sketch of the
matrix itself finds them. One product of ``r`` vectors serves all systems with the same matrix.

Index legend: ``r`` rank of the sketch, ``q`` vectors, ``p`` parameters.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_influence.core.precision import exact
from lightning_influence.curvature.solve.spectrum import Matvec

_ATTEMPTS = 5


def nystrom_preconditioner(matvec: Matvec, like: Tensor, rank: int, damping: float) -> Matvec:
    """Return a product with ``P⁻¹``, close to ``(C + λ)⁻¹`` up to a factor.

    ``P⁻¹ = I + U (diag((σ_r + λ) / (σ + λ)) - I) Uᵀ`` with the eigenvectors ``U: [r, p]`` and eigenvalues ``σ`` of the
    sketch: it brings the large eigenvalues of ``C + λ`` down to the level of the smallest one found.

    Args:
        matvec: A positive semidefinite matrix, for ``[r, p]``.
        like: A tensor ``[..., p]`` whose last dimension, dtype and device the vectors take.
        rank: ``r``; twice the number of eigenvalues above ``λ`` leaves nothing to wish for.
        damping: Absolute λ.

    Raises:
        ValueError: If the matrix is not positive semidefinite within rounding.
    """
    size = like.shape[-1]
    generator = torch.Generator().manual_seed(0)  # the same on every process
    random = torch.randn((size, min(rank, size)), generator=generator).to(like.device)
    sketch = torch.linalg.qr(exact(random))[0].T  # rp, orthonormal rows
    image = exact(matvec(sketch.to(like)))
    # Shifted a little, so that rounding does not make the small matrix indefinite; taken off again below.
    shift = torch.finfo(like.dtype).eps * float(image.norm())
    for _ in range(_ATTEMPTS):
        shifted = image + shift * sketch
        small = sketch @ shifted.T
        factor, failed = torch.linalg.cholesky_ex((small + small.T) / 2)
        if not int(failed):
            break
        shift *= 10
    else:
        raise ValueError("the matrix is not positive semidefinite: a Nyström preconditioner needs that; use plain CG.")
    # C ≈ Y (Ω Yᵀ)⁻¹ Yᵀ = Bᵀ B with B = L⁻¹ Y
    _, roots, vectors = torch.linalg.svd(
        torch.linalg.solve_triangular(factor, shifted, upper=False), full_matrices=False
    )
    eigenvalues = (roots.square() - shift).clamp(min=0)
    scales = ((eigenvalues[-1] + damping) / (eigenvalues + damping) - 1).to(like)
    basis = vectors.to(like)

    def precondition(v: Tensor) -> Tensor:
        product: Tensor = v + ((v @ basis.T) * scales) @ basis
        return product

    return precondition
