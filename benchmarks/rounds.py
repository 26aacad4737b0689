"""Contestants take turns: processes that are told when to run, medians, ratios and the agreement of their scores."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

MEGABYTE = 2**20


class ContestantError(RuntimeError):
    """A contestant could not be started or has stopped; the message is the last line that it wrote."""


class Contestant(Protocol):
    """What answers requests: ``("exact", path)``, ``("run",)`` and ``("tensors",)``."""

    def ask(self, *request: str) -> dict[str, Any]: ...


class Process:
    """A contestant in a process of its own.

    Args:
        command: Program and arguments; it writes a line of JSON when it is ready, and one for each request.
        log: File for everything else that it writes.
        threads: Threads of every numerical library in it.

    Raises:
        ContestantError: If it does not become ready.
    """

    def __init__(self, command: Sequence[str], log: Path, threads: int) -> None:
        self._log = log
        # Libraries without a setting of their own read these.
        environment = {
            **os.environ,
            **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads)),
            "HF_HUB_OFFLINE": "1",
            "PYTHONWARNINGS": "ignore",
        }
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
            )
        try:
            self._reply()
        except ContestantError:
            self.close()
            raise

    def ask(self, *request: str) -> dict[str, Any]:
        """Send a request and wait for the reply."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # what it died of is in the log
            print("\t".join(request), file=self._process.stdin, flush=True)
        return self._reply()

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def _reply(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            lines = [text for text in self._log.read_text(errors="replace").splitlines() if text.strip()]
            raise ContestantError(f"{lines[-1].strip() if lines else 'no message'} (exit code {code})")
        reply: dict[str, Any] = json.loads(line)
        return reply


def contestant_process(spec: Mapping[str, Any], log: Path) -> Process:
    """Start ``contestants.py`` with a ``Spec``."""
    script = Path(__file__).parent / "contestants.py"
    return Process([sys.executable, str(script), json.dumps(dict(spec))], log, int(spec["threads"]))


@dataclass
class Result:
    """What one contestant has done.

    Attributes:
        seconds: Of every round.
        peak: Bytes taken at most beyond what was held at the start; None if unknown.
        stages: Seconds by stage of every round, where it tells.
        scores: Scores to compare.
        failure: What it failed with; it has no further rounds.
        tensors: Bytes of tensors held at most beyond those held at the start, where they were counted.
        operation: What was running at that moment.
    """

    seconds: list[float] = field(default_factory=list)
    peak: int | None = None
    stages: list[dict[str, float]] = field(default_factory=list)
    scores: np.ndarray | None = None
    failure: str | None = None
    tensors: int | None = None
    operation: str | None = None

    @property
    def median(self) -> float:
        """Median seconds; NaN without a round."""
        return statistics.median(self.seconds) if self.seconds else float("nan")


def compete(contestants: Mapping[str, Contestant], folder: Path, *, rounds: int, budget: float) -> dict[str, Result]:
    """Let contestants take turns, A B A B.

    The first request gives the scores to compare, and warms up. There is at least one round; another one starts if it
    can be expected to end within the budget.

    Args:
        contestants: By name.
        folder: Where they write scores.
        rounds: Rounds at most.
        budget: Seconds for all rounds.

    Returns:
        What each has done.
    """
    results = {name: Result() for name in contestants}

    def ask(name: str, *request: str) -> dict[str, Any] | None:
        try:
            reply = contestants[name].ask(*request)
        except ContestantError as error:
            results[name].failure = str(error)
            return None
        results[name].peak = reply["peak"]
        return reply

    for name, result in results.items():
        path = folder / f"{name}.npy"
        reply = ask(name, "exact", str(path))
        if reply is not None and reply["compared"]:
            result.scores = np.load(path)
    spent = 0.0
    for done in range(rounds):
        if done and spent * (done + 1) / done > budget:
            break
        start = time.perf_counter()
        for name, result in results.items():
            if result.failure is None and (reply := ask(name, "run")) is not None:
                result.seconds.append(reply["seconds"])
                if "stages" in reply:
                    result.stages.append(reply["stages"])
        spent += time.perf_counter() - start
    return results


def weigh(contestants: Mapping[str, Contestant]) -> dict[str, Result]:
    """Count the tensors that contestants hold, once each and without a warm-up, whose remains would be freed.

    Args:
        contestants: By name.

    Returns:
        What each has held. Noting allocations takes time and memory: neither is told.
    """
    results = {name: Result() for name in contestants}
    for name, result in results.items():
        try:
            reply = contestants[name].ask("tensors")
        except ContestantError as error:
            result.failure = str(error)
        else:
            result.tensors, result.operation = reply["tensors"], reply["operation"]
    return results


@dataclass(frozen=True)
class Ratio:
    """How many times as long one took as the other, round by round: median, smallest, largest."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"**{short(self.median)}** ({short(self.low)} to {short(self.high)})"


def ratio(slow: Result, fast: Result) -> Ratio | None:
    """Compare two contestants by their common rounds; None without one."""
    each = [a / b for a, b in zip(slow.seconds, fast.seconds, strict=False)]
    return Ratio(statistics.median(each), min(each), max(each)) if each else None


def disagreement(found: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest relative difference of scores.

    Args:
        found: ``[n]``, or ``[q, n]``.
        expected: The same shape.

    Returns:
        Of one score per example, relative to that score; of pairs, which may be close to 0, relative to the largest
        score of the query.

    Raises:
        ValueError: If the shapes differ.
    """
    if found.shape != expected.shape:
        raise ValueError(f"scores {found.shape} and {expected.shape} can't be compared; expected the same shape.")
    scale = np.abs(expected) if expected.ndim == 1 else np.abs(expected).max(axis=1, keepdims=True)
    return float((np.abs(found - expected) / scale).max())


def short(value: float) -> str:
    """Write a number with two or three digits."""
    if value != value:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def seconds(value: float) -> str:
    """Write seconds."""
    return f"{1000 * value:.0f} ms" if value < 0.1 else f"{short(value)} s" if value == value else "–"


def megabytes(value: int | None) -> str:
    """Write bytes."""
    if value is None:
        return "unknown"
    size = value / MEGABYTE
    return f"{size:,.0f} MB" if size >= 10 else f"{size:.1f} MB"
