"""Which examples are in a training batch."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, IterableDataset


class BatchIndexRecorder:
    """Notes the dataset indices of every training batch, leaving data and order as they are.

    Lightning hands each loader to ``strategy.process_dataloader`` before it makes an iterator, the last moment to put a
    recording proxy in place of the batch sampler; later, workers would already have drawn from the real one.
    """

    def __init__(self) -> None:
        self._queue: deque[Any] = deque()
        self._replaced: tuple[DataLoader[Any], _RecordingSampler] | None = None
        self._strategy: Any = None

    def attach(self, trainer: Trainer) -> None:
        """Start to record the training loaders of this trainer. Call in ``setup``."""
        self.detach()
        self._strategy = trainer.strategy
        process = trainer.strategy.process_dataloader

        def recording(dataloader: object) -> object:
            processed = process(dataloader)
            if trainer.training:
                self._record(processed)
            return processed

        # On the instance, over the class's method: `detach` deletes it again.
        self._strategy.__dict__["process_dataloader"] = recording

    def detach(self) -> None:
        """Put everything back."""
        if self._strategy is not None:
            self._strategy.__dict__.pop("process_dataloader", None)
            self._strategy = None
        self._put_back()
        self._queue.clear()

    def next(self) -> list[int] | None:
        """Return the indices of the next training batch, None if they are unknown. Call once per batch."""
        return _integers(self._queue.popleft()) if self._queue else None

    def check(self) -> None:
        """Look at the indices drawn ahead, if any.

        Raises:
            MisconfigurationException: If they are no integers.
        """
        if self._queue:
            _integers(self._queue[0])

    def _record(self, loader: object) -> None:
        if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
            return
        sampler = loader.batch_sampler
        if sampler is None or any(proxy._recorder is self for proxy in _proxies(sampler)):
            return
        # One at a time: holding on to a loader that was replaced would keep its persistent workers alive.
        self._put_back()
        proxy = _RecordingSampler(sampler, self)
        self._replaced = (loader, proxy)
        # DataLoader refuses a new batch sampler by plain assignment.
        object.__setattr__(loader, "batch_sampler", proxy)

    def _put_back(self) -> None:
        """Take the proxy out again, also from below the proxies of other recorders."""
        if self._replaced is None:
            return
        loader, proxy = self._replaced
        self._replaced = None
        if loader.batch_sampler is proxy:
            object.__setattr__(loader, "batch_sampler", proxy._sampler)
        for above in _proxies(loader.batch_sampler):
            if above._sampler is proxy:
                above._sampler = proxy._sampler

    def _start(self) -> deque[Any]:
        self._queue = deque()
        return self._queue


class _RecordingSampler:
    """Stands in for a batch sampler and notes what it yields."""

    def __init__(self, sampler: Any, recorder: BatchIndexRecorder) -> None:
        self._sampler = sampler
        self._recorder = recorder

    def __iter__(self) -> Iterator[Any]:
        queue = self._recorder._start()
        for indices in self._sampler:
            queue.append(indices)  # looked at later: an error here would come out of a half-made iterator
            yield indices

    def __len__(self) -> int:
        return len(self._sampler)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_sampler"], name)


def _proxies(sampler: Any) -> Iterator[_RecordingSampler]:
    while isinstance(sampler, _RecordingSampler):
        yield sampler
        sampler = sampler._sampler


def _integers(indices: Any) -> list[int]:
    try:
        return [int(index) for index in indices]
    except (TypeError, ValueError) as error:
        raise MisconfigurationException(
            f"InfluenceAudit: the training sampler yields {indices!r}; expected lists of integer dataset indices, "
            "which scores can be filed under."
        ) from error
