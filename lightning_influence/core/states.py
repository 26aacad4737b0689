"""What single things were: contents, tensors, arrays, generators; each can tell whether it has changed, and go back."""

from __future__ import annotations

import ctypes
import types
import zlib
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Iterable
from operator import is_
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_influence.core.random_streams import GENERATORS, stream_of
from lightning_influence.core.reachable import BUFFERS, Found
from lightning_influence.core.slots import Slots
from lightning_influence.core.torch_private import is_view, set_version, version

# Nobody sees the first write to an array: larger ones are not copied, only compared.
_LARGE_ARRAY = 2**24
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_PLAIN = (bool, int, float, complex, str, bytes, type(None))


class State(ABC):
    """What one thing was."""

    def __init__(self, found: Found) -> None:
        self.path = found.path
        self.expected = found.expected

    @abstractmethod
    def changed(self) -> list[str]:
        """Return the paths of what is not what it was."""

    @abstractmethod
    def restore(self, *, numbers: bool = False) -> bool:
        """Put it back, or only what of it may count something; False if that can't be."""


class Contents(State):
    """What something holds: the same objects in the same places."""

    def __init__(self, found: Found, slots: Slots) -> None:
        super().__init__(found)
        self._slots = slots
        of_cell = isinstance(found.value, types.CellType)
        self._style = (
            "{}[{!r}]" if isinstance(found.value, dict) else "{}" if of_cell else "{}.{}" if found.path else "{}{}"
        )
        self.kept = self._given = slots.read()

    def hand_out(self, copied: Callable[[Any], Any]) -> None:
        """Let it hold copies of what knows no way back."""
        if isinstance(self.kept, dict):
            self._given = {key: copied(value) for key, value in self.kept.items()}
        else:
            self._given = [copied(value) for value in self.kept]
        self._slots.write(self._given)

    def changed(self) -> list[str]:
        """Compare."""
        now, given = self._slots.read(), self._given
        same = len(now) == len(given) and all(map(is_, values_in(now), values_in(given)))
        if not isinstance(now, dict):
            if not same:
                same = now == given if isinstance(now, set) else _are_same(now, given)
            return [] if same else [self.path]
        if same and all(map(is_, now, given)):
            return []
        names = [
            self._style.format(self.path, key)
            for key in {**given, **now}
            if key not in now or key not in given or not _is_same(now[key], given[key])
        ]
        return names or ([] if list(now) == list(given) else [self.path])

    def restore(self, *, numbers: bool = False) -> bool:
        """Put it back."""
        if not numbers:
            self._slots.write(self.kept)
            self._given = self.kept
            return True
        now, given = self._slots.read(), self._given
        if isinstance(now, dict):
            self._slots.write({**now, **{key: old for key, old in given.items() if _counts(now.get(key), old)}})
        elif isinstance(now, list) and len(now) == len(given):
            self._slots.write([old if _counts(new, old) else new for new, old in zip(now, given, strict=True)])
        return True


def values_in(contents: Any) -> Iterable[Any]:
    """Return the things that were read from slots."""
    return contents.values() if isinstance(contents, dict) else contents


def _counts(new: Any, old: Any) -> bool:
    return new is not old and type(new) is type(old) and isinstance(old, (int, float))


def _is_same(one: Any, other: Any) -> bool:
    return one is other or (type(one) is type(other) and isinstance(one, _PLAIN) and bool(one == other))


def _are_same(ones: list[Any], others: list[Any]) -> bool:
    return len(ones) == len(others) and all(map(_is_same, ones, others))


class TensorState(State):
    """Values, memory, flags and version of a tensor.

    Args:
        found: The tensor.
        copied: Whether to copy its values; else the count of changes tells, and on the host a checksum: a write through
            ``.data`` on an accelerator is not seen.
    """

    def __init__(self, found: Found, *, copied: bool) -> None:
        super().__init__(found)
        self._tensor: Tensor = found.value
        self._leaf = self._tensor.grad_fn is None
        # Passes freeze parameters, and thaw what they differentiate: that is theirs to put back.
        self._flag = None if isinstance(self._tensor, nn.Parameter) else self._tensor.requires_grad
        self._version = None if self._tensor.is_inference() else version(self._tensor)
        self.memory = self._tensor.data  # held: `.data =` would free it
        self._values = self.memory.clone() if copied else None
        self._checksum = None if copied else _checksum_of(self.memory)

    def changed(self) -> list[str]:
        """Compare."""
        tensor = self._tensor
        attached = self._flag not in (None, tensor.requires_grad) or (tensor.grad_fn is None) != self._leaf
        return [self.path] if attached or self._moved() or not self._same_values() else []

    def restore(self, *, numbers: bool = False) -> bool:
        """Put it back."""
        tensor = self._tensor
        if self._leaf and tensor.grad_fn is not None:
            if is_view(tensor):
                return False
            tensor.detach_()
        if self._moved():
            tensor.data = self.memory
        same = self._same_values()
        if not same and self._values is not None:
            with torch.inference_mode(self.memory.is_inference()):
                # What is not strided gets other parts by that: written to a second handle, the first would not see it.
                (self.memory if self.memory.layout == torch.strided else tensor).copy_(self._values)
        if self._leaf and self._flag is not None:
            tensor.requires_grad_(self._flag)
        if self._version is not None and version(tensor) != self._version:
            # Else a graph that training has kept would be refused for a change that is none.
            set_version(tensor, self._version)
        return same or self._values is not None

    def _moved(self) -> bool:
        tensor, memory = self._tensor, self.memory
        if tensor.dtype != memory.dtype or tensor.device != memory.device or tensor.layout != memory.layout:
            return True
        # Subclasses may have no memory of their own (a `DTensor`).
        odd = memory.layout != torch.strided or memory.is_quantized or memory.is_nested
        plain = type(memory) is Tensor and not odd
        return plain and not tensor.data.is_set_to(memory)

    def _same_values(self) -> bool:
        if self._values is None or self.memory.layout != torch.strided or self.memory.is_nested:
            counted = self._version is None or self._version == version(self._tensor)
            return counted and (self._checksum is None or self._checksum == _checksum_of(self.memory))
        if self.memory.shape != self._values.shape:
            return False
        return torch.equal(_bits(self.memory), _bits(self._values))


def _checksum_of(tensor: Tensor) -> int | None:
    """Return what tells of writes that no version counts (through ``.numpy()`` or ``.data``), where the host has it."""
    if type(tensor) is not Tensor or tensor.device.type != "cpu" or tensor.layout != torch.strided or tensor.is_nested:
        return None
    return None if tensor.is_quantized else zlib.crc32(_bits(tensor).contiguous().reshape(-1).numpy().data)


def _bits(tensor: Tensor) -> Tensor:
    """Return a tensor as integers: not-a-number is equal to itself."""
    tensor = tensor.resolve_conj().resolve_neg()
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    kind = _INTEGERS.get(tensor.element_size())
    return tensor if kind is None or tensor.is_quantized else tensor.view(kind)


class ValueState(State):
    """What can be read as a value of its own, and written back: a random stream, an array, a buffer of bytes."""

    def __init__(self, found: Found) -> None:
        super().__init__(found)
        self._read, self._write = _access(found.value)
        self._kept = self._read()
        self.expected |= isinstance(found.value, GENERATORS)  # as the streams of the process are

    def changed(self) -> list[str]:
        """Compare."""
        return [] if _equal(self._read(), self._kept) else [self.path]

    def restore(self, *, numbers: bool = False) -> bool:
        """Put it back."""
        if self._write is not None:
            self._write(self._kept)
        return self._write is not None


def _access(value: Any) -> tuple[Callable[[], Any], Callable[[Any], Any] | None]:
    """Return how to read a value, and how to write it back, if that is possible."""

    def write(kept: Any) -> None:
        if isinstance(value, np.ndarray):
            if value.shape != kept.shape:
                value.resize(kept.shape, refcheck=False)
            value[...] = kept
        elif isinstance(value, bytearray):
            value[:] = kept
        elif isinstance(value, array):
            del value[:]
            value.frombytes(kept)
        else:
            ctypes.memmove(ctypes.addressof(value), kept, len(kept))

    if isinstance(value, GENERATORS):
        stream = stream_of(value)
        return stream.read, stream.write
    if isinstance(value, BUFFERS):
        return lambda: bytes(value), write
    if value.nbytes > _LARGE_ARRAY and not value.dtype.hasobject:
        return lambda: zlib.crc32(np.ascontiguousarray(value).view(np.uint8).reshape(-1).data), None
    return value.copy, write


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return all(_equal(one[key], other[key]) for key in one)
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return bool(one.shape == other.shape and one.tobytes() == other.tobytes())
    return bool(one == other)
