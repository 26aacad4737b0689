"""Influence of training examples on queries, pair by pair.

``score(z → q) = ∇ℓ(q)ᵀ (C + λ)⁻¹ ∇ℓ(z)``: positive for proponents (training on ``z`` lowers the loss of ``q``),
negative for opponents. Every query's gradient is preconditioned once; the training data are then passed over, and of
each batch only its columns of scores are kept: all of them (in memory or in a file), or the strongest of every query.

A loss whose scale depends on the batch (class weights, ``ignore_index``) is scaled as that of the training
data.

Index legend: ``q`` queries, ``n`` training examples, ``m`` the whole and its parts by layer.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from lightning_influence.core import distributed, memory
from lightning_influence.core.errors import check_flag, short
from lightning_influence.core.indices import Indices, integers
from lightning_influence.curvature.curvature import Curvature
from lightning_influence.gradients.coverage import listed
from lightning_influence.gradients.passes import ExampleGradients
from lightning_influence.gradients.visitors import visit
from lightning_influence.scores import matrix_file
from lightning_influence.scores.examples import ExampleScorer
from lightning_influence.scores.products import SCORE_BYTES, Normalisation, PairColumns, StrongestPairs
from lightning_influence.scores.queries import (
    PreparedQueries,
    check_layers,
    check_pairs,
    prepared_queries,
    query_chunks,
)

_TITLE = "pairwise scores"
_SHOWN = 10  # queries in a repr


@dataclass(frozen=True, eq=False)
class PairwiseScores:
    """Scores of all pairs.

    Attributes:
        queries: Dataset indices of the queries ``[q]``, in the order they were given.
        examples: Dataset indices of the training examples ``[n]``, sorted, each once.
        scores: ``[q, n]``; NaN for queries and examples without a finite gradient. In memory float64; float32 where
            they are in a file, from which they are read when they are looked at.
        parts: By layer, ``[q, n]`` each: what the layer's parameters contribute to the scores, their sum. None unless
            asked for.
        notes: What a reader should know.
    """

    queries: Tensor
    examples: Tensor
    scores: Tensor
    parts: dict[str, Tensor] | None = None
    notes: list[str] = field(default_factory=list)

    def __repr__(self) -> str:
        layers = f", by {len(self.parts)} layers" if self.parts else ""
        return f"PairwiseScores({len(self.queries):,} queries x {len(self.examples):,} examples{layers})"

    def group(self, members: int | Indices) -> Tensor:
        """Return the influence of a group of training examples on every query, the sum over its members.

        Args:
            members: Dataset indices.

        Returns:
            ``[q]``, float64; NaN where the score of a member is. To first order, removing the group from the ``N``
            training examples raises the query's loss by ``1/N`` of it.

        Raises:
            ValueError: If a member is no index, was not scored, or is named twice.
        """
        wanted = torch.tensor(integers(members), dtype=torch.long)
        missing = wanted[~torch.isin(wanted, self.examples)].tolist()
        if missing or len(wanted.unique()) != len(wanted):
            raise ValueError(f"the group holds {missing or 'repeated'} indices; expected distinct, scored examples.")
        columns = torch.searchsorted(self.examples, wanted)
        # Query by query: the columns of a large group would be most of a matrix that may not fit into memory.
        sums = [row[columns].sum(dtype=torch.float64) for row in self.scores]
        return torch.stack(sums)


@dataclass(frozen=True, eq=False)
class TopScores:
    """The strongest proponents and opponents of every query.

    ``m`` is at most the ``count`` asked for and the number of examples that some query has a score for; a query with
    fewer of them (its own gradient is not finite) has -1 as their index and NaN as their score.

    Attributes:
        queries: Dataset indices of the queries ``[q]``.
        proponents: Dataset indices of the examples with the largest scores ``[q, m]``, largest first; of equal scores
            the smallest index first.
        proponent_scores: Their scores.
        opponents: Dataset indices of the examples with the smallest scores ``[q, m]``, smallest first.
        opponent_scores: Their scores.
        notes: What a reader of the scores should know.
    """

    queries: Tensor
    proponents: Tensor
    proponent_scores: Tensor
    opponents: Tensor
    opponent_scores: Tensor
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, queries: Sequence[int], found: Sequence[tuple[Tensor, Tensor]]) -> TopScores:
        """Return what ``StrongestPairs`` has found of several chunks of queries, in their order."""
        scores, rows = (torch.cat([part[place] for part in found], 1) for place in (0, 1))
        unknown = torch.isneginf(scores)
        # Without entries that no query has a score for.
        kept = (~unknown).any(1).sum(1).tolist()
        scores, rows = scores.masked_fill(unknown, torch.nan), rows.masked_fill(unknown, -1)
        (most, proponents), (least, opponents) = ((scores[k, :, :m], rows[k, :, :m]) for k, m in enumerate(kept))
        notes = _unscored(queries, unknown[0].all(1))
        return cls(torch.tensor(list(queries)), proponents, most, opponents, -least, notes)

    def __repr__(self) -> str:
        columns = (self.queries, self.proponents, self.proponent_scores, self.opponents, self.opponent_scores)
        rows = zip(*(column[:_SHOWN].tolist() for column in columns), strict=True)
        lines = [f"  {q}: proponents {_named(p, high)}; opponents {_named(o, low)}" for q, p, high, o, low in rows]
        more = ["  ..."] if len(self.queries) > _SHOWN else []
        return "\n".join([f"TopScores of {len(self.queries):,} queries", *lines, *more])


def _named(indices: Sequence[int], scores: Sequence[float]) -> str:
    known = [f"{i} ({score:+.3g})" for i, score in zip(indices, scores, strict=True) if i >= 0]
    return (", ".join(known[:3]) or "none") + (", ..." if len(known) > 3 else "")


def _unscored(queries: Sequence[int], unknown: Tensor) -> list[str]:
    """Return what to say of queries without a score."""
    found = torch.tensor(list(queries))[unknown.cpu()].tolist()
    return [f"queries whose loss or gradients are not finite have no scores: {listed(found)}"] if found else []


def pairwise_scores(
    gradients: ExampleGradients,
    indices: Sequence[int],
    curvature: Curvature,
    queries: ExampleGradients,
    query_indices: Sequence[int],
    *,
    normalise: Normalisation = "none",
    by_layer: bool = False,
    path: str | os.PathLike[str] | None = None,
) -> PairwiseScores:
    """Score every query with every training example.

    Args:
        gradients: Passes over the training data.
        indices: The training examples; one that is named twice counts once.
        curvature: The curvature, fitted on the training data.
        queries: Passes over the queries' data, with the model and coverage of the training data; the loss is scaled as
            theirs.
        query_indices: The queries.
        normalise: ``"relative"`` divides by ``√(g_zᵀ (C + λ)⁻¹ g_z)``, so that examples with large gradients do not
            lead every list (the ℓ-RelatIF of Barshan et al. 2020, 2003.11630). ``"cosine"`` divides by that of the
            query, too: the cosine of the gradients in the metric ``(C + λ)⁻¹``; with the identity it is the plain one
            (grad-cos). Where GGN and Hessian are not dense, the norm of training examples is EK-FAC's, and that of
            queries their own; such cosines may exceed 1. An example without a gradient (or one so small that float32
            loses its square) has 0. ``"leverage"`` divides by what the others carry of the example's fit, ``1 - h_z``:
            the effect of a removal, curvature included, see ``leverage``; ``indices`` are all training examples then.
        by_layer: Whether to give each layer's part of the scores, too.
        path: Where to write the scores instead of holding them in memory: an ``.npy`` file in float32, which
            ``numpy.load(path, mmap_mode="r")`` reads. It appears when it is complete; none that is there is replaced.
            With several processes, on a file system that all of them share.

    Returns:
        All scores, on the host; the same on every process.

    Raises:
        ValueError: Before anything is computed, if there is no query or no example, the scores do not fit into memory
            (or on the disk), training data, queries and curvature are not about the same parameters, or ``by_layer`` is
            combined with ``normalise`` or ``path``.
        QueryError: Before any training example is scored, if the training task can't be run on the queries.
        SolverError: If an iterative solver did not reach its tolerance.
    """
    _check(gradients, indices, curvature, queries, query_indices, normalise)
    check_flag("by_layer", by_layer)
    if by_layer and normalise != "none":
        raise ValueError(f"by_layer=True with normalise={normalise!r}: a normalised score is no sum over layers.")
    if by_layer and path is not None:
        raise ValueError("by_layer=True keeps the parts in memory; leave out `path`, and take fewer queries at a time.")
    layers, shape = list(gradients.coverage.blocks) if by_layer else [], (len(query_indices), len(distinct(indices)))
    with nullcontext() if path is None else matrix_file.written(path, shape) as write:
        total = PairSum(gradients, indices, queries, query_indices, layers=layers, write=write)
        for rows, prepared in total.prepared(curvature):
            total.add(rows, prepared, curvature=curvature, normalise=normalise)
    return total.result() if path is None else total.result(matrix_file.mapped(Path(path)))


def top_scores(
    gradients: ExampleGradients,
    indices: Sequence[int],
    curvature: Curvature,
    queries: ExampleGradients,
    query_indices: Sequence[int],
    count: int = 10,
    *,
    normalise: Normalisation = "none",
) -> TopScores:
    """Find the ``count`` strongest proponents and opponents of every query; memory does not grow with the data.

    Raises:
        ValueError, QueryError, SolverError: As ``pairwise_scores``, and if ``count`` is less than 1.
    """
    _check(gradients, indices, curvature, queries, query_indices, normalise)
    if count < 1:
        raise ValueError(f"count is {count}; expected at least one proponent and opponent to find.")
    examples = distinct(indices).tolist()
    chunks = query_chunks(gradients, query_indices, curvature)
    found = []
    for prepared in prepared_queries(curvature, queries.like(gradients), chunks, len(examples)):
        own = None if normalise == "none" else ExampleScorer(gradients, examples, curvature)
        strongest = StrongestPairs(prepared, count, own, [normalise])
        visit(gradients, examples, [*filter(None, (own, strongest))], title=_TITLE)
        scores, rows, _ = strongest.result()
        found.append((scores[0], rows[0]))
    return TopScores.of(query_indices, found)


def _check(
    gradients: ExampleGradients,
    indices: Sequence[int],
    curvature: Curvature,
    queries: ExampleGradients,
    query_indices: Sequence[int],
    normalise: Normalisation,
) -> None:
    """Raise ``ValueError`` for arguments that do not go together."""
    check_pairs(gradients, indices, queries, query_indices)
    if normalise not in get_args(Normalisation):
        raise ValueError(
            f"normalise={short(normalise)}; expected one of {', '.join(map(repr, get_args(Normalisation)))}."
        )
    check_layers(gradients, "the curvature", curvature.dampings.keys())


class PairSum:
    """A matrix of scores that passes over the training data add to.

    Args:
        gradients: Passes over the training data.
        indices: The training examples; one that is named twice counts once.
        queries: Passes over the queries' data, with the model and coverage of the training data; the loss is scaled as
            theirs.
        query_indices: The queries.
        layers: Whose parts of the scores to keep, too.
        write: Takes the scores instead, see ``matrix_file``; nothing can be added to them there.

    Raises:
        ValueError: If there is no query or no example, training data and queries are not about the same parameters, or
            the scores do not fit into memory.
    """

    def __init__(
        self,
        gradients: ExampleGradients,
        indices: Sequence[int],
        queries: ExampleGradients,
        query_indices: Sequence[int],
        *,
        layers: Sequence[str] = (),
        write: matrix_file.Write | None = None,
    ) -> None:
        check_pairs(gradients, indices, queries, query_indices)
        self.gradients = gradients
        self._queries, self._layers, self._write = queries.like(gradients), layers, write
        self._examples, self._asked = distinct(indices), torch.tensor(list(query_indices), dtype=torch.long)
        size = 0 if write is not None else len(self._examples)
        self._scores = _zeros(1 + len(layers), len(self._asked), size)
        self._met = torch.zeros(size, dtype=torch.bool)

    def prepared(self, curvature: Curvature | None = None) -> Iterator[tuple[slice, PreparedQueries]]:
        """Yield rows and gradients of as many queries as are taken at a time, at the weights that the model has now.

        Args:
            curvature: What they are preconditioned with, if they are.

        Raises:
            QueryError: Before the first, if the training task can't be run on the queries.
        """
        start = 0
        chunks = query_chunks(self.gradients, self._asked.tolist(), curvature)
        for queries in prepared_queries(curvature, self._queries, chunks, len(self._examples)):
            rows = slice(start, start + len(queries.self_influence))
            yield rows, queries
            start = rows.stop

    def add(
        self,
        rows: slice,
        queries: PreparedQueries,
        weight: float = 1.0,
        *,
        curvature: Curvature | None = None,
        normalise: Normalisation = "none",
    ) -> None:
        """Add ``weight · ⟨v_q, g_z⟩`` at the weights that the model has now, in one pass over the training data.

        Args:
            rows: The queries.
            queries: Their vectors.
            weight: Of the term.
            curvature: For the norms to divide by.
            normalise: See ``pairwise_scores``.
        """

        def write(places: Tensor, scores: Tensor) -> None:
            if self._write is not None:
                self._write(rows, places, scores[0])
                return
            self._scores[:, rows, places] += weight * scores
            self._met[places] = True

        examples = self._examples.tolist()
        own = None if normalise == "none" else ExampleScorer(self.gradients, examples, curvature)
        columns = PairColumns(self._examples, queries, write, own, normalise, self._layers)
        visit(self.gradients, examples, [*filter(None, (own, columns))], title=_TITLE)
        columns.finish()

    def result(self, filed: Tensor | None = None, *, notes: Sequence[str] = ()) -> PairwiseScores:
        """Return the sums, or what was written; NaN for examples that no pass has met."""
        self._scores.masked_fill_(~self._met, torch.nan)
        parts = dict(zip(self._layers, self._scores[1:], strict=True)) if self._layers else None
        scores = self._scores[0] if filed is None else filed
        unscored = _unscored(self._asked.tolist(), scores.isnan().all(1)) if filed is None else ()
        return PairwiseScores(self._asked, self._examples, scores, parts, list(dict.fromkeys([*notes, *unscored])))


def mean_scores(members: Iterable[PairwiseScores]) -> PairwiseScores:
    """Return the mean of scores of the same pairs: an ensemble over models of several seeds, or of several methods.

    Influence has a unit, the change of the query's loss, so that members are averaged as they are. Three seeds raised
    the LDS of the GGN from .706 to .756 on digits (``docs/results/lds.md``).

    Args:
        members: Scores of the same queries and examples, in the same order; one at least.

    Returns:
        The mean; NaN for a pair that some member has no score for. Parts by layer are averaged if all members have the
        same ones.

    Raises:
        TypeError, ValueError: If there is no member, one is something else, or they are not about the same pairs.
    """
    every: list[Any] = list(members) if hasattr(members, "__iter__") else [members]
    if odd := [type(member).__name__ for member in every if not isinstance(member, PairwiseScores)]:
        raise TypeError(f"a member is a {odd[0]}; expected `PairwiseScores` of `influence.pairs`.")
    if not every:
        raise ValueError("there are no scores to average; pass at least one member.")
    first = every[0]
    for number, other in enumerate(every):
        if not (torch.equal(first.queries, other.queries) and torch.equal(first.examples, other.examples)):
            raise ValueError(
                f"member {number} has scores of other pairs than member 0; expected the same queries and training "
                "examples in all members."
            )
    total = torch.zeros(first.scores.shape, dtype=torch.float64)
    for member in every:
        total += member.scores
    parts = None
    if first.parts and all(member.parts and member.parts.keys() == first.parts.keys() for member in every):
        parts = {name: torch.stack([m.parts[name] for m in every if m.parts]).mean(0) for name in first.parts}
    notes = list(dict.fromkeys(note for member in every for note in member.notes))
    return PairwiseScores(first.queries, first.examples, total / len(every), parts, notes)


def distinct(indices: Sequence[int]) -> Tensor:
    """Return the indices sorted, each once: scores then fill the matrix from left to right."""
    return torch.tensor(sorted(set(integers(indices))), dtype=torch.long)


def _zeros(matrices: int, queries: int, examples: int) -> Tensor:
    """Return ``[m, q, n]`` on the host, after a look at whether it fits."""
    host = torch.device("cpu")
    needed = SCORE_BYTES * matrices * queries * examples
    if distributed.any_process(not memory.fits(needed, host)):
        parts = f" with their parts by {matrices - 1} layers" if matrices > 1 else ""
        way_out = "leave out by_layer=True" if parts else "pass `path=` to `pairwise_scores` to keep them in a file"
        raise ValueError(
            f"{queries:,} x {examples:,} scores{parts} take {memory.readable(needed)} of memory, and "
            f"{memory.readable(memory.available_bytes(host) or 0)} are available; {way_out}, take fewer queries at a "
            "time, or use `top_scores`, which keeps the strongest only."
        )
    # Written to, so that it counts as taken from here on.
    return torch.full((matrices, queries, examples), 0.0, dtype=torch.float64)
