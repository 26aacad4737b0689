"""One pass over the data, and many that look at it: what somebody else wants to know costs no pass of its own."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lightning_influence.core import distributed
from lightning_influence.core.memory import is_out_of_memory
from lightning_influence.core.precision import wide
from lightning_influence.gradients.capture import LayerIO
from lightning_influence.gradients.passes import BatchGradients, ExampleGradients, Labels
from lightning_influence.objective.terms import BatchLoss

# Numbers that rows on their way to the host may hold on the device.
_LEAVING = 2**22


class Visitor:
    """Looks at the batches of a pass: at each as a whole, at its layers one by one, and at the whole again.

    Memory may run out anywhere on the way. The batch then begins anew, in halves: what was found in it so far is
    forgotten with ``begin``, and only ``keep`` and ``file`` change what counts, once for every example.

    What it has found it gathers over processes once, when it is asked after the pass.
    """

    def begin(self, batch: BatchGradients) -> None:
        """Take note of a batch whose layers come next."""

    def add(self, io: LayerIO) -> None:
        """Look at a layer; its memory is free afterwards."""

    def keep(self, io: LayerIO) -> None:
        """Add a layer to sums over all examples: in place, and after all that takes memory."""

    def end(self, batch: BatchGradients) -> None:
        """Take note that all layers of the batch have been there."""

    def file(self) -> None:
        """File what has come of the batch, which does not come again."""


class Guest(Visitor):
    """A visitor that must not spoil the pass of others: it leaves with its first error.

    With several processes it raises: the others would wait for this one at the next collective. Of memory that runs
    out it is the last to be told: a smaller batch may do.

    Attributes:
        error: Why it has left.
    """

    def __init__(self, visitor: Visitor) -> None:
        self._visitor = visitor
        self._halves = False  # whether the batch at hand has any
        self.error: Exception | None = None

    def begin(self, batch: BatchGradients) -> None:
        """Hand the batch on."""
        self._halves = len(batch.indices) > 1
        self._try("begin", batch)

    def add(self, io: LayerIO) -> None:
        """Hand the layer on."""
        self._try("add", io)

    def keep(self, io: LayerIO) -> None:
        """Hand the layer on."""
        self._try("keep", io)

    def end(self, batch: BatchGradients) -> None:
        """Hand the batch on."""
        self._try("end", batch)

    def file(self) -> None:
        """Hand it on."""
        self._try("file")

    def leave(self, error: Exception) -> None:
        """Leave a pass that has not come to its end."""
        self.error = self.error or error

    def _try(self, what: str, *seen: BatchGradients | LayerIO) -> None:
        if self.error is not None:
            return
        try:
            getattr(self._visitor, what)(*seen)
        except Exception as error:
            if distributed.world_size() > 1 or (self._halves and is_out_of_memory(error)):
                raise
            self.error = error


def visit(
    gradients: ExampleGradients,
    indices: Sequence[int],
    visitors: Sequence[Visitor],
    labels: Labels = "true",
    *,
    draw: int = 0,
    title: str = "",
    everywhere: bool = False,
) -> None:
    """Let visitors look at every batch of one pass, see ``ExampleGradients.run``."""
    run = gradients.run(indices, labels, draw=draw, title=title, everywhere=everywhere)
    with closing(run) as batches:
        for batch in batches:
            with batch.attempt:
                _look(batch, visitors)


def _look(batch: BatchGradients, visitors: Sequence[Visitor]) -> None:
    """Let visitors look at a batch, or at a part of one that some of them have seen much of."""
    for visitor in visitors:
        visitor.begin(batch)
    for io in batch.drained():
        for number, visitor in enumerate(visitors):
            visitor.add(io)
            batch.attempt.once((number, io.name), partial(visitor.keep, io))
    for visitor in visitors:
        visitor.end(batch)
    for number, visitor in enumerate(visitors):
        batch.attempt.once(number, visitor.file)


@dataclass(frozen=True, eq=False)
class ExampleScores:
    """Scores of a set of examples, sorted by dataset index; but for the features the same on every process.

    Attributes:
        indices: Dataset indices ``[n]``.
        columns: Column name to ``[n]``; NaN (or -1) where the loss or a gradient is non-finite.
        features: Inputs of the last layer ``[n, d]`` (mean over positions), if asked for; on other ranks than zero
            ``[0, d]``.
    """

    indices: Tensor
    columns: dict[str, Tensor]
    features: Tensor | None

    def __repr__(self) -> str:
        return f"ExampleScores({len(self.indices):,} examples: {', '.join(self.columns)})"


class ExampleColumns:
    """Columns of numbers by example, put together over batches and, once, over processes.

    There is room for all from the start: a few numbers of each batch, kept between the large tensors that come and go
    with it, would break the heap into pieces that never return to the system (2.9 GB for 50,000 examples of a CNN).
    Rows of many numbers (features) leave the device.

    Args:
        indices: The examples of all processes.
        device: Where the columns are.
        shared: Whether each process has its ``share`` of them; else it may have any.
    """

    def __init__(self, indices: Sequence[int], device: torch.device, *, shared: bool = True) -> None:
        self._size = len(distributed.share(indices) if shared else indices)
        self._device = device
        self._kept = array("q")
        self._columns: dict[str, Tensor] = {}
        self._leaving: dict[str, list[tuple[int, int, Tensor]]] = {}  # rows by place, still on the device

    def add(self, indices: Sequence[int], columns: Mapping[str, Tensor]) -> None:
        """Add the rows of a batch; what some batches do not tell is NaN, False or -1 there."""
        # Before anything counts: it takes memory, and the batch may come again.
        if sum(values.numel() for rows in self._leaving.values() for *_, values in rows) > _LEAVING:
            self._leave()
        start, end = len(self._kept), len(self._kept) + len(indices)
        for name, values in columns.items():
            if name not in self._columns:
                place = self._device if values.ndim == 1 else torch.device("cpu")
                self._columns[name] = _unknown(torch.empty_like(values, device=place), self._size)
            column = self._columns[name]
            if column.device == values.device:
                column[start:end] = values.detach()
            else:
                self._leaving.setdefault(name, []).append((start, end, values.detach()))
        self._kept.extend(indices)

    def _leave(self) -> None:
        """Copy rows to the host, which waits for the device meanwhile: those of many batches at a time."""
        for name, rows in self._leaving.items():
            copied = torch.cat([values for *_, values in rows]).to(self._columns[name].device)
            places = [place for start, end, _ in rows for place in range(start, end)]
            self._columns[name][places] = copied
        self._leaving = {}

    @property
    def complete(self) -> bool:
        """Whether every process has seen all the examples that are its."""
        return not distributed.any_process(len(self._kept) < self._size)

    def gathered(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Return dataset indices ``[n]``, sorted, and the columns ``[n, ...]``, the same on every process.

        But for ``features``, which take memory: those go to rank zero, and are ``[0, d]`` on the others.
        """
        self._leave()
        # Collate functions leave examples out.
        columns = {name: values[: len(self._kept)] for name, values in self._columns.items()}
        if distributed.any_process(not columns):  # which doesn't know what the others have
            for layout in distributed.gather_objects({n: (v.dtype, v.shape[1:]) for n, v in columns.items()}):
                for name, (dtype, shape) in layout.items():
                    like = torch.zeros((0, *shape), dtype=dtype, device=self._device)
                    columns.setdefault(name, _unknown(like, len(self._kept)))
        kept = torch.tensor(self._kept, dtype=torch.long, device=self._device)
        features = {name: columns.pop(name) for name in ("features",) if name in columns}
        found, gathered = distributed.gather_by_index(kept, columns)
        if features:
            gathered |= distributed.gather_by_index(kept, features, everywhere=False)[1]
        return found, gathered


class LossColumns(Visitor):
    """Notes what the loss tells of every example, see ``loss_columns``."""

    def __init__(self, indices: Sequence[int], device: torch.device) -> None:
        self.columns = ExampleColumns(indices, device)

    def end(self, batch: BatchGradients) -> None:
        """Look at the loss."""
        self._found = batch.indices, loss_columns(batch.loss)

    def file(self) -> None:
        """File the batch."""
        self.columns.add(*self._found)


def in_order(indices: Sequence[int], found: Tensor, values: Tensor) -> Tensor:
    """Return the rows of examples, given those of the sorted indices that were ``found``; unknown ones as NaN or -1."""
    wanted = torch.as_tensor(list(indices), dtype=torch.long, device=found.device)
    result, known = _unknown(values, len(wanted)), torch.isin(wanted, found)
    result[known] = values[torch.searchsorted(found, wanted[known])]
    return result


def loss_columns(loss: BatchLoss) -> dict[str, Tensor]:
    """Return what a batch tells without gradients: ``loss``, and where there are classes ``predicted``, ``label``."""
    row = {} if loss.values is None else {"loss": wide(loss.values.detach())}
    return row | ({} if loss.primary is None else loss.primary.decided(loss.n))


def _unknown(like: Tensor, size: int) -> Tensor:
    """Return a column of which nothing is known."""
    fill = torch.nan if like.is_floating_point() else False if like.dtype == torch.bool else -1
    return like.new_full((size, *like.shape[1:]), fill)
