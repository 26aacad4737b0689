"""Where processes meet: before each collective all tell each other which one they have come to.

Where one of them has failed instead, or has come to another, all raise, and none waits for ever. So memory is taken
before processes meet, and nothing that could fail comes between that and the collective.
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

_Item = TypeVar("_Item")


class ProcessError(RuntimeError):
    """Another process has failed; the message says which. It is the cause of the error that is raised here, too."""


def rank() -> int:
    """The number of this process, from 0; 0 without a process group."""
    return dist.get_rank() if _in_process_group() else 0


def world_size() -> int:
    """How many processes take part; 1 without a process group."""
    return dist.get_world_size() if _in_process_group() else 1


@contextmanager
def together() -> Iterator[None]:
    """Let processes fail together: an error of one is raised in the block on all, wherever the others wait for it.

    To be entered on all of them. Whoever catches an error has to do so outside of such a block, so that all do: one
    that goes on inside, alone, meets nobody any more.

    Raises:
        Exception: That of the first process that has failed, on all of them.
    """
    if world_size() == 1:
        yield
        return
    try:
        yield
    except Exception as error:
        if _is_told(error):
            raise
        vars(error)["_told"] = True
        try:
            first = _failures(meet("together", failure=True), error)[0]
        except Exception:  # with others gone, there is nobody to tell
            raise error from None
        if first[0] == rank() and type(first[1]) is type(error):
            raise
        raise first[1] from error
    meet("together")


def _is_told(error: BaseException | None) -> bool:
    """Whether other processes know of an error, or of one that it was made of."""
    while error is not None:
        if vars(error).get("_told"):
            return True
        error = error.__cause__ or error.__context__
    return False


def meet(function: str, layout: Sequence[object] = (), count: int = 0, *, failure: bool = False) -> list[int]:
    """Return every process's count, once all have come to the same place with the same layout.

    Args:
        function: The place.
        layout: What is going to travel from there.
        count: Of this process.
        failure: Whether it has failed, and comes to no other place any more.

    Raises:
        ValueError: On all processes, if they have come to different places, or with different layouts.
        Exception: On those that have not failed, that of one that has.
    """
    if world_size() == 1:
        return [count]
    mark = zlib.crc32(repr((function, layout)).encode())
    failed, counts, marks = torch.stack(all_gather(torch.tensor([failure, count, mark]))).T.tolist()
    if failure:
        return list(failed)
    if any(failed):
        number, error = _failures(failed, None)[0]
        vars(error)["_told"] = True
        raise error from ProcessError(f"rank {number} of {world_size()} has failed, and this one with it.")
    if len(set(marks)) > 1:  # tensors would be mixed up
        raise ValueError(
            f"{function} needs the same tensors (names, dtypes, shapes) on every rank; rank {rank()} has "
            f"{list(layout)}. A rank without examples passes zeros or empty tensors like those of the others."
        )
    return list(counts)


def _failures(failed: Sequence[int], error: Exception | None) -> list[tuple[int, Exception]]:
    """Return who has failed, and with what."""
    told = () if error is None else (type(error).__module__, type(error).__qualname__, _arguments(error))
    said = objects(told)
    return [(number, _rebuilt(*said[number])) for number, bad in enumerate(failed) if bad]


def _arguments(error: Exception) -> tuple[str | int, ...]:
    """Return what an error is made of, if that can be told to other processes; else its words."""
    plain = error.args and all(isinstance(each, (str, int)) for each in error.args)
    return error.args if plain else (str(error),)


def _rebuilt(module: str, name: str, arguments: tuple[str | int, ...]) -> Exception:
    """Return the error of another process, or a ``RuntimeError`` with its words where there is no such class here."""
    kind = getattr(sys.modules.get(module), name, None)
    with suppress(Exception):
        error = kind(*arguments) if isinstance(kind, type) and issubclass(kind, Exception) else None
        if error is not None:
            return error
    return RuntimeError(f"{name}: {' '.join(map(str, arguments))}")


def _in_process_group() -> bool:
    return dist.is_available() and dist.is_initialized()


def device_for(device: torch.device) -> torch.device:
    """The device itself if the backend communicates from there, else one that it does (NCCL: no CPU)."""
    if world_size() == 1:
        return device
    # For example "cuda:nccl" or "cpu:gloo,cuda:gloo".
    served = [entry.split(":")[0] for entry in dist.get_backend_config().split(",")]
    return device if device.type in served else torch.device(served[0])


def all_gather(tensor: Tensor, parts: list[Tensor] | None = None) -> list[Tensor]:
    """One tensor per rank, all of the same shape and dtype; in given ones, on a device that the backend serves."""
    local = tensor.to(device_for(tensor.device)).contiguous()
    parts = parts or [torch.empty_like(local) for _ in range(world_size())]
    dist.all_gather(parts, local)
    return parts


def objects(item: _Item) -> list[_Item]:
    """One object per rank."""
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, item)
    return found


def to_first(tensor: Tensor, parts: list[Tensor]) -> None:
    """The same in the given tensors of rank zero."""
    dist.gather(tensor, parts or None, dst=0)


def broadcast(tensor: Tensor, owner: int) -> None:
    """Write the owner's tensor into those of all, of one shape and dtype, on a device that the backend serves."""
    dist.broadcast(tensor, src=owner)


def padded(tensor: Tensor, rows: int) -> Tensor:
    """Rows of zeros after a tensor's own: what all gather is of one shape."""
    if len(tensor) == rows:
        return tensor
    return torch.cat([tensor, tensor.new_zeros(rows - len(tensor), *tensor.shape[1:])])
