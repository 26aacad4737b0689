"""What holds references and can be told to hold others: containers, attributes, closures' cells, globals."""

from __future__ import annotations

import types
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

CONTAINERS = (dict, list, deque, set)


@dataclass(frozen=True, eq=False)
class Slots:
    """Something that holds references and can be told to hold others.

    Attributes:
        read: Returns what it holds at the moment, in a container of its own.
        write: Makes it hold that again, in place.
    """

    read: Callable[[], Any]
    write: Callable[[Any], None]


def entries(held: Any) -> Slots:
    """Return the entries of a dictionary, list, deque or set, past the methods of a user's subclass."""
    kind: Any = next(kind for kind in (OrderedDict, *CONTAINERS) if isinstance(held, kind))
    is_mapping = isinstance(held, dict)
    fill: Any = kind.extend if kind in (list, deque) else kind.update

    def read() -> Any:
        if is_mapping:
            return dict(kind.items(held))
        return (set if kind is set else list)(kind.__iter__(held))

    def write(contents: Any) -> None:
        # Cleared first: an entry that was deleted would else come back at the end of the order.
        kind.clear(held)
        if kind is OrderedDict:  # whose `update` calls the subclass
            for key, value in contents.items():
                kind.__setitem__(held, key, value)
        else:
            fill(held, contents)

    return Slots(read, write)


def attributes(owner: Any, names: Iterable[str]) -> Slots:
    """Return attributes that descriptors hold: those of ``__slots__``, and what a closure's cell contains."""
    return _named(lambda: names, *_access(object, owner))


def slot_names(kind: type) -> list[str]:
    """Return the attributes that ``__slots__`` make, without those that a subclass has put something else over."""
    bases = [base for base in kind.__mro__ if "__slots__" in vars(base) and base.__module__ != "builtins"]
    members = types.MemberDescriptorType
    slots = [(name, slot) for base in bases for name, slot in vars(base).items() if isinstance(slot, members)]
    return [name for name, slot in slots if getattr(kind, name, None) is slot]


def some_globals(scope: dict[str, Any], names: frozenset[str]) -> Slots:
    """Return those of some names that are globals."""
    return _named(lambda: names & scope.keys(), scope.__getitem__, scope.__setitem__, scope.__delitem__)


def class_attributes(kind: type) -> Slots:
    """Return the data among the attributes of a class: no methods, properties or names of Python's own."""

    def names() -> list[str]:
        return [n for n, v in vars(kind).items() if not (n.startswith(("__", "_abc_")) or hasattr(type(v), "__get__"))]

    return _named(names, *_access(type, kind))


def _access(base: Any, owner: Any) -> list[Callable[..., Any]]:
    """Return what gets, sets and deletes attributes, past the methods of a user's class."""
    return [partial(method, owner) for method in (base.__getattribute__, base.__setattr__, base.__delattr__)]


def _named(
    names: Callable[[], Iterable[str]], get: Callable[..., Any], put: Callable[..., Any], drop: Callable[..., Any]
) -> Slots:
    def read() -> dict[str, Any]:
        found = {}
        for name in names():
            with suppress(AttributeError, KeyError, ValueError):  # not assigned yet
                found[name] = get(name)
        return found

    def write(contents: dict[str, Any]) -> None:
        now = read()
        for name in now.keys() - contents.keys():
            drop(name)
        for name, value in contents.items():
            if name not in now or now[name] is not value:
                put(name, value)

    return Slots(read, write)
