"""Metrics of how good influence scores are, as pure functions and as `torchmetrics` classes.

Two questions are answered. *Mislabel detection*: with known label noise, do the scores rank the mislabelled examples
first? *Linear datamodeling score*: do summed influences predict what retraining on subsets really gives?

Both depend on the order of the scores alone, never on their size. torchmetrics' own `BinaryAUROC` and
`BinaryAveragePrecision` put a sigmoid on scores outside [0, 1], which merges large scores into ties; here everything is
computed from ranks over the whole accumulated set.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import rank_zero_warn
from torchmetrics.utilities.data import dim_zero_cat

__all__ = [
    "LinearDatamodelingScore",
    "MislabelDetection",
    "linear_datamodeling_correlations",
    "mislabel_detection",
]


def mislabel_detection(scores: Tensor, is_mislabelled: Tensor, inspect: float = 0.1) -> dict[str, float]:
    """How well `scores` find the mislabelled examples.

    Only the order of the scores counts, and never the order of the examples: equal scores form one group, AUROC counts
    a pair inside it as one half, the average precision takes it as one threshold, and where the inspected share ends
    inside it, the numbers at the cut are the expectation over all orders of the group.

    A NaN score is ranked after every other score, including `-inf`. Its example counts as never found: it adds nothing
    to the recall and precision at the cut even when the cut reaches it.

    Args:
        scores: `[n]`, high = suspicious. Negate scores where low is suspicious (AUM, probability margin).
        is_mislabelled: `[n]`, bool or 0/1, which examples really have a wrong label.
        inspect: share of the ranking that is looked at, in (0, 1]; rounded up to whole examples, at least one.

    Returns:
        `auroc`; `average_precision` (step-wise, as in scikit-learn); `recall_at`: share of the mislabelled examples
        among the inspected ones; `precision_at`: share of the inspected examples that are mislabelled; `nan_scores`:
        number of NaN scores.

    Raises:
        ValueError: If the shapes do not fit, `is_mislabelled` is not 0/1, `inspect` is outside (0, 1], or there is no
            mislabelled or no correctly labelled example.

    Example:
        >>> result = mislabel_detection(torch.tensor([9.0, 1.0, 5.0, 2.0]), torch.tensor([1, 0, 0, 1]), inspect=0.5)
        >>> result["auroc"], result["recall_at"]
        (0.75, 0.5)
    """
    _check_inspect(inspect)
    scores, positive = _check_detection_inputs(scores, is_mislabelled)
    scores, positive = scores.cpu(), positive.cpu()
    count = scores.numel()
    positives = int(positive.sum())
    negatives = count - positives
    if positives == 0 or negatives == 0:
        missing = "mislabelled" if positives == 0 else "correctly labelled"
        raise ValueError(
            f"mislabel detection needs mislabelled and correctly labelled examples, but none of the {count} examples "
            f"is {missing}; pass the mask of the labels that were really changed"
        )

    size, hits, last_is_nan = _tie_groups(scores, positive)
    inspected_after = size.cumsum(0)
    hits_after = hits.cumsum(0)
    hits_before = hits_after - hits

    # A pair (mislabelled, clean) is in order when the mislabelled one is in an earlier group; ties count one half.
    ordered_pairs = ((size - hits) * (hits_before + hits / 2)).sum()
    average_precision = (hits / positives * (hits_after / inspected_after)).sum()

    # The small constant keeps 0.07 * 100 = 7.000000000000001 from becoming 8 examples.
    cut = min(count, max(1, math.ceil(inspect * count - 1e-9)))
    inside = (cut - (inspected_after - size)).clamp(min=0).minimum(size)
    found_per_group = hits * inside / size
    if last_is_nan:
        found_per_group[-1] = 0.0
    found = float(found_per_group.sum())

    return {
        "auroc": float(ordered_pairs) / (positives * negatives),
        "average_precision": float(average_precision),
        "recall_at": found / positives,
        "precision_at": found / cut,
        "nan_scores": float(scores.isnan().sum()),
    }


class MislabelDetection(Metric):
    """Mislabel detection over everything seen since the last reset, see `mislabel_detection`.

    `compute` gives a dictionary, so log it with `self.log_dict(metric.compute())`. Across processes the scores are
    gathered first: the result is that of the whole data set, not a mean of per-process results. Should a sampler pad
    the last batch with repeated examples, remove them before `update`.

    Args:
        inspect: share of the ranking that is looked at, in (0, 1].
        kwargs: passed to `torchmetrics.Metric`.

    Raises:
        ValueError: If `inspect` is outside (0, 1].
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    scores: list[Tensor]
    is_mislabelled: list[Tensor]

    def __init__(self, inspect: float = 0.1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        _check_inspect(inspect)
        self.inspect = inspect
        self.add_state("scores", default=[], dist_reduce_fx="cat")
        self.add_state("is_mislabelled", default=[], dist_reduce_fx="cat")

    def update(self, scores: Tensor, is_mislabelled: Tensor) -> None:
        """Add examples.

        Args:
            scores: `[n]`, high = suspicious, any range.
            is_mislabelled: `[n]`, bool or 0/1.

        Raises:
            ValueError: If the shapes do not fit or `is_mislabelled` is not 0/1.
        """
        scores, positive = _check_detection_inputs(scores, is_mislabelled)
        self.scores.append(scores.detach())
        self.is_mislabelled.append(positive)

    def compute(self) -> dict[str, Tensor]:
        """The numbers of `mislabel_detection` as scalar tensors.

        Raises:
            ValueError: If there is no mislabelled or no correctly labelled example.
        """
        scores = dim_zero_cat(self.scores)
        result = mislabel_detection(scores, dim_zero_cat(self.is_mislabelled), self.inspect)
        return {name: torch.tensor(value, device=scores.device) for name, value in result.items()}


def linear_datamodeling_correlations(predicted: Tensor, measured: Tensor) -> Tensor:
    """Spearman correlation over subsets, for every query.

    Equal values share their average rank. Source: Park et al. 2023, "TRAK: Attributing Model Behavior at Scale",
    definition 2.2.

    Args:
        predicted: `[subsets, queries]`, the sum of the influences of each subset's examples on each query.
        measured: `[subsets, queries]`, what the model retrained on the subset really gave.

    Returns:
        `[queries]`, float64 on the CPU. NaN where `predicted` or `measured` does not vary over the subsets, since no
        correlation is defined there (torchmetrics gives 0, which reads as "no relation").

    Raises:
        ValueError: If the shapes differ or are not `[subsets, queries]`, there are fewer than two subsets or no query,
            or a value is not finite.
    """
    _check_datamodeling_inputs(predicted, measured)
    subsets, queries = predicted.shape
    if subsets < 2 or queries < 1:
        raise ValueError(
            f"a rank correlation needs at least two subsets and one query, got predicted of shape "
            f"[subsets={subsets}, queries={queries}]"
        )
    for name, values in (("predicted", predicted), ("measured", measured)):
        bad = ~values.isfinite()
        if bad.any():
            first = [int(position) for position in bad.nonzero()[0]]
            raise ValueError(
                f"{name} has {int(bad.sum())} values that are not finite, the first at [subset, query] = {first}; "
                f"leave those queries out by name instead of averaging over them"
            )

    ranks_predicted = _average_ranks(predicted.detach().cpu().T)
    ranks_measured = _average_ranks(measured.detach().cpu().T)
    # The mean rank is (subsets + 1) / 2 whatever the ties.
    centred_predicted = ranks_predicted - (subsets + 1) / 2
    centred_measured = ranks_measured - (subsets + 1) / 2
    covariance = (centred_predicted * centred_measured).sum(-1)
    scale = (centred_predicted.square().sum(-1) * centred_measured.square().sum(-1)).sqrt()
    return torch.where(scale > 0, covariance / scale, torch.nan)


class LinearDatamodelingScore(Metric):
    """Mean over queries of the Spearman correlation between predicted and measured outcomes over subsets.

    Queries whose predictions or measurements do not vary over the subsets have no correlation: they are left out of
    the mean with a warning, and `constant_queries` holds their number after `compute`. Look at it before comparing two
    methods: a method that predicts a constant for its hard queries is not punished by the mean.

    Args:
        kwargs: passed to `torchmetrics.Metric`.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    plot_lower_bound = -1.0
    plot_upper_bound = 1.0

    predicted: list[Tensor]
    measured: list[Tensor]
    constant_queries: int

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.constant_queries = 0
        self.add_state("predicted", default=[], dist_reduce_fx="cat")
        self.add_state("measured", default=[], dist_reduce_fx="cat")

    def update(self, predicted: Tensor, measured: Tensor) -> None:
        """Add subsets; every update has the same queries in the same order.

        Args:
            predicted: `[subsets, queries]`.
            measured: `[subsets, queries]`.

        Raises:
            ValueError: If the shapes differ, are not `[subsets, queries]`, or the number of queries changed.
        """
        _check_datamodeling_inputs(predicted, measured)
        if self.predicted and self.predicted[0].shape[1] != predicted.shape[1]:
            raise ValueError(
                f"earlier updates had {self.predicted[0].shape[1]} queries, this one has {predicted.shape[1]}; "
                f"add subsets (rows) with update and use one metric per set of queries"
            )
        self.predicted.append(predicted.detach())
        self.measured.append(measured.detach())

    def compute(self) -> Tensor:
        """The score as a scalar tensor, in [-1, 1].

        Raises:
            ValueError: If a value is not finite, there are fewer than two subsets, or no query varies.
        """
        predicted = dim_zero_cat(self.predicted)
        correlations = linear_datamodeling_correlations(predicted, dim_zero_cat(self.measured))
        constant = correlations.isnan()
        self.constant_queries = int(constant.sum())
        if constant.all():
            raise ValueError(
                f"all {correlations.numel()} queries have constant predictions or measurements over the "
                f"{predicted.shape[0]} subsets, so no correlation is defined; use more or smaller subsets"
            )
        if self.constant_queries:
            rank_zero_warn(
                f"{self.constant_queries} of {correlations.numel()} queries have constant predictions or measurements "
                f"over the subsets and are left out of the linear datamodeling score"
            )
        return correlations.nanmean().to(device=predicted.device, dtype=torch.float32)


def _average_ranks(values: Tensor) -> Tensor:
    """Ranks 1..n along the last dimension; ties share their average rank."""
    ordered = values.sort(dim=-1).values.contiguous()
    values = values.contiguous()
    below = torch.searchsorted(ordered, values, right=False)
    not_above = torch.searchsorted(ordered, values, right=True)
    return (below + not_above + 1).double() / 2


def _tie_groups(scores: Tensor, positive: Tensor) -> tuple[Tensor, Tensor, bool]:
    """Group equal scores, most suspicious first: group sizes, positives per group, whether the last group is NaN."""
    unscored = scores.isnan()
    values, group = (-scores[~unscored]).unique(return_inverse=True)
    codes = torch.full(scores.shape, values.numel(), dtype=torch.int64)
    codes[~unscored] = group
    last_is_nan = bool(unscored.any())
    groups = values.numel() + int(last_is_nan)
    size = torch.bincount(codes, minlength=groups).double()
    hits = torch.bincount(codes[positive], minlength=groups).double()
    return size, hits, last_is_nan


def _check_inspect(inspect: float) -> None:
    if not 0 < inspect <= 1:
        raise ValueError(f"inspect is the share of the ranking to look at and must be in (0, 1], got {inspect}")


def _check_detection_inputs(scores: Tensor, is_mislabelled: Tensor) -> tuple[Tensor, Tensor]:
    if scores.ndim != 1 or scores.shape != is_mislabelled.shape:
        raise ValueError(
            f"scores and is_mislabelled must both have shape [n], got {list(scores.shape)} and "
            f"{list(is_mislabelled.shape)}; flatten them or pass one score per example"
        )
    if is_mislabelled.dtype != torch.bool:
        if not ((is_mislabelled == 0) | (is_mislabelled == 1)).all():
            raise ValueError("is_mislabelled must be bool or hold only 0 and 1; pass `given_label != true_label`")
        is_mislabelled = is_mislabelled == 1
    # Unsigned and boolean scores could not be negated; float64 also holds every int32 and half-precision value.
    return (scores if scores.is_floating_point() else scores.double()), is_mislabelled


def _check_datamodeling_inputs(predicted: Tensor, measured: Tensor) -> None:
    if predicted.ndim != 2 or predicted.shape != measured.shape:
        raise ValueError(
            f"predicted and measured must both have shape [subsets, queries], got {list(predicted.shape)} and "
            f"{list(measured.shape)}; pass one row per retrained model"
        )
