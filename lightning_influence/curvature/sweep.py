"""How much scores depend on the damping: one pass, as rotated gradients do not depend on it.

The damping is a choice, and choosing it by what the scores should be good for is leakage. What can be told honestly
is whether it matters: how far rankings move when it is ten times smaller or larger.

Index legend: ``n`` examples, ``d`` dampings.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_influence.core import distributed
from lightning_influence.core.precision import exact, wide_zeros
from lightning_influence.curvature.curvature import BlockCurvature
from lightning_influence.gradients.passes import ExampleGradients

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
    if not all(factor > 0 for factor in factors):
        raise ValueError(f"factors={tuple(factors)}; expected positive multiples of the fitted damping.")
    ordered = tuple(sorted({1.0, *map(float, factors)}))
    reference = ordered.index(1.0)
    kept: list[int] = []
    rows = [wide_zeros((0, len(ordered)), gradients.device)]
    by_layer = wide_zeros(len(curvature.blocks), gradients.device)
    places = {name: place for place, name in enumerate(curvature.blocks)}
    with closing(gradients.run(indices, title=title)) as batches:
        for batch in batches:
            total = wide_zeros((batch.loss.n, len(ordered)), gradients.device)
            for io in batch.drained():
                dampings = [factor * curvature.dampings[io.name] for factor in ordered]
                part = curvature.blocks[io.name].self_influences(io.x, io.gs[0], dampings)
                total += part
                by_layer[places[io.name]] += part[:, reference].sum()
            rows.append(total.masked_fill(~batch.finite.unsqueeze(1), torch.nan))
            kept.extend(batch.indices)
    own = torch.tensor(kept, dtype=torch.long, device=gradients.device)
    (by_layer,) = distributed.sum_across_processes([by_layer])
    order, columns = distributed.gather_by_index(own, {"values": torch.cat(rows)})
    values = exact(columns["values"]).cpu()
    finite = values[torch.isfinite(values).all(1)]
    if len(finite) < 2:
        raise ValueError(f"{len(finite)} examples have finite gradients; expected at least two to rank.")
    head = max(1, round(_HEAD * len(finite)))
    whole = by_layer.sum().clamp(min=torch.finfo(by_layer.dtype).tiny)
    best = [set(column.topk(head).indices.tolist()) for column in finite.T]
    return DampingSweep(
        ordered,
        order.cpu(),
        values,
        tuple(rank_correlation(finite[:, d], finite[:, reference]) for d in range(len(ordered))),
        tuple(len(found & best[reference]) / head for found in best),
        dict(zip(places, (by_layer / whole).tolist(), strict=True)),
    )


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Return Spearman's correlation of two columns ``[n]``; 1 if neither says anything, 0 if one of them does not."""
    first, second = (ranks - ranks.mean() for ranks in map(_ranks, (a, b)))
    scale = float(first.norm() * second.norm())
    return float(first @ second) / scale if scale else float(torch.equal(first, second))


def _ranks(column: Tensor) -> Tensor:
    """Return ranks ``[n]``, ties sharing their mean."""
    _, inverse, counts = torch.unique(column, return_inverse=True, return_counts=True)
    ranks: Tensor = (counts.cumsum(0) - (counts - 1) / 2).double()
    return ranks[inverse]
