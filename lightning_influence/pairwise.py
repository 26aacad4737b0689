"""Influence of training examples on queries, pair by pair.

``score(z → q) = ∇ℓ(q)ᵀ (C + λ)⁻¹ ∇ℓ(z)``: positive for proponents (training on ``z`` lowers the loss of ``q``),
negative for opponents. Every query's gradient is preconditioned once; the training data are then passed over, and of
each batch only its column of scores is kept.

Index legend: ``q`` queries, ``n`` training examples, ``k`` groups, ``o`` outputs, ``i`` inputs.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_influence import distributed, per_sample
from lightning_influence.curvature.fitted import Curvature
from lightning_influence.passes import BatchGradients, ExampleGradients
from lightning_influence.precision import working_dtype

Normalisation = Literal["none", "relative", "cosine"]

# Preconditioned gradients of queries are held as full parameter vectors: so many bytes of them at a time.
_QUERY_BYTES = 2**30


@dataclass(frozen=True, eq=False)
class PairwiseScores:
    """Scores of all pairs.

    Attributes:
        queries: Dataset indices of the queries ``[q]``, in the order they were given.
        examples: Dataset indices of the training examples ``[n]``, sorted.
        scores: ``[q, n]``; NaN for queries and examples without a finite gradient.
    """

    queries: Tensor
    examples: Tensor
    scores: Tensor

    def group(self, members: Sequence[int]) -> Tensor:
        """Return the influence of a group of training examples on every query, the sum over its members: ``[q]``.

        Raises:
            ValueError: If a member was not scored, or is named twice.
        """
        places = {int(example): place for place, example in enumerate(self.examples)}
        missing = [member for member in members if member not in places]
        if missing or len(set(members)) != len(members):
            raise ValueError(f"the group holds {missing or 'repeated'} indices; expected distinct, scored examples.")
        return self.scores[:, [places[member] for member in members]].sum(1)


@dataclass(frozen=True, eq=False)
class TopScores:
    """The strongest proponents and opponents of every query.

    Attributes:
        queries: Dataset indices of the queries ``[q]``.
        proponents: Dataset indices of the examples with the largest scores ``[q, m]``, largest first.
        proponent_scores: Their scores.
        opponents: Dataset indices of the examples with the smallest scores ``[q, m]``, smallest first.
        opponent_scores: Their scores.
    """

    queries: Tensor
    proponents: Tensor
    proponent_scores: Tensor
    opponents: Tensor
    opponent_scores: Tensor


def pairwise_scores(
    gradients: ExampleGradients,
    indices: Sequence[int],
    curvature: Curvature,
    queries: ExampleGradients,
    query_indices: Sequence[int],
    *,
    normalise: Normalisation = "none",
    query_bytes: int = _QUERY_BYTES,
) -> PairwiseScores:
    """Score every query with every training example.

    Args:
        gradients: Passes over the training data.
        indices: The training examples.
        curvature: The curvature, fitted on the training data.
        queries: Passes over the queries' data; the loss is scaled as that of the training data.
        query_indices: The queries.
        normalise: ``"relative"`` divides by ``√(g_zᵀ (C + λ)⁻¹ g_z)``, so that examples with large gradients do not
            lead every list (RelatIF; Barshan et al. 2020, 2003.11630); ``"cosine"`` by that of the query, too.
        query_bytes: Memory for preconditioned query gradients. More queries take more passes over the training data.

    Returns:
        All scores, on the host; the same on every process.

    Raises:
        ValueError: If there is no query or no example.
    """
    chunks = []
    examples = torch.empty(0, dtype=torch.long)
    for part in _query_chunks(gradients, query_indices, query_bytes):
        prepared = _prepare(curvature, queries.like(gradients), part, normalise)
        kept: list[int] = []
        columns = []
        with closing(_columns(gradients, indices, curvature, prepared, normalise)) as batches:
            for batch_indices, scores in batches:
                kept.extend(batch_indices)
                columns.append(scores)
        local = torch.cat(columns) if columns else prepared.self_influence.new_empty((0, len(part)))
        own = torch.tensor(kept, dtype=torch.long, device=local.device)
        examples, merged = distributed.gather_by_index(own, {"scores": local})
        chunks.append(merged["scores"].T.cpu())
    return PairwiseScores(torch.tensor(list(query_indices)), examples.cpu(), torch.cat(chunks))


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
    """Find the strongest proponents and opponents of every query; memory does not grow with the training data.

    Args:
        gradients: Passes over the training data.
        indices: The training examples.
        curvature: The curvature, fitted on the training data.
        queries: Passes over the queries' data.
        query_indices: The queries.
        count: Number of proponents and of opponents.
        normalise: See ``pairwise_scores``.
        query_bytes: See ``pairwise_scores``.

    Raises:
        ValueError: If there is no query or no example.
    """
    found = []
    for part in _query_chunks(gradients, query_indices, query_bytes):
        prepared = _prepare(curvature, queries.like(gradients), part, normalise)
        best: dict[float, tuple[Tensor, Tensor]] = {}
        with closing(_columns(gradients, indices, curvature, prepared, normalise)) as batches:
            for batch_indices, scores in batches:
                rows = torch.tensor(batch_indices, device=scores.device)
                for sign in (1.0, -1.0):
                    best[sign] = _merged(best.get(sign), sign * scores.T, rows.expand(len(part), -1), count)
        found.append([_over_processes(best.get(sign), len(part), count, gradients.device) for sign in (1.0, -1.0)])
    (up, most), (down, least) = (
        (torch.cat([f[s][0] for f in found]), torch.cat([f[s][1] for f in found])) for s in (0, 1)
    )
    return TopScores(torch.tensor(list(query_indices)), most, up, least, -down)


@dataclass(frozen=True, eq=False)
class _Prepared:
    """Preconditioned gradients of some queries.

    Attributes:
        vectors: ``(C + λ)⁻¹ g_q`` by block, ``[q, k, o, i]``.
        self_influence: ``g_qᵀ (C + λ)⁻¹ g_q``, ``[q]``.
    """

    vectors: Mapping[str, Tensor]
    self_influence: Tensor


def _query_chunks(gradients: ExampleGradients, query_indices: Sequence[int], size: int) -> Iterator[list[int]]:
    if not len(query_indices):
        raise ValueError("there is no query to score; pass at least one index.")
    like = next(p for p in gradients.module.parameters() if p.is_floating_point())
    width = gradients.coverage.covered_parameters * working_dtype(like.dtype).itemsize
    step = max(1, size // max(width, 1))
    for start in range(0, len(query_indices), step):
        yield list(query_indices[start : start + step])


def _prepare(
    curvature: Curvature, queries: ExampleGradients, indices: list[int], normalise: Normalisation
) -> _Prepared:
    if normalise not in get_args(Normalisation):
        raise ValueError(f"normalise={normalise!r}; expected one of {', '.join(map(repr, get_args(Normalisation)))}.")
    shapes = {name: block.shape for name, block in queries.coverage.blocks.items()}
    parts: dict[str, list[Tensor]] = {name: [] for name in shapes}
    finite = []
    with closing(queries.run(indices, title="queries", everywhere=True)) as batches:
        for batch in batches:
            finite.append(batch.finite)
            reached = {io.name: per_sample.formed(io.x, io.gs[0]) for io in batch.layers()}
            for name, shape in shapes.items():
                like = next(iter(reached.values()))
                missing = like.new_zeros((batch.loss.n, *shape))
                parts[name].append(reached.get(name, missing))
    raw = {name: torch.cat(rows) for name, rows in parts.items()}
    vectors = curvature.solve(raw)
    products = [(raw[name] * vectors[name]).sum((1, 2, 3), dtype=torch.float64) for name in raw]
    own = torch.stack(products).sum(0).masked_fill(~torch.cat(finite), torch.nan)
    return _Prepared(vectors, own)


def _columns(
    gradients: ExampleGradients,
    indices: Sequence[int],
    curvature: Curvature,
    prepared: _Prepared,
    normalise: Normalisation,
) -> Generator[tuple[list[int], Tensor], None, None]:
    """Yield the indices of a batch and its scores ``[n, q]``."""
    if not len(indices):
        raise ValueError("there is no training example to score.")
    of_query = prepared.self_influence.sqrt() if normalise == "cosine" else 1.0
    unusable = prepared.self_influence.isnan()
    with closing(gradients.run(indices, title="pairwise scores")) as batches:
        for batch in batches:
            scores, own = _scored(batch, curvature, prepared, normalise != "none")
            if own is not None:
                scores = scores / own.clamp(min=torch.finfo(own.dtype).tiny).sqrt().unsqueeze(1)
            scores = scores / of_query
            scores[~batch.finite] = torch.nan
            scores[:, unusable] = torch.nan
            yield batch.indices, scores


def _scored(
    batch: BatchGradients, curvature: Curvature, prepared: _Prepared, with_own: bool
) -> tuple[Tensor, Tensor | None]:
    """Return ``⟨g_z, v_q⟩``, ``[n, q]``, and ``g_zᵀ (C + λ)⁻¹ g_z``, ``[n]``."""
    device = prepared.self_influence.device
    scores = torch.zeros((batch.loss.n, len(prepared.self_influence)), dtype=torch.float64, device=device)
    scorer = curvature.scorer(batch.loss.n) if with_own else None
    for io in batch.layers():
        scores += per_sample.products(io.x, io.gs[0], prepared.vectors[io.name])
        if scorer is not None:
            scorer.add(io)
    return scores, None if scorer is None else scorer.self_influence()


def _merged(best: tuple[Tensor, Tensor] | None, scores: Tensor, rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Merge scores ``[q, n]`` of further examples into the best so far."""
    scores = scores.nan_to_num(nan=-torch.inf)
    if best is not None:
        scores, rows = torch.cat([best[0], scores], 1), torch.cat([best[1], rows], 1)
    values, places = scores.topk(min(count, scores.shape[1]), dim=1)
    return values, rows.gather(1, places)


def _over_processes(
    best: tuple[Tensor, Tensor] | None, queries: int, count: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Merge what the processes have found, on the host; entries without a score are dropped where none has one."""
    if best is None:
        best = torch.zeros((queries, 0), dtype=torch.float64, device=device), torch.zeros((queries, 0), device=device)
    values = torch.full((queries, count), -torch.inf, dtype=torch.float64, device=device)
    rows = torch.full((queries, count), -1, dtype=torch.long, device=device)
    values[:, : best[0].shape[1]], rows[:, : best[1].shape[1]] = best[0], best[1].long()
    own = distributed.rank() * queries + torch.arange(queries, device=device)
    _, gathered = distributed.gather_by_index(own, {"values": values, "rows": rows})
    merged = gathered["values"].view(-1, queries, count).transpose(0, 1).reshape(queries, -1)
    from_rows = gathered["rows"].view(-1, queries, count).transpose(0, 1).reshape(queries, -1)
    top, places = merged.topk(min(count, merged.shape[1]), dim=1)
    known = int(torch.isfinite(top).any(0).sum())
    return top[:, :known].cpu(), from_rows.gather(1, places)[:, :known].cpu()
