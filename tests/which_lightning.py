"""The package of Lightning that tests use: ``LIGHTNING_PACKAGE=pytorch_lightning pytest`` takes the other one.

``from which_lightning import pl, Callback, TensorBoardLogger`` gives the package, and classes wherever in it they are.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any

PACKAGE = os.environ.get("LIGHTNING_PACKAGE", "lightning.pytorch")
FABRIC = {"lightning.pytorch": "lightning.fabric", "pytorch_lightning": "lightning_fabric"}[PACKAGE]

pl: Any = import_module(PACKAGE)

_PLACES = [PACKAGE] + [
    f"{PACKAGE}.{name}"
    for name in ("callbacks", "loggers", "strategies", "plugins", "accelerators", "tuner", "utilities")
]
_PLACES += [f"{PACKAGE}.utilities.exceptions", f"{FABRIC}.plugins.io"]


def __getattr__(name: str) -> Any:
    for place in _PLACES:
        if name in vars(module := import_module(place)):
            return vars(module)[name]
    raise AttributeError(f"{PACKAGE} has no {name}")
