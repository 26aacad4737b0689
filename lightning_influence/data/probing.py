"""What a collate function does with its examples, learned by content from batches of random ones."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_influence.core.containers import Path
from lightning_influence.core.errors import Forgiving
from lightning_influence.data.collation import Collation, DataError, Link, length_of
from lightning_influence.data.contents import array_at, columns, copied, parts, rows_of
from lightning_influence.data.matching import agreeing

_SIZES = (8, 7, 5, 3, 2, 16)  # of the batches that are looked at
_ENOUGH_PAIRS = 8  # told apart: by chance alone, examples hardly keep their order then
_MANY_LENGTHS = 4  # examples a length, below which batches are not made of equal ones


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
            looks += [_Look(items, collate_fn)] if any(item is not None for item in items) else []
        except Exception as error:  # broken examples that the sampler leaves out, sizes that are not collated
            failure = f" ({type(error).__name__}: {error})"
    looks = [look for look in looks if look.batch is not None]
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
        return Collation(_consistent(straight, looks), True, paths, few)
    links = _consistent(candidates, looks)
    orders = [look.order(links) for look in looks]
    known = [order for order in orders if not isinstance(order, str)] if links else []
    name = getattr(collate_fn, "__qualname__", type(collate_fn).__name__)
    if len(known) == len(looks):
        if any(len(order) > len(look.items) for order, look in zip(known, looks, strict=True)):
            raise DataError(
                f"the collate function {name} makes several rows of one example: an example then has several losses in "
                "a batch. Repeat examples by the sampler instead, or make them in the step (where verification looks "
                "at it)."
            )
        return Collation(links, all(bool((np.diff(order) > 0).all()) for order in known), paths, few)
    alone = {look.alone(collate_fn) for look in looks}
    if "moved" in alone or (links and not straight):
        raise DataError(
            f"the collate function {name} puts examples in an order of its own, and nothing that it returns tells "
            "which is which: scores would be filed under the wrong examples. Sort in the data set or by a batch "
            "sampler instead, or let it return something of each example as it is, such as its number."
        )
    unknown = (
        "nothing that the collate function returns is as it was in the examples: its rows are taken to be in the order "
        "in which the examples were drawn"
    )
    return Collation(_consistent(straight, looks), True, paths, few, "" if told or "kept" in alone else unknown)


class _Look:
    """One batch that was looked at."""

    def __init__(self, items: list[Any], collate_fn: Callable[[list[Any]], Any]) -> None:
        self.present = [k for k, item in enumerate(items) if item is not None]
        paths = dict.fromkeys(path for k in self.present for path in parts(items[k]))
        self.values = {path: [array_at(item, path) for item in items] for path in paths}
        self.items = [copied(item) for item in items]
        self.batch = collate_fn(list(items))

    def column(self, path: Path) -> list[NDArray[Any] | None]:
        """Return what a part is in each example."""
        return self.values.get(path) or [None] * len(self.items)

    def length(self, path: Path, k: int) -> int:
        """Return how many rows a part of an example has."""
        return length_of(self.column(path)[k])

    def scores(self, link: Link) -> NDArray[np.int64] | None:
        """Return what rows have in common with examples, ``[rows, n]``."""
        return link.scores(self.column(link.item), self.batch)

    def in_order(self, link: Link) -> bool:
        """Tell whether a part comes back in the order of the examples."""
        column = self.column(link.item)
        return link.in_order([column[k] for k in self.present], self.batch, range(len(self.present)))

    def lies_joined(self, link: Link) -> bool:
        """Tell whether the part of every example has rows that lie end to end in the batch."""
        scores = self.scores(link)
        return scores is not None and len(scores) == len(self.present)

    def told_apart(self, links: Sequence[Link]) -> int:
        """Count neighbours that differ in any of these parts."""
        pairs = list(zip(self.present, self.present[1:], strict=False))
        return sum(any(agreeing(self.values[x.item][a], self.values[x.item][b]) < 0 for x in links) for a, b in pairs)

    def met(self, link: Link) -> bool:
        """Tell whether every row has something that one of the examples has."""
        scores = self.scores(link)
        return scores is not None and len(scores) > 0 and bool((scores >= 0).any(1).all())

    def order(self, links: Sequence[Link]) -> NDArray[np.int64] | str:
        """Return the order that links tell."""
        values = [self.column(link.item) for link in links]
        return Collation(tuple(links), keeps_order=False).order(values, self.items, self.batch)

    def alone(self, collate_fn: Callable[[list[Any]], Any]) -> str:
        """Compare the rows with those of each example by itself: ``"kept"``, ``"moved"``, or nothing if they differ."""
        single = None
        with Forgiving():  # not every collate function can do with one example
            single = [collate_fn([self.items[k]]) for k in self.present]
        if single is None:
            return ""
        straight, found = list(range(len(single))), set()
        for path, within in columns(self.batch):
            own = [held[0] if (held := rows_of(batch, path, within)) else None for batch in single]
            scores = Link((), path, within).scores(own, self.batch)
            if scores is None or len(scores) != len(single):
                continue
            best = [np.flatnonzero((row >= 0) & (row == row.max())).tolist() for row in scores]
            if all(len(places) == 1 for places in best):
                order = sum(best, [])
                found.add("kept" if order == straight else "moved" if sorted(order) == straight else "")
        return "kept" if "kept" in found else "moved" if "moved" in found else ""


def _candidates(looks: Sequence[_Look]) -> list[Link]:
    """Return every pair of a part of the examples and a column of the batch that has something of it in every row."""
    links = [Link(item, path, within) for path, within in columns(looks[0].batch) for item in looks[0].values]
    return [link for link in links if sum(look.met(link) for look in looks) * 3 >= len(looks) * 2]


def _joined(looks: Sequence[_Look]) -> list[Link]:
    """Return the parts whose rows lie end to end in every batch, and are not one row for each example."""
    own = [path for path, within in columns(looks[0].batch) if not within]
    links = [Link(item, path, joined=True) for path in own for item in looks[0].values]
    return [
        link
        for link in links
        if all(look.lies_joined(link) for look in looks)
        and any(look.length(link.item, k) != 1 for look in looks for k in look.present)
    ]


def _consistent(candidates: Sequence[Link], looks: Sequence[_Look]) -> tuple[Link, ...]:
    """Return the few links that agree with each other in every look and tell as much as all: small ones if they do."""
    matches = {}
    for link in candidates:
        scores = [look.scores(link) for look in looks]
        if all(own is not None for own in scores):
            matches[link] = [own >= 0 for own in scores if own is not None]
    kept: list[Link] = []
    total: list[NDArray[np.bool_]] = []

    def cost(link: Link) -> tuple[int, int]:
        sizes = [value.size for look in looks for value in look.column(link.item) if value is not None]
        return sum(int(match.sum()) for match in matches[link]), max(sizes, default=0)

    for link in sorted(matches, key=cost):
        own = matches[link]
        if any(a.shape != b.shape for a, b in zip(total, own, strict=bool(total))):
            continue
        new = [a & b for a, b in zip(total, own, strict=True)] if total else own
        tells_more = not total or any((a != b).any() for a, b in zip(new, total, strict=True))
        if tells_more and all(bool(match.any(1).all()) for match in new):
            kept.append(link)
            total = new
    return tuple(kept)
