"""Step sizes that optimizers have really taken, by parameter and by layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lightning_influence.core.precision import exact
from lightning_influence.core.sharding import names_of
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
        moved: Parameter name to ``Σ_t η_t P_t``, what its gradient was multiplied with in all; ``P`` of Adam and its
            kin is one over the mean of ``1/P`` over the scalars. Without parameters of which it is not known. By
            default ``step_sizes``, unless an optimizer is adaptive.
    """

    step_sizes: Mapping[str, float]
    weight_decay: Mapping[str, float]
    adaptive: tuple[str, ...]
    steps: int
    moved: Mapping[str, float] | None = None


# Scalars of a block whose step sizes are kept from one batch to the next: those of larger ones would be as large as the
# model, all together.
_KEPT = 2**20

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
        optimizers: Names of all that have stepped.
        unknown: Those of which it is not known how they turn gradients into steps.
    """

    def __init__(self, module: nn.Module) -> None:
        self.summed = 1
        self.steps = 0
        self.optimizers: set[str] = set()
        self.unknown: set[str] = set()
        self._names = names_of(module)
        self._sums: dict[str, float] = {}
        self._totals: dict[str, float] = {}
        self._weight_decay: dict[str, float] = {}
        self._adaptive: set[str] = set()
        # Names of parameters that adaptive optimizers move, and those of which it is not known how they do.
        self._scaled: set[str] = set()
        self._unclear: set[str] = set()
        # Σ η and Σ η P over the steps whose P is known
        self._known: dict[str, tuple[float, float]] = {}
        self._all_steps = 0
        # Of each group rate, decay and parameters of the last step, the kind of its optimizer, and how many such steps
        # have not been added up.
        self._taken: list[tuple[float, float, list[int]]] = []
        self._kind: type | None = None
        self._alike = 0

    @property
    def sums(self) -> dict[str, float]:
        """Parameter name to the sum of its learning rates since the last checkpoint."""
        self._add_up()
        return self._sums

    def record(self, optimizer: Any, times: int = 1) -> None:
        """Add the current learning rates of one optimizer, just before it steps.

        Args:
            optimizer: The optimizer.
            times: Number of steps with them.

        Raises:
            TypeError: If it is none.
        """
        optimizer = optimizers.inner(optimizer)
        if not isinstance(getattr(optimizer, "param_groups", None), list):
            raise TypeError(
                f"the optimizer is a {type(optimizer).__name__}; expected one of torch, or a wrapper of it."
            )
        self.steps += times
        self._all_steps += times
        # Most steps are like the one before: what they move is added up when somebody asks.
        taken = [
            (
                optimizers.rate(group) * self.summed * times,
                optimizers.l2_coefficient(optimizer, group) / self.summed,
                [id(parameter) for parameter in group["params"] if parameter.requires_grad],
            )
            for group in optimizer.param_groups
        ]
        if taken == self._taken and type(optimizer) is self._kind:
            self._alike += 1
            return
        self._add_up()
        self._taken, self._kind, self._alike = taken, type(optimizer), 1
        kind = type(optimizer).__name__
        self.optimizers.add(kind)
        understood = optimizers.is_understood(optimizer)
        self.unknown |= set() if understood else {kind}
        plain = understood and not optimizers.is_preconditioned(optimizer)
        self._adaptive |= set() if plain else {kind}
        moved = {self._names[each] for _, _, parameters in taken for each in parameters if each in self._names}
        (set() if plain else self._scaled if understood else self._unclear).update(moved)

    def _add_up(self) -> None:
        """Add the steps that are alike, one by one: sums are the same whenever somebody asks."""
        steps, self._alike = self._alike, 0
        for rate, decay, parameters in self._taken if steps else ():
            for name in [self._names[each] for each in parameters if each in self._names]:
                total, since = self._totals.get(name, 0.0), self._sums.get(name, 0.0)
                for _ in range(steps):
                    total, since = total + rate, since + rate
                self._totals[name], self._sums[name], self._weight_decay[name] = total, since, decay

    def history(self, preconditioner: Mapping[str, Tensor] | None = None) -> OptimizerHistory:
        """Return what the optimizers have done since the start of training.

        Args:
            preconditioner: What adaptive optimizers multiply gradients with now, see ``optimizers.preconditioners``; it
                stands for the steps since the last ``take``.
        """
        self._add_up()
        known = self._with(preconditioner)
        told = bool(known) or preconditioner is not None
        moved = {}
        for name, total in self._totals.items():
            if name not in self._scaled | self._unclear:
                moved[name] = total
            elif told and name not in self._unclear:
                # Steps of which nothing is known count as the others; what has no scale yet has not been moved.
                size, scaled = known.get(name, (1.0, 0.0))
                moved[name] = total * scaled / size
        adaptive = tuple(sorted(self._adaptive))
        return OptimizerHistory(dict(self._totals), dict(self._weight_decay), adaptive, self._all_steps, moved)

    def take(self, preconditioner: Mapping[str, Tensor] | None = None) -> dict[str, float]:
        """Return the sums since the last call and start again; ``preconditioner`` as for ``history``."""
        self._known = self._with(preconditioner)
        taken, self._sums, self.steps = self.sums, {}, 0
        return taken

    def _with(self, preconditioner: Mapping[str, Tensor] | None) -> dict[str, tuple[float, float]]:
        """Return what is known of scales, given that of the steps since the last checkpoint."""
        known, sums = dict(self._known), self.sums
        for name, scale in (preconditioner or {}).items():
            # An entry that no step has moved has no part in the mean.
            inverse = exact(scale[scale > 0]).reciprocal()
            if name in sums:
                size, scaled = known.get(name, (0.0, 0.0))
                by = sums[name] / float(inverse.mean()) if inverse.numel() else 0.0
                known[name] = size + sums[name], scaled + by
        return {name: (size, scaled) for name, (size, scaled) in known.items() if size}

    def state_dict(self) -> dict[str, Any]:
        """Return the sums, in primitives."""
        self._add_up()
        return {
            "sums": dict(self.sums),
            "steps": self.steps,
            "totals": dict(self._totals),
            "weight_decay": dict(self._weight_decay),
            "all_steps": self._all_steps,
            "optimizers": sorted(self.optimizers),
            "unknown": sorted(self.unknown),
            "adaptive": sorted(self._adaptive),
            "scaled": sorted(self._scaled),
            "unclear": sorted(self._unclear),
            "known": {name: list(pair) for name, pair in self._known.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._taken, self._kind, self._alike = [], None, 0
        self._sums, self._totals = dict(state["sums"]), dict(state["totals"])
        self._weight_decay = dict(state["weight_decay"])
        self.steps, self._all_steps = state["steps"], state["all_steps"]
        self.optimizers, self.unknown = set(state["optimizers"]), set(state["unknown"])
        self._adaptive = set(state["adaptive"])
        # Checkpoints of earlier versions do not tell which parameters those optimizers moved.
        self._scaled = set(state.get("scaled", self._totals if self._adaptive else ()))
        self._unclear = set(state.get("unclear", ()))
        self._known = {name: (size, moved) for name, (size, moved) in state.get("known", {}).items()}


def block_step_sizes(
    blocks: Mapping[str, ParameterBlock],
    sums: Mapping[str, float],
    module: nn.Module,
    preconditioner: Mapping[str, Tensor] | None = None,
) -> Mapping[str, StepSize]:
    """Return the step sizes of every block; those of large ones are put together whenever they are asked for.

    Args:
        blocks: The blocks.
        sums: Parameter name to step size; 0 for others.
        module: The model, as a parameter may have several names.
        preconditioner: Parameter name to what its gradient is multiplied with, elementwise; ones for others.
    """
    return _BlockStepSizes(blocks, sums, names_of(module), preconditioner or {})


class _BlockStepSizes(Mapping[str, StepSize]):
    def __init__(
        self,
        blocks: Mapping[str, ParameterBlock],
        sums: Mapping[str, float],
        names: Mapping[int, str],
        preconditioner: Mapping[str, Tensor],
    ) -> None:
        self._blocks, self._sums, self._names, self._preconditioner = blocks, sums, names, preconditioner
        self._kept: dict[str, StepSize] = {}

    def __getitem__(self, name: str) -> StepSize:
        found = self._kept[name] if name in self._kept else self._found(self._blocks[name])
        if not isinstance(found, Tensor) or found.numel() <= _KEPT:
            self._kept[name] = found
        return found

    def _found(self, block: ParameterBlock) -> StepSize:
        own = {name: self._names.get(id(parameter), "") for name, parameter in block.parameters.items()}
        sizes = {self._sums.get(name, 0.0) for name in own.values()}
        if len(sizes) == 1 and not self._preconditioner.keys() & own.values():
            return sizes.pop()
        scaled = {
            name: self._sums.get(own[name], 0.0) * self._scale(own[name], parameter)
            for name, parameter in block.parameters.items()
        }
        return block.from_parameters({name: value.detach() for name, value in scaled.items()})

    def _scale(self, name: str, parameter: Tensor) -> Tensor:
        found = self._preconditioner.get(name)
        return torch.ones_like(parameter) if found is None else found.to(parameter)

    def __iter__(self) -> Iterator[str]:
        return iter(self._blocks)

    def __len__(self) -> int:
        return len(self._blocks)


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
