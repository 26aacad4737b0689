"""How to add a column to the audit, and what the table of columns is read for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from models import Classifier, loader, make_trainer, vectors
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from which_lightning import TensorBoardLogger

from lightning_influence import AuditReport, InfluenceAudit
from lightning_influence.audit.belief import LabelBeliefs
from lightning_influence.audit.columns import COLUMNS, Column, Columns, add, scored
from lightning_influence.audit.ranking import ingredients, judged, rank


# >>> how to add a column
def last_surprise(columns: Columns) -> np.ndarray:
    """How much higher the loss is at the end than over the run."""
    return np.exp(columns["loss"] - columns["loss_mean"])


@pytest.fixture
def surprise() -> Iterator[Column]:
    column = Column(
        "last_surprise",
        "exp of the final loss minus its mean over the run",
        "high",
        merge="mean",
        shown=("table", "histogram"),
        values=last_surprise,
    )
    add(column)
    yield column
    del COLUMNS[column.name]


# <<<


@pytest.mark.usefixtures("sure")
def test_a_column_from_outside_is_everywhere(surprise: Column, tmp_path: Path) -> None:
    reports, logger = [], TensorBoardLogger(tmp_path)
    for seed in (0, 1):
        torch.manual_seed(seed)
        audit = InfluenceAudit(known_noise=[1, 5])
        make_trainer(tmp_path / str(seed), callbacks=[audit], logger=logger).fit(Classifier(), loader(vectors()))
        assert audit.has_report
        reports.append(audit.report)
    report = reports[0]
    expected = np.exp(report.columns["loss"] - report.columns["loss_mean"])
    np.testing.assert_array_equal(report.columns["last_surprise"], expected)
    assert "last_surprise" in str(report).split("candidates  ")[1].splitlines()[1]
    assert "last_surprise" in report.manifest["detection"]

    assert report.directory is not None
    schema = pq.read_schema(report.directory / "scores.parquet")
    meaning = schema.field("last_surprise").metadata[b"description"].decode()
    assert meaning == "exp of the final loss minus its mean over the run; high = suspicious"
    np.testing.assert_array_equal(AuditReport.load(report.directory).columns["last_surprise"], expected)
    assert "last_surprise" in (report.directory / "candidates.csv").read_text().splitlines()[0].split(",")

    merged = AuditReport.ensemble(reports)
    mean = np.mean([each.columns["last_surprise"] for each in reports], axis=0)
    np.testing.assert_allclose(merged.columns["last_surprise"], mean, rtol=1e-12)

    tags = EventAccumulator(logger.log_dir).Reload().Tags()
    assert "influence/last_surprise/log10" in tags["histograms"]
    assert "influence/detection/last_surprise" in tags["tensors"]


def test_adding_one_takes_fewer_than_forty_lines() -> None:
    source = Path(__file__).read_text()
    assert source.partition("# >>>")[2].partition("# <<<")[0].count("\n") < 40
    assert "last_surprise" not in COLUMNS


def test_a_name_is_taken_once() -> None:
    with pytest.raises(ValueError, match="there is a column 'aum' already"):
        add(Column("aum", "something else"))


def test_a_column_that_fails_costs_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    columns = {"index": np.arange(3), "loss_mean": np.arange(3.0)}
    monkeypatch.setitem(COLUMNS, "lacks", Column("lacks", "", values=lambda columns: columns["nothing"]))
    assert "lacks" not in rank(columns)
    monkeypatch.setitem(COLUMNS, "short", Column("short", "", values=lambda columns: columns["loss_mean"][:2]))
    with pytest.warns(UserWarning, match=r"no column 'short': ValueError: its shape is \(2,\); expected \(3,\)"):
        assert "short" not in rank(columns)


def test_direction_and_group_decide_the_ranking(monkeypatch: pytest.MonkeyPatch) -> None:
    columns = {"index": np.arange(4), "loss_mean": np.arange(4.0), "mine": np.array([5.0, 1.0, 7.0, 3.0])}
    assert ingredients(columns) == ("loss_mean",)
    monkeypatch.setitem(COLUMNS, "mine", Column("mine", "", "low", ranks=1))
    assert ingredients(columns) == ("mine",)
    assert rank(columns)["rank"].tolist() == [3, 1, 4, 2]
    assert scored(columns)["mine"].tolist() == [-5.0, -1.0, -7.0, -3.0]


GROUPS = [
    ("support",),
    ("el2n", "neighbour_disagreement", "prob_margin"),
    ("loss_mean", "tracin"),
    ("loss", "self_influence"),
    ("grad_norm_squared",),
]


def test_what_is_ranked_by_where_less_and_less_is_known() -> None:
    columns = {"index": np.arange(4)} | {name: np.arange(4.0) for group in GROUPS for name in group}
    for group in GROUPS:
        assert ingredients(columns) == group
        columns[group[0]] = np.full(4, np.nan)  # as good as not there
        assert ingredients(columns) == (group[1:] or ingredients(columns))
        for name in group:
            del columns[name]
    assert ingredients(columns) == ()


def test_candidates_are_the_first_of_the_ranking_up_to_the_noise_rate() -> None:
    """Of those with a label and finite scores; what the run would rather have decides nothing."""
    columns = {
        "index": np.arange(10) + 30,
        "loss_mean": np.arange(10.0),
        "suggested": np.array([1] * 8 + [-1, 1]),
        "finite": np.array([True] * 7 + [False, True, True]),
    }
    for rate, expected in ((0.0, []), (0.25, [39, 36]), (0.3, [39, 36]), (0.5, [39, 36, 35, 34]), (1.0, 8)):
        ranked, _ = judged(columns, beliefs=LabelBeliefs("told", noise_rate=rate))
        found = AuditReport(ranked).candidates.tolist()
        assert (len(found) if isinstance(expected, int) else found) == expected
    ranked, beliefs = judged(columns, beliefs=LabelBeliefs(reason="who knows", noise_rate=0.3))
    assert not ranked["candidate"].any()
    assert beliefs.reason == "who knows"
    assert "no features of the first epochs" in judged(columns | {"label": np.arange(10) % 2})[1].reason
    assert "no single class" in judged(columns)[1].reason


def test_every_column_says_what_it_is() -> None:
    for name, column in COLUMNS.items():
        assert name == column.name
        assert column.meaning
        assert column.direction in (None, "high", "low")


def test_what_is_printed_is_short_and_tells_examples_apart() -> None:
    """An index of six digits once was 1.235e+05."""
    columns = {"index": np.arange(123_450, 123_470), "loss_mean": np.arange(20.0), "suggested": np.zeros(20, int)}
    ranked, _ = judged(columns, beliefs=LabelBeliefs("told", noise_rate=0.05))
    report = AuditReport(ranked, {"status": "complete"})
    assert repr(report) == "AuditReport(20 examples, 1 candidates, complete)"
    rows = str(report).splitlines()
    assert rows[-1] == "    suspicion: how much speaks against the label"
    assert rows[-3].split() == ["rank", "index", "suggested", "suspicion"]
    assert rows[-2].split() == ["1", "123469", "0", "1.648"]


def test_nothing_to_rank_by_is_no_error() -> None:
    """Before the first epoch ends, or where no loss is finite any more; what is there is worth keeping."""
    for columns in ({}, {"loss_mean": np.full(3, np.nan), "finite": np.zeros(3, dtype=bool)}):
        ranked = rank({"index": np.array([4, 5, 6]), **columns})
        assert ranked["rank"].tolist() == [1, 2, 3]
        assert not ranked["candidate"].any()
        assert np.isnan(ranked["suspicion"]).all()
        assert "0 (0.0%)" in str(AuditReport(ranked))
