"""The training loader of a run, by itself or within a list or a dictionary."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from lightning_influence.callbacks.lightning import Trainer
from lightning_influence.core.containers import children, leaves
from lightning_influence.data.contents import at
from lightning_influence.data.source import DataError


def train_loader(trainer: Trainer) -> Any:
    """Return the training loader of a trainer.

    Raises:
        DataError: If there are several, or batches in the place of one.
    """
    loaders = dict(leaves(trainer.train_dataloader))
    if any(isinstance(loader, (Tensor, np.ndarray, str, bytes, float, int)) for loader in loaders.values()):
        kind = type(trainer.train_dataloader).__name__
        raise DataError(f"training data come from a {kind} of batches; expected a torch `DataLoader`.")
    if len(loaders) > 1:
        names = ", ".join("/".join(map(str, path)) for path in loaders)
        raise DataError(
            f"training goes over {len(loaders)} loaders at once ({names}): the loss of a step is that of examples of "
            "all of them, and which part of it is whose is not known. Expected one loader (`ConcatDataset` makes one "
            "of several data sets). `Influence(model, loss, data)` audits the trained model on the data of one loader, "
            "with the part of the loss that is about them."
        )
    return next(iter(loaders.values()), None)


def batch_of_loader(trainer: Trainer, batch: Any) -> Any:
    """Return the loader's own batch in what ``training_step`` gets."""
    return at(batch, next(path for path, _ in leaves(trainer.train_dataloader)))


def batch_of_step(trainer: Trainer, batch: Any) -> Any:
    """Return what ``training_step`` gets of a batch of the loader: it, or a list or dictionary around it."""
    return _around(trainer.train_dataloader, batch)


def _around(container: Any, batch: Any) -> Any:
    items = children(container)
    if items is None:
        return batch
    made = {key: _around(item, batch) for key, item in items}
    return type(container)(made.values()) if isinstance(container, (list, tuple)) else made
