"""One pass over the data, and many that look at it: what somebody else wants to know costs no pass of its own."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_influence.core import distributed
from lightning_influence.core.precision import wide
from lightning_influence.gradients.capture import LayerIO
from lightning_influence.gradients.passes import BatchGradients, ExampleGradients
from lightning_influence.objective.terms import BatchLoss


class Visitor:
    """Looks at the batches of a pass: at each as a whole, at its layers one by one, and at the whole again.

    What it has found it gathers over processes once, when it is asked after the pass.
    """

    def begin(self, batch: BatchGradients) -> None:
        """Take note of a batch whose layers come next."""

    def add(self, io: LayerIO) -> None:
        """Look at a layer; its memory is free afterwards."""

    def end(self, batch: BatchGradients) -> None:
        """Take note that all layers of the batch have been there."""


class Guest(Visitor):
    """A visitor that must not spoil the pass of others: it leaves with its first error.

    With several processes it raises: the others would wait for this one at the next collective.

    Attributes:
        error: Why it has left.
    """

    def __init__(self, visitor: Visitor) -> None:
        self._visitor = visitor
        self.error: Exception | None = None

    def begin(self, batch: BatchGradients) -> None:
        """Hand the batch on."""
        self._try("begin", batch)

    def add(self, io: LayerIO) -> None:
        """Hand the layer on."""
        self._try("add", io)

    def end(self, batch: BatchGradients) -> None:
        """Hand the batch on."""
        self._try("end", batch)

    def _try(self, what: str, seen: BatchGradients | LayerIO) -> None:
        if self.error is not None:
            return
        try:
            getattr(self._visitor, what)(seen)
        except Exception as error:
            if distributed.world_size() > 1:
                raise
            self.error = error


def visit(
    gradients: ExampleGradients,
    indices: Sequence[int],
    visitors: Sequence[Visitor],
    *,
    title: str = "",
    everywhere: bool = False,
) -> None:
    """Let visitors look at every batch of one pass, see ``ExampleGradients.run``."""
    with closing(gradients.run(indices, title=title, everywhere=everywhere)) as batches:
        for batch in batches:
            for visitor in visitors:
                visitor.begin(batch)
            for io in batch.drained():
                for visitor in visitors:
                    visitor.add(io)
            for visitor in visitors:
                visitor.end(batch)


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

    def add(self, indices: Sequence[int], columns: Mapping[str, Tensor]) -> None:
        """Add the rows of a batch; what some batches do not tell is NaN, False or -1 there."""
        start, end = len(self._kept), len(self._kept) + len(indices)
        for name, values in columns.items():
            if name not in self._columns:
                place = self._device if values.ndim == 1 else torch.device("cpu")
                self._columns[name] = _unknown(torch.empty_like(values, device=place), self._size)
            self._columns[name][start:end] = values.detach()
        self._kept.extend(indices)

    @property
    def complete(self) -> bool:
        """Whether every process has seen all the examples that are its."""
        return not distributed.any_process(len(self._kept) < self._size)

    def gathered(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Return dataset indices ``[n]``, sorted, and the columns ``[n, ...]``, the same on every process.

        But for ``features``, which take memory: those go to rank zero, and are ``[0, d]`` on the others.
        """
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
        """File the batch."""
        self.columns.add(batch.indices, loss_columns(batch.loss))


def in_order(indices: Sequence[int], found: Tensor, values: Tensor) -> Tensor:
    """Return the rows of examples, given those of the sorted indices that were ``found``; unknown ones as NaN or -1."""
    wanted = torch.as_tensor(list(indices), dtype=torch.long, device=found.device)
    result, known = _unknown(values, len(wanted)), torch.isin(wanted, found)
    result[known] = values[torch.searchsorted(found, wanted[known])]
    return result


def loss_columns(loss: BatchLoss) -> dict[str, Tensor]:
    """Return what a batch tells without gradients: ``loss``, and where there are classes ``predicted``, ``label``."""
    row = {} if loss.values is None else {"loss": wide(loss.values.detach())}
    statistics = {} if loss.primary is None else loss.primary.statistics(loss.n)
    return row | {name: statistics[name] for name in ("predicted", "label") if name in statistics}


def _unknown(like: Tensor, size: int) -> Tensor:
    """Return a column of which nothing is known."""
    fill = torch.nan if like.is_floating_point() else False if like.dtype == torch.bool else -1
    return like.new_full((size, *like.shape[1:]), fill)
