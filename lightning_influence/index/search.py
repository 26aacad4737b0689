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
from lightning_influence.index.files import Shard
from lightning_influence.scores.products import inverse_length

# Numbers of a part of an index that are in memory at a time, and scores of it with queries.
_PART, _SCORES = 2**24, 2**24
# Numbers of candidates that are multiplied at a time.
_GATHERED = 2**22
# Up to so many multiplications, and numbers read, all examples are multiplied: about a second.
_ALL, _READ = 2**34, 2**28
# The search proposes so many for each that is asked for, on either side.
_PROPOSED, _FEWEST = 6, 64


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
                about a second.
        """
        count = min(count, len(self))
        if everything is None:
            numbers = len(self) * self._shards[0].rows.shape[1]
            everything = numbers <= _READ and len(queries) * len(self) * self._multiplications(queries) <= _ALL
        weights = self._weights(relative)
        if everything:
            best = Best(len(queries), count)
            for start, scores in self.all_scores(queries):
                places = torch.arange(start, start + scores.shape[1])
                best.add(places, scores.mul_(weights[places]))
            return best.result(queries.finite)
        return self._of_candidates(queries, self.candidates(queries, count, relative=relative), count, weights)

    def all_scores(self, queries: CodedQueries) -> Iterator[tuple[int, Tensor]]:
        """Yield the scores of all rows, part by part: place of the first, and ``[q, n]``."""
        width = max(1, *(shard.rows.shape[1] for shard in self._shards))
        step = max(1, min(_PART // width, _SCORES // max(1, len(queries))))
        for first, shard in zip(self._starts, self._shards, strict=False):
            for start in range(0, len(shard), step):
                part = slice(start, start + step)
                yield int(first) + start, self._coder.scores(shard.rows[part].float(), shard.lengths[part], queries)

    def candidates(self, queries: CodedQueries, count: int, *, relative: bool) -> Tensor:
        """Return places of rows that may be among the strongest, ``[q, c]``, proponents, then opponents."""
        vectors = queries.searched @ self._projection
        # Of an example without a finite gradient there is nothing but zeros.
        weights = self._lengths * self._weights(relative).nan_to_num()
        best = Best(len(queries), min(max(_FEWEST, _PROPOSED * count), len(self)))
        step = max(1, min(_PART // vectors.shape[1], _SCORES // max(1, len(queries))))
        for first, shard in zip(self._starts, self._shards, strict=False):
            for start in range(0, len(shard), step):
                rows = shard.search[start : start + step].float()
                places = torch.arange(int(first) + start, int(first) + start + len(rows))
                best.add(places, (vectors @ rows.T).mul_(weights[places]), known=True)
        return torch.cat(list(best.result().rows), 1)

    def _of_candidates(self, queries: CodedQueries, places: Tensor, count: int, weights: Tensor) -> Found:
        places = places.sort(1).values
        asked = places.clamp(min=0)
        step, parts = max(1, _GATHERED // (places.shape[1] * self._shards[0].rows.shape[1])), []
        for start in range(0, len(queries), step):
            some = slice(start, start + step)
            parts.append(self._coder.scores_of_each(*self._rows(asked[some]), queries.some(some)))
        scores = torch.cat(parts) * weights[asked]
        again = torch.zeros_like(places, dtype=torch.bool)  # on both sides, where there are few
        again[:, 1:] = places[:, 1:] == places[:, :-1]
        scores.masked_fill_(again | (places < 0), torch.nan)
        best = Best(len(queries), count)
        best.add(places, scores)
        return best.result(queries.finite)

    def _rows(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """Return some rows, ``[q, c, width]``, and their lengths."""
        flat = places.flatten()
        rows = torch.empty(len(flat), self._shards[0].rows.shape[1])
        lengths = torch.empty(len(flat), self._shards[0].lengths.shape[1])
        for first, last, shard in zip(self._starts, self._starts[1:], self._shards, strict=False):
            own = ((flat >= first) & (flat < last)).nonzero().squeeze(1)
            at = flat[own] - int(first)
            if len(own) == len(flat):
                rows, lengths = shard.rows.index_select(0, at).float(), shard.lengths.index_select(0, at)
            else:
                rows[own], lengths[own] = shard.rows.index_select(0, at).float(), shard.lengths.index_select(0, at)
        return rows.unflatten(0, places.shape), lengths.unflatten(0, places.shape)

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

    def add(self, places: Tensor, scores: Tensor, *, known: bool = False) -> None:
        """Look at scores ``[q, n]`` of rows that are at places ``[q, n]``, or ``[n]`` for all queries.

        A score of NaN is none; there is no such if all are ``known``.
        """
        count = min(self._count, scores.shape[1])
        for side, largest in enumerate((True, False)):
            none = -torch.inf if largest else torch.inf
            own = scores if known else scores.nan_to_num(none, torch.inf, -torch.inf)
            values, found = own.topk(count, 1, largest=largest)
            rows = places[found] if places.ndim == 1 else places.gather(1, found)
            self._merge(side, values if largest else -values, rows)

    def _merge(self, side: int, values: Tensor, rows: Tensor) -> None:
        both = torch.cat([self._scores[side], values], 1)
        every = torch.cat([self._rows[side], rows], 1)
        kept, order = both.sort(dim=1, descending=True, stable=True)
        self._scores[side] = kept[:, : self._count]
        self._rows[side] = every.gather(1, order[:, : self._count])

    def result(self, finite: Tensor | None = None) -> Found:
        """Return them, none for queries without a finite gradient."""
        scores = self._scores if finite is None else self._scores.masked_fill(~finite[None, :, None], -torch.inf)
        return Found(scores, self._rows.masked_fill(scores.isneginf(), -1))
