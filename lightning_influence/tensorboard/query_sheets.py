"""Queries in TensorBoard: each with its strongest proponents and opponents, as pictures and as a table.

`pairs` is the table of pairs (`pairs.parquet`), see `columns.PAIR_DESCRIPTIONS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from lightning_influence.tensorboard.pictures import Picture, sheet
from lightning_influence.tensorboard.summary import Columns, Writer, drawn_label_text, escape, label_text, number_text

QUERIES_TAG = "influence/queries"
QUERY_TAG = "influence/queries/{number}"

_KINDS = ("proponent", "opponent")
_SHOWN = 5
_TITLES = ("query", "proponents", "opponents")
_UNKNOWN = "–"


def write_queries(
    writer: Writer,
    pairs: Columns,
    *,
    images: Callable[[int | None, list[int]], Tensor | None],
    measured: str = "loss",
    label_names: Sequence[str] | None = None,
    step: int,
) -> None:
    """Write the table of pairs and, where inputs are images, a sheet for every query.

    Args:
        writer: event file writer.
        pairs: the table of pairs.
        images: called with the number of a query set and indices in it, or with None and indices of training examples;
            returns `[n, C, H, W]`, or None where the inputs are no images.
        measured: what is measured of a query.
        label_names: name of each class, or None to show class numbers.
        step: global step.
    """
    writer.add_text(QUERIES_TAG, queries_markdown(pairs, measured=measured, label_names=label_names), step)
    for number in np.unique(pairs["number"]):
        rows = {kind: _strongest(pairs, int(number), kind) for kind in _KINDS}
        every = np.concatenate(list(rows.values()))
        first = int(every[0])
        query = images(int(pairs["query_set"][first]), [int(pairs["query"][first])])
        examples = images(None, [int(pairs["index"][row]) for row in every])
        if query is None or examples is None:
            return
        by_row = dict(zip(every.tolist(), examples, strict=True))
        pictures = [Picture(query[0], query_caption(pairs, first, measured, label_names), 0, 0)]
        for column, kind in enumerate(_KINDS, start=1):
            for place, row in enumerate(rows[kind].tolist()):
                pictures.append(Picture(by_row[row], example_caption(pairs, row, label_names), place, column))
        writer.add_image(QUERY_TAG.format(number=number), sheet(pictures, _TITLES), step)


def queries_markdown(pairs: Columns, *, measured: str = "loss", label_names: Sequence[str] | None = None) -> str:
    """GitHub-style table: a row for every query, with its five strongest proponents and opponents.

    Args:
        pairs: the table of pairs.
        measured: what is measured of a query.
        label_names: name of each class; the names are untrusted and escaped.
    """
    names = ["query", "given", "predicted", measured.replace("_", " "), *_TITLES[1:]]
    lines = ["| " + " | ".join(map(escape, names)) + " |", "| ---: | :--- | :--- | ---: | :--- | :--- |"]
    for number in np.unique(pairs["number"]):
        rows = {kind: _strongest(pairs, int(number), kind) for kind in _KINDS}
        first = int(np.concatenate(list(rows.values()))[0])
        cells = [
            f"#{int(pairs['query'][first])}",
            label_text(pairs["query_label"][first], label_names),
            label_text(pairs["query_predicted"][first], label_names),
            number_text(pairs["measured"][first]),
            *(", ".join(_told(pairs, row, label_names) for row in own) or _UNKNOWN for own in rows.values()),
        ]
        lines.append("| " + " | ".join(map(escape, cells)) + " |")
    head = (
        "**Queries** and the training examples that matter most to them. Training on a proponent (score > 0) makes the "
        "query's measurement better, on an opponent worse; in brackets the example's given label and its score."
    )
    return head + "\n\n" + "\n".join(lines) + "\n"


def query_caption(pairs: Columns, row: int, measured: str, label_names: Sequence[str] | None) -> str:
    """For example `#12  given 3 → predicted 8  loss 4.21`."""
    names = ("query", "query_label", "query_predicted")
    value = f"{measured.replace('_', ' ')} {number_text(pairs['measured'][row])}"
    return _caption(pairs, row, names, value, label_names)


def example_caption(pairs: Columns, row: int, label_names: Sequence[str] | None) -> str:
    """For example `#345  given 3 → predicted 8  +12.1`."""
    return _caption(pairs, row, ("index", "label", "predicted"), f"{pairs['score'][row]:+.3g}", label_names)


def _caption(
    pairs: Columns, row: int, names: tuple[str, str, str], value: str, label_names: Sequence[str] | None
) -> str:
    index, label, predicted = names
    parts = [f"#{int(pairs[index][row])}"]
    given, said = (drawn_label_text(pairs[name][row], label_names) for name in (label, predicted))
    if given != _UNKNOWN:
        parts.append(f"given {given}")
    if said not in (_UNKNOWN, given):
        parts[-1] += f" → predicted {said}"
    return "  ".join([*parts, value])


def _told(pairs: Columns, row: int, label_names: Sequence[str] | None) -> str:
    label = label_text(pairs["label"][row], label_names)
    given = "" if label == _UNKNOWN else f"{label}, "
    return f"#{int(pairs['index'][row])} ({given}{pairs['score'][row]:+.3g})"


def _strongest(pairs: Mapping[str, npt.NDArray[Any]], number: int, kind: str) -> npt.NDArray[np.int64]:
    rows = np.flatnonzero((pairs["number"] == number) & (pairs["kind"] == kind))
    return rows[np.argsort(pairs["rank"][rows], kind="stable")][:_SHOWN]
