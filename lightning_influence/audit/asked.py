"""Answers about new examples, added to the queries of an audit: its table of pairs, and its page."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lightning_influence.audit.columns import Columns
from lightning_influence.audit.queries import with_examples
from lightning_influence.audit.store.atomic import reading, replacing, whole
from lightning_influence.audit.store.store import PAGE, AuditStore
from lightning_influence.index.answering import Answers

PAGE_FIELDS = {
    "query": "query",
    "set": "query_set",
    "number": "number",
    "label": "query_label",
    "predicted": "query_predicted",
    "loss": "query_loss",
    "measured": "measured",
    "list": "list",
    "kind": "kind",
    "rank": "rank",
    "index": "index",
    "score": "score",
    "relative": "relative",
    "query_id": "query_id",
}
"""What the page calls columns of the table of pairs."""


def keep_answers(store: AuditStore, columns: Columns, answers: Answers, kind: str) -> Columns:
    """Add answers to the queries of an audit on disk, as a set of their own; return the whole table.

    Args:
        store: The audit.
        columns: Its scores table.
        answers: About new examples.
        kind: Which list they make: ``"strongest"`` or ``"specific"``.

    Raises:
        StoreError: If a file is damaged, or can't be written.
    """
    before = store.read_pairs() or {}
    numbers, sets = (before.get(name, np.zeros(0, np.int64)) for name in ("number", "query_set"))
    new = _table(answers, kind, int(numbers.max(initial=0)), int(sets.max(initial=-1)) + 1, columns)
    table = {name: np.concatenate([before[name], _like(before[name], new, name)]) for name in before} or new
    store.write_pairs(table)
    path = store.directory / PAGE
    if path.exists():
        with reading(path):
            page = json.loads(whole(path))
            _add(page, new)
        text = json.dumps(page, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        with replacing(path) as handle:
            handle.write(text.encode())
    return table


def _table(answers: Answers, kind: str, numbers: int, number_of_set: int, columns: Columns) -> Columns:
    """Return rows as those of ``queries.QuerySearch``."""
    own, parts = columns.get("self_influence"), []
    lengths = dict(zip(columns["index"].tolist(), () if own is None else np.sqrt(own).tolist(), strict=False))
    told = answers.told
    sides = (
        ("proponent", 1, answers.proponents, answers.proponent_scores),
        ("opponent", -1, answers.opponents, answers.opponent_scores),
    )
    for side, sign, examples, scores in sides:
        query, rank = ((sign * scores > 0) & (examples >= 0)).nonzero(as_tuple=True)
        found, unknown = examples[query, rank].numpy(), torch.full((len(answers.queries),), -1)
        score = scores[query, rank].double().numpy()
        if kind == "specific":
            score = score * np.array([lengths.get(index, math.nan) for index in found.tolist()])
        loss = told.get("loss", unknown * math.nan).double()[query].numpy()
        parts.append(
            {
                "number": query.numpy() + numbers + 1,
                "query_set": np.full(len(query), number_of_set),
                "query": answers.queries[query].numpy(),
                "query_label": told.get("label", unknown).long()[query].numpy(),
                "query_predicted": told.get("predicted", unknown).long()[query].numpy(),
                "query_loss": loss,
                "measured": loss,
                "kind": np.full(len(query), side, dtype=object),
                "list": np.full(len(query), kind, dtype=object),
                "rank": rank.numpy() + 1,
                "index": found,
                "score": score,
            }
        )
    return with_examples({name: np.concatenate([part[name] for part in parts]) for name in parts[0]}, columns)


def _like(before: NDArray[Any], new: Columns, name: str) -> NDArray[Any]:
    """Return a column of the new rows; one that only the others have is empty there."""
    if name in new:
        return new[name].astype(before.dtype)
    empty: Any = "" if before.dtype.kind == "O" else math.nan if before.dtype.kind == "f" else -1
    return np.full(len(new["index"]), empty, dtype=before.dtype)


def _add(page: dict[str, Any], new: Columns) -> None:
    lists = {name: new[source].tolist() for name, source in PAGE_FIELDS.items() if source in new}
    rows = [dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True)]
    for row in rows:
        row |= {name: None for name, value in row.items() if isinstance(value, float) and not math.isfinite(value)}
    page["pairs"] = [*page.get("pairs", ()), *rows]
    texts = {f"{row['set']}/{row['query']}": f"asked later: example {row['query']} of its batch" for row in rows}
    page["query_texts"] = {**page.get("query_texts", {}), **texts}
