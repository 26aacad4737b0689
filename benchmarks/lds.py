"""How well scores predict retraining: the linear datamodeling score (LDS; Park et al. 2023, 2303.14186).

Networks are retrained on random halves of the data; a method predicts minus the loss of a query by the sum of its
scores over the half. The LDS is the rank correlation of the two over the halves, averaged over queries. Retrained
losses are averaged over seeds first; what noise is left bounds every method, and that ceiling is printed. All methods
see the same halves. Nothing is tuned on the score: every damping follows from a rule. What has been trained and scored
is kept in ``.lds/`` and not run again; remove it there to have it anew.

    make lds                                    all tables (some hours on 2 cores; resumes)
    python benchmarks/lds.py --only digits --seeds 10
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lds_methods import MODELS, TABLES, Row, Setting, slug
from peers import versions
from retraining import GroundTruth, Score, datamodeling_score, keep, retrain
from torch import Tensor


@dataclass(frozen=True)
class Result:
    """One line of the table: means over models of the scores for loss and margin, and the score of the models' mean."""

    score: Score
    margin: float
    ensemble: Score | None
    seconds: float
    remark: str


def scored(row: Row, setting: Setting) -> dict[str, Any]:
    """Return what a method says of the full-data models ``[models, queries, N]``, now or before."""
    path = setting.kept / f"{slug(row.name)}.pt"
    if not path.exists():
        if not setting.parameters:
            setting.train_full()
        found, start = list[Tensor](), time.perf_counter()
        for model in range(row.models):
            setting.become(model)
            torch.manual_seed(model)  # some peers draw labels from the global stream
            found.append(row.scores(setting).float())
        seconds = (time.perf_counter() - start) / row.models
        kept = {"scores": torch.stack(found), "seconds": seconds, "remark": row.remark()}
        keep({**kept, "date": time.strftime("%Y-%m-%d")}, path)
    read: dict[str, Any] = torch.load(path)
    return read


def measure(row: Row, setting: Setting, truth: GroundTruth) -> Result:
    """Hold a method's scores against what retraining says."""
    found = scored(row, setting)
    each = [datamodeling_score(scores, truth) for scores in found["scores"]]
    mean = Score(*(sum(values) / len(each) for values in zip(*((s.value, s.low, s.high) for s in each), strict=True)))
    margins = [datamodeling_score(scores, truth, truth.confidence, draws=1).value for scores in found["scores"]]
    both = datamodeling_score(found["scores"].mean(0), truth) if row.models > 1 else None
    return Result(mean, sum(margins) / len(margins), both, found["seconds"], found["remark"])


def run(setting: Setting, rows: list[Row], *, subsets: int, seeds: int) -> Iterator[str]:
    """Retrain, measure, and yield the lines of a table."""
    report = lambda text: print(f"  {text}", flush=True)  # noqa: E731
    print(f"{setting.title}: {subsets} subsets x {seeds} seeds", flush=True)
    truth = retrain(
        setting.net,
        setting.data,
        setting.queries,
        setting.recipe,
        subsets=subsets,
        seeds=seeds,
        at_once=setting.at_once,
        kept=setting.kept,
        report=report,
    )
    constant = int((~truth.varies).sum())
    yield f"## {setting.title}\n"
    yield (
        f"{setting.examples:,} training examples, {len(setting.queries[1])} queries"
        f"{f' ({constant} whose loss is always the same are left out)' if constant else ', all of which vary'}, "
        f"{subsets} random halves, {seeds} seeds each; trainer damping 1/(ηK) = "
        f"{setting.recipe.trainer_damping(setting.examples):.4f}, with the L2 term {setting.trainer_damping:.4f}. "
        f"**Noise ceiling {truth.ceiling():.3f}.**{' ' + setting.note if setting.note else ''}\n"
    )
    yield f"| method | LDS (mean of {MODELS} models) | 95 % interval | margin | {MODELS} models ensembled | seconds | |"
    yield "|---|---|---|---|---|---|---|"
    for row in rows:
        try:
            result = measure(row, setting, truth)
        except ImportError as error:
            line = f"| {row.name} | not installed ({error.name}) | | | | | |"
        except Exception as error:  # a peer that fails is a finding, not the end of the table
            line = f"| {row.name} | failed: {type(error).__name__}: {str(error).splitlines()[0][:120]} | | | | | |"
        else:
            score, both = result.score, "" if result.ensemble is None else f"{result.ensemble.value:.3f}"
            line = (
                f"| {row.name} | {score.value:.3f} | {score.low:.3f} to {score.high:.3f} | {result.margin:.3f} | "
                f"{both} | {result.seconds:.1f} | {result.remark} |"
            )
        report(line)
        yield line


def header() -> str:
    """Say what was run, on what, and how to read it."""
    return (
        "# Linear datamodeling scores\n\n"
        f"Written by `benchmarks/lds.py` on {time.strftime('%Y-%m-%d')}: {versions('kronfluence', 'dattri')}; "
        f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}.\n\n"
        "A method predicts minus the loss of a query after training on half of the data by the sum of its scores over "
        "that half. The LDS is Spearman's correlation of prediction and truth over the halves, averaged over queries; "
        "the truth is averaged over seeds first. The ceiling is what a perfect method would reach. Intervals: "
        "bootstrap over halves and queries. *Margin*: the same for the log-odds of the label, whose scores are a "
        "multiple of the loss's and whose mean over seeds is not. Every damping follows from a rule fixed beforehand; "
        "rows in bold are what the callback does by default for that curvature. Seconds are of a model (on a busy "
        "machine they mean little), for TRAK with the trainings of its models.\n\n"
        "**This is another question than that of [replay.md](replay.md)**: what becomes of *any* run, not of this "
        "one.\n"
    )


def main() -> None:
    """Run all settings and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(TABLES), nargs="*", default=list(TABLES), help="some of the settings")
    parser.add_argument("--seeds", type=int, help="models per half (default 50 for digits, 8 else)")
    parser.add_argument("--out", type=Path, help="markdown file to write")
    arguments = parser.parse_args()
    tables: list[str] = []
    for name in arguments.only:
        setting, rows, subsets, seeds = TABLES[name]
        tables += ["", *run(setting(), rows, subsets=subsets, seeds=arguments.seeds or seeds)]
        text = header() + "\n".join(tables) + "\n"
        if arguments.out:
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
