"""An index on the disk: a folder with one set of arrays from each process that has written it.

| file | content |
|---|---|
| `index.json` | what it is about, and how well it does |
| `layout.safetensors` | which coordinates are kept, and the projection of the search |
| `examples-<rank>.npy` | of each example its index, self-influence, length of what is searched, and content in short |
| `rows-<rank>.npy`, `lengths-<rank>.npy` | what is kept of its gradient, see ``coding`` |
| `search-<rank>.npy` | what the search looks at first |

Arrays are mapped into memory: nothing is read that nobody asks for, and an index may be larger than the memory.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

from lightning_influence.core import distributed
from lightning_influence.core.memory import readable
from lightning_influence.scores.matrix_file import new_map

FOLDER = "index"
"""Of an index, in the directory of an audit or of a saved curvature."""
VERSION = 1

_ABOUT, _LAYOUT = "index.json", "layout.safetensors"
DIGEST = 16
"""Bytes of what an example holds in short; zeros where that is not known."""
EXAMPLE = np.dtype([("index", "<i8"), ("self_influence", "<f8"), ("length", "<f4"), ("digest", f"V{DIGEST}")])


class ExampleIndexError(ValueError):
    """An index that there is none of, that is damaged, or about something else."""


@dataclass(frozen=True, eq=False)
class Shard:
    """What one process has written, mapped into memory.

    Attributes:
        examples: Records ``[n]``, see ``EXAMPLE``.
        rows: ``[n, width]``.
        lengths: ``[n, parts]``.
        search: ``[n, r]``.
    """

    examples: NDArray[Any]
    rows: Tensor
    lengths: Tensor
    search: Tensor

    @classmethod
    def mapped(cls, *arrays: NDArray[Any]) -> Shard:
        """Return it of mapped arrays, which are read when they are looked at; nobody writes to its tensors."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*not writable", category=UserWarning)
            return cls(arrays[0], *map(torch.from_numpy, arrays[1:]))

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.examples)


def has_index(directory: Path) -> bool:
    """Tell whether a directory, of an audit or of a saved curvature, holds an index."""
    return (directory / FOLDER / _ABOUT).is_file()


def read_about(folder: Path) -> dict[str, Any]:
    """Return what an index is about.

    Raises:
        ExampleIndexError: If there is none, or it can't be read.
    """
    path = folder / _ABOUT
    if not has_index(folder.parent):
        raise ExampleIndexError(
            f"{folder.parent} holds no index: make the audit with `InfluenceAudit(index=True)`, or one by "
            "`Influence(...).fit().index(directory)`."
        )
    try:
        about = json.loads(path.read_bytes())
        version = about["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise ExampleIndexError(
            f"{path} can't be read ({type(error).__name__}: {error}): make the index again."
        ) from error
    if version != VERSION:
        raise ExampleIndexError(f"{path} has version {version!r}; this package reads {VERSION}: make the index again.")
    return dict(about)


def read_layout(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of an index."""
    try:
        return safetensors.torch.load((folder / _LAYOUT).read_bytes())
    except Exception as error:  # a damaged file may raise anything
        raise ExampleIndexError(f"{folder / _LAYOUT} can't be read: {error}. Make the index again.") from error


def read_shards(folder: Path, sizes: list[int]) -> list[Shard]:
    """Return what each process has written."""
    shards = []
    for rank, size in enumerate(sizes):
        try:
            arrays = [np.load(path, mmap_mode="r") for path in _arrays(folder, rank)]
        except (OSError, ValueError, EOFError) as error:
            raise ExampleIndexError(f"{folder} can't be read: {error}. Make the index again.") from error
        if any(len(array) < size for array in arrays) or arrays[0].dtype != EXAMPLE:
            raise ExampleIndexError(f"{folder} lacks examples of process {rank}: make the index again.")
        shards.append(Shard.mapped(*(array[:size] for array in arrays)))
    return shards


def _arrays(folder: Path, rank: int) -> list[Path]:
    return [folder / f"{kind}-{rank}.npy" for kind in ("examples", "rows", "lengths", "search")]


class Folder:
    """A folder that is written under another name, and takes its place when it is complete.

    Args:
        directory: In which it will be, on a file system that all processes share.
        needed: Bytes that it takes.

    Raises:
        ExampleIndexError: On every process, if it can't be made, or the disk has no room for it.
    """

    def __init__(self, directory: Path, needed: int) -> None:
        directory, token = distributed.gather_objects((directory, secrets.token_hex(4)))[0]
        self.final, self.path = directory / FOLDER, directory / f".tmp-{token}-{FOLDER}"
        self._maps: list[NDArray[Any]] = []
        free = shutil.disk_usage(directory).free if directory.is_dir() else needed
        if distributed.any_process(needed > free):
            raise ExampleIndexError(
                f"an index takes {readable(needed)} on disk, and {readable(free)} are free at {directory}: free some, "
                "or keep less by `Index(numbers=...)`."
            )
        try:
            distributed.from_first(lambda: self.path.mkdir(parents=True))
        except OSError as error:
            raise ExampleIndexError(f"an index can't be written to {directory}: {error}.") from error
        if distributed.any_process(not self.path.is_dir()):
            raise ExampleIndexError(
                f"not all processes find {directory}; an index takes a folder on a file system that they share."
            )

    def array(self, kind: str, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """Return an array of this process, mapped into memory.

        Raises:
            ExampleIndexError: If it can't be made; nothing is left behind then.
        """
        path = self.path / f"{kind}-{distributed.rank()}.npy"
        try:
            made = new_map(path, shape, dtype)
        except OSError as error:
            self.give_up()
            raise ExampleIndexError(
                f"an index can't be written to {self.final.parent}: {error}. Free some room, or keep less by "
                "`Index(numbers=...)`."
            ) from error
        self._maps.append(made)
        return made

    def complete(self, about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Put it in its place, once every process has written its part."""
        for array in self._maps:
            array.flush()  # type: ignore[attr-defined]
        self._maps.clear()
        distributed.any_process(False)  # all of them have come so far
        if distributed.rank() == 0:
            apart = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
            (self.path / _LAYOUT).write_bytes(safetensors.torch.save(apart))
            (self.path / _ABOUT).write_text(json.dumps({**about, "version": VERSION}, indent=1) + "\n")
            if self.final.exists():
                shutil.rmtree(self.final)
            os.replace(self.path, self.final)
        distributed.any_process(False)

    def give_up(self) -> None:
        """Leave nothing behind."""
        self._maps.clear()
        if distributed.rank() == 0:
            shutil.rmtree(self.path, ignore_errors=True)
