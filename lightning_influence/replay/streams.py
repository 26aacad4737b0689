"""Random streams of the process by name: read, as often as there are batches, and put back."""

from __future__ import annotations

import ctypes
import operator
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from lightning_influence.replay.record import Streams

# Of a Mersenne twister; its place among them follows.
_WORDS = 624


class StreamReader:
    """Reads all streams. A state that has not changed since the last time is the same object: it is kept once."""

    def __init__(self) -> None:
        self._last: dict[str, tuple[Any, Any]] = {}  # as it is read, and as it is kept

    def __call__(self) -> Streams:
        """Return the states of the streams."""
        found = {
            "torch": self._read("torch", torch.default_generator.get_state(), torch.equal),
            "numpy": self._read_numpy(),
            "python": self._read("python", random.getstate(), operator.eq, _compact),
        }
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            for device, generator in enumerate(torch.cuda.default_generators):
                name = f"cuda:{device}"
                found[name] = self._read(name, generator.get_state(), torch.equal)
        return found

    def _read(
        self, name: str, state: Any, same: Callable[[Any, Any], bool], kept: Callable[[Any], Any] | None = None
    ) -> Any:
        last = self._last.get(name)
        if last is None or not same(state, last[0]):
            last = self._last[name] = state, state if kept is None else kept(state)
        return last[1]

    def _read_numpy(self) -> Any:
        """Look at the memory of the generator first: to ask for its state takes as long as all the rest."""
        raw, last = _memory_of_numpy(), self._last.get("numpy")
        # With a normal number put by, the next one leaves the memory as it is.
        if raw is not None and last is not None and raw == last[0] and not last[1][3]:
            return last[1]
        state = np.random.get_state()
        if last is None or not _same_numpy(state, last[1]):
            last = self._last["numpy"] = raw, state
        return last[1]


def write(streams: Streams) -> None:
    """Put the streams back to a state."""
    for name, state in streams.items():
        if name == "torch":
            torch.default_generator.set_state(state)
        elif name == "numpy":
            np.random.set_state(state)
        elif name == "python":
            version, words, gauss = state
            random.setstate((version, tuple(words.tolist()), gauss))
        elif torch.cuda.is_available():
            torch.cuda.default_generators[int(name.partition(":")[2])].set_state(state)


def _same_numpy(one: Any, other: Any) -> bool:
    return bool(one[0] == other[0] and one[2:] == other[2:] and np.array_equal(one[1], other[1]))


def _compact(state: Any) -> Any:
    version, words, gauss = state
    return version, np.array(words, np.uint32), gauss


def _memory_of_numpy() -> bytes | None:
    """Return what numpy's generator holds beside a normal number that is put by; None where that is not known."""
    generator = getattr(np.random, "get_bit_generator", lambda: None)()
    if type(generator) is not np.random.MT19937:
        return None
    return ctypes.string_at(generator.ctypes.state_address, _WORDS * 4 + 4)
