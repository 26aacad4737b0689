"""Candidates in TensorBoard: the most suspicious examples, as a table and as pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from lightning_influence.audit.columns import COLUMNS, Columns, candidate_rows, legend, shown_in
from lightning_influence.audit.words import cell_text
from lightning_influence.tensorboard.pictures import sheet
from lightning_influence.tensorboard.text import caption, escape, id_line, table

_TAG = "influence/candidates"
_LISTED = 50
# The Time Series dashboard shows a sheet 210 pixels high: pictures stay recognisable on small ones.
_ON_A_SHEET, _IN_A_ROW = 9, 3


def write_candidates(
    writer: Any,
    columns: Columns,
    *,
    images: Callable[[list[int]], Sequence[Tensor | str] | None],
    label_names: Sequence[str] | None = None,
    step: int,
) -> None:
    """Write the table of candidates and their pictures under ``influence/candidates``.

    The pictures come on sheets of nine, the most suspicious ones first; the second is ``influence/candidates/2``.

    Args:
        writer: Event file writer.
        columns: The scores table.
        images: Called with dataset indices; returns an image ``[C, H, W]`` or a text for each, or None where there is
            nothing to show.
        label_names: Name of each class, or None to show class numbers.
        step: Global step.
    """
    writer.add_text(_TAG, candidates_markdown(columns, label_names), step)
    rows = candidate_rows(columns, _LISTED).tolist()
    shown = images([int(columns["index"][row]) for row in rows]) if rows else None
    if shown is None:
        return
    pictures = [(image, _caption(columns, row, label_names)) for image, row in zip(shown, rows, strict=True)]
    for first in range(0, len(pictures), _ON_A_SHEET):
        tag = f"{_TAG}/{first // _ON_A_SHEET + 1}" if first else _TAG
        writer.add_image(tag, sheet(pictures[first : first + _ON_A_SHEET], _IN_A_ROW), step)


def candidates_markdown(columns: Columns, label_names: Sequence[str] | None) -> str:
    """Return the table of the most suspicious examples, with the columns that are shown in tables.

    Args:
        columns: The scores table. Unknown values (NaN, label -1) are an en dash.
        label_names: Name of each class, or None to show class numbers.
    """
    every, rows, total = candidate_rows(columns), candidate_rows(columns, _LISTED), len(columns["index"])
    if not rows.size:
        return f"**No candidates** among {total:,} training examples."
    names = shown_in("table", columns)
    labels = {name for name in names if "names" in COLUMNS[name].shown}
    cells = [
        [cell_text(name, value, label_names, label=name in labels) for value in columns[name][rows]] for name in names
    ]
    head = f"**{len(every):,} candidates** among {total:,} training examples"
    head += f"; the {rows.size} most suspicious are shown." if rows.size < len(every) else ", most suspicious first."
    if low := [name for name in names if COLUMNS[name].direction == "low"]:
        head += f" High scores are suspicious; for {' and '.join(low)}, low ones are."
    titles = {"label": "given"}
    titled = [titles.get(name, name) for name in names]
    words = [titles.get(name, name) for name in names if name in {*labels, "id", "text"}]
    below = f"\n{escape(explained)}.\n" if (explained := legend(names)) else ""
    return head + "\n\n" + table(titled, zip(*cells, strict=True), words) + below


def _caption(columns: Columns, row: int, label_names: Sequence[str] | None) -> str:
    given, suggested = (columns[name][row] if name in columns else -1 for name in ("label", "suggested"))
    return caption(columns["index"][row], given, "suggests", suggested, label_names) + id_line(columns, row)
