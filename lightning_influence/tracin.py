"""TracIn: influence traced along the run (Pruthi et al. 2020, 2002.08484).

``TracIn(z, z) = Σ_t η_t ‖∇ℓ(z; θ_t)‖²`` over recorded checkpoints. A checkpoint stands for the optimizer steps since
the one before it, so ``η_t`` is the sum of the learning rates that those steps really used, per parameter, divided by
``1 - momentum`` (a constant gradient moves the weights by that much). Adaptive optimizers are treated as plain
gradient steps with their learning rate.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_influence.capture import LayerIO
from lightning_influence.curvature.damping import OptimizerHistory
from lightning_influence.layers import ParameterBlock
from lightning_influence.per_sample import squared_norms

# Optimizers whose `weight_decay` is added to the gradient.
_L2_OPTIMIZERS = (
    torch.optim.SGD,
    torch.optim.ASGD,
    torch.optim.Adam,
    torch.optim.Adamax,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.Adagrad,
    torch.optim.Adadelta,
    torch.optim.RMSprop,
)


class StepSizes:
    """Sums the learning rates that the optimizers use, per parameter, between two checkpoints.

    Args:
        module: The model; learning rates are kept under its parameter names.
    """

    def __init__(self, module: nn.Module) -> None:
        self._names = {id(p): name for name, p in module.named_parameters()}
        self.sums: dict[str, float] = {}
        self.steps = 0
        self._totals: dict[str, float] = {}
        self._weight_decay: dict[str, float] = {}
        self._adaptive: set[str] = set()
        self._all_steps = 0

    def record(self, optimizer: Any) -> None:
        """Add the current learning rates of one optimizer, just before it steps."""
        self.steps += 1
        self._all_steps += 1
        optimizer = getattr(optimizer, "optimizer", optimizer)
        if not isinstance(optimizer, torch.optim.SGD):
            self._adaptive.add(type(optimizer).__name__)
        for group in optimizer.param_groups:
            momentum, dampening = (float(group.get(name) or 0.0) for name in ("momentum", "dampening"))
            rate = float(group["lr"]) * (1 - dampening * (momentum > 0)) / (1 - momentum)
            decay = _l2_coefficient(optimizer, group)
            for parameter in group["params"]:
                name = self._names.get(id(parameter))
                if name is not None and parameter.requires_grad:
                    self.sums[name] = self.sums.get(name, 0.0) + rate
                    self._totals[name] = self._totals.get(name, 0.0) + rate
                    self._weight_decay[name] = decay

    def history(self) -> OptimizerHistory:
        """Return what the optimizers have done since the start of training."""
        return OptimizerHistory(
            dict(self._totals), dict(self._weight_decay), tuple(sorted(self._adaptive)), self._all_steps
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the sums, in primitives."""
        return {
            "step_sizes": dict(self.sums),
            "steps": self.steps,
            "total_step_sizes": dict(self._totals),
            "weight_decay": dict(self._weight_decay),
            "adaptive": sorted(self._adaptive),
            "all_steps": self._all_steps,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint; one of an earlier version does not know the totals."""
        self.sums = dict(state["step_sizes"])
        self.steps = state["steps"]
        self._totals = dict(state.get("total_step_sizes", {}))
        self._weight_decay = dict(state.get("weight_decay", {}))
        self._adaptive = set(state.get("adaptive", ()))
        self._all_steps = state.get("all_steps", 0)

    def take(self) -> dict[str, float]:
        """Return the sums since the last call and start again."""
        taken, self.sums, self.steps = self.sums, {}, 0
        return taken


def _l2_coefficient(optimizer: Any, group: Mapping[str, Any]) -> float:
    """Return the coefficient of the L2 term that an optimizer adds to the loss; decoupled decay adds none."""
    if not isinstance(optimizer, _L2_OPTIMIZERS) or isinstance(optimizer, torch.optim.AdamW):
        return 0.0
    return 0.0 if group.get("decoupled_weight_decay") else float(group.get("weight_decay") or 0.0)


def block_step_sizes(
    blocks: Mapping[str, ParameterBlock], sums: Mapping[str, float], module: nn.Module
) -> dict[str, tuple[float, float]]:
    """Return, for every block, the step sizes of its first parameter and of the others (a bias; 0 without one)."""
    by_id = {id(p): sums.get(name, 0.0) for name, p in module.named_parameters()}
    result = {}
    for name, block in blocks.items():
        sizes = [by_id.get(id(parameter), 0.0) for parameter in block.parameters.values()]
        result[name] = sizes[0], sizes[-1] if len(sizes) > 1 else 0.0
    return result


def self_influence(io: LayerIO, norms: Tensor, bias_columns: slice | None, step_sizes: tuple[float, float]) -> Tensor:
    """Return one block's part of ``η ‖∇ℓ(z)‖²`` for every example, ``[n]``.

    Args:
        io: The block's activations and output gradients.
        norms: Its squared gradient norms ``[n]``.
        bias_columns: Columns of the activations that are the bias.
        step_sizes: Of the weight and of the bias.
    """
    weight, bias = step_sizes
    if bias_columns is None or weight == bias:
        return norms * weight
    of_bias = squared_norms(io.x[..., bias_columns], io.gs[0])
    return norms * weight + of_bias * (bias - weight)


class TracInScores:
    """Running TracIn self-influence of every example.

    Args:
        size: Number of examples of the data set.
    """

    def __init__(self, size: int) -> None:
        self.values = torch.zeros(size, dtype=torch.float64)
        self.checkpoints: list[int] = []

    def add(self, step: int, indices: Iterable[int], increments: Tensor) -> bool:
        """Add one checkpoint's part; a step that was added before (a resumed run) is left alone.

        Returns:
            Whether it was added.
        """
        if step in self.checkpoints:
            return False
        self.checkpoints.append(step)
        self.values[torch.as_tensor(list(indices))] += increments.double().cpu()
        return True
