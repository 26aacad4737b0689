"""Replay as users meet it: asked of a report, or along a recorded run, and how far to trust it."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import test_replay_scores
import torch
import torch.nn.functional as F
from models import make_trainer
from sklearn.datasets import load_digits
from test_replay_scores import CHEAP, N
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from which_lightning import MisconfigurationException, ModelCheckpoint, pl

from lightning_influence import AuditReport, DemographicParityGap, Influence, InfluenceAudit, Queries
from lightning_influence.audit.store.atomic import StoreError
from lightning_influence.audit.store.store import AuditStore
from lightning_influence.core import memory
from lightning_influence.data import ExampleSource
from lightning_influence.replay import ReplayError, Rerun, replay_scores
from lightning_influence.replay.attribution import Replay, _Bill
from lightning_influence.replay.scores import weighting_of
from lightning_influence.replay.settings import Record
from lightning_influence.replay.trust import Retraining, Trust, self_test
from lightning_influence.scores.measurements import Loss, MeasurementError

pytestmark = pytest.mark.usefixtures("unverified")


class Digits(pl.LightningModule):
    def __init__(self, activation: type[nn.Module] = nn.GELU, rate: float = 0.03) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 16), activation(), nn.Linear(16, 10))
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), self.rate, momentum=0.9)


def digits(start: int, stop: int) -> TensorDataset:
    pixels, labels = load_digits(return_X_y=True)
    return TensorDataset(torch.tensor(pixels[start:stop] / 16).float(), torch.tensor(labels[start:stop]))


class Run(NamedTuple):
    model: Digits
    report: AuditReport
    train: TensorDataset
    queries: TensorDataset


def run_of(
    directory: Path, model: pl.LightningModule, train: Any, *, record: Any = True, **arguments: Any
) -> InfluenceAudit:
    pl.seed_everything(1, verbose=False)
    own = {name: arguments.pop(name) for name in ("queries", "ids") if name in arguments}
    audit = InfluenceAudit(record=record, **CHEAP, **own)
    callbacks = [audit, *arguments.pop("callbacks", ())]
    trainer = make_trainer(directory, callbacks=callbacks, **{"max_epochs": 6, **arguments})
    trainer.fit(model, train)
    return audit


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    train, queries, directory = digits(0, 200), digits(200, 230), tmp_path_factory.mktemp("run")
    pl.seed_everything(0, verbose=False)
    model = Digits()
    audit = run_of(directory, model, DataLoader(train, 32, shuffle=True))
    return Run(model, audit.report, train, queries)


def state_of(model: nn.Module) -> Any:
    flags = [(p.requires_grad, p.grad) for p in model.parameters()]
    return copy.deepcopy(model.state_dict()), [m.training for m in model.modules()], flags, torch.get_rng_state()


def same(one: Any, other: Any) -> bool:
    weights = all(torch.equal(value, other[0][name]) for name, value in one[0].items())
    return weights and one[1:3] == other[1:3] and torch.equal(one[3], other[3])


# ---------------------------------------------------------------------------------------------------- the front doors


def test_a_report_from_the_disk_is_asked_with_a_model_freshly_made(run: Run) -> None:
    report = AuditReport.load(run.report.directory or "")
    model = Digits().train()
    before = state_of(model)
    scores = report.replay(model, DataLoader(run.train, 32, shuffle=True), run.queries)
    assert same(state_of(model), before)
    assert scores.scores.shape == (30, 200)
    assert scores.queries.tolist() == list(range(30))
    assert scores.trust is not None
    assert scores.trust.word == "reliable"
    assert scores.trust.correlation > 0.95
    assert scores.trust.left_out == 10
    told = " ".join(scores.notes)
    assert "42 steps; run again, it ended in the same bits" in told
    assert "self-test: reliable. In 5 trainings without 10 random examples" in told
    assert repr(scores).startswith("ReplayedPairs(30 queries x 200 examples; Trust(0.9")
    # With the model itself, a data set, and along the run: the same to the last bit.
    again = run.report.replay(run.model, run.train, DataLoader(run.queries, 8), [7, 3], self_test=0)
    assert torch.equal(again.scores, scores.scores[[7, 3]])
    assert again.trust is None
    assert any("no self-test" in note for note in again.notes)
    influence = Influence(run.model, nn.CrossEntropyLoss(), run.train, verify=False)
    along = influence.along(report.training_record()).replay(run.queries, [7, 3], self_test=0)
    torch.testing.assert_close(along.scores, again.scores)


def test_queries_together_and_other_measurements(run: Run) -> None:
    each = run.report.replay(run.model, run.train, run.queries, range(8), self_test=0)
    whole = run.report.replay(run.model, run.train, run.queries, range(8), together=True, self_test=3)
    torch.testing.assert_close(whole.scores, each.scores.mean(0), rtol=1e-4, atol=1e-4)
    assert whole.trust is not None
    assert whole.trust.actual.shape == (3, 1)
    assert any("self-test" in note for note in whole.notes)

    def mean_loss(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    custom = run.report.replay(
        run.model, run.train, run.queries, range(8), measurement=mean_loss, together=True, self_test=0
    )
    torch.testing.assert_close(custom.scores, whole.scores, rtol=1e-4, atol=1e-4)
    margins = run.report.replay(run.model, run.train, run.queries, [0], measurement="margin", self_test=0)
    assert float((margins.scores * each.scores[:1]).sum()) < 0
    for set_alone in (mean_loss, DemographicParityGap(torch.arange(30) % 2)):
        with pytest.raises(MeasurementError, match="as a whole: pass `together=True`"):
            run.report.replay(run.model, run.train, run.queries, measurement=set_alone)


class Module(pl.LightningDataModule):
    """With a hook of its own, without which the loss is another one."""

    def setup(self, stage: str) -> None:
        self.train = digits(0, 60)

    def train_dataloader(self) -> Any:
        return DataLoader(self.train, 16, shuffle=True)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return 0.5 * batch[0], batch[1]


def test_a_data_module_freshly_made(tmp_path: Path) -> None:
    model, data = Digits(), Module()
    audit = run_of(tmp_path, model, data, max_epochs=2)
    expected = audit.report.replay(model, data, digits(60, 66), self_test=0)
    fresh = audit.report.replay(Digits(), Module(), digits(60, 66), self_test=0)
    torch.testing.assert_close(fresh.scores, expected.scores)
    with pytest.raises(ReplayError, match="does not come out the same a second time: at step 0"):
        audit.report.replay(Digits(), digits(0, 60), digits(60, 66))


def test_what_is_refused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    replay = partial(run.report.replay, queries=run.queries, indices=[0], self_test=0)
    wider = Digits()
    wider.net[0] = nn.Linear(64, 17)
    with pytest.raises(ReplayError, match=r"'net.0.weight' is .* pass the model that was trained"):
        replay(wider, run.train)
    with pytest.raises(ReplayError, match="trained on 200 examples, and TensorDataset has 190; pass the data that it"):
        replay(Digits(), digits(0, 190))
    with pytest.raises(ReplayError, match="step 0 was taken on another batch: the examples"):
        replay(Digits(), digits(20, 220))

    class OtherLoss(Digits):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return 2 * super().training_step(batch, batch_idx)

    with pytest.raises(ReplayError, match="does not come out the same a second time: at step 0"):
        replay(OtherLoss(), run.train)
    with pytest.raises(ReplayError, match=r"would take at least .* more than max_cost=1e-09"):
        replay(Digits(), run.train, max_cost=1e-9)
    with pytest.raises(ReplayError, match=r"leave out the self-test \(`self_test=0`\)"):
        replay(Digits(), run.train, max_cost=1e-9, self_test=5)
    with pytest.raises(ValueError, match="max_cost=0; expected a number of seconds > 0"):
        replay(Digits(), run.train, max_cost=0)
    for odd in (True, 2, -1, 1.5, None):
        with pytest.raises(ValueError, match=r"self_test=.*; expected an integer >= 3, or 0 for none"):
            replay(Digits(), run.train, self_test=odd)
    with monkeypatch.context() as small:
        small.setattr(memory, "available_bytes", lambda device: 10_000)
        with pytest.raises(ReplayError, match="1 queries take .* of memory"):
            replay(Digits(), run.train)
    with pytest.raises(ValueError, match="the query set has no example \\[30\\]"):
        run.report.replay(Digits(), run.train, run.queries, [30])
    with pytest.raises(ValueError, match="together='yes'; expected True or False"):
        replay(Digits(), run.train, together="yes")


def test_what_it_takes_is_told_before_most_of_it_is_spent(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    influence = Influence(run.model, None, run.train, verify=False)
    record, told = run.report.training_record(), list[str]()
    replay = Replay(
        Rerun(record, run.model, source=ExampleSource(run.train)), progress=progress_to(told), told=told.append
    )
    queries, chosen = influence.queries(run.queries, [0])
    replay.pairs(queries, chosen, self_test=3)
    steps = len(record.steps)
    assert told[0] == f"replay: {5 * steps} steps"
    (at,) = [number for number, words in enumerate(told) if words.startswith("about ")]
    assert "to run the training again" in told[at]
    assert "for the self-test" in told[at]
    assert told.count("step") == 5 * steps
    assert told[:at].count("step") == steps + 3
    monkeypatch.setattr(_Bill, "running_again", lambda self: None)
    with pytest.raises(ReplayError, match=r"would take \d\S* seconds for 42 steps, more than max_cost=1e-06"):
        replay.pairs(queries, chosen, self_test=0, max_cost=1e-6)


def progress_to(told: list[str]) -> Any:
    @contextmanager
    def progress(title: str, steps: int) -> Iterator[Any]:
        told.append(f"{title}: {steps} steps")
        yield lambda done: told.extend(["step"] * done)

    return progress


class Mixed(Digits):
    """Mixes examples in every second step of training."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        if not self.training or batch_idx % 2:
            return super().training_step(batch, batch_idx)
        x[:, 20:40] = x.flip(0)[:, 20:40]
        logits = self(x)
        return 0.7 * F.cross_entropy(logits, y) + 0.3 * F.cross_entropy(logits, y.flip(0))


def test_steps_that_mix_examples(tmp_path: Path) -> None:
    """By weights of rows, scores would be wrong, and the self-test, which knows no others, would find them right."""
    train = digits(0, 60)
    report = run_of(tmp_path, Mixed(), DataLoader(train, 16), max_epochs=1).report
    with pytest.raises(ReplayError, match="at step 0 the loss of some examples depends on others of their batch"):
        report.replay(Mixed(), train, digits(60, 64))
    with pytest.raises(ReplayError, match="a `task=` that comes to another loss than the one trained on"):
        report.replay(Mixed(), train, digits(60, 64), task="classification")


class Other(Digits):
    """Has a loss of training of its own."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y, *weights = batch
        if self.kind == "contrasts by hand":
            z, near = (F.normalize(self(v), dim=1) for v in (x, x + 0.1 * torch.randn_like(x)))
            return -(5 * z @ near.T).log_softmax(1).diagonal().mean()
        if not self.training:
            return F.cross_entropy(self(x.float()), y)
        n = len(y)
        other = torch.arange(n).sub(1) if self.kind == "neighbours" else torch.randperm(n)
        if self.kind == "in the first epochs" and self.current_epoch > 3:
            other = torch.arange(n)
        if self.kind == "as arrays":
            assert x.numpy().any()
        if self.kind == "weighted":
            return (weights[0] * F.cross_entropy(self(x), y, reduction="none")).sum() / weights[0].sum()
        if self.kind == "normalised by classes":
            return F.cross_entropy(self(x), y, torch.linspace(1, 3, 10))
        if self.kind == "some of them":
            return F.cross_entropy(self(x), y.masked_fill(torch.rand(n) < y / 10, -100))
        mixed = x if self.kind == "labels" else 0.7 * x + 0.3 * x[other]
        return 0.7 * F.cross_entropy(self(mixed), y) + 0.3 * F.cross_entropy(self(mixed), y[other])


@pytest.mark.parametrize(
    "kind", ["neighbours", "in the first epochs", "as arrays", "contrasts by hand", "labels", "bytes"]
)
def test_examples_are_mixed_in_many_ways(kind: str, tmp_path: Path) -> None:
    train = digits(0, 64)
    if kind == "bytes":
        train = TensorDataset((16 * train.tensors[0]).to(torch.uint8), train.tensors[1])
    report = run_of(tmp_path, Other(kind), DataLoader(train, 16, shuffle=True)).report
    step = 0 if kind == "in the first epochs" else 16
    with pytest.raises(ReplayError, match=f"at step {step} the loss of some examples depends on others"):
        report.replay(Other(kind), train, train, [0])


@pytest.mark.parametrize("kind", ["weighted", "normalised by classes", "some of them"])
def test_a_sum_that_a_loss_is_divided_by_mixes_nothing(kind: str, tmp_path: Path) -> None:
    train = TensorDataset(*digits(0, 64).tensors, torch.linspace(0.5, 2, 64))
    report = run_of(tmp_path, Other(kind), DataLoader(train, 16, shuffle=True), max_epochs=2).report
    trust = report.replay(Other(kind), train, train, range(5), self_test=3).trust
    assert trust is not None
    assert trust.correlation > 0.9


class AsksTheTrainer(Digits):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * (1 + self.current_epoch / self.trainer.max_epochs)


def test_a_model_that_asks_its_trainer(tmp_path: Path) -> None:
    train, model = DataLoader(digits(0, 60), 16), AsksTheTrainer()
    report = run_of(tmp_path, model, train, max_epochs=2).report
    assert report.replay(model, train, digits(60, 64), self_test=0).scores.isfinite().all()
    with pytest.raises(ReplayError, match="^the training step asks for `trainer.max_epochs`, and the model has no tr"):
        report.replay(AsksTheTrainer(), train, digits(60, 64))


class Compiled(Digits):
    def __init__(self, compiled: bool) -> None:
        super().__init__()
        self.net.insert(1, nn.BatchNorm1d(16))
        self.net.insert(2, nn.Dropout(0.2))
        if compiled:
            self.net = torch.compile(self.net, backend="eager")


def test_a_compiled_part_is_replayed_as_it_is_eagerly(tmp_path: Path) -> None:
    """Its modules and buffers have other names."""
    found = []
    for compiled in (False, True):
        pl.seed_everything(0, verbose=False)
        model = Compiled(compiled)
        report = run_of(tmp_path / str(compiled), model, DataLoader(digits(0, 60), 16), max_epochs=2).report
        found.append(report.replay(model, digits(0, 60), digits(60, 64), self_test=3))
    torch.testing.assert_close(found[0].scores, found[1].scores, rtol=1e-4, atol=1e-5)
    assert all(scores.trust is not None and scores.trust.correlation > 0.9 for scores in found)


def by_example(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def test_the_loss_by_example_is_that_of_the_audit(tmp_path: Path) -> None:
    train = DataLoader(digits(0, 60), 16)
    pl.seed_everything(1, verbose=False)
    audit = InfluenceAudit(record=True, task=by_example, **CHEAP)
    make_trainer(tmp_path, callbacks=[audit], max_epochs=1).fit(Digits(), train)
    with pytest.raises(ReplayError, match="the audit was made with `task=by_example`.*; pass it here, too"):
        audit.report.replay(Digits(), train, digits(60, 64))
    found = audit.report.replay(Digits(), train, digits(60, 64), task=by_example, self_test=3)
    assert found.trust is not None
    assert found.trust.correlation > 0.9


def test_a_run_without_a_record_and_one_that_was_resumed(tmp_path: Path) -> None:
    train = DataLoader(digits(0, 40), 16)
    without = run_of(tmp_path / "one", Digits(), train, record=False, max_epochs=1)
    with pytest.raises(StoreError, match=r"no record of the training in .*see `InfluenceAudit\(record=True\)`"):
        without.report.replay(Digits(), train, digits(40, 44))
    keep = ModelCheckpoint(dirpath=tmp_path, save_last=True)
    run_of(tmp_path / "two", Digits(), train, max_epochs=1, callbacks=[keep], enable_checkpointing=True)
    audit = InfluenceAudit(record=True, **CHEAP)
    trainer = make_trainer(tmp_path / "three", callbacks=[audit], max_epochs=2)
    with pytest.warns(UserWarning, match="as training was resumed"):
        trainer.fit(Digits(), train, ckpt_path=tmp_path / "last.ckpt")
    with pytest.raises(StoreError, match="no record of the training in .* as training was resumed"):
        audit.report.replay(Digits(), train, digits(40, 44))


# -------------------------------------------------------------------------------------------------------- harm_exact


class WithValidation(Digits):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def val_dataloader(self) -> Any:
        return DataLoader(digits(60, 90), 16)


def test_harm_in_this_run_is_a_column_outside_the_suspicion(tmp_path: Path) -> None:
    train = DataLoader(digits(0, 60), 16, shuffle=True)
    pl.seed_everything(0, verbose=False)
    model = WithValidation()
    other = copy.deepcopy(model)
    report = run_of(tmp_path / "one", model, train, max_epochs=2).report
    without = run_of(tmp_path / "two", other, train, record=Record(max_cost=0), max_epochs=2).report
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())
    assert set(report.columns) - set(without.columns) == {"harm_exact"}
    assert (report.columns["rank"] == without.columns["rank"]).all()
    scores = report.replay(model, train, digits(60, 90), together=True, self_test=0)
    np.testing.assert_allclose(report.columns["harm_exact"], -scores.scores, rtol=1e-6)
    stored = AuditReport.load(report.directory or "")
    np.testing.assert_array_equal(stored.columns["harm_exact"], report.columns["harm_exact"])
    assert "harm_exact" in (Path(report.directory or "") / "columns.md").read_text()
    assert "harm_exact" not in stored.manifest["ranked_by"]


def test_harm_that_takes_too_long_or_fails_costs_no_audit(tmp_path: Path) -> None:
    train = DataLoader(digits(0, 60), 16)
    report = run_of(tmp_path / "one", WithValidation(), train, record=Record(max_cost=1e-9), max_epochs=1).report

    class MovesWeights(WithValidation):
        def on_train_batch_end(self, *args: Any) -> None:
            with torch.no_grad():
                self.net[0].bias += 0.1

    moved = run_of(tmp_path / "two", MovesWeights(), train, max_epochs=1).report
    for each, why in ((report, "no harm_exact: the replay would take at least"), (moved, "does not come out the same")):
        stored = AuditReport.load(each.directory or "")
        assert stored.status == each.status == "complete"
        assert "harm_exact" not in stored.columns
        assert "harm" in stored.columns
        assert any(why in note for note in stored.manifest["notes"])
        assert any(why in note for note in each.manifest["notes"])


def test_harm_on_a_disk_that_has_filled_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = AuditStore.write_scores

    def until_there_is_harm(store: AuditStore, columns: Any) -> None:
        if "harm_exact" in columns:
            raise StoreError("the disk is full")
        write(store, columns)

    monkeypatch.setattr(AuditStore, "write_scores", until_there_is_harm)
    with pytest.warns(UserWarning, match="what replay has told is in memory alone"):
        report = run_of(tmp_path, WithValidation(), DataLoader(digits(0, 60), 16), max_epochs=1).report
    assert report.status == AuditReport.load(report.directory or "").status == "complete"
    assert "harm_exact" in report.columns


# ----------------------------------------------------------------------------------------------- queries by replay


@pytest.mark.parametrize("measurement", ["loss", "margin"])
def test_queries_of_an_audit_have_a_list_by_replay(measurement: Any, tmp_path: Path) -> None:
    train = DataLoader(digits(0, 60), 16, shuffle=True)
    queries = Queries(count=3, top=4, measurement=measurement, method="replay")
    model = WithValidation()
    report = run_of(tmp_path, model, train, record=False, queries=queries, ids=lambda k: f"digit {k}").report
    assert report.pairs is not None
    pairs = {name: values[report.pairs["list"] == "replay"] for name, values in report.pairs.items()}
    assert set(report.pairs["list"]) == {"strongest", "specific", "replay"}
    assert set(pairs["number"]) == {1, 2, 3}
    sign = -1 if measurement == "margin" else 1
    asked = sorted(set(pairs["query"].tolist()))
    found = report.replay(model, train, digits(60, 90), asked, measurement=measurement, self_test=0)
    for query, scores in zip(asked, sign * found.scores.numpy(), strict=True):
        for kind, order in (("proponent", np.argsort(-scores)), ("opponent", np.argsort(scores))):
            own = (pairs["query"] == query) & (pairs["kind"] == kind)
            assert pairs["index"][own].tolist() == order[:4].tolist()
            np.testing.assert_allclose(pairs["score"][own], scores[order[:4]], rtol=1e-5)
            assert pairs["rank"][own].tolist() == [1, 2, 3, 4]
    assert pairs["id"].tolist() == [f"digit {k}" for k in pairs["index"]]
    assert (pairs["label"] == report.columns["label"][pairs["index"]]).all()
    notes = report.manifest["notes"]
    assert any(note.startswith("queries by replay: self-test:") for note in notes)
    stored = AuditReport.load(report.directory or "")
    assert stored.pairs is not None
    assert all((stored.pairs[name] == values).all() for name, values in report.pairs.items() if values.dtype == object)
    assert stored.manifest["notes"] == notes
    assert "harm_exact" in stored.columns
    page = json.loads((Path(report.directory or "") / "audit.json").read_text())
    assert {pair["list"] for pair in page["pairs"]} == {"strongest", "specific", "replay"}
    assert "by what the example did in this very run, by replay" in str(report)


def test_queries_that_replay_can_not_answer(tmp_path: Path) -> None:
    queries = Queries(count=2, method="replay")
    with pytest.raises(ValueError, match=r'method="replay"\) takes time, which Record\(max_cost=0\) does not allow'):
        InfluenceAudit(queries=queries, record=Record(max_cost=0))
    with pytest.raises(ValueError, match=r"queries: method='exact'; expected \"influence\" or \"replay\""):
        Queries(method="exact")  # type: ignore[arg-type]
    train = DataLoader(digits(0, 60), 16)

    class Stepping(WithValidation):
        def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            super().optimizer_step(*args, **kwargs)

    with pytest.raises(MisconfigurationException, match=r"this run can't be replayed.*`method=` of `Queries`"):
        run_of(tmp_path / "own", Stepping(), train, record=False, queries=queries, max_epochs=1)
    short = Record(max_cost=1e-9)
    dear = run_of(tmp_path / "dear", WithValidation(), train, record=short, queries=queries, max_epochs=1)
    assert any("no lists of queries by replay: the replay would take" in note for note in dear.report.manifest["notes"])
    assert set(dear.report.pairs["list"]) == {"strongest", "specific"}  # type: ignore[index]
    assert AuditReport.load(dear.report.directory or "").manifest["notes"] == dear.report.manifest["notes"]
    with pytest.warns(UserWarning, match="queries have no lists by replay"):
        InfluenceAudit(queries=queries, dirpath=tmp_path / "after", **CHEAP).audit(
            WithValidation(), train, val_dataloaders=DataLoader(digits(60, 90), 16)
        )


# ------------------------------------------------------------------------------------------------------------- trust


def test_a_run_without_an_example_is_the_one_in_which_it_weighs_nothing(tmp_path: Path) -> None:
    """BatchNorm, dropout, noise, accumulation, clipping, OneCycle, AdamW: the other one is trained by a trainer."""
    weights = torch.ones(N, dtype=torch.float64)
    weights[[3, 11, 20]] = 0
    _, rerun, passes = test_replay_scores.trained(tmp_path, test_replay_scores.Net)
    with rerun.standing():
        way = weighting_of(rerun, rerun.task, passes.coverage.trace.forms)
    ended = Retraining(rerun, way, rerun.task).end(torch.arange(N), weights)
    other, _, _ = test_replay_scores.trained(tmp_path, partial(test_replay_scores.Net, weights))
    for name, value in {**ended.parameters, **ended.buffers}.items():
        torch.testing.assert_close(value, other.state_dict()[name], rtol=1e-9, atol=1e-12)
    unweighted = rerun.record.states[len(rerun.record.steps)].parameters
    assert not torch.allclose(ended.parameters["net.0.weight"], unweighted["net.0.weight"], rtol=1e-3)


def test_scores_of_other_examples_are_found_out(run: Run) -> None:
    """As they are 0.99; shuffled about 0, whatever they are of."""
    influence = Influence(run.model, None, run.train, verify=False)
    along = influence.along(run.report.training_record())
    rerun = along._replay._rerun
    queries, _ = influence.queries(run.queries)
    found = replay_scores(rerun, queries, range(30))
    with rerun.standing():
        way = weighting_of(rerun, rerun.task, queries.coverage.trace.forms)
    ends = [(Loss(), [(queries, [index])]) for index in range(30)]
    test = partial(self_test, rerun, way, ends)
    trust = test((found.examples, found.scores))
    assert trust.correlation > 0.95
    draw = torch.Generator().manual_seed(0)
    shuffled = torch.stack([row[torch.randperm(200, generator=draw)] for row in found.scores])
    wrong = test((found.examples, shuffled))
    assert abs(wrong.correlation) < 0.5
    assert wrong.word == "not for removals"
    assert "a cooler learning rate (it went up to 0.03)" in str(wrong)
    torch.testing.assert_close(wrong.actual, trust.actual)


class Kinks(Digits):
    """With ReLU and max pooling, one of them as a function."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.MaxPool2d(2), nn.Flatten()
        )
        self.head = nn.Linear(27, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.net(x)))


def test_what_would_help_is_read_off_the_model(run: Run, tmp_path: Path) -> None:
    assert [part.partition(" ")[0] for part in _helps(run)] == ["a"]
    train = digits(0, 40)
    audit = run_of(tmp_path, Kinks(), DataLoader(train, 16), max_epochs=1)
    trust = audit.report.replay(Kinks(), train, run.queries, [0, 1], self_test=3).trust
    assert trust is not None
    assert trust.helps == [
        "a cooler learning rate (it went up to 0.03)",
        "smooth activations (GELU, SiLU) in place of ReLU",
        "average pooling in place of max pooling",
    ]
    assert trust.notes == ["examples that are left out still take part in batch statistics"]


def _helps(run: Run) -> list[str]:
    trust = run.report.replay(run.model, run.train, run.queries, [0], self_test=3).trust
    assert trust is not None
    return list(trust.helps)


def test_the_words() -> None:
    draw = torch.Generator().manual_seed(0)
    actual = torch.randn(2000, 3, generator=draw, dtype=torch.float64)
    trust = Trust(actual, actual, 5, 12.0, ["cooler"])
    assert trust.word == "reliable"
    assert "What would help" not in str(trust)
    for share, word in ((0.2, "reliable"), (0.4, "for ranking"), (1.0, "not for removals")):
        noise = torch.randn(2000, 3, generator=draw, dtype=torch.float64)
        assert replace(trust, predicted=actual + share * noise).word == word
    still = replace(trust, actual=torch.cat([actual[:, :2], torch.zeros(2000, 1)], 1))
    assert "(mean over 3 queries), 1 of which did not change" in str(still)
    assert replace(trust, actual=torch.zeros(2000, 3)).word == "unknown"
