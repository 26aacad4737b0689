"""Examples for which a step returns no loss, as guards against NaN do: found, and left out of the passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from lightning_influence.data.source import ExampleSource
from lightning_influence.objective.scale import NoLossError

_Loss = TypeVar("_Loss")

NO_LOSS = "the step returns no loss for it"


def answered(
    source: ExampleSource,
    indices: Sequence[int],
    size: int | None,
    forward: Callable[[Any, list[int]], _Loss],
    *,
    apart: bool = True,
) -> Iterator[tuple[list[int], _Loss]]:
    """Yield batches with their losses; one without a loss is halved until it is known for which examples.

    Those are noted in ``source.missing``.

    Args:
        source: The examples.
        indices: Which of them.
        size: Examples in a batch, as ``ExampleSource.batches`` has it.
        forward: Returns the loss of a batch, given the batch and its examples.
        apart: Whether batches without a loss may be halved.

    Raises:
        NoLossError: If there is no loss for any example, or for one of those that have to stay together.
    """
    answers, error = False, None
    for whole in source.batches(indices, size):
        waiting = [whole]
        while waiting:
            chosen, batch = waiting.pop()
            try:
                loss = forward(batch, chosen)
            except NoLossError as raised:
                if not apart:
                    raise
                error = raised
                if len(chosen) == 1:
                    source.missing[chosen[0]] = NO_LOSS
                    continue
                half = len(chosen) // 2
                parts = (made for part in (chosen[:half], chosen[half:]) for made in source.batches(part, len(part)))
                waiting += reversed(list(parts))
            else:
                answers = True
                yield chosen, loss
    if error is not None and not answers:
        raise error
