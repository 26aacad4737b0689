"""A run that is killed at any moment can be read, and resumed to the audit of a run that nobody killed.

The moments are drawn: batches of training, steps of the passes at epoch ends and of the final audit, files before and
after they are put in place, and any time at all. Others: ``INFLUENCE_TRIALS_SEED=7 pytest tests/test_kills.py``.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import kills
import numpy as np
import pytest
from kills import MOMENTS, Job
from own_processes import METHOD

from lightning_influence import AuditReport
from lightning_influence.audit.store.store import StoreError

SEED = int(os.environ.get("INFLUENCE_TRIALS_SEED", "0"))
# Whether checkpoints come at epoch ends or every so many steps, and how TracIn is computed, goes round.
EVERY = (None, 3, None, None, 4)
TRACIN = ("epoch", "step", "epoch", None)
KINDS = ("batch", "batch", "pass", "pass", "audit", "audit", "audit", "before write", "before write", "after write")
KINDS = (*KINDS, "any time", "any time")


@pytest.fixture(scope="module")
def run() -> Iterator[Callable[[Job], int]]:
    """Trains in a process of its own."""
    context = multiprocessing.get_context(METHOD)
    asked, there = context.Pipe()
    server = context.Process(target=kills.serve, args=(there,), daemon=True)
    server.start()
    there.close()

    def trained(job: Job) -> int:
        Path(job.directory).mkdir(parents=True, exist_ok=True)
        asked.send(job)
        return int(asked.recv())

    yield trained
    asked.send(None)
    server.join()


@pytest.fixture(scope="module")
def whole(run: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Job], tuple[AuditReport, dict[str, Any]]]:
    """Runs that nobody kills, by how TracIn is computed."""
    known: dict[Any, tuple[AuditReport, dict[str, Any]]] = {}

    def straight(job: Job) -> tuple[AuditReport, dict[str, Any]]:
        if job.tracin not in known:
            directory = tmp_path_factory.mktemp("whole")
            job = replace(job, directory=str(directory), every=None, moment=None, seconds=None)
            assert run(job) == 0, _said(directory)
            result = json.loads((directory / "result.json").read_text())
            known[job.tracin] = AuditReport.load(result["directory"]), result
        return known[job.tracin]

    return straight


@pytest.mark.parametrize("number", range(len(KINDS)))
def test_a_killed_run(number: int, run: Any, whole: Any, tmp_path: Path) -> None:
    rng = random.Random(f"{SEED} {number}")
    kind = KINDS[number]
    tracin = "epoch" if kind == "pass" else TRACIN[(number + SEED) % len(TRACIN)]
    job = Job(str(tmp_path), tracin, EVERY[(number + SEED) % len(EVERY)])
    expected, result = whole(job)
    job = _killed(job, kind, rng, result)
    told = f"{job}"

    ended = run(job)
    assert ended == -signal.SIGKILL or (kind == "any time" and ended == 0), f"{told}\n{_said(tmp_path)}"
    complete = _readable(tmp_path, told)

    assert run(replace(job, moment=None, seconds=None)) == 0, f"{told}\n{_said(tmp_path)}"
    again = json.loads((tmp_path / "result.json").read_text())
    assert again["weights"] == result["weights"], f"{told}: it is training that went another way"
    resumed = again["directory"] or complete
    assert resumed is not None, f"{told}: there is no audit after the run was resumed\n{_said(tmp_path)}"
    _check_same(AuditReport.load(resumed), expected, told)


def test_a_run_that_is_killed_twice(run: Any, whole: Any, tmp_path: Path) -> None:
    """In the final audit, and when that is made up for."""
    job = Job(str(tmp_path))
    expected, result = whole(job)
    job = replace(job, moment="audit", count=result["counts"]["audit"] // 2)
    assert run(job) == -signal.SIGKILL
    assert run(replace(job, count=2)) == -signal.SIGKILL, "the second run made no audit"
    _readable(tmp_path, "killed twice")
    assert run(replace(job, moment=None)) == 0, _said(tmp_path)
    directory = json.loads((tmp_path / "result.json").read_text())["directory"]
    assert directory is not None, "there is no audit after the run was resumed"
    _check_same(AuditReport.load(directory), expected, "killed twice")


def test_every_moment_comes(whole: Any) -> None:
    """A name that is never counted would kill nobody."""
    _, result = whole(Job(""))
    assert set(MOMENTS) == set(result["counts"])
    assert result["counts"]["batch"] == 15
    assert result["counts"]["before write"] >= 4


def _killed(job: Job, kind: str, rng: random.Random, result: dict[str, Any]) -> Job:
    if kind == "any time":
        return replace(job, seconds=rng.uniform(0.05, 0.95) * result["seconds"])
    return replace(job, moment=kind, count=rng.randint(1, result["counts"][kind]))


def _readable(directory: Path, told: str) -> str | None:
    """Check what lies on the disk between kill and resume; return the audit that is complete, if there is one."""
    read: list[AuditReport] = []
    unnamed: list[str] = []
    for folder in sorted(directory.glob("influence*")):
        try:
            report = AuditReport.load(folder)
            assert str(report)
            assert (report.columns["times_seen"] > 0).any()
            for checkpoint in report.checkpoints():
                assert checkpoint.parameters
            read.append(report)
        except StoreError as error:
            unnamed += [] if str(folder) in str(error) else [repr(error)]
    assert not unnamed, told
    if (directory / "an epoch has ended").exists():
        assert read, f"{told}: epochs have ended, but nothing can be read"
    return next((str(report.directory) for report in read if report.status == "complete"), None)


def _check_same(report: AuditReport, expected: AuditReport, told: str) -> None:
    assert report.status == "complete", told
    assert set(report.columns) == set(expected.columns), told
    for name, values in expected.columns.items():
        np.testing.assert_allclose(report.columns[name], values, rtol=1e-9, atol=1e-12, err_msg=f"{told}: {name}")
    assert report.manifest["tracin_steps"] == expected.manifest["tracin_steps"], told
    kept, whole = ([(c.step, c.steps) for c in each.checkpoints()] for each in (report, expected))
    assert kept == whole, f"{told}: the kept checkpoints stand for {kept}"


def _said(directory: Path) -> str:
    return (directory / "said.txt").read_text()[-3000:]
