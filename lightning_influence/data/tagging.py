"""Batches that know what was drawn for them: tags put on where a data loader fetches, and taken off where it hands out.

Everything private of torch's data loaders is used in this file: ``DataLoader._get_iterator``, an iterator's
``_dataset_fetcher`` and ``_next_data``, the ``_DatasetKind`` of a worker. Where a version, or a loader of the user's
own, has none of them, batches are unknown, never guessed.
"""

from __future__ import annotations

import operator
import sys
import weakref
from array import array
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_influence.core.torch_private import version
from lightning_influence.data.collation import Collated, Collating, Collation

# Batches without anything that a weak reference can point to.
_HELD = 4
# Version and place of a tensor's memory.
_Written: TypeAlias = tuple[int, int]


class _Tagged(NamedTuple):
    """A batch on its way out of a data loader, with what was drawn for it."""

    drawn: Drawn
    data: Any


class Drawn(NamedTuple):
    """What was drawn for a batch, see ``Collated``.

    Attributes:
        indices: What the batch sampler yielded; integers as the bytes of an array, which is sent in no time.
        order: Positions of the rows among them, where collating may have moved them.
        reason: Why that is not known.
        ragged: Whether rows of several lengths lie end to end.
        before: What ``Tagging.before_fetch`` has returned; None of workers.
    """

    indices: Any
    order: NDArray[np.int64] | None = None
    reason: str = ""
    ragged: bool = False
    before: Any = None


class Tagging:
    """Stands in for a loader's ``_get_iterator``: the iterators tag what they fetch.

    A plain object that holds the loader: whoever copies or pickles that gets one that belongs to the copy.

    Attributes:
        before_fetch: Called in this process before a batch is fetched, once it is known of what.
    """

    def __init__(self, loader: DataLoader[Any], collation: Collation | None) -> None:
        self.loader = loader
        self.collation = collation
        self.registry = Registry()
        self.users = 0
        self.before_fetch: Callable[[], Any] | None = None

    @classmethod
    def of(cls, loader: DataLoader[Any], collation: Collation | None) -> Tagging:
        """Let a loader tag what it fetches from now on; several may ask for it.

        Args:
            loader: The loader.
            collation: What its collate function does, None if it surely keeps the order.
        """
        found = loader.__dict__.get("_get_iterator")
        if not isinstance(found, Tagging):
            found = loader.__dict__["_get_iterator"] = cls(loader, collation)
        found.users += 1
        return found

    def leave(self) -> None:
        """Put the loader back, once the last of those that asked has no more use for it."""
        self.users -= 1
        if not self.users:
            self.loader.__dict__.pop("_get_iterator", None)

    def __call__(self) -> Any:
        """Return an iterator as the loader itself would, whose batches are noted in the registry."""
        loader = self.loader
        own = type(loader)._get_iterator
        if own.__module__.partition(".")[0] not in ("torch", "torchdata"):
            return own(loader)  # who knows what it returns
        if not loader.num_workers:
            iterator = own(loader)
            fetcher = getattr(iterator, "_dataset_fetcher", None)
            if fetcher is None or not hasattr(iterator, "_next_data"):
                return iterator
            _tag(fetcher, self.collation, self.before_fetch)
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

    def __init__(self, init: Callable[[int], None] | None, collation: Collation | None) -> None:
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


def _tag(fetcher: Any, collation: Collation | None, before_fetch: Callable[[], Any] | None = None) -> None:
    if collation is not None:
        fetcher.collate_fn = Collating(fetcher.collate_fn, collation)
    unbound, reference = type(fetcher).fetch, weakref.ref(fetcher)

    def fetch(indices: Any) -> _Tagged:
        kept = _kept(indices)  # before, as samplers may reuse their list
        before = None if before_fetch is None else before_fetch()
        data = unbound(reference(), indices)
        if isinstance(data, Collated):
            return _Tagged(Drawn(kept, data.order, data.reason, data.ragged, before), data.data)
        return _Tagged(Drawn(kept, before=before), data)

    fetcher.fetch = fetch


def _kept(indices: Any) -> Any:
    try:
        if isinstance(indices, list) and set(map(type, indices)) == {int}:
            return array("q", indices).tobytes()  # in an eighth of the time of what follows, in every step
        found = np.asarray(indices)
    except (TypeError, ValueError, OverflowError):  # of several shapes, or too large
        return indices
    return found.astype(np.int64).tobytes() if found.dtype.kind in "iu" and found.ndim == 1 else indices


def _untag(iterator: Any, registry: Registry) -> None:
    # Weakly: workers shut down when the last reference goes, not when the garbage collector comes.
    unbound, reference = type(iterator)._next_data, weakref.ref(iterator)

    def next_data() -> Any:
        data = unbound(reference())
        if not isinstance(data, _Tagged):
            return data
        registry.add(data.data, data.drawn)
        return data.data

    iterator._next_data = next_data


class Registry:
    """Batches by what they are made of, as long as that lives."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[list[weakref.ref[Any]], list[_Written], Drawn]] = {}
        self._held: deque[tuple[Any, Drawn]] = deque(maxlen=_HELD)

    def __reduce__(self) -> tuple[Any, ...]:
        return Registry, ()

    def add(self, batch: Any, drawn: Drawn) -> None:
        """Note a batch."""
        made_of = _leaves(batch)
        if not made_of:
            if batch is not None:
                self._held.append((batch, drawn))
            return
        key, known = id(made_of[0]), self._known

        def forget(reference: Any) -> None:
            if key in known and known[key][0][0] is reference:
                del known[key]

        known[key] = [weakref.ref(made_of[0], forget), *map(weakref.ref, made_of[1:])], _written(made_of), drawn

    def find(self, batch: Any) -> Drawn | None:
        """Return what was drawn for a batch; None unless it is made of the very same things, in their order.

        Nor if all of it was written to since: its rows may be others, or in another order. In batches that are only
        scaled, labels stay as they are.
        """
        made_of = _leaves(batch)
        if not made_of:
            return next((drawn for held, drawn in self._held if held is batch), None)
        references, written, drawn = self._known.get(id(made_of[0]), ([], [], None))
        same = [id(reference()) for reference in references] == [id(part) for part in made_of]
        rewritten = bool(written) and all(map(operator.ne, written, _written(made_of)))
        return drawn if same and not rewritten else None


def _written(made_of: list[Any]) -> list[_Written]:
    return [
        (version(part), part.data_ptr() if part.layout is torch.strided else 0)
        for part in made_of
        if isinstance(part, Tensor) and not part.is_inference()
    ]


def _leaves(batch: Any, depth: int = 16) -> list[Any]:
    """Return what a batch is made of and a weak reference can point to."""
    if isinstance(batch, Tensor):
        return [batch]
    items = batch if isinstance(batch, (tuple, list)) else batch.values() if isinstance(batch, Mapping) else None
    if items is None or not depth:
        return [batch] if type(batch).__weakrefoffset__ else []
    return [leaf for item in items for leaf in _leaves(item, depth - 1)]
