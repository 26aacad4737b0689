"""Sheets of queries: pictures at their places, captions, and a table that is only text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_influence.loggers.exhibits import Picture, Table
from lightning_influence.loggers.pictures import sheet
from lightning_influence.loggers.query_sheets import _example, _query, queries, queries_table

PAPER = 255


def pairs(
    proponents: int = 7, opponents: int = 6, queries: int = 2, lists: tuple[str, ...] = ("strongest", "specific")
) -> dict[str, np.ndarray[Any, Any]]:
    rows: dict[str, list[Any]] = {}
    for number in range(1, queries + 1):
        for kind, count, sign in (("proponent", proponents, 1), ("opponent", opponents, -1)):
            for rank in range(1, count + 1):
                row = {
                    "number": number, "query_set": number - 1, "query": 10 * number, "query_label": 0,
                    "query_predicted": 1, "query_loss": 3.25, "measured": 3.25, "kind": kind, "rank": rank,
                    "index": 100 * number + rank + (50 if sign < 0 else 0), "score": sign * 20.0 / rank,
                    "relative": sign * 0.5 / rank, "label": rank % 2, "predicted": 1, "loss": 0.5,
                }  # fmt: skip
                for name in lists:
                    for column, value in (row | {"list": name}).items():
                        rows.setdefault(column, []).append(value)
    return {name: np.array(values, dtype=object if name in ("kind", "list") else None) for name, values in rows.items()}


def written(exhibits: Iterator[Table | Picture]) -> tuple[dict[str, Table], dict[str, Tensor]]:
    """Tables and pictures by tag."""
    tables: dict[str, Table] = {}
    pictures: dict[str, Tensor] = {}
    for one in exhibits:
        if isinstance(one, Table):
            tables[one.tag] = one
        else:
            pictures[one.tag] = one.image
    return tables, pictures


def test_pictures_are_at_their_places() -> None:
    black = torch.zeros(1, 4, 4)
    black[0, 0, 0] = 1  # else constant, which is shown as grey
    alone = sheet([(black, "")], 1)
    found = sheet([(black, ""), None, None, None, None, (black, "")], 3, ["one", "two", "three"])
    assert found.shape[2] > 2.5 * alone.shape[2]
    dark = (found.sum(0) == 0).nonzero()
    middle = torch.tensor(found.shape[1:]) / 2
    assert len(dark)
    assert bool(((dark < middle).all(1) | (dark > middle).all(1)).sum() > 0.95 * len(dark))
    # The cell below the first one is empty paper.
    below = found[:, int(middle[0]) + 30 :, : found.shape[2] // 3 - 10]
    assert bool((below == PAPER).all())
    titles = found[:, :30]
    assert all(bool((part != PAPER).any()) for part in titles.chunk(3, 2))


def test_images_of_two_sizes_share_a_sheet() -> None:
    small, large = torch.rand(1, 8, 8), torch.rand(3, 300, 150)
    assert sheet([(small, "#1"), (large, "#2")], 2).shape == sheet([(small, "#1")] * 2, 2).shape


def test_captions() -> None:
    table = pairs(lists=("strongest",))
    names = ["cat", "dog"]
    assert _query(table, 0, "fgsm_loss", names) == "#10 given cat\npredicted dog\nfgsm loss 3.25"
    assert _example(table, 0, names) == "#101 given dog\n+20"
    assert _example(table, 8, names) == "#152 given cat\npredicted dog\n-10"
    unknown = table | {"label": np.full(len(table["label"]), -1), "predicted": np.full(len(table["label"]), -1)}
    assert _example(unknown, 0, None) == "#101\n+20"
    # Each list shows what it is ordered by; of earlier versions, there is one.
    assert _example(pairs(lists=("specific",)), 0, names) == "#101 given dog\n+0.5"
    earlier = {name: values for name, values in table.items() if name not in ("list", "relative")}
    assert _example(earlier, 0, names) == "#101 given dog\n+20"


def test_a_sheet_for_every_query_with_five_of_each() -> None:
    asked: list[tuple[int | None, list[int]]] = []

    def images(of: int | None, indices: list[int]) -> Tensor:
        asked.append((of, indices))
        return torch.rand(len(indices), 1, 6, 6)

    tables, pictures = written(queries(pairs(), images=images))
    assert list(pictures) == [
        f"influence/queries/{number}/{name}" for number in (1, 2) for name in ("strongest", "specific")
    ]
    assert asked[:2] == [(0, [10]), (None, [101, 102, 103, 104, 105, 151, 152, 153, 154, 155])]
    assert asked[2:4] == asked[:2]
    assert asked[4] == (1, [20])
    assert list(tables) == ["influence/queries"]
    table = tables["influence/queries"]
    assert len(table.rows) == 2 * 2 * (5 + 5)
    assert table.rows[0] == ["#10", "0", "1", 3.25, "strongest", "proponent", "#101", "1", 20.0]
    assert table.rows[-1] == ["#20", "0", "1", 3.25, "specific", "opponent", "#255", "1", -0.1]


@pytest.mark.parametrize(("proponents", "opponents"), [(0, 2), (2, 0), (1, 1)])
def test_queries_with_few_pairs(proponents: int, opponents: int) -> None:
    table = pairs(proponents, opponents, queries=1, lists=("specific",))
    tables, pictures = written(queries(table, images=lambda of, indices: torch.rand(len(indices), 1, 6, 6)))
    assert list(pictures) == ["influence/queries/1/specific"]
    assert tables["influence/queries"].columns()["kind"] == ["proponent"] * proponents + ["opponent"] * opponents


def test_no_images() -> None:
    tables, pictures = written(queries(pairs(), images=lambda of, indices: None))
    assert not pictures
    assert tables


@pytest.mark.parametrize("length", [3, 24])
def test_no_word_is_squeezed(length: int) -> None:
    """TensorBoard breaks words of a table that is wider than its card, in the narrow columns first: "que ry"."""
    names = ["a" * length, "b" * length]
    (head, body) = queries_table(pairs(), label_names=names).markdown().split("\n\n", 1)
    assert ("| query |" in body) == (length == 3)
    assert ("* **&#35;10** given aaa" in body) == (length == 24)
    texts = Table("t", ("example", "text"), [("#1", "some words " * 10)])
    assert texts.markdown().startswith("* **&#35;1** text some words")


def test_class_names_are_only_text() -> None:
    for name, bars in (("<b>|`*[x](y)", 10), ("<script>|`*[x](y) and more", 0)):  # in a table, and in a list
        shown = queries_table(pairs(), label_names=[name, "b"]).markdown()
        for line in shown.splitlines()[7:]:
            assert not any(character in line.removeprefix("* **").replace("** ", "", 1) for character in "<>`*[]")
            assert line.count("|") in (0, bars), "a name must not end a cell"


def test_the_order_of_the_rows_does_not_matter() -> None:
    order = np.random.default_rng(0).permutation(52)
    assert queries_table({name: values[order] for name, values in pairs().items()}) == queries_table(pairs())
