"""Trainers, models, data and audits drawn at random: nobody has chosen their combinations.

A draw follows from its seed and number alone. Every option of every field turns up once in as many draws as the field
has options (in an order that the seed decides), so that a few dozen draws have met them all.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from models import QUIET, logged_rows
from random_models import Data, Model, parts
from torch import Tensor, nn
from which_lightning import (
    Callback,
    CSVLogger,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateMonitor,
    MisconfigurationException,
    ModelCheckpoint,
    RichProgressBar,
    SingleDeviceStrategy,
    TensorBoardLogger,
    TQDMProgressBar,
    pl,
)

from lightning_influence import AuditReport, InfluenceAudit, Queries, TracIn

OPTIONS: dict[str, Sequence[Any]] = {
    # The model and its loss
    "model": ("mlp", "mlp", "cnn", "attention", "gru", "tokens"),
    "dropout": (0.0, 0.0, 0.2),
    "frozen": (None, None, None, "body", "norm", "thawed"),
    "loss": ("ce", "ce", "by_hand", "nll", "smoothed", "weighted", "ignore", "sum", "bce", "mse", "two_terms"),
    "side_effect": (None,) * 8 + ("counter", "buffer", "teacher"),
    "optimization": ("automatic",) * 9 + ("manual",),
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
        "evens",
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
    "limit_val_batches": (None, None, 1),
    "inference_mode": (True, True, False),
    "strategy": ("auto", "auto", "device"),
    "bar": (None, None, None, "tqdm", "rich", "default"),
    "logger": ("csv", "csv", None, "tensorboard", "csv", None, "csv", "both"),
    "callbacks": ("", "", "checkpoint", "stop", "rates", "checkpoint stop rates", "accumulator"),
    "place": ("first", "last"),
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
    "task": (False,) * 7 + (True,),
    "layers": (None, None, None, "head", "glob"),
    "uncovered": ("report", "exact"),
    "queries": (None, None, "worst", "loader", "margin"),
    "known_noise": (False, True),
    "verify": (True, True, True, False),
}

# One way to train and to audit: a number, a seed, and an option of each field. Its ``repr`` is all there is to know.
Draw: Any = make_dataclass("Draw", ["number", "seed", *OPTIONS], frozen=True)


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
    if values["sampler"] == "batches" and values["loss"] == "sum":
        values["sampler"] = "shuffle"  # what is a step along the sum of a batch worth if no two are of one size?
    if values["sampler"] == "batches" or values["overfit_batches"]:
        values["drop_last"] = False  # our own batches; Lightning makes a loader of its own
    if values["limit_train_batches"] is not None:
        values["overfit_batches"] = 0
    if values["overfit_batches"]:
        # Lightning validates on the training data then, and shuffles neither.
        values |= {"validation": False, "sampler": "shuffle"}
    if not values["validation"]:
        values |= {"val_check_interval": None, "check_val_every_n_epoch": 1}
    if values["sampler"] in ("distributed", "evens"):
        values["batch_size"] = 4  # there is only half of the data
    if values["val_check_interval"] == 2 and (values["batch_size"] > 5 or values["limit_train_batches"] == 0.7):
        values["val_check_interval"] = 1  # an epoch may have one batch only
    if values["val_check_interval"] is not None:
        values["check_val_every_n_epoch"] = 1
    if values["precision"] == "bf16-true":
        values["solver"] = "auto"  # iterations would round for thousands of steps
    if values["optimization"] == "manual":
        # Neither can the Trainer step for the user then, nor the audit tell from the step what is minimised.
        values |= {"accumulate": 1, "clip": None, "scheduler": None, "task": True}
        values["callbacks"] = values["callbacks"].replace("accumulator", "")
        values["tracin"] = values["tracin"] if values["tracin"] in (None, "every 2 epochs") else "epoch"
    if values["accumulate"] > 1 or values["duration"] == ("steps", 3):
        values["callbacks"] = values["callbacks"].replace("accumulator", "")
    if values["logger"] is None:
        values["callbacks"] = values["callbacks"].replace("rates", "")
    return Draw(number, seed, **values)


def _option(seed: int, number: int, name: str, options: Sequence[Any]) -> Any:
    turn, place = divmod(number, len(options))
    order = list(options)
    random.Random(f"{seed} {name} {turn}").shuffle(order)
    return order[place]


def differing(drawn: Draw) -> str:
    """What differs from the plainest draw."""
    names = [name for name, options in OPTIONS.items() if getattr(drawn, name) != options[0]]
    return ", ".join(f"{name}={getattr(drawn, name)!r}" for name in names)


class Thaw(Callback):
    """Starts to train the first layer with the second epoch."""

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.current_epoch == 1:
            pl_module.body[0].requires_grad_(True)


class Peek(Callback):
    """Looks at a batch of the training loader in the middle of an epoch, as who draws pictures of the data does."""

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            next(iter(trainer.train_dataloader))


def task(module: Model, batch: Any) -> Tensor:
    """The loss of a batch, for who does not want to run ``training_step`` again."""
    x, y, _ = parts(batch)
    return module.loss(module(x), y)


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
        "task": task if draw.task else None,
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
    if draw.frozen == "thawed":
        more.append(Thaw())
    if draw.callbacks == "accumulator":
        more.append(GradientAccumulationScheduler({0: 1, 1: 2}))
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
        "callbacks": [*callbacks, *more] if draw.place == "first" else [*more, *callbacks],
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
        "limit_val_batches": draw.limit_val_batches,
        "inference_mode": draw.inference_mode,
        "strategy": "auto" if draw.strategy == "auto" else SingleDeviceStrategy(torch.device("cpu")),
    }
    if draw.strategy == "device":
        arguments.pop("devices")
        arguments.pop("accelerator")
    return pl.Trainer(**arguments)


@dataclass
class Visit:
    """A batch as it was trained on."""

    weights: dict[str, Tensor]
    batch: Any
    rates: Mapping[str, float] = field(default_factory=dict)


class Watcher(Callback):
    """Notes the weights before every batch and after every epoch, and how far gradients moved them."""

    def __init__(self) -> None:
        self.visits: list[Visit] = []
        self.ends: list[tuple[int, int, dict[str, Tensor], dict[str, float]]] = []
        self._open: list[Visit] = []
        self._moved: dict[str, float] = {}

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._open.append(Visit(_weights(pl_module), batch))

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        names = {id(p): name for name, p in pl_module.named_parameters()}
        rates = {
            names[id(p)]: group["lr"] / (1 - group.get("momentum", 0.0))
            for group in optimizer.param_groups
            for p in group["params"]
            if p.requires_grad
        }
        for visit in self._open:
            visit.rates = rates
        self.visits, self._open = self.visits + self._open, []
        self._moved = {name: self._moved.get(name, 0.0) + rate for name, rate in rates.items()}

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        every = 2 if pl_module.draw.tracin == "every 2 epochs" else 1
        if (trainer.current_epoch + 1) % every == 0:
            self._end(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._end(trainer, pl_module)

    def _end(self, trainer: pl.Trainer, module: Any) -> None:
        if self._moved:
            self.ends.append((trainer.global_step, len(module.diary), _weights(module), self._moved))
            self._moved = {}


def _weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


@dataclass
class Fit:
    """What came of one training."""

    trainer: pl.Trainer
    model: Model
    data: Data
    watcher: Watcher
    trace: dict[str, Any]
    refusal: Exception | None = None
    report: AuditReport | None = None
    said: list[str] = field(default_factory=list)


def train(drawn: Draw, directory: Path, with_audit: bool) -> Fit:
    """Train, and keep everything that could differ."""
    pl.seed_everything(drawn.number, verbose=False)
    data, model, watcher = Data(drawn), Model(drawn), Watcher()
    audits: list[Callback] = []
    try:
        # Making the audit may not draw random numbers either.
        audits = [make_audit(drawn, data)] if with_audit else []
        trainer = make_trainer(drawn, directory, [watcher, *audits])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.fit(model, datamodule=data)
    except (MisconfigurationException, ValueError) as error:
        if not with_audit:
            raise
        return Fit(trainer if audits else make_trainer(drawn, directory, []), model, data, watcher, {}, error)
    trace: dict[str, Any] = {
        "weights": model.state_dict(),  # buffers and names, too
        "gradients": [p.grad for p in model.parameters()],
        "frozen": [p.requires_grad for p in model.parameters()],
        "modes": [module.training for module in model.modules()],
        "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "schedulers": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
        "random streams": (random.getstate(), np.random.get_state()[1:], torch.get_rng_state()),
        "order and losses": model.diary,
        "inputs": model.inputs,
        "counter": (model.ends, model.counter.n, model.counter.total),
        "metric": {**{name: getattr(model.metric, name) for name in model.metric._defaults}},
        "metric updates": model.metric._update_count,
        "attributes": sorted(model.__dict__),
        "generator": getattr(getattr(data.train, "dataset", data.train), "generator", None),
        "logged": {k: v for k, v in trainer.logged_metrics.items()},
        "callback metrics": dict(trainer.callback_metrics),
        "rows": logged_rows(trainer) if drawn.logger == "csv" else [],
        "progress": (trainer.global_step, trainer.current_epoch, trainer.should_stop),
    }
    if trace["generator"] is not None:
        trace["generator"] = trace["generator"].get_state()
    fit = Fit(trainer, model, data, watcher, trace)
    if audits:
        assert isinstance(audits[0], InfluenceAudit)
        fit.report = audits[0].report if audits[0].has_report else None
        fit.said = [str(warning.message) for warning in caught if "nfluence" in str(warning.message)]
    return fit
