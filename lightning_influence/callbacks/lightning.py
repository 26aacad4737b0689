"""Lightning's two packages: the same classes under other names, of which this module alone knows.

``import lightning`` and ``import pytorch_lightning`` load copies of the same code, so ``isinstance`` with a class of
one is wrong of objects of the other. Objects are told by the names of their classes, and nothing is imported that the
user has not: a second copy takes over the first one's log messages, and may be of a release that can't be imported.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeAlias

from lightning_utilities.core.overrides import is_overridden
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

from lightning_influence.core.origin import is_lightnings

if TYPE_CHECKING:
    import lightning.pytorch as new
    import pytorch_lightning as old
    from lightning.fabric.utilities.exceptions import MisconfigurationException as _NewError
    from lightning_fabric.utilities.exceptions import MisconfigurationException as _OldError

    Callback: TypeAlias = new.Callback | old.Callback
    LightningModule: TypeAlias = new.LightningModule | old.LightningModule
    Trainer: TypeAlias = new.Trainer | old.Trainer

    class AuditCallback(new.Callback, old.Callback):  # type: ignore[misc]  # hooks are told the trainer of their own
        """A callback of every package of Lightning that is loaded."""

    class MisconfigurationException(_NewError, _OldError):
        """What can't be audited; caught as the ``MisconfigurationException`` of every package that is loaded."""

else:
    Callback = LightningModule = Trainer = Any  # for who reads annotations at run time, as LightningCLI does

    class _AnyCallback:  # Python can't change the bases of a class that has none but `object`
        pass

    class AuditCallback(_AnyCallback):
        """A callback of every package of Lightning that is loaded."""

    class _AnyError(Exception):
        pass

    class MisconfigurationException(_AnyError):
        """What can't be audited; caught as the ``MisconfigurationException`` of every package that is loaded."""


__all__ = [
    "AuditCallback",
    "Callback",
    "LightningModule",
    "MisconfigurationException",
    "Trainer",
    "callbacks_of",
    "dummy_logger",
    "is_a",
    "is_running",
    "of_package",
    "overrides",
    "package_of",
    "rank_zero_info",
    "rank_zero_warn",
    "version_of",
]

# ------------------------------------------------------------------------------------------ being of both packages

# What is made a subclass of what, once that is there.
_BASES: Sequence[tuple[type, Sequence[str], str]] = (
    (AuditCallback, ("lightning.pytorch.callbacks.callback", "pytorch_lightning.callbacks.callback"), "Callback"),
    (
        MisconfigurationException,
        ("lightning.fabric.utilities.exceptions", "lightning_fabric.utilities.exceptions"),
        "MisconfigurationException",
    ),
)


def _adopt() -> None:
    """Let our classes inherit from those of the packages that are loaded."""
    for own, modules, name in _BASES:
        found = (getattr(sys.modules.get(module), name, None) for module in modules)
        bases = (*(kind for kind in found if isinstance(kind, type)), own.__bases__[-1])
        if bases != own.__bases__:
            own.__bases__ = bases


class _AdoptLater(MetaPathFinder):
    """Looks again at each later import, and finds nothing itself: whatever comes first, we are of every package.

    Where `Callback` is defined, the rest of its package is still to be imported, so nobody sees one that isn't ours.
    """

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> None:
        _adopt()


_adopt()
sys.meta_path.insert(0, _AdoptLater())

# ----------------------------------------------------------------------------------------- telling what something is


def is_a(value: object, *names: str) -> bool:
    """Tell whether something is an instance of one of Lightning's classes, in either package.

    Args:
        value: Anything.
        names: Names of classes: ``"DDPStrategy"``.
    """
    return any(base.__name__ in names and is_lightnings(base.__module__) for base in type(value).__mro__)


def package_of(value: object) -> str:
    """Return the package that a trainer or module is of: ``"lightning.pytorch"`` or ``"pytorch_lightning"``."""
    kinds = [base.__module__ for base in type(value).__mro__]
    return next(p for kind in kinds for p in ("lightning.pytorch", "pytorch_lightning") if kind.startswith(f"{p}."))


def version_of(value: object) -> dict[str, str]:
    """Return the distribution that a trainer or module comes from (``"pytorch-lightning"``), with its version."""
    package = package_of(value).partition(".")[0]
    return {package.replace("_", "-"): str(sys.modules[package].__version__)}


def of_package(value: object, module: str, name: str) -> Any:
    """Return what goes by a name in the package that a trainer or module is of, ``("loops.fit_loop", "_FitLoop")``."""
    return getattr(import_module(f"{package_of(value)}.{module}"), name)


def overrides(hook: str, module: LightningModule) -> bool:
    """Tell whether a module has a hook of its own."""
    return is_overridden(hook, module, sys.modules[package_of(module)].LightningModule)


def callbacks_of(trainer: Trainer) -> list[Any]:
    """Return a trainer's callbacks; they are of no type that both packages share."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[union-attr]
    return callbacks


def is_running(trainer: Trainer | None) -> bool:
    """Tell whether a trainer is between the beginning and the end of a fit, or of whatever else it does."""
    return trainer is not None and trainer.state.status == "running"


def dummy_logger(trainer: Trainer) -> Any:
    """Return a logger of the trainer's package that writes nothing, whatever is called."""
    return sys.modules[f"{package_of(trainer)}.loggers.logger"].DummyLogger()
