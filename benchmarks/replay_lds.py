"""How well scores predict what leaving examples out of *this run* does: same start, same order, same chance.

A network is trained and recorded; then again without some examples (their part of the loss is multiplied by 0), once
for each of some random subsets. The LDS is the rank correlation, over the subsets, of the summed scores with what has
really changed, averaged over queries. Other methods score the recorded run's final weights. A recipe that is done is
kept in ``.replay_lds/`` and not run again; remove it there to have it anew.

    make lds-this-run                           all recipes (half an hour)
    python benchmarks/replay_lds.py --only cancer --subsets 10
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from replay_runs import Setting, followed, passes, settings, train
from retraining import GroundTruth, Score, datamodeling_score
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_influence import Checkpoint, Influence
from lightning_influence.replay.scores import replay_scores
from lightning_influence.training import OptimizerHistory

SHARES = (0.01, 0.05, 0.1, 0.2, 0.5)
KEPT = Path(".replay_lds")

Found = dict[str, Any]
"""What is kept of a recipe: ``rows`` by method with ``scores`` by share, and how they were had."""


@dataclass(frozen=True)
class Run:
    """The run that all methods explain."""

    setting: Setting
    module: nn.Module
    checkpoints: Sequence[Checkpoint]
    history: OptimizerHistory

    @property
    def influence(self) -> Influence:
        """The door to its final weights."""
        data = TensorDataset(*self.setting.data)
        return Influence(self.module, None, data, batch_size=self.setting.batch_size)

    @property
    def asked(self) -> TensorDataset:
        """The queries."""
        return TensorDataset(*self.setting.queries)


def replay(run: Run) -> Tensor:
    """Record the run, check that it ends in the same weights, and go back through it."""
    module, rerun = train(run.setting, record=True)
    assert rerun is not None
    rerun.verify()
    ends = run.checkpoints[-1].parameters
    assert all(torch.equal(value, ends[name]) for name, value in module.named_parameters()), "not the same run"
    queries = passes(module, run.setting.queries, passes(module, run.setting.data))
    return replay_scores(rerun, queries, range(len(run.setting.queries[1]))).scores


def fitted(curvature: Any, **options: Any) -> Callable[[Run], Tensor]:
    """Return a method of ours with its default damping; labels and examples are not sampled."""

    def scores(run: Run) -> Tensor:
        influence = run.influence.fit(curvature, history=run.history, **options)
        return influence.pairs(run.asked).scores

    return scores


def source(run: Run) -> Tensor:
    """Three segments with EK-FAC."""
    along = run.influence.along(run.checkpoints)
    exact: dict[str, Any] = {"fisher": "exact", "factor_examples": None}
    return along.source(run.asked, weight_decay=run.history.weight_decay, **exact).scores


METHODS: dict[str, Callable[[Run], Tensor]] = {
    "**replay**": replay,
    "GGN": fitted("ggn"),
    "EK-FAC": fitted("ekfac", fisher="exact", factor_examples=None),
    "K-FAC": fitted("kfac", fisher="exact", factor_examples=None),
    "SOURCE, EK-FAC": source,
    "TracIn, 10 checkpoints": lambda run: run.influence.along(run.checkpoints).tracin(run.asked).scores,
    "inner product (IP)": fitted("identity"),
}


def left_out(setting: Setting, share: float, subsets: int) -> GroundTruth:
    """Train without some examples, and return who was in and what the queries have then."""
    n, generator = len(setting.data[1]), torch.Generator().manual_seed(2)
    members, losses = torch.ones(subsets, n), []
    for row in members:
        row[torch.randperm(n, generator=generator)[: max(round(share * n), 1)]] = 0
        module, _ = train(setting, row)
        module.eval()
        with torch.no_grad():
            logits = module(setting.queries[0]).double()
            losses.append(F.cross_entropy(logits, setting.queries[1], reduction="none"))
    return GroundTruth(members, torch.stack(losses).unsqueeze(1))


def measure(setting: Setting, subsets: int) -> Found:
    """Score a recipe's run with every method, and hold it against trainings without examples."""
    start = time.perf_counter()
    run = Run(setting, *followed(setting))
    print(f"{setting.title}: trained in {time.perf_counter() - start:.1f} s", flush=True)
    scores, rows = dict[str, Tensor](), dict[str, Found]()
    for name, method in METHODS.items():
        start = time.perf_counter()
        try:
            found = method(run)
            if not bool(found.isfinite().all()):
                raise ValueError(f"{int((~found.isfinite()).sum())} of {found.numel()} scores are not finite")
        except Exception as error:  # a method that fails is a finding, not the end of the table
            rows[name] = {"failed": f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"}
            print(f"  {name}: {rows[name]['failed']}", flush=True)
        else:
            scores[name] = found
            rows[name] = {"seconds": time.perf_counter() - start, "scores": []}
    constant, start = [], time.perf_counter()
    for share in SHARES:
        truth = left_out(setting, share, subsets)
        varies = (truth.losses != truth.losses[0]).any(0)[0]
        constant.append(int((~varies).sum()))
        truth = GroundTruth(truth.members, truth.losses[..., varies])
        for name, given in scores.items():
            score = datamodeling_score(given[varies], truth)
            rows[name]["scores"].append([score.value, score.low, score.high])
        told = ", ".join(f"{name} {row['scores'][-1][0]:.3f}" for name, row in rows.items() if "scores" in row)
        print(f"  {_percent(share)} left out: {told}", flush=True)
    return {
        "rows": rows,
        "constant": constant,
        "examples": len(setting.data[1]),
        "queries": len(setting.queries[1]),
        "subsets": subsets,
        "minutes": (time.perf_counter() - start) / 60,
        "date": time.strftime("%Y-%m-%d"),
    }


def kept(setting: Setting, subsets: int) -> Found:
    """Return what was found for a recipe, now or before."""
    asked = repr((setting.title, len(setting.queries[1]), subsets, SHARES, sorted(METHODS)))
    path = KEPT / f"{sha256(asked.encode()).hexdigest()[:16]}.json"
    if not path.exists():
        found = measure(setting, subsets)
        KEPT.mkdir(exist_ok=True)
        path.with_suffix(".part").write_text(json.dumps({"title": setting.title, **found}))
        path.with_suffix(".part").replace(path)
    read: Found = json.loads(path.read_text())
    return read


def section(title: str, found: Found) -> str:
    """Return a recipe's table."""
    lines = [
        f"## {title}\n",
        f"{found['examples']:,} training examples, {found['queries']} queries, {found['subsets']} random subsets for "
        f"each share, retrained in {found['minutes']:.1f} minutes on {found['date']}. {_constant(found['constant'])}\n",
        f"| method | {' | '.join(f'{_percent(share)} left out' for share in SHARES)} | seconds |",
        "|---" * (len(SHARES) + 2) + "|",
    ]
    for name, row in found["rows"].items():
        if "failed" in row:
            lines.append(f"| {name} | {row['failed']} |" + " |" * len(SHARES))
            continue
        cells = [Score(*score) for score in row["scores"]]
        told = " | ".join(f"{cell.value:.3f} ({cell.low:.2f} to {cell.high:.2f})" for cell in cells)
        lines.append(f"| {name} | {told} | {row['seconds']:.1f} |")
    return "\n".join(lines)


def _percent(share: float) -> str:
    return f"{share * 100:g} %"


def _constant(counts: Sequence[int]) -> str:
    if not any(counts):
        return "Every query changed."
    told = ", ".join(f"{count} ({_percent(share)})" for count, share in zip(counts, SHARES, strict=True))
    return f"Queries that did not change, left out: {told}."


def summary(every: Mapping[str, Found]) -> str:
    """Return a line for each recipe."""
    shown = ["**replay**", "GGN", "EK-FAC"]
    shares = "/".join(f"{share * 100:g}" for share in SHARES)
    lines = [f"| LDS at {shares} % left out | {' | '.join(shown)} | best other |", "|---" * (len(shown) + 2) + "|"]
    for title, found in every.items():
        values = {name: [score[0] for score in row.get("scores", ())] for name, row in found["rows"].items()}
        others = [row for name, row in values.items() if name != shown[0] and row]
        best = [max(column) for column in zip(*others, strict=True)]
        told = [
            " ".join(f"{value:.2f}".replace("0.", ".") for value in row) or "failed"
            for row in [*(values[name] for name in shown), best]
        ]
        lines.append(f"| {title} | {' | '.join(told)} |")
    return "\n".join(lines)


def header() -> str:
    """Say what was run, on what, and how to read it."""
    versions = ", ".join(
        f"{package} {importlib.metadata.version(package)}" for package in ("lightning-influence", "torch")
    )
    return (
        "# Replay: what if these had been missing from this run?\n\n"
        f"Written by `benchmarks/replay_lds.py` on {time.strftime('%Y-%m-%d')}: {versions}; {os.cpu_count()} cores, "
        f"{platform.machine()}, Python {platform.python_version()}.\n\n"
        "A run is recorded, and trained again without some examples: same start, same order of batches, same chance; "
        "their part of the loss is multiplied by 0. A method predicts the change of a query's loss by the sum of the "
        "scores of what is left out. The LDS is Spearman's correlation of prediction and truth over random subsets, "
        "averaged over queries; in brackets a 95 % bootstrap interval over subsets and queries. A query's margin "
        "(log-odds of its label) is a monotone function of its loss, and its scores are a multiple: there is one LDS "
        "for both. Every method explains the same run; GGN, EK-FAC, K-FAC and IP its final weights, SOURCE and TracIn "
        "ten checkpoints; dampings are the defaults (after Adam with what its state tells). Seconds are for all "
        "queries, a replay's with two trainings (recorded, and run again to the same bits).\n\n"
        "**This is another question than that of [lds.md](lds.md)**, which asks what becomes of *any* run: random "
        "halves, averaged over seeds. A method that is good at one need not be at the other.\n"
    )


def main() -> None:
    """Run what is not there yet, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subsets", type=int, default=20, help="trainings for each share (default 20)")
    parser.add_argument("--queries", type=int, default=32, help="default 32")
    parser.add_argument("--only", default="", help="part of a title")
    parser.add_argument("--out", type=Path, help="markdown file to write")
    chosen = parser.parse_args()
    every: dict[str, Found] = {}
    for setting in settings(chosen.queries):
        if chosen.only in setting.title:
            every[setting.title] = kept(setting, chosen.subsets)
            text = "\n".join([header(), summary(every), "", *(section(*each) + "\n" for each in every.items())])
            if chosen.out:
                chosen.out.parent.mkdir(parents=True, exist_ok=True)
                chosen.out.write_text(text)
    print(text if every else f"no recipe has {chosen.only!r} in its title")


if __name__ == "__main__":
    main()
