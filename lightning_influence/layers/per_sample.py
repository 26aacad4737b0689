"""Per-example gradient algebra without the gradients.

Every function takes activations ``x: [k, n, s, i]`` and output gradients ``g: [k, n, s, o]`` of one block (see
``layers``) and returns something about the per-example gradients ``G_kn = Σ_s g_kns x_knsᵀ``, ``[o, i]``, choosing
the cheapest exact form. With one position (``s = 1``) the gradient is an outer product and no ``[n, o, i]`` tensor
ever exists; with one-hot rows ``g`` (embeddings, see ``rows``) only the rows that an example uses do; otherwise
gradients are formed for a few examples at a time.

Index legend: ``k`` groups, ``n`` examples, ``s``/``t`` positions, ``i`` inputs, ``o`` outputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from lightning_influence.layers.patches import Activations, Patches
from lightning_influence.layers.rows import Joined, OneHot, Rows, added, compact, rotate

# Scalars of formed gradients held at a time: 16 MiB in float32.
_CHUNK_ELEMENTS = 2**22
# The same where they are used up at once, in a buffer that is filled again: it stays in a processor's cache.
_CACHED_ELEMENTS = 2**20

NormForm = Literal["auto", "gram", "pixels", "form"]
RotationForm = Literal["auto", "rotate_first", "form_first"]


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
    if isinstance(g, OneHot):
        return compact(_in_rows(x), g).square().sum((0, 2, 3))
    if isinstance(g, Joined):
        first, second = g.split(_in_rows(x))
        # nst, nst -> n: ⟨Σ_s e_id x_sᵀ, Σ_t g_t x_tᵀ⟩ = Σ_st (x_s·x_t) g_t[id_s]
        products = first[0] @ second[0].transpose(-1, -2)
        picked = g.dense[0].transpose(-1, -2).gather(1, g.onehot.indices.unsqueeze(2).expand_as(products))
        cross = (products * picked).sum((1, 2))
        return squared_norms(first, g.onehot) + 2 * cross + squared_norms(second, g.dense, form=form)
    if g.shape[2] == 1:
        return (_in_rows(x).square().sum(-1) * g.square().sum(-1)).sum((0, 2))
    form = _norm_form(x, g) if form == "auto" else form
    if form == "form":
        return torch.cat([chunk.square_().sum((0, 2, 3)) for chunk in _formed(_in_rows(x), g)])
    # knst, knst -> n
    return torch.cat([of_x.mul_(of_g).sum((0, 2, 3)) for of_x, of_g in _pairs(x, g, form)])


def squared_norms_with_bias(x: Activations, g: Tensor) -> tuple[Tensor, Tensor]:
    """Return the squared norms of every example's gradients of a weight and of its bias.

    Args:
        x: Activations ``[k, n, s, i]``, without a bias column.
        g: Output gradients ``[k, n, s, o]``.

    Returns:
        ``Σ_k ‖G_kn‖²`` and ``Σ_k ‖Σ_s g_kns‖²``, each ``[n]``.
    """
    form = _norm_form(x, g) if g.shape[2] > 1 else "form"
    if form != "form":  # the Gram matrix of the output gradients tells both
        parts = [(of_x.mul_(of_g).sum((0, 2, 3)), of_g.sum((0, 2, 3))) for of_x, of_g in _pairs(x, g, form)]
        of_weight, of_bias = zip(*parts, strict=True)
        return torch.cat(of_weight), torch.cat(of_bias)
    return squared_norms(x, g, form=form), g.sum(2).square().sum((0, 2))


def _norm_form(x: Activations, g: Tensor) -> NormForm:
    """Return the cheapest way to squared norms."""
    k, _, s, i = x.shape
    o = g.shape[3]
    laid_out = x.cost() if isinstance(x, Patches) else 0.0
    costs: dict[NormForm, float] = {"form": k * s * i * o + laid_out, "gram": k * s * s * (i + o) + laid_out}
    if isinstance(x, Patches):
        costs["pixels"] = k * s * s * o + x.gram_cost()
    return min(costs, key=lambda form: costs[form])


def _pairs(x: Activations, g: Tensor, form: NormForm) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield ``x_s · x_t`` and ``g_s · g_t`` of a few examples at a time, ``[k, m, s, s]``, each a tensor of its own."""
    k, n, s = g.shape[:3]
    pixels = isinstance(x, Patches) and form == "pixels"
    rows = x if pixels else _in_rows(x)
    side = math.prod(rows.images.shape[2:]) if isinstance(rows, Patches) else s
    step = max(1, _CHUNK_ELEMENTS // (k * side * side))
    for start in range(0, n, step):
        some = g[:, start : start + step]
        if isinstance(rows, Patches):
            of_x = rows.of_examples(start, start + step).gram()
        else:
            part = rows[:, start : start + step]
            of_x = part @ part.transpose(-1, -2)
        yield of_x, some @ some.transpose(-1, -2)


def _in_rows(x: Activations) -> Tensor:
    return x.laid_out() if isinstance(x, Patches) else x


def gradients(x: Tensor, g: Rows) -> Iterator[Tensor]:
    """Yield the per-example gradients a few examples at a time, each ``[k, m, o, i]``, in order."""
    k, n, _, i = x.shape
    o = g.shape[3]
    step = max(1, _CHUNK_ELEMENTS // (k * i * o))
    if isinstance(g, (OneHot, Joined)):
        onehot, x, dense, of_dense = (g, x, None, x) if isinstance(g, OneHot) else (g.onehot, *_parts(x, g))
        for start in range(0, n, step):
            ids = onehot.indices[start : start + step]
            offset = torch.arange(len(ids), device=ids.device).unsqueeze(1) * o
            if dense is None:
                chunk = x.new_zeros((1, len(ids), o, i))
            else:
                chunk = dense[:, start : start + step].transpose(-1, -2) @ of_dense[:, start : start + step]
            flat = x[0, start : start + step].reshape(-1, i)
            chunk.view(-1, i).index_add_(0, (ids + offset).reshape(-1), flat)
            yield chunk
        return
    for start in range(0, n, step):
        # kmso, kmsi -> kmoi
        yield g[:, start : start + step].transpose(-1, -2) @ x[:, start : start + step]


def _formed(x: Tensor, g: Rows, *, inputs_first: bool = True, elements: int | None = None) -> Iterator[Tensor]:
    """Yield per-example gradients, so many elements at a time, ``[k, m, i, o]``: each valid until the next one.

    Inputs first, as the bias makes their number odd, and rows of an even length in memory are written faster; or
    ``[k, m, o, i]``, which other matrices are laid out like.
    """
    if not isinstance(g, Tensor):
        yield from (chunk.transpose(-1, -2) if inputs_first else chunk for chunk in gradients(x, g))
        return
    k, n = x.shape[:2]
    # kmsi, kmso -> kmio
    left, right = (x, g) if inputs_first else (g, x)
    rows, columns = left.shape[3], right.shape[3]
    step = min(n, max(1, (elements or _elements(x)) // (k * rows * columns)))
    buffer = torch.empty((k, step, rows, columns), dtype=torch.result_type(x, g), device=x.device)
    for start in range(0, n, step):
        some, others = left[:, start : start + step], right[:, start : start + step]
        yield torch.matmul(some.transpose(-1, -2), others, out=buffer[:, : some.shape[1]])


def _elements(x: Tensor) -> int:
    return _CACHED_ELEMENTS if x.device.type == "cpu" else _CHUNK_ELEMENTS


def formed(x: Tensor, g: Rows) -> Tensor:
    """Return all per-example gradients at once, ``[n, k, o, i]``; for queries and small networks."""
    if isinstance(g, Tensor) and x.shape[2] == 1:
        # knso, knsi -> knoi: in one go, as putting chunks together takes a copy
        return (g.transpose(-1, -2) @ x).transpose(0, 1).contiguous()
    return torch.cat([chunk.transpose(0, 1) for chunk in gradients(x, g)])


def _parts(x: Tensor, g: Joined) -> tuple[Tensor, Tensor, Tensor]:
    """Return the activations of the one-hot rows, the dense rows and their activations."""
    first, second = g.split(x)
    return first, g.dense, second


def _added(x: Tensor, g: OneHot) -> Tensor:
    """Return ``Σ_ns e_id x_nsᵀ``, ``[1, o, i]``."""
    i = x.shape[3]
    return x.new_zeros((1, g.size, i)).index_add_(1, g.indices.reshape(-1), x.reshape(1, -1, i))


def summed_gradient(x: Tensor, g: Rows) -> Tensor:
    """Return the sum over examples of their gradients, ``[k, o, i]``."""
    if isinstance(g, OneHot):
        return _added(x, g)
    if isinstance(g, Joined):
        first, second = g.split(x)
        return _added(first, g.onehot) + summed_gradient(second, g.dense)
    if x.shape[2] == 1:
        return g[:, :, 0].transpose(-1, -2) @ x[:, :, 0]
    # One product per example instead of one over all rows: patches lie transposed in memory, and a copy costs more.
    return added(chunk.sum(1) for chunk in gradients(x, g))


def summed_squares(x: Tensor | Sequence[Tensor], gs: Sequence[Rows]) -> Tensor:
    """Return the elementwise squares of the gradients, summed over examples and draws, ``[k, o, i]``."""
    return rotated_squares(x, gs, None, None)


def weighted_squares(x: Tensor, g: Rows, weights: Tensor) -> Tensor:
    """Return ``Σ_koi weights_koi (G_kn)²_oi``, ``[n]``.

    Args:
        x: Activations ``[k, n, s, i]``.
        g: Output gradients ``[k, n, s, o]``.
        weights: ``[k, o, i]``.
    """
    return weighted_rotated_squares(x, g, None, None, weights)


def inner_products(x: Tensor, g: Rows, matrix: Tensor) -> Tensor:
    """Return the inner product of every per-example gradient with one matrix.

    Args:
        x: Activations ``[k, n, s, i]``.
        g: Output gradients ``[k, n, s, o]``.
        matrix: ``[k, o, i]``.

    Returns:
        ``Σ_ks g_knsᵀ matrix_k x_kns``, ``[n]``.
    """
    if isinstance(g, OneHot):
        return (x[0] * matrix[0][g.indices]).sum((1, 2))
    if isinstance(g, Joined):
        first, second = g.split(x)
        return inner_products(first, g.onehot, matrix) + inner_products(second, g.dense, matrix)
    return (rotate(x, matrix.transpose(-1, -2)) * g).sum((0, 2, 3))


def products(x: Tensor, g: Rows, vectors: Tensor) -> Tensor:
    """Return the inner products of every per-example gradient with many vectors.

    Args:
        x: Activations ``[k, n, s, i]``.
        g: Output gradients ``[k, n, s, o]``.
        vectors: ``[q, k, o, i]``.

    Returns:
        ``[n, q]``.
    """
    if isinstance(g, Joined):
        first, second = g.split(x)
        return products(first, g.onehot, vectors) + products(second, g.dense, vectors)
    if isinstance(g, OneHot):
        step = max(1, _CHUNK_ELEMENTS // (len(vectors) * x.shape[2] * x.shape[3]))
        parts = []
        for start in range(0, x.shape[1], step):
            picked = vectors[:, 0][:, g.indices[start : start + step]]  # qnsi
            parts.append(torch.einsum("nsi,qnsi->nq", x[0, start : start + step], picked))
        return torch.cat(parts)
    if x.shape[2] == 1:
        return _bilinear(x[:, :, 0], g[:, :, 0], vectors)
    # One matrix product with all vectors per chunk: forming the gradients costs a q-th of it. All vectors go through
    # the cache for every chunk, so these are large.
    flat = vectors.flatten(1).T
    chunks = _formed(x, g, inputs_first=False, elements=_CHUNK_ELEMENTS)
    return torch.cat([chunk.transpose(0, 1).flatten(1) @ flat for chunk in chunks])


def _bilinear(x: Tensor, g: Tensor, vectors: Tensor) -> Tensor:
    """Return ``Σ_k g_knᵀ v_qk x_kn``, ``[n, q]``, from ``[k, n, i]``, ``[k, n, o]`` and ``[q, k, o, i]``.

    As many multiplications as with formed gradients, which are larger than what stands here in their place. A few
    vectors at a time, so that all examples meet them while they are in the cache.
    """
    (k, n, i), o = x.shape, g.shape[2]
    step = max(1, _elements(x) // (k * n * o))
    parts = []
    for start in range(0, len(vectors), step):
        some = vectors[start : start + step]
        # kni, kri -> knr: r counts vectors and outputs
        turned = x @ some.transpose(0, 1).reshape(k, -1, i).transpose(-1, -2)
        # knqo, knoj -> knq
        parts.append((turned.view(k, n, -1, o) @ g.unsqueeze(-1)).squeeze(-1).sum(0))
    return torch.cat(parts, 1) if parts else x.new_zeros((n, 0))


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
        return added(_added(compact(rotated, g).square(), g) for g in gs if isinstance(g, OneHot))
    if x.shape[2] == 1:
        squares = added(rotate(_dense(g), basis_g)[:, :, 0].square() for g in gs)
        # kno, kni -> koi
        return squares.transpose(-1, -2) @ rotate(x, basis_x)[:, :, 0].square()
    squares = added(chunk.square_().sum(1) for chunk in _rotated(x, gs, basis_x, basis_g, form))
    return squares.transpose(-1, -2).contiguous()


def weighted_rotated_squares(
    x: Tensor,
    g: Rows,
    basis_x: Tensor | None,
    basis_g: Tensor | None,
    weights: Tensor,
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
    if weights.ndim == 4:
        return _many_weighted_squares(x, g, basis_x, basis_g, weights, form)
    if isinstance(g, OneHot):
        return (compact(rotate(x, basis_x), g)[0].square() * weights[0][g.indices]).sum((1, 2))
    if x.shape[2] == 1:
        # kno, koi, kni -> n
        squares = rotate(_dense(g), basis_g)[:, :, 0].square()
        return ((squares @ weights) * rotate(x, basis_x)[:, :, 0].square()).sum((0, 2))
    column = _column(weights)
    chunks = _rotated(x, [g], basis_x, basis_g, form)
    return torch.cat([(chunk.square_().flatten(2) @ column).sum((0, 2)) for chunk in chunks])


def _many_weighted_squares(
    x: Tensor, g: Rows, basis_x: Tensor | None, basis_g: Tensor | None, weights: Tensor, form: RotationForm
) -> Tensor:
    if isinstance(g, OneHot):
        squares = compact(rotate(x, basis_x), g)[0].square()
        return torch.stack([(squares * each[0][g.indices]).sum((1, 2)) for each in weights], 1)
    if x.shape[2] == 1:
        of_g, of_x = rotate(_dense(g), basis_g)[:, :, 0].square(), rotate(x, basis_x)[:, :, 0].square()
        return torch.stack([((of_g @ each) * of_x).sum((0, 2)) for each in weights], 1)
    columns = weights.transpose(-1, -2).flatten(2).permute(1, 2, 0)  # dkp -> kpd
    chunks = _rotated(x, [g], basis_x, basis_g, form)
    return torch.cat([(chunk.square_().flatten(2) @ columns).sum(0) for chunk in chunks])


def rotated_scores(
    x: Tensor,
    g: Rows,
    basis_x: Tensor | None,
    basis_g: Tensor | None,
    weights: Tensor,
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
    if isinstance(g, OneHot) or x.shape[2] == 1:
        inner = None if vector is None else inner_products(x, g, vector)
        return squared_norms(x, g), weighted_rotated_squares(x, g, basis_x, basis_g, weights), inner
    turned = None
    if vector is not None:
        turned = vector if basis_x is None else vector @ basis_x
        turned = _column(turned if basis_g is None else basis_g.transpose(-1, -2) @ turned)
    column = _column(weights)
    norms, weighted, inners = [], [], []
    for chunk in _rotated(x, [g], basis_x, basis_g, "auto"):
        flat = chunk.flatten(2)
        if turned is not None:
            inners.append((flat @ turned).sum((0, 2)))
        flat.square_()
        norms.append(flat.sum((0, 2)))
        weighted.append((flat @ column).sum((0, 2)))
    return torch.cat(norms), torch.cat(weighted), torch.cat(inners) if inners else None


def _column(matrix: Tensor) -> Tensor:
    """Return ``[k, o, i]`` as a column ``[k, i·o, 1]``, to multiply what ``_rotated`` yields."""
    return matrix.transpose(-1, -2).flatten(1).unsqueeze(-1)


def _rotated(
    x: Tensor, gs: Sequence[Rows], basis_x: Tensor | None, basis_g: Tensor | None, form: RotationForm
) -> Iterator[Tensor]:
    """Yield rotated gradients for every draw, a few examples at a time, ``[k, m, i, o]``: each valid until the next.

    Either side is turned before the gradients are formed or after that, whichever is cheaper: per example, ``d`` draws
    cost ``s·i²`` or ``d·o·i²`` multiplications on the side of the inputs, and ``d·s·o²`` or ``d·i·o²`` on the other.
    """
    s, i, o, d = x.shape[2], x.shape[3], gs[0].shape[3], len(gs)
    x_first, g_first = (s <= d * o, s <= i) if form == "auto" else (form == "rotate_first",) * 2
    if x_first:
        x, basis_x = rotate(x, basis_x), None
    for g in gs:
        rows, after = g, basis_g
        if g_first and basis_g is not None:
            rows, after = rotate(_dense(g), basis_g), None
        for chunk in _formed(x, rows):
            if after is not None:
                chunk = chunk @ after.unsqueeze(1)
            yield chunk if basis_x is None else basis_x.transpose(-1, -2).unsqueeze(1) @ chunk


def rotated_rows(x: Tensor, g: Rows, basis_x: Tensor | None, basis_g: Tensor | None) -> tuple[Tensor, Rows]:
    """Return the activations and output gradients of the rotated gradients ``basis_gᵀ G_kn basis_x``.

    Args:
        x: Activations ``[k, n, s, i]``.
        g: Output gradients ``[k, n, s, o]``.
        basis_x: Orthonormal columns ``[k, i, i]``; None is the identity.
        basis_g: Orthonormal columns ``[k, o, o]``; None is the identity, the only one for one-hot rows.
    """
    return rotate(x, basis_x), g if basis_g is None else rotate(_dense(g), basis_g)


def _dense(g: Rows) -> Tensor:
    """Return rows that a basis can turn, or that are one position each: never one-hot ones."""
    if isinstance(g, Tensor):
        return g
    raise TypeError(f"rows of type {type(g).__name__} have an identity basis and more than one position.")
