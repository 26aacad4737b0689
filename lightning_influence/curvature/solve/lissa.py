"""LiSSA: gradient descent on random batches (Agarwal et al. 2017, 1602.03943; Koh & Liang 2017, 1703.04730).

Index legend: ``q`` systems, ``p`` parameters.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import chain, islice

import torch
from torch import Tensor

from lightning_influence.curvature.solve.solution import INDEFINITE, SOLVED, UNSOLVED, Run, Solution
from lightning_influence.curvature.solve.spectrum import Matvec, largest_eigenvalue, row_norms, smallest_eigenvalue

# Steps between two looks at whether any system is left: the device need not be waited for in every step.
_LOOK = 10
# An iterate that converges is never longer than ``min(steps · α, 1/λ) ‖g‖``; random batches overshoot a little.
_OVERSHOOT = 10.0
# Batches whose largest eigenvalue is looked at besides that of all the data: small batches have larger ones.
_BATCHES_TO_LOOK_AT = 3
# The default step size over its bound.
_MARGIN = 0.9

_DIVERGED, _SLOW = range(UNSOLVED, UNSOLVED + 2)


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
    """Solve by ``v ← v - α ((C_B + λ) v - g)`` on random batches.

    Stopping after ``J`` steps acts like an additional damping of ``1/(αJ)``: directions whose eigenvalue lies below it
    are not solved for yet. The second half of the iterates is averaged, as the noise of the batches does not fade;
    where the last iterate has the smaller residual (without noise it has), that is taken.

    Args:
        matvecs: For every step the curvature of a random batch, whose expectation is ``C``.
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
        ValueError: If ``g`` is non-finite, ``damping`` is no number >= 0, or ``C + λ`` has no
            positive eigenvalue.
    """
    run = Run(matvec, g, damping)
    stream = iter(matvecs)
    first = list(islice(stream, min(steps, _BATCHES_TO_LOOK_AT)))
    if step_size is None:
        step_size = _MARGIN * _step_bound([run.plain, *first], g, damping)
    v, average, averaged = torch.zeros_like(g), torch.zeros_like(g), 0
    alive = torch.ones_like(run.kinds, dtype=torch.bool)
    for step, product in enumerate(islice(chain(first, stream), steps), 1):
        moved = v - step_size * (product(v) + damping * v - run.b)
        longest = _OVERSHOOT * min(step * step_size, 1 / damping if damping else math.inf)
        # Decided on the device: nothing has to wait for it, and no infinity ever enters the next product.
        alive = alive & (row_norms(moved) <= longest)
        v = torch.where(alive[:, None], moved, v)
        run.steps += alive
        if step > steps // 2:
            averaged += 1
            average += (v - average) / averaged
        if step % _LOOK == 0 and not bool(alive.any()):
            break
    residual = row_norms(run.b - run(v))
    if averaged:
        other = row_norms(run.b - run(average))
        better = alive & (other < residual)
        v, residual = torch.where(better[:, None], average, v), torch.where(better, other, residual)
    run.residual = residual
    run.kinds = torch.where(alive, torch.where(residual <= tolerance, SOLVED, _SLOW), _DIVERGED)
    if not bool(alive.all()):
        kind, value = _why_diverged(run)
        run.kinds = torch.where(alive, run.kinds, kind)
        run.values = torch.where(alive, run.values, value)

    def why(kind: int, value: float, residual: float, steps: int) -> str:
        if kind == _DIVERGED:
            return (
                f"diverged: step_size {step_size:.3g} is too large for the largest eigenvalue, {value:.3g} over all "
                f"the data (and more in small batches); pass less than {1 / (value + damping):.3g}, or none to have "
                "it found."
            )
        return (
            f"not converged: the relative residual is {residual:.2g}; stopping after {steps} steps acts like an "
            f"additional damping of {1 / (step_size * max(steps, 1)):.2g}. Take more steps (`steps=`), larger "
            f"batches, or raise `damping`, now {damping:.3g}."
        )

    return run.solution(v, why)


def _step_bound(matvecs: Iterable[Matvec], g: Tensor, damping: float) -> float:
    """Return ``1/(σ + λ)`` for the largest eigenvalue of any of the matrices."""
    largest = max(found.value + found.error for found in (largest_eigenvalue(matvec, g) for matvec in matvecs))
    if not largest + damping > 0:
        raise ValueError(
            f"the largest eigenvalue of the curvature is {largest:.3g} and damping is {damping:.3g}: C + damping is "
            "not positive definite. Raise `damping`."
        )
    return 1 / (max(largest, 0.0) + damping)


def _why_diverged(run: Run) -> tuple[int, float]:
    """Tell a negative eigenvalue, which no step size helps against, from a step that is too long."""
    smallest = smallest_eigenvalue(run.plain, run.b, max_steps=30, resolution=0.1 * run.damping)
    if smallest.value < -run.damping - smallest.error:
        return INDEFINITE, smallest.value
    largest = largest_eigenvalue(run.plain, run.b)
    return _DIVERGED, largest.value + largest.error
