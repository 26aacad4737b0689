"""Which examples are in a training batch."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, IterableDataset


class BatchIndexRecorder:
    """Notes the dataset indices of every training batch, leaving data and order as they are.

    Lightning hands each loader to ``strategy.process_dataloader`` before it makes an iterator, the last moment to put a
    recording proxy in place of the batch sampler; later, workers would already have drawn from the real one.
    """

    def __init__(self) -> None:
        self._queue: deque[list[int]] = deque()
        self._replaced: list[tuple[DataLoader[Any], _RecordingSampler]] = []
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
        for loader, proxy in self._replaced:
            _take_out(loader, proxy)
        self._replaced.clear()
        self._queue.clear()

    def next(self) -> list[int] | None:
        """Return the indices of the next training batch, None if they are unknown. Call once per batch."""
        return self._queue.popleft() if self._queue else None

    def _record(self, loader: object) -> None:
        if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
            return
        sampler = loader.batch_sampler
        if sampler is None or any(loader is known for known, _ in self._replaced):
            return
        proxy = _RecordingSampler(sampler, self)
        self._replaced.append((loader, proxy))
        _set_batch_sampler(loader, proxy)

    def _start(self) -> deque[list[int]]:
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
            queue.append([int(index) for index in indices])
            yield indices

    def __len__(self) -> int:
        return len(self._sampler)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_sampler"], name)


def _set_batch_sampler(loader: DataLoader[Any], sampler: Any) -> None:
    # DataLoader refuses a new batch sampler by plain assignment.
    object.__setattr__(loader, "batch_sampler", sampler)


def _take_out(loader: DataLoader[Any], proxy: _RecordingSampler) -> None:
    """Remove one proxy, wherever it stands in a chain of them (two audits of one run)."""
    if loader.batch_sampler is proxy:
        _set_batch_sampler(loader, proxy._sampler)
        return
    outer: Any = loader.batch_sampler
    while isinstance(outer, _RecordingSampler):
        if outer._sampler is proxy:
            outer._sampler = proxy._sampler
            return
        outer = outer._sampler
