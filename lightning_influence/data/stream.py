"""Examples of a stream: known by their ids, and met again by going over the loader once more.

What is asked for by number is handed over in the order in which the loader has it, and nothing is kept but the batch at
hand and what waits for the next one.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from lightning_influence.core.errors import Forgiving
from lightning_influence.data.again import Again
from lightning_influence.data.collation import DataError
from lightning_influence.data.contents import digest
from lightning_influence.data.ids import Id, IdBook, SampleId, ids_in
from lightning_influence.data.rows import Cutting, Row, UnlikeError, joined, sizes_of
from lightning_influence.data.source import ExampleSource

NOT_MET = "the stream did not hold it again"

_NAMED = 5
_PATIENCE = 60.0  # seconds for counting a stream in silence, which may have no end


class Stream(Dataset[Any]):
    """The few examples of a stream that are at hand, by number.

    Args:
        dataset: The stream.
        book: The ids of its examples.
        go_over: Puts examples into ``held``.

    Attributes:
        rows: Those of the batch that was handed out last.
        held: What was asked to be kept.
    """

    def __init__(self, dataset: Any, book: IdBook, go_over: Callable[[Sequence[int]], None]) -> None:
        self.dataset, self.book = dataset, book
        self.rows: dict[int, Row] = {}
        self.held: dict[int, Any] = {}
        self._go_over = go_over

    def __len__(self) -> int:
        """Return the number of examples that have come so far."""
        return len(self.book)

    def fetch(self, indices: Sequence[int]) -> None:
        """Have a few examples at hand, and keep them: pictures and texts of the candidates."""
        if wanted := [index for index in indices if index not in self.held and index not in self.rows]:
            self._go_over(wanted)

    def __getitem__(self, index: int) -> Any:
        """Return what a batch held of an example that is at hand."""
        if index in self.held:
            return self.held[index]
        if index not in self.rows:
            raise IndexError(f"the stream has gone on: example {index} is not at hand")
        return self.rows[index].example()


class StreamSource(ExampleSource):
    """The examples of a loader that can only be gone over, filed by their ids.

    Args:
        loader: A ``DataLoader`` of whatever kind, or another iterable of batches.
        sample_id: How a batch tells the ids of its examples; None numbers them in the order of the loader.

    Attributes:
        book: The ids that have come so far; an example's index is its number there.
        repeated: How many examples came once more in the same epoch.
        repeats: A few of their ids.
        whole: Whether all of its examples are known, those that nobody was trained on included.

    Raises:
        DataError: If the loader can be gone over only once.
    """

    def __init__(self, loader: Any, sample_id: SampleId | None) -> None:
        self.book = IdBook()
        self._loader = Again(loader)
        self._stream = Stream(self._loader.dataset, self.book, self._hold)
        super().__init__(self._stream, batch_size=self._loader.batch_size, sequential=True)
        self.changed = self._loader.changed
        self.sample_id = sample_id
        self.repeated, self.repeats = 0, list[Id]()
        self.whole = False
        self._epoch, self._drawn, self._longest = -1, 0, 0
        self._seen = np.zeros(0, bool)  # in this epoch
        self._ends = False
        self._cutting = Cutting()

    @property
    def loader(self) -> Any:
        """What is gone over."""
        return self._loader.loader

    def take(self, loader: Any) -> None:
        """Go on with a loader that takes the place of the last one."""
        self._loader = Again(loader)
        self._stream.dataset = self._loader.dataset

    @property
    def reads_apart(self) -> bool:
        """Whether passes have an iterator that has nothing to do with training's: else they wait for its end."""
        return self._loader.apart

    # ------------------------------------------------------------------ what training meets

    def met(self, batch: Any, epoch: int, *, endless: bool) -> list[int]:
        """Return the numbers of the examples of a training batch.

        Args:
            batch: As the loader has handed it out.
            epoch: That it is of.
            endless: Whether the length of the loader is known, or limited: how it ends then tells nothing.

        Raises:
            DataError: If the ids can't be read; of the first batch, also if they don't tell its examples apart.
        """
        ids = self._ids(batch)
        self._cutting.learn(batch, len(ids))
        if not len(self.book):
            self._look_at(batch, ids)
        first = not self._stream.rows and self._epoch < 0
        numbers = self.book.add(ids)
        if first:
            self.batch_size = self.pass_batch_size = len(ids)
            copied = joined(self._cutting.rows(batch, len(ids)))  # a step may overwrite it
            self._stream.rows = dict(zip(numbers, self._cutting.rows(copied, len(ids)), strict=True))
        if epoch != self._epoch:
            self._ends |= self._epoch >= 0 and not endless
            self._epoch, self._drawn = epoch, 0
            self._seen[:] = False
        self._drawn += 1
        self._longest = max(self._longest, self._drawn)
        if len(self._seen) < len(self.book):
            self._seen = np.concatenate([self._seen, np.zeros(len(self.book) // 8 + len(numbers) + 256, bool)])
        again = self._seen[numbers]
        if again.any() or len(set(numbers)) < len(numbers):
            places = [k for k, number in enumerate(numbers) if again[k] or number in numbers[:k]]
            self.repeated += len(places)
            new = [ids[k] for k in places if ids[k] not in self.repeats]
            self.repeats += list(dict.fromkeys(new))[: _NAMED - len(self.repeats)]
        self._seen[numbers] = True
        return numbers

    def _ids(self, batch: Any) -> list[Id]:
        if self.sample_id is not None:
            return ids_in(batch, self.sample_id)
        sizes = sizes_of(batch)
        size = max(sizes, key=lambda each: (sizes[each], each), default=1)
        return list(range(size))

    def _look_at(self, batch: Any, ids: list[Id]) -> None:
        """Refuse ids of a first batch that are not those of its rows, or that examples share."""
        n = len(ids)
        with Forgiving():  # it need not make batches of any size
            other = self._loader.resized(n - 1 or 2)
            for another in islice(other or (), 1):
                self._cutting.learn(another, len(self._ids(another)))
        picked = joined(self._cutting.rows(batch, n, (n - 1, 0)))
        with suppress(DataError):
            if self.sample_id is None or self._ids(picked) == [ids[-1], ids[0]]:
                picked = None
        if picked is not None:
            raise DataError(
                "the rows of a batch can't be picked: two of its examples have other ids by themselves than in the "
                "batch. Expected batches of tensors, arrays and lists with one row for each example, the ids among "
                "them."
            )
        _check_shared(ids, self._cutting.rows(batch, n))

    # ------------------------------------------------------------------ passes

    @property
    def at_hand(self) -> list[int]:
        """The examples of the batch that was handed out last; a first one is drawn if there is none."""
        if not self._stream.rows:
            for batch in self._loader:
                self.met(batch, self._epoch, endless=True)
                break
        return list(self._stream.rows)

    def _batches(self, indices: Sequence[int], size: int) -> Generator[tuple[list[int], Any], None, None]:
        """Yield ``(indices, batch)``, ``size`` examples at a time, in the order in which the stream holds them.

        Examples that are at hand come in the order that is asked for. Batches that can't be put together (of other
        lengths) are handed over one by one.

        Raises:
            DataError: If the stream can't be gone over again, or holds none of the examples any more.
        """
        rows = self._stream.rows
        if all(index in rows for index in indices):
            for part in _parts(list(indices), size):
                for chosen, _, batch in _split([(index, rows[index]) for index in part]):
                    yield chosen, batch
            return
        try:
            yield from self._met_again(indices, size)
        finally:
            self._stream.rows = {}

    def _met_again(self, indices: Sequence[int], size: int) -> Iterator[tuple[list[int], Any]]:
        left = np.bincount(np.asarray(indices, np.int64), minlength=len(self.book)).astype(np.uint16)
        waiting: list[tuple[int, Row]] = []
        met = 0
        for batch, numbers in self._again():
            places = []
            for place, index in enumerate(numbers):
                if 0 <= index < len(left) and left[index]:
                    places += [place] * int(left[index])
                    left[index] = 0
                    if self.missing.get(index) == NOT_MET:
                        del self.missing[index]
            met += len(places)
            rows = self._cutting.picked(batch, len(numbers), places)
            waiting += [(numbers[place], row) for place, row in zip(places, rows, strict=True)]
            # One more is waited for: a lone last example would meet steps that squeeze the batch away.
            while len(waiting) > size + 1:
                yield from self._handed(waiting[:size])
                waiting = waiting[size:]
            if met == len(indices):
                break
        for part in _parts(waiting, size):
            yield from self._handed(part)
        if not met:
            raise DataError(
                f"{type(self._stream.dataset).__name__} holds none of the {len(indices):,} examples again that it is "
                "asked for: it can be read only once, or is another stream each time. Expected a data set whose "
                "`__iter__` starts afresh, with the same ids."
            )
        self.missing |= dict.fromkeys(np.flatnonzero(left).tolist(), NOT_MET)

    def _handed(self, waiting: list[tuple[int, Row]]) -> Iterator[tuple[list[int], Any]]:
        for chosen, rows, batch in _split(waiting):
            self._stream.rows = dict(zip(chosen, rows, strict=True))
            yield chosen, batch

    def _again(self) -> Iterator[tuple[Any, Sequence[int]]]:
        """Yield the batches of the stream from its beginning, with the numbers of their examples, -1 for strangers."""
        limit = math.inf if self._ends or self.sample_id is None or not self._longest else self._longest
        start = 0
        for number, batch in enumerate(self._loader):
            with suppress(DataError):  # whose ids are not known in training, either
                ids = self._ids(batch)
                self._cutting.learn(batch, len(ids))
                yield batch, range(start, start + len(ids)) if self.sample_id is None else self.book.find(ids)
                start += len(ids)
            if number + 1 >= limit:
                return

    def counted(self, batches: float) -> list[int]:
        """Return the numbers of the examples of so many batches of a stream that nobody trains on, by going over it."""
        found = 0
        for number, batch in enumerate(_patiently(self._loader)):
            found += len(self._ids(batch) if self.sample_id is None else self.met(batch, 0, endless=False))
            if number + 1 >= batches:
                break
        return list(range(len(self.book) or found))

    def _hold(self, indices: Sequence[int]) -> None:
        """Go over the stream for a few examples, and keep them in ``dataset``."""
        for chosen, _ in self._batches(indices, self.pass_batch_size):
            self._stream.held |= {index: self._stream.rows[index].example() for index in chosen}

    # ------------------------------------------------------------------ what an index would allow

    def repeatable(self, indices: Sequence[int]) -> Dataset[Any]:
        """Return what is at hand."""
        return self._stream

    @contextmanager
    def fetching(self) -> Iterator[Callable[[int], Any]]:
        """Look at single examples that are at hand."""
        yield self._stream.__getitem__

    def digests(self, indices: Sequence[int] | None = None) -> list[bytes | None]:
        """Return nothing: a sample of a stream can't be asked for."""
        return []

    def notes(self) -> list[str]:
        """Return what a reader of the scores should know."""
        if not self.repeated:
            return []
        return [
            f"examples came {self.repeated:,} times with an id that the epoch had had before (such as "
            f"{', '.join(map(repr, self.repeats))}): two share it, workers hand out the same, or the stream repeats "
            "itself. They count as one example",
        ]

    def look_again(self) -> None:
        """Forget which examples the last pass did not meet: the next one may."""
        self.missing = {index: reason for index, reason in self.missing.items() if reason != NOT_MET}

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and primitives, for a Lightning checkpoint."""
        return {"ids": self.book.state_dict(), "longest": self._longest, "ends": self._ends, "repeated": self.repeated}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.book.load_state_dict(state["ids"])
        self._longest, self._ends, self.repeated = state["longest"], state["ends"], state["repeated"]


def _check_shared(ids: Sequence[Id], rows: Sequence[Row]) -> None:
    held: dict[Id, list[int]] = {}
    for place, value in enumerate(ids):
        held.setdefault(value, []).append(place)
    shared = {value: places for value, places in held.items() if len(places) > 1}
    for value, places in shared.items():
        if len({digest(rows[place].example()) for place in places}) > 1:
            raise DataError(
                f"sample_id gives {len(places)} examples of the first batch the id {value!r}, and they hold different "
                f"things ({len(shared)} ids of {len(held)} are shared so). Expected ids that tell examples apart: add "
                "what differs (a row, a line, a shard)."
            )


def _patiently(loader: Again) -> Iterator[Any]:
    """Yield the batches of a loader, and say how many have come once that takes long."""
    end = time.perf_counter() + _PATIENCE
    for number, batch in enumerate(loader):
        if time.perf_counter() > end:
            end = math.inf
            warnings.warn(
                f"{type(loader.dataset).__name__} has handed out {number:,} batches so far, and is counted until it "
                "ends. If it never does, interrupt this and say how much of it is meant: "
                "`trainer=Trainer(limit_train_batches=..., limit_val_batches=...)`.",
                stacklevel=2,
            )
        yield batch


def _parts(items: list[Any], size: int) -> Iterator[list[Any]]:
    """Yield so many at a time; a lone last one is given the one before it for company."""
    parts = [items[start : start + size] for start in range(0, len(items), size)]
    if len(parts) > 1 and len(parts[-1]) == 1 and size > 2:
        parts[-1].insert(0, parts[-2].pop())
    yield from parts


def _split(waiting: list[tuple[int, Row]]) -> Iterator[tuple[list[int], list[Row], Any]]:
    """Yield numbers, rows and batches: one if they can be put together, else those of each batch."""
    chosen, rows = [index for index, _ in waiting], [row for _, row in waiting]
    try:
        whole = joined(rows)
    except UnlikeError:
        for batch in list(dict.fromkeys(id(row.batch) for row in rows)):
            own = [k for k, row in enumerate(rows) if id(row.batch) == batch]
            yield [chosen[k] for k in own], [rows[k] for k in own], joined([rows[k] for k in own])
        return
    yield chosen, rows, whole
