"""Leaving no trace: everything an extra pass over the data can touch is put back.

An audit re-runs the user's own ``training_step`` in the middle of a training run. The guards here make that invisible:
random streams, train/eval modes, ``requires_grad`` flags, and whatever the step moves itself (a teacher's weights, a
memory bank, a meter, a counter in a closure) are the same objects with the same values afterwards.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import nn

from lightning_influence.core.reachable import Found, Walk
from lightning_influence.core.snapshot import Snapshot
from lightning_influence.core.torch_private import eagerly

# Containers of data sets with more items are not looked into.
LONGEST_OF_DATA = 1_000


@contextmanager
def isolated_rng() -> Iterator[None]:
    """Restore the random streams of Python, NumPy and torch (CPU and every initialised accelerator)."""
    python_state = random.getstate()
    numpy_state = np.random.get_state()
    cpu_state = torch.get_rng_state()
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    mps_state = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(cpu_state)
        if cuda_states is not None:
            torch.cuda.set_rng_state_all(cuda_states)
        if mps_state is not None:
            torch.mps.set_rng_state(mps_state)


def seed_generator(generator: Any, seed: int) -> None:
    """Put a random generator of any kind at the start of the stream of ``seed``."""
    if isinstance(generator, torch.Generator):
        generator.manual_seed(seed)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = type(generator.bit_generator)(seed).state
    else:
        generator.seed(seed % 2**32)


def seed_everything(seed: int) -> None:
    """Seed the global streams; use under ``isolated_rng``."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    # `torch.manual_seed` formats a stack trace for an accelerator that may not be there: 0.4 ms each time.
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(seed)


@contextmanager
def unchanged(*data: object) -> Iterator[Snapshot]:
    """Leave all that a data set and its helpers reach as it is found; random streams of the process are not theirs."""
    walk = Walk([(type(part).__name__, part) for part in data], LONGEST_OF_DATA)
    snapshot = Snapshot(walk, data=True)
    try:
        yield snapshot
    finally:
        snapshot.restore()


@contextmanager
def left_alone(*data: object) -> Iterator[None]:
    """Leave the random streams, and all that a data set and its helpers reach, as they are found."""
    with isolated_rng(), unchanged(*data):
        yield


# Of passes that are under way, the innermost last; and what passes over a model have found to change.
_under_way: list[Snapshot] = []
_changed: WeakKeyDictionary[nn.Module, dict[str, None]] = WeakKeyDictionary()


@contextmanager
def untouched(module: nn.Module, *others: object) -> Iterator[None]:
    """Run an extra pass over ``module``: eval mode, frozen parameters, and everything put back at the end.

    Gradients are enabled inside (activations may require them); ``.grad`` of the parameters is never written. All that
    the module reaches is compared with what it was, and put back in place: weights, buffers, attributes, containers and
    objects within, closures, class attributes, and the globals that the user's functions name. What was found changed
    is told by ``changes_in``.

    Args:
        module: The user's model, on its device.
        *others: What else the pass runs (a task).

    Yields:
        Nothing; the guards are active inside the ``with`` block.

    Raises:
        StateError: If something has changed that can't be put back.
    """
    reached = list(Walk([("", module), *((getattr(other, "__name__", "task"), other) for other in others)]))
    with ExitStack() as guards:
        guards.enter_context(isolated_rng())
        guards.enter_context(_evaluating([found.value for found in reached if isinstance(found.value, nn.Module)]))
        guards.enter_context(_frozen(reached))
        guards.enter_context(kept(module, reached))
        guards.enter_context(torch.inference_mode(False))
        guards.enter_context(torch.enable_grad())
        # Hooks and probes need the eager modules; a compiled forward would not call them.
        guards.enter_context(eagerly())
        yield


def rewind() -> None:
    """Put back what the batches of the innermost pass change; call at the start of each."""
    if _under_way:
        _under_way[-1].rewind()


def changes_in(module: nn.Module) -> list[str]:
    """Return the paths of what extra passes over a model have found changed and put back."""
    return list(_changed.get(module, ()))


@contextmanager
def kept(module: nn.Module, reached: list[Found]) -> Iterator[None]:
    """Put back what was reached, and let ``changes_in`` tell what of it had changed."""
    snapshot = Snapshot(reached)
    _under_way.append(snapshot)
    try:
        with snapshot.watch or nullcontext():
            yield
    finally:
        _under_way.remove(snapshot)
        try:
            snapshot.restore()
        finally:
            if snapshot.changed:
                _changed.setdefault(module, {}).update(snapshot.changed)


def hidden_parameters(root: nn.Module) -> list[nn.Parameter]:
    """Return the trainable parameters that plain attributes hide from ``root.parameters()``, of modules or loose."""
    known = {id(p) for p in root.parameters()}
    everywhere = [found.value for found in Walk([("", root)]) if isinstance(found.value, nn.Parameter)]
    return [p for p in everywhere if id(p) not in known and p.requires_grad]


@contextmanager
def _evaluating(modules: list[nn.Module]) -> Iterator[None]:
    """Put every module in eval mode and give each its own mode back (a frozen BatchNorm stays frozen)."""
    modes = [(module, module.training) for module in modules]
    try:
        # The attribute instead of .eval(): a LightningModule may override train()/eval() with side effects.
        for module in modules:
            module.training = False
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def _frozen(reached: list[Found]) -> Iterator[None]:
    """Clear ``requires_grad`` of every parameter: backward passes then compute no weight gradients."""
    parameters = [found.value for found in reached if isinstance(found.value, nn.Parameter)]
    flags = [(parameter, parameter.requires_grad) for parameter in parameters]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
