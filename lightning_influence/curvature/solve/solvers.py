"""The iterative solvers by name: what each makes of a system, how far it goes, and what it needs.

A solver of one's own is a function ``(system, g, tolerance, steps) -> Solution`` and an entry in ``SOLVERS``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from lightning_influence.core import distributed
from lightning_influence.core.memory import available_bytes
from lightning_influence.curvature.sampled import Effort
from lightning_influence.curvature.solve.cg import cg
from lightning_influence.curvature.solve.lissa import lissa
from lightning_influence.curvature.solve.nystrom import nystrom_preconditioner
from lightning_influence.curvature.solve.solution import Run, Solution
from lightning_influence.curvature.solve.spectrum import Matvec, row_norms

# A sketch of so many vectors pays from so many systems on: it costs a product of that many vectors, and on a digits
# network (trainer damping) it took 13 steps a system where plain CG took 35.
_RANK = 80
# Bytes that making it takes of each of its vectors' scalars, and the share of the memory that it may take.
_SKETCH_BYTES, _SKETCH_SHARE = 52, 0.5
_WORTH_A_SKETCH = 8
# Systems whose residual a direct solver measures: each of them is sent through the network with all the data.
_MEASURED = 4
# Steps that a system is expected to take with a sketch, and without.
_SKETCHED, _PLAIN = 13, 35


@dataclass(eq=False)
class System:
    """``C + λ``, as a solver meets it.

    Attributes:
        matvec: Multiplies ``[q, p]`` by ``C``.
        damping: Absolute λ.
        blocks: Multiplies by the inverse of a block-diagonal ``C + λ``.
        batches: Yields the curvature of random batches, without end.
        sample: Makes what multiplies by the inverse of a ``C + λ`` of some of the data's gradients, see ``sampled``.
        like: ``[p]``, for size, dtype and device.
    """

    matvec: Matvec
    damping: float
    blocks: Matvec
    batches: Callable[[], Iterator[Matvec]]
    sample: Callable[[], Matvec]
    like: Tensor

    @cached_property
    def sampled(self) -> Matvec:
        """What ``sample`` makes, for all solves."""
        return self.sample()

    @cached_property
    def sketch(self) -> Matvec:
        """Multiplies by something close to the inverse, made of one product; for all solves."""
        available = min(distributed.gather_objects(available_bytes(self.like.device) or 2**33))
        room = int(available * _SKETCH_SHARE / (_SKETCH_BYTES * len(self.like)))
        return nystrom_preconditioner(self.matvec, self.like, max(1, min(_RANK, room)), self.damping)


@dataclass(frozen=True)
class IterativeSolver:
    """One solver.

    Attributes:
        solve: Solves a system for ``g: [q, p]``, to a relative residual, in at most so many steps.
        tolerance: Where to stop: influence scores need no more.
        steps: Most steps.
        semidefinite: Whether it needs a curvature without negative eigenvalues.
    """

    solve: Callable[[System, Tensor, float, int], Solution]
    tolerance: float = 1e-4
    steps: int = 1000
    semidefinite: bool = False


def _cg(system: System, g: Tensor, tolerance: float, steps: int, preconditioner: Matvec | None = None) -> Solution:
    return cg(system.matvec, g, system.damping, preconditioner=preconditioner, tolerance=tolerance, max_steps=steps)


def _nystrom(system: System, g: Tensor, tolerance: float, steps: int) -> Solution:
    return _cg(system, g, tolerance, steps, system.sketch if len(g) >= _WORTH_A_SKETCH else None)


def _pcg(system: System, g: Tensor, tolerance: float, steps: int) -> Solution:
    return _cg(system, g, tolerance, steps, system.blocks)


def _lissa(system: System, g: Tensor, tolerance: float, steps: int) -> Solution:
    return lissa(system.batches(), g, system.damping, matvec=system.matvec, steps=steps, tolerance=tolerance)


def _woodbury(system: System, g: Tensor, tolerance: float, steps: int) -> Solution:
    """Solve with some of the gradients; where the residual with all of them is too large, that preconditions CG."""
    there, solution = g.any(1).nonzero()[:, 0], system.sampled(g)
    measured = there[torch.linspace(0, len(there) - 1, min(_MEASURED, len(there))).round().long()]
    run = Run(system.matvec, g[measured], system.damping)
    residual = row_norms(g[measured] - run(solution[measured])) / row_norms(g[measured])
    worst = float(residual.max()) if len(residual) else 0.0
    if not worst <= tolerance:
        del solution
        found = _cg(system, g, tolerance, steps, system.sampled)
        reached = float(found.residual.max())
        return replace(found, about=f"and conjugate gradients to a relative residual of {reached:.2g}")
    solved = torch.ones_like(g[:, 0], dtype=torch.bool)
    about = f"to a relative residual of {worst:.2g}, measured for {len(measured)} of {len(g)} systems"
    residuals = solved.to(residual.dtype) * worst
    return Solution(solution, solved, solved.long() * 0, residuals, ("",) * len(g), run.products, about)


def cheapest(system: System, effort: Effort, systems: int) -> str:
    """Return the solver that so many systems with a GGN take the least work with, as far as that is known before."""
    if "sampled" in vars(system):
        return "woodbury"
    sketched = systems >= _WORTH_A_SKETCH
    vectors = _RANK + _SKETCHED * systems if sketched else _PLAIN * systems
    sampled = effort.once + systems * effort.each + min(systems, _MEASURED) * effort.product
    return "woodbury" if effort.exact and sampled < vectors * effort.product else "nystrom"


SOLVERS: dict[str, IterativeSolver] = {
    "cg": IterativeSolver(_cg),
    "nystrom": IterativeSolver(_nystrom, semidefinite=True),
    "pcg": IterativeSolver(_pcg),
    # To go on takes a product with every system a step. Rank correlation of scores with those of all gradients (a CNN
    # of 100,000 parameters) by residual: .013 .997, .1 .973.
    "woodbury": IterativeSolver(_woodbury, tolerance=0.03, semidefinite=True),
    # Random batches do not reach as far.
    "lissa": IterativeSolver(_lissa, tolerance=1e-2, steps=2000),
}
"""Iterative solvers by name; an entry adds one."""
