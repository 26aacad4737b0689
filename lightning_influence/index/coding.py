"""What is kept of a gradient: its strongest coordinates in the curvature's eigenbasis, or both its sides.

In the eigenbasis of a block the score of a pair is a sum over coordinates, ``Σ_j (√inverse_j g_qj)(√inverse_j g_zj)``,
and coordinate ``j`` adds ``lam_j / (lam_j + λ)`` to it on average. The largest of all layers are kept. A layer that has
one position an example has gradients of rank one: both sides of these, ``o + i`` numbers, are all of it.

A row holds the kept coordinates, the strongest first, then activations and output gradients of the layers that are kept
whole; each of these parts has a length of 1, and its length is kept apart.

Index legend: ``n`` examples, ``q`` queries, ``d`` kept coordinates, ``k, o, i`` groups, outputs, inputs of a block.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_influence.core.random_streams import OwnStreams
from lightning_influence.curvature.blocks.block import Eigenbasis, Shape
from lightning_influence.curvature.curvature import Curvature
from lightning_influence.gradients.capture import LayerIO
from lightning_influence.layers import per_sample
from lightning_influence.layers.rows import Joined, OneHot, Rows, rotate

# Coordinates that the search may be made of.
_LEADING = 4096
_OVERSAMPLED = 16
# Numbers of queries' gradients that are multiplied at a time.
_CHUNK = 2**22


class OtherRowsError(ValueError):
    """A layer that had one position an example has more of them."""


@dataclass(frozen=True, eq=False)
class Layout:
    """What of which layer stands where in a row.

    Attributes:
        kept: Layer to flat places of its kept coordinates in ``[k, o, i]``, ``[d]``.
        places: Layer to where these stand in a row, ``[d]``.
        whole: The layers that are kept whole, with their shapes, in the order of a row.
        leading: The same to flat places of those of its coordinates that the search is made of.
        prefix: How many of the kept coordinates it is made of, too: the first.
    """

    kept: Mapping[str, Tensor]
    places: Mapping[str, Tensor]
    whole: Mapping[str, Shape] = field(default_factory=dict)
    leading: Mapping[str, Tensor] = field(default_factory=dict)
    prefix: int = 0

    @classmethod
    def planned(cls, curvature: Curvature, shapes: Mapping[str, Shape], width: int, single: Collection[str]) -> Layout:
        """Choose what to keep.

        Args:
            curvature: The curvature.
            shapes: Layer to its shape ``(k, o, i)``.
            width: How many numbers a row may have.
            single: The layers with one position an example: they may take half of the numbers to be kept whole.
        """
        whole, left = {}, width
        sizes = {name: k * (o + i) for name, (k, o, i) in shapes.items() if name in single and o > 1 and i > 1}
        for name in sorted(sizes, key=lambda name: sizes[name]):
            if left - sizes[name] >= width / 2:
                whole[name], left = shapes[name], left - sizes[name]
        kept = _strongest(curvature, [name for name in shapes if name not in whole], left)
        leading = {name: flat for name, (flat, _) in _strongest(curvature, list(shapes), _LEADING).items()}
        prefix = min(sum(len(flat) for name, flat in leading.items() if name not in whole), left)
        return cls(
            {name: flat for name, (flat, _) in kept.items()},
            {name: places for name, (_, places) in kept.items()},
            whole,
            {name: flat for name, flat in leading.items() if name in whole},
            prefix,
        )

    @property
    def coordinates(self) -> int:
        """How many coordinates are kept."""
        return sum(len(places) for places in self.places.values())

    @property
    def width(self) -> int:
        """How many numbers a row has."""
        return self.coordinates + sum(k * (o + i) for k, o, i in self.whole.values())

    @property
    def searched(self) -> int:
        """How many coordinates the search is made of."""
        return self.prefix + sum(map(len, self.leading.values()))

    def sides(self, rows: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Return activations ``[n, k, i]`` and output gradients ``[n, k, o]`` of the layers that are kept whole."""
        found, start = {}, self.coordinates
        for name, (k, o, i) in self.whole.items():
            x, g = rows[:, start : start + k * i], rows[:, start + k * i : start + k * (o + i)]
            found[name] = x.unflatten(1, (k, i)), g.unflatten(1, (k, o))
            start += k * (o + i)
        return found

    def tensors(self) -> dict[str, Tensor]:
        """Return it as tensors by name."""
        found = {f"kept/{name}": flat for name, flat in self.kept.items()}
        found |= {f"places/{name}": places for name, places in self.places.items()}
        found |= {f"whole/{name}": torch.tensor(shape) for name, shape in self.whole.items()}
        found |= {f"leading/{name}": flat for name, flat in self.leading.items()}
        return found

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor], whole: Sequence[str], prefix: int) -> Layout:
        """Read it back; ``whole`` has the order of the layers in a row."""

        def part(kind: str) -> dict[str, Tensor]:
            return {name.removeprefix(f"{kind}/"): t for name, t in tensors.items() if name.startswith(f"{kind}/")}

        shapes = {name: (int(s[0]), int(s[1]), int(s[2])) for name, s in part("whole").items()}
        return cls(part("kept"), part("places"), {name: shapes[name] for name in whole}, part("leading"), prefix)


def _strongest(curvature: Curvature, layers: Sequence[str], count: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the coordinates that add most to scores: by layer flat places and ranks, both by rank."""
    numbers, flats, shares = [], [], []
    for place, name in enumerate(layers):
        basis = curvature.eigenbasis(name)
        assert basis is not None
        # lam / (lam + λ)
        share = 1 - curvature.dampings[name] * basis.inverse.flatten().double().cpu()
        found = share.topk(min(max(count, 0), len(share)))
        numbers.append(torch.full_like(found.indices, place))
        flats.append(found.indices)
        shares.append(found.values)
    if not shares:
        return {}
    order = torch.cat(shares).argsort(descending=True, stable=True)[: max(count, 0)]
    number, flat, rank = torch.cat(numbers)[order], torch.cat(flats)[order], torch.arange(len(order))
    every = {name: (number == place).nonzero().squeeze(1) for place, name in enumerate(layers)}
    return {name: (flat[own], rank[own]) for name, own in every.items() if len(own)}


@dataclass(frozen=True, eq=False)
class CodedQueries:
    """Gradients of queries, ready to be multiplied with rows.

    Attributes:
        kept: Weighted coordinates ``[q, d]``, in the order of a row.
        whole: ``(C + λ)⁻¹ g_q`` in the eigenbasis ``[q, k, o, i]``, of the layers that are kept whole.
        searched: The coordinates that the search is made of ``[q, m]``.
        finite: Which have finite gradients ``[q]``; the others are zero.
        told: What their loss tells of them, ``[q]`` each.
    """

    kept: Tensor
    whole: Mapping[str, Tensor]
    searched: Tensor
    finite: Tensor
    told: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        """Return the number of queries."""
        return len(self.kept)

    def some(self, queries: slice | Tensor) -> CodedQueries:
        """Return some of them."""
        whole = {name: v[queries] for name, v in self.whole.items()}
        told = {name: values[queries] for name, values in self.told.items()}
        return CodedQueries(self.kept[queries], whole, self.searched[queries], self.finite[queries], told)

    @classmethod
    def together(cls, parts: Sequence[CodedQueries]) -> CodedQueries:
        """Put several together."""
        whole = {name: torch.cat([part.whole[name] for part in parts]) for name in parts[0].whole}
        kept, searched, finite = (
            torch.cat([getattr(part, name) for part in parts]) for name in ("kept", "searched", "finite")
        )
        names = set.intersection(*(set(part.told) for part in parts))
        told = {name: torch.cat([part.told[name] for part in parts]) for name in names}
        return cls(kept, whole, searched, finite, told)


class Coder:
    """Turns gradients into rows, and rows into scores.

    Args:
        layout: What stands where.
        curvature: The curvature, fitted.
    """

    def __init__(self, layout: Layout, curvature: Curvature) -> None:
        self.layout = layout
        self._layers: dict[str, _Kept] = {}
        self._bases: dict[str, Eigenbasis] = {}
        self._leading: dict[str, tuple[Tensor, Tensor]] = {}
        for name in [*layout.kept, *layout.whole]:
            basis = curvature.eigenbasis(name)
            assert basis is not None
            if name in layout.kept:
                self._layers[name] = _Kept(basis, layout.kept[name])
            else:
                self._bases[name] = basis
                flat = layout.leading.get(name, torch.zeros(0, dtype=torch.long))
                self._leading[name] = flat, basis.inverse.flatten().cpu()[flat].sqrt()

    def empty(self, n: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return rows of examples of whom no layer is known so far, and the lengths of their parts."""
        rows = torch.zeros(n, self.layout.width, device=device)
        return rows, torch.ones(n, 1 + len(self.layout.whole), device=device)

    def add(self, io: LayerIO, rows: Tensor, lengths: Tensor) -> None:
        """Put a layer of a batch into its rows.

        Raises:
            OtherRowsError: If it is kept whole, and has more than one position.
        """
        if io.name in self._layers:
            places = self.layout.places[io.name].to(rows.device)
            rows[:, places] = self._layers[io.name].coordinates(io).to(rows.dtype)
        elif io.name in self._bases:
            if io.x.shape[2] > 1 or not isinstance(io.gs[0], Tensor):
                raise OtherRowsError(
                    f"the layer {io.name!r} had one position in the examples that were looked at first, and has "
                    f"{io.x.shape[2]} in others"
                )
            x, g = self._bases[io.name].rotated(io.x, io.gs[0])
            assert isinstance(g, Tensor)
            number = 1 + list(self.layout.whole).index(io.name)
            for side, of_rows in zip((x, g), self.layout.sides(rows)[io.name], strict=True):
                numbers = side[:, :, 0].transpose(0, 1)
                length = _length(numbers.flatten(1))
                lengths[:, number] *= length
                of_rows.copy_(numbers / length[:, None, None])

    def finish(self, rows: Tensor, lengths: Tensor) -> None:
        """Give the kept coordinates a length of 1, once all layers have been added."""
        own = rows[:, : self.layout.coordinates]
        if own.shape[1]:
            lengths[:, 0] = _length(own)
            own /= lengths[:, :1]

    def queries(self, io: LayerIO, kept: Tensor, whole: dict[str, Tensor]) -> None:
        """Put a layer of a batch of queries into ``kept: [q, d]`` and ``whole: [q, k, o, i]``, gradients as they are.

        ``coded`` makes queries of them.
        """
        if io.name in self._layers:
            places = self.layout.places[io.name].to(kept.device)
            kept[:, places] = self._layers[io.name].coordinates(io).to(kept.dtype)
        elif io.name in self._bases:
            whole[io.name] = per_sample.formed(*self._bases[io.name].rotated(io.x, io.gs[0])).to(kept)

    def coded(self, kept: Tensor, whole: Mapping[str, Tensor], finite: Tensor) -> CodedQueries:
        """Return queries, ready to be multiplied, on the host."""
        kept, whole = kept.cpu(), {name: v.cpu() for name, v in whole.items()}
        leading = [kept[:, : self.layout.prefix]]
        leading += [whole[name].flatten(1)[:, flat] * root for name, (flat, root) in self._leading.items()]
        weighted = {name: v * self._bases[name].inverse.cpu() for name, v in whole.items()}
        return CodedQueries(kept, weighted, torch.cat(leading, 1), finite.cpu())

    def searched(self, rows: Tensor, lengths: Tensor) -> Tensor:
        """Return the coordinates of rows that the search is made of, ``[n, m]``."""
        leading = [rows[:, : self.layout.prefix] * lengths[:, :1]]
        for number, (name, (x, g)) in enumerate(self.layout.sides(rows).items()):
            flat, root = self._leading[name]
            _, o, i = self.layout.whole[name]
            group, place = flat // (o * i), flat % (o * i)
            found = x[:, group, place % i] * g[:, group, place // i] * root
            leading.append(found * lengths[:, 1 + number, None])
        return torch.cat(leading, 1)

    def scores(self, rows: Tensor, lengths: Tensor, queries: CodedQueries) -> Tensor:
        """Return the scores of queries with rows, ``[q, n]`` in float32; of the whole gradient if all of it is kept."""
        d = self.layout.coordinates
        total = (queries.kept @ rows[:, :d].T) * lengths[:, 0]
        for number, (name, (x, g)) in enumerate(self.layout.sides(rows).items()):
            vectors = queries.whole[name]
            step = max(1, _CHUNK // (len(rows) * vectors.shape[1] * vectors.shape[2] or 1))
            for start in range(0, len(queries), step):
                some = vectors[start : start + step].transpose(0, 1)  # kqoi
                turned = x.transpose(0, 1) @ some.flatten(1, 2).mT  # kni, k(qo)i -> kn(qo)
                # kn(qo) -> knqo, kno -> knq
                part = (turned.unflatten(2, (some.shape[1], -1)) @ g.transpose(0, 1).unsqueeze(-1)).squeeze(-1).sum(0)
                total[start : start + step] += part.T * lengths[:, 1 + number]
        return total

    def scores_of_each(self, rows: Tensor, lengths: Tensor, queries: CodedQueries) -> Tensor:
        """Return the same of each query with rows of its own, ``[q, c, width]`` and ``[q, c, parts]``: ``[q, c]``."""
        d = self.layout.coordinates
        total = (rows[..., :d] @ queries.kept.unsqueeze(2)).squeeze(2) * lengths[..., 0]
        for number, (name, (x, g)) in enumerate(self.layout.sides(rows.flatten(0, 1)).items()):
            x, g = (side.unflatten(0, rows.shape[:2]).transpose(1, 2) for side in (x, g))  # qkci, qkco
            part = ((x @ queries.whole[name].mT) * g).sum((1, 3))
            total += part * lengths[..., 1 + number]
        return total


class _Kept:
    """Some coordinates of a layer's gradients: only the outputs and inputs that they are made of are turned."""

    def __init__(self, basis: Eigenbasis, flat: Tensor) -> None:
        _, o, i = basis.inverse.shape
        flat = flat.to(basis.inverse.device)
        group, place = flat // (o * i), flat % (o * i)
        self._outputs, output = (place // i).unique(return_inverse=True)
        self._inputs, inputs = (place % i).unique(return_inverse=True)
        self._picks = (group * len(self._outputs) + output) * len(self._inputs) + inputs
        self._roots = basis.inverse.flatten()[flat].sqrt()
        sides = (basis.activation_basis, self._inputs, i), (basis.gradient_basis, self._outputs, o)
        self._x, self._g = (b if b is None or len(own) == size else b[..., own].contiguous() for b, own, size in sides)
        # One-hot rows of other outputs fall into a last one, which is dropped.
        self._table = torch.full((o,), len(self._outputs), device=flat.device).scatter_(
            0, self._outputs, torch.arange(len(self._outputs), device=flat.device)
        )

    def coordinates(self, io: LayerIO) -> Tensor:
        """Return them, weighted, ``[n, d]``."""
        x = io.x[..., self._inputs] if self._x is None else rotate(io.x, self._x)
        g = self._turned(io.gs[0])
        parts = []
        for chunk in per_sample.gradients(x, g):
            own = chunk[:, :, : len(self._outputs)].transpose(0, 1).flatten(1)
            parts.append(own[:, self._picks] * self._roots)
        return torch.cat(parts)

    def _turned(self, g: Rows) -> Rows:
        if isinstance(g, OneHot):
            return self._one_hot(g)
        if isinstance(g, Joined):
            dense = g.dense[..., self._outputs]
            return Joined(self._one_hot(g.onehot), torch.cat([dense, torch.zeros_like(dense[..., :1])], -1))
        return g[..., self._outputs] if self._g is None else rotate(g, self._g)

    def _one_hot(self, g: OneHot) -> OneHot:
        return OneHot(self._table[g.indices], len(self._outputs) + 1, kept=g.kept)


def _length(numbers: Tensor) -> Tensor:
    """Return the length of rows; 1 for those without."""
    length: Tensor = numbers.norm(dim=1)
    return length.masked_fill(length == 0, 1.0)


def projection(sample: Tensor, size: int) -> Tensor:
    """Return orthonormal columns ``[m, size]`` that keep most of the products of rows ``[s, m]`` with each other.

    Rows count by the root of their length: neither do the longest decide alone, nor do all count the same.
    """
    scaled = sample / _length(sample).sqrt().unsqueeze(1)
    size = min(size, *sample.shape)
    with OwnStreams():
        _, _, columns = torch.svd_lowrank(scaled, min(size + _OVERSAMPLED, *sample.shape), niter=4)
    found: Tensor = columns[:, :size].contiguous()
    return found
