"""Whose code something is: the user's own, an installed package's, or that of torch and its kind."""

from __future__ import annotations

import functools
import io
import site
import sys
import sysconfig
from collections.abc import Iterator
from typing import Any

# One code under two names, the second of which has its lower half in a package of its own.
LIGHTNING = frozenset({"lightning", "pytorch_lightning", "lightning_fabric"})

# What these hold is theirs, or a whole Trainer; modules and data sets among them are looked into all the same.
_LIBS = {"torch", *LIGHTNING, "lightning_utilities", "torchmetrics", "numpy"}
_TRANSPARENT = ("torch.nn.", "torch.utils.data.", "lightning.pytorch.core.", "pytorch_lightning.core.")
_HOLDERS_OF_THE_LIBRARY = {"argparse", "collections", "queue", "types", "multiprocessing.sharedctypes"}
_STANDARD_LIBRARY = sysconfig.get_path("stdlib")
_INSTALLED = tuple({sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()})


@functools.cache
def _origin(module_name: str) -> str:
    package = module_name.partition(".")[0]
    if package in _LIBS or package == "lightning_influence":
        return package
    module = sys.modules.get(module_name)
    file = getattr(module, "__file__", None)
    if file is None:
        made_by_hand = module is None and module_name not in sys.builtin_module_names
        return "user" if made_by_hand or module_name == "__main__" else "standard library"
    if file.startswith(_INSTALLED):
        return "installed"
    return "standard library" if file.startswith(_STANDARD_LIBRARY) else "user"


def is_lightnings(module_name: str) -> bool:
    """Tell whether a module of this name is of one of Lightning's packages."""
    return module_name.partition(".")[0] in LIGHTNING


def is_users(module_name: str) -> bool:
    """Tell whether a module of this name is the user's own, neither installed nor of the standard library."""
    return _origin(module_name) == "user"


@functools.cache
def is_opaque(kind: Any) -> bool:
    """Tell whether objects of a class are no business of an extra pass: a Trainer, an optimizer, a lock, a file."""
    for base in kind.__mro__[:-1]:
        origin = _origin(base.__module__)
        if f"{base.__module__}.".startswith(_TRANSPARENT) or base.__module__ in _HOLDERS_OF_THE_LIBRARY:
            continue
        if origin in _LIBS or (base is kind and origin == "standard library"):
            return True
    return False


def is_stream(value: Any) -> bool:
    """Tell whether it is an iterator whose place nobody can read or put back: a generator, one of a data loader."""
    kind: Any = type(value)
    if not isinstance(value, Iterator) or isinstance(value, io.IOBase):
        return False
    return kind.__module__.startswith("torch.utils.data.") or is_opaque(kind)
