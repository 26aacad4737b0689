"""A matrix of scores too large for memory: filled part by part in a file, then mapped into memory.

The file is an ordinary ``.npy`` in float32, half of what the scores take in memory: influence scores are not known to
seven digits. It is written under a temporary name beside its place and renamed when it is complete, so a reader
meets all scores or none.
"""

from __future__ import annotations

import glob
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from errno import EDQUOT, ENOSPC
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

from lightning_influence.core import distributed, memory
from lightning_influence.core.errors import check_path

Write = Callable[[slice, Tensor, Tensor], None]
"""Takes rows ``r``, the places of columns ``[c]``, and their scores ``[r, c]``."""

_ITEM = np.dtype(np.float32).itemsize


@contextmanager
def written(path: str | os.PathLike[str], shape: tuple[int, int]) -> Iterator[Write]:
    """Make the file: it takes its place once the body has succeeded.

    Args:
        path: Ends in ``.npy``; the folder exists, on a file system that all processes share.
        shape: Rows and columns.

    Yields:
        What writes a part of the matrix. Every process may call it, rank 0 writes: of a mapped page that two machines
        change, one change would be lost.

    Raises:
        ValueError: If the file is there, or can't be made, or the disk has no room for it. Raised on every process,
            before the body runs.
        OSError: If it can't be completed.
    """
    check_path("path", path)
    path = Path(path)
    # The processes look for the same file.
    token, first = distributed.gather_objects(secrets.token_hex(4))[0], distributed.rank() == 0
    temporary = path.with_name(f".tmp-{token}-{path.name}")
    matrix: Tensor | None = None

    def write(rows: slice, columns: Tensor, values: Tensor) -> None:
        if matrix is not None:
            matrix[rows, columns] = values.to(matrix)

    try:
        with _together(path):
            matrix = _made(path, temporary, shape) if first else None
        with _together(path):
            if not temporary.exists():
                raise ValueError(
                    f"rank 0 writes the scores to {path}, and this process does not find the file there; pass a path "
                    "on a file system that all processes share."
                )
        yield write
        with _together(path):
            matrix = None  # Windows does not rename a file that is mapped.
            if first:
                with open(temporary, "rb+") as handle:
                    os.fsync(handle.fileno())
                os.replace(temporary, path)
    finally:
        matrix = None
        if first:
            temporary.unlink(missing_ok=True)


def mapped(path: Path) -> Tensor:
    """Return the scores of a file, read from the disk when they are looked at; the tensor and the file are one."""
    # A tensor of a read-only mapping crashes when it is written to, and the kernel refuses a copy-on-write mapping
    # ("c") that is larger than the memory.
    return torch.from_numpy(np.load(path, mmap_mode="r+"))


def _made(path: Path, temporary: Path, shape: tuple[int, int]) -> Tensor:
    if path.suffix != ".npy" or path.is_dir() or not path.parent.is_dir():
        raise ValueError(f"path is {str(path)!r}; expected a file name ending in '.npy', in a folder that exists.")
    if path.exists():
        raise ValueError(f"path is {str(path)!r}, which exists; expected a new file: delete that one, or pass another.")
    for leftover in path.parent.glob(f".tmp-????????-{glob.escape(path.name)}"):
        leftover.unlink(missing_ok=True)
    needed, free = shape[0] * shape[1] * _ITEM, shutil.disk_usage(path.parent).free
    if needed > free:
        raise ValueError(
            f"{shape[0]:,} x {shape[1]:,} scores take {memory.readable(needed)} on disk, and {memory.readable(free)} "
            f"are free for {path}; pass a path on another disk, or use `top_scores`, which keeps the strongest only."
        )
    return torch.from_numpy(new_map(temporary, shape, np.float32))


def new_map(path: Path, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """Return a new array in a file, mapped into memory; raise ``OSError`` if the disk has no room for it."""
    made: NDArray[Any] = np.lib.format.open_memmap(path, mode="w+", dtype=np.dtype(dtype), shape=shape)
    _reserve(path)
    return made


def _reserve(path: Path) -> None:
    """Take the room on the disk now: a mapped page that finds none later kills the process, without an error."""
    if not hasattr(os, "posix_fallocate"):
        return
    with open(path, "rb+") as handle:
        try:
            os.posix_fallocate(handle.fileno(), 0, path.stat().st_size)
        except OSError as error:  # file systems may not know how
            if error.errno in (ENOSPC, EDQUOT):
                raise


@contextmanager
def _together(path: Path) -> Iterator[None]:
    """Let all processes fail where one of them does."""
    error: Exception | None = None
    try:
        yield
    except (OSError, ValueError) as caught:
        error = caught
    if distributed.any_process(error is not None):
        raise error or ValueError(f"another process can't write the scores to {path}; its error says why.")
