"""Squared per-example gradients as the optimizers scale them: ``gᵀ P g``, for every parameter group apart.

``P`` is what an optimizer multiplies gradients with, elementwise: nothing for SGD, ``1/√v`` for Adam and its kin.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lightning_influence.gradients.block_rows import Use, joined, rows_of
from lightning_influence.layers import per_sample
from lightning_influence.layers.blocks import ParameterBlock
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

    def of_uses(self, block: ParameterBlock, uses: Sequence[Use], n: int) -> Iterator[tuple[Group, Tensor]]:
        """Yield the groups that a block's parameters move in and their ``gᵀ P g``, ``[n]``.

        Args:
            block: The block.
            uses: Its uses, each with the gradient of its output.
            n: Number of examples.

        Raises:
            NotSteppedError: If an optimizer that scales gradients has no state yet.
        """
        activations, gs = joined(rows_of(block, uses, n))
        groups = {name: self._groups.get(id(parameter)) for name, parameter in block.parameters.items()}
        scales = {name: self._scale(parameter) for name, parameter in block.parameters.items()}
        together = len(set(groups.values())) == 1 and all(scale is None for scale in scales.values())
        for group in {group: None for group in groups.values() if group is not None}:
            if together:
                yield group, per_sample.squared_norms(activations[0], gs[0])
                continue
            own: dict[str, Tensor] = {}
            for name, parameter in block.parameters.items():
                scale = scales[name]
                plain = torch.ones_like(parameter) if scale is None else scale
                own[name] = plain if groups[name] == group else torch.zeros_like(parameter)
            weights = block.from_parameters(own).detach().to(activations[0])
            yield group, per_sample.weighted_squares(activations[0], gs[0], weights)

    def _scale(self, parameter: Tensor) -> Tensor | None:
        """Return ``P`` of a parameter, shaped like it, or None for a plain step."""
        group = self._groups.get(id(parameter))
        if group is None or not optimizers.is_preconditioned(optimizer := self._optimizers[group[0]]):
            return None
        scale = optimizers.preconditioner(optimizer, optimizer.param_groups[group[1]], parameter)
        if scale is None:
            raise NotSteppedError
        return scale
