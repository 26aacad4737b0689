"""Batches that hold one of each loader: examples of the one that is gone over, and others to keep them company.

A step that goes over several loaders at once gets a batch of each. Beside each example of the loader in question stands
one of every other loader, always the same: an example with its company does not depend on batch size and order.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.utils.data import DataLoader, IterableDataset, default_collate

from lightning_influence.core.containers import Path, children, leaves
from lightning_influence.core.errors import told
from lightning_influence.data.collation import DataError
from lightning_influence.data.contents import copied
from lightning_influence.data.source import ExampleSource
from lightning_influence.data.stream import StreamSource

# Of each other loader: so many examples take turns, and are held in memory.
_HELD = 128


class Company:
    """Puts batches of one loader where the step expects them.

    Args:
        loaders: A list or a dictionary of loaders, nested or not.
        own: Where the loader in question is in it.
        drawn_from: Returns the examples that a loader draws from, given their number.

    Attributes:
        own: See the arguments.
        loader: Its name.
        others: Names of the other loaders.
        steady: Of those that have a single example.

    Raises:
        DataError: If examples of another loader can't be had.
    """

    def __init__(self, loaders: Any, own: Path, drawn_from: Callable[[Any, int], list[int]]) -> None:
        self.own, self.loader = own, named(own)
        paths = dict(leaves(loaders))
        # Without the loaders: to hold them would keep their workers alive.
        self._form = _around(loaders, dict.fromkeys(paths))
        self._others = {path: _Others(path, each, drawn_from) for path, each in paths.items() if path != own}
        self.others = [named(path) for path in self._others]
        self.steady = [named(path) for path, each in self._others.items() if len(each.chosen) == 1]

    def beside(self, indices: Sequence[int], batch: Any) -> Any:
        """Return what a step gets of a batch.

        Args:
            indices: Of the examples in it: these tell the company of each.
            batch: Of the loader in question.
        """
        return _around(self._form, {path: each(indices) for path, each in self._others.items()} | {self.own: batch})


def named(path: Path) -> str:
    """Return what a loader is called: its key or its place in a list, and those of what is around that."""
    return "/".join(map(str, path))


class _Others:
    """Some examples of another loader."""

    def __init__(self, path: Path, loader: Any, drawn_from: Callable[[Any, int], list[int]]) -> None:
        self.path, self.source, self.held = path, _source(path, loader), dict[int, Any]()
        if isinstance(self.source, StreamSource):
            self.chosen = self.source.at_hand
        else:
            drawn = drawn_from(loader, len(self.source))
            self.chosen = random.Random(0).sample(drawn, min(_HELD, len(drawn)))
        if not self.chosen:
            raise DataError(f"the loader {named(path)!r} is empty; expected some examples.")

    def __call__(self, indices: Sequence[int]) -> Any:
        """Return those that keep some examples company as one batch, in whatever order that has."""
        chosen = [self.chosen[index % len(self.chosen)] for index in indices]
        if self.source.plain or isinstance(self.source, StreamSource):  # of rows
            return self.source.one_batch(chosen)
        with self.source.fetching() as fetch, told(self._failed):
            for index in set(chosen) - self.held.keys():
                self.held[index] = fetch(index)
            return (self.source.collate_fn or default_collate)([copied(self.held[index]) for index in chosen])

    def _failed(self, words: str) -> DataError:
        return DataError(
            f"the loader {named(self.path)!r}, whose examples stand beside those of the audit, can't give a batch of "
            f"some of them ({words}): expected a data set and a collate function that can, whatever the choice."
        )


def _source(path: Path, loader: Any) -> ExampleSource:
    indexed = isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset)
    if indexed and loader.batch_sampler is not None:
        return ExampleSource.from_loader(loader)
    source = StreamSource(loader, None)
    if not source.reads_apart:
        raise DataError(
            f"a batch of the loader {named(path)!r} is needed beside the examples, and a {type(loader).__name__} may "
            "share its iterator with training; expected a torch `DataLoader`."
        )
    return source


def _around(loaders: Any, batches: Mapping[Path, Any], path: Path = ()) -> Any:
    """Return the same containers, with batches in place of loaders."""
    items = children(loaders)
    if items is None:
        return batches[path]
    made = {key: _around(item, batches, (*path, key)) for key, item in items}
    return type(loaders)(made.values()) if isinstance(loaders, (list, tuple)) else made
