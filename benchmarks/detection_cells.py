"""The grid of ``make detection``: its cells, which of them are held out, and the networks that they train."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

SEEDS = (0, 1, 2)
# What all cells have in common. Results of another recipe are not taken for this one's: raise the edition with every
# change of data, noise, networks or learning rates.
RECIPE = {"edition": 1, "batch": 64, "folds": 5}
CLEANLAB = "2.9"
# Kinds of noise, by which the cells are split and averaged.
RANDOM, CLEAN, INSTANCE, IMBALANCE, HARD = "random flips", "clean", "instance-dependent", "imbalance", "hard tasks"
KINDS = (RANDOM, CLEAN, INSTANCE, IMBALANCE, HARD)


@dataclass(frozen=True)
class Cell:
    """One run of the grid.

    Attributes:
        data: ``mnist``, ``digits``, ``arrests``, ``cancer``, ``wine`` or ``gaussians``.
        net: ``mlp``, ``cnn`` or ``resnet``.
        optimizer: ``sgd``, ``adam`` or ``adamw``.
        epochs: Of training.
        noise: ``clean``, ``symmetric``, ``pair``, ``instance`` or ``imbalance``.
        rate: Share of the labels that it changes.
        examples: Training examples at most.
        rate_scale: Factor of the usual learning rate.
    """

    data: str
    net: str
    optimizer: str
    epochs: int
    noise: str
    rate: float = 0.0
    examples: int = 4000
    rate_scale: float = 1.0

    @property
    def name(self) -> str:
        noise = self.noise if self.noise == "clean" else f"{self.noise}{100 * self.rate:g}"
        slow = "" if self.rate_scale == 1.0 else "-slow"
        return f"{self.data}-{self.net}-{self.optimizer}-{self.epochs}-{noise}{slow}"

    @property
    def kind(self) -> str:
        """What it is averaged with."""
        if self.data in ("arrests", "gaussians") or self.rate_scale != 1.0:
            return HARD
        return {"clean": CLEAN, "instance": INSTANCE, "imbalance": IMBALANCE}.get(self.noise, RANDOM)


# A fractional design: every data set, network, optimizer and length meets every kind of noise that it can. The first
# dozen has a bit of everything. Sizes keep a run between five seconds and a minute.
CELLS = (
    Cell("mnist", "resnet", "adamw", 30, "pair", 0.10, 1000),
    Cell("mnist", "mlp", "sgd", 30, "instance", 0.15, 2500),
    Cell("mnist", "mlp", "adam", 30, "pair", 0.20, 2500),
    Cell("mnist", "cnn", "sgd", 5, "pair", 0.10, 1500),
    Cell("arrests", "mlp", "adam", 30, "symmetric", 0.05, 6000),
    Cell("digits", "mlp", "adam", 6, "symmetric", 0.10, 1500),
    Cell("mnist", "cnn", "adam", 5, "clean"),
    Cell("cancer", "mlp", "adamw", 30, "symmetric", 0.10),
    Cell("mnist", "cnn", "adam", 30, "imbalance", 0.10),
    Cell("gaussians", "mlp", "adam", 30, "symmetric", 0.10, 2000),
    Cell("digits", "resnet", "sgd", 30, "symmetric", 0.40, 1500),
    Cell("mnist", "mlp", "sgd", 5, "symmetric", 0.10, 4000, 0.01),
    Cell("mnist", "mlp", "adamw", 30, "clean"),
    Cell("digits", "resnet", "adamw", 30, "clean", examples=1500),
    Cell("cancer", "mlp", "sgd", 30, "clean"),
    Cell("wine", "mlp", "adam", 30, "clean"),
    Cell("digits", "cnn", "sgd", 5, "clean", examples=1500),
    Cell("arrests", "mlp", "sgd", 30, "clean", examples=6000),
    Cell("arrests", "mlp", "adamw", 5, "symmetric", 0.10, 6000),
    Cell("gaussians", "mlp", "sgd", 30, "clean", examples=2000),
    Cell("mnist", "resnet", "sgd", 5, "symmetric", 0.01, 2000),
    Cell("digits", "mlp", "adamw", 30, "symmetric", 0.01, 1500),
    Cell("mnist", "cnn", "adamw", 5, "symmetric", 0.10),
    Cell("mnist", "mlp", "sgd", 30, "symmetric", 0.10),
    Cell("wine", "mlp", "sgd", 30, "symmetric", 0.10),
    Cell("mnist", "resnet", "adam", 5, "symmetric", 0.20, 2000),
    Cell("digits", "cnn", "sgd", 30, "symmetric", 0.20, 1500),
    Cell("cancer", "mlp", "adam", 5, "symmetric", 0.20),
    Cell("mnist", "mlp", "adamw", 30, "symmetric", 0.40),
    Cell("mnist", "cnn", "adam", 5, "symmetric", 0.40),
    Cell("digits", "mlp", "sgd", 30, "pair", 0.10, 1500),
    Cell("wine", "mlp", "adamw", 30, "pair", 0.20),
    Cell("digits", "cnn", "adamw", 30, "pair", 0.20, 1500),
    Cell("mnist", "cnn", "adam", 5, "instance", 0.15),
    Cell("digits", "resnet", "adamw", 30, "instance", 0.15, 1500),
    Cell("digits", "mlp", "adamw", 5, "imbalance", 0.10, 1500),
    Cell("mnist", "resnet", "sgd", 30, "imbalance", 0.10, 2000),
)


def held_out(cells: tuple[Cell, ...] = CELLS, seed: int = 0) -> frozenset[str]:
    """Return the names of the cells that nothing is chosen on.

    Within every kind of noise the cells are shuffled with a fixed seed; kind after kind, every third cell of the whole
    row is held out.
    """
    row: list[str] = []
    for kind in KINDS:
        names = sorted(cell.name for cell in cells if cell.kind == kind)
        random.Random(seed).shuffle(names)
        row += names
    return frozenset(row[2::3])


class Residual(nn.Module):
    """Two convolutions with BatchNorm beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.path = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.relu(self.path(inputs) + self.shortcut(inputs))


def network(net: str, shape: torch.Size, classes: int) -> nn.Sequential:
    """Return a network of two parts, features and head, with random weights.

    Args:
        net: ``mlp``, ``cnn`` or ``resnet``.
        shape: Of one example.
        classes: Number of classes.
    """
    image = len(shape) == 3
    if net == "mlp":
        width = 128 if image else 32
        body = [nn.Flatten(), nn.Linear(shape.numel(), width), nn.ReLU(), nn.Linear(width, width // 2), nn.ReLU()]
        return nn.Sequential(nn.Sequential(*body), nn.Linear(width // 2, classes))
    if net == "cnn":
        body = [nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        body += [nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
        body += [nn.Linear(16 * (shape[1] // 4) ** 2, 64), nn.ReLU()]
        return nn.Sequential(nn.Sequential(*body), nn.Linear(64, classes))
    large = shape[1] > 16
    body = [nn.Conv2d(1, 8, 3, 2 if large else 1, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    body += [Residual(8, 16, 2 if large else 1), Residual(16, 32, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(nn.Sequential(*body), nn.Linear(32, classes))


def optimizer(cell: Cell, parameters: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
    """Return the cell's optimizer, with its usual learning rate."""
    if cell.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=0.05 * cell.rate_scale, momentum=0.9)
    kind = torch.optim.Adam if cell.optimizer == "adam" else torch.optim.AdamW
    return kind(parameters, lr=1e-3 * cell.rate_scale)
