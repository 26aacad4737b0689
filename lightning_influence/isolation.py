"""Leaving no trace: everything an extra pass over the data can touch is put back.

An audit re-runs the user's own ``training_step`` in the middle of a training run. The guards here make that
invisible: random streams, train/eval modes, buffers, ``requires_grad`` flags and the attributes of every
submodule (torchmetrics states and the ``self.outputs.append(loss)`` habit included) are the same objects with
the same values afterwards.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

# Containers longer than this are copied without looking inside: walking a million-entry list on every pass
# would cost more than the pass, and such lists hold data, not running state.
_DEEP_COPY_LIMIT = 10_000

_MODULE_INTERNALS = frozenset(
    name for name in nn.Module().__dict__ if name not in {"training"}
)  # parameters, buffers, submodules and hook tables have guards of their own


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


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Put every submodule in eval mode and give each its own mode back (a frozen BatchNorm stays frozen)."""
    modes = [(submodule, submodule.training) for submodule in module.modules()]
    try:
        # The attribute instead of .eval(): a LightningModule may override train()/eval() with side effects.
        for submodule, _ in modes:
            submodule.training = False
        yield
    finally:
        for submodule, mode in modes:
            submodule.training = mode


@contextmanager
def frozen_parameters(module: nn.Module) -> Iterator[None]:
    """Clear ``requires_grad`` of every parameter: backward passes then compute no weight gradients."""
    flags = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextmanager
def restored_buffers(module: nn.Module) -> Iterator[None]:
    """Give the pass copies of all buffers; the originals are put back untouched."""
    originals: list[tuple[nn.Module, str, Tensor | None]] = []
    memo: dict[int, Any] = {}
    try:
        for submodule in module.modules():
            for name, buffer in submodule._buffers.items():
                originals.append((submodule, name, buffer))
        for submodule, name, buffer in originals:
            submodule._buffers[name] = _working_copy(buffer, memo)
        yield
    finally:
        for submodule, name, buffer in originals:
            submodule._buffers[name] = buffer


@contextmanager
def restored_attributes(module: nn.Module) -> Iterator[None]:
    """Give the pass copies of the tensors and containers that submodules hold as plain attributes.

    The originals are set aside and put back, so aliases (the states that a torchmetrics ``MetricCollection``
    shares between its members) stay aliases.
    """
    originals = [(submodule, dict(submodule.__dict__)) for submodule in module.modules()]
    memo: dict[int, Any] = {}
    try:
        for submodule, attributes in originals:
            for name, value in attributes.items():
                if name not in _MODULE_INTERNALS:
                    copy = _working_copy(value, memo)
                    if copy is not value:
                        submodule.__dict__[name] = copy
        yield
    finally:
        for submodule, attributes in originals:
            submodule.__dict__.clear()
            submodule.__dict__.update(attributes)


@contextmanager
def untouched(module: nn.Module) -> Iterator[None]:
    """Run an extra pass over ``module``: eval mode, frozen parameters, and everything put back at the end.

    Gradients are enabled inside (activations may require them); ``.grad`` of the parameters is never written.
    Python objects that are neither tensors nor built-in containers (a user's own statistics object) are shared
    with the pass and cannot be protected.

    Args:
        module: The user's model, on its device.

    Yields:
        Nothing; the guards are active inside the ``with`` block.
    """
    with ExitStack() as guards:
        guards.enter_context(isolated_rng())
        guards.enter_context(restored_attributes(module))
        guards.enter_context(restored_buffers(module))
        guards.enter_context(evaluation_mode(module))
        guards.enter_context(frozen_parameters(module))
        guards.enter_context(torch.inference_mode(False))
        guards.enter_context(torch.enable_grad())
        # Hooks and probes need the eager modules; a compiled forward would not call them.
        guards.enter_context(_eager())
        yield


def _eager() -> Any:
    return torch.compiler.set_stance("force_eager")


def _working_copy(value: Any, memo: dict[int, Any]) -> Any:
    """Copy tensors and built-in containers, sharing everything else; aliases stay aliases through ``memo``."""
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, nn.Parameter):
        return value
    copy: Any
    if isinstance(value, Tensor):
        copy = value.detach().clone()
    elif type(value) in (list, deque):
        inner = value if len(value) > _DEEP_COPY_LIMIT else [_working_copy(item, memo) for item in value]
        copy = deque(inner, value.maxlen) if isinstance(value, deque) else list(inner)
    elif type(value) is dict:
        small = len(value) <= _DEEP_COPY_LIMIT
        copy = {key: _working_copy(item, memo) if small else item for key, item in value.items()}
    elif type(value) is set:
        copy = set(value)
    else:
        return value
    memo[id(value)] = copy
    return copy
