"""How one call of a torch function becomes rows ``[k, n, s, ·]``, and the algebra of rows.

A layer is one file: what a call of its function says about per-example gradients, and a reader registered for it.
"""

from __future__ import annotations

# Each of them enters its functions into the table.
from lightning_influence.layers import convolution, elementwise, embedding, linear, norm, per_sample  # noqa: F401
from lightning_influence.layers.blocks import LayerError, ParameterBlock
from lightning_influence.layers.call import Call, Layouts, MatrixCall
from lightning_influence.layers.registry import READERS, reads
from lightning_influence.layers.rows import Joined, OneHot, Rows, second_moment
from lightning_influence.layers.site import NotUnderstoodError, Site

__all__ = [
    "READERS",
    "Call",
    "Joined",
    "LayerError",
    "Layouts",
    "MatrixCall",
    "NotUnderstoodError",
    "OneHot",
    "ParameterBlock",
    "Rows",
    "Site",
    "per_sample",
    "reads",
    "second_moment",
]
