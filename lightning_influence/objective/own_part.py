"""The part of a loss that is about the examples of one loader, where a step goes over several at once.

A term belongs to a loader if what it is called with changes with that loader's batch, and with no other's; or the first
or the last of its rows do, where batches are laid end to end (a replay buffer).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields, replace
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from lightning_influence.objective.losses import LossCall
from lightning_influence.objective.losses.shares import SIDE_BY_SIDE
from lightning_influence.objective.scale import NoLossError, TaskError, TermKey
from lightning_influence.objective.terms import BatchLoss, LossTerm, values_of

OwnRows: TypeAlias = Literal["all", "first", "last"]
"""Which rows of a term are those of the loader in question: as many as it has examples."""

# Beyond rounding: of another order of the same sums.
_ALIKE = 1e-4


def own_part(loss: BatchLoss, own: Mapping[TermKey, OwnRows]) -> BatchLoss:
    """Return some of the terms of a loss as a loss of its own.

    Raises:
        NoLossError: If the loss has none of them.
    """
    found = [_part(term, loss.n, own[term.key], loss.loss.dtype) for term in loss.terms if term.key in own]
    if not found:
        raise NoLossError("the loss of a batch has no term that is known to be about its examples")
    terms, values = tuple(term for term, _ in found), torch.stack([value for _, value in found]).sum(0)
    return replace(loss, loss=_sum(terms), terms=terms, remainder=False, values=values, partial=True)


def own_rows(call: LossCall, n: int, rows: OwnRows) -> LossCall:
    """Return a call for some of its rows: those of ``n`` examples of the loader in question."""
    if rows == "all":
        return call
    chosen = slice(n) if rows == "first" else slice(len(call.input) - n, None)
    return replace(call, input=call.input[chosen], target=call.target[chosen], layout=SIDE_BY_SIDE)


def _part(term: LossTerm, n: int, rows: OwnRows, dtype: torch.dtype) -> tuple[LossTerm, Tensor]:
    """Return a term for the rows of the loader in question, and the losses of its examples."""
    if rows == "all":
        return term, values_of([term], n, dtype)
    call = own_rows(term.call, n, rows)
    scale = term.scale(n).detach()
    if scale.ndim:
        scale = scale[:n] if rows == "first" else scale[len(scale) - n :]
    scaled = call.elements() * scale
    # What the task has added up holds others' rows, too: these are added up anew.
    mean = torch.full((), 1 / n, dtype=scaled.dtype, device=scaled.device)
    with torch.no_grad():
        values = call.per_example(scaled, n).to(dtype)
    return LossTerm(replace(call, output=scaled.sum()), mean, term.key), values


def own_terms(
    losses: tuple[BatchLoss, BatchLoss, BatchLoss], loader: str, others: Sequence[str], steady: Sequence[str] = ()
) -> dict[TermKey, OwnRows] | None:
    """Tell which terms of a loss belong to a loader; None if all of it does, and part of that is no known call.

    Args:
        losses: Of a batch, of one with other examples of the loader, and of one with others of all other loaders.
        loader: Name of the loader.
        others: Names of the other ones.
        steady: Those of a single example: nothing changes with it.

    Raises:
        TaskError: If some part of the loss depends on the loader and on others, or on the loader by no known call.
    """
    first, of_own, of_others = losses
    with_own, with_others = _changed(first, of_own), _changed(first, of_others)
    by_hand = _rests_differ(first, of_own, with_own)
    alone = not _differ(first.loss, of_others.loss) and with_own >= {term.key for term in first.seen}
    if by_hand and alone and not steady:
        return None
    own: dict[TermKey, OwnRows] = dict.fromkeys(with_own - with_others, "all")
    own |= {key: rows for key in with_own & with_others if (rows := _rows(losses, key)) is not None}
    seen = ", ".join(map(repr, others))
    way_out = (
        f"In `training_step`, call the loss for {loader!r} on its own, or pass `task=`, a function (module, batch) -> "
        f"the loss of the examples in {_code(loader)} alone."
    )
    if mixed := (with_own & with_others) - own.keys():
        raise TaskError(
            f"loader={loader!r}: what {next(iter(mixed))} is called with depends on examples of this loader and of "
            f"others ({seen}), so that no part of the loss is theirs alone. {way_out}"
        )
    if by_hand:
        seen = ", ".join(map(repr, steady)) if alone else seen
        raise TaskError(
            f"loader={loader!r}: part of the loss depends on its examples, and is no known loss call, so that it can't "
            f"be told from that of the other loaders ({seen}{' of a single example' * alone}). {way_out}"
        )
    if not own:
        raise TaskError(
            f"loader={loader!r}: the loss of the first batch does not depend on its examples, but on those of {seen}. "
            "If their part joins in later, let it be there from the start with a weight of 0; or pass `task=`, a "
            f"function (module, batch) -> the loss of the examples in {_code(loader)}."
        )
    return own


def _rows(losses: tuple[BatchLoss, BatchLoss, BatchLoss], key: TermKey) -> OwnRows | None:
    """Tell which rows of a term are those of the loader, if the others' rows come before or after them."""
    n, found = losses[0].n, [term for loss in losses for term in _of(loss, {key})]
    calls = [term.call for term in found]
    if len(calls) < len(losses) or any(call.input.shape != calls[0].input.shape for call in calls):
        return None
    plain = [f.name for f in fields(calls[0]) if f.name not in ("output", "input", "target", "class_weights")]
    rows = calls[0].input.ndim and all(len(c.input) == len(c.target) > n for c in calls)
    if not rows or any(isinstance(getattr(calls[0], name), Tensor) for name in plain) or _differ_in_weight(found):
        return None
    by_own, by_others = (_rows_that_differ(calls[0], call) for call in calls[1:])
    sides: tuple[tuple[OwnRows, slice], ...] = (("first", slice(n)), ("last", slice(-n, None)))
    for which, inside in sides:
        outside = torch.ones_like(by_own)
        outside[inside] = False
        if by_own[inside].any() and not by_own[outside].any() and not by_others[inside].any():
            return which
    return None


def _differ_in_weight(terms: Sequence[LossTerm]) -> bool:
    return any(_differ(terms[0].coefficient, term.coefficient) for term in terms[1:])


def _rows_that_differ(a: LossCall, b: LossCall) -> Tensor:
    pairs = [(a.input, b.input), (a.target, b.target)]
    found = [torch.tensor([_differ(x, y) for x, y in zip(*pair, strict=True)]) for pair in pairs]
    return found[0] | found[1]


def _rests_differ(a: BatchLoss, b: BatchLoss, keys: Collection[TermKey]) -> bool:
    """Tell whether what two losses have besides some terms differs by more than the rounding of the losses."""
    totals = [float(each.loss.detach()) for each in (a, b)]
    parts = [float(_sum(_of(each, keys)).detach()) for each in (a, b)]
    rounding = max(_ALIKE, 4 * torch.finfo(a.loss.dtype).eps) * max(map(abs, totals + parts))
    return abs((totals[0] - parts[0]) - (totals[1] - parts[1])) > rounding


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
    if a.shape != b.shape or not (a.is_floating_point() or a.is_complex()):
        return a.shape != b.shape or not torch.equal(a, b)
    a, b = a.detach().double(), b.detach().double()
    return not torch.allclose(a, b, rtol=_ALIKE, atol=_ALIKE * float(a.abs().max() if a.numel() else 0), equal_nan=True)
