"""Scores of pairs that are sums over several passes: over checkpoints of a run, over sub-networks of a model.

Each term is an inner product of gradients, ``⟨v_q, g_z⟩``, with the weights and the vectors of its own pass. The
machinery of one pass is that of ``pairwise``; what is added here is the matrix that the passes share.

Index legend: ``q`` queries, ``n`` training examples, ``k, o, i`` a block's groups, outputs, inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing

import torch
from torch import Tensor

from lightning_influence.core import distributed, memory
from lightning_influence.core.precision import wide_zeros
from lightning_influence.gradients.passes import ExampleGradients
from lightning_influence.scores.pairs import PairwiseScores, distinct, gathered_columns
from lightning_influence.scores.queries import PreparedQueries, check_pairs, query_chunks, query_gradients

QUERY_BYTES = 2**30
"""Memory for the vectors of queries, unless told otherwise."""

_SCORE_BYTES = 8


class PairSum:
    """A matrix of scores that passes over the training data add to.

    Args:
        gradients: Passes over the training data.
        indices: The training examples; one that is named twice counts once.
        queries: Passes over the queries' data, with the model and coverage of the training data; the loss is scaled as
            theirs.
        query_indices: The queries.
        query_bytes: Memory for the vectors of queries; more queries take more passes over the training data.

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
        query_bytes: int = QUERY_BYTES,
    ) -> None:
        check_pairs(gradients, indices, queries, query_indices)
        self.gradients = gradients
        self.queries = queries.like(gradients)
        self._examples = distinct(indices)
        self._asked = torch.tensor(list(query_indices), dtype=torch.long)
        self._scores = _zeros(len(self._asked), len(self._examples))
        self._chunks, self.notes = query_chunks(gradients, query_indices, query_bytes)

    def queried(self) -> Iterator[tuple[slice, dict[str, Tensor], Tensor]]:
        """Yield, for as many queries as are taken at a time, their rows, their gradients, and which are finite.

        Gradients go by block, ``[q, k, o, i]``, at the weights that the model has now.

        Raises:
            QueryError: Before the first, if the training task can't be run on the queries.
        """
        start = 0
        for vectors, finite in query_gradients(self.queries, self._chunks):
            rows = slice(start, start + len(finite))
            yield rows, vectors, finite
            start = rows.stop

    def add(self, rows: slice, vectors: Mapping[str, Tensor], finite: Tensor, weight: float = 1.0) -> None:
        """Add ``weight · ⟨v_q, g_z⟩`` at the weights that the model has now, in one pass over the training data.

        Args:
            rows: The queries.
            vectors: ``v_q`` by block, ``[q, k, o, i]``.
            finite: Which queries have a score, ``[q]``; an example without a finite gradient has none.
            weight: Of the term.
        """
        # All that a pass without norms looks for there is who has a score.
        known = wide_zeros(len(finite), finite.device).masked_fill(~finite, torch.nan)
        with closing(gathered_columns(self.gradients, self._examples, PreparedQueries(vectors, known))) as pieces:
            for places, scores in pieces:
                self._scores[rows, places] += weight * scores[0]

    def result(self, notes: Sequence[str] = ()) -> PairwiseScores:
        """Return the sums, with further notes."""
        return PairwiseScores(self._asked, self._examples, self._scores, None, [*self.notes, *notes])


def mean_scores(members: Sequence[PairwiseScores]) -> PairwiseScores:
    """Return the mean of scores of the same pairs: an ensemble over models of several seeds, or of several methods.

    Influence has a unit, the change of the query's loss, so that members are averaged as they are. Three seeds raised
    the LDS of the GGN from .706 to .756 on digits (``docs/results/lds.md``).

    Args:
        members: Scores of the same queries and examples, in the same order; one at least.

    Returns:
        The mean; NaN for a pair that some member has no score for. Parts by layer are averaged if all members have the
        same ones.

    Raises:
        ValueError: If there is no member, or they are not about the same pairs.
    """
    if not members:
        raise ValueError("there are no scores to average; pass at least one member.")
    first = members[0]
    for number, other in enumerate(members):
        for what, own, theirs in (
            ("queries", first.queries, other.queries),
            ("examples", first.examples, other.examples),
        ):
            if not torch.equal(own, theirs):
                raise ValueError(
                    f"member {number} has scores of {len(theirs)} {what}, member 0 of {len(own)}, or of others; "
                    "expected the same queries and training examples in all members."
                )
    total = torch.zeros(first.scores.shape, dtype=torch.float64)
    for member in members:
        total += member.scores
    layers = [list(member.parts or {}) for member in members]
    parts = None
    if layers[0] and all(found == layers[0] for found in layers):
        parts = {name: torch.stack([(m.parts or {})[name] for m in members]).mean(0) for name in layers[0]}
    notes = list(dict.fromkeys(note for member in members for note in member.notes))
    return PairwiseScores(first.queries, first.examples, total / len(members), parts, notes)


def _zeros(queries: int, examples: int) -> Tensor:
    host = torch.device("cpu")
    needed = _SCORE_BYTES * queries * examples
    if distributed.any_process(not memory.fits(needed, host)):
        raise ValueError(
            f"{queries:,} x {examples:,} scores take {memory.readable(needed)} of memory, and "
            f"{memory.readable(memory.available_bytes(host) or 0)} are available; take fewer queries at a time."
        )
    return torch.zeros((queries, examples), dtype=torch.float64)
