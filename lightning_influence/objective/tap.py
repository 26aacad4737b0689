"""Taps that hear the loss calls of a step."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_influence.core.torch_private import ahead_of, leave_mode, version
from lightning_influence.objective.handwritten import DECIDING, MOST, Decision, decision
from lightning_influence.objective.losses import LossCall, all_arguments, known_loss, read_call
from lightning_influence.objective.scale import calling_place


class Heard(list[LossCall]):
    """The known loss calls of a step, and what else may tell of a loss.

    Attributes:
        decisions: Of what the last softmaxes and sigmoids were taken.
    """

    def __init__(self) -> None:
        super().__init__()
        self.decisions: list[Decision] = []

    def decide(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note a call of one of ``DECIDING``."""
        found = decision(func, args, kwargs)
        if found is not None:
            self.decisions.append(Decision(*found, version(found[0]), calling_place(), len(self)))
            del self.decisions[:-MOST]


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
        self.calls = Heard()
        self._listening = True
        self._protect = protect

    def stop(self) -> None:
        """Stop listening and leave the stack of modes, from the middle if need be.

        For taps that are entered and left in different hooks: others may have entered modes of their own since.
        """
        if not self._listening:
            return
        self._listening = False
        leave_mode(self)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the call unchanged and take note of it."""
        if not known_loss(func):  # nearly all of them, in every training step
            output = func(*args, **(kwargs or {}))
            if func in DECIDING and self._listening:
                self.calls.decide(func, args, kwargs or {})
            return output
        kwargs = all_arguments(func, kwargs or {})
        output = func(*args, **kwargs)
        call = read_call(func, args, kwargs, output) if self._listening and output.requires_grad else None
        if call is None or not call.in_graph:
            return output
        self.calls.append(replace(call, place=calling_place()))
        return output.clone() if self._protect else output


class TrainingTap(LossTap):
    """A loss tap for one training batch after another. Stopped at first, see ``start``."""

    def __init__(self) -> None:
        super().__init__()
        self._listening = False

    def start(self) -> None:
        """Listen to a batch."""
        self.forget()
        self._listening = True
        self.__enter__()

    def forget(self) -> None:
        """Let go of what was heard: it holds the graph of the batch."""
        self.calls = Heard()

    def taken(self) -> Heard:
        """Return the calls and forget them: they hold the graph of the batch."""
        calls, self.calls = self.calls, Heard()
        return calls


def calls_in(loss: Tensor, calls: Sequence[LossCall]) -> list[LossCall]:
    """Return the calls that a loss is made of, leaving out those that were only logged."""
    nodes = {call.output.grad_fn for call in calls}
    found = {loss.grad_fn} & nodes
    for _, following, _ in edges_below(loss, nodes):
        found |= {following} & nodes
        if len(found) == len(nodes):
            break
    return [call for call in calls if call.output.grad_fn in found]


def edges_below(loss: Tensor, ends: Container[Any]) -> Iterator[tuple[Any, Any, int]]:
    """Yield the edges of a loss's graph: an operation, one that its inputs come from, and the number of that's output.

    Nothing in it is run.

    Args:
        loss: Where to start.
        ends: Operations to go no further than.
    """
    waiting: list[Any] = [loss.grad_fn]
    seen = {loss.grad_fn}
    while waiting:
        node = waiting.pop()
        for following, number in () if node is None or node in ends else ahead_of(node):
            if following is not None:
                yield node, following, number
                if following not in seen:
                    seen.add(following)
                    waiting.append(following)
