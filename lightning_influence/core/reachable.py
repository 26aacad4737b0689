"""What user code can reach and change: attributes, containers, closures, globals that it names, class attributes."""

from __future__ import annotations

import ctypes
import functools
import gc
import io
import itertools
import random
import site
import sys
import sysconfig
import types
import warnings
from array import array
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
# What numbers in shared memory are made of (`multiprocessing.Value`).
SHARED = (ctypes._SimpleCData, ctypes.Array, ctypes.Structure)
BUFFERS = (bytearray, array, *SHARED)
_ATOMS = (str, bytes, int, float, complex, type(None), type(Ellipsis), range, slice, np.generic, torch.dtype)
_MOST_VISITS = 30_000
_CACHED_FUNCTION: Any = type(functools.cache(lambda: None))

# What these hold is theirs, or a whole Trainer; modules and data sets among them are looked into all the same.
_OPAQUE = {
    "torch",
    "lightning",
    "pytorch_lightning",
    "lightning_fabric",
    "lightning_utilities",
    "torchmetrics",
    "numpy",
}
_TRANSPARENT = ("torch.nn.", "torch.utils.data.", "lightning.pytorch.core.", "pytorch_lightning.core.")
_STANDARD_LIBRARY = sysconfig.get_path("stdlib")
_INSTALLED = tuple({sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()})
_HOLDERS_OF_THE_LIBRARY = {"argparse", "collections", "queue", "types", "multiprocessing.sharedctypes"}

# What makes a module's parameters, buffers and submodules; the hook tables beside them are left alone.
REGISTRIES = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
MODULE_INTERNALS = frozenset(name for name in nn.Module().__dict__ if name != "training")


@dataclass(frozen=True, eq=False)
class Slots:
    """Something that holds references and can be told to hold others: a container, an object, a closure's cell.

    Attributes:
        read: Returns what it holds at the moment, in a container of its own.
        write: Makes it hold that again, in place.
    """

    read: Callable[[], Any]
    write: Callable[[Any], None]


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
        self._names: dict[int, tuple[str, dict[str, Any], set[str]]] = {}  # of globals that functions name

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
        for path, names, chosen in self._names.values():
            yield Found("" if path == "__main__" else path, None, _chosen(names, chosen))

    def _visit(self, path: str, value: Any, expected: bool) -> Iterator[Found]:
        if isinstance(value, (Tensor, np.ndarray, *GENERATORS, *BUFFERS)):
            yield Found(path, value, expected=expected)
        elif isinstance(value, nn.Module):
            yield from self._visit_module(path, value, expected or _is_metric(value))
        elif isinstance(value, (types.FunctionType, types.MethodType, functools.partial)):
            yield from self._visit_function(path, value)
        elif isinstance(value, _CACHED_FUNCTION):
            # The function, and the results that it keeps; which ones those are is no state.
            for held in gc.get_referents(value):
                for content in held.values() if type(held) is dict else (held,):
                    self._go_on(path, content, expected)
        elif isinstance(value, types.BuiltinMethodType):
            self._go_on(path, value.__self__)
        elif isinstance(value, (staticmethod, classmethod)):
            self._go_on(path, value.__func__)
        elif isinstance(value, property):
            for function in (value.fget, value.fset):
                self._go_on(path, function)
        elif isinstance(value, types.CellType):
            yield Found(path, value, _cell(value))
            for content in _cell(value).read():
                self._go_on(path, content, expected)
        elif isinstance(value, type):
            if is_users(value.__module__) and not issubclass(value, Enum):
                yield from self._visit_class(value)
        elif not isinstance(value, types.ModuleType):
            yield from self._visit_contents(path, value, expected)
            yield from self._visit_attributes(path, value, expected)

    def _visit_module(self, path: str, module: nn.Module, expected: bool) -> Iterator[Found]:
        yield Found(path, module, _mapping(module.__dict__), expected)
        for name in REGISTRIES:
            registry = module.__dict__.get(name)
            if isinstance(registry, (dict, set)):  # scripted modules have views of C++ containers
                yield Found(path, None, _set(registry) if isinstance(registry, set) else _mapping(registry))
        owned = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        attributes = [(name, value) for name, value in module.__dict__.items() if name not in MODULE_INTERNALS]
        # What hooks hold, not the tables: passes have hooks of their own.
        hooks = [
            (f"{name}[{key}]", hook)
            for name, table in module.__dict__.items()
            if name.endswith("_hooks") and isinstance(table, dict)
            for key, hook in table.items()
        ]
        for name, value in (*owned, *module._modules.items(), *attributes, *hooks):
            self._go_on(f"{path}.{name}" if path else name, value, expected)
        self._go_on(path, type(module), expected)

    def _visit_contents(self, path: str, value: Any, expected: bool) -> Iterator[Found]:
        items: Iterable[tuple[object, Any]] = ()
        if isinstance(value, (list, deque)):
            yield Found(path, value, _sequence(value), expected)
            items = enumerate(value)
        elif isinstance(value, dict):
            yield Found(path, value, _mapping(value), expected)
            items = value.items()
        elif isinstance(value, set):
            yield Found(path, value, _set(value), expected)
            items = enumerate(value)
        elif isinstance(value, (tuple, frozenset)):
            items = enumerate(value)
        if items and len(value) <= self._longest:
            for key, item in items:
                self._go_on(f"{path}[{key!r}]" if isinstance(key, (int, str)) else path, item, expected)

    def _visit_attributes(self, path: str, value: Any, expected: bool) -> Iterator[Found]:
        kind: Any = type(value)
        if _is_opaque(kind):
            return
        try:
            own = object.__getattribute__(value, "__dict__")
        except AttributeError:
            own = None
        if isinstance(own, dict):
            yield Found(path, value, _mapping(own), expected)
            for name, item in list(own.items()):
                self._go_on(f"{path}.{name}", item, expected)
        if descriptors := _slot_descriptors(kind):
            slots = _descriptors(value, descriptors)
            yield Found(path, value, slots, expected)
            for name, item in slots.read().items():
                self._go_on(f"{path}.{name}", item, expected)
        if kind.__module__ == "multiprocessing.sharedctypes" and hasattr(value, "get_obj"):
            self._go_on(path, value.get_obj(), expected)
        self._go_on(path, kind)

    def _visit_class(self, kind: type) -> Iterator[Found]:
        yield Found(kind.__name__, kind, _class_attributes(kind))
        for name, value in list(vars(kind).items()):
            if not name.startswith("__") or isinstance(value, types.FunctionType):
                self._go_on(f"{kind.__name__}.{name}", value)
        for base in kind.__mro__[1:]:
            self._go_on(base.__name__, base)

    def _visit_function(self, path: str, function: Any) -> Iterator[Found]:
        if isinstance(function, types.MethodType):
            self._go_on(path, function.__self__)
            self._go_on(path, function.__func__)
            return
        if isinstance(function, functools.partial):
            for part in (function.func, function.args, function.keywords):
                self._go_on(path, part)
            return
        if function.__dict__:
            yield Found(path, function, _mapping(function.__dict__))
        code = function.__code__
        cells = zip(code.co_freevars, function.__closure__ or (), strict=False)
        for name, item in (*cells, *function.__dict__.items(), *(function.__kwdefaults__ or {}).items()):
            self._go_on(name, item)
        self._go_on(path, function.__defaults__)
        # `global COUNTER; COUNTER += 1`, and the same in a module that is imported by name.
        scope = function.__globals__
        if is_users(scope.get("__name__", "")):
            names = _names_in(code)
            self._note_names(scope, names)
            for name in names:
                if isinstance(module := scope.get(name), types.ModuleType) and is_users(module.__name__):
                    self._note_names(vars(module), names)

    def _note_names(self, scope: dict[str, Any], names: frozenset[str]) -> None:
        path = scope.get("__name__", "")
        noted = self._names.setdefault(id(scope), (path, scope, set()))[2]
        for name in names - noted:
            if name in scope:
                self._go_on(name if path == "__main__" else f"{path}.{name}", scope[name])
        noted |= names

    def _go_on(self, path: str, value: Any, expected: bool = False) -> None:
        if not isinstance(value, _ATOMS):
            self._waiting.append((path, value, expected))


def shallow(path: str, holder: dict[str, Any]) -> Iterator[Found]:
    """Yield attributes, and the containers and tensors among them, not what those hold: that may be a whole model."""
    yield Found(path, holder, _mapping(holder))
    for name, value in holder.items():
        if isinstance(value, Tensor):
            yield Found(f"{path}.{name}", value)
        elif isinstance(value, (list, deque, dict, set)):
            slots = _mapping(value) if isinstance(value, dict) else _set(value) if isinstance(value, set) else None
            yield Found(f"{path}.{name}", value, slots or _sequence(value))


@functools.cache
def is_users(module_name: str) -> bool:
    """Tell whether a module of this name is the user's own, neither installed nor of the standard library."""
    if module_name.partition(".")[0] in _OPAQUE | {"lightning_influence"}:
        return False
    module = sys.modules.get(module_name)
    file = getattr(module, "__file__", None)
    if file is None:
        return module_name == "__main__" or module_name not in sys.builtin_module_names and module is None
    return not file.startswith((*_INSTALLED, _STANDARD_LIBRARY))


def is_stream(value: Any) -> bool:
    """Tell whether it is an iterator whose place nobody can read or put back: a generator, one of a data loader."""
    kind: Any = type(value)
    if not isinstance(value, Iterator) or isinstance(value, io.IOBase):
        return False
    return kind.__module__.startswith("torch.utils.data.") or _is_opaque(kind)


@functools.cache
def _is_opaque(kind: Any) -> bool:
    """Tell whether objects of a class are no business of an extra pass: a Trainer, an optimizer, a lock, a file."""
    for base in kind.__mro__[:-1]:
        name = f"{base.__module__}."
        if name.startswith(_TRANSPARENT) or base.__module__ in _HOLDERS_OF_THE_LIBRARY:
            continue
        if name.partition(".")[0] in _OPAQUE:
            return True
        if base is kind and not is_users(base.__module__) and _is_of_the_standard_library(base.__module__):
            return True
    return False


def _is_of_the_standard_library(module_name: str) -> bool:
    file = getattr(sys.modules.get(module_name), "__file__", None)
    return file is None or (file.startswith(_STANDARD_LIBRARY) and not file.startswith(_INSTALLED))


def _is_metric(module: nn.Module) -> bool:
    return any(base.__module__.startswith("torchmetrics") for base in type(module).__mro__)


@functools.cache
def _names_in(code: types.CodeType) -> frozenset[str]:
    """Return the global and attribute names that a function uses, functions within it included."""
    inner = [_names_in(constant) for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return frozenset(itertools.chain(code.co_names, *inner))


# ------------------------------------------------------------------------------------ what can hold other things


def _mapping(mapping: dict[Any, Any]) -> Slots:
    kind = OrderedDict if isinstance(mapping, OrderedDict) else dict  # not the methods of a user's subclass

    def write(contents: dict[Any, Any]) -> None:
        # Cleared first: an entry that was deleted would else come back at the end of the order.
        kind.clear(mapping)
        for key, value in contents.items():
            kind.__setitem__(mapping, key, value)

    return Slots(lambda: dict(kind.items(mapping)), write)


def _sequence(sequence: Any) -> Slots:
    kind: Any = list if isinstance(sequence, list) else deque

    def write(contents: list[Any]) -> None:
        kind.clear(sequence)
        kind.extend(sequence, contents)

    return Slots(lambda: list(kind.__iter__(sequence)), write)


def _set(members: set[Any]) -> Slots:
    def write(contents: set[Any]) -> None:
        set.clear(members)
        set.update(members, contents)

    return Slots(lambda: set(set.__iter__(members)), write)


def _cell(cell: types.CellType) -> Slots:
    def read() -> list[Any]:
        try:
            return [cell.cell_contents]
        except ValueError:  # not assigned yet
            return []

    def write(contents: list[Any]) -> None:
        if contents:
            cell.cell_contents = contents[0]
        elif read():
            del cell.cell_contents

    return Slots(read, write)


def _chosen(scope: dict[str, Any], names: set[str]) -> Slots:
    def read() -> dict[str, Any]:
        return {name: scope[name] for name in names if name in scope}

    def write(contents: dict[str, Any]) -> None:
        for name in names & scope.keys() - contents.keys():
            del scope[name]
        scope.update(contents)

    return Slots(read, write)


def _class_attributes(kind: type) -> Slots:
    def read() -> dict[str, Any]:
        return {name: value for name, value in vars(kind).items() if _is_data(name, value)}

    def write(contents: dict[str, Any]) -> None:
        for name in read().keys() - contents.keys():
            type.__delattr__(kind, name)
        for name, value in contents.items():
            if vars(kind).get(name) is not value:
                type.__setattr__(kind, name, value)

    return Slots(read, write)


def _is_data(name: str, value: Any) -> bool:
    reserved = name.startswith(("__", "_abc_"))
    return not (reserved or isinstance(value, types.FunctionType) or hasattr(type(value), "__get__"))


def _slot_descriptors(kind: type) -> dict[str, Any]:
    """Return the attributes that ``__slots__`` make, by name."""
    members = types.MemberDescriptorType
    slotted = [base for base in kind.__mro__ if "__slots__" in vars(base) and base.__module__ != "builtins"]
    return {name: slot for base in slotted for name, slot in vars(base).items() if isinstance(slot, members)}


def _descriptors(owner: Any, descriptors: dict[str, Any]) -> Slots:
    def read() -> dict[str, Any]:
        contents = {}
        for name, slot in descriptors.items():
            try:
                contents[name] = slot.__get__(owner)
            except AttributeError:  # not assigned yet
                continue
        return contents

    def write(contents: dict[str, Any]) -> None:
        for name, slot in descriptors.items():
            if name in contents:
                slot.__set__(owner, contents[name])
            elif name in read():
                slot.__delete__(owner)

    return Slots(read, write)
