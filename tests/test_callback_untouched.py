"""Training with the audit is bitwise the training without it, and nothing stays behind."""

from __future__ import annotations

import copy
import gc
import multiprocessing
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import (
    CLASSES,
    Classifier,
    Numbered,
    Validated,
    Witness,
    images,
    leftovers,
    loader,
    logged_rows,
    make_trainer,
    vectors,
)
from torch import Tensor
from torch.utils.data import BatchSampler, SequentialSampler, SubsetRandomSampler, WeightedRandomSampler
from which_lightning import Callback, EarlyStopping, ModelCheckpoint, TensorBoardLogger, Tuner, pl

from lightning_influence import InfluenceAudit, TracIn
from lightning_influence.replay.settings import Record


@dataclass
class Setting:
    """One way to train."""

    trainer: dict[str, Any] = field(default_factory=dict)
    loader: dict[str, Any] = field(default_factory=lambda: {"batch_size": 5, "shuffle": True})
    sampler: Callable[[], dict[str, Any]] = dict
    model: dict[str, Any] = field(default_factory=dict)
    audit: dict[str, Any] = field(default_factory=dict)
    callbacks: Callable[[], list[Callback]] = list
    augment: bool = False
    validation: bool = True
    reload: bool = False


def every_other() -> dict[str, Any]:
    """A batch sampler of the user's own, with batches of different sizes."""
    order = list(range(0, 22, 2)) + list(range(1, 22, 2))
    return {"batch_sampler": [order[:5], order[5:7], order[7:16], order[16:]]}


WORKERS = {"num_workers": 2, "shuffle": True, "batch_size": 5}
SETTINGS = {
    "plain": Setting(),
    "no validation, augmentation": Setting(validation=False, augment=True),
    "adam, in order": Setting(model={"optimizer": "adam"}, loader={"batch_size": 5}),
    "lr schedule and early stopping": Setting(
        model={"optimizer": "scheduled"},
        trainer={"max_epochs": 6},
        callbacks=lambda: [EarlyStopping("val_noise", patience=1)],
    ),
    "lbfgs, own batch sampler": Setting(model={"optimizer": "lbfgs"}, loader={}, sampler=every_other),
    "workers": Setting(loader=WORKERS),
    "persistent workers": Setting(loader={**WORKERS, "persistent_workers": True}, trainer={"max_epochs": 3}),
    "accumulation and clipping": Setting(trainer={"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}),
    "every second epoch": Setting(trainer={"max_epochs": 3}, audit={"tracin": TracIn(every_n_epochs=2)}),
    "in flight": Setting(trainer={"max_epochs": 3}, audit={"tracin": "step"}),
    "in flight, adam": Setting(model={"optimizer": "adam"}, audit={"tracin": "step"}),
    "in flight, lbfgs": Setting(model={"optimizer": "lbfgs"}, audit={"tracin": "step"}),
    "in flight, accumulated and clipped": Setting(
        trainer={"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}, audit={"tracin": "step"}
    ),
    "in flight, bfloat16": Setting(trainer={"precision": "bf16-mixed"}, audit={"tracin": "step"}),
    "in flight, some batches": Setting(audit={"tracin": TracIn(mode="step", every_n_steps=2)}),
    "in flight, a budget": Setting(audit={"tracin": TracIn(mode="step", overhead=0.1)}),
    "no TracIn, incomplete batch dropped": Setting(
        audit={"tracin": None, "verify": False}, loader={"batch_size": 5, "shuffle": True, "drop_last": True}
    ),
    "diagonal, own generator": Setting(
        audit={"curvature": "diagonal", "fisher": "empirical"},
        sampler=lambda: {"generator": torch.Generator().manual_seed(3)},
    ),
    "64-true, subset": Setting(
        trainer={"precision": "64-true"},
        loader={"batch_size": 4},
        sampler=lambda: {"sampler": SubsetRandomSampler(range(3, 19))},
    ),
    "bf16-mixed, with replacement": Setting(
        trainer={"precision": "bf16-mixed"},
        loader={"batch_size": 4},
        sampler=lambda: {"sampler": WeightedRandomSampler(torch.rand(22), 18)},
    ),
    "augmentation in workers": Setting(augment=True, loader=WORKERS),
    "limited": Setting(trainer={"limit_train_batches": 3, "limit_val_batches": 2}),
    "overfit": Setting(trainer={"overfit_batches": 2}),
    "reloaded": Setting(reload=True, trainer={"max_epochs": 3, "reload_dataloaders_every_n_epochs": 1}),
    "reloaded with persistent workers": Setting(
        reload=True,
        loader={**WORKERS, "persistent_workers": True},
        trainer={"max_epochs": 3, "reload_dataloaders_every_n_epochs": 1},
    ),
    "stopped within an epoch": Setting(trainer={"max_steps": 7, "max_epochs": -1}),
    "validation within epochs": Setting(trainer={"val_check_interval": 2, "num_sanity_val_steps": 1}),
    "recorded": Setting(augment=True, audit={"record": True}),
    "recorded in workers": Setting(augment=True, loader=WORKERS, audit={"record": True}),
    "recorded, adam, accumulated and clipped": Setting(
        model={"optimizer": "adam"},
        trainer={"accumulate_grad_batches": 2, "gradient_clip_val": 0.1, "max_epochs": 3},
        audit={"record": True, "tracin": "step"},
    ),
    "recorded, bfloat16, limited": Setting(
        trainer={"precision": "bf16-mixed", "limit_train_batches": 3}, audit={"record": True}
    ),
    "recorded with a budget": Setting(trainer={"max_epochs": 4}, audit={"record": Record(max_bytes=40_000)}),
}


class Data(pl.LightningDataModule):
    """Makes new loaders whenever asked."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        self.setting = setting
        self.loaders: list[Any] = []

    def train_dataloader(self) -> Any:
        made = loader(
            Numbered(images(), augment=self.setting.augment), **{**self.setting.loader, **self.setting.sampler()}
        )
        if not self.setting.reload:
            self.loaders.append((made, made.batch_sampler))
        return made

    def val_dataloader(self) -> Any:
        return loader(Numbered(images(9, seed=2)), batch_size=4) if self.setting.validation else []


def train(setting: Setting, directory: Path, audits: list[Callback]) -> tuple[dict[str, Any], pl.Trainer, Witness]:
    """Train and return everything that could differ."""
    pl.seed_everything(7, verbose=False)
    model = Witness(**setting.model)
    checkpoint = ModelCheckpoint(dirpath=directory / "checkpoints", save_last=True, save_top_k=-1)
    trainer = make_trainer(
        directory,
        callbacks=[*audits, *setting.callbacks(), checkpoint],
        **{"enable_checkpointing": True, **setting.trainer},
    )
    data = Data(setting)
    trainer.fit(model, datamodule=data)
    saved = torch.load(directory / "checkpoints" / "last.ckpt", weights_only=False)
    saved["callbacks"] = sorted(key for key in saved["callbacks"] if "InfluenceAudit" not in key)
    saved["checkpoint files"] = sorted(path.name for path in (directory / "checkpoints").iterdir())
    trace = {
        "weights": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "schedulers": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
        "random streams": (random.getstate(), np.random.get_state()[1:], torch.get_rng_state()),
        "data order": model.order,
        "inputs": model.inputs,
        "epoch losses": model.epoch_losses,
        "outputs left over": [float(loss.detach()) for loss in model.outputs],
        "log": logged_rows(trainer),
        "logged metrics": dict(trainer.logged_metrics),
        "callback metrics": dict(trainer.callback_metrics),
        "metric": {name: getattr(model.accuracy, name) for name in model.accuracy._defaults},
        "metric updates": model.accuracy._update_count,
        "modes": [module.training for module in model.modules()],
        "frozen": [parameter.requires_grad for parameter in model.parameters()],
        "gradients": [parameter.grad for parameter in model.parameters()],
        "progress": (trainer.global_step, trainer.current_epoch, trainer.should_stop),
        "checkpoint": saved,
        "function modes in validation": set(model.modes_in_stack),
    }
    for made, sampler in data.loaders:
        assert made.batch_sampler is sampler
        if made.generator is not None:
            trace["generator of the loader"] = made.generator.get_state()
    return trace, trainer, model


def differences(left: Any, right: Any, where: str = "") -> Iterator[str]:
    """Yield where two nested structures differ, tensors by their bits."""
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        same = left.dtype == right.dtype and left.shape == right.shape and left.requires_grad == right.requires_grad
        if not same or not torch.equal(bits(left), bits(right)):
            yield where
    elif isinstance(left, np.ndarray):
        if not np.array_equal(left, right):
            yield where
    elif isinstance(left, dict) and isinstance(right, dict):
        if list(left) != list(right):
            yield f"{where}: keys {list(left)} and {list(right)}"
        for key in left.keys() & right.keys():
            yield from differences(left[key], right[key], f"{where}[{key!r}]")
    elif isinstance(left, (list, tuple)) and isinstance(right, (list, tuple)) and len(left) == len(right):
        for number, (one, other) in enumerate(zip(left, right, strict=True)):
            yield from differences(one, other, f"{where}[{number}]")
    elif left != right and not (left != left and right != right):
        yield f"{where}: {left!r} and {right!r}"


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_training_is_bitwise_the_same(setting: Setting, tmp_path: Path) -> None:
    audit = InfluenceAudit(**setting.audit)
    without, _, _ = train(setting, tmp_path / "without", [])
    with_audit, trainer, model = train(setting, tmp_path / "with", [audit])

    assert list(differences(without, with_audit)) == []
    assert leftovers(trainer, model) == []
    assert with_audit["function modes in validation"] <= {0}
    assert model.net[5].training is False
    # The comparison means something: there was an audit, and training did something.
    assert audit.has_report
    assert audit.report.status == "complete"
    assert len(set(map(tuple, with_audit["data order"]))) > 1
    assert "log" not in model.__dict__


def test_the_comparison_notices_a_difference(tmp_path: Path) -> None:
    class Clumsy(Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            if trainer.current_epoch == 0:
                torch.rand(())

    without, _, _ = train(Setting(), tmp_path / "without", [])
    with_it, _, _ = train(Setting(), tmp_path / "with", [Clumsy()])
    found = {where.split("]")[0] for where in differences(without, with_it)}
    assert {"['weights'", "['random streams'", "['data order'", "['log'", "['checkpoint'"} <= found


def test_audits_side_by_side_leave_no_trace_either(tmp_path: Path) -> None:
    setting = Setting(trainer={"max_epochs": 3})
    audits = [InfluenceAudit(), InfluenceAudit(curvature="diagonal", dirpath=tmp_path / "second")]
    without, _, _ = train(setting, tmp_path / "without", [])
    with_audits, trainer, model = train(setting, tmp_path / "with", list(audits))
    assert list(differences(without, with_audits)) == []
    assert leftovers(trainer, model) == []


@pytest.mark.parametrize("stop", ["on_before_backward", "on_after_backward"])
def test_a_mode_of_somebody_else_above_the_tap_stays(stop: str, tmp_path: Path) -> None:
    """A mode entered after the tap and left after it hides the tap from ``stop``, which must not grow the stack."""

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    depths: list[int] = []

    class User(Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            depths.append(torch._C._len_torch_function_stack())
            self.mode = Mode()
            self.mode.__enter__()

    def leave(self: User, *_: Any) -> None:
        self.mode.__exit__(None, None, None)

    setattr(User, stop, leave)
    trainer = make_trainer(tmp_path, callbacks=[InfluenceAudit(), User()])
    trainer.fit(Classifier(), loader(vectors()))
    # The audit's own tap is the only thing that lies there when a batch starts.
    assert set(depths) == {1}
    assert torch._C._len_torch_function_stack() == 0


def test_a_batch_that_is_skipped_leaves_no_tap_for_the_audit(tmp_path: Path) -> None:
    """``on_train_batch_start`` may return -1 to end the epoch: no hook of the batch follows."""
    depths = []

    class Skips(Classifier):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
            return -1 if batch_idx == 2 else None

        def on_train_epoch_end(self) -> None:
            depths.append(torch._C._len_torch_function_stack())

    audit = InfluenceAudit()
    make_trainer(tmp_path, callbacks=[audit]).fit(Skips(), loader(vectors()))
    assert depths == [0, 0]
    assert audit.has_report
    assert audit.report.columns["times_seen"].tolist() == [2] * 10 + [0] * 12


def test_old_loaders_are_let_go(tmp_path: Path) -> None:
    """Whoever holds on to a replaced loader keeps its persistent workers alive, two more in every epoch."""
    workers: list[int] = []

    class Counts(Witness):
        def on_train_epoch_start(self) -> None:
            gc.collect()
            workers.append(len(multiprocessing.active_children()))

    setting = Setting(reload=True, loader={"batch_size": 8, "num_workers": 1, "persistent_workers": True})
    trainer = make_trainer(
        tmp_path,
        max_epochs=4,
        reload_dataloaders_every_n_epochs=1,
        callbacks=[InfluenceAudit(tracin=None, curvature="identity")],
    )
    trainer.fit(Counts(), datamodule=Data(setting))
    # The old one may still be there while the new one starts.
    assert max(workers[1:]) <= 2, f"{workers} worker processes"


def test_what_the_model_writes_to_its_logger_is_written_once(tmp_path: Path) -> None:
    class Writes(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            self.logger.experiment.add_scalar("own/loss", float(loss), self.global_step)
            self.loggers[0].experiment.add_scalar("own/again", float(loss), self.global_step)
            return loss

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path)
    trainer = make_trainer(tmp_path, callbacks=[InfluenceAudit()], logger=logger)
    trainer.fit(Writes(), loader(vectors()))
    events = EventAccumulator(logger.log_dir).Reload()
    assert len(events.Scalars("own/loss")) == len(events.Scalars("own/again")) == trainer.global_step == 10
    assert trainer.loggers == [logger]


def test_manual_optimization_of_two_optimizers(tmp_path: Path) -> None:
    class Manual(Witness):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            x, y, indices = batch
            self.order.append(indices.tolist())
            for number, optimizer in enumerate(self.optimizers()):
                self.toggle_optimizer(optimizer)
                optimizer.zero_grad()
                loss = F.cross_entropy(self(x), y)
                self.outputs.append(loss)
                self.log(f"loss{number}", loss)
                self.manual_backward(loss)
                optimizer.step()
                self.untoggle_optimizer(optimizer)

        def configure_optimizers(self) -> Any:
            convolutions, rest = self.net[:5].parameters(), self.net[8:].parameters()
            return torch.optim.SGD(convolutions, lr=0.1), torch.optim.Adam(rest, lr=0.01)

    def task(module: Manual, batch: Any) -> Tensor:
        return F.cross_entropy(module(batch[0]), batch[1])

    traces = []
    for audits in ([], [InfluenceAudit(task=task)]):
        pl.seed_everything(7, verbose=False)
        model = Manual()
        trainer = make_trainer(tmp_path / str(len(audits)), callbacks=list(audits))
        trainer.fit(model, loader(Numbered(images()), shuffle=True))
        states = [optimizer.state_dict() for optimizer in trainer.optimizers]
        traces.append((model.state_dict(), states, model.order, logged_rows(trainer), torch.get_rng_state()))
        assert leftovers(trainer, model) == []
    assert list(differences(*traces)) == []
    assert audits[0].report.status == "complete"
    # Two backward passes of one batch are one visit.
    assert audits[0].report.columns["times_seen"].tolist() == [2] * 22


def test_a_second_fit_and_a_validation_run_are_the_same_too(tmp_path: Path) -> None:
    traces = []
    for audits in ([], [InfluenceAudit()]):
        pl.seed_everything(7, verbose=False)
        model = Validated()
        trainer = make_trainer(tmp_path / str(len(audits)), callbacks=list(audits))
        train_loader, val_loader = loader(vectors(), shuffle=True), loader(vectors(8))
        samplers = train_loader.batch_sampler, val_loader.batch_sampler
        trainer.fit(model, train_loader, val_loader)
        trainer.validate(model, val_loader, verbose=False)
        trainer.fit_loop.max_epochs = 4
        trainer.fit(model, train_loader, val_loader)
        assert (train_loader.batch_sampler, val_loader.batch_sampler) == samplers
        assert leftovers(trainer, model) == []
        traces.append((model.state_dict(), logged_rows(trainer), torch.get_rng_state()))
    assert list(differences(*traces)) == []
    assert audits[0].report.status == "complete"


@pytest.mark.parametrize("tool", ["learning rate", "batch size"])
def test_tuning_before_training(tool: str, tmp_path: Path) -> None:
    """The finders train for a while with other callbacks and put everything back."""

    class Tuned(Validated):
        def __init__(self) -> None:
            super().__init__(lambda module: torch.optim.SGD(module.parameters(), lr=module.lr))
            self.lr, self.batch_size = 0.1, 2
            self.made: list[Any] = []

        def train_dataloader(self) -> Any:
            self.made.append(loader(vectors(), batch_size=self.batch_size, shuffle=True))
            return self.made[-1]

        def val_dataloader(self) -> Any:
            return loader(vectors(8, seed=2))

    traces = []
    for audits in ([], [InfluenceAudit()]):
        pl.seed_everything(7, verbose=False)
        model = Tuned()
        trainer = make_trainer(tmp_path / str(len(audits)), callbacks=list(audits))
        if tool == "learning rate":
            found = Tuner(trainer).lr_find(model, num_training=8, min_lr=1e-4)
            assert found is not None
            results: Any = found.results
        else:
            results = Tuner(trainer).scale_batch_size(model, max_trials=2, steps_per_trial=1)
        trainer.fit(model)
        traces.append((results, model.lr, model.batch_size, model.state_dict(), torch.get_rng_state()))
        assert all("_RecordingSampler" not in type(made.batch_sampler).__name__ for made in model.made)
        assert leftovers(trainer, model) == []
    assert list(differences(*traces)) == []
    report = audits[0].report
    assert report.status == "complete"
    # Only the real training counts.
    assert report.columns["times_seen"].tolist() == [2] * 22


def test_the_audit_can_be_copied_before_and_after_training(tmp_path: Path) -> None:
    """``ddp_spawn`` pickles the trainer, sweeps copy their callbacks."""
    audit = copy.deepcopy(InfluenceAudit())
    make_trainer(tmp_path, callbacks=[audit], logger=False).fit(Classifier(classes=CLASSES), loader(vectors()))
    again = copy.deepcopy(audit)
    assert again.has_report
    np.testing.assert_array_equal(again.report.ranking, audit.report.ranking)


def test_samplers_that_look_at_their_epoch(tmp_path: Path) -> None:
    """Lightning calls ``set_epoch`` on the sampler, also through the proxy that records it."""

    class Epochs(SequentialSampler):
        epoch = -1

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

        def __iter__(self) -> Iterator[int]:
            return iter([(index + 3 * self.epoch) % 22 for index in range(22)])

    orders = []
    for audits in ([], [InfluenceAudit()]):
        data = Numbered(images())
        model = Witness()
        batches = loader(data, batch_sampler=BatchSampler(Epochs(data), 5, drop_last=False))
        make_trainer(tmp_path / str(len(audits)), callbacks=list(audits)).fit(model, batches)
        orders.append(model.order)
    assert orders[0] == orders[1]
    assert orders[0][5] == [3, 4, 5, 6, 7]
