"""The only collectives: sums over processes and results gathered by example index.

Everything here also works without a process group, as the only process there is. Every process must call the
same functions in the same order; where one of them could fail alone, all agree first and fail together.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

_Item = TypeVar("_Item")

# What processes tell each other of a matrix at a time.
_GATHER_BYTES = 2**26


def rank() -> int:
    """The number of this process, from 0; 0 without a process group."""
    return dist.get_rank() if _in_process_group() else 0


def world_size() -> int:
    """How many processes take part; 1 without a process group."""
    return dist.get_world_size() if _in_process_group() else 1


def share(indices: Sequence[_Item]) -> list[_Item]:
    """This process's part of `indices`: every `world_size()`-th entry, starting at `rank()`.

    The parts are disjoint, cover everything, keep the order and differ in length by at most one.
    """
    return list(indices[rank() :: world_size()])


def sum_across_processes(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the sum of every tensor over the processes, in its own dtype and on its own device.

    Args:
        tensors: The same shapes and dtypes, in the same order, on every process; any device, any strides.
            They are left as they are; without other processes they are themselves the result.

    Raises:
        ValueError: If shapes or dtypes differ between processes; on every process.
    """
    if world_size() == 1:
        return list(tensors)
    _agree("sum_across_processes", [(value.dtype, tuple(value.shape)) for value in tensors])
    sums = list(tensors)
    for places in _alike(tensors):
        own = [tensors[place].detach() for place in places]
        total = torch.cat([value.reshape(-1).to(_device_for(value.device)) for value in own])
        dist.all_reduce(total, op=dist.ReduceOp.SUM)
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


def gather_by_index(indices: Tensor, values: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Collect per-example values from all processes, sorted by example index.

    Processes may hold different numbers of examples, none included. An index held more than once (the padding
    of a `DistributedSampler`) is kept once, as the lowest rank first held it. Values travel as bytes: every
    dtype is kept, and so is every NaN.

    Args:
        indices: `[n]`, int64, the data set indices of this process's examples.
        values: `{name: [n, ...]}`. Names, dtypes and trailing shapes agree across processes; a process
            without examples passes tensors `[0, ...]`.

    Returns:
        The sorted distinct indices `[m]` and `{name: [m, ...]}`, the same on every process, each tensor on
        the device it came from. One process gets its own tensors back where they are sorted and distinct already.

    Raises:
        ValueError: If names, dtypes or shapes differ between processes; on every process.
    """
    names = sorted(values)
    columns = [indices, *(values[name] for name in names)]
    layout = [(name, values[name].dtype, tuple(values[name].shape[1:])) for name in names]
    counts = _agree("gather_by_index", layout, len(indices))
    if world_size() == 1:
        if bool((indices[1:] > indices[:-1]).all()):  # features of a large data set are not copied for nothing
            return indices, dict(values)
        return _sorted(names, columns)

    device = _device_for(indices.device)
    own = torch.cat([_as_bytes(column).to(device) for column in columns], dim=1)
    padded = own.new_zeros(max(counts), own.shape[1])
    padded[: len(own)] = own
    rows = torch.cat([part[:count] for part, count in zip(_all_gather(padded), counts, strict=True)])
    gathered = [
        _line(part).view(column.dtype).reshape(len(rows), *column.shape[1:]).to(column.device)
        for part, column in zip(rows.split([_row_bytes(c) for c in columns], dim=1), columns, strict=True)
    ]
    return _sorted(names, gathered)


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


def _sorted(names: Sequence[str], columns: Sequence[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Sort rows by the first column and keep the first of every index there."""
    # A stable sort leaves equal indices in the order of the ranks.
    ordered, order = torch.sort(columns[0], stable=True)
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[1:] = ordered[1:] != ordered[:-1]
    kept = order[first]
    return ordered[first], {
        name: column[kept.to(column.device)] for name, column in zip(names, columns[1:], strict=True)
    }


def any_process(flag: bool) -> bool:
    """Whether `flag` is true on at least one process; the same answer on all.

    Ask before raising an error that other processes may not meet: they would wait for this one at the next
    collective.
    """
    if world_size() == 1:
        return bool(flag)
    answer = torch.tensor(int(flag), device=_device_for(torch.device("cpu")))
    dist.all_reduce(answer, op=dist.ReduceOp.MAX)
    return bool(answer.item())


def gather_objects(item: _Item) -> list[_Item]:
    """Return what every process holds, by rank: small things that no tensor holds, such as names."""
    if world_size() == 1:
        return [item]
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, item)
    return found


def _in_process_group() -> bool:
    return dist.is_available() and dist.is_initialized()


def _device_for(device: torch.device) -> torch.device:
    """The device itself if the backend communicates from there, else one that it does (NCCL: no CPU)."""
    if world_size() == 1:
        return device
    # For example "cuda:nccl" or "cpu:gloo,cuda:gloo".
    served = [entry.split(":")[0] for entry in dist.get_backend_config().split(",")]
    return device if device.type in served else torch.device(served[0])


def _agree(function: str, layout: Sequence[object], count: int = 0) -> list[int]:
    """Return every process's count; raise on every process if layouts differ: tensors would be mixed up."""
    told = torch.tensor([count, zlib.crc32(repr(layout).encode())])
    counts, checksums = torch.stack(_all_gather(told)).T.tolist()
    if len(set(checksums)) > 1:
        raise ValueError(
            f"{function} needs the same tensors (names, dtypes, shapes) on every rank; rank {rank()} has "
            f"{layout}. A rank without examples passes zeros or empty tensors like those of the others."
        )
    return list(counts)


def _all_gather(tensor: Tensor) -> list[Tensor]:
    """One tensor per rank, all of the same shape and dtype."""
    if world_size() == 1:
        return [tensor]
    local = tensor.to(_device_for(tensor.device)).contiguous()
    parts = [torch.empty_like(local) for _ in range(world_size())]
    dist.all_gather(parts, local)
    return parts


def _row_bytes(column: Tensor) -> int:
    return math.prod(column.shape[1:]) * column.element_size()


def _as_bytes(column: Tensor) -> Tensor:
    """`[n, ...]` as `[n, bytes]`, uint8."""
    return _line(column.detach()).view(torch.uint8).reshape(len(column), _row_bytes(column))


def _line(tensor: Tensor) -> Tensor:
    """A copy as one dimension with stride 1, which `view(dtype)` takes whatever strides 0 or 1 rows had."""
    return tensor.reshape(-1).clone(memory_format=torch.contiguous_format)
