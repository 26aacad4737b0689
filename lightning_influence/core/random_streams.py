"""Random streams: those of the process and those that objects hold, read, put back and seeded in one way."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch

GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)


class Stream(NamedTuple):
    """What can be done with a random stream of any kind.

    Attributes:
        read: Returns its state, in memory of its own.
        write: Puts it back to a state.
        seed: Starts it anew.
    """

    read: Callable[[], Any]
    write: Callable[[Any], Any]
    seed: Callable[[int], Any]


def stream_of(generator: Any) -> Stream:
    """Return the stream of one of ``GENERATORS``."""
    if isinstance(generator, random.Random):
        return Stream(generator.getstate, generator.setstate, generator.seed)
    if isinstance(generator, torch.Generator):
        return Stream(generator.get_state, generator.set_state, generator.manual_seed)
    if isinstance(generator, np.random.RandomState):
        return Stream(
            lambda: generator.get_state(legacy=False), generator.set_state, lambda seed: generator.seed(seed % 2**32)
        )
    bits = generator.bit_generator

    def write(state: Any) -> None:
        bits.state = state

    return Stream(lambda: bits.state, write, lambda seed: write(type(bits)(seed).state))


def _of_process() -> Iterator[Stream]:
    """Yield the streams of Python, NumPy and torch (CPU and every initialised accelerator)."""
    yield Stream(random.getstate, random.setstate, random.seed)
    yield Stream(np.random.get_state, np.random.set_state, lambda seed: np.random.seed(seed % 2**32))
    # Not `torch.manual_seed`, which formats a stack trace for an accelerator that may not be there: 0.4 ms each time.
    yield stream_of(torch.default_generator)
    if torch.cuda.is_initialized():
        yield from map(stream_of, torch.cuda.default_generators)
    if torch.backends.mps.is_available():
        yield Stream(torch.mps.get_rng_state, torch.mps.set_rng_state, torch.mps.manual_seed)


@contextmanager
def isolated_rng() -> Iterator[None]:
    """Restore the random streams of the process."""
    before = [(stream, stream.read()) for stream in _of_process()]
    try:
        yield
    finally:
        for stream, state in before:
            stream.write(state)


def seed_everything(seed: int) -> None:
    """Seed the random streams of the process; use under ``isolated_rng``."""
    for stream in _of_process():
        stream.seed(seed)


class OwnStreams:
    """Random streams of someone who draws in turns with the process: a context that goes on where it was left.

    Args:
        seed: Where they begin.
    """

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed
        self._states: list[Any] = []
        self._before: list[tuple[Stream, Any]] = []

    def __enter__(self) -> None:
        self._before = [(stream, stream.read()) for stream in _of_process()]
        if len(self._states) != len(self._before):
            seed_everything(self._seed)
            return
        for (stream, _), state in zip(self._before, self._states, strict=True):
            stream.write(state)

    def __exit__(self, *_: object) -> None:
        self._states = [stream.read() for stream, _ in self._before]
        for stream, state in self._before:
            stream.write(state)
