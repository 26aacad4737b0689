"""Measuring the loss scale of a set of examples, forward only."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import closing, suppress
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_influence.core import distributed
from lightning_influence.data.source import ExampleSource
from lightning_influence.objective.scale import LossScale, NoLossError, ScaleTally
from lightning_influence.objective.terms import BatchLoss, steady_terms

# What turns the values of a batch into numbers that Python can branch on, or into shapes.
_VALUE_READS = frozenset(
    ("__bool__", "__int__", "__float__", "__index__", "__complex__", "__contains__", "__array__", "item", "tolist")
    + ("numpy", "equal", "allclose", "is_nonzero", "nonzero", "argwhere", "masked_select", "unique")
    + ("unique_consecutive", "bincount", "repeat_interleave")
)


def measured_scale(
    losses: Callable[..., Generator[tuple[list[int], BatchLoss], None, None]],
    source: ExampleSource,
    indices: Sequence[int],
    of_mean: bool | None = None,
) -> LossScale:
    """Return the loss scale of examples, see ``ExampleGradients.calibrate``.

    All of them are visited, in batches as training has them, unless one batch tells for all: the data are plain
    tensors, so that all batches look alike, what the terms are divided by follows from shapes alone, and the task read
    no value that it could have branched on.

    Args:
        losses: ``ExampleGradients.losses`` of passes that weigh every batch on its own.
        source: The examples.
        indices: Of those to visit.
        of_mean: See ``ScaleTally.scale``.
    """
    size = source.batch_size
    if source.plain and len(indices) > size and of_mean is not False:
        watch, steady = _ValueReads(), None
        with suppress(NoLossError), closing(losses(indices[:size], everywhere=True, watch=lambda n: watch)) as first:
            _, loss = next(first)
            steady = steady_terms([(term.key, term.call, term.form) for term in loss.seen], loss.n)
        if steady is not None and not watch.seen:
            return LossScale(dict(steady))
    order = torch.randperm(len(indices), generator=torch.Generator().manual_seed(0)).tolist()
    ordered = list(indices) if source.sequential else [indices[place] for place in order]
    # The same batches, however many processes there are.
    own = distributed.share([ordered[start : start + size] for start in range(0, len(ordered), size)])
    visited, tally = [index for batch in own for index in batch], ScaleTally()
    with closing(losses(visited, title="loss scale", everywhere=True, size=size)) as batches:
        for _, loss in batches:
            tally.add(loss.n, {term.key: term.share(loss.n) for term in loss.terms})
    whole = ScaleTally()
    for part in distributed.gather_objects(tally):
        whole.merge(part)
    return whole.scale(size, of_mean=of_mean)


class _ValueReads(TorchFunctionMode):
    """Notices whether values of tensors are read: what a task does may then depend on them.

    Attributes:
        seen: Whether any were.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the call unchanged."""
        name = getattr(func, "__name__", "")
        self.seen |= name in _VALUE_READS or (name == "where" and len(args) == 1)
        if name == "__getitem__":
            key = args[1] if isinstance(args[1], tuple) else (args[1],)
            self.seen |= any(isinstance(part, Tensor) and part.dtype in (torch.bool, torch.uint8) for part in key)
        return func(*args, **(kwargs or {}))
