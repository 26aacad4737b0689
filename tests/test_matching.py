"""Rows of batches and the examples that they are made of: found without comparing each with each."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lightning_influence.data import matching
from lightning_influence.data.matching import agreeing, joined_scores, pair_scores

RNG = np.random.default_rng(0)


def padded(values: list[Any], size: int, left: bool, dtype: Any) -> list[Any]:
    rows = []
    for value in values:
        row = np.zeros((size, *value.shape[1:]), dtype)
        cut = value[:size]
        row[slice(size - len(cut), None) if left else slice(0, len(cut))] = cut
        rows.append(row)
    return rows


def texts(n: int) -> list[Any]:
    return [np.asarray(f"file {k % 5}" * (1 + k % 3)) for k in range(n)]


def tokens(n: int) -> list[Any]:
    return [RNG.integers(-3, 3, 1 + k % 7) for k in range(n)]


def boxes(n: int) -> list[Any]:
    found = [RNG.normal(size=(k % 4, 2)) for k in range(n)]
    found[1][0] = np.nan, -0.0
    return found


CASES: dict[str, Any] = {
    "tokens": lambda: (values := tokens(20), padded(values[::-1], 9, False, np.int64)),
    "tokens, left, another type": lambda: (values := tokens(20), padded(values, 9, True, np.int32)),
    "tokens, cut": lambda: (values := tokens(20), padded(values, 3, False, np.int64)),
    "boxes, rounded": lambda: (values := boxes(12), padded(values[::2], 5, False, np.float32)),
    "boxes, rounded more": lambda: (values := boxes(12), padded(values, 5, False, np.float16)),
    "numbers, rounded": lambda: ([np.asarray(k / 3) for k in range(9)], [np.float32(k / 3) for k in (4, 2, 20)]),
    "numbers, as floats": lambda: ([np.asarray(k) for k in range(9)], [np.asarray(float(k)) for k in (4, 2, 20)]),
    "floats, as numbers": lambda: ([np.asarray(float(k)) for k in range(9)], [np.asarray(k) for k in (4, 2, 20)]),
    "texts": lambda: (values := texts(11), values[::-1]),
    "texts and numbers": lambda: ([*texts(3), np.asarray(3)], [*texts(2), np.asarray(3)]),
    "nothing here and there": lambda: ([None, *tokens(3), None], [*tokens(2), None]),
    "images of several sizes": lambda: (values := [RNG.normal(size=(2, k, 3 + k)) for k in range(1, 4)], values[::-1]),
    "no rows": lambda: (tokens(3), []),
    "no values": lambda: ([], tokens(3)),
}


@pytest.mark.parametrize("name", CASES)
def test_scores_are_those_of_each_pair(name: str) -> None:
    made = CASES[name]()
    values, rows = made[0], [None if row is None else np.asarray(row) for row in made[1]]
    expected = np.array([[agreeing(value, row) for value in values] for row in rows]).reshape(len(rows), len(values))
    assert np.array_equal(pair_scores(values, rows), expected)


def test_a_large_batch_does_not_compare_each_with_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """512 sorted texts took 3 s a batch."""
    compared = [0]

    def counting(value: Any, row: Any) -> int:
        compared[0] += 1
        return agreeing(value, row)

    monkeypatch.setattr(matching, "agreeing", counting)
    values = [np.concatenate([[101], RNG.integers(1, 20_000, 5 + k % 30)]) for k in range(512)]
    scores = pair_scores(values, padded(values[::-1], 40, False, np.int64))
    assert scores.argmax(1).tolist() == list(range(511, -1, -1))
    assert compared[0] <= 2 * 512


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_what_lies_end_to_end_is_cut_up(dtype: Any) -> None:
    values = [RNG.normal(size=(1 + k % 3, 2)) for k in range(7)]
    values[2] = values[5]  # each is used once
    order = [2, 3, 6, 5, 0]
    column = np.concatenate([values[k] for k in order]).astype(dtype)
    scores = joined_scores([*values, None], column)
    assert scores is not None
    assert scores.argmax(1).tolist() == order
    assert [int(row.max()) for row in scores] == [values[k].size for k in order]
    assert (scores >= 0).sum() == len(order)
    assert joined_scores(values, column[1:]) is None
    assert joined_scores([value.round() for value in values], column) is None
