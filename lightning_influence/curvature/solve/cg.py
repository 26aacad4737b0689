"""(Preconditioned) conjugate gradients for many systems at once.

Index legend: ``q`` systems (or those of them still being solved), ``p`` parameters.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_influence.curvature.solve.solution import INDEFINITE, SINGULAR, SOLVED, UNSOLVED, Run, Solution
from lightning_influence.curvature.solve.spectrum import Matvec, rounding, row_norms, row_products

# A restart from the true residual that does not halve it shows that rounding, not the number of steps, is the limit.
_WORTHWHILE = 0.5
# Residuals may grow on the way, by the root of the condition number at most.
_LARGEST_GROWTH = 1e6

_PRECONDITIONER, _EXHAUSTED, _STALLED = range(UNSOLVED, UNSOLVED + 3)


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
        ValueError: If ``g`` is non-finite, or ``damping`` is no number >= 0.
    """
    run = Run(matvec, g, damping)
    x = torch.zeros_like(run.b)
    active = run.residual.nonzero()[:, 0]
    r, first = run.b[active], True
    while len(active):
        start = run.residual[active]
        sweep = _sweep(run, preconditioner, x[active], r, tolerance, max_steps - run.steps[active])
        r = run.b[active] - run(sweep.x)
        found = row_norms(r)
        kept = found <= (_LARGEST_GROWTH if first else start)
        now = torch.where(kept, found, start)
        steps = run.steps[active] + sweep.steps
        # The later ones tell more.
        kinds = torch.where(now > _WORTHWHILE * start, _STALLED, SOLVED)
        kinds = torch.where(steps >= max_steps, _EXHAUSTED, kinds)
        kinds = torch.where(kept, kinds, SINGULAR if first else _STALLED)
        kinds = torch.where(sweep.kinds != SOLVED, sweep.kinds, kinds)
        kinds = torch.where(now <= tolerance, SOLVED, kinds)
        x[active] = torch.where(kept[:, None], sweep.x, x[active])
        run.steps[active], run.kinds[active] = steps, kinds
        run.values[active], run.residual[active] = sweep.values, now
        going = ((now > tolerance) & (kinds == SOLVED)).nonzero()[:, 0]
        active, r, first = active[going], r[going], False

    def why(kind: int, _: float, residual: float, steps: int) -> str:
        if kind == _PRECONDITIONER:
            return (
                f"preconditioner: it is not positive definite, perhaps within rounding only; raise `damping`, now "
                f'{damping:.3g}, compute in float64, or leave it out (`solver="cg"`).'
            )
        if kind == _EXHAUSTED:
            return (
                f"not converged: the relative residual is {residual:.2g} after {steps} steps; take more "
                f"(`max_steps=`), raise `damping`, now {damping:.3g}, or pass a (better) `preconditioner=`."
            )
        return (
            f"rounding: the relative residual is {residual:.2g} and falls no further; raise `damping`, now "
            f"{damping:.3g}, or `tolerance`, or compute in float64."
        )

    return run.solution(x, why)


class _Sweep(NamedTuple):
    """Conjugate gradients from one residual on: where each system has got to, in how many steps, and why no further."""

    x: Tensor
    steps: Tensor
    kinds: Tensor
    values: Tensor


def _sweep(run: Run, preconditioner: Matvec | None, x: Tensor, r: Tensor, tolerance: float, budget: Tensor) -> _Sweep:
    """Run until the recursion's residual is small, the budget (``[q]`` steps) is used up, or something breaks."""
    ends = _Sweep(x.clone(), torch.zeros_like(budget), torch.zeros_like(budget), torch.zeros_like(row_norms(r)))
    # Of the systems still running: their numbers, solutions, directions, and rᵀz of the step before.
    live, own, d = torch.arange(len(x), device=x.device), x, torch.zeros_like(x)
    before = torch.ones_like(ends.values)
    while True:
        z = r if preconditioner is None else preconditioner(r)
        rz = row_products(r, z)
        d = z + (rz / before).to(d.dtype)[:, None] * d
        ad = run(d)
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
        kinds = torch.where(singular, SINGULAR, SOLVED)
        kinds = torch.where(indefinite, INDEFINITE, kinds)
        ends.kinds[live] = torch.where(unsuitable, _PRECONDITIONER, kinds)
        ends.values[live] = torch.where(
            curvature.abs() <= noise, -run.damping, curvature / row_products(d, d) - run.damping
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
