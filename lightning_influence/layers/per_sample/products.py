"""Inner products of per-example gradients with given vectors."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_influence.layers.per_sample.forming import at_a_time, end_to_end, gradients
from lightning_influence.layers.rows import Joined, OneHot, Rows, rotate


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
    turned = rotate(x, matrix.transpose(-1, -2))
    if len(x) == x.shape[2] == g.shape[3] == 1:
        return (turned * g)[0, :, 0, 0]
    return (turned * g).sum((0, 2, 3))


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
        step = at_a_time(len(vectors) * x.shape[2] * x.shape[3])
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
    chunks = gradients(x, g, cached=False)
    return end_to_end([chunk.transpose(0, 1).flatten(1) @ flat for chunk in chunks])


def by_position(x: Tensor, g: Rows, vectors: Tensor) -> list[Tensor]:
    """Return what ``products`` adds up, position by position, ``[n, q, s]``: of one-hot rows and of dense ones.

    The arguments are those of ``products``.
    """
    if isinstance(g, Joined):
        first, second = g.split(x)
        return by_position(first, g.onehot, vectors) + by_position(second, g.dense, vectors)
    if isinstance(g, OneHot):
        return [torch.stack([torch.einsum("nsi,nsi->ns", x[0], vector[0][g.indices]) for vector in vectors], 1)]
    return [torch.stack([((x @ vector.mT.unsqueeze(1)) * g).sum((0, 3)) for vector in vectors], 1)]


def _bilinear(x: Tensor, g: Tensor, vectors: Tensor) -> Tensor:
    """Return ``Σ_k g_knᵀ v_qk x_kn``, ``[n, q]``, from ``[k, n, i]``, ``[k, n, o]`` and ``[q, k, o, i]``.

    As many multiplications as with formed gradients, which are larger than what stands here in their place. A few
    vectors at a time, so that all examples meet them while they are in the cache.
    """
    (k, n, i), o = x.shape, g.shape[2]
    step = at_a_time(k * n * o, cached=x.device.type == "cpu")
    parts = []
    for start in range(0, len(vectors), step):
        some = vectors[start : start + step]
        # kni, kri -> knr: r counts vectors and outputs
        turned = x @ some.transpose(0, 1).reshape(k, -1, i).transpose(-1, -2)
        # knqo, knoj -> knq
        parts.append((turned.view(k, n, -1, o) @ g.unsqueeze(-1)).squeeze(-1).sum(0))
    return (parts[0] if len(parts) == 1 else torch.cat(parts, 1)) if parts else x.new_zeros((n, 0))
