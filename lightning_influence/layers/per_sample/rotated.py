"""Squares of per-example gradients in a basis, where curvature is diagonal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from lightning_influence.layers.per_sample.forming import at_a_time, end_to_end, gradients, scattered
from lightning_influence.layers.per_sample.norms import squared_norms
from lightning_influence.layers.per_sample.products import inner_products
from lightning_influence.layers.rows import OneHot, Rows, added, compact, of_outputs, rotate

RotationForm = Literal["auto", "rotate_first", "form_first"]


@dataclass(frozen=True, eq=False)
class Inverses:
    """``1 / (eigenvalues + damping)``, computed for a part of a block at a time: the whole is as large as its weights.

    Attributes:
        eigenvalues: ``[k, o, i]``.
        dampings: ``[d]``.
    """

    eigenvalues: Tensor
    dampings: Tensor

    def of(self, outputs: slice) -> Tensor:
        """Return those of some outputs, ``[d, k, o, i]``."""
        return (self.eigenvalues[:, outputs] + self.dampings.view(-1, 1, 1, 1)).reciprocal_()

    def at(self, indices: Tensor) -> Iterator[Tensor]:
        """Yield those of the outputs ``[n, s]`` of the only group, ``[n, s, i]``, one damping after the other."""
        picked = self.eigenvalues[0][indices]
        for damping in self.dampings:
            yield (picked + damping).reciprocal_()


Weights: TypeAlias = "Tensor | Inverses"
"""What squares are multiplied with: ``[k, o, i]``, or many at a time, ``[d, k, o, i]``."""


def weighted_squares(x: Tensor, g: Rows, weights: Tensor) -> Tensor:
    """Return ``Σ_koi weights_koi (G_kn)²_oi``, ``[n]``, for weights ``[k, o, i]``."""
    return weighted_rotated_squares(x, g, None, None, weights)


def rotated_squares(
    x: Tensor | Sequence[Tensor],
    gs: Sequence[Rows],
    basis_x: Tensor | None,
    basis_g: Tensor | None,
    *,
    form: RotationForm = "auto",
) -> Tensor:
    """Return the squares of the rotated gradients, summed over examples and draws.

    Args:
        x: Activations ``[k, n, s, i]``, or one per draw.
        gs: Output gradients ``[k, n, s, o]``, one per draw, or one that all draws share.
        basis_x: Orthonormal columns ``[k, i, i]``; None is the identity.
        basis_g: Orthonormal columns ``[k, o, o]``; None is the identity, the only one for one-hot rows.
        form: For tests only, see ``_rotated``.

    Returns:
        ``Σ_n Σ_draws (basis_gᵀ G_kn basis_x)²``, ``[k, o, i]`` (EK-FAC eigenvalues before the mean; George et al.
        2018, 1806.03884).
    """
    if not isinstance(x, Tensor):
        if len(x) > 1:
            each = gs if len(gs) > 1 else [gs[0]] * len(x)
            return added(rotated_squares(a, [g], basis_x, basis_g, form=form) for a, g in zip(x, each, strict=True))
        x = x[0]
    if isinstance(gs[0], OneHot):
        rotated = rotate(x, basis_x)
        return added(scattered(compact(rotated, g).square(), g) for g in gs if isinstance(g, OneHot))
    basis_g = _turning(basis_g)
    if x.shape[2] == 1:
        squares = added(rotate(_dense(g), basis_g)[:, :, 0].square() for g in gs)
        # kno, kni -> koi
        return squares.transpose(-1, -2) @ rotate(x, basis_x)[:, :, 0].square()
    total: Tensor | None = None
    for outputs, chunks in _rotated(x, gs, basis_x, basis_g, form):
        part = added(chunk.square_().sum(1) for chunk in chunks)
        if part.shape[1] == gs[0].shape[3]:
            return part
        total = part.new_empty((len(part), gs[0].shape[3], part.shape[2])) if total is None else total
        total[:, outputs] = part
    assert total is not None
    return total


def weighted_rotated_squares(
    x: Tensor,
    g: Rows,
    basis_x: Tensor | None,
    basis_g: Tensor | None,
    weights: Weights,
    *,
    form: RotationForm = "auto",
) -> Tensor:
    """Return ``Σ_koi weights_koi (basis_gᵀ G_kn basis_x)²_oi`` for every example.

    With ``weights = 1 / (eigenvalues + damping)`` this is the self-influence; nothing is ever rotated back.

    Args:
        x: Activations ``[k, n, s, i]``.
        g: Output gradients ``[k, n, s, o]``.
        basis_x: Orthonormal columns ``[k, i, i]``; None is the identity.
        basis_g: Orthonormal columns ``[k, o, o]``; None is the identity, the only one for one-hot rows.
        weights: ``[k, o, i]``, or many at a time: ``[d, k, o, i]``.
        form: For tests only, see ``_rotated``.

    Returns:
        ``[n]``, or ``[n, d]``; the gradients are rotated once.
    """
    basis_g = _turning(basis_g)
    if isinstance(weights, Tensor) and weights.ndim == 3:
        return weighted_rotated_squares(x, g, basis_x, basis_g, weights.unsqueeze(0), form=form).squeeze(1)
    if isinstance(g, OneHot):
        squares = compact(rotate(x, basis_x), g)[0].square()
        found = weights.at(g.indices) if isinstance(weights, Inverses) else (each[0][g.indices] for each in weights)
        return torch.stack([(squares * each).sum((1, 2)) for each in found], 1)
    if x.shape[2] == 1:
        # kno, dkoi, kni -> nd
        of_g, of_x = rotate(_dense(g), basis_g)[:, :, 0].square(), rotate(x, basis_x)[:, :, 0].square()
        if len(x) == 1 and of_g.shape[2] == 1:  # parameters without rows of their own, as those of norms
            return (of_x[0] @ _of(weights, slice(None))[:, 0, 0].T).mul_(of_g[0])
        parts = _slices(len(x) * x.shape[3], of_g.shape[2])
        return added((of_g[..., part] @ _of(weights, part)).mul_(of_x).sum((1, 3)).T for part in parts)
    parts_of_sums = []
    for outputs, chunks in _rotated(x, [g], basis_x, basis_g, form):
        columns = _columns(_of(weights, outputs))
        parts_of_sums.append(end_to_end([_over_groups(chunk.square_().flatten(2) @ columns) for chunk in chunks]))
    return added(parts_of_sums)


def rotated_scores(
    x: Tensor,
    g: Rows,
    basis_x: Tensor | None,
    basis_g: Tensor | None,
    weights: Weights,
    vector: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return what a scoring pass needs of every example, from one look at its rotated gradient.

    Args:
        x: Activations ``[k, n, s, i]``.
        g: Output gradients ``[k, n, s, o]``.
        basis_x: Orthonormal columns ``[k, i, i]``; None is the identity.
        basis_g: Orthonormal columns ``[k, o, o]``; None is the identity, the only one for one-hot rows.
        weights: ``[k, o, i]``, in the rotated basis.
        vector: ``[k, o, i]``, in the parameter basis.

    Returns:
        ``(squared_norms, weighted_rotated_squares, inner_products)``, each ``[n]``, the last None without a vector.
    """
    weights = weights.unsqueeze(0) if isinstance(weights, Tensor) and weights.ndim == 3 else weights
    if isinstance(g, OneHot) or x.shape[2] == 1:
        inner = None if vector is None else inner_products(x, g, vector)
        return squared_norms(x, g), weighted_rotated_squares(x, g, basis_x, basis_g, weights)[:, 0], inner
    sums: list[tuple[Tensor, Tensor, Tensor | None]] = []  # by part of the outputs
    for outputs, chunks in _rotated(x, [g], basis_x, basis_g, "auto"):
        turned = None
        if vector is not None:
            turned = vector[:, outputs] if basis_g is None else basis_g[..., outputs].mT @ vector
            turned = _columns((turned if basis_x is None else turned @ basis_x).unsqueeze(0))
        column = _columns(_of(weights, outputs))
        norms, weighted, inners = [], [], []
        for chunk in chunks:
            flat = chunk.flatten(2)
            if turned is not None:
                inners.append(_over_groups(flat @ turned)[:, 0])
            flat.square_()
            norms.append(flat.sum((0, 2)))
            weighted.append(_over_groups(flat @ column)[:, 0])
        sums.append((end_to_end(norms), end_to_end(weighted), end_to_end(inners) if inners else None))
    found, scaled, inner_parts = zip(*sums, strict=True)
    return added(found), added(scaled), None if vector is None else added(inner_parts)


def rotated_rows(x: Tensor, g: Rows, basis_x: Tensor | None, basis_g: Tensor | None) -> tuple[Tensor, Rows]:
    """Return the activations and output gradients of the rotated gradients ``basis_gᵀ G_kn basis_x``.

    Args:
        x: Activations ``[k, n, s, i]``.
        g: Output gradients ``[k, n, s, o]``.
        basis_x: Orthonormal columns ``[k, i, i]``; None is the identity.
        basis_g: Orthonormal columns ``[k, o, o]``; None is the identity, the only one for one-hot rows.
    """
    return rotate(x, basis_x), g if basis_g is None else rotate(_dense(g), basis_g)


def _turning(basis: Tensor | None) -> Tensor | None:
    """Return a basis unless it has one direction: squares are the same in it."""
    return None if basis is not None and basis.shape[-1] == 1 else basis


def _over_groups(rows: Tensor) -> Tensor:
    """Add up ``[k, n, d]`` over the groups."""
    return rows[0] if len(rows) == 1 else rows.sum(0)


def _columns(matrices: Tensor) -> Tensor:
    """Return ``[d, k, o, i]`` as columns ``[k, o·i, d]``, to multiply what ``_rotated`` yields."""
    return matrices.flatten(2).permute(1, 2, 0)


def _of(weights: Weights, outputs: slice) -> Tensor:
    """Return the weights of some outputs, ``[d, k, o, i]``."""
    return weights.of(outputs) if isinstance(weights, Inverses) else weights[:, :, outputs]


def _slices(size: int, outputs: int) -> list[slice]:
    """Return parts of so many outputs, of ``size`` scalars each, that a gradient of one example is formed of."""
    step = at_a_time(size)
    return [slice(start, start + step) for start in range(0, outputs, step)]


def _rotated(
    x: Tensor, gs: Sequence[Rows], basis_x: Tensor | None, basis_g: Tensor | None, form: RotationForm
) -> Iterator[tuple[slice, Iterator[Tensor]]]:
    """Yield, by parts of the outputs, what yields rotated gradients for every draw, a few examples at a time.

    These are ``[k, m, o, i]``, to be worked on in place. Layers of ordinary size come in one part: others would be
    as large, for one example, as the layer itself.

    Either side is turned before the gradients are formed or after that, whichever is cheaper: per example, ``d`` draws
    cost ``s·i²`` or ``d·o·i²`` multiplications on the side of the inputs, and ``d·s·o²`` or ``d·i·o²`` on the other.
    """
    (k, _, s, i), o, d = x.shape, gs[0].shape[3], len(gs)
    parts = _slices(k * i, o)
    x_first, g_first = (s <= d * o, s <= i or len(parts) > 1) if form == "auto" else (form == "rotate_first",) * 2
    if basis_g is not None and not g_first:
        parts = [slice(0, o)]
    if x_first:
        x, basis_x = rotate(x, basis_x), None

    def chunks(outputs: slice) -> Iterator[Tensor]:
        for g in gs:
            own_x, rows, after = x, g, None if g_first else basis_g
            if basis_g is not None and g_first:
                rows = rotate(_dense(g), basis_g[..., outputs])
            elif len(parts) > 1:
                own_x, rows = of_outputs(x, g, outputs.start, min(outputs.stop, o))
            for chunk in gradients(own_x, rows):
                if after is not None:
                    chunk = after.mT.unsqueeze(1) @ chunk
                yield chunk if basis_x is None else chunk @ basis_x.unsqueeze(1)

    for outputs in parts:
        yield outputs, chunks(outputs)


def _dense(g: Rows) -> Tensor:
    """Return rows that a basis can turn, or that are one position each: never one-hot ones."""
    if isinstance(g, Tensor):
        return g
    raise TypeError(f"rows of type {type(g).__name__} have an identity basis and more than one position.")
