"""A batch that somebody has at hand, as examples by index."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

from lightning_influence.data.collation import DataError
from lightning_influence.data.rows import Row, described, joined, sizes_of
from lightning_influence.data.source import ExampleSource


class BatchSource(ExampleSource):
    """The examples of one batch, numbered from 0: parts of it are put together again as they were.

    Args:
        batch: What a training step takes.

    Raises:
        DataError: If there is no example in it.
    """

    def __init__(self, batch: Any) -> None:
        sizes = sizes_of(batch)
        # Tensors and lists have one entry for each example; the container of inputs and targets may be as long.
        size = max(sizes, key=lambda length: (sizes[length], length), default=0)
        if not size:
            raise DataError(
                f"the batch, {described(batch)}, holds no example; expected what `training_step` takes, a data set or "
                "a DataLoader."
            )
        self._rows = [Row(batch, place, size) for place in range(size)]
        super().__init__(self._rows, batch_size=size)

    def _batches(self, indices: Sequence[int], size: int) -> Generator[tuple[list[int], Any], None, None]:
        for start in range(0, len(indices), size):
            chosen = list(indices[start : start + size])
            yield chosen, joined([self._rows[index] for index in chosen])
