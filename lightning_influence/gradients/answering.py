"""Examples for which a step returns no loss, as guards against NaN do, or raises an error: left out, or named."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

from lightning_influence.core.errors import Forgiving, examples, told
from lightning_influence.data.source import ExampleSource
from lightning_influence.gradients.attempts import Attempt, in_halves
from lightning_influence.objective.scale import NoLossError, TaskError

_Loss = TypeVar("_Loss")

NO_LOSS = "the step returns no loss for it"


def answered(
    source: ExampleSource,
    indices: Sequence[int],
    size: int | None,
    forward: Callable[[Any, list[int]], _Loss],
    attempt: Attempt | None = None,
) -> Iterator[tuple[list[int], _Loss]]:
    """Yield batches with their losses; one without a loss is halved until it is known for which examples.

    Those are noted in ``source.missing``. Batches that memory does not suffice for come in halves, too.

    Args:
        source: The examples.
        indices: Which of them.
        size: Examples in a batch, as ``ExampleSource.batches`` has it.
        forward: Returns the loss of a batch, given the batch and its examples.
        attempt: Tells whether there was memory for what is done with them, and whether they may be halved at all.

    Raises:
        NoLossError: If there is no loss for any example, or for one of those that have to stay together.
        TaskError: If the task fails; it names the examples with which it does.
    """
    answers, error = False, None
    attempt = attempt or Attempt()
    most = source.room.most if size is None else None
    for chosen, batch in in_halves(source, source.batches(indices, size), attempt, most):
        found: list[_Loss] = []
        try:
            with attempt, told(partial(refusal, source, chosen, forward)):
                found.append(forward(batch, chosen))
        except NoLossError as raised:
            if not attempt.apart:
                raise
            error = raised.with_traceback(None)
            if len(chosen) == 1:
                source.missing[chosen[0]] = NO_LOSS
            attempt.again = len(chosen) > 1
        del batch
        if found:
            answers = True
            yield chosen, found.pop()
    if error is not None and not answers:
        raise error


def refusal(
    source: ExampleSource, chosen: list[int], forward: Callable[[Any, list[int]], Any], words: str
) -> TaskError:
    """Return what to say of a batch that a task fails with, by halves: the one example that it fails with, if it is."""

    def fails(part: list[int]) -> bool:
        with Forgiving():
            for own, batch in source.batches(part, len(part)):
                forward(batch, own)
            return False
        return True

    found, others_pass = chosen, False
    while len(found) > 1:
        half = len(found) // 2
        first, second = found[:half], found[half:]
        bad = [part for part in (first, second) if fails(part)]
        if not bad:  # it is how many they are, or what they are together
            break
        others_pass |= len(bad) == 1
        found = bad[0]
    # Where nothing passes any more (a device that has failed), none of them is to blame.
    which = examples(found if others_pass else chosen)
    return TaskError(
        f"the loss can't be computed on {which} ({words}): mend what the data hold there, or leave it out."
    )
