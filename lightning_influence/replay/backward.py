"""Back through all steps of a run: the derivative of numbers at its end by the weight of every training example.

States are known at some steps; between two of these the training is run again, and its steps are then taken backwards.

Index legend: ``q`` queries, ``n`` training examples.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_influence.core import memory
from lightning_influence.replay.optimizers import rule_of, slots_of
from lightning_influence.replay.record import ReplayError, StepInput, TrainingRecord
from lightning_influence.replay.step import Cotangents, StepDerivative

Segment = Callable[[int, int], Iterable[StepInput]]
"""Yields the steps from one to before another, in their order: ``Rerun.segment``."""
_TIMED = 3
_COARSE = ("16-true", "bf16-true")


@dataclass(frozen=True)
class Cost:
    """What a replay takes, told after a few steps of it.

    Attributes:
        steps: Number of steps of the run.
        step: Seconds that a step takes to go back through.
        rerun: Seconds that it takes to run again.
    """

    steps: int
    step: float
    rerun: float

    @property
    def seconds(self) -> float:
        """Seconds in all."""
        return self.steps * (self.step + self.rerun)

    def __str__(self) -> str:
        """Return it as a person reads it."""
        each = f"{self.steps:,} steps, {1e3 * (self.step + self.rerun):.3g} ms each"
        return f"{self.seconds:.3g} seconds ({each}, {1e3 * self.rerun:.3g} of them to run it again)"


def check_record(record: TrainingRecord) -> None:
    """Raise ``ReplayError`` for a run that can't be differentiated, before anything is computed."""
    recipe = record.recipe
    if recipe.precision in _COARSE:
        raise ReplayError(
            f"the run was made in precision {recipe.precision!r}, whose weights have too few digits to tell what one "
            "example does to them; train with '32-true' or 'bf16-mixed'."
        )
    for number, step in enumerate(record.steps):
        for group in step.groups:
            rule_of(recipe.optimizer, group)
        odd = [str(batch.loss) for batch in step.batches if batch.loss is not None and not math.isfinite(batch.loss)]
        if odd:
            raise ReplayError(
                f"the loss of step {number} was not finite ({', '.join(odd)}): "
                "nothing can be traced back through it. Train without that, or replay a run that ended before it."
            )
    if not record.states.keys() >= {0, len(record.steps)}:
        raise ReplayError(f"the states before the first and after the last of {len(record.steps)} steps are not kept.")


def example_derivatives(
    derivative: StepDerivative,
    record: TrainingRecord,
    segment: Segment,
    end: Cotangents,
    *,
    max_cost: float | None = None,
    told: Callable[[Cost], None] = lambda cost: None,
    advance: Callable[[int], None] = lambda steps: None,
) -> tuple[Tensor, Tensor]:
    """Return the examples of a run ``[n]``, and the derivatives of numbers at its end by their weights, ``[q, n]``.

    Args:
        derivative: Of a step.
        record: Of the run.
        segment: Runs a part of it again.
        end: Derivatives of the numbers by the state at the end.
        max_cost: Seconds that it may take.
        told: Called with the cost, after a few steps.
        advance: Called after each step.

    Raises:
        ReplayError: If the run can't be differentiated, does not fit into memory, or takes more than ``max_cost``.
    """
    check_record(record)
    check_memory(derivative.parameters, record, len(end))
    steps = len(record.steps)
    examples = examples_of(record)
    result = torch.zeros(len(end), len(examples), dtype=torch.float64)
    known = sorted(step for step in record.states if step <= steps)
    reached, taken, done = record.states[steps].parameters, 0.0, 0
    for start, stop in reversed(list(zip(known, known[1:], strict=False))):
        began = time.perf_counter()
        inputs = list(segment(start, stop))
        rerun = (time.perf_counter() - began) / (stop - start)
        while inputs:
            step, began = inputs.pop(), time.perf_counter()
            end, parts = derivative.pull(step, end, reached)
            for batch, part in zip(step.record.batches, parts, strict=True):
                # An example may be there more than once.
                columns = torch.searchsorted(examples, torch.as_tensor(batch.indices, dtype=torch.long))
                result.index_add_(1, columns, part.cpu().double())
            reached = step.state.parameters
            done += 1
            # The first step has more to set up than the others.
            taken += time.perf_counter() - began if 1 < done <= _TIMED else 0.0
            advance(1)
            if done == min(_TIMED, steps):
                cost = Cost(steps, taken / max(done - 1, 1), rerun)
                told(cost)
                if max_cost is not None and cost.seconds > max_cost:
                    raise ReplayError(
                        f"the replay would take {cost}, more than max_cost={max_cost:g}; allow more, or take fewer "
                        "queries: one takes least."
                    )
    if not bool(result.isfinite().all()):
        raise ReplayError(
            "the derivatives have overflowed on their way back: this training is too unstable to say what a single "
            "example did (a cooler learning rate helps)."
        )
    return examples, result


def examples_of(record: TrainingRecord) -> Tensor:
    """Return the dataset indices of the training examples, sorted: all of them, or those that were drawn of more."""
    drawn = {int(index) for step in record.steps for batch in step.batches for index in batch.indices}
    n = record.recipe.examples
    return torch.arange(n) if max(drawn, default=0) < n else torch.tensor(sorted(drawn))


def check_memory(parameters: Sequence[Tensor], record: TrainingRecord, queries: int) -> None:
    """Raise ``ReplayError`` if so many queries do not fit into memory."""
    recipe = record.recipe
    slots = max(len(slots_of(recipe.optimizer, group)) for group in record.steps[-1].groups)
    device = parameters[0].device
    weights = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
    known = sorted(record.states)
    longest = max(stop - start for start, stop in zip(known, known[1:], strict=False))
    states = weights * (1 + slots) * longest
    # Cotangents before and after the optimizer, and the gradient's; of several steps none.
    each = weights * (3 * (1 + slots) + 4)
    if not memory.fits(states + each * queries, device):
        available = memory.available_bytes(device) or 0
        most = max(int((available - states) // each), 0)
        raise ReplayError(
            f"{queries:,} queries take {memory.readable(each * queries)} of memory, the states of {longest} steps "
            f"{memory.readable(states)}, and {memory.readable(available)} are available; "
            + (f"take {most:,} queries at a time." if most else "record more states (a shorter distance between them).")
        )
