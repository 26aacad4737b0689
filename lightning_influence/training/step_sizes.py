"""Step sizes that optimizers have really taken, by parameter and by layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lightning_influence.core.weights import parameters_of
from lightning_influence.gradients.capture import LayerIO
from lightning_influence.layers import per_sample
from lightning_influence.layers.blocks import ParameterBlock
from lightning_influence.training import optimizers


@dataclass(frozen=True)
class OptimizerHistory:
    """What the optimizers did in a run.

    Attributes:
        step_sizes: Parameter name to ``Σ_t η_t / (1 - momentum)`` over all steps.
        weight_decay: Parameter name to the coefficient of an L2 term in the loss; decoupled decay is none.
        adaptive: Names of optimizers whose steps are no multiples of the gradient (Adam), or may not be.
        steps: Number of optimizer steps.
    """

    step_sizes: Mapping[str, float]
    weight_decay: Mapping[str, float]
    adaptive: tuple[str, ...]
    steps: int


StepSize: TypeAlias = "float | Tensor"
"""``η`` of a block, or ``η P`` of every scalar, ``[k, o, i]``, where they differ."""


class StepSizes:
    """Sums the learning rates that the optimizers use, per parameter, between two checkpoints.

    Args:
        module: The model; learning rates are kept under its parameter names.

    Attributes:
        summed: Number of examples whose own losses add up to a batch loss; 1 where that is their mean. As many times
            the rate of a sum is the rate of the mean that makes the same steps, and a part of its L2 term.
        steps: Number of steps since the last checkpoint.
        sums: Parameter name to the sum of its learning rates since then.
        optimizers: Names of all that have stepped.
        unknown: Those of which it is not known how they turn gradients into steps.
    """

    def __init__(self, module: nn.Module) -> None:
        self.summed = 1
        self.steps = 0
        self.sums: dict[str, float] = {}
        self.optimizers: set[str] = set()
        self.unknown: set[str] = set()
        self._names = {id(p): name for name, p in parameters_of(module).items()}
        self._totals: dict[str, float] = {}
        self._weight_decay: dict[str, float] = {}
        self._adaptive: set[str] = set()
        self._all_steps = 0

    def record(self, optimizer: Any) -> None:
        """Add the current learning rates of one optimizer, just before it steps.

        Raises:
            TypeError: If it is none.
        """
        optimizer = optimizers.inner(optimizer)
        if not isinstance(getattr(optimizer, "param_groups", None), list):
            raise TypeError(
                f"the optimizer is a {type(optimizer).__name__}; expected one of torch, or a wrapper of it."
            )
        self.steps += 1
        self._all_steps += 1
        kind = type(optimizer).__name__
        self.optimizers.add(kind)
        understood = optimizers.is_understood(optimizer)
        self.unknown |= set() if understood else {kind}
        self._adaptive |= set() if understood and not optimizers.is_preconditioned(optimizer) else {kind}
        for group in optimizer.param_groups:
            rate = optimizers.rate(group) * self.summed
            decay = optimizers.l2_coefficient(optimizer, group) / self.summed
            for parameter in group["params"]:
                name = self._names.get(id(parameter))
                if name is not None and parameter.requires_grad:
                    self.sums[name] = self.sums.get(name, 0.0) + rate
                    self._totals[name] = self._totals.get(name, 0.0) + rate
                    self._weight_decay[name] = decay

    def history(self) -> OptimizerHistory:
        """Return what the optimizers have done since the start of training."""
        adaptive = tuple(sorted(self._adaptive))
        return OptimizerHistory(dict(self._totals), dict(self._weight_decay), adaptive, self._all_steps)

    def take(self) -> dict[str, float]:
        """Return the sums since the last call and start again."""
        taken, self.sums, self.steps = self.sums, {}, 0
        return taken

    def state_dict(self) -> dict[str, Any]:
        """Return the sums, in primitives."""
        return {
            "sums": dict(self.sums),
            "steps": self.steps,
            "totals": dict(self._totals),
            "weight_decay": dict(self._weight_decay),
            "all_steps": self._all_steps,
            "optimizers": sorted(self.optimizers),
            "unknown": sorted(self.unknown),
            "adaptive": sorted(self._adaptive),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.sums, self._totals = dict(state["sums"]), dict(state["totals"])
        self._weight_decay = dict(state["weight_decay"])
        self.steps, self._all_steps = state["steps"], state["all_steps"]
        self.optimizers, self.unknown = set(state["optimizers"]), set(state["unknown"])
        self._adaptive = set(state["adaptive"])


def block_step_sizes(
    blocks: Mapping[str, ParameterBlock],
    sums: Mapping[str, float],
    module: nn.Module,
    preconditioner: Mapping[str, Tensor] | None = None,
) -> dict[str, StepSize]:
    """Return the step sizes of every block.

    Args:
        blocks: The blocks.
        sums: Parameter name to step size; 0 for others.
        module: The model, as a parameter may have several names.
        preconditioner: Parameter name to what its gradient is multiplied with, elementwise; ones for others.
    """
    names = {id(p): name for name, p in parameters_of(module).items()}
    preconditioner = preconditioner or {}
    result: dict[str, StepSize] = {}
    for block_name, block in blocks.items():
        own = {name: names.get(id(parameter), "") for name, parameter in block.parameters.items()}
        sizes = {sums.get(name, 0.0) for name in own.values()}
        if len(sizes) == 1 and not preconditioner.keys() & own.values():
            result[block_name] = sizes.pop()
            continue
        scaled = {
            name: sums.get(own[name], 0.0) * preconditioner.get(own[name], torch.ones_like(parameter)).to(parameter)
            for name, parameter in block.parameters.items()
        }
        result[block_name] = block.from_parameters({name: value.detach() for name, value in scaled.items()})
    return result


def self_influence(io: LayerIO, norms: Tensor, step_size: StepSize) -> Tensor:
    """Return one block's part of ``η gᵀ P g`` for every example, ``[n]``.

    Args:
        io: The block's activations and output gradients.
        norms: Its squared gradient norms ``[n]``.
        step_size: Of the block.
    """
    if isinstance(step_size, Tensor):
        return per_sample.weighted_squares(io.x, io.gs[0], step_size.to(io.x))
    return norms * step_size
