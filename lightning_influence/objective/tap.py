"""Taps that hear the loss calls of a step."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode, _pop_mode, _push_mode

from lightning_influence.objective.losses import CrossEntropy, LossCall, all_arguments, known_loss, read_call
from lightning_influence.objective.scale import Place, calling_place


class LossTap(TorchFunctionMode):
    """Watches for known loss calls while it is active.

    Args:
        protect: Hand the caller a copy of what the loss returned, as ``loss *= 0.5`` would else change what the tap
            holds. Left out in training itself, where nothing may be touched.

    Attributes:
        calls: The calls seen so far whose input takes part in a gradient, in order.
    """

    def __init__(self, *, protect: bool = False) -> None:
        super().__init__()
        self.calls: list[LossCall] = []
        self._listening = True
        self._protect = protect

    def stop(self) -> None:
        """Stop listening and leave the stack of modes, from the middle if need be.

        For taps that are entered and left in different hooks: others may have entered modes of their own since.
        """
        if not self._listening:
            return
        self._listening = False
        above: list[TorchFunctionMode] = []
        while torch._C._len_torch_function_stack():
            mode = _pop_mode()
            if mode is self:
                break
            above.append(mode)
        for mode in reversed(above):
            _push_mode(mode)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run the call unchanged and take note of it."""
        if not known_loss(func):  # nearly all of them, in every training step
            return func(*args, **(kwargs or {}))
        kwargs = all_arguments(func, kwargs or {})
        output = func(*args, **kwargs)
        if self._listening:
            call = read_call(func, args, kwargs, output)
            if call is not None and call.output.requires_grad and call.in_graph:
                self.calls.append(replace(call, place=calling_place()))
                return output.clone() if self._protect else output
        return output


def calls_in(loss: Tensor, calls: Sequence[LossCall]) -> list[LossCall]:
    """Return the calls that a loss is made of, leaving out those that were only logged.

    Walks the graph from the loss to the calls' outputs and no further; nothing in it is run.
    """
    nodes = {call.output.grad_fn: call for call in calls}
    found: set[int] = set()
    waiting = [loss.grad_fn]
    seen = {loss.grad_fn}
    while waiting and len(found) < len(calls):
        node = waiting.pop()
        if node is None:
            continue
        if node in nodes:
            found.add(id(nodes[node]))
            continue
        ahead = [following for following, _ in node.next_functions if following not in seen]
        seen.update(ahead)
        waiting.extend(ahead)
    return [call for call in calls if id(call) in found]


class TrainingTap(LossTap):
    """A loss tap for one training batch after another, which reads a call as the last one if only its tensors differ.

    Stopped at first, see ``start``.
    """

    def __init__(self) -> None:
        super().__init__()
        self._listening = False
        self._noted: list[tuple[tuple[Any, ...], dict[str, Any], Tensor, Place]] = []  # calls that are not read yet
        self._last: tuple[list[str], list[Any], CrossEntropy] | None = None  # names and values of arguments

    def start(self) -> None:
        """Listen to a batch."""
        self.forget()
        self._listening = True
        self.__enter__()

    def forget(self) -> None:
        """Let go of what was heard: it holds the graph of the batch."""
        self.calls, self._noted = [], []

    def taken(self) -> list[LossCall]:
        """Return the calls and forget them: they hold the graph of the batch."""
        self._read_noted()
        calls, self.calls = self.calls, []
        return calls

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the call unchanged and take note of it."""
        if not known_loss(func):  # nearly all of them, in every training step
            return func(*args, **kwargs) if kwargs else func(*args)
        if func is not F.cross_entropy:
            self._read_noted()
            return super().__torch_function__(func, types, args, kwargs)
        output = func(*args, **(kwargs or {}))
        if self._listening and output.requires_grad:
            self._noted.append((args, kwargs or {}, output, calling_place()))
        return output

    def _read_noted(self) -> None:
        noted, self._noted = self._noted, []
        self.calls += [call for entry in noted if (call := self._read(*entry)) is not None]

    def _read(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor, place: Place) -> LossCall | None:
        """Read a cross-entropy, whose settings are nearly always those of the batch before."""
        last, values = self._last, list(kwargs.values())
        if last is not None and len(args) == 2 and last[0] == list(kwargs) and all(map(operator.is_, values, last[1])):
            like = last[2]
            call: LossCall | None = CrossEntropy(
                output,
                *args,
                like.reduction,
                class_weights=like.class_weights,
                ignore_index=like.ignore_index,
                label_smoothing=like.label_smoothing,
                place=place,
            )
        else:
            call = read_call(F.cross_entropy, args, kwargs, output)
            call = None if call is None else replace(call, place=place)
            if isinstance(call, CrossEntropy) and len(args) == 2:
                empty = output.new_empty(0)  # the batch would else be held
                self._last = list(kwargs), values, replace(call, output=empty, input=empty, target=empty)
        return call if call is not None and call.in_graph else None
