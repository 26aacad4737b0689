"""Columns of the scores table: names, meanings, units and signs, in one place."""

from __future__ import annotations

COLUMN_DESCRIPTIONS: dict[str, str] = {
    "index": "position of the example in the training data set",
    "label": "given label as a class number; -1 = unknown",
    "predicted": "class the trained model predicts; -1 = unknown",
    "suggested": "class the audit proposes instead of the given label; -1 = unknown",
    "rank": "position by suspicion, 1 = most suspicious",
    "candidate": "whether the example is proposed for review",
    "finite": "whether every loss and gradient seen for the example was finite",
    "times_seen": "how many times training saw the example",
    "suspicion": "combined score, no unit; high = suspicious",
    "loss_mean": "mean over epochs of the example's own loss, without class weights and label smoothing; "
    "high = suspicious",
    "loss_variance": "variance over epochs of the example's own loss, loss squared; high = suspicious",
    "aum": "area under the margin: mean over epochs of the logit of the given label minus the largest other "
    "logit; low = suspicious",
    "el2n": "mean over epochs of the L2 norm of (predicted probabilities - target); high = suspicious",
    "epochs_wrong": "epochs in which the predicted class was not the given label; high = suspicious",
    "forgetting": "times the example went from predicted rightly to wrongly; high = suspicious",
    "prob_margin": "mean predicted probability of the given label minus the largest mean of another label, "
    "-1 to 1; low = suspicious",
    "neighbour_disagreement": "share of the nearest training examples with another given label, mean over "
    "epochs, 0 to 1; high = suspicious",
    "loss": "the example's own loss under the trained model; high = suspicious",
    "grad_norm_squared": "squared L2 norm of the gradient of the example's own loss; high = suspicious",
    "self_influence": "score of the example on itself, at least 0: removing it raises its own loss by about "
    "this divided by the number of training examples; high = suspicious",
    "tracin": "TracIn self-influence: sum over checkpoints of the learning rates since the last one (over "
    "1 - momentum) times the squared gradient norm; high = suspicious",
    "harm": "minus the influence score on the mean validation loss; positive = training on the example "
    "raises it; high = suspicious",
}

SCORE_COLUMNS = (
    "suspicion",
    "loss_mean",
    "loss_variance",
    "aum",
    "el2n",
    "epochs_wrong",
    "forgetting",
    "prob_margin",
    "neighbour_disagreement",
    "loss",
    "grad_norm_squared",
    "self_influence",
    "tracin",
    "harm",
)
"""Columns that rate how suspicious an example is. High = suspicious, except `LOW_IS_SUSPICIOUS`."""

LOW_IS_SUSPICIOUS = frozenset({"aum", "prob_margin"})
