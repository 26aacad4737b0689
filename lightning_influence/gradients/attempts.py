"""Batches that memory does not suffice for: they come again in halves, and no pass is lost to them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from itertools import pairwise
from types import TracebackType
from typing import Any

from lightning_influence.core.memory import is_out_of_memory, let_go
from lightning_influence.data.source import ExampleSource


class RoomError(MemoryError):
    """Memory does not suffice for as few examples as it takes; the message gives the way out."""

    @classmethod
    def of(cls, error: BaseException, size: int) -> RoomError:
        """Return what to say of memory that has run out with so few examples."""
        few = "a single example" if size == 1 else f"{size} examples, which is as few as it takes"
        return cls(
            f"memory has run out with {few} ({(str(error) or type(error).__name__).splitlines()[0]}). Free some "
            "(another process on the device, a second model), cover fewer layers (`layers=`), take a curvature that "
            'keeps less (`curvature="diagonal"`), or audit a checkpoint of the run on a larger device or the CPU.'
        )


class Attempt:
    """Takes a batch in as a whole or not at all, so that it can come again in halves if memory runs out.

    Whoever looks at the batches of a pass does so within it, and changes what counts last. Sums over all examples that
    are too large to be kept apart until then are added up part by part: ``through`` tells which parts have been.

    Attributes:
        apart: Whether batches may be halved at all.
        size: Number of examples of the batch at hand.
        short: Whether memory has run out for it.
        again: Whether it is to come again in halves, for that reason or another.
        through: Marks of what has been done for good with the examples of the batch at hand.

    Example:
        >>> attempt = Attempt()
        >>> for indices, loss in passes.losses(examples, attempt=attempt):
        ...     with attempt:
        ...         columns.add(indices, loss_columns(loss))
    """

    def __init__(self, apart: bool = True) -> None:
        self.apart = apart
        self.size = 0
        self.short = self.again = False
        self.through: set[Hashable] = set()

    def begin(self, size: int, through: Iterable[Hashable] = ()) -> None:
        """Turn to a batch, or to a part of one that much has been done with already."""
        self.size, self.short, self.again, self.through = size, False, False, set(through)

    def once(self, mark: Hashable, change: Callable[[], object]) -> None:
        """Make a change unless it has been made with the examples of the batch at hand."""
        if mark not in self.through:
            change()
            self.through.add(mark)

    def __enter__(self) -> Attempt:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> bool:
        if not self.apart or error is None or isinstance(error, RoomError) or not is_out_of_memory(error):
            return False
        if self.size <= 1:
            raise RoomError.of(error, 1) from error
        self.short = self.again = True
        return True


def in_halves(
    source: ExampleSource, batches: Iterable[tuple[list[int], Any]], attempt: Attempt, most: int | None = None
) -> Iterator[tuple[list[int], Any]]:
    """Yield batches; those that are to come again do so in halves, and where memory ran out, so do all that follow.

    Args:
        source: The examples; it is told how many there is room for, see ``data.room``.
        batches: Of the source.
        attempt: At the batch that was yielded last.
        most: Examples that there is room for, as far as is known.
    """
    for whole in batches:
        waiting = [(*whole, frozenset[Hashable]())]
        while waiting:
            chosen, batch, through = waiting.pop()
            if most is None or len(chosen) <= most:
                attempt.begin(len(chosen), through)
                yield chosen, batch
                if not attempt.again:
                    continue
                through = frozenset(attempt.through)
                size = (len(chosen) + 1) // 2
                if attempt.short:
                    most = size
                    source.room.shrink(len(chosen), size)
                    source.pass_batch_size = min(source.pass_batch_size, size)
                    del batch
                    let_go()
            else:
                size = most
            count = -(-len(chosen) // size)  # as equal as they can be: steps may not take a single example
            ends = [len(chosen) * part // count for part in range(count + 1)]
            parts = [chosen[start:end] for start, end in pairwise(ends)]
            waiting += [(*made, through) for part in reversed(parts) for made in source.batches(part, len(part))]
