"""The training loader of a run: the only one, by itself or within a list or a dictionary, or one of several by name."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from torch import Tensor

from lightning_influence.callbacks.lightning import Trainer
from lightning_influence.core.containers import Path, leaves
from lightning_influence.core.errors import short
from lightning_influence.data.company import named
from lightning_influence.data.contents import at
from lightning_influence.data.source import DataError

LoaderName: TypeAlias = "str | int | None"
"""Key or place of one of several training loaders; None if there is one."""


def check_loader(given: object) -> None:
    """Raise ``ValueError`` for what can't name a loader."""
    if given is not None and (isinstance(given, bool) or not isinstance(given, (str, int))):
        raise ValueError(
            f"loader={short(given)}; expected the key of one of several training loaders in their dictionary, its "
            'place in their list, or "outer/inner" where these are nested; None if there is one.'
        )


def train_loader(trainer: Trainer, name: LoaderName) -> Any:
    """Return the training loader of a trainer; None before there is one.

    Args:
        trainer: The trainer.
        name: Which one of several.

    Raises:
        DataError: If it is not told which one, or there are batches in the place of one.
    """
    return at(trainer.train_dataloader, path_of_loader(trainer, name))


def path_of_loader(trainer: Trainer, name: LoaderName) -> Path:
    """Return where the loader is among those of a trainer, and its batches in what ``training_step`` gets.

    Raises:
        DataError: As ``train_loader``.
    """
    loaders = dict(leaves(trainer.train_dataloader))
    if any(isinstance(loader, (Tensor, np.ndarray, str, bytes, float, int)) for loader in loaders.values()):
        kind = type(trainer.train_dataloader).__name__
        raise DataError(f"training data come from a {kind} of batches; expected a torch `DataLoader`.")
    names = [named(path) for path in loaders]
    if name is not None and names != [""]:
        found = [path for path in loaders if named(path) == str(name)]
        if len(found) == 1:
            return found[0]
        raise DataError(f"loader={name!r}: training goes over {', '.join(map(repr, names))}; expected one of these.")
    if name is not None and trainer.train_dataloader is not None:
        raise DataError(f"loader={name!r}: training goes over one loader, which has no name; leave `loader` out.")
    if len(loaders) > 1:
        raise DataError(
            f"training goes over {len(loaders)} loaders at once ({', '.join(names)}), and an audit is about the "
            f"examples of one of them: `InfluenceAudit(loader={_name(loaders)!r})`, and another audit for each of the "
            "others in `callbacks=`."
        )
    return next(iter(loaders), ())


def _name(loaders: dict[Path, Any]) -> Any:
    path = next(iter(loaders))
    return path[0] if len(path) == 1 else named(path)
