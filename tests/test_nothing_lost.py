"""Late errors, kills and resumptions: what is computed or recorded is kept, and what is missing is said."""

from __future__ import annotations

import errno
import io
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import CLASSES, FEATURES, Classifier, Validated, images, loader, make_trainer, vectors
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from which_lightning import (
    Callback,
    CSVLogger,
    MisconfigurationException,
    ModelCheckpoint,
    RichProgressBar,
    TensorBoardLogger,
    TQDMProgressBar,
    pl,
)

from lightning_influence import AuditReport, InfluenceAudit, TracIn
from lightning_influence.audit.store import tensors as files
from lightning_influence.audit.store.store import AuditStore, StoreError
from lightning_influence.callbacks import display
from lightning_influence.callbacks import run as audit_run
from lightning_influence.callbacks.query_report import QueryReport
from lightning_influence.training.checkpoints import Checkpoint, check_together

pytestmark = pytest.mark.usefixtures("unverified")

# ------------------------------------------------------------------------------------------------ late errors


class Gone(CSVLogger):
    """A tracking server that is gone when training has ended."""

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        if "influence/coverage" in metrics:
            raise ConnectionError("the server is gone")
        super().log_metrics(metrics, step)


class NoWriter(TensorBoardLogger):
    gone = False

    @property
    def experiment(self) -> Any:
        if self.gone:
            raise OSError("the volume is gone")
        return super().experiment


class Goes(Callback):
    """The volume goes before the audit, or comes back after it: Lightning itself needs it then."""

    def __init__(self, gone: bool) -> None:
        self.gone = gone

    def on_train_end(self, trainer: Any, module: Any) -> None:
        trainer.loggers[0].gone = self.gone

    @property
    def state_key(self) -> str:
        return f"Goes{self.gone}"


class NoImages(TensorBoardLogger):
    @property
    def experiment(self) -> Any:
        writer = super().experiment

        def fail(*_: Any) -> None:
            raise ValueError("no pictures today")

        writer.add_image = fail
        return writer


@pytest.mark.usefixtures("sure")
@pytest.mark.parametrize(
    ("kind", "said"),
    [(Gone, "logging to Gone"), (NoWriter, "logging to NoWriter"), (NoImages, "showing pictures in NoImages")],
)
def test_a_logger_that_fails_late(kind: Any, said: str, tmp_path: Path) -> None:
    """It used to replace the complete table by a partial one, with `report` None and the other loggers left out."""
    other = CSVLogger(tmp_path, "other", flush_logs_every_n_steps=1)
    audit = InfluenceAudit()
    loggers = [kind(tmp_path, "first"), other]
    trainer = make_trainer(tmp_path, callbacks=[Goes(True), audit, Goes(False)], logger=loggers)
    with pytest.warns(UserWarning, match=f"{said} failed, all else goes on") as caught:
        trainer.fit(Classifier(features=36), loader(images()))
    messages = [str(warning.message) for warning in caught if f"{said} failed" in str(warning.message)]
    assert len(messages) == len(set(messages))
    assert audit.has_report
    assert audit.report.directory is not None
    assert AuditReport.load(audit.report.directory).status == "complete"
    assert "influence/coverage" in (Path(other.log_dir) / "metrics.csv").read_text()


@pytest.mark.usefixtures("sure")
def test_pictures_that_fail_leave_the_table(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = NoImages(tmp_path, "board")
    with pytest.warns(UserWarning, match="showing pictures in NoImages failed.*no pictures today"):
        make_trainer(tmp_path, callbacks=[InfluenceAudit()], logger=logger).fit(
            Classifier(features=36), loader(images())
        )
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    assert "influence/candidates/text_summary" in events.Tags()["tensors"]
    assert "influence/coverage" in events.Tags()["scalars"]


@pytest.mark.parametrize(
    "full", ["net.1", "scores.parquet", "candidates.csv", "columns.md", "pairs.parquet", "manifest.json"]
)
def test_a_disk_that_is_full_at_the_end(full: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    audit = InfluenceAudit(queries="worst")
    replace, finishing = os.replace, [False]
    finish = audit_run.AuditRun.finish_or_warn

    def finished(self: Any, *args: Any) -> Any:
        result = finish(self, *args)
        finishing[0] = True
        return result

    def replaced(source: Any, target: Any) -> None:
        if finishing[0] and full in str(target):
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(audit_run.AuditRun, "finish_or_warn", finished)
    monkeypatch.setattr(os, "replace", replaced)
    with pytest.warns(UserWarning, match=r"could not be written to .*No space left.*report.save\(directory\)"):
        make_trainer(tmp_path, callbacks=[audit]).fit(Validated(), loader(vectors()), loader(vectors(7, 2)))
    report = audit.report
    assert report is not None
    assert report.directory is not None
    on_disk = AuditReport.load(report.directory)
    assert on_disk.status == ("recording" if full == "manifest.json" else "interrupted")
    assert ("self_influence" in on_disk.columns) == (full != "scores.parquet")
    assert on_disk.columns["times_seen"].tolist() == [2] * 22
    finishing[0] = False
    saved = AuditReport.load(report.save(tmp_path / "elsewhere").directory)  # type: ignore[arg-type]
    assert saved.status == "complete"
    assert saved.pairs is not None
    for name, values in report.columns.items():
        np.testing.assert_array_equal(saved.columns[name], values)


def test_a_disk_that_is_full_during_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a table nor a checkpoint that can't be written costs a pass; the next checkpoint stands for the steps."""
    replace = os.replace

    def replaced(source: Any, target: Any) -> None:
        if trainer.current_epoch == 0 and "manifest" not in str(target):
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    audit = InfluenceAudit()
    trainer = make_trainer(tmp_path, callbacks=[audit], max_epochs=3)
    monkeypatch.setattr(os, "replace", replaced)
    with pytest.warns(UserWarning, match="writing the table so far"):
        trainer.fit(Classifier(), loader(vectors()))
    assert audit.has_report
    assert audit.report.manifest["tracin_steps"] == [5, 10, 15]
    assert [(kept.step, kept.steps) for kept in audit.report.checkpoints()] == [(10, 10), (15, 5)]
    assert any("checkpoint of step 5 was not kept" in note for note in audit.report.manifest["notes"])


@pytest.mark.parametrize("when", ["on_train_epoch_end", "on_train_end"])
def test_a_directory_that_was_deleted_is_made_again(when: str, tmp_path: Path) -> None:
    class Tidy(Callback):
        pass

    setattr(Tidy, when, lambda *_: shutil.rmtree(tmp_path / "audit"))
    audit = InfluenceAudit(dirpath=tmp_path / "audit")
    make_trainer(tmp_path, callbacks=[Tidy(), audit], max_epochs=2).fit(Classifier(), loader(vectors()))
    assert audit.has_report
    on_disk = AuditReport.load(tmp_path / "audit")
    assert on_disk.status == "complete"
    np.testing.assert_array_equal(on_disk.columns["self_influence"], audit.report.columns["self_influence"])


@pytest.mark.parametrize("after", ["before the audit", "before the queries"])
@pytest.mark.parametrize("by_loader", [False, True])
def test_validation_data_that_are_gone_cost_their_columns_alone(
    after: str, by_loader: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Files(Dataset[Any]):
        gone = False

        def __len__(self) -> int:
            return 7

        def __getitem__(self, index: int) -> Any:
            if self.gone:
                raise OSError("the volume is gone")
            return vectors(7, 2)[index]

    class Unmount(Callback):
        def on_train_end(self, *_: Any) -> None:
            data.gone = after == "before the audit"

    def ask(*arguments: Any) -> Any:
        data.gone = True
        return asks(*arguments)

    data, asks = Files(), QueryReport.on_training
    monkeypatch.setattr(QueryReport, "on_training", ask)
    asked = DataLoader(data, 4)
    audit = InfluenceAudit(queries=asked if by_loader else "worst")
    with pytest.warns(UserWarning, match="the volume is gone|no validation examples"):
        make_trainer(tmp_path, callbacks=[Unmount(), audit]).fit(Validated(), loader(vectors()), asked)
    report = audit.report
    assert report is not None
    assert report.directory is not None
    assert AuditReport.load(report.directory).status == "complete"
    assert np.isfinite(report.columns["self_influence"]).all()
    assert ("harm" in report.columns) == (after == "before the queries")
    assert report.pairs is None
    assert any("no pairs of queries" in note for note in report.manifest["notes"])


# ----------------------------------------------------------------------------------------------------- kills


def killed(train: Callable[[], None]) -> None:
    """Run in a process of its own that is expected to kill itself."""
    child = os.fork()
    if not child:
        torch.set_num_threads(1)  # the pool of the parent's threads is not there
        try:
            train()
        finally:
            os._exit(3)
    for _ in range(600):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert os.WIFSIGNALED(status), "the run was to be killed"
            return
        time.sleep(0.1)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    pytest.fail("the run hangs")


def kill(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def trained(
    directory: Path, audit: Callback | None, *more: Callback, ckpt: Any = None, epochs: int = 3, **model: Any
) -> None:
    torch.manual_seed(3)
    keeper = ModelCheckpoint(directory / "kept", save_last=True, save_on_train_epoch_end=True)
    callbacks = [callback for callback in (audit, *more, keeper) if callback is not None]
    trainer = make_trainer(directory, callbacks=callbacks, max_epochs=epochs, enable_checkpointing=True, logger=False)
    trainer.fit(Validated(**model), loader(vectors()), loader(vectors(7, 2)), ckpt_path=ckpt)


@pytest.mark.parametrize(
    "arguments",
    [{}, {"tracin": "step"}, {"tracin": None, "curvature": "ggn", "damping": "trainer"}, {"queries": "worst"}],
    ids=["epoch", "step", "none", "queries"],
)
def test_an_audit_that_was_cut_goes_on(arguments: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed while the final scores are computed; Lightning calls nothing at the end of a run that is over already."""

    def adam(module: nn.Module) -> Any:
        return torch.optim.Adam(module.parameters(), lr=0.01)

    with monkeypatch.context() as patch:
        patch.setattr(audit_run, "influence_scores", kill)
        killed(lambda: trained(tmp_path / "cut", InfluenceAudit(**arguments), optimizer=adam))
    partial = AuditReport.load(tmp_path / "cut" / "influence")
    assert partial.status == "recording"
    assert partial.columns["times_seen"].tolist() == [3] * 22
    audit, whole = InfluenceAudit(**arguments), InfluenceAudit(**arguments)
    trained(tmp_path / "cut", audit, optimizer=adam, ckpt=tmp_path / "cut" / "kept" / "last.ckpt")
    trained(tmp_path / "whole", whole, optimizer=adam)
    assert audit.has_report
    assert whole.has_report
    assert AuditReport.load(audit.report.directory).status == "complete"  # type: ignore[arg-type]
    assert set(audit.report.columns) == set(whole.report.columns)
    for name, values in whole.report.columns.items():
        np.testing.assert_allclose(audit.report.columns[name], values, rtol=1e-6, atol=1e-9, err_msg=name)
    for name in ("tracin_steps", "notes", "examples", "coverage"):
        assert audit.report.manifest[name] == whole.report.manifest[name]
    if whole.report.pairs is not None:
        np.testing.assert_array_equal(audit.report.pairs["index"], whole.report.pairs["index"])  # type: ignore[index]
    kept = [[(c.step, c.steps) for c in each.report.checkpoints()] for each in (audit, whole)]  # type: ignore[union-attr]
    assert kept[0] == kept[1]
    # Once it is complete, it stays, and resuming makes the same once more.
    again = InfluenceAudit(**arguments)
    trained(tmp_path / "whole", again, optimizer=adam, ckpt=tmp_path / "whole" / "kept" / "last.ckpt")
    assert again.has_report
    assert again.report.directory != whole.report.directory
    for name, values in whole.report.columns.items():
        np.testing.assert_allclose(again.report.columns[name], values, rtol=1e-6, atol=1e-9, err_msg=name)


@pytest.mark.parametrize("tracin", ["epoch", "step", None])
def test_a_kill_in_a_later_epoch_leaves_a_table(tracin: Any, tmp_path: Path) -> None:
    class Kill(Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            if trainer.current_epoch == 1:
                kill()

    killed(lambda: trained(tmp_path, InfluenceAudit(tracin=tracin), Kill()))
    report = AuditReport.load(tmp_path / "influence")
    assert report.status == "recording"
    assert report.columns["times_seen"].tolist() == [1] * 22


def test_kept_checkpoints_stand_for_all_steps_after_a_kill(tmp_path: Path) -> None:
    """The killed run had dropped a checkpoint for a later one, which the resumed run does not have."""

    class Kill(Callback):
        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            if trainer.current_epoch == 3:
                kill()

    settings = TracIn(keep_checkpoints=2)
    killed(lambda: trained(tmp_path / "cut", InfluenceAudit(tracin=settings), Kill(), epochs=5))
    audit, whole = InfluenceAudit(tracin=settings), InfluenceAudit(tracin=settings)
    trained(tmp_path / "cut", audit, epochs=5, ckpt=tmp_path / "cut" / "kept" / "last.ckpt")
    trained(tmp_path / "whole", whole, epochs=5)
    assert audit.has_report
    assert whole.has_report
    kept = list(audit.report.checkpoints())
    assert sum(each.steps for each in kept) == 25
    assert sum(each.step_sizes["net.1.weight"] for each in kept) == pytest.approx(25 * 0.1)
    np.testing.assert_allclose(audit.report.columns["tracin"], whole.report.columns["tracin"], rtol=1e-6)


# ------------------------------------------------------------------------------------------- other arguments


@pytest.mark.parametrize(
    "then",
    [{"damping": 0.3}, {"curvature": "kfac"}, {"queries": "worst"}, {"factor_examples": 9}, {"fisher": "empirical"}],
    ids=lambda arguments: next(iter(arguments)),
)
def test_resuming_with_other_arguments_keeps_what_was_recorded(then: Any, tmp_path: Path) -> None:
    trained(tmp_path, InfluenceAudit(), epochs=2)
    audit = InfluenceAudit(**then)
    trained(tmp_path, audit, epochs=3, ckpt=tmp_path / "kept" / "last.ckpt")
    assert audit.has_report
    assert audit.report.columns["times_seen"].tolist() == [3] * 22
    assert audit.report.manifest["tracin_steps"] == [5, 10, 15]
    assert audit.report.manifest["notes"] == []
    assert [(kept.step, kept.steps) for kept in audit.report.checkpoints()] == [(5, 5), (10, 5), (15, 5)]


@pytest.mark.parametrize(
    ("first", "then", "named"),
    [
        ({"tracin": "step"}, {"tracin": "epoch"}, "another tracin"),
        ({"tracin": None}, {"tracin": "step"}, "another tracin"),
        ({}, {"layers": ["net.3"]}, "another layers"),
    ],
)
def test_resuming_with_another_tracin_says_what_it_lacks(first: Any, then: Any, named: str, tmp_path: Path) -> None:
    trained(tmp_path, InfluenceAudit(**first), epochs=2)
    audit = InfluenceAudit(**then)
    trained(tmp_path, audit, epochs=3, ckpt=tmp_path / "kept" / "last.ckpt")
    assert audit.has_report
    assert audit.report.columns["times_seen"].tolist() == [3] * 22
    (note,) = (note for note in audit.report.manifest["notes"] if "tracin lacks" in note)
    assert "the 10 steps before training was resumed" in note
    assert named in note
    assert sum(kept.steps for kept in audit.report.checkpoints()) == 15


def test_known_noise_that_is_told_once_the_audit_is_complete_is_measured(tmp_path: Path) -> None:
    trained(tmp_path, InfluenceAudit(), epochs=2)
    audit = InfluenceAudit(known_noise=[1, 2, 5])
    trained(tmp_path, audit, epochs=2, ckpt=tmp_path / "kept" / "last.ckpt")
    assert audit.has_report
    assert "self_influence" in audit.report.manifest["detection"]


@pytest.mark.parametrize("overhead", [0.25, None])
def test_an_audit_that_joins_says_which_epochs_it_lacks(overhead: float | None, tmp_path: Path) -> None:
    trained(tmp_path, None, epochs=2)
    audit = InfluenceAudit(overhead=overhead)
    trained(tmp_path, audit, epochs=3, ckpt=tmp_path / "kept" / "last.ckpt")
    assert audit.has_report
    (note,) = audit.report.manifest["notes"]
    assert "after 10 steps, in epoch 2: the epochs 0 to 1 and the steps before it are missing" in note


def test_two_audits_find_their_states_under_other_arguments(tmp_path: Path) -> None:
    """By their settings of TracIn, whatever their order."""
    trained(tmp_path, InfluenceAudit(tracin="step"), InfluenceAudit(), epochs=2)
    audits = InfluenceAudit(damping=0.3), InfluenceAudit(tracin="step", damping=0.3)
    trained(tmp_path, *audits, epochs=3, ckpt=tmp_path / "kept" / "last.ckpt")
    for audit in audits:
        assert audit.has_report
        assert audit.report.columns["times_seen"].tolist() == [3] * 22
        assert audit.report.manifest["notes"] == []
        assert np.isfinite(audit.report.columns["tracin"]).all()
    assert audits[0].has_report
    assert audits[0].report.manifest["tracin_steps"] == [5, 10, 15]


def test_a_fit_without_an_audit_says_why(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"no influence audit: no step was trained \(max_epochs=0"):
        trained(tmp_path, InfluenceAudit(), epochs=0)


def test_a_second_fit_with_nothing_to_train_keeps_the_report(tmp_path: Path) -> None:
    audit, model = InfluenceAudit(), Classifier()
    trainer = make_trainer(tmp_path, callbacks=[audit])
    trainer.fit(model, loader(vectors()))
    before = audit.report
    trainer.fit(model, loader(vectors()))
    assert before is not None
    assert audit.report is before
    assert audit.unlearner("diagonal") is not None


# ---------------------------------------------------------------------------------------------- huge examples

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(FEATURES, CLASSES),
    "deep": lambda: nn.Sequential(nn.Linear(FEATURES, 8), nn.ReLU(), nn.Linear(8, CLASSES)),
    "scaled": lambda: nn.Sequential(nn.PReLU(), nn.Linear(FEATURES, CLASSES)),
    "convolution": lambda: nn.Sequential(
        nn.Unflatten(1, (1, FEATURES)), nn.Conv1d(1, 4, 3), nn.Flatten(), nn.Linear(12, CLASSES)
    ),
}


class Still(pl.LightningModule):
    """Steps too small to move a weight."""

    def __init__(self, network: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = NETWORKS[network]()

    def training_step(self, batch: Any, _: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 1e-40)


@pytest.mark.parametrize(
    ("network", "curvature", "value"),
    [
        ("linear", "ekfac", 1e20),
        ("linear", "ggn", 1e36),
        ("deep", "kfac", 1e30),
        ("deep", "ggn", 1e20),
        ("scaled", "diagonal", 1e20),
        ("convolution", "block_ggn", 1e25),
    ],
)
@pytest.mark.parametrize("place", [0, 21])
def test_one_huge_example_is_listed_and_spoils_nobody(
    network: str, curvature: Any, value: float, place: int, tmp_path: Path
) -> None:
    """Its squares overflow: it ended training before the first step, or made everybody's scores NaN."""
    x, y = vectors().tensors
    spoilt = x.clone()
    spoilt[place, 0] = value
    others = [index for index in range(22) if index != place]
    columns = []
    for number, data in enumerate((TensorDataset(spoilt, y), TensorDataset(x[others], y[others]))):
        audit = InfluenceAudit(tracin=None, curvature=curvature, fisher="empirical", damping="relative")
        trainer = make_trainer(tmp_path / str(number), callbacks=[audit], max_epochs=1, logger=False)
        trainer.fit(Still(network), loader(data))
        assert audit.has_report
        assert audit.report.nonfinite.tolist() == ([] if number else [place])
        columns.append(audit.report.columns)
    for name in ("grad_norm_squared", "self_influence", "loss", "neighbour_disagreement"):
        np.testing.assert_allclose(columns[0][name][others], columns[1][name], rtol=1e-3, atol=1e-6, err_msg=name)


class Guarded(Still):
    """Skips batches whose loss is not finite, as many do."""

    def training_step(self, batch: Any, _: int) -> Any:
        loss = super().training_step(batch, _)
        return loss if torch.isfinite(loss) else None


@pytest.mark.parametrize("spoilt", [[7], list(range(6)), [0, 4, 9, 13, 21]], ids=["one", "a whole batch", "everywhere"])
@pytest.mark.parametrize("arguments", [{}, {"tracin": "step"}, {"curvature": "ggn", "damping": 0.1}], ids=str)
def test_examples_without_a_loss_are_listed(spoilt: list[int], arguments: Any, tmp_path: Path) -> None:
    """A pass whose step returned None for a batch lost the audit; so did one such example in the first look."""
    x, y = (tensor.clone() for tensor in vectors().tensors)
    x[spoilt, 0] = float("nan")
    others = [index for index in range(22) if index not in spoilt]
    columns = []
    for number, data in enumerate((TensorDataset(x, y), TensorDataset(x[others], y[others]))):
        audit = InfluenceAudit(fisher="empirical", factor_examples=None, **arguments)
        trainer = make_trainer(tmp_path / str(number), callbacks=[audit], max_epochs=2, logger=False)
        trainer.fit(Guarded("deep"), loader(data))
        assert audit.has_report
        notes, steps = audit.report.manifest["notes"], trainer.global_step
        assert number or any(f"{len(spoilt)} of 22 examples are not scored" in note for note in notes)
        assert number or any("the step returns no loss for it" in note for note in notes)
        assert number or any("of 10 training batches had no loss or no backward pass" in note for note in notes)
        assert not any("failed" in note for note in notes)
        assert steps
        columns.append(audit.report.columns)
    assert columns[0]["index"].tolist() == others
    for name in ("grad_norm_squared", "self_influence", "loss", "neighbour_disagreement"):
        np.testing.assert_allclose(columns[0][name], columns[1][name], rtol=1e-4, atol=1e-6, err_msg=name)


def test_a_step_that_never_returns_a_loss_is_refused(tmp_path: Path) -> None:
    class Never(Still):
        def training_step(self, batch: Any, _: int) -> Any:
            return None

    trainer = make_trainer(tmp_path, callbacks=[InfluenceAudit()], max_epochs=1, logger=False)
    with pytest.raises(MisconfigurationException, match="`training_step` returned NoneType instead of a loss"):
        trainer.fit(Never("linear"), loader(vectors()))


# ---------------------------------------------------------------------------------------------------- display


@pytest.mark.parametrize("place", [0, 1])
def test_rich_bars_show_the_passes(place: int, tmp_path: Path) -> None:
    """A plain bar inside ends in a RecursionError: rich redirects what it writes, and so on."""
    screen = io.StringIO()
    bar = RichProgressBar(refresh_rate=100, console_kwargs={"file": screen, "force_terminal": True})
    audit = InfluenceAudit()
    callbacks: list[Callback] = [audit]
    callbacks.insert(place, bar)
    trainer = make_trainer(tmp_path, callbacks=callbacks, enable_progress_bar=True)
    trainer.fit(Validated(), loader(vectors()), loader(vectors(7, 2)))
    assert audit.has_report
    assert audit.report.manifest["tracin_steps"] == [5, 10]
    assert bar not in display._BROKEN


@pytest.mark.parametrize("broken", ["update", "add_task"])
def test_a_rich_display_that_breaks_is_off(broken: str, tmp_path: Path) -> None:
    bar = RichProgressBar(console_kwargs={"file": io.StringIO(), "force_terminal": True})
    audit = InfluenceAudit()

    class Break(Callback):
        def on_train_end(self, *_: Any) -> None:
            def fail(*_: Any, **__: Any) -> None:
                raise RecursionError("maximum recursion depth exceeded")

            setattr(bar.progress, broken, fail)

    make_trainer(tmp_path, callbacks=[Break(), audit, bar], enable_progress_bar=True).fit(
        Classifier(), loader(vectors())
    )
    assert audit.has_report
    assert bar in display._BROKEN


def test_plain_bars_are_off_unless_somebody_watches(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    audit = InfluenceAudit()
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    for watched in (False, True):
        monkeypatch.setattr(sys.stderr, "isatty", lambda watched=watched: watched)
        trainer = make_trainer(tmp_path, callbacks=[audit, TQDMProgressBar()], enable_progress_bar=True, logger=False)
        trainer.fit(Classifier(), loader(vectors()))
        assert ("influence: self-influence" in capfd.readouterr().err) == watched
    assert audit.has_report


# ------------------------------------------------------------------------------------------------------ files


def test_headers_are_enough_to_count_and_check_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every look used to read all tensors of all files."""
    store, module = AuditStore.create(tmp_path / "audit"), nn.Linear(4, 3)
    for step in (10, 20, 30):
        store.checkpoints().write(Checkpoint.of(module, step, step_sizes={"weight": 0.1}, steps=10))
    reads: list[Path] = []
    whole = files.whole
    monkeypatch.setattr(files, "whole", lambda path, *limit: (reads.append(path), whole(path, *limit))[1])
    checkpoints = store.checkpoints()
    assert len(checkpoints) == 3
    assert len(checkpoints[1:]) == 2
    assert [each.step for each in checkpoints[1:].outlines] == [20, 30]
    check_together(checkpoints, module)
    with pytest.raises(ValueError, match="has the shape"):
        check_together(checkpoints, nn.Linear(5, 3))
    assert reads == []
    assert [each.step for each in checkpoints[1:]] == [20, 30]
    assert len(reads) == 2


def a_store(directory: Path) -> AuditStore:
    store = AuditStore.create(directory)
    numbers = np.random.default_rng(0).standard_normal(50)
    text = np.array([f"class {n % 3}" for n in range(50)], dtype=object)
    yes = np.ones(50, dtype=bool)
    ranks = np.arange(1, 51)
    table = {"index": ranks - 1, "rank": ranks, "candidate": yes, "finite": yes, "loss": numbers, "name": text}
    store.write_scores(table)
    store.write_factors("net", {"a": torch.randn(6, 6), "b": torch.randn(3).double()}, {"kind": "ekfac"})
    store.checkpoints().write(Checkpoint.of(nn.Linear(4, 3), 7, step_sizes={"weight": 0.125}, steps=7))
    store.write_manifest({"status": "complete", "notes": ["a"], "coverage": {"summary": "all"}})
    return store


def everything(store: AuditStore) -> list[Any]:
    """All numbers of an audit, as one list."""
    report = AuditReport.load(store.directory)
    columns = report.columns if str(report) else {}
    (tensors, about), (kept,) = store.factors()["net"], store.checkpoints()
    listed: list[Any] = [(name, values.dtype, values.tolist()) for name, values in columns.items()]
    listed += [(name, value.dtype, value.tolist()) for name, value in sorted({**tensors, **kept.parameters}.items())]
    return [*listed, about["kind"], kept.step, kept.steps, kept.step_sizes, kept.optimizer]


@pytest.mark.parametrize("name", ["scores.parquet", "factors/net.safetensors", "checkpoints/step-00000007.safetensors"])
def test_flipped_bits_are_errors(name: str, tmp_path: Path) -> None:
    """Without checksums, three in ten are read as other numbers."""
    store = a_store(tmp_path / "audit")
    before, path = everything(store), store.directory / name
    content, generator = path.read_bytes(), np.random.default_rng(5)
    errors = 0
    for place in generator.integers(0, 8 * len(content), 150).tolist():
        flipped = bytearray(content)
        flipped[place // 8] ^= 1 << place % 8
        path.write_bytes(flipped)
        try:
            assert everything(store) == before
        except StoreError:
            errors += 1
    assert errors > 75


ODD: dict[str, bytes] = {
    "empty": b"",
    "garbage": bytes(range(256)) * 4,
    "deep": b"[" * 100_000,
    "not unicode": b'{"schema_version": 1, "status": "\xff"}',
    "not finite": b'{"schema_version": 1, "status": "complete", "seconds": {"a": NaN}}',
    "numbers for lists": b'{"schema_version": 1, "status": "complete", "notes": 5}',
    "nothing for lists": b'{"schema_version": 1, "status": "complete", "notes": null}',
    "lists for mappings": b'{"schema_version": 1, "status": "complete", "seconds": [1]}',
    "text for numbers": b'{"schema_version": 1, "status": "complete", "seconds": {"a": "b"}}',
    "lacking": b'{"schema_version": 1, "status": "complete", "damping_sweep": {"factors": [1]}}',
    "huge header": (2**62).to_bytes(8, "little") + b"{}",
    "huge shape": (97).to_bytes(8, "little")
    + b'{"parameters/w":{"dtype":"F32","shape":[1099511627776,1099511627776],"data_offsets":[0,8]}}'.ljust(97)
    + bytes(8),
}


@pytest.mark.parametrize("odd", [*ODD, "a folder", "a pipe", "a link to nothing"])
def test_odd_files_are_errors_that_name_them(odd: str, tmp_path: Path) -> None:
    store = a_store(tmp_path / "audit")
    names = ["manifest.json", "scores.parquet", "pairs.parquet"]
    names += ["factors/net.safetensors", "checkpoints/step-00000007.safetensors"]
    for name in names:
        path = store.directory / name
        before = path.read_bytes() if path.exists() else None
        path.unlink(missing_ok=True)
        if odd in ODD:
            path.write_bytes(ODD[odd])
        elif odd == "a folder":
            path.mkdir()
        elif odd == "a pipe":
            os.mkfifo(path)
        else:
            path.symlink_to("nowhere")
        with pytest.raises(StoreError, match=str(store.directory)):
            everything(store)
        path.rmdir() if odd == "a folder" else path.unlink()
        if before is not None:
            path.write_bytes(before)


def test_a_table_that_claims_more_than_there_is_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = a_store(tmp_path / "audit")
    monkeypatch.setattr("lightning_influence.audit.store.tables.available_bytes", lambda device: 1000)
    with pytest.raises(StoreError, match=r"scores.parquet cannot be read: it claims 300 entries"):
        store.read_scores()


@pytest.mark.parametrize(
    "text", [" =1+1", "\ufeff=1", "\u00a0@SUM(A1)", "\x00-1", "\u200b+1", "\n\t =x", "\x0b\uff1d1"]
)
def test_formulas_behind_what_spreadsheets_drop(text: str, tmp_path: Path) -> None:
    store = AuditStore.create(tmp_path / "audit")
    names = [text, "a =b", " plain"]
    store.write_candidates({"candidate": [True] * 3, "rank": [1, 2, 3], "label": [0, 1, 2]}, label_names=names)
    written = (store.directory / "candidates.csv").read_bytes().decode()
    assert f"'{text}" in written
    assert "'a" not in written
    assert "' plain" not in written
