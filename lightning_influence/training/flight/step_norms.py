"""Squared per-example gradients as the optimizers scale them: ``gᵀ P g``, for every parameter group apart.

``P`` is what an optimizer multiplies gradients with, elementwise: nothing for SGD, ``1/√v`` for Adam and its kin.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lightning_influence.core.precision import working
from lightning_influence.gradients.block_rows import Source, Use, joined, rows_of
from lightning_influence.layers import per_sample
from lightning_influence.layers.blocks import MatrixBlock, ParameterBlock
from lightning_influence.layers.call import DirectCall, MatrixCall
from lightning_influence.layers.embedding import EmbeddingCall
from lightning_influence.layers.linear import LinearCall
from lightning_influence.layers.patches import Activations, laid_out
from lightning_influence.layers.rows import Rows
from lightning_influence.training import optimizers

Group: TypeAlias = tuple[int, int]
"""A parameter group: number of its optimizer, and its own in it."""


class StepNorms:
    """Knows the parameter groups of a run, and what they multiply gradients with.

    Args:
        run_optimizers: Those of the run.

    Attributes:
        complete: False once an optimizer had no state yet to tell ``P`` from; ``start`` sets it.
    """

    def __init__(self, run_optimizers: Sequence[Any]) -> None:
        self._optimizers = list(run_optimizers)
        self.complete = True
        # Parameter to its group, and the optimizer with the group's settings if it scales gradients.
        self._groups: dict[int, tuple[Group, Any]] = {}
        # Block and roles to the groups of weight and bias, for linear maps that take plain steps.
        self._plain_rows: dict[tuple[str, ...], tuple[Group | None, Group | None]] = {}
        self._grouped: list[tuple[Any, int]] = []  # the parameter groups that these were made from, and their sizes
        self._scales: dict[str, Tensor] = {}

    def start(self) -> None:
        """Get ready for a batch: callbacks add parameters to groups during training."""
        self.complete = True
        grouped = [(g, len(g["params"])) for o in self._optimizers for g in optimizers.inner(o).param_groups]
        same = len(grouped) == len(self._grouped)
        if same and all(a is b and m == n for (a, m), (b, n) in zip(grouped, self._grouped, strict=True)):
            return
        self._grouped = grouped
        self._plain_rows = {}
        self._groups = {
            id(parameter): (
                (number, place),
                (optimizer, group) if optimizers.is_preconditioned(optimizer) else None,
            )
            for number, optimizer in enumerate(map(optimizers.inner, self._optimizers))
            for place, group in enumerate(optimizer.param_groups)
            for parameter in group["params"]
        }

    def stepped(self) -> None:
        """Forget what the optimizers' state said: a step has changed it."""
        self._scales = {}

    def group(self, parameter: Tensor) -> Group | None:
        """Return the group of a parameter, None if it does not move."""
        found = self._groups.get(id(parameter))
        return None if found is None else found[0]

    def plain_rows(self, name: str, roles: Mapping[str, Source]) -> tuple[Group | None, Group | None] | None:
        """Return the groups of the weight and bias of a linear map, None if either does not take plain steps.

        Args:
            name: Its block.
            roles: What was passed as its weight and bias.
        """
        key = (name, *roles)
        known = self._plain_rows.get(key)
        if known is not None:
            return known
        places = {role: self._groups.get(id(source.tensor)) for role, source in roles.items()}
        if any(place is not None and place[1] is not None for place in places.values()):
            return None
        of_weight, of_bias = places.get("weight"), places.get("bias")
        groups = None if of_weight is None else of_weight[0], None if of_bias is None else of_bias[0]
        self._plain_rows[key] = groups
        return groups

    def of_rows(
        self, call: LinearCall, roles: Mapping[str, Source], x: Tensor, g: Tensor
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the parameters of a linear map with a row per example, and their ``gᵀ P g``, ``[n]``.

        Args:
            call: The linear map.
            roles: What was passed as its weight and bias.
            x: Inputs ``[n, i]``.
            g: Output gradients ``[n, o]``.
        """
        squares = g.square()
        for role, source in roles.items():
            scale = self._scale(*source.parameters[0])
            weighted = squares.sum(1, keepdim=True)
            if scale is not None:
                scale = scale.to(squares)
                weighted = squares @ (scale.t() if role == "weight" and call.transposed else scale)
            if role == "weight":  # no, oi, ni -> n
                weighted = weighted * x.square()
            yield source.tensor, weighted.sum(1) if weighted.ndim == 2 else weighted

    def of_uses(self, block: ParameterBlock, uses: Sequence[Use], n: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the parameters of a block and their ``gᵀ P g``, ``[n]``.

        Args:
            block: The block.
            uses: Its uses, each with the gradient of its output.
            n: Number of examples.
        """
        if len(uses) == 1 and isinstance(block, MatrixBlock) and self._is_plain_affine(uses[0]):
            yield from zip(*_affine(uses[0], n), strict=True)
            return
        if len(uses) == 1:
            for role, source in uses[0].roles.items():
                if isinstance(block, MatrixBlock) and source.tensor is block.weight:
                    yield source.tensor, self._of_matrix(block, uses[0], n)
                else:
                    scale = self._scale(source.parameters[0][0], source.tensor)
                    yield source.tensor, _of_direct(uses[0], role, n, scale)
            return
        activations, gs = joined(rows_of(block, uses, n))
        x = laid_out(activations)[0]
        weights = self._weights(block)
        columns = block.bias_columns
        split = [slice(None)] if columns is None else [slice(None, columns.start), columns]
        for parameter, part in zip(block.parameters.values(), split, strict=False):
            yield parameter, _squares(x[..., part], gs[0], None if weights is None else weights[..., part])

    def _is_plain_affine(self, use: Use) -> bool:
        """Tell whether a weight and a bias take plain steps."""
        sources = use.roles.values()
        whole = use.roles.keys() == {"weight", "bias"} and isinstance(use.call, MatrixCall)
        return whole and all(self._scale(*source.parameters[0]) is None for source in sources)

    def _of_matrix(self, block: MatrixBlock, use: Use, n: int) -> Tensor:
        """Return ``gᵀ P g`` of the weight of a matrix, from its only use."""
        call, layouts = use.call, use.layouts
        gradient = _gradient(use)
        scale = self._scale(block.weight_name, block.weight)
        if "weight" not in call.matrix_roles:
            return _of_direct(use, "weight", n, scale)
        x: Activations
        g: Rows
        if isinstance(call, EmbeddingCall):
            x, g = call.rows(gradient, n, layouts)
        else:
            assert isinstance(call, MatrixCall)
            x, g = call.captured(n, layouts), call.output_gradients(gradient, n, layouts)
        if scale is None:
            return per_sample.squared_norms(x, g)
        (x,) = laid_out([x])
        as_matrix = block.from_parameters(
            {name: scale if p is block.weight else p for name, p in block.parameters.items()}
        )
        return _squares(x, g, as_matrix[..., : as_matrix.shape[-1] - block.has_bias])

    def _scale(self, name: str, parameter: Tensor) -> Tensor | None:
        """Return ``P`` of a parameter, shaped like it, or None for a plain step."""
        found = self._groups.get(id(parameter))
        if found is None or found[1] is None:
            return None
        if name not in self._scales:
            optimizer, group = found[1]
            scale = optimizers.preconditioner(optimizer, group, parameter)
            if scale is None:
                self.complete = False
                return None
            self._scales[name] = scale
        return self._scales[name]

    def _weights(self, block: ParameterBlock) -> Tensor | None:
        """Return ``P`` of a block, ``[k, o, i]``, or None for plain steps."""
        scales = {name: self._scale(name, parameter) for name, parameter in block.parameters.items()}
        if all(scale is None for scale in scales.values()):
            return None
        filled = {
            name: torch.ones_like(parameter) if (scale := scales[name]) is None else scale
            for name, parameter in block.parameters.items()
        }
        return block.from_parameters(filled)


def _affine(use: Use, n: int) -> tuple[list[Tensor], tuple[Tensor, Tensor]]:
    """Return weight and bias, and ``‖g‖²`` of each for every example."""
    assert isinstance(use.call, MatrixCall)
    x = use.call.captured(n, use.layouts)
    g = use.call.output_gradients(_gradient(use), n, use.layouts)
    return [use.roles[role].tensor for role in ("weight", "bias")], per_sample.squared_norms_with_bias(x, g)


def _of_direct(use: Use, role: str, n: int, scale: Tensor | None) -> Tensor:
    """Return ``gᵀ P g`` of a parameter that scales or shifts, ``[n]``."""
    assert isinstance(use.call, (MatrixCall, DirectCall))
    own = use.call.direct(role, _gradient(use), n, use.layouts).reshape(n, -1)
    return own.square().sum(1) if scale is None else own.square() @ scale.reshape(-1).to(own)


def _gradient(use: Use) -> Tensor:
    """Return the gradient of the output of a use that was reached."""
    return working(next(gradient for gradient in use.output.gradients if gradient is not None))


def _squares(x: Tensor, g: Rows, weights: Tensor | None) -> Tensor:
    """Return ``Σ_oi P (Σ_s g xᵀ)²`` of every example, ``[n]``."""
    if weights is not None:
        return per_sample.weighted_squares(x, g, weights.detach().to(x))
    return per_sample.squared_norms(x, g)
