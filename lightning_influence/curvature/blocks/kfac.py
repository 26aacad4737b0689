"""K-FAC: the Fisher of a layer as a Kronecker product (Martens & Grosse 2015, 1503.05671)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from lightning_influence.core.precision import exact, wide, wide_zeros
from lightning_influence.curvature.blocks.block import OF_INPUTS, Measure, Shape, Sides
from lightning_influence.curvature.blocks.eigenvectors import eigenvectors, null_columns
from lightning_influence.curvature.blocks.kronecker import KroneckerBlock
from lightning_influence.layers.per_sample import squared_norms
from lightning_influence.layers.rows import Joined, OneHot, Rows, added, second_moment

_SIDES = ("activation", "gradient")


class KFACBlock(KroneckerBlock):
    """``C = B ⊗ A``: eigenvalues are products of those of the factors.

    The bases are the eigenvectors of ``A = 1/N Σ_n Σ_s x xᵀ`` and ``B = 1/(N S) Σ_n Σ_s g gᵀ``. With this scaling
    ``B ⊗ A`` has the size of the Fisher itself for layers that share weights over positions (Grosse & Martens 2016,
    1602.01407; "KFAC-expand" in Eschenhagen et al. 2023, 2311.00636).

    A side without a dense basis has the identity, and of its moment the diagonal alone: embeddings, whose one-hot rows
    have a diagonal moment anyway, and sides too large for an eigendecomposition. A parameter that is both an embedding
    and a linear layer (tied) has the sum of two Kronecker products, ``Σ_u B_u ⊗ A_u``; its basis is that of the sums
    ``Σ_u tr(B_u) A_u`` and ``Σ_u tr(A_u) B_u``, its eigenvalues the diagonal of the sum in it.
    """

    measures: ClassVar[tuple[Measure, ...]] = ("covariances",)
    title: ClassVar[str] = "K-FAC"
    # Share of the examples that have a part in the Fisher, see `bounded_damping`; None where that is not known.
    _share: float | None = None

    def __init__(self, shape: Shape, dense: Sides = (True, True)) -> None:
        super().__init__(shape, dense)
        # By side which columns of its basis span a null space, [k, m]: for eigenvalues that are measured.
        self._null: dict[str, Tensor] = {}
        self._spread = False  # whether there were rows without a trace of their own

    def bounded_damping(self, examples: int, directions: int) -> float:
        """Return the default damping, raised until the data could span the dimensions that the block then has.

        The Fisher of ``n`` examples has a rank of ``n`` times the directions of one example's output gradient at most.
        A Kronecker product has full rank however few examples carry it, and where a network has separated its data few
        do: their number is ``(Σ t)² / Σ t²``, ``t`` being the traces of their Fishers. Twice that is allowed, as it is
        half of all for traces that are distributed exponentially. Effective dimensions are ``Σ lam / (lam + λ)``.

        Layers that share weights over positions, and embeddings, are left at the default: there it made scores worse
        (``docs/curvature.md``).

        Args:
            examples: Number of training examples.
            directions: Of one example's output gradient: ``c - 1`` for a softmax over ``c`` classes.
        """
        least = self.damping()
        if self._share is None or not least:
            return least
        most, eigenvalues = 2 * self._share * examples * directions, wide(self.eigenvalues)

        def fits(damping: float) -> bool:
            return float((eigenvalues / (eigenvalues + damping)).sum()) <= most

        if fits(least):
            return least
        # There are no more than `trace / λ` dimensions. Halving the interval 30 times is exact to 1e-6 at least.
        low, high = least, float(eigenvalues.sum()) / most
        for _ in range(30):
            middle = math.sqrt(low * high)
            low, high = (low, middle) if fits(middle) else (middle, high)
        return high

    def part(self) -> None:
        """Measure activations by itself from now on; the sums so far are its own, too."""
        if self.inputs_of is not None:
            sums = self.inputs_of._sums
            self._sums |= {name: total.clone() for name, total in sums.items() if name.startswith(f"{OF_INPUTS}.")}
        super().part()

    def _contributions(self, xs: Sequence[Tensor], gs: Sequence[Rows], examples: int) -> dict[str, Tensor]:
        outputs, inputs = self.dense
        sums: dict[str, Tensor] = {}
        for use, use_xs, use_gs in _by_use(xs, gs):
            if self.inputs_of is None:
                sums[f"activation.{use}"] = added(second_moment(x, diagonal=not inputs) for x in use_xs)
            sums |= {
                f"gradient.{use}": added(second_moment(g, diagonal=not outputs) for g in use_gs),
                # Known to the host: a device has much to launch as it is.
                f"rows.{use}": torch.tensor(float(examples * use_xs[0].shape[2]), dtype=torch.float64),
            }
        if len(xs) == 1 and xs[0].shape[2] == 1 and all(isinstance(g, Tensor) for g in gs):
            return sums | _traces(xs, gs)
        if not self._spread:  # not a number, whatever is added
            unknown = wide_zeros((), xs[0].device).fill_(math.nan)
            sums |= {"traces": unknown, "traces_squared": unknown.clone()}
            self._spread = True
        return sums

    def _decompositions(self, sums: dict[str, Tensor]) -> dict[str, Callable[[], dict[str, Tensor]]]:
        uses, sizes = _uses(sums), dict[str, list[Tensor]]()
        for side in _SIDES:
            counted = zip(uses, _counts(sums, side), strict=True)
            # They weigh the kinds of uses, of which a block that shares its activations has but one.
            sizes[side] = [_trace(sums[f"{side}.{use}"]) / n for use, n in counted] if len(uses) > 1 else []
        sides = zip(_SIDES, reversed(_SIDES), reversed(self.dense), strict=True)
        return {
            side: partial(self._decomposed, sums, side, sizes[other])
            for side, other, dense in sides
            if dense and (side != OF_INPUTS or self.inputs_of is None)
        }

    def _decomposed(self, sums: dict[str, Tensor], side: str, sizes: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return the basis of a side, which columns span a null space, and the diagonal of each use's moment in it."""
        counts, uses = _counts(sums, side), _uses(sums)
        kept = sums[f"{side}.{uses[-1]}"].new_empty(0)  # device and type of what is kept
        # A basis takes the place of its moment before the next is decomposed: memory for one of the two.
        moments = [exact(sums.pop(f"{side}.{use}")).div_(count) for use, count in zip(uses, counts, strict=True)]
        whole = moments[0]
        if len(uses) > 1:  # each use in proportion to the size of its other factor
            whole = added(size * moment for size, moment in zip(sizes, moments, strict=True))
        values, basis = eigenvectors(whole)
        found = {
            f"{side}.basis": basis.to(kept).contiguous(),
            f"{side}.null": null_columns(values, kept.dtype).to(kept.device),
        }
        if "eigenvalues" not in self.measures:
            found[f"{side}.diagonals"] = torch.stack([_diagonal_in(moment, basis) for moment in moments])
        return found

    def _finish(self, sums: dict[str, Tensor]) -> None:
        self._spread = False
        if (squares := float(sums.pop("traces_squared"))) > 0:  # NaN is not
            self._share = float(sums.pop("traces")) ** 2 / squares / float(sums["examples"])
        uses, diagonals = _uses(sums), dict[str, list[Tensor]]()
        for side, dense in zip(_SIDES, reversed(self.dense), strict=True):
            if dense:
                self.tensors[f"{side}_basis"], self._null[side] = sums[f"{side}.basis"], sums[f"{side}.null"]
            if "eigenvalues" in self.measures:
                continue
            if dense:
                diagonals[side] = list(sums[f"{side}.diagonals"])
                continue
            of_uses = zip(uses, _counts(sums, side), strict=True)
            diagonals[side] = [_diagonal_in(exact(sums[f"{side}.{use}"]).div_(count), None) for use, count in of_uses]
        if diagonals:  # otherwise they are measured
            pairs = zip(diagonals["gradient"], diagonals["activation"], strict=True)
            eigenvalues = added(y.unsqueeze(-1) * x.unsqueeze(-2) for y, x in pairs)
            kept = sums["activation.basis" if self.dense[1] else f"activation.{uses[-1]}"]
            self.tensors["eigenvalues"] = eigenvalues.to(kept)


def _uses(sums: Mapping[str, Tensor]) -> list[str]:
    return sorted(name.removeprefix("rows.") for name in sums if name.startswith("rows."))


def _counts(sums: Mapping[str, Tensor], side: str) -> list[Tensor]:
    """Return what a side's moment is a sum over, by use: examples, or all their rows."""
    if side == "activation":
        return [exact(sums["examples"])] * len(_uses(sums))
    # 0 if the layer was never reached
    return [exact(sums[f"rows.{use}"]).clamp(min=1) for use in _uses(sums)]


def _traces(xs: Sequence[Tensor], gs: Sequence[Rows]) -> dict[str, Tensor]:
    """Return the sums of the examples' squared gradient norms and of their squares."""
    traces = wide(added(squared_norms(xs[0], g) for g in gs))
    return {"traces": traces.sum(), "traces_squared": traces.square().sum()}


def _by_use(xs: Sequence[Tensor], gs: Sequence[Rows]) -> Iterator[tuple[str, Sequence[Tensor], Sequence[Rows]]]:
    """Yield the rows of each kind of use: name, activations and output gradients by draw."""
    joined = [g for g in gs if isinstance(g, Joined)]
    if not joined:
        yield ("embedding" if isinstance(gs[0], OneHot) else "linear"), xs, gs
        return
    splits = [joined[0].split(x) for x in xs]
    yield "embedding", [first for first, _ in splits], [joined[0].onehot]
    # Looked-up vectors have gradients that depend on the labels; the activations of a linear map do not.
    yield "linear", [splits[0][1]], [g.dense for g in joined]


def _trace(moment: Tensor) -> Tensor:
    """Return the traces of ``[k, m, m]``, or of diagonals ``[k, m]``, shaped to scale another moment."""
    diagonal = moment if moment.ndim == 2 else moment.diagonal(dim1=-2, dim2=-1)
    return exact(diagonal).sum()


def _diagonal_in(moment: Tensor, basis: Tensor | None) -> Tensor:
    """Return the diagonal ``[k, m]`` of a moment in a basis, never negative."""
    if basis is None:
        return moment if moment.ndim == 2 else moment.diagonal(dim1=-2, dim2=-1)
    return ((moment @ basis) * basis).sum(-2).clamp(min=0)
