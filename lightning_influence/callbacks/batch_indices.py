"""Which examples are in a training batch: indices travel with it, from where it is fetched to the training loop."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, IterableDataset

from lightning_influence.callbacks.lightning import MisconfigurationException, Trainer
from lightning_influence.callbacks.loaders import batch_of_loader, train_loader
from lightning_influence.callbacks.preparing import errors_as_misconfiguration
from lightning_influence.core import distributed
from lightning_influence.data.again import Again
from lightning_influence.data.collation import DataError, is_plain
from lightning_influence.data.ids import SampleId
from lightning_influence.data.source import ExampleSource
from lightning_influence.data.stream import StreamSource
from lightning_influence.data.tagging import Tagging
from lightning_influence.training.batch_record import BatchRecord

_ELSEWHERE = (
    "the training loop got other objects than the DataLoader made (merged, cut, copied, moved or overwritten batches, "
    "or a loader of its own kind)"
)


class BatchIndexRecorder:
    """Knows the examples of every training batch, leaving data and order as they are.

    Lightning hands each loader to ``strategy.process_dataloader`` before it makes an iterator; that is when the loader
    is told to tag what it fetches. Tags are taken off again before anybody sees a batch; which objects it was made of
    is kept as long as they live. What the training loop hands on is looked up by them, whoever else iterates the
    loader, and whatever a loader skips, repeats or stores.

    A stream has no indices: its batches tell ids, which are read where a batch is looked up.

    Args:
        sample_id: How batches of a stream tell the ids of their examples.

    Attributes:
        source: The examples of the loader, as ``ExampleSource.from_loader`` tells; None before there is one.
        known: State of the stream of a run that is resumed.
        before_fetch: See ``Tagging``.
        on_batch: Called with the trainer, each batch as it was fetched, and what is known of it.
    """

    def __init__(self, sample_id: SampleId | None = None) -> None:
        self.sample_id = sample_id
        self.known: dict[str, Any] | None = None
        self.source: ExampleSource | None = None
        self.before_fetch: Callable[[], Any] | None = None
        self.on_batch: Callable[[Trainer, Any, BatchRecord], None] | None = None
        self._loader: DataLoader[Any] | None = None
        self._tagging: Tagging | None = None
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
            processed = process(dataloader)
            if trainer.training:
                with around():
                    self._follow(processed)
            return processed

        def looking(data: Any) -> Any:
            # What the data fetcher handed on, before hooks and devices change it.
            if trainer.training:
                with around():
                    self._found = self._look_up(data) if self.sample_id is None else self._read(trainer, data)
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
        self._undo = []
        self._leave()
        self.source, self._found = None, BatchRecord(None, _ELSEWHERE)

    def source_of(self, trainer: Trainer) -> ExampleSource:
        """Return the examples that a trainer trains on.

        Raises:
            DataError: As ``ExampleSource.from_loader``, and for several loaders.
        """
        if self.sample_id is not None:
            return self._stream(trainer)
        loader = train_loader(trainer)
        if self.source is None or loader is not self._loader:
            return ExampleSource.from_loader(loader)
        return self.source

    def next(self) -> BatchRecord:
        """Return what is known of the batch that the training loop got last. Call once per batch."""
        found, self._found = self._found, BatchRecord(None, _ELSEWHERE)
        return found

    def _read(self, trainer: Trainer, batch: Any) -> BatchRecord:
        with errors_as_misconfiguration():
            source = self._stream(trainer)
        endless, own = not math.isinf(trainer.num_training_batches), batch_of_loader(trainer, batch)
        try:
            return BatchRecord(tuple(source.met(own, trainer.current_epoch, endless=endless)))
        except DataError as error:
            if not len(source):  # before the first step
                raise MisconfigurationException(f"InfluenceAudit: {error}") from error
            self._unread = self._unread or str(error)
            return BatchRecord(None, self._unread)

    def _stream(self, trainer: Trainer) -> StreamSource:
        """Return the examples of the loader that there is by now."""
        loader = train_loader(trainer)
        if not isinstance(self.source, StreamSource):
            self.source = StreamSource(loader, self.sample_id)
            if self.known is not None:
                self.source.load_state_dict(self.known)
        elif loader is not self.source.loader:
            self.source.take(loader)
        return self.source

    def _look_up(self, batch: Any) -> BatchRecord:
        drawn = None if self._tagging is None else self._tagging.registry.find(batch)
        if drawn is None:
            return BatchRecord(None, _ELSEWHERE)
        if not isinstance(drawn.indices, bytes):
            raise MisconfigurationException(
                f"InfluenceAudit: the training sampler yields {drawn.indices!r}; expected lists of integer dataset "
                "indices, which scores can be filed under."
            )
        if drawn.reason:
            return BatchRecord(None, drawn.reason)
        indices = np.frombuffer(drawn.indices, np.int64)
        if self.source is not None and (indices < 0).any():  # counted from the end
            indices = np.where(indices < 0, indices + len(self.source), indices)
        own = indices if drawn.order is None else indices[drawn.order]
        return BatchRecord(tuple(own.tolist()), ragged=drawn.ragged, drawn=drawn)

    def _follow(self, loader: object) -> None:
        if loader is self._loader:
            return
        if self.sample_id is not None:
            with errors_as_misconfiguration():
                _check_stream(loader)
            return
        if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
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
        self._loader, self._tagging = loader, Tagging.of(loader, collating)
        self._tagging.before_fetch = self.before_fetch

    def _leave(self) -> None:
        if self._tagging is not None:
            self._tagging.leave()
        self._loader = self._tagging = None


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
