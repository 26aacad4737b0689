"""Per-example gradient algebra without the gradients.

Every function takes activations ``x: [k, n, s, i]`` and output gradients ``g: [k, n, s, o]`` of one block (see
``blocks``) and returns something about the per-example gradients ``G_kn = Σ_s g_kns x_knsᵀ``, ``[o, i]``, choosing
the cheapest exact form. With one position (``s = 1``) the gradient is an outer product and no ``[n, o, i]`` tensor
ever exists; with one-hot rows ``g`` (embeddings, see ``rows``) only the rows that an example uses do; otherwise
gradients are formed for a few examples at a time.

Index legend: ``k`` groups, ``n`` examples, ``s``/``t`` positions, ``i`` inputs, ``o`` outputs.
"""

from lightning_influence.layers.per_sample.forming import formed, gradients, summed_gradient
from lightning_influence.layers.per_sample.norms import squared_norms
from lightning_influence.layers.per_sample.products import by_position, inner_products, products
from lightning_influence.layers.per_sample.rotated import (
    Inverses,
    Weights,
    rotated_rows,
    rotated_scores,
    rotated_squares,
    weighted_rotated_squares,
    weighted_squares,
)

__all__ = [
    "Inverses",
    "Weights",
    "by_position",
    "formed",
    "gradients",
    "inner_products",
    "products",
    "rotated_rows",
    "rotated_scores",
    "rotated_squares",
    "squared_norms",
    "summed_gradient",
    "weighted_rotated_squares",
    "weighted_squares",
]
