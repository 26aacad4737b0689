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
from lightning_influence.core.precision import wide_zeros
from lightning_influence.curvature import Curvature
from lightning_influence.gradients.passes import ExampleGradients
from lightning_influence.gradients.visitors import (
    ExampleColumns,
    Guest,
    LossColumns,
    Visitor,
    in_order,
    loss_columns,
    visit,
)
from lightning_influence.scores.measurements import (
    AnyMeasurement,
    Loss,
    Measured,
    Measurement,
    MeasurementError,
    QuerySets,
    Statistic,
    as_measurement,
    measured_values,
)
from lightning_influence.scores.pairs import TopScores, distinct, top_of
from lightning_influence.scores.products import PairColumns, StrongestPairs
from lightning_influence.scores.queries import (
    PreparedQueries,
    QueryError,
    check_layers,
    prepared_queries,
    query_chunks,
)

Columns = dict[str, NDArray[Any]]

_FACTS = ("query_label", "query_predicted", "query_loss")


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
        columns: What the queries add to the scores table: influence on the measurement of the whole set, if there is
            one.
        about: For the manifest: title, measurement, value.
        notes: What a reader should know.
    """

    table: Columns
    queries: list[tuple[int, int]]
    columns: Columns
    about: dict[str, Any]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class _Part:
    """Queries of one set whose pairs are found in one pass.

    Attributes:
        number: Of the set.
        places: Of the queries among all of them.
        top: Finds their pairs.
        guest: The same, as it looks at a pass.
    """

    number: int
    places: list[int]
    top: StrongestPairs
    guest: Guest


class QuerySearch:
    """Chooses the queries, and finds the strongest proponents and opponents of each as the audit's passes go by.

    Args:
        gradients: Passes over the training data.
        indices: The training examples.
        sets: Passes over the queries' data and the examples to choose from, by loader.
        asked: What is asked.
    """

    def __init__(self, gradients: ExampleGradients, indices: Sequence[int], sets: QuerySets, asked: Queries) -> None:
        self._gradients, self._asked, self._examples = gradients, asked, distinct(indices)
        self._sets = [(passes.like(gradients), list(chosen)) for passes, chosen in sets]
        self._noted: dict[int, LossColumns] = {}
        self._known: dict[int, tuple[Tensor, dict[str, Tensor]]] = {}
        self._chosen: list[tuple[int, int]] = []
        self._values: Tensor | None = None  # what is measured of those chosen, if that is known by then
        self._later: list[list[int]] = []  # queries that take a further pass: their gradients don't fit all at once
        self._parts: list[_Part] = []
        self._measured: Measured | None = None
        self._influence = torch.full((len(self._examples),), torch.nan, dtype=torch.float64)
        self._watching: list[Guest] = []
        self._notes: list[str] = []

    def on_validation(self, number: int) -> Sequence[Visitor]:
        """Note the losses of a set that is passed over anyway."""
        passes, chosen = self._sets[number]
        self._noted[number] = LossColumns(chosen, passes.device)
        return [self._noted[number]]

    def on_training(self, curvature: Curvature) -> Sequence[Visitor]:
        """Choose the queries, and return who finds their pairs in the next pass over the training data.

        Raises:
            MeasurementError: If what is asked for can't be measured.
            QueryError: If the training task can't be run on the queries.
            SolverError: If an iterative solver did not reach its tolerance.
        """
        self._curvature = curvature
        check_layers(self._gradients, "the curvature", curvature.dampings.keys())
        if self._asked.of_set:
            self._measured = self._asked.measured.measure(self._sets)
            vector = curvature.solve(self._measured.gradient)
            as_query = PreparedQueries({n: v[None] for n, v in vector.items()}, wide_zeros(1, self._gradients.device))
            self._columns = PairColumns(self._examples, as_query, self._write)
            self._watching = [Guest(self._columns)]
        self._known = {n: noted.columns.gathered() for n, noted in self._noted.items() if noted.columns.complete}
        with _run_on_queries():
            self._choose()
        places, notes = query_chunks(self._gradients, range(len(self._chosen)))
        self._notes += notes
        first, self._later = places[0], places[1:]
        return [*self._watching, *self._prepared(first)]

    def result(self, columns: Mapping[str, NDArray[Any]]) -> QueryPairs:
        """Return what was found, once the pass is over.

        Args:
            columns: The scores table: ``index``, and for the table of pairs ``label``, ``predicted``, ``loss``.
        """
        for chunk in self._later:
            visit(self._gradients, self._examples.tolist(), self._prepared(chunk), title="pairwise scores")
        for guest in [*self._watching, *(part.guest for part in self._parts)]:
            if guest.error is not None:
                raise guest.error
        with _run_on_queries():
            rows = [self._rows(part) for part in self._parts]
        joined = {name: np.concatenate([part[name] for part in rows]) for name in rows[0]}
        order = np.argsort(joined["number"], kind="stable")
        table = _with_examples({name: values[order] for name, values in joined.items()}, columns)
        asked, statistic, found = self._asked, self._asked.statistic, {}
        total = sum(len(chosen) for _, chosen in self._sets)
        about: dict[str, Any] = {
            "title": _title(asked, len(self._chosen), total, statistic),
            "measurement": asked.measured.name,
            "per_query": statistic.name,
            "examples": total,
        }
        if self._measured is not None:
            self._columns.finish()
            wanted = torch.from_numpy(columns["index"]).tolist()
            found = {INFLUENCE_ON + asked.measured.name: in_order(wanted, self._examples, self._influence).numpy()}
            about |= {"value": self._measured.value, "groups": self._measured.counts}
        return QueryPairs(table, self._chosen, found, about, self._notes)

    def _write(self, places: Tensor, scores: Tensor) -> None:
        self._influence[places] = scores[0, 0]

    def _choose(self) -> None:
        """Choose the queries, the worst first."""
        asked, statistic = self._asked, self._asked.statistic
        every = [(number, query) for number, (_, chosen) in enumerate(self._sets) for query in chosen]
        if asked.which != "worst":
            if len(every) > asked.count:
                self._notes.append(
                    f"queries: the first {asked.count} of {len(every):,} are shown; `Queries(count=...)` shows more"
                )
            self._chosen = every[: asked.count]
            return
        values = torch.cat([self._value(number, chosen) for number, (_, chosen) in enumerate(self._sets)])
        badness = -values if statistic.higher_is_better else values
        finite = badness.isfinite()
        if unknown := int((~finite).sum()):
            self._notes.append(f"queries: {unknown} examples with a non-finite {statistic.name} are not asked about")
        order = badness.masked_fill(~finite, -torch.inf).argsort(descending=True, stable=True)
        order = order[finite[order]][: asked.count]
        self._chosen, self._values = [every[place] for place in order.tolist()], values[order]
        if not self._chosen:
            raise QueryError(f"queries: none of {len(every):,} examples has a finite {statistic.name}.")

    def _value(self, number: int, indices: list[int]) -> Tensor:
        """Return what is measured of examples of a set, ``[q]`` on the host."""
        found, known = self._known.get(number, (None, {}))
        if type(self._asked.statistic) is Loss and found is not None and "loss" in known:
            return in_order(indices, found, known["loss"]).cpu().double()
        return measured_values(self._sets[number][0], indices, self._asked.statistic)

    def _prepared(self, places: Sequence[int]) -> list[Guest]:
        """Return who finds the pairs of some of the queries, by their places."""
        found = []
        for number, (passes, _) in enumerate(self._sets):
            own = [place for place in places if self._chosen[place][0] == number]
            if not own:
                continue
            indices = [self._chosen[place][1] for place in own]
            measuring = passes.measuring(self._asked.statistic)
            (prepared,) = prepared_queries(self._curvature, measuring, [indices], len(self._examples))
            top = StrongestPairs(prepared, self._asked.top)
            found.append(_Part(number, own, top, Guest(top)))
        self._parts += found
        return [part.guest for part in found]

    def _rows(self, part: _Part) -> Columns:
        """Return the pairs of some queries, one row each: proponents first, the strongest first."""
        part.top.finish()
        queries = [self._chosen[place][1] for place in part.places]
        facts, top = self._facts(part, queries), top_of(queries, [part.top])
        number = torch.tensor(part.places) + 1
        sides = []
        for kind, examples, scores in _sides(top, self._asked.statistic):
            # Of few examples, the strongest proponents may be none; or fewer than asked for have a score at all.
            row, rank = ((examples >= 0) & (scores > 0 if kind == "proponent" else scores < 0)).nonzero(as_tuple=True)
            side = {"number": number[row], "query_set": torch.full_like(row, part.number), "query": top.queries[row]}
            side |= {name: values[row] for name, values in facts.items()}
            told = {"rank": rank + 1, "index": examples[row, rank], "score": scores[row, rank].double()}
            kinds = np.full(len(row), kind, dtype=object)
            sides.append(
                {n: v.numpy() for n, v in side.items()} | {"kind": kinds} | {n: v.numpy() for n, v in told.items()}
            )
        return {name: np.concatenate([side[name] for side in sides]) for name in sides[0]}

    def _facts(self, part: _Part, queries: list[int]) -> dict[str, Tensor]:
        """Return label, prediction, loss and measured value of queries, ``[q]`` each."""
        if part.number in self._known:
            found, columns = self._known[part.number]
        else:
            passes, noted = self._sets[part.number][0], ExampleColumns(queries, torch.device("cpu"))
            with closing(passes.losses(queries)) as losses:
                for own, loss in losses:
                    noted.add(own, loss_columns(loss))
            found, columns = noted.gathered()
        told = {f"query_{name}": in_order(queries, found, values).cpu() for name, values in columns.items()}
        unknown = {"query_loss": torch.full((len(queries),), torch.nan)}
        facts = {name: told.get(name, unknown.get(name, torch.full((len(queries),), -1))) for name in _FACTS}
        facts = {name: values.double() if name == "query_loss" else values.long() for name, values in facts.items()}
        if self._values is not None:
            return facts | {"measured": self._values[part.places]}
        plain = type(self._asked.statistic) is Loss
        return facts | {"measured": facts["query_loss"] if plain else self._value(part.number, queries)}


def _sides(top: TopScores, statistic: Statistic) -> list[tuple[str, Tensor, Tensor]]:
    if statistic.higher_is_better:
        # A positive score lowers what is measured: here, those are the opponents.
        return [
            ("proponent", top.opponents, -top.opponent_scores),
            ("opponent", top.proponents, -top.proponent_scores),
        ]
    return [("proponent", top.proponents, top.proponent_scores), ("opponent", top.opponents, top.opponent_scores)]


@contextmanager
def _run_on_queries() -> Iterator[None]:
    try:
        yield
    except (MeasurementError, torch.OutOfMemoryError, MemoryError):
        raise
    # Anything can go wrong in a user's task that meets another kind of batch.
    except Exception as error:
        raise QueryError(
            f"queries: the training task can't be run on them ({type(error).__name__}: {error}). Queries need inputs "
            "and labels of the kind that the model was trained on."
        ) from error


def _title(asked: Queries, count: int, total: int, statistic: Statistic) -> str:
    if asked.which != "worst":
        return f"the first {count} of {total:,} given examples"
    extreme = "smallest" if statistic.higher_is_better else "largest"
    return f"the {count} of {total:,} validation examples with the {extreme} {statistic.name.replace('_', ' ')}"


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
