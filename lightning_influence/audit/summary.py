"""The report as a few lines of text: what was covered, what was found, where it lies."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_influence.audit.acting import advice
from lightning_influence.audit.belief import LabelBeliefs
from lightning_influence.audit.columns import PAIR_LISTS, Columns, candidate_rows, column_of, legend, shown_in
from lightning_influence.audit.health import far_off, far_off_told
from lightning_influence.audit.words import called, cell_text, label_text
from lightning_influence.gradients.coverage import listed

_LISTED = 10  # candidates, and queries
_WIDTH = 116  # letters of a line that explains
_NOTED = 2  # notes, where it has to be short
_NAMED = 3  # proponents, and opponents, of each query


def summary(columns: Columns, manifest: Mapping[str, Any], pairs: Columns | None, directory: object = None) -> str:
    """Return what is printed of a report."""
    size = len(columns["index"])
    lines = [f"Influence audit of {size:,} training examples ({manifest.get('status', 'complete')})"]
    if weights := manifest.get("audited_weights"):
        lines.append(f"  weights     {weights['told']}")
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
    if (residuals := far_off(columns)) is not None:
        lines.append(f"  residuals   {far_off_told(*residuals)}: the first of `report.ranking`")
    rows = candidate_rows(columns)
    ranked_by = " + ".join(manifest.get("ranked_by", ()))
    lines.append(
        f"  candidates  {len(rows):,} ({len(rows) / max(size, 1):.1%}){f' ranked by {ranked_by}' if ranked_by else ''}"
    )
    label_names = manifest.get("label_names")
    if len(rows):
        names = shown_in("table", columns)
        lines += (f"    {line}" for line in _table(columns, names, rows[:_LISTED], label_names))
        lines += (f"    {line}" for line in textwrap.wrap(legend(names), _WIDTH))
    if queries := manifest.get("queries"):
        lines += _queries(queries, pairs, label_names)
    if detection := manifest.get("detection"):
        lines.append("  against the known label noise (recall: share found in the first 10 %)")
        lines.append(f"    {'column':<24}{'AUROC':>8}{'AP':>8}{'recall':>8}")
        for name, values in detection.items():
            numbers = "".join(_told(values[key], "8.3f") for key in ("auroc", "average_precision", "recall_at"))
            lines.append(f"    {name:<24}{numbers}")
    if directory is not None:
        lines.append(f"  saved in    {directory}")
    return "\n".join(lines)


def brief(columns: Columns, manifest: Mapping[str, Any], directory: object = None) -> str:
    """Return the most important of it in at most eight lines, for logs and notebooks."""
    size, candidates = len(columns["index"]), int(columns["candidate"].sum())
    lines = [f"Influence audit of {size:,} training examples ({manifest.get('status', 'complete')})"]
    notes = manifest.get("notes", ())
    lines += [f"  note        {note}" for note in notes[:_NOTED]]
    if len(notes) > _NOTED:
        lines.append(f"  note        and {len(notes) - _NOTED} more, see `print(report)`")
    if about := manifest.get("labels"):
        lines += _labels(columns, LabelBeliefs.read(about))
    lines.append(f"  candidates  {candidates:,} ({candidates / max(size, 1):.1%}); all of it: `print(report)`")
    if directory is not None:
        lines.append(f"  saved in    {directory}")
    return "\n".join(lines)


def _table(
    columns: Columns, names: Sequence[str], rows: NDArray[np.int64], label_names: Sequence[str] | None
) -> Iterator[str]:
    """Yield lines with a head: numbers to the right, what is text to the left."""
    cells = []
    for name in names:
        label = "names" in column_of(name).shown
        entries = ["given" if name == "label" else name]
        entries += [cell_text(name, columns[name][row], label_names, label=label, digits=4) for row in rows]
        words, width = name in ("id", "text"), max(map(len, entries))
        cells.append([entry.ljust(width) if words else entry.rjust(width) for entry in entries])
    for line in zip(*cells, strict=True):
        yield "  ".join(line).rstrip()


def _labels(columns: Columns, beliefs: LabelBeliefs) -> list[str]:
    """Return what is believed of the labels as a whole."""
    if not beliefs.told:
        return [f"  labels      cannot tell which are wrong: {beliefs.reason}"]
    return [
        f"  labels      about {beliefs.noise_rate:.1%} are wrong ({beliefs.low:.1%} to {beliefs.high:.1%}), "
        f"{beliefs.counted}",
        f"  advice      {advice(columns, beliefs)}",
    ]


def _told(value: float | None, form: str) -> str:
    """Return a number as text; in a manifest that was read, null stands for NaN."""
    return format(float("nan") if value is None else value, form)


def strongest_pairs(pairs: Columns, most: int) -> Iterator[dict[str, tuple[NDArray[np.int64], NDArray[np.int64]]]]:
    """Yield for every query its rows in the table of pairs, by list: of proponents and opponents, the first first."""
    order = np.lexsort((pairs["rank"], pairs["number"]))
    starts = np.unique(pairs["number"][order], return_index=True)[1]
    for rows in np.split(order, starts[1:]) if len(order) else ():
        kinds, lists = pairs["kind"][rows], lists_of(pairs)[rows]
        yield {
            name: (own[kinds[lists == name] == "proponent"][:most], own[kinds[lists == name] == "opponent"][:most])
            for name in PAIR_LISTS
            if len(own := rows[lists == name])
        }


def lists_of(pairs: Columns) -> NDArray[Any]:
    """Return which list each row of the table of pairs is of; audits of earlier versions have the strongest alone."""
    return pairs["list"] if "list" in pairs else np.full(len(pairs["kind"]), "strongest")


def strength(pairs: Columns, row: int) -> float:
    """Return the number that the list of a row is ordered by."""
    return float(pairs["relative" if lists_of(pairs)[row] == "specific" else "score"][row])


def _queries(about: Mapping[str, Any], pairs: Columns | None, label_names: Sequence[str] | None) -> list[str]:
    """Return a line for every query, and one for each of its lists of proponents and opponents."""
    lines = [f"  queries     {about['title']}"]
    if "value" in about:
        lines[0] += f"; {about['measurement']} of all {about['examples']:,}: {_told(about['value'], '.4g')}"
    if pairs is None:
        return lines
    lines += [f"    {name + ':':<11}{PAIR_LISTS[name]}" for name in PAIR_LISTS if name in lists_of(pairs)]
    for lists in islice(strongest_pairs(pairs, _NAMED), _LISTED):
        first = int(np.concatenate(next(iter(lists.values())))[0])
        told = f"    #{called(pairs, first, 'query', 'query_id')}"
        if pairs["query_label"][first] >= 0:
            given, said = (label_text(pairs[name][first], label_names) for name in ("query_label", "query_predicted"))
            told += f" given {given}, predicted {said}"
        told += f", {about['per_query']} {pairs['measured'][first]:.3g}"
        lines.append(told)
        for name, both in lists.items():
            told = f"      {name + ':':<11}"
            for kind, rows in zip(("proponents", "; opponents"), both, strict=True):
                strongest = ", ".join(f"{called(pairs, row)} ({strength(pairs, row):+.3g})" for row in rows)
                told += f"{kind} {strongest or 'none'}"
            lines.append(told)
    if (more := len(np.unique(pairs["number"])) - _LISTED) > 0:
        lines.append(f"    and {more:,} more in `report.pairs`")
    return lines
