"""Several audits of the same data as one: columns of scores merged over runs.

Seeds are noise that averaging takes out: three models raised the LDS of every method but grad-cos on digits
(``docs/results/lds.md``). Scores have units (a loss, a change of a loss, a number of epochs), so that they are averaged
as they are; what is ranked by is made comparable afterwards, by the z-scores of the ranking.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_influence.audit.belief import LabelBeliefs
from lightning_influence.audit.columns import COLUMNS, Columns, column_of


class EnsembleError(ValueError):
    """Audits that can't be merged; the message says which and why."""


def merged_columns(members: Sequence[Columns]) -> tuple[dict[str, NDArray[Any]], list[str]]:
    """Merge the columns of audits of the same data, each as its ``Column.merge`` says.

    Scores are means over the runs that know them. An example is finite if it is in all runs. A run's vote for a
    suggested label weighs as much as the run is sure, ``|prob_margin|``: with two classes that is the label with the
    larger mean probability. The mean of ``prob_margin`` is at most the margin of the mean probabilities, as runs that
    contradict a label need not agree on another one.

    Args:
        members: Columns by name, ``[n]``, sorted by ``index``.

    Returns:
        The columns that all members have, without those of the ranking, and the names of the others.

    Raises:
        EnsembleError: If there are fewer than two members, or they are about other examples or labels.
    """
    if len(members) < 2:
        raise EnsembleError(f"{len(members)} audits to merge; expected two at least.")
    common = set.intersection(*(set(member) for member in members))
    left_out = sorted(set.union(*(set(member) for member in members)) - common)
    ids = {}
    for name in (name for name, column in COLUMNS.items() if column.merge == "same"):
        if name in left_out and name != "id":  # examples are the same ones, whether or not a run knew their names
            raise EnsembleError(f"some audits have the column {name!r} and others have not; audit them alike.")
        known = [(number, member[name]) for number, member in enumerate(members) if name in member]
        for number, values in known:
            if not np.array_equal(values, known[0][1]):
                raise EnsembleError(
                    f"audit {number} has another column {name!r} than audit {known[0][0]}: it is about other examples "
                    "or labels. Merge audits of the same training data."
                )
        if known and name in left_out:
            ids[name] = known[0][1]
            left_out.remove(name)
    names = [name for name in members[0] if name in common and column_of(name).merge != "anew"]
    return {name: _merged(name, members) for name in names} | ids, left_out


def merged_manifest(
    manifests: Sequence[Mapping[str, Any]], sources: Sequence[str], left_out: Sequence[str]
) -> dict[str, Any]:
    """Return the manifest of an ensemble, without what the ranking says.

    Args:
        manifests: Of the audits.
        sources: What each is: its directory.
        left_out: Columns that not all of them have.

    Raises:
        EnsembleError: If an audit is not complete, or they are about other data.
    """
    for manifest, source in zip(manifests, sources, strict=True):
        if (status := manifest.get("status", "complete")) != "complete":
            raise EnsembleError(f"{source} is {status!r}; expected complete audits. Leave it out, or finish the run.")
    prints = [manifest.get("fingerprint", {}) for manifest in manifests]
    data = {source: found["data"] for source, found in zip(sources, prints, strict=True) if "data" in found}
    if len(set(data.values())) > 1:
        told = "; ".join(f"{source}: {value}" for source, value in data.items())
        raise EnsembleError(f"the audits are about different training data ({told}); merge audits of the same data.")
    models = sorted({found["model"] for found in prints if "model" in found})
    notes = [f"an ensemble of {len(sources)} audits: scores are means over them, labels a vote."]
    if left_out:
        notes.append(f"columns that not all audits have were left out: {', '.join(left_out)}.")
    notes += dict.fromkeys(note for manifest in manifests for note in manifest.get("notes", ()))
    fingerprint = {"model": ", ".join(models), "data": next(iter(data.values()), "")}
    about = {"status": "complete", "ensemble": list(sources), "fingerprint": fingerprint, "notes": notes}
    return about | {name: manifests[0][name] for name in ("label_names",) if name in manifests[0]}


def merged_beliefs(manifests: Sequence[Mapping[str, Any]]) -> LabelBeliefs:
    """Return what most of the runs that can tell believe of the labels: means; that none can tell unless most can."""
    found = [LabelBeliefs.read(manifest.get("labels", {})) for manifest in manifests]
    told = [each for each in found if each.told]
    if 2 * len(told) <= len(found):
        reasons = dict.fromkeys(each.reason for each in found if not each.told)
        return LabelBeliefs(reason="; ".join(reasons), noise_rate=_mean([each.noise_rate for each in found]))
    joints = [each.joint for each in told if each.joint is not None]
    numbers = [(each.noise_rate, each.low, each.high, each.surest) for each in told]
    rate, low, high, surest = np.mean(numbers, 0).tolist()
    alike = len(joints) == len(told) and len({joint.shape for joint in joints}) == 1
    return LabelBeliefs("told", "", rate, low, high, surest, np.mean(np.stack(joints), 0) if alike else None)


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if np.isfinite(value)]
    return float(np.mean(known)) if known else float("nan")


def _merged(name: str, members: Sequence[Columns]) -> NDArray[Any]:
    stacked = np.stack([member[name] for member in members])
    how = column_of(name).merge
    if how == "first":
        return np.asarray([next((own for own in each if own), each[0]) for each in stacked.T], dtype=stacked.dtype)
    if how == "vote":
        sure = name == "suggested" and all("prob_margin" in member for member in members)
        weights = np.abs([member["prob_margin"] for member in members]) if sure else np.ones(stacked.shape)
        return _vote(stacked.astype(np.int64), np.nan_to_num(weights))
    if how == "mean":
        values = stacked.astype(np.float64)
        known = ~np.isnan(values)
        total = np.where(known, values, 0.0).sum(0)
        return np.where(known.any(0), total / np.maximum(known.sum(0), 1), np.nan)
    return np.asarray(stacked[0] if how == "same" else stacked.astype(bool).all(0) if how == "all" else stacked.sum(0))


def _vote(labels: NDArray[np.int64], weights: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return the class with the largest sum of weights ``[n]`` of labels ``[m, n]``, the smallest of equal ones.

    -1 is no vote, and the result where there is none.
    """
    total = np.stack([np.where(labels == own, weights, 0.0).sum(0) for own in labels])
    total[labels < 0] = -np.inf
    best = np.where(total == total.max(0), labels, np.iinfo(np.int64).max)
    return np.asarray(best.min(0))
