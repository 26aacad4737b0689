"""Which known call the loss of a training batch is made of, by what was heard or by the graph."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from lightning_influence.objective.handwritten import HAND_WRITTEN, HandWritten, handwritten
from lightning_influence.objective.losses import CrossEntropy, LossCall
from lightning_influence.objective.own_part import OwnRows, own_rows
from lightning_influence.objective.scale import HeardTerms, Place, TermKey
from lightning_influence.objective.tap import Heard, calls_in
from lightning_influence.objective.terms import TermForm, placed_calls, steady_terms
from lightning_influence.training.batch_record import BatchRecord
from lightning_influence.training.loss_graph import call_in_graph, trained_elements

# To listen takes much longer than to read the graph. Once that has told of so many batches in a row what was heard, it
# is relied upon, but for the first batches of every epoch; if it then fails to tell, it is not any more.
_AGREEING, _AGAIN = 16, 2


class HeardLosses:
    """Reads the losses of a run.

    Attributes:
        terms: What they have told of their scale.
        compiled: Whether training runs compiled code: what watches its calls would have it compiled anew, perhaps
            otherwise.
        task_apart: Whether passes minimise something else than training does: its step may mix examples.
        own: Terms of the loss that are about the examples of the loader in question, of several; None if all are.
        mixed: Whether it did in the batch that was read last: what that says is of no example alone.
    """

    def __init__(self) -> None:
        self.terms = HeardTerms()
        self.compiled = False
        self.task_apart = False
        self.own: Mapping[TermKey, OwnRows] | None = None
        self.mixed = False
        self._agreed = 0
        self._failed = False
        self._epoch = -1
        self._silent: set[Place] = set()  # softmaxes that have told nothing of the loss

    def needs_tap(self, epoch: int) -> bool:
        """Tell whether the calls of the next batch have to be heard.

        Args:
            epoch: Of the batch.
        """
        if epoch != self._epoch:
            self._epoch, self._agreed = epoch, min(self._agreed, _AGREEING - _AGAIN)
        return not self.compiled and (self._failed or self._agreed < _AGREEING or self.own is not None)

    def read(
        self, batch: BatchRecord, loss: Tensor, calls: Sequence[LossCall] | None, forms: Mapping[TermKey, TermForm]
    ) -> LossCall | None:
        """Return the call that tells of the examples, None if there is no such.

        Args:
            batch: The batch.
            loss: Before the backward pass.
            calls: What was heard; None if nothing has listened: then its graph tells.
            forms: See ``discover.term_forms``.
        """
        n, self.mixed = len(batch.indices or ()), False
        if calls is None:
            return self._in_graph(loss, n, forms) if self.own is None else None
        forms = {} if self.task_apart else forms  # they are those of the task's calls
        with torch.no_grad():
            found = self._first(batch, loss, n, calls, forms)
            self.mixed = found is not None and self.task_apart and _mixes(found, calls_in(loss, calls))
        return None if self.mixed else found

    def _in_graph(self, loss: Tensor, n: int, forms: Mapping[TermKey, TermForm]) -> LossCall | None:
        call = call_in_graph(loss)
        if call is not None and not (_in_rows(forms.values()) and n and call.single_rows(n)):
            call = None
        self._failed = self._failed or call is None
        # Of one row for each example, only these make the divisor of a mean depend on the batch.
        if call is None or call.reduction != "mean" or call.class_weights is not None:
            self.terms.add(None)  # else this one is what was heard before, or it would not be relied upon
        return call

    def _first(
        self, batch: BatchRecord, loss: Tensor, n: int, calls: Sequence[LossCall], forms: Mapping[TermKey, TermForm]
    ) -> LossCall | None:
        known = calls_in(loss, calls)
        by_hand = self._by_hand(loss, calls, known, n, forms)
        written = [each.call for each in by_hand]
        # In the order of the step, as passes have them: labels are read from the first.
        numbered = [(each.after, each.call) for each in by_hand] + [(calls.index(call), call) for call in known]
        placed = placed_calls([call for _, call in sorted(numbered, key=itemgetter(0))], forms)
        # Of several loaders, others' terms are met in passes, too, and have as many rows as their batches.
        self.terms.terms.update(key for key, call, _ in placed if self.own is not None or call.rows_match(n))
        if self.own is not None:
            rows = self.own
            placed = [(key, own_rows(call, n, rows[key]), form) for key, call, form in placed if key in rows]
        self.terms.add(steady_terms(placed, n) if self.own is None else None)
        _, first, form = placed[0] if placed else (None, None, None)
        if first is not None and first.reduction != "none" and _in_rows([form]) and n and first.single_rows(n):
            told = call_in_graph(loss)
            if told is not None and _agree(first, told):
                self._agreed += 1
                return told  # what is told alike is computed together
            self._agreed = 0
            return first
        self._agreed = 0
        if batch.ragged:  # only one row for each example is read then
            return None
        key, call = next(((key, call) for key, call, _ in placed if call.rows_match(n)), (None, None))
        some = self.own is not None and key is not None and self.own[key] != "all"  # its elements are those of all rows
        return call if call is None or call in written or some else trained_elements(loss, call)

    def _by_hand(
        self,
        loss: Tensor,
        calls: Sequence[LossCall],
        known: Sequence[LossCall],
        n: int,
        forms: Mapping[TermKey, TermForm],
    ) -> list[HandWritten]:
        """Return the losses that are written by hand, unless known calls tell of the examples."""
        places = {key.place for key in forms if key.kind in HAND_WRITTEN}
        told = any(call.rows_match(n) for _, call, _ in placed_calls(known, forms))
        if not isinstance(calls, Heard) or (told and not places):
            return []
        asked = [each for each in calls.decisions if each.place not in self._silent]
        found = handwritten(loss, asked, known, sure=bool(places))
        if found:
            self._silent |= {each.place for each in asked} - {written.call.place for written in found}
        elif not places:
            self._silent |= {each.place for each in asked}
        return found

    def start_again(self) -> None:
        """Forget the terms of other data."""
        self.terms = HeardTerms()

    def state_dict(self) -> dict[str, Any]:
        """Return the terms, in primitives."""
        return self.terms.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.terms = HeardTerms.of_state(state)


def _in_rows(forms: Iterable[TermForm | None]) -> bool:
    """Tell whether forms have their examples in rows, as far as they are known."""
    return not [form for form in forms if form is not None and (form.layout is None or form.layout.dim)]


def _mixes(found: LossCall, calls: Sequence[LossCall]) -> bool:
    """Tell whether a loss has labels of several examples for the same outputs: mixup, CutMix."""
    for call in calls:
        if call.input is found.input and call is not found:
            other = call.target
            if other.shape == found.target.shape and not torch.equal(other, found.target):
                return True
    if not isinstance(found, CrossEntropy) or not found.target.is_floating_point():
        return False
    largest = found.target.detach().topk(min(3, found.target.shape[1]), 1).values
    # Smoothed labels have all others alike; of two classes that can't be told.
    return bool((largest[:, 1] > largest[:, -1] + 1e-4 if largest.shape[1] > 2 else largest[:, -1] > 1e-4).any())


def _agree(heard: LossCall, told: LossCall) -> bool:
    """Tell whether the graph tells of the very call that was heard."""
    return told.target.data_ptr() == heard.target.data_ptr() and told.input.shape == heard.input.shape
