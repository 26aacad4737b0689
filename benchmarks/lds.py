"""How well scores predict retraining: the linear datamodeling score (LDS; Park et al. 2023, 2303.14186).

Networks are retrained on random halves of the data; a method predicts minus the loss of a query by the sum of its
scores over the half. The LDS is the rank correlation of the two over the halves, averaged over queries. Retrained
losses are averaged over seeds first; what noise is left bounds every method, and that ceiling is printed. All methods
see the same halves. Nothing is tuned on the score: every damping follows from a rule.

    make lds                                    the whole table (about half an hour on 2 cores)
    python benchmarks/lds.py --quick            a few minutes, noisier
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from lds_methods import DATTRI, EXACT, MODELS, OURS, PEERS, TRAJECTORY, Row, Setting, digits, influence, mnist, trainer
from retraining import GroundTruth, Score, datamodeling_score, retrain


@dataclass(frozen=True)
class Result:
    """One line of the table: the mean over models, and the score of their mean."""

    name: str
    score: Score
    ensemble: Score
    seconds: float
    remark: str


def measure(row: Row, setting: Setting, truth: GroundTruth) -> Result:
    """Score every full-data model with one method."""
    found, start = [], time.perf_counter()
    for model in range(MODELS):
        setting.become(model)
        torch.manual_seed(model)  # some peers draw labels from the global stream
        found.append(row.scores(setting))
    seconds = (time.perf_counter() - start) / MODELS
    each = [datamodeling_score(scores, truth) for scores in found]
    mean = Score(*(sum(values) / MODELS for values in zip(*((s.value, s.low, s.high) for s in each), strict=True)))
    return Result(row.name, mean, datamodeling_score(torch.stack(found).mean(0), truth), seconds, row.remark())


def run(setting: Setting, rows: list[Row], *, subsets: int, seeds: int) -> Iterator[str]:
    """Retrain, measure, and yield the lines of a table."""
    report = lambda text: print(f"  {text}", flush=True)  # noqa: E731
    print(f"{setting.title}: {subsets} subsets x {seeds} seeds", flush=True)
    start = time.perf_counter()
    truth = retrain(
        setting.net,
        setting.data,
        setting.queries,
        setting.recipe,
        subsets=subsets,
        seeds=seeds,
        at_once=setting.at_once,
        report=report,
    )
    setting.train_full()
    minutes = (time.perf_counter() - start) / 60
    yield f"## {setting.title}\n"
    yield (
        f"{setting.examples:,} training examples, {len(setting.queries[1])} queries, {subsets} random halves, {seeds} "
        f"seeds each, retrained in {minutes:.1f} minutes; trainer damping 1/(ηK) = "
        f"{setting.recipe.trainer_damping(setting.examples):.4f}, with the L2 term {setting.trainer_damping:.4f}. "
        f"**Noise ceiling {truth.ceiling():.3f}.**\n"
    )
    yield f"| method | LDS (mean of {MODELS} models) | 95 % interval | {MODELS} models ensembled | seconds | |"
    yield "|---|---|---|---|---|---|"
    for row in rows:
        try:
            result = measure(row, setting, truth)
        except ImportError as error:
            line = f"| {row.name} | not installed ({error.name}) | | | | |"
        except Exception as error:  # a peer that fails is a finding, not the end of the table
            line = f"| {row.name} | failed: {type(error).__name__}: {str(error).splitlines()[0][:120]} | | | | |"
        else:
            score, both = result.score, result.ensemble
            line = (
                f"| {row.name} | {score.value:.3f} | {score.low:.3f} to {score.high:.3f} | {both.value:.3f} | "
                f"{result.seconds:.1f} | {result.remark} |"
            )
        report(line)
        yield line


def header(started: float) -> str:
    """Say what was run, on what, and how to read it."""
    versions = []
    for package in ("lightning-influence", "torch", "kronfluence", "dattri"):
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"{package} not installed")
    return (
        "# Linear datamodeling scores\n\n"
        f"Written by `benchmarks/lds.py` on {time.strftime('%Y-%m-%d')}: {', '.join(versions)}; {os.cpu_count()} "
        f"cores, {platform.machine()}, Python {platform.python_version()}; "
        f"{(time.time() - started) / 60:.0f} minutes.\n\n"
        "A method predicts minus the loss of a query after training on half of the data by the sum of its scores over "
        "that half. The LDS is Spearman's correlation of prediction and truth over the halves, averaged over queries; "
        "the truth is averaged over seeds first. The ceiling is what a perfect method would reach. Intervals: "
        "bootstrap over halves and queries. Every damping follows from a rule fixed beforehand; rows in bold are what "
        "the callback does by default for that curvature.\n"
    )


def main() -> None:
    """Run both settings and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="100 subsets x 10 seeds, digits only")
    parser.add_argument("--only", choices=["digits", "mnist"], help="one of the settings")
    parser.add_argument("--seeds", type=int, default=50, help="models per subset of digits (default 50)")
    parser.add_argument("--out", type=Path, help="markdown file to write")
    arguments = parser.parse_args()
    started = time.time()
    tables: list[str] = []
    if arguments.only != "mnist":
        rows = [*OURS, *TRAJECTORY, *EXACT, *PEERS, *DATTRI]
        tables += run(digits(), rows, subsets=100, seeds=10 if arguments.quick else arguments.seeds)
    if not arguments.quick and arguments.only != "digits":
        # Products of 100 queries with a convolutional network take minutes a step; its dense matrix takes seconds.
        rows = [row for row in OURS if "GGN" not in row.name and "PCG" not in row.name and "CG" not in row.name]
        rows += [
            influence("block_ggn", name="block GGN, trainer damping", damping=trainer),
            influence("ggn", name="**GGN, trainer damping**, dense", damping=trainer, solver="dense"),
            *PEERS,
        ]
        tables += ["", *run(mnist(), rows, subsets=50, seeds=8)]
    text = header(started) + "\n" + "\n".join(tables) + "\n"
    print(text)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
