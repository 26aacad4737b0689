"""How much scores depend on the damping: one pass, as rotated gradients do not depend on it.

The damping is a choice, and choosing it by what the scores should be good for is leakage. What can be told honestly
is whether it matters: how far rankings move when it is ten times smaller or larger.

Index legend: ``n`` examples, ``d`` dampings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_influence.core import distributed
from lightning_influence.core.containers import sent
from lightning_influence.core.precision import exact, wide_zeros
from lightning_influence.core.ranks import average_ranks
from lightning_influence.curvature.curvature import BlockCurvature
from lightning_influence.gradients.capture import LayerIO
from lightning_influence.gradients.passes import BatchGradients, ExampleGradients
from lightning_influence.gradients.visitors import ExampleColumns, Visitor, visit
from lightning_influence.layers.rows import some

FACTORS = (0.01, 0.1, 1.0, 10.0, 100.0)
# Share of the examples at the head of a ranking, for the overlap.
_HEAD = 0.1


@dataclass(frozen=True, eq=False)
class DampingSweep:
    """Self-influence for several dampings.

    Attributes:
        factors: Multiples of the fitted dampings, rising, ``d`` of them.
        indices: Dataset indices ``[n]``, sorted.
        self_influence: ``[n, d]``; NaN for examples without a finite gradient.
        stability: Spearman's rank correlation of each with that of the fitted damping (factor 1).
        overlap: Share of the top tenth of the fitted damping that is in the top tenth of each.
        layer_shares: Block name to its share of the self-influence at the fitted damping, summed over the examples.
    """

    factors: tuple[float, ...]
    indices: Tensor
    self_influence: Tensor
    stability: tuple[float, ...]
    overlap: tuple[float, ...]
    layer_shares: dict[str, float]

    def __repr__(self) -> str:
        lines = ["damping   rank correlation   same top 10 %"]
        rows = zip(self.factors, self.stability, self.overlap, strict=True)
        return "\n".join(lines + [f"{f:>6g} x   {s:>16.3f}   {o:>13.0%}" for f, s, o in rows])


def damping_sweep(
    gradients: ExampleGradients,
    indices: Sequence[int],
    curvature: BlockCurvature,
    factors: Sequence[float] = FACTORS,
    *,
    title: str = "damping sweep",
) -> DampingSweep:
    """Compute self-influence for multiples of the fitted dampings, in one pass over the examples.

    Args:
        gradients: The passes.
        indices: Dataset indices of the examples.
        curvature: A fitted block-diagonal curvature.
        factors: Multiples of its dampings; 1 is added if it is missing.
        title: Text of the progress bar.

    Raises:
        ValueError: If a factor is not positive, or fewer than two examples have finite gradients.
    """
    sweeper = Sweeper(indices, curvature, gradients.device, factors)
    visit(gradients, indices, [sweeper], title=title)
    return sweeper.result()


class Sweeper(Visitor):
    """Sweeps over some examples of a pass, see ``damping_sweep``."""

    def __init__(
        self,
        indices: Sequence[int],
        curvature: BlockCurvature,
        device: torch.device,
        factors: Sequence[float] = FACTORS,
    ) -> None:
        if not all(factor > 0 for factor in factors):
            raise ValueError(f"factors={tuple(factors)}; expected positive multiples of the fitted damping.")
        self._factors = tuple(sorted({1.0, *map(float, factors)}))
        self._reference = self._factors.index(1.0)
        self._indices, self._curvature = frozenset(indices), curvature
        self._places = {name: place for place, name in enumerate(curvature.blocks)}
        self._by_layer = wide_zeros(len(self._places), device)
        self._parts = torch.zeros_like(self._by_layer)  # of the batch at hand
        self._columns = ExampleColumns(indices, device, shared=False)
        self._rows: list[int] = []
        self._chosen = torch.zeros(0, dtype=torch.long, device=device)
        self._total = wide_zeros((0, len(self._factors)), device)

    def begin(self, batch: BatchGradients) -> None:
        """Look who of the batch is among the examples."""
        chosen = [place for place, index in enumerate(batch.indices) if index in self._indices]
        self._rows = [batch.indices[place] for place in chosen]
        self._chosen = sent(torch.tensor(chosen, dtype=torch.long), self._by_layer.device)
        self._total = self._by_layer.new_zeros((len(chosen), len(self._factors)))
        self._parts = torch.zeros_like(self._by_layer)

    def add(self, io: LayerIO) -> None:
        """Add a layer's part."""
        if not len(self._chosen):
            return
        dampings = [factor * self._curvature.dampings[io.name] for factor in self._factors]
        x, g = some(io.x, self._chosen), some(io.gs[0], self._chosen)
        part = self._curvature.blocks[io.name].self_influences(x, g, dampings)
        self._total += part
        self._parts[self._places[io.name]] += part[:, self._reference].sum()

    def end(self, batch: BatchGradients) -> None:
        """Leave out examples without a finite gradient."""
        self._total.masked_fill_(~batch.finite[self._chosen].unsqueeze(1), torch.nan)

    def file(self) -> None:
        """File the batch."""
        self._columns.add(self._rows, {"values": self._total})
        self._by_layer += self._parts

    def result(self) -> DampingSweep:
        """Return the sweep, the same on every process.

        Raises:
            ValueError: If fewer than two examples have finite gradients.
        """
        (by_layer,) = distributed.sum_across_processes([self._by_layer])
        order, columns = self._columns.gathered()
        values = exact(columns["values"]).cpu()
        finite = values[torch.isfinite(values).all(1)]
        if len(finite) < 2:
            raise ValueError(f"{len(finite)} examples have finite gradients; expected at least two to rank.")
        head = max(1, round(_HEAD * len(finite)))
        whole = by_layer.sum().clamp(min=torch.finfo(by_layer.dtype).tiny)
        reference = finite[:, self._reference]
        best = [set(column.topk(head).indices.tolist()) for column in finite.T]
        return DampingSweep(
            self._factors,
            order.cpu(),
            values,
            tuple(rank_correlation(column, reference) for column in finite.T),
            tuple(len(found & best[self._reference]) / head for found in best),
            dict(zip(self._places, (by_layer / whole).tolist(), strict=True)),
        )


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Return Spearman's correlation of two columns ``[n]``; 1 if neither says anything, 0 if one of them does not."""
    first, second = (ranks - ranks.mean() for ranks in map(average_ranks, (a, b)))
    scale = float(first.norm() * second.norm())
    return float(first @ second) / scale if scale else float(torch.equal(first, second))
