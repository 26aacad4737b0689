"""How well a replay predicts what leaving examples out of *this run* does: same start, same order, same chance.

A network is trained and recorded; then again without some examples (their part of the loss is multiplied by 0), once
for each of some random subsets. The LDS is the rank correlation, over the subsets, of the summed scores with what has
really changed, averaged over queries.

    python benchmarks/replay_lds.py             the digits MLP and the breast cancer MLP, a few minutes
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from sklearn.datasets import load_breast_cancer, load_digits
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_influence.data import ExampleSource
from lightning_influence.gradients import ExampleGradients, discover
from lightning_influence.metrics import linear_datamodeling_correlations
from lightning_influence.objective import TrainingStepTask
from lightning_influence.replay.kept_states import KeptStates
from lightning_influence.replay.recorder import Recorder
from lightning_influence.replay.rerun import Rerun
from lightning_influence.replay.scores import replay_scores

SHARES = (0.01, 0.05, 0.1, 0.2)
QUERIES = 50

Data = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Setting:
    """A run to replay.

    Attributes:
        title: Of the table's row.
        net: Makes the network.
        data: Training examples and labels, on which it is trained.
        queries: Others.
        optimizer: Makes its optimizer.
        batch_size: Of training; the last odd batch of an epoch is left out.
        epochs: Of training.
    """

    title: str
    net: Callable[[], nn.Module]
    data: Data
    queries: Data
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
    batch_size: int
    epochs: int

    def order(self) -> list[list[int]]:
        """Return the batches."""
        generator = torch.Generator().manual_seed(1)
        n, batches = len(self.data[1]), list[list[int]]()
        for _ in range(self.epochs):
            shuffled = torch.randperm(n, generator=generator).tolist()
            batches += [shuffled[k : k + self.batch_size] for k in range(0, n - self.batch_size + 1, self.batch_size)]
        return batches


class Classifier(nn.Module):
    """A network with its cross-entropy."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, inputs: Tensor) -> Tensor:
        """Return logits."""
        logits: Tensor = self.net(inputs)
        return logits

    def training_step(self, batch: Data, batch_idx: int) -> Tensor:
        """Return the mean loss."""
        return F.cross_entropy(self(batch[0]), batch[1])


def mlp(inputs: int, width: int, classes: int) -> nn.Module:
    """Two hidden layers, GELU."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(inputs, width),
        nn.GELU(),
        nn.Linear(width, width),
        nn.GELU(),
        nn.Linear(width, classes),
    )


def cnn() -> nn.Module:
    """Two convolutions on 8 x 8 with BatchNorm, GELU and average pooling."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.GELU(),
        nn.AvgPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.GELU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


def digits() -> tuple[Data, Data]:
    """1,400 digits of 8 x 8, and others to ask about."""
    found = load_digits()
    return _split(torch.tensor(found.data, dtype=torch.float32), torch.tensor(found.target), 1400)


def cancer() -> tuple[Data, Data]:
    """469 cells with 30 features, and others."""
    found = load_breast_cancer()
    return _split(torch.tensor(found.data, dtype=torch.float32), torch.tensor(found.target), 469)


def _split(inputs: Tensor, labels: Tensor, size: int) -> tuple[Data, Data]:
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    inputs = (inputs - inputs[order[:size]].mean(0)) / (inputs[order[:size]].std(0) + 1e-6)
    train, rest = order[:size], order[size : size + QUERIES]
    return (inputs[train], labels[train]), (inputs[rest], labels[rest])


def settings() -> list[Setting]:
    """Return the runs."""
    of_digits, of_cancer = digits(), cancer()
    return [
        Setting(
            "digits MLP GELU, SGD .03, batch 128, 10 epochs",
            lambda: mlp(64, 32, 10),
            *of_digits,
            lambda p: torch.optim.SGD(p, 0.03, momentum=0.9, weight_decay=1e-3),
            128,
            10,
        ),
        Setting(
            "digits CNN GELU, BatchNorm, SGD .005, batch 32, 5 epochs",
            cnn,
            *of_digits,
            lambda p: torch.optim.SGD(p, 0.005, momentum=0.9),
            32,
            5,
        ),
        Setting(
            "cancer MLP GELU, AdamW 5e-4, batch 64, 30 epochs",
            lambda: mlp(30, 64, 2),
            *of_cancer,
            lambda p: torch.optim.AdamW(p, 5e-4),
            64,
            30,
        ),
    ]


def train(setting: Setting, weights: Tensor | None = None, *, record: bool = False) -> tuple[Classifier, Rerun | None]:
    """Train by a plain loop.

    Args:
        setting: The run.
        weights: Of the examples ``[N]``, all 1 by default.
        record: Whether to record it.
    """
    torch.manual_seed(0)
    module = Classifier(setting.net()).train()
    optimizer, (inputs, labels), order = setting.optimizer(module.parameters()), setting.data, setting.order()
    recorder = Recorder(module, optimizer, examples=len(labels), states=KeptStates(len(order))) if record else None
    for number, indices in enumerate(order):
        before = recorder.fetching() if recorder else None
        batch = inputs[indices], labels[indices]
        if recorder:
            recorder.fetched(batch, indices, before)
            recorder.begin(number, epoch=0)
        optimizer.zero_grad()
        if weights is None:
            loss = module.training_step(batch, number)
        else:
            each = F.cross_entropy(module(batch[0]), batch[1], reduction="none")
            loss = (each * weights[indices]).mean()
        if recorder:
            recorder.differentiated(loss)
        loss.backward()
        if recorder:
            recorder.stepping()
        optimizer.step()
        if recorder:
            recorder.ended()
    if recorder is None:
        return module, None
    source = ExampleSource(TensorDataset(inputs, labels), batch_size=setting.batch_size)
    return module, Rerun(recorder.finish(), module, TrainingStepTask(), source)


def passes(module: nn.Module, data: Data, like: ExampleGradients | None = None) -> ExampleGradients:
    """Return passes over data."""
    source = ExampleSource(TensorDataset(*data), batch_size=64)
    task = TrainingStepTask()
    found = ExampleGradients(module, task, source, discover(module, task, source))
    return found if like is None else found.like(like)


def measured(module: nn.Module, queries: Data, measurement: str) -> Tensor:
    """Return what every query has after a training, ``[q]``."""
    module.eval()
    with torch.no_grad():
        log_p = F.log_softmax(module(queries[0]).double(), 1)
        own = log_p.gather(1, queries[1].unsqueeze(1)).squeeze(1)
        return -own if measurement == "loss" else own - torch.log1p(-own.exp())


def this_run(
    setting: Setting, scores: Tensor, measurement: str = "loss", shares: Sequence[float] = SHARES, subsets: int = 40
) -> list[tuple[float, int]]:
    """Return the LDS for each share of examples left out, and how many queries did not change (which are left out).

    Args:
        setting: The run.
        scores: ``[q, N]``, sign and scale of ``pairwise_scores``.
        measurement: ``"loss"`` or ``"margin"``.
        shares: Of the training examples.
        subsets: Number of trainings for each share.
    """
    n, found = len(setting.data[1]), []
    for share in shares:
        generator = torch.Generator().manual_seed(2)
        predicted, changed = [], []
        for _ in range(subsets):
            out = torch.randperm(n, generator=generator)[: max(round(share * n), 1)]
            weights = torch.ones(n)
            weights[out] = 0
            module, _ = train(setting, weights)
            predicted.append(scores[:, out].sum(1) / n)
            changed.append(measured(module, setting.queries, measurement))
        each = linear_datamodeling_correlations(torch.stack(predicted), torch.stack(changed))
        constant = int(each.isnan().sum())
        found.append((float(each.nanmean()), constant))
    return found


def replayed(setting: Setting, measurement: str = "loss") -> tuple[Tensor, str]:
    """Return the scores of all queries by replay, ``[q, N]``, and what they took."""
    start = time.perf_counter()
    module, rerun = train(setting, record=True)
    assert rerun is not None
    trained = time.perf_counter()
    training = passes(module, setting.data)
    queries = passes(module, setting.queries, training)
    costs: list[str] = []
    found = replay_scores(
        rerun, queries, range(len(setting.queries[1])), measurement, told=lambda cost: costs.append(str(cost))
    )
    took = f"trained in {trained - start:.2f} s, replayed in {time.perf_counter() - trained:.1f} s (told: {costs[0]})"
    return found.scores, took


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--subsets", type=int, default=40)
    parser.add_argument("--only", default="", help="part of a title")
    parser.add_argument("--measurement", default="loss", choices=["loss", "margin"])
    chosen = parser.parse_args()
    for setting in settings():
        if chosen.only not in setting.title:
            continue
        scores, took = replayed(setting, chosen.measurement)
        print(f"{setting.title}: {took}", flush=True)
        for share, (value, constant) in zip(
            SHARES, this_run(setting, scores, chosen.measurement, subsets=chosen.subsets), strict=True
        ):
            print(f"  {share:.0%} left out: LDS {value:.3f}" + (f" ({constant} constant)" if constant else ""))


if __name__ == "__main__":
    main()
