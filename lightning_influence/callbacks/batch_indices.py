"""Which examples are in a training batch: indices travel with it, from where it is fetched to the training loop.

Everything private of torch's data loaders is used in this file: ``DataLoader._get_iterator``, an iterator's
``_dataset_fetcher`` and ``_next_data``, the ``_DatasetKind`` of a worker. Where a version, or a loader of the user's
own, has none of them, batches are unknown, never guessed.
"""

from __future__ import annotations

import sys
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_influence.callbacks.preparing import errors_as_misconfiguration
from lightning_influence.collation import Collated, Collating, is_plain
from lightning_influence.source import ExampleSource

# Batches without anything that a weak reference can point to.
_HELD = 4
_DEEPEST = 8
_ELSEWHERE = (
    "the training loop got other objects than the DataLoader made (merged, cut, copied or moved batches, or a loader "
    "of its own kind)"
)


@dataclass(frozen=True)
class KnownBatch:
    """What is known of a training batch.

    Attributes:
        indices: Dataset indices of its examples, in their order; None if they are not known.
        reason: Why not.
        ragged: Whether its examples have several lengths and lie end to end.
    """

    indices: list[int] | None
    reason: str = _ELSEWHERE
    ragged: bool = False


class _Tagged(NamedTuple):
    """A batch on its way out of a data loader, with what was drawn for it."""

    drawn: _Drawn
    data: Any


class _Drawn(NamedTuple):
    indices: Any
    order: Any = None
    reason: str = ""
    ragged: bool = False


class BatchIndexRecorder:
    """Knows the examples of every training batch, leaving data and order as they are.

    Lightning hands each loader to ``strategy.process_dataloader`` before it makes an iterator; that is when the loader
    is told to tag what it fetches. Tags are taken off again before anybody sees a batch; which objects it was made of
    is kept as long as they live. What the training loop hands on is looked up by them, whoever else iterates the
    loader, and whatever a loader skips, repeats or stores.

    Attributes:
        source: The examples of the loader, as ``ExampleSource.from_loader`` tells; None before there is one.
    """

    def __init__(self) -> None:
        self.source: ExampleSource | None = None
        self._loader: DataLoader[Any] | None = None
        self._tagging: _Tagging | None = None
        self._found = KnownBatch(None)
        self._undo: list[tuple[Any, str]] = []

    def attach(self, trainer: Trainer) -> None:
        """Start to follow the batches of this trainer. Call in ``setup``."""
        self.detach()
        self.source = None
        process, convert = trainer.strategy.process_dataloader, trainer.precision_plugin.convert_input

        def following(dataloader: object) -> object:
            processed = process(dataloader)
            if trainer.training:
                self._follow(processed)
            return processed

        def looking(data: Any) -> Any:
            # What the data fetcher handed on, before hooks and devices change it.
            if trainer.training:
                self._found = self._look_up(data)
            return convert(data)

        # On the instances, over the classes' methods: `detach` deletes them again.
        for owner, name, method in (
            (trainer.strategy, "process_dataloader", following),
            (trainer.precision_plugin, "convert_input", looking),
        ):
            owner.__dict__[name] = method
            self._undo.append((owner, name))

    def detach(self) -> None:
        """Put everything back."""
        for owner, name in self._undo:
            owner.__dict__.pop(name, None)
        self._undo = []
        self._leave()
        self._found = KnownBatch(None)

    def source_of(self, loader: Any) -> ExampleSource:
        """Return the examples of a loader.

        Raises:
            DataError: As ``ExampleSource.from_loader``.
        """
        if self.source is None or loader is not self._loader:
            return ExampleSource.from_loader(loader)
        return self.source

    def next(self) -> KnownBatch:
        """Return what is known of the batch that the training loop got last. Call once per batch."""
        found, self._found = self._found, KnownBatch(None)
        return found

    def _look_up(self, batch: Any) -> KnownBatch:
        drawn = None if self._tagging is None else self._tagging.registry.find(batch)
        if drawn is None:
            return KnownBatch(None)
        indices = _integers(drawn.indices)
        if drawn.reason:
            return KnownBatch(None, drawn.reason)
        if drawn.order is not None:
            indices = [indices[k] for k in drawn.order.tolist()]
        return KnownBatch(indices, "", drawn.ragged)

    def _follow(self, loader: object) -> None:
        if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset) or loader is self._loader:
            return
        if loader.batch_sampler is None:
            return
        # One at a time: holding on to a loader that was replaced would keep its persistent workers alive.
        self._leave()
        try:
            with errors_as_misconfiguration():
                source = ExampleSource.from_loader(loader)
                collating = None if is_plain(loader.collate_fn) else source.collation
        except MisconfigurationException:
            if self.source is None:
                raise
            return  # loaded again in the middle of training, which goes on
        self.source = source
        tagging = loader.__dict__.get("_get_iterator")
        if not isinstance(tagging, _Tagging):
            tagging = _Tagging(loader, collating)
            loader.__dict__["_get_iterator"] = tagging
        tagging.users += 1
        self._loader, self._tagging = loader, tagging

    def _leave(self) -> None:
        if self._loader is not None and self._tagging is not None:
            self._tagging.users -= 1
            if not self._tagging.users:
                self._loader.__dict__.pop("_get_iterator", None)
        self._loader = self._tagging = None


class _Tagging:
    """Stands in for a loader's ``_get_iterator``: the iterators tag what they fetch.

    A plain object that holds the loader: whoever copies or pickles that gets one that belongs to the copy.
    """

    def __init__(self, loader: DataLoader[Any], collation: Any) -> None:
        self.loader = loader
        self.collation = collation
        self.registry = _Registry()
        self.users = 0

    def __call__(self) -> Any:
        loader = self.loader
        own = type(loader)._get_iterator
        if own.__module__.partition(".")[0] not in ("torch", "torchdata"):
            return own(loader)  # who knows what it returns
        if not loader.num_workers:
            iterator = own(loader)
            fetcher = getattr(iterator, "_dataset_fetcher", None)
            if fetcher is None or not hasattr(iterator, "_next_data"):
                return iterator
            _tag(fetcher, self.collation)
        else:
            init = loader.worker_init_fn
            loader.worker_init_fn = _WorkerTagging(init, self.collation)
            try:
                iterator = own(loader)
            finally:
                loader.worker_init_fn = init
        _untag(iterator, self.registry)
        return iterator


class _WorkerTagging:
    """A ``worker_init_fn`` after which the fetchers of the worker tag their batches."""

    def __init__(self, init: Callable[[int], None] | None, collation: Any) -> None:
        self.init = init
        self.collation = collation

    def __call__(self, worker_id: int) -> None:
        if self.init is not None:
            self.init(worker_id)
        kind: Any = torch.utils.data._DatasetKind
        create, collation = kind.create_fetcher, self.collation

        def tagging(*args: Any) -> Any:
            fetcher = create(*args)
            # Not those of loaders that the data set itself has.
            if sys._getframe(1).f_code.co_name == "_worker_loop":
                _tag(fetcher, collation)
            return fetcher

        # For the life of the worker: each epoch of persistent workers makes another.
        kind.create_fetcher = tagging


def _tag(fetcher: Any, collation: Any) -> None:
    if collation is not None:
        fetcher.collate_fn = Collating(fetcher.collate_fn, collation)
    unbound, reference = type(fetcher).fetch, weakref.ref(fetcher)

    def fetch(indices: Any) -> _Tagged:
        kept = list(indices) if isinstance(indices, list) else indices  # samplers may reuse their list
        data = unbound(reference(), indices)
        if isinstance(data, Collated):
            return _Tagged(_Drawn(_Opaque(kept), data.order, data.reason, data.ragged), data.data)
        return _Tagged(_Drawn(_Opaque(kept)), data)

    fetcher.fetch = fetch


class _Opaque:
    """Indices as they were drawn, which pinning of memory leaves alone."""

    def __init__(self, value: Any) -> None:
        self.value = value


def _untag(iterator: Any, registry: _Registry) -> None:
    # Weakly: workers shut down when the last reference goes, not when the garbage collector comes.
    unbound, reference = type(iterator)._next_data, weakref.ref(iterator)

    def next_data() -> Any:
        data = unbound(reference())
        if not isinstance(data, _Tagged):
            return data
        registry.add(data.data, data.drawn)
        return data.data

    iterator._next_data = next_data


class _Registry:
    """Batches by what they are made of, as long as that lives."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[list[weakref.ref[Any]], _Drawn]] = {}
        self._held: deque[tuple[Any, _Drawn]] = deque(maxlen=_HELD)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Registry, ()

    def add(self, batch: Any, drawn: _Drawn) -> None:
        """Note a batch."""
        leaves = list(_leaves(batch, 0))
        if not leaves:
            if batch is not None:
                self._held.append((batch, drawn))
            return
        key, known = id(leaves[0]), self._known

        def forget(reference: Any) -> None:
            if key in known and known[key][0][0] is reference:
                del known[key]

        known[key] = [weakref.ref(leaves[0], forget), *map(weakref.ref, leaves[1:])], drawn

    def find(self, batch: Any) -> _Drawn | None:
        """Return what was drawn for a batch; None unless it is made of the very same things, in their order."""
        leaves = list(_leaves(batch, 0))
        if not leaves:
            return next((drawn for held, drawn in self._held if held is batch), None)
        references, drawn = self._known.get(id(leaves[0]), ([], None))
        if len(references) != len(leaves):
            return None
        same = all(reference() is leaf for reference, leaf in zip(references, leaves, strict=True))
        return drawn if same else None


def _leaves(batch: Any, depth: int) -> Iterator[Any]:
    """Yield what a batch is made of and a weak reference can point to: tensors first of all."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping) and depth < _DEEPEST:
        for value in batch.values():
            yield from _leaves(value, depth + 1)
    elif isinstance(batch, (list, tuple)) and depth < _DEEPEST:
        for value in batch:
            yield from _leaves(value, depth + 1)
    elif type(batch).__weakrefoffset__:
        yield batch


def _integers(drawn: _Opaque) -> list[int]:
    try:
        return [int(index) for index in drawn.value]
    except (TypeError, ValueError) as error:
        raise MisconfigurationException(
            f"InfluenceAudit: the training sampler yields {drawn.value!r}; expected lists of integer dataset indices, "
            "which scores can be filed under."
        ) from error
