"""How good the labels are, in a few lines: how many are wrong, in which classes, and how many to look at."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_influence.audit.belief import LabelBeliefs
from lightning_influence.audit.columns import Columns
from lightning_influence.audit.ranking import NO_CLASSES
from lightning_influence.audit.words import label_text
from lightning_influence.gradients.coverage import listed

# Of the labels that are inspected, the least likely to be wrong is so with this probability.
_WORTH_A_LOOK = 0.25
FIRST_LOOK = 50  # where nothing is known
_LISTED = 5
_FAR, _NORMAL_MEDIAN = 3.5, 0.6745  # deviations; of the distances of a standard normal number


@dataclass(frozen=True, eq=False, repr=False)
class Health:
    """How good the labels of an audited data set are.

    Numbers of labels are expectations, no integers; NaN where the audit can't tell.

    Attributes:
        examples: How many were audited.
        verdict: ``"told"`` or ``"cannot tell"``.
        reason: Why it can't.
        noise_rate: Estimated share of wrong labels.
        noise_interval: Lower and upper end of what it may be.
        classes: For each class its ``examples`` and how many of their labels are ``wrong``.
        overlaps: Pairs of classes that are taken for each other, the most frequent first, with the number of labels
            that are one and may be the other.
        inspect: How many examples of the ranking to look at, from the first.
        expected: How many of these are expected to be wrong.
        nonfinite: How many examples have a non-finite loss or gradient.
        duplicates: Pairs of dataset indices that are likely copies of each other.
        contradicting: Those of them that carry different labels.
    """

    examples: int
    verdict: str
    reason: str
    noise_rate: float
    noise_interval: tuple[float, float]
    classes: Mapping[int, Mapping[str, float]]
    overlaps: Mapping[tuple[int, int], float]
    inspect: int
    expected: float
    nonfinite: int
    duplicates: tuple[tuple[int, int], ...] = ()
    contradicting: tuple[tuple[int, int], ...] = ()
    _names: Sequence[str] | None = field(default=None)
    _counted: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return all of it in terms of JSON; None where the audit can't tell."""
        return {
            "examples": self.examples,
            "verdict": self.verdict,
            "reason": self.reason,
            "noise_rate": _known(self.noise_rate),
            "noise_interval": [_known(end) for end in self.noise_interval],
            "classes": [
                {"class": number, **{name: _known(value) for name, value in about.items()}}
                for number, about in self.classes.items()
            ],
            "overlaps": [{"classes": list(pair), "labels": count} for pair, count in self.overlaps.items()],
            "inspect": self.inspect,
            "expected": _known(self.expected),
            "nonfinite": self.nonfinite,
            "duplicates": [list(pair) for pair in self.duplicates],
            "contradicting": [list(pair) for pair in self.contradicting],
        }

    def lines(self) -> list[tuple[str, str]]:
        """Return what is printed, each line with its title."""
        told = [("wrong", self._wrong()), ("inspect", self._inspect())]
        rates = {number: about["wrong"] / about["examples"] for number, about in self.classes.items()}
        worst = sorted((number for number in rates if rates[number] > 0), key=lambda number: -rates[number])
        if worst:
            each = [
                f"{self._class(number)} {rates[number]:.1%} of {self.classes[number]['examples']:,.0f}"
                for number in worst
            ]
            told.append(("by class", listed(each, _LISTED)))
        if self.overlaps:
            pairs = [f"{self._class(a)} and {self._class(b)} {n:,.0f}" for (a, b), n in self.overlaps.items()]
            told.append(("overlap", f"labels that are one and may be the other: {listed(pairs, _LISTED)}"))
        if self.duplicates:
            found = f"{len(self.duplicates):,} pairs are likely copies: {_pairs(self.duplicates)}"
            if self.contradicting:
                found += f"; {len(self.contradicting):,} with different labels: {_pairs(self.contradicting)}"
            told.append(("duplicates", found))
        if self.nonfinite:
            told.append(("non-finite", f"{self.nonfinite:,} examples: look at their inputs first"))
        return told

    def _wrong(self) -> str:
        if self.verdict != "told":
            return f"cannot tell: {self.reason}"
        low, high = self.noise_interval
        between = f" ({low:.1%} to {high:.1%})" if math.isfinite(low + high) else ""
        return (
            f"{self.noise_rate:.1%} of the labels{between}, about {self.noise_rate * self.examples:,.0f}, "
            f"{self._counted}"
        )

    def _inspect(self) -> str:
        if not self.inspect:
            if math.isnan(self.expected):
                return "nothing: no target is far off"
            return f"nothing: no label is wrong with a probability of {_WORTH_A_LOOK:.0%}"
        first = f"the first {self.inspect:,} of the ranking"
        if math.isnan(self.expected):
            return f"{first}; how many of them are wrong is not known; go on while many are"
        return f"{first}; about {self.expected:,.0f} of them are wrong ({self.expected / self.inspect:.0%})"

    def _class(self, number: int) -> str:
        return label_text(number, self._names)

    def __str__(self) -> str:
        body = (f"  {title:<12}{text}" for title, text in self.lines())
        return "\n".join([f"Health of the labels of {self.examples:,} examples", *body])

    __repr__ = __str__


def _pairs(pairs: Sequence[tuple[int, int]]) -> str:
    return listed([f"{one} and {other}" for one, other in pairs], _LISTED)


def health(columns: Columns, manifest: Mapping[str, Any]) -> Health:
    """Return how good the labels are; see ``AuditReport.health``."""
    about = manifest.get("labels") or {}
    beliefs = LabelBeliefs.read(about)
    told, reason = beliefs.told, beliefs.reason if about else _unknown(columns)
    if (residuals := far_off(columns)) is not None:
        reason = f"{reason}; {far_off_told(*residuals)}"
    inspect, expected = _worth_a_look(columns, told)
    sizes = _counts(columns["label"]) if "label" in columns else {}
    wrong: dict[int, float] = dict.fromkeys(sizes, 0.0 if told else math.nan)
    overlaps: dict[tuple[int, int], float] = {}
    for (given, other), count in flows(columns, about).items():
        if told and given in wrong:
            wrong[given] += count
        pair = min(given, other), max(given, other)
        overlaps[pair] = overlaps.get(pair, 0.0) + count
    duplicates, contradicting = _duplicates(columns)
    return Health(
        examples=len(columns["index"]),
        verdict="told" if told else "cannot tell",
        reason=reason,
        noise_rate=beliefs.noise_rate if told else math.nan,
        noise_interval=(beliefs.low, beliefs.high),
        classes={number: {"examples": size, "wrong": wrong[number]} for number, size in sizes.items()},
        overlaps=dict(sorted(((p, n) for p, n in overlaps.items() if n >= 0.5), key=lambda item: (-item[1], item[0]))),
        inspect=inspect,
        expected=expected,
        nonfinite=int((~columns["finite"].astype(bool)).sum()),
        duplicates=duplicates,
        contradicting=contradicting,
        _names=manifest.get("label_names"),
        _counted=beliefs.counted,
    )


def far_off(columns: Columns) -> tuple[int, float] | None:
    """Return how many targets of a regression are far off, and how many would be if residuals were normal.

    Far: over 3.5 times the deviation that the median of their mean distances (``el2n``) speaks of. None for losses with
    class decisions. With several outputs the distances vary less than one alone, so that fewer are far by chance.
    """
    if "el2n" not in columns or {"label", "aum"} & set(columns):
        return None
    distances = columns["el2n"][np.isfinite(columns["el2n"])]
    deviation = float(np.median(distances)) / _NORMAL_MEDIAN if len(distances) else 0.0
    far = int((distances > _FAR * deviation).sum()) if deviation > 0 else 0
    return far, len(distances) * math.erfc(_FAR / math.sqrt(2))


def far_off_told(far: int, expected: float) -> str:
    """Return that as words."""
    return (
        f"{far:,} targets are over {_FAR:g} robust deviations from what training predicted, "
        f"{expected:.1f} would be if residuals were normal"
    )


def _duplicates(columns: Columns) -> tuple[tuple[tuple[int, int], ...], tuple[tuple[int, int], ...]]:
    """Return the pairs that are likely copies, and those of them with different labels."""
    if not {"nearest", "near_duplicate"} <= set(columns):
        return (), ()
    rows = np.flatnonzero(columns["near_duplicate"])
    found = np.sort(np.stack([columns["index"][rows], columns["nearest"][rows]], 1), 1)
    pairs = np.unique(found, axis=0)
    if "label" not in columns or not len(pairs):
        return _tuples(pairs), ()
    given = columns["label"][np.searchsorted(columns["index"], pairs)]  # sorted by index
    return _tuples(pairs), _tuples(pairs[(given >= 0).all(1) & (given[:, 0] != given[:, 1])])


def _tuples(pairs: NDArray[Any]) -> tuple[tuple[int, int], ...]:
    return tuple((int(one), int(other)) for one, other in pairs)


def _unknown(columns: Columns) -> str:
    if "label" not in columns:
        return NO_CLASSES
    return "no estimate was made (the run was interrupted, or an older version audited it)"


def _worth_a_look(columns: Columns, told: bool) -> tuple[int, float]:
    """Return how many of the ranking to look at, and how many of these are expected to be wrong."""
    size = len(columns["index"])
    if (residuals := far_off(columns)) is not None:
        return residuals[0], math.nan
    if not told or "wrong_probability" not in columns:
        return min(max(int(columns["candidate"].sum()), FIRST_LOOK), size), math.nan
    chances = columns["wrong_probability"]
    most = int((np.nan_to_num(chances) >= _WORTH_A_LOOK).sum())
    return most, float(np.nansum(chances[columns["rank"] <= most]))


def flows(columns: Columns, about: Mapping[str, Any]) -> dict[tuple[int, int], float]:
    """Return how many labels of one class are likely of another, by both."""
    if "label" not in columns or "suggested" not in columns:
        return {}
    if joint := about.get("joint"):
        classes = about["classes"]
        return {
            (given, other): float(count)
            for given, row in zip(classes, joint, strict=True)
            for other, count in zip(classes, row, strict=True)
            if given != other and count
        }
    pairs = np.stack([columns["label"], columns["suggested"]], 1)
    weights = np.nan_to_num(np.asarray(columns.get("wrong_probability", columns["candidate"]), dtype=np.float64))
    known = (pairs >= 0).all(1) & (pairs[:, 0] != pairs[:, 1]) & (weights > 0)
    distinct, which = np.unique(pairs[known], axis=0, return_inverse=True)
    counts = np.bincount(which.reshape(-1), weights[known], minlength=len(distinct))
    return {(int(given), int(other)): float(n) for (given, other), n in zip(distinct, counts, strict=True)}


def _counts(labels: NDArray[Any]) -> dict[int, int]:
    numbers, counts = np.unique(labels[labels >= 0], return_counts=True)
    return dict(zip(numbers.tolist(), counts.tolist(), strict=True))


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value
