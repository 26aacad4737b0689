"""Audits after the fact: of checkpoints, along checkpoints, at chosen weights."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from models import CLASSES, FEATURES, QUIET, Classifier, Validated, make_trainer, vectors
from own_processes import together
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset
from which_lightning import PACKAGE, Callback, ModelCheckpoint, StochasticWeightAveraging, pl

from lightning_influence import AuditReport, InfluenceAudit, TracIn
from lightning_influence.core import distributed

pytestmark = [
    pytest.mark.usefixtures("unverified"),
    pytest.mark.filterwarnings("ignore:no logger"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*have no `validation_step`"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec"),
]

# What follows from all the columns that there are, and from beliefs.
OF_ALL = {"rank", "suspicion", "candidate", "suggested", "wrong_probability"}
OF_TRAINING = {"times_seen", "loss_mean", "loss_variance", "aum", "el2n", "epochs_wrong", "forgetting", "prob_margin"}
OF_TRAINING |= {"support"}


def train_data(n: int = 40) -> DataLoader[Any]:
    return DataLoader(vectors(n), 8, shuffle=True)


def val_data() -> DataLoader[Any]:
    return DataLoader(vectors(16, 2), 8)


def adam(module: nn.Module) -> Any:
    return torch.optim.Adam(module.parameters(), lr=0.02)


def stepped(module: nn.Module) -> Any:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)]


def trained(
    directory: Path, model: pl.LightningModule, audit: InfluenceAudit | None = None, *callbacks: Any, epochs: int = 4
) -> Any:
    """Train with a checkpoint at the end of every epoch."""
    torch.manual_seed(3)
    keeper = ModelCheckpoint(directory / "checkpoints", filename="{epoch}", save_top_k=-1, monitor=None)
    own = [] if audit is None else [audit]
    trainer = make_trainer(
        directory, max_epochs=epochs, callbacks=[*own, *callbacks, keeper], enable_checkpointing=True, logger=False
    )
    trainer.fit(model, train_data(), val_data())
    return trainer


def kept(directory: Path) -> list[Path]:
    return sorted((directory / "checkpoints").glob("epoch=*.ckpt"))


def without_records(path: Path) -> Path:
    """The checkpoint of a run without an audit."""
    content = torch.load(path, weights_only=True)
    content["callbacks"] = {}
    other = path.with_name(f"bare-{path.name}")
    torch.save(content, other)
    return other


def assert_same(report: AuditReport, other: AuditReport, *, but: set[str] = OF_ALL) -> set[str]:
    """Every column that both have is the same; return what the first lacks."""
    for name in (report.columns.keys() & other.columns.keys()) - but:
        np.testing.assert_allclose(
            report.columns[name].astype(float), other.columns[name].astype(float), rtol=1e-6, atol=1e-9, err_msg=name
        )
    return set(other.columns) - set(report.columns)


# ------------------------------------------------------------------------------------------------ of one checkpoint


def test_a_checkpoint_of_deepspeed_is_refused_with_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning's own converter runs here, over what DeepSpeed's part of it finds in such a directory."""
    model = Validated(adam)
    trainer = trained(tmp_path, model)
    trainer.save_checkpoint(tmp_path / "file.ckpt")
    content = torch.load(tmp_path / "file.ckpt", weights_only=True)
    directory = tmp_path / "run" / "checkpoints" / "epoch=3.ckpt"
    (directory / "checkpoint").mkdir(parents=True)
    (directory / "latest").write_text("checkpoint")
    own = {name: content.pop(name) for name in ("state_dict", "optimizer_states", "lr_schedulers")}
    engine = {"module": own["state_dict"], "buffer_names": [], "shared_params": {}, "sparse_tensor_module_names": set()}
    engine |= {"param_shapes": [{"net.0.weight": torch.Size([8, 5])}], "ds_config": {"zero_optimization": {"stage": 2}}}
    engine |= {"skipped_steps": 0, "global_steps": 20, "dp_world_size": 2, "mp_world_size": 1, "ds_version": "0.17.1"}
    states = [directory / "checkpoint" / f"{name}.pt" for name in ("mp_rank_00_model_states", "zero_pp_optim_states")]
    torch.save(engine | content, states[0])
    torch.save({"optimizer_state_dict": {"zero_stage": 2}}, states[1])

    for path in (directory, directory.parent.parent):
        with pytest.raises(
            ValueError, match=r"of DeepSpeed, of which each process .*, and pass .*/whole\.ckpt"
        ) as raised:
            InfluenceAudit().audit(Validated(adam), train_data(), ckpt_path=path)
    (command,) = re.findall("`(.*)`", str(raised.value))
    found = SimpleNamespace(
        get_fp32_state_dict_from_zero_checkpoint=lambda path, tag: own["state_dict"],
        get_model_state_file=lambda path, stage: states[0],
        get_optim_files=lambda path: [states[1]],
    )
    monkeypatch.setattr(import_module(f"{PACKAGE}.utilities.deepspeed"), "_DEEPSPEED_AVAILABLE", True)
    for name in ("deepspeed", "deepspeed.utils"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace())
    monkeypatch.setitem(sys.modules, "deepspeed.utils.zero_to_fp32", found)
    exec(command)

    other, audits = Validated(adam), [InfluenceAudit(dirpath=tmp_path / name) for name in ("one", "other")]
    report = audits[0].audit(other, train_data(), ckpt_path=directory / "whole.ckpt", val_dataloaders=val_data())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert "whole.ckpt, step 20" in str(report)
    expected = audits[1].audit(model, train_data(), ckpt_path=tmp_path / "file.ckpt", val_dataloaders=val_data())
    assert assert_same(report, expected) == set()


@pytest.mark.parametrize("kind", ["whole", "weights", "state_dict"])
def test_the_scores_are_those_of_the_callback(tmp_path: Path, kind: str) -> None:
    audit, model = InfluenceAudit(queries="worst"), Validated(adam)
    trainer = trained(tmp_path, model, audit)
    path = tmp_path / "last.ckpt"
    if kind == "state_dict":
        torch.save(model.state_dict(), path)
    else:
        trainer.save_checkpoint(path, weights_only=kind == "weights")
    again, other = InfluenceAudit(queries="worst"), Validated(adam)
    report = again.audit(other, train_data(), ckpt_path=path, val_dataloaders=val_data())
    lacking = assert_same(report, audit.report, but=set() if kind == "whole" else OF_ALL)
    of_run = {"tracin", "neighbour_disagreement", "wrong_probability"}
    assert lacking == (set() if kind == "whole" else OF_TRAINING | of_run)
    assert report is again.report
    assert report.directory == tmp_path / "influence-v1"
    assert report.pairs is not None
    assert audit.report.pairs is not None
    assert report.pairs["index"].tolist() == audit.report.pairs["index"].tolist()
    assert report.manifest["audited_weights"]["file"] == str(path)
    assert f"weights     those of last.ckpt{'' if kind == 'state_dict' else ', step 20'}" in str(report)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    if kind == "whole":
        assert report.beliefs.described() == audit.report.beliefs.described()
    else:
        assert any(note.startswith("no training dynamics: ") for note in report.manifest["notes"])
        assert "the first epochs have learnt" in report.beliefs.reason
    assert again.influence("diagonal") is not None
    assert AuditReport.load(report.directory).manifest["step"] == (0 if kind == "state_dict" else 20)


def _audited_later(_: int, directory: Path) -> None:
    audit = InfluenceAudit(dirpath=directory / "later")
    audit.audit(Validated(adam), train_data(), ckpt_path=directory / "last.ckpt", val_dataloaders=val_data())


def test_a_process_of_its_own_finds_the_same(tmp_path: Path) -> None:
    audit = InfluenceAudit()
    trainer = trained(tmp_path, Validated(adam), audit)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    together(_audited_later, tmp_path, processes=1)
    assert assert_same(AuditReport.load(tmp_path / "later"), audit.report, but=set()) == set()


def test_of_the_weights_that_the_model_has(tmp_path: Path) -> None:
    audit, model = InfluenceAudit(), Validated()
    trained(tmp_path, model, audit)
    before = deepcopy(model.state_dict())
    report = InfluenceAudit(dirpath=tmp_path / "now").audit(model, train_data(), val_dataloaders=val_data())
    assert_same(report, audit.report)
    assert report.manifest["audited_weights"]["which"] == "given"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Failing(Validated):
    """Its optimizers can be made in its own training only."""

    def configure_optimizers(self) -> Any:
        if self.trainer.max_epochs != 4:
            raise RuntimeError("no schedule")
        return super().configure_optimizers()


def test_an_audit_that_fails_leaves_the_report_and_the_records(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    audit, model = InfluenceAudit(), Validated(adam)
    trainer = trained(tmp_path, model, audit, epochs=2)
    report, key = audit.report, audit.state_key
    with pytest.raises(ValueError, match="there is no checkpoint"):
        audit.audit(model, train_data(), ckpt_path=tmp_path / "none.ckpt")
    assert audit.report is report
    audit.audit(model, train_data())  # of weights alone: what training has recorded is the run's
    trainer.save_checkpoint(tmp_path / "over.ckpt")
    seen = torch.load(tmp_path / "over.ckpt", weights_only=True)["callbacks"][key]["parts"]
    assert seen.keys() == torch.load(kept(tmp_path)[-1], weights_only=True)["callbacks"][key]["parts"].keys()
    again = InfluenceAudit().audit(Validated(adam), train_data(), ckpt_path=tmp_path / "over.ckpt")
    assert again.columns["times_seen"].tolist() == report.columns["times_seen"].tolist()


def test_the_best_weights_of_a_trainer_are_audited_without_a_path(tmp_path: Path) -> None:
    keeper = ModelCheckpoint(tmp_path / "best", monitor="val_loss", mode="max")  # the first epoch's
    model = Validated(adam)
    trainer = trained(tmp_path, model, None, keeper)
    report = InfluenceAudit(weights="best").audit(model, trainer=trainer)
    assert report.manifest["audited_weights"]["file"] == keeper.best_model_path


def test_no_optimizer_is_needed(tmp_path: Path) -> None:
    audit = InfluenceAudit()
    trained(tmp_path, Failing(), audit)
    with pytest.warns(UserWarning, match="Failing.configure_optimizers fails outside of its training .*no schedule"):
        report = InfluenceAudit().audit(Failing(), train_data(), ckpt_path=kept(tmp_path)[-1])
    assert_same(report, audit.report)


class Half(Validated):
    """Trains its head alone, by what its optimizer is given."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net[3].parameters(), lr=0.1)


def test_what_the_optimizer_holds_is_what_is_audited(tmp_path: Path) -> None:
    audit = InfluenceAudit()
    trained(tmp_path, Half(), audit)
    report = InfluenceAudit().audit(Half(), train_data(), ckpt_path=without_records(kept(tmp_path)[-1]))
    assert list(report.manifest["coverage"]["covered"]) == ["net.3"]
    assert_same(report, audit.report)


def test_a_model_in_double_precision_stays_so(tmp_path: Path) -> None:
    data = TensorDataset(vectors(40).tensors[0].double(), vectors(40).tensors[1])
    audit, model = InfluenceAudit(), Classifier()
    trainer = make_trainer(tmp_path, precision="64-true", callbacks=[audit])
    trainer.fit(model, DataLoader(data, 8))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    report = InfluenceAudit().audit(Classifier(), DataLoader(data, 8), ckpt_path=tmp_path / "last.ckpt")
    assert_same(report, audit.report, but=set())


class Compiled(Validated):
    def __init__(self, compiled: bool) -> None:
        super().__init__(adam)
        if compiled:
            self.net = torch.compile(self.net, backend="eager")


@pytest.mark.parametrize("compiled", [True, False])
def test_names_do_not_tell_what_is_compiled(tmp_path: Path, compiled: bool) -> None:
    audit = InfluenceAudit()
    trained(tmp_path, Compiled(compiled), audit)
    report = InfluenceAudit().audit(Compiled(not compiled), train_data(), ckpt_path=kept(tmp_path)[-1])
    assert_same(report, audit.report, but=set())


class Late(pl.LightningModule):
    """Made in hooks, and its step writes to the logger."""

    def configure_model(self) -> None:
        if not hasattr(self, "net"):
            self.net = nn.Linear(FEATURES, CLASSES)

    def on_train_start(self) -> None:
        self.weight = torch.ones(CLASSES)
        self.log("started", 1.0)

    def on_train_epoch_start(self) -> None:
        if self.trainer.max_epochs == 1:
            raise RuntimeError("no epoch")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.log("loss", 1.0)
        self.logger.log_metrics({"a": 1.0})
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1], weight=self.weight)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_what_hooks_make_is_there(tmp_path: Path) -> None:
    torch.manual_seed(3)
    audit = InfluenceAudit()
    trainer = make_trainer(tmp_path, callbacks=[audit])
    trainer.fit(Late(), train_data())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    with pytest.warns(UserWarning, match="Late.on_train_epoch_start fails outside of its training: .*no epoch"):
        report = InfluenceAudit().audit(Late(), train_data(), ckpt_path=tmp_path / "last.ckpt")
    assert_same(report, audit.report, but=set())


class Data(pl.LightningDataModule):
    """Everything that a data module may do."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def prepare_data(self) -> None:
        self.calls.append("prepare")

    def setup(self, stage: str) -> None:
        self.calls.append(stage)
        self.data = Subset(vectors(60), range(0, 60, 2))

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.data, 8, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return val_data()

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [2 * batch[0], batch[1]]


def test_a_data_module_is_set_up_as_in_training(tmp_path: Path) -> None:
    audit = InfluenceAudit()
    trainer = make_trainer(tmp_path, callbacks=[audit], limit_train_batches=0.5)
    trainer.fit(Validated(), datamodule=Data())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    data = Data()
    report = InfluenceAudit().audit(Validated(), data, ckpt_path=tmp_path / "last.ckpt", trainer=make_trainer(tmp_path))
    assert data.calls == ["prepare", "fit"]
    # Which examples a limited run has drawn is in its records.
    assert report.columns["index"].tolist() == audit.report.columns["index"].tolist()
    assert_same(report, audit.report, but=set())
    assert report.columns["harm"].shape == (len(report),)
    whole = InfluenceAudit().audit(
        Validated(),
        Data(),
        ckpt_path=without_records(tmp_path / "last.ckpt"),
        trainer=make_trainer(tmp_path, limit_train_batches=2),
    )
    assert len(whole) == 30


def test_a_trainer_that_has_trained_is_left_as_it_was(tmp_path: Path) -> None:
    """``best`` is what its ModelCheckpoint has kept; it can go on to train and to save afterwards."""
    audit, model = InfluenceAudit(), Validated(adam)
    keeper = ModelCheckpoint(tmp_path / "kept", monitor="val_loss", save_last=True)
    trainer = make_trainer(tmp_path, max_epochs=3, callbacks=[audit, keeper], enable_checkpointing=True)
    trainer.fit(model, train_data(), val_data())
    first = audit.report
    trainer.save_checkpoint(tmp_path / "before.ckpt")
    state = torch.get_rng_state()
    report = audit.audit(model, ckpt_path="last", trainer=trainer)
    assert torch.equal(torch.get_rng_state(), state)
    assert_same(report, first, but=set())
    assert report.directory == tmp_path / "csv" / "version_0" / "influence-v1"
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    before, after = (torch.load(tmp_path / f"{name}.ckpt", weights_only=True) for name in ("before", "after"))
    assert before["loops"] == after["loops"]
    assert str(before["optimizer_states"]) == str(after["optimizer_states"])
    assert [type(each) for each in trainer.callbacks if each in (audit, keeper)] == [InfluenceAudit, ModelCheckpoint]
    assert audit.audit(model, ckpt_path="best", trainer=trainer).manifest["audited_weights"]["file"] == str(
        keeper.best_model_path
    )
    trainer.fit_loop.max_epochs = 4
    trainer.fit(model, train_data(), val_data())
    assert audit.report.columns["times_seen"].max() == 1


# ------------------------------------------------------------------------------------------------- along checkpoints


@pytest.mark.parametrize("optimizer", [adam, stepped])
@pytest.mark.parametrize("curvature", ["ekfac", "ggn"])
def test_along_checkpoints_tracin_is_that_of_the_callback(
    tmp_path: Path, optimizer: Callable[[nn.Module], Any], curvature: Any
) -> None:
    audit = InfluenceAudit(curvature=curvature)
    trained(tmp_path, Validated(optimizer), audit)
    paths = [without_records(path) for path in kept(tmp_path)]
    report = InfluenceAudit(curvature=curvature).audit(Validated(optimizer), train_data(), ckpt_paths=paths[::-1])
    assert assert_same(report, audit.report) == OF_TRAINING | {"harm"}
    assert report.manifest["tracin_steps"] == [5, 10, 15, 20]
    assert report.manifest["audited_weights"]["file"] == str(paths[-1])
    assert np.isfinite(report.columns["wrong_probability"]).all()
    assert len(report.checkpoints()) == 4


def test_early_checkpoints_tell_of_labels_and_late_ones_do_not(tmp_path: Path) -> None:
    trained(tmp_path, Validated(), epochs=5)
    early = InfluenceAudit(tracin=None).audit(
        Validated(), train_data(), ckpt_path=kept(tmp_path)[-1], ckpt_paths=kept(tmp_path)[:3]
    )
    assert "tracin" not in early.columns
    assert np.isfinite(early.columns["wrong_probability"]).all()
    late = InfluenceAudit().audit(Validated(), train_data(), ckpt_paths=kept(tmp_path)[3:])
    assert "epoch=3.ckpt, was taken after 4 epochs; pass checkpoints of the first epochs" in late.beliefs.reason
    assert late.beliefs.verdict == "cannot tell"
    assert "tracin" in late.columns


def test_the_best_in_the_middle_of_a_run(tmp_path: Path) -> None:
    trained(tmp_path, Validated())
    paths = kept(tmp_path)
    model = Validated()
    report = InfluenceAudit().audit(model, train_data(), ckpt_path=paths[1], ckpt_paths=paths)
    whole = InfluenceAudit().audit(Validated(), train_data(), ckpt_paths=paths)
    alone = InfluenceAudit().audit(Validated(), train_data(), ckpt_path=paths[1])
    np.testing.assert_allclose(report.columns["tracin"], whole.columns["tracin"], rtol=1e-6)
    np.testing.assert_allclose(report.columns["loss"], alone.columns["loss"], rtol=1e-6)
    held = torch.load(paths[1], weights_only=True)["state_dict"]
    assert all(torch.equal(value, held[name]) for name, value in model.state_dict().items())


def test_checkpoints_without_optimizer_state_say_what_tracin_rests_on(tmp_path: Path) -> None:
    trained(tmp_path, Validated())
    paths = []
    for path in kept(tmp_path):
        content = torch.load(path, weights_only=True)
        paths.append(tmp_path / f"weights-{path.name}")
        torch.save({name: value for name, value in content.items() if name != "optimizer_states"}, paths[-1])
    report = InfluenceAudit().audit(Validated(), train_data(), ckpt_paths=paths)
    notes = " ".join(report.manifest["notes"])
    assert "tracin has the learning rates that configure_optimizers starts with" in notes
    whole = InfluenceAudit().audit(Validated(), train_data(), ckpt_paths=kept(tmp_path))
    np.testing.assert_allclose(report.columns["tracin"], whole.columns["tracin"], rtol=1e-6)
    with pytest.warns(UserWarning, match="configure_optimizers fails"):
        without = InfluenceAudit().audit(Failing(), train_data(), ckpt_paths=paths)
    assert "tracin" not in without.columns
    assert any(note.startswith("no tracin: learning rates are not known") for note in without.manifest["notes"])


# ------------------------------------------------------------------------------------------------------ other data


class Labelled(Dataset[Any]):
    def __init__(self, n: int = 40, shift: int = 0) -> None:
        self.data, self.shift = vectors(n), shift

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        x, y = self.data[index]
        return x, (y + self.shift) % CLASSES


@pytest.mark.parametrize("data", [Labelled(shift=1), Labelled(39)])
@pytest.mark.parametrize("mode", ["epoch", "step"])
def test_other_data_are_told_and_the_records_left_out(tmp_path: Path, data: Labelled, mode: Any) -> None:
    audit = InfluenceAudit(tracin=TracIn(mode))
    trained(tmp_path, Validated(), audit)
    with pytest.warns(UserWarning, match="the training data are not those of the training: .*is left out"):
        report = InfluenceAudit(tracin=TracIn(mode)).audit(
            Validated(), DataLoader(data, 8), ckpt_path=kept(tmp_path)[-1]
        )
    assert not {"times_seen", "tracin", "support"} & set(report.columns)
    assert any("are not those of the training" in note for note in report.manifest["notes"])
    assert report.status == "complete"


def test_data_unlike_those_of_the_audit_beside_it(tmp_path: Path) -> None:
    model = Validated()
    trained(tmp_path, model, InfluenceAudit())
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    x, y = vectors(40).tensors
    for data, told in (
        (Labelled(shift=1), r"TensorDataset \w+ then, Labelled \w+ now"),
        (Labelled(39), "40 examples then, 39 now"),
        (TensorDataset(x + 1, y), "examples hold something else"),
    ):
        with pytest.warns(UserWarning, match=f"the data are not those of the audit in .*influence: .*{told}"):
            report = InfluenceAudit().audit(model, DataLoader(data, 8), ckpt_path=tmp_path / "weights.pt")
        assert report.status == "complete"
        assert "the data are not those of the audit" in str(AuditReport.load(str(report.directory)))


# ------------------------------------------------------------------------------------------------------- bad input


def test_a_checkpoint_of_another_model_names_what_differs(tmp_path: Path) -> None:
    trained(tmp_path, Classifier(features=FEATURES))
    path = kept(tmp_path)[-1]
    with pytest.raises(ValueError, match=r"of another model: 'net.3.weight' has the shape \[3, 6\] there and \[5, 6\]"):
        InfluenceAudit().audit(Classifier(classes=5), train_data(), ckpt_path=path)

    class Deeper(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.more = nn.Linear(3, 3)

    with pytest.raises(ValueError, match="it lacks 'more.weight' of Deeper; it lacks 'more.bias' of Deeper. Build"):
        InfluenceAudit().audit(Deeper(), train_data(), ckpt_path=path)


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("missing.ckpt", "there is no checkpoint .*missing.ckpt"),
        ("cut.ckpt", "cut.ckpt can't be read as a checkpoint .*it may be cut off"),
        ("text.ckpt", "text.ckpt can't be read as a checkpoint"),
        ("other.ckpt", "holds the keys model, epoch; expected a checkpoint of a Trainer"),
        ("objects.ckpt", "holds objects other than tensors .*add_safe_globals"),
        ("empty", r"empty holds no \*.ckpt"),
        ("checkpoints", "holds epoch=0.ckpt, epoch=1.ckpt; pass the path of one"),
        (".", "holds .*checkpoints/epoch=1.ckpt"),
        ("best", "what a Trainer knows of its own run"),
        (7, "ckpt_path=7; expected a path"),
    ],
)
def test_what_is_no_checkpoint(tmp_path: Path, path: Any, said: str) -> None:
    trained(tmp_path, Classifier(), epochs=2)
    whole = kept(tmp_path)[0].read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.ckpt").write_text("weights")
    torch.save({"model": {}, "epoch": 3}, tmp_path / "other.ckpt")
    torch.save({"state_dict": {}, "hyper_parameters": partial(print)}, tmp_path / "objects.ckpt")
    (tmp_path / "empty").mkdir()
    audit = InfluenceAudit()
    given = path if path == "best" or path == 7 else tmp_path / path
    with pytest.raises(ValueError, match=said):
        audit.audit(Classifier(), train_data(), ckpt_path=given)
    with pytest.raises(RuntimeError, match="there is no report"):
        _ = audit.report


def test_the_only_checkpoint_of_a_directory(tmp_path: Path) -> None:
    trained(tmp_path, Classifier(), epochs=1)
    report = InfluenceAudit().audit(Classifier(), train_data(), ckpt_path=tmp_path)
    assert report.directory == tmp_path / "influence"


def test_validation_data_of_the_trainer_may_be_a_stream(tmp_path: Path) -> None:
    class Streamed(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter(vectors(6, 2))

    trainer, model = make_trainer(tmp_path), Validated()
    trainer.fit(model, train_data())
    report = InfluenceAudit().audit(model, val_dataloaders=DataLoader(Streamed(), 3), trainer=trainer)
    assert report is not None
    assert "harm" in report.columns


def test_data_of_the_last_fit_are_left_alone_if_others_are_audited(tmp_path: Path) -> None:
    class Remembering(Data):
        loaded = 0

        def state_dict(self) -> dict[str, Any]:
            return {"place": 1}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            self.loaded += 1

    trainer, model, data = make_trainer(tmp_path), Classifier(), Remembering()
    trainer.fit(model, datamodule=data)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    for given, loads in ((train_data(), 0), (None, 1)):
        InfluenceAudit().audit(model, given, ckpt_path=tmp_path / "last.ckpt", trainer=trainer)
        assert data.loaded == loads
        assert trainer.datamodule is data  # type: ignore[attr-defined]


@pytest.mark.parametrize("lent", [False, True])
def test_in_the_middle_of_training_a_copy_can_be_audited(tmp_path: Path, lent: bool) -> None:
    reports = []

    class Halfway(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            with pytest.raises(RuntimeError, match="in the middle of a run.*deepcopy"):
                InfluenceAudit().audit(pl_module, train_data(), trainer=trainer if lent else None)
            if not lent:
                audit = InfluenceAudit(dirpath=tmp_path / "audit")
                reports.append(audit.audit(deepcopy(pl_module), train_data()))

    models = []
    for callbacks in ([], [Halfway()]):
        torch.manual_seed(0)
        models.append(Validated(adam))
        make_trainer(tmp_path, callbacks=callbacks, max_epochs=2).fit(models[-1], train_data(), val_data())
    assert all(torch.equal(one, other) for one, other in zip(*(each.parameters() for each in models), strict=True))
    assert len(reports) == 2 * (not lent)


def test_an_audit_that_is_done_is_not_lost_to_the_end_of_the_fit(tmp_path: Path) -> None:
    class Ending(Classifier):
        def on_fit_end(self) -> None:
            raise AttributeError("nothing was trained")

    audit = InfluenceAudit(dirpath=tmp_path)
    with pytest.raises(AttributeError, match="nothing was trained"):
        audit.audit(Ending(), train_data())
    assert len(audit.report) == len(train_data().dataset)  # type: ignore[arg-type]
    assert AuditReport.load(tmp_path).status == "complete"


def test_a_dry_run_says_what_it_is(tmp_path: Path) -> None:
    trainer, model = make_trainer(tmp_path, fast_dev_run=True), Validated()
    trainer.fit(model, train_data())
    report = InfluenceAudit().audit(model, trainer=trainer)
    assert report is not None
    assert report.directory is None
    notes = [note for note in report.manifest["notes"] if "examples" in note]
    assert notes == [f"`fast_dev_run`: {len(report)} examples alone were looked at, and nothing is written"]


def test_records_of_an_earlier_version_are_told(tmp_path: Path) -> None:
    model = Validated(adam)
    trained(tmp_path, model, InfluenceAudit(), epochs=1)
    content = torch.load(kept(tmp_path)[-1], weights_only=True)
    (state,) = [state for key, state in content["callbacks"].items() if key.startswith("InfluenceAudit")]
    del state["parts"]
    torch.save(content, tmp_path / "before.ckpt")
    with pytest.warns(UserWarning, match="what an earlier version .* has recorded of the training is left out"):
        report = InfluenceAudit().audit(Validated(adam), train_data(), ckpt_path=tmp_path / "before.ckpt")
    assert "times_seen" not in report.columns


def test_one_of_several_processes_needs_their_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    with pytest.raises(ValueError, match="one of 2 processes, which share an audit: pass their `trainer=`"):
        InfluenceAudit().audit(Classifier(), train_data())


def test_other_arguments_that_can_not_be(tmp_path: Path) -> None:
    model = Classifier()
    trainer = make_trainer(tmp_path)
    with pytest.raises(TypeError, match="the model is Linear.*expected the LightningModule"):
        InfluenceAudit().audit(nn.Linear(2, 2), train_data())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="there are no training data: pass the DataLoader"):
        InfluenceAudit().audit(model)
    with pytest.raises(ValueError, match="val_dataloaders beside the data module Data"):
        InfluenceAudit().audit(model, Data(), val_dataloaders=val_data())
    with pytest.raises(ValueError, match="ckpt_paths='a.ckpt'; expected a list"):
        InfluenceAudit().audit(model, train_data(), ckpt_paths="a.ckpt")
    with pytest.raises(ValueError, match="ckpt_path='best': the Trainer has no ModelCheckpoint"):
        InfluenceAudit().audit(model, train_data(), ckpt_path="best", trainer=trainer)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="does not tell which step of training it is of"):
        InfluenceAudit().audit(model, train_data(), ckpt_paths=[tmp_path / "weights.pt"])


# --------------------------------------------------------------------------------------------------- which weights


class Noisy(Validated):
    """With a validation loss that is best in the second epoch."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", abs(self.current_epoch - 1.0) + 0.5)


def fitted(directory: Path, model: pl.LightningModule, *callbacks: Any, epochs: int = 4) -> Any:
    torch.manual_seed(3)
    trainer = make_trainer(directory, max_epochs=epochs, callbacks=list(callbacks), enable_checkpointing=True)
    trainer.fit(model, train_data(), val_data())
    return trainer


@pytest.mark.parametrize("mode", ["epoch", "step", None])
def test_the_best_weights_are_audited_and_the_last_put_back(tmp_path: Path, mode: Any) -> None:
    torch.manual_seed(0)
    model, other = (Noisy(adam) for _ in range(2))
    other.load_state_dict(model.state_dict())
    last, best = InfluenceAudit(tracin=mode), InfluenceAudit(tracin=mode, weights="best")
    keeper = ModelCheckpoint(tmp_path / "kept", monitor="val_loss")
    fitted(tmp_path / "a", model, last, ModelCheckpoint(tmp_path / "other", monitor="val_loss"))
    trainer = fitted(tmp_path / "b", other, best, keeper)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    about = best.report.manifest["audited_weights"]
    assert about == {
        "which": "best",
        "step": 10,
        "file": keeper.best_model_path,
        "monitor": "val_loss",
        "value": 0.5,
        "told": "the best by val_loss (0.5): epoch=1-step=10.ckpt, step 10",
    }
    afterwards = InfluenceAudit(tracin=None).audit(
        Noisy(adam), train_data(), ckpt_path=without_records(Path(keeper.best_model_path)), val_dataloaders=val_data()
    )
    assert_same(afterwards, best.report)
    # What is about the run, not about the weights, is the same.
    for name in {"times_seen", "loss_mean", "prob_margin"} | ({"tracin"} if mode else set()):
        np.testing.assert_allclose(best.report.columns[name], last.report.columns[name], rtol=1e-6)
    assert not np.allclose(best.report.columns["loss"], last.report.columns["loss"])
    if mode == "epoch":
        np.testing.assert_allclose(
            best.report.checkpoints()[-1].parameters["net.1.weight"], other.net[1].weight.detach(), rtol=0
        )
    assert trainer.optimizers[0].state[other.net[1].weight]["step"] == 20


def average_of(callback: Any, model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in callback._average_model.named_parameters()}


@pytest.mark.parametrize("before", [False, True])
def test_averaged_weights_in_either_order(tmp_path: Path, before: bool) -> None:
    model, averaging = Validated(), StochasticWeightAveraging(0.05, swa_epoch_start=1)
    audit = InfluenceAudit(weights="averaged")
    fitted(tmp_path, model, *((averaging, audit) if before else (audit, averaging)))
    assert audit.report.manifest["audited_weights"]["which"] == "averaged"
    assert "StochasticWeightAveraging" in str(audit.report).splitlines()[1]
    # The callback has put its average into the model by now.
    now = InfluenceAudit(dirpath=tmp_path / "now").audit(model, train_data(), val_dataloaders=val_data())
    assert_same(now, audit.report)


def test_an_exponential_average(tmp_path: Path) -> None:
    module = pytest.importorskip(f"{PACKAGE}.callbacks.weight_averaging")
    if not hasattr(module, "EMAWeightAveraging"):
        pytest.skip("this release has none")
    model, audit = Validated(), InfluenceAudit(weights="averaged")
    trainer = fitted(tmp_path, model, audit, module.EMAWeightAveraging(decay=0.9))
    now = InfluenceAudit(dirpath=tmp_path / "now").audit(model, train_data(), val_dataloaders=val_data())
    assert_same(now, audit.report)
    path = next(Path(trainer.checkpoint_callback.dirpath).glob("*.ckpt"))
    later = InfluenceAudit(dirpath=tmp_path / "later").audit(
        Validated(), train_data(), ckpt_path=path, val_dataloaders=val_data()
    )
    assert later.manifest["audited_weights"]["which"] == "averaged"
    assert_same(later, audit.report)


@pytest.mark.parametrize(
    ("weights", "callbacks", "said"),
    [
        ("best", [], "the Trainer's ModelCheckpoint monitors nothing"),
        ("best", [ModelCheckpoint(save_top_k=0, monitor="val_loss")], r"keeps none \(save_top_k=0\)"),
        ("averaged", [], "has none of them among its callbacks"),
    ],
)
def test_weights_that_there_will_not_be_are_refused_before_training(
    tmp_path: Path, weights: Any, callbacks: list[Any], said: str
) -> None:
    model = Validated()
    before = deepcopy(model.state_dict())
    with pytest.raises(Exception, match=said):
        fitted(tmp_path, model, InfluenceAudit(weights=weights), *callbacks)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(Exception, match="the Trainer has no ModelCheckpoint|none of them"):
        make_trainer(tmp_path, callbacks=[InfluenceAudit(weights=weights)]).fit(model, train_data())
    with pytest.raises(ValueError, match="weights='first'; expected one of 'last', 'best', 'averaged'"):
        InfluenceAudit(weights="first")  # type: ignore[arg-type]


def test_without_a_best_checkpoint_the_last_weights_are_audited(tmp_path: Path) -> None:
    """What was trained is worth an audit, whatever became of the file."""

    class Loses(ModelCheckpoint):  # type: ignore[misc]
        def on_train_epoch_end(self, *arguments: Any) -> None:
            super().on_train_epoch_end(*arguments)
            for path in Path(self.dirpath).glob("*.ckpt"):
                path.write_bytes(path.read_bytes()[:100])

    audit = InfluenceAudit(weights="best")
    keeper = Loses(tmp_path / "kept", monitor="val_loss", save_on_train_epoch_end=True)
    with pytest.warns(UserWarning, match="the best checkpoint can't be audited, .*can't be read"):
        fitted(tmp_path, Validated(), audit, keeper)
    assert audit.report.status == "complete"
    assert audit.report.manifest["audited_weights"]["which"] == "last"


def test_quiet(tmp_path: Path) -> None:
    """Keep ``QUIET`` a mapping that a trainer takes: the tests above would watch a bar otherwise."""
    assert pl.Trainer(**QUIET, logger=False, enable_checkpointing=False).progress_bar_callback is None


@pytest.mark.filterwarnings("always:no logger")
def test_it_is_said_where_an_audit_goes_that_nothing_names_a_folder_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.chdir(tmp_path)
    model = Classifier()
    report = InfluenceAudit(curvature="kfac").audit(model, train_data())
    assert report.directory == tmp_path / "influence"
    (tmp_path / "elsewhere").mkdir()
    torch.save(model.state_dict(), tmp_path / "elsewhere" / "weights.pt")
    beside = InfluenceAudit(curvature="kfac").audit(model, train_data(), ckpt_path="elsewhere/weights.pt")
    assert beside.directory == tmp_path / "elsewhere" / "influence"
    (told,) = [str(each.message) for each in recwarn if "no logger" in str(each.message)]
    assert f"goes to {report.directory}; `InfluenceAudit(dirpath=...)` names another" in told
