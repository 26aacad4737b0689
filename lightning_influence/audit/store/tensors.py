"""Tensors in safetensors files with a checksum, under names that every file system takes."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote, unquote
from zlib import crc32

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

from lightning_influence.audit.store.atomic import check_readable, whole

SUFFIX = ".safetensors"
"""Of files with tensors."""

_CHECKSUM = "crc32"
# Windows keeps these names for devices, whatever extension follows.
_DEVICE_NAMES = {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(10))}


def packed_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file; any strides, device or sharing of storage will do."""
    # Not `save_file`: that goes through a temporary file of its own, which a killed writer would leave behind, and
    # makes it readable for the owner only.
    apart = _separate(tensors)
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
    """Metadata of a safetensors file, and names and shapes of its tensors, on "meta"; only the header is read."""
    check_readable(path)
    with safe_open(path, framework="pt") as handle:
        metadata = handle.metadata() or {}
        tensors = {
            name: torch.empty(handle.get_slice(name).get_shape(), device="meta")
            for name in handle.keys()  # noqa: SIM118
        }
    return tensors, {name: value for name, value in metadata.items() if name != _CHECKSUM}


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors that share no storage, which safetensors demands; copies only what has to be."""
    result: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        # Safetensors saves the bytes as they lie and would lose a pending conjugation or minus sign.
        flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
        result[name] = flat.clone() if flat.untyped_storage().data_ptr() in seen else flat
        seen.add(result[name].untyped_storage().data_ptr())
    return result


def _checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> int:
    result = crc32(repr(sorted(metadata.items())).encode(errors="surrogatepass"))
    for name, tensor in sorted(tensors.items()):
        result = crc32(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode(errors="surrogatepass"), result)
        if tensor.numel():
            line = tensor.as_strided((tensor.numel(),), (1,))  # a lone entry may have any stride
            result = crc32(line.view(torch.uint8).numpy().data, result)
    return result


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
