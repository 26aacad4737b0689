"""Columns of the scores table: names, meanings, units and signs, in one place."""

from __future__ import annotations

COLUMN_DESCRIPTIONS: dict[str, str] = {
    "index": "position of the example in the training data set",
    "label": "given label as a class number; -1 = unknown",
    "predicted": "class the trained model predicts; -1 = unknown",
    "suggested": "class with the largest mean predicted probability over the run plus mean share of the neighbours; "
    "-1 = unknown",
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

PAIR_DESCRIPTIONS: dict[str, str] = {
    "number": "number of the query, from 1; the worst first",
    "query_set": "number of the loader that the query comes from, from 0",
    "query": "position of the query in that loader's data set",
    "query_label": "given label of the query; -1 = unknown",
    "query_predicted": "class the trained model predicts for it; -1 = unknown",
    "query_loss": "its loss under the trained model",
    "measured": "what is measured of the query: its loss, margin or adversarial loss",
    "kind": "proponent: training on the example makes the query's measurement better; opponent: worse",
    "rank": "place among the query's proponents or opponents, 1 = strongest",
    "index": "position of the training example in its data set",
    "score": "influence, positive for proponents: removing the example from N makes the query's measurement worse by "
    "about this divided by N",
    "label": "given label of the training example; -1 = unknown",
    "predicted": "class the trained model predicts for it; -1 = unknown",
    "loss": "its loss under the trained model",
}

INFLUENCE_ON = "influence_on_"
"""Columns of the scores table that begin so, with the name of a measurement of the query set: its influence score.
Positive: training on the example lowers the measurement; removing it from N raises it by about this divided by N."""

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
