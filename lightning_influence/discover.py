"""Finding out what a model does with its parameters, from one tiny batch of its own data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from lightning_influence.coverage import Coverage, Layers, Uncovered, cover
from lightning_influence.isolation import hidden_parameters, rewind, seed_everything, untouched
from lightning_influence.snapshot import StateError
from lightning_influence.source import ExampleSource
from lightning_influence.task import Task, run_tapped
from lightning_influence.terms import BatchLoss, TaskError, term_forms, understand
from lightning_influence.trace import ShapeRecorder, Trace, Tracer


def discover(
    module: nn.Module,
    task: Task,
    source: ExampleSource,
    *,
    indices: Sequence[int] | None = None,
    layers: Layers = None,
    uncovered: Uncovered = "report",
    to_device: Callable[[Any], Any] = lambda batch: batch,
    forward_context: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Coverage:
    """Trace a model on one tiny batch and find the parameters whose per-example gradients are understood.

    Args:
        module: The model.
        task: Its loss.
        source: Its examples.
        indices: The first few of them are run, by default of all.
        layers: What to keep, see ``layers.cover``.
        uncovered: ``"report"`` leaves other parameters out, with the reason; ``"exact"`` computes their gradients one
            example at a time.
        to_device: Moves a batch to the module's device.
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
    to_device: Callable[[Any], Any] = lambda batch: batch,
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
        to_device: Moves a batch to the module's device.
        forward_context: Wraps the forward passes (a Trainer's precision).

    Returns:
        The trace; its ``failure`` says why if the model can't be run so.
    """
    if not indices:
        return Trace(failure="there are no examples")
    parameters = [p for p in module.parameters() if p.is_floating_point()]
    hidden = hidden_parameters(module)
    try:
        with untouched(module, task):
            for parameter in parameters:
                parameter.requires_grad_(True)

            def run(watch: ShapeRecorder | Tracer, indices: list[int]) -> BatchLoss | None:
                ((_, batch),) = source.batches(indices, len(indices))
                rewind()
                seed_everything(0)
                with forward_context(), watch:
                    loss, calls = run_tapped(task, module, to_device(batch))
                try:
                    return understand(loss, calls, len(indices))
                except TaskError:  # raised again by the first pass
                    return None

            # Examples that happen to have equal rows leave their order open: others are tried then.
            for start, size in ((0, 2), (2, 3), (5, 4)) if not whole else ((0, len(indices)),):
                chosen = list(indices) if whole else source.steady(indices, start, size)
                recorder = ShapeRecorder()
                small = run(recorder, chosen)
                tracer = Tracer(parameters, recorder.calls, (size, size + 1), hidden)
                large = run(tracer, [*chosen, chosen[0]])
                if small is not None and large is not None:
                    tracer.trace.forms = term_forms(small, large)
                if not tracer.trace.ambiguous:
                    break
    except (torch.OutOfMemoryError, StateError):
        raise
    # Whatever goes wrong in a user's step on a tiny batch: layers used in the standard way are understood without.
    except Exception as error:
        return Trace(failure=f"{type(error).__name__}: {error}")
    return tracer.trace
