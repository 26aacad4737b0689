"""Per-example gradient algebra without the gradients.

Every function takes activations ``x: [k, n, s, i]`` and output gradients ``g: [k, n, s, o]`` of one block (see
``layers``) and returns something about the per-example gradients ``G_kn = Σ_s g_kns x_knsᵀ``, ``[o, i]``, choosing
the cheapest exact form. With one position (``s = 1``) the gradient is an outer product and no ``[n, o, i]`` tensor
ever exists; otherwise gradients are formed for a few examples at a time.

Index legend: ``k`` groups, ``n`` examples, ``s``/``t`` positions, ``i`` inputs, ``o`` outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

# Scalars of formed gradients held at a time: 16 MiB in float32, about what stays in cache between two uses.
_CHUNK_ELEMENTS = 2**22

NormForm = Literal["auto", "gram", "form"]
RotationForm = Literal["auto", "rotate_first", "form_first"]


def squared_norms(x: Tensor, g: Tensor, *, form: NormForm = "auto") -> Tensor:
    """Return the squared norm of every per-example gradient.

    Args:
        x: Activations ``[k, n, s, i]``.
        g: Output gradients ``[k, n, s, o]``.
        form: For tests only: ``"gram"`` (``Σ_st (x_s·x_t)(g_s·g_t)``, ``s²(i + o)`` multiplications) or ``"form"``
            (``s·i·o``); by default the cheaper one.

    Returns:
        ``Σ_k ‖G_kn‖²``, ``[n]``.
    """
    s, i, o = x.shape[2], x.shape[3], g.shape[3]
    if s == 1:
        return (x.square().sum(-1) * g.square().sum(-1)).sum((0, 2))
    if form == "gram" or (form == "auto" and s * (i + o) < i * o):
        # knst, knst -> n
        return ((x @ x.transpose(-1, -2)) * (g @ g.transpose(-1, -2))).sum((0, 2, 3))
    return torch.cat([chunk.square().sum((0, 2, 3)) for chunk in gradients(x, g)])


def gradients(x: Tensor, g: Tensor) -> Iterator[Tensor]:
    """Yield the per-example gradients a few examples at a time, each ``[k, m, o, i]``, in order."""
    k, n, _, i = x.shape
    step = max(1, _CHUNK_ELEMENTS // (k * i * g.shape[3]))
    for start in range(0, n, step):
        # kmso, kmsi -> kmoi
        yield g[:, start : start + step].transpose(-1, -2) @ x[:, start : start + step]


def summed_gradient(x: Tensor, g: Tensor) -> Tensor:
    """Return the sum over examples of their gradients, ``[k, o, i]``."""
    if x.shape[2] == 1:
        return g[:, :, 0].transpose(-1, -2) @ x[:, :, 0]
    # One product per example instead of one over all rows: patches lie transposed in memory, and a copy costs more.
    return torch.stack([chunk.sum(1) for chunk in gradients(x, g)]).sum(0)


def summed_squares(x: Tensor, gs: Sequence[Tensor]) -> Tensor:
    """Return the elementwise squares of the gradients, summed over examples and draws, ``[k, o, i]``."""
    if x.shape[2] == 1:
        squares = torch.stack([g[:, :, 0].square() for g in gs]).sum(0)
        return squares.transpose(-1, -2) @ x[:, :, 0].square()
    return torch.stack([chunk.square().sum(1) for g in gs for chunk in gradients(x, g)]).sum(0)


def weighted_squares(x: Tensor, g: Tensor, weights: Tensor) -> Tensor:
    """Return ``Σ_koi weights_koi (G_kn)²_oi``, ``[n]``.

    Args:
        x: Activations ``[k, n, s, i]``.
        g: Output gradients ``[k, n, s, o]``.
        weights: ``[k, o, i]``.
    """
    if x.shape[2] == 1:
        # kno, koi, kni -> n
        return ((g[:, :, 0].square() @ weights) * x[:, :, 0].square()).sum((0, 2))
    return torch.cat([(chunk.square() * weights.unsqueeze(1)).sum((0, 2, 3)) for chunk in gradients(x, g)])


def inner_products(x: Tensor, g: Tensor, matrix: Tensor) -> Tensor:
    """Return the inner product of every per-example gradient with one matrix.

    Args:
        x: Activations ``[k, n, s, i]``.
        g: Output gradients ``[k, n, s, o]``.
        matrix: ``[k, o, i]``.

    Returns:
        ``Σ_ks g_knsᵀ matrix_k x_kns``, ``[n]``.
    """
    return (rotate(x, matrix.transpose(-1, -2)) * g).sum((0, 2, 3))


def second_moment(rows: Tensor) -> Tensor:
    """Return ``Σ_ns v_ns v_nsᵀ`` for ``rows: [k, n, s, i]``: ``[k, i, i]``."""
    k, n, s, i = rows.shape
    if s == 1 or rows.is_contiguous():
        flat = rows.reshape(k, n * s, i)
        return flat.transpose(-1, -2) @ flat
    columns = rows.transpose(-1, -2)
    if k == 1:
        return torch.addbmm(rows.new_zeros((i, i)), columns[0], rows[0]).unsqueeze(0)
    flat = columns.transpose(1, 2).reshape(k, i, n * s)
    return flat @ flat.transpose(-1, -2)


def rotate(rows: Tensor, basis: Tensor) -> Tensor:
    """Multiply every row by a matrix: ``[k, n, s, i]`` times ``[k, i, j]`` is ``[k, n, s, j]``."""
    k, n, s, i = rows.shape
    if s == 1 or rows.is_contiguous():
        return torch.bmm(rows.reshape(k, n * s, i), basis).view(k, n, s, -1)
    # Patches lie as [n, i, s] in memory: multiply from the left there rather than copy them.
    return (basis.transpose(-1, -2).unsqueeze(1) @ rows.transpose(-1, -2)).transpose(-1, -2)


def rotated_squares(
    x: Tensor, gs: Sequence[Tensor], basis_x: Tensor, basis_g: Tensor, *, form: RotationForm = "auto"
) -> Tensor:
    """Return the squares of the rotated gradients, summed over examples and draws.

    Args:
        x: Activations ``[k, n, s, i]``.
        gs: Output gradients ``[k, n, s, o]``, one per draw.
        basis_x: Orthonormal columns ``[k, i, i]``.
        basis_g: Orthonormal columns ``[k, o, o]``.
        form: For tests only, see ``_rotated``.

    Returns:
        ``Σ_n Σ_draws (basis_gᵀ G_kn basis_x)²``, ``[k, o, i]`` (EK-FAC eigenvalues before the mean; George et al.
        2018, 1806.03884).
    """
    if x.shape[2] == 1:
        squares = torch.stack([rotate(g, basis_g)[:, :, 0].square() for g in gs]).sum(0)
        # kno, kni -> koi
        return squares.transpose(-1, -2) @ rotate(x, basis_x)[:, :, 0].square()
    return torch.stack([chunk.square().sum(1) for chunk in _rotated(x, gs, basis_x, basis_g, form)]).sum(0)


def weighted_rotated_squares(
    x: Tensor, g: Tensor, basis_x: Tensor, basis_g: Tensor, weights: Tensor, *, form: RotationForm = "auto"
) -> Tensor:
    """Return ``Σ_koi weights_koi (basis_gᵀ G_kn basis_x)²_oi`` for every example.

    With ``weights = 1 / (eigenvalues + damping)`` this is the self-influence; nothing is ever rotated back.

    Args:
        x: Activations ``[k, n, s, i]``.
        g: Output gradients ``[k, n, s, o]``.
        basis_x: Orthonormal columns ``[k, i, i]``.
        basis_g: Orthonormal columns ``[k, o, o]``.
        weights: ``[k, o, i]``.
        form: For tests only, see ``_rotated``.

    Returns:
        ``[n]``.
    """
    if x.shape[2] == 1:
        # kno, koi, kni -> n
        squares = rotate(g, basis_g)[:, :, 0].square()
        return ((squares @ weights) * rotate(x, basis_x)[:, :, 0].square()).sum((0, 2))
    scales = weights.unsqueeze(1)
    chunks = _rotated(x, [g], basis_x, basis_g, form)
    return torch.cat([chunk.square_().mul_(scales).sum((0, 2, 3)) for chunk in chunks])


def rotated_scores(
    x: Tensor, g: Tensor, basis_x: Tensor, basis_g: Tensor, weights: Tensor, vector: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return what a scoring pass needs of every example, from one look at its rotated gradient.

    Args:
        x: Activations ``[k, n, s, i]``.
        g: Output gradients ``[k, n, s, o]``.
        basis_x: Orthonormal columns ``[k, i, i]``.
        basis_g: Orthonormal columns ``[k, o, o]``.
        weights: ``[k, o, i]``, in the rotated basis.
        vector: ``[k, o, i]``, in the parameter basis.

    Returns:
        ``(squared_norms, weighted_rotated_squares, inner_products)``, each ``[n]``, the last None without a vector.
    """
    if x.shape[2] == 1:
        inner = None if vector is None else inner_products(x, g, vector)
        return squared_norms(x, g), weighted_rotated_squares(x, g, basis_x, basis_g, weights), inner
    turned = None if vector is None else (basis_g.transpose(-1, -2) @ vector @ basis_x).unsqueeze(1)
    norms, weighted, inners = [], [], []
    for chunk in _rotated(x, [g], basis_x, basis_g, "auto"):
        if turned is not None:
            inners.append((chunk * turned).sum((0, 2, 3)))
        squares = chunk.square_()
        norms.append(squares.sum((0, 2, 3)))
        weighted.append(squares.mul_(weights.unsqueeze(1)).sum((0, 2, 3)))
    return torch.cat(norms), torch.cat(weighted), torch.cat(inners) if inners else None


def _rotated(x: Tensor, gs: Sequence[Tensor], basis_x: Tensor, basis_g: Tensor, form: RotationForm) -> Iterator[Tensor]:
    """Yield rotated gradients ``[k, m, o, i]`` for every draw, a few examples at a time.

    Per example, ``d`` draws cost ``s·i² + d·s·o² + d·s·o·i`` multiplications when rows are rotated first, and
    ``d·s·o·i + d·o·i·(o + i)`` when gradients are formed first.
    """
    s, i, o, d = x.shape[2], x.shape[3], gs[0].shape[3], len(gs)
    if form == "auto":
        form = "rotate_first" if s * (i * i + d * o * o) < d * o * i * (o + i) else "form_first"
    if form == "rotate_first":
        x = rotate(x, basis_x)
        for g in gs:
            yield from gradients(x, rotate(g, basis_g))
        return
    left, right = basis_g.transpose(-1, -2).unsqueeze(1), basis_x.unsqueeze(1)
    for g in gs:
        for chunk in gradients(x, g):
            yield left @ chunk @ right
