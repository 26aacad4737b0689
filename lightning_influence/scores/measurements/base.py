"""What a measurement is: a number that a model gives on a set of examples, and its gradient.

Most are a function of means over groups of examples (one group: the mean loss; two: a gap between them). Batches then
add to one sum for each group, so that the gradient of the whole set is exact whatever the batches were.

Index legend: ``n`` examples of a batch, ``c`` groups of examples, ``k, o, i`` a block's groups, outputs, inputs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple, TypeAlias

import torch
from torch import Tensor

from lightning_influence.core import distributed
from lightning_influence.core.precision import wide_zeros, working_dtype
from lightning_influence.gradients.attempts import Attempt, in_halves
from lightning_influence.gradients.capture import LayerIO
from lightning_influence.gradients.passes import BatchGradients, ExampleGradients
from lightning_influence.gradients.visitors import Visitor, visit
from lightning_influence.layers import per_sample
from lightning_influence.objective.terms import BatchLoss

QuerySets: TypeAlias = "Sequence[tuple[ExampleGradients, Sequence[int]]]"
"""Passes over the data of each set (one for every loader), and which of its examples to take."""


class MeasurementError(ValueError):
    """A measurement can't be made on these examples; the message says why and the way out."""


@dataclass(frozen=True, eq=False)
class Measured:
    """A measurement of a set of examples; the same on every process.

    Attributes:
        value: The number.
        gradient: Its gradient by block, ``[k, o, i]``; empty if not asked for.
        counts: Group to its number of examples.
        left_out: Number of examples with a non-finite value or gradient, which are no part of it.
    """

    value: float
    gradient: dict[str, Tensor]
    counts: dict[str, int]
    left_out: int = 0


class Measurement(ABC):
    """A number that a model gives on a set of examples."""

    higher_is_better: ClassVar[bool] = False
    """Whether training is meant to raise it, as a margin, rather than to lower it, as a loss."""

    @property
    @abstractmethod
    def name(self) -> str:
        """One word, for columns and tags."""

    @abstractmethod
    def measure(self, sets: QuerySets, *, gradient: bool = True) -> Measured:
        """Measure all sets as one.

        Args:
            sets: The examples. The passes are over one module, with one coverage.
            gradient: Whether to differentiate by the covered parameters.

        Raises:
            MeasurementError: If the measurement is not defined for these examples, is no finite number, or does not
                depend on the covered parameters.
        """

    def differentiated(self, sets: QuerySets, tensors: Sequence[Tensor]) -> tuple[float, list[Tensor]]:
        """Return the value and its derivatives by tensors that the model computes with, on this process alone.

        Args:
            sets: As for ``measure``.
            tensors: They require gradients; the model is isolated by who calls (``isolation.untouched``).

        Raises:
            MeasurementError: If the measurement is not defined for these examples, is no finite number, or has no such
                derivatives.
        """
        raise MeasurementError(
            f"{self.name} is known by its gradient in the covered parameters alone; a replay takes a function (module, "
            "batch) -> number, or a `Statistic`."
        )


class Statistic(Measurement):
    """A function of means, over groups of examples, of a value that every example has by itself."""

    per_query: ClassVar[bool] = False
    """Whether the value of one example alone is a measurement of the same kind."""

    @property
    def groups(self) -> tuple[str, ...]:
        """What the groups are, for errors."""
        return ("all",)

    @abstractmethod
    def values(self, loss: BatchLoss) -> Tensor | None:
        """Return the value of every example, ``[n]``, in the graph; None if only the loss of the batch is known."""

    def combined(self, means: Tensor) -> Tensor:
        """Return the measurement from the means ``[c]`` of the groups, differentiably."""
        return means[0]

    def assigned(self, queries: ExampleGradients, indices: Sequence[int]) -> Tensor | None:
        """Return the group of every example of the dataset, -1 for none; None if there is just one group."""
        return None

    def members(self, loss: BatchLoss, assigned: Tensor) -> Tensor:
        """Return the group of every example of a batch, ``[n]``, given what ``assigned`` says of them."""
        return assigned

    def altered(self, batch: Any, run: Callable[[Any], BatchLoss]) -> Any:
        """Return the batch to evaluate, see ``passes.Quantity``."""
        return batch

    def outputs(self, loss: BatchLoss) -> tuple[list[Tensor], list[Tensor]]:
        """Return where to run backward from, see ``passes.Quantity``."""
        values = self.values(loss)
        if values is None:
            return loss.true_outputs()
        return [values], [torch.ones_like(values)]

    def measure(self, sets: QuerySets, *, gradient: bool = True) -> Measured:
        """Measure all sets as one, batch by batch; processes share the examples."""
        # Before anything is computed: groups that can't be told, or are empty.
        assigned = [self.assigned(queries, indices) for queries, indices in sets]
        means = GroupMeans(self, sets[0][0], gradient=gradient)
        for (queries, indices), groups in zip(sets, assigned, strict=True):
            means.assigned, measuring = groups, queries.measuring(self)
            if gradient:
                visit(measuring, indices, [means], title=self.name)
                continue
            attempt = Attempt()
            with closing(measuring.losses(indices, attempt=attempt)) as losses:
                for found, loss in losses:
                    with attempt:
                        means.take(means.counted(loss, found))
        return means.result()

    def differentiated(self, sets: QuerySets, tensors: Sequence[Tensor]) -> tuple[float, list[Tensor]]:
        """Return value and derivatives, batch by batch: of the sum over each group, then of what is made of them."""
        assigned = [self.assigned(queries, indices) for queries, indices in sets]
        means = GroupMeans(self, sets[0][0], gradient=False)
        sums: list[list[Tensor]] = [[torch.zeros_like(tensor) for tensor in tensors] for _ in self.groups]
        for (queries, indices), groups in zip(sets, assigned, strict=True):
            means.assigned, measuring = groups, queries.measuring(self)
            attempt, source = Attempt(), queries.source
            for found, batch in in_halves(source, source.batches(indices), attempt):
                with attempt:
                    self._differentiate(measuring.forward(batch, len(found)), found, means, sums, tensors, attempt)
        value, _, weights = means.combined(*means.sums)
        return value, [
            torch.stack([w.to(part) * part for w, part in zip(weights, parts, strict=True)]).sum(0)
            for parts in zip(*sums, strict=True)
        ]

    def _differentiate(
        self,
        loss: BatchLoss,
        indices: list[int],
        means: GroupMeans,
        sums: list[list[Tensor]],
        tensors: Sequence[Tensor],
        attempt: Attempt,
    ) -> None:
        """Add the derivatives of a batch to those of the groups."""
        counted = means.counted(loss, indices)
        whole = len(sums) == 1 and bool(counted.inside.all())
        values = None if whole else self.values(loss)
        for number, (group, mask) in enumerate(zip(sums, counted.inside, strict=True)):
            if not whole and (values is None or not values.requires_grad):
                raise MeasurementError(f"{self.name}: some queries have no finite value; leave them out.")
            outputs, starts = self.outputs(loss) if values is None else ([values], [mask.to(values)])
            parts = torch.autograd.grad(outputs, tensors, starts, retain_graph=True, allow_unused=True)
            dense = [None if part is None else part.to_dense() if part.is_sparse else part for part in parts]
            attempt.once(number, partial(_add, group, dense))
        attempt.once("counted", partial(means.take, counted))


class Counted(NamedTuple):
    """What a batch adds to means over ``c`` groups.

    Attributes:
        inside: Which examples are in which group, ``[c, n]``.
        values: Sums of values, ``[c]``.
        counts: Numbers of examples, ``[c + 1]``; the last one: left out.
    """

    inside: Tensor
    values: Tensor
    counts: Tensor


class GroupMeans(Visitor):
    """Means of a statistic's values over groups of examples, and their gradients; what is not finite is left out.

    Args:
        statistic: The values, and the groups.
        queries: Passes over the model.
        gradient: Whether to add up gradients, too.

    Attributes:
        assigned: What the statistic says of the groups in the data set that is passed over.
    """

    def __init__(self, statistic: Statistic, queries: ExampleGradients, *, gradient: bool = True) -> None:
        self._statistic = statistic
        self.assigned: Tensor | None = None
        c = len(statistic.groups)
        like = next(p for p in queries.module.parameters() if p.is_floating_point())
        self._values = wide_zeros(c, like.device)
        self._counts = torch.zeros(c + 1, dtype=torch.int64, device=like.device)  # the last one: left out
        self._gradients = {
            name: torch.zeros((c, *block.shape), dtype=working_dtype(like.dtype), device=like.device)
            for name, block in queries.coverage.blocks.items()
            if gradient
        }
        self._masks: list[Tensor | None] = []

    def counted(self, loss: BatchLoss, indices: Sequence[int], finite: Tensor | None = None) -> Counted:
        """Return what a batch adds."""
        with torch.no_grad():
            values = self._statistic.values(loss)
            # Where only the batch loss is known, every example has the mean: the sum is right.
            values = loss.loss.detach().expand(loss.n) if values is None else values.detach()
            values = values.to(self._values)
            chosen = torch.as_tensor(indices)
            groups = torch.zeros(loss.n, dtype=torch.long) if self.assigned is None else self.assigned[chosen]
            groups = self._statistic.members(loss, groups.to(values.device))
        usable = values.isfinite() if finite is None else values.isfinite() & finite.to(values.device)
        inside = torch.arange(len(self._values), device=values.device).unsqueeze(1) == groups
        left_out = (inside.any(0) & ~usable).sum()
        inside &= usable
        counts = torch.cat([inside.sum(1), left_out.unsqueeze(0)])
        return Counted(inside, (inside * values.nan_to_num(0, 0, 0)).sum(1), counts)

    def take(self, counted: Counted) -> None:
        """Add the values of a batch."""
        self._values += counted.values
        self._counts += counted.counts

    def begin(self, batch: BatchGradients) -> None:
        """Look who is in which group."""
        self._counted = self.counted(batch.loss, batch.indices, batch.finite)
        inside = self._counted.inside
        self._masks = [None if whole else mask for mask, whole in zip(inside, inside.all(1).tolist(), strict=True)]

    def keep(self, io: LayerIO) -> None:
        """Add a layer's gradients."""
        # A gradient is linear in the activations, also where the rows of `g` are one-hot.
        parts = [
            per_sample.summed_gradient(io.x if mask is None else io.x * mask.to(io.x)[None, :, None, None], io.gs[0])
            for mask in self._masks
        ]
        _add(self._gradients[io.name], parts)

    def file(self) -> None:
        """Add the values of the batch."""
        self.take(self._counted)

    @property
    def sums(self) -> tuple[Tensor, Tensor]:
        """Sums of values ``[c]`` and counts ``[c + 1]`` of this process."""
        return self._values, self._counts

    def gathered(self) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return sums of values ``[c]``, counts ``[c + 1]`` and sums of gradients ``[c, k, o, i]`` of all processes."""
        values, counts, *gradients = distributed.sum_across_processes(
            [self._values, self._counts, *self._gradients.values()]
        )
        return values, counts, dict(zip(self._gradients, gradients, strict=True))

    def result(self) -> Measured:
        """Return the measurement of everything that was added, on all processes."""
        values, counts, gradients = self.gathered()
        value, sizes, weights = self.combined(values, counts)
        # c, ckoi -> koi
        summed = {block: torch.tensordot(weights.to(found), found, 1) for block, found in gradients.items()}
        if summed:
            check_gradient(self._statistic.name, summed)
        return Measured(value, summed, sizes, int(counts[-1]))

    def combined(self, values: Tensor, counts: Tensor) -> tuple[float, dict[str, int], Tensor]:
        """Return value, sizes of groups, and the derivative of the value by the sum over each group, ``[c]``."""
        name, left_out = self._statistic.name, int(counts[-1])
        sizes = dict(zip(self._statistic.groups, counts[:-1].tolist(), strict=True))
        check_sizes(name, sizes, f"; {left_out} are left out as not finite" if left_out else "")
        means = (values / counts[:-1]).requires_grad_(True)
        with torch.enable_grad():
            value = self._statistic.combined(means)
        (slopes,) = torch.autograd.grad(value, means)
        return float(value.detach()), sizes, slopes / counts[:-1]


def _add(totals: Iterable[Tensor], parts: Iterable[Tensor | None]) -> None:
    for total, part in zip(totals, parts, strict=True):
        if part is not None:
            total += part


def check_sizes(name: str, sizes: dict[str, int], more: str = "") -> None:
    """Raise ``MeasurementError`` if a group is empty."""
    empty = [group for group, size in sizes.items() if not size]
    if empty:
        listed = ", ".join(f"{group}: {size}" for group, size in sizes.items())
        raise MeasurementError(
            f"{name}: no example of the query set is in the group {' or '.join(map(repr, empty))} ({listed}{more}); "
            "take queries that have examples of every group."
        )


def check_gradient(name: str, gradient: dict[str, Tensor]) -> None:
    """Raise ``MeasurementError`` for a gradient that is exactly zero, or not finite."""
    if not all(bool(value.isfinite().all()) for value in gradient.values()):
        raise MeasurementError(f"{name}: its gradient is not finite; leave out the examples that make it so.")
    if not any(bool(value.any()) for value in gradient.values()):
        raise MeasurementError(
            f"{name} does not depend on the covered parameters ({', '.join(list(gradient)[:5])}): its gradient is "
            "exactly zero, and no training example has an influence on it. Compute it from the model's outputs, "
            "without `detach`, `no_grad`, `argmax` or rounding."
        )
