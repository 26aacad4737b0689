"""A recorded run comes out the same a second time, to the last bit, or it is said where it does not."""

from __future__ import annotations

import copy
import random
from array import array
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import CLASSES, Numbered, Witness, images, leftovers, loader, make_trainer
from test_callback_untouched import differences
from torch import Tensor, nn
from torch.utils.data import Dataset
from which_lightning import (
    Callback,
    LearningRateFinder,
    MisconfigurationException,
    ModelCheckpoint,
    StochasticWeightAveraging,
    pl,
)

from lightning_influence import AuditReport, InfluenceAudit, Record
from lightning_influence.audit.store.atomic import StoreError
from lightning_influence.audit.store.kept_run import KeptRun
from lightning_influence.replay import Recorder, ReplayError, Rerun, TrainingRecord, kept_states, streams
from lightning_influence.replay.checksum import checksum
from lightning_influence.replay.streams import StreamReader

CHEAP: dict[str, Any] = {"curvature": "identity", "tracin": None, "verify": False}
BATCH = 5


class Net(pl.LightningModule):
    """With all that draws random numbers, or keeps state, in a step."""

    def __init__(self, optimizer: Callable[[nn.Module], Any] | None = None) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 3, 3, padding=1),
            nn.BatchNorm2d(3),
            nn.ReLU(),
            nn.Dropout(0.3),
            nn.Flatten(),
            nn.Linear(108, CLASSES),
        )
        self._optimizer = optimizer or (lambda module: torch.optim.AdamW(module.parameters(), lr=1e-2))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return self._optimizer(self)


def trained(
    directory: Path,
    model: Any = None,
    data: Any = None,
    *,
    callbacks: Any = (),
    audit: InfluenceAudit | None = None,
    **arguments: Any,
) -> tuple[InfluenceAudit, Any, Any]:
    """Train, recording; return the audit, the model, the loader."""
    pl.seed_everything(3, verbose=False)
    audit = audit or InfluenceAudit(record=True, **CHEAP)
    model = Net() if model is None else model
    data = loader(Numbered(images(), augment=True), BATCH, shuffle=True) if data is None else data
    make_trainer(directory, callbacks=[*callbacks, audit], **arguments).fit(model, data)
    return audit, model, data


def again(audit: InfluenceAudit, model: Any, data: Any) -> TrainingRecord:
    """Run the training again, with everything else moved on; nothing of the module may change by that."""
    record = audit.training_record
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    streams = random.getstate(), np.random.get_state()[1:], torch.get_rng_state()
    rerun = Rerun(record, model, source=data)
    rerun.verify()
    for step in range(0, len(record.steps), 3):
        found = rerun.segment(step, min(step + 3, len(record.steps)))
        assert [each.state.step for each in found] == list(range(step, min(step + 3, len(record.steps))))
    after = random.getstate(), np.random.get_state()[1:], torch.get_rng_state()
    assert list(differences([before, streams], [model.state_dict(), after])) == []
    assert modes == [module.training for module in model.modules()]
    assert leftovers(model.trainer, model) == []
    return record


def sgd(**arguments: Any) -> Callable[[nn.Module], Any]:
    return lambda module: torch.optim.SGD(module.parameters(), lr=0.05, **arguments)


def one_cycle(module: Any) -> Any:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    steps = module.trainer.estimated_stepping_batches
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def by_epoch(module: Any) -> Any:
    optimizer = torch.optim.RMSprop(module.parameters(), lr=1e-2, momentum=0.5)
    return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]


def two_groups(module: Any) -> Any:
    groups = [{"params": module.net[0].parameters(), "lr": 1e-3}, {"params": module.net[5].parameters()}]
    return torch.optim.Adam(groups, lr=1e-2, weight_decay=1e-3)


RECIPES: dict[str, tuple[Callable[[nn.Module], Any] | None, dict[str, Any]]] = {
    "adamw": (None, {}),
    "sgd": (sgd(), {}),
    "nesterov": (sgd(momentum=0.9, nesterov=True, weight_decay=1e-3), {}),
    "dampening": (sgd(momentum=0.9, dampening=0.5), {}),
    "one cycle": (one_cycle, {"max_epochs": 3}),
    "rmsprop, by epoch": (by_epoch, {"max_epochs": 3}),
    "some parameters in two groups": (two_groups, {}),
    "clipped by norm": (None, {"gradient_clip_val": 0.5}),
    "clipped by value": (None, {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}),
    "accumulated, an odd one at the end": (sgd(momentum=0.9), {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}),
    "accumulated by three": (None, {"accumulate_grad_batches": 3, "max_epochs": 3}),
    "bf16-mixed": (None, {"precision": "bf16-mixed"}),
    "64-true": (None, {"precision": "64-true"}),
    "bf16-true": (None, {"precision": "bf16-true"}),
    "some batches": (None, {"limit_train_batches": 3, "max_epochs": 4}),
    "some steps": (None, {"max_steps": 7, "max_epochs": -1}),
    "endless": (None, {"max_epochs": -1, "max_time": {"seconds": 1}}),
}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_recipes(recipe: tuple[Any, dict[str, Any]], tmp_path: Path) -> None:
    optimizer, arguments = recipe
    audit, model, data = trained(tmp_path, Net(optimizer), **arguments)
    record = again(audit, model, data)
    steps = len(record.steps)
    assert steps == model.trainer.global_step
    assert {0, steps} <= set(record.states)
    assert len(record.states) <= 2 * steps**0.5 + 4
    assert {len(step.batches) for step in record.steps} <= {1, 2, 3}
    final = record.states[steps]
    for name, parameter in model.named_parameters():
        assert torch.equal(final.parameters[name], parameter)
    assert any(not torch.equal(final.parameters[name], value) for name, value in record.states[0].parameters.items())


class Drawing(Dataset[Any]):
    """Draws from one random stream, or from a generator of its own."""

    def __init__(self, kind: str) -> None:
        self.data, self.kind = images(), kind
        self.own = np.random.default_rng(0)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        x, y = self.data[index]
        drawn = {
            "torch": lambda: float(torch.rand(())),
            "numpy": np.random.rand,
            "python": random.random,
            "own": self.own.random,
            "none": lambda: 0.5,
        }[self.kind]()
        return x * float(drawn), y


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["torch", "numpy", "python", "own", "none"])
def test_augmentation(kind: str, workers: int, tmp_path: Path) -> None:
    audit, model, data = trained(tmp_path, data=loader(Drawing(kind), BATCH, shuffle=True, num_workers=workers))
    record = again(audit, model, data)
    kept = [batch.kept is not None for step in record.steps for batch in step.batches]
    assert set(kept) == {kind == "own" or (workers > 0 and kind != "none")}


def test_collate_functions_that_move_and_draw(tmp_path: Path) -> None:
    def collate(examples: list[Any]) -> Any:
        examples = sorted(examples, key=lambda example: float(example[0].sum()))
        x = torch.stack([example[0] for example in examples])
        labels, numbers = (torch.tensor([int(example[place]) for example in examples]) for place in (1, 2))
        return x + torch.randn(x.shape), labels, numbers

    audit, model, data = trained(tmp_path, data=loader(Numbered(images()), BATCH, shuffle=True, collate_fn=collate))
    record = again(audit, model, data)
    for each in Rerun(record, model, source=data).segment(0, 2):
        for noted, batch in zip(each.record.batches, each.batches, strict=True):
            assert batch[2].tolist() == list(noted.indices) != list(noted.drawn or ())


def test_nothing_is_stored_of_streams_that_nobody_draws_from(tmp_path: Path) -> None:
    class Plain(Net):
        def __init__(self) -> None:
            super().__init__()
            self.net[3] = nn.Identity()

    audit, model, data = trained(tmp_path, Plain(), loader(images(), BATCH, shuffle=True))
    record = again(audit, model, data)
    for name in ("torch", "numpy", "python"):
        met = {id(batch.before_step[name]) for step in record.steps for batch in step.batches}
        assert len(met) <= (1 if name != "torch" else 2)  # torch's own stream is asked for a seed at each epoch


class Validated(Net):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("noise", torch.rand(()) + random.random() + float(np.random.rand()))

    def val_dataloader(self) -> Any:
        return loader(images(9), batch_size=4, shuffle=True)


def test_random_numbers_that_others_draw_in_between(tmp_path: Path) -> None:
    audit, model, data = trained(tmp_path, Validated(), val_check_interval=2, num_sanity_val_steps=1)
    again(audit, model, data)


def test_an_epoch_that_ends_before_its_step(tmp_path: Path) -> None:
    """Lightning drops the gradients of its last batch at the start of the next."""
    with pytest.warns(UserWarning, match="epoch 0 ended before the step that 1 batches were for"):
        audit, *_ = trained(tmp_path, EndsEpochs(), accumulate_grad_batches=2)
    assert audit.report.status == "complete"


def test_learning_rates_that_are_tried_out_are_no_part_of_the_run(tmp_path: Path) -> None:
    class Tuned(Net):
        def __init__(self) -> None:
            super().__init__(lambda module: torch.optim.SGD(module.parameters(), lr=module.lr))
            self.lr = 0.1

    finder = LearningRateFinder(num_training_steps=25, min_lr=1e-4, early_stop_threshold=None)
    audit, model, data = trained(tmp_path, Tuned(), callbacks=[finder], max_epochs=6)
    record = again(audit, model, data)
    assert len(record.steps) == 30
    assert record.steps[0].groups[0]["lr"] == model.lr != 0.1


class AsksTheTrainer(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        epochs = self.trainer.max_epochs
        assert self.trainer.training
        factor = 1 + self.current_epoch / epochs + self.global_step / 100 + batch_idx / 10
        if self.logger is not None:
            self.logger.log_metrics({"own": factor}, step=self.global_step)
        return factor * super().training_step(batch, batch_idx)


def test_a_step_that_asks_for_epoch_and_step(tmp_path: Path) -> None:
    audit, model, data = trained(tmp_path, AsksTheTrainer())
    record = again(audit, model, data)
    at_end = model.trainer.current_epoch, model.trainer.global_step
    other = AsksTheTrainer()
    other.load_state_dict(model.state_dict())
    with pytest.raises(ReplayError, match=r"asks for `trainer.max_epochs`, and the model has no trainer"):
        Rerun(record, other, source=data).verify()
    assert (model.trainer.current_epoch, model.trainer.global_step) == at_end


def test_another_object_of_the_same_class(tmp_path: Path) -> None:
    audit, _, data = trained(tmp_path)
    other = Net()
    weights = copy.deepcopy(other.state_dict())
    Rerun(audit.training_record, other, source=data).verify()
    assert list(differences(weights, other.state_dict())) == []


class AugmentsOnDevice(Net):
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        x, *rest = batch
        return (x + torch.randn(x.shape), *rest) if self.trainer.training else batch


def test_augmentation_on_the_device(tmp_path: Path) -> None:
    audit, model, data = trained(tmp_path, AugmentsOnDevice())
    again(audit, model, data)


class Overwrites(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        batch[0].mul_(0.5)
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("keep", [False, True])
def test_a_step_that_writes_to_its_batch(keep: bool, tmp_path: Path) -> None:
    audit = InfluenceAudit(record=Record(keep_batches=keep), **CHEAP)
    audit, model, data = trained(tmp_path, Overwrites(), audit=audit)
    again(audit, model, data)


class Skips(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        loss = super().training_step(batch, batch_idx)
        return None if batch_idx == 1 else loss


class EndsEpochs(Net):
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        return -1 if batch_idx == 3 else None


class Freezes(Net):
    def on_train_epoch_start(self) -> None:
        self.net[1].train(self.current_epoch % 2 == 0)


@pytest.mark.parametrize("kind", [Skips, EndsEpochs, Freezes])
def test_steps_that_are_not_all_alike(kind: type[Net], tmp_path: Path) -> None:
    audit, model, data = trained(tmp_path, kind(), max_epochs=3)
    again(audit, model, data)


def test_metrics_and_lists_of_a_module_stay_as_they_are(tmp_path: Path) -> None:
    data = loader(Numbered(images()), BATCH, shuffle=True)
    audit, model, data = trained(tmp_path, Witness(), data)
    order, metric = copy.deepcopy(model.order), model.accuracy.metric_state
    again(audit, model, data)
    assert model.order == order
    assert list(differences(dict(metric), dict(model.accuracy.metric_state))) == []


# ------------------------------------------------------------------------------------------------- what is not recorded


class Noisy(Callback):
    """Changes gradients at one step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        if trainer.global_step == self.step:
            pl_module.net[5].weight.grad.add_(1.0)


class Shifts(Callback):
    """Changes weights before one batch."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 6:
            with torch.no_grad():
                pl_module.net[5].bias.add_(1.0)


class Rescales(Callback):
    """Changes a batch."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 7:
            batch[0].mul_(2)


@pytest.mark.parametrize(
    ("changes", "step"), [(Noisy(4), 5), (Shifts(), 6), (Rescales(), 7)], ids=["gradients", "weights", "a batch"]
)
def test_what_others_change_is_refused_with_the_step(changes: Callback, step: int, tmp_path: Path) -> None:
    audit, model, data = trained(tmp_path, callbacks=[changes])
    with pytest.raises(ReplayError, match=rf"at step {step} \(batch {step % 5} of epoch {step // 5}\) the loss was"):
        Rerun(audit.training_record, model, source=data).verify()


def test_gradients_that_are_changed_in_the_last_step(tmp_path: Path) -> None:
    audit, model, data = trained(tmp_path, callbacks=[Noisy(9)])
    with pytest.raises(ReplayError, match=r"after step 9 the weights net\.5\.weight differ, while all losses"):
        Rerun(audit.training_record, model, source=data).verify()


def test_other_data(tmp_path: Path) -> None:
    audit, model, data = trained(tmp_path)
    data.dataset.data.tensors[0][4, 0, 0, 0] += 1
    with pytest.raises(ReplayError, match=r"step \d was taken on another batch: .*keep_batches=True"):
        Rerun(audit.training_record, model, source=data).verify()


def test_another_model(tmp_path: Path) -> None:
    audit, model, data = trained(tmp_path)
    with pytest.raises(ReplayError, match=r"holds 'net\.0\.weight', which the module has not"):
        Rerun(audit.training_record, nn.Linear(2, 2), source=data)
    model.net[5] = nn.Linear(108, 7)
    with pytest.raises(ReplayError, match=r"'net\.5\.weight' is torch.float32 of shape \[3, 108\] in the record"):
        Rerun(audit.training_record, model, source=data)


def test_other_attributes(tmp_path: Path) -> None:
    class Weighs(Net):
        weight = 1.0

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.weight * super().training_step(batch, batch_idx)

        def on_train_epoch_end(self) -> None:
            self.weight += 1

    audit, model, data = trained(tmp_path, Weighs())
    with pytest.raises(ReplayError, match=r"at step 0 .*state that is no parameter"):
        Rerun(audit.training_record, model, source=data).verify()


# ------------------------------------------------------------------------------------------------------------- refused


class Manual(Net):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class OwnStep(Net):
    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)


class OwnClipping(Net):
    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        super().configure_gradient_clipping(*args, **kwargs)


REFUSED: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
    "manual": (Manual, {}, "optimizes manually"),
    "step": (OwnStep, {}, "has its own `optimizer_step`"),
    "clipping": (OwnClipping, {}, "has its own `configure_gradient_clipping`"),
    "adagrad": (lambda: Net(lambda m: torch.optim.Adagrad(m.parameters())), {}, "the optimizer is torch.*Adagrad"),
    "lbfgs": (lambda: Net(lambda m: torch.optim.LBFGS(m.parameters())), {}, "the optimizer is torch.*LBFGS"),
    "amsgrad": (lambda: Net(lambda m: torch.optim.Adam(m.parameters(), amsgrad=True)), {}, "amsgrad=True in group 0"),
    "averaging": (Net, {"callbacks": [StochasticWeightAveraging(1e-2)]}, "StochasticWeightAveraging averages weights"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_refused_before_training(case: tuple[Callable[[], Any], dict[str, Any], str], tmp_path: Path) -> None:
    make, arguments, words = case
    model = make()
    before = copy.deepcopy(model.state_dict())
    task = {"task": lambda module, batch: F.cross_entropy(module(batch[0]), batch[1])}
    audit = InfluenceAudit(record=True, **CHEAP, **task)
    with pytest.raises(MisconfigurationException, match=f"this run can't be replayed: .*{words}.*Leave out `record=`"):
        trained(tmp_path, model, audit=audit, **arguments)
    assert list(differences(before, model.state_dict())) == []
    with pytest.raises(RuntimeError, match="there is no record of the training"):
        _ = audit.training_record


def test_several_loaders_are_refused(tmp_path: Path) -> None:
    data = {"a": loader(images(), BATCH), "b": loader(images(), BATCH)}
    with pytest.raises(MisconfigurationException, match="trained on several loaders at once; expected one"):
        trained(tmp_path, data=data, audit=InfluenceAudit(record=True, loader="a", **CHEAP))


def test_without_recording(tmp_path: Path) -> None:
    audit, *_ = trained(tmp_path, audit=InfluenceAudit(**CHEAP))
    with pytest.raises(RuntimeError, match=r"no record of the training: `InfluenceAudit\(record=True\)` records a run"):
        _ = audit.training_record
    assert not any("replay" in note for note in audit.report.manifest["notes"])


def test_a_budget_that_is_too_small_ends_the_recording_alone(tmp_path: Path) -> None:
    audit = InfluenceAudit(record=Record(max_bytes=40_000), **CHEAP)
    with pytest.warns(
        UserWarning, match=r"after \d+ steps its record has [\d.]+ kB, more than the 40 kB of `max_bytes=`"
    ):
        audit, model, _ = trained(tmp_path, audit=audit, max_epochs=6)
    assert model.trainer.global_step == 30
    assert any(note.startswith("this run can't be replayed: after ") for note in audit.report.manifest["notes"])


@pytest.mark.parametrize("value", ["yes", 1, 0, Record])
def test_bad_arguments(value: Any) -> None:
    with pytest.raises(ValueError, match=r"record=.*; expected True, False, or Record\(...\)"):
        InfluenceAudit(record=value)


def test_bad_settings() -> None:
    with pytest.raises(ValueError, match="keep_batches='always'; expected True, False or \"auto\""):
        Record(keep_batches="always")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_bytes=0; expected an integer >= 1"):
        Record(max_bytes=0)


# ------------------------------------------------------------------------------------------------------ other loops


def test_a_resumed_run_is_not_recorded_and_says_so(tmp_path: Path) -> None:
    keep = ModelCheckpoint(dirpath=tmp_path, save_last=True)
    trained(tmp_path, callbacks=[keep], enable_checkpointing=True)
    audit = InfluenceAudit(record=True, **CHEAP)
    trainer = make_trainer(tmp_path, callbacks=[audit], max_epochs=3)
    data = loader(Numbered(images(), augment=True), BATCH, shuffle=True)
    with pytest.warns(UserWarning, match="can't be replayed.*after 10 steps, as training was resumed"):
        trainer.fit(Net(), data, ckpt_path=tmp_path / "last.ckpt")
    assert trainer.global_step == 15
    assert any("as training was resumed" in note for note in audit.report.manifest["notes"])
    with pytest.raises(RuntimeError, match=r"no record of the training: the record begins after 10 steps"):
        _ = audit.training_record


def test_a_second_fit_begins_with_nothing(tmp_path: Path) -> None:
    audit, model, data = trained(tmp_path)
    before = audit.training_record
    model.trainer.fit_loop.max_epochs = 3
    with pytest.warns(UserWarning, match="can't be replayed"):
        model.trainer.fit(model, data)
    with pytest.raises(RuntimeError, match="the record begins after 10 steps"):
        _ = audit.training_record
    assert len(before.steps) == 10


def test_a_run_that_is_interrupted(tmp_path: Path) -> None:
    class Fails(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if self.current_epoch:
                raise ZeroDivisionError("on purpose")
            return super().training_step(batch, batch_idx)

    audit = InfluenceAudit(record=True, **CHEAP)
    with pytest.raises(ZeroDivisionError):
        trained(tmp_path, Fails(), audit=audit)
    with pytest.raises(RuntimeError, match="the run ended with ZeroDivisionError: on purpose"):
        _ = audit.training_record


def test_the_audit_can_be_copied_with_its_record(tmp_path: Path) -> None:
    audit, model, data = trained(tmp_path)
    Rerun(copy.deepcopy(audit).training_record, model, source=data).verify()


class Frozen(Net):
    """Thaws a layer in the middle of training."""

    def __init__(self) -> None:
        super().__init__()
        self.net[0].requires_grad_(False)

    def on_train_epoch_start(self) -> None:
        self.net[0].requires_grad_(self.current_epoch > 0)


def test_parameters_that_are_thawed_later(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="before step 5, parameters were frozen, thawed, or given to the optimizer"):
        audit, *_ = trained(tmp_path, Frozen())
    with pytest.raises(RuntimeError, match="before step 5"):
        _ = audit.training_record


def test_parameters_that_are_frozen_all_along(tmp_path: Path) -> None:
    model = Net()
    model.net[0].requires_grad_(False)
    audit, model, data = trained(tmp_path, model)
    record = again(audit, model, data)
    assert "net.0.weight" not in record.states[0].parameters
    assert not model.net[0].weight.requires_grad


def test_a_loop_of_ones_own() -> None:
    torch.manual_seed(0)
    data, model = Drawing("torch"), Net().net
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def task(module: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(module(batch[0]), batch[1])

    source = loader(data, BATCH)
    recorder = Recorder(model, optimizer, examples=len(data))
    for number in range(12):
        indices = torch.randperm(len(data))[:BATCH].tolist()
        before = recorder.fetching()
        batch = source.collate_fn([data[index] for index in indices])
        recorder.fetched(batch, indices, before)
        recorder.begin(number, epoch=0)
        optimizer.zero_grad()
        loss = task(model, batch)
        recorder.differentiated(loss)
        loss.backward()
        recorder.stepping()
        optimizer.step()
        recorder.ended()
    record = recorder.finish()
    weights = copy.deepcopy(model.state_dict())
    rerun = Rerun(record, model.eval(), task, source)
    rerun.verify()
    assert list(differences(weights, model.state_dict())) == []
    assert not any(module.training for module in model.modules())
    # Unknown length: distances have grown with it.
    assert sorted(record.states) == [0, 4, 8, 12]
    for step, state in record.states.items():
        if step < 12:
            (found,) = rerun.segment(step, step + 1)
            assert list(differences(vars(state), vars(found.state))) == []


def test_a_loop_that_forgets_something() -> None:
    model = nn.Linear(2, 1)
    recorder = Recorder(model, torch.optim.SGD(model.parameters(), lr=0.1), examples=3)
    with pytest.raises(ReplayError, match="no step was taken"):
        recorder.finish()
    recorder = Recorder(model, torch.optim.SGD(model.parameters(), lr=0.1), examples=3)
    recorder.begin(0, 0)
    with pytest.raises(ReplayError, match="not known which examples batch 0 of epoch 0 holds"):
        recorder.finish()
    recorder = Recorder(model, torch.optim.SGD(model.parameters(), lr=0.1), examples=3)
    for number in range(2):
        recorder.fetched(torch.zeros(1, 2), [0], recorder.fetching())
        recorder.begin(number, 0)
        recorder.ended()
    with pytest.raises(ReplayError, match="no optimizer step has followed 2 batches"):
        recorder.finish()


# ------------------------------------------------------------------------------------------------------------ checksums


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 4), ()])
def test_checksums_tell_batches_apart(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = (torch.arange(max(1, int(np.prod(shape)))) % 2).reshape(shape).to(dtype)
    others = [x.clone(), x.clone().flatten().flip(0).reshape(shape), x == 3]
    others[0].view(-1)[-1] = others[0].view(-1)[-1] == 0
    known = {checksum({"x": x, "name": "a"})}
    assert checksum({"x": x.clone(), "name": "a"}) in known
    assert checksum({"x": x, "name": "b"}) not in known
    assert checksum({"x": others[0], "name": "a"}) not in known
    if x.numel() > 2 and not x.numel() % 2:
        assert checksum({"x": others[1], "name": "a"}) not in known


def test_checksums_of_views_and_of_other_things() -> None:
    x = torch.randn(6, 4)
    assert checksum(x.t()) == checksum(x.t().contiguous()) != checksum(x)
    assert checksum(x[1:, 1:3]) == checksum(x[1:, 1:3].clone())
    assert checksum(x.numpy()) == checksum(x)
    line = torch.arange(9, dtype=torch.uint8)
    assert checksum(line[1:]) == checksum(line[1:].clone())
    assert checksum([object(), None, x.to_sparse()]) == checksum([object(), None, x.to_sparse()])
    assert checksum([torch.zeros(0)]) == checksum([torch.zeros(0)])
    assert checksum((1, 2)) != checksum((2, 1))
    assert checksum(-x) != checksum(x)
    assert checksum(torch.complex(x, x)) != checksum(torch.complex(x, -x))


# -------------------------------------------------------------------------------------------------------------- streams

DRAWS: dict[str, Callable[[], Any]] = {
    "torch": lambda: torch.rand(()),
    "numpy": np.random.rand,
    "numpy, normal": np.random.randn,
    "python": random.random,
    "python, normal": lambda: random.gauss(0.0, 1.0),
}


@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.parametrize("before", [0, 1, 2])
def test_a_stream_is_read_anew_once_somebody_draws(name: str, before: int) -> None:
    """Every second normal number is one that was put by: the generator itself stays where it is."""
    pl.seed_everything(0, verbose=False)
    reader, draw = StreamReader(), DRAWS[name]
    for _ in range(before):
        draw()
    first = reader()
    assert all(again is state for again, state in zip(reader().values(), first.values(), strict=True))
    for _ in range(3):
        state = reader()
        drawn = float(draw())
        after = reader()
        changed = [each for each in state if state[each] is not after[each]]
        assert changed == [name.split(",")[0]]
        streams.write(state)
        assert float(draw()) == drawn
        streams.write(after)


# ---------------------------------------------------------------------------------------------------------------- files


def read_again(audit: InfluenceAudit) -> TrainingRecord:
    """The record as it lies on the disk: the one in memory, to the last bit."""
    stored, record = AuditReport.load(audit.report.directory).training_record(), audit.training_record
    assert asdict(stored.recipe) == asdict(record.recipe)
    assert list(stored.states) == list(record.states)
    for step, state in record.states.items():
        assert list(differences(vars(state), vars(stored.states[step]))) == []
    for step, other in zip(record.steps, stored.steps, strict=True):
        assert (list(map(dict, step.groups)), step.training) == (list(map(dict, other.groups)), other.training)
        for batch, there in zip(step.batches, other.batches, strict=True):
            for name, value in vars(batch).items():
                found = getattr(there, name)
                if isinstance(value, array):
                    value, found = list(value), list(found)
                assert list(differences(value, found)) == [], name
    return stored


@pytest.mark.parametrize("kind", ["torch", "own"])
def test_a_record_on_the_disk(kind: str, tmp_path: Path) -> None:
    audit, model, data = trained(tmp_path, data=loader(Drawing(kind), BATCH, shuffle=True), accumulate_grad_batches=2)
    stored = read_again(audit)
    Rerun(stored, model, source=data).verify()
    assert not list(Path(audit.report.directory).rglob(".tmp-*"))


def test_batches_that_hold_more_than_tensors(tmp_path: Path) -> None:
    def collate(examples: list[Any]) -> Any:
        x, y = torch.utils.data.default_collate(examples)
        return [x, y, {"names": ["a", None], 3: (1.5, True)}, np.arange(3)]

    audit = InfluenceAudit(record=Record(keep_batches=True), **CHEAP)
    audit, model, data = trained(tmp_path, data=loader(images(), BATCH, collate_fn=collate), audit=audit)
    Rerun(read_again(audit), model, source=data).verify()


class Odd(NamedTuple):
    x: Tensor
    y: Tensor


def test_batches_that_no_file_holds_stay_in_memory(tmp_path: Path) -> None:
    def collate(examples: list[Any]) -> Any:
        return Odd(*torch.utils.data.default_collate(examples))

    audit = InfluenceAudit(record=Record(keep_batches=True), **CHEAP)
    with pytest.warns(UserWarning, match="the record of the training is in memory alone: a batch holds a Odd"):
        audit, model, data = trained(tmp_path, data=loader(images(), BATCH, collate_fn=collate), audit=audit)
    again(audit, model, data)
    with pytest.raises(StoreError, match="there is no record of the training in .*influence"):
        audit.report.training_record()


def test_states_that_do_not_fit_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_states, "_IN_MEMORY", 5_000)
    audit, model, data = trained(tmp_path, max_epochs=-1, max_steps=30)
    record = again(audit, model, data)
    files = sorted(path.name for path in (audit.report.directory / "training").iterdir())
    assert files == [f"state-{step:08d}.safetensors" for step in record.states] + ["steps.safetensors"]
    read_again(audit)


def test_an_interrupted_run_leaves_no_states(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Fails(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if self.current_epoch:
                raise ZeroDivisionError("on purpose")
            return super().training_step(batch, batch_idx)

    monkeypatch.setattr(kept_states, "_IN_MEMORY", 0)
    with pytest.raises(ZeroDivisionError):
        trained(tmp_path, Fails())
    assert list(tmp_path.rglob("training"))
    assert list(tmp_path.rglob("state-*")) == []


@pytest.mark.parametrize("file", ["steps", "state-00000004"])
def test_damaged_files(file: str, tmp_path: Path) -> None:
    audit, model, data = trained(tmp_path)
    path = audit.report.directory / "training" / f"{file}.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(StoreError, match=f"{file}.safetensors cannot be read"):
        Rerun(audit.report.training_record(), model, source=data).verify()
    path.unlink()
    with pytest.raises(StoreError, match=r"no record of the training|lacks the states of the steps \[4\]"):
        audit.report.training_record()


def test_a_disk_that_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise StoreError("Cannot write: no space left")

    monkeypatch.setattr(KeptRun, "_write", full)
    with pytest.warns(UserWarning, match="in memory alone: Cannot write: no space left"):
        audit, model, data = trained(tmp_path)
    again(audit, model, data)
    monkeypatch.setattr(kept_states, "_IN_MEMORY", 0)
    with pytest.warns(UserWarning, match="can't be replayed.* recording it failed: StoreError: Cannot write"):
        audit, model, data = trained(tmp_path / "again")
    assert audit.report.status == "complete"
