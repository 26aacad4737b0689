"""Going over a loader once more, beside training: the batches that it hands out, and nothing of it moved."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from functools import partial
from itertools import islice
from types import FunctionType, ModuleType
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_influence.core.containers import children
from lightning_influence.core.errors import told
from lightning_influence.core.isolation import unchanged
from lightning_influence.core.origin import is_stream
from lightning_influence.core.random_streams import OwnStreams
from lightning_influence.data.collation import DataError, is_plain

_END = object()
# Where iterators are looked for in a data set.
_DEEPEST, _WIDEST, _MOST_HELD = 6, 64, 2_000


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
        _check(self.dataset)

    @property
    def apart(self) -> bool:
        """Whether an iterator has nothing to do with training's: else it waits for its end."""
        kind = type(self.loader)
        return isinstance(self.loader, DataLoader) and (
            kind.__iter__ is DataLoader.__iter__ or kind.__module__.startswith("torchdata")
        )

    @property
    def batch_size(self) -> int:
        """Number of examples in a batch, as far as the loader tells."""
        sizes = [
            getattr(each, "batch_size", None) for each in (self.loader, getattr(self.loader, "batch_sampler", None))
        ]
        return next((size for size in sizes if isinstance(size, int) and size > 0), 32)

    def resized(self, size: int) -> Again | None:
        """Return the loader with batches of another size; None if it is not the one that puts them together.

        None also if torch's own collating does: every part of its batches has a row for each example.
        """
        loader = self.loader
        if not self.apart or loader.batch_size is None or is_plain(loader.collate_fn):
            return None
        return Again(DataLoader(self.dataset, size, collate_fn=loader.collate_fn))

    def __iter__(self) -> Iterator[Any]:
        """Go over the loader once, with random streams of its own, and leave what that reaches as it was."""
        own, loader = OwnStreams(), _another(self.loader) if self.apart else self.loader
        reached = [self.dataset, *(getattr(loader, name, None) for name in ("batch_sampler", "sampler", "collate_fn"))]
        with unchanged(*(each for each in reached if each is not None)) as state:
            fetching: Iterator[Any] | None = None
            while True:
                with own, told(partial(_refusal, self.dataset)):
                    fetching = iter(loader) if fetching is None else fetching
                    batch = next(fetching, _END)
                if batch is _END:
                    break
                if batch is not None:
                    yield batch
            del fetching
        self.changed |= state.changed


def _refusal(dataset: Any, words: str) -> DataError:
    return DataError(f"{type(dataset).__name__} can't be gone over once more ({words}).")


def _check(dataset: Any) -> None:
    """Raise ``DataError`` for what can be read only once."""
    held = next((path for path, value in _held_by(dataset) if is_stream(value)), None)
    if held is not None or hasattr(type(dataset), "__next__"):
        why = f"holds an iterator ({held})" if held else "is one"
        raise DataError(
            f"{type(dataset).__name__} can be read only once, as it {why}, and an audit goes over the data once more. "
            "Expected a data set whose `__iter__` makes a new iterator each time it is called."
        )


def _held_by(dataset: Any) -> Iterator[tuple[str, Any]]:
    """Yield what a data set holds, and what that holds, with names; not classes, functions, modules."""
    waiting, seen = deque([("", dataset, _DEEPEST)]), set[int]()
    while waiting and len(seen) < _MOST_HELD:
        path, node, depth = waiting.popleft()
        if id(node) in seen:
            continue
        seen.add(id(node))
        yield path, node
        items = children(node)
        if items is None and not isinstance(node, (type, ModuleType, FunctionType, Tensor)):
            items = getattr(node, "__dict__", {}).items()
        if depth:
            below = ((f"{path}.{key}".strip("."), item, depth - 1) for key, item in items or ())
            waiting.extend(islice(below, _WIDEST))


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
