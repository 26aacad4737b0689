"""Which examples are in a training batch: indices travel with it, from where it is fetched to the training loop."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

from torch.utils.data import DataLoader, IterableDataset

from lightning_influence.callbacks import bridge
from lightning_influence.callbacks.lightning import MisconfigurationException, Trainer
from lightning_influence.callbacks.loaders import LoaderName, path_of_loader, train_loader
from lightning_influence.callbacks.preparing import errors_as_misconfiguration
from lightning_influence.core import distributed
from lightning_influence.core.containers import Path
from lightning_influence.data.again import Again
from lightning_influence.data.collation import DataError, is_plain
from lightning_influence.data.contents import at
from lightning_influence.data.ids import SampleId
from lightning_influence.data.source import ExampleSource
from lightning_influence.data.stream import StreamSource
from lightning_influence.data.tagging import Tagging
from lightning_influence.training.batch_record import BatchRecord

_ELSEWHERE = (
    "the training loop got other objects than the DataLoader made (merged, cut, copied, moved or overwritten batches, "
    "or a loader of its own kind)"
)


class _Followed(NamedTuple):
    """A loader whose batches are tagged."""

    loader: DataLoader[Any]
    source: ExampleSource
    tagging: Tagging


class _Place(NamedTuple):
    """Where the loader in question is among those of a trainer."""

    among: Any
    path: Path
    loader: Any


class BatchIndexRecorder:
    """Knows the examples of every training batch, leaving data and order as they are.

    Lightning hands each loader to ``strategy.process_dataloader`` before it makes an iterator; that is when the loader
    is told to tag what it fetches. Tags are taken off again before anybody sees a batch; which objects it was made of
    is kept as long as they live. What the training loop hands on is looked up by them, whoever else iterates the
    loader, and whatever a loader skips, repeats or stores.

    A stream has no indices: its batches tell ids, which are read where a batch is looked up.

    Args:
        sample_id: How batches of a stream tell the ids of their examples.
        loader: Which loader of several.

    Attributes:
        source: The examples of the loader, as ``ExampleSource.from_loader`` tells; None before there is one.
        known: State of the stream of a run that is resumed.
        before_fetch: See ``Tagging``.
        on_batch: Called with the trainer, each batch as it was fetched, and what is known of it.
    """

    def __init__(self, sample_id: SampleId | None = None, loader: LoaderName = None) -> None:
        self.sample_id, self.loader = sample_id, loader
        self.known: dict[str, Any] | None = None
        self.source: ExampleSource | None = None
        self.before_fetch: Callable[[], Any] | None = None
        self.on_batch: Callable[[Trainer, Any, BatchRecord], None] | None = None
        self._followed: list[_Followed] = []
        self._place: _Place | None = None  # until loaders are loaded again
        self._found = BatchRecord(None, _ELSEWHERE)
        self._unread = ""  # why ids of a batch could not be read
        self._undo: list[tuple[Any, str]] = []

    def attach(self, trainer: Trainer, around: Callable[[], AbstractContextManager[Any]] = nullcontext) -> None:
        """Start to follow the batches of this trainer. Call in ``setup``.

        Args:
            trainer: The trainer.
            around: Put around everything that is done between the loader and the training loop.
        """
        self.detach()
        process, convert = trainer.strategy.process_dataloader, trainer.precision_plugin.convert_input

        def following(dataloader: object) -> object:
            self._place = None
            processed = process(dataloader)
            if trainer.training:
                with around():
                    self._follow(processed)
            return processed

        def looking(data: Any) -> Any:
            # What the data fetcher handed on, before hooks and devices change it.
            if trainer.training:
                with around():
                    self._found = self._look_up(trainer, data) if self.sample_id is None else self._read(trainer, data)
                    if self.on_batch is not None:
                        self.on_batch(trainer, data, self._found)
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
        self._undo, self._place = [], None
        self._leave()
        self.source, self._found = None, BatchRecord(None, _ELSEWHERE)

    def source_of(self, trainer: Trainer) -> ExampleSource:
        """Return the examples that a trainer trains on.

        Raises:
            DataError: As ``ExampleSource.from_loader``, and for several loaders.
        """
        if self.sample_id is not None:
            return self._stream(trainer)
        followed = self._own(trainer)
        if followed is not None:
            return followed.source
        source = ExampleSource.from_loader(train_loader(trainer, self.loader))
        return bridge.in_company(trainer, self.loader, source)

    def source_of_epoch(self, trainer: Trainer) -> ExampleSource | None:
        """Return the examples of the loader that an epoch goes over, as far as it is followed."""
        if self.sample_id is None and self.source is not None:
            self._own(trainer)
        return self.source

    def next(self) -> BatchRecord:
        """Return what is known of the batch that the training loop got last. Call once per batch."""
        found, self._found = self._found, BatchRecord(None, _ELSEWHERE)
        return found

    def _read(self, trainer: Trainer, batch: Any) -> BatchRecord:
        with errors_as_misconfiguration():
            source = self._stream(trainer)
        endless, own = not math.isinf(trainer.num_training_batches), self._part(trainer, batch)
        if own is None:
            return BatchRecord((), filed=True)
        try:
            return BatchRecord(tuple(source.met(own, trainer.current_epoch, endless=endless)))
        except DataError as error:
            if not len(source):  # before the first step
                raise MisconfigurationException(f"InfluenceAudit: {error}") from error
            self._unread = self._unread or str(error)
            return BatchRecord(None, self._unread)

    def _stream(self, trainer: Trainer) -> StreamSource:
        """Return the examples of the loader that there is by now."""
        loader = self._placed(trainer).loader
        if not isinstance(self.source, StreamSource):
            if self.loader is not None:
                _check_stream(loader)
            self.source = StreamSource(loader, self.sample_id)
            bridge.in_company(trainer, self.loader, self.source)
            if self.known is not None:
                self.source.load_state_dict(self.known)
        elif loader is not self.source.loader:
            self.source.take(loader)
        return self.source

    def _part(self, trainer: Trainer, batch: Any) -> Any:
        """Return the loader's own batch in what ``training_step`` gets."""
        path = self._placed(trainer).path
        return at(batch, path) if path else batch

    def _placed(self, trainer: Trainer) -> _Place:
        """Return where the loader in question is, asked anew where a trainer has other loaders than before."""
        among = trainer.train_dataloader
        if self._place is None or self._place.among is not among:
            with errors_as_misconfiguration():
                path = path_of_loader(trainer, self.loader)
            self._place = _Place(among, path, at(among, path))
        return self._place

    def _own(self, trainer: Trainer) -> _Followed | None:
        """Return the loader in question, if it is followed; the others are left alone from then on."""
        place = self._placed(trainer)
        for own in self._followed:
            if own.loader is place.loader:
                break
        else:
            return None
        if len(self._followed) > 1:
            self._leave(but=own)
        if own.source.company is None and place.path:
            with errors_as_misconfiguration():
                bridge.in_company(trainer, self.loader, own.source)
        self.source = own.source
        return own

    def _look_up(self, trainer: Trainer, data: Any) -> BatchRecord:
        batch, followed = self._part(trainer, data), self._own(trainer)
        if batch is None and self.loader is not None:  # it has come to its end before others
            return BatchRecord((), filed=True)
        drawn = None if followed is None else followed.tagging.registry.find(batch)
        if drawn is None:
            return BatchRecord(None, _ELSEWHERE)
        if not isinstance(drawn.indices, bytes):
            raise MisconfigurationException(
                f"InfluenceAudit: the training sampler yields {drawn.indices!r}; expected lists of integer dataset "
                "indices, which scores can be filed under."
            )
        if drawn.reason:
            return BatchRecord(None, drawn.reason)
        indices = array("q", drawn.indices).tolist()
        if self.source is not None and min(indices, default=0) < 0:  # counted from the end
            indices = [index + len(self.source) if index < 0 else index for index in indices]
        if drawn.order is not None:
            indices = [indices[place] for place in drawn.order.tolist()]
        return BatchRecord(tuple(indices), ragged=drawn.ragged, drawn=drawn)

    def _follow(self, loader: object) -> None:
        if any(loader is each.loader for each in self._followed):
            return
        if self.sample_id is not None:
            if self.loader is None:
                with errors_as_misconfiguration():
                    _check_stream(loader)
            return
        if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
            return
        if loader.batch_sampler is None:
            return
        # One at a time: holding on to a loader that was replaced would keep its persistent workers alive.
        if self.loader is None:
            self._leave()
        try:
            with errors_as_misconfiguration():
                source = ExampleSource.from_loader(loader)
                collating = None if is_plain(loader.collate_fn) else source.collation
        except MisconfigurationException:
            if self.source is None and self.loader is None:
                raise
            return  # loaded again in the middle of training, which goes on; or it may be another one that is asked for
        if self.loader is None:
            self.source = source
        tagging = Tagging.of(loader, collating)
        tagging.before_fetch = self.before_fetch
        self._followed.append(_Followed(loader, source, tagging))

    def _leave(self, but: _Followed | None = None) -> None:
        for each in self._followed:
            if each is not but:
                each.tagging.leave()
        self._followed = [] if but is None else [but]


def _check_stream(loader: Any) -> None:
    """Raise ``DataError`` for what needs no ids, or has none that processes agree on."""
    if distributed.world_size() > 1:
        raise DataError(
            f"{distributed.world_size()} processes train on a stream, each with examples of its own: expected one "
            "process, `Trainer(devices=1)`."
        )
    Again(loader)
    sampler = getattr(getattr(loader, "batch_sampler", None), "sampler", None)
    of_torch = type(sampler).__module__.startswith("torch.utils.data") and isinstance(loader, DataLoader)
    if of_torch and not isinstance(loader.dataset, IterableDataset):
        raise DataError(
            f"{type(loader.dataset).__name__} has an index, which its examples are filed under. `ids=` names them: one "
            "for each in their order, or a function from index to id; leave `sample_id` out."
        )
