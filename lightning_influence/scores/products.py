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
from lightning_influence.gradients.capture import LayerIO
from lightning_influence.gradients.passes import BatchGradients
from lightning_influence.gradients.visitors import Visitor
from lightning_influence.scores.examples import ExampleScorer
from lightning_influence.scores.leverage import curvature_along_gradients, inverse_rest
from lightning_influence.scores.queries import PreparedQueries

Normalisation = Literal["none", "relative", "cosine", "leverage"]
"""What scores of pairs are divided by: nothing, the norm of the training example, or that of the query, too; or what
the other examples carry of its fit."""

SCORE_BYTES = 8


class _Pairs(Visitor, ABC):
    """Computes the scores of every batch with prepared queries, and hands them on to ``_take``.

    Args:
        prepared: The queries.
        own: Scores the examples with the curvature in the same pass, and comes before: the lengths to divide by. Not
            needed where nothing is divided.
        asked: What to divide by.
        layers: Whose parts of the scores to give, after the whole.
    """

    def __init__(
        self,
        prepared: PreparedQueries,
        own: ExampleScorer | None = None,
        asked: Sequence[Normalisation] = (),
        layers: Sequence[str] = (),
    ) -> None:
        self._prepared, self._own, self._asked = prepared, own, asked
        self._along: Tensor | None = None
        self._places = {layer: 1 + place for place, layer in enumerate(layers)}
        self._scores = wide_zeros(0, prepared.self_influence.device)
        self._indices: list[int] = []

    @property
    def prepared(self) -> PreparedQueries:
        """The queries."""
        return self._prepared

    def begin(self, batch: BatchGradients) -> None:
        of_queries = self._prepared.self_influence
        self._scores = of_queries.new_zeros((batch.loss.n, 1 + len(self._places), len(of_queries)))

    def add(self, io: LayerIO) -> None:
        part = self._prepared.products(io)
        self._scores[:, 0] += part
        if self._places:
            self._scores[:, self._places[io.name]] = part

    def end(self, batch: BatchGradients) -> None:
        scores = self._scores
        scores[~batch.finite] = torch.nan
        scores[..., self._prepared.self_influence.isnan()] = torch.nan
        if "leverage" in self._asked:
            self._along = curvature_along_gradients(batch.loss)
        self._indices, self._scores = batch.indices, scores

    def file(self) -> None:
        self._take(self._indices, self._scores)

    def _normalised(self, scores: Tensor, normalise: Normalisation) -> Tensor:
        """Return scores ``[n, m, q]`` of the batch, normalised."""
        if normalise == "none":
            return scores
        assert self._own is not None
        of_examples, of_queries = self._own.self_influence.to(scores), self._prepared.self_influence
        if self._along is not None and normalise == "leverage":
            return scores * inverse_rest(of_examples, self._along.to(scores), self._own.examples)[:, None, None]
        scores = scores * inverse_length(of_examples)[:, None, None]
        return scores * inverse_length(of_queries) if normalise == "cosine" else scores

    @abstractmethod
    def _take(self, indices: list[int], scores: Tensor) -> None:
        """Take the scores of a batch, ``[n, m, q]``."""


class PairColumns(_Pairs):
    """Hands on columns of the matrix of scores, on every process the same.

    Args:
        examples: Dataset indices ``[n]`` of the pass, sorted.
        prepared: The queries.
        write: Takes places of columns ``[n]`` and their scores ``[m, q, n]``.
        own: Knows the lengths to divide by, see ``_Pairs``; not needed without.
        normalise: See ``pairwise_scores``.
        layers: Whose parts of the scores to give, after the whole.
    """

    def __init__(
        self,
        examples: Tensor,
        prepared: PreparedQueries,
        write: Callable[[Tensor, Tensor], None],
        own: ExampleScorer | None = None,
        normalise: Normalisation = "none",
        layers: Sequence[str] = (),
    ) -> None:
        super().__init__(prepared, own, [normalise], layers)
        self._examples, self._write, self._normalise = examples, write, normalise
        self._shape = 1 + len(layers), len(prepared.self_influence)
        self._rounds = distributed.Rounds(len(examples), SCORE_BYTES * math.prod(self._shape))
        self._found: list[tuple[list[int], Tensor]] = []

    def _take(self, indices: list[int], scores: Tensor) -> None:
        self._found.append((indices, exact(self._normalised(scores, self._normalise)).cpu()))
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
        own: Knows the lengths to divide by, see ``_Pairs``; not needed without.
        lists: What they are the strongest by, one list each, see ``pairwise_scores``.
    """

    def __init__(
        self,
        prepared: PreparedQueries,
        count: int,
        own: ExampleScorer | None = None,
        lists: Sequence[Normalisation] = ("none",),
    ) -> None:
        super().__init__(prepared, own, lists)
        self._count, self._lists = count, lists
        self._shape = len(lists), 2, len(prepared.self_influence)
        scores = wide_zeros((math.prod(self._shape), 0), prepared.self_influence.device)
        self._best = scores, scores.long(), scores

    def _take(self, indices: list[int], scores: Tensor) -> None:
        plain = scores[:, 0].T
        ranked = [self._normalised(scores, normalise)[:, 0].T for normalise in self._lists]
        # Opponents are found as proponents of the negative.
        found = torch.cat([side for values in ranked for side in (values, -values)])
        rows = torch.tensor(indices, device=scores.device).expand(len(found), -1)
        new = found, rows, torch.cat([plain, -plain] * len(ranked))
        best = [torch.cat(parts, 1) for parts in zip(self._best, new, strict=True)]
        self._best = _strongest(best, self._count)

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return scores of proponents and of opponents, examples, and the scores as they are, ``[l, 2, q, count]``.

        By list, on the host. Both scores of opponents are negated; the same on every process, padded with scores of
        -inf.
        """
        found, rows, plain = (part.unflatten(0, self._shape) for part in _over_processes(self._best, self._count))
        return found, rows, plain


def inverse_length(squared: Tensor) -> Tensor:
    """Return what to multiply with to divide by the roots of squared lengths.

    Zero for what is too short to be divided by: its square is lost in float32, whatever it was summed up in, while its
    products are not. NaN for what an inexact solver has left negative.
    """
    short = squared.abs() < torch.finfo(torch.float32).tiny
    return squared.rsqrt().masked_fill(short, 0.0)


def _strongest(best: Sequence[Tensor], count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the largest scores ``[q, count]`` and what belongs to them; of equal ones those that come first."""
    scores, places = best[0].masked_fill(best[0].isnan(), -torch.inf).sort(dim=1, descending=True, stable=True)
    places = places[:, :count]
    rows, plain = (part.gather(1, places) for part in best[1:])
    return scores[:, :count], rows, plain


def _over_processes(best: Sequence[Tensor], count: int) -> list[Tensor]:
    """Merge what the processes have found: ``[q, count]`` on the host, padded with scores of -inf."""
    found = distributed.gather_objects([part.cpu() for part in best])
    merged = [torch.cat(parts, 1) for parts in zip(*found, strict=True)]
    order = merged[1].argsort(dim=1)
    merged = list(_strongest([part.gather(1, order) for part in merged], count))
    missing = 0, count - merged[1].shape[1]
    fills = -torch.inf, -1, torch.nan
    return [F.pad(part, missing, value=fill) for part, fill in zip(merged, fills, strict=True)]
