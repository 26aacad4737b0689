"""Extreme eigenvalues of a symmetric matrix from products with it, and what they say about a curvature.

Inner products and norms are summed in float64 (float32 on devices without it), whatever the vectors are stored in.

Index legend: ``q`` vectors, ``p`` parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_influence.core.precision import wide_dtype

Matvec = Callable[[Tensor], Tensor]
"""Multiplies every row of ``[q, p]`` by one and the same symmetric matrix."""

# Columns whose wide copies an inner product may hold at a time: the vectors may take most of the memory already.
_CHUNK = 2**22
# Roundings of the largest eigenvalue by which others are off at least, in however small a matrix.
_ROUNDINGS = 10.0
# Relative error of an extreme eigenvalue that will do.
_PRECISION = 1e-2
# Estimates of the smallest eigenvalue are too large; within this share of what would be singular, it is computed.
_SUSPICIOUS = 0.01


class IndefiniteError(ValueError):
    """The curvature has an eigenvalue of at most ``-damping``; the message gives it and the way out."""


class Eigenvalue(NamedTuple):
    """An extreme eigenvalue as far as it is known.

    Attributes:
        value: A Rayleigh quotient: the true largest eigenvalue is no smaller, the true smallest one no larger.
        error: Some eigenvalue lies within this distance of ``value``; rounding of the whole spectrum included.
        rounding: See ``rounding``: an eigenvalue of 0 may come out as this, of either sign.
    """

    value: float
    error: float
    rounding: float


def largest_eigenvalue(matvec: Matvec, like: Tensor, *, max_steps: int = 50, resolution: float = 0.0) -> Eigenvalue:
    """Estimate the (algebraically) largest eigenvalue by Lanczos iteration: a product a step, memory of three vectors.

    The basis is not orthogonalised again: eigenvalues then come out more than once, the extreme ones no worse for it
    (Paige 1980), and a network's parameters need not be stored dozens of times.

    Args:
        matvec: The symmetric matrix.
        like: A tensor ``[..., p]`` whose last dimension, dtype and device the vectors take.
        max_steps: Most products.
        resolution: Absolute error that will do; a relative one of 1 % does in any case.

    Returns:
        The estimate and its error.

    Raises:
        ValueError: If a product is non-finite.
    """
    p = like.shape[-1]
    # The same on every device and process.
    v = torch.randn(1, p, generator=torch.Generator().manual_seed(0)).to(like.device, like.dtype)
    v = v / row_norms(v).to(v.dtype)[:, None]
    before = torch.zeros_like(v)
    diagonal: list[float] = []
    beside: list[float] = []
    while True:
        w = matvec(v)
        if beside:
            w = w - beside[-1] * before
        alpha = float(row_products(w, v))
        w = w - alpha * v
        # Once more: the part that rounding leaves would grow from step to step.
        w = w - row_products(w, v).to(w.dtype)[:, None] * v
        beta = float(row_norms(w))
        if not (math.isfinite(alpha) and math.isfinite(beta)):
            raise ValueError("a product has non-finite entries; leave out the examples that cause them.")
        diagonal.append(alpha)
        off = torch.tensor(beside, dtype=torch.float64)
        tridiagonal = torch.diag(torch.tensor(diagonal, dtype=torch.float64)) + torch.diag(off, 1) + torch.diag(off, -1)
        eigenvalues, vectors = torch.linalg.eigh(tridiagonal)
        noise = rounding(len(diagonal), float(eigenvalues.abs().max()), v.dtype)
        found = Eigenvalue(float(eigenvalues[-1]), max(beta * abs(float(vectors[-1, -1])), noise), noise)
        enough = found.error <= max(_PRECISION * abs(found.value), resolution)
        if beta <= noise or len(diagonal) >= min(max_steps, p) or enough:
            return found
        beside.append(beta)
        before, v = v, w / beta


def smallest_eigenvalue(matvec: Matvec, like: Tensor, *, max_steps: int = 100, resolution: float = 0.0) -> Eigenvalue:
    """Estimate the (algebraically) smallest eigenvalue, see ``largest_eigenvalue``."""
    found = largest_eigenvalue(lambda v: -matvec(v), like, max_steps=max_steps, resolution=resolution)
    return found._replace(value=-found.value)


def require_positive_definite(matvec: Matvec, like: Tensor, damping: float, *, max_steps: int = 100) -> Eigenvalue:
    """Refuse a curvature that this damping does not make positive definite: the Hessian of a network, usually.

    Args:
        matvec: The curvature, without damping.
        like: See ``largest_eigenvalue``.
        damping: Absolute λ.
        max_steps: Most products. What they do not find is let pass.

    Returns:
        The smallest eigenvalue as far as it is known.

    Raises:
        IndefiniteError: If an eigenvalue of at most ``-damping``, within rounding, was found.
        ValueError: If a product is non-finite, or ``damping`` is no number >= 0.
    """
    check_damping(damping)
    smallest = smallest_eigenvalue(matvec, like, max_steps=max_steps, resolution=0.1 * damping)
    if smallest.value + damping <= smallest.rounding:
        raise IndefiniteError(indefinite_reason(smallest.value, damping, smallest.rounding, smallest.error))
    return smallest


def rounding(size: int, largest: float, dtype: torch.dtype) -> float:
    """Return how far rounding moves the eigenvalues of a matrix: of what is no larger the sign means nothing.

    Errors of single entries are as good as independent; together they grow with the root of the size.
    """
    return max(_ROUNDINGS, math.sqrt(size)) * torch.finfo(dtype).eps * abs(largest)


def factorised(matrix: Tensor, dtype: torch.dtype) -> tuple[Tensor, tuple[float, float] | None]:
    """Factorise a symmetric float64 matrix that should be positive definite.

    Whether a factorisation of a singular matrix breaks down is up to the signs of roundings: the eigenvalues decide.

    Args:
        matrix: ``[p, p]``.
        dtype: Type that its entries were computed in.

    Returns:
        The Cholesky factor; and the smallest eigenvalue with its rounding, if it is no larger than that.
    """
    factor, failed = torch.linalg.cholesky_ex(matrix)
    size = len(matrix)
    if not int(failed):
        # Inverse iteration finds an eigenvalue that is small enough to matter at once; the trace bounds the largest.
        v = torch.randn(size, 1, generator=torch.Generator().manual_seed(0), dtype=matrix.dtype).to(matrix.device)
        for _ in range(2):
            v = torch.cholesky_solve(v / v.norm(), factor)
        if float(v.norm()) * rounding(size, float(matrix.trace()), dtype) < _SUSPICIOUS:
            return factor, None
    eigenvalues = torch.linalg.eigvalsh(matrix)
    noise = rounding(size, float(eigenvalues.abs().max()), dtype)
    smallest = float(eigenvalues[0])
    return factor, (smallest, noise) if int(failed) or smallest <= noise else None


def indefinite_reason(value: float, damping: float, noise: float = 0.0, error: float = 0.0) -> str:
    """Say why ``C + damping`` is not positive definite, ``C`` having the eigenvalue ``value``, and what to do."""
    if not math.isfinite(value):
        return "non-finite: a product has non-finite entries; leave out the examples that cause them."
    # The zero eigenvalues of a semidefinite curvature come out as rounding noise of either sign.
    if value >= -noise or value > -damping:
        return (
            f"singular: within rounding, C + {damping:.3g} has an eigenvalue of 0; raise `damping`, or compute in "
            "float64."
        )
    return (
        f"indefinite: the curvature has an eigenvalue of {value:.4g} or below, so that C + {damping:.3g} is not "
        f"positive definite. Raise `damping` above {max(noise, error) - value:.4g} at least, or use the GGN, which has "
        "no negative eigenvalues."
    )


def check_damping(damping: float) -> None:
    """Raise ``ValueError`` unless it is a number >= 0."""
    if isinstance(damping, bool) or not (math.isfinite(damping) and damping >= 0):
        raise ValueError(f"damping is {damping!r}; expected a number >= 0.")


def row_products(a: Tensor, b: Tensor) -> Tensor:
    """Return the inner product of every row of ``a`` with the same row of ``b``, ``[q]``."""
    kind = wide_dtype(a.device)
    total = torch.zeros(len(a), dtype=kind, device=a.device)
    for left, right in zip(a.split(_CHUNK, 1), b.split(_CHUNK, 1), strict=True):
        total = total + torch.einsum("qp,qp->q", left.to(kind), right.to(kind))
    return total


def row_norms(a: Tensor) -> Tensor:
    """Return the length of every row, ``[q]``."""
    return row_products(a, a).sqrt()
