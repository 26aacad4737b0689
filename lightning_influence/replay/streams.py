"""Random streams of the process by name: read, as often as there are batches, and put back."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from lightning_influence.replay.record import Streams

_MERSENNE = "MT19937"


class StreamReader:
    """Reads all streams. A state that has not changed since the last time is the same object: it is kept once."""

    def __init__(self) -> None:
        self._last: dict[str, tuple[Any, Any]] = {}  # as it is read, and as it is kept

    def __call__(self) -> Streams:
        """Return the states of the streams."""
        found: dict[str, Any] = {}
        for name, (read, same, kept) in _READING.items():
            state, last = read(), self._last.get(name)
            if last is None or not same(state, last[0]):
                last = self._last[name] = state, kept(state)
            found[name] = last[1]
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            for device, generator in enumerate(torch.cuda.default_generators):
                name, state = f"cuda:{device}", generator.get_state()
                last = self._last.get(name)
                if last is None or not torch.equal(state, last[0]):
                    last = self._last[name] = state, state
                found[name] = last[1]
        return found


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
    return bool(one[2:] == other[2:] and one[0] == other[0] and np.array_equal(one[1], other[1]))


def _kept_python(state: Any) -> Any:
    version, words, gauss = state
    return version, np.array(words, np.uint32), gauss


_READING: dict[str, tuple[Callable[[], Any], Callable[[Any, Any], bool], Callable[[Any], Any]]] = {
    "torch": (torch.default_generator.get_state, torch.equal, lambda state: state),
    "numpy": (np.random.get_state, _same_numpy, lambda state: state),
    "python": (random.getstate, lambda one, other: bool(one == other), _kept_python),
}
