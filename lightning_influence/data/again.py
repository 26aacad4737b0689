"""Going over a loader once more, beside training: the batches that it hands out, and nothing of it moved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from lightning_influence.core.errors import told
from lightning_influence.core.isolation import LONGEST_OF_DATA, unchanged
from lightning_influence.core.origin import is_stream
from lightning_influence.core.random_streams import OwnStreams
from lightning_influence.core.reachable import Walk
from lightning_influence.data.collation import DataError

_END = object()


class Again:
    """A loader, to be gone over as often as somebody asks.

    Args:
        loader: A ``DataLoader`` of whatever kind, or another iterable of batches.

    Attributes:
        dataset: Its data set; of a loader without one, itself.
        changed: What was found to change in it, and put back.

    Raises:
        DataError: If it can be gone over only once.
    """

    def __init__(self, loader: Any) -> None:
        self.loader = loader
        self.dataset = getattr(loader, "dataset", loader)
        self.changed: dict[str, None] = {}
        self._check()

    @property
    def apart(self) -> bool:
        """Whether passes have an iterator that has nothing to do with training's: else they wait for its end."""
        return isinstance(self.loader, DataLoader) and (
            type(self.loader).__iter__ is DataLoader.__iter__ or type(self.loader).__module__.startswith("torchdata")
        )

    @property
    def batch_size(self) -> int:
        """Number of examples in a batch, as far as the loader tells."""
        told = self.loader, getattr(self.loader, "batch_sampler", None)
        sizes = [getattr(each, "batch_size", None) for each in told]
        return next((size for size in sizes if isinstance(size, int) and size > 0), 32)

    def __iter__(self) -> Iterator[Any]:
        """Go over the loader once, with random streams of its own, and leave what it reaches as it was."""
        own, loader = OwnStreams(), _another(self.loader) if self.apart else self.loader
        reached = [self.dataset, *(getattr(loader, name, None) for name in ("batch_sampler", "sampler", "collate_fn"))]
        with unchanged(*(each for each in reached if each is not None)) as state:
            fetching: Iterator[Any] | None = None
            while True:
                with own, told(self._refusal):
                    fetching = iter(loader) if fetching is None else fetching
                    batch = next(fetching, _END)
                if batch is _END:
                    break
                if batch is not None:
                    yield batch
            del fetching
        self.changed |= state.changed

    def _refusal(self, words: str) -> DataError:
        return DataError(f"{type(self.dataset).__name__} can't be gone over once more ({words}).")

    def _check(self) -> None:
        """Raise ``DataError`` for what can be read only once."""
        dataset = self.dataset
        held = [("", dataset)] + [
            (found.path, value)
            for found in Walk([(type(dataset).__name__, dataset)], LONGEST_OF_DATA)
            if found.slots is not None
            for value in _values(found.slots.read())
        ]
        once = [path for path, value in held if is_stream(value)]
        if once or hasattr(type(dataset), "__next__"):
            raise DataError(
                f"{type(dataset).__name__} can be read only once (it is, or holds, an iterator: "
                f"{(once or [''])[0] or type(dataset).__name__}): an audit goes over the data once more. Expected a "
                "data set whose `__iter__` makes a new iterator each time it is called."
            )


def _another(loader: DataLoader[Any]) -> DataLoader[Any]:
    """Return a loader of the same batches, whose iterators are not those of training."""
    settings: dict[str, Any] = {"collate_fn": loader.collate_fn, "num_workers": loader.num_workers}
    if loader.num_workers:
        names = ("worker_init_fn", "multiprocessing_context", "prefetch_factor", "timeout")
        settings |= {name: getattr(loader, name) for name in names}
    if isinstance(loader.dataset, IterableDataset):
        settings["batch_size"] = loader.batch_size
    elif loader.batch_sampler is None:
        settings |= {"batch_size": None, "sampler": loader.sampler}
    else:
        settings["batch_sampler"] = loader.batch_sampler
    return DataLoader(loader.dataset, **settings)


def _values(held: Any) -> list[Any]:
    return list(held.values()) if isinstance(held, Mapping) else list(held)
