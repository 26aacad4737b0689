"""What a person meets in the first hour: a sentence for each thing that is missing or in the wrong place."""

from __future__ import annotations

import shutil
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Classifier, Stream, loader, make_trainer, vectors
from torch.utils.data import DataLoader, Dataset
from which_lightning import Callback, MisconfigurationException, pl

from lightning_influence import AuditReport, InfluenceAudit
from lightning_influence.audit.store.atomic import StoreError
from lightning_influence.callbacks.listening import BatchListener
from lightning_influence.callbacks.run import AuditRun
from lightning_influence.callbacks.uninvited import UninvitedAudit
from lightning_influence.core.errors import short
from lightning_influence.data.source import DataError, ExampleSource
from lightning_influence.every_training import callbacks
from lightning_influence.training.recording import Recording

VARIABLE = "LIGHTNING_INFLUENCE"


def fitted(directory: Path, *audits: Callback, **arguments: Any) -> pl.Trainer:
    trainer = make_trainer(directory, callbacks=list(audits), **arguments)
    trainer.fit(Classifier(), loader(vectors()))
    return trainer


# --------------------------------------------------------------------------------------------- the callback itself


def test_a_class_among_the_callbacks_is_named(tmp_path: Path) -> None:
    # Lightning 2.5 has refused it by then, in words of its own.
    said = r"holds a class, InfluenceAudit, .*write InfluenceAudit\(\)|^Expected a parent$"
    with pytest.raises((TypeError, ValueError), match=said):
        fitted(tmp_path, InfluenceAudit)  # type: ignore[arg-type]


def test_a_report_that_is_not_there_says_why(tmp_path: Path) -> None:
    audit = InfluenceAudit()
    assert not audit.has_report
    with pytest.raises(RuntimeError, match="there is no report: `trainer.fit` has not run"):
        _ = audit.report

    class Early(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            with pytest.raises(RuntimeError, match="training has not ended yet"):
                _ = audit.report

    fitted(tmp_path, audit, Early())
    assert audit.has_report
    assert audit.report.status == "complete"


def test_a_report_lost_to_an_error_names_it(tmp_path: Path) -> None:
    class Breaks(Callback):
        def on_train_epoch_start(self, *_: Any) -> None:
            raise ZeroDivisionError("of the user")

    audit = InfluenceAudit()
    with pytest.raises(ZeroDivisionError):
        fitted(tmp_path, audit, Breaks())
    with pytest.raises(RuntimeError, match="the run ended with ZeroDivisionError: of the user"):
        _ = audit.report


def test_a_report_of_a_failed_audit_names_the_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("the disk is gone")

    monkeypatch.setattr("lightning_influence.callbacks.run.influence_scores", fail)
    audit = InfluenceAudit()
    with pytest.warns(UserWarning, match="the influence audit failed"):
        fitted(tmp_path, audit)
    with pytest.raises(RuntimeError, match="the disk is gone.*kept in"):
        _ = audit.report


def test_a_report_of_no_training_says_so(tmp_path: Path) -> None:
    audit = InfluenceAudit()
    with pytest.warns(UserWarning, match="no step was trained"):
        fitted(tmp_path, audit, max_epochs=0)
    with pytest.raises(RuntimeError, match=r"no step was trained \(max_epochs=0"):
        _ = audit.report


# ------------------------------------------------------------------------------------------------ where things lie


def test_an_audit_is_found_inside_its_run(tmp_path: Path) -> None:
    fitted(tmp_path, audit := InfluenceAudit())
    directory = audit.report.directory
    assert directory is not None
    for above in (directory, directory.parent, tmp_path):
        assert AuditReport.load(above).directory == directory
    shutil.copytree(directory, directory.with_name("influence-v1"))
    with pytest.raises(StoreError, match="has 2 audits inside it: influence, influence-v1"):
        AuditReport.load(directory.parent)
    shutil.rmtree(directory)
    (directory.parent / "hparams").mkdir()
    assert AuditReport.load(directory.parent).directory == directory.with_name("influence-v1")
    with pytest.raises(StoreError, match="holds no audit"):
        AuditReport.load(directory.parent / "hparams")


def test_a_loader_for_a_data_set_is_told_the_way() -> None:
    data = DataLoader(vectors())
    with pytest.raises(DataError, match=r"from_loader\(loader\)"):
        ExampleSource(data)  # type: ignore[arg-type]
    assert len(ExampleSource.from_loader(data)) == len(vectors())


def test_messages_name_large_values_shortly() -> None:
    with pytest.raises(ValueError, match=r"^queries=.*; expected None") as raised:
        InfluenceAudit(queries=[(torch.randn(50), "word" * 50)] * 1000)  # type: ignore[arg-type]
    assert len(str(raised.value)) < 3000
    assert short("nystorm") == "'nystorm'"


# ------------------------------------------------------------------------------------------- audits without any code


def test_nothing_comes_uninvited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert callbacks() == []
    monkeypatch.setenv(VARIABLE, "")
    assert callbacks() == []


@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
def test_both_packages_ask(package: str) -> None:
    (found,) = [each for each in entry_points(group=f"{package}.callbacks_factory") if "influence" in each.name]
    assert found.load() is callbacks


def test_a_variable_audits_every_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "audit.yaml").write_text("curvature: kfac\ntracin:\n  mode: epoch\n  every_n_epochs: 2\n")
    monkeypatch.setenv(VARIABLE, str(tmp_path / "audit.yaml"))
    trainer = fitted(tmp_path)
    (audit,) = [each for each in trainer.callbacks if isinstance(each, InfluenceAudit)]  # type: ignore[attr-defined]
    assert audit.report.manifest["curvature"]["name"] == "kfac"
    assert audit.report.manifest["arguments"]["tracin"]["every_n_epochs"] == 2


def test_an_empty_file_is_all_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "audit.yaml").write_text("")
    monkeypatch.setenv(VARIABLE, str(tmp_path / "audit.yaml"))
    assert callbacks()[0].arguments.described() == InfluenceAudit().arguments.described()


def test_an_audit_of_the_user_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "audit.yaml").write_text("curvature: kfac")
    monkeypatch.setenv(VARIABLE, str(tmp_path / "audit.yaml"))
    own = InfluenceAudit(curvature="diagonal")
    trainer = fitted(tmp_path, own)
    assert [each for each in trainer.callbacks if isinstance(each, InfluenceAudit)] == [own]  # type: ignore[attr-defined]
    assert own.report.manifest["curvature"]["name"] == "diagonal"


def test_what_it_has_recorded_is_of_use_to_an_audit_of_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "audit.yaml").write_text("")
    monkeypatch.setenv(VARIABLE, str(tmp_path / "audit.yaml"))
    trainer: Any = fitted(tmp_path)
    (uninvited,) = [each for each in trainer.callbacks if isinstance(each, InfluenceAudit)]
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    report = InfluenceAudit().audit(trainer.lightning_module, trainer=trainer, ckpt_path=tmp_path / "last.ckpt")
    assert report.columns["loss_mean"].tolist() == uninvited.report.columns["loss_mean"].tolist()
    assert report.columns["tracin"].tolist() == pytest.approx(uninvited.report.columns["tracin"].tolist())


class Undecided(Classifier):
    """Has a loss that is not made of per-example losses."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return super().training_step(batch, batch_idx).square() * batch[0].std()


@pytest.mark.parametrize("late", [False, True])
def test_what_cannot_be_audited_is_trained_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    (tmp_path / "audit.yaml").write_text("")
    models = []
    for path in (str(tmp_path / "audit.yaml"), ""):
        monkeypatch.setenv(VARIABLE, path)
        torch.manual_seed(0)
        models.append(Undecided() if late else Classifier())
        trainer = make_trainer(tmp_path)
        data = loader(vectors()) if late else DataLoader(Stream(), batch_size=4)
        if path:
            with pytest.warns(UserWarning, match=f"{VARIABLE}: this training is not audited"):
                trainer.fit(models[-1], data)
        else:
            trainer.fit(models[-1], data)
        assert not any(isinstance(each, UninvitedAudit) for each in trainer.callbacks)  # type: ignore[attr-defined]
        assert trainer.global_step > 0
    assert all(torch.equal(one, other) for one, other in zip(*(each.parameters() for each in models), strict=True))


class Keyed(Dataset[Any]):
    """Has keys for its examples."""

    def __len__(self) -> int:
        return len(vectors())

    def __getitem__(self, key: Any) -> Any:
        return vectors()[int(str(key).removeprefix("k"))]


class Heavy(Classifier):
    """Has no memory to spare for passes in evaluation mode."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if not self.training:
            raise torch.OutOfMemoryError("out of memory")
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize(
    ("content", "kind", "keys", "said"),
    [
        ("", Classifier, True, "the training sampler yields"),  # between the loader and the loop
        ("sample_id: 1", Classifier, False, "Tensor.* has an index"),  # while the data are loaded
        ("", Heavy, False, "memory has run out with 3 examples"),
    ],
)
def test_whatever_fails_where_training_is_trained_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, kind: type[Classifier], keys: bool, said: str
) -> None:
    (tmp_path / "audit.yaml").write_text(content)
    monkeypatch.setenv(VARIABLE, str(tmp_path / "audit.yaml"))
    trainer = make_trainer(tmp_path)
    names = [f"k{number}" for number in range(len(vectors()))]
    data = DataLoader(Keyed(), batch_size=4, sampler=names) if keys else loader(vectors())
    with pytest.warns(UserWarning, match=f"{VARIABLE}: this training is not audited.*{said}"):
        trainer.fit(kind(), data)
    assert not any(isinstance(each, UninvitedAudit) for each in trainer.callbacks)  # type: ignore[attr-defined]
    assert trainer.global_step == len(data) * (trainer.max_epochs or 0)
    assert not {"process_dataloader", "convert_input"} & {*vars(trainer.strategy), *vars(trainer.precision_plugin)}
    for directory in tmp_path.rglob("influence"):
        assert AuditReport.load(directory).status == "interrupted"


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        *((AuditRun, name) for name in ("take_over", "take_data", "epoch_ended", "finish_or_warn")),
        *((BatchListener, name) for name in ("batch_started", "before_backward", "before_step", "batch_ended")),
        (BatchListener, "after_backward"),
        (Recording, "state_dict"),
    ],
)
def test_whatever_fails_in_whichever_hook_training_goes_on_as_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: type, name: str
) -> None:
    """Only hooks before the first step were in nobody's way: an error at the second epoch ended hours of training."""
    (tmp_path / "audit.yaml").write_text("tracin: step" if name == "after_backward" else "")
    before, calls = getattr(owner, name), []

    def failing(*arguments: Any, **more: Any) -> Any:
        calls.append(name)
        if len(calls) >= 2 or name in ("take_over", "finish_or_warn"):
            raise ZeroDivisionError(f"in {name}")
        return before(*arguments, **more)

    models = []
    for path in ("", str(tmp_path / "audit.yaml")):
        monkeypatch.setenv(VARIABLE, path)
        torch.manual_seed(0)
        models.append(Classifier())
        keeper = pl.callbacks.ModelCheckpoint(tmp_path / "kept", save_top_k=-1, filename="{step}")
        trainer = make_trainer(tmp_path, callbacks=[keeper], enable_checkpointing=True, max_epochs=3)
        if path:
            monkeypatch.setattr(owner, name, failing)
            with pytest.warns(UserWarning, match=f"{VARIABLE}: th.*ZeroDivisionError"):
                trainer.fit(models[-1], loader(vectors()))
        else:
            trainer.fit(models[-1], loader(vectors()))
        assert trainer.global_step == 3 * len(loader(vectors()))
        assert trainer.state.finished
    assert calls
    assert not any(isinstance(each, UninvitedAudit) for each in trainer.callbacks)  # type: ignore[attr-defined]
    assert all(torch.equal(one, other) for one, other in zip(*(each.parameters() for each in models), strict=True))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "can't be read: .*No such file"),
        ("curvature: [", "can't be read"),
        ("- ekfac", "is no mapping"),
        ("curvatur: ekfac", "has curvatur; expected arguments of InfluenceAudit: curvature,"),
        ("curvature: ekfax", "curvature='ekfax'; expected one of"),
        ("tracin:\n  mode: never", "mode='never'; expected one of"),
        ("tracin:\n  evry: 2", "evry"),
    ],
)
def test_a_file_that_describes_no_audit_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None, said: str
) -> None:
    if content is not None:
        (tmp_path / "audit.yaml").write_text(content)
    monkeypatch.setenv(VARIABLE, str(tmp_path / "audit.yaml"))
    with pytest.raises(ValueError, match=f"{VARIABLE}=.*{said}"):
        callbacks()


def test_other_refusals_stay(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException):
        make_trainer(tmp_path, callbacks=[InfluenceAudit()]).fit(Classifier(), DataLoader(Stream(), batch_size=4))
