"""The only collectives: what processes tell each other, and how they share work.

Everything here also works without a process group, as the only process there is. Every process must call the
same functions in the same order, see ``meeting``; where one may fail alone, within ``meeting.together``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_influence.core.meeting import (
    all_gather,
    broadcast,
    device_for,
    meet,
    objects,
    padded,
    rank,
    to_first,
    together,
    world_size,
)

__all__ = [
    "Rounds",
    "any_process",
    "dealt",
    "from_first",
    "gather_by_index",
    "gather_objects",
    "rank",
    "share",
    "sum_across_processes",
    "world_size",
]

_Item = TypeVar("_Item")

# What processes tell each other of a matrix at a time.
_GATHER_BYTES = 2**26
# Rows that are gathered by index travel in pieces that are small beside what comes of them.
_PIECE_BYTES = 2**22


def share(indices: Sequence[_Item]) -> list[_Item]:
    """This process's part of `indices`: every `world_size()`-th entry, starting at `rank()`.

    The parts are disjoint, cover everything, keep the order and differ in length by at most one.
    """
    return list(indices[rank() :: world_size()])


def sum_across_processes(tensors: Sequence[Tensor], *, everywhere: bool = True) -> list[Tensor]:
    """Return the sum of every tensor over the processes, in its own dtype and on its own device.

    Args:
        tensors: The same shapes and dtypes, in the same order, on every process; any device, any strides.
            They are left as they are; without other processes they are themselves the result.
        everywhere: Whether every process gets the sums; else what others than rank zero get means nothing.

    Raises:
        ValueError: If shapes or dtypes differ between processes; on every process.
    """
    if world_size() == 1:
        return list(tensors)
    layout = [(value.dtype, tuple(value.shape)) for value in tensors]
    sums, groups = list(tensors), _alike(tensors)
    if not groups:
        meet("sum_across_processes", layout)
    for places in groups:
        own = [tensors[place].detach() for place in places]
        total = torch.cat([value.reshape(-1).to(device_for(value.device)) for value in own])
        meet("sum_across_processes", layout)
        if everywhere:
            dist.all_reduce(total, op=dist.ReduceOp.SUM)
        else:
            dist.reduce(total, dst=0, op=dist.ReduceOp.SUM)
        for place, value, part in zip(places, own, total.split([value.numel() for value in own]), strict=True):
            sums[place] = part.view(value.shape).to(value.device, copy=len(own) > 1)
    return sums


def _alike(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Return places of tensors that travel together: of a type and a device, up to a size; larger ones alone."""
    groups: list[list[int]] = []
    room: dict[tuple[torch.dtype, torch.device], tuple[int, list[int]]] = {}
    for place, value in enumerate(tensors):
        size, kind = value.numel() * value.element_size(), (value.dtype, value.device)
        left, group = room.get(kind, (-1, []))
        if size > left:
            left, group = _GATHER_BYTES, []
            groups.append(group)
        group.append(place)
        room[kind] = left - size, group
    return groups


def gather_by_index(
    indices: Tensor, values: Mapping[str, Tensor], *, everywhere: bool = True
) -> tuple[Tensor, dict[str, Tensor]]:
    """Collect per-example values from all processes, sorted by example index.

    Processes may hold different numbers of examples, none included. An index held more than once (the padding
    of a `DistributedSampler`) is kept once, as the lowest rank first held it. Values travel as bytes, some rows at a
    time, to where they stay: every dtype is kept, and so is every NaN.

    Args:
        indices: `[n]`, int64, the data set indices of this process's examples.
        values: `{name: [n, ...]}`. Names, dtypes and trailing shapes agree across processes; a process
            without examples passes tensors `[0, ...]`.
        everywhere: Whether every process gets the values; else rank zero alone, and the others `[0, ...]`.

    Returns:
        The sorted distinct indices `[m]`, the same on every process, and `{name: [m, ...]}`, each tensor on
        the device it came from. One process gets its own tensors back where they are sorted and distinct already.

    Raises:
        ValueError: If names, dtypes or shapes differ between processes; on every process.
    """
    layout = [(name, values[name].dtype, tuple(values[name].shape[1:])) for name in sorted(values)]
    counts = meet("gather_by_index", layout, len(indices))
    if world_size() == 1:
        if bool((indices[1:] > indices[:-1]).all()):  # features of a large data set are not copied for nothing
            return indices, dict(values)
        found, places = _distinct(indices)
        kept = (places >= 0).nonzero().squeeze(1)[places[places >= 0].argsort()]
        return found, {name: column[kept.to(column.device)] for name, column in values.items()}

    most = max(counts)
    every = [part[:count] for part, count in zip(all_gather(padded(indices, most)), counts, strict=True)]
    found, places = _distinct(torch.cat(every).to(indices.device))
    by_rank, here = places.split(counts), everywhere or rank() == 0
    gathered = {name: value.new_empty(len(found) if here else 0, *value.shape[1:]) for name, value in values.items()}
    columns = [values[name].detach() for name, *_ in layout]
    widths, device = [_row_bytes(column) for column in columns], device_for(indices.device)
    rows = min(most, max(1, _PIECE_BYTES // (world_size() * max(1, sum(widths)))))
    # Room for all rounds: pieces that come and go would break the heap.
    own = torch.zeros(rows, sum(widths), dtype=torch.uint8, device=device)
    parts = [torch.empty_like(own) for _ in range(world_size() if here else 0)]
    for start in range(0, most if any(widths) else 0, max(rows, 1)):
        for column, room in zip(columns, own.split(widths, dim=1), strict=True):
            piece = _as_bytes(column[start : start + rows])
            room[: len(piece)] = piece
        meet("gather_by_index", layout)
        (all_gather if everywhere else to_first)(own, parts)
        for part, of_rank in zip(parts, by_rank, strict=here):
            at = of_rank[start : start + rows]
            wanted = (at >= 0).nonzero().squeeze(1)
            for (name, dtype, shape), told in zip(layout, part[: len(at)].split(widths, dim=1), strict=True):
                target = gathered[name]
                values_of = _line(told if len(wanted) == len(at) else told[wanted.to(told.device)])
                taken = values_of.view(dtype).reshape(len(wanted), *shape).to(target.device)
                target.index_copy_(0, at[wanted].to(target.device), taken)
    return found, gathered


def _distinct(indices: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sorted distinct indices ``[m]``, and the place of each one there, -1 where it was there before."""
    # A stable sort leaves equal indices in the order of the ranks.
    ordered, order = torch.sort(indices, stable=True)
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[1:] = ordered[1:] != ordered[:-1]
    places = torch.full_like(indices, -1)
    places[order[first]] = torch.arange(int(first.sum()), device=indices.device)
    return ordered[first], places


class Rounds:
    """Counts when processes that pass over their shares gather rows: as often everywhere, as memory has room for.

    Args:
        examples: Number of examples over all processes, each of which has its ``share``.
        row_bytes: Size of a row.
    """

    def __init__(self, examples: int, row_bytes: int) -> None:
        share = -(-examples // world_size())  # the largest
        self._rows = max(1, _GATHER_BYTES // (world_size() * row_bytes))
        self._rounds = -(-share // self._rows)
        self._taken = self._made = 0

    def due(self, rows: int) -> int:
        """Return how many rounds are to be made now that so many more rows have come."""
        self._taken += rows
        return self._make(min(self._taken // self._rows, self._rounds) - self._made)

    def left(self) -> int:
        """Return how many are to be made at the end."""
        return self._make(self._rounds - self._made)

    def _make(self, count: int) -> int:
        self._made += count
        return count


def any_process(flag: bool) -> bool:
    """Whether `flag` is true on at least one process; the same answer on all."""
    return any(meet("any_process", count=int(flag)))


def gather_objects(item: _Item) -> list[_Item]:
    """Return what every process holds, by rank: small things that no tensor holds, such as names."""
    if world_size() == 1:
        return [item]
    meet("gather_objects")
    return objects(item)


def from_first(work: Callable[[], _Item]) -> _Item:
    """Do something on rank zero alone; return what came of it, something small, or raise its error on every process."""
    with together():
        return gather_objects(work() if rank() == 0 else None)[0]  # type: ignore[return-value]


def dealt(
    work: Sequence[Callable[[], dict[str, Tensor]]], costs: Sequence[float], device: torch.device
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Deal work out over the processes, so that each has about as much; every process gets all results.

    Args:
        work: The same on every process, and with the same results wherever it is done.
        costs: Of each.
        device: Where results are, unless they are on the host.

    Yields:
        Place of a work and its result, one after the other; not in their order.

    Raises:
        Exception: On every process, if a work raises it.
    """
    if world_size() == 1:
        yield from ((place, each()) for place, each in enumerate(work))
        return
    with together():
        own = {place: work[place]() for place in _dealt_out(costs)[rank()]}
    told = gather_objects(
        {
            place: {name: (value.dtype, value.shape, value.device.type) for name, value in result.items()}
            for place, result in own.items()
        }
    )
    for owner, layouts in enumerate(told):
        for group in _travelling(layouts):
            kinds = [(place, name, *kind) for place in group for name, kind in layouts[place].items()]
            widths = [shape.numel() * dtype.itemsize for *_, dtype, shape, _ in kinds]
            flat = torch.empty(sum(widths), dtype=torch.uint8, device=device_for(device))
            if owner == rank():
                torch.cat([_line(own[place][name]).view(torch.uint8).to(flat) for place, name, *_ in kinds], out=flat)
            meet("dealt")
            broadcast(flat, owner)
            found: dict[int, dict[str, Tensor]] = {place: {} for place in group}
            for (place, name, dtype, shape, kind), part in zip(kinds, flat.split(widths), strict=True):
                where = device if kind == device.type else torch.device("cpu")
                found[place][name] = _line(part).view(dtype).reshape(shape).to(where)
            yield from ((place, own.pop(place, found[place])) for place in group)


def _travelling(layouts: Mapping[int, Mapping[str, tuple[torch.dtype, torch.Size, str]]]) -> Iterator[list[int]]:
    """Yield places of results that travel together, up to a size; larger ones alone."""
    group, left = list[int](), _GATHER_BYTES
    for place, kinds in layouts.items():
        size = sum(shape.numel() * dtype.itemsize for dtype, shape, _ in kinds.values())
        if group and size > left:
            yield group
            group, left = [], _GATHER_BYTES
        group.append(place)
        left -= size
    if group:
        yield group


def _dealt_out(costs: Sequence[float]) -> list[list[int]]:
    """Return places by rank: the dearest first, each to who has least to do so far."""
    loads, places = [0.0] * world_size(), [list[int]() for _ in range(world_size())]
    for place in sorted(range(len(costs)), key=lambda place: -costs[place]):
        least = loads.index(min(loads))
        loads[least] += costs[place]
        places[least].append(place)
    return places


def _row_bytes(column: Tensor) -> int:
    return math.prod(column.shape[1:]) * column.element_size()


def _as_bytes(column: Tensor) -> Tensor:
    """`[n, ...]` as `[n, bytes]`, uint8."""
    return _line(column.detach()).view(torch.uint8).reshape(len(column), _row_bytes(column))


def _line(tensor: Tensor) -> Tensor:
    """A copy as one dimension with stride 1, which `view(dtype)` takes whatever strides 0 or 1 rows had."""
    return tensor.reshape(-1).clone(memory_format=torch.contiguous_format)
