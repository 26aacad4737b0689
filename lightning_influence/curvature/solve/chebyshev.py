"""Functions of a symmetric matrix times vectors, from products with it, by Chebyshev polynomials."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_influence.curvature.solve.spectrum import Matvec, largest_eigenvalue

# Outside of the interval polynomials grow without bound, and the largest eigenvalue is an estimate.
_MARGIN = 1.1
# Terms that a spectrum below 1 takes, down to the rounding of float64.
_LEAST = 12


def exponential_mean(x: Tensor) -> Tensor:
    """Return ``(1 - exp(-x)) / x``, the mean of ``exp(-s x)`` over ``s`` from 0 to 1; 1 at 0."""
    safe = x.where(x != 0, torch.ones_like(x))
    return torch.where(x != 0, -torch.expm1(-safe) / safe, 1.0)


def matrix_exponential_mean(matvec: Matvec, v: Tensor) -> Tensor:
    """Return ``M⁻¹ (I - exp(-M)) v``, see ``exponential_mean``, for a positive semidefinite ``M``; ``[q, p]``.

    The number of products grows with the root of the largest eigenvalue, as that of conjugate gradients does: the
    coefficients of ``exp(-x)`` on ``[0, L]`` fall as ``exp(-k² / L)``. Vectors held at a time: five.

    Args:
        matvec: Multiplies ``[q, p]`` by ``M``.
        v: ``[q, p]``.
    """
    found = largest_eigenvalue(matvec, v)
    largest = _MARGIN * (found.value + found.error)
    if not largest > 0:
        return v
    terms = _LEAST + math.ceil(math.sqrt(-largest * math.log(torch.finfo(v.dtype).eps)))
    return _polynomial(_coefficients(exponential_mean, largest, terms), matvec, v, largest)


def _coefficients(function: Callable[[Tensor], Tensor], largest: float, terms: int) -> list[float]:
    """Return the first coefficients of a function on ``[0, largest]``, from its values at as many nodes."""
    angles = math.pi * (torch.arange(terms, dtype=torch.float64) + 0.5) / terms
    values = function(largest * (angles.cos() + 1) / 2)
    found = [2 / terms * float((values * (k * angles).cos()).sum()) for k in range(terms)]
    return [found[0] / 2, *found[1:]]


def _polynomial(coefficients: list[float], matvec: Matvec, v: Tensor, largest: float) -> Tensor:
    before, last = v, 2 / largest * matvec(v) - v
    total = coefficients[0] * before + coefficients[1] * last
    for coefficient in coefficients[2:]:
        before, last = last, 2 * (2 / largest * matvec(last) - last) - before
        total += coefficient * last
    return total
