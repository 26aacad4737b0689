"""Audits of several runs merged into one report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import Classifier, loader, make_trainer, vectors

from lightning_influence import InfluenceAudit
from lightning_influence.audit.belief import LabelBeliefs
from lightning_influence.audit.ensemble import EnsembleError
from lightning_influence.audit.ranking import rank
from lightning_influence.audit.report import AuditReport

N = 6


def report(seed: int, directory: Path | None = None, manifest: Any = None, **columns: Any) -> AuditReport:
    generator = np.random.default_rng(seed)
    own = {
        "index": np.arange(N),
        "label": np.array([0, 1, 2, 0, 1, 2]),
        "suggested": np.array([0, 1, 2, 0, 1, 2]),
        "prob_margin": generator.uniform(0.1, 0.9, N),
        "el2n": generator.uniform(0, 1, N),
        "self_influence": generator.uniform(0, 5, N),
        "times_seen": np.full(N, 3),
        "finite": np.ones(N, dtype=bool),
        **columns,
    }
    about = {"status": "complete", "fingerprint": {"data": "Digits 12ab", "model": "Net 34cd"}, "notes": ["careful"]}
    return AuditReport(rank(own), about | (manifest or {}), directory)


def test_scores_are_averaged_and_ranked_anew() -> None:
    """As they are: z-scores of every run would give a run of small influences the weight of one of large ones."""
    first, second = report(0), report(1, self_influence=np.arange(N) * 1e-3)
    found = AuditReport.ensemble([first, second])
    for name in ("el2n", "self_influence", "prob_margin"):
        np.testing.assert_allclose(found.columns[name], (first.columns[name] + second.columns[name]) / 2)
    assert found.columns["times_seen"].tolist() == [6] * N
    z = [(v - v.mean()) / v.std() for v in (found.columns["el2n"], -found.columns["prob_margin"])]
    np.testing.assert_allclose(found.columns["suspicion"], sum(z))
    assert found.ranking.tolist() == np.argsort(-sum(z), kind="stable").tolist()
    assert found.ranking.tolist() != first.ranking.tolist()
    assert found.manifest["ranked_by"] == ["el2n", "prob_margin"]


def test_suggestions_are_votes_that_weigh_as_much_as_a_run_is_sure() -> None:
    runs = [  # margins below 0 contradict the label
        report(0, suggested=np.array([1, 0, 2, 1, -1, 0]), prob_margin=np.array([-0.9, -0.2, 0.5, -0.4, np.nan, -0.3])),
        report(1, suggested=np.array([0, 1, 2, 2, 0, 1]), prob_margin=np.array([0.3, 0.1, 0.5, -0.5, -0.1, -0.3])),
        report(2, suggested=np.array([0, 1, 2, 2, -1, 2]), prob_margin=np.array([0.3, 0.2, 0.5, -0.1, np.nan, 0.3])),
    ]
    found = AuditReport.ensemble(runs)
    # .9 against .3 + .3; .2 against .1 + .2; all agree; .4 against .5 + .1; one knows; a tie goes to the smallest
    assert found.columns["suggested"].tolist() == [1, 1, 2, 2, 0, 0]


def test_with_two_classes_the_vote_is_the_mean_probability() -> None:
    generator = np.random.default_rng(0)
    label = (np.arange(200) == 0).astype(np.int64)  # all of one class would be no classes
    probabilities = generator.uniform(0, 1, (5, 200))  # of class 1
    columns: Any = {"index": np.arange(200), "label": label, "el2n": probabilities[0]}
    runs = [
        AuditReport(rank(columns | {"suggested": (p > 0.5).astype(np.int64), "prob_margin": 1 - 2 * p}))
        for p in probabilities
    ]
    found = AuditReport.ensemble(runs).columns
    assert found["suggested"].tolist() == (probabilities.mean(0) > 0.5).astype(int).tolist()
    np.testing.assert_allclose(found["prob_margin"], 1 - 2 * probabilities.mean(0))
    plain = (np.mean(probabilities > 0.5, axis=0) > 0.5).astype(int)
    assert found["suggested"].tolist() != plain.tolist()  # heads alone would say something else


JOINT = np.array([[1.5, 0.5], [0.0, 4.0]])


def told(rate: float, **changes: Any) -> dict[str, Any]:
    beliefs = {"noise_rate": rate, "low": rate - 0.1, "high": rate + 0.1, "joint": JOINT * (1 + rate)} | changes
    return {"labels": LabelBeliefs("told", **beliefs).described()}


UNSURE = {"labels": LabelBeliefs(reason="the classes overlap", noise_rate=0.6, low=0, high=0.9).described()}


def test_what_most_runs_that_can_tell_believe_of_the_labels() -> None:
    """Means over these; the candidates are as many of the common ranking."""
    found = AuditReport.ensemble([report(0, None, told(0.2)), report(1, None, told(0.4)), report(2, None, UNSURE)])
    beliefs = found.beliefs
    assert beliefs.told
    assert (beliefs.noise_rate, beliefs.low, beliefs.high) == pytest.approx((0.3, 0.2, 0.4))
    np.testing.assert_allclose(beliefs.joint, JOINT * 1.3)
    assert found.candidates.tolist() == found.ranking[:2].tolist()
    assert found.manifest["labels"]["verdict"] == "told"


@pytest.mark.parametrize("others", [[UNSURE], [UNSURE, UNSURE], [{}]])
def test_unless_most_can_tell_nobody_can(others: list[Any]) -> None:
    """Old audits, which have no such entry, can't tell either."""
    found = AuditReport.ensemble([report(0, None, told(0.2)), *(report(1, None, other) for other in others)])
    assert not found.beliefs.told
    assert found.candidates.tolist() == []
    assert found.beliefs.reason == ("the classes overlap" if others[0] else "nothing is recorded of it")


def test_joints_of_other_shapes_are_not_averaged() -> None:
    for other in (told(0.4, joint=np.eye(3)), told(0.4, joint=None)):
        beliefs = AuditReport.ensemble([report(0, None, told(0.2)), report(1, None, other)]).beliefs
        assert beliefs.joint is None
        assert beliefs.noise_rate == pytest.approx(0.3)


def test_predictions_are_a_plain_vote() -> None:
    runs = [report(seed, predicted=np.full(N, guess)) for seed, guess in enumerate((2, 1, 2))]
    assert AuditReport.ensemble(runs).columns["predicted"].tolist() == [2] * N


def test_examples_that_a_run_does_not_know() -> None:
    el2n = np.array([np.nan, 1.0, 1, 1, 1, 1])
    finite = np.array([True, True, True, True, True, False])
    found = AuditReport.ensemble([report(0, el2n=el2n), report(1, el2n=np.full(N, 3.0), finite=finite)])
    assert found.columns["el2n"].tolist() == [3, 2, 2, 2, 2, 2]
    assert found.nonfinite.tolist() == [5]
    assert found.ranking[-1] == 5
    assert found.manifest["nonfinite"].tolist() == [5]


def test_columns_that_not_all_have_are_left_out_and_named() -> None:
    found = AuditReport.ensemble([report(0, harm=np.ones(N)), report(1)])
    assert "harm" not in found.columns
    assert "columns that not all audits have were left out: harm." in found.manifest["notes"]


def test_the_manifest_says_what_it_is(tmp_path: Path) -> None:
    other = {"fingerprint": {"data": "Digits 12ab", "model": "Wide 56ef"}}
    found = AuditReport.ensemble([report(0, tmp_path / "a"), report(1, tmp_path / "b", other), report(2)])
    assert found.manifest["ensemble"] == [str(tmp_path / "a"), str(tmp_path / "b"), "audit 2"]
    assert found.manifest["fingerprint"] == {"data": "Digits 12ab", "model": "Net 34cd, Wide 56ef"}
    assert found.status == "complete"
    assert found.directory is None
    assert found.manifest["notes"].count("careful") == 1
    assert "an ensemble of 3 audits" in str(found)


def test_audits_of_real_runs(tmp_path: Path) -> None:
    """Two seeds on the same data, read back from their directories; a run on other data does not mix with them."""
    directories = []
    for seed, data in ((0, vectors(30)), (1, vectors(30)), (2, vectors(30, seed=7))):
        torch.manual_seed(seed)
        trainer = make_trainer(tmp_path / str(seed), callbacks=[audit := InfluenceAudit()])
        trainer.fit(Classifier(), loader(data))
        assert audit.has_report
        directories.append(audit.report.directory)
    reports = [AuditReport.load(str(directory)) for directory in directories]
    found = AuditReport.ensemble(reports[:2])
    assert found.manifest["ensemble"] == [str(directory) for directory in directories[:2]]
    own = [each.columns["self_influence"] for each in reports[:2]]
    np.testing.assert_allclose(found.columns["self_influence"], np.mean(own, axis=0))
    assert not np.allclose(own[0], own[1])
    assert set(found.columns) == set(reports[0].columns)
    assert sorted(found.ranking.tolist()) == list(range(30))
    with pytest.raises(EnsembleError, match="audit 1 has another column 'label'|different training data"):
        AuditReport.ensemble([reports[0], reports[2]])


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"manifest": {"fingerprint": {"data": "Digits 99"}}}, "different training data .*audit 1: Digits 99"),
        ({"manifest": {"status": "interrupted"}}, "audit 1 is 'interrupted'; expected complete audits"),
        ({"label": np.zeros(N, dtype=np.int64)}, "audit 1 has another column 'label' than audit 0"),
        ({"index": np.arange(N) + 1}, "audit 1 has another column 'index' than audit 0"),
    ],
)
def test_audits_that_do_not_go_together(other: dict[str, Any], message: str) -> None:
    with pytest.raises(EnsembleError, match=message):
        AuditReport.ensemble([report(0), report(1, **other)])


def test_too_few_or_half_labelled() -> None:
    with pytest.raises(EnsembleError, match="1 audits to merge; expected two at least"):
        AuditReport.ensemble([report(0)])
    bare = report(1)
    columns = {name: values for name, values in bare.columns.items() if name != "label"}
    with pytest.raises(EnsembleError, match="some audits have the column 'label' and others have not"):
        AuditReport.ensemble([report(0), AuditReport(columns, bare.manifest)])
