"""Rows looked up in a weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_influence.layers.call import Call, Layouts
from lightning_influence.layers.registry import reads
from lightning_influence.layers.rows import OneHot
from lightning_influence.layers.site import NotSeparableError, NotUnderstoodError, Site


@dataclass(frozen=True, eq=False)
class EmbeddingCall(Call):
    """Vectors looked up by index: a linear layer on one-hot rows, with the roles of input and gradient exchanged.

    Attributes:
        padding_idx: Index whose vector gets no gradient.
    """

    padding_idx: int | None = None

    matrix_roles = frozenset({"weight"})
    kind = "embedding"
    title = "an embedding"

    def rows(self, gradient: Tensor, n: int, layouts: Layouts) -> tuple[Tensor, OneHot]:
        """Return the gradients of the looked-up vectors ``[1, n, s, i]`` and the one-hot rows of their indices."""
        indices = layouts.input.by_example(self.input, n).reshape(n, -1)
        vectors = layouts.output.by_example(gradient, n).reshape(1, n, -1, gradient.shape[-1])
        return _looked_up(indices, vectors, len(self.parameters["weight"]), self.padding_idx)


@dataclass(frozen=True, eq=False)
class EmbeddingBagCall(EmbeddingCall):
    """Sums or means of looked-up vectors, one bag per row of the output.

    Attributes:
        scales: Factor of every index in its bag, shaped like ``input`` (1 / size of the bag for means).
        bags: For inputs with ``offsets``: the bag of every index. None if every row of ``input`` is a bag.
    """

    scales: Tensor | None = None
    bags: Tensor | None = None

    @property
    def examples_in_input(self) -> bool:
        """Whether every row of the input is a bag."""
        return self.bags is None

    def rows(self, gradient: Tensor, n: int, layouts: Layouts) -> tuple[Tensor, OneHot]:
        """Return the gradients of the looked-up vectors ``[1, n, s, i]`` and the one-hot rows of their indices."""
        size = len(self.parameters["weight"])
        if self.bags is None:
            indices, scales = self.input, self.scales
            valid = torch.ones_like(indices, dtype=torch.bool)
        else:
            indices, scales, valid = self._padded(len(gradient))
        # bl, bd -> bld
        vectors = gradient.unsqueeze(1).expand(-1, indices.shape[1], -1)
        if scales is not None:
            vectors = vectors * scales.unsqueeze(-1).to(vectors.dtype)
        of_bags = layouts.output
        picked = of_bags.by_example(indices, n).reshape(n, -1)
        flat = of_bags.by_example(vectors, n).reshape(1, n, -1, gradient.shape[-1])
        return _looked_up(picked, flat, size, self.padding_idx, of_bags.by_example(valid, n).reshape(n, -1))

    def _padded(self, bags: int) -> tuple[Tensor, Tensor | None, Tensor]:
        """Lay bags of different sizes out as ``[bags, longest]``."""
        assert self.bags is not None
        counts = torch.bincount(self.bags, minlength=bags)
        longest = max(int(counts.max()), 1)
        starts = counts.cumsum(0) - counts
        place = torch.arange(len(self.bags), device=self.bags.device) - starts[self.bags]
        indices = self.input.new_zeros((bags, longest))
        valid = torch.zeros_like(indices, dtype=torch.bool)
        indices[self.bags, place], valid[self.bags, place] = self.input, True
        if self.scales is None:
            return indices, None, valid
        scales = self.scales.new_zeros((bags, longest))
        scales[self.bags, place] = self.scales
        return indices, scales, valid


def _looked_up(
    indices: Tensor, vectors: Tensor, size: int, padding_idx: int | None, kept: Tensor | None = None
) -> tuple[Tensor, OneHot]:
    if padding_idx is not None:
        real = indices != padding_idx
        kept = real if kept is None else kept & real
    if kept is not None:
        vectors = torch.where(kept.view(1, *kept.shape, 1), vectors, 0)
    return vectors, OneHot(indices, size, kept=kept)


@reads(F.embedding)
def _read_embedding(site: Site) -> Call:
    a = site.bind("input weight padding_idx max_norm norm_type scale_grad_by_freq sparse")
    _check_embedding(a)
    return EmbeddingCall(a["input"], {"weight": a["weight"]}, _padding_idx(a))


def _check_embedding(a: Mapping[str, Any]) -> None:
    if a["max_norm"] is not None:
        raise NotSeparableError("in an embedding with `max_norm`, which changes its weights in every forward pass")
    if a["scale_grad_by_freq"]:
        raise NotSeparableError("in an embedding with `scale_grad_by_freq`, whose gradients depend on the batch")


def _padding_idx(a: Mapping[str, Any]) -> int | None:
    index = a["padding_idx"]
    return None if index is None else int(index) % len(a["weight"])


@reads(Tensor.__getitem__)
def _read_getitem(site: Site) -> Call:
    weight, index = site.args
    if isinstance(index, tuple) and len(index) == 1:
        (index,) = index
    if not isinstance(index, Tensor) or index.dtype not in (torch.int64, torch.int32) or weight.ndim != 2:
        raise NotUnderstoodError("in an indexing that is not a look-up of rows")
    return EmbeddingCall(index.long() % len(weight), {"weight": weight})


@reads(F.embedding_bag)
def _read_embedding_bag(site: Site) -> Call:
    names = (
        "input weight offsets max_norm norm_type scale_grad_by_freq mode sparse per_sample_weights include_last_offset"
        " padding_idx"
    )
    a = site.bind(names)
    _check_embedding(a)
    roles = site.roles(a, "embedding_bag", weight="weight")
    mode = a["mode"] or "mean"
    if mode == "max":
        raise NotUnderstoodError("in an embedding bag with `mode='max'`")
    ids, offsets, padding = a["input"].long(), a["offsets"], _padding_idx(a)
    scales = None if a["per_sample_weights"] is None else a["per_sample_weights"].detach()
    bags: Tensor | None = None
    counted = (
        torch.ones_like(ids, dtype=site.output.dtype) if padding is None else (ids != padding).to(site.output.dtype)
    )
    if ids.ndim == 1:
        starts = (offsets[:-1] if a["include_last_offset"] else offsets).to(ids.device)
        bags = torch.searchsorted(starts.contiguous(), torch.arange(len(ids), device=ids.device), right=True) - 1
        sizes = torch.zeros(len(starts), dtype=site.output.dtype, device=ids.device).index_add_(0, bags, counted)[bags]
    else:
        sizes = counted.sum(1, keepdim=True)
    if mode == "mean":
        scales = counted / sizes.clamp(min=1)
    return EmbeddingBagCall(ids, roles, padding, scales, bags)
