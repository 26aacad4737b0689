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
        bags: The bag of every index.
        scales: Factor of every index in its bag (1 / size of the bag for means); None for 1.
    """

    bags: Tensor = torch.empty(0)
    scales: Tensor | None = None

    examples_in_input = False

    def rows(self, gradient: Tensor, n: int, layouts: Layouts) -> tuple[Tensor, OneHot]:
        """Return the gradients of the looked-up vectors ``[1, n, s, i]`` and the one-hot rows of their indices."""
        indices, valid = (
            self._padded(self.input, len(gradient)),
            self._padded(torch.ones_like(self.bags).bool(), len(gradient)),
        )
        # bl, bd -> bld
        vectors = gradient.unsqueeze(1).expand(-1, indices.shape[1], -1)
        if self.scales is not None:
            vectors = vectors * self._padded(self.scales, len(gradient)).unsqueeze(-1).to(vectors.dtype)
        indices, vectors, valid = (layouts.output.by_example(each, n) for each in (indices, vectors, valid))
        return _looked_up(
            indices.reshape(n, -1),
            vectors.reshape(1, n, -1, gradient.shape[-1]),
            len(self.parameters["weight"]),
            self.padding_idx,
            valid.reshape(n, -1),
        )

    def _padded(self, values: Tensor, bags: int) -> Tensor:
        """Lay one value per index out as ``[bags, longest]``, zeros behind the shorter bags."""
        counts = torch.bincount(self.bags, minlength=bags)
        starts = counts.cumsum(0) - counts
        padded = values.new_zeros((bags, max(int(counts.max()), 1)))
        padded[self.bags, torch.arange(len(self.bags), device=self.bags.device) - starts[self.bags]] = values
        return padded


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
    ids, padding, scales = a["input"].long(), _padding_idx(a), a["per_sample_weights"]
    count = len(site.output)
    if ids.ndim == 1:
        starts = (a["offsets"][:-1] if a["include_last_offset"] else a["offsets"]).to(ids.device)
        bags = torch.searchsorted(starts.contiguous(), torch.arange(len(ids), device=ids.device), right=True) - 1
    else:
        bags = torch.arange(count, device=ids.device).repeat_interleave(ids.shape[1])
    ids = ids.flatten()
    if mode == "mean":
        counted = (torch.ones_like(ids) if padding is None else ids != padding).to(site.output.dtype)
        scales = counted / counted.new_zeros(count).index_add_(0, bags, counted).clamp(min=1)[bags]
    return EmbeddingBagCall(ids, roles, padding, bags, None if scales is None else scales.detach().flatten())
