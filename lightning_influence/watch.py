"""Watching every call of a torch function, from the outside and from within attention."""

from __future__ import annotations

import operator
import types
from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Sequence
from dataclasses import replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_influence.calls import tensors_in
from lightning_influence.loss_scale import Place, calling_place
from lightning_influence.losses import CrossEntropy, LossCall, all_arguments, known_loss, read_call
from lightning_influence.reading import IN_PLACE
from lightning_influence.task import LossTap


class FunctionWatch(TorchFunctionMode, ABC):
    """Sees every call of a torch function while it is active, from the outside and from within attention."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run the call unchanged and look at it."""
        kwargs = all_arguments(func, kwargs or {})
        if func == F.multi_head_attention_forward:
            # Its linear maps are the layers. This copy does not ask the mode again, so the mode can see what it calls.
            with self:
                return visible_attention(*args, **kwargs)
        before: tuple[Any, ...] | None = None
        if func in IN_PLACE and any(id(tensor) in self.followed for tensor in tensors_in((args, kwargs))):
            before = (args[0].detach().clone(), *args[1:])
        output = func(*args, **kwargs)
        self.after(func, args, kwargs, output, before)
        return output

    @property
    @abstractmethod
    def followed(self) -> Container[int]:
        """Ids of the tensors to follow: what an in-place call with one of them overwrites is copied before."""

    @abstractmethod
    def after(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
        before: tuple[Any, ...] | None,
    ) -> None:
        """Look at a finished call.

        Args:
            func: The function.
            args: Its positional arguments.
            kwargs: Its keyword arguments.
            output: What it returned.
            before: The positional arguments with a copy of what the call has overwritten, if it has.
        """


class Reliance:
    """When the graph of a batch can be relied upon to tell what its calls did: then nothing has to watch them.

    To watch takes much longer than to read the graph. Once that has told of some batches in a row what was heard, it is
    relied upon; if it then fails to, or keeps disagreeing, it is not any more.
    """

    AGREEING = 16
    DISAGREEING = 64

    def __init__(self) -> None:
        self._agreed = 0
        self._disagreed = 0
        self._given_up = False

    @property
    def needs_watching(self) -> bool:
        """Whether the calls of the next batch have to be watched."""
        return self._given_up or self._agreed < self.AGREEING

    @property
    def given_up(self) -> bool:
        """Whether it is no use to compare any more."""
        return self._given_up

    def compared(self, agrees: bool) -> None:
        """Note whether the graph told what was heard."""
        self._agreed = self._agreed + 1 if agrees else 0
        self._disagreed += not agrees
        self._given_up = self._given_up or self._disagreed >= self.DISAGREEING

    def failed(self) -> None:
        """Note that the graph was relied upon, and told nothing."""
        self._given_up = True

    def doubted(self, batches: int) -> None:
        """Ask for so many more batches that agree."""
        self._agreed = min(self._agreed, self.AGREEING - batches)


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


# The function, with a `has_torch_function` of its own that says no: the calls that it makes can be watched.
visible_attention = types.FunctionType(
    F.multi_head_attention_forward.__code__,
    {**F.multi_head_attention_forward.__globals__, "has_torch_function": lambda arguments: False},
    "multi_head_attention_forward",
    F.multi_head_attention_forward.__defaults__,
)


def outputs_of(func: Callable[..., Any], args: Sequence[Any], output: Any) -> list[Tensor]:
    """Return the tensors that a call made or changed."""
    if func == Tensor.__setitem__:
        return [args[0]]
    return list(tensors_in(output))


def name_of(function: Callable[..., Any]) -> str:
    """Return the name that a torch function goes by in messages."""
    return getattr(function, "__name__", repr(function))
