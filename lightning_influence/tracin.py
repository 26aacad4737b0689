"""TracIn: influence traced along the run (Pruthi et al. 2020, 2002.08484).

``TracIn(z, z) = Σ_t η_t ∇ℓ(z; θ_t)ᵀ P_t ∇ℓ(z; θ_t)``. A checkpoint stands for the optimizer steps since the one before
it, so ``η_t`` is the sum of the learning rates that those steps really used, per parameter, divided by
``1 - momentum`` (a constant gradient moves the weights by that much). ``P_t`` is what an adaptive optimizer multiplies
gradients with, elementwise, from its state (see ``optimizers``), and the identity for plain gradient steps; an
optimizer whose update is not known counts as plain, with its learning rate.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
from torch import Tensor, nn

from lightning_influence import optimizers, per_sample
from lightning_influence.capture import LayerIO
from lightning_influence.coverage import Layers, listed_layers
from lightning_influence.curvature.damping import OptimizerHistory
from lightning_influence.layers import ParameterBlock

Mode = Literal["epoch", "step"]

# Batches of scores in flight that wait for being added up.
_FLUSH_EVERY = 64

StepSize: TypeAlias = "tuple[float, float] | Tensor"
"""``η`` of a block's first parameter and of the others, or ``η P`` of every scalar, ``[k, o, i]``."""


@dataclass(frozen=True)
class TracIn:
    """How TracIn is computed during training.

    Attributes:
        mode: ``"epoch"``: at ends of epochs, one pass over the training data scores every example at the weights of
            the moment. ``"step"``: in flight, from the training pass itself: every example counts ``η_t ‖g‖²`` at each
            step that trains on it, with the gradient of that very pass (its dropout and its augmentation included,
            before clipping). No pass over the data is added.
        every_n_epochs: Epochs between checkpoints: between passes in mode ``"epoch"``, and between kept checkpoints in
            either mode.
        every_n_steps: Mode ``"step"`` only: of so many consecutive batches one is measured, drawn at random from a
            stream of its own. An example's sum over its measured visits is scaled by its number of visits over
            that of the measured ones; it is NaN if none was measured.
        layers: Mode ``"step"`` only: layers to measure, as the callback's ``layers``, a part of those; the scores are
            then about these layers. None for all.
        overhead: Mode ``"step"`` only: largest share of the training time to add, such as 0.1, the training dynamics
            included. The first batches are timed with and without, and ``every_n_steps`` is raised as far as needed;
            the audit's notes say to what.
        keep_checkpoints: Number of checkpoints to keep in the audit directory, for scores of pairs; 0 for none.
            With more, those that are left stay spread evenly over the training, and the step sizes of a dropped one
            count towards the next.
        keep_bytes: Bytes that they may take together.

    Raises:
        ValueError: If a value is out of range, or is about the other mode.

    Example:
        >>> InfluenceAudit(tracin=TracIn(mode="step", overhead=0.1))
    """

    mode: Mode = "epoch"
    every_n_epochs: int = 1
    every_n_steps: int = 1
    layers: Layers = None
    overhead: float | None = None
    keep_checkpoints: int = 10
    keep_bytes: int = 2**30

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise ValueError(f"mode={self.mode!r}; expected one of {', '.join(map(repr, get_args(Mode)))}.")
        for name, least in (("every_n_epochs", 1), ("every_n_steps", 1), ("keep_checkpoints", 0), ("keep_bytes", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name}={value!r}; expected an integer >= {least}.")
        budget = self.overhead
        if budget is not None and (isinstance(budget, bool) or not isinstance(budget, (int, float)) or not budget > 0):
            raise ValueError(f"overhead={budget!r}; expected a share of the training time > 0, such as 0.1, or None.")
        asked = [name for name in ("layers", "overhead") if getattr(self, name) is not None]
        asked += ["every_n_steps"] if self.every_n_steps != 1 else []
        if self.mode == "epoch" and asked:
            raise ValueError(f'{asked[0]}={getattr(self, asked[0])!r} is about TracIn in flight; pass mode="step".')

    def described(self) -> dict[str, Any]:
        """Return the settings in primitives."""
        layers = None if self.layers is None else [getattr(e, "__name__", e) for e in listed_layers(self.layers)]
        return {**vars(self), "layers": layers}


class StepSizes:
    """Sums the learning rates that the optimizers use, per parameter, between two checkpoints.

    Args:
        module: The model; learning rates are kept under its parameter names.

    Attributes:
        summed: Number of examples whose own losses add up to a batch loss; 1 where that is their mean. As many times
            the rate of a sum is the rate of the mean that makes the same steps, and a part of its L2 term.
    """

    def __init__(self, module: nn.Module) -> None:
        self.summed = 1
        self._names = {id(p): name for name, p in module.named_parameters()}
        self.steps = 0
        self._sums: dict[str, float] = {}
        self._totals: dict[str, float] = {}
        self._weight_decay: dict[str, float] = {}
        self._adaptive: set[str] = set()
        self._all_steps = 0
        self.optimizers: set[str] = set()
        self.unknown: set[str] = set()
        self._met: set[type] = set()  # optimizers that are in these sets
        # Rates and L2 coefficients wait for being shared out to each of the parameters that they are for.
        self._waiting: dict[tuple[str, ...], tuple[float, float]] = {}

    @property
    def sums(self) -> dict[str, float]:
        """Parameter name to the sum of its learning rates since the last checkpoint."""
        self._share_out()
        return self._sums

    def record(self, optimizer: Any) -> None:
        """Add the current learning rates of one optimizer, just before it steps."""
        self.steps += 1
        self._all_steps += 1
        optimizer = optimizers.inner(optimizer)
        if type(optimizer) not in self._met:
            self._meet(optimizer)
        names, waiting = self._names, self._waiting
        for group in optimizer.param_groups:
            known = tuple([names[id(p)] for p in group["params"] if p.requires_grad and id(p) in names])
            before, _ = waiting.get(known, (0.0, 0.0))
            decay = optimizers.l2_coefficient(optimizer, group) / self.summed
            waiting[known] = before + optimizers.rate(group) * self.summed, decay

    def _meet(self, optimizer: Any) -> None:
        self._met.add(type(optimizer))
        name = type(optimizer).__name__
        self.optimizers.add(name)
        if not optimizers.is_understood(optimizer):
            self.unknown.add(name)
        if not isinstance(optimizer, torch.optim.SGD):
            self._adaptive.add(name)

    def _share_out(self) -> None:
        waiting, self._waiting = self._waiting, {}
        for names, (rate, decay) in waiting.items():
            for name in names:
                self._sums[name] = self._sums.get(name, 0.0) + rate
                self._totals[name] = self._totals.get(name, 0.0) + rate
                self._weight_decay[name] = decay

    def history(self) -> OptimizerHistory:
        """Return what the optimizers have done since the start of training."""
        self._share_out()
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
            "optimizers": sorted(self.optimizers),
            "unknown_optimizers": sorted(self.unknown),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint; one of an earlier version does not know the totals."""
        self._sums, self._waiting = dict(state["step_sizes"]), {}
        self.steps = state["steps"]
        self._totals = dict(state.get("total_step_sizes", {}))
        self._weight_decay = dict(state.get("weight_decay", {}))
        self._adaptive = set(state.get("adaptive", ()))
        self._all_steps = state.get("all_steps", 0)
        self._met = set()
        self.optimizers = set(state.get("optimizers", ()))
        self.unknown = set(state.get("unknown_optimizers", ()))

    def take(self) -> dict[str, float]:
        """Return the sums since the last call and start again."""
        taken, self._sums, self.steps = self.sums, {}, 0
        return taken


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
    names = {id(p): name for name, p in module.named_parameters()}
    preconditioner = preconditioner or {}
    result: dict[str, StepSize] = {}
    for block_name, block in blocks.items():
        own = {name: names.get(id(parameter), "") for name, parameter in block.parameters.items()}
        sizes = [sums.get(name, 0.0) for name in own.values()]
        if preconditioner.keys() & own.values():
            scaled = {
                name: sums.get(own[name], 0.0) * preconditioner.get(own[name], torch.ones_like(parameter)).to(parameter)
                for name, parameter in block.parameters.items()
            }
            result[block_name] = block.from_parameters({name: value.detach() for name, value in scaled.items()})
        else:
            result[block_name] = sizes[0], sizes[-1] if len(sizes) > 1 else 0.0
    return result


def is_one_rate(step_size: StepSize, bias_columns: slice | None) -> bool:
    """Tell whether all of a block's parameters have one and the same ``η``, so that its squared norms tell all.

    Args:
        step_size: Of the block.
        bias_columns: Columns of the activations that are the bias; None without one.
    """
    return not isinstance(step_size, Tensor) and (bias_columns is None or step_size[0] == step_size[1])


def self_influence(io: LayerIO, norms: Tensor, bias_columns: slice | None, step_size: StepSize) -> Tensor:
    """Return one block's part of ``η gᵀ P g`` for every example, ``[n]``.

    Args:
        io: The block's activations and output gradients.
        norms: Its squared gradient norms ``[n]``.
        bias_columns: Columns of the activations that are the bias.
        step_size: Of the block.
    """
    if isinstance(step_size, Tensor):
        return per_sample.weighted_squares(io.x, io.gs[0], step_size.to(io.x))
    weight, bias = step_size
    if bias_columns is None or is_one_rate(step_size, bias_columns):
        return norms * weight
    of_bias = per_sample.squared_norms(io.x[..., bias_columns], io.gs[0])
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
        self.values[torch.as_tensor(list(indices))] += increments.cpu().double()
        return True


@dataclass(frozen=True, eq=False)
class Increments:
    """What a batch adds in flight: ``Σ η s + Σ g² (η x² + η')`` per example, not yet added up.

    Attributes:
        n: Number of examples.
        squares: Squared norms ``s: [n]``, each with its ``η``.
        lengths: Of linear maps with a row per example: lengths of inputs and output gradients, ``[n]`` each, and ``η``
            of weight and bias.
    """

    n: int
    squares: Sequence[tuple[Tensor, float]]
    lengths: Sequence[tuple[Tensor, Tensor, float, float]]

    @staticmethod
    def joined(batches: Sequence[Increments]) -> Tensor:
        """Add up each of several batches, and lay them end to end, float64; one by one it takes as long as a step."""
        parts = []
        for n, run in groupby(batches, lambda batch: batch.n):
            alike = list(run)
            total = torch.zeros(len(alike), n, dtype=torch.float64)
            if squares := [(k, *entry) for k, batch in enumerate(alike) for entry in batch.squares]:
                of, s, rates = zip(*squares, strict=True)
                total.index_add_(0, torch.tensor(of), _stacked(s) * _column(rates))
            if lengths := [(k, *entry) for k, batch in enumerate(alike) for entry in batch.lengths]:
                of, x, g, weights, biases = zip(*lengths, strict=True)
                inner = _stacked(x).square_().mul_(_column(weights)).add_(_column(biases))
                total.index_add_(0, torch.tensor(of), inner.mul_(_stacked(g).square_()))
            parts.append(total.flatten())
        return torch.cat(parts)


def _stacked(rows: Sequence[Tensor]) -> Tensor:
    return torch.stack(tuple(rows)).cpu().double()


def _column(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).unsqueeze(1)


class VisitSums:
    """Running TracIn in flight of every example: a sum over the times it was trained on.

    Where only some of the batches are measured, the sum over an example's measured visits is multiplied by its number
    of visits over that of the measured ones: the mean is taken for that of all, so that scores do not depend on how
    often chance has measured an example.

    Args:
        size: Number of examples of the data set.
    """

    def __init__(self, size: int) -> None:
        self.sums = {
            name: torch.zeros(size, dtype=torch.float64) for name in ("tracin", "tracin_visits", "tracin_measured")
        }
        # What all processes knew when they last told each other; the rest of the sums is this process's own.
        self._common = {name: value.clone() for name, value in self.sums.items()}
        # Increments wait on their device: copying each one at once would make a GPU wait in every step.
        self._waiting: list[tuple[Sequence[int], Increments | None]] = []

    def add(self, indices: Sequence[int], increments: Increments | None) -> None:
        """Add one batch.

        Args:
            indices: Dataset indices; one that is there twice was trained on twice.
            increments: ``η ‖g‖²``; None if the batch was not measured.
        """
        self._waiting.append((indices, increments))
        if len(self._waiting) >= _FLUSH_EVERY:
            self.flush()

    def flush(self) -> None:
        """Add the waiting batches to the sums."""
        waiting, self._waiting = self._waiting, []
        measured = [(rows, values) for rows, values in waiting if values is not None]
        for name, batches in (
            ("tracin_visits", [rows for rows, _ in waiting]),
            ("tracin_measured", [r for r, _ in measured]),
        ):
            rows = torch.from_numpy(np.fromiter(chain.from_iterable(batches), np.int64))
            self.sums[name].index_add_(0, rows, torch.ones(len(rows), dtype=torch.float64))
        if measured:
            # The rows of the measured batches: those of the last round of the loop.
            self.sums["tracin"].index_add_(0, rows, Increments.joined([values for _, values in measured]))

    def addends(self) -> list[Tensor]:
        """Return what is to be summed over the processes, each of which has seen its own part of the batches."""
        self.flush()
        return [value - self._common[name] for name, value in sorted(self.sums.items())]

    def take(self, totals: Sequence[Tensor]) -> None:
        """Take over what all processes have seen: the sums of their ``addends``."""
        added = zip(sorted(self.sums), totals, strict=True)
        self.load_state_dict({name: self._common[name] + total for name, total in added})

    def values(self) -> Tensor:
        """Return the scores, ``[size]``; NaN for examples that were trained on but never measured."""
        self.flush()
        visits, measured = self.sums["tracin_visits"], self.sums["tracin_measured"]
        return torch.where(visits > 0, self.sums["tracin"] * visits / measured, 0.0)

    @property
    def unmeasured(self) -> Tensor:
        """Examples that were trained on but never measured, ``[size]`` bool."""
        return (self.sums["tracin_visits"] > 0) & (self.sums["tracin_measured"] == 0)

    def state_dict(self) -> dict[str, Tensor]:
        """Return tensors only, for a Lightning checkpoint."""
        self.flush()
        return {name: value.clone() for name, value in self.sums.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a checkpoint."""
        self.sums = {name: state[name].clone() for name in self.sums}
        self._common = {name: value.clone() for name, value in self.sums.items()}
        self._waiting = []
