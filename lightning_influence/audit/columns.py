"""Columns of an audit's tables, one row each: meaning and unit, and what ranking, ensemble and displays do with it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Columns = Mapping[str, NDArray[Any]]
Merge = Literal["same", "first", "mean", "sum", "vote", "all", "anew"]
Place = Literal["table", "names", "histogram", "scalar"]


@dataclass(frozen=True)
class Column:
    """A column of the scores table.

    Attributes:
        name: Its name in the table.
        meaning: What it is, with unit and sign.
        direction: At which end of its scores an example is suspicious; None if it rates nobody. Columns with one are
            measured against known label noise.
        merge: What several runs make of it: it must be the ``"same"``, is that of the ``"first"`` that knows it, their
            ``"mean"``, ``"sum"`` or ``"vote"``, true for ``"all"``, or computed ``"anew"`` by the ranking.
        shown: Where, besides the files: in the ``"table"`` of candidates, in TensorBoard as a ``"histogram"`` at the
            end or as a ``"scalar"``, its mean, at every epoch; as class ``"names"`` for numbers of classes.
        ranks: The ranking is the sum of the z-scores of the columns with the smallest such number; None for no part
            in it.
        values: What computes it from the other columns, if nobody else fills it in; a ``KeyError`` for one of them that
            an audit has not leaves it out.
        legend: What stands below a table that shows it, in a few words.
    """

    name: str
    meaning: str
    direction: Literal["high", "low"] | None = None
    merge: Merge = "mean"
    shown: tuple[Place, ...] = ()
    ranks: int | None = None
    values: Callable[[Columns], NDArray[Any]] | None = None
    legend: str = ""

    @property
    def description(self) -> str:
        """What is stored with the column."""
        return self.meaning + (f"; {self.direction} = suspicious" if self.direction else "")

    def suspicion(self, values: NDArray[Any]) -> NDArray[np.float64]:
        """Return scores ``[n]`` such that high is suspicious."""
        scores = np.asarray(values, dtype=np.float64)
        return -scores if self.direction == "low" else scores


COLUMNS: dict[str, Column] = {}
"""The columns by name, in the order in which they are listed; `add` adds one."""


def add(column: Column) -> None:
    """Add a column to those that audits know from now on.

    Raises:
        ValueError: If there is one of this name.

    Example:
        >>> add(Column("loss_rise", "final loss minus its mean over the run", "high", values=loss_rise))
    """
    if column.name in COLUMNS:
        raise ValueError(f"there is a column {column.name!r} already; give the new one another name.")
    COLUMNS[column.name] = column


def column_of(name: str) -> Column:
    """Return what is known of a column; of an unknown one, that runs are averaged."""
    return COLUMNS.get(name) or Column(name, "")


def shown_in(place: Place, columns: Mapping[str, Any]) -> list[str]:
    """Return the names of those columns that are shown in a place; texts, of any length, come last."""
    names = [name for name, column in COLUMNS.items() if place in column.shown and name in columns]
    return sorted(names, key=lambda name: name == "text")


def legend(names: Iterable[str]) -> str:
    """Return a line that explains those of some columns that need it."""
    told = ((name, column_of(name).legend) for name in names)
    return "; ".join(f"{name}: {words}" for name, words in told if words)


def scored(columns: Columns) -> dict[str, NDArray[np.float64]]:
    """Return the columns that rate examples and hold a number, such that high is suspicious."""
    return {
        name: column.suspicion(columns[name])
        for name, column in COLUMNS.items()
        if column.direction and name in columns and np.isfinite(columns[name]).any()
    }


def candidate_rows(columns: Columns, most: int | None = None) -> NDArray[np.int64]:
    """Return the rows of the examples proposed for review, the most suspicious first."""
    rows = np.flatnonzero(columns["candidate"])
    return rows[np.argsort(columns["rank"][rows], kind="stable")][:most]


def _places(values: NDArray[Any]) -> NDArray[np.float64]:
    """Return each value's place among all, from 0 for the lowest to 1; NaN stays."""
    known = np.isfinite(values)
    places = np.full(len(values), np.nan)
    places[known] = np.searchsorted(np.sort(values[known]), values[known], side="right") / max(int(known.sum()), 1)
    return places


for _column in (
    Column("rank", "position by suspicion, 1 = most suspicious", merge="anew", shown=("table",)),
    Column("index", "position of the example in the training data set", merge="same", shown=("table",)),
    Column("id", "name of the example, as given by `ids=`", merge="same", shown=("table",)),
    Column("dataset", "number of the concatenated data set that it comes from, from 0", merge="same", shown=("table",)),
    Column(
        "original_index",
        "position of the example in the data set that subsets, splits and concatenations were made of",
        merge="same",
        shown=("table",),
    ),
    Column("text", "what `describe=` says of those to look at; empty for others", merge="first", shown=("table",)),
    Column("label", "given label as a class number; -1 = unknown", merge="same", shown=("table", "names")),
    Column("predicted", "class the trained model predicts; -1 = unknown", merge="vote", shown=("names",)),
    Column(
        "suggested",
        "most probable class other than the given label, right or wrong; -1 = unknown",
        merge="vote",
        shown=("table", "names"),
    ),
    Column(
        "suspicion",
        "sum of z-scores of what ranks, no unit",
        "high",
        merge="anew",
        shown=("table",),
        legend="how much speaks against the label",
    ),
    Column("candidate", "whether the example is proposed for review", merge="anew"),
    Column(
        "wrong_probability",
        "probability that the given label is wrong, 0 to 1",
        "high",
        shown=("table", "histogram"),
        legend="probability that the given label is wrong",
    ),
    Column(
        "support",
        "mean probability over the run, plus what the others' labels told of this one before it was learnt by heart "
        "(else the mean share of its neighbours): of the given label, minus the largest of another, -2 to 2",
        "low",
        ranks=1,
    ),
    Column("finite", "whether every loss and gradient seen for the example was finite", merge="all"),
    Column("times_seen", "how many times training saw the example", merge="sum"),
    Column(
        "loss_mean",
        "mean over epochs of the example's own loss, without class weights and label smoothing",
        "high",
        shown=("scalar",),
        ranks=3,
    ),
    Column(
        "loss_worst",
        "mean over epochs of the largest loss among its class decisions (tokens, labels), if there are several",
        "high",
    ),
    Column(
        "worst_decision",
        "mean of the example's places by `loss_worst` and `loss`, 0 to 1",
        "high",
        merge="anew",
        ranks=1,
        values=lambda columns: (_places(columns["loss_worst"]) + _places(columns["loss"])) / 2,
    ),
    Column("loss_variance", "variance over epochs of the example's own loss, loss squared", "high"),
    Column(
        "aum", "mean over epochs of the logit of the given label minus the largest other one", "low", shown=("scalar",)
    ),
    Column(
        "el2n",
        "mean over epochs of the L2 norm of (predicted probabilities - target)",
        "high",
        shown=("table", "scalar"),
        ranks=2,
        legend="how far predictions were from the label, 0 to 1.4",
    ),
    Column("epochs_wrong", "epochs in which the predicted class was not the given label", "high"),
    Column("forgetting", "times the example went from predicted rightly to wrongly", "high", shown=("scalar",)),
    Column(
        "neighbour_disagreement",
        "share of the nearest training examples with another given label, mean over epochs, 0 to 1",
        "high",
        ranks=2,
    ),
    Column(
        "nearest",
        "training example whose features under the trained model are nearest, as an index; -1 = unknown. Looked for "
        "among 10,000 at most",
        merge="first",
    ),
    Column("nearest_cosine", "cosine between its centred features and those of `nearest`, -1 to 1", merge="first"),
    Column(
        "near_duplicate",
        "whether `nearest` is so much nearer than other examples that one is likely a copy of the other",
        merge="first",
    ),
    Column(
        "prob_margin",
        "mean probability of the given label minus the largest mean of another label, -1 to 1",
        "low",
        shown=("scalar",),
        ranks=2,
    ),
    Column("loss", "the example's own loss under the trained model", "high", ranks=4),
    Column("grad_norm_squared", "of the gradient of that loss, squared L2 norm", "high", shown=("histogram",), ranks=5),
    Column(
        "self_influence",
        "score on itself, >= 0: removing the example raises its own loss by about this / number of training examples",
        "high",
        shown=("table", "histogram"),
        ranks=4,
        legend="how much the model rests on it",
    ),
    Column(
        "tracin",
        "sum over checkpoints of step sizes since the last one, over 1 - momentum, times the squared gradient norm",
        "high",
        shown=("histogram",),
        ranks=3,
    ),
    Column(
        "harm",
        "minus the influence on the mean validation loss; positive = training on the example raises it",
        "high",
        shown=("table",),
        legend="> 0 = it raises the validation loss",
    ),
    Column(
        "harm_exact",
        "harm in this very run, by replay: leaving the example out of it changes the mean validation loss by "
        "-harm_exact/N, to first order",
    ),
):
    add(_column)

INFLUENCE_ON = "influence_on_"
"""Columns of the scores table that begin so, with the name of a measurement of the query set: its influence score.
Positive: training on the example lowers the measurement; removing it from N raises it by about this divided by N."""

PAIR_DESCRIPTIONS: dict[str, str] = {
    "number": "number of the query, from 1; the worst first",
    "query_set": "number of the loader that the query comes from, from 0",
    "query": "position of the query in that loader's data set",
    "query_label": "given label of the query; -1 = unknown",
    "query_predicted": "class the trained model predicts for it; -1 = unknown",
    "query_loss": "its loss under the trained model",
    "measured": "what is measured of the query: its loss, margin or adversarial loss",
    "kind": "proponent: training on the example makes the query's measurement better; opponent: worse",
    "list": "strongest: ordered by score; specific: by relative, so that loud examples do not lead every list",
    "rank": "place among the query's proponents or opponents of the list, 1 = first",
    "index": "position of the training example in its data set",
    "score": "influence, positive for proponents: removing the example from N makes the query's measurement worse by "
    "about this divided by N",
    "relative": "score over the root of the example's self_influence, what `normalise='relative'` gives; 0 for an "
    "example without a gradient",
    "label": "given label of the training example; -1 = unknown",
    "predicted": "class the trained model predicts for it; -1 = unknown",
    "loss": "its loss under the trained model",
}
"""Columns of the table of pairs, one row a query and strong training example, with their meanings."""

TOKEN_DESCRIPTIONS: dict[str, str] = {
    "tokens": "what the score is made of, by the tokens of the training example, as JSON: [[text, part], ...]; empty = "
    "unknown",
    "tokens_rest": "what is no token's of the score, as of norms and of a head on pooled features",
}
"""Columns that it has beside these where a tokenizer describes the examples."""

PAIRS_NEEDED = [name for name in PAIR_DESCRIPTIONS if name not in ("list", "relative")]
"""Those of them that audits have always had."""

PAIR_LISTS: dict[str, str] = {
    "strongest": "by score; loud examples (wrong labels) lead many lists",
    "specific": "by score relative to how much the example moves the model",
    "replay": "by what the example did in this very run, by replay",
}
"""What the column ``list`` of the table of pairs may be, and what to say of it where it is shown."""


def meaning_in_pairs(name: str) -> str:
    """Return the meaning of a column of the table of pairs, those of names included that it has where there are any."""
    of_query = name.startswith("query_")
    known = (PAIR_DESCRIPTIONS | TOKEN_DESCRIPTIONS).get(name) or column_of(name.removeprefix("query_")).meaning
    return f"of the query: {known}" if of_query and name not in PAIR_DESCRIPTIONS else known
