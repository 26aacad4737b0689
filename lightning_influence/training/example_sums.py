"""Running columns over the examples, of which every process fills its own part."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import chain, islice

import torch
from torch import Tensor

from lightning_influence.core import distributed

_ROWS = 2**12


class ExampleSums:
    """Columns ``[size]``, or ``[size, c]``, which are there from the first value on.

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
        """Add values ``[n]`` (float64, int32) or ``[n, c]`` (float32, to save memory) to distinct or repeated rows."""
        column = self._column(name, values)
        # A fifth of the time of indexing.
        column.index_add_(0, rows, values.to(column.dtype))

    def put(self, name: str, rows: Tensor, values: Tensor) -> Tensor:
        """Set the state of distinct rows; return what it was."""
        column = self._column(name, values)
        before = column.index_select(0, rows)
        column.index_copy_(0, rows, values.to(column.dtype))
        return before

    def forget(self, name: str) -> None:
        """Keep a column no longer, if there is one."""
        for columns in (self._columns, self._common):
            columns.pop(name, None)

    def _dtype(self, name: str, dimensions: int = 1) -> torch.dtype:
        return torch.float32 if dimensions > 1 else torch.int32 if name in self._whole else torch.float64

    def _column(self, name: str, values: Tensor) -> Tensor:
        if name not in self._columns:
            self._columns[name] = torch.full(
                (self.size, *values.shape[1:]), self._last.get(name, 0.0), dtype=self._dtype(name, values.ndim)
            )
        return self._columns[name]

    def grow(self, size: int) -> None:
        """Have room for more examples."""
        self.size = size
        for columns in (self._columns, self._common):
            columns |= {name: lengthened(value, size, self._last.get(name, 0.0)) for name, value in columns.items()}

    def addends(self) -> list[Tensor]:
        """Return what is to be summed over the processes, each of which has seen its own part of the batches."""
        added = [
            v * self._visited() if name in self._last else v - self._common.get(name, 0) for name, v in self._all()
        ]
        # A process without records must not stay away from the collective: all raise then, instead of waiting.
        return [*added, self._visited()] if self._last else added

    def take(self, totals: Sequence[Tensor]) -> None:
        """Take over what all processes have seen: the sums of their ``addends``."""
        for (name, _), total in zip(self._all(), totals, strict=False):
            before = self._common.get(name, torch.full_like(total, self._last.get(name, 0.0)))
            if name in self._last:
                visitors = totals[-1]
                told = torch.where(visitors > 0, total / visitors.clamp(min=1), before)
                self._columns[name] = told.to(self._dtype(name))
            else:
                self._columns[name] = before + total
        self._common = {name: value.clone() for name, value in self._columns.items()}

    def _all(self) -> list[tuple[str, Tensor]]:
        return sorted(self._columns.items())

    def _visited(self) -> Tensor:
        """Which examples this process has visited since all told each other, 0 or 1."""
        seen = self._columns.get(self._visits, torch.zeros(self.size, dtype=torch.float64))
        return (seen > self._common.get(self._visits, 0)).double()

    def state_dict(self) -> dict[str, Tensor]:
        """Return copies of the columns, in as few bytes as hold them."""
        return {name: narrowed(value) for name, value in self._columns.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a checkpoint."""
        self._columns = {name: value.to(self._dtype(name, value.ndim), copy=True) for name, value in state.items()}
        self._common = {name: value.clone() for name, value in self._columns.items()} if _others() else {}


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
    """Let every process know what all have seen, all columns in one gather; to be called by all of them."""
    if not _others():
        return
    addends = [part.addends() for part in parts]
    totals = iter(distributed.sum_across_processes([*chain.from_iterable(addends)]))
    for part, own in zip(parts, addends, strict=True):
        part.take([*islice(totals, len(own))])


def _others() -> bool:
    return distributed.world_size() > 1
