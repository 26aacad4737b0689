"""Running columns over the examples, of which every process fills its own part."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice

import torch
from torch import Tensor

from lightning_influence.core import distributed

_ROWS = 2**12
TOGETHER = 2**24
"""Bytes of addends that processes tell each other at a time."""


class ExampleSums:
    """Columns ``[size]``, which are there from the first value on.

    Args:
        size: Number of examples of the data set.
        *sums: Columns that are there before anything is added.
        last: Columns that are no sums but the state at the last visit, each with what it is before the first: across
            processes, it is that of whoever has visited the example since they last told each other.
        visits: Column that counts the visits.
        whole: Columns of whole numbers, as the one that counts visits.
    """

    def __init__(
        self,
        size: int,
        *sums: str,
        last: Mapping[str, float] | None = None,
        visits: str = "",
        whole: Collection[str] = (),
    ) -> None:
        self.size = size
        self._last = dict(last or {})
        self._visits = visits
        self._whole = {*whole, visits}
        self._columns = {name: torch.zeros(size, dtype=self._dtype(name)) for name in sums}
        # What all processes knew when they last told each other; the rest is this process's own.
        self._common: dict[str, Tensor] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._columns

    def __getitem__(self, name: str) -> Tensor:
        return self._columns[name]

    def add(self, name: str, rows: Tensor, values: Tensor) -> None:
        """Add values ``[n]`` to distinct or repeated rows."""
        column = self._column(name)
        # A fifth of the time of indexing.
        column.index_add_(0, rows, values.to(column.dtype))

    def put(self, name: str, rows: Tensor, values: Tensor) -> Tensor:
        """Set the state of distinct rows; return what it was."""
        column = self._column(name)
        before = column.index_select(0, rows)
        column.index_copy_(0, rows, values.to(column.dtype))
        return before

    def _dtype(self, name: str) -> torch.dtype:
        return torch.int32 if name in self._whole else torch.float64

    def _column(self, name: str) -> Tensor:
        if name not in self._columns:
            self._columns[name] = torch.full((self.size,), self._last.get(name, 0.0), dtype=self._dtype(name))
        return self._columns[name]

    def grow(self, size: int) -> None:
        """Have room for more examples."""
        self.size = size
        for columns in (self._columns, self._common):
            columns |= {name: lengthened(value, size, self._last.get(name, 0.0)) for name, value in columns.items()}

    def names(self) -> list[str]:
        """Return which columns there are."""
        return sorted(self._columns)

    def be_told(self, names: Iterable[str]) -> None:
        """Have all columns that some process has, and room for what all of them know."""
        for name in names:
            column = self._column(name)
            if name not in self._common:
                self._common[name] = torch.full_like(column, self._last.get(name, 0.0))

    def addends(self, rows: slice) -> list[Tensor]:
        """Return what is to be summed of some rows over the processes, each of which has seen its own batches."""
        added = [
            value[rows] * self._visited(rows) if name in self._last else value[rows] - self._common[name][rows]
            for name, value in sorted(self._columns.items())
        ]
        return [*added, *([self._visited(rows)] if self._last else [])]

    def take(self, rows: slice, totals: Sequence[Tensor]) -> None:
        """Take over what all processes have seen of some rows: the sums of their ``addends``."""
        for (name, column), total in zip(sorted(self._columns.items()), totals, strict=False):
            common = self._common[name][rows]
            if name in self._last:
                visitors = totals[-1]
                column[rows] = torch.where(visitors > 0, total / visitors.clamp(min=1), common).to(column.dtype)
            else:
                column[rows] = common + total
            common.copy_(column[rows])

    def _visited(self, rows: slice) -> Tensor:
        """Which of some examples this process has visited since all told each other, 0 or 1."""
        if self._visits not in self._columns:
            return torch.zeros(len(range(self.size)[rows]), dtype=torch.float64)
        return (self._columns[self._visits][rows] > self._common[self._visits][rows]).double()

    def state_dict(self) -> dict[str, Tensor]:
        """Return copies of the columns, in as few bytes as hold them."""
        return {name: narrowed(value) for name, value in self._columns.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a checkpoint."""
        self._columns = {name: value.to(self._dtype(name), copy=True) for name, value in state.items()}
        if _others():
            self._common = {name: value.clone() for name, value in self._columns.items()}


def narrowed(column: Tensor) -> Tensor:
    """Return a copy with the same numbers, those of a column ``[n]`` in the smallest type that holds them."""
    if column.ndim == 1 and len(column):
        low, high = (float(end) for end in column.aminmax())
        for dtype in (torch.int8, torch.int16, torch.int32):
            if torch.iinfo(dtype).min <= low and high <= torch.iinfo(dtype).max:
                narrow = column.to(dtype, copy=True)
                if torch.equal(narrow.to(column.dtype), column):
                    return narrow
                break
        if torch.equal((single := column.to(torch.float32, copy=True)).to(column.dtype), column):
            return single
    return column.clone()


def in_blocks(*tables: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield some rows of each table at a time, at least once: what is computed of them may be many times wider."""
    return zip(*(table.split(_ROWS) for table in tables), strict=True)


def lengthened(column: Tensor, size: int, value: float = 0.0) -> Tensor:
    """Return a column ``[n, ...]`` with rows of a value after its own."""
    return torch.cat([column, column.new_full((size - len(column), *column.shape[1:]), value)])


def share(parts: Sequence[ExampleSums]) -> None:
    """Let processes know what all have seen, some rows of all columns at a time; to be called by all of them."""
    if not _others():
        return
    names = distributed.gather_objects([part.names() for part in parts])
    for part, of_ranks in zip(parts, zip(*names, strict=True), strict=True):
        part.be_told(sorted(set(chain.from_iterable(of_ranks))))
    size = max((part.size for part in parts), default=0)
    step = max(1, TOGETHER // max(1, 8 * sum(len(part.names()) for part in parts)))
    for start in range(0, size, step):
        rows = slice(start, start + step)
        added = [part.addends(rows) for part in parts]
        totals = iter(distributed.sum_across_processes([*chain.from_iterable(added)]))
        for part, own in zip(parts, added, strict=True):
            part.take(rows, [*islice(totals, len(own))])


def _others() -> bool:
    return distributed.world_size() > 1
