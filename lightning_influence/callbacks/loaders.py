"""The training loaders of a run: one, one within a container, or several that take turns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lightning_influence.callbacks.lightning import Trainer
from lightning_influence.core.containers import Path, children, leaves
from lightning_influence.data.contents import at
from lightning_influence.data.source import BY_ID, DataError


@dataclass(frozen=True)
class TrainingLoaders:
    """What a trainer goes over.

    Attributes:
        every: The loaders.
        container: The list or dictionary that ``training_step`` gets around a batch of the only loader; None without.
        path: Of the batch in it.
        in_turn: Whether several loaders take turns; else each batch is made of one of each.
    """

    every: list[Any]
    container: Any = None
    path: Path = ()
    in_turn: bool = False

    def own(self, batch: Any) -> Any:
        """Return the loader's batch in what ``training_step`` gets."""
        return at(batch, self.path) if self.container is not None else batch

    def placed(self, batch: Any) -> Any:
        """Return what ``training_step`` gets of a batch of the loader."""
        return batch if self.container is None else _replaced(self.container, batch)

    def check(self, *, by_id: bool) -> None:
        """Raise ``DataError`` for several loaders whose examples can't be told apart."""
        if len(self.every) < 2 or (self.in_turn and by_id):
            return
        if self.in_turn:
            raise DataError(
                f"training goes over {len(self.every)} loaders in turn, whose indices begin at 0 each. Expected one "
                f"loader (`ConcatDataset` makes one of several data sets), or ids: {BY_ID}."
            )
        raise DataError(
            f"training goes over {len(self.every)} loaders at once: the loss of a step is that of examples of all of "
            "them, and which part of it is whose is not known. Expected one loader, or several that take turns "
            f'(`CombinedLoader(..., mode="sequential")` with {BY_ID}). `Influence(model, loss, data)` audits the trained '
            "model on the data of one loader, with the part of the loss that is about them."
        )


def training_loaders(trainer: Trainer) -> TrainingLoaders:
    """Return the training loaders of a trainer."""
    held: Any = trainer.train_dataloader
    found = list(leaves(held))
    in_turn = getattr(trainer.fit_loop._combined_loader, "_mode", "") == "sequential"
    if len(found) == 1 and children(held) is not None and not in_turn:
        return TrainingLoaders([found[0][1]], held, found[0][0])
    return TrainingLoaders([loader for _, loader in found], in_turn=in_turn)


def train_loader(trainer: Trainer) -> Any:
    """Return the training loader, or of several what holds them."""
    every = training_loaders(trainer).every
    return every[0] if len(every) == 1 else trainer.train_dataloader


def _replaced(container: Any, batch: Any) -> Any:
    items = children(container)
    if items is None:
        return batch
    made = {key: _replaced(item, batch) for key, item in items}
    return made if not isinstance(container, (list, tuple)) else type(container)(made.values())
