"""Small networks with data of theirs, for Trainers drawn at random (``random_trainers``)."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    Sampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
    default_collate,
)
from torchmetrics import MeanMetric
from which_lightning import pl

if TYPE_CHECKING:
    from random_trainers import Draw

CLASSES = 3
IGNORED = -100


class Examples(Dataset[Any]):
    """Vectors, images or texts; every example is ``(x, y, its own number)``, with its augmentation."""

    def __init__(self, draw: Draw, size: int, seed: int, augment: str | None) -> None:
        made = torch.Generator().manual_seed(seed)
        self.y = torch.randint(CLASSES, (size,), generator=made)
        self.augment = augment
        self.generator = torch.Generator().manual_seed(seed + 1) if augment == "generator" else None
        own = torch.Generator().manual_seed(seed + 2)
        self.noise = lambda shape: torch.randn(shape, generator=own)
        self.fetches = 0
        if draw.model in ("mlp", "cnn"):
            shape = (5,) if draw.model == "mlp" else (1, 5, 5)
            self.x = torch.randn(size, *shape, generator=made)
            self.x.view(size, -1)[torch.arange(size), self.y] += 1.5
        else:
            self.x = torch.randint(1, 12, (size, 6), generator=made)
            self.augment = None
        if draw.model == "tokens":
            self.y = self.x.roll(-1, 1) % CLASSES
            if draw.loss == "ignore":
                lengths = torch.randint(2, 7, (size,), generator=made)
                self.y[torch.arange(6)[None] >= lengths[:, None]] = IGNORED
        elif draw.loss == "ignore":
            self.y[[3, size // 2]] = IGNORED

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        x = self.x[index]
        if self.augment == "global":
            x = x * (1 + 0.1 * random.random()) + 0.1 * float(np.random.rand()) * torch.randn(x.shape)
        elif self.augment == "generator":
            x = x + 0.2 * torch.randn(x.shape, generator=self.generator)
        elif self.augment == "closure":
            x = x + 0.2 * self.noise(x.shape)
        elif self.augment == "fetches":
            self.fetches += 1
            x = x * (1 + 0.01 * (self.fetches % 7))
        return x, self.y[index], int(index)


class EveryEpochAnother(Sampler[int]):
    """An order that depends on the epoch alone."""

    epoch = 0

    def __init__(self, size: int) -> None:
        self.size = size

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(self.size, generator=torch.Generator().manual_seed(self.epoch)).tolist())


class Evens(Sampler[int]):
    """Leaves out every other example, as samplers do that split a data set."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return (self.size + 1) // 2

    def __iter__(self) -> Iterator[int]:
        return iter((2 * torch.randperm(len(self))).tolist())


def never_drawn(draw: Draw) -> set[int]:
    """Indices that the sampler of a draw does not draw in any epoch."""
    return {
        "subset": {0, 1, draw.size - 2, draw.size - 1},
        "evens": set(range(1, draw.size, 2)),
        "weighted": {0, 1, 2},
    }.get(draw.sampler, set())


def as_dict(examples: list[Any]) -> dict[str, Any]:
    x, y, number = default_collate(examples)
    return {"inputs": {"x": x}, "number": number, "y": y}


def by_first_value(examples: list[Any]) -> Any:
    """As who packs sequences sorts them by length: the order of the rows is not that of the indices."""
    return default_collate(sorted(examples, key=lambda example: -float(example[0].flatten()[0])))


COLLATES: dict[str, Callable[[list[Any]], Any] | None] = {"tuple": None, "dict": as_dict, "sorted": by_first_value}


def parts(batch: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, targets and own numbers of a batch."""
    return (batch["inputs"]["x"], batch["y"], batch["number"]) if isinstance(batch, dict) else tuple(batch)


class Data(pl.LightningDataModule):
    """Training and validation data of a draw.

    Attributes:
        positions: Own number of an example to its index in the training data set.
    """

    def __init__(self, draw: Draw) -> None:
        super().__init__()
        self.draw = draw
        examples = Examples(draw, draw.size + 5 * draw.subset, seed=draw.number, augment=draw.augment)
        chosen = list(range(len(examples)))
        if draw.subset:
            random.Random(draw.number).shuffle(chosen)
            chosen = chosen[: draw.size]
        self.train: Dataset[Any] = Subset(examples, chosen) if draw.subset else examples
        self.positions = {own: position for position, own in enumerate(chosen)}
        self.held_out = Examples(draw, 9, seed=1000 + draw.number, augment=None)
        self.collate = COLLATES[draw.collate]

    def train_dataloader(self) -> DataLoader[Any]:
        draw, size = self.draw, self.draw.size
        common: dict[str, Any] = {"num_workers": draw.workers, "collate_fn": self.collate}
        common["persistent_workers"] = draw.workers > 1
        if draw.sampler == "batches":
            order = [*range(0, size, 2), *range(1, size, 2)]
            batches = [order[:5], order[5:8], order[8:16], order[16:20], order[20:]]
            return DataLoader(self.train, batch_sampler=batches, **common)
        if draw.sampler == "epochs":
            sampler = BatchSampler(EveryEpochAnother(size), draw.batch_size, draw.drop_last)
            return DataLoader(self.train, batch_sampler=sampler, **common)
        chosen: dict[str, Any] = {
            "shuffle": lambda: {"shuffle": True},
            "generator": lambda: {"shuffle": True, "generator": torch.Generator().manual_seed(3)},
            "sequential": lambda: {"sampler": SequentialSampler(self.train)},  # type: ignore[arg-type]
            "weighted": lambda: {"sampler": WeightedRandomSampler([0, 0, 0, *range(3, size)], size - 3)},
            "evens": lambda: {"sampler": Evens(size)},
            "subset": lambda: {"sampler": SubsetRandomSampler(range(2, size - 2))},
            "distributed": lambda: {"sampler": DistributedSampler(self.train, 2, 0, shuffle=True)},
        }[draw.sampler]()
        return DataLoader(self.train, batch_size=draw.batch_size, drop_last=draw.drop_last, **chosen, **common)

    def val_dataloader(self) -> Any:
        return DataLoader(self.held_out, batch_size=4, collate_fn=self.collate) if self.draw.validation else []

    def queries(self) -> DataLoader[Any]:
        return DataLoader(self.held_out, batch_size=4, collate_fn=self.collate)


class Counter:
    """Somebody's own meter."""

    def __init__(self) -> None:
        self.n, self.total = 0, 0.0

    def update(self, value: float, n: int) -> None:
        self.n, self.total = self.n + n, self.total + n * value


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.attention(h, h, h, need_weights=False)[0]


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(8, 6, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.gru(x)[0][:, -1]


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


class Model(pl.LightningModule):
    """A small network; notes what training showed it, and has what people's modules have: metrics, logs, state."""

    def __init__(self, draw: Draw) -> None:
        super().__init__()
        self.draw = draw
        drop = nn.Dropout(draw.dropout)
        if draw.model == "mlp":
            self.body = nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Tanh(), drop)
            width = 6
        elif draw.model == "cnn":
            self.body = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), drop, nn.Flatten())
            width = 27
        elif draw.model == "gru":
            self.body = nn.Sequential(nn.Embedding(12, 8), drop, Recurrent())
            width = 6
        else:
            pooled = [] if draw.model == "tokens" else [Mean()]
            self.body = nn.Sequential(nn.Embedding(12, 8, padding_idx=0), Attention(), drop, *pooled)
            width = 8
        self.head = nn.Linear(width, CLASSES)
        if draw.frozen in ("body", "thawed"):
            self.body[0].requires_grad_(False)
        if draw.frozen == "norm" and draw.model == "cnn":
            self.body[1].eval()
        self.automatic_optimization = draw.optimization == "automatic"
        self.register_buffer("class_weights", torch.tensor([0.5, 1.0, 2.0]))
        self.register_buffer("center", torch.zeros(CLASSES))
        self.metric = MeanMetric()
        self.counter = Counter()
        self.teacher = nn.Linear(width, CLASSES).requires_grad_(False) if draw.side_effect == "teacher" else None
        self.diary: list[tuple[list[int], list[float]]] = []
        self.inputs: list[float] = []
        self.ends: list[tuple[int, float]] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))

    def target(self, y: Tensor, like: Tensor) -> Tensor:
        return F.one_hot(y, CLASSES).to(like)

    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        """The batch loss, as people write it."""
        kind = self.draw.loss
        if self.draw.model == "tokens":
            logits, y = logits.flatten(0, 1), y.flatten()
        if kind == "by_hand":
            return F.cross_entropy(logits, y, reduction="none").mean()
        if kind == "nll":
            return F.nll_loss(logits.log_softmax(1), y)
        if kind == "bce":
            return F.binary_cross_entropy_with_logits(logits, self.target(y, logits))
        if kind == "mse":
            return F.mse_loss(logits, self.target(y, logits))
        if kind == "two_terms":
            return F.cross_entropy(logits, y) + 0.3 * F.mse_loss(logits, self.target(y, logits))
        arguments = {
            "weighted": {"weight": self.class_weights},
            "smoothed": {"label_smoothing": 0.1},
            "sum": {"reduction": "sum"},
        }
        return F.cross_entropy(logits, y, **arguments.get(kind, {}))

    def shares(self, logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """What each example adds to the numerator and to the denominator of the batch loss, ``[n]`` each."""
        n, kind = len(y), self.draw.loss
        if kind in ("bce", "mse"):
            function = F.mse_loss if kind == "mse" else F.binary_cross_entropy_with_logits
            return function(logits, self.target(y, logits), reduction="none").mean(1), torch.ones(n)
        flat, labels = logits.reshape(-1, CLASSES), y.reshape(-1)
        weights = (labels != IGNORED).to(logits)
        smoothing = 0.1 if kind == "smoothed" else 0.0
        if kind == "weighted":
            weights = self.class_weights.to(logits)[labels]
        elements = F.cross_entropy(flat, labels, reduction="none", label_smoothing=smoothing) * weights
        if kind == "two_terms":
            elements = elements + 0.3 * (logits - self.target(y, logits)).square().mean(1)
        return elements.view(n, -1).sum(1), weights.view(n, -1).sum(1)

    def plain(self, logits: Tensor, y: Tensor) -> Tensor:
        """Mean loss of every example's own elements, without weights, smoothing and further terms, ``[n]``."""
        if self.draw.loss in ("bce", "mse"):
            return self.shares(logits, y)[0]
        losses = F.cross_entropy(logits.reshape(-1, CLASSES), y.reshape(-1), reduction="none").view(len(y), -1)
        return losses.sum(1) / (y.view(len(y), -1) != IGNORED).sum(1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y, numbers = parts(batch)
        logits = self(x)
        loss = self.loss(logits, y)
        seen = logits.detach()
        with torch.autocast("cpu", enabled=False):
            own = self.plain(seen if seen.dtype == torch.float64 else seen.float(), y)
        self.diary.append((numbers.tolist(), own.tolist()))
        self.inputs.append(float(x.double().sum()))
        self.metric.update(loss.detach())
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        self.log("train_metric", self.metric, on_step=True, on_epoch=True)
        if self.draw.side_effect == "counter":
            self.counter.update(float(loss.detach()), len(y))
        elif self.draw.side_effect == "buffer":
            self.center.mul_(0.9).add_(seen.reshape(-1, CLASSES).mean(0), alpha=0.1)
        elif self.teacher is not None:
            for own_weights, mean in zip(self.head.parameters(), self.teacher.parameters(), strict=True):
                mean.data = 0.9 * mean.data + 0.1 * own_weights.data
        if not self.automatic_optimization:
            optimizer: Any = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return loss

    def on_train_epoch_end(self) -> None:
        self.ends.append((self.counter.n, self.counter.total))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y, _ = parts(batch)
        self.log("val_loss", self.loss(self(x), y), batch_size=len(y))
        self.log("val_noise", torch.rand(()) + random.random() + float(np.random.rand()), batch_size=len(y))

    def configure_optimizers(self) -> Any:
        frozen = self.draw.frozen != "thawed"
        trained = [p for p in [*self.body.parameters(), *self.head.parameters()] if p.requires_grad or not frozen]
        kind, per_example = self.draw.optimizer, 1.0
        if self.draw.loss == "sum":
            per_example = 1 / 20
        if kind.endswith("groups"):
            bias = [p for p in trained if p.ndim < 2]
            trained = [{"params": [p for p in trained if p.ndim >= 2]}, {"params": bias, "lr": 0.02 * per_example}]
        optimizer = {
            "sgd": lambda: torch.optim.SGD(trained, lr=0.1 * per_example),
            "momentum": lambda: torch.optim.SGD(trained, lr=0.05 * per_example, momentum=0.8),
            "nesterov": lambda: torch.optim.SGD(
                trained, lr=0.05 * per_example, momentum=0.8, nesterov=True, weight_decay=1e-3
            ),
            "decay": lambda: torch.optim.SGD(trained, lr=0.1 * per_example, weight_decay=1e-2),
            "groups": lambda: torch.optim.SGD(trained, lr=0.1 * per_example, momentum=0.5),
            "adam": lambda: torch.optim.Adam(trained, lr=0.01),
            "adamw": lambda: torch.optim.AdamW(trained, lr=0.01),
            "rmsprop": lambda: torch.optim.RMSprop(trained, lr=0.01),
            "adam groups": lambda: torch.optim.Adam(trained, lr=0.01, weight_decay=1e-3),
        }[kind]()
        kinds = torch.optim.lr_scheduler
        if self.draw.scheduler == "epoch":
            return [optimizer], [kinds.StepLR(optimizer, 1, 0.5)]
        if self.draw.scheduler == "plateau":
            plateau = kinds.ReduceLROnPlateau(optimizer, patience=0)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "train_loss"}}
        if self.draw.scheduler == "step":
            made: Any = kinds.ExponentialLR(optimizer, 0.9)
        elif self.draw.scheduler == "onecycle":
            steps = int(self.trainer.estimated_stepping_batches)
            made = kinds.OneCycleLR(
                optimizer, 0.1 * per_example, total_steps=steps + 1, cycle_momentum=kind == "momentum"
            )
        else:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": made, "interval": "step"}}
