"""Trainers, models, data and audits drawn at random: nobody has chosen their combinations.

A draw follows from its seed and number alone. Every option of every field turns up once in as many draws as the field
has options (in an order that the seed decides), so that a few dozen draws have met them all.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import (
    Callback,
    EarlyStopping,
    LearningRateMonitor,
    ModelCheckpoint,
    RichProgressBar,
    TQDMProgressBar,
)
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies import SingleDeviceStrategy
from models import QUIET
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

from lightning_influence import InfluenceAudit, Queries, TracIn

CLASSES = 3
IGNORED = -100

OPTIONS: dict[str, Sequence[Any]] = {
    # The model and its loss
    "model": ("mlp", "mlp", "cnn", "attention", "gru", "tokens"),
    "dropout": (0.0, 0.0, 0.2),
    "frozen": (None, None, "body", "norm"),
    "loss": ("ce", "ce", "by_hand", "nll", "smoothed", "weighted", "ignore", "sum", "bce", "mse", "two_terms"),
    "side_effect": (None,) * 8 + ("counter", "buffer", "teacher"),
    # The data
    "size": (22, 24, 31, 40),
    "augment": (None,) * 16 + ("global", "generator", "closure", "fetches"),
    "subset": (False, False, True),
    "peek": (False,) * 9 + (True,),
    "collate": ("tuple", "dict") * 9 + ("sorted",),
    "batch_size": (4, 5, 8),
    "sampler": (
        "shuffle",
        "shuffle",
        "generator",
        "sequential",
        "weighted",
        "subset",
        "batches",
        "distributed",
        "epochs",
    ),
    "drop_last": (False, False, True),
    "workers": (0,) * 18 + (1, 2),
    # The trainer
    "precision": ("32-true", "32-true", "32-true", "64-true", "bf16-mixed", "bf16-true"),
    "accumulate": (1, 1, 2, 3),
    "clip": (None, None, "norm", "value"),
    "duration": (("epochs", 2), ("epochs", 2), ("epochs", 3), ("epochs", 1), ("steps", 3), ("steps", 7)),
    "limit_train_batches": (None, None, None, 2, 0.7),
    "overfit_batches": (0,) * 9 + (2,),
    "reload": (0, 0, 0, 1),
    "validation": (True, True, False),
    "val_check_interval": (None, None, 0.5, 2),
    "check_val_every_n_epoch": (1, 1, 2),
    "num_sanity_val_steps": (0, 2),
    "inference_mode": (True, True, False),
    "strategy": ("auto", "auto", "device"),
    "bar": (None, None, None, "tqdm", "rich", "default"),
    "logger": ("csv", "csv", None, "tensorboard", "csv", None, "csv", "both"),
    "callbacks": ("", "", "checkpoint", "stop", "rates", "checkpoint stop rates"),
    "optimizer": (
        "sgd",
        "sgd",
        "momentum",
        "nesterov",
        "decay",
        "groups",
        "adam",
        "adamw",
        "rmsprop",
        "adam groups",
    ),
    "scheduler": (None, None, "epoch", "step", "onecycle", "plateau"),
    # The audit
    "curvature": (
        "identity",
        "identity",
        "identity",
        "diagonal",
        "diagonal",
        "kfac",
        "ekfac",
        "ekfac",
        "block_ggn",
        "ggn",
        "hessian",
    ),
    "fisher": ("auto", "sampled", "empirical", "empirical", "exact"),
    "damping": ("auto", 0.1, 0.01, "relative", "trainer"),
    "solver": ("auto", "auto", "auto", "dense", "cg", "nystrom"),
    "factor_examples": ("auto", None, None, 12),
    "tracin": ("epoch", "epoch", "step", "step", None, "every 2 epochs", "every 2 steps", "budget"),
    "layers": (None, None, None, "head", "glob"),
    "uncovered": ("report", "exact"),
    "queries": (None, None, "worst", "loader", "margin"),
    "known_noise": (False, True),
    "verify": (True, True, True, False),
}


@dataclass(frozen=True)
class Draw:
    """One way to train and to audit; plain values only, so that its ``repr`` is all there is to know."""

    number: int
    seed: int
    model: str
    dropout: float
    frozen: str | None
    loss: str
    side_effect: str | None
    size: int
    augment: str | None
    subset: bool
    peek: bool
    collate: str
    batch_size: int
    sampler: str
    drop_last: bool
    workers: int
    precision: str
    accumulate: int
    clip: str | None
    duration: tuple[str, int]
    limit_train_batches: int | float | None
    overfit_batches: int
    reload: int
    validation: bool
    val_check_interval: int | float | None
    check_val_every_n_epoch: int
    num_sanity_val_steps: int
    inference_mode: bool
    strategy: str
    bar: str | None
    logger: str | None
    callbacks: str
    optimizer: str
    scheduler: str | None
    curvature: str
    fisher: str
    damping: str | float
    solver: str
    factor_examples: int | str | None
    tracin: str | None
    layers: str | None
    uncovered: str
    queries: str | None
    known_noise: bool
    verify: bool

    def differing(self) -> str:
        """What differs from the plainest draw."""
        plain = {name: options[0] for name, options in OPTIONS.items()}
        names = [field.name for field in fields(self) if field.name in plain]
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names if getattr(self, name) != plain[name])


def draw(seed: int, number: int) -> Draw:
    """Return one draw; what can't go together gives way."""
    values = {name: _option(seed, number, name, options) for name, options in OPTIONS.items()}
    if values["model"] == "tokens" and values["loss"] not in ("ce", "smoothed", "ignore", "sum", "weighted"):
        values["loss"] = "ignore"  # a text's tokens are classified, one by one
    if values["model"] == "tokens" and values["collate"] == "sorted":
        values["collate"] = "dict"
    if values["model"] == "tokens" and values["queries"] == "margin":
        values["queries"] = "worst"  # many decisions have no margin
    if values["workers"]:
        values["peek"] = False  # persistent workers serve one iterator at a time
    if values["loss"] == "ignore":
        values["drop_last"] = True  # a batch with nothing but ignored labels has no loss
    if values["sampler"] == "batches" or values["overfit_batches"]:
        values["drop_last"] = False  # our own batches; Lightning makes a loader of its own
    if values["limit_train_batches"] is not None:
        values["overfit_batches"] = 0
    if values["overfit_batches"]:
        # Lightning validates on the training data then, and shuffles neither.
        values |= {"validation": False, "sampler": "shuffle"}
    if not values["validation"]:
        values |= {"val_check_interval": None, "check_val_every_n_epoch": 1}
    if values["sampler"] == "distributed":
        values["batch_size"] = 4  # there is only half of the data
    if values["val_check_interval"] == 2 and (values["batch_size"] > 5 or values["limit_train_batches"] == 0.7):
        values["val_check_interval"] = 1  # an epoch may have one batch only
    if values["val_check_interval"] is not None:
        values["check_val_every_n_epoch"] = 1
    if values["precision"] == "bf16-true":
        values["solver"] = "auto"  # iterations would round for thousands of steps
    if values["logger"] is None:
        values["callbacks"] = values["callbacks"].replace("rates", "")
    return Draw(number, seed, **values)


def _option(seed: int, number: int, name: str, options: Sequence[Any]) -> Any:
    turn, place = divmod(number, len(options))
    order = list(options)
    random.Random(f"{seed} {name} {turn}").shuffle(order)
    return order[place]


# ---------------------------------------------------------------------------------------------------------- the data


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
            "weighted": lambda: {"sampler": WeightedRandomSampler(torch.linspace(0.1, 1, size).tolist(), size - 3)},
            "subset": lambda: {"sampler": SubsetRandomSampler(range(2, size - 2))},
            "distributed": lambda: {"sampler": DistributedSampler(self.train, 2, 0, shuffle=True)},
        }[draw.sampler]()
        return DataLoader(self.train, batch_size=draw.batch_size, drop_last=draw.drop_last, **chosen, **common)

    def val_dataloader(self) -> Any:
        return DataLoader(self.held_out, batch_size=4, collate_fn=self.collate) if self.draw.validation else []

    def queries(self) -> DataLoader[Any]:
        return DataLoader(self.held_out, batch_size=4, collate_fn=self.collate)


# --------------------------------------------------------------------------------------------------------- the model


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
        if draw.frozen == "body":
            self.body[0].requires_grad_(False)
        if draw.frozen == "norm" and draw.model == "cnn":
            self.body[1].eval()
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
        return loss

    def on_train_epoch_end(self) -> None:
        self.ends.append((self.counter.n, self.counter.total))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y, _ = parts(batch)
        self.log("val_loss", self.loss(self(x), y), batch_size=len(y))
        self.log("val_noise", torch.rand(()) + random.random() + float(np.random.rand()), batch_size=len(y))

    def configure_optimizers(self) -> Any:
        trained = [p for p in self.parameters() if p.requires_grad]
        kind = self.draw.optimizer
        if kind.endswith("groups"):
            bias = [p for p in trained if p.ndim < 2]
            trained = [{"params": [p for p in trained if p.ndim >= 2]}, {"params": bias, "lr": 0.02}]
        optimizer = {
            "sgd": lambda: torch.optim.SGD(trained, lr=0.1),
            "momentum": lambda: torch.optim.SGD(trained, lr=0.05, momentum=0.8),
            "nesterov": lambda: torch.optim.SGD(trained, lr=0.05, momentum=0.8, nesterov=True, weight_decay=1e-3),
            "decay": lambda: torch.optim.SGD(trained, lr=0.1, weight_decay=1e-2),
            "groups": lambda: torch.optim.SGD(trained, lr=0.1, momentum=0.5),
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
            made = kinds.OneCycleLR(optimizer, 0.1, total_steps=steps + 1, cycle_momentum=kind == "momentum")
        else:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": made, "interval": "step"}}


# ------------------------------------------------------------------------------------------------- trainer and audit


class Peek(Callback):
    """Looks at a batch of the training loader in the middle of an epoch, as who draws pictures of the data does."""

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            next(iter(trainer.train_dataloader))


def make_audit(draw: Draw, data: Data) -> InfluenceAudit:
    """The audit of a draw; raises what its arguments are refused with."""
    tracin: Any = {
        "every 2 epochs": TracIn(every_n_epochs=2),
        "every 2 steps": TracIn(mode="step", every_n_steps=2, keep_checkpoints=1),
        "budget": TracIn(mode="step", overhead=0.2),
    }.get(draw.tracin or "", draw.tracin)
    queries: Any = {"loader": data.queries(), "margin": Queries(count=2, top=3, measurement="margin")}
    arguments: dict[str, Any] = {
        "curvature": draw.curvature,
        "fisher": draw.fisher,
        "damping": draw.damping,
        "solver": draw.solver,
        "factor_examples": draw.factor_examples,
        "tracin": tracin,
        "layers": {"head": ["head"], "glob": ["h*", nn.Linear]}.get(draw.layers or ""),
        "uncovered": draw.uncovered,
        "queries": queries.get(draw.queries, draw.queries),
        "known_noise": [1, 4, 7] if draw.known_noise else None,
        "verify": draw.verify,
    }
    return InfluenceAudit(**arguments)


def make_trainer(draw: Draw, directory: Path, callbacks: list[Callback]) -> pl.Trainer:
    """The trainer of a draw."""
    more: list[Callback] = [Peek()] if draw.peek else []
    if draw.bar in ("tqdm", "rich"):
        more.append(TQDMProgressBar(leave=True) if draw.bar == "tqdm" else RichProgressBar())
    if "checkpoint" in draw.callbacks:
        more.append(ModelCheckpoint(directory / "checkpoints", save_last=True, every_n_train_steps=2))
    if "stop" in draw.callbacks:
        more.append(EarlyStopping("train_loss_epoch", patience=0, check_on_train_epoch_end=True))
    if "rates" in draw.callbacks:
        more.append(LearningRateMonitor(logging_interval="step"))
    loggers: list[Any] = []
    if draw.logger in ("csv", "both"):
        loggers.append(CSVLogger(directory, name="csv", flush_logs_every_n_steps=1))
    if draw.logger in ("tensorboard", "both"):
        loggers.append(TensorBoardLogger(directory, name="board"))
    kind, amount = draw.duration
    clip = {"norm": 0.5, "value": 0.05, None: None}[draw.clip]
    arguments: dict[str, Any] = {
        **QUIET,
        "default_root_dir": directory,
        "callbacks": [*callbacks, *more],
        "logger": loggers or False,
        "log_every_n_steps": 1,
        "enable_progress_bar": draw.bar is not None,
        "enable_checkpointing": "checkpoint" in draw.callbacks,
        "precision": draw.precision,
        "accumulate_grad_batches": draw.accumulate,
        "gradient_clip_val": clip,
        "gradient_clip_algorithm": draw.clip,
        "max_epochs": amount if kind == "epochs" else 4,
        "max_steps": amount if kind == "steps" else -1,
        "limit_train_batches": draw.limit_train_batches,
        "overfit_batches": draw.overfit_batches,
        "reload_dataloaders_every_n_epochs": draw.reload,
        "val_check_interval": draw.val_check_interval,
        "check_val_every_n_epoch": draw.check_val_every_n_epoch,
        "num_sanity_val_steps": draw.num_sanity_val_steps,
        "inference_mode": draw.inference_mode,
        "strategy": "auto" if draw.strategy == "auto" else SingleDeviceStrategy(torch.device("cpu")),
    }
    if draw.strategy == "device":
        arguments.pop("devices")
        arguments.pop("accelerator")
    return pl.Trainer(**arguments)
