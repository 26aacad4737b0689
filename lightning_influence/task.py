"""What training minimises, read off the user's own code.

A task runs the loss of one batch. ``TrainingStepTask`` is the user's ``training_step`` itself; anything callable
as ``task(module, batch) -> loss`` can take its place. While it runs, a tap watches for known loss calls, so that
per-example losses, predictions and Fisher labels need no code from the user.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _pop_mode, _push_mode

from lightning_influence.losses import LossCall, known_loss, read_call


class TaskError(RuntimeError):
    """The loss of a batch can't be understood; the message says what was seen and the way out."""


class Task(Protocol):
    """The loss of one batch, for models whose ``training_step`` can't serve (manual optimisation, exotic losses).

    Any function with this signature will do. The batch has been moved to the module's device. Each example's loss
    must depend on that example only.

    Example:
        >>> def task(module, batch):
        ...     images, labels = batch
        ...     return torch.nn.functional.cross_entropy(module(images), labels)
    """

    def __call__(self, module: Any, batch: Any) -> Tensor:
        """Return the mean loss of the batch (scalar) or one loss per example (``[n]``)."""
        ...


class TrainingStepTask:
    """The user's own ``training_step`` as the task, with its logging muted.

    Metrics, buffers, modes and random streams are the business of ``isolation.untouched``, which every extra pass
    runs under.
    """

    def __call__(self, module: Any, batch: Any) -> Tensor:
        """Run ``module.training_step(batch, 0)`` and return its loss.

        Raises:
            TaskError: If there is no ``training_step`` that takes a batch, or it returns no loss.
        """
        step = getattr(module, "training_step", None)
        if step is None:
            raise TaskError(
                f"{type(module).__name__} has no `training_step` to take the loss from; pass `task=`, a function "
                "(module, batch) -> loss."
            )
        signature = inspect.getfullargspec(step)
        if "dataloader_iter" in signature.args:
            raise TaskError(
                "`training_step(dataloader_iter)` fetches its own batches, so a given batch can't be run again; "
                "pass `task=`, a function (module, batch) -> loss."
            )
        # The trainer's own rule: a batch index is passed, by position, where a second positional argument can take it.
        own = signature.args[1:] if inspect.ismethod(step) else signature.args
        takes_index = len(own) >= 2 or signature.varargs is not None
        with _muted(module):
            result = step(batch, 0) if takes_index else step(batch)
        if isinstance(result, Mapping):
            result = result.get("loss")
        if not isinstance(result, Tensor):
            raise TaskError(
                f"`training_step` returned {type(result).__name__} instead of a loss tensor (or a dict with the key "
                "'loss'); return the loss, or pass `task=`, a function (module, batch) -> loss."
            )
        return result


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
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if self._listening and known_loss(func):
            call = read_call(func, args, kwargs, output)
            if call is not None and call.output.requires_grad:
                self.calls.append(call)
                return output.clone() if self._protect else output
        return output


@dataclass(frozen=True, eq=False)
class LossTerm:
    """One tapped call and how it enters the batch loss.

    Attributes:
        call: The tapped call.
        coefficient: Derivative of the batch loss with respect to what the call returned.
        reference: See ``LossCall.scale``; None takes the batch's own.
    """

    call: LossCall
    coefficient: Tensor
    reference: float | None = None

    def scale(self, n: int) -> Tensor:
        """Return the weight of each element in its example's own loss."""
        return self.call.scale(self.coefficient, n, self.reference)

    def correction(self, n: int) -> float:
        """Return the reference scale over the batch's own."""
        if self.reference is None or self.call.reduction == "none":
            return 1.0
        own = self.call.batch_reference(n)
        return self.reference / own if self.call.reduction == "sum" else own / self.reference


@dataclass(frozen=True, eq=False)
class BatchLoss:
    """The loss of one batch and what the tap saw of it.

    Attributes:
        loss: The batch loss, in the graph.
        n: Number of examples in the batch.
        terms: The known calls that the loss is made of; empty if none was seen.
        remainder: Whether the loss has a part besides the terms that depends on what the terms depend on or has a
            value of its own (an untapped loss, a penalty).
        values: Per-example losses ``[n]`` if the task returned them or the terms tell them, else None.
    """

    loss: Tensor
    n: int
    terms: tuple[LossTerm, ...]
    remainder: bool
    values: Tensor | None

    @property
    def tapped(self) -> bool:
        """Whether the known calls account for the whole loss."""
        return bool(self.terms) and not self.remainder

    @property
    def primary(self) -> LossCall | None:
        """The call that predictions and margins are read from: the first."""
        return self.terms[0].call if self.terms else None

    def true_outputs(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return tensors and gradients to run backward from, for the gradients of every example's own loss.

        Starting from the terms instead of the batch loss puts the reference scale in place of the batch's own.
        """
        if not self.tapped:
            return [self.loss], [torch.full_like(self.loss, float(self.n))]
        outputs = [term.call.output for term in self.terms]
        return outputs, [term.coefficient * (self.n * term.correction(self.n)) for term in self.terms]

    def sampled_outputs(self, noise: Callable[[tuple[int, ...]], Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return logits and gradients for labels sampled from the model, independently for each term.

        Args:
            noise: Given the shape for one example, returns uniform numbers ``[n, *shape]``, fresh at each call.
        """
        inputs, gradients = [], []
        for term in self.terms:
            shape = term.call.noise_shape(self.n)
            inputs.append(term.call.input)
            gradients.append(_like(term.call.sampled_gradient(term.scale(self.n), noise(shape)), term.call.input))
        return inputs, gradients

    def exact_draws(self) -> int | None:
        """Return the number of backward passes of ``exact_outputs``, or None if there is no closed form."""
        draws = [term.call.exact_draws(self.n) for term in self.terms]
        return sum(d for d in draws if d is not None) if draws and None not in draws else None

    def exact_outputs(self) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
        """Yield logits and gradients whose outer products add up to the exact Fisher (GGN) of every example."""
        for term in self.terms:
            for column in term.call.exact_gradients(term.scale(self.n), self.n):
                yield [term.call.input], [_like(column, term.call.input)]


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


def evaluate(
    task: Task,
    module: nn.Module,
    batch: Any,
    n: int,
    references: Mapping[int, float] | None = None,
) -> BatchLoss:
    """Run ``task`` on one batch under the tap.

    Args:
        task: The task.
        module: The user's module.
        batch: One batch of ``n`` examples, on the module's device.
        n: Number of examples in the batch.
        references: For terms whose scale depends on the batch (class weights, ``ignore_index``, sums): term number
            to the value for the whole training set, see ``LossCall.scale``. With None, every term is scaled such that
            the batch loss is the mean over this very batch.

    Returns:
        The loss and its known terms.

    Raises:
        TaskError: If the loss has the wrong shape or does not depend on the model.
    """
    with LossTap(protect=True) as tap:
        loss = task(module, batch)
    values: Tensor | None = None
    if loss.ndim == 1 and loss.shape[0] == n:
        values, loss = loss.detach(), loss.mean()
    if loss.numel() != 1:
        raise TaskError(
            f"the loss of a batch of {n} examples has the shape {tuple(loss.shape)}; expected a scalar (their mean), "
            f"or [{n}] from a `task=`."
        )
    loss = loss.reshape(())
    if not loss.requires_grad:
        raise TaskError(
            "the loss does not depend on any layer that is understood (nn.Linear, nn.Conv2d with trainable "
            "parameters): nothing to attribute. Was it computed under `torch.no_grad()` or from detached tensors?"
        )
    calls = [call for call in tap.calls if call.rows_match(n)]
    coefficients = (
        torch.autograd.grad(loss, [call.output for call in calls], retain_graph=True, allow_unused=True)
        if calls
        else ()
    )
    used = [(call, c) for call, c in zip(calls, coefficients, strict=True) if c is not None]
    terms = tuple(
        LossTerm(call, c, None if references is None else references.get(k, call.natural_reference(n)))
        for k, (call, c) in enumerate(used)
    )
    with torch.no_grad():
        explained = sum((float((term.coefficient * term.call.output).sum()) for term in terms), 0.0)
        total = float(loss)
        if math.isfinite(total) and math.isfinite(explained):
            remainder = abs(total - explained) > 1e-4 * max(abs(total), abs(explained), 1e-8)
        else:  # explained if the known calls are non-finite themselves
            remainder = math.isfinite(explained)
        if terms and not remainder:
            parts = [term.call.per_example(term.call.elements() * term.scale(n), n) for term in terms]
            values = torch.stack([part.to(loss.dtype) for part in parts]).sum(0)
    return BatchLoss(loss, n, terms, remainder, values)


@contextmanager
def _muted(module: Any) -> Iterator[None]:
    """Replace ``log`` and ``log_dict`` on the instance: Lightning refuses them outside its own loops."""
    names = ("log", "log_dict")
    own = {name: module.__dict__[name] for name in names if name in module.__dict__}
    try:
        for name in names:
            module.__dict__[name] = _ignore
        yield
    finally:
        for name in names:
            del module.__dict__[name]
        module.__dict__.update(own)


def _ignore(*args: Any, **kwargs: Any) -> None:
    return None


def _like(gradient: Tensor, tensor: Tensor) -> Tensor:
    return gradient.to(tensor.dtype)
