"""Which examples the rows of a batch hold: what a collate function of the user's own does with its examples.

It may sort them, drop broken ones, draw others in their place, or lay rows of several lengths end to end. A part of
the examples that comes back in the batch (labels, padded texts, file names) tells the order; see ``looks``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import default_collate, default_convert

from lightning_influence.core.containers import Path
from lightning_influence.data.contents import array_at, at, digest, rows_of
from lightning_influence.data.matching import agreeing, joined_scores, pair_scores

_PLAIN = (default_collate, default_convert)


class DataError(RuntimeError):
    """The training data can't be visited example by example; the message says why and the way out."""


class Collated(NamedTuple):
    """A batch, and where its rows come from.

    Attributes:
        data: What the collate function returned.
        order: Positions of its rows among the examples that were handed in; None if that is not known.
        reason: Why it is not known.
        ragged: Whether its examples have several lengths and lie end to end.
    """

    data: Any
    order: NDArray[np.int64] | None
    reason: str = ""
    ragged: bool = False


@dataclass(frozen=True)
class Link:
    """A part of the examples that comes back in the batch.

    Attributes:
        item: Where it is in an example.
        batch: Where it is in the batch.
        within: Where it is in a row of a list.
        joined: Whether rows of several lengths lie end to end, instead of one row for each example.
    """

    item: Path
    batch: Path
    within: Path = ()
    joined: bool = False

    def scores(self, values: Sequence[Any], batch: Any) -> NDArray[np.int64] | None:
        """Return how many scalars each row has in common with each example, ``[rows, n]``; -1 if it is another one."""
        values = [array_at(value) for value in values]
        if self.joined:
            return joined_scores(values, array_at(batch, self.batch))
        rows = rows_of(batch, self.batch, self.within)
        return None if rows is None else pair_scores(values, rows)

    def in_order(self, values: Sequence[Any], batch: Any, places: Iterable[int]) -> bool:
        """Tell whether there are as many rows as values, and those at some of the places hold them."""
        column: Any = array_at(batch, self.batch) if self.joined else at(batch, self.batch)
        starts = [0, *accumulate(length_of(value) if self.joined else 1 for value in values)]
        if not hasattr(column, "__len__") or not getattr(column, "ndim", 1) or len(column) != starts[-1]:
            return False

        def row(k: int) -> NDArray[Any] | None:
            return column[starts[k] : starts[k + 1]] if self.joined else array_at(column[k], self.within)

        return all(agreeing(array_at(values[k]), row(k)) >= 0 for k in places)


@dataclass(frozen=True)
class Collation:
    """What a collate function does with its examples.

    Attributes:
        links: Parts of the examples that tell the order of a batch; none if nothing comes back as it was.
        keeps_order: Whether rows have come in the order of the examples so far.
        lengths: Where the examples hold what lies end to end in the batch.
        few_lengths: Whether those are so few that batches can be made of examples of one length.
        note: What a reader of the report should know.
    """

    links: tuple[Link, ...] = ()
    keeps_order: bool = True
    lengths: tuple[Path, ...] = ()
    few_lengths: bool = False
    note: str = ""

    def lengths_of(self, item: Any) -> tuple[int, ...]:
        """Return how many rows an example has, for each part that lies end to end."""
        return tuple(length_of(at(item, path)) for path in self.lengths)

    def order(self, values: Sequence[Sequence[Any]], items: Sequence[Any], batch: Any) -> NDArray[np.int64] | str:
        """Return the positions of the rows among the examples, or why they are not known.

        Args:
            values: For each link, what it is in each of the examples.
            items: The examples; some may be None.
            batch: What was made of them.
        """
        present = [k for k, item in enumerate(items) if item is not None]
        straight = np.array(present, np.int64)
        if not self.links:
            return straight
        if self.keeps_order and present:
            # A few rows of each batch: learning has looked at all of several.
            places = {0, len(present) // 2, len(present) - 1}
            own = [[column[k] for k in present] for column in values]
            if all(link.in_order(held, batch, places) for link, held in zip(self.links, own, strict=True)):
                return straight
        total: NDArray[np.int64] | None = None
        for link, column in zip(self.links, values, strict=True):
            scores = link.scores(column, batch)
            if scores is None or (total is not None and scores.shape != total.shape):
                return "the collate function returned a batch of another kind than before"
            total = scores if total is None else np.where((scores < 0) | (total < 0), -1, scores + total)
        return "its rows can't be told apart" if total is None else _assigned(total, items)


class Collating:
    """A collate function that tells where the rows of its batches come from.

    Args:
        collate_fn: The user's own.
        collation: What it does.
        apart: Make batches of examples that can't be mistaken for another number of rows each: a list of them.
    """

    def __init__(self, collate_fn: Callable[[list[Any]], Any], collation: Collation, *, apart: bool = False) -> None:
        self.collate_fn = collate_fn
        self.collation = collation
        self.apart = apart

    def __call__(self, items: list[Any]) -> Any:
        """Collate a batch, or several."""
        everything = range(len(items))
        if not self.apart:
            return self._one(items, everything)
        # Those that are nothing go along with others: a collate function may not take them by themselves.
        parts = [part for part in self._parts(items) if any(items[k] is not None for k in part)]
        return [self._one([items[k] for k in part], part) for part in parts]

    def _one(self, items: list[Any], places: Sequence[int]) -> Collated:
        # Before the collate function, which may take the examples apart.
        lengths = {self.collation.lengths_of(item) for item in items if item is not None}
        values = [[at(item, link.item) for item in items] for link in self.collation.links]
        kept = list(items)
        data = self.collate_fn(items)
        order = np.zeros(0, np.int64) if data is None else self.collation.order(values, kept, data)
        if isinstance(order, str):
            return Collated(data, None, order)
        return Collated(data, np.array(places, np.int64)[order], "", data is not None and len(lengths) > 1)

    def _parts(self, items: list[Any]) -> list[list[int]]:
        """Share out the examples over batches whose number of rows tells of no other length than they have."""
        lengths = [None if item is None else self.collation.lengths_of(item) for item in items]
        if self.collation.few_lengths:
            return [[k for k, own in enumerate(lengths) if own == length] for length in dict.fromkeys(lengths)]
        parts, waiting = [], [list(range(len(items)))]
        while waiting:
            part = waiting.pop()
            own = [length for k in part if (length := lengths[k]) is not None]
            mistaken = len(set(own)) > 1 and any(sum(rows) % len(own) == 0 for rows in zip(*own, strict=True))
            if mistaken:
                waiting += [part[len(part) // 2 :], part[: len(part) // 2]]
            else:
                parts.append(part)
        return parts


def length_of(value: Any) -> int:
    """Return the number of rows of an array or a list, 0 for anything else."""
    return len(value) if hasattr(value, "__len__") and bool(getattr(value, "ndim", 1)) else 0


def is_plain(collate_fn: Callable[[list[Any]], Any] | None) -> bool:
    """Tell whether a collate function surely stacks examples in their order."""
    return collate_fn is None or any(collate_fn is plain for plain in _PLAIN)


def _assigned(scores: NDArray[np.int64], items: Sequence[Any]) -> NDArray[np.int64] | str:
    """Give every row the example that it has most in common with; of examples that are alike each gets one."""
    order: list[int] = []
    used: set[int] = set()
    for row in scores:
        best = np.flatnonzero((row >= 0) & (row == row.max())).tolist()
        if not best:
            return "it holds rows of no example that was drawn for it"
        free = [k for k in best if k not in used] or best
        if len({digest(items[k]) for k in free}) > 1:
            return "its rows can't be told apart"
        order.append(free[0])
        used.add(free[0])
    return np.array(order, np.int64)
