"""Files of an audit: whole or absent.

A file is written under a temporary name beside its place, flushed to the disk and renamed, so a reader meets the old
file or the new one.
"""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import torch

from lightning_influence.core.memory import available_bytes, is_out_of_memory

FACTORS = "factors"
"""Folder of the curvature factors; whoever makes it owns the audit."""


class StoreError(RuntimeError):
    """An audit directory that cannot be made, written or read; the message names the path and the way out."""


def check_readable(path: Path, limit: int | None = None) -> None:
    """Raise ``ValueError`` for what is no plain file, or larger than a limit or the memory.

    Raises:
        OSError: If there is none.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise ValueError("it is no file")  # a pipe would wait for ever
    room = available_bytes(torch.device("cpu")) if limit is None else limit
    if room is not None and found.st_size > room:
        raise ValueError(f"it has {found.st_size:,} bytes, more than the {room:,} that can be read")


def whole(path: Path, limit: int | None = None) -> bytes:
    """Return the bytes of a file, see ``check_readable``."""
    check_readable(path, limit)
    return path.read_bytes()


def local_path(directory: str | os.PathLike[str]) -> Path:
    """Return the absolute path of a folder; raise ``StoreError`` for a remote address."""
    text = os.fspath(directory)
    if "://" in text:
        raise StoreError(f"{text} is a remote address; pass `dirpath=` with a folder on a local disk.")
    return Path(os.path.abspath(os.path.expanduser(text)))


def claim(path: Path) -> bool:
    """Take `path` if it is new or an empty folder; `False` if somebody has it already."""
    if os.path.lexists(path) and (not path.is_dir() or any(path.iterdir())):
        return False
    try:
        # Several processes may have seen the folder empty; the one that makes this owns it.
        os.makedirs(path / FACTORS)
    except FileExistsError:
        return False
    return True


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Opens a temporary file beside `path` that takes its place once the body has succeeded."""
    temporary = path.with_name(f".tmp-{secrets.token_hex(4)}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)  # copying tools drop empty folders, and people tidy up
        for leftover in path.parent.glob(f".tmp-????????-{path.name}"):
            leftover.unlink(missing_ok=True)
        with open(temporary, "xb") as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
        # The rename itself must survive a power cut; where folders cannot be synced the file is still whole.
        with suppress(OSError):
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except OSError as error:
        raise StoreError(
            f"Cannot write {path}: {error}. What stood there before is unchanged. Free some space or pass "
            "`dirpath=` with a folder this process may write; only one process may write an audit at a time."
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def reading(path: Path, hint: str = "") -> Iterator[None]:
    """Turn what the libraries raise for a missing or damaged file into ``StoreError``."""
    try:
        yield
    except StoreError:
        raise
    except FileNotFoundError as error:
        raise StoreError(f"{path} does not exist{hint}; finish the audit or run it again.") from error
    except Exception as error:  # a damaged file may raise anything
        if is_out_of_memory(error):
            raise
        raise StoreError(f"{path} cannot be read: {error}. Run the audit again.") from error
