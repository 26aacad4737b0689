"""Small models, data and trainers for the tests of the callback."""

from __future__ import annotations

import csv
import random
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset
from torchmetrics.classification import MulticlassAccuracy
from which_lightning import CSVLogger, pl

FEATURES, CLASSES = 5, 3
HOOKS = [name for name in nn.Module().__dict__ if name.endswith("_hooks")]
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def make_trainer(directory: Path, **arguments: Any) -> pl.Trainer:
    """A quiet trainer of two epochs, with a CSV logger and without checkpoints unless asked for."""
    settings: dict[str, Any] = {
        "max_epochs": 2,
        "log_every_n_steps": 1,
        "num_sanity_val_steps": 0,
        "enable_checkpointing": False,
        "default_root_dir": directory,
        **QUIET,
    }
    if "logger" not in arguments and not arguments.get("barebones"):
        settings["logger"] = CSVLogger(directory, name="csv", flush_logs_every_n_steps=1)
    if arguments.get("barebones"):
        for name in ("enable_progress_bar", "enable_model_summary", "log_every_n_steps", "num_sanity_val_steps"):
            settings.pop(name, None)
        settings.pop("enable_checkpointing")
    with warnings.catch_warnings():
        # Checkpoints beside the logs of an earlier run, few batches, few workers: all on purpose here.
        warnings.simplefilter("ignore")
        return pl.Trainer(**{**settings, **arguments})


def vectors(n: int = 22, seed: int = 1, *, classes: int = CLASSES, dtype: torch.dtype = torch.float32) -> TensorDataset:
    """Vectors with class labels that a linear layer can find out half-way."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, FEATURES, generator=generator, dtype=torch.float64)
    noise = torch.randn(n, classes, generator=generator, dtype=torch.float64)
    return TensorDataset(x.to(dtype), (2 * x[:, :classes] + noise).argmax(1))


def images(n: int = 22, seed: int = 1) -> TensorDataset:
    """Grey images ``[1, 6, 6]`` with a bright corner that tells the class, three in ten of them wrong."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (n,), generator=generator)
    x = 0.5 * torch.randn(n, 1, 6, 6, generator=generator)
    for k, (row, column) in enumerate([(0, 0), (0, 3), (3, 0)]):
        x[labels == k, :, row : row + 3, column : column + 3] += 1.5
    wrong = torch.rand(n, generator=generator) < 0.3
    return TensorDataset(x, torch.where(wrong, (labels + 1) % CLASSES, labels))


class Named(Dataset[tuple[Tensor, ...]]):
    """A dataset with class names."""

    def __init__(self, data: TensorDataset, classes: list[str]) -> None:
        self.data, self.classes = data, classes

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return self.data[index]


class Numbered(Dataset[tuple[Tensor, Tensor, int]]):
    """Adds the index to every example, so that a model can tell which ones it was given."""

    def __init__(self, data: TensorDataset, *, augment: bool = False) -> None:
        self.data, self.augment = data, augment

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        x, y = self.data[index]
        if self.augment:
            x = x * (1 + random.random()) + float(np.random.rand()) * torch.randn(x.shape)
        return x, y, index


class Stream(IterableDataset[tuple[Tensor, Tensor]]):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        data = vectors()
        yield from (data[index] for index in range(len(data)))  # type: ignore[misc]


class Classifier(pl.LightningModule):
    """A multilayer perceptron with cross-entropy.

    Args:
        optimizer: Makes the optimizer, or what ``configure_optimizers`` may return, from the module.
        features: Number of inputs.
        loss: Called as ``loss(logits, batch)``.
    """

    def __init__(
        self,
        optimizer: Callable[[nn.Module], Any] | None = None,
        features: int = FEATURES,
        loss: Callable[[Tensor, Any], Tensor] | None = None,
        classes: int = CLASSES,
    ) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(features, 6), nn.Tanh(), nn.Linear(6, classes))
        self._optimizer = optimizer or (lambda module: torch.optim.SGD(module.parameters(), lr=0.1))
        self._loss = loss or (lambda logits, batch: F.cross_entropy(logits, batch[1]))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self._loss(self(batch[0]), batch)

    def configure_optimizers(self) -> Any:
        return self._optimizer(self)


class Validated(Classifier):
    """With a validation loss."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self._loss(self(batch[0]), batch))


class Witness(pl.LightningModule):
    """A network with all that an extra pass could disturb, which notes everything that happens to it."""

    def __init__(self, optimizer: str = "sgd") -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 3, 3, padding=1),
            nn.BatchNorm2d(3),
            nn.ReLU(),
            nn.Dropout(0.3),
            nn.Conv2d(3, 4, 3, stride=2),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(16, 8),
            nn.Dropout(0.2),
            nn.Linear(8, CLASSES),
        )
        self.net[5].eval()  # frozen statistics, as in fine-tuning
        self.net[5].weight.requires_grad_(False)
        self.accuracy = MulticlassAccuracy(CLASSES)
        self.optimizer = optimizer
        self.outputs: list[Tensor] = []
        self.order: list[list[int]] = []
        self.inputs: list[float] = []
        self.epoch_losses: list[float] = []
        self.modes_in_stack: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y, indices = batch
        self.order.append([int(index) for index in indices])
        self.inputs.append(float(x.double().sum()))
        logits = self(x)
        loss = F.cross_entropy(logits, y)
        self.outputs.append(loss)
        self.accuracy(logits, y)
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        self.log("train_accuracy", self.accuracy, on_step=True, on_epoch=True)
        self.log_dict({"logit_mean": logits.mean(), "first_index": float(indices[0])})
        if self.logger is not None:
            self.logger.log_metrics({"own_metric": float(loss)}, step=self.global_step)
        return loss

    def on_train_epoch_end(self) -> None:
        self.epoch_losses.append(float(torch.stack([loss.detach() for loss in self.outputs]).double().mean()))
        self.outputs.clear()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y, _ = batch
        self.modes_in_stack.append(torch._C._len_torch_function_stack())
        self.log("val_loss", F.cross_entropy(self(x), y))
        self.log("val_noise", torch.rand(()) + random.random() + float(np.random.rand()))

    def configure_optimizers(self) -> Any:
        trainable = [p for p in self.parameters() if p.requires_grad]
        if self.optimizer == "adam":
            return torch.optim.Adam(trainable, lr=1e-2)
        if self.optimizer == "lbfgs":
            return torch.optim.LBFGS(trainable, lr=0.1, max_iter=3)
        momentum = torch.optim.SGD(trainable, lr=0.05, momentum=0.9, weight_decay=1e-3)
        if self.optimizer == "scheduled":
            return [momentum], [torch.optim.lr_scheduler.ExponentialLR(momentum, 0.5)]
        return momentum


def leftovers(trainer: pl.Trainer, model: nn.Module) -> list[str]:
    """What an extra pass could have left on the model or in torch."""
    found = [
        f"{name or 'model'}.{table}"
        for name, module in model.named_modules()
        for table in HOOKS
        # torchmetrics' metrics carry a hook of their own
        if getattr(module, table) and not type(module).__module__.startswith("torchmetrics")
    ]
    found += [
        f"{name}.{attribute}"
        for name, module in model.named_modules()
        for attribute in ("log", "log_dict")
        if attribute in module.__dict__
    ]
    found += [
        name
        for name in torch_module.__dict__
        if name.startswith("_global_") and name.endswith("_hooks") and torch_module.__dict__[name]
    ]
    if torch._C._len_torch_function_stack():
        found.append("a torch function mode")
    if "process_dataloader" in trainer.strategy.__dict__:
        found.append("strategy.process_dataloader")
    if "convert_input" in trainer.precision_plugin.__dict__:
        found.append("precision_plugin.convert_input")
    made = trainer.train_dataloader
    if isinstance(made, DataLoader) and "_get_iterator" in made.__dict__:
        found.append("train_dataloader._get_iterator")
    return found


def logged_rows(trainer: pl.Trainer) -> list[dict[str, str]]:
    """What the CSV logger wrote, without the audit's own columns."""
    with open(Path(trainer.log_dir) / "metrics.csv", newline="") as file:
        rows = [
            {name: value for name, value in row.items() if value and not name.startswith("influence/")}
            for row in csv.DictReader(file)
        ]
    return [row for row in rows if set(row) - {"step"}]


def loader(dataset: Dataset[Any], batch_size: int = 5, **arguments: Any) -> DataLoader[Any]:
    if "batch_sampler" in arguments:
        return DataLoader(dataset, **arguments)
    return DataLoader(dataset, batch_size=batch_size, **arguments)
