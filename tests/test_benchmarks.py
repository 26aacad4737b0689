"""The arithmetic of the benchmarks, on contestants whose times and scores are made up; nothing is timed here."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, Any]]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import rounds
    import side_by_side

    yield rounds, side_by_side
    for name in ("rounds", "side_by_side"):
        sys.modules.pop(name, None)


class Fake:
    """Takes so many seconds in each round, and says so in the order it was asked."""

    def __init__(self, name: str, seconds: list[float], scores: np.ndarray | None, log: list[str]) -> None:
        self.name, self.seconds, self.scores, self.log = name, iter(seconds), scores, log

    def ask(self, *request: str) -> dict[str, Any]:
        self.log.append(f"{self.name} {request[0]}")
        if request[0] == "exact":
            if self.scores is not None:
                np.save(request[1], self.scores)
            return {"seconds": 9.0, "compared": self.scores is not None, "peak": 1}
        return {"seconds": next(self.seconds), "peak": 3 * 2**20, "stages": {"factors": 0.5, "scores": 0.01}}


class Broken:
    """Dies in its first round."""

    def __init__(self, error: type[Exception]) -> None:
        self.error = error

    def ask(self, *request: str) -> dict[str, Any]:
        if request[0] == "run":
            raise self.error("out of memory")
        return {"seconds": 1.0, "compared": False, "peak": None}


def test_turns_medians_ratios(modules: Any, tmp_path: Path) -> None:
    rounds, _ = modules
    log: list[str] = []
    fakes = {
        "slow": Fake("slow", [10.0, 40.0, 30.0], np.array([1.0, 2.0]), log),
        "fast": Fake("fast", [1.0, 2.0, 10.0], np.array([1.0, 2.002]), log),
    }
    found = rounds.compete(fakes, tmp_path, rounds=3, budget=60)
    assert log == ["slow exact", "fast exact", *["slow run", "fast run"] * 3]
    # Round by round, 10, 20 and 3; the ratio of the medians would be 15.
    assert rounds.ratio(found["slow"], found["fast"]) == rounds.Ratio(10.0, 3.0, 20.0)
    assert found["slow"].median == 30.0
    assert rounds.disagreement(found["fast"].scores, found["slow"].scores) == pytest.approx(1e-3)
    assert found["fast"].peak == 3 * 2**20


def test_a_contestant_that_fails_does_not_end_the_others(modules: Any, tmp_path: Path) -> None:
    rounds, table = modules
    fakes = {"kronfluence": Broken(rounds.ContestantError), "ours": Fake("ours", [1.0, 2.0], None, [])}
    found = rounds.compete(fakes, tmp_path, rounds=2, budget=60)
    assert found["ours"].seconds == [1.0, 2.0]
    assert found["kronfluence"].failure == "out of memory"
    assert rounds.ratio(found["kronfluence"], found["ours"]) is None
    match = table.Match("self", "mlp", 1000, ("kronfluence", "ours"))
    (line,) = list(table.speed_table({match: found}, table.SPEED))[2:]
    assert "kronfluence failed: out of memory" in line


def test_no_further_round_beyond_the_budget(modules: Any, tmp_path: Path) -> None:
    rounds, _ = modules
    found = rounds.compete({"slow": Fake("slow", [1.0] * 5, None, [])}, tmp_path, rounds=5, budget=0.0)
    assert len(found["slow"].seconds) == 1


def test_differences_of_pairs_are_relative_to_the_querys_largest(modules: Any) -> None:
    rounds, _ = modules
    expected = np.array([[1e-9, 10.0], [1.0, -2.0]])
    found = np.array([[1e-3, 10.0], [1.0, -2.1]])
    assert rounds.disagreement(found, expected) == pytest.approx(0.05)
    with pytest.raises(ValueError, match="can't be compared"):
        rounds.disagreement(found[0], expected)


def result(rounds: Any, seconds: list[float], peak: int = 2**20, **more: Any) -> Any:
    return rounds.Result(seconds=seconds, peak=peak, **more)


def test_the_page_says_what_was_met_and_what_was_missed(modules: Any, tmp_path: Path) -> None:
    rounds, table = modules
    scores, off = np.array([1.0, 2.0]), np.array([1.0, 2.01])
    results = {
        table.Match("self", "mlp", 1000, ("kronfluence", "ours", "ours, defaults")): {
            "kronfluence": result(rounds, [20.0, 22.0], scores=scores),
            "ours": result(rounds, [0.1, 0.1], scores=off),
            "ours, defaults": result(rounds, [0.5, 0.5]),
            "floor": result(
                rounds,
                [0.05, 0.4],
                stages=[
                    {"passes": 0.04, "eigendecompositions": 0.01, "defaults": 0.03},
                    {"passes": 0.3, "eigendecompositions": 0.1, "defaults": 0.31},
                ],
            ),
        },
        table.Match("tracin", "mlp", 1000, ("captum", "ours", "floor")): {
            "captum": result(rounds, [1.0]),
            "ours": result(rounds, [0.1]),
            "floor": result(rounds, [0.025]),
        },
        table.Match("audit", "mlp", 5000, ("plain pass", "ours")): {
            "plain pass": result(rounds, [1.0]),
            "ours": result(rounds, [4.5], stages=[{"factors": 3.0, "scores": 0.01}]),
        },
        table.Match("audit", "mlp", 50000, ("ours",)): {"ours": result(rounds, [20.0])},
        table.Match("step", "mlp", 640, ("every step", "with a budget")): {
            "every step": result(
                rounds, [9.0], stages=[{"plain": 0.010, "dynamics": 0.0102, "in flight": 0.0122, "floor": 5e-5}]
            ),
            "with a budget": result(rounds, [9.0], stages=[{"plain": 0.020, "in flight": 0.0214, "every": 3}]),
        },
        table.Match("training", "mlp", 256, ("training",)): {"training": result(rounds, [1.0], peak=2**21)},
        table.Match("training", "mlp", 500, ("training",), tensors=True): {"training": rounds.Result(tensors=2**24)},
        table.Match("audit", "mlp", 500, ("ours",), tensors=True): {
            "ours": rounds.Result(tensors=2**23, operation="aten::linalg_eigh")
        },
        table.Match("self", "mlp", 500, ("kronfluence",), tensors=True): {"kronfluence": rounds.Result(failure="died")},
    }
    text = table.page(results, 0.0, "benchmarks.png")
    lines = text.splitlines()

    same, defaults = (line for line in lines if "| kronfluence |" in line)
    assert "| 21.0 s | ours | 100 ms |" in same or "| 21.0 s | ours | 0.10 s |" in same
    assert "**210** (200 to 220) (2)" in same
    assert "≥ 100: met" in same
    assert "5e-03 (≤ 1e-03: **missed**)" in same
    assert "≥ 100: **missed** |" in defaults
    # Round by round, 400 and 55, and with fewer examples 667 and 71.
    assert "| 0.23 s (passes 0.17 s, eigendecompositions 55 ms) | 228× |" in same
    assert "| 0.17 s | 369× |" in defaults
    (beyond,) = (line for line in lines if "| captum |" in line)
    assert "≥ 50: **missed**, beyond the floor | 25 ms | 40.0× |" in beyond
    assert any("**4.50** (4.50 to 4.50) (1)" in line and "≤ 4: **missed**" in line for line in lines)
    (steps,) = (line for line in lines if "+2.0% | ≤ 3%: met | +22.0% | ≤ 10%: **missed**" in line)
    assert "| 10.00 ms |" in steps
    assert steps.endswith("+7.0% (1 of 3 steps) | ≤ 10%: met |")
    assert "≤ 10%: **missed** | 0.5% |" in steps
    (sizes,) = (line for line in lines if "(500)" in line)
    assert "| 16 MB | 2.0 MB | 8.0 MB | 1.0 MB | yes | failed: died | 1.0 MB | `aten::linalg_eigh` |" in sizes
    assert table.growth(results)["whole audit, MLP"] == [(5000, pytest.approx(0.9), 1.0), (50000, 0.4, 1.0)]
    table.plot(table.growth(results), tmp_path / "growth.png")
    assert (tmp_path / "growth.png").stat().st_size > 10_000


def test_multiplications_of_the_algebra(modules: Any) -> None:
    import floors

    def layer(inputs: int, outputs: int, positions: int, kernel: tuple[int, ...] = ()) -> Any:
        return floors.Layer(torch.empty(1, inputs, inputs), torch.empty(1, outputs, outputs), positions, kernel)

    rows = layer(10, 4, 1)
    assert (rows.covariances(), rows.rotated(), rows.formed()) == (50 + 8, 100 + 16 + 40, 0)
    # Few positions: they are turned, and then form the gradient; of many, the gradient is turned.
    assert layer(10, 4, 3).rotated() == 3 * (100 + 16 + 40)
    assert layer(10, 4, 100).rotated() == 4 * 100 + 10 * 16 + 100 * 40
    assert layer(10, 4, 100).formed() == 4000
    # Nine places of two channels: 12 different products of 2 x 2 in the place of 72, and those of a place with itself.
    assert layer(18, 4, 100, (3, 3)).covariances() == 100 * (12 * 4 + 4 / 2 + 8)
    assert floors.multiplications_a_second(64, 1) > 0


def test_a_process_that_dies_leaves_its_last_words(modules: Any, tmp_path: Path) -> None:
    rounds, _ = modules
    ready = "import json; print(json.dumps({}), flush=True); input(); raise SystemExit('no memory left')"
    process = rounds.Process([sys.executable, "-c", ready], tmp_path / "log", threads=1)
    with pytest.raises(rounds.ContestantError, match=r"no memory left \(exit code 1\)"):
        process.ask("run")
    process.close()
    with pytest.raises(rounds.ContestantError, match="No module named 'nowhere'"):
        rounds.Process([sys.executable, "-c", "import nowhere"], tmp_path / "log", threads=1)


def test_every_match_has_its_contestants(modules: Any) -> None:
    """Names are matched across two files: a typing error would show only after minutes."""
    _, table = modules
    import contestants

    for quick in (False, True):
        for match in table.matches(quick):
            assert {(match.work, name) for name in match.contestants} <= contestants.CONTESTANTS.keys()
    played = {(m.work, m.network): set(m.contestants) for m in reversed(table.matches(False))}
    for target in table.SPEED:
        assert {target.peer, target.ours} <= played[target.work, target.network]
