"""Candidates: the most suspicious examples, as a table and as pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from lightning_influence.audit.columns import COLUMNS, Columns, candidate_rows, legend, shown_in
from lightning_influence.audit.words import cell_text
from lightning_influence.loggers.exhibits import Picture, Table
from lightning_influence.loggers.pictures import sheet
from lightning_influence.loggers.text import caption, escape, id_line

_TAG = "influence/candidates"
_LISTED = 50
# TensorBoard's Time Series dashboard shows a sheet 210 pixels high: pictures stay recognisable on small ones.
_ON_A_SHEET, _IN_A_ROW = 9, 3


def candidates(
    columns: Columns,
    *,
    images: Callable[[list[int]], Sequence[Tensor | str] | None],
    label_names: Sequence[str] | None = None,
) -> Iterator[Table | Picture]:
    """Yield the table of candidates and their pictures, ``influence/candidates``.

    The pictures come on sheets of nine, the most suspicious ones first; the second is ``influence/candidates/2``.

    Args:
        columns: The scores table.
        images: Called with dataset indices; returns an image ``[C, H, W]`` or a text for each, or None where there is
            nothing to show.
        label_names: Name of each class, or None to show class numbers.
    """
    yield candidates_table(columns, label_names)
    rows = candidate_rows(columns, _LISTED).tolist()
    shown = images([int(columns["index"][row]) for row in rows]) if rows else None
    if shown is None:
        return
    pictures = [(image, _caption(columns, row, label_names)) for image, row in zip(shown, rows, strict=True)]
    for first in range(0, len(pictures), _ON_A_SHEET):
        tag = f"{_TAG}/{first // _ON_A_SHEET + 1}" if first else _TAG
        yield Picture(tag, sheet(pictures[first : first + _ON_A_SHEET], _IN_A_ROW))


def candidates_table(columns: Columns, label_names: Sequence[str] | None) -> Table:
    """Return the most suspicious examples, with the columns that are shown in tables.

    Args:
        columns: The scores table. Unknown values (NaN, label -1) are an en dash.
        label_names: Name of each class, or None to show class numbers.
    """
    every, rows, total = candidate_rows(columns), candidate_rows(columns, _LISTED), len(columns["index"])
    if not rows.size:
        return Table(_TAG, (), (), f"**No candidates** among {total:,} training examples.")
    names = shown_in("table", columns)
    labels = {name for name in names if "names" in COLUMNS[name].shown}
    cells = [
        [
            cell_text(name, value, label_names, label=name in labels)
            if name in labels or name == "id" or isinstance(value, str)
            else value.item()
            for value in columns[name][rows]
        ]
        for name in names
    ]
    head = f"**{len(every):,} candidates** among {total:,} training examples"
    head += f"; the {rows.size} most suspicious are shown." if rows.size < len(every) else ", most suspicious first."
    if low := [name for name in names if COLUMNS[name].direction == "low"]:
        head += f" High scores are suspicious; for {' and '.join(low)}, low ones are."
    titles = ["given" if name == "label" else name for name in names]
    explained = legend(names)
    return Table(_TAG, titles, list(zip(*cells, strict=True)), head, f"{escape(explained)}." if explained else "")


def _caption(columns: Columns, row: int, label_names: Sequence[str] | None) -> str:
    given, suggested = (columns[name][row] if name in columns else -1 for name in ("label", "suggested"))
    return caption(columns["index"][row], given, "suggests", suggested, label_names) + id_line(columns, row)
