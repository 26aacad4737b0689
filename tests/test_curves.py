"""Curves of the examples over the epochs: recorded, kept in files, taken over, thinned, and shown."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import Classifier, Numbered, loader, make_trainer, vectors
from torch import Tensor, nn
from torch.utils.data import SubsetRandomSampler, TensorDataset
from which_lightning import ModelCheckpoint

from lightning_influence import AuditReport, InfluenceAudit
from lightning_influence.audit.curves import SUGGESTED, Curves, sparkline
from lightning_influence.core import distributed
from lightning_influence.training import class_shares
from lightning_influence.training import curves as recorded
from lightning_influence.training.batch_record import BatchRecord
from lightning_influence.training.curves import CurveRecord
from lightning_influence.training.dynamics import RIVAL, TrainingDynamics, _rivals

pytestmark = pytest.mark.usefixtures("unverified")


class Diary(Classifier):
    """Notes loss, margin and probability of each visit by epoch."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.seen: list[tuple[int, int, float, float, float]] = []
        self.chances: dict[tuple[int, int], Tensor] = {}  # by epoch and example, of every class

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y, indices = batch
        logits = self(x)
        losses = F.cross_entropy(logits, y, reduction="none").detach()
        others = logits.detach().clone()
        own = others.gather(1, y[:, None])[:, 0]
        others.scatter_(1, y[:, None], -torch.inf)
        for index, chances in zip(indices.tolist(), logits.detach().softmax(1), strict=True):
            self.chances[self.current_epoch, index] = chances
        for each in zip(indices.tolist(), losses.tolist(), (own - others.amax(1)).tolist(), strict=True):
            self.seen.append((self.current_epoch, *each, float(np.exp(-each[1]))))
        return F.cross_entropy(logits, y)

    def expected(self, epochs: int, size: int = 22) -> dict[str, np.ndarray[Any, Any]]:
        tables = {}
        for place, name in enumerate(recorded.CURVES, 2):
            values = [[[v[place] for v in self.seen if v[:2] == (e, n)] for e in range(epochs)] for n in range(size)]
            tables[name] = np.array([[np.mean(v) if v else np.nan for v in row] for row in values])
        return tables


def fit(
    folder: Path, model: Any, data: Any, *, epochs: int = 3, ckpt: Any = None, callbacks: Any = (), **own: Any
) -> Any:
    torch.manual_seed(3)
    audit = InfluenceAudit()
    own = {"max_epochs": epochs, "callbacks": [audit, *callbacks], "enable_checkpointing": bool(callbacks), **own}
    make_trainer(folder, **own).fit(model, data, ckpt_path=ckpt)
    assert audit.has_report, audit
    return audit.report


def check(curves: Curves, expected: dict[str, Any]) -> None:
    assert set(curves) - {SUGGESTED} == set(expected)
    for name, values in expected.items():
        np.testing.assert_allclose(curves[name], values, rtol=1e-4, atol=1e-5, err_msg=name)


class TestRecorded:
    @pytest.mark.parametrize("accumulate", [1, 3])
    def test_each_value_is_that_of_the_visit(self, accumulate: int, tmp_path: Path) -> None:
        model = Diary()
        data = loader(Numbered(vectors()), shuffle=True)
        report = fit(tmp_path, model, data, accumulate_grad_batches=accumulate)
        assert report.curves.epochs.tolist() == [0, 1, 2]
        check(report.curves, model.expected(3))
        again = AuditReport.load(report.directory)
        for name, values in report.curves.items():
            assert np.array_equal(again.curves[name], values, equal_nan=True)

    def test_examples_of_some_epochs_only(self, tmp_path: Path) -> None:
        """A limited, shuffled epoch sees other examples each time; of those never seen there are no rows."""
        model = Diary()
        report = fit(tmp_path, model, loader(Numbered(vectors()), shuffle=True), limit_train_batches=2)
        rows = report.columns["index"]
        check(report.curves, {name: values[rows] for name, values in model.expected(3).items()})
        assert np.isnan(report.curves["loss"]).any()
        some = fit(tmp_path, Diary(), loader(Numbered(vectors()), sampler=SubsetRandomSampler(range(3, 11))))
        assert some.columns["index"].tolist() == list(range(3, 11))
        assert np.isfinite(some.curves["loss"]).all()
        saved = some.save(tmp_path / "saved")
        for each in (AuditReport.load(saved.directory), AuditReport.load(some.directory)):
            assert np.array_equal(each.curves["loss"], some.curves["loss"])

    def test_repeated_visits_are_averaged(self, tmp_path: Path) -> None:
        model = Diary()
        report = fit(tmp_path, model, loader(Numbered(vectors()), sampler=[*range(22), *range(5)]), epochs=2)
        assert report.columns["times_seen"].tolist() == [4] * 5 + [2] * 17
        check(report.curves, model.expected(2))

    def test_several_decisions_are_averaged_and_regression_has_losses(self, tmp_path: Path) -> None:
        torch.manual_seed(0)
        several = TensorDataset(torch.randn(20, 4), torch.randint(2, (20, 3)).float())
        values: list[Tensor] = []

        class Several(Classifier):
            def training_step(self, batch: Any, batch_idx: int) -> Tensor:
                logits = self(batch[0])
                values.append((logits.detach().sigmoid() - (1 - batch[1])).abs().mean(1))
                return F.binary_cross_entropy_with_logits(logits, batch[1])

        report = fit(tmp_path, Several(features=4), loader(several), epochs=1)
        np.testing.assert_allclose(report.curves["probability"][:, 0], torch.cat(values), rtol=1e-5)

        class Regression(Classifier):
            def training_step(self, batch: Any, batch_idx: int) -> Tensor:
                return F.mse_loss(self(batch[0]), batch[1])

        report = fit(tmp_path, Regression(features=4), loader(several), epochs=2)
        assert set(report.curves) == {"loss"}
        np.testing.assert_allclose(report.curves["loss"].mean(1), report.columns["loss_mean"], rtol=1e-5)

    def test_tokens_that_do_not_count_are_left_out(self, tmp_path: Path) -> None:
        class Tokens(Classifier):
            def __init__(self) -> None:
                super().__init__()
                self.net = nn.Sequential(nn.Embedding(7, 5), nn.Linear(5, 7))
                self.told: list[Tensor] = []

            def training_step(self, batch: Any, batch_idx: int) -> Tensor:
                logits = self.net(batch[0]).transpose(1, 2)
                losses = F.cross_entropy(logits.detach(), batch[1], reduction="none")
                kept = batch[1] >= 0
                self.told.append((torch.exp(-losses) * kept).sum(1) / kept.sum(1))
                return F.cross_entropy(logits, batch[1])

        torch.manual_seed(1)
        targets = torch.randint(7, (12, 4))
        targets[::2, 2:] = -100
        model = Tokens()
        report = fit(tmp_path, model, loader(TensorDataset(torch.randint(7, (12, 4)), targets)), epochs=1)
        np.testing.assert_allclose(report.curves["probability"][:, 0], torch.cat(model.told), rtol=1e-5)


class TestOfTheSuggestedLabel:
    def test_it_is_known_where_it_was_the_likeliest_of_the_others(self, tmp_path: Path) -> None:
        model = Diary()
        report = fit(tmp_path, model, loader(Numbered(vectors()), shuffle=True))
        expected = np.full((22, 3), np.nan)
        for row, (given, suggested) in enumerate(
            zip(report.columns["label"], report.columns["suggested"], strict=True)
        ):
            for epoch in range(3):
                chances = model.chances[epoch, row].clone()
                own = float(chances[suggested])
                chances[given] = -1
                if int(chances.argmax()) == suggested:
                    expected[row, epoch] = own
        assert 0.2 < np.isnan(expected).mean() < 0.8  # the case is none where all or nothing is known
        np.testing.assert_allclose(report.curves[SUGGESTED], expected, rtol=1e-5, atol=1e-6)
        saved = report.save(tmp_path / "saved")
        for each in (AuditReport.load(report.directory), AuditReport.load(saved.directory)):
            assert np.array_equal(each.curves[SUGGESTED], report.curves[SUGGESTED], equal_nan=True)
        assert SUGGESTED in str(report[3])

    def test_of_two_classes_it_is_always_known(self, tmp_path: Path) -> None:
        report = fit(tmp_path, Diary(classes=2), loader(Numbered(vectors(classes=2))))
        total = report.curves[SUGGESTED] + report.curves["probability"]
        np.testing.assert_allclose(total, np.ones((22, 3)), rtol=1e-5)

    @pytest.mark.parametrize("classes", [2, 10, 1000, 50_000])
    @pytest.mark.parametrize("certain", [False, True])
    def test_class_and_probability_in_one_number(self, classes: int, certain: bool) -> None:
        logits = torch.zeros(2, classes)
        logits[0, -1] = logits[1, 1] = 200.0 if certain else 1.0
        shares = logits.softmax(1)
        rival, probability = np.divmod(_rivals(shares, torch.zeros(2, dtype=torch.long)).numpy(), np.float32(1))
        assert rival.tolist() == [classes - 1, 1]
        np.testing.assert_allclose(probability, [shares[0, -1], shares[1, 1]], atol=classes * 2.0**-23)
        # The given label is left out, however likely it is.
        assert _rivals(shares, torch.tensor([classes - 1, 1])).floor().tolist() == [0, 0]
        assert _rivals(torch.ones(3, 1), torch.zeros(3, dtype=torch.long)).tolist() == [-1, -1, -1]

    def test_unlike_the_mean_probabilities_it_has_no_limit(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(class_shares, "_ALL", 1)
        monkeypatch.setattr(class_shares, "_LARGEST", 1)
        dynamics, told = TrainingDynamics(2), torch.tensor([[0.1, 0.7, 0.2], [0.5, 0.2, 0.3]])
        record = CurveRecord(dynamics)
        statistics = {"loss": torch.ones(2), "label": torch.tensor([1, 1]), "probabilities": told}
        dynamics.record(BatchRecord((0, 1)), statistics)
        record.end(0)
        told = dynamics.mean_probabilities(torch.arange(2))
        assert told is not None
        np.testing.assert_allclose(told, [[0, 0.7, 0], [0.5, 0, 0]], rtol=1e-6)
        np.testing.assert_allclose(record.kept[0][RIVAL], [2.2, 0.5], rtol=1e-6)

    def test_of_what_two_processes_have_visited_it_is_unknown(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The state of an example that a sampler has repeated is a mean over processes: of classes, nonsense."""
        dynamics = TrainingDynamics(2)
        record = CurveRecord(dynamics)
        told = torch.tensor([[0.1, 0.7, 0.2]]).expand(3, -1)
        for batch in ((0, 1), (1,)):
            n = len(batch)
            statistics = {"loss": torch.ones(n), "label": torch.zeros(n).long(), "probabilities": told[:n]}
            dynamics.record(BatchRecord(batch), statistics)
        monkeypatch.setattr(distributed, "world_size", lambda: 2)
        record.end(0)
        np.testing.assert_allclose(record.kept[0][RIVAL], [1.7, np.nan], rtol=1e-6)


class TestKept:
    def test_resumed_within_an_epoch(self, tmp_path: Path) -> None:
        """The epoch that the checkpoint cuts has the visits of both runs."""
        keeper = ModelCheckpoint(dirpath=tmp_path / "kept", filename="{step}", save_top_k=-1, every_n_train_steps=7)
        one, two = Diary(), Diary()
        fit(tmp_path / "one", one, loader(Numbered(vectors())), epochs=2, callbacks=[keeper])
        checkpoint = tmp_path / "kept" / "step=7.ckpt"
        report = fit(tmp_path / "two", two, loader(Numbered(vectors())), ckpt=checkpoint)
        two.seen = one.seen[: 22 + 10] + two.seen
        assert report.curves.epochs.tolist() == [0, 1, 2]
        check(report.curves, two.expected(3))

    def test_what_is_gone_is_said(self, tmp_path: Path) -> None:
        keeper = ModelCheckpoint(dirpath=tmp_path / "kept", filename="{step}", save_top_k=-1)
        first = fit(tmp_path / "one", Diary(), loader(Numbered(vectors())), epochs=2, callbacks=[keeper])
        shutil.rmtree(first.directory)
        two = Diary()
        report = fit(tmp_path / "two", two, loader(Numbered(vectors())), ckpt=tmp_path / "kept" / "step=10.ckpt")
        assert any("curves lack the epochs 0, 1 before training was resumed" in n for n in report.manifest["notes"])
        assert report.curves.epochs.tolist() == [2]
        check(report.curves, {name: values[:, 2:] for name, values in two.expected(3).items()})

    def test_damaged_files_and_earlier_audits(self, tmp_path: Path) -> None:
        report = fit(tmp_path, Diary(), loader(Numbered(vectors())))
        (report.directory / "curves" / "epoch-00001.safetensors").write_bytes(b"no tensors")
        with pytest.warns(UserWarning, match=r"no curves of epoch 1: .*epoch-00001.safetensors cannot be read"):
            assert AuditReport.load(report.directory).curves.epochs.tolist() == [0, 2]
        shutil.rmtree(report.directory / "curves")
        old = AuditReport.load(report.directory)
        assert (len(old.curves), old.curves.epochs.tolist(), old[3].curves) == (0, [], {})
        assert "over the epochs" not in str(old[3])
        with pytest.raises(ValueError, match="no curves"):
            old.plot("curves")
        assert repr(old.curves) == "Curves(none: 0 examples, 0 epochs)"

    @pytest.mark.parametrize("resume", [False, True])
    def test_long_runs_are_thinned_evenly(self, resume: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(recorded, "_MOST_EPOCHS", 6)
        record = CurveRecord(TrainingDynamics(2))
        for epoch in range(23):
            record.begin(epoch)
            losses = torch.tensor([float(epoch), 2.0 * epoch])
            record._dynamics.record(BatchRecord((0, 1)), {"loss": losses})
            record.end(epoch)
            assert len(record.kept) <= 6
            if resume and epoch in (7, 13):
                files, state, sums = record.lasting(), record.state_dict(), record._dynamics.state_dict()
                record = CurveRecord(TrainingDynamics(2))
                record._dynamics.load_state_dict(sums)
                record.load_state_dict(state)
                assert record.restore(files) == []
        assert sorted(record.kept) == [0, 8, 16, 22]
        assert all(v["loss"].tolist() == [epoch, 2 * epoch] for epoch, v in record.kept.items())

    def test_files_of_epochs_that_were_given_up_go(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(recorded, "_MOST_EPOCHS", 3)
        model = Diary()
        report = fit(tmp_path, model, loader(Numbered(vectors())), epochs=6)
        assert report.curves.epochs.tolist() == [0, 4, 5]
        names = sorted(file.name for file in (report.directory / "curves").iterdir())
        assert names == [f"epoch-0000{n}.safetensors" for n in (0, 4, 5)]
        check(AuditReport.load(report.directory).curves, {k: v[:, [0, 4, 5]] for k, v in model.expected(6).items()})

    def test_a_checkpoint_holds_no_curves(self) -> None:
        dynamics = TrainingDynamics(1000)
        record = CurveRecord(dynamics)
        for epoch in range(30):
            dynamics.record(BatchRecord(tuple(range(1000))), {"loss": torch.rand(1000)})
            record.end(epoch)
        state = record.state_dict()
        assert state == {"epochs": list(range(30)), "epoch": 0, "stride": 1, "since": {}}


class TestShown:
    def test_sparklines(self) -> None:
        assert sparkline(np.array([0, 1, 2, 3.5, 7], dtype=np.float32)) == "▁▂▃▅█"
        assert sparkline(np.array([1, np.nan, 1], dtype=np.float32)) == "▁·▁"
        assert sparkline(np.full(3, np.nan, dtype=np.float32)) == "···"
        assert len(sparkline(np.arange(500, dtype=np.float32))) == 32

    def test_an_example_and_figures(self, tmp_path: Path) -> None:
        pytest.importorskip("matplotlib")
        report = fit(tmp_path, Diary(), loader(Numbered(vectors())))
        example = report[3]
        assert example.epochs == (0, 1, 2)
        assert np.array_equal(example.curves["loss"], report.curves["loss"][3])
        assert "over the epochs 0 to 2, as training saw it:" in str(example)
        titles = [f"{name} over epochs" for name in (*recorded.CURVES, SUGGESTED)]
        figure = report.plot("curves")
        assert [axis.get_title() for axis in figure.axes] == titles
        assert [axis.get_title() for axis in report.plot(index=3).axes][:4] == titles
        line = report.plot(index=3).axes[0].lines[-1]
        assert np.array_equal(line.get_ydata(), report.curves["loss"][3])
