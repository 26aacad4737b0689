"""The report as a few lines of text: what was covered, what was found, where it lies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_influence.audit.acting import advice
from lightning_influence.audit.belief import LabelBeliefs
from lightning_influence.audit.columns import Columns, candidate_rows, shown_in
from lightning_influence.gradients.coverage import listed

_LISTED = 10  # candidates
_NAMED = 3  # proponents, and opponents, of each query


def summary(columns: Columns, manifest: Mapping[str, Any], pairs: Columns | None, directory: object = None) -> str:
    """Return what is printed of a report."""
    size = len(columns["index"])
    lines = [f"Influence audit of {size:,} training examples ({manifest.get('status', 'complete')})"]
    if coverage := manifest.get("coverage"):
        lines.append(f"  coverage    {coverage['summary']}")
    if seconds := manifest.get("seconds"):
        spent = ", ".join(f"{name} {_told(value, '.1f')} s" for name, value in seconds.items())
        lines.append(f"  time        {spent}")
    if swept := manifest.get("damping_sweep"):
        told = ", ".join(
            f"{_told(stability, '.2f')} with {_told(factor, 'g')} x"
            for factor, stability in zip(swept["factors"], swept["stability"], strict=False)
            if factor != 1
        )
        lines.append(f"  damping     rank correlation of self_influence: {told} (on {swept['examples']} examples)")
    for note in manifest.get("notes", ()):
        lines.append(f"  note        {note}")
    if bad := columns["index"][~columns["finite"].astype(bool)].tolist():
        lines.append(f"  non-finite  {len(bad)} examples, left out of the factors: {listed(bad, 10)}")
    if about := manifest.get("labels"):
        lines += _labels(columns, LabelBeliefs.read(about))
    rows = candidate_rows(columns)
    ranked_by = " + ".join(manifest.get("ranked_by", ()))
    lines.append(
        f"  candidates  {len(rows):,} ({len(rows) / max(size, 1):.1%}){f' ranked by {ranked_by}' if ranked_by else ''}"
    )
    if len(rows):
        names = shown_in("table", columns)
        lines.append("    " + "".join(f"{'given' if name == 'label' else name:>18}" for name in names))
        for row in rows[:_LISTED]:
            values = [columns[name][row] for name in names]
            lines.append("    " + "".join(f"{v:>18}" if isinstance(v, np.integer) else f"{v:>18.4g}" for v in values))
    if queries := manifest.get("queries"):
        lines += _queries(queries, pairs)
    if detection := manifest.get("detection"):
        lines.append("  against the known label noise (recall: share found in the first 10 %)")
        lines.append(f"    {'column':<24}{'AUROC':>8}{'AP':>8}{'recall':>8}")
        for name, values in detection.items():
            numbers = "".join(_told(values[key], "8.3f") for key in ("auroc", "average_precision", "recall_at"))
            lines.append(f"    {name:<24}{numbers}")
    if directory is not None:
        lines.append(f"  saved in    {directory}")
    return "\n".join(lines)


def _labels(columns: Columns, beliefs: LabelBeliefs) -> list[str]:
    """Return what is believed of the labels as a whole."""
    if not beliefs.told:
        return [f"  labels      cannot tell which are wrong: {beliefs.reason}"]
    return [
        f"  labels      about {beliefs.noise_rate:.1%} are wrong ({beliefs.low:.1%} to {beliefs.high:.1%}), mistakes "
        "that the network shares not counted",
        f"  advice      {advice(columns, beliefs)}",
    ]


def _told(value: float | None, form: str) -> str:
    """Return a number as text; in a manifest that was read, null stands for NaN."""
    return format(float("nan") if value is None else value, form)


def strongest_pairs(pairs: Columns, most: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Yield for every query its rows in the table of pairs, of proponents and of opponents, the strongest first."""
    order = np.lexsort((pairs["rank"], pairs["number"]))
    starts = np.unique(pairs["number"][order], return_index=True)[1]
    for rows in np.split(order, starts[1:]) if len(order) else ():
        kinds = pairs["kind"][rows]
        yield rows[kinds == "proponent"][:most], rows[kinds == "opponent"][:most]


def _queries(about: Mapping[str, Any], pairs: Columns | None) -> list[str]:
    """Return a line for every query, with its strongest proponents and opponents."""
    lines = [f"  queries     {about['title']}"]
    if "value" in about:
        lines[0] += f"; {about['measurement']} of all {about['examples']:,}: {_told(about['value'], '.4g')}"
    if pairs is None:
        return lines
    for both in strongest_pairs(pairs, _NAMED):
        first = int(np.concatenate(both)[0])
        told = f"    #{int(pairs['query'][first])}"
        if pairs["query_label"][first] >= 0:
            told += f" given {int(pairs['query_label'][first])}, predicted {int(pairs['query_predicted'][first])}"
        told += f", {about['per_query']} {pairs['measured'][first]:.3g}"
        for kind, rows in zip(("proponents", "opponents"), both, strict=True):
            strongest = ", ".join(f"{int(pairs['index'][row])} ({pairs['score'][row]:+.3g})" for row in rows)
            told += f"; {kind} {strongest or 'none'}"
        lines.append(told)
    return lines
