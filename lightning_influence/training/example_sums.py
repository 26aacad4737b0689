"""Running columns over the examples, of which every process fills its own part."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import chain, islice

import torch
from torch import Tensor

from lightning_influence.core import distributed

_ROWS = 2**12
# Bytes of addends that processes tell each other at a time.
_TOGETHER = 2**24


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
        # What all processes knew of columns [size] when they last told each other; the rest is this process's own.
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

    def kinds(self) -> dict[str, tuple[int, ...]]:
        """Return which columns there are, and their shapes but for the rows."""
        return {name: tuple(value.shape[1:]) for name, value in self._columns.items()}

    def be_told(self, kinds: Mapping[str, tuple[int, ...]]) -> None:
        """Have all columns that some process has, and room for what all of them know."""
        for name, shape in kinds.items():
            column = self._column(name, torch.empty(0, *shape))
            if not shape and name not in self._common:
                self._common[name] = torch.full_like(column, self._last.get(name, 0.0))

    def addends(self, rows: slice) -> tuple[list[Tensor], list[Tensor]]:
        """Return what is to be summed of some rows over the processes, each of which has seen its own batches.

        The sums of the first ones are to be known everywhere, those of the others (columns ``[size, c]``) on rank zero.
        """
        narrow, wide = self._by_width()
        added = [
            value[rows] * self._visited(rows) if name in self._last else value[rows] - self._common[name][rows]
            for name, value in narrow
        ]
        return [*added, *([self._visited(rows)] if self._last else [])], [value[rows] for _, value in wide]

    def take(self, rows: slice, everywhere: Sequence[Tensor], on_first: Sequence[Tensor]) -> None:
        """Take over what all processes have seen of some rows: the sums of their ``addends``."""
        narrow, wide = self._by_width()
        for (name, column), total in zip(narrow, everywhere, strict=False):
            common = self._common[name][rows]
            if name in self._last:
                visitors = everywhere[-1]
                column[rows] = torch.where(visitors > 0, total / visitors.clamp(min=1), common).to(column.dtype)
            else:
                column[rows] = common + total
            common.copy_(column[rows])
        for (_, column), total in zip(wide, on_first, strict=True):
            column[rows] = total if distributed.rank() == 0 else 0  # what rank zero knows is not told again

    def _by_width(self) -> tuple[list[tuple[str, Tensor]], list[tuple[str, Tensor]]]:
        """Return the columns ``[size]``, and the others."""
        every = sorted(self._columns.items())
        return [each for each in every if each[1].ndim == 1], [each for each in every if each[1].ndim > 1]

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
        self._columns = {name: value.to(self._dtype(name, value.ndim), copy=True) for name, value in state.items()}
        if _others():
            narrow, wide = self._by_width()
            self._common = {name: value.clone() for name, value in narrow}
            for _, value in wide if distributed.rank() else ():
                value.zero_()  # rank zero has it


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
    """Let processes know what all have seen, some rows of all columns at a time; to be called by all of them.

    Sums ``[size, c]`` are known to rank zero alone afterwards: they are many times as large.
    """
    if not _others():
        return
    kinds = distributed.gather_objects([part.kinds() for part in parts])
    for number, part in enumerate(parts):
        part.be_told({name: shape for of_rank in kinds for name, shape in of_rank[number].items()})
    size = max((part.size for part in parts), default=0)
    each = sum(8 * sum(math.prod(shape) for shape in part.kinds().values()) for part in parts)
    step = max(1, _TOGETHER // max(1, each))
    for start in range(0, size, step):
        rows = slice(start, start + step)
        narrow, wide = zip(*(part.addends(rows) for part in parts), strict=True)
        totals = iter(distributed.sum_across_processes([*chain.from_iterable(narrow)]))
        large = [*chain.from_iterable(wide)]
        of_first = iter(distributed.sum_across_processes(large, everywhere=False) if large else ())
        for part, own, own_wide in zip(parts, narrow, wide, strict=True):
            part.take(rows, [*islice(totals, len(own))], [*islice(of_first, len(own_wide))])


def _others() -> bool:
    return distributed.world_size() > 1
