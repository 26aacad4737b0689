"""What single things were: contents, tensors, arrays, generators; each can tell whether it has changed, and go back."""

from __future__ import annotations

import copy
import ctypes
import random
import zlib
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Iterable
from operator import is_
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_influence.core.reachable import Found, Slots
from lightning_influence.core.torch_private import set_version

# Nobody sees the first write to an array: larger ones are not copied, only compared.
_LARGE_ARRAY = 2**24
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_COLUMNS = 2**12


class State(ABC):
    """What one thing was."""

    def __init__(self, found: Found) -> None:
        self.path = found.path
        self.expected = found.expected

    @abstractmethod
    def changed(self) -> list[str]:
        """Return the paths of what is not what it was."""

    @abstractmethod
    def restore(self) -> bool:
        """Put it back; False if that can't be."""

    def restore_numbers(self) -> bool:
        """Put back only what may count something."""
        return self.restore()


class Contents(State):
    """What something holds: the same objects in the same places."""

    def __init__(self, found: Found, slots: Slots) -> None:
        super().__init__(found)
        self._slots = slots
        self._style = "{}[{!r}]" if isinstance(found.value, dict) else "{}.{}" if found.path else "{}{}"
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
        if same and (not isinstance(now, dict) or all(map(is_, now, given))):
            return []
        if not isinstance(now, dict):
            same = len(now) == len(given) and (now == given if isinstance(now, set) else all(map(_is_same, now, given)))
            return [] if same else [self.path]
        keys = dict.fromkeys((*given, *now))
        names = [
            self._style.format(self.path, key)
            for key in keys
            if key not in now or key not in given or not _is_same(now[key], given[key])
        ]
        return names or ([] if list(now) == list(given) else [self.path])

    def restore(self) -> bool:
        """Put it back."""
        self._slots.write(self.kept)
        self._given = self.kept
        return True

    def restore_numbers(self) -> bool:
        """Put back the numbers among what it holds."""
        now, given = self._slots.read(), self._given
        if isinstance(now, dict):
            self._slots.write({**now, **{key: old for key, old in given.items() if _counts(now.get(key), old)}})
        elif isinstance(now, list) and len(now) == len(given):
            self._slots.write([old if _counts(new, old) else new for new, old in zip(now, given, strict=True)])
        return True


def _counts(new: Any, old: Any) -> bool:
    return new is not old and type(new) is type(old) and isinstance(old, (int, float))


def values_in(contents: Any) -> Iterable[Any]:
    """Return the things that were read from slots."""
    return contents.values() if isinstance(contents, dict) else contents


def _is_same(one: Any, other: Any) -> bool:
    return one is other or (type(one) is type(other) and isinstance(one, _PLAIN) and bool(one == other))


class TensorState(State):
    """Values, memory, flags and version of a tensor."""

    def __init__(self, found: Found, tensor: Tensor, *, copied: bool) -> None:
        super().__init__(found)
        self._tensor = tensor
        self._leaf = tensor.grad_fn is None
        # Passes freeze parameters, and thaw what they differentiate: that is theirs to put back.
        self._flag = None if isinstance(tensor, nn.Parameter) else tensor.requires_grad
        self._version = None if tensor.is_inference() else tensor._version
        self.memory = tensor.data  # held: `.data =` would free it
        self._values = self.memory.clone() if copied else None
        self._sums = None if copied else _sums(self.memory)

    def copy(self) -> None:
        """Copy the values: they are about to change."""
        if self._values is None:
            self._values = self.memory.clone()

    def changed(self) -> list[str]:
        """Compare."""
        tensor = self._tensor
        attached = self._flag not in (None, tensor.requires_grad) or (tensor.grad_fn is None) != self._leaf
        return [self.path] if attached or self._moved() or not self._same_values() else []

    def restore(self) -> bool:
        """Put it back."""
        tensor = self._tensor
        if self._leaf and tensor.grad_fn is not None:
            if tensor._is_view():
                return False
            tensor.detach_()
        if self._moved():
            tensor.data = self.memory
        possible = True
        if not self._same_values():
            possible = self._values is not None
            if self._values is not None:
                with torch.inference_mode(self.memory.is_inference()):
                    self.memory.copy_(self._values)
        if self._leaf and self._flag is not None:
            tensor.requires_grad_(self._flag)
        if self._version is not None and tensor._version != self._version:
            # Else a graph that training has kept would be refused for a change that is none.
            set_version(tensor, self._version)
        return possible

    def _moved(self) -> bool:
        tensor, memory = self._tensor, self.memory
        if tensor.dtype != memory.dtype or tensor.device != memory.device or tensor.layout != memory.layout:
            return True
        # Subclasses may have no memory of their own (a `DTensor`).
        plain = type(memory) is Tensor and memory.layout == torch.strided
        return plain and not tensor.data.is_set_to(memory)

    def _same_values(self) -> bool:
        if self._values is None:
            return torch.equal(_sums(self.memory), self._sums)  # type: ignore[arg-type]
        if self.memory.shape != self._values.shape:
            return False
        if self.memory.layout != torch.strided:
            return self._version == self._tensor._version
        return torch.equal(_bits(self.memory), _bits(self._values))


def _bits(tensor: Tensor) -> Tensor:
    """Return a tensor as integers: not-a-number is equal to itself."""
    tensor = tensor.resolve_conj().resolve_neg()
    kind = _INTEGERS.get(tensor.element_size())
    return tensor if kind is None or tensor.is_quantized else tensor.view(kind)


def _sums(tensor: Tensor) -> Tensor:
    """Return sums over rows and columns of a large tensor's words; they tell rows in another order, too."""
    words = _bits(tensor).reshape(-1)
    if words.is_complex():
        words = torch.view_as_real(words).reshape(-1).view(torch.int64)
    if words.element_size() < 8 and words.storage_offset() * words.element_size() % 8 == 0:
        whole = words.numel() * words.element_size() // 8 * 8 // words.element_size()
        words, rest = words[:whole].view(torch.int64), words[whole:]
    else:
        rest = words[:0]
    table = words[: words.numel() // _COLUMNS * _COLUMNS].view(-1, _COLUMNS)
    rest_of_words = words[table.numel() :]
    return torch.cat([table.sum(0), table.sum(1), rest_of_words.to(torch.int64), rest.to(torch.int64)])


class ArrayState(State):
    """Values of an array."""

    def __init__(self, found: Found, array: np.ndarray[Any, Any]) -> None:
        super().__init__(found)
        self._array = array
        self._values = array.copy() if array.nbytes <= _LARGE_ARRAY else None
        self._hash = self._hashed() if self._values is None else 0

    def changed(self) -> list[str]:
        """Compare."""
        if self._values is None:
            return [] if self._hashed() == self._hash else [self.path]
        now = self._array
        same = now.shape == self._values.shape and now.tobytes() == self._values.tobytes()
        return [] if same else [self.path]

    def restore(self) -> bool:
        """Put it back."""
        if self._values is None:
            return False
        if self._array.shape != self._values.shape:
            self._array.resize(self._values.shape, refcheck=False)
        self._array[...] = self._values
        return True

    def _hashed(self) -> int:
        return zlib.crc32(np.ascontiguousarray(self._array).view(np.uint8).reshape(-1).data)


class GeneratorState(State):
    """The place of a random generator in its stream."""

    def __init__(self, found: Found, generator: Any) -> None:
        super().__init__(found)
        self.expected = True  # as the streams of the process are
        self._generator = generator
        self._kept = copy.deepcopy(self._state())

    def changed(self) -> list[str]:
        """Compare."""
        return [] if _agree(self._state(), self._kept) else [self.path]

    def restore(self) -> bool:
        """Put it back."""
        generator = self._generator
        if isinstance(generator, np.random.Generator):
            generator.bit_generator.state = self._kept
        elif isinstance(generator, random.Random):
            generator.setstate(self._kept)
        else:
            generator.set_state(self._kept)
        return True

    def _state(self) -> Any:
        generator = self._generator
        if isinstance(generator, np.random.Generator):
            return generator.bit_generator.state
        return generator.getstate() if isinstance(generator, random.Random) else generator.get_state()


def _agree(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return all(_agree(one[key], other[key]) for key in one)
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, tuple) and not isinstance(one[0], int):
        return all(map(_agree, one, other))
    return bool(np.all(one == other))


class BytesState(State):
    """Bytes, numbers and arrays of plain numbers, also in shared memory."""

    def __init__(self, found: Found, value: Any) -> None:
        super().__init__(found)
        self._value = value
        self._kept = self._bytes()

    def changed(self) -> list[str]:
        """Compare."""
        return [] if self._bytes() == self._kept else [self.path]

    def restore(self) -> bool:
        """Put it back."""
        value: Any = self._value
        if isinstance(value, bytearray):
            value[:] = self._kept
        elif isinstance(value, array):
            del value[:]
            value.frombytes(self._kept)
        else:
            ctypes.memmove(ctypes.addressof(value), self._kept, len(self._kept))
        return True

    def _bytes(self) -> bytes:
        value: Any = self._value
        if isinstance(value, (bytearray, array)):
            return bytes(memoryview(value).cast("B"))
        return ctypes.string_at(ctypes.addressof(value), ctypes.sizeof(value))
