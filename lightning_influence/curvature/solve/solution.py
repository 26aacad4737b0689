"""What solving ``(C + λ) v = g`` came to, for many systems at once: ``g: [q, p]`` with one system per row.

A ``Solution`` says what was reached, whether that is good enough, and if not, why and what to do. It never holds NaN or
infinity. Inner products and norms are summed wide (``spectrum``), whatever the vectors are stored in.

Index legend: ``q`` systems, ``p`` parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_influence.curvature.solve.spectrum import Matvec, check_damping, indefinite_reason, row_norms

SOLVED, INDEFINITE, SINGULAR, UNSOLVED = range(4)
"""How a system ended. A solver's own reasons are numbers from ``UNSOLVED`` on."""


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
        about: How the solution came about, where a reader of the scores should know.
    """

    solution: Tensor
    converged: Tensor
    steps: Tensor
    residual: Tensor
    reasons: tuple[str, ...]
    products: int
    about: str = ""

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


class Run:
    """One solver's run on many systems: the product with ``C + λ``, and how each system ends.

    Args:
        matvec: Multiplies ``[q, p]`` by ``C``.
        g: ``[q, p]``.
        damping: Absolute λ.

    Attributes:
        b: The systems at unit length (zero rows as they are): no scale can overflow then.
        steps: Iterations, ``[q]``; none at first.
        kinds: ``SOLVED``, or why not, ``[q]``.
        values: An eigenvalue, where the reason needs one, ``[q]``.
        residual: Relative residual, ``[q]``; that of a solution of zero at first.
        products: Number of products so far.

    Raises:
        ValueError: If ``g`` is non-finite, or ``damping`` is no number >= 0.
    """

    def __init__(self, matvec: Matvec, g: Tensor, damping: float) -> None:
        bad = (~torch.isfinite(g).all(1)).nonzero()[:, 0].tolist()
        if bad:
            raise ValueError(f"g has non-finite entries in the rows {bad[:10]}; leave those examples out.")
        check_damping(damping)
        self.damping, self.products = damping, 0
        self._matvec, self._g, norms = matvec, g, row_norms(g)
        self._norms = norms
        self.b = g / torch.where(norms > 0, norms, 1).to(g.dtype)[:, None]
        self.steps = torch.zeros_like(norms, dtype=torch.int64)
        self.kinds = torch.zeros_like(self.steps)
        self.values = torch.zeros_like(norms)
        self.residual = (norms > 0).to(norms.dtype)

    def plain(self, v: Tensor) -> Tensor:
        """Multiply by ``C``."""
        self.products += 1
        return self._matvec(v)

    def __call__(self, v: Tensor) -> Tensor:
        """Multiply by ``C + λ``."""
        return self.plain(v) + self.damping * v

    def solution(self, x: Tensor, why: Callable[[int, float, float, int], str]) -> Solution:
        """Undo the normalisation and put everything into words.

        Args:
            x: Solutions for ``b``.
            why: What to say of a solver's own kind, value, residual and steps; a colon ends the name of the kind.
        """
        v = (x * self._norms[:, None].to(x.dtype)).to(self._g)
        finite = torch.isfinite(v).all(1)
        v = torch.where(finite[:, None], v, 0)
        kinds, residual = torch.where(finite, self.kinds, SINGULAR), torch.where(finite, self.residual, 1)

        def reason(kind: int, value: float, residual: float, steps: int) -> str:
            if kind == INDEFINITE:
                return indefinite_reason(value, self.damping)
            if kind == SINGULAR:
                damping = f"{self.damping:.3g}"
                return f"singular: with damping {damping} the solution grows beyond all bounds; raise `damping`."
            return "" if kind == SOLVED else why(kind, value, residual, steps)

        ends = zip(kinds.tolist(), self.values.tolist(), residual.tolist(), self.steps.tolist(), strict=True)
        return Solution(v, kinds == SOLVED, self.steps, residual, tuple(reason(*end) for end in ends), self.products)
