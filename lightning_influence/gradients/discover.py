"""Finding out what a model does with its parameters, from one tiny batch of its own data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lightning_influence.core.containers import mover
from lightning_influence.core.isolation import hidden_parameters, rewind, untouched
from lightning_influence.core.layout import BatchLayout, Order, find_layout
from lightning_influence.core.memory import is_out_of_memory
from lightning_influence.core.random_streams import seed_everything
from lightning_influence.core.snapshot import StateError
from lightning_influence.data.company import Company
from lightning_influence.data.source import DataError, ExampleSource
from lightning_influence.gradients.attempts import RoomError
from lightning_influence.gradients.coverage import Coverage, Layers, Uncovered, cover
from lightning_influence.gradients.trace import Trace
from lightning_influence.gradients.tracer import Tracer
from lightning_influence.layers.blocks import LayerError
from lightning_influence.objective.losses import LossCall
from lightning_influence.objective.own_part import OwnRows, own_terms
from lightning_influence.objective.scale import NoLossError, TermKey
from lightning_influence.objective.tap import Heard
from lightning_influence.objective.task import Task, TrainingStepTask, run_tapped
from lightning_influence.objective.terms import BatchLoss, LossTerm, TaskError, TermForm, understand


class TraceError(LayerError):
    """The model can't be run on a few examples, which is how its use of parameters is found out."""


def discover(
    module: nn.Module,
    task: Task,
    source: ExampleSource,
    *,
    indices: Sequence[int] | None = None,
    layers: Layers = None,
    uncovered: Uncovered = "report",
    to_device: Callable[[Any], Any] | None = None,
    forward_context: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Coverage:
    """Trace a model on one tiny batch and find the parameters whose per-example gradients are understood.

    Args:
        module: The model.
        task: Its loss.
        source: Its examples.
        indices: The first few of them are run, by default of all.
        layers: What to keep, see ``coverage.cover``.
        uncovered: ``"report"`` leaves other parameters out, with the reason; ``"exact"`` computes their gradients one
            example at a time.
        to_device: Moves a batch to the module's device; by default tensors in nested containers are moved.
        forward_context: Wraps the forward passes (a Trainer's precision).

    Returns:
        The coverage.

    Raises:
        LayerError: If nothing is covered, or an entry of ``layers`` matches nothing.
    """
    indices = range(len(source)) if indices is None else indices
    trace = trace_model(module, task, source, indices=indices, to_device=to_device, forward_context=forward_context)
    return cover(module, layers, trace=trace, uncovered=uncovered)


def trace_model(
    module: nn.Module,
    task: Task,
    source: ExampleSource,
    *,
    indices: Sequence[int],
    whole: bool = False,
    to_device: Callable[[Any], Any] | None = None,
    forward_context: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Trace:
    """Run a model on batches of two and of three examples and follow its parameters.

    The three are the two and a copy of the first: all lengths are those of the smaller batch, and rows that share
    a dimension with the examples can be told apart. All parameters are followed, as frozen ones may be trained later.

    Args:
        module: The model.
        task: Its loss.
        source: Its examples.
        indices: The first few of them are run.
        whole: Whether to run all of them as one batch instead.
        to_device: Moves a batch to the module's device; by default tensors in nested containers are moved.
        forward_context: Wraps the forward passes (a Trainer's precision).

    Returns:
        The trace; its ``failure`` says why if that can't be followed.

    Raises:
        NoLossError: If there is no loss for them.
        LayerError: If the model can't be run on two examples.
    """
    if not indices:
        return Trace(failure="there are no examples")
    parameters = {name: p for name, p in module.named_parameters() if p.is_floating_point()}
    hidden = hidden_parameters(module)

    moved = to_device or mover(module)

    def heard(batch: Any, watch: AbstractContextManager[Any]) -> tuple[Tensor, Heard]:
        rewind()
        seed_everything(0)
        with forward_context(), watch:
            return run_tapped(task, module, moved(batch))

    def run(watch: AbstractContextManager[Any], indices: list[int]) -> BatchLoss | None:
        loss, calls = heard(source.one_batch(indices), watch)
        try:
            return understand(loss, calls, len(indices))
        except TaskError:  # raised again by the first pass
            return None

    def with_own_terms(trace: Trace) -> Trace:
        company = source.company
        if company is not None and company.others:
            with _differentiated(module, task, parameters):
                trace.own = _own_terms(source, company, indices if whole else indices[:3], heard, task)
        return trace

    try:
        with _differentiated(module, task, parameters):
            # Examples that happen to have equal rows leave their order open: others are tried then.
            for start, size in ((0, 2), (2, 3), (5, 4)) if not whole else ((0, len(indices)),):
                chosen = list(indices) if whole else source.steady(indices, start, size)
                first = Tracer(parameters, (size, size + 1))
                small = run(first, chosen)
                tracer = Tracer(parameters, (size, size + 1), first.calls, hidden)
                large = run(tracer, [*chosen, chosen[0]])
                # Copies of one example say nothing of what the others do to its part of the loss.
                telling = len(set(chosen)) > 1 or len(indices) == 1
                if small is not None and large is not None and telling:
                    tracer.trace.forms = term_forms(small, large)
                if not tracer.trace.ambiguous:
                    break
    except (StateError, NoLossError):
        raise
    # Whatever goes wrong in a user's step on a tiny batch: its examples may still be run one at a time, as two copies.
    except Exception as error:
        # What the source itself refuses, it refuses for good; with a cause, it is what somebody's code made of a batch.
        refused = isinstance(error, DataError) and error.__cause__ is None
        if is_out_of_memory(error):
            raise RoomError.of(error, size + 1) from error
        if refused:
            raise
        failure = f"{type(error).__name__}: {error}"
        try:
            with untouched(module, task):
                run(nullcontext(), [indices[0]] * 2)
        except NoLossError:
            raise
        except Exception as second:
            if is_out_of_memory(second):
                raise RoomError.of(second, 2) from second
            raise TraceError(
                f"the model can't be run on two copies of an example ({type(second).__name__}: {second}), which is how "
                "its use of parameters is found out. Its step has to take batches of any size: a size that is written "
                "into the model has to come from its inputs."
            ) from error
        return with_own_terms(Trace(failure=failure))
    return with_own_terms(tracer.trace)


@contextmanager
def _differentiated(module: nn.Module, task: Task, parameters: Mapping[str, Tensor]) -> Iterator[None]:
    with untouched(module, task):
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        yield


def _own_terms(
    source: ExampleSource,
    company: Company,
    indices: Sequence[int],
    heard: Callable[..., tuple[Tensor, Heard]],
    task: Task,
) -> dict[TermKey, OwnRows] | None:
    """Return the terms of the loss that are about the examples of a source, see ``own_terms``; none of a single one."""
    *chosen, other = dict.fromkeys(indices)
    n = len(chosen)
    # A task is meant to be about the examples, whatever can't be seen of them or of the others.
    of_step = isinstance(task, TrainingStepTask)
    steady = company.steady if of_step else ()
    if not n:
        return {} if of_step else None
    tried = (chosen, chosen), ([other] * n, chosen), (chosen, [chosen[0] + 1] * n)
    first, of_own, of_others = (understand(*heard(source.one_batch(*each), nullcontext()), n) for each in tried)
    return own_terms((first, of_own, of_others), company.loader, company.others, steady)


def term_forms(small: BatchLoss, large: BatchLoss) -> dict[TermKey, TermForm]:
    """Tell from two tiny batches where the examples of every term are, and which terms are sums.

    Args:
        small: A batch, say of examples ``a, b``.
        large: The same examples and more, the last one a copy of the first: ``a, b, a``.

    Returns:
        The form of every term that both of them have.
    """
    forms: dict[TermKey, TermForm] = {}
    smaller = {term.key: term for term in small.seen}
    for after in large.seen:
        before = smaller.get(after.key)
        if before is None:
            continue
        call, pickings = after.call, (before.call.picking, after.call.picking)
        # A tensor that does not grow with the batch has no examples: rows looked up in it are the batch's own.
        follow = not (pickings[0] and pickings[1] and pickings[0].source == pickings[1].source)
        shapes = [
            term.call.element_shape if picking is None or not follow else picking.source
            for term, picking in zip((before, after), pickings, strict=True)
        ]
        layout = find_layout(shapes[0], shapes[1], (small.n, large.n))
        if layout is not None:
            # Rows side by side, also where there happens to be one per example here.
            layout = BatchLayout(layout.dim, _order(call, layout.dim, large.n, follow))
        steady = (
            before.factor is not None
            and after.factor is not None
            and math.isclose(before.factor, after.factor, rel_tol=1e-6)
        )
        elementwise = steady and _changes(before, after, small.n, large.n, layout, follow)
        sums = steady and not elementwise and call.reduction != "mean"
        forms[after.key] = TermForm(layout, sums, follow, elementwise)
    return forms


def _changes(
    before: LossTerm, after: LossTerm, small: int, large: int, layout: BatchLayout | None, follow: bool
) -> bool:
    """Tell whether the elements of the first example have other coefficients in the larger batch."""
    if after.call.reduction != "none" or layout is None:
        return False
    first = []
    for term, n in ((before, small), (after, large)):
        call = term.call.placed(layout, follow=follow)
        if not call.rows_match(n):
            return False
        first.append(call.shares(n).gather(call.per_row(call.scale(term.coefficient, n)))[0] / n)
    return first[0].shape == first[1].shape and not torch.allclose(first[0], first[1], rtol=1e-4, equal_nan=True)


def _order(call: LossCall, dim: int, n: int, follow: bool) -> Order:
    """Tell the order of rows: the losses of the first and the last example are those of copies."""
    orders: tuple[Order, Order] = ("major", "minor")
    alike: list[Order] = []
    for order in orders:
        placed = call.placed(BatchLayout(dim, order), follow=follow)
        if placed.rows_match(n):
            parts = placed.shares(n).gather(placed.per_row(placed.elements().detach()))
            if torch.allclose(parts[0], parts[-1], rtol=1e-3, atol=1e-6, equal_nan=True):
                alike.append(order)
    return alike[0] if len(alike) == 1 else "major"
