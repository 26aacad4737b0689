"""Files of an audit: whole or absent, under names that every file system takes.

A file is written under a temporary name beside its place, flushed to the disk and renamed, so a reader meets the old
file or the new one.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO
from urllib.parse import quote, unquote
from zlib import crc32

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

from lightning_influence.core.memory import available_bytes

FACTORS = "factors"
"""Folder of the curvature factors."""

CHECKPOINTS = "checkpoints"
"""Folder of the checkpoints."""

SUFFIX = ".safetensors"
"""Of files with tensors."""

_CHECKSUM = "crc32"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "C64": torch.complex64,
}

# Windows keeps these names for devices, whatever extension follows.
_DEVICE_NAMES = {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(10))}


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


def packed_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file; any strides, device or sharing of storage will do."""
    # Not `save_file`: that goes through a temporary file of its own, which a killed writer would leave behind, and
    # makes it readable for the owner only.
    apart = separate(tensors)
    return safetensors.torch.save(apart, metadata={**metadata, _CHECKSUM: str(_checksum(apart, metadata))})


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file."""
    # In one go: `safe_open` opens the file again for the data, which by then may be another one.
    data = whole(path)
    tensors = safetensors.torch.load(data)
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    metadata = dict(header.get("__metadata__", {}))
    checksum = metadata.pop(_CHECKSUM, None)  # files of earlier versions have none
    if checksum is not None and checksum != str(_checksum(tensors, metadata)):
        raise ValueError("its content does not have the checksum that it was written with")
    return tensors, metadata


def load_outline(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Metadata of a safetensors file, and its tensors on the device "meta"; only the header is read."""
    check_readable(path)
    with safe_open(path, framework="pt") as handle:
        parts = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118
        metadata = handle.metadata() or {}
        tensors = {
            name: torch.empty(part.get_shape(), dtype=_DTYPES.get(part.get_dtype(), torch.uint8), device="meta")
            for name, part in parts.items()
        }
    return tensors, {name: value for name, value in metadata.items() if name != _CHECKSUM}


def _checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> int:
    result = crc32(repr(sorted(metadata.items())).encode(errors="surrogatepass"))
    for name in sorted(tensors):
        tensor = tensors[name]
        result = crc32(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode(errors="surrogatepass"), result)
        if tensor.numel():
            line = tensor.as_strided((tensor.numel(),), (1,))  # a lone entry may have any stride
            result = crc32(line.view(torch.uint8).numpy().data, result)
    return result


def local_path(directory: str | os.PathLike[str]) -> Path:
    """Return the absolute path of a folder; raise ``StoreError`` for a remote address."""
    text = os.fspath(directory)
    if "://" in text:
        raise StoreError(f"{text} is a remote address; pass `dirpath=` with a folder on a local disk.")
    return Path(os.path.abspath(os.path.expanduser(text)))


def claim(path: Path) -> bool:
    """Takes `path` if it is new or an empty folder; `False` if somebody has it already."""
    try:
        os.mkdir(path)
    except FileExistsError:
        if not path.is_dir() or any(path.iterdir()):
            return False
    try:
        # Several processes may have seen the folder empty; the one that makes this owns it.
        os.mkdir(path / FACTORS)
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


def block_file_name(block_name: str) -> str:
    """File name of a block; capitals are escaped too, since some file systems ignore case."""
    text = quote(block_name, safe="", errors="surrogatepass")
    text = re.sub("%..|[A-Z]", lambda part: part[0] if part[0][0] == "%" else f"%{ord(part[0]):X}", text)
    if text.startswith(".") or text.split(".")[0] in _DEVICE_NAMES:
        text = f"%{ord(text[0]):X}{text[1:]}"
    # No escaped name is a lone "%"; the root module's name is "".
    return (text or "%") + SUFFIX


def block_name_of(file: str) -> str:
    """Return the block that a file is named after."""
    text = file.removesuffix(SUFFIX)
    return "" if text == "%" else unquote(text, errors="surrogatepass")


def separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors that share no storage, which safetensors demands; copies only what has to be."""
    result: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.dtype == torch.complex128:
            kind = f"{tensor.layout}, {tensor.dtype}"
            raise ValueError(f"tensor {name!r} is {kind}; safetensors holds dense tensors up to complex64.")
        # safetensors saves the bytes as they lie and would lose a pending conjugation or minus sign
        flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
        if flat.untyped_storage().data_ptr() in seen:
            flat = flat.clone()
        seen.add(flat.untyped_storage().data_ptr())
        result[name] = flat
    return result
