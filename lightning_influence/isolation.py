"""Leaving no trace: everything an extra pass over the data can touch is put back.

An audit re-runs the user's own ``training_step`` in the middle of a training run. The guards here make that
invisible: random streams, train/eval modes, buffers, ``requires_grad`` flags and the attributes of every
submodule (torchmetrics states and the ``self.outputs.append(loss)`` habit included) are the same objects with
the same values afterwards.
"""

from __future__ import annotations

import copy
import random
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

# Containers longer than this are copied without looking inside: walking a million-entry list on every pass
# would cost more than the pass, and such lists hold data, not running state.
_DEEP_COPY_LIMIT = 10_000

# What makes a module's parameters, buffers and submodules: restored entry by entry. The hook tables are left alone.
_REGISTRIES = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
_MODULE_INTERNALS = frozenset(name for name in nn.Module().__dict__ if name != "training")


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


_GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
_LARGEST_SEARCH = 10_000


def generators_in(root: object) -> list[Any]:
    """Return the random generators that an object holds, itself or in what it holds (a data set's transforms)."""
    found: list[Any] = []
    waiting: list[Any] = [root]
    seen: set[int] = set()
    while waiting and len(seen) < _LARGEST_SEARCH:
        value = waiting.pop()
        if id(value) in seen or isinstance(value, (str, bytes, int, float, Tensor, np.ndarray, type)):
            continue
        seen.add(id(value))
        if isinstance(value, _GENERATORS):
            found.append(value)
        elif isinstance(value, (list, tuple, set, deque)):
            waiting.extend(list(value)[:100])
        elif isinstance(value, dict):
            waiting.extend(list(value.values())[:100])
        elif hasattr(value, "__dict__"):
            waiting.extend(vars(value).values())
    return found


def seed_generator(generator: Any, seed: int) -> None:
    """Put a random generator of any kind at the start of the stream of ``seed``."""
    if isinstance(generator, torch.Generator):
        generator.manual_seed(seed)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = type(generator.bit_generator)(seed).state
    else:
        generator.seed(seed % 2**32)


@contextmanager
def isolated_generators(generators: list[Any]) -> Iterator[None]:
    """Restore the states of random generators."""
    states = [_generator_state(generator) for generator in generators]
    try:
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            if isinstance(generator, np.random.Generator):
                generator.bit_generator.state = state
            elif isinstance(generator, random.Random):
                generator.setstate(state)
            else:
                generator.set_state(state)


def _generator_state(generator: Any) -> Any:
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    return generator.getstate() if isinstance(generator, random.Random) else generator.get_state()


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
def untouched(module: nn.Module) -> Iterator[None]:
    """Run an extra pass over ``module``: eval mode, frozen parameters, and everything put back at the end.

    Gradients are enabled inside (activations may require them); ``.grad`` of the parameters is never written. The pass
    works on copies of tensors, arrays, generators and built-in containers that modules hold as attributes; the
    originals are set aside and put back, so aliases stay aliases. Other Python objects (a user's own statistics object)
    are shared with the pass and cannot be protected.

    Args:
        module: The user's model, on its device.

    Yields:
        Nothing; the guards are active inside the ``with`` block.
    """
    modules = _all_modules(module)
    with ExitStack() as guards:
        guards.enter_context(isolated_rng())
        guards.enter_context(_restored(modules))
        guards.enter_context(_evaluating(modules))
        guards.enter_context(_frozen(modules))
        guards.enter_context(_kept_weights(modules))
        guards.enter_context(torch.inference_mode(False))
        guards.enter_context(torch.enable_grad())
        # Hooks and probes need the eager modules; a compiled forward would not call them.
        guards.enter_context(_eager())
        yield


def _eager() -> AbstractContextManager[Any]:
    # Nothing is compiled before the compiler is imported, which takes seconds.
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


def _all_modules(root: nn.Module) -> list[nn.Module]:
    """Return the submodules, and modules hidden from ``modules()`` in plain attributes (``self._teacher = [net]``)."""
    found: dict[int, nn.Module] = {}
    waiting: list[Any] = [root]
    seen: set[int] = set()
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, nn.Module):
            found[id(value)] = value
            waiting.extend(value._modules.values())
            waiting.extend(item for name, item in value.__dict__.items() if name not in _MODULE_INTERNALS)
        elif isinstance(value, (list, tuple, deque, set)) and len(value) <= _DEEP_COPY_LIMIT:
            waiting.extend(value)
        elif isinstance(value, dict) and len(value) <= _DEEP_COPY_LIMIT:
            waiting.extend(value.values())
    return list(found.values())


def hidden_parameters(root: nn.Module) -> list[nn.Parameter]:
    """Return the trainable parameters of modules that plain attributes hide from ``root.parameters()``."""
    known = {id(p) for p in root.parameters()}
    everywhere = [p for module in _all_modules(root) for p in module.parameters(recurse=False)]
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
def _frozen(modules: list[nn.Module]) -> Iterator[None]:
    """Clear ``requires_grad`` of every parameter: backward passes then compute no weight gradients."""
    parameters = {id(p): p for module in modules for p in module._parameters.values() if p is not None}
    flags = [(parameter, parameter.requires_grad) for parameter in parameters.values()]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextmanager
def _kept_weights(modules: list[nn.Module]) -> Iterator[None]:
    """Put back the weights of embeddings with ``max_norm``, which every forward pass overwrites."""
    weights = [module.weight for module in modules if getattr(module, "max_norm", None) is not None]
    kept = [(weight, weight.detach().clone()) for weight in weights if isinstance(weight, Tensor)]
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, values in kept:
                if not torch.equal(weight, values):
                    weight.copy_(values)


@contextmanager
def _restored(modules: list[nn.Module]) -> Iterator[None]:
    """Let the pass work on copies of buffers and attributes; put the originals back."""
    attributes = [(module, dict(module.__dict__)) for module in modules]
    registries = [
        (module.__dict__[name], copy.copy(module.__dict__[name]))
        for module in modules
        for name in _REGISTRIES
        if isinstance(module.__dict__.get(name), (dict, set))  # scripted modules have views of C++ containers
    ]
    memo: dict[int, Any] = {}
    try:
        for module, own in attributes:
            for name, value in own.items():
                if name not in _MODULE_INTERNALS:
                    replacement = _working_copy(value, memo)
                    if replacement is not value:
                        module.__dict__[name] = replacement
            for name, buffer in list(module._buffers.items()):
                module._buffers[name] = _working_copy(buffer, memo)
        yield
    finally:
        for module, own in attributes:
            module.__dict__.clear()
            module.__dict__.update(own)
        for registry, entries in registries:
            # Cleared first: an entry that was deleted in the pass would else come back at the end of the order.
            registry.clear()
            registry.update(entries)


def _working_copy(value: Any, memo: dict[int, Any]) -> Any:
    """Copy what a pass may change in place, sharing everything else; aliases stay aliases through ``memo``."""
    if id(value) in memo:
        return memo[id(value)]
    result: Any
    if isinstance(value, nn.Parameter):
        return value
    if isinstance(value, Tensor):
        result = memo[id(value)] = value.detach().clone()
    elif isinstance(value, torch.Generator):
        result = memo[id(value)] = value.clone_state()
    elif isinstance(value, (np.ndarray, np.random.Generator, np.random.RandomState, random.Random)):
        result = memo[id(value)] = copy.deepcopy(value)
    elif isinstance(value, (list, deque)):
        result = memo[id(value)] = copy.copy(value)
        if len(value) <= _DEEP_COPY_LIMIT:
            for position, item in enumerate(value):
                result[position] = _working_copy(item, memo)
    elif isinstance(value, dict):
        result = memo[id(value)] = copy.copy(value)
        if len(value) <= _DEEP_COPY_LIMIT:
            for key, item in value.items():
                result[key] = _working_copy(item, memo)
    elif isinstance(value, set):
        result = memo[id(value)] = copy.copy(value)
    elif isinstance(value, tuple) and len(value) <= _DEEP_COPY_LIMIT:
        items = [_working_copy(item, memo) for item in value]
        if all(new is old for new, old in zip(items, value, strict=True)):
            return value
        result = memo[id(value)] = type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    else:
        return value
    return result
