"""Labels that are known to be right: the surplus of suspicious ones among the others is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import Classifier, loader, make_trainer, vectors
from which_lightning import MisconfigurationException

from lightning_influence import InfluenceAudit
from lightning_influence.audit.acting import advice
from lightning_influence.audit.belief import LabelBeliefs
from lightning_influence.audit.ranking import judged
from lightning_influence.audit.trusted import wrong_beside_trusted
from lightning_influence.training.class_shares import ClassShares
from lightning_influence.training.evidence import LabelEvidence


def sample(n: int, share: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Suspicion, which labels are wrong (two standard deviations more suspicious), and which are trusted."""
    generator = np.random.default_rng(seed)
    wrong = np.arange(n) < round(share * n)
    trusted = np.zeros(n, dtype=bool)
    trusted[generator.choice(np.flatnonzero(~wrong), 400, replace=False)] = True
    return generator.normal(size=n) + 2 * wrong, wrong, trusted


def test_the_surplus_is_found() -> None:
    """Means over samples: how many of 400 trusted lie above a threshold is a matter of chance."""
    measured = []
    for seed in range(6):
        suspicion, wrong, trusted = sample(4000, 0.15, seed)
        found = wrong_beside_trusted(suspicion, trusted, np.zeros(len(suspicion), dtype=np.int64))
        chosen = found >= 0.5
        measured.append((wrong[chosen].mean(), chosen[wrong].mean(), found[~trusted].mean()))
        assert not found[trusted].any()
        others = np.argsort(-suspicion[~trusted])
        assert (np.diff(found[~trusted][others]) <= 1e-12).all(), "the more suspicious, the more probably wrong"
    precision, recall, rate = np.mean(measured, 0)
    assert precision > 0.6
    assert recall > 0.4
    assert rate == pytest.approx(0.165, abs=0.05)


def agreed_with(suspicion: Any) -> tuple[dict[str, Any], LabelEvidence]:
    """A run that sees no mistake in two classes, and how it ranks the examples."""
    labels = np.arange(len(suspicion)) % 2
    agreed = torch.nn.functional.one_hot(torch.from_numpy(labels), 2).double() * 0.8 + 0.1
    columns = {"index": np.arange(len(labels)), "label": labels, "support": -suspicion}
    return columns, LabelEvidence(*map(ClassShares.of, (4 * agreed, agreed, agreed, 2 * agreed)))


@pytest.mark.parametrize("seed", range(4))
def test_where_all_are_right_nothing_is_found(seed: int) -> None:
    suspicion, _, trusted = sample(4000, 0.0, seed)
    assert wrong_beside_trusted(suspicion, trusted, np.zeros(len(suspicion), dtype=np.int64)).mean() < 0.05


def test_units_and_order_do_not_matter() -> None:
    suspicion, _, trusted = sample(1000, 0.2)
    one = np.zeros(1000, dtype=np.int64)
    found, order = wrong_beside_trusted(suspicion, trusted, one), np.random.default_rng(1).permutation(1000)
    np.testing.assert_allclose(wrong_beside_trusted(np.exp(suspicion), trusted, one), found)
    np.testing.assert_allclose(wrong_beside_trusted(suspicion[order], trusted[order], one), found[order])


def test_mistakes_that_the_run_shares() -> None:
    """The belief sees none of them: only beside trusted labels there are candidates, and none of those is one."""
    suspicion, wrong, trusted = sample(4000, 0.15)
    columns, evidence = agreed_with(suspicion)
    alone, beliefs = judged(columns, evidence)
    assert (beliefs.verdict, int(alone["candidate"].sum())) == ("told", 0)
    beside, beliefs = judged(columns, evidence, trusted=np.flatnonzero(trusted))
    assert isinstance(beliefs, LabelBeliefs)
    assert beliefs.low <= beliefs.noise_rate <= beliefs.high
    assert 0.08 < beliefs.noise_rate < 0.22
    assert wrong[beside["candidate"]].mean() > 0.6
    assert not beside["candidate"][trusted].any()
    assert not beside["wrong_probability"][trusted].any()


@pytest.mark.usefixtures("sure")
def test_a_run_beside_trusted_labels(tmp_path: Path) -> None:
    trusted: list[int] | None = None
    for _ in range(2):  # trusted labels that a run calls wrong would refute it: those that it agrees with most
        torch.manual_seed(0)
        audit = InfluenceAudit(trusted=trusted)
        make_trainer(tmp_path, callbacks=[audit]).fit(Classifier(), loader(vectors()))
        report, asked, trusted = audit.report, trusted, audit.report.ranking[-3:].tolist()
    assert asked is not None
    assert report.manifest["labels"]["trusted"] == 3
    assert not set(asked) & set(report.candidates.tolist())
    assert len(report.candidates)
    assert report.columns["wrong_probability"][asked].tolist() == [0.0] * 3


def test_bad_ones(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="trusted holds negative or repeated indices"):
        InfluenceAudit(trusted=[1, 1])
    with pytest.raises(ValueError, match=r"trusted: indices must be integers, got \[0.5\]"):
        InfluenceAudit(trusted=[0.5])  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"the examples \[2\] are in trusted and in known_noise"):
        InfluenceAudit(trusted=[1, 2], known_noise=[2, 3])
    trainer = make_trainer(tmp_path, callbacks=[InfluenceAudit(trusted=[10_000])])
    with pytest.raises(MisconfigurationException, match="trusted holds the index 10000"):
        trainer.fit(Classifier(), loader(vectors()))


def test_trusted_labels_take_no_place_of_others() -> None:
    """The rate is a share of all labels: of the others alone it was too few the more were trusted."""
    suspicion, wrong, _ = sample(4000, 0.15)
    columns, evidence = agreed_with(suspicion)
    counts = []
    for share in (0.2, 0.8):
        right = np.flatnonzero(~wrong)
        found, _ = judged(columns, evidence, trusted=right[: int(share * len(right))])
        counts.append(int(found["candidate"].sum()))
    assert counts[1] > 0.7 * counts[0]
    # Once more, of what several audits have said alike: who is trusted by all is known by the 0.
    merged = {name: found[name] for name in (*columns, "suggested", "wrong_probability")}
    again, _ = judged(merged, beliefs=LabelBeliefs("told", noise_rate=0.5))
    assert not again["candidate"][right[: int(0.8 * len(right))]].any()


def test_classes_that_were_checked_unevenly() -> None:
    """An easy class's right labels say nothing of a hard one's: all 1,600 of those were advised to be changed."""
    suspicion, _, _ = sample(2000, 0.0)
    labels = (np.arange(2000) % 5 > 0).astype(np.int64)
    suspicion += 3 * labels  # right, but harder to tell
    for checked in (np.flatnonzero(labels == 0)[:300], np.r_[np.flatnonzero(labels == 0)[:250], 1:40]):
        trusted = np.isin(np.arange(2000), checked)
        found = wrong_beside_trusted(suspicion, trusted, labels)
        assert np.isnan(found[(labels == 1) & ~trusted]).all() == (not (labels[checked] == 1).any())
        assert np.nanmean(found) < 0.05
        assert np.nanmax(found) < 0.5


def test_labels_of_a_class_that_nobody_checked_are_no_candidates() -> None:
    suspicion, wrong, trusted = sample(4000, 0.15)
    labels = np.arange(4000) % 3
    agreed = torch.nn.functional.one_hot(torch.from_numpy(labels), 3).double() * 0.8 + 0.1
    columns: dict[str, Any] = {"index": np.arange(4000), "label": labels, "support": -suspicion}
    evidence = LabelEvidence(*map(ClassShares.of, (4 * agreed, agreed, agreed, 2 * agreed)))
    found, beliefs = judged(columns, evidence, trusted=np.flatnonzero(trusted & (labels < 2)))
    assert beliefs.told
    assert set(labels[found["candidate"]]) == {0, 1}
    assert np.isnan(found["wrong_probability"][labels == 2]).all()
    acted = advice(found, beliefs, 0.5).indices
    assert acted
    assert wrong[acted].mean() > 0.5


def test_a_run_that_calls_right_labels_wrong_is_not_believed() -> None:
    """Half of what it calls wrong are labels that somebody has checked: 389 of 500 changes made things worse."""
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 4, 2000)
    seen = np.where(generator.random(2000) < 0.25, (labels + 1) % 4, labels)
    shares = torch.nn.functional.one_hot(torch.from_numpy(seen), 4).double() * 0.8 + 0.05
    columns: dict[str, Any] = {"index": np.arange(2000), "label": labels, "support": (seen == labels) * 1.0}
    evidence = LabelEvidence(*map(ClassShares.of, (4 * shares, shares, shares, 2 * shares)))
    alone, beliefs = judged(columns, evidence)
    assert beliefs.told
    assert alone["candidate"].sum() > 400
    beside, beliefs = judged(columns, evidence, trusted=np.arange(300))
    assert not beliefs.told
    assert "of the 300 labels for wrong that are known to be right" in beliefs.reason
    assert not beside["candidate"].any()
    few, beliefs = judged(columns, evidence, trusted=np.flatnonzero(seen == labels)[:300])
    assert beliefs.told, "none of those was called wrong"
    assert few["candidate"].sum() > 400
