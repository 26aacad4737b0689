"""Queries of an audit: the examples that the model does worst on, and the training examples to thank or to blame."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_influence.audit.columns import INFLUENCE_ON
from lightning_influence.core import distributed
from lightning_influence.core.memory import is_out_of_memory
from lightning_influence.curvature import Curvature
from lightning_influence.gradients.passes import ExampleGradients
from lightning_influence.scores.measurements import (
    AnyMeasurement,
    Loss,
    Measurement,
    MeasurementError,
    MeasurementScores,
    QuerySets,
    Statistic,
    as_measurement,
    measured_values,
    measurement_scores,
)
from lightning_influence.scores.pairs import TopScores, top_scores
from lightning_influence.scores.queries import QueryError

Columns = dict[str, NDArray[Any]]


@dataclass(frozen=True, eq=False)
class Queries:
    """What an audit is asked about, beside the training data themselves.

    Args:
        which: ``"worst"``: of all validation examples the ``count`` worst, by the measurement if it is one of single
            examples, else by loss. Or a loader: its first ``count`` examples, whatever order it shuffles them to.
        count: Number of queries that are shown with their proponents and opponents.
        top: Number of proponents and of opponents of each, at most: proponents have positive scores, opponents
            negative ones.
        measurement: ``"loss"``, ``"margin"``, one of ``lightning_influence.measurements``, or a function
            ``(module, batch) -> number`` of the whole set. One other than the loss is also measured on the whole set
            (all validation examples, or all of the loader), and every training example gets its influence on it, in the
            column ``influence_on_<name>``; so it does for the loss of a loader.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> InfluenceAudit(queries=Queries(measurement=DemographicParityGap(group=is_black)))
    """

    which: Literal["worst"] | DataLoader[Any] = "worst"
    count: int = 8
    top: int = 10
    measurement: AnyMeasurement = "loss"

    def __post_init__(self) -> None:
        if self.which != "worst" and not isinstance(self.which, DataLoader):
            raise ValueError(f'queries: which={self.which!r}; expected "worst" or a DataLoader.')
        for name, value in (("count", self.count), ("top", self.top)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"queries: {name}={value!r}; expected an integer >= 1.")
        as_measurement(self.measurement)

    @property
    def measured(self) -> Measurement:
        """What is measured."""
        return as_measurement(self.measurement)

    @property
    def statistic(self) -> Statistic:
        """What is measured of each query by itself: the loss if the measurement is one of sets only."""
        measured = self.measured
        return measured if isinstance(measured, Statistic) and measured.per_query else Loss()

    @property
    def of_set(self) -> bool:
        """Whether there is a measurement of the whole set besides the mean validation loss, which is ``harm``."""
        return self.which != "worst" or type(self.measured) is not Loss


@dataclass(frozen=True, eq=False)
class QueryPairs:
    """What an audit has found about its queries; the same on every process.

    Attributes:
        table: One row per pair, see ``columns.PAIR_DESCRIPTIONS``.
        queries: The queries, as number of their set and index in it, the first one first.
        influence: Influence of the training examples on the measurement of the whole set, if there is one.
        about: For the manifest: title, measurement, value.
        notes: What a reader should know.
    """

    table: Columns
    queries: list[tuple[int, int]]
    influence: MeasurementScores | None
    about: dict[str, Any]
    notes: list[str] = field(default_factory=list)

    def columns(self, indices: NDArray[Any]) -> Columns:
        """Return the columns that the queries add to the scores table, given its ``index``."""
        if self.influence is None:
            return {}
        found = self.influence.indices.cpu().numpy()
        values = np.full(len(indices), np.nan)
        known = np.isin(indices, found)
        values[known] = self.influence.scores.cpu().numpy()[np.searchsorted(found, indices[known])]
        return {INFLUENCE_ON + self.about["measurement"]: values}


def query_pairs(
    gradients: ExampleGradients,
    indices: Sequence[int],
    curvature: Curvature,
    sets: QuerySets,
    asked: Queries,
    columns: Mapping[str, NDArray[Any]],
) -> QueryPairs:
    """Choose the queries, and find the strongest proponents and opponents of each.

    Args:
        gradients: Passes over the training data.
        indices: The training examples.
        curvature: The curvature, fitted on them.
        sets: Passes over the queries' data and the examples to choose from, by loader.
        asked: What is asked.
        columns: The scores table: ``index``, and for the table of pairs ``label``, ``predicted``, ``loss``.

    Raises:
        MeasurementError: If what is asked for can't be measured.
        QueryError: If the training task can't be run on the queries.
        SolverError: If an iterative solver did not reach its tolerance.
    """
    statistic = asked.statistic
    sets = [(passes.like(gradients), list(chosen)) for passes, chosen in sets]
    total = sum(len(chosen) for _, chosen in sets)
    influence = None
    if asked.of_set:
        influence = measurement_scores(gradients, indices, curvature, sets, measurement=asked.measured)
    with _run_on_queries():
        chosen, notes = _chosen(sets, asked)
    parts: list[Columns] = []
    for number, (passes, _) in enumerate(sets):
        places = [place for place, (of, _) in enumerate(chosen) if of == number]
        own = [chosen[place][1] for place in places]
        if not own:
            continue
        top = top_scores(gradients, indices, curvature, passes.measuring(statistic), own, asked.top)
        notes += [note for note in top.notes if note not in notes]
        with _run_on_queries():
            facts = _facts(passes, own, statistic)
        parts.append(_rows(top, statistic, facts, number, places))
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    order = np.argsort(joined["number"], kind="stable")
    table = _with_examples({name: values[order] for name, values in joined.items()}, columns)
    about: dict[str, Any] = {
        "title": _title(asked, len(chosen), total, statistic),
        "measurement": asked.measured.name,
        "per_query": statistic.name,
        "examples": total,
    }
    if influence is not None:
        about |= {"value": influence.measured.value, "groups": influence.measured.counts}
    return QueryPairs(table, chosen, influence, about, notes)


@contextmanager
def _run_on_queries() -> Iterator[None]:
    try:
        yield
    except MeasurementError:
        raise
    # Anything can go wrong in a user's task that meets another kind of batch.
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise QueryError(
            f"queries: the training task can't be run on them ({type(error).__name__}: {error}). Queries need inputs "
            "and labels of the kind that the model was trained on."
        ) from error


def _title(asked: Queries, count: int, total: int, statistic: Statistic) -> str:
    if asked.which != "worst":
        return f"the first {count} of {total:,} given examples"
    extreme = "smallest" if statistic.higher_is_better else "largest"
    return f"the {count} of {total:,} validation examples with the {extreme} {statistic.name.replace('_', ' ')}"


def _chosen(sets: QuerySets, asked: Queries) -> tuple[list[tuple[int, int]], list[str]]:
    """Return set and index of the queries, the worst first."""
    every = [(number, query) for number, (_, chosen) in enumerate(sets) for query in chosen]
    if asked.which != "worst":
        notes = []
        if len(every) > asked.count:
            notes = [f"queries: the first {asked.count} of {len(every):,} are shown; `Queries(count=...)` shows more"]
        return every[: asked.count], notes
    statistic = asked.statistic
    values = torch.cat([measured_values(passes, chosen, statistic) for passes, chosen in sets])
    badness = -values if statistic.higher_is_better else values
    finite = badness.isfinite()
    order = badness.masked_fill(~finite, -torch.inf).argsort(descending=True, stable=True)
    notes = []
    if not bool(finite.all()):
        notes = [f"queries: {int((~finite).sum())} examples with a non-finite {statistic.name} are not asked about"]
    return [every[place] for place in order.tolist() if bool(finite[place])][: asked.count], notes


def _facts(passes: ExampleGradients, chosen: list[int], statistic: Statistic) -> dict[str, Tensor]:
    """Return label, prediction, loss and measured value of the queries, ``[q]`` each, in their order."""
    seen: list[int] = []
    parts: dict[str, list[Tensor]] = {
        "query_label": [torch.zeros(0, dtype=torch.long)],
        "query_predicted": [torch.zeros(0, dtype=torch.long)],
        "query_loss": [torch.zeros(0, dtype=torch.float64)],
    }
    with closing(passes.losses(chosen)) as losses:
        for own, loss in losses:
            statistics = {} if loss.primary is None else loss.primary.statistics(loss.n)
            unknown = torch.full((loss.n,), -1)
            missing = torch.full((loss.n,), torch.nan, dtype=torch.float64)
            seen += own
            parts["query_label"].append(statistics.get("label", unknown).cpu().long())
            parts["query_predicted"].append(statistics.get("predicted", unknown).cpu().long())
            parts["query_loss"].append(missing if loss.values is None else loss.values.detach().cpu().double())
    merged, columns = distributed.gather_by_index(
        torch.tensor(seen, dtype=torch.long), {name: torch.cat(values) for name, values in parts.items()}
    )
    places = torch.searchsorted(merged, torch.tensor(chosen))
    facts = {name: values[places] for name, values in columns.items()}
    plain = type(statistic) is Loss
    facts["measured"] = facts["query_loss"] if plain else measured_values(passes, chosen, statistic)
    return facts


def _rows(
    top: TopScores, statistic: Statistic, facts: Mapping[str, Tensor], number: int, places: Sequence[int]
) -> Columns:
    """Return the pairs of one set, one row each: by query, proponents first, the strongest first."""
    found = {
        "proponent": (top.proponents, top.proponent_scores),
        "opponent": (top.opponents, top.opponent_scores),
    }
    if statistic.higher_is_better:
        # A positive score lowers what is measured: here, those are the opponents.
        found = {
            "proponent": (top.opponents, -top.opponent_scores),
            "opponent": (top.proponents, -top.proponent_scores),
        }
    rows: dict[str, list[Any]] = {
        name: [] for name in ("number", "query_set", "query", *facts, "kind", "rank", "index", "score")
    }
    for row, query in enumerate(top.queries.tolist()):
        told = {name: values[row].item() for name, values in facts.items()}
        for kind, (examples, scores) in found.items():
            pairs = zip(examples[row].tolist(), scores[row].tolist(), strict=True)
            for rank, (index, score) in enumerate(pairs, start=1):
                # Of few examples, the strongest proponents may be none; or fewer than asked for have a score at all.
                if index < 0 or not (score > 0 if kind == "proponent" else score < 0):
                    continue
                values = {"number": places[row] + 1, "query_set": number, "query": query, **told}
                values |= {"kind": kind, "rank": rank, "index": index, "score": score}
                for name, value in values.items():
                    rows[name].append(value)
    floats = {"query_loss", "measured", "score"}
    return {
        name: np.array(values, dtype=object if name == "kind" else np.float64 if name in floats else np.int64)
        for name, values in rows.items()
    }


def _with_examples(table: Columns, columns: Mapping[str, NDArray[Any]]) -> Columns:
    """Add what the scores table says of the training examples."""
    order = np.argsort(columns["index"], kind="stable")
    rows = order[np.searchsorted(columns["index"][order], table["index"])]
    size = len(rows)
    return table | {
        "label": columns["label"][rows] if "label" in columns else np.full(size, -1),
        "predicted": columns["predicted"][rows] if "predicted" in columns else np.full(size, -1),
        "loss": columns["loss"][rows] if "loss" in columns else np.full(size, np.nan),
    }
