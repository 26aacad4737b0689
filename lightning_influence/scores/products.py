"""Inner products of training examples with queries, as a pass goes by: all of them, or the strongest of every query.

Index legend: ``q`` queries, ``n`` training examples, ``m`` the whole and its parts by layer.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_influence.core import distributed
from lightning_influence.core.precision import exact, wide_zeros
from lightning_influence.curvature.curvature import Curvature, Scorer
from lightning_influence.gradients.capture import LayerIO
from lightning_influence.gradients.passes import BatchGradients
from lightning_influence.gradients.visitors import Visitor
from lightning_influence.scores.queries import PreparedQueries

Normalisation = Literal["none", "relative", "cosine"]
"""What scores of pairs are divided by: nothing, the norm of the training example, or that of the query, too."""

SCORE_BYTES = 8


class _Pairs(Visitor, ABC):
    """Computes the scores of every batch with prepared queries, and hands them on to ``_take``.

    Args:
        prepared: The queries.
        curvature: For the norms to divide by; not needed without.
        normalise: See ``pairwise_scores``.
        layers: Whose parts of the scores to give, after the whole.
    """

    def __init__(
        self,
        prepared: PreparedQueries,
        curvature: Curvature | None = None,
        normalise: Normalisation = "none",
        layers: Sequence[str] = (),
    ) -> None:
        self._prepared = prepared
        self._curvature = None if normalise == "none" else curvature
        self._places = {layer: 1 + place for place, layer in enumerate(layers)}
        self._of_query = _length(prepared.self_influence) if normalise == "cosine" else None
        self._scores = wide_zeros(0, prepared.self_influence.device)
        self._scorer: Scorer | None = None

    def begin(self, batch: BatchGradients) -> None:
        of_queries = self._prepared.self_influence
        self._scores = of_queries.new_zeros((batch.loss.n, 1 + len(self._places), len(of_queries)))
        self._scorer = None if self._curvature is None else self._curvature.scorer(batch.loss.n)

    def add(self, io: LayerIO) -> None:
        part = self._prepared.products(io)
        self._scores[:, 0] += part
        if self._places:
            self._scores[:, self._places[io.name]] = part
        if self._scorer is not None:
            self._scorer.add(io)

    def end(self, batch: BatchGradients) -> None:
        scores = self._scores
        if self._scorer is not None:
            scores = scores / _length(self._scorer.self_influence().to(scores))[:, None, None]
        if self._of_query is not None:
            scores = scores / self._of_query
        scores[~batch.finite] = torch.nan
        scores[..., self._prepared.self_influence.isnan()] = torch.nan
        self._take(batch.indices, scores)

    @abstractmethod
    def _take(self, indices: list[int], scores: Tensor) -> None:
        """Take the scores of a batch, ``[n, m, q]``."""


class PairColumns(_Pairs):
    """Hands on columns of the matrix of scores, on every process the same.

    Args:
        examples: Dataset indices ``[n]`` of the pass, sorted.
        prepared: The queries.
        write: Takes places of columns ``[n]`` and their scores ``[m, q, n]``.
        curvature: For the norms to divide by; not needed without.
        normalise: See ``pairwise_scores``.
        layers: Whose parts of the scores to give, after the whole.
    """

    def __init__(
        self,
        examples: Tensor,
        prepared: PreparedQueries,
        write: Callable[[Tensor, Tensor], None],
        curvature: Curvature | None = None,
        normalise: Normalisation = "none",
        layers: Sequence[str] = (),
    ) -> None:
        super().__init__(prepared, curvature, normalise, layers)
        self._examples, self._write = examples, write
        self._shape = 1 + len(layers), len(prepared.self_influence)
        self._rounds = distributed.Rounds(len(examples), SCORE_BYTES * math.prod(self._shape))
        self._found: list[tuple[list[int], Tensor]] = []

    def _take(self, indices: list[int], scores: Tensor) -> None:
        self._found.append((indices, exact(scores).cpu()))
        for _ in range(self._rounds.due(len(indices))):
            self._gather()

    def finish(self) -> None:
        """Hand on what is left once the pass is over."""
        for _ in range(self._rounds.left()):
            self._gather()

    def _gather(self) -> None:
        found, self._found = self._found, []
        indices = torch.tensor([index for own, _ in found for index in own], dtype=torch.long)
        scores = torch.cat([torch.zeros(0, *self._shape, dtype=torch.float64), *(own for _, own in found)])
        merged, gathered = distributed.gather_by_index(indices, {"scores": scores})
        self._write(torch.searchsorted(self._examples, merged), gathered["scores"].permute(1, 2, 0))


class StrongestPairs(_Pairs):
    """Keeps the strongest proponents and opponents of every query; memory does not grow with the training data.

    Args:
        prepared: The queries.
        count: How many of each.
        curvature: For the norms to divide by; not needed without.
        normalise: See ``pairwise_scores``.
    """

    def __init__(
        self,
        prepared: PreparedQueries,
        count: int,
        curvature: Curvature | None = None,
        normalise: Normalisation = "none",
    ) -> None:
        super().__init__(prepared, curvature, normalise)
        self._count = count
        scores = wide_zeros((2 * len(prepared.self_influence), 0), prepared.self_influence.device)
        self._best = scores, scores.long()

    def _take(self, indices: list[int], scores: Tensor) -> None:
        signed = torch.cat([scores[:, 0].T, -scores[:, 0].T])  # opponents are found as proponents of the negative
        rows = torch.tensor(indices, device=scores.device).expand(len(signed), -1)
        self._best = _strongest(torch.cat([self._best[0], signed], 1), torch.cat([self._best[1], rows], 1), self._count)

    def result(self) -> tuple[Tensor, Tensor]:
        """Return scores of proponents and of opponents, and the examples' indices, ``[2, q, count]``, on the host.

        Those of opponents are negated; the same on every process, padded with scores of -inf.
        """
        scores, rows = _over_processes(self._best, self._count)
        return scores.unflatten(0, (2, -1)), rows.unflatten(0, (2, -1))


def _length(squared: Tensor) -> Tensor:
    """Return square roots that can be divided by; NaN for what an inexact solver has left negative."""
    return squared.clamp(min=torch.finfo(squared.dtype).tiny).sqrt().masked_fill(squared < 0, torch.nan)


def _strongest(scores: Tensor, rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the largest scores ``[q, count]`` and their examples; of equal ones those that come first."""
    scores, places = scores.masked_fill(scores.isnan(), -torch.inf).sort(dim=1, descending=True, stable=True)
    return scores[:, :count], rows.gather(1, places[:, :count])


def _over_processes(best: tuple[Tensor, Tensor], count: int) -> tuple[Tensor, Tensor]:
    """Merge what the processes have found: ``[q, count]`` on the host, padded with scores of -inf."""
    found = distributed.gather_objects((best[0].cpu(), best[1].cpu()))
    scores, rows = (torch.cat([part[place] for part in found], 1) for place in (0, 1))
    rows, order = rows.sort(dim=1)
    scores, rows = _strongest(scores.gather(1, order), rows, count)
    missing = 0, count - rows.shape[1]
    return F.pad(scores, missing, value=-torch.inf), F.pad(rows, missing, value=-1)
