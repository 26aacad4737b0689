"""What retraining without some examples does to a measurement, against what their influence scores predict.

For every seed (of the split, the starts and the order of batches) networks are trained on all the data. The examples
are scored on a measurement of a query set; those whose removal is predicted to lower it most are removed, and as a
control those whose removal is predicted to raise it most, and as many at random. Networks are trained anew on what is
left and measured, on the queries and on a test set that the scores have never seen. Every number is a mean over the
same few starts, so that the noise of training does not hide what removal does.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from retraining import Recipe, load, train
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_influence.curvature import CurvatureName, FactorExamples, fit
from lightning_influence.data import ExampleSource
from lightning_influence.gradients import ExampleGradients, discover
from lightning_influence.scores.measurements import Measurement, measurement_scores, measurement_value

WAYS = ("lower", "raise")


@dataclass(frozen=True)
class Split:
    """Examples: inputs, labels, and for gaps the group of each."""

    inputs: Tensor
    labels: Tensor
    group: Tensor | None = None

    def rows(self, chosen: Tensor) -> Split:
        """Return some of the examples."""
        group = None if self.group is None else self.group[chosen]
        return Split(self.inputs[chosen], self.labels[chosen], group)


@dataclass(frozen=True)
class Study:
    """What is trained, measured and removed.

    Attributes:
        split: Given a seed, the training, query and test examples.
        measurements: Name to what makes the measurement of a split.
        share: Share of the training examples to remove.
        starts: Networks trained on every set of examples.
        random: Draws of random removal.
    """

    net: nn.Sequential
    recipe: Recipe
    split: Callable[[int], tuple[Split, Split, Split]]
    measurements: Mapping[str, Callable[[Split], Measurement]]
    curvature: CurvatureName
    share: float
    starts: int
    random: int
    trainer_damping: bool = False

    def passes(self, split: Split) -> ExampleGradients:
        """Return the engine's passes over some examples."""
        source = ExampleSource(TensorDataset(split.inputs, split.labels), batch_size=256)
        return ExampleGradients(self.net, cross_entropy, source, discover(self.net, cross_entropy, source))


@dataclass
class Outcome:
    """What one seed says of one measurement; changes are those of the mean over starts.

    Attributes:
        before: Trained on everything, on the queries and on the test set.
        predicted: Way to the predicted change on the queries.
        changes: Way to the changes on the queries and on the test set.
        random: Changes of every random draw, likewise.
    """

    before: tuple[float, float]
    predicted: dict[str, float] = field(default_factory=dict)
    changes: dict[str, tuple[float, float]] = field(default_factory=dict)
    random: list[tuple[float, float]] = field(default_factory=list)


def cross_entropy(module: nn.Module, batch: Any) -> Tensor:
    """The loss of training."""
    return F.cross_entropy(module(batch[0]), batch[1])


def outcomes(study: Study, seed: int) -> dict[str, Outcome]:
    """Train, score, remove, train anew."""
    training, queries, test = study.split(seed)
    n = len(training.labels)
    count = round(study.share * n)
    seeds = [1000 * seed + start for start in range(study.starts)]
    full = train(
        study.net, training.inputs, training.labels, torch.arange(n).expand(study.starts, -1), seeds, study.recipe
    )
    generator = torch.Generator().manual_seed(seed)
    kept = {("random", draw): torch.randperm(n, generator=generator)[count:] for draw in range(study.random)}
    predicted: dict[tuple[str, str], float] = {}
    for name, scores in _scores(study, full, training, queries).items():
        order = scores.argsort()
        # Removing an example changes the measurement by its score / N: the most negative ones lower it.
        for way, rows in (("lower", order), ("raise", order.flip(0))):
            predicted[name, way] = float(scores[rows[:count]].sum()) / n
            kept[name, way] = rows[count:]
    subsets = torch.stack(list(kept.values())).repeat_interleave(study.starts, 0)
    again = train(study.net, training.inputs, training.labels, subsets, seeds * len(kept), study.recipe)
    result = {}
    for name, measurement in study.measurements.items():
        before = _measured(study, full, range(study.starts), queries, test, measurement)
        outcome = result[name] = Outcome(before)
        for number, (of, way) in enumerate(kept):
            if of not in (name, "random"):
                continue
            models = range(number * study.starts, (number + 1) * study.starts)
            after = _measured(study, again, models, queries, test, measurement)
            change = (after[0] - before[0], after[1] - before[1])
            if of == "random":
                outcome.random.append(change)
            else:
                outcome.changes[str(way)] = change
                outcome.predicted[str(way)] = predicted[name, str(way)]
    return result


def _scores(study: Study, parameters: dict[str, Tensor], training: Split, queries: Split) -> dict[str, Tensor]:
    """Return the training examples' scores on every measurement, the mean over the networks, ``[n]``."""
    n, q = len(training.labels), len(queries.labels)
    damping = study.recipe.trainer_damping(n) + study.recipe.weight_decay if study.trainer_damping else None
    total = {name: torch.zeros(n, dtype=torch.float64) for name in study.measurements}
    for model in range(study.starts):
        load(study.net, parameters, model)
        gradients = study.passes(training)
        curvature = fit(
            gradients, study.curvature, range(n), examples=FactorExamples(n, n, n), labels=("sampled", "exact"),
            damping=damping,
        )  # fmt: skip
        for name, measurement in study.measurements.items():
            found = measurement_scores(
                gradients, range(n), curvature, study.passes(queries), range(q), measurement(queries)
            )
            total[name] += found.scores / study.starts
    return total


def _measured(
    study: Study,
    parameters: dict[str, Tensor],
    models: range,
    queries: Split,
    test: Split,
    measurement: Callable[[Split], Measurement],
) -> tuple[float, float]:
    """Return the measurement on queries and test set, the mean over some networks."""
    totals = [0.0, 0.0]
    for model in models:
        load(study.net, parameters, model)
        for place, split in enumerate((queries, test)):
            value = measurement_value(study.passes(split), range(len(split.labels)), measurement(split))
            totals[place] += value / len(models)
    return totals[0], totals[1]


def table(name: str, found: Mapping[int, Outcome]) -> Iterator[str]:
    """Yield a table: a row for each seed, then the mean, and in how many seeds the sign is right."""
    yield f"## {name}\n"
    yield (
        "| seed | before: queries, test | removed to lower: predicted | queries | test | removed to raise: predicted | "
        "queries | test | random: queries | test |"
    )
    yield "|---" * 10 + "|"
    for seed, outcome in found.items():
        cells = [f"{outcome.before[0]:.4f}, {outcome.before[1]:.4f}"]
        for way in WAYS:
            cells += [f"{value:+.4f}" for value in (outcome.predicted[way], *outcome.changes[way])]
        cells += [_spread([change[place] for change in outcome.random]) for place in (0, 1)]
        yield f"| {seed} | " + " | ".join(cells) + " |"
    every = list(found.values())
    cells = [", ".join(f"{float(torch.tensor([o.before[place] for o in every]).mean()):.4f}" for place in (0, 1))]
    for way in WAYS:
        cells.append(_spread([o.predicted[way] for o in every]))
        cells += [_spread([o.changes[way][place] for o in every]) for place in (0, 1)]
    cells += [_spread([change[place] for o in every for change in o.random]) for place in (0, 1)]
    yield "| **mean ± sd** | " + " | ".join(cells) + " |"
    yield ""
    for place, where in enumerate(("queries", "test set")):
        lower = [o.changes["lower"][place] for o in every]
        higher = [o.changes["raise"][place] for o in every]
        least = [min(change[place] for change in o.random) for o in every]
        most = [max(change[place] for change in o.random) for o in every]
        below = sum(value < other for value, other in zip(lower, least, strict=True))
        above = sum(value > other for value, other in zip(higher, most, strict=True))
        yield (
            f"* {where}: removal to lower did in {sum(value < 0 for value in lower)} of {len(every)} seeds, by more "
            f"than every random draw in {below}; removal to raise did in {sum(value > 0 for value in higher)}, by more "
            f"than every random draw in {above}."
        )
    shares = {way: sum(o.changes[way][0] for o in every) / sum(o.predicted[way] for o in every) for way in WAYS}
    yield (
        f"* size: on the queries, removal to lower did {shares['lower']:.2f} of what was predicted, removal to raise "
        f"{shares['raise']:.2f}."
    )
    yield ""


def _spread(values: list[float]) -> str:
    found = torch.tensor(values, dtype=torch.float64)
    return f"{float(found.mean()):+.4f} ± {float(found.std()):.4f}"


def run(study: Study, title: str, about: str, script: str, packages: tuple[str, ...]) -> None:
    """Run a study over the seeds asked for on the command line and write its tables."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="markdown file to write")
    arguments = parser.parse_args()
    started = time.time()
    found: dict[str, dict[int, Outcome]] = {name: {} for name in study.measurements}
    for seed in range(arguments.seeds):
        for name, outcome in outcomes(study, seed).items():
            found[name][seed] = outcome
            print(f"{time.time() - started:5.0f} s  seed {seed}  {name}: {outcome}", flush=True)
    versions = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in packages)
    lines = [
        f"# {title}\n",
        f"Written by `benchmarks/{script}` on {time.strftime('%Y-%m-%d')}: {versions}; {os.cpu_count()} cores, "
        f"{platform.machine()}, Python {platform.python_version()}; {(time.time() - started) / 60:.0f} minutes.\n",
        about + "\n",
        "Scores are of the query set only; nothing has been chosen on the test set. Every number is a mean over "
        f"{study.starts} starts, changes are against training on everything from the same starts. Random: mean and "
        f"standard deviation over {study.random} draws of as many examples.\n",
    ]
    for name, by_seed in found.items():
        lines += table(name, by_seed)
    text = "\n".join(lines).rstrip() + "\n"
    print(text)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(text)
