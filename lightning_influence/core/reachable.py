"""What user code can reach and change: attributes, containers, closures, globals that it names, class attributes."""

from __future__ import annotations

import ctypes
import functools
import gc
import itertools
import types
import warnings
from array import array
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_influence.core.origin import is_opaque, is_users
from lightning_influence.core.random_streams import GENERATORS
from lightning_influence.core.slots import (
    CONTAINERS,
    Slots,
    attributes,
    class_attributes,
    entries,
    slot_names,
    some_globals,
)

# What numbers in shared memory are made of (`multiprocessing.Value`).
SHARED = (ctypes._SimpleCData, ctypes.Array, ctypes.Structure)
BUFFERS = (bytearray, array, *SHARED)
_ATOMS = (str, bytes, int, float, complex, type(None), type(Ellipsis), range, slice, np.generic, torch.dtype)
_CACHED_FUNCTION: Any = type(functools.cache(lambda: None))
_AROUND_OTHERS = (
    types.MethodType,
    types.BuiltinMethodType,
    functools.partial,
    staticmethod,
    classmethod,
    property,
    _CACHED_FUNCTION,
)
_MOST_VISITS = 30_000

# What makes a module's parameters, buffers and submodules; the hook tables beside them are left alone.
_REGISTRIES = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
_MODULE_INTERNALS = frozenset(name for name in nn.Module().__dict__ if name != "training")


@dataclass(frozen=True, eq=False)
class Found:
    """One thing that was reached.

    Attributes:
        path: How, in words that its owner knows.
        value: The thing: a tensor, an array, a generator, a buffer of bytes, a module, or what holds ``slots``.
        slots: What it holds, if that can be changed.
        expected: Whether changing it is its purpose (a metric).
    """

    path: str
    value: Any
    slots: Slots | None = None
    expected: bool = False


class Walk:
    """Visits everything that can be reached from some objects, every thing once.

    Args:
        roots: Path to object.
        longest: Containers with more items are not looked into: they hold data, not running state.
    """

    def __init__(self, roots: Iterable[tuple[str, object]], longest: int = 10_000) -> None:
        self._longest = longest
        self._waiting: deque[tuple[str, Any, bool]] = deque((path, value, False) for path, value in roots)
        self._seen: dict[int, Any] = {}

    def __iter__(self) -> Iterator[Found]:
        """Yield what is found; each may be changed before the next one is asked for."""
        while self._waiting and len(self._seen) < _MOST_VISITS:
            path, value, expected = self._waiting.popleft()
            if isinstance(value, _ATOMS) or id(value) in self._seen:
                continue
            self._seen[id(value)] = value  # held: the id of something that is gone may come back
            yield from self._visit(path, value, expected)
        if self._waiting:
            warnings.warn(
                f"more than {_MOST_VISITS:,} objects can be reached from the model or the data: extra passes of the "
                "influence audit do not look after the rest. Keep data in arrays rather than in many small containers.",
                stacklevel=2,
            )

    def _visit(self, path: str, value: Any, expected: bool) -> Iterator[Found]:
        if isinstance(value, (Tensor, np.ndarray, *GENERATORS, *BUFFERS)):
            yield Found(path, value, expected=expected)
        elif isinstance(value, nn.Module):
            yield from self._visit_module(path, value, expected or _is_metric(value))
        elif isinstance(value, types.FunctionType):
            yield from self._visit_function(path, value)
        elif isinstance(value, _AROUND_OTHERS):
            for held in gc.get_referents(value):
                # Results that are kept are looked into; which ones those are is no state.
                results = isinstance(value, _CACHED_FUNCTION) and type(held) is dict
                for other in held.values() if results else (held,):
                    self._go_on(path, other, expected)
        elif isinstance(value, types.CellType):
            yield Found(path, value, slots := attributes(value, ["cell_contents"]))
            for content in slots.read().values():
                self._go_on(path, content, expected)
        elif isinstance(value, type):
            if is_users(value.__module__) and not issubclass(value, Enum):
                yield from self._visit_class(value)
        elif not isinstance(value, types.ModuleType):
            yield from self._visit_entries(path, value, expected)
            yield from self._visit_attributes(path, value, expected)

    def _visit_module(self, path: str, module: nn.Module, expected: bool) -> Iterator[Found]:
        own = module.__dict__
        yield Found(path, module, entries(own), expected)
        for name in _REGISTRIES:
            if isinstance(own.get(name), (dict, set)):  # scripted modules have views of C++ containers
                yield Found(path, None, entries(own[name]))
        owned = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        attributes = [(name, value) for name, value in own.items() if name not in _MODULE_INTERNALS]
        # What hooks hold, not the tables: passes have hooks of their own.
        hooks = [
            (f"{name}[{key}]", hook)
            for name, table in own.items()
            if name.endswith("_hooks") and isinstance(table, dict)
            for key, hook in table.items()
        ]
        for name, value in (*owned, *module.named_children(), *attributes, *hooks):
            self._go_on(f"{path}.{name}" if path else name, value, expected)
        self._go_on(path, type(module), expected)

    def _visit_entries(self, path: str, value: Any, expected: bool) -> Iterator[Found]:
        if isinstance(value, CONTAINERS):
            yield Found(path, value, entries(value), expected)
        if isinstance(value, (*CONTAINERS, tuple, frozenset)) and len(value) <= self._longest:
            for key, item in value.items() if isinstance(value, dict) else enumerate(value):
                self._go_on(f"{path}[{key!r}]" if isinstance(key, (int, str)) else path, item, expected)

    def _visit_attributes(self, path: str, value: Any, expected: bool) -> Iterator[Found]:
        kind: Any = type(value)
        if is_opaque(kind):
            return
        try:
            own = object.__getattribute__(value, "__dict__")
        except AttributeError:
            own = None
        owned = [entries(own)] if isinstance(own, dict) else []
        names = slot_names(kind)
        for slots in [*owned, attributes(value, names)] if names else owned:
            yield Found(path, value, slots, expected)
            for name, item in slots.read().items():
                self._go_on(f"{path}.{name}", item, expected)
        self._go_on(path, kind)

    def _visit_class(self, kind: type) -> Iterator[Found]:
        yield Found(kind.__name__, kind, class_attributes(kind))
        for name, value in list(vars(kind).items()):
            if not name.startswith("__") or isinstance(value, types.FunctionType):
                self._go_on(f"{kind.__name__}.{name}", value)
        for base in kind.__mro__[1:]:
            self._go_on(base.__name__, base)

    def _visit_function(self, path: str, function: types.FunctionType) -> Iterator[Found]:
        if function.__dict__:
            yield Found(path, function, entries(function.__dict__))
        code = function.__code__
        cells = zip(code.co_freevars, function.__closure__ or (), strict=False)
        for name, item in (*cells, *function.__dict__.items(), *(function.__kwdefaults__ or {}).items()):
            self._go_on(name, item)
        self._go_on(path, function.__defaults__)
        # `global COUNTER; COUNTER += 1`, and the same in a module that is imported by name.
        names, scope = _names_in(code), function.__globals__
        imported = [vars(scope[name]) for name in names if isinstance(scope.get(name), types.ModuleType)]
        for holder in (scope, *imported):
            if is_users(module := holder.get("__name__", "")):
                module = "" if module == "__main__" else module
                yield Found(module, None, slots := some_globals(holder, names))
                for name, item in slots.read().items():
                    self._go_on(f"{module}.{name}" if module else name, item)

    def _go_on(self, path: str, value: Any, expected: bool = False) -> None:
        if not isinstance(value, _ATOMS):
            self._waiting.append((path, value, expected))


def shallow(path: str, holder: dict[str, Any]) -> Iterator[Found]:
    """Yield attributes, and the containers and tensors among them, not what those hold: that may be a whole model."""
    yield Found(path, holder, entries(holder))
    for name, value in holder.items():
        if isinstance(value, (Tensor, *CONTAINERS)):
            yield Found(f"{path}.{name}", value, None if isinstance(value, Tensor) else entries(value))


def _is_metric(module: nn.Module) -> bool:
    return any(base.__module__.startswith("torchmetrics") for base in type(module).__mro__)


@functools.cache
def _names_in(code: types.CodeType) -> frozenset[str]:
    """Return the global and attribute names that a function uses, functions within it included."""
    inner = [_names_in(constant) for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return frozenset(itertools.chain(code.co_names, *inner))
