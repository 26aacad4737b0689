"""Queries of an audit: real runs whose pairs are those of direct calls, on disk, in memory and in TensorBoard."""

from __future__ import annotations

import warnings
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from models import Classifier, Stream, Validated, images, loader, make_trainer, vectors
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from which_lightning import MisconfigurationException, TensorBoardLogger, pl

from lightning_influence import AdversarialLoss, AuditReport, DemographicParityGap, InfluenceAudit, Margin, Queries
from lightning_influence.audit.columns import PAIR_DESCRIPTIONS
from lightning_influence.audit.store.store import AuditStore
from lightning_influence.callbacks import run as audit_run
from lightning_influence.curvature import FactorExamples, fit
from lightning_influence.data.source import ExampleSource
from lightning_influence.gradients.discover import discover
from lightning_influence.gradients.passes import ExampleGradients
from lightning_influence.objective.task import TrainingStepTask
from lightning_influence.scores.measurements import as_measurement, measurement_scores
from lightning_influence.scores.pairs import pairwise_scores, top_scores

pytestmark = pytest.mark.usefixtures("unverified")

N, Q = 22, 13
TRAINING, VALIDATION = vectors(N, dtype=torch.float64), vectors(Q, 2, dtype=torch.float64)
LISTS: dict[str, Any] = {"strongest": "none", "specific": "relative"}
EVERYTHING: dict[str, Any] = {"curvature": "ggn", "damping": 0.05, "factor_examples": None, "fisher": "exact"}


def audited(
    directory: Path, queries: Any, *data: Any, model: pl.LightningModule | None = None, **trainer: Any
) -> tuple[AuditReport, pl.LightningModule, pl.Trainer]:
    torch.manual_seed(0)
    model = model or Validated().double()
    audit = InfluenceAudit(queries=queries, **EVERYTHING)
    made = make_trainer(directory, callbacks=[audit], max_epochs=3, **trainer)
    made.fit(model, *(data or (loader(TRAINING), loader(VALIDATION, 4))))
    assert audit.has_report
    return audit.report, model, made


class Direct:
    """The engine alone, without a trainer."""

    def __init__(self, model: Any, training: Any = TRAINING, validation: Any = VALIDATION) -> None:
        self.model = model
        self.gradients, self.queries = self._passes(training), self._passes(validation)
        everything = FactorExamples(N, N, N)
        self.curvature = fit(
            self.gradients, "ggn", range(N), examples=everything, labels=("exact", "exact"), damping=0.05
        )

    def _passes(self, data: Any) -> ExampleGradients:
        source, task = ExampleSource(data, batch_size=5), TrainingStepTask()
        return ExampleGradients(self.model, task, source, discover(self.model, task, source))

    def losses(self) -> Tensor:
        x, y = self.queries.source.dataset.tensors  # type: ignore[attr-defined]
        with torch.no_grad():
            return F.cross_entropy(self.model(x), y, reduction="none")


def of_query(report: AuditReport, number: int, kind: str, name: str = "strongest") -> dict[str, Any]:
    assert report.pairs is not None
    rows = (report.pairs["number"] == number) & (report.pairs["kind"] == kind) & (report.pairs["list"] == name)
    return {name: values[rows] for name, values in report.pairs.items()}


def test_the_worst_queries_and_their_pairs(tmp_path: Path) -> None:
    report, model, _ = audited(tmp_path, Queries(count=4, top=3))
    direct = Direct(model)
    losses = direct.losses()
    worst = losses.argsort(descending=True)[:4].tolist()
    scored = direct.gradients, range(N), direct.curvature, direct.queries, worst
    tops = {name: top_scores(*scored, 3, normalise=how) for name, how in LISTS.items()}
    plain = pairwise_scores(*scored).scores
    training = {int(index): row for row, index in enumerate(report.columns["index"])}
    x, y = VALIDATION.tensors
    predicted = model(x).argmax(1)
    for (row, query), (name, top) in product(enumerate(worst), tops.items()):
        for kind, examples, scores in (
            ("proponent", top.proponents, top.proponent_scores),
            ("opponent", top.opponents, top.opponent_scores),
        ):
            pairs = of_query(report, row + 1, kind, name)
            assert pairs["index"].tolist() == examples[row].tolist()
            assert pairs["rank"].tolist() == [1, 2, 3]
            np.testing.assert_allclose(pairs["score" if name == "strongest" else "relative"], scores[row], rtol=1e-8)
            np.testing.assert_allclose(pairs["score"], plain[row, examples[row]], rtol=1e-8)
            own = np.array([report.columns["self_influence"][training[index]] for index in pairs["index"].tolist()])
            np.testing.assert_allclose(pairs["relative"], pairs["score"] / own**0.5, rtol=1e-12)
            assert set(pairs["query"]) == {query}
            assert set(pairs["query_set"]) == {0}
            np.testing.assert_allclose(pairs["query_loss"], float(losses[query]), rtol=1e-8)
            np.testing.assert_allclose(pairs["measured"], float(losses[query]), rtol=1e-8)
            assert set(pairs["query_label"]) == {int(y[query])}
            assert set(pairs["query_predicted"]) == {int(predicted[query])}
            for column in ("label", "predicted", "loss"):
                known = [report.columns[column][training[index]] for index in pairs["index"].tolist()]
                np.testing.assert_array_equal(pairs[column], known)
    one, other = ([of_query(report, 1 + row, "opponent", name)["index"].tolist() for row in range(4)] for name in LISTS)
    assert one != other, "one list would do for both"
    assert (of_query(report, 1, "proponent")["score"] > 0).all()
    assert (of_query(report, 1, "opponent")["score"] < 0).all()


def test_pairs_are_on_disk_and_come_back(tmp_path: Path) -> None:
    report, _, _ = audited(tmp_path, "worst")
    assert report.pairs is not None
    assert report.directory is not None
    loaded = AuditReport.load(report.directory)
    assert loaded.pairs is not None
    assert list(loaded.pairs) == list(report.pairs)
    assert set(loaded.pairs) == set(PAIR_DESCRIPTIONS)
    for name, values in report.pairs.items():
        np.testing.assert_array_equal(loaded.pairs[name], values)
    schema = pq.read_schema(report.directory / "pairs.parquet")
    assert all(schema.field(name).metadata[b"description"].decode() == text for name, text in PAIR_DESCRIPTIONS.items())
    assert len(np.unique(report.pairs["number"])) == 8
    # Of 22 examples, ten may not all be on the same side.
    signs = np.where(report.pairs["kind"] == "proponent", 1, -1)
    assert (signs * report.pairs["score"] > 0).all()
    assert 200 < len(report.pairs["number"]) <= 2 * 8 * 2 * 10
    assert report.manifest["seconds"]["queries"] > 0
    text = str(loaded)
    assert "queries     the 8 of 13 validation examples with the largest loss" in text
    first = of_query(report, 1, "proponent")
    assert f"#{first['query'][0]} given {first['query_label'][0]}, predicted {first['query_predicted'][0]}" in text
    assert f"strongest: proponents {first['index'][0]} ({first['score'][0]:+.3g})" in text
    first = of_query(report, 1, "proponent", "specific")
    assert f"specific:  proponents {first['index'][0]} ({first['relative'][0]:+.3g})" in text
    told = {"which": "worst", "count": 8, "top": 10, "measurement": "loss", "normalise": "both"}
    assert report.manifest["arguments"]["queries"] == told
    # The mean validation loss is `harm` already.
    assert not any(name.startswith("influence_on") for name in report.columns)


def test_scores_by_leverage(tmp_path: Path) -> None:
    report, model, _ = audited(tmp_path, Queries(count=2, top=3, normalise="leverage"))
    direct = Direct(model)
    worst = direct.losses().argsort(descending=True)[:2].tolist()
    scored = direct.gradients, range(N), direct.curvature, direct.queries, worst
    top = top_scores(*scored, 3, normalise="leverage")
    for row in range(2):
        pairs = of_query(report, row + 1, "opponent", "strongest")
        assert pairs["index"].tolist() == top.opponents[row].tolist()
        np.testing.assert_allclose(pairs["score"], top.opponent_scores[row], rtol=1e-8)
    assert (top.opponent_scores < 1.05 * top_scores(*scored, 3).opponent_scores).all()
    assert any("divided by one minus the leverage" in note for note in report.manifest["notes"])


class Handmade(Validated):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return (self(batch[0]).square().sum(1) + 1).log().mean()


def test_no_leverage_without_a_known_loss(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, callbacks=[InfluenceAudit(queries=Queries(normalise="leverage"))])
    with pytest.raises(MisconfigurationException, match='"leverage" needs a loss made of known calls alone'):
        trainer.fit(Handmade().double(), loader(TRAINING), loader(VALIDATION, 4))
    assert not trainer.global_step
    assert not list(tmp_path.rglob("manifest.json"))


@pytest.mark.parametrize(("normalise", "name"), [("none", "strongest"), ("relative", "specific")])
def test_one_list_alone(normalise: Any, name: str, tmp_path: Path) -> None:
    both, _, _ = audited(tmp_path / "both", Queries(count=3, top=4))
    alone, _, _ = audited(tmp_path / "alone", Queries(count=3, top=4, normalise=normalise))
    assert alone.pairs is not None
    assert set(alone.pairs["list"]) == {name}
    for kind in ("proponent", "opponent"):
        for column, values in of_query(alone, 2, kind, name).items():
            np.testing.assert_array_equal(values, of_query(both, 2, kind, name)[column])
    assert all((f"    {each + ':':<11}proponents" in str(alone)) == (each == name) for each in LISTS)


def test_ten_queries_are_printed(tmp_path: Path) -> None:
    text = str(audited(tmp_path, Queries(count=Q))[0])
    assert text.count("strongest: proponents") == 10
    assert "    and 3 more in `report.pairs`" in text


def test_pairs_of_earlier_versions(tmp_path: Path) -> None:
    """They have the strongest alone, and no column that says so."""
    report, _, _ = audited(tmp_path, Queries(count=3, normalise="none"))
    assert report.directory is not None
    told = str(report)
    assert report.pairs is not None
    earlier = {name: values for name, values in report.pairs.items() if name not in ("list", "relative")}
    AuditStore.open(report.directory).write_pairs(earlier)
    loaded = AuditReport.load(report.directory)
    assert loaded.pairs is not None
    assert "list" not in loaded.pairs
    assert str(loaded) == told


def test_an_example_without_a_gradient_leads_no_list(tmp_path: Path) -> None:
    """Float32 loses the square of a gradient before the gradient: divided by what is left, it led with 1e+130."""
    x, y = (t.float() for t in TRAINING.tensors)
    x[5] = 1e-24 * x[5]
    x[9] = 0
    asked = TensorDataset(VALIDATION.tensors[0].float(), VALIDATION.tensors[1])

    class Bare(Validated):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Linear(5, 3, bias=False)

    audit = InfluenceAudit(queries=Queries(count=3, top=50), curvature="ekfac", factor_examples=None)
    data = loader(TensorDataset(x, y.long())), loader(asked, 4)
    make_trainer(tmp_path, callbacks=[audit], max_epochs=2).fit(Bare(), *data)
    report = audit.report
    assert report is not None
    assert report.columns["self_influence"][[5, 9]].tolist() == [0.0, 0.0]
    specific = report.pairs["list"] == "specific"
    assert not np.isin(report.pairs["index"][specific], [5, 9]).any()
    of_tiny = report.pairs["index"] == 5
    assert of_tiny.any(), "its score is not zero"
    assert (report.pairs["relative"][of_tiny] == 0).all()


def test_without_queries_there_are_no_pairs(tmp_path: Path) -> None:
    report, _, _ = audited(tmp_path, None)
    assert report.directory is not None
    assert report.pairs is None
    assert AuditReport.load(report.directory).pairs is None
    assert "queries  " not in str(report)


@pytest.mark.parametrize("batch_size", [3, Q])
def test_a_loader_of_the_users_own(batch_size: int, tmp_path: Path) -> None:
    own = vectors(Q, 7, dtype=torch.float64)
    given = DataLoader(own, batch_size=batch_size, shuffle=True)
    report, model, _ = audited(tmp_path, Queries(given, count=5, top=2), loader(TRAINING), model=Classifier().double())
    direct = Direct(model, validation=own)
    top = top_scores(direct.gradients, range(N), direct.curvature, direct.queries, range(5), 2)
    assert [set(of_query(report, number, "opponent")["query"].tolist()) for number in range(1, 6)] == [
        {query} for query in range(5)
    ]
    np.testing.assert_array_equal(of_query(report, 3, "opponent")["index"], top.opponents[2])
    assert any("the first 5 of 13 are shown" in note for note in report.manifest["notes"])
    assert "the first 5 of 13 given examples" in report.manifest["queries"]["title"]
    # No validation loader, no harm; the loss of the loader's examples, all of them, is measured all the same.
    assert "harm" not in report.columns
    scores = measurement_scores(direct.gradients, range(N), direct.curvature, direct.queries, range(Q)).scores
    np.testing.assert_allclose(report.columns["influence_on_loss"], scores, rtol=1e-7)
    assert report.manifest["queries"]["value"] == pytest.approx(float(direct.losses().mean()), rel=1e-9)


@pytest.mark.parametrize("kind", ["margin", "adversarial", "gap", "function"])
def test_other_measurements(kind: str, tmp_path: Path) -> None:
    group = torch.arange(Q) % 2
    measurement: Any = {
        "margin": "margin",
        "adversarial": AdversarialLoss.fgsm(0.1),
        "gap": DemographicParityGap(group),
        "function": lambda module, batch: module(batch[0]).softmax(1)[:, 0].std(),
    }[kind]
    report, model, _ = audited(tmp_path, Queries(count=3, top=4, measurement=measurement))
    direct = Direct(model)
    made = as_measurement(measurement)
    whole = measurement_scores(
        direct.gradients, range(N), direct.curvature, direct.queries, range(Q), measurement=measurement
    )
    np.testing.assert_allclose(report.columns[f"influence_on_{made.name}"], whole.scores, rtol=1e-7)
    assert "harm" in report.columns
    assert np.abs(np.corrcoef(report.columns["harm"], whole.scores)[0, 1]) < 0.9999
    assert report.manifest["queries"]["value"] == pytest.approx(whole.measured.value)
    assert f"{made.name} of all 13: {whole.measured.value:.4g}" in str(report)
    # Sets have no single queries: there it is the loss.
    per_query = made if kind in ("margin", "adversarial") else as_measurement("loss")
    numbers = [direct.queries.measuring(per_query)]  # type: ignore[arg-type]
    first = int(of_query(report, 1, "proponent")["query"][0])
    top = top_scores(direct.gradients, range(N), direct.curvature, numbers[0], [first], 4)
    proponents, opponents = (of_query(report, 1, kind) for kind in ("proponent", "opponent"))
    if kind == "margin":
        # Proponents are those whose training raises the margin.
        x, y = VALIDATION.tensors
        p = model(x).softmax(1).gather(1, y[:, None]).squeeze(1)
        margins = (p.log() - (1 - p).log()).detach()
        assert first == int(margins.argmin())
        assert proponents["measured"][0] == pytest.approx(float(margins[first]))
        np.testing.assert_array_equal(proponents["index"], top.opponents[0])
        np.testing.assert_allclose(proponents["score"], -top.opponent_scores[0], rtol=1e-7)
        specific = top_scores(
            direct.gradients, range(N), direct.curvature, numbers[0], [first], 4, normalise="relative"
        )
        found = of_query(report, 1, "proponent", "specific")
        np.testing.assert_array_equal(found["index"], specific.opponents[0])
        np.testing.assert_allclose(found["relative"], -specific.opponent_scores[0], rtol=1e-7)
        for name in LISTS:
            for column in ("score", "relative"):
                assert (of_query(report, 1, "proponent", name)[column] > 0).all()
                assert (of_query(report, 1, "opponent", name)[column] < 0).all()
    else:
        np.testing.assert_array_equal(proponents["index"], top.proponents[0])
        np.testing.assert_allclose(opponents["score"], top.opponent_scores[0], rtol=1e-7)


def test_several_validation_loaders_are_asked_as_one(tmp_path: Path) -> None:
    class Several(Validated):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            super().validation_step(batch, batch_idx)

    halves = [TensorDataset(*(t[rows] for t in VALIDATION.tensors)) for rows in (slice(0, 5), slice(5, Q))]
    report, model, _ = audited(
        tmp_path, Queries(count=6, top=2), loader(TRAINING), [loader(half) for half in halves], model=Several().double()
    )
    losses = Direct(model).losses()
    for number, place in enumerate(losses.argsort(descending=True)[:6].tolist(), start=1):
        pairs = of_query(report, number, "proponent")
        assert (pairs["query_set"][0], pairs["query"][0]) == ((0, place) if place < 5 else (1, place - 5))


# ----------------------------------------------------------------------------------------------------------- passes


@pytest.mark.parametrize("loaders", [1, 2])
@pytest.mark.parametrize("queries", [None, "worst", "margin"])
def test_scores_pairs_and_sweep_share_one_pass(
    queries: Any, loaders: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two passes over the training set fit EK-FAC and one scores, whoever asks; validation has one for its mean loss.

    Pairs took one more for every validation loader, the damping sweep one, another measurement one; and validation was
    run up to three times more.
    """

    class Several(Validated):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            super().validation_step(batch, batch_idx)

    def batches(self: ExampleSource, indices: Any, size: int | None = None) -> Any:
        visited.setdefault(len(self.dataset), []).extend(indices)
        return original(self, indices, size)

    def scored(*arguments: Any, **options: Any) -> Any:
        visited.clear()
        return scores(*arguments, **options)

    visited: dict[int, list[int]] = {}
    original, scores = ExampleSource.batches, audit_run.influence_scores
    monkeypatch.setattr(ExampleSource, "batches", batches)
    monkeypatch.setattr(audit_run, "influence_scores", scored)
    asked = Queries(measurement="margin") if queries == "margin" else queries
    audit = InfluenceAudit(queries=asked, factor_examples=None)
    trainer = make_trainer(tmp_path, callbacks=[audit], max_epochs=2)
    trainer.fit(Several().double(), loader(TRAINING), [loader(VALIDATION, 4) for _ in range(loaders)])
    assert audit.has_report
    assert (audit.report.pairs is not None) == (queries is not None)
    assert "damping_sweep" in audit.report.manifest
    assert sorted(visited[N]) == sorted(3 * list(range(N)))
    # A margin has a gradient of its own, and its worst examples are looked for; the queries come once more.
    passes = 3 if queries == "margin" else 1
    assert len(visited[Q]) == passes * Q * loaders + (8 if queries else 0)


def test_pairs_that_fail_cost_no_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They look at the pass that scores; what goes wrong with them there is theirs."""

    def fail(*_: Any) -> None:
        raise RuntimeError("out of luck")

    monkeypatch.setattr("lightning_influence.scores.products.StrongestPairs._take", fail)
    with pytest.warns(UserWarning, match="no pairs of queries: RuntimeError: out of luck"):
        report, _, _ = audited(tmp_path, "worst")
    assert report.status == "complete"
    assert report.pairs is None
    assert np.isfinite(report.columns["self_influence"]).all()


def test_queries_that_take_several_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only so many of their gradients fit into memory at a time; the pairs are the same."""
    whole, _, _ = audited(tmp_path / "whole", Queries(count=5, top=3))

    monkeypatch.setattr("lightning_influence.scores.queries._query_bytes", lambda device: 1)
    apart, _, _ = audited(tmp_path / "apart", Queries(count=5, top=3))
    assert whole.pairs is not None
    assert apart.pairs is not None
    for name, values in whole.pairs.items():
        if values.dtype == np.float64:
            np.testing.assert_allclose(apart.pairs[name], values, rtol=1e-9)
        else:
            np.testing.assert_array_equal(apart.pairs[name], values)


# --------------------------------------------------------------------------------------------------------- pictures


def test_pictures_and_table_in_tensorboard(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    report, _, _ = audited(
        tmp_path, Queries(count=2), loader(images()), loader(images(6, 2)), model=Validated(features=36), logger=logger
    )
    events = EventAccumulator(logger.log_dir, size_guidance={"tensors": 0, "images": 0}).Reload()
    tags = events.Tags()
    sheets = [tag for tag in tags["images"] if tag.startswith("influence/queries")]
    assert sheets == [f"influence/queries/{number}/{name}" for number in (1, 2) for name in LISTS]
    (image,) = events.Images(sheets[0])
    assert image.width < 3 * 192 + 100
    assert image.height > 5 * 144
    (text,) = events.Tensors("influence/queries/text_summary")
    written = text.tensor_proto.string_val[0].decode()
    first = of_query(report, 1, "proponent")
    assert f"| &#35;{first['query'][0]} | {first['query_label'][0]} |" in written
    assert f"| proponent | &#35;{first['index'][0]} | {first['label'][0]} | {first['score'][0]:.3g} |" in written


def test_a_table_alone_where_inputs_are_no_images(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    audited(tmp_path, "worst", logger=logger)
    tags = EventAccumulator(logger.log_dir).Reload().Tags()
    assert tags["images"] == []
    assert "influence/queries/text_summary" in tags["tensors"]


# ---------------------------------------------------------------------------------------------- what may go wrong


def test_training_is_unchanged_by_queries(tmp_path: Path) -> None:
    found = []
    for queries in (None, Queries(DataLoader(VALIDATION, shuffle=True), measurement=AdversarialLoss.pgd(0.1, 2))):
        torch.manual_seed(5)
        model = Validated().double()
        made = make_trainer(tmp_path, callbacks=[InfluenceAudit(queries=queries)])
        made.fit(model, loader(TRAINING, shuffle=True), loader(VALIDATION))
        found.append([*(p.detach() for p in model.parameters()), torch.rand(3)])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_a_dry_run_goes_through_and_writes_nothing(tmp_path: Path) -> None:
    report, _, _ = audited(tmp_path, Queries(loader(VALIDATION), measurement="margin"), fast_dev_run=True)
    assert report.pairs is not None
    assert not list(tmp_path.rglob("pairs.parquet"))


@pytest.mark.parametrize("lacking", ["fit` was given", "no `validation_step`", "limit_val_batches=0"])
def test_worst_queries_without_validation_are_refused(tmp_path: Path, lacking: str) -> None:
    model = Classifier() if "step" in lacking else Validated()
    given = None if "given" in lacking else loader(VALIDATION)
    audit = InfluenceAudit(queries="worst")
    limit = 0 if "limit" in lacking else None
    trainer = make_trainer(tmp_path, callbacks=[audit], limit_val_batches=limit)
    with pytest.raises(MisconfigurationException, match=f"asks about validation examples, but .*{lacking}"):
        trainer.fit(model.double(), loader(TRAINING), given)
    assert trainer.global_step == 0


def test_validation_batches_of_another_kind_are_a_note(tmp_path: Path) -> None:
    class Different(Classifier):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("spread", batch["x"].std())

    other: Any = [{"x": torch.randn(5)} for _ in range(6)]
    with pytest.warns(UserWarning, match="no pairs of queries: .*can't be run on.*KeyError"):
        report, _, _ = audited(tmp_path, "worst", loader(TRAINING), loader(other), model=Different().double())
    assert report.status == "complete"
    assert report.pairs is None
    assert "self_influence" in report.columns


@pytest.mark.parametrize(
    ("measurement", "message"),
    [
        (
            lambda module, batch: module(batch[0]).sum(1),
            r"returned the shape \[13\]; expected a tensor with one number",
        ),
        (lambda module, batch: batch[0].mean(), "does not depend on the covered parameters"),
        (lambda module, batch: module(batch["x"]).mean(), "can't be measured on the query set"),
        (DemographicParityGap(torch.zeros(Q)), r"in the group 's=1' \(s=0: 13, s=1: 0\)"),
        (DemographicParityGap(torch.zeros(3)), r"`group` has the shape \[3\]; expected \[13\]"),
    ],
)
def test_bad_measurements_are_found_before_the_first_step(measurement: Any, message: str, tmp_path: Path) -> None:
    model = Validated().double()
    audit = InfluenceAudit(queries=Queries(measurement=measurement))
    trainer = make_trainer(tmp_path, callbacks=[audit])
    with pytest.raises(MisconfigurationException, match=message):
        trainer.fit(model, loader(TRAINING), loader(VALIDATION))
    assert trainer.global_step == 0


def test_a_stream_of_queries(tmp_path: Path) -> None:
    """Its examples are numbered in the order of the loader."""
    tables = []
    for queries in (DataLoader(Stream(), 4), DataLoader(vectors(), 4)):
        torch.manual_seed(0)
        audit = InfluenceAudit(queries=Queries(queries, count=4))
        make_trainer(tmp_path, callbacks=[audit]).fit(Validated(), loader(vectors(30, seed=2)))
        tables.append(audit.report.pairs)
    stream, plain = tables
    assert stream is not None
    assert plain is not None
    rows = plain["query"] < 4
    assert sorted(set(stream["query"].tolist())) == [0, 1, 2, 3]
    np.testing.assert_array_equal(stream["index"], plain["index"][rows])
    np.testing.assert_allclose(stream["score"], plain["score"][rows], rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: InfluenceAudit(queries="best"), "queries='best'; expected None, \"worst\""),  # type: ignore[arg-type]
        (lambda: InfluenceAudit(queries=[1, 2]), r"queries=\[1, 2\]; expected None"),  # type: ignore[arg-type]
        (lambda: Queries("best"), "which='best'; expected \"worst\" or a DataLoader"),  # type: ignore[arg-type]
        (lambda: Queries(count=0), "count=0; expected an integer >= 1"),
        (lambda: Queries(top=True), "top=True; expected an integer >= 1"),
        (
            lambda: Queries(normalise="cosine"),
            "normalise='cosine'; expected one of 'both', 'none', 'relative', 'leverage'",
        ),  # type: ignore[arg-type]
        (lambda: Queries(measurement="gap"), "measurement='gap'; expected 'loss' or 'margin'"),  # type: ignore[arg-type]
    ],
)
def test_arguments_out_of_range(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_integers_of_numpy_are_integers() -> None:
    asked = Queries(count=np.int64(3), top=np.uint8(2))  # type: ignore[arg-type]
    assert (asked.count, type(asked.count), asked.top, type(asked.top)) == (3, int, 2, int)


def test_queries_that_are_not_finite_are_not_asked_about(tmp_path: Path) -> None:
    x, y = (t.clone() for t in VALIDATION.tensors)
    x[3] = torch.nan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report, _, _ = audited(
            tmp_path, Queries(count=Q, measurement=Margin()), loader(TRAINING), loader(TensorDataset(x, y))
        )
    assert report.pairs is not None
    assert 3 not in report.pairs["query"]
    assert len(np.unique(report.pairs["number"])) == Q - 1
    assert any("1 examples with a non-finite margin" in note for note in report.manifest["notes"])
