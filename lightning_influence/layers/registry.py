"""Which torch functions are understood: the table of their readers.

Whoever calls them: a layer, a subclass of a layer, a functional call in a user's ``forward``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from lightning_influence.layers.call import Call
from lightning_influence.layers.site import NotUnderstoodError, Site

Reader: TypeAlias = "Callable[[Site], Call]"

READERS: dict[Callable[..., Any], Reader] = {}
"""Torch function to what reads its calls; ``reads`` adds one."""
IN_PLACE: set[Callable[..., Any]] = set()
"""Operators that overwrite their first argument, see ``overwrites``."""


def reads(*functions: Callable[..., Any]) -> Callable[[Reader], Reader]:
    """Register what is decorated as the reader of some torch functions.

    A reader tells what a call (``Site``) does with the parameters among its arguments, as a ``Call``, and raises
    ``NotUnderstoodError`` where it is used in a way that has no per-example form.
    """

    def register(reader: Reader) -> Reader:
        READERS.update(dict.fromkeys(functions, reader))
        return reader

    return register


def overwrites(function: Callable[..., Any]) -> bool:
    """Tell whether a function overwrites its first argument: its value has to be kept before the call."""
    name = getattr(function, "__name__", "")
    return function in IN_PLACE or (name.endswith("_") and not name.endswith("__"))


def read_call(site: Site) -> Call | None:
    """Tell what a call does with the parameters among its arguments.

    Returns:
        None if the function is not a known one.

    Raises:
        NotUnderstoodError: If it is known, but used in a way that has no per-example form.
    """
    reader = READERS.get(site.function)
    if reader is not None and (site.output.is_complex() or any(p.is_complex() for p in site.parameters)):
        raise NotUnderstoodError("with complex numbers")
    return None if reader is None else reader(site)
