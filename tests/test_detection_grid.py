"""The pure parts of ``make detection``: the cells and their split, noise, and what a cell is judged by."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
NAMES = ("detection", *(f"detection_{part}" for part in ("cells", "data", "runs", "scores", "table")))


@pytest.fixture
def grid(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import detection
    import detection_cells
    import detection_data
    import detection_scores
    import detection_table

    monkeypatch.setattr(detection, "CACHE", tmp_path / "cache")
    yield SimpleNamespace(
        cells=detection_cells, data=detection_data, scores=detection_scores, table=detection_table, run=detection
    )
    for name in NAMES:
        sys.modules.pop(name, None)


def test_every_third_cell_of_every_kind_is_held_out(grid: Any) -> None:
    cells = grid.cells.CELLS
    assert len({cell.name for cell in cells}) == len(cells)
    apart = grid.cells.held_out()
    assert len(apart) == len(cells) // 3
    for kind in grid.cells.KINDS:
        among = [cell for cell in cells if cell.kind == kind]
        assert len(among) / 3 - 1 < sum(cell.name in apart for cell in among) < len(among) / 3 + 1
    assert grid.cells.held_out(tuple(reversed(cells))) == apart  # whatever order they are written in


def test_every_level_meets_every_other(grid: Any) -> None:
    cells = grid.cells.CELLS
    for kind in (grid.cells.RANDOM, grid.cells.CLEAN, grid.cells.INSTANCE, grid.cells.IMBALANCE):
        among = [cell for cell in cells if cell.kind == kind]
        assert {cell.net for cell in among} >= {"mlp"}
        assert len({cell.net for cell in among}) >= 2
        assert len({cell.data for cell in among}) >= 2
        assert {5, 30} <= {cell.epochs for cell in among}
    assert min(sum(cell.optimizer == o for cell in cells) for o in ("sgd", "adam", "adamw")) >= 8


@pytest.mark.parametrize("maker", ["symmetric", "pair"])
def test_noise_changes_as_many_labels_as_it_says(grid: Any, maker: str) -> None:
    labels = np.arange(400) % 4
    given = getattr(grid.data, maker)(labels, 0.15, np.random.default_rng(0))
    shifts = (given - labels) % 4
    assert (shifts != 0).sum() == 60
    assert set(shifts.tolist()) == ({0, 1} if maker == "pair" else {0, 1, 2, 3})


def test_instance_noise_lies_where_classes_meet(grid: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = np.arange(300) % 3
    inputs = torch.randn(300, 1, generator=generator) + 4 * torch.from_numpy(labels).unsqueeze(1)
    given = grid.data.instance(labels, 0.1, inputs, 0)
    wrong = given != labels
    assert wrong.sum() == 30
    assert (abs(given - labels) <= 1).all()  # never the class on the far side
    to_border = (inputs.squeeze(1) - torch.tensor([2.0, 6.0]).unsqueeze(1)).abs().amin(0).numpy()
    assert to_border[wrong].max() < to_border[~wrong].mean()


def test_data_are_the_same_again_and_others_with_another_seed(grid: Any) -> None:
    cell = next(cell for cell in grid.cells.CELLS if cell.data == "digits" and cell.noise == "imbalance")
    first, again, other = grid.data.noisy(cell, 0), grid.data.noisy(cell, 0), grid.data.noisy(cell, 1)
    assert torch.equal(first.inputs, again.inputs)
    assert np.array_equal(first.given, again.given)
    assert first.inputs.shape != other.inputs.shape or not torch.equal(first.inputs, other.inputs)
    counts = np.sort(np.bincount(first.true))
    assert counts[4] * 15 < counts[5]
    assert first.wrong.mean() == pytest.approx(0.1, abs=0.001)


def test_scores_of_flags(grid: Any) -> None:
    wrong = np.array([True, True, False, False, False])
    nothing = grid.scores.found(np.zeros(5, dtype=bool), wrong)
    assert (nothing["n"], nothing["recall"], nothing["f1"], nothing["false_alarms"]) == (0, 0.0, 0.0, 0.0)
    assert math.isnan(nothing["precision"])
    clean = grid.scores.found(wrong, np.zeros(5, dtype=bool))
    assert math.isnan(clean["f1"])
    assert clean["false_alarms"] == 0.4


def test_calibration_sees_what_the_base_rate_hides(grid: Any) -> None:
    wrong = np.array([True, False] * 50)
    assert grid.scores.calibration(np.full(100, 0.5), wrong) == (0.0, 0.25)
    assert grid.scores.calibration(wrong.astype(float), wrong) == (0.0, 0.0)
    # Half the mass a tenth too high, half a tenth too low: on average right, in its bins not.
    error, _ = grid.scores.calibration(np.where(wrong, 0.9, 0.1), wrong)
    assert error == pytest.approx(0.1)
    known = np.array([np.nan] * 98 + [1.0, 0.0])
    assert grid.scores.calibration(known, wrong) == (0.0, 0.0)


def test_an_audit_is_judged(grid: Any) -> None:
    true = np.array([0, 0, 0, 1, 1, 1, 2, 2, 2, 2])
    given = true.copy()
    given[[0, 3]] = [1, 2]
    data = grid.data.Noisy(torch.zeros(10, 1), given, true, 3)
    rank = np.array([1, 5, 6, 2, 7, 8, 3, 9, 10, 4])
    suggested = given.copy()
    suggested[[0, 3, 6]] = [0, 0, 1]  # found and right, found and wrong, a false alarm
    columns = {
        "index": np.arange(10),
        "label": given,
        "suggested": suggested,
        "rank": rank,
        "suspicion": -rank.astype(float),
        "loss_mean": -rank.astype(float)[::-1],
        "candidate": suggested != given,
        "finite": np.ones(10, dtype=bool),
    }
    report = SimpleNamespace(  # whatever the rule is by which it acts
        columns=columns,
        manifest={"labels": {"verdict": "told", "reason": "", "noise_rate": 0.1}},
        relabelled=lambda dataset: TensorDataset(dataset.tensors[0], torch.from_numpy(suggested)),
        clean_indices=lambda: np.flatnonzero(suggested == given).tolist(),
    )
    train = TensorDataset(data.inputs, torch.from_numpy(given))
    found = grid.scores.of_audit(report, data, train)
    assert (found["ap"], found["n"], found["f1"], found["f1_true_number"]) == (1.0, 3, 0.8, 1.0)
    assert found["best_column"] == "loss_mean"
    assert found["best_column_ap"] < 1
    assert found["fnr"] == 0.5  # the first tenth is one of the two
    assert found["suggested_right"] == 0.5
    assert (found["relabelled"], found["damage"]) == (3, 0.0)  # one put right, one made wrong
    assert found["right_dropped"] == pytest.approx(1 / 8)


def test_the_tables_take_what_is_there(grid: Any) -> None:
    """Of one cell and one seed, with an old audit that told no rate, and without the peer."""
    assert "Held out: 0 of" in grid.table.page({})
    cell = grid.cells.CELLS[0]
    run = dict.fromkeys(("ap", "best_column_ap", "f1_true_number", "precision", "recall", "f1", "damage"), 0.5)
    run |= {"examples": 10, "wrong": 1, "best_column": "el2n", "verdict": "cannot tell", "reason": "a hard task"}
    run |= dict.fromkeys(("n", "false_alarms", "relabelled", "right_dropped", "seconds"), 0)
    run |= dict.fromkeys(
        ("noise_rate", "noise_rate_low", "noise_rate_high", "fnr", "ece", "brier", "suggested_right"), math.nan
    )
    page = grid.table.page({(cell.name, 0, "lightning-influence"): run})
    assert f"| {cell.name} | 1 | a hard task |" in page
    assert "nan" not in page
    widths = {line.count("|") for line in page.splitlines() if line.startswith(f"| {cell.name} | 1 | 10")}
    assert widths == {21}


def test_results_of_other_settings_are_not_taken(grid: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    job = grid.run.Job(grid.cells.CELLS[0], 0, "cleanlab")
    before = job.path
    assert job.path == before
    monkeypatch.setitem(grid.cells.RECIPE, "batch", 32)
    assert job.path != before
    assert job.path.name.startswith(f"{job.cell.name}_0_")


def test_a_cell_runs_and_is_kept(grid: Any, tmp_path: Path) -> None:
    job = grid.run.Job(grid.cells.Cell("wine", "mlp", "sgd", 2, "symmetric", 0.1), 0, "lightning-influence")
    result, _ = grid.run.work(job, tmp_path / "records")
    assert result["wrong"] == 18
    assert grid.run.results([job.cell], [0]).keys() == {(job.cell.name, 0, "lightning-influence")}
    with np.load(tmp_path / "records" / f"{job.cell.name}_0.npz") as kept:
        assert kept["epochs"].tolist() == [0, 1, 2]
        assert kept["features"].shape == (3, 178, 16)
        assert kept["seen_probabilities"].shape == (2, 178, 3)
        assert kept["wrong"].sum() == 18
