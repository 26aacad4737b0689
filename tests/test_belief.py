"""Which labels are wrong, how many, and when nobody can tell."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import make_trainer
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from which_lightning import pl

from lightning_influence import AuditReport, InfluenceAudit
from lightning_influence.audit import belief
from lightning_influence.audit.belief import LabelBeliefs, believe
from lightning_influence.audit.ranking import judged
from lightning_influence.training.class_shares import ClassShares
from lightning_influence.training.dynamics import margin_of_label
from lightning_influence.training.evidence import EvidenceRecord, LabelEvidence
from lightning_influence.training.neighbours import nearest_labels, votes

pytestmark = pytest.mark.usefixtures("unverified")

N, CLASSES, DIMENSION = 600, 4, 8


def gaussians(distance: float, seed: int, flips: float = 0.1) -> tuple[Tensor, Tensor, Tensor]:
    """Features, true and given labels of classes so far apart, in standard deviations."""
    generator = torch.Generator().manual_seed(seed)
    true = torch.arange(N) % CLASSES
    features = torch.randn(N, DIMENSION, generator=generator) + distance / 2**0.5 * F.one_hot(true, DIMENSION)
    given = true.clone()
    flipped = torch.randperm(N, generator=generator)[: round(flips * N)]
    given[flipped] = (given[flipped] + torch.randint(1, CLASSES, flipped.shape, generator=generator)) % CLASSES
    return features, true, given


def evidence_of(features: Tensor, given: Tensor) -> LabelEvidence:
    """Evidence as a run gives it whose features are these from the first to the last epoch."""
    nearest, record = nearest_labels(features, given), EvidenceRecord(len(given))
    for trained in (False, True, True, True):
        record.add(torch.arange(len(given)), features, given, nearest, trained=trained)
    near = votes(nearest.clamp(min=0), 1 + int(given.max())) * (given >= 0)[:, None]
    found = record.about(range(len(given)), ClassShares.of(2 * near))
    assert found is not None
    return found


def audited(features: Tensor, given: Tensor) -> AuditReport:
    evidence = evidence_of(features, given)
    support, _ = margin_of_label(evidence.trained[:] + evidence.late[:], given)
    columns = {"index": np.arange(len(given)), "label": given.numpy(), "support": support.numpy()}
    ranked, beliefs = judged(columns, evidence)
    return AuditReport(ranked, {"labels": beliefs.described()})


def share_right(labels: Any, true: Tensor) -> float:
    return float((torch.as_tensor(labels) == true).double().mean())


def relabelled(report: AuditReport, given: Tensor) -> np.ndarray:
    labels = given.numpy().copy()
    labels[report.advice().indices] = report.columns["suggested"][report.advice().indices]
    return labels


# ------------------------------------------------------------------------------------------------- by hand


def test_the_confident_joint_of_seven_examples() -> None:
    shares = np.array(
        [[8, 1, 1, 0], [4, 5, 1, 0], [2, 6, 2, 0], [1, 4, 5, 0], [1, 1, 8, 0], [4, 2, 3, 1], [0, 1, 7, 2]],
        dtype=np.float64,
    )
    # On average, those who carry a label have 6, 5 and 6 of ten for it; nobody carries the last one.
    # The second is probably of class 1, which is as sure of it as usual and surer than 0; of the fourth and the sixth
    # nothing is known, as 2 and 0 are surer than the given ones, but not as sure as usual.
    given = np.array([0, 0, 1, 1, 2, 2, 2])
    joint = belief._confident_joint(ClassShares.of(torch.from_numpy(shares)), given)
    np.testing.assert_allclose(joint, [[1, 1, 0, 0], [0, 2, 0, 0], [0, 0, 3, 0], [0, 0, 0, 0]])
    # A label that nothing exceeds counts half where its share is less than usual: one of 2.5 is 1.2 of three.
    less = torch.tensor([[0.9, 0.1, 0.0], [0.4, 0.3, 0.3], [0.1, 0.9, 0.0], [0.2, 0.8, 0.0]]).double()
    halves = belief._confident_joint(ClassShares.of(less), np.array([0, 0, 0, 1]))
    np.testing.assert_allclose(halves, [[1.8, 1.2, 0], [0, 1, 0], [0, 0, 0]])
    # Of a class whose examples are all contradicted by what is not sure either, nothing is known: its labels stand.
    none = torch.tensor([[0.4, 0.6], [0.4, 0.6], [0.1, 0.9]]).double()
    alone = belief._confident_joint(ClassShares.of(none), np.array([0, 0, 1]))
    assert alone.tolist() == [[2, 0], [0, 1]]


def test_a_small_class_of_which_most_labels_are_wrong_does_not_draw_in_others() -> None:
    """Its usual share is so small that many have as much; they have more for their own class."""
    given = np.array([0] * 90 + [1] * 10)
    shares = np.tile([0.9, 0.1], (100, 1))
    shares[:45] = [0.8, 0.2]
    shares[96:] = [0.3, 0.7]
    joint = belief._confident_joint(ClassShares.of(torch.from_numpy(shares)), given)
    assert joint[0].tolist() == [90, 0]
    assert joint[1, 0] > 5


def test_the_number_of_wrong_labels_is_the_less_of_two_counts() -> None:
    """What the joint has off its diagonal, and how many the features contradict; of the surest, if they are few."""
    generator, told = np.random.default_rng(0), 0
    for sharpness in (0.5, 1.0, 3.0, 8.0) * 5:
        given = generator.integers(0, 3, 90)
        shares = np.exp(generator.normal(0, 1, (90, 3)) + sharpness * np.eye(3)[given])
        shares /= shares.sum(1, keepdims=True)
        beliefs, _ = believe(given, LabelEvidence(*[ClassShares.of(torch.from_numpy(shares))] * 4), np.arange(90))
        assert beliefs.joint is not None
        assert beliefs.joint.sum() == pytest.approx(90)
        rate = min(1 - np.trace(beliefs.joint) / 90, float((shares.argmax(1) != given).mean()))
        assert beliefs.noise_rate <= rate + 1e-9
        assert beliefs.noise_rate == pytest.approx(rate) or not beliefs.told or rate <= 0.05
        told += beliefs.told
        assert 0 <= beliefs.low <= beliefs.noise_rate <= beliefs.high <= 1
    assert told


def test_nothing_known_is_nothing_believed() -> None:
    zeros = torch.zeros(5, 3)
    for labels, shares in (
        (np.full(5, -1), torch.full((5, 3), 1 / 3)),
        (np.arange(5) % 3, zeros),
        (np.zeros(5, dtype=np.int64), torch.ones(5, 1)),
    ):
        beliefs, columns = believe(labels, LabelEvidence(*[ClassShares.of(shares)] * 4), np.arange(5))
        assert not beliefs.told
        assert beliefs.reason == "nothing was recorded that tells labels apart"
        assert np.isnan([beliefs.noise_rate, beliefs.low, beliefs.high]).all()
        assert (columns["suggested"] == -1).all()
        assert np.isnan(columns["wrong_probability"]).all()


def test_one_class_only_tells_nothing_of_its_labels() -> None:
    """As of a loss of margins, whose labels are all the same: "no label is wrong" would be said of what has none."""
    labels, shares = np.ones(40, dtype=np.int64), torch.tensor([[0.1, 0.9]]).repeat(40, 1)
    beliefs, columns = believe(labels, LabelEvidence(*[ClassShares.of(shares)] * 4), np.arange(40))
    assert (beliefs.verdict, beliefs.reason) == ("cannot tell", "all given labels are the same")
    assert np.isnan(beliefs.noise_rate)
    assert np.isnan(columns["wrong_probability"]).all()


# ----------------------------------------------------------------------------------------------- Gaussians


@pytest.mark.parametrize("seed", range(4))
def test_flips_of_classes_that_are_apart_are_told(seed: int) -> None:
    features, true, given = gaussians(7.0, seed)
    report, flipped = audited(features, given), np.flatnonzero(true != given)
    beliefs, found = report.beliefs, set(report.candidates.tolist())
    assert beliefs.told
    assert abs(beliefs.noise_rate - 0.1) < 0.03
    assert beliefs.low <= 0.1 <= beliefs.high
    assert len(report.candidates) == round(beliefs.noise_rate * N)
    assert 2 * len(found & set(flipped)) / (len(found) + len(flipped)) >= 0.9
    probability = report.columns["wrong_probability"]
    assert probability.mean() == pytest.approx(beliefs.noise_rate, abs=1e-6)
    assert probability[flipped].mean() > 0.8
    assert (report.columns["suggested"][flipped] == true.numpy()[flipped]).mean() > 0.95
    assert (report.columns["suggested"] != given.numpy()).all()
    assert beliefs.joint is not None
    assert np.diag(beliefs.joint).sum() == pytest.approx(N * 0.9, abs=N * 0.03)
    assert share_right(relabelled(report, given), true) > 0.97
    assert "% are wrong" in str(report)


@pytest.mark.parametrize("flips", [0.0, 0.1])
@pytest.mark.parametrize("seed", range(4))
def test_classes_that_overlap_are_refused_with_the_reason(seed: int, flips: float) -> None:
    """A quarter of the labels looks wrong, and none has to be."""
    features, true, given = gaussians(2.0, seed, flips)
    report = audited(features, given)
    assert report.beliefs.verdict == "cannot tell"
    assert "the classes overlap" in report.beliefs.reason
    assert report.candidates.tolist() == []
    assert len(report.advice()) == 0
    assert report.columns["wrong_probability"].max() < 0.5
    assert relabelled(report, given).tolist() == given.tolist()
    assert "cannot tell which are wrong" in str(report)


@pytest.mark.parametrize("distance", [4.0, 5.0, 7.0])
@pytest.mark.parametrize("seed", range(3))
def test_clean_data_have_next_to_no_candidates(seed: int, distance: float) -> None:
    features, true, given = gaussians(distance, seed, flips=0.0)
    report = audited(features, given)
    assert len(report.candidates) <= 0.01 * N
    assert report.beliefs.told
    assert report.beliefs.noise_rate < 0.01
    assert report.columns["wrong_probability"].mean() == pytest.approx(
        max(report.beliefs.noise_rate, 0.5 / N), abs=1e-6
    )


@pytest.mark.parametrize("flips", [0.0, 0.02, 0.1])
@pytest.mark.parametrize("distance", [2.0, 2.5, 4.0, 6.0])
def test_relabelling_by_default_does_no_harm(distance: float, flips: float) -> None:
    """However near the classes are: beyond what a hundredth of the labels can do."""
    for seed in range(2):
        features, true, given = gaussians(distance, seed, flips)
        gained = share_right(relabelled(audited(features, given), given), true) - share_right(given, true)
        assert gained >= -0.01
        assert gained > 0.7 * flips or distance < 6 or not flips


@pytest.mark.parametrize(
    ("distance", "flips"), [(0.0, 0.0), (0.5, 0.0), (1.0, 0.1), (0.0, 0.1), (1.5, 0.1), (1.5, 0.3)]
)
def test_relabelling_where_nothing_tells_the_classes_apart(distance: float, flips: float) -> None:
    """The surest contradict as many labels as all do: that alone once passed for labels that are wrong at random."""
    for seed in range(4):
        features, true, given = gaussians(distance, seed, flips)
        assert share_right(relabelled(audited(features, given), given), true) >= share_right(given, true) - 0.01


def test_a_class_that_looks_like_another_is_spared() -> None:
    """Twenty examples that only their label tells from a larger class: that most are wrong is no safe bet."""
    features, true, given = gaussians(7.0, 0)
    rare = np.flatnonzero(true.numpy() == 0)[:20]
    given[rare] = CLASSES
    report = audited(features, given)
    assert report.beliefs.told
    assert len(set(report.candidates.tolist()) & set(rare.tolist())) > 10
    assert set(report.advice().spared) == {CLASSES}
    assert (given[report.advice().indices] != CLASSES).all()
    assert len(report.advice()) > 30


def lopsided(seed: int, flips: float, distance: float = 7.0) -> tuple[Tensor, Tensor, Tensor]:
    """Two of four classes have a twentieth of the examples."""
    features, true, given = gaussians(distance, seed, 0.0)
    more, _, _ = gaussians(distance, seed + 100, 0.0)
    features, true = torch.cat([features, more]), torch.cat([true, true])
    kept = (true < 2) | (torch.arange(2 * N) < N // 20)
    features, true = features[kept], true[kept]
    generator, given = torch.Generator().manual_seed(seed), true.clone()
    flipped = torch.randperm(len(true), generator=generator)[: round(flips * len(true))]
    given[flipped] = (given[flipped] + torch.randint(1, CLASSES, flipped.shape, generator=generator)) % CLASSES
    return features, true, given


@pytest.mark.parametrize("flips", [0.0, 0.1])
@pytest.mark.parametrize("seed", range(4))
def test_flips_among_classes_of_which_some_are_rare_are_told(seed: int, flips: float) -> None:
    """Of those that carry a rare label, most have got it by accident."""
    features, true, given = lopsided(seed, flips)
    report, flipped = audited(features, given), np.flatnonzero(true != given)
    assert report.beliefs.told, report.beliefs.reason
    assert abs(report.beliefs.noise_rate - flips) < 0.02
    found = set(report.candidates.tolist())
    assert len(found & set(flipped)) >= 0.8 * len(flipped)
    assert len(found - set(flipped)) <= 0.01 * N
    assert share_right(relabelled(report, given), true) >= share_right(given, true)


@pytest.mark.parametrize("flips", [0.0, 0.05, 0.1])
@pytest.mark.parametrize("seed", range(3))
def test_a_class_that_is_not_told_from_another_is_refused(seed: int, flips: float) -> None:
    """A fifth of the examples have label 1, more often the higher the first feature, yet nowhere most of them."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(2000, 4, generator=generator)
    true = (torch.rand(2000, generator=generator) < (0.2 + 0.1 * features[:, 0]).clamp(0, 0.5)).long()
    flipped = torch.rand(2000, generator=generator) < flips
    given = torch.where(flipped, 1 - true, true)
    report = audited(features, given)
    assert not report.beliefs.told
    assert "some class cannot be told from the others" in report.beliefs.reason
    assert relabelled(report, given).tolist() == given.tolist()


@pytest.mark.parametrize("seed", range(3))
def test_an_example_that_turned_up_later_does_not_count_for_the_first_features(seed: int) -> None:
    """Its zeros stood for class 0: features that had told nothing, it seemed, so that less was asked of later ones."""
    features, _, given = gaussians(2.0, seed)
    told = evidence_of(features, given)
    told.first[:][torch.randperm(N, generator=torch.Generator().manual_seed(0))[: N // 2]] = 0
    beliefs, _ = believe(given.numpy(), told, np.arange(N))
    assert "the classes overlap" in beliefs.reason
    told.first[:].zero_()
    beliefs, _ = believe(given.numpy(), told, np.arange(N))
    assert beliefs.noise_rate > 0


# --------------------------------------------------------------------------------- what must not matter


def test_neither_the_order_of_examples_nor_names_of_classes_matter() -> None:
    for distance in (7.0, 3.0):
        features, _, given = gaussians(distance, 1)
        plain, order = audited(features, given), torch.randperm(N, generator=torch.Generator().manual_seed(0))
        names = torch.tensor([2, 0, 3, 1])
        permuted, renamed = audited(features[order], given[order]), audited(features, names[given])
        for other, rows, name in ((permuted, order.numpy(), torch.arange(CLASSES)), (renamed, np.arange(N), names)):
            assert other.beliefs.verdict == plain.beliefs.verdict
            for value in ("noise_rate", "low", "high"):
                assert getattr(other.beliefs, value) == pytest.approx(getattr(plain.beliefs, value), abs=1e-9)
            np.testing.assert_allclose(
                other.columns["wrong_probability"], plain.columns["wrong_probability"][rows], atol=1e-5
            )
            likely = other.columns["wrong_probability"] > 0.05  # of no other class at all, the first is taken
            suggested = name[plain.columns["suggested"][rows]].numpy()
            assert other.columns["suggested"][likely].tolist() == suggested[likely].tolist()
            assert other.columns["candidate"].tolist() == plain.columns["candidate"][rows].tolist()
            assert plain.beliefs.joint is not None
            assert other.beliefs.joint is not None
            np.testing.assert_allclose(other.beliefs.joint[np.ix_(name, name)], plain.beliefs.joint, atol=1e-9)


def test_examples_without_a_label_change_nothing_for_the_others() -> None:
    features, _, given = gaussians(7.0, 2)
    plain = audited(features, given)
    more = torch.cat([given, torch.full((50,), -1)])
    found = audited(torch.cat([features, features[:50]]), more)
    np.testing.assert_allclose(found.columns["wrong_probability"][:N], plain.columns["wrong_probability"], atol=1e-5)
    assert np.isnan(found.columns["wrong_probability"][N:]).all()
    assert (found.columns["suggested"][N:] == -1).all()
    assert found.candidates.tolist() == plain.candidates.tolist()


# ----------------------------------------------------------------------------------------------- on disk


def test_beliefs_survive_the_disk(tmp_path: Path) -> None:
    features, _, given = gaussians(7.0, 3)
    report = audited(features, given).save(tmp_path / "told")
    assert report.directory is not None
    there, here = AuditReport.load(report.directory).beliefs, report.beliefs
    assert (there.verdict, there.reason, there.noise_rate) == ("told", "", here.noise_rate)
    assert (there.low, there.high) == (here.low, here.high)
    np.testing.assert_array_equal(there.joint, here.joint)
    labels = json.loads((report.directory / "manifest.json").read_text())["labels"]
    assert labels["classes"] == list(range(CLASSES))
    assert {"verdict", "reason", "noise_rate", "noise_rate_low", "noise_rate_high", "joint"} <= set(labels)

    unknown = LabelBeliefs(reason="who knows")
    ranked, _ = judged({"index": np.arange(3), "loss": np.arange(3.0)}, beliefs=unknown)
    report = AuditReport(ranked, {"labels": unknown.described()}).save(tmp_path / "unknown")
    assert report.directory is not None
    labels = json.loads((report.directory / "manifest.json").read_text())["labels"]
    assert (labels["noise_rate"], labels["verdict"]) == (None, "cannot tell")
    assert "joint" not in labels
    found = AuditReport.load(report.directory)
    assert np.isnan([found.beliefs.noise_rate, found.beliefs.low, found.beliefs.high]).all()
    assert "cannot tell which are wrong: who knows" in str(found)


def test_audits_from_before_there_were_beliefs() -> None:
    old = AuditReport(judged({"index": np.arange(3), "loss": np.arange(3.0)})[0], {"status": "complete"})
    assert not old.beliefs.told
    assert str(old.advice()) == "nothing to act on: nothing is recorded of it."


# ---------------------------------------------------------------------------------------------- real runs


class Memorising(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


@pytest.fixture(scope="module")
def digits() -> tuple[TensorDataset, np.ndarray]:
    pixels, labels = load_digits(return_X_y=True)
    x, given = torch.from_numpy(pixels[:600]).float(), torch.from_numpy(labels[:600]).long()
    generator = torch.Generator().manual_seed(0)
    flipped = torch.randperm(600, generator=generator)[:60]
    given[flipped] = (given[flipped] + torch.randint(1, 10, (60,), generator=generator)) % 10
    return TensorDataset(x, given), flipped.numpy()


def trained(data: TensorDataset, directory: Path, audit: InfluenceAudit | None) -> Memorising:
    pl.seed_everything(0, verbose=False)
    model = Memorising()
    trainer = make_trainer(directory, callbacks=[audit] if audit else [], max_epochs=14, logger=False)
    trainer.fit(model, DataLoader(data, batch_size=6, shuffle=True))
    return model


@pytest.fixture(scope="module")
def unwatched(digits: Any, tmp_path_factory: pytest.TempPathFactory) -> Memorising:
    return trained(digits[0], tmp_path_factory.mktemp("unwatched"), None)


@pytest.mark.parametrize("tracin", ["epoch", "step", None])
def test_a_network_that_knows_wrong_labels_by_heart(tracin: Any, digits: Any, unwatched: Any, tmp_path: Path) -> None:
    """In the end it contradicts a third of the flips; what the others said before finds nine of ten."""
    data, flipped = digits
    audit = InfluenceAudit(tracin=tracin, curvature="identity", known_noise=flipped)
    model = trained(data, tmp_path, audit)
    for name, value in unwatched.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    report = audit.report
    assert report is not None
    by_heart = report.columns["predicted"] != report.columns["label"]
    assert by_heart[flipped].mean() < 0.5
    found = set(report.candidates.tolist())
    assert report.beliefs.told
    assert len(found & set(flipped)) >= 0.8 * len(flipped)
    assert len(found & set(flipped)) >= 0.8 * len(found)
    assert abs(report.beliefs.noise_rate - 0.1) < 0.05
    assert report.manifest["ranked_by"] == ["support"]


def test_only_classes_that_somebody_has_are_suggested() -> None:
    """Ties went to the smallest number: of labels 0 and 5, class 1 was suggested."""
    features, _, given = gaussians(6.0, 0)
    two = torch.where(given == 0, 0, 5)
    report = audited(features, two)
    assert set(report.columns["suggested"].tolist()) == {0, 5}
    alone = audited(features, torch.full_like(given, 3))
    assert set(alone.columns["suggested"].tolist()) == {-1}


@pytest.mark.parametrize("tracin", ["epoch", None])
def test_a_run_that_draws_a_part_of_the_data_can_tell(tracin: Any, digits: Any, tmp_path: Path) -> None:
    """Before the first batch nobody knows which examples it will draw: no reason to look at none of them ever."""
    data, flipped = digits
    audit = InfluenceAudit(tracin=tracin, curvature="identity")
    trainer = make_trainer(tmp_path, callbacks=[audit], max_epochs=8, limit_train_batches=50, logger=False)
    trainer.fit(Memorising(), DataLoader(data, batch_size=6, shuffle=True))
    report = audit.report
    assert report is not None
    assert report.beliefs.told, report.beliefs.reason
    found = set(report.candidates.tolist())
    assert len(found & set(flipped)) >= 0.5 * len(flipped)
    assert len(found & set(flipped)) >= 0.7 * len(found)
