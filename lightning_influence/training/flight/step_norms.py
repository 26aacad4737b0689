"""Squared per-example gradients as the optimizers scale them: ``gᵀ P g``, for every parameter group apart.

``P`` is what an optimizer multiplies gradients with, elementwise: nothing for SGD, ``1/√v`` for Adam and its kin.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lightning_influence.core.precision import working
from lightning_influence.gradients.block_rows import Use, joined, rows_of
from lightning_influence.layers import per_sample
from lightning_influence.layers.blocks import MatrixBlock, ParameterBlock
from lightning_influence.layers.call import DirectCall, MatrixCall
from lightning_influence.layers.embedding import EmbeddingCall
from lightning_influence.layers.linear import LinearCall
from lightning_influence.layers.rows import Rows
from lightning_influence.training import optimizers

Group: TypeAlias = tuple[int, int]
"""A parameter group: number of its optimizer, and its own in it."""


class NotSteppedError(RuntimeError):
    """An optimizer has no state yet to tell ``P`` from."""


class StepNorms:
    """Knows the parameter groups of a run, and what they multiply gradients with.

    Args:
        run_optimizers: Those of the run, with the groups that they have now.
    """

    def __init__(self, run_optimizers: Sequence[Any]) -> None:
        self._optimizers = [optimizers.inner(optimizer) for optimizer in run_optimizers]
        self._groups: dict[int, Group] = {
            id(parameter): (number, place)
            for number, optimizer in enumerate(self._optimizers)
            for place, group in enumerate(optimizer.param_groups)
            for parameter in group["params"]
        }
        self._scales: dict[int, Tensor | None] = {}  # until the next step

    def stepped(self) -> None:
        """Forget what the optimizers' state said: a step has changed it."""
        self._scales = {}

    def group(self, parameter: Tensor) -> Group | None:
        """Return the group of a parameter, None if it does not move."""
        return self._groups.get(id(parameter))

    def of_uses(self, block: ParameterBlock, uses: Sequence[Use], n: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the parameters of a block and their ``gᵀ P g``, ``[n]``.

        Args:
            block: The block.
            uses: Its uses, each with the gradient of its output.
            n: Number of examples.

        Raises:
            NotSteppedError: If an optimizer that scales gradients has no state yet.
        """
        bias = block.bias_columns
        columns = [slice(None)] if bias is None else [slice(None, bias.start), bias]
        if len(uses) == 1:
            (use,) = uses
            plain = all(self._scale(source.tensor) is None for source in use.roles.values())
            if plain and type(use.call) is LinearCall and use.call.input.ndim == 2 and len(use.call.input) == n:
                # A row per example, in an eighth of the operations: all of a step of a small network.
                lengths = _gradient(use).square().sum(1)
                for role, source in use.roles.items():
                    yield (
                        source.tensor,
                        lengths if role == "bias" else working(use.call.input).square().sum(1) * lengths,
                    )
                return
            for role, source in use.roles.items():
                scale = self._scale(source.tensor)
                if isinstance(block, MatrixBlock) and source.tensor is block.weight and role in use.call.matrix_roles:
                    weights = None if scale is None else self._weights(block)
                    yield source.tensor, _squares(*_rows(use, n), weights, columns[0])
                else:
                    yield source.tensor, _of_direct(use, role, n, scale)
            return
        xs, gs = joined(rows_of(block, uses, n))
        x, weights = xs[0], self._weights(block)
        for parameter, part in zip(block.parameters.values(), columns, strict=False):
            yield parameter, _squares(x[..., part], gs[0], weights, part)

    def _weights(self, block: ParameterBlock) -> Tensor | None:
        """Return ``P`` of a block, ``[k, o, i]``, or None for plain steps."""
        scales = {name: self._scale(parameter) for name, parameter in block.parameters.items()}
        if all(scale is None for scale in scales.values()):
            return None
        plain = {
            name: torch.ones_like(parameter) for name, parameter in block.parameters.items() if scales[name] is None
        }
        return block.from_parameters({name: plain[name] if s is None else s for name, s in scales.items()})

    def _scale(self, parameter: Tensor) -> Tensor | None:
        """Return ``P`` of a parameter, shaped like it, or None for a plain step."""
        if id(parameter) not in self._scales:
            self._scales[id(parameter)] = self._read_scale(parameter)
        return self._scales[id(parameter)]

    def _read_scale(self, parameter: Tensor) -> Tensor | None:
        group = self._groups.get(id(parameter))
        if group is None or not optimizers.is_preconditioned(optimizer := self._optimizers[group[0]]):
            return None
        scale = optimizers.preconditioner(optimizer, optimizer.param_groups[group[1]], parameter)
        if scale is None:
            raise NotSteppedError
        return scale


def _rows(use: Use, n: int) -> tuple[Tensor, Rows]:
    """Return the activations and output gradients of a weight."""
    call, layouts, gradient = use.call, use.layouts, _gradient(use)
    if isinstance(call, EmbeddingCall):
        return call.rows(gradient, n, layouts)
    assert isinstance(call, MatrixCall)
    return call.captured(n, layouts), call.output_gradients(gradient, n, layouts)


def _of_direct(use: Use, role: str, n: int, scale: Tensor | None) -> Tensor:
    """Return ``gᵀ P g`` of a parameter that scales or shifts, ``[n]``."""
    assert isinstance(use.call, (MatrixCall, DirectCall))
    own = use.call.direct(role, _gradient(use), n, use.layouts).reshape(n, -1)
    return own.square().sum(1) if scale is None else own.square() @ scale.reshape(-1).to(own)


def _gradient(use: Use) -> Tensor:
    """Return the gradient of the output of a use that was reached."""
    return working(next(gradient for gradient in use.output.gradients if gradient is not None))


def _squares(x: Tensor, g: Rows, weights: Tensor | None, columns: slice) -> Tensor:
    """Return ``Σ_oi P (Σ_s g xᵀ)²`` of every example, ``[n]``, with the given columns of the weights ``P``."""
    if weights is None:
        return per_sample.squared_norms(x, g)
    return per_sample.weighted_squares(x, g, weights[..., columns].detach().to(x))
