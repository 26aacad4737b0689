"""Which examples are suspicious.

The ranking follows what was measured (``make detection``): the *trajectory* finds wrong labels, influence at the final
weights alone does not, as a network that has memorised a wrong label is no longer surprised by it. Where there are
classes, what the run and the neighbours say of the given label ranks, the same that beliefs about labels start from
(``audit.belief``, which knows how many are wrong); else z-scores of how hard an example is to fit. All columns stay in
the table; influence earns its place there by saying which predictions an example harms.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_influence.audit.belief import DOUBT, LabelBeliefs, believe
from lightning_influence.audit.columns import COLUMNS, Columns
from lightning_influence.audit.trusted import wrong_beside_trusted
from lightning_influence.training.evidence import LabelEvidence

NO_CLASSES = "an example has no single class (but a number, tokens or several labels): it may fit badly and be right"
ONE_SIDED = "all labels are one side of a yes or no, as where a loss compares two outputs: none of them can be wrong"
_NO_EVIDENCE = "no features of the first epochs were looked at"

# What is said of labels, if there are some.
_OF_LABELS = ("label", "predicted", "suggested", "support", "neighbour_disagreement")

# Beside trusted labels some of the others must be wrong with this probability, or nothing is said of them.
_SURE = 0.5
# Of the labels that a run calls wrong so many must be so, as far as the trusted ones can tell.
_CONFIRMED = 0.8


def rank(columns: Columns) -> dict[str, NDArray[Any]]:
    """Add the audit's own columns to the scores, as ``judged`` does without evidence."""
    return judged(columns)[0]


def judged(
    columns: Columns,
    evidence: LabelEvidence | None = None,
    beliefs: LabelBeliefs | None = None,
    trusted: NDArray[np.int64] | None = None,
) -> tuple[dict[str, NDArray[Any]], LabelBeliefs]:
    """Rank the examples and say which are proposed for review.

    Args:
        columns: Score columns ``[n]``, with ``index``.
        evidence: What others say about the labels of the same examples.
        beliefs: What is known already of the labels as a whole, in place of evidence: the mean over several runs.
        trusted: Dataset indices of labels that are known to be right.

    Returns:
        A new mapping with ``suspicion``, ``rank`` (1 = most suspicious), ``candidate`` and ``finite`` added, with
        evidence ``suggested`` and ``wrong_probability``, and the columns that are computed from others; and the
        beliefs. Candidates are as many of the first as labels are believed to be wrong; none where the run cannot
        tell. Examples that are not finite rank last. With nothing to rank by, ``suspicion`` is NaN and the order that
        of the data set.
    """
    one_sided = _one_sided(columns)
    result = {name: values for name, values in columns.items() if not (one_sided and name in _OF_LABELS)}
    _add_computed(result)
    size = len(result["index"])
    finite = result.get("finite", np.ones(size, dtype=bool)).astype(bool)
    suspicion = np.where(finite & bool(ingredients(result)), _suspicion(result, finite), np.nan)
    order = np.lexsort((result["index"], -np.nan_to_num(suspicion, nan=-np.inf)))
    ranks = np.empty(size, dtype=np.int64)
    ranks[order] = np.arange(1, size + 1)
    result |= {"suspicion": suspicion, "rank": ranks, "finite": finite}
    if evidence is not None and "label" in result:
        beliefs, found = believe(result["label"], evidence, order)
        result |= found
    elif beliefs is not None and not beliefs.told and "wrong_probability" in result:  # of those who could tell
        result["wrong_probability"] = np.minimum(result["wrong_probability"], DOUBT)
    without = ONE_SIDED if one_sided else NO_CLASSES if "label" not in result else _NO_EVIDENCE
    beliefs = beliefs or LabelBeliefs(reason=without)
    eligible = finite & (result["suggested"] >= 0 if "suggested" in result else False)
    if trusted is not None and len(trusted):
        right = np.isin(result["index"], trusted)
        if "wrong_probability" in result:
            beliefs, result["wrong_probability"] = _beside_trusted(beliefs, result, right & np.isfinite(suspicion))
        else:
            beliefs = replace(beliefs, reason=f"{beliefs.reason}, and trusted labels do not change that")
        eligible &= ~right
        beliefs = replace(beliefs, trusted=int(right.sum()))
    if "wrong_probability" in result:
        # Not those that all members of an ensemble trust, nor those of which nothing is known.
        eligible &= result["wrong_probability"] > 0
    result["candidate"] = np.zeros(size, dtype=bool)
    if beliefs.told:
        first = order[eligible[order]]
        count = beliefs.noise_rate * len(first)
        if beliefs.trusted:  # which have no part in it
            count = float(np.nansum(result["wrong_probability"][first]))
        result["candidate"][first[: round(count)]] = True
    return result, beliefs


def _one_sided(columns: Columns) -> bool:
    """Tell whether all decisions are a yes, or all a no, as of preferences: the class is in the order of its inputs."""
    found = [columns[name] for name in ("label", "predicted", "suggested") if name in columns]
    known = columns["label"][columns["label"] >= 0] if "label" in columns else np.empty(0)
    return len(np.unique(known)) == 1 and all(bool((values <= 1).all()) for values in found)


def _beside_trusted(
    beliefs: LabelBeliefs, columns: Columns, right: NDArray[np.bool_]
) -> tuple[LabelBeliefs, NDArray[np.float64]]:
    """Believe what labels known to be right tell, where it is more than the run alone does."""
    wrong = np.array(columns["wrong_probability"])
    known = np.isfinite(columns["suspicion"]) & np.isfinite(wrong)
    found = np.full(len(wrong), np.nan)
    if right.any() and (known & ~right).any():
        found[known] = wrong_beside_trusted(columns["suspicion"][known], right[known], columns["label"][known])
    told = found[np.isfinite(found)]
    rate = float(told.mean()) if len(told) else 0.0
    beliefs, wrong = _contradicted(beliefs, wrong, right)
    wrong[right] = 0.0
    # The run alone knows better how sure each single label is, as long as both agree on how many are wrong.
    if told.max(initial=0.0) < _SURE or (beliefs.told and rate <= beliefs.high):
        return beliefs, wrong
    low = min(rate, float(told[told >= _SURE].sum()) / len(found))
    error = 2 * (rate * (1 - rate) / max(int(right.sum()), 1)) ** 0.5
    return replace(
        beliefs, verdict="told", reason="", noise_rate=rate, low=low, high=min(rate + error, 1.0), surest=rate
    ), found


def _contradicted(
    beliefs: LabelBeliefs, wrong: NDArray[np.float64], right: NDArray[np.bool_]
) -> tuple[LabelBeliefs, NDArray[np.float64]]:
    """Take back what a run believes, if it calls too many of the labels wrong that are known to be right."""
    if not beliefs.told or not right.any():
        return beliefs, wrong
    called, count = wrong >= _SURE, int(right.sum())
    alarms = float(called[right].mean())
    surely = alarms - 2 * (alarms * (1 - alarms) / count) ** 0.5
    if surely * (1 - beliefs.noise_rate) * (~right).sum() <= (1 - _CONFIRMED) * called[~right].sum():
        return beliefs, wrong
    reason = f"it takes {alarms:.1%} of the {count:,} labels for wrong that are known to be right"
    return replace(beliefs, verdict="cannot tell", reason=reason, low=0.0, surest=0.0), np.minimum(wrong, DOUBT)


def ingredients(columns: Columns) -> tuple[str, ...]:
    """Return the names of the columns that the ranking combines: of the first group of which one is there."""
    groups: dict[int, list[str]] = {}
    for name, column in COLUMNS.items():
        if column.ranks is not None and name in columns and np.isfinite(columns[name]).any():
            groups.setdefault(column.ranks, []).append(name)
    return tuple(groups[min(groups)]) if groups else ()


def _add_computed(columns: dict[str, NDArray[Any]]) -> None:
    for name, column in COLUMNS.items():
        if column.values is not None and name not in columns:
            try:
                values = np.asarray(column.values(columns))
                if values.shape != columns["index"].shape:
                    raise ValueError(f"its shape is {values.shape}; expected {columns['index'].shape}")
                columns[name] = values
            except KeyError:  # a column that this audit has not
                continue
            except Exception as error:  # the scores that are there may not be lost to it
                warnings.warn(f"no column {name!r}: {type(error).__name__}: {error}", stacklevel=3)


def _suspicion(columns: Columns, finite: NDArray[Any]) -> NDArray[np.float64]:
    total = np.zeros(len(finite))
    for name in ingredients(columns):
        values = COLUMNS[name].suspicion(columns[name])
        usable = finite & np.isfinite(values)
        centred = values - values[usable].mean() if usable.any() else values
        spread = centred[usable].std() if usable.any() else 0.0
        # An example that was never trained on says nothing: the mean, not an extreme.
        total += np.where(usable, centred, 0.0) / (spread if spread > 0 else 1.0)
    return total
