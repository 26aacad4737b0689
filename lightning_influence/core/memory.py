"""How much memory there is, to refuse or take another way before it runs out."""

from __future__ import annotations

import ctypes
import gc
import warnings
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")
_OUT_OF_MEMORY = ("DefaultCPUAllocator", "out of memory", "_STATUS_ALLOC_FAILED")


def available_bytes(device: torch.device) -> int | None:
    """Return the memory that can still be taken on a device; None (for an accelerator with a warning) if unknown."""
    if device.type != "cpu":
        return _left_on(device)
    known = [size for size in (_free_on_host(), _left_in_group()) if size is not None]
    return min(known, default=None)


def fits(size: float, device: torch.device) -> bool:
    """Tell whether ``size`` bytes can be taken; yes where the system does not tell."""
    available = available_bytes(device)
    return available is None or size <= available


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that memory has run out: no fault of the task or the data that it came up with."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    # Plain ones: the allocator of the host, and those of other accelerators and libraries.
    return isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in _OUT_OF_MEMORY)


def let_go() -> None:
    """Give back what a failed attempt has left: tracebacks in cycles hold tensors, and the allocator its blocks."""
    gc.collect()
    trim()
    with suppress(AttributeError, RuntimeError):  # the host has no such function, some accelerators no module
        torch.get_device_module().empty_cache()


def trim() -> None:
    """Give free memory of the host back to the system, where glibc keeps it: activations of a pass, of large models."""
    with suppress(AttributeError, OSError, TypeError):  # another library
        ctypes.CDLL(None).malloc_trim(0)


def readable(size: float) -> str:
    """Return a number of bytes as a person reads it."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.3g} {unit}"
    return f"{size:.0f} bytes"


def _left_on(device: torch.device) -> int | None:
    """Return what an accelerator has left."""
    try:
        backend = torch.get_device_module(device)
        free: int = backend.mem_get_info(device)[0]
        # What the allocator has cached is free, too: the driver does not know.
        return free + int(backend.memory_reserved(device) - backend.memory_allocated(device))
    except (AttributeError, RuntimeError):  # MPS has no such functions, some XPUs no answer
        _say_unknown(device.type)
        return None


@cache
def _say_unknown(kind: str) -> None:
    """Say so once."""
    warnings.warn(
        f"{kind} does not tell how much memory it has left: whether something fits is not known before it is tried.",
        stacklevel=3,
    )


def _free_on_host() -> int | None:
    try:
        lines = _MEMINFO.read_text().splitlines()
        entries = dict(line.split(":", 1) for line in lines)
        return int(entries["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):  # not Linux
        return None


def _left_in_group() -> int | None:
    """Return what the limit of the control group (a container) leaves, None without one."""
    try:
        limit = int((_CGROUP / "memory.max").read_text())
        used = int((_CGROUP / "memory.current").read_text())
        statistics = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no control groups, or "max": no limit
        return None
    # Cached files are given back when memory gets short.
    return limit - used + int(statistics.get("inactive_file", 0))
