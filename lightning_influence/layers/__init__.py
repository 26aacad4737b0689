"""How one call of a torch function becomes rows ``[k, n, s, ·]``, and the algebra of rows.

A layer is one file: what a call of its function says about per-example gradients, and a reader registered for it.
"""

from lightning_influence.layers import convolution, elementwise, embedding, linear, norm

__all__ = ["convolution", "elementwise", "embedding", "linear", "norm"]
