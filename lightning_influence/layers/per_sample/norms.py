"""Squared norms of per-example gradients."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lightning_influence.layers.per_sample.forming import at_a_time, end_to_end, gradients
from lightning_influence.layers.rows import Joined, OneHot, Rows, compact

NormForm = Literal["auto", "gram", "form"]


def squared_norms(x: Tensor, g: Rows, *, form: NormForm = "auto") -> Tensor:
    """Return the squared norm of every per-example gradient.

    Args:
        x: Activations ``[k, n, s, i]``.
        g: Output gradients ``[k, n, s, o]``.
        form: For tests only: ``"gram"`` (``Σ_st (x_s·x_t)(g_s·g_t)``, ``s²(i + o)`` multiplications) or ``"form"``
            (``s·i·o``); by default the cheaper one.

    Returns:
        ``Σ_k ‖G_kn‖²``, ``[n]``.
    """
    if isinstance(g, Tensor) and (s := g.shape[2]) > 1:
        (k, _, _, i), o = x.shape, g.shape[3]
        if form == "gram" or (form == "auto" and s * (i + o) < i * o):
            step = at_a_time(k * s * s)
            pairs = zip(x.split(step, 1), g.split(step, 1), strict=True)
            # knst, knst -> n
            return end_to_end([(a @ a.mT).mul_(b @ b.mT).sum((0, 2, 3)) for a, b in pairs])
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
        of_g = g[..., 0] if g.shape[3] == 1 else torch.linalg.vector_norm(g, dim=-1)
        lengths: Tensor = (torch.linalg.vector_norm(x, dim=-1) * of_g).square_()
        return lengths[0, :, 0] if len(x) == 1 else lengths.sum((0, 2))
    return end_to_end([chunk.square_().sum((0, 2, 3)) for chunk in gradients(x, g)])
