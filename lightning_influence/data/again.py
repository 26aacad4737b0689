"""Going over a loader once more, beside training: the batches that it hands out, and nothing of it moved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
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
    """Loaders, to be gone over one after the other as often as somebody asks.

    Args:
        loaders: Each a ``DataLoader`` of whatever kind, or another iterable of batches.

    Attributes:
        dataset: The first one's data set; of a loader without one, itself.
        changed: What was found to change in them, and put back.

    Raises:
        DataError: If one can be gone over only once.
    """

    def __init__(self, loaders: Sequence[Any]) -> None:
        self.loaders = list(loaders)
        self.dataset = _data_of(self.loaders[0])
        self.changed: dict[str, None] = {}
        for loader in self.loaders:
            _check(_data_of(loader))

    @property
    def apart(self) -> bool:
        """Whether iterators have nothing to do with training's: else they wait for its end."""
        return all(map(_is_known, self.loaders))

    @property
    def batch_size(self) -> int:
        """Number of examples in a batch, as far as the loader tells."""
        told = self.loaders[0], getattr(self.loaders[0], "batch_sampler", None)
        sizes = [getattr(each, "batch_size", None) for each in told]
        return next((size for size in sizes if isinstance(size, int) and size > 0), 32)

    def __iter__(self) -> Iterator[Any]:
        """Go over all batches once, with random streams of its own, and leave what that reaches as it was."""
        own = OwnStreams()
        for loader in self.loaders:
            yield from self._batches(_another(loader) if _is_known(loader) else loader, own)

    def _batches(self, loader: Any, own: OwnStreams) -> Iterator[Any]:
        names = "batch_sampler", "sampler", "collate_fn"
        reached = [_data_of(loader), *(getattr(loader, name, None) for name in names)]
        with unchanged(*(each for each in reached if each is not None)) as state:
            fetching: Iterator[Any] | None = None
            while True:
                with own, told(partial(_refusal, _data_of(loader))):
                    fetching = iter(loader) if fetching is None else fetching
                    batch = next(fetching, _END)
                if batch is _END:
                    break
                if batch is not None:
                    yield batch
            del fetching
        self.changed |= state.changed


def _data_of(loader: Any) -> Any:
    return getattr(loader, "dataset", loader)


def _is_known(loader: Any) -> bool:
    return isinstance(loader, DataLoader) and (
        type(loader).__iter__ is DataLoader.__iter__ or type(loader).__module__.startswith("torchdata")
    )


def _refusal(dataset: Any, words: str) -> DataError:
    return DataError(f"{type(dataset).__name__} can't be gone over once more ({words}).")


def _check(dataset: Any) -> None:
    """Raise ``DataError`` for what can be read only once."""
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
