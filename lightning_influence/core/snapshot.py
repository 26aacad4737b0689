"""State that can be put back: all that an extra pass over the data can change, noted before and compared afterwards.

Contents are put back in place: the same objects in the same places, so that aliases stay aliases and views stay views.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_influence.core.origin import is_stream
from lightning_influence.core.random_streams import GENERATORS
from lightning_influence.core.reachable import BUFFERS, SHARED, Found
from lightning_influence.core.states import Contents, State, TensorState, ValueState, values_in
from lightning_influence.core.torch_private import shard_of

# Tensors and arrays of data beyond this are left alone; others beyond that are watched, not copied.
_LARGE, _HUGE = 2**20, 2**28
_EMPTY: tuple[Any, ...] = ([], (), range(0), {}, set(), "", b"")
_ITERATORS: Any = (itertools.count, itertools.cycle, *(type(iter(empty)) for empty in _EMPTY))
_OF_A_STEP = "Pass `task=` (`loss=` of `Influence`), a function (module, batch) -> loss that leaves it alone."
_OF_DATA = "Let the data set return the same for an index whatever it has returned before."
# After so many batches, or examples, it is known what moves.
_SURE = 3


class StateError(RuntimeError):
    """Something that an extra pass has changed can't be put back; the message names it and the way out."""


class Snapshot:
    """The state of some objects and of all that they reach, to be put back.

    Iterators and tensors with a graph know no way back: copies take their places until ``restore``. Of generators and
    iterators of data loaders there are no copies: taking from them is an error.

    Args:
        reached: What they reach, see ``reachable.Walk``.
        data: Whether these are data: what is large is then left alone, as data sets hold what they never write to.

    Attributes:
        changed: Paths of what was found changed so far.
        shared: Paths of what other processes share.
    """

    def __init__(self, reached: Iterable[Found], *, data: bool = False) -> None:
        self.changed: dict[str, None] = {}
        self.shared: set[str] = set()
        self._states: list[State] = []
        self._moving: dict[int, State] = {}  # found changed at least once
        self._one_way: list[Contents] = []
        self._batches = 0
        self._way_out = _OF_DATA if data else _OF_A_STEP
        with torch.inference_mode(False), torch.no_grad():
            for found in reached:
                self._note(found, data)
            self._hand_out_copies()

    def _note(self, found: Found, data: bool) -> None:
        value = found.value
        if isinstance(value, SHARED) or (
            isinstance(value, Tensor)
            and value.device.type == "cpu"
            and value.layout == torch.strided  # others have no storage of their own
            and value.is_shared()
        ):
            self.shared.add(found.path)
        if found.slots is not None:
            contents = Contents(found, found.slots)
            self._states.append(contents)
            if not isinstance(contents.kept, set) and any(map(_is_one_way, values_in(contents.kept))):
                self._one_way.append(contents)
        elif isinstance(value, Tensor):
            if (shard := shard_of(value)) is not None:
                value, found = shard, replace(found, value=shard)
            size = value.numel() * value.element_size()
            if not (is_lazy(value) or value.is_meta or (size > _LARGE and data)):
                self._states.append(TensorState(found, copied=size <= _HUGE or isinstance(value, nn.Parameter)))
        elif isinstance(value, (*GENERATORS, *BUFFERS)) or (
            isinstance(value, np.ndarray) and not (isinstance(value, np.memmap) or (value.nbytes > _LARGE and data))
        ):
            self._states.append(ValueState(found))

    def rewind(self, *, numbers: bool = False) -> None:
        """Put back what changes, at the start of a batch: each of them starts where training stands.

        After the first batch all is compared, later on only what has been seen to change.

        Args:
            numbers: Whether to put back only numbers, tensors and arrays (a counter), not what has been filled (a
                cache) or opened.
        """
        if self._batches:
            self._put_back(list(self._moving.values()) if self._batches > 1 else self._states, numbers=numbers)
            if not numbers:
                self._hand_out_copies()
        self._batches += 1

    @property
    def moves_memory(self) -> bool:
        """Whether rewinding may overwrite tensors or arrays, and with them their views."""
        return self._batches < _SURE or any(not isinstance(state, Contents) for state in self._moving.values())

    def restore(self) -> None:
        """Compare everything and put back what has changed.

        Raises:
            StateError: If something can't be.
        """
        try:
            self._put_back(self._states)
        finally:
            for contents in self._one_way:
                contents.restore()

    def _put_back(self, states: list[State], *, numbers: bool = False) -> None:
        if not states:  # before nearly every example
            return
        lost: list[str] = []
        with torch.inference_mode(False), torch.no_grad():
            for state in states:
                changed = state.changed()
                if not changed:
                    continue
                self._moving[id(state)] = state
                if not state.expected:
                    self.changed |= dict.fromkeys(changed)
                try:
                    restored = state.restore(numbers=numbers)
                except (RuntimeError, ValueError, BufferError):  # read-only, or entries that share memory
                    restored = False  # and those after it are still to be put back
                if not restored:
                    lost += changed
        if lost:
            raise StateError(
                f"an extra pass over the data has changed {', '.join(lost)}, and it can't be put back (it is large, "
                f"read-only, or a view). {self._way_out}"
            )

    def _hand_out_copies(self) -> None:
        copies: dict[int, Any] = {}

        def copied(value: Any) -> Any:
            if not _is_one_way(value):
                return value
            if id(value) not in copies:
                copyable = isinstance(value, (Tensor, *_ITERATORS))
                copies[id(value)] = _copy(value) if copyable else _Stream(value, self._way_out)
            return copies[id(value)]

        for contents in self._one_way:
            contents.hand_out(copied)


def _is_one_way(value: Any) -> bool:
    return value.grad_fn is not None if isinstance(value, Tensor) else isinstance(value, _ITERATORS) or is_stream(value)


class _Stream(Iterator[Any]):
    """Stands in for an iterator that nothing may be taken from: what is taken would be missing in training."""

    def __init__(self, stream: Any, way_out: str) -> None:
        self._stream = stream
        self._way_out = way_out

    def __next__(self) -> Any:
        raise StateError(
            f"an extra pass over the data would take from a {type(self._stream).__name__}, which can't be put back: "
            f"training would miss that. {self._way_out}"
        )

    send = __next__

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    try:
        return copy.deepcopy(value) if isinstance(value, itertools.cycle) else copy.copy(value)
    except Exception:  # an iterator over something of the user's own
        return value
