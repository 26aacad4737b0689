"""What to do about an audit's candidates: train without them, or with the labels that it suggests.

Both start from the columns of a report and leave the data as they are: indices for ``torch.utils.data.Subset``, and a
data set that hands out other labels.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from lightning_influence.audit.belief import LabelBeliefs
from lightning_influence.audit.columns import candidate_rows
from lightning_influence.audit.relabel import LabelError, Path, Relabelled, as_label, fetched, find_label
from lightning_influence.core.errors import is_number, short
from lightning_influence.core.indices import Indices, distinct
from lightning_influence.gradients.coverage import listed

Columns = Mapping[str, NDArray[Any]]

# Share of the labels acted on that are expected to be wrong, at least.
PRECISION = 0.8
# A class of which more would be gone is left alone: twice the noise rate, within these bounds.
_MOST_OF_A_CLASS = 0.5, 0.8


@dataclass(frozen=True, eq=False)
class Advice:
    """Which labels are so probably wrong that one may act on them without looking at each.

    Attributes:
        indices: Dataset indices, the surest first.
        expected: How many of their labels are expected to be wrong.
        precision: The level asked for: share of them whose label is expected to be wrong, at least.
        classes: Of each class concerned, how many examples there are and how many of them are among these.
        spared: Classes that are left alone, with the number of their examples that would have been among these.
        reason: Why there is nothing to act on; empty otherwise.
    """

    indices: list[int]
    expected: float
    precision: float
    classes: dict[int, tuple[int, int]]
    spared: dict[int, int]
    reason: str = ""

    def __len__(self) -> int:
        """Return how many they are."""
        return len(self.indices)

    def __str__(self) -> str:
        if not self.indices:
            return f"nothing to act on: {self.reason}."
        changes = [f"{own}: {taken} of {size}" for own, (size, taken) in self.classes.items()]
        lines = [
            f"{len(self)} labels are sure enough: about {self.expected:.0f} of them are expected to be wrong "
            f"({self.expected / len(self):.0%}; asked for: {100 * self.precision:.3g}%). By class: "
            f"{listed(changes, 12)}."
        ]
        if self.spared:
            told = ", ".join(f"{own} ({count} examples)" for own, count in self.spared.items())
            lines.append(f"Left alone, as most of the class would be gone: {told}.")
        return " ".join(lines)


def advice(columns: Columns, beliefs: LabelBeliefs, precision: float = PRECISION) -> Advice:
    """Return what one may act on; see ``AuditReport.advice``."""
    if not is_number(precision, above=0) or precision > 1:
        raise ValueError(f"precision={short(precision)}; expected a share of right decisions, above 0 and up to 1.")
    nothing = Advice([], 0.0, float(precision), {}, {}, beliefs.reason or "no label is sure enough to be wrong")
    if not beliefs.told:
        return nothing
    if "wrong_probability" not in columns:
        return replace(nothing, reason="not all of the audits say how sure each label is")
    probability, labels = columns["wrong_probability"], columns["label"]
    rows = candidate_rows(columns)
    rows = rows[np.argsort(-probability[rows], kind="stable")]
    sure = _sure(probability, rows, beliefs, precision)[: _cap(beliefs, labels)]
    sizes, taken = np.bincount(labels[labels >= 0]), np.bincount(labels[sure], minlength=1)
    most = np.clip(2 * beliefs.noise_rate, *_MOST_OF_A_CLASS)
    spared = {int(own): int(taken[own]) for own in np.flatnonzero(taken) if taken[own] > most * sizes[own]}
    rows = _sure(probability, rows[~np.isin(labels[rows], list(spared))], beliefs, precision)[: _cap(beliefs, labels)]
    if not len(rows):
        gone = f"most of the classes {listed(sorted(spared), 12)} would be gone"
        return replace(nothing, spared=spared, reason=gone if spared else nothing.reason)
    found, counts = np.unique(labels[rows], return_counts=True)
    classes = {int(own): (int(sizes[own]), int(count)) for own, count in zip(found, counts, strict=True)}
    indices = [int(index) for index in columns["index"][rows]]
    return Advice(indices, float(probability[rows].sum()), float(precision), classes, spared)


def _sure(
    probability: NDArray[np.float64], rows: NDArray[np.int64], beliefs: LabelBeliefs, precision: float
) -> NDArray[np.int64]:
    """Return as many of the first rows as are expected to be wrong to that share."""
    if beliefs.low <= 0:  # perhaps no label is wrong: each by itself must be that sure
        rows = rows[probability[rows] >= precision]
    enough = np.flatnonzero(np.cumsum(probability[rows]) >= precision * np.arange(1, len(rows) + 1))
    return rows[: int(enough[-1]) + 1 if len(enough) else 0]


def _cap(beliefs: LabelBeliefs, labels: NDArray[np.int64]) -> int | None:
    """Return how many labels may be acted on at most: what the examples that are easiest to tell bear out."""
    return round(beliefs.surest * int((labels >= 0).sum())) if np.isfinite(beliefs.surest) else None


def clean_indices(columns: Columns, advised: Advice, drop: float | int | None = None) -> list[int]:
    """Return the examples to keep; see ``AuditReport.clean_indices``."""
    kept = columns["finite"].astype(bool)
    if drop is None:
        tell_of_nothing(advised)
        kept &= ~np.isin(columns["index"], advised.indices)
    else:
        share = isinstance(drop, (float, np.floating))
        number = isinstance(drop, (int, np.integer)) and not isinstance(drop, bool)
        if not (share or number) or not 0 <= drop < (1 if share else len(kept)):
            raise ValueError(
                f"drop={short(drop)}; expected a share from 0 to below 1, a number of examples below "
                f"{len(kept)}, or None "
                "for what is sure enough. Without examples of your choice: "
                "`sorted({*report.clean_indices(0)} - {*mine})`."
            )
        kept &= columns["rank"] > (round(float(drop) * len(kept)) if share else drop)
    return [int(index) for index in np.sort(columns["index"][kept])]


def tell_of_nothing(advised: Advice) -> None:
    """Warn that nothing is done, and why."""
    if not advised.indices:
        warnings.warn(
            f"the data stay as they are: {advised.reason}. `drop=` and `indices=` act on what you choose.",
            stacklevel=4,
        )


def relabelled(
    columns: Columns,
    dataset: Dataset[Any],
    candidates: Sequence[int],
    *,
    indices: Sequence[int] | None = None,
    labels: Mapping[int, int] | None = None,
    size: int | None = None,
) -> Relabelled:
    """Return a data set with suggested labels, or with others; see ``AuditReport.relabelled``.

    Args:
        columns: The audit's columns.
        dataset: What was audited.
        candidates: Examples to relabel unless others are asked for.
        indices: These others.
        labels: New labels in place of the suggested ones.
        size: Length of the data set that was audited; None if that was not noted.
    """
    if isinstance(indices, Mapping):
        raise ValueError("indices is a mapping; new labels are passed as `labels={index: label}`.")
    if labels is not None:
        if indices is not None:
            raise ValueError("labels= says which examples and which labels; pass it without indices=.")
        new = new_labels(columns, labels)
        return Relabelled(dataset, new, _label_path(columns, dataset, list(new), size))
    if "suggested" not in columns or "label" not in columns:
        raise LabelError(
            "the audit suggests no labels: the loss of this training has no classes, or no known loss call. Leave the "
            "suspicious examples out instead, with `clean_indices()`."
        )
    rows = _rows(columns, candidates if indices is None else indices)
    new = {int(columns["index"][row]): int(columns["suggested"][row]) for row in rows}
    return Relabelled(dataset, new, _label_path(columns, dataset, list(new), size))


def new_labels(columns: Columns, labels: Mapping[int, int]) -> dict[int, int]:
    """Return the new labels that differ from the given ones.

    Raises:
        LabelError: If the audit knows no labels, not that of an example, or no such class.
        ValueError: If this is no mapping, or an index is not in the audit.
    """
    if not isinstance(labels, Mapping):
        raise ValueError(f"labels is a {type(labels).__name__}; expected a mapping from index to label, `{{17: 3}}`.")
    if "label" not in columns:
        raise LabelError("the audit knows no labels (no classes, or no known loss call), so that none can be replaced.")
    given = dict(zip(columns["index"].tolist(), columns["label"].tolist(), strict=True))
    known = classes_of(columns)
    chosen = distinct(
        list(labels), given, "not in the audit", f"dataset indices of the {len(given):,} audited examples"
    )
    new = dict(zip(chosen, map(as_label, labels.values()), strict=True))
    if odd := {index: label for index, label in zip(chosen, labels.values(), strict=True) if new[index] not in known}:
        raise LabelError(
            f"new labels {dict(list(odd.items())[:5])} are none that the audit has seen; expected one of the classes "
            f"{listed(sorted(known), 20)}."
        )
    if unknown := [index for index in chosen if given[index] < 0]:
        raise LabelError(f"the audit knows no label for the examples {listed(unknown, 10)}; leave them out.")
    return {index: int(label) for index, label in new.items() if label is not None and label != given[index]}


def classes_of(columns: Columns) -> set[int]:
    """Return the classes that an audit has seen, given, predicted or suggested."""
    names = [name for name in ("label", "predicted", "suggested") if name in columns]
    return {int(label) for name in names for label in np.unique(columns[name]) if label >= 0}


def _rows(columns: Columns, indices: Indices) -> NDArray[np.int64]:
    """Return the rows of the examples that have a suggestion other than their label."""
    rows = {int(index): row for row, index in enumerate(columns["index"])}
    chosen = distinct(indices, rows, "not in the audit", f"dataset indices of the {len(rows):,} audited examples")
    found = np.asarray([rows[index] for index in chosen], dtype=np.int64)
    given, suggested = columns["label"][found], columns["suggested"][found]
    unknown = (suggested < 0) | (given < 0)
    if unknown.any():
        shown = columns["index"][found[unknown]][:10].tolist()
        raise LabelError(f"the audit knows no label, or suggests none, for the examples {shown}; leave them out.")
    differing: NDArray[np.int64] = found[suggested != given]
    return differing


def _label_path(columns: Columns, dataset: Any, changed: Sequence[int], size: int | None) -> Path:
    """Return where the label lies, after a look at whether this is the data set that was audited."""
    pairs = zip(columns["index"].tolist(), columns["label"].tolist(), strict=True)
    given = {int(index): int(label) for index, label in pairs if label >= 0}
    length, most = len(dataset), int(columns["index"].max()) + 1
    if length < most or length != (size or length):
        raise LabelError(
            f"this {type(dataset).__name__} has {length:,} examples, and the audited data set had {size or most:,}; "
            "pass the training data set of the run that was audited."
        )
    try:
        path = find_label(dataset, given)
    except LabelError as error:
        raise LabelError(f"{error} (Or is this not the data set that was audited?)") from error
    for index, leaves in fetched(dataset, changed):
        if as_label(leaves.get(path)) != given[index]:
            raise LabelError(
                f"example {index} holds the label {leaves.get(path)!r}, and it had {given[index]} when it was audited; "
                "pass the data set of that run, unchanged."
            )
    return path
