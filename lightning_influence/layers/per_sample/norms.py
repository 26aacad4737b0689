"""Squared norms of per-example gradients."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from lightning_influence.layers.patches import Activations, Patches, laid_out
from lightning_influence.layers.per_sample.forming import at_a_time, in_buffer
from lightning_influence.layers.rows import Joined, OneHot, Rows, compact

NormForm = Literal["auto", "gram", "pixels", "form"]


def squared_norms(x: Activations, g: Rows, *, form: NormForm = "auto") -> Tensor:
    """Return the squared norm of every per-example gradient.

    Args:
        x: Activations ``[k, n, s, i]``.
        g: Output gradients ``[k, n, s, o]``.
        form: For tests only: ``"gram"`` (``Σ_st (x_s·x_t)(g_s·g_t)``, ``s²(i + o)`` multiplications), ``"pixels"`` (the
            same, the first factor from products of pixels) or ``"form"`` (``s·i·o``); by default the cheapest.

    Returns:
        ``Σ_k ‖G_kn‖²``, ``[n]``.
    """
    if isinstance(g, Tensor) and g.shape[2] > 1:
        form = _cheapest_form(x, g) if form == "auto" else form
        if form != "form":  # knst, knst -> n
            return torch.cat([of_x.mul_(of_g).sum((0, 2, 3)) for of_x, of_g in _pairs(x, g, form)])
    (x,) = laid_out([x])
    if isinstance(g, OneHot):
        return compact(x, g).square().sum((0, 2, 3))
    if isinstance(g, Joined):
        first, second = g.split(x)
        cross = []
        step = at_a_time(first.shape[2] * second.shape[2])
        for start in range(0, len(g.onehot.indices), step):
            some = slice(start, start + step)
            # nst, nst -> n: ⟨Σ_s e_id x_sᵀ, Σ_t g_t x_tᵀ⟩ = Σ_st (x_s·x_t) g_t[id_s]
            products = first[0, some] @ second[0, some].transpose(-1, -2)
            ids = g.onehot.indices[some].unsqueeze(2).expand_as(products)
            cross.append((products * g.dense[0, some].transpose(-1, -2).gather(1, ids)).sum((1, 2)))
        return squared_norms(first, g.onehot) + 2 * torch.cat(cross) + squared_norms(second, g.dense, form=form)
    if g.shape[2] == 1:
        return (x.square().sum(-1) * g.square().sum(-1)).sum((0, 2))
    return torch.cat([chunk.square_().sum((0, 2, 3)) for chunk in in_buffer(x, g)])


def squared_norms_with_bias(x: Activations, g: Tensor) -> tuple[Tensor, Tensor]:
    """Return the squared norms of every example's gradients of a weight and of its bias.

    Args:
        x: Activations ``[k, n, s, i]``, without a bias column.
        g: Output gradients ``[k, n, s, o]``.

    Returns:
        ``Σ_k ‖G_kn‖²`` and ``Σ_k ‖Σ_s g_kns‖²``, each ``[n]``.
    """
    form = _cheapest_form(x, g) if g.shape[2] > 1 else "form"
    if form != "form":  # the Gram matrix of the output gradients tells both
        parts = [(of_x.mul_(of_g).sum((0, 2, 3)), of_g.sum((0, 2, 3))) for of_x, of_g in _pairs(x, g, form)]
        of_weight, of_bias = zip(*parts, strict=True)
        return torch.cat(of_weight), torch.cat(of_bias)
    return squared_norms(x, g, form=form), g.sum(2).square().sum((0, 2))


def _cheapest_form(x: Activations, g: Tensor) -> NormForm:
    k, _, s, i = x.shape
    o = g.shape[3]
    costs: dict[NormForm, float] = {"form": k * s * i * o, "gram": k * s * s * (i + o)}
    if isinstance(x, Patches):
        costs = {form: cost + x.cost() for form, cost in costs.items()}
        costs["pixels"] = k * s * s * o + x.gram_cost()
    return min(costs, key=lambda form: costs[form])


def _pairs(x: Activations, g: Tensor, form: NormForm) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield ``x_s · x_t`` and ``g_s · g_t`` of a few examples at a time, ``[k, m, s, s]``, each a tensor of its own."""
    k, n, s = g.shape[:3]
    rows = x if form == "pixels" else laid_out([x])[0]
    side = math.prod(rows.images.shape[2:]) if isinstance(rows, Patches) else s
    step = at_a_time(k * side * side)
    for start in range(0, n, step):
        some = g[:, start : start + step]
        if isinstance(rows, Patches):
            of_x = rows.of_examples(start, start + step).gram()
        else:
            part = rows[:, start : start + step]
            of_x = part @ part.transpose(-1, -2)
        yield of_x, some @ some.transpose(-1, -2)
