"""Influence of training examples on queries, pair by pair.

``score(z → q) = ∇ℓ(q)ᵀ (C + λ)⁻¹ ∇ℓ(z)``: positive for proponents (training on ``z`` lowers the loss of ``q``),
negative for opponents. Every query's gradient is preconditioned once; the training data are then passed over, and of
each batch only its columns of scores are kept: all of them (in memory or in a file), or the strongest of every query.

A loss whose scale depends on the batch (class weights, ``ignore_index``) is scaled as that of the training
data.

Index legend: ``q`` queries, ``n`` training examples, ``k`` groups, ``o`` outputs, ``i`` inputs.
"""

from __future__ import annotations

import math
import os
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_influence.core import distributed, memory
from lightning_influence.core.precision import exact, wide_zeros
from lightning_influence.curvature.curvature import Curvature
from lightning_influence.gradients.passes import BatchGradients, ExampleGradients
from lightning_influence.scores import matrix_file as score_matrix
from lightning_influence.scores.queries import (
    PreparedQueries,
    check_layers,
    check_pairs,
    prepared_queries,
    query_chunks,
)

Normalisation = Literal["none", "relative", "cosine"]

# Preconditioned gradients of queries are held as full parameter vectors: so many bytes of them at a time.
_QUERY_BYTES = 2**30
_SCORE_BYTES = 8
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

    def group(self, members: Sequence[int]) -> Tensor:
        """Return the influence of a group of training examples on every query, the sum over its members.

        Args:
            members: Dataset indices.

        Returns:
            ``[q]``, float64; NaN where the score of a member is. To first order, removing the group from the ``N``
            training examples raises the query's loss by ``1/N`` of it.

        Raises:
            ValueError: If a member was not scored, or is named twice.
        """
        wanted = torch.tensor(list(members), dtype=torch.long)
        missing = wanted[~torch.isin(wanted, self.examples)].tolist()
        if missing or len(set(members)) != len(members):
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
        notes: What a reader should know.
    """

    queries: Tensor
    proponents: Tensor
    proponent_scores: Tensor
    opponents: Tensor
    opponent_scores: Tensor
    notes: list[str] = field(default_factory=list)

    def __repr__(self) -> str:
        columns = (self.queries, self.proponents, self.proponent_scores, self.opponents, self.opponent_scores)
        rows = zip(*(column[:_SHOWN].tolist() for column in columns), strict=True)
        lines = [f"  {q}: proponents {_named(p, high)}; opponents {_named(o, low)}" for q, p, high, o, low in rows]
        more = ["  ..."] if len(self.queries) > _SHOWN else []
        return "\n".join([f"TopScores of {len(self.queries):,} queries", *lines, *more])


def _named(indices: Sequence[int], scores: Sequence[float]) -> str:
    return ", ".join(f"{i} ({score:+.3g})" for i, score in zip(indices[:3], scores[:3], strict=True)) + ", ..."


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
    query_bytes: int = _QUERY_BYTES,
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
            queries their own; such cosines may exceed 1.
        by_layer: Whether to give each layer's part of the scores, too.
        path: Where to write the scores instead of holding them in memory: an ``.npy`` file in float32, which
            ``numpy.load(path, mmap_mode="r")`` reads. It appears, or replaces the one there, when it is complete. With
            several processes, on a file system that all of them share.
        query_bytes: Memory for preconditioned query gradients. More queries take more passes over the training data.

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
    if by_layer and normalise != "none":
        raise ValueError(
            f"by_layer=True with normalise={normalise!r}: a normalised score is no sum over layers; use "
            'normalise="none".'
        )
    if by_layer and path is not None:
        raise ValueError("by_layer=True keeps the parts in memory; leave out `path`, and take fewer queries at a time.")
    examples = distinct(indices)
    asked = torch.tensor(list(query_indices), dtype=torch.long)
    layers = list(gradients.coverage.blocks) if by_layer else []
    if path is not None:
        with score_matrix.written(Path(path), (len(asked), len(examples))) as write:
            chunks, notes = query_chunks(gradients, query_indices, query_bytes)
            with closing(_pieces(gradients, examples, curvature, queries, chunks, normalise, layers)) as pieces:
                for rows, places, scores in pieces:
                    write(rows, places, scores[0])
        return PairwiseScores(asked, examples, score_matrix.mapped(Path(path)), None, notes)
    held = _allocated(1 + len(layers), len(asked), len(examples))
    chunks, notes = query_chunks(gradients, query_indices, query_bytes)
    with closing(_pieces(gradients, examples, curvature, queries, chunks, normalise, layers)) as pieces:
        for rows, places, scores in pieces:
            held[:, rows, places] = scores
    parts = dict(zip(layers, held[1:], strict=True)) if by_layer else None
    return PairwiseScores(asked, examples, held[0], parts, notes)


def top_scores(
    gradients: ExampleGradients,
    indices: Sequence[int],
    curvature: Curvature,
    queries: ExampleGradients,
    query_indices: Sequence[int],
    count: int = 10,
    *,
    normalise: Normalisation = "none",
    query_bytes: int = _QUERY_BYTES,
) -> TopScores:
    """Find the ``count`` strongest proponents and opponents of every query; memory does not grow with the data.

    Raises:
        ValueError, QueryError, SolverError: As ``pairwise_scores``, and if ``count`` is less than 1.
    """
    _check(gradients, indices, curvature, queries, query_indices, normalise)
    if count < 1:
        raise ValueError(f"count is {count}; expected at least one proponent and opponent to find.")
    examples = distinct(indices).tolist()
    found: dict[float, list[tuple[Tensor, Tensor]]] = {1.0: [], -1.0: []}
    chunks, notes = query_chunks(gradients, query_indices, query_bytes)
    for prepared in prepared_queries(curvature, queries.like(gradients), chunks, len(examples)):
        size = len(prepared.self_influence)
        best = {sign: _nothing(size, gradients.device) for sign in found}
        with closing(_columns(gradients, examples, curvature, prepared, normalise, [])) as batches:
            for batch_indices, scores in batches:
                rows = torch.tensor(batch_indices, device=scores.device).expand(size, -1)
                for sign in best:
                    best[sign] = _merged(best[sign], sign * scores[:, 0].T, rows, count)
        for sign, parts in found.items():
            parts.append(_over_processes(best[sign], count))
    proponents, most = _trimmed(found[1.0])
    opponents, least = _trimmed(found[-1.0])
    return TopScores(torch.tensor(list(query_indices)), proponents, most, opponents, -least, notes)


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
        raise ValueError(f"normalise={normalise!r}; expected one of {', '.join(map(repr, get_args(Normalisation)))}.")
    check_layers(gradients, "the curvature", curvature.dampings.keys())


def distinct(indices: Sequence[int]) -> Tensor:
    """Return the indices sorted, each once: scores then fill the matrix from left to right."""
    return torch.tensor(sorted({int(index) for index in indices}), dtype=torch.long)


def _allocated(matrices: int, queries: int, examples: int) -> Tensor:
    """Return ``[m, q, n]`` on the host, after a look at whether it fits."""
    host = torch.device("cpu")
    needed = _SCORE_BYTES * matrices * queries * examples
    if distributed.any_process(not memory.fits(needed, host)):
        parts = f" with their parts by {matrices - 1} layers" if matrices > 1 else ""
        way_out = "leave out by_layer=True, or " if parts else "pass `path=` to keep them in a file, or "
        raise ValueError(
            f"{queries:,} x {examples:,} scores{parts} take {memory.readable(needed)} of memory, and "
            f"{memory.readable(memory.available_bytes(host) or 0)} are available; {way_out}use `top_scores`, which "
            "keeps the strongest only."
        )
    # Written to, so that it counts as taken from here on.
    return torch.full((matrices, queries, examples), torch.nan, dtype=torch.float64)


def _pieces(
    gradients: ExampleGradients,
    examples: Tensor,
    curvature: Curvature,
    queries: ExampleGradients,
    chunks: Sequence[list[int]],
    normalise: Normalisation,
    layers: Sequence[str],
) -> Generator[tuple[slice, Tensor, Tensor], None, None]:
    """Yield parts of the matrix: rows ``q``, places of columns ``[n]``, scores ``[m, q, n]``; on every process."""
    start = 0
    for prepared in prepared_queries(curvature, queries.like(gradients), chunks, len(examples)):
        rows = slice(start, start + len(prepared.self_influence))
        with closing(gathered_columns(gradients, examples, prepared, curvature, normalise, layers)) as pieces:
            for places, scores in pieces:
                yield rows, places, scores
        start = rows.stop


def gathered_columns(
    gradients: ExampleGradients,
    examples: Tensor,
    prepared: PreparedQueries,
    curvature: Curvature | None = None,
    normalise: Normalisation = "none",
    layers: Sequence[str] = (),
) -> Generator[tuple[Tensor, Tensor], None, None]:
    """Yield columns of the matrix in one pass: their places ``[n]``, their scores ``[m, q, n]``; on every process.

    Args:
        gradients: Passes over the training data.
        examples: Dataset indices ``[n]``, sorted.
        prepared: The queries.
        curvature: For the norms to divide by; not needed without.
        normalise: See ``pairwise_scores``.
        layers: Whose parts of the scores to give, after the whole.
    """
    with closing(_columns(gradients, examples.tolist(), curvature, prepared, normalise, layers)) as batches:
        shape = 1 + len(layers), len(prepared.self_influence)
        for found in distributed.rounds(batches, len(examples), _SCORE_BYTES * math.prod(shape)):
            indices = [index for own, _ in found for index in own]
            scores = torch.cat([torch.zeros(0, *shape, dtype=torch.float64), *(exact(own).cpu() for _, own in found)])
            merged, gathered = distributed.gather_by_index(torch.tensor(indices, dtype=torch.long), {"scores": scores})
            yield torch.searchsorted(examples, merged), gathered["scores"].permute(1, 2, 0)


def _columns(
    gradients: ExampleGradients,
    indices: Sequence[int],
    curvature: Curvature | None,
    prepared: PreparedQueries,
    normalise: Normalisation,
    layers: Sequence[str],
) -> Generator[tuple[list[int], Tensor], None, None]:
    """Yield the indices of a batch and its scores ``[n, m, q]``: the whole, then the parts of the layers."""
    of_query = _length(prepared.self_influence) if normalise == "cosine" else None
    unusable = prepared.self_influence.isnan()
    with closing(gradients.run(indices, title="pairwise scores")) as batches:
        for batch in batches:
            scores, own = _scored(batch, None if normalise == "none" else curvature, prepared, layers)
            if own is not None:
                scores = scores / _length(own.to(scores))[:, None, None]
            if of_query is not None:
                scores = scores / of_query
            scores[~batch.finite] = torch.nan
            scores[..., unusable] = torch.nan
            yield batch.indices, scores


def _scored(
    batch: BatchGradients, curvature: Curvature | None, prepared: PreparedQueries, layers: Sequence[str]
) -> tuple[Tensor, Tensor | None]:
    """Return ``⟨g_z, v_q⟩`` and its parts, ``[n, m, q]``, and ``g_zᵀ (C + λ)⁻¹ g_z``, ``[n]``."""
    places = {layer: 1 + place for place, layer in enumerate(layers)}
    of_queries = prepared.self_influence
    scores = of_queries.new_zeros((batch.loss.n, 1 + len(layers), len(of_queries)))
    scorer = None if curvature is None else curvature.scorer(batch.loss.n)
    for io in batch.drained():
        part = prepared.products(io)
        scores[:, 0] += part
        if layers:
            scores[:, places[io.name]] = part
        if scorer is not None:
            scorer.add(io)
    return scores, None if scorer is None else scorer.self_influence()


def _length(squared: Tensor) -> Tensor:
    """Return square roots that can be divided by; NaN for what an inexact solver has left negative."""
    return squared.clamp(min=torch.finfo(squared.dtype).tiny).sqrt().masked_fill(squared < 0, torch.nan)


def _nothing(queries: int, device: torch.device) -> tuple[Tensor, Tensor]:
    values = wide_zeros((queries, 0), device)
    return values, torch.zeros((queries, 0), dtype=torch.long, device=device)


def _merged(best: tuple[Tensor, Tensor], scores: Tensor, rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Merge scores ``[q, n]`` of further examples into the best so far; of equal ones the first stay."""
    values, known = torch.cat([best[0], scores], 1), torch.cat([best[1], rows], 1)
    values = values.masked_fill(values.isnan(), -torch.inf)
    values, places = values.sort(dim=1, descending=True, stable=True)
    return values[:, :count], known.gather(1, places[:, :count])


def _over_processes(best: tuple[Tensor, Tensor], count: int) -> tuple[Tensor, Tensor]:
    """Merge what the processes have found: ``[q, count]`` on the host, padded with scores of -inf."""
    queries, device = len(best[0]), best[0].device
    values = torch.full((queries, count), -torch.inf, dtype=best[0].dtype, device=device)
    rows = torch.full((queries, count), -1, dtype=torch.long, device=device)
    values[:, : best[0].shape[1]], rows[:, : best[1].shape[1]] = best
    own = distributed.rank() * queries + torch.arange(queries, device=device)
    _, gathered = distributed.gather_by_index(own, {"values": values, "rows": rows})
    merged, known = (
        gathered[name].view(-1, queries, count).transpose(0, 1).reshape(queries, -1) for name in ("values", "rows")
    )
    known, order = known.sort(dim=1)
    top = _merged(_nothing(queries, device), merged.gather(1, order), known, count)
    return top[0].cpu(), top[1].cpu()


def _trimmed(found: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return indices and scores ``[q, m]`` of all queries, without entries that no query has a score for."""
    scores, rows = (torch.cat([part[place] for part in found]) for place in (0, 1))
    unknown = torch.isneginf(scores)
    kept = int((~unknown).any(0).sum())
    scores, rows = scores.masked_fill(unknown, torch.nan), rows.masked_fill(unknown, -1)
    return rows[:, :kept], scores[:, :kept]
