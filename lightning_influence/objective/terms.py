"""What the loss of one batch is made of, and every example's part in it.

Each known call that the loss depends on is a term; ``ℓ`` of an example is the sum of its own elements over all terms,
scaled such that the batch loss is the mean of ``ℓ``.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from lightning_influence.core.layout import BatchLayout
from lightning_influence.objective.handwritten import HAND_WRITTEN, handwritten
from lightning_influence.objective.losses import LossCall, single
from lightning_influence.objective.losses.output_curvature import negative_weight
from lightning_influence.objective.reductions import divided, reduction_of
from lightning_influence.objective.scale import LossScale, TaskError, TermKey, TermShare
from lightning_influence.objective.tap import Heard

__all__ = ["BatchLoss", "LossTerm", "TaskError", "TermForm", "placed_calls", "steady_terms", "understand", "values_of"]


@dataclass(frozen=True)
class TermForm:
    """How a term of the loss follows the batch; the same in every batch of a task, see ``discover.term_forms``.

    Attributes:
        layout: Where the examples are, see ``LossCall.layout``; None if the number of rows does not follow theirs.
        sums: Whether the weight of an element in the batch loss stays as it is when the batch grows (a sum over the
            examples); else it shrinks (a mean, by whatever the task divides by).
        follow: See ``LossCall.follow``.
        elementwise: Whether each element is divided by what belongs to the batch before they are added up.
    """

    layout: BatchLayout | None
    sums: bool
    follow: bool = True
    elementwise: bool = False


@dataclass(frozen=True, eq=False)
class LossTerm:
    """One tapped call and how it enters the batch loss.

    Attributes:
        call: The tapped call.
        coefficient: Derivative of the batch loss with respect to what the call returned.
        key: Which term of the loss it is.
        reference: See ``batch_reference``; None takes the batch's own.
        form: How it follows the batch; None takes a call with ``reduction="sum"`` for a sum, others for means.
        factor: What the sum of the call's elements (times weights of the task's own, such as a mask) is multiplied
            with; None if there is no such number.
    """

    call: LossCall
    coefficient: Tensor
    key: TermKey
    reference: float | None = None
    form: TermForm | None = None
    factor: float | None = None

    @property
    def sums(self) -> bool:
        """Whether the term grows with the batch."""
        return self.call.reduction == "sum" if self.form is None else self.form.sums

    def scale(self, n: int) -> Tensor:
        """Return the weight of each element in its example's own loss."""
        if self.call.reduction == "mean":
            return self.call.scale(self.coefficient, n, self.reference)
        return self.call.scale(self._coefficient, n) * self.correction(n)

    def start(self, n: int) -> Tensor:
        """Return the derivative of the sum of the examples' own losses with respect to what the call returned."""
        if self.call.reduction == "mean" and self.reference is not None and not self.sums:
            return self._coefficient * (self.call.weight() / self.reference)  # which the host need not know
        return self._coefficient * (n * self.correction(n))

    @property
    def _coefficient(self) -> Tensor:
        # Where nothing of the batch counts, the task has divided by zero: such examples have no loss.
        nothing = self.form is not None and self.factor is not None and math.isinf(self.factor)
        return torch.zeros_like(self.coefficient) if nothing else self.coefficient

    def correction(self, n: int) -> float:
        """Return the reference scale over the batch's own."""
        if self.reference is None or (self.form is None and self.call.reduction == "none"):
            return 1.0
        own = self.batch_reference(n)
        return self.reference / own if self.sums else own / self.reference

    def batch_reference(self, n: int) -> float:
        """Return the number that makes the term's scale depend on the batch.

        The batch size for a sum; else what the elements are divided by (number of tokens, sum of weights), per
        example.
        """
        if self.sums:
            return float(n)
        if self.call.reduction == "mean":
            return self.call.mean_weight(n)
        return 1 / (n * self.factor) if self.form is not None and self.factor else 1.0

    def share(self, n: int) -> TermShare:
        """Return what this batch says about the scale of the term."""
        weights = self.coefficient if self.call.reduction == "none" else self.call.weights()
        counted = weights[weights != 0].abs()
        reference = self.batch_reference(n) if len(counted) else 0.0
        if not reference:
            return TermShare(sums=self.sums)
        alike = single(self.call.noise_shape(n)) and bool(counted.max() <= (1 + 1e-5) * counted.min())
        return TermShare(reference * n, self.sums, reference, reference * n / len(counted) if alike else None)


@dataclass(frozen=True, eq=False)
class BatchLoss:
    """The loss of one batch and what the tap saw of it.

    Attributes:
        loss: The batch loss, in the graph.
        n: Number of examples in the batch.
        terms: The known calls that the loss is made of and whose rows can be shared out over the examples; empty if
            none was seen.
        remainder: Whether the loss has a part besides the terms that depends on what the terms depend on or has a
            value of its own (an untapped loss, a penalty).
        values: Per-example losses ``[n]`` if the task returned them or the terms tell them, else None.
        seen: The terms and the known calls whose rows can't be shared out.
        partial: Whether other terms of what the task returned are left out, see ``own_part``.
        least_weight: The least weight of an element of the terms.
    """

    loss: Tensor
    n: int
    terms: tuple[LossTerm, ...]
    remainder: bool
    values: Tensor | None
    seen: tuple[LossTerm, ...] = ()
    partial: bool = False
    least_weight: float = 0.0

    @property
    def scale(self) -> LossScale:
        """What all terms are scaled by: the given scale, or else the batch's own."""
        of = {t.key: t.batch_reference(self.n) if t.reference is None else t.reference for t in self._whole}
        return LossScale(of)

    @property
    def _whole(self) -> list[LossTerm]:
        return [term for term in self.seen if term.call.rows_match(self.n)]

    @property
    def tapped(self) -> bool:
        """Whether the known calls account for the whole loss."""
        return bool(self.terms) and not self.remainder

    @property
    def primary(self) -> LossCall | None:
        """The call that predictions and margins are read from: the first."""
        return self.terms[0].call if self.terms else None

    def labels_of(self) -> str:
        """Return what tells the labels, if others have other ones; else nothing."""
        told = [(term.key, term.call.decided(self.n).get("label")) for term in self.terms] if self.terms[1:] else []
        labels = [(key, label) for key, label in told if label is not None]
        alike = all(torch.equal(label, labels[0][1]) for _, label in labels)
        return "" if alike or labels[0][0] != self.terms[0].key else str(labels[0][0])

    def true_outputs(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return tensors and gradients to run backward from, for the gradients of every example's own loss.

        Starting from the terms instead of the batch loss puts the reference scale in place of the batch's own.
        """
        if not self.tapped:
            return [self.loss], [torch.full_like(self.loss, float(self.n))]
        outputs = [term.call.output for term in self.terms]
        return outputs, [term.start(self.n) for term in self.terms]

    def sampled_outputs(self, noise: Callable[[tuple[int, ...]], Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return logits and gradients for labels sampled from the model, independently for each term.

        Args:
            noise: Given the shape for one example, returns uniform numbers ``[n, *shape]``, fresh at each call.
        """
        self._check_weights()
        each = [term.call.sampled(term.scale(self.n), noise(term.call.noise_shape(self.n))) for term in self.terms]
        return _in_graph(chain.from_iterable(each))

    def _check_weights(self) -> None:
        if self.least_weight < 0:
            raise negative_weight(self.least_weight)

    def exact_draws(self) -> int | None:
        """Return the backward passes that ``exact_outputs`` of the whole loss takes; None without a closed form."""
        draws = [term.call.exact_draws(self.n) for term in self._whole]
        return sum(d for d in draws if d is not None) if draws and None not in draws else None

    def exact_outputs(self) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
        """Yield logits and gradients whose outer products add up to the exact Fisher (GGN) of every example."""
        self._check_weights()
        for term in self.terms:
            for column in term.call.exact(term.scale(self.n), self.n):
                yield _in_graph(column)


def placed_calls(
    calls: Sequence[LossCall], forms: Mapping[TermKey, TermForm]
) -> list[tuple[TermKey, LossCall, TermForm | None]]:
    """Tell which term each of the calls that a loss is made of is, and put its examples where they are.

    Args:
        calls: In the order in which they were made.
        forms: See ``discover.term_forms``; a call without one has its examples side by side.
    """
    met: Counter[tuple[str, Any]] = Counter()
    found: list[tuple[TermKey, LossCall, TermForm | None]] = []
    for call in calls:
        what = type(call).__name__, call.place
        key = TermKey(*what, met[what])
        met[what] += 1
        form = forms.get(key)
        found.append((key, call if form is None else call.placed(form.layout, follow=form.follow), form))
    return found


def steady_terms(
    calls: Sequence[tuple[TermKey, LossCall, TermForm | None]], n: int
) -> tuple[tuple[TermKey, float], ...] | None:
    """Return the terms of a batch with their divisors per example, if these follow from shapes alone; else None.

    Args:
        calls: See ``placed_calls``; all that the loss is made of.
        n: Number of examples in the batch.
    """
    found = [(key, call.steady_divisor(n, alone=len(calls) == 1)) for key, call, _ in calls]
    told = tuple((key, divisor) for key, divisor in found if divisor is not None)
    return told if told and len(told) == len(found) else None


def understand(
    loss: Tensor,
    calls: Sequence[LossCall],
    n: int,
    scale: LossScale | None = None,
    forms: Mapping[TermKey, TermForm] | None = None,
) -> BatchLoss:
    """Tell what a loss is made of.

    Args:
        loss: What a task returned for a batch.
        calls: The known loss calls that it made, see ``run_tapped``.
        n: Number of examples in the batch.
        scale: That of the whole training set. With None, every term is scaled such that the batch loss is the mean
            over this very batch.
        forms: Where the examples of the terms are, see ``discover.term_forms``; by default rows come first, those of
            one example side by side.

    Raises:
        TaskError: If the loss has the wrong shape or does not depend on the model.
    """
    values: Tensor | None = None
    if loss.ndim == 1 and loss.shape[0] == n:
        values, loss = loss.detach(), loss.mean()
    if loss.numel() != 1:
        raise TaskError(
            f"the loss of a batch of {n} examples has the shape {tuple(loss.shape)}; expected a scalar (their mean), "
            f"or [{n}] from a `task=` (`loss=` of `Influence`)."
        )
    loss = loss.reshape(())
    if not loss.requires_grad:
        raise TaskError(
            "the loss does not depend on any layer with trainable parameters that is understood: nothing to attribute. "
            "Was it computed under `torch.no_grad()` or from detached tensors?"
        )
    numbered = _seen(loss, calls, n, scale, forms or {})
    seen = tuple(numbered.values())
    terms, remainder, lowest = _told(loss, seen, n)
    if remainder or not terms:
        by_hand = _by_hand(loss, calls, [term.call for term in seen], n, scale, forms or {})
        # In the order of the step: labels are read from the first.
        seen = tuple(term for _, term in sorted([*by_hand, *numbered.items()], key=itemgetter(0)))
        terms, remainder, lowest = _told(loss, seen, n)
    if terms and not remainder:
        values = values_of(terms, n, loss.dtype)
    return BatchLoss(loss, n, terms, remainder, values, seen, least_weight=lowest)


@torch.no_grad()
def values_of(terms: Sequence[LossTerm], n: int, dtype: torch.dtype) -> Tensor:
    """Return what terms say of every example's own loss, ``[n]``."""
    parts = [term.call.per_example(term.call.elements() * term.scale(n), n) for term in terms]
    return torch.stack([part.to(dtype) for part in parts]).sum(0)


def _told(loss: Tensor, seen: Sequence[LossTerm], n: int) -> tuple[tuple[LossTerm, ...], bool, float]:
    """Return those whose rows can be shared out, whether the loss has a part besides them, and the least weight."""
    terms = tuple(term for term in seen if term.call.rows_match(n))
    with torch.no_grad():
        parts = [(term.coefficient * term.call.output).sum().to(loss.device) for term in terms]
        least = [term.coefficient.min().to(loss.device) for term in terms if term.coefficient.numel()]
        total, *others = torch.stack([loss.reshape(()), *parts, *least]).tolist()  # all that the host waits for
    others, lowest = others[: len(parts)], min(others[len(parts) :], default=0.0)
    explained, rounding = sum(others, 0.0), max(1e-4, 4 * torch.finfo(loss.dtype).eps)
    if not (math.isfinite(total) and math.isfinite(explained)):  # explained if the calls are non-finite themselves
        return terms, math.isfinite(explained), lowest
    return terms, abs(total - explained) > rounding * max(abs(total), abs(explained), 1e-8), lowest


def _by_hand(
    loss: Tensor,
    calls: Sequence[LossCall],
    known: Sequence[LossCall],
    n: int,
    scale: LossScale | None,
    forms: Mapping[TermKey, TermForm],
) -> list[tuple[int, LossTerm]]:
    """Return what is written by hand, as terms after so many calls; with forms only where the trace has found it."""
    decisions = calls.decisions if isinstance(calls, Heard) else []
    places = {key.place for key in forms if key.kind in HAND_WRITTEN}
    if forms:
        decisions = [each for each in decisions if each.place in places]
    found = handwritten(loss, decisions, known, sure=bool(places))
    terms = []
    placed = placed_calls([written.call for written in found], forms)
    for (key, call, form), written in zip(placed, found, strict=True):
        reference = scale[key] if scale is not None and call.rows_match(n) else None
        reduction = reduction_of(loss, written.logits.grad_fn)
        if reduction is None:
            factor = divided(written.weight, n)
        else:
            (at_reduction,) = torch.autograd.grad(loss, reduction[:1], retain_graph=True)
            factor = at_reduction.abs() / reduction[1]
        terms.append((written.after, LossTerm(call, written.weight, key, reference, form, float(factor))))
    return terms


def _seen(
    loss: Tensor,
    calls: Sequence[LossCall],
    n: int,
    scale: LossScale | None,
    forms: Mapping[TermKey, TermForm],
) -> dict[int, LossTerm]:
    """Return the calls that the loss is made of, as terms, by their places among all calls."""
    if not calls:
        return {}
    reductions = [reduction_of(loss, call.output.grad_fn) if call.reduction == "none" else None for call in calls]
    wanted: list[Any] = [call.output for call in calls]
    wanted += [reduction[0] for reduction in reductions if reduction is not None]
    found: tuple[Tensor | None, ...] = torch.autograd.grad(loss, wanted, retain_graph=True, allow_unused=True)
    at_reductions = iter(found[len(calls) :])
    used: list[tuple[int, LossCall, Tensor, Tensor | None]] = []
    for number, (call, coefficient, reduction) in enumerate(zip(calls, found, reductions, strict=False)):
        factor = coefficient if call.reduction == "sum" else None
        if reduction is not None:
            at_reduction = next(at_reductions)
            factor = None if at_reduction is None else at_reduction / reduction[1]
        if coefficient is not None:
            used.append((number, call, coefficient, factor))
    terms: dict[int, LossTerm] = {}
    placed = placed_calls([call for _, call, _, _ in used], forms)
    for (key, call, form), (number, _, coefficient, factor) in zip(placed, used, strict=True):
        if call.reduction == "none" and call.rows_match(n):
            call = call.counting(coefficient != 0)
        if form is not None and form.elementwise:
            factor = divided(coefficient, n)
        reference = scale[key] if scale is not None and call.rows_match(n) else None
        terms[number] = LossTerm(call, coefficient, key, reference, form, None if factor is None else float(factor))
    return terms


def _in_graph(pairs: Iterable[tuple[Tensor, Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
    """Return the tensors that take part in a gradient, and their gradients."""
    own = [(tensor, gradient) for tensor, gradient in pairs if tensor.requires_grad]
    return [tensor for tensor, _ in own], [gradient.to(tensor.dtype) for tensor, gradient in own]
