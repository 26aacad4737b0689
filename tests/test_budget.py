"""One budget for everything: at which ends of epochs TracIn has its passes, and what is said of it."""

from __future__ import annotations

import gc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import Classifier, Validated, loader, make_trainer, vectors
from which_lightning import Callback, EarlyStopping, ModelCheckpoint, pl

from lightning_influence import AuditReport, InfluenceAudit, TracIn
from lightning_influence.callbacks import bridge, budget, showing
from lightning_influence.callbacks.from_child import FromChild
from lightning_influence.callbacks.showing import SHARE, Watched
from lightning_influence.training.flight.pace import Pace
from lightning_influence.training.pass_schedule import PassSchedule

pytestmark = pytest.mark.usefixtures("unverified")


def schedule(
    overhead: float | None = 0.25, *, always: float = 5.0, each: float = 0.0, one: float = 1.0
) -> PassSchedule:
    made = PassSchedule(TracIn(mode="auto", overhead=overhead))
    made.decide(always, each, one)
    return made


@pytest.mark.parametrize(
    ("epochs", "spacing"),
    [(1, None), (8, None), (20, None), (24, 12), (31, 16), (32, 8), (47, 12), (48, 6), (100, 13), (1000, 125)],
)
def test_as_many_ends_as_fit(epochs: int, spacing: int | None) -> None:
    """Of 24 epochs a quarter is 6: five for what is always done, one for a pass before the last."""
    assert schedule().spacing(epochs) == spacing


@pytest.mark.parametrize(("always", "one"), [(0.0, 0.0), (0.3, 0.02), (5.0, 0.7), (4.0, 12.0)])
def test_the_budget_is_kept_and_used(always: float, one: float) -> None:
    made = schedule(always=always, one=one)
    for epochs in range(1, 300):
        ends = [end for end in range(1, epochs) if made.due(end, epochs)]
        assert len(ends) < 8
        if ends:
            assert always + one * len(ends) <= 0.25 * epochs
            assert made.share(epochs) == pytest.approx((always + one * len(ends)) / epochs)
            assert set(np.diff([0, *ends])) == {ends[0]}, "evenly spaced"
        else:
            assert epochs == 1 or always + one > 0.25 * epochs, "there was room for one more"


def test_without_a_limit_every_end_is_due() -> None:
    """Until it is known what fits, too."""
    undecided = PassSchedule(TracIn(mode="auto", overhead=0.1))
    assert not undecided.decided
    for every in (schedule(None), undecided, PassSchedule(TracIn()), PassSchedule(None)):
        assert [every.due(end, 500) for end in range(1, 500)] == [True] * 499


def test_a_schedule_goes_with_its_budget() -> None:
    state = schedule(0.5).state_dict()
    same, other = (PassSchedule(TracIn(mode="auto", overhead=overhead)) for overhead in (0.5, 0.1))
    for each in (same, other):
        each.load_state_dict(state)
    assert (same.always, same.one, same.decided) == (5.0, 1.0, True)
    assert not other.decided


# ----------------------------------------------------------------------------------------------- how long it lasts


class _Asked(Callback):
    def __init__(self) -> None:
        self.found: list[tuple[int, int | None]] = []

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.found.append(bridge.expected_epochs(trainer))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"max_epochs": 3}, [(3, 3)] * 3),
        ({"max_epochs": 30, "max_steps": 8}, [(2, 2)] * 2),
        ({"max_epochs": -1, "max_steps": 13}, [(3, 3)] * 3),
        ({"max_epochs": -1, "max_steps": 4, "accumulate_grad_batches": 2}, [(2, 2)] * 2),
        ({"max_epochs": 9, "max_time": {"hours": 1}, "callbacks": "early"}, [(2, 9), (4, 9), (4, 9), (8, 9)]),
        ({"max_epochs": 3, "max_time": {"hours": 1}}, [(2, 3), (3, 3), (3, 3)]),
    ],
)
def test_expected_epochs(arguments: dict[str, Any], expected: Any, tmp_path: Path) -> None:
    asked, arguments = _Asked(), dict(arguments)
    stop = EarlyStopping("val_loss", patience=3, min_delta=1e9) if arguments.pop("callbacks", None) else None
    trainer = make_trainer(tmp_path, callbacks=[each for each in (asked, stop) if each is not None], **arguments)
    trainer.fit(Validated(), loader(vectors()), loader(vectors()))
    assert asked.found == expected


# ------------------------------------------------------------------------------------------------------- in a run


def fit(directory: Path, audit: InfluenceAudit, epochs: int, **arguments: Any) -> AuditReport:
    torch.manual_seed(3)
    ckpt_path = arguments.pop("ckpt_path", None)
    trainer = make_trainer(
        directory, max_epochs=epochs, callbacks=[audit, *arguments.pop("callbacks", [])], **arguments
    )
    trainer.fit(Classifier(), loader(vectors()), ckpt_path=ckpt_path)
    return audit.report


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A training that is worth timing, and what its clock says: of an epoch, the rest takes 1.2 times, a pass .5."""
    monkeypatch.setattr(budget, "_TINY", -1)
    monkeypatch.setattr(budget.RunBudget, "_measured", lambda *_: (1.2, 0.0, 0.5, 1.0))


def steps(ends: list[int]) -> list[int]:
    return [5 * end for end in ends]


def test_a_tiny_training_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its ends of epochs are a matter of their number alone, or two runs of a user's tests would differ."""
    monkeypatch.setattr(budget.RunBudget, "_measured", None)
    report = fit(tmp_path, InfluenceAudit(curvature="identity"), 5)
    assert report.manifest["tracin_steps"] == steps([1, 2, 3, 4, 5])
    assert not [note for note in report.manifest["notes"] if "overhead" in note]
    report = fit(tmp_path, InfluenceAudit(curvature="identity"), 12)
    assert report.manifest["tracin_steps"] == steps([2, 4, 6, 8, 10, 12])


@pytest.mark.usefixtures("timed")
@pytest.mark.parametrize(
    ("epochs", "tracin", "overhead", "ends"),
    [
        (4, "auto", 0.25, [4]),
        (12, "auto", 0.25, [3, 6, 9, 12]),
        (12, "auto", None, list(range(1, 13))),
        (12, "epoch", 0.25, list(range(1, 13))),
        (12, TracIn(every_n_epochs=4), 0.25, [4, 8, 12]),
        (12, TracIn(mode="auto", overhead=0.15), 0.25, [6, 12]),
        (12, TracIn(mode="auto", overhead=0.9), 0.25, [3, 6, 9, 12]),
    ],
)
def test_passes_within_the_budget(
    epochs: int, tracin: Any, overhead: float | None, ends: list[int], tmp_path: Path
) -> None:
    audit = InfluenceAudit(curvature="identity", tracin=tracin, overhead=overhead)
    report = fit(tmp_path, audit, epochs)
    assert report.manifest["tracin_steps"] == steps(ends)
    told = [note for note in report.manifest["notes"] if "overhead" in note]
    thinned = len(ends) < epochs and not (isinstance(tracin, TracIn) and tracin.mode == "epoch")
    assert len(told) == thinned
    assert not thinned or f"{len(ends)} of {epochs} ends of epochs" in told[0]
    # The steps between two count with the later one.
    assert sum(each.steps for each in report.checkpoints()) == 5 * epochs


@pytest.mark.usefixtures("timed")
def test_a_resumed_run_keeps_its_rhythm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    straight = fit(tmp_path / "straight", InfluenceAudit(curvature="identity", overhead=0.25), 12)
    keeper = ModelCheckpoint(dirpath=tmp_path / "kept", filename="{epoch}", save_top_k=-1)
    first = fit(
        tmp_path / "first",
        InfluenceAudit(curvature="identity", overhead=0.25),
        12,
        callbacks=[keeper],
        enable_checkpointing=True,
    )
    monkeypatch.setattr(budget.RunBudget, "_measured", None)  # a slower machine would have it otherwise
    resumed = fit(
        tmp_path / "second",
        InfluenceAudit(curvature="identity", overhead=0.25),
        12,
        ckpt_path=str(tmp_path / "kept" / "epoch=6.ckpt"),
    )
    for each in (first, resumed):
        assert each.manifest["tracin_steps"] == straight.manifest["tracin_steps"] == steps([3, 6, 9, 12])
        np.testing.assert_allclose(each.columns["tracin"], straight.columns["tracin"], rtol=1e-6)


def test_what_was_recorded_at_every_end_is_gone_on_with(tmp_path: Path) -> None:
    """The default was `tracin="epoch"` once: its checkpoints hold no schedule, and their sums are as good."""
    keeper = ModelCheckpoint(dirpath=tmp_path / "kept", filename="{epoch}", save_top_k=-1)
    before = InfluenceAudit(curvature="identity", tracin="epoch")
    whole = fit(tmp_path / "first", before, 3, callbacks=[keeper], enable_checkpointing=True)
    path = tmp_path / "kept" / "epoch=1.ckpt"
    content = torch.load(path, weights_only=False)
    for key in [key for key in content["callbacks"] if key.startswith("InfluenceAudit")]:
        content["callbacks"][key]["parts"].pop("schedule")
    torch.save(content, path)
    report = fit(tmp_path / "second", InfluenceAudit(curvature="identity"), 3, ckpt_path=str(path))
    assert report.manifest["tracin_steps"] == steps([1, 2, 3])
    np.testing.assert_allclose(report.columns["tracin"], whole.columns["tracin"], rtol=1e-6)


def test_what_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before training what will be done and what it costs, after the first epoch what fits: measured, not made up."""
    lines: list[str] = []
    monkeypatch.setattr("lightning_influence.callbacks.reporting.rank_zero_info", lines.append)
    monkeypatch.setattr(budget, "_TINY", -1)
    fit(tmp_path, InfluenceAudit(), 2)
    before, after, *_ = lines
    assert "after as many epochs as overhead=0.1" in before
    assert "the final audit of ekfac take about " in before
    assert "Of 2 epochs, about 1 s, the audit adds " in after
    assert after.endswith("%: what is done in any case takes more than overhead=0.1")
    lines.clear()
    fit(tmp_path, InfluenceAudit(tracin="epoch"), 1)
    assert "TracIn after every epoch" in lines[0]
    lines.clear()
    fit(tmp_path, InfluenceAudit(tracin=None), 1)
    assert "without TracIn" in lines[0]
    assert not any("the audit adds" in line for line in lines)


def test_an_epoch_is_that_of_its_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However few of them were timed: a run that is resumed within its first epoch has the rest of it alone."""
    monkeypatch.setattr(budget, "_TINY", -1)
    keeper = ModelCheckpoint(dirpath=tmp_path / "kept", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    fit(tmp_path / "first", InfluenceAudit(curvature="identity"), 2, callbacks=[keeper], enable_checkpointing=True)
    clock, found = iter(range(1000)), list[float]()
    monkeypatch.setattr(Pace, "clock", lambda self: 0.0)  # recording takes none of it
    monkeypatch.setattr(budget, "time", SimpleNamespace(perf_counter=lambda: next(clock)))  # a second each
    measured = budget.RunBudget._measured
    monkeypatch.setattr(
        budget.RunBudget, "_measured", lambda *given: found.append(measured(*given)[3]) or measured(*given)
    )
    for step, epochs in ((0, 2), (3, 2)):
        path = {"ckpt_path": str(tmp_path / "kept" / f"step={step}.ckpt")} if step else {}
        fit(tmp_path / f"{step}", InfluenceAudit(curvature="identity"), epochs, **path)
    assert found == [5.0, 5.0]


def test_what_a_pass_takes_is_read_off_a_forward_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without classes off the one that looks for paths: the first batch of all, cold, is ten times too long.

    The first look ends with two examples then: shared out over all, a pass would seem to take next to no time.
    """
    over: list[int] = []
    heard = budget.RunBudget.went_over
    monkeypatch.setattr(
        budget.RunBudget, "went_over", lambda self, *given: over.append(given[1]) or heard(self, *given)
    )
    squares = Classifier(classes=1, loss=lambda outputs, batch: F.mse_loss(outputs, batch[1][:, None].float()))
    for model, expected in ((squares, [22]), (Classifier(), [22, 22])):
        over.clear()
        audit = InfluenceAudit(curvature="identity")
        make_trainer(tmp_path, callbacks=[audit]).fit(model, loader(vectors()))
        assert over == expected
        assert audit._run is not None
        assert audit._run.budget._forward


@pytest.mark.parametrize("resumed", [False, True], ids=["limited", "resumed"])
def test_a_run_without_a_look_before_training_times_one(
    resumed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else its passes would be taken to be as slow as the first batch of all, and be left out."""
    told: list[tuple[float, float | None]] = []
    monkeypatch.setattr(budget, "_TINY", -1)

    def measured(self: budget.RunBudget, *_: Any) -> tuple[float, float, float, float]:
        told.append((self._look, self._forward))
        return 1.2, 0.0, 0.5, 1.0

    monkeypatch.setattr(budget.RunBudget, "_measured", measured)
    monkeypatch.setattr(budget, "_TRIED", 7)
    heard = budget.RunBudget.went_over
    monkeypatch.setattr(budget.RunBudget, "went_over", lambda self, _, examples: heard(self, 2.0, examples))
    arguments: dict[str, Any] = {"limit_train_batches": 2}
    if resumed:
        save = ModelCheckpoint(tmp_path / "kept", every_n_train_steps=2, save_top_k=-1)
        fit(tmp_path, InfluenceAudit(curvature="identity"), 1, callbacks=[save], max_steps=2, enable_checkpointing=True)
        (kept,) = (tmp_path / "kept").glob("*.ckpt")
        arguments = {"ckpt_path": kept}
        told.clear()
    fit(tmp_path, InfluenceAudit(curvature="identity"), 2, **arguments)
    ((look, forward),) = told
    assert look > 0
    assert forward == 2 / 7


def test_validation_within_an_epoch_is_no_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is that after its last batch: a batch takes a second here, validation a hundred."""
    now, found = [0.0], list[float]()

    class Slow(Validated):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            now[0] += 1
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            now[0] += 100
            return super().validation_step(batch, batch_idx)

    monkeypatch.setattr(budget, "_TINY", -1)
    monkeypatch.setattr(Pace, "clock", lambda self: 0.0)
    monkeypatch.setattr(budget, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    measured = budget.RunBudget._measured
    monkeypatch.setattr(
        budget.RunBudget, "_measured", lambda *given: found.append(measured(*given)[3]) or measured(*given)
    )
    for interval in (2, 1.0):
        audit = InfluenceAudit(curvature="identity")
        trainer = make_trainer(tmp_path, max_epochs=1, val_check_interval=interval, callbacks=[audit])
        trainer.fit(Slow(), loader(vectors()), loader(vectors()))
    assert found == [5.0, 5.0]


def test_recording_counts_in_every_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes .05 of each epoch leaves .05 of a budget of .1, however long training is."""
    assert schedule(0.1, always=0.0, each=0.05).spacing(19) is None
    assert schedule(0.1, always=0.0, each=0.05).spacing(20) == 10
    assert schedule(0.1, always=0.0, each=0.2).spacing(10**6) is None
    assert schedule(0.1, always=1.0, each=0.05, one=9.0).share(10) == pytest.approx(0.15)
    ticks, found = iter(range(10**6)), list[tuple[float, ...]]()
    monkeypatch.setattr(budget, "_TINY", -1)
    monkeypatch.setattr(Pace, "clock", lambda self: next(ticks) / 1000)  # each hook takes a millisecond
    measured = budget.RunBudget._measured
    monkeypatch.setattr(budget.RunBudget, "_measured", lambda *given: found.append(measured(*given)) or found[0])
    fit(tmp_path, InfluenceAudit(curvature="identity"), 1)
    _, each, _, epoch = found[0]
    hooks = 3  # of a batch: its start, before its backward pass, before the step
    assert each - SHARE * epoch == pytest.approx(5 * hooks / 1000)


def test_what_can_not_be_decided_costs_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It used to fail again at each end of an epoch, and look and pass with it."""

    def fail(*_: Any) -> Any:
        raise ValueError("no clock")

    monkeypatch.setattr(budget, "_TINY", -1)
    monkeypatch.setattr(budget.RunBudget, "_measured", fail)
    with pytest.warns(UserWarning, match=r"can't tell how many passes for TracIn .* \(ValueError: no clock\)") as said:
        report = fit(tmp_path, InfluenceAudit(curvature="identity"), 4)
    assert len([each for each in said if "no clock" in str(each.message)]) == 1
    assert report.manifest["tracin_steps"] == steps([4])
    assert not [note for note in report.manifest["notes"] if "failed" in note]


def test_a_tiny_training_without_an_end_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stop(Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            trainer.should_stop = trainer.current_epoch == 2

    asked: list[int] = []
    monkeypatch.setattr(budget.RunBudget, "_measured", lambda *_: asked.append(1))
    fit(tmp_path, InfluenceAudit(curvature="identity"), -1, callbacks=[Stop()])
    assert not asked


def test_looks_grow_with_the_logarithm_of_the_epochs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of labels that training learns slowly there was one after every epoch, half an epoch each."""
    monkeypatch.setattr("lightning_influence.training.evidence.EvidenceRecord.complete", False)
    looked: list[int] = []
    monkeypatch.setattr(budget.RunBudget, "looked", lambda self, seconds: looked.append(1))
    fit(tmp_path, InfluenceAudit(curvature="identity", tracin=None), 12)
    assert len(looked) == 1 + len([1, 2, 3, 4, 8])


# ------------------------------------------------------------------------------------- what is written meanwhile


def test_what_is_shown_takes_a_small_share(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(showing, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    watched, written = Watched(), list[float]()
    with watched.taking(whole=False):  # a table alone does not tell how long a page takes
        now[0] += 0.05
    for second in range(1, 1000):
        now[0] += 1.0
        if watched.due:
            written.append(second)
            with watched.taking(whole=True):
                now[0] += 2.0
    assert written[0] == 30
    assert 3 <= len(written) <= 5, "two seconds each"
    assert 0.05 + 2.0 * len(written) <= SHARE * now[0]


def test_a_note_that_nobody_reads_is_removed() -> None:
    child = FromChild()
    file = child._file
    file.write_text("{}", encoding="utf-8")
    del child
    gc.collect()
    assert not file.exists()


# ------------------------------------------------------------------------------------------------------ arguments


@pytest.mark.parametrize("number", [np.float64, np.float32])
@pytest.mark.parametrize("mode", ["auto", "step"])
def test_numbers_of_numpy_do_not_get_into_checkpoints(
    number: Any, mode: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget, "_TINY", -1)
    tracin = TracIn(mode=mode, overhead=number(0.5), keep_checkpoints=np.int64(2))
    audit = InfluenceAudit(tracin=tracin, factor_examples=np.int64(8), damping=number(0.1))
    trainer = make_trainer(tmp_path, callbacks=[audit])
    trainer.fit(Classifier(), loader(vectors()))
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    torch.load(tmp_path / "end.ckpt", weights_only=True)


@pytest.mark.parametrize("overhead", [0, -0.1, "0.2", True, float("nan")])
def test_an_overhead_that_is_none(overhead: Any) -> None:
    with pytest.raises(ValueError, match=r"overhead=.*; expected a share of the training time > 0, such as 0.1, or"):
        InfluenceAudit(overhead=overhead)


def test_how_often_is_found_out() -> None:
    with pytest.raises(ValueError, match='every_n_epochs=2 is what mode="auto" finds out; pass mode="epoch" to set it'):
        TracIn(mode="auto", every_n_epochs=2)


def test_in_flight_within_the_same_budget() -> None:
    for own, whole, least in ((0.5, 0.25, 0.25), (0.1, 0.25, 0.1), (0.5, None, 0.5), (None, 0.25, None)):
        audit = InfluenceAudit(tracin=TracIn(mode="step", overhead=own), overhead=whole)
        assert audit.arguments.tracin == TracIn(mode="step", overhead=least)
