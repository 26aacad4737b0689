"""The contract of one parameter block's curvature, by its eigenvalues: ``C = Q diag(lam) Qᵀ``.

A block approximates the mean curvature ``C = 1/N Σ_n E_y[v_n v_nᵀ]`` of the per-example loss with respect to one
layer's parameters, laid out ``[k, o, i]`` (see ``layers``). It is fitted in a fixed number of passes over the data
and then solves as often as needed. Nobody outside this package branches on the kind of approximation.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lightning_influence.core import distributed
from lightning_influence.core.errors import is_number
from lightning_influence.core.precision import wide, wide_dtype
from lightning_influence.curvature.solve.spectrum import rounding
from lightning_influence.layers import per_sample
from lightning_influence.layers.rows import Rows

Measure = Literal["covariances", "eigenvalues"]
Shape = tuple[int, int, int]
Sides = tuple[bool, bool]
"""Whether the output side and the input side may have a dense basis."""

OF_INPUTS = "activation"
"""What is decomposed of the activations alone, see ``CurvatureBlock._decompositions``: once for all that share them."""
RELATIVE_DAMPING = 0.1
"""Default damping: this multiple of the block's mean eigenvalue (Grosse et al. 2023, 2308.03296)."""
# Eigenvalues of a block of which the inverses are kept from one batch to the next: of larger blocks they would be as
# large as the model, all together, and take little of the time that their gradients take.
KEPT_INVERSES = 2**20
# Bytes of sums that are copied at a time, to be added up over processes.
_TOGETHER = 2**26


@dataclass(frozen=True, eq=False)
class Eigenbasis:
    """Where solving with a block is elementwise: ``(C + λ)⁻¹ v = Q_B (inverse ∘ (Q_Bᵀ v Q_A)) Q_Aᵀ``.

    Attributes:
        activation_basis: ``Q_A: [k, i, i]``, orthonormal columns; None is the identity.
        gradient_basis: ``Q_B: [k, o, o]``, orthonormal columns; None is the identity, the only one for one-hot rows.
        inverse: ``1 / (lam + damping)``, ``[k, o, i]``.
    """

    activation_basis: Tensor | None
    gradient_basis: Tensor | None
    inverse: Tensor

    def rotated(self, x: Tensor, g: Rows) -> tuple[Tensor, Rows]:
        """Return activations and output gradients in this basis: those of the gradients ``Q_Bᵀ G_n Q_A``."""
        return per_sample.rotated_rows(x, g, self.activation_basis, self.gradient_basis)


class CurvatureBlock(ABC):
    """Curvature of one block of parameters.

    Fitting: for each of ``measures`` a pass, ``update`` with every batch that the layer took part in, then ``end_pass``
    once. A kind of its own says what it sums up in a pass and what it makes of the sums, in which basis it scales, and
    what the gradients in that basis add up to; the rest follows.

    Args:
        shape: ``(k, o, i)``: groups, outputs, inputs (bias column included).
        dense: Whether the output side and the input side may have a dense basis: not for one-hot rows, and not for
            sides too large for an eigendecomposition.

    Attributes:
        measures: What each pass measures.
        title: What users call it.
    """

    measures: ClassVar[tuple[Measure, ...]]
    title: ClassVar[str]

    def __init__(self, shape: Shape, dense: Sides = (True, True)) -> None:
        self.shape = shape
        self.dense = dense
        self.tensors: dict[str, Tensor] = {}
        """The fitted state, see ``fitted_shapes``; what the store keeps."""
        self.inputs_of: CurvatureBlock | None = None
        """A block that always has the same activations: what follows from them alone may be found there."""
        self._finished_passes = 0
        # Sums over examples of the running pass. All of them add up across processes.
        self._sums: dict[str, Tensor] = {}
        # The last damping and ``1 / (lam + damping)``: a pass asks for the same one with every batch.
        self._cached: tuple[float, Tensor] | None = None
        self._extremes: tuple[Tensor, float, float] | None = None

    # ------------------------------------------------------------------------------------------- what a kind defines

    @classmethod
    @abstractmethod
    def fitted_shapes(cls, shape: Shape, dense: Sides) -> dict[str, tuple[int, ...]]:
        """Return names and shapes of ``tensors``; what is called a basis, ``[k, m, m]``, takes a decomposition."""

    @abstractmethod
    def _contributions(self, xs: Sequence[Tensor], gs: Sequence[Rows], examples: int) -> dict[str, Tensor]:
        """Return this batch's part of the running pass's sums; one of ``xs``, ``gs`` or both have one per draw."""

    @abstractmethod
    def _finish(self, sums: dict[str, Tensor]) -> None:
        """End the running pass: ``sums`` hold totals over all processes, and their number of ``"examples"``."""

    def _decompositions(self, sums: dict[str, Tensor]) -> dict[str, Callable[[], dict[str, Tensor]]]:
        """Return what decomposes sums in ending the running pass, by their name: one process does it for all.

        What is called ``m`` replaces ``sums["m"]`` and ``sums["m.…"]``, which it may take out, by its result.
        """
        return {}

    @abstractmethod
    def _scaled(self, v: Tensor, scales: Tensor) -> Tensor:
        """Return ``Q diag(scales) Qᵀ v`` for ``v: [..., k, o, i]`` and scales like the eigenvalues."""

    @abstractmethod
    def diagonal(self) -> Tensor:
        """Return the diagonal of the curvature, ``[k, o, i]``."""

    @abstractmethod
    def self_influences(self, x: Tensor, g: Rows, dampings: Sequence[float]) -> Tensor:
        """Return ``G_nᵀ (C + damping)⁻¹ G_n`` for every example and damping, ``[n, d]``, by the cheapest exact form."""

    def eigenbasis(self, damping: float) -> Eigenbasis | None:
        """Return where ``solve`` is elementwise; None if there is no such basis that rows can be rotated to."""
        return None

    # ------------------------------------------------------------------------------------------------------- fitting

    def update(self, x: Tensor | Sequence[Tensor], gs: Sequence[Rows], examples: int) -> None:
        """Add one batch to the running pass.

        Args:
            x: Activations ``[k, n, s, i]``, or one per draw where they depend on the labels (embeddings, see
                ``rows``); rows of left-out examples are zero.
            gs: Output gradients ``[k, n, s, o]`` whose outer products, summed over the draws, average to the
                curvature of one example's loss. Rows of left-out examples are zero.
            examples: Number of examples that count (``n`` minus those left out).
        """
        xs = [x] if isinstance(x, Tensor) else x
        for name, value in self._contributions(xs, gs, examples).items():
            if name in self._sums:
                self._sums[name] += value
            else:
                self._sums[name] = value

    def end_pass(self, examples: int) -> None:
        """Turn the sums of the running pass into means and prepare the next one; see ``end_passes``."""
        end_passes({self.title: self}, examples)

    def _ended(self, sums: dict[str, Tensor]) -> None:
        self._finish(sums)
        self._finished_passes += 1

    def part(self) -> None:
        """Measure activations by itself from now on; those of ``inputs_of`` were its own so far."""
        self.inputs_of = None

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up a fitted state, instead of fitting: ``tensors`` of a block of the same shape."""
        self.tensors, self._finished_passes = dict(tensors), len(self.measures)

    # --------------------------------------------------------------------------------------------------------- using

    @property
    def eigenvalues(self) -> Tensor:
        """``lam: [k, o, i]``; for dense bases ``[k, o·i]``, never negative."""
        if self._finished_passes != len(self.measures):
            raise RuntimeError(
                f"{type(self).__name__} needs {len(self.measures)} passes over the data and has seen "
                f"{self._finished_passes}; call `update` for every batch and `end_pass` after each pass first."
            )
        return self.tensors["eigenvalues"]

    def damping(self, relative: float = RELATIVE_DAMPING) -> float:
        """Return ``relative`` times the mean eigenvalue of the block."""
        return relative * float(wide(self.eigenvalues).mean())

    def matvec(self, v: Tensor) -> Tensor:
        """Multiply by the curvature: ``[..., k, o, i] -> [..., k, o, i]``."""
        return self._scaled(v, self.eigenvalues)

    def solve(self, v: Tensor, damping: float) -> Tensor:
        """Return ``(C + damping)⁻¹ v`` for ``v: [..., k, o, i]``."""
        return self._scaled(v, self._inverse(damping))

    def apply(self, function: Callable[[Tensor], Tensor], v: Tensor) -> Tensor:
        """Return ``f(C) v`` for ``v: [..., k, o, i]``; ``function`` maps eigenvalues of any shape, elementwise."""
        return self._scaled(v, function(self.eigenvalues))

    def self_influence(self, x: Tensor, g: Rows, damping: float) -> Tensor:
        """Return ``G_nᵀ (C + damping)⁻¹ G_n`` for every example, ``[n]``."""
        return self.self_influences(x, g, [damping])[:, 0]

    def scores(
        self, x: Tensor, g: Rows, damping: float, query: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return squared gradient norm, self-influence, and inner product with ``query``, each ``[n]``.

        Together they may cost less than apart. ``query: [k, o, i]`` is usually a preconditioned gradient.
        """
        inner = None if query is None else per_sample.inner_products(x, g, query)
        return per_sample.squared_norms(x, g), self.self_influence(x, g, damping), inner

    def to_dense(self) -> Tensor:
        """Return the block as dense matrices ``[k, o·i, o·i]`` (row-major in ``[o, i]``); for small blocks."""
        k, o, i = self.shape
        unit = torch.eye(o * i, dtype=self.eigenvalues.dtype, device=self.eigenvalues.device).reshape(-1, 1, o, i)
        columns = self.matvec(unit.expand(-1, k, -1, -1))  # [o·i, k, o, i]
        return columns.reshape(o * i, k, o * i).permute(1, 2, 0)

    def check_damping(self, damping: float) -> None:
        """Raise ``ValueError`` if ``damping`` is no number >= 0, or leaves the curvature singular."""
        smallest, largest = self._range()
        # Eigenvalues that should be 0 come out as rounding noise of the largest.
        noise = rounding(max(self.shape[1:]), largest, self.eigenvalues.dtype)
        if not is_number(damping) or damping < 0 or (damping == 0 and smallest <= noise):
            raise ValueError(
                f"damping {damping!r} leaves the curvature singular (its smallest eigenvalue is {smallest:.3g}); pass "
                'a damping > 0, or `damping="relative"`.'
            )

    def _range(self) -> tuple[float, float]:
        """Return the smallest and the largest eigenvalue, read from the device once."""
        if self._extremes is None or self._extremes[0] is not self.eigenvalues:
            smallest, largest = torch.stack(self.eigenvalues.aminmax()).tolist()
            self._extremes = self.eigenvalues, smallest, largest
        return self._extremes[1:]

    def _inverse(self, damping: float) -> Tensor:
        if self._cached is not None and self._cached[0] == damping:
            return self._cached[1]
        self.check_damping(damping)
        inverse = 1 / (self.eigenvalues + damping)
        self._cached = (damping, inverse) if inverse.numel() <= KEPT_INVERSES else None
        return inverse


def end_passes(blocks: Mapping[str, CurvatureBlock], examples: int) -> None:
    """End the running passes of blocks: their sums over all processes are decomposed, each by one of them.

    Args:
        blocks: The blocks by name, the same on every process.
        examples: Number of examples that this process has counted.

    Raises:
        ValueError: If no process has counted any.
        LinAlgError: If a block can't be decomposed.
    """
    examples = _sum_passes(list(blocks.values()), examples)
    if not examples:
        raise ValueError("no example was counted: all losses or gradients are non-finite, or the data are empty.")
    passes: dict[str, dict[str, Tensor]] = {}
    work: list[tuple[str, str, Callable[[], dict[str, Tensor]]]] = []
    for layer, block in blocks.items():
        sums, block._sums = block._sums, {}
        device = next((value.device for value in sums.values()), torch.device("cpu"))
        sums["examples"] = torch.full((), float(examples), dtype=wide_dtype(device), device=device)
        passes[layer] = sums
        work += [(layer, name, partial(_named, layer, each)) for name, each in block._decompositions(sums).items()]
    costs = [
        float(sum(value.numel() * value.shape[-1] for value in _of(passes[layer], name).values()))
        for layer, name, _ in work
    ]
    names = {id(block): layer for layer, block in blocks.items()}
    takers = {(layer, name): [layer] for layer, name, _ in work}
    for layer, block in blocks.items():
        if (whose := (names.get(id(block.inputs_of), ""), OF_INPUTS)) in takers:
            takers[whose].append(layer)
    waiting = Counter(layer for each in takers.values() for layer in each)
    for layer in blocks.keys() - waiting.keys():
        blocks[layer]._ended(passes.pop(layer))
    devices = {value.device for sums in passes.values() for value in sums.values()}
    device = max(devices, key=lambda each: each.type != "cpu", default=torch.device("cpu"))
    for place, found in distributed.dealt([each for *_, each in work], costs, device):
        layer, name, _ = work[place]
        for taker in takers[layer, name]:
            for key in _of(passes[taker], name):
                del passes[taker][key]
            passes[taker] |= found
            waiting[taker] -= 1
            if not waiting[taker]:
                blocks[taker]._ended(passes.pop(taker))


def _of(sums: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """Return the sums that are called by a name, or by that and more after a point."""
    return {key: value for key, value in sums.items() if key.partition(".")[0] == name}


def _named(layer: str, decompose: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    try:
        return decompose()
    except torch.linalg.LinAlgError as error:
        raise torch.linalg.LinAlgError(
            f"the curvature of {layer!r} can't be decomposed: {error} Leave it out by `layers=`, or use "
            '`curvature="diagonal"`.'
        ) from error


def _sum_passes(blocks: Sequence[CurvatureBlock], examples: int) -> int:
    """Add up the running passes of all processes, of all blocks together; return the number of examples of all."""
    if distributed.world_size() == 1:
        return examples
    counted, *_ = distributed.sum_across_processes([torch.tensor(examples)])
    waiting = [(block._sums, name) for block in blocks for name in sorted(block._sums)]
    while waiting:
        # Sums take the place of parts before the next ones travel: memory for a few of them.
        size = 0
        some: list[tuple[dict[str, Tensor], str]] = []
        while waiting and (not some or size < _TOGETHER):
            some.append(waiting.pop())
            size += some[-1][0][some[-1][1]].nbytes
        for (sums, name), total in zip(some, distributed.sum_across_processes([s[n] for s, n in some]), strict=True):
            sums[name] = total
    return int(counted)
