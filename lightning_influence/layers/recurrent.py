"""Recurrent layers, step by step: torch's own functions run all steps in one call, in which nothing can be watched.

What they are replaced by makes the same numbers (up to rounding) by calls of ``F.linear``: one for the inputs of all
steps, one for the state of every step. A weight is then one that is shared over time, like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_influence.core.torch_private import filled_rows, packed_rows

State: TypeAlias = "tuple[Tensor, ...]"
"""Hidden state ``[n, o]``, and the cell's ``[n, o]`` of an LSTM."""
Watched: TypeAlias = "Callable[[], AbstractContextManager[Any]]"
_Step: TypeAlias = "Callable[[Tensor, State, _Weights], State]"


@dataclass(frozen=True)
class _Weights:
    """Those of one layer in one direction."""

    input: Tensor
    hidden: Tensor
    input_bias: Tensor | None = None
    hidden_bias: Tensor | None = None
    projection: Tensor | None = None

    def of_input(self, x: Tensor) -> Tensor:
        return F.linear(x, self.input, self.input_bias)

    def of_hidden(self, h: Tensor) -> Tensor:
        return F.linear(h, self.hidden, self.hidden_bias)


def _lstm_step(x: Tensor, state: State, weights: _Weights) -> State:
    into, forget, new, out = (x + weights.of_hidden(state[0])).chunk(4, -1)
    cell = forget.sigmoid() * state[1] + into.sigmoid() * new.tanh()
    hidden = out.sigmoid() * cell.tanh()
    return hidden if weights.projection is None else F.linear(hidden, weights.projection), cell


def _gru_step(x: Tensor, state: State, weights: _Weights) -> State:
    (hidden,) = state
    x_reset, x_update, x_new = x.chunk(3, -1)
    h_reset, h_update, h_new = weights.of_hidden(hidden).chunk(3, -1)
    new = (x_new + (x_reset + h_reset).sigmoid() * h_new).tanh()
    return (new + (x_update + h_update).sigmoid() * (hidden - new),)


def _tanh_step(x: Tensor, state: State, weights: _Weights) -> State:
    return ((x + weights.of_hidden(state[0])).tanh(),)


def _relu_step(x: Tensor, state: State, weights: _Weights) -> State:
    return ((x + weights.of_hidden(state[0])).relu(),)


_STEPS: dict[str, _Step] = {"lstm": _lstm_step, "gru": _gru_step, "rnn_tanh": _tanh_step, "rnn_relu": _relu_step}
_LAYERS: dict[Callable[..., Any], _Step] = {getattr(torch, name): step for name, step in _STEPS.items()}
_CELLS: dict[Callable[..., Any], _Step] = {getattr(torch, f"{name}_cell"): step for name, step in _STEPS.items()}


class Recurrent:
    """Runs recurrent functions in steps, and remembers how the sequences of a forward pass were packed.

    A packed sequence holds rows sorted by length. Only where torch itself has sorted them (``enforce_sorted=False``) is
    it known which row is whose; others are left to torch.

    Attributes:
        steps: Id of a weight of such a layer to the number of steps that its call has been run in.
    """

    def __init__(self) -> None:
        self.steps: dict[int, int] = {}
        # What was put in order, kept alive, along which dimension, and the order.
        self._orders: dict[int, tuple[Tensor, int, Tensor]] = {}
        self._packed: dict[int, tuple[Tensor, Tensor]] = {}  # sizes of steps, kept alive, and the order

    def note(self, function: Callable[..., Any], args: Sequence[Any], output: Any) -> None:
        """Look at a finished call: sorting and packing are what matters."""
        if function == Tensor.index_select and len(args) == 3:
            self._orders[id(output)] = output, args[1] % output.ndim, args[2]
        elif function == packed_rows and id(args[0]) in self._orders:
            rows, dim, order = self._orders[id(args[0])]
            batch = 0 if args[2] else 1
            # Users select, too: features, steps, some of the rows, or one more than once.
            if dim == batch and order.sort().values.equal(torch.arange(rows.shape[batch], device=order.device)):
                self._packed[id(output[1])] = output[1], order

    def in_steps(
        self, function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], watched: Watched
    ) -> Any:
        """Return what a recurrent function returns, by calls that are watched; None for anything else.

        Args:
            function: Of torch.
            args: Its positional arguments.
            kwargs: Its keyword arguments.
            watched: Makes a context in which calls are watched.

        Returns:
            None also for dropout between layers: it would draw other numbers than training.
        """
        if kwargs:
            return None
        if function in _CELLS:
            with watched():
                return _cell(_CELLS[function], *args)
        if function not in _LAYERS or len(args) != 9:
            return None
        packed = isinstance(args[4], bool)
        layers, dropout, training = args[5:8] if packed else args[4:7]
        if dropout and training and layers > 1:
            return None
        if packed and id(args[1]) not in self._packed:
            return None
        length = len(args[1]) if packed else args[0].shape[1 if args[8] else 0]
        steps = length * layers * (2 if args[-1 if packed else -2] else 1)
        self.steps.update((id(weight), steps) for weight in args[3 if packed else 2])
        if not packed:
            with watched():
                return _layers(function, *args)
        return _of_packed(function, self._packed[id(args[1])][1], watched, *args)


def _of_packed(
    function: Callable[..., Any],
    order: Tensor,
    watched: Watched,
    data: Tensor,
    sizes: Tensor,
    states: Any,
    *settings: Any,
) -> tuple[Tensor, ...]:
    """Run packed sequences, filled up and in the order of the batch."""
    back = order.argsort()
    filled, lengths = filled_rows(data, sizes, False, 0.0, len(sizes))
    first = states if isinstance(states, (tuple, list)) else (states,)
    first = tuple(state.index_select(1, back) for state in first)
    own = lengths.to(data.device)[back]
    with watched():
        found, *last = partial(_layers, lengths=own)(function, filled.index_select(1, back), first, *settings)
    rows, _ = packed_rows(found.index_select(1, order), lengths, False)
    return rows, *(state.index_select(1, order) for state in last)


def _cell(step: _Step, x: Tensor, states: Any, *weights: Tensor | None) -> Any:
    own = _Weights(*weights)  # type: ignore[arg-type]
    state = tuple(states) if isinstance(states, (tuple, list)) else (states,)
    found = step(own.of_input(x), state, own)
    return found if len(found) > 1 else found[0]


def _layers(
    function: Callable[..., Any],
    x: Tensor,
    states: Any,
    parameters: Sequence[Tensor],
    biases: bool,
    layers: int,
    dropout: float,
    training: bool,
    bidirectional: bool,
    batch_first: bool = False,
    lengths: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Return the states of the last layer at all steps, and the last states of all layers, ``[layers, n, o]``."""
    directions, time = (2 if bidirectional else 1), (1 if batch_first else 0)
    first = states if isinstance(states, (tuple, list)) else (states,)
    weights = _grouped(parameters, biases, layers * directions)
    last: list[State] = []
    for layer in range(layers):
        sides = []
        for direction in range(directions):
            number = layer * directions + direction
            own, state = next(weights), tuple(state[number] for state in first)
            side, state = _steps(_LAYERS[function], x, state, own, time, lengths, backwards=direction == 1)
            sides.append(side)
            last.append(state)
        x = torch.cat(sides, -1) if bidirectional else sides[0]
    return x, *(torch.stack(column) for column in zip(*last, strict=True))


def _steps(
    step: _Step, x: Tensor, state: State, weights: _Weights, time: int, lengths: Tensor | None, *, backwards: bool
) -> tuple[Tensor, State]:
    """Run one layer in one direction; beyond its length an example keeps its state, and what comes out is zero."""
    inputs = weights.of_input(x).unbind(time)
    outputs: list[Tensor] = [inputs[0]] * len(inputs)
    for number in reversed(range(len(inputs))) if backwards else range(len(inputs)):
        after = step(inputs[number], state, weights)
        if lengths is None:
            state, outputs[number] = after, after[0]
        else:
            there = (lengths > number).unsqueeze(1)
            state = tuple(torch.where(there, new, old) for new, old in zip(after, state, strict=True))
            outputs[number] = torch.where(there, after[0], 0)
    return torch.stack(outputs, time), state


def _grouped(parameters: Sequence[Tensor], biases: bool, groups: int) -> Iterator[_Weights]:
    size = len(parameters) // groups
    for start in range(0, len(parameters), size):
        own = list(parameters[start : start + size])
        bias: list[Any] = own[2:4] if biases else [None, None]
        yield _Weights(own[0], own[1], bias[0], bias[1], own[-1] if size % 2 else None)
