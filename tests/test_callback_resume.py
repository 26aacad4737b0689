"""A run that is stopped and resumed has the audit of a run that never stopped."""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference as ref
import torch
import torch.nn.functional as F
from models import CLASSES, Numbered, Validated, leftovers, loader, make_trainer, vectors
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler, TensorDataset
from which_lightning import Callback, MisconfigurationException, ModelCheckpoint, pl

from lightning_influence import AuditReport, InfluenceAudit, TracIn
from lightning_influence.callbacks import run as audit_run

pytestmark = pytest.mark.usefixtures("unverified")

DOUBLE = vectors(dtype=torch.float64)


class EveryEpochAnother(Sampler[int]):
    """An order that depends on the epoch alone, so that a resumed run sees the batches of a straight one."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return 22

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(22, generator=torch.Generator().manual_seed(self.epoch)).tolist())


def data() -> tuple[DataLoader[Any], DataLoader[Any]]:
    return (
        loader(Numbered(DOUBLE), sampler=EveryEpochAnother()),
        loader(Numbered(vectors(7, 2, dtype=torch.float64))),
    )


class Diary(Validated):
    """Notes the losses of its examples, its learning rates, and its weights at the ends of epochs."""

    def __init__(self, fails_in_epoch: int | None = None) -> None:
        super().__init__(optimizer)
        self.double()
        self.fails_in_epoch = fails_in_epoch
        self.losses: list[tuple[int, float]] = []
        self.steps: list[float] = []
        self.ends: list[tuple[int, dict[str, Tensor]]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.training and self.current_epoch == self.fails_in_epoch and batch_idx == 1:
            raise RuntimeError("lightning struck")
        x, y, indices = batch
        losses = F.cross_entropy(self(x), y, reduction="none").detach()
        self.losses += zip(indices.tolist(), losses.tolist(), strict=True)
        return F.cross_entropy(self(x), y)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.steps.append(optimizer.param_groups[0]["lr"])

    def on_train_epoch_end(self) -> None:
        weights = {name: value.clone() for name, value in self.net.state_dict().items()}
        self.ends.append((self.trainer.global_step, weights))


def optimizer(module: nn.Module) -> Any:
    sgd = torch.optim.SGD(module.parameters(), lr=0.2, momentum=0.5)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(sgd, 0.9)
    return {"optimizer": sgd, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def run(
    directory: Path,
    *,
    epochs: int,
    audits: list[Callback],
    ckpt_path: Path | None = None,
    saves: dict[str, Any] | None = None,
    model: Diary | None = None,
    loaders: Any = None,
    **fit_arguments: Any,
) -> tuple[pl.Trainer, Diary]:
    torch.manual_seed(3)
    model = model or Diary()
    keeper = ModelCheckpoint(dirpath=directory / "kept", filename="{step}", save_top_k=-1, **(saves or {}))
    trainer = make_trainer(directory, max_epochs=epochs, callbacks=[*audits, keeper], enable_checkpointing=True)
    path = None if ckpt_path is None else str(ckpt_path)
    trainer.fit(model, *(loaders or data()), ckpt_path=path, **fit_arguments)
    assert leftovers(trainer, model) == []
    return trainer, model


def fail(*_: Any, **__: Any) -> None:
    raise RuntimeError("out of everything")


def check_same(
    one: AuditReport | None, other: AuditReport | None, without: tuple[str, ...] = (), *, curves: bool = True
) -> None:
    assert one is not None
    assert other is not None
    assert one.status == other.status == "complete"
    assert set(one.columns) == set(other.columns)
    for name in sorted(set(one.columns) - set(without)):
        np.testing.assert_allclose(one.columns[name], other.columns[name], rtol=1e-12, atol=1e-12, err_msg=name)
    assert one.manifest["tracin_steps"] == other.manifest["tracin_steps"]
    if not curves:
        return
    assert one.curves.epochs.tolist() == other.curves.epochs.tolist()
    assert set(one.curves) == set(other.curves) == {"loss", "margin", "probability", "suggested_probability"}
    for name, values in one.curves.items():
        np.testing.assert_allclose(values, other.curves[name], rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Reports of runs of four epochs without a stop, by arguments."""
    reports: dict[Any, AuditReport] = {}

    def report(**arguments: Any) -> AuditReport:
        key = tuple(sorted(arguments.items()))
        if key not in reports:
            audit = InfluenceAudit(**arguments)
            run(tmp_path_factory.mktemp("straight"), epochs=4, audits=[audit])
            assert audit.has_report
            reports[key] = audit.report
        return reports[key]

    return report


@pytest.mark.parametrize("every", [1, 2, 3, None])
@pytest.mark.parametrize("stop", [1, 2])
def test_resumed_after_the_last_epoch_of_a_shorter_run(
    stop: int, every: int | None, straight: Any, tmp_path: Path
) -> None:
    """The first run takes its last weights in the final pass, after the checkpoint was written."""
    settings = None if every is None else TracIn(every_n_epochs=every)
    run(tmp_path / "first", epochs=stop, audits=[InfluenceAudit(tracin=settings)])
    audit = InfluenceAudit(tracin=settings)
    checkpoint = tmp_path / "first" / "kept" / f"step={5 * stop}.ckpt"
    run(tmp_path / "second", epochs=4, audits=[audit], ckpt_path=checkpoint)
    check_same(audit.report, straight(tracin=settings))
    assert audit.has_report
    assert audit.report.columns["times_seen"].tolist() == [4] * 22


@pytest.mark.parametrize("every", [1, 2])
def test_resumed_from_a_checkpoint_saved_after_training(every: int, straight: Any, tmp_path: Path) -> None:
    """Here the final pass of the first run is in the state: its weights must not count twice."""
    settings = TracIn(every_n_epochs=every)
    trainer, _ = run(tmp_path / "first", epochs=2, audits=[InfluenceAudit(tracin=settings)])
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    audit = InfluenceAudit(tracin=settings)
    run(tmp_path / "second", epochs=4, audits=[audit], ckpt_path=tmp_path / "saved.ckpt")
    check_same(audit.report, straight(tracin=settings))


def test_resumed_with_other_labels_is_said_before_the_first_step(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    """It was in the notes of the report alone: hours later."""
    run(tmp_path / "first", epochs=1, audits=[InfluenceAudit()])
    checkpoint = tmp_path / "first" / "kept" / "step=5.ckpt"
    run(tmp_path / "same", epochs=2, audits=[InfluenceAudit()], ckpt_path=checkpoint)
    assert not any("another label" in str(each.message) for each in recwarn)
    x, y = DOUBLE.tensors
    y = y.clone()
    y[[3, 8]] = (y[[3, 8]] + 1) % CLASSES
    other = loader(Numbered(TensorDataset(x, y)), sampler=EveryEpochAnother()), data()[1]

    message = r"2 of 22 examples .* have another label than before training was resumed \(examples 3, 8\)"
    with pytest.warns(UserWarning, match=message), pytest.raises(RuntimeError, match="lightning struck"):
        run(
            tmp_path / "other", epochs=2, audits=[InfluenceAudit()], ckpt_path=checkpoint, model=Diary(1), loaders=other
        )


@pytest.mark.parametrize("every", [1, 2])
def test_resumed_after_a_crash(every: int, straight: Any, tmp_path: Path) -> None:
    """From the last epoch's end before the crash; what was recorded after it is forgotten."""
    settings = TracIn(every_n_epochs=every)
    torch.manual_seed(3)
    first = InfluenceAudit(tracin=settings)
    with pytest.raises(RuntimeError, match="lightning struck"):
        run(tmp_path / "first", epochs=4, audits=[first], model=Diary(fails_in_epoch=2))
    checkpoint = tmp_path / "first" / "kept" / "step=10.ckpt"
    for number in range(2):  # a checkpoint can be resumed from more than once
        audit = InfluenceAudit(tracin=settings)
        run(tmp_path / f"again{number}", epochs=4, audits=[audit], ckpt_path=checkpoint)
        check_same(audit.report, straight(tracin=settings))


@pytest.mark.parametrize("mode", ["epoch", "step"])
def test_kept_checkpoints_come_along(mode: Any, straight: Any, tmp_path: Path) -> None:
    """The resumed run's directory holds those of the whole run, and its scores in flight are the whole run's."""
    settings = TracIn(mode=mode)
    run(tmp_path / "first", epochs=2, audits=[InfluenceAudit(tracin=settings)])
    audit = InfluenceAudit(tracin=settings)
    run(tmp_path / "second", epochs=4, audits=[audit], ckpt_path=tmp_path / "first" / "kept" / "step=10.ckpt")
    check_same(audit.report, straight(tracin=settings))
    assert audit.has_report
    assert [kept.step for kept in audit.report.checkpoints()] == [5, 10, 15, 20]
    for kept, other in zip(audit.report.checkpoints(), straight(tracin=settings).checkpoints(), strict=True):
        assert kept.step_sizes == other.step_sizes
        assert all(torch.equal(value, other.parameters[name]) for name, value in kept.parameters.items())


def test_in_flight_resumed_after_a_crash(straight: Any, tmp_path: Path) -> None:
    """Batches after the checkpoint were recorded before the crash; they count once."""
    settings = TracIn(mode="step", every_n_steps=2)
    torch.manual_seed(3)
    with pytest.raises(RuntimeError, match="lightning struck"):
        run(tmp_path / "first", epochs=4, audits=[InfluenceAudit(tracin=settings)], model=Diary(fails_in_epoch=2))
    audit = InfluenceAudit(tracin=settings)
    run(tmp_path / "second", epochs=4, audits=[audit], ckpt_path=tmp_path / "first" / "kept" / "step=10.ckpt")
    check_same(audit.report, straight(tracin=settings))


def test_in_flight_resumed_within_an_epoch(tmp_path: Path) -> None:
    """Every batch that was really trained on counts once, at its own weights and rate; the loader starts anew."""

    class Flown(Diary):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            weights = {name: value.clone() for name, value in self.net.state_dict().items()}
            self.visits = [*getattr(self, "visits", []), (batch[2].tolist(), weights)]

    settings, one, two = TracIn(mode="step"), Flown(), Flown()
    saves = {"every_n_train_steps": 7}
    run(tmp_path / "first", epochs=2, audits=[InfluenceAudit(tracin=settings)], saves=saves, model=one)
    audit = InfluenceAudit(tracin=settings)
    checkpoint = tmp_path / "first" / "kept" / "step=7.ckpt"
    run(tmp_path / "second", epochs=3, audits=[audit], ckpt_path=checkpoint, model=two)
    assert audit.has_report

    expected, network = np.zeros(22), Diary().net
    visits, rates = one.visits[:7] + two.visits, one.steps[:7] + two.steps
    for (indices, weights), rate in zip(visits, rates, strict=True):
        network.load_state_dict(weights)
        x, y = (tensor[indices] for tensor in DOUBLE.tensors)
        gradients = ref.per_example_gradients(network, F.cross_entropy, x, y)
        expected[indices] += rate / 0.5 * sum(g.square().flatten(1).sum(1).numpy() for g in gradients.values())
    seen = [sum(index in indices for indices, _ in visits) for index in range(22)]
    assert len(set(seen)) > 1  # as without a stop they would not be
    assert audit.report.columns["times_seen"].tolist() == seen
    np.testing.assert_allclose(audit.report.columns["tracin"], expected, rtol=1e-10)


@pytest.mark.parametrize("stop", [1, 2])
def test_resumed_from_a_checkpoint_saved_after_validation(stop: int, straight: Any, tmp_path: Path) -> None:
    """Checkpoints of the best validation loss are written before the epoch's end has come to the audit."""
    saves = {"save_on_train_epoch_end": False}
    run(tmp_path / "first", epochs=stop, audits=[InfluenceAudit()], saves=saves)
    audit = InfluenceAudit()
    checkpoint = tmp_path / "first" / "kept" / f"step={5 * stop}.ckpt"
    run(tmp_path / "second", epochs=4, audits=[audit], ckpt_path=checkpoint)
    check_same(audit.report, straight())


def test_resumed_by_the_same_trainer_and_callback(straight: Any, tmp_path: Path) -> None:
    audit = InfluenceAudit()
    trainer, model = run(tmp_path, epochs=2, audits=[audit])
    first = audit.report
    trainer.fit_loop.max_epochs = 4
    trainer.fit(model, *data(), ckpt_path=str(tmp_path / "kept" / "step=10.ckpt"))
    check_same(audit.report, straight())
    assert first is not None
    assert audit.has_report
    assert AuditReport.load(first.directory).columns["times_seen"].tolist() == [2] * 22  # type: ignore[arg-type]
    assert audit.report.directory == Path(f"{first.directory}-v1")


def test_resumed_within_an_epoch(tmp_path: Path) -> None:
    """Lightning starts the loader anew then; what counts is what was really trained on."""
    _, one = run(tmp_path / "first", epochs=2, audits=[InfluenceAudit()], saves={"every_n_train_steps": 7})
    audit = InfluenceAudit()
    checkpoint = tmp_path / "first" / "kept" / "step=7.ckpt"
    _, two = run(tmp_path / "second", epochs=3, audits=[audit], ckpt_path=checkpoint)
    assert audit.has_report

    losses: dict[int, list[float]] = {}
    before = [5, 5, 5, 5, 2, 5, 5]  # examples in the first seven batches
    for index, loss in one.losses[: sum(before)] + two.losses:
        losses.setdefault(index, []).append(loss)
    columns = audit.report.columns
    assert columns["times_seen"].tolist() == [len(losses[n]) for n in range(22)]
    np.testing.assert_allclose(columns["loss_mean"], [np.mean(losses[n]) for n in range(22)], rtol=1e-12)
    np.testing.assert_allclose(columns["loss_variance"], [np.var(losses[n]) for n in range(22)], atol=1e-12)

    rates = one.steps[:7] + two.steps
    ends = [one.ends[0], *two.ends]
    assert audit.report.manifest["tracin_steps"] == [step for step, _ in ends]
    gradients, etas, start = [], [], 0
    network = Diary().net
    for step, weights in ends:
        network.load_state_dict(weights)
        gradients.append(ref.per_example_gradients(network, F.cross_entropy, *DOUBLE.tensors))
        etas.append(sum(rates[start:step]) / 0.5)
        start = step
    np.testing.assert_allclose(columns["tracin"], ref.tracin_self(gradients, etas), rtol=1e-10)


def test_the_state_is_tensors_and_primitives(tmp_path: Path, straight: Any) -> None:
    """A checkpoint can be loaded, and resumed from, without running any pickled code."""
    run(tmp_path / "first", epochs=2, audits=[InfluenceAudit()])
    path = tmp_path / "first" / "kept" / "step=10.ckpt"
    states = torch.load(path, weights_only=True)["callbacks"]
    (key,) = (key for key in states if key.startswith("InfluenceAudit"))
    assert states[key]["size"] == 22
    audit = InfluenceAudit()
    # An argument of `fit` since Lightning 2.6.
    options = {"weights_only": True} if "weights_only" in inspect.signature(pl.Trainer.fit).parameters else {}
    run(tmp_path / "second", epochs=4, audits=[audit], ckpt_path=path, **options)
    check_same(audit.report, straight())


def test_a_state_of_an_earlier_version_is_refused(tmp_path: Path) -> None:
    run(tmp_path / "first", epochs=1, audits=[InfluenceAudit()])
    path = tmp_path / "first" / "kept" / "step=5.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    for state in checkpoint["callbacks"].values():
        state.pop("parts", None)
    torch.save(checkpoint, path)
    with pytest.raises(MisconfigurationException, match="an earlier version of lightning-influence.*new run"):
        run(tmp_path / "second", epochs=2, audits=[InfluenceAudit()], ckpt_path=path)


@pytest.mark.parametrize("size", [20, 25])
def test_a_data_set_of_another_size(size: int, tmp_path: Path) -> None:
    run(tmp_path / "first", epochs=1, audits=[InfluenceAudit()])
    others = loader(Numbered(vectors(size, dtype=torch.float64))), data()[1]
    message = f"checkpoint was written for 22 training examples, the data set has {size}.*same training data"
    with pytest.raises(MisconfigurationException, match=message):
        run(
            tmp_path / "second",
            epochs=2,
            audits=[InfluenceAudit()],
            ckpt_path=tmp_path / "first" / "kept" / "step=5.ckpt",
            loaders=others,
        )


def test_after_a_refused_resumption_the_callback_starts_afresh(tmp_path: Path) -> None:
    run(tmp_path / "first", epochs=1, audits=[InfluenceAudit()])
    path = tmp_path / "first" / "kept" / "step=5.ckpt"
    others = loader(Numbered(vectors(20, dtype=torch.float64))), data()[1]
    audit = InfluenceAudit()
    with pytest.raises(MisconfigurationException, match="the data set has 20"):
        run(tmp_path / "second", epochs=2, audits=[audit], ckpt_path=path, loaders=others)
    run(tmp_path / "third", epochs=2, audits=[audit], loaders=others)
    assert audit.has_report
    assert audit.report.columns["times_seen"].tolist() == [2] * 20


def test_what_a_run_lacks_it_still_lacks_when_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(audit_run, "score_examples", fail)
        with pytest.warns(UserWarning, match="pass at the end of epoch 0 failed"):
            run(tmp_path / "first", epochs=2, audits=[InfluenceAudit()])
    audit = InfluenceAudit()
    run(tmp_path / "second", epochs=4, audits=[audit], ckpt_path=tmp_path / "first" / "kept" / "step=10.ckpt")
    assert audit.has_report
    (note,) = (note for note in audit.report.manifest["notes"] if "the passes at the ends of the epochs" in note)
    assert "epochs [0] failed: tracin lacks their steps" in note
    assert audit.report.manifest["tracin_steps"] == [10, 15, 20]


def test_an_audit_that_joins_later_and_one_that_leaves(tmp_path: Path) -> None:
    run(tmp_path / "without", epochs=2, audits=[])
    audit = InfluenceAudit()
    run(tmp_path / "joins", epochs=4, audits=[audit], ckpt_path=tmp_path / "without" / "kept" / "step=10.ckpt")
    assert audit.has_report
    assert audit.report.columns["times_seen"].tolist() == [2] * 22
    assert audit.report.manifest["tracin_steps"] == [15, 20]
    trainer, model = run(
        tmp_path / "leaves", epochs=5, audits=[], ckpt_path=tmp_path / "joins" / "kept" / "step=20.ckpt"
    )
    assert trainer.current_epoch == 5
    assert leftovers(trainer, model) == []


def test_a_resumed_run_may_write_elsewhere(straight: Any, tmp_path: Path) -> None:
    """The old place may be another machine's: what was recorded counts, wherever the audit goes."""
    run(tmp_path / "first", epochs=2, audits=[InfluenceAudit(dirpath=tmp_path / "old")])
    audit = InfluenceAudit(dirpath=tmp_path / "new")
    shutil.rmtree(tmp_path / "old")
    run(tmp_path / "second", epochs=4, audits=[audit], ckpt_path=tmp_path / "first" / "kept" / "step=10.ckpt")
    check_same(audit.report, straight(), curves=False)
    assert audit.report.curves.epochs.tolist() == [2, 3]  # the others were kept there
    assert any("curves lack the epochs 0, 1" in note for note in audit.report.manifest["notes"])
    assert AuditReport.load(tmp_path / "new").status == "complete"


@pytest.mark.parametrize(
    "second",
    [
        {"curvature": "identity"},
        {"damping": 0.5},
        {"tracin": TracIn(every_n_epochs=2)},
        {"factor_examples": 7},
        {"fisher": "empirical"},
        {"task": lambda module, batch: F.cross_entropy(module(batch[0]), batch[1])},
    ],
    ids=lambda arguments: next(iter(arguments)),
)
def test_two_audits_in_one_run(second: dict[str, Any], straight: Any, tmp_path: Path) -> None:
    def both() -> list[InfluenceAudit]:
        return [InfluenceAudit(), InfluenceAudit(**second)]

    first = both()
    run(tmp_path / "first", epochs=2, audits=list(first))
    assert first[0].has_report
    assert first[1].has_report
    assert str(first[1].report.directory) == f"{first[0].report.directory}-v1"
    for name in ("times_seen", "loss_mean", "aum", "el2n"):
        np.testing.assert_array_equal(first[0].report.columns[name], first[1].report.columns[name])

    resumed = both()
    run(tmp_path / "second", epochs=4, audits=list(resumed), ckpt_path=tmp_path / "first" / "kept" / "step=10.ckpt")
    check_same(resumed[0].report, straight())
    assert resumed[1].has_report
    assert resumed[1].report.columns["times_seen"].tolist() == [4] * 22
    alone = straight(**second)
    check_same(resumed[1].report, alone)


def test_what_was_recorded_survives_a_failed_audit(
    straight: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The final audit fails; training is resumed from its last checkpoint for more epochs."""
    with monkeypatch.context() as patch:
        patch.setattr(audit_run, "influence_scores", fail)
        with pytest.warns(UserWarning, match="the influence audit failed"):
            run(tmp_path / "first", epochs=3, audits=[InfluenceAudit()])
    audit = InfluenceAudit()
    run(tmp_path / "second", epochs=4, audits=[audit], ckpt_path=tmp_path / "first" / "kept" / "step=15.ckpt")
    check_same(audit.report, straight())


def test_resuming_a_run_that_is_already_over(tmp_path: Path) -> None:
    """No step is left to train: nothing to record, and the finished audit stays as it is."""
    audit = InfluenceAudit(dirpath=tmp_path / "audit")
    run(tmp_path / "first", epochs=2, audits=[audit])
    before = {path: path.read_bytes() for path in (tmp_path / "audit").rglob("*") if path.is_file()}
    again = InfluenceAudit(dirpath=tmp_path / "audit")
    run(tmp_path / "second", epochs=2, audits=[again], ckpt_path=tmp_path / "first" / "kept" / "step=10.ckpt")
    assert {path: path.read_bytes() for path in (tmp_path / "audit").rglob("*") if path.is_file()} == before


def test_validation_data_that_are_gone_end_no_fit_that_had_nothing_left(tmp_path: Path) -> None:
    class Split(pl.LightningDataModule):
        gone = False

        def train_dataloader(self) -> DataLoader[Any]:
            return loader(vectors())

        def val_dataloader(self) -> DataLoader[Any]:
            if self.gone:
                raise FileNotFoundError("val.csv is gone")
            return loader(vectors(6, 2))

    data = Split()
    trainer = make_trainer(tmp_path, callbacks=[InfluenceAudit()])
    trainer.fit(Validated(), datamodule=data)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    data.gone = True
    audit = InfluenceAudit()
    trainer = make_trainer(tmp_path, callbacks=[audit])
    with pytest.warns(UserWarning, match="no influence audit: val.csv is gone"):
        trainer.fit(Validated(), datamodule=data, ckpt_path=tmp_path / "last.ckpt")
    with pytest.raises(RuntimeError, match="val.csv is gone"):
        _ = audit.report
