"""Callback and engine on another device than the CPU, with float64 and without: the same numbers, and no error.

They run in a process of their own (``device_cases``), as the pretended device can't be taken back from torch.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from own_processes import together

from lightning_influence.core import precision

CASES = [
    *("default", "step", "step, Adam", "worst", "margin", "class weights", "cnn", "cnn, step", "transformer"),
    *("picked tokens, step", "binary", "absolute", "gaussian", "exact", "solvers", "trajectories", "measured", "chain"),
    *("stepped", "door", "timed"),
    *("deterministic", "deterministic, transformer", "deterministic, cnn", "deterministic, chain"),
    *(f"audit {name}" for name in ("identity", "diagonal", "kfac", "ekfac", "block_ggn", "ggn", "hessian")),
    *(f"pairs {name}" for name in ("identity", "diagonal", "kfac", "ekfac", "block_ggn", "ggn", "nystrom")),
]
# A device with float64 differs where that is used on it: in sums and decompositions.
WITH_FLOAT64 = ["default", "worst", "transformer", "audit block_ggn"]
WITH_FLOAT64 += ["pairs ekfac", "pairs ggn", "pairs nystrom", "solvers"]
# Numbers by which examples are ordered change places where they are nearly the same.
ORDERS = {"rank", "candidate"}


def _cases(_: int, with_float64: list[str], path: Path) -> None:
    import device_cases

    warnings.simplefilter("ignore")
    path.write_text(device_cases.run(with_float64), encoding="utf-8")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Case, then ``"cpu"``, ``"float64"`` or ``"no float64"``, then name, to an array or an error."""
    path = tmp_path_factory.mktemp("devices") / "found.json"
    together(_cases, WITH_FLOAT64, path, processes=1, patience=600)
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    assert sorted(found) == sorted([*CASES, "strictness", "waits"])
    return found


@pytest.mark.parametrize(
    ("case", "mode"), [*((case, "no float64") for case in CASES), *((case, "float64") for case in WITH_FLOAT64)]
)
def test_the_device_gives_the_numbers_of_the_cpu(outcomes: dict[str, Any], case: str, mode: str) -> None:
    expected, found = outcomes[case]["cpu"], outcomes[case][mode]
    assert "error" not in expected, expected["error"]
    assert "error" not in found, found["error"]
    assert found.keys() == expected.keys()
    for name in expected.keys() - ORDERS:
        values, truth = (np.asarray(columns[name], dtype=float) for columns in (found, expected))
        # The models are float32. Kernels add up in other orders, and solutions are stopped at other roundings.
        scale = float(np.nanmax(np.abs(truth))) if truth.size else 0.0
        np.testing.assert_allclose(values, truth, rtol=1e-3, atol=1e-4 * scale, err_msg=name)


def test_batches_are_timed_when_the_device_is_done(outcomes: dict[str, Any]) -> None:
    # Around each of four hooks, at the start of a batch and at its end.
    assert outcomes["timed"]["no float64"] == {"waits": 8 * (4 * 2 + 2)}


def test_the_host_seldom_waits_for_the_device(outcomes: dict[str, Any]) -> None:
    """Every wait leaves the device idle: for whether the loss is understood, and whether all gradients are finite.

    It waited five to seven times, for the copies of inputs and labels, for weights, for noise, for features.
    """
    assert outcomes["waits"] == {"scoring": 2, "sweep": 2, "fitting": 2}


def test_the_device_is_strict(outcomes: dict[str, Any]) -> None:
    errors = dict.fromkeys(["mixing", "in place", "indexing", "generator", "deterministic"], "RuntimeError")
    errors |= {"numpy": "TypeError", "float64": "TypeError", "linalg": "NotImplementedError"}
    assert outcomes["strictness"] == errors


def test_sums_are_wide_and_decompositions_exact_where_there_is_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cpu")
    half = torch.ones(2, dtype=torch.float16)
    assert (precision.wide_dtype(device), precision.wide(half).dtype) == (torch.float64, torch.float64)
    assert precision.exact(half).dtype == torch.float64
    double = torch.ones(2, dtype=torch.float64)
    assert precision.exact(double) is double
    assert precision.exact(double, copy=True) is not double
    monkeypatch.setattr(precision, "_has_float64", lambda kind: False)
    assert (precision.wide_dtype(device), precision.wide(half).dtype) == (torch.float32, torch.float32)
    assert precision.wide_zeros(3, device).dtype == torch.float32
    assert precision.exact(half).dtype == torch.float64
