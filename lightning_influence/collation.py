"""Which examples the rows of a batch hold: what a collate function of the user's own does with its examples.

It may sort them, drop broken ones, draw others in their place, or lay rows of several lengths end to end. What it does
is learned from batches of random examples, by content: a part of the examples that comes back in the batch (labels,
padded texts, file names) tells the order of every later one.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import default_collate, default_convert

from lightning_influence.contents import Path, agreeing, array_at, at, columns, copied, joined_scores, parts, rows_of

_PLAIN = (default_collate, default_convert)
_SIZES = (8, 7, 5, 3, 2, 16)  # of the batches that are looked at
_ENOUGH_PAIRS = 8  # told apart: by chance alone, examples hardly keep their order then
_MANY_LENGTHS = 4  # examples a length, below which batches are not made of equal ones


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
        return (
            None
            if rows is None
            else np.array([[agreeing(v, r) for v in values] for r in rows]).reshape(-1, len(values))
        )

    def in_order(self, values: Sequence[Any], batch: Any, places: Sequence[int]) -> bool:
        """Tell whether there are as many rows as values, and those at some of the places hold them."""
        if self.joined:
            column = array_at(batch, self.batch)
            starts = np.cumsum([0, *map(_length, values)])
            if column is None or not column.ndim or len(column) != starts[-1]:
                return False
            return all(agreeing(array_at(values[k]), column[starts[k] : starts[k + 1]]) >= 0 for k in places)
        column = at(batch, self.batch)
        if not hasattr(column, "__len__") or not getattr(column, "ndim", 1) or len(column) != len(values):
            return False
        return all(agreeing(array_at(values[k]), array_at(column[k], self.within)) >= 0 for k in places)


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
        return tuple(_length(at(item, path)) for path in self.lengths)

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
            places = sorted({0, len(present) // 2, len(present) - 1})
            own = values if len(present) == len(items) else [[column[k] for k in present] for column in values]
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
        if not self.apart:
            return self._one(items)
        # Those that are nothing go along with others: a collate function may not take them by themselves.
        return [self._one([items[k] for k in part], part) for part in self._parts(items)]

    def _one(self, items: list[Any], places: Sequence[int] | None = None) -> Collated:
        collation = self.collation
        present = [k for k, item in enumerate(items) if item is not None]
        lengths = {collation.lengths_of(items[k]) for k in present} if collation.lengths else set()
        # Before the collate function, which may take the examples apart.
        values = [_all_at(items, link.item) for link in collation.links]
        kept = list(items)
        if places is not None and not present:
            return Collated(None, np.zeros(0, np.int64))
        data = self.collate_fn(items)
        if data is None:
            return Collated(None, np.zeros(0, np.int64))
        order = collation.order(values, kept, data)
        if isinstance(order, str):
            return Collated(data, None, order)
        return Collated(data, order if places is None else np.array(places, np.int64)[order], "", len(lengths) > 1)

    def _parts(self, items: list[Any]) -> list[list[int]]:
        """Share out the examples over batches whose number of rows tells of no other length than they have."""
        everything = list(range(len(items)))
        if not self.collation.lengths:
            return [everything]
        lengths = [None if item is None else self.collation.lengths_of(item) for item in items]
        if self.collation.few_lengths:
            groups: dict[Any, list[int]] = {}
            for k in everything:
                groups.setdefault(lengths[k], []).append(k)
            return list(groups.values())
        parts, waiting = [], [everything]
        while waiting:
            part = waiting.pop()
            own = [length for k in part if (length := lengths[k]) is not None]
            mistaken = len(set(own)) > 1 and any(sum(rows) % len(own) == 0 for rows in zip(*own, strict=True))
            if mistaken:
                waiting += [part[len(part) // 2 :], part[: len(part) // 2]]
            else:
                parts.append(part)
        return parts


def _all_at(items: Sequence[Any], path: Path) -> list[Any]:
    if len(path) == 1:
        try:
            return [item[path[0]] for item in items]
        except (TypeError, KeyError, IndexError):  # an example that is something else
            pass
    return [at(item, path) for item in items]


def _length(value: Any) -> int:
    return len(value) if hasattr(value, "__len__") and bool(getattr(value, "ndim", 1)) else 0


def is_plain(collate_fn: Callable[[list[Any]], Any] | None) -> bool:
    """Tell whether a collate function surely stacks examples in their order."""
    return collate_fn is None or any(collate_fn is plain for plain in _PLAIN)


def learn(fetch: Callable[[int], Any], size: int, collate_fn: Callable[[list[Any]], Any], seed: int = 0) -> Collation:
    """Look at batches of random examples.

    Args:
        fetch: Returns an example by its index.
        size: Number of examples.
        collate_fn: The collate function.
        seed: Of the choice of examples.

    Raises:
        DataError: If it reorders examples and the order can't be told from what comes back.
    """
    chooser, failure = random.Random(seed), ""
    looks: list[_Look] = []
    for count in _SIZES:
        try:
            items = [fetch(index) for index in chooser.sample(range(size), min(count, size))]
            look = _Look(items, collate_fn) if any(item is not None for item in items) else None
        except Exception as error:  # broken examples that the sampler leaves out, sizes that are not collated
            failure = f" ({type(error).__name__}: {error})"
            continue
        if look is not None and look.batch is not None:
            looks.append(look)
    if not looks:
        return Collation(note=f"the collate function made no batch of the examples that were looked at{failure}")
    lengths = _joined(looks)
    seen = [tuple(look.length(x.item, k) for x in lengths) for look in looks for k in look.present]
    few = bool(lengths) and len(set(seen)) * _MANY_LENGTHS <= len(seen)
    paths = tuple(link.item for link in lengths)
    candidates = [*_candidates(looks), *lengths]
    # Where others took the place of broken examples, no part of all rows is to be found.
    whole = [look for look in looks if all(look.met(link) for link in candidates)]
    looks = whole if len(whole) * 3 >= len(looks) * 2 else looks
    straight = [link for link in candidates if all(look.in_order(link) for look in looks)]
    told, pairs = sum(look.told_apart(straight) for look in looks), sum(len(look.present) - 1 for look in looks)
    if straight and told >= min(_ENOUGH_PAIRS, pairs):
        return Collation(_telling(straight, looks), True, paths, few)
    links = _consistent(candidates, looks)
    orders = [look.order(links) for look in looks]
    known = [order for order in orders if not isinstance(order, str)]
    if links and len(known) == len(orders):
        return Collation(links, all(bool((np.diff(order) > 0).all()) for order in known), paths, few)
    alone = {look.alone(collate_fn) for look in looks}
    if "moved" in alone or (links and not straight):
        name = getattr(collate_fn, "__qualname__", type(collate_fn).__name__)
        raise DataError(
            f"the collate function {name} puts examples in an order of its own, and nothing that it returns tells "
            "which is which: scores would be filed under the wrong examples. Sort in the data set or by a batch "
            "sampler instead, or let it return something of each example as it is, such as its number."
        )
    unknown = (
        "nothing that the collate function returns is as it was in the examples: its rows are taken to be in the order "
        "in which the examples were drawn"
    )
    return Collation(_telling(straight, looks), True, paths, few, "" if told or "kept" in alone else unknown)


class _Look:
    """One batch that was looked at."""

    def __init__(self, items: list[Any], collate_fn: Callable[[list[Any]], Any]) -> None:
        self.present = [k for k, item in enumerate(items) if item is not None]
        paths = dict.fromkeys(path for k in self.present for path in parts(items[k]))
        self.values = {path: [array_at(item, path) for item in items] for path in paths}
        self._items = [copied(item) for item in items]
        self.batch = collate_fn(list(items))

    def length(self, path: Path, k: int) -> int:
        """Return how many rows a part of an example has."""
        return _length(self.values[path][k])

    def in_order(self, link: Link) -> bool:
        """Tell whether a part comes back in the order of the examples."""
        if link.item not in self.values:
            return False
        own = [self.values[link.item][k] for k in self.present]
        return link.in_order(own, self.batch, range(len(own)))

    def told_apart(self, links: Sequence[Link]) -> int:
        """Count neighbours that differ in any of these parts."""
        pairs = list(zip(self.present, self.present[1:], strict=False))
        return sum(any(agreeing(self.values[x.item][a], self.values[x.item][b]) < 0 for x in links) for a, b in pairs)

    def met(self, link: Link) -> bool:
        """Tell whether every row has something that one of the examples has."""
        values = self.values.get(link.item)
        if values is None:
            return False
        if link.joined:
            return link.scores(values, self.batch) is not None
        rows = rows_of(self.batch, link.batch, link.within)
        return bool(rows) and all(any(agreeing(v, row) >= 0 for v in values) for row in rows or ())

    def order(self, links: Sequence[Link]) -> NDArray[np.int64] | str:
        """Return the order that links tell."""
        values = [self.values[link.item] for link in links]
        return Collation(tuple(links), keeps_order=False).order(values, self._items, self.batch)

    def alone(self, collate_fn: Callable[[list[Any]], Any]) -> str:
        """Compare the rows with those of each example by itself: ``"kept"``, ``"moved"``, or nothing if they differ."""
        try:
            single = [collate_fn([self._items[k]]) for k in self.present]
        except Exception:  # not every collate function can do with one example
            return ""
        straight, found = list(range(len(single))), set()
        for path, within in columns(self.batch):
            rows = rows_of(self.batch, path, within)
            if rows is None or len(rows) != len(single):
                continue
            own = [held[0] if (held := rows_of(batch, path, within)) else None for batch in single]
            scores = np.array([[agreeing(value, row) for value in own] for row in rows])
            best = [np.flatnonzero((row >= 0) & (row == row.max())) for row in scores]
            if all(len(places) == 1 for places in best):
                order = [int(places[0]) for places in best]
                found.add("kept" if order == straight else "moved" if sorted(order) == straight else "")
        return "kept" if "kept" in found else "moved" if "moved" in found else ""


def _candidates(looks: Sequence[_Look]) -> list[Link]:
    """Return every pair of a part of the examples and a column of the batch that has something of it in every row."""
    links = [Link(item, path, within) for path, within in columns(looks[0].batch) for item in looks[0].values]
    return [link for link in links if sum(look.met(link) for look in looks) * 3 >= len(looks) * 2]


def _joined(looks: Sequence[_Look]) -> list[Link]:
    """Return the parts whose rows lie end to end in every batch, and are not one row for each example."""
    found = []
    for path, within in columns(looks[0].batch):
        for item in looks[0].values if not within else ():
            link = Link(item, path, joined=True)
            if all(_lies_joined(look, link) for look in looks) and any(
                look.length(item, k) != 1 for look in looks for k in look.present
            ):
                found.append(link)
    return found


def _lies_joined(look: _Look, link: Link) -> bool:
    values = look.values.get(link.item)
    own = [] if values is None else [values[k] for k in look.present]
    if not own or any(value is None or not value.ndim for value in own):
        return False
    scores = link.scores(own, look.batch)
    return scores is not None and len(scores) == len(own)


def _consistent(candidates: Sequence[Link], looks: Sequence[_Look]) -> tuple[Link, ...]:
    """Return links that agree with each other in every look, those that tell most first."""
    matches = {}
    for link in candidates:
        scores = [link.scores(look.values[link.item], look.batch) for look in looks if link.item in look.values]
        if len(scores) == len(looks) and all(s is not None for s in scores):
            matches[link] = [s >= 0 for s in scores if s is not None]
    kept: list[Link] = []
    total: list[NDArray[np.bool_]] = []
    for link in sorted(matches, key=lambda link: sum(int(match.sum()) for match in matches[link])):
        own = matches[link]
        if not total:
            new = own
        elif all(a.shape == b.shape for a, b in zip(total, own, strict=True)):
            new = [a & b for a, b in zip(total, own, strict=True)]
        else:
            continue
        tells_more = not total or any((a != b).any() for a, b in zip(new, total, strict=True))
        if tells_more and all(bool(match.any(1).all()) for match in new):
            kept.append(link)
            total = new
    return tuple(kept)


def _telling(links: Sequence[Link], looks: Sequence[_Look], most: int = 3) -> tuple[Link, ...]:
    """Return the few links that tell most, small ones first."""

    def cost(link: Link) -> tuple[int, int]:
        size = max((v.size for look in looks for v in look.values[link.item] if v is not None), default=0)
        return -sum(look.told_apart([link]) for look in looks), size

    return tuple(sorted(links, key=cost)[:most])


def _assigned(scores: NDArray[np.int64], items: Sequence[Any]) -> NDArray[np.int64] | str:
    """Give every row the example that it has most in common with; of examples that are alike each gets one."""
    order: list[int] = []
    used: set[int] = set()
    for row in scores:
        best = np.flatnonzero((row >= 0) & (row == row.max())).tolist()
        if not best:
            return "it holds rows of no example that was drawn for it"
        free = [k for k in best if k not in used] or best
        if any(not _alike(items[free[0]], items[k]) for k in free[1:]):
            return "its rows can't be told apart"
        order.append(free[0])
        used.add(free[0])
    return np.array(order, np.int64)


def _alike(a: Any, b: Any) -> bool:
    own = list(parts(a))
    same = (agreeing(array_at(a, path), array_at(b, path)) >= 0 for path in own)
    return own == list(parts(b)) and all(same)
