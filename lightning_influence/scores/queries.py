"""Queries: what training examples are scored by, one gradient each, preconditioned once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from lightning_influence.core import distributed, memory
from lightning_influence.core.precision import wide, wide_zeros, working_dtype
from lightning_influence.curvature.blocks.block import Eigenbasis
from lightning_influence.curvature.curvature import Curvature
from lightning_influence.gradients.capture import LayerIO
from lightning_influence.gradients.passes import BatchGradients, ExampleGradients
from lightning_influence.gradients.visitors import Visitor, visit
from lightning_influence.layers import per_sample
from lightning_influence.layers.rows import Rows
from lightning_influence.objective.task import TaskError
from lightning_influence.scores.measurements.base import MeasurementError

# Of a gradient there are, for a while: itself, the solution, and what solving takes. Where blocks are solved for one at
# a time, that is of one block.
_COPIES = 4
# Solving for all parameters at once: what conjugate gradients and their products hold at their peak.
_ITERATED = 20
# For all queries' vectors, each as large as the parameters: more queries take more passes over the training data.
_QUERY_BYTES = 2**32

_Query = TypeVar("_Query")


class QueryError(ValueError):
    """The task of the training data can't be run on the queries; the cause is what it raised."""


@dataclass(frozen=True, eq=False)
class PreparedQueries:
    """Preconditioned gradients of some queries.

    Attributes:
        vectors: ``(C + λ)⁻¹ g_q`` by block, ``[q, k, o, i]``, each in the basis that ``bases`` names.
        self_influence: ``g_qᵀ (C + λ)⁻¹ g_q``, ``[q]``; NaN for queries without a finite gradient.
        bases: Bases of the vectors by block; None, or no entry, is that of the parameters.
    """

    vectors: Mapping[str, Tensor]
    self_influence: Tensor
    bases: Mapping[str, Eigenbasis | None] = field(default_factory=dict)

    def turned(self, vectors: Mapping[str, Tensor]) -> PreparedQueries:
        """Return the same queries with other vectors, in the basis of the parameters."""
        return PreparedQueries(vectors, self.self_influence)

    def products(self, io: LayerIO) -> Tensor:
        """Return one block's part of ``⟨g_z, v_q⟩`` for a batch of ``n`` examples, ``[n, q]``."""
        return per_sample.products(*_rows(io, self.bases.get(io.name)), self.vectors[io.name])

    def by_position(self, io: LayerIO) -> list[Tensor]:
        """Return the same before the sum over positions, ``[n, q, s]`` for each kind of rows that the block has."""
        return per_sample.by_position(*_rows(io, self.bases.get(io.name)), self.vectors[io.name])


def check_pairs(
    gradients: ExampleGradients, indices: Sequence[int], queries: ExampleGradients, query_indices: Sequence[int]
) -> None:
    """Raise ``ValueError`` for training data and queries that do not go together."""
    if not len(query_indices):
        raise ValueError("there is no query to score; pass at least one index.")
    if not len(indices):
        raise ValueError("there is no training example to score; pass at least one index.")
    if queries.module is not gradients.module:
        raise ValueError("the queries run through another model than the training data; build both on the same module.")
    check_layers(gradients, "the queries", queries.coverage.blocks.keys())
    own, theirs = ({name: block.shape for name, block in p.coverage.blocks.items()} for p in (gradients, queries))
    if own != theirs:
        raise ValueError("the queries' layers have other shapes than the training data's; use the same coverage.")


def check_layers(gradients: ExampleGradients, other: str, covered: Set[str]) -> None:
    """Raise ``ValueError`` if something else covers other layers than the training data's passes."""
    if different := covered ^ gradients.coverage.blocks.keys():
        raise ValueError(
            f"{other} and the training data differ in the layers {sorted(different)}; build the passes with the same "
            "coverage, and fit the curvature with them."
        )


def query_chunks(
    gradients: ExampleGradients, queries: Sequence[_Query], curvature: Curvature | None = None
) -> list[list[_Query]]:
    """Return the queries to take at a time, the same on every process: as many as memory has room for.

    Args:
        gradients: Passes over the training data.
        queries: The queries.
        curvature: What they are preconditioned with. Without one, others will hold more of each query.
    """
    blocks = gradients.coverage.blocks.values()
    like = next(p for p in gradients.module.parameters() if p.is_floating_point())
    itemsize = working_dtype(like.dtype).itemsize
    # Block by block, a few gradients and what solving makes of them, beside the vectors.
    alone = curvature is not None and _by_block(curvature)
    beside = _COPIES * max((math.prod(block.shape) for block in blocks), default=0) * itemsize if alone else 0
    copies = 1 if alone else _COPIES if curvature is None or curvature.blockwise is None else _ITERATED
    width = max(1, copies * gradients.coverage.covered_parameters * itemsize)
    step = max(1, (min(distributed.gather_objects(_query_bytes(gradients.device))) - beside) // width)
    return [list(queries[start : start + step]) for start in range(0, len(queries), step)]


def _query_bytes(device: torch.device) -> int:
    """Return what vectors of queries may take: a few GB, or half of what is free, if that is more."""
    available = memory.available_bytes(device)
    if available is None:
        return _QUERY_BYTES
    # An accelerator is a process's own; of the host's memory, each takes its part.
    sharing = distributed.world_size() if device.type == "cpu" else 1
    return min(available, max(_QUERY_BYTES, available // (2 * sharing)))


def prepared_queries(
    curvature: Curvature | None,
    queries: ExampleGradients,
    chunks: Sequence[list[int]],
    examples: int | None = None,
) -> Iterator[PreparedQueries]:
    """Yield the preconditioned gradients of one chunk of queries after the other, the same on every process.

    Args:
        curvature: ``C + λ``; None for the gradients as they are.
        queries: Passes over the queries' data.
        chunks: The queries, as many as are taken at a time.
        examples: Number of training examples that each chunk will be multiplied with: vectors stay in the eigenbasis
            of the curvature where rotating the examples costs less. None leaves all in the basis of the parameters.

    Raises:
        QueryError: If the task can't be run on some query of the chunk.
        SolverError: If an iterative solver did not reach its tolerance.
    """
    for chunk in chunks:
        asked = _Solving(curvature, queries, len(chunk), examples)
        with run_on_queries():
            visit(queries, chunk, [asked], title="queries", everywhere=True)
        yield asked.result()


def _by_block(curvature: Curvature | None) -> bool:
    """Tell whether blocks can be solved for one at a time."""
    return curvature is None or curvature.blockwise is curvature


def _rows(io: LayerIO, basis: Eigenbasis | None) -> tuple[Tensor, Rows]:
    """Return a block's activations and output gradients, in a basis."""
    return (io.x, io.gs[0]) if basis is None else basis.rotated(io.x, io.gs[0])


def _cheaper_basis(curvature: Curvature, io: LayerIO, queries: int, examples: int) -> Eigenbasis | None:
    """Return the eigenbasis of a block if pairs cost less in it than in the basis of the parameters, else None.

    The multiplications beyond those of the scores themselves, with one position per example and a single process:

    * in the eigenbasis, the rows of all queries and training examples are rotated: ``(q + n)(i² + o²)``;
    * else the queries' gradients are rotated there and back: ``2 q·o·i (i + o)``;

    where a side that has the identity as its basis costs nothing. One-hot rows stay in the basis of the parameters, and
    so do layers with more positions, whose rows cost that much more to rotate. Both are told from the first batch of
    queries; should other batches be of another kind, the scores are right all the same.
    """
    basis = curvature.eigenbasis(io.name)
    if basis is None or io.x.shape[2] > 1 or not isinstance(io.gs[0], Tensor):
        return None
    _, o, i = basis.inverse.shape
    sides = [of.shape[-1] for of in (basis.activation_basis, basis.gradient_basis) if of is not None]
    rotated_rows = (queries + examples) * sum(side**2 for side in sides)
    return basis if rotated_rows < 2 * queries * o * i * sum(sides) else None


@contextmanager
def run_on_queries() -> Iterator[None]:
    """Raise ``QueryError`` for whatever goes wrong in a user's task that meets another kind of batch."""
    try:
        yield
    except MeasurementError:
        raise
    except Exception as error:
        if memory.is_out_of_memory(error):
            raise
        words = str(error) if isinstance(error, TaskError) else f"{type(error).__name__}: {error}"
        raise QueryError(
            f"queries: the training task can't be run on them: {words.rstrip('.')}. Queries need inputs and labels of "
            "the kind that the model was trained on."
        ) from (error.__cause__ or error)


class _Solving(Visitor):
    """Keeps the gradients of all examples of a pass, preconditioned as soon as they are formed where that can be done.

    They are formed a few at a time, block by block: as large as all parameters there are the vectors alone.
    """

    def __init__(
        self, curvature: Curvature | None, queries: ExampleGradients, count: int, examples: int | None
    ) -> None:
        self._curvature, self._examples, self._count, self._done = curvature, examples, count, 0
        self._shapes, self._device = {n: (count, *b.shape) for n, b in queries.coverage.blocks.items()}, queries.device
        self._vectors: dict[str, Tensor] = {}
        self._bases: dict[str, Eigenbasis | None] = {}
        self._squares: dict[str, Tensor] = {}
        self._finite: list[Tensor] = []

    def add(self, io: LayerIO) -> None:
        name, curvature = io.name, self._curvature
        if name not in self._vectors:
            self._vectors[name] = io.x.new_zeros(self._shapes[name])
            self._squares[name] = wide_zeros(self._count, io.x.device)
            if curvature is not None and self._examples is not None:
                self._bases[name] = _cheaper_basis(curvature, io, self._count, self._examples)
        basis, start = self._bases.get(name), self._done
        for formed in per_sample.gradients(*_rows(io, basis), cached=False):
            gradients = formed.transpose(0, 1)
            solved = gradients
            if basis is not None:
                solved = gradients * basis.inverse
            elif curvature is not None and _by_block(curvature):
                solved = curvature.solve({name: gradients})[name]
            these = slice(start, start + len(gradients))
            self._vectors[name][these], start = solved, these.stop
            self._squares[name][these] = _inner(gradients, solved)

    def end(self, batch: BatchGradients) -> None:
        self._of_batch = batch.finite

    def file(self) -> None:
        self._done += len(self._of_batch)
        self._finite.append(self._of_batch)

    def result(self) -> PreparedQueries:
        """Return the queries."""
        reached, squares, curvature = self._vectors, self._squares, self._curvature
        like = next(iter(reached.values()), torch.zeros(0, device=self._device))
        # Zeros are made only where they are needed: they are as large as gradients.
        found = {n: reached.pop(n) if n in reached else like.new_zeros(shape) for n, shape in self._shapes.items()}
        if not _by_block(curvature):
            assert curvature is not None
            solved = curvature.solve(found)
            squares = {name: _inner(found.pop(name), solved[name]) for name in list(found)}
            found = solved
        total = wide_zeros(self._count, self._device)
        if curvature is not None:
            total = sum(squares.values(), total)
        return PreparedQueries(found, total.masked_fill(~torch.cat(self._finite), torch.nan), self._bases)


def _inner(gradients: Tensor, vectors: Tensor) -> Tensor:
    """Return inner products ``[m]`` of ``[m, k, o, i]``, the same in every orthonormal basis."""
    # Rows first: a sum in float64 takes a copy of what it adds up.
    return wide((gradients * vectors).sum(3)).sum((1, 2))
