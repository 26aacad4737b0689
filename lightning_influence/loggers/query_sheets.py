"""Queries, each with its lists of proponents and opponents: as pictures and as a table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest

import numpy as np
from torch import Tensor

from lightning_influence.audit.columns import PAIR_LISTS, Columns
from lightning_influence.audit.summary import lists_of, strength, strongest_pairs
from lightning_influence.audit.words import called, cut
from lightning_influence.loggers.exhibits import Picture, Table
from lightning_influence.loggers.pictures import sheet
from lightning_influence.loggers.text import caption, id_line, label_text, number_text

_TAG = "influence/queries"
_SHOWN = 5
_TEXT = 200  # letters of what an example says
_TITLES = ("query", "proponents", "opponents")
_HEAD = (
    "**Queries** and the training examples that matter most to them. Training on a proponent (score > 0) makes the "
    "query's measurement better, on an opponent worse.\n\n"
)


def queries(
    pairs: Columns,
    *,
    images: Callable[[int | None, list[int]], Sequence[Tensor | str] | None],
    measured: str = "loss",
    label_names: Sequence[str] | None = None,
) -> Iterator[Table | Picture]:
    """Yield the table of pairs and, where inputs are images, a sheet for every list of a query.

    Args:
        pairs: The table of pairs, see `columns.PAIR_DESCRIPTIONS`.
        images: Called with the number of a query set and indices in it, or with None and indices of training examples;
            returns an image ``[C, H, W]`` or a text for each, or None where there is nothing to show.
        measured: What is measured of a query.
        label_names: Name of each class, or None to show class numbers.
    """
    yield queries_table(pairs, measured=measured, label_names=label_names)
    texts: list[tuple[str, str, str]] = []
    lists = [(name, *both) for of_query in strongest_pairs(pairs, _SHOWN) for name, both in of_query.items()]
    for name, proponents, opponents in lists:
        every = np.concatenate((proponents, opponents))
        first = int(every[0])
        query = images(int(pairs["query_set"][first]), [int(pairs["query"][first])])
        examples = images(None, pairs["index"][every].tolist())
        if query is None or examples is None:
            break
        shown = [(image, _example(pairs, row, label_names)) for image, row in zip(examples, every, strict=True)]
        asked = [(query[0], _query(pairs, first, measured, label_names))]
        rows = zip_longest(asked, shown[: len(proponents)], shown[len(proponents) :])
        places = [picture for row in rows for picture in row]
        told = [(called(pairs, first, "query", "query_id"), "query", query[0])]
        told += [(called(pairs, r), str(pairs["kind"][r]), text) for r, text in zip(every, examples, strict=True)]
        texts += [(f"#{who}", kind, cut(text, _TEXT)) for who, kind, text in told if isinstance(text, str) and text]
        yield Picture(
            f"{_TAG}/{int(pairs['number'][first])}/{name}", sheet(places, len(_TITLES), _TITLES, _explained(name))
        )
    if texts:
        yield Table(f"{_TAG}/texts", ("example", "kind", "text"), list(dict.fromkeys(texts)))


def queries_table(pairs: Columns, *, measured: str = "loss", label_names: Sequence[str] | None = None) -> Table:
    """Return a row for each of the first five proponents and opponents of every list of a query.

    Args:
        pairs: The table of pairs.
        measured: What is measured of a query.
        label_names: Name of each class; the names are untrusted.
    """
    rows = []
    lists = [(name, both) for of_query in strongest_pairs(pairs, _SHOWN) for name, both in of_query.items()]
    for name, both in lists:
        for row in np.concatenate(both).tolist():
            asked = [f"#{called(pairs, row, 'query', 'query_id')}"]
            asked += [label_text(pairs[label][row], label_names) for label in ("query_label", "query_predicted")]
            example = [f"#{called(pairs, row)}", label_text(pairs["label"][row], label_names)]
            measure = float(pairs["measured"][row])
            rows.append([*asked, measure, name, str(pairs["kind"][row]), *example, float(strength(pairs, row))])
    names = ["query", "given", "predicted", measured.replace("_", " "), "list", "kind", "example", "label", "score"]
    explained = "".join(f"* {_explained(name)}\n" for name in PAIR_LISTS if name in lists_of(pairs))
    return Table(_TAG, names, rows, _HEAD + explained)


def _explained(name: str) -> str:
    return f"{name}: {PAIR_LISTS[name]}"


def _query(pairs: Columns, row: int, measured: str, label_names: Sequence[str] | None) -> str:
    text = caption(
        pairs["query"][row], pairs["query_label"][row], "predicted", pairs["query_predicted"][row], label_names
    )
    text += f"\n{measured.replace('_', ' ')} {number_text(pairs['measured'][row])}"
    return text + id_line(pairs, row, "query_id")


def _example(pairs: Columns, row: int, label_names: Sequence[str] | None) -> str:
    text = caption(pairs["index"][row], pairs["label"][row], "predicted", pairs["predicted"][row], label_names)
    return f"{text}\n{strength(pairs, row):+.3g}" + id_line(pairs, row)
