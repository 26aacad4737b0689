"""The strongest rows of an index for each query: the few that a search finds, or all, are multiplied with it.

Index legend: ``q`` queries, ``n`` examples of a part, ``c`` candidates.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lightning_influence.index.coding import CodedQueries, Coder
from lightning_influence.index.files import Shard, as_tensor
from lightning_influence.scores.products import inverse_length

# Numbers of a part of an index that are in memory at a time, and scores of it with queries.
_PART, _SCORES = 2**24, 2**24
# Up to so many multiplications all examples are multiplied: a few seconds.
_ALL = 2**35
# The search proposes so many for each that is asked for, on either side.
_PROPOSED, _FEWEST = 4, 32


@dataclass(frozen=True, eq=False)
class Found:
    """The strongest of every query.

    Attributes:
        scores: By side (proponents, opponents) ``[2, q, k]``, the strongest first; those of opponents are negated.
        rows: Places in the index ``[2, q, k]``; -1 where there are no more, with a score of -inf.
    """

    scores: Tensor
    rows: Tensor


class Search:
    """Looks for strong rows.

    Args:
        coder: Multiplies rows with queries.
        shards: The index.
        projection: Columns ``[m, r]`` of the space in which candidates are looked for.
    """

    def __init__(self, coder: Coder, shards: Sequence[Shard], projection: Tensor) -> None:
        self._coder, self._shards, self._projection = coder, shards, projection
        own = np.concatenate([shard.examples["self_influence"] for shard in shards])
        self._self_influence = torch.from_numpy(own)
        self._lengths = torch.from_numpy(np.concatenate([shard.examples["length"] for shard in shards]))
        self._starts = np.cumsum([0, *map(len, shards)])

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self._self_influence)

    def strongest(self, queries: CodedQueries, count: int, *, relative: bool, everything: bool | None = None) -> Found:
        """Return the strongest rows of every query.

        Args:
            queries: The queries.
            count: How many on either side.
            relative: Whether by scores over the root of self-influence.
            everything: Whether to multiply all rows, not the candidates of a search alone; by default where that takes
                no longer than a few seconds.
        """
        count = min(count, len(self))
        if everything is None:
            everything = len(queries) * len(self) * self._multiplications(queries) <= _ALL
        weights = self._weights(relative)
        if everything:
            best = Best(len(queries), count)
            for start, scores in self.all_scores(queries):
                best.add(start, scores.mul_(weights[start : start + scores.shape[1]]))
            return best.result(queries.finite)
        places = self.candidates(queries, count, relative=relative)
        return self._of_candidates(queries, places, count, weights).result(queries.finite)

    def all_scores(self, queries: CodedQueries) -> Iterator[tuple[int, Tensor]]:
        """Yield the scores of all rows, part by part: place of the first, and ``[q, n]``."""
        width = max(1, *(shard.rows.shape[1] for shard in self._shards))
        step = max(1, min(_PART // width, _SCORES // max(1, len(queries))))
        for first, shard in zip(self._starts, self._shards, strict=False):
            for start in range(0, len(shard), step):
                part = slice(start, start + step)
                rows, lengths = as_tensor(shard.rows[part]), as_tensor(shard.lengths[part])
                yield int(first) + start, self._coder.scores(rows, lengths, queries)

    def candidates(self, queries: CodedQueries, count: int, *, relative: bool) -> Tensor:
        """Return places of rows that may be among the strongest, ``[q, c]``, proponents, then opponents."""
        vectors = queries.searched @ self._projection
        # Of an example without a finite gradient there is nothing but zeros.
        weights = self._lengths * self._weights(relative).nan_to_num()
        best = Best(len(queries), min(max(_FEWEST, _PROPOSED * count), len(self)))
        step = max(1, _SCORES // max(1, len(queries)))
        for first, shard in zip(self._starts, self._shards, strict=False):
            for start in range(0, len(shard), step):
                rows = as_tensor(shard.search[start : start + step])
                place = int(first) + start
                best.add(place, (vectors @ rows.T).mul_(weights[place : place + len(rows)]))
        return torch.cat(list(best.result().rows), 1)

    def _of_candidates(self, queries: CodedQueries, places: Tensor, count: int, weights: Tensor) -> Best:
        best = Best(len(queries), count)
        for number, own in enumerate(places):
            own = own[own >= 0].unique()
            rows, lengths = self._rows(own)
            scores = self._coder.scores(rows, lengths, queries.some(slice(number, number + 1)))
            best.put(number, own, scores[0] * weights[own])
        return best

    def _rows(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """Return some rows, by sorted places."""
        found = places.numpy()
        parts = []
        for first, last, shard in zip(self._starts, self._starts[1:], self._shards, strict=False):
            own = found[(found >= first) & (found < last)] - first
            if len(own):
                parts.append((as_tensor(shard.rows[own]), as_tensor(shard.lengths[own])))
        rows, lengths = zip(*parts, strict=True)
        return torch.cat(rows), torch.cat(lengths)

    def _weights(self, relative: bool) -> Tensor:
        """Return what to multiply scores with: NaN for examples whose gradient is not finite."""
        own = self._self_influence
        return inverse_length(own).float() if relative else torch.where(own.isnan(), own, 1.0).float()

    def _multiplications(self, queries: CodedQueries) -> int:
        return int(queries.kept.shape[1] + sum(v[0].numel() for v in queries.whole.values()))


class Best:
    """Keeps the strongest on either side of every query.

    Args:
        queries: How many.
        count: How many of each to keep.
    """

    def __init__(self, queries: int, count: int) -> None:
        self._count = count
        self._scores = torch.full((2, queries, count), -torch.inf)
        self._rows = torch.full((2, queries, count), -1)

    def add(self, start: int, scores: Tensor) -> None:
        """Look at the scores ``[q, n]`` of rows from a place on."""
        count = min(self._count, scores.shape[1])
        unknown = bool(scores[:1].isnan().any())
        for side, largest in enumerate((True, False)):
            own = scores.masked_fill(scores.isnan(), -torch.inf if largest else torch.inf) if unknown else scores
            values, places = own.topk(count, 1, largest=largest)
            self._merge(side, slice(None), values if largest else -values, places + start)

    def put(self, query: int, places: Tensor, scores: Tensor) -> None:
        """Look at the scores ``[c]`` of one query with some rows."""
        known = ~scores.isnan()
        for side, sign in enumerate((1, -1)):
            own, rows = (sign * scores)[known][None], places[known][None]
            self._merge(side, slice(query, query + 1), own, rows)

    def _merge(self, side: int, queries: slice, values: Tensor, rows: Tensor) -> None:
        both = torch.cat([self._scores[side, queries], values], 1)
        every = torch.cat([self._rows[side, queries], rows], 1)
        kept, order = both.sort(dim=1, descending=True, stable=True)
        self._scores[side, queries] = kept[:, : self._count]
        self._rows[side, queries] = every.gather(1, order[:, : self._count])

    def result(self, finite: Tensor | None = None) -> Found:
        """Return them, none for queries without a finite gradient."""
        scores = self._scores if finite is None else self._scores.masked_fill(~finite[None, :, None], -torch.inf)
        return Found(scores, self._rows.masked_fill(scores.isneginf(), -1))
