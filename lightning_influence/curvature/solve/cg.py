"""Solving ``(C + λ) v = g`` with little more than products ``C v``: dense, conjugate gradients, LiSSA.

All solvers take many right-hand sides at once, ``g: [q, p]`` with one system per row, and return a ``Solution``: what
was reached, whether that is good enough, and if not, why and what to do. A solution never holds NaN or infinity.
Inner products and norms are summed wide (``spectrum``), whatever the vectors are stored in.

Index legend: ``q`` systems (or those of them still being solved), ``p`` parameters.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain, islice
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_influence.core.precision import exact, wide_dtype
from lightning_influence.curvature.solve.spectrum import (
    Matvec,
    check_damping,
    factorised,
    indefinite_reason,
    largest_eigenvalue,
    rounding,
    row_norms,
    row_products,
    smallest_eigenvalue,
)

# A restart from the true residual that does not halve it shows that rounding, not the number of steps, is the limit.
_WORTHWHILE = 0.5
# Residuals of conjugate gradients may grow on the way, by the root of the condition number at most.
_LARGEST_GROWTH = 1e6
# LiSSA waits for the device so often, to see whether it can stop.
_LOOK = 10
# A LiSSA iterate that converges is never longer than ``min(steps · α, 1/λ) ‖g‖``; random batches overshoot a little.
_OVERSHOOT = 10.0
# Batches whose largest eigenvalue LiSSA looks at besides that of all the data: small batches have larger ones.
_BATCHES_TO_LOOK_AT = 3
# The default step size over its bound.
_MARGIN = 0.9

# How a system ended.
_SOLVED, _INDEFINITE, _SINGULAR, _PRECONDITIONER, _EXHAUSTED, _STALLED, _DIVERGED, _SLOW = range(8)


class SolverError(RuntimeError):
    """A linear system could not be solved; the message says why and the way out."""


@dataclass(frozen=True, eq=False)
class Solution:
    """Solutions of ``q`` systems and how far they can be trusted.

    Attributes:
        solution: ``[q, p]``, always finite; what was reached where a system was not solved.
        converged: ``[q]`` bool: the residual is within the tolerance.
        steps: ``[q]`` int64, iterations that each system took.
        residual: ``[q]``, ``‖(C + λ) v - g‖ / ‖g‖``, computed anew from the solution; 0 where ``g`` is 0.
        reasons: One text per system: empty if it converged, else why not and the way out.
        products: Number of products of the full curvature with a batch of vectors.
    """

    solution: Tensor
    converged: Tensor
    steps: Tensor
    residual: Tensor
    reasons: tuple[str, ...]
    products: int

    @property
    def reason(self) -> str:
        """Why systems were not solved, each kind of reason once; empty if all of them were."""
        kinds: dict[str, list[str]] = {}
        for reason in filter(None, self.reasons):
            # The same failure comes with other numbers for each system: the first speaks for all.
            kinds.setdefault(reason.partition(":")[0], []).append(reason)
        if not kinds:
            return ""
        failed = sum(map(len, kinds.values()))
        listed = " ".join(f"[{len(found)}] {found[0]}" for found in kinds.values())
        return f"{failed} of {len(self.reasons)} systems were not solved. {listed}"

    def require(self) -> Tensor:
        """Return the solution.

        Raises:
            SolverError: If a system was not solved.
        """
        if self.reason:
            raise SolverError(self.reason)
        return self.solution


def dense(matrix: Tensor, g: Tensor, damping: float, *, tolerance: float = 1e-6) -> Solution:
    """Solve with the matrix itself, by a Cholesky factorisation in float64.

    Args:
        matrix: ``C: [p, p]``; its symmetric part counts.
        g: ``[q, p]``.
        damping: Absolute λ.
        tolerance: Relative residual that counts as solved.

    Returns:
        The solutions; zeros, not converged, if ``C + λ`` is not positive definite, the reason giving the smallest
        eigenvalue.

    Raises:
        ValueError: If ``g`` or ``matrix`` is non-finite or of the wrong shape, or ``damping`` is no number >= 0.
    """
    _check(g, damping, tolerance)
    p = g.shape[1]
    if matrix.shape != (p, p):
        raise ValueError(f"the matrix has the shape {tuple(matrix.shape)}; expected {(p, p)} for g {tuple(g.shape)}.")
    if not bool(torch.isfinite(matrix).all()):
        raise ValueError("the matrix has non-finite entries; leave out the examples that they come from.")
    wide = exact(matrix)
    wide = (wide + wide.T) / 2
    damped = wide + damping * torch.eye(p, dtype=wide.dtype, device=wide.device)
    b, norms = _normalised(exact(g))
    x, values = torch.zeros_like(b), torch.zeros_like(norms)
    factor, singular = factorised(damped, matrix.dtype)
    if singular is not None:
        smallest, noise = singular
        values += -damping if abs(smallest) <= noise else smallest - damping
    else:
        found = torch.cholesky_solve(b.T, factor).T
        x = torch.where(torch.isfinite(found).all(1, keepdim=True), found, 0)
    residual = row_norms(b - x @ damped)
    kinds = torch.where(residual <= tolerance, _SOLVED, _STALLED if singular is None else _INDEFINITE)
    ends = _Ends(torch.zeros_like(kinds), kinds, values, residual)
    return ends.solution(g, x, norms, damping, products=0)


def cg(
    matvec: Matvec,
    g: Tensor,
    damping: float,
    *,
    preconditioner: Matvec | None = None,
    tolerance: float = 1e-5,
    max_steps: int = 200,
) -> Solution:
    """Solve by (preconditioned) conjugate gradients.

    Every system runs on its own and leaves the batch once it is done. Where the recursion believes to have converged,
    the residual is computed from the solution; a system that is not there yet starts again from it.

    Args:
        matvec: The curvature, without damping.
        g: ``[q, p]``.
        damping: Absolute λ.
        preconditioner: Multiplies by something positive definite that is close to ``(C + λ)⁻¹``, for example the
            inverse of EK-FAC with the same damping.
        tolerance: Relative residual that counts as solved. Single precision reaches about 1e-7 times the condition
            number, and no less.
        max_steps: Most steps of one system.

    Returns:
        The solutions. A system that meets a direction ``d`` with ``dᵀ (C + λ) d <= 0`` keeps what it had by then.

    Raises:
        ValueError: If ``g`` is non-finite or of the wrong shape, or an argument is out of range.
    """
    _check(g, damping, tolerance)
    if max_steps < 1:
        raise ValueError(f"max_steps is {max_steps}; expected at least 1.")
    operator = _Damped(matvec, damping)
    b, norms = _normalised(g)
    x, ends = torch.zeros_like(b), _Ends.start(norms)
    active = norms.nonzero()[:, 0]
    r = b[active]
    first = True
    while len(active):
        start = ends.residual[active]
        sweep = _sweep(operator, preconditioner, x[active], r, tolerance, max_steps - ends.steps[active])
        r = b[active] - operator(sweep.x)
        found = row_norms(r)
        kept = found <= (_LARGEST_GROWTH if first else start)
        now = torch.where(kept, found, start)
        steps = ends.steps[active] + sweep.steps
        # The later ones tell more.
        kinds = torch.where(now > _WORTHWHILE * start, _STALLED, _SOLVED)
        kinds = torch.where(steps >= max_steps, _EXHAUSTED, kinds)
        kinds = torch.where(kept, kinds, _SINGULAR if first else _STALLED)
        kinds = torch.where(sweep.kinds != _SOLVED, sweep.kinds, kinds)
        kinds = torch.where(now <= tolerance, _SOLVED, kinds)
        x[active] = torch.where(kept[:, None], sweep.x, x[active])
        ends.write(active, steps, kinds, sweep.values, now)
        going = ((now > tolerance) & (kinds == _SOLVED)).nonzero()[:, 0]
        active, r, first = active[going], r[going], False
    return ends.solution(g, x, norms, damping, products=operator.products)


def lissa(
    matvecs: Iterable[Matvec],
    g: Tensor,
    damping: float,
    *,
    matvec: Matvec,
    steps: int = 1000,
    step_size: float | None = None,
    tolerance: float = 1e-2,
) -> Solution:
    """Solve by ``v ← v - α ((C_B + λ) v - g)`` on random batches (Agarwal et al. 2017, 1602.03943; Koh & Liang 2017).

    Stopping after ``J`` steps acts like an additional damping of ``1/(αJ)``: directions whose eigenvalue lies below it
    are not solved for yet. The second half of the iterates is averaged, as the noise of the batches does not fade;
    where the last iterate has the smaller residual (without noise it has), that is taken.

    Args:
        matvecs: For every step the curvature of a random batch, whose expectation is ``C``. With
            ``itertools.repeat(matvec)`` this is plain gradient descent, which stops when it has converged.
        g: ``[q, p]``.
        damping: Absolute λ.
        matvec: The curvature of all the data, for the step size and the residual.
        steps: ``J``.
        step_size: ``α``, which must be below ``1/(σ + λ)`` for the largest eigenvalue ``σ`` of every batch. By default
            0.9 of that, ``σ`` being the largest found for ``matvec`` and the first batches.
        tolerance: Relative residual that counts as solved. Random batches leave noise in it.

    Returns:
        The solutions. A system that diverges keeps its last iterate that could still be one of a convergent run.

    Raises:
        ValueError: If ``g`` is non-finite or of the wrong shape, or an argument is out of range.
    """
    _check(g, damping, tolerance)
    if steps < 1:
        raise ValueError(f"steps is {steps}; expected at least 1.")
    operator = _Damped(matvec, damping)
    stream = iter(matvecs)
    first = list(islice(stream, min(steps, _BATCHES_TO_LOOK_AT)))
    if step_size is None:
        step_size = _MARGIN * _step_bound([operator.plain, *(m for m in first if m is not matvec)], g, damping)
    elif not (math.isfinite(step_size) and step_size > 0):
        raise ValueError(f"step_size is {step_size}; expected a number > 0, or None for one below 1/(σ + λ).")

    b, norms = _normalised(g)
    v, average, ends = torch.zeros_like(b), torch.zeros_like(b), _Ends.start(norms)
    alive = torch.ones_like(norms, dtype=torch.bool)
    done = torch.zeros_like(alive)
    averaged = 0
    for step, product in enumerate(islice(chain(first, stream), steps), 1):
        gradient = product(v) + damping * v - b
        moved = v - step_size * gradient
        longest = _OVERSHOOT * min(step * step_size, 1 / damping if damping else math.inf)
        # Decided on the device: nothing has to wait for it, and no infinity ever enters the next product.
        alive = alive & (row_norms(moved) <= longest)
        moving = alive & ~done
        v = torch.where(moving[:, None], moved, v)
        ends.steps += moving
        if step > steps // 2:
            averaged += 1
            average += (v - average) / averaged
        if step % _LOOK == 0:
            if product is matvec:  # which tells the residual, if that of the iterate before
                done = done | (row_norms(gradient) <= _WORTHWHILE * tolerance)
            if not bool((alive & ~done).any()):
                break
    residual = row_norms(b - operator(v))
    if averaged:
        other = row_norms(b - operator(average))
        better = alive & (other < residual)
        v, residual = torch.where(better[:, None], average, v), torch.where(better, other, residual)
    ends.residual = residual
    ends.kinds = torch.where(alive, torch.where(residual <= tolerance, _SOLVED, _SLOW), _DIVERGED)
    if not bool(alive.all()):
        kind, value = _why_diverged(operator, g)
        ends.kinds = torch.where(alive, ends.kinds, kind)
        ends.values = torch.where(alive, ends.values, value)
    return ends.solution(g, v, norms, damping, products=operator.products, step_size=step_size)


@dataclass(eq=False)
class _Ends:
    """How each system ended: ``[q]`` each, ``values`` being what the explanation of its kind needs."""

    steps: Tensor
    kinds: Tensor
    values: Tensor
    residual: Tensor

    @classmethod
    def start(cls, norms: Tensor) -> _Ends:
        """No step yet; the residual of a zero solution."""
        zeros = torch.zeros_like(norms, dtype=torch.int64)
        return cls(zeros, zeros.clone(), torch.zeros_like(norms), (norms > 0).to(norms.dtype))

    def write(self, rows: Tensor, steps: Tensor, kinds: Tensor, values: Tensor, residual: Tensor) -> None:
        """Set the state of some systems."""
        self.steps[rows], self.kinds[rows] = steps, kinds
        self.values[rows], self.residual[rows] = values, residual

    def solution(
        self, g: Tensor, x: Tensor, norms: Tensor, damping: float, *, products: int, step_size: float = 0.0
    ) -> Solution:
        """Undo the normalisation and put everything into words."""
        v = (x * norms[:, None].to(x.dtype)).to(g.device, g.dtype)
        finite = torch.isfinite(v).all(1)
        v = torch.where(finite[:, None], v, 0)
        finite = finite.to(self.kinds.device)
        kinds = torch.where(finite, self.kinds, _SINGULAR)
        residual = torch.where(finite, self.residual, 1)
        rows = zip(kinds.tolist(), self.values.tolist(), residual.tolist(), self.steps.tolist(), strict=True)
        reasons = tuple(_explain(*row, damping, step_size) for row in rows)
        device = g.device
        return Solution(
            v,
            (kinds == _SOLVED).to(device),
            self.steps.to(device),
            residual.to(device, wide_dtype(device)),
            reasons,
            products,
        )


def _explain(kind: int, value: float, residual: float, steps: int, damping: float, step_size: float) -> str:
    """Say how a system ended and what to do about it; what stands before the colon names the kind."""
    reached = f"the relative residual is {residual:.2g}"
    if kind == _SOLVED:
        return ""
    if kind == _INDEFINITE:
        return indefinite_reason(value, damping)
    if kind == _SINGULAR:
        return f"singular: with damping {damping:.3g} the solution grows beyond all bounds; raise `damping`."
    if kind == _PRECONDITIONER:
        return "preconditioner: it is not positive definite; pass the inverse of a damped positive curvature."
    if kind == _EXHAUSTED:
        return (
            f"not converged: {reached} after {steps} steps; take more (`max_steps=`), raise `damping`, now "
            f"{damping:.3g}, or pass a (better) `preconditioner=`."
        )
    if kind == _STALLED:
        return (
            f"rounding: {reached} and falls no further; raise `damping`, now {damping:.3g}, or `tolerance`, or compute "
            "in float64."
        )
    if kind == _DIVERGED:
        return (
            f"diverged: step_size {step_size:.3g} is too large for the largest eigenvalue, {value:.3g} over all the "
            f"data (and more in small batches); pass less than {1 / (value + damping):.3g}, or none to have it found."
        )
    return (
        f"not converged: {reached}; stopping after {steps} steps acts like an additional damping of "
        f"{1 / (step_size * max(steps, 1)):.2g}. Take more steps (`steps=`), larger batches, or raise `damping`, now "
        f"{damping:.3g}."
    )


class _Damped:
    """``C + λ`` that counts its products."""

    def __init__(self, matvec: Matvec, damping: float) -> None:
        self._matvec, self.damping = matvec, damping
        self.products = 0

    def plain(self, v: Tensor) -> Tensor:
        """Multiply by ``C``."""
        self.products += 1
        result = self._matvec(v)
        if result.shape != v.shape:
            raise ValueError(f"matvec turned {tuple(v.shape)} into {tuple(result.shape)}; expected the same shape.")
        return result

    def __call__(self, v: Tensor) -> Tensor:
        return self.plain(v) + self.damping * v


class _Sweep(NamedTuple):
    """Conjugate gradients from one residual on: where each system has got to, in how many steps, and why no further."""

    x: Tensor
    steps: Tensor
    kinds: Tensor
    values: Tensor


def _sweep(
    operator: _Damped, preconditioner: Matvec | None, x: Tensor, r: Tensor, tolerance: float, budget: Tensor
) -> _Sweep:
    """Run until the recursion's residual is small, the budget (``[q]`` steps) is used up, or something breaks."""
    ends = _Sweep(x.clone(), torch.zeros_like(budget), torch.zeros_like(budget), torch.zeros_like(row_norms(r)))
    # Of the systems still running: their numbers, solutions, directions, and rᵀz of the step before.
    live, own, d = torch.arange(len(x), device=x.device), x, torch.zeros_like(x)
    before = torch.ones_like(ends.values)
    while True:
        z = r if preconditioner is None else preconditioner(r)
        rz = row_products(r, z)
        d = z + (rz / before).to(d.dtype)[:, None] * d
        ad = operator(d)
        curvature = row_products(d, ad)
        unsuitable = ~(rz > 0)
        # By rounding alone it may be positive where there is none.
        noise = rounding(1, 1.0, d.dtype) * row_norms(d) * row_norms(ad)
        indefinite = ~(curvature > noise) & ~unsuitable
        alpha = (rz / curvature).to(d.dtype)[:, None]
        moved, rest = own + alpha * d, r - alpha * ad
        norms = row_norms(rest)
        singular = ~(torch.isfinite(norms) & torch.isfinite(row_norms(moved))) & ~unsuitable & ~indefinite
        broken = (unsuitable | indefinite | singular)[:, None]
        own, r = torch.where(broken, own, moved), torch.where(broken, r, rest)
        kinds = torch.where(singular, _SINGULAR, _SOLVED)
        kinds = torch.where(indefinite, _INDEFINITE, kinds)
        ends.kinds[live] = torch.where(unsuitable, _PRECONDITIONER, kinds)
        ends.values[live] = torch.where(
            curvature.abs() <= noise, -operator.damping, curvature / row_products(d, d) - operator.damping
        )
        ends.steps[live] += 1
        # The one thing in a step that waits for the device: who goes on.
        going = (~broken[:, 0] & (norms > tolerance) & (ends.steps[live] < budget[live])).nonzero()[:, 0]
        if len(going) < len(live):
            ends.x[live] = own
            live, own, r, d, rz = live[going], own[going], r[going], d[going], rz[going]
        if not len(live):
            return ends
        before = rz


def _step_bound(matvecs: Iterable[Matvec], g: Tensor, damping: float) -> float:
    """Return ``1/(σ + λ)`` for the largest eigenvalue of any of the matrices."""
    largest = max(found.value + found.error for found in (largest_eigenvalue(matvec, g) for matvec in matvecs))
    if not largest + damping > 0:
        raise ValueError(
            f"the largest eigenvalue of the curvature is {largest:.3g} and damping is {damping:.3g}: C + damping is "
            "not positive definite. Raise `damping`."
        )
    return 1 / (max(largest, 0.0) + damping)


def _why_diverged(operator: _Damped, g: Tensor) -> tuple[int, float]:
    """Tell a negative eigenvalue, which no step size helps against, from a step that is too long."""
    smallest = smallest_eigenvalue(operator.plain, g, max_steps=30, resolution=0.1 * operator.damping)
    if smallest.value < -operator.damping - smallest.error:
        return _INDEFINITE, smallest.value
    largest = largest_eigenvalue(operator.plain, g)
    return _DIVERGED, largest.value + largest.error


def _check(g: Tensor, damping: float, tolerance: float) -> None:
    if g.ndim != 2 or not g.is_floating_point() or g.shape[1] == 0:
        raise ValueError(
            f"g has the shape {tuple(g.shape)} and dtype {g.dtype}; expected floating point [q, p], one system per row."
        )
    bad = (~torch.isfinite(g).all(1)).nonzero()[:, 0].tolist()
    if bad:
        raise ValueError(f"g has non-finite entries in the rows {bad[:10]}; leave those examples out.")
    check_damping(damping)
    if not (math.isfinite(tolerance) and tolerance > 0):
        raise ValueError(f"tolerance is {tolerance}; expected a number > 0.")


def _normalised(g: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows of ``g`` at unit length (zero rows as they are), and their norms: no scale can overflow then."""
    norms = row_norms(g)
    return g / torch.where(norms > 0, norms, 1).to(g.dtype)[:, None], norms
