"""Blocks of parameters: which ones are understood, and how each becomes activations and output gradients.

A block is a weight with its bias, wherever they are used, in the canonical layout

    activations       ``x: [k, n, s, i]``
    output gradients  ``g: [k, n, s, o]``

``k`` independent groups (1 except for grouped convolutions, whose weight is block-diagonal), ``n`` examples,
``s`` positions that share the weights, ``i`` inputs of a group plus a last column of ones for the bias, ``o`` outputs
of a group. The gradient of example ``n`` for group ``k`` is ``Σ_s g_s x_sᵀ``, ``[o, i]``, row-major like the weight.
Rows of embeddings are one-hot (see ``rows``). Scales and shifts have no such form: every example's own gradient is the
only row, a vector.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_influence.layers.call import Layouts, MatrixCall
from lightning_influence.layers.rows import OneHot, Rows

# A side with more rows keeps the identity as its eigenbasis: the decomposition is cubic, a minute for this one.
_LARGEST_BASIS = 8192
# Vectors up to this length have a dense curvature, longer ones a diagonal.
LARGEST_VECTOR = 1024

ONE_HOT = frozenset({"embedding"})


class LayerError(RuntimeError):
    """A layer was used in a way that would give wrong numbers; the message names it and the way out."""


class NewPathError(LayerError):
    """A batch took another path through the model than any that was traced."""


class ParameterBlock:
    """Parameters whose per-example gradients are handled together.

    Without a matrix form (scales, shifts and whatever else) all are flattened into one row, ``(1, 1, p)``.

    Args:
        name: Path of the module for its weight and bias, of the parameter for others.
        parameters: Full name to parameter: first the weight, then its bias.
    """

    def __init__(self, name: str, parameters: Mapping[str, nn.Parameter]) -> None:
        self.name = name
        self.parameters = dict(parameters)

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(k, o, i)``, the bias column included."""
        return 1, 1, sum(p.numel() for p in self.parameters.values())

    @property
    def dense(self) -> tuple[bool, bool]:
        """Whether the output side and the input side may have a dense eigenbasis; long vectors have a diagonal."""
        return True, self.shape[2] <= LARGEST_VECTOR

    @property
    def basis_sizes(self) -> tuple[int, int]:
        """Dimensions of the dense eigenbases of the output and the input side; 0 for the identity."""
        _, o, i = self.shape
        return o * self.dense[0], i * self.dense[1]

    def to_parameters(self, block: Tensor) -> dict[str, Tensor]:
        """Split ``[..., k, o, i]`` into tensors shaped like the parameters, by name (leading dimensions kept)."""
        lead = block.shape[:-3]
        parts = block.reshape(*lead, -1).split([p.numel() for p in self.parameters.values()], -1)
        return {
            name: part.reshape((*lead, *p.shape))
            for (name, p), part in zip(self.parameters.items(), parts, strict=True)
        }

    def from_parameters(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Join tensors shaped like the parameters, by name, into one block ``[k, o, i]``."""
        return torch.cat([tensors[name].reshape(-1) for name in self.parameters]).view(1, 1, -1)

    def direct_rows(self, gradients: Mapping[str, Tensor]) -> tuple[Tensor, Rows]:
        """Turn per-example gradients ``[n, *shape]``, by parameter name, into rows; missing ones are zero."""
        like = next(iter(gradients.values()))
        parts = [
            gradients[name].reshape(len(like), -1) if name in gradients else like.new_zeros((len(like), p.numel()))
            for name, p in self.parameters.items()
        ]
        return torch.cat(parts, 1).view(1, len(like), 1, -1), like.new_ones((1, len(like), 1, 1))

    def no_rows(self, dtype: torch.dtype, device: torch.device) -> list[tuple[Tensor, Rows]]:
        """Return rows of zeros, one pair for each kind of rows that the block can have."""
        k, o, i = self.shape
        zeros = torch.zeros((k, 1, 1, i), dtype=dtype, device=device)
        return [(zeros, torch.zeros((k, 1, 1, o), dtype=dtype, device=device))]


class MatrixBlock(ParameterBlock):
    """A weight ``[o, ...]`` and a bias ``[o]`` as one matrix, or several for a grouped convolution.

    Args:
        name: Path of the module for its weight and bias, of the parameter for others.
        weight: Full name and parameter.
        bias: Full name and parameter.
        form: ``"linear"``; ``"transposed"`` for ``[i, o]``; ``"rows"`` for ``[..., i]``; ``"convolution"``;
            ``"transposed convolution"`` for ``[i, o / groups, ...]``.
        groups: Number of groups of a convolution.
        kinds: Kinds of rows that the weight gets: ``"linear"``, ``"embedding"`` or both.
    """

    def __init__(
        self,
        name: str,
        weight: tuple[str, nn.Parameter],
        bias: tuple[str, nn.Parameter] | None = None,
        *,
        form: str = "linear",
        groups: int = 1,
        kinds: frozenset[str] = frozenset({"linear"}),
    ) -> None:
        super().__init__(name, dict([weight] if bias is None else [weight, bias]))
        self.weight_name, self.weight = weight
        self.bias_name = None if bias is None else bias[0]
        self.form = form
        self.groups = groups
        self.kinds = kinds

    @property
    def has_bias(self) -> bool:
        """Whether the last column is a bias."""
        return self.bias_name is not None

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(groups, o / groups, i / groups + bias)``."""
        shape, k = self.weight.shape, self.groups
        if self.form == "transposed":
            return 1, shape[1], shape[0] + self.has_bias
        if self.form == "rows":
            return 1, math.prod(shape[:-1]), shape[-1]
        if self.form == "transposed convolution":
            return k, shape[1], shape[0] // k * math.prod(shape[2:]) + self.has_bias
        return k, shape[0] // k, math.prod(shape[1:]) + self.has_bias

    @property
    def dense(self) -> tuple[bool, bool]:
        """Not for the one-hot side of an embedding, nor for very large sides."""
        _, o, i = self.shape
        return o <= _LARGEST_BASIS and self.kinds == {"linear"}, i <= _LARGEST_BASIS

    def to_parameters(self, block: Tensor) -> dict[str, Tensor]:
        """Split ``[..., k, o, i]`` into weight and bias, by name."""
        lead, shape = block.shape[:-3], self.weight.shape
        weight = block[..., :-1] if self.has_bias else block
        if self.form == "transposed":
            weight = weight.squeeze(-3).transpose(-1, -2)
        elif self.form == "transposed convolution":
            weight = weight.unflatten(-1, (-1, math.prod(shape[2:]))).transpose(-3, -2)
        result = {self.weight_name: weight.reshape((*lead, *shape))}
        if self.bias_name is not None:
            result[self.bias_name] = block[..., -1].reshape((*lead, *self.parameters[self.bias_name].shape))
        return result

    def from_parameters(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Join weight and bias, by name, into ``[k, o, i]``."""
        k, o, _ = self.shape
        weight = tensors[self.weight_name]
        if self.form == "transposed":
            weight = weight.t()
        elif self.form == "transposed convolution":
            weight = weight.reshape(k, -1, o, math.prod(weight.shape[2:])).transpose(1, 2)
        parts = [weight.reshape(k, o, -1)]
        if self.bias_name is not None:
            parts.append(tensors[self.bias_name].reshape(k, o, 1))
        return torch.cat(parts, -1)

    def direct_rows(self, gradients: Mapping[str, Tensor]) -> tuple[Tensor, Rows]:
        """Give every output a position of its own: ``x`` holds the gradient's rows, ``g`` says which."""
        _, o, i = self.shape
        like = next(iter(gradients.values()))
        n = len(like)
        x = like.new_zeros((1, n, o, i))
        if self.weight_name in gradients:
            x[..., : i - self.has_bias] = gradients[self.weight_name].reshape(1, n, o, -1)
        if self.bias_name is not None and self.bias_name in gradients:
            x[..., -1] = gradients[self.bias_name].reshape(1, n, o)
        return x, OneHot(torch.arange(o, device=like.device).expand(n, o), o, distinct=True)

    def linear_rows(
        self, call: MatrixCall, gradients: Sequence[Tensor | None], n: int, layouts: Layouts, start: int, bias: bool
    ) -> tuple[list[Tensor], list[Rows]]:
        """Return the rows of a linear map or a convolution.

        Args:
            call: The call.
            gradients: Of its output, by draw; None is zero.
            n: Number of examples.
            layouts: Where they are.
            start: First output of the block that the call computes.
            bias: Whether the call adds the block's bias.
        """
        x = call.captured(n, layouts, ones=bias)
        if self.has_bias and not bias:
            x = self.widened(x)
        rows: list[Rows] = []
        for gradient in gradients:
            if gradient is None:
                rows.append(torch.zeros((*x.shape[:3], self.shape[1]), dtype=x.dtype, device=x.device))
                continue
            g = call.output_gradients(gradient, n, layouts)
            rest = self.shape[1] - start - g.shape[-1]
            rows.append(F.pad(g, (start, rest)) if start or rest else g)
        return [x], rows

    def widened(self, x: Tensor) -> Tensor:
        """Add a column of zeros if the block has a bias."""
        return F.pad(x, (0, 1)) if self.has_bias else x

    def no_rows(self, dtype: torch.dtype, device: torch.device) -> list[tuple[Tensor, Rows]]:
        """Return rows of zeros, one pair for each kind of rows that the block can have."""
        zeros = super().no_rows(dtype, device)
        nothing = torch.zeros((1, 1), dtype=torch.bool, device=device)
        onehot = OneHot(torch.zeros((1, 1), dtype=torch.long, device=device), self.shape[1], kept=nothing)
        pairs = {"linear": zeros[0], "embedding": (zeros[0][0], onehot)}
        return [pairs[kind] for kind in sorted(self.kinds)]
