"""The loss of a batch with a weight for every example, ``Σ_z w_z (z's part)``: at ``w = 1`` what the task returns.

Three ways, found out on a batch: the task returns one loss per example; the known calls that it makes are weighted
element by element, and all that it does with them afterwards stays; or what it has written by hand is weighted where
its gradient reaches the logits.

Index legend: ``n`` examples of a batch.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lightning_influence.objective.handwritten import HAND_WRITTEN, Decision
from lightning_influence.objective.losses import LossCall, known_loss, known_losses
from lightning_influence.objective.losses.divergence import Divergence
from lightning_influence.objective.losses.picking import find_picking
from lightning_influence.objective.losses.shares import SIDE_BY_SIDE, share_out
from lightning_influence.objective.scale import Place, TaskError, TermKey
from lightning_influence.objective.tap import Heard, LossTap
from lightning_influence.objective.task import Task, run_tapped
from lightning_influence.objective.terms import BatchLoss, TermForm, understand
from lightning_influence.replay.record import ReplayError

_WAY_OUT = "pass a `task=` (`loss=` of `Influence`) that returns one loss per example."
Forms: TypeAlias = "Mapping[TermKey, TermForm]"
Run: TypeAlias = "Callable[[int, LossTap | None], tuple[Tensor, Heard]]"


@dataclass(frozen=True)
class Weighting:
    """How a task's loss is weighted.

    Attributes:
        forms: Where the examples of its terms are, see ``discover.term_forms``.
        single: Whether the task returns one loss per example.
        penalty: Whether the loss has a part that belongs to no example, one of the weights alone.
        by_hand: Places of the softmaxes and sigmoids of losses written by hand, and where the examples are there.
    """

    forms: Forms
    single: bool = False
    penalty: bool = False
    by_hand: Mapping[Place, TermForm | None] | None = None

    def loss(self, task: Task, module: nn.Module, batch: Any, weights: Tensor) -> tuple[Tensor, list[Decision]]:
        """Return the weighted loss of a batch, and what its gradient takes.

        Args:
            task: The task.
            module: The model.
            batch: On its device.
            weights: Ones ``[n]`` that require a gradient.
        """
        plain = self.single or self.by_hand is not None
        loss, heard = run_tapped(task, module, batch, None if plain else _WeightedCalls(weights, self.forms))
        if self.single:
            if loss.shape != weights.shape:
                raise ReplayError(
                    f"the task returned a loss of the shape {list(loss.shape)} for {len(weights)} examples, and one "
                    "per example for others."
                )
            loss = loss * weights.to(loss.dtype)
        loss = loss.mean()
        return loss, self._logits(heard.decisions) if self.by_hand is not None else []

    def gradient(
        self, loss: Tensor, logits: Sequence[Decision], weights: Tensor, parameters: Sequence[Tensor]
    ) -> list[Tensor | None]:
        """Return the gradient of a weighted loss, in the graph of parameters and weights; see ``loss``."""
        if self.by_hand is None:
            return _gradients([loss], parameters, None)
        slopes = torch.autograd.grad(loss, [each.logits for each in logits], create_graph=True)
        weighted = [slope * self._at(each, weights).to(slope.dtype) for slope, each in zip(slopes, logits, strict=True)]
        return _gradients([each.logits for each in logits], parameters, weighted)

    def _logits(self, decisions: Sequence[Decision]) -> list[Decision]:
        assert self.by_hand is not None
        found: list[Decision] = []
        for each in decisions:
            if each.place in self.by_hand and all(each.logits is not other.logits for other in found):
                found.append(each)
        return found

    def _at(self, each: Decision, weights: Tensor) -> Tensor:
        """Return the weights ``[n]`` at the logits, of which the dimension of the classes has size 1."""
        shape = list(each.logits.shape)
        if each.dim is not None:
            del shape[each.dim]
        form = (self.by_hand or {}).get(each.place)
        layout = SIDE_BY_SIDE if form is None or form.layout is None else form.layout
        shares = share_out(torch.Size(shape), layout, len(weights))
        if shares is None or find_picking(each.logits) is not None:
            raise _not_shared("a loss written by hand", len(weights))
        rows = shares.scatter(_spread(weights, shares.shape))
        return rows if each.dim is None else rows.unsqueeze(each.dim)


def weighting(
    run: Callable[[int, LossTap | None], tuple[Tensor, Heard]], sizes: Sequence[int], forms: Forms
) -> Weighting:
    """Find out on batches of different examples how a task's loss is weighted.

    Args:
        run: Runs the task, see ``run_tapped``, on one of them.
        sizes: Their numbers of examples; the second one is run only if the loss has a part that no example accounts
            for.
        forms: See ``discover.term_forms``.

    Raises:
        ReplayError: If the loss is not made of the examples' own.
    """
    n, (loss, heard) = sizes[0], run(0, None)
    if loss.ndim == 1 and len(loss) == n:
        return Weighting(forms, single=True)
    try:
        understood = understand(loss, heard, n, None, forms)
    except TaskError as error:
        raise ReplayError(str(error)) from error
    by_hand = {term.key.place: term.form for term in understood.terms if term.key.kind in HAND_WRITTEN}
    _check(understood, bool(by_hand))
    if by_hand or not understood.remainder:
        return Weighting(forms, by_hand=by_hand or None)
    total, rests = float(loss.detach()), [_rest(run, number, size, forms) for number, size in enumerate(sizes[:2])]
    # A penalty on weights is the same with other examples.
    if len(rests) < 2 or not math.isclose(rests[0], rests[1], rel_tol=1e-4):
        raise ReplayError(
            "a part of the loss belongs to no example: its known calls account for "
            f"{total - rests[0]:.6g} of {total:.6g}, and the rest changes with the batch; {_WAY_OUT}"
        )
    return Weighting(forms, penalty=True)


def _rest(run: Run, number: int, n: int, forms: Forms) -> float:
    """Return the part of the loss that does not depend on the weights of the examples."""
    weights = torch.ones(n, requires_grad=True)
    loss, _ = run(number, _WeightedCalls(weights, forms))
    (parts,) = torch.autograd.grad(loss, weights)
    return float(loss.detach().double() - parts.double().sum())


def _check(loss: BatchLoss, by_hand: bool) -> None:
    odd = [term for term in loss.seen if not term.call.rows_match(loss.n)]
    if odd:
        raise _not_shared(str(odd[0].key), loss.n)
    if not loss.terms:
        raise ReplayError(
            "the loss of a batch does not tell the examples' own: no known loss call "
            f"({known_losses()}) was seen; {_WAY_OUT}"
        )
    if by_hand and any(term.key.kind not in HAND_WRITTEN for term in loss.terms):
        raise ReplayError(f"the loss is made of known calls and of others that are written by hand; {_WAY_OUT}")


def _not_shared(what: str, n: int) -> ReplayError:
    return ReplayError(f"the rows of {what} can't be shared out over the {n} examples of a batch; {_WAY_OUT}")


def _spread(weights: Tensor, shape: Sequence[int]) -> Tensor:
    return weights.view(-1, *[1] * len(shape)).expand(-1, *shape)


def _gradients(
    outputs: Sequence[Tensor], parameters: Sequence[Tensor], starts: Sequence[Tensor] | None
) -> list[Tensor | None]:
    found = torch.autograd.grad(outputs, parameters, starts, create_graph=True, allow_unused=True)
    return [part.to_dense() if part is not None and part.is_sparse else part for part in found]


class _WeightedCalls(LossTap):
    """Has known loss calls return what they would with weights.

    Args:
        weights: Of the examples ``[n]``.
        forms: See ``discover.term_forms``.
    """

    def __init__(self, weights: Tensor, forms: Forms) -> None:
        super().__init__()
        self._weights, self._forms = weights, forms
        self._met: Counter[tuple[str, Place]] = Counter()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the call; weight what a known loss returns."""
        if not known_loss(func):
            return func(*args, **(kwargs or {}))
        output = super().__torch_function__(func, types, args, kwargs)
        if not self.calls:
            return output
        return self._weighted(self.calls.pop())

    def _weighted(self, call: LossCall) -> Tensor:
        what, n = (type(call).__name__, call.place), len(self._weights)
        form = self._forms.get(TermKey(*what, self._met[what]))
        self._met[what] += 1
        if form is not None:
            call = call.placed(form.layout, follow=form.follow)
        if not call.rows_match(n):
            return call.output
        shares = call.shares(n)
        rows = shares.scatter(_spread(self._weights, shares.shape)).to(call.output)
        if call.reduction == "none":
            if isinstance(call, Divergence):
                return call.output * rows.unsqueeze(1).movedim(1, call.class_dim)
            return call.output * rows.reshape(call.output.shape)
        elements = call.elements()
        total = ((rows.unsqueeze(1) if rows.ndim < elements.ndim else rows) * elements).sum()
        return (total / call.weights().sum() if call.reduction == "mean" else total).to(call.output.dtype)
