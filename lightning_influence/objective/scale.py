"""The loss scale: what every term of the loss is weighed with, so that an example counts the same in every batch.

``ℓ(z)`` is the sum of the example's own elements over all terms. A term multiplies its elements with a factor that may
depend on the batch: one over the number of tokens, of labelled examples, of examples of a kind, over the sum of class
weights. In ``ℓ`` it is one over the mean of these divisors over all training batches, so that the batch loss is on
average the mean of ``ℓ``: a mean over the examples of a kind divides by their share times the batch size. (A batch
that has none of the kind counts with 0 then, so that a kind that most batches lack weighs more than in training.) A sum
has the training batch size in place of the batch's own. Two units are as the task has them: a loss that is nothing but
sums over examples has the sum of ``ℓ`` for its batch loss, and one that is a mean over those examples that count at
all (others are ignored or masked) has that mean.

A scale is made once for a set of passes, over all their examples, and nobody changes it afterwards.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Literal, NamedTuple, TypeAlias

from lightning_influence.core.origin import LIGHTNING

Place: TypeAlias = tuple[tuple[str, int, int], ...]

# Frames of a call's way that tell places apart: a loss function of the user's own is called from several.
_DEPTH = 8
_OWN = __name__.partition(".")[0]
_CALLERS = {_OWN, *LIGHTNING}
_ALIKE = 1e-5


class TermKey(NamedTuple):
    """Which term of the loss a call is, in any batch: what is called, and where.

    Calls at the same place, as in a loop over heads, are told apart by their order alone. A loop that skips some of
    them in some batches is refused (``ScaleTally.scale``); one that takes them in another order is not noticed.

    Attributes:
        kind: Class of the loss.
        place: File, line and instruction of the call, then of the user's functions that led to it.
        occurrence: Number of the call among those of its kind at its place in the batch.
    """

    kind: str
    place: Place
    occurrence: int

    def __str__(self) -> str:
        """Return what it is called in messages."""
        where = f" at {self.place[0][0]}:{self.place[0][1]}" if self.place else ""
        return f"{self.kind}{where}" + (f" (number {self.occurrence + 1} there)" if self.occurrence else "")


class TaskError(RuntimeError):
    """The loss of a batch can't be understood; the message says what was seen and the way out."""


class NoLossError(TaskError):
    """A task has returned None, which skips a batch in training."""


class ScaleError(TaskError):
    """A term of the loss has no scale that holds in every batch; the message says which, and the way out."""


def calling_place() -> Place:
    """Return where the user's code is: file, line and instruction of its innermost functions, outside of torch."""
    found: list[tuple[str, int, int]] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and len(found) < _DEPTH:
        package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        if package in _CALLERS:
            # A task of this package calls losses of torch itself: who asked for the pass is no part of the place.
            if found or frame.f_code.co_name == "run_tapped":
                break
        elif package != "torch":
            found.append((frame.f_code.co_filename, frame.f_lineno, frame.f_lasti))
        frame = frame.f_back
    return tuple(found)


@dataclass(frozen=True, eq=False)
class LossScale(Mapping[TermKey, float]):
    """Term to its reference: mean divisor per example (means), or batch size (sums); see ``LossTerm.correction``."""

    _references: Mapping[TermKey, float]

    def __getitem__(self, key: TermKey) -> float:
        """Return the reference of a term.

        Raises:
            ScaleError: If it was met in no training batch.
        """
        if key not in self._references:
            known = ", ".join(map(str, self._references)) or "none"
            raise ScaleError(
                f"the loss has a term that the loss scale does not know, {key}: no batch that it was measured on had "
                f"it (known: {known}). A loss that depends on more than its batch (chance, the epoch, a "
                "counter) needs a `task=` (`loss=` of `Influence`) that does not."
            )
        return self._references[key]

    def __contains__(self, key: object) -> bool:
        """Tell whether a term is known."""
        return key in self._references

    def __iter__(self) -> Iterator[TermKey]:
        """Iterate over the terms."""
        return iter(self._references)

    def __len__(self) -> int:
        """Return the number of terms."""
        return len(self._references)


# A number that is the same in all batches so far; "any" before the first of them, None where they differ.
_Same: TypeAlias = float | Literal["any"] | None


def _same(a: _Same, b: _Same) -> _Same:
    if a == "any" or b == "any":
        return b if a == "any" else a
    return a if a is not None and b is not None and math.isclose(a, b, rel_tol=_ALIKE) else None


@dataclass(eq=False)
class TermShare:
    """What batches say about the scale of one of their terms; nothing by default: nothing in them counts.

    Attributes:
        total: Sum of the divisors.
        sums: Whether the term is a sum over examples, whose divisor is the batch size.
        reference: Divisor per example, see ``LossTerm.batch_reference``, if it is the same in all batches.
        among_counted: The divisor over the number of examples that count, where every one of them has one element and
            the same weight, if it is the same in all batches.
    """

    total: float = 0.0
    sums: bool = False
    reference: _Same = "any"
    among_counted: _Same = "any"

    def add(self, other: TermShare) -> None:
        """Add what other batches say."""
        self.total += other.total
        self.sums |= other.sums
        self.reference = _same(self.reference, other.reference)
        self.among_counted = _same(self.among_counted, other.among_counted)

    def divisor(self, examples: int, *, alone: bool) -> float:
        """Return the divisor per example; a term without others is left in the unit that it has for one example."""
        steady, among = self.reference, self.among_counted
        # The mean over those that count, unless it is one over all, of which as many count in every batch.
        unsteady = not isinstance(steady, float) or not _is_one(steady)
        if alone and isinstance(among, float) and unsteady and (steady is None or _is_one(among)):
            return among
        if isinstance(steady, float):
            return steady
        return self.total / max(examples, 1) or 1.0  # if nothing counts, any number will do


def _is_one(value: float) -> bool:
    return math.isclose(value, 1, rel_tol=_ALIKE)


@dataclass(eq=False)
class ScaleTally:
    """Adds up what the batches of a data set say about the scale of the terms."""

    examples: int = 0
    entries: dict[TermKey, TermShare] = field(default_factory=dict)
    counts: dict[tuple[str, Place], set[int]] = field(default_factory=dict)

    def add(self, n: int, terms: Mapping[TermKey, TermShare]) -> None:
        """Add a batch of ``n`` examples."""
        at_place = Counter((key.kind, key.place) for key in terms)
        self.merge(ScaleTally(n, dict(terms), {place: {count} for place, count in at_place.items()}))

    def merge(self, other: ScaleTally) -> None:
        """Add what other batches say."""
        self.examples += other.examples
        for key, entry in other.entries.items():
            self.entries.setdefault(key, TermShare()).add(entry)
        for place, counts in other.counts.items():
            self.counts.setdefault(place, set()).update(counts)

    def scale(self, batch_size: int, *, of_mean: bool | None = None) -> LossScale:
        """Return the scale.

        Args:
            batch_size: Of training.
            of_mean: Whether the batch loss is on average the mean of ``ℓ``, else their sum; by default whether some
                term is no sum.

        Raises:
            ScaleError: If calls at one place can't be told apart.
        """
        for key, entry in self.entries.items():
            if len(self.counts[key[:2]]) > 1 and not entry.sums:
                raise ScaleError(
                    f"{key} is called {' or '.join(map(str, sorted(self.counts[key[:2]])))} times in a batch, "
                    "and which of its calls are left out can't be told, nor how much each weighs. Make the same calls "
                    'in every batch, write each of them out in a line of its own, or sum with `reduction="sum"`.'
                )
        if of_mean is None:
            of_mean = not all(entry.sums for entry in self.entries.values())
        alone, unit = len(self.entries) == 1, 1 if of_mean else batch_size
        return LossScale(
            {
                key: float(batch_size / unit if entry.sums else unit * entry.divisor(self.examples, alone=alone))
                for key, entry in self.entries.items()
            }
        )


@dataclass
class HeardTerms:
    """What training itself has told of the loss scale, batch by batch.

    Attributes:
        terms: All terms that were heard.
        steady: The terms of every batch, each with its divisor per example, if they were the same in all batches and
            none of them depends on its batch; empty before the first batch, None if that is not so, or not known.
    """

    terms: set[TermKey] = field(default_factory=set)
    steady: tuple[tuple[TermKey, float], ...] | None = ()

    def add(self, batch: tuple[tuple[TermKey, float], ...] | None) -> None:
        """Note what a batch was made of; None if that is not known, or depends on the batch."""
        if self.steady is not None and batch != self.steady:
            self.steady = batch if self.steady == () else None

    def scale(self, batch_size: int, *, of_mean: bool) -> LossScale | None:
        """Return the scale, if the batches settle it."""
        if not self.steady:
            return None
        unit = 1 if of_mean else batch_size
        return LossScale({key: divisor * unit for key, divisor in self.steady})

    @classmethod
    def joined(cls, parts: Sequence[HeardTerms]) -> HeardTerms:
        """Put together what several processes have heard."""
        steady = {part.steady for part in parts if part.steady != ()}
        return cls(set().union(*(part.terms for part in parts)), steady.pop() if len(steady) == 1 else None)

    def state_dict(self) -> dict[str, Any]:
        """Return it in primitives."""
        steady = None if self.steady is None else [(tuple(key), divisor) for key, divisor in self.steady]
        return {"terms": [tuple(key) for key in self.terms], "steady": steady}

    @classmethod
    def of_state(cls, state: Mapping[str, Any] | None) -> HeardTerms:
        """Go on from a checkpoint; nothing is known of what one without a state has heard."""
        if state is None:
            return cls(steady=None)
        steady = state["steady"]
        pairs = None if steady is None else tuple((TermKey(*key), divisor) for key, divisor in steady)
        return cls({TermKey(*key) for key in state["terms"]}, pairs)
