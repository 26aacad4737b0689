"""The part of a loss that is about the examples of one loader, where a step goes over several at once.

A term belongs to a loader if what it is called with changes with that loader's batch, and with no other's.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lightning_influence.objective.scale import NoLossError, TaskError, TermKey
from lightning_influence.objective.terms import BatchLoss, LossTerm, values_of

# Beyond rounding: of another order of the same sums.
_ALIKE = 1e-4


def own_part(loss: BatchLoss, own: Collection[TermKey]) -> BatchLoss:
    """Return some of the terms of a loss as a loss of its own.

    Raises:
        NoLossError: If the loss has none of them.
    """
    terms = tuple(term for term in loss.terms if term.key in own)
    if not terms:
        raise NoLossError(f"the loss of a batch has no term at {' or '.join(map(str, own))}")
    values = values_of(terms, loss.n, loss.loss.dtype)
    return replace(loss, loss=_sum(terms), terms=terms, remainder=False, values=values, partial=True)


def own_terms(
    losses: tuple[BatchLoss, BatchLoss, BatchLoss], loader: str, others: Sequence[str]
) -> set[TermKey] | None:
    """Tell which terms of a loss belong to a loader; None if all of it does.

    Args:
        losses: Of a batch, of one with other examples of the loader, and of one with others of all other loaders.
        loader: Name of the loader.
        others: Names of the other ones.

    Raises:
        TaskError: If some part of the loss depends on the loader and on others, or on the loader by no known call.
    """
    first, of_own, of_others = losses
    with_own, with_others = _changed(first, of_own), _changed(first, of_others)
    if not _differ(first.loss, of_others.loss) and with_own >= {term.key for term in first.seen}:
        return None
    own, seen = with_own - with_others, ", ".join(map(repr, others))
    way_out = (
        f"In `training_step`, call the loss for {loader!r} on its own, or pass `task=`, a function (module, batch) -> "
        f"the loss of the examples in {_code(loader)} alone."
    )
    if mixed := with_own & with_others:
        raise TaskError(
            f"loader={loader!r}: what {next(iter(mixed))} is called with depends on examples of this loader and of "
            f"others ({seen}), so that no part of the loss is theirs alone. {way_out}"
        )
    if _differ(*(each.loss.detach() - _sum(_of(each, own)) for each in (first, of_own))):
        raise TaskError(
            f"loader={loader!r}: part of the loss depends on its examples, and is no known loss call, so that it can't "
            f"be told from that of the other loaders ({seen}). {way_out}"
        )
    if not own:
        raise TaskError(f"loader={loader!r}: the loss does not depend on its examples, but on those of {seen}.")
    return own


def _code(loader: str) -> str:
    return "batch" + "".join(f"[{key}]" if key.isdigit() else f'["{key}"]' for key in loader.split("/"))


def _of(loss: BatchLoss, keys: Collection[TermKey]) -> list[LossTerm]:
    return [term for term in loss.seen if term.key in keys]


def _sum(terms: Sequence[LossTerm]) -> Tensor:
    return torch.stack([(term.coefficient * term.call.output).sum() for term in terms] or [torch.zeros(())]).sum()


def _changed(before: BatchLoss, after: BatchLoss) -> set[TermKey]:
    """Return the terms that one of two batches lacks, or that are called with something else, or weigh otherwise."""
    then, now = ({term.key: term for term in loss.seen} for loss in (before, after))
    found = set(then.keys() ^ now.keys())
    for key in then.keys() & now.keys():
        held = [(t.call.input, t.call.target, t.call.elements(), t.coefficient) for t in (then[key], now[key])]
        if any(_differ(a, b) for a, b in zip(*held, strict=True)):
            found.add(key)
    return found


def _differ(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return True
    a, b = a.detach().double(), b.detach().double()
    return not torch.allclose(a, b, rtol=_ALIKE, atol=_ALIKE * float(a.abs().max() if a.numel() else 0), equal_nan=True)
