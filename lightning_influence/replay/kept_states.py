"""The states of a run that are kept, at even distances, within a budget."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from lightning_influence.core.containers import leaves
from lightning_influence.core.torch_private import eager_name
from lightning_influence.core.weights import parameters_of
from lightning_influence.replay.record import RunState

# Of memory; what is beyond lies on the disk, if there is one.
_IN_MEMORY = 2**28


class Shelf(Protocol):
    """Where states are put that are too large for the memory."""

    def put(self, state: RunState) -> None:
        """Keep a state."""
        ...

    def get(self, step: int) -> RunState:
        """Return it."""
        ...

    def drop(self, step: int) -> None:
        """Forget it."""
        ...


class KeptStates(Mapping[int, RunState]):
    """States by step: the first, every ⌈√K⌉-th of K, the last.

    Where K is not known, or the budget is small, every second one is dropped whenever there are too many.

    Args:
        steps: K, None if it is not known.
        shelf: For what is too large for the memory.

    Attributes:
        interval: Steps between two states.
        bytes: That all of them take.
        shelf: See the arguments.
    """

    def __init__(self, steps: int | None = None, shelf: Shelf | None = None) -> None:
        self.interval = 1 if steps is None else max(1, math.ceil(math.sqrt(steps)))
        self.bytes = 0
        self.shelf = shelf
        self._held: dict[int, RunState] = {}
        self._sizes: dict[int, int] = {}

    def __getitem__(self, step: int) -> RunState:
        if step in self._held or self.shelf is None or step not in self._sizes:
            return self._held[step]
        return self.shelf.get(step)

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(self._sizes))

    def __len__(self) -> int:
        return len(self._sizes)

    def keep(self, state: RunState) -> None:
        """Keep a state."""
        size = bytes_of([dict(state.parameters), dict(state.buffers), dict(state.optimizer)])
        in_memory = sum(self._sizes[step] for step in self._held)
        if self.shelf is None or in_memory + size <= _IN_MEMORY:
            self._held[state.step] = state
        else:
            self.shelf.put(state)
        self._sizes[state.step] = size
        self.bytes += size
        if len(self) > 2 * self.interval + 2:
            self.thin()

    def thin(self) -> bool:
        """Keep every second state; tell whether there was one to drop."""
        steps = list(self)
        if len(steps) < 3:
            return False
        self.interval *= 2
        for step in steps[:-1]:
            if step % self.interval:
                self._drop(step)
        return True

    def clear(self) -> None:
        """Drop all of them."""
        for step in list(self):
            self._drop(step)

    def _drop(self, step: int) -> None:
        self.bytes -= self._sizes.pop(step)
        if self._held.pop(step, None) is None and self.shelf is not None:
            self.shelf.drop(step)


def state_of(module: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> RunState:
    """Return a copy, on the host, of all that a step changes.

    Args:
        module: The model.
        optimizer: Its optimizer.
        step: Number of steps that it has taken.
    """
    parameters = parameters_of(module)
    names = {id(p): name for name, p in parameters.items()}
    return RunState(
        step,
        {name: _copy(p) for name, p in parameters.items() if p.requires_grad},
        {eager_name(name): _copy(buffer) for name, buffer in module.named_buffers()},
        {names[id(p)]: {key: _copy(value) for key, value in own.items()} for p, own in optimizer.state.items() if own},
    )


def bytes_of(node: Any) -> int:
    """Return the memory that tensors and arrays in nested containers take."""
    return sum(leaf.nbytes for _, leaf in leaves(node) if isinstance(leaf, (Tensor, np.ndarray)))


def _copy(value: Any) -> Any:
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value
