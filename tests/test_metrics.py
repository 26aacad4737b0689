"""Mislabel detection against scikit-learn, the linear datamodeling score against scipy."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from own_processes import together
from scipy.stats import spearmanr
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc
from torchmetrics.functional.regression import spearman_corrcoef

from lightning_influence.core.ranks import average_ranks
from lightning_influence.metrics import (
    LinearDatamodelingScore,
    MislabelDetection,
    _average_ranks,
    linear_datamodeling_correlations,
    mislabel_detection,
)


def noisy_scores(n: int = 400, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    is_mislabelled = torch.rand(n, generator=generator) < 0.1
    scores = torch.randn(n, generator=generator, dtype=torch.float64) + 1.5 * is_mislabelled
    return scores, is_mislabelled


SHAPES = {
    "in the unit interval": lambda scores: torch.sigmoid(scores),
    "eight decades": lambda scores: 10 ** (4 * scores / scores.abs().max() + 4),
    "negative": lambda scores: scores - 100,
    "many ties": lambda scores: scores.round(),
    "two values": lambda scores: (scores > 1).double(),
    "integers": lambda scores: (scores * 3).round().to(torch.int16),
    "infinities": lambda scores: torch.where(scores.abs() > 2, scores / 0, scores),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", [0, 1])
def test_agrees_with_scikit_learn(shape: str, seed: int) -> None:
    scores, is_mislabelled = noisy_scores(seed=seed)
    scores = SHAPES[shape](scores)
    result = mislabel_detection(scores, is_mislabelled)

    plain = np.clip(scores.double().numpy(), -1e30, 1e30)
    assert result["auroc"] == pytest.approx(roc_auc_score(is_mislabelled, plain), abs=1e-12)
    assert result["average_precision"] == pytest.approx(average_precision_score(is_mislabelled, plain), abs=1e-12)
    assert result["nan_scores"] == 0


def test_torchmetrics_alone_would_be_wrong_on_large_scores() -> None:
    """Its sigmoid turns every score above 40 into 1: 0.65 instead of 0.85, the reason for ranking first."""
    scores, is_mislabelled = noisy_scores()
    scores = 10 ** (scores + 2)
    right = roc_auc_score(is_mislabelled, scores)
    assert abs(float(binary_auroc(scores, is_mislabelled.long())) - right) > 0.1
    assert mislabel_detection(scores, is_mislabelled)["auroc"] == pytest.approx(right, abs=1e-12)


def test_found_among_the_inspected() -> None:
    scores = torch.arange(20.0).flip(0)
    is_mislabelled = torch.zeros(20, dtype=torch.bool)
    is_mislabelled[[0, 3, 4, 19]] = True
    result = mislabel_detection(scores, is_mislabelled, inspect=0.2)
    assert result["recall_at"] == 2 / 4
    assert result["precision_at"] == 2 / 4
    assert mislabel_detection(scores, is_mislabelled, inspect=1.0)["recall_at"] == 1.0


@pytest.mark.parametrize(
    ("count", "inspect", "cut"),
    # 0.07 * 100 is 7.000000000000001 and 0.55 * 100 is 55.00000000000001: neither may become one more.
    [(100, 0.07, 7), (100, 0.55, 55), (5, 0.1, 1), (15, 0.1, 2), (10, 1.0, 10)],
)
def test_inspected_examples_are_rounded_up(count: int, inspect: float, cut: int) -> None:
    scores = torch.arange(float(count)).flip(0)
    is_mislabelled = torch.arange(count) == 0
    result = mislabel_detection(scores, is_mislabelled, inspect)
    assert result["precision_at"] == pytest.approx(1 / cut, abs=1e-12)


def test_ties_at_the_cut_are_counted_in_expectation() -> None:
    """Equal to the mean over all orders of the tied examples, each ranked without ties."""
    scores = torch.tensor([5.0, 3.0, 3.0, 3.0, 3.0, 1.0])
    is_mislabelled = torch.tensor([False, True, False, True, False, True])
    tied = [1, 2, 3, 4]
    recalls = []
    for order in itertools.permutations(tied):
        untied = scores.clone()
        for place, example in enumerate(order):
            untied[example] -= place / 10
        recalls.append(mislabel_detection(untied, is_mislabelled, inspect=0.5)["recall_at"])
    result = mislabel_detection(scores, is_mislabelled, inspect=0.5)
    assert result["recall_at"] == pytest.approx(np.mean(recalls), abs=1e-12)
    # By the order of the examples it would be 1/3 or 2/3.
    assert result["recall_at"] == pytest.approx((2 * 2 / 4) / 3, abs=1e-12)


@pytest.mark.parametrize("shape", ["many ties", "two values"])
def test_order_of_examples_does_not_matter(shape: str) -> None:
    scores, is_mislabelled = noisy_scores(n=101)
    scores = SHAPES[shape](scores)
    scores[::7] = torch.nan
    order = torch.randperm(101, generator=torch.Generator().manual_seed(3))
    assert mislabel_detection(scores[order], is_mislabelled[order]) == mislabel_detection(scores, is_mislabelled)


def test_nan_scores_are_ranked_last_and_counted() -> None:
    scores, is_mislabelled = noisy_scores()
    scores[::9] = torch.nan
    scores[1] = -torch.inf
    result = mislabel_detection(scores, is_mislabelled)
    assert result["nan_scores"] == len(scores[::9])
    last = np.nan_to_num(scores.numpy(), nan=-2e3, neginf=-1e3)
    assert result["auroc"] == pytest.approx(roc_auc_score(is_mislabelled, last), abs=1e-12)
    assert result["average_precision"] == pytest.approx(average_precision_score(is_mislabelled, last), abs=1e-12)


def test_nan_scores_are_never_found() -> None:
    scores = torch.tensor([3.0, torch.nan, 1.0, torch.nan])
    is_mislabelled = torch.tensor([True, True, False, False])
    result = mislabel_detection(scores, is_mislabelled, inspect=1.0)
    assert result["recall_at"] == 0.5
    assert result["precision_at"] == 0.25

    all_nan = mislabel_detection(torch.full((4,), torch.nan), is_mislabelled, inspect=0.5)
    assert (all_nan["auroc"], all_nan["recall_at"], all_nan["nan_scores"]) == (0.5, 0.0, 4.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.uint8, torch.int64, torch.bool])
def test_every_score_type(dtype: torch.dtype) -> None:
    scores = torch.tensor([3, 1, 0, 2]).to(dtype)
    is_mislabelled = torch.tensor([1, 0, 0, 1])
    expected = roc_auc_score(is_mislabelled, scores.double())
    assert mislabel_detection(scores, is_mislabelled)["auroc"] == expected


def test_metric_over_several_updates_is_the_whole_set() -> None:
    scores, is_mislabelled = noisy_scores()
    metric = MislabelDetection(inspect=0.25)
    for part in (slice(0, 100), slice(100, 101), slice(101, 400)):
        metric.update(scores[part], is_mislabelled[part])
    result = metric.compute()
    assert set(result) == {"auroc", "average_precision", "recall_at", "precision_at", "nan_scores"}
    expected = mislabel_detection(scores, is_mislabelled, inspect=0.25)
    assert {name: float(value) for name, value in result.items()} == pytest.approx(expected, abs=1e-6)

    metric.reset()
    metric.update(torch.tensor([1.0, 2.0]), torch.tensor([True, False]))
    assert metric.compute()["auroc"] == 0


def test_metric_keeps_no_graph() -> None:
    metric = MislabelDetection()
    scores = torch.rand(4, requires_grad=True)
    metric.update(scores * 2, torch.tensor([1, 0, 0, 1]))
    assert not metric.scores[0].requires_grad


@pytest.mark.parametrize(
    ("scores", "is_mislabelled", "message"),
    [
        (torch.rand(3), torch.zeros(4, dtype=torch.bool), r"shape \[n\], got \[3\] and \[4\]"),
        (torch.rand(3, 1), torch.zeros(3, 1, dtype=torch.bool), r"got \[3, 1\]"),
        (torch.rand(3), torch.tensor([0, 1, 2]), "only 0 and 1"),
    ],
)
def test_wrong_inputs(scores: Tensor, is_mislabelled: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mislabel_detection(scores, is_mislabelled)
    with pytest.raises(ValueError, match=message):
        MislabelDetection().update(scores, is_mislabelled)


def test_one_class_alone_is_an_error() -> None:
    with pytest.raises(ValueError, match="none of the 3 examples is mislabelled"):
        mislabel_detection(torch.rand(3), torch.zeros(3, dtype=torch.bool))
    metric = MislabelDetection()
    metric.update(torch.rand(3), torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="none of the 3 examples is correctly labelled"):
        metric.compute()
    with pytest.raises(ValueError, match="none of the 0 examples"):
        mislabel_detection(torch.rand(0), torch.zeros(0, dtype=torch.bool))


@pytest.mark.parametrize("inspect", [0.0, -0.1, 1.01, float("nan")])
def test_inspect_outside_its_range(inspect: float) -> None:
    with pytest.raises(ValueError, match=r"must be in \(0, 1\], got"):
        MislabelDetection(inspect=inspect)
    with pytest.raises(ValueError, match=r"must be in \(0, 1\], got"):
        mislabel_detection(torch.rand(2), torch.tensor([True, False]), inspect)


def outcomes(subsets: int = 30, queries: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    predicted = torch.randn(subsets, queries, generator=generator)
    measured = predicted * torch.linspace(-1, 1, queries) + 0.5 * torch.randn(subsets, queries, generator=generator)
    return predicted, measured


@pytest.mark.parametrize("digits", [None, 0])
def test_correlations_agree_with_scipy(digits: int | None) -> None:
    predicted, measured = outcomes()
    if digits is not None:
        predicted, measured = predicted.round(decimals=digits), measured.round(decimals=digits)
    expected = [spearmanr(p, m).statistic for p, m in zip(predicted.T, measured.T, strict=True)]
    assert linear_datamodeling_correlations(predicted, measured).tolist() == pytest.approx(expected, abs=1e-12)


def test_datamodeling_score_is_the_mean_over_queries() -> None:
    predicted, measured = outcomes()
    metric = LinearDatamodelingScore()
    for part in (slice(0, 7), slice(7, 8), slice(8, 30)):
        metric.update(predicted[part], measured[part])
    expected = np.mean([spearmanr(p, m).statistic for p, m in zip(predicted.T, measured.T, strict=True)])
    assert float(metric.compute()) == pytest.approx(expected, abs=1e-6)
    assert metric.constant_queries == 0


def test_size_and_offset_do_not_matter() -> None:
    predicted, measured = outcomes()
    scaled = 1e4 * predicted.double() + torch.arange(5) * 1e6
    plain = linear_datamodeling_correlations(predicted, measured)
    assert torch.equal(linear_datamodeling_correlations(scaled, measured), plain)
    # The same numbers mixed over queries would be ranked differently: ranks are taken per query.
    assert not torch.allclose(linear_datamodeling_correlations(predicted.roll(1, dims=1), measured), plain)


def test_constant_queries_are_left_out_with_a_warning() -> None:
    predicted, measured = outcomes()
    predicted[:, 1] = 3.0
    measured[:, 3] = -2.0
    # What torchmetrics says of them: 0, which would pull the mean towards "no relation".
    assert spearman_corrcoef(predicted[:, 1], measured[:, 1]) == 0

    metric = LinearDatamodelingScore()
    metric.update(predicted, measured)
    with pytest.warns(UserWarning, match="2 of 5 queries have constant"):
        score = float(metric.compute())
    expected = np.mean([spearmanr(predicted[:, q], measured[:, q]).statistic for q in (0, 2, 4)])
    assert score == pytest.approx(expected, abs=1e-6)
    assert metric.constant_queries == 2
    assert linear_datamodeling_correlations(predicted, measured).isnan().tolist() == [False, True, False, True, False]


def test_datamodeling_errors() -> None:
    predicted, measured = outcomes()
    metric = LinearDatamodelingScore()
    with pytest.raises(ValueError, match=r"\[subsets, queries\], got \[30, 5\] and \[29, 5\]"):
        metric.update(predicted, measured[1:])
    with pytest.raises(ValueError, match=r"\[subsets, queries\], got \[30\]"):
        metric.update(predicted[:, 0], measured[:, 0])
    metric.update(predicted[:1], measured[:1])
    with pytest.raises(ValueError, match="earlier updates had 5 queries, this one has 4"):
        metric.update(predicted[:, :4], measured[:, :4])
    with pytest.raises(ValueError, match=r"at least two subsets and one query.*subsets=1"):
        metric.compute()

    constant = LinearDatamodelingScore()
    constant.update(torch.ones(3, 2), measured[:3, :2])
    with pytest.raises(ValueError, match="all 2 queries have constant"):
        constant.compute()

    measured[4, 2] = torch.nan
    with pytest.raises(ValueError, match=r"measured has 1 values that are not finite.*\[4, 2\]"):
        linear_datamodeling_correlations(predicted, measured)


def _gather(rank: int, store: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        scores, is_mislabelled = noisy_scores()
        predicted, measured = outcomes()
        # Unequal shares, as a data set of odd length gives.
        detection, datamodeling = MislabelDetection(), LinearDatamodelingScore()
        examples, subsets = (slice(0, 150), slice(0, 11)) if rank == 0 else (slice(150, 400), slice(11, 30))
        detection.update(scores[examples], is_mislabelled[examples])
        datamodeling.update(predicted[subsets], measured[subsets])
        found = {name: float(value) for name, value in detection.compute().items()}
        assert found == pytest.approx(mislabel_detection(scores, is_mislabelled), abs=1e-6)
        mean = float(linear_datamodeling_correlations(predicted, measured).mean())
        assert float(datamodeling.compute()) == pytest.approx(mean, abs=1e-6)
    finally:
        torch.distributed.destroy_process_group()


def test_two_processes_give_the_numbers_of_one(tmp_path: Path) -> None:
    """The mean of the two processes' own AUROCs differs from the AUROC of the whole."""
    scores, is_mislabelled = noisy_scores()
    parts = [mislabel_detection(scores[part], is_mislabelled[part]) for part in (slice(0, 150), slice(150, 400))]
    whole = mislabel_detection(scores, is_mislabelled)
    assert abs(parts[0]["auroc"] / 2 + parts[1]["auroc"] / 2 - whole["auroc"]) > 1e-4
    together(_gather, str(tmp_path / "store"))


def test_ties_share_their_rank() -> None:
    """Here and in the rooms, which these metrics do not know."""
    values = torch.tensor([3.0, 1.0, 3.0, -torch.inf, 2.0, 3.0])
    assert average_ranks(values).tolist() == _average_ranks(values).tolist() == [5.0, 2.0, 5.0, 1.0, 3.0, 5.0]
