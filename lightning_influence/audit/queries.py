"""Queries of an audit: the examples that the model does worst on, and the training examples to thank or to blame."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_influence.audit.columns import INFLUENCE_ON
from lightning_influence.core.errors import check_count, short
from lightning_influence.curvature import Curvature
from lightning_influence.data.source import ExampleSource
from lightning_influence.gradients.attempts import Attempt
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
from lightning_influence.scores.examples import ExampleScorer
from lightning_influence.scores.measurements import (
    AnyMeasurement,
    Loss,
    Measurement,
    QuerySets,
    Statistic,
    as_measurement,
    measured_values,
)
from lightning_influence.scores.pairs import distinct
from lightning_influence.scores.products import Normalisation, StrongestPairs, inverse_length
from lightning_influence.scores.queries import (
    QueryError,
    check_layers,
    prepared_queries,
    query_chunks,
    run_on_queries,
)
from lightning_influence.scores.token_scores import TokenScores

Columns = dict[str, NDArray[Any]]
Lists = Literal["both", "none", "relative", "leverage"]

_MOST_TOKENS = 512  # of a pair

_LISTS: dict[Lists, dict[str, Normalisation]] = {
    "both": {"strongest": "none", "specific": "relative"},
    "none": {"strongest": "none"},
    "relative": {"specific": "relative"},
    "leverage": {"strongest": "leverage"},
}


@dataclass(frozen=True, eq=False)
class Queries:
    """What an audit is asked about, beside the training data themselves.

    Args:
        which: ``"worst"``: of all validation examples the ``count`` worst, by the measurement if it is one of single
            examples, else by loss. Or a loader: its first ``count`` examples, whatever order it shuffles them to.
        count: Number of queries that are shown with their proponents and opponents.
        top: Number of proponents and of opponents of each, at most: proponents have positive scores, opponents
            negative ones.
        measurement: ``"loss"``, ``"margin"``, one that ``lightning_influence`` has (``AdversarialLoss``, ...), or a
            function ``(module, batch) -> number`` of the whole set. One other than the loss is also measured on it
            (all validation examples, or all of the loader), and every training example gets its influence on it, in the
            column ``influence_on_<name>``; so it does for the loss of a loader.
        normalise: Which lists are made of each query: ``"none"``, the ``strongest`` examples, among them the loud ones
            (wrong labels, outliers) that lead many lists; ``"relative"``, the most ``specific`` ones, whose score is
            large for how much they move the model at all (RelatIF); or ``"both"``, in the same pass. ``"leverage"``:
            the ``strongest`` by what removing them does, curvature included (rescaled influence): scores are divided by
            one minus the example's leverage. It needs a known loss.
        method: ``"influence"`` functions alone, or ``"replay"``: a further list of each query, ``replay``, by what the
            examples did in this very run (``docs/replay.md``). It records the training (``record=``), and is made
            once the audit is written, within ``Record(max_cost=...)``.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> InfluenceAudit(queries=Queries(measurement=DemographicParityGap(group=is_black)))
    """

    which: Literal["worst"] | DataLoader[Any] = "worst"
    count: int = 8
    top: int = 10
    measurement: AnyMeasurement = "loss"
    normalise: Lists = "both"
    method: Literal["influence", "replay"] = "influence"

    def __post_init__(self) -> None:
        if self.which != "worst" and not isinstance(self.which, DataLoader):
            raise ValueError(f'queries: which={short(self.which)}; expected "worst" or a DataLoader.')
        for name, value in (("count", self.count), ("top", self.top)):
            object.__setattr__(self, name, check_count(f"queries: {name}", value))
        as_measurement(self.measurement)
        if self.normalise not in get_args(Lists):
            expected = ", ".join(map(repr, get_args(Lists)))
            raise ValueError(f"queries: normalise={short(self.normalise)}; expected one of {expected}.")
        if self.method not in ("influence", "replay"):
            raise ValueError(f'queries: method={short(self.method)}; expected "influence" or "replay".')

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
        columns: What the queries add to the scores table: influence on the measurement of the whole set, if there is
            one.
        about: For the manifest: title, measurement, value.
        notes: What a reader should know.
    """

    table: Columns
    columns: Columns
    about: dict[str, Any]
    notes: list[str] = field(default_factory=list)


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
        self._measured = torch.zeros(0)  # of the queries, each by itself
        self._later: list[list[int]] = []  # queries that take a further pass: their gradients don't fit all at once
        self._found: list[tuple[int, list[int], StrongestPairs]] = []  # number of a set, places of its queries
        self._guests: list[Guest] = []
        self._notes: list[str] = []
        self._of_set: ExampleScorer | None = None

    @property
    def source(self) -> ExampleSource:
        """The training data."""
        return self._gradients.source

    def on_validation(self, number: int) -> Sequence[Visitor]:
        """Note the losses of a set that is passed over anyway."""
        passes, chosen = self._sets[number]
        self._noted[number] = LossColumns(chosen, passes.device)
        return [self._noted[number]]

    def on_training(self, curvature: Curvature, own: ExampleScorer) -> Sequence[Guest]:
        """Choose the queries, and return who finds their pairs in the next pass over the training data.

        Args:
            curvature: The curvature.
            own: Who looks at the same pass before them, and finds the examples' self-influence.

        Raises:
            MeasurementError: If what is asked for can't be measured.
            QueryError: If the training task can't be run on the queries.
            SolverError: If an iterative solver did not reach its tolerance.
        """
        self._curvature = curvature
        check_layers(self._gradients, "the curvature", curvature.dampings.keys())
        if self._asked.of_set:
            self._measurement = self._asked.measured.measure(self._sets)
            query = curvature.solve(self._measurement.gradient)
            self._of_set = ExampleScorer(self._gradients, self._examples.tolist(), query=query)
            self._guests.append(Guest(self._of_set))
        self._known = {n: noted.columns.gathered() for n, noted in self._noted.items() if noted.columns.complete}
        with run_on_queries():
            self._choose()
        first, *self._later = query_chunks(self._gradients, range(len(self._chosen)), curvature)
        self._prepare(first, own)
        return self._guests

    def result(self, columns: Mapping[str, NDArray[Any]]) -> QueryPairs:
        """Return what was found, once the pass is over.

        Args:
            columns: The scores table: ``index``, and for the table of pairs ``label``, ``predicted``, ``loss``.
        """
        examples = self._examples.tolist()
        for chunk in self._later:
            before, own = len(self._guests), ExampleScorer(self._gradients, examples, self._curvature)
            self._prepare(chunk, own)
            visit(self._gradients, examples, [own, *self._guests[before:]], title="pairwise scores")
        for guest in self._guests:
            if guest.error is not None:
                raise guest.error
        with run_on_queries():
            parts = [self._rows(*found) for found in self._found]
        joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        order = np.argsort(joined["number"], kind="stable")
        table = with_examples({name: values[order] for name, values in joined.items()}, columns)
        asked, total = self._asked, sum(len(chosen) for _, chosen in self._sets)
        about: dict[str, Any] = {
            "title": _title(asked, len(self._chosen), total, asked.statistic),
            "measurement": asked.measured.name,
            "per_query": asked.statistic.name,
            "examples": total,
        }
        more: Columns = {}
        if asked.normalise == "leverage":
            self._notes.append("queries: scores are divided by one minus the leverage of the training example")
        if self._of_set is not None:
            about |= {"value": self._measurement.value, "groups": self._measurement.counts}
            found = self._of_set.result()
            influence = in_order(columns["index"].tolist(), found.indices, -found.columns["harm"]).cpu()
            more = {INFLUENCE_ON + asked.measured.name: influence.double().numpy()}
        return QueryPairs(table, more, about, self._notes)

    def tokens(self, table: Columns, texts: Mapping[int, Sequence[str | None]]) -> Columns:
        """Return what the scores of a table of pairs are made of, by token; nothing if no layer tells.

        Args:
            table: Of ``result``.
            texts: Of the training examples in it, each token's text, None for padding.

        Returns:
            Columns of the table, see ``columns.TOKEN_DESCRIPTIONS``. One more pass over the examples is made, in
            batches of those with the same number of tokens: nothing is filled up then.
        """
        lengths: dict[int, list[int]] = {}
        for index, own in texts.items():
            lengths.setdefault(len(own), []).append(index)
        fixed = self._same_in_all(lengths)
        scores: dict[tuple[int, int], Tensor] = {}  # by number of the query and example
        for length, group in sorted(lengths.items()):
            visitors = [TokenScores(strongest.prepared, length, fixed) for _, _, strongest in self._found]
            visit(self._gradients, group, visitors, everywhere=True)
            for (_, places, _), visitor in zip(self._found, visitors, strict=True):
                for index, found in visitor.found.items() if visitor.told else ():
                    scores |= {(place + 1, index): own for place, own in zip(places, found, strict=True)}
        if not scores:
            return {}
        sign = -1 if self._asked.statistic.higher_is_better else 1
        rows = len(table["index"])
        made: Columns = {"tokens": np.full(rows, "", dtype=object), "tokens_rest": np.full(rows, np.nan)}
        for row, key in enumerate(zip(table["number"].tolist(), table["index"].tolist(), strict=True)):
            if key in scores and bool(scores[key].isfinite().all()):
                own = texts[key[1]]
                *parts, rest = (sign * scores[key]).tolist()
                told = [[text, part] for text, part in zip(own, parts, strict=True) if text is not None]
                made["tokens"][row] = json.dumps(told[:_MOST_TOKENS], ensure_ascii=False)
                shown = sum(part for _, part in told[:_MOST_TOKENS])
                made["tokens_rest"][row] = rest + sum(parts) - shown
        return made

    def _same_in_all(self, lengths: Mapping[int, Sequence[int]]) -> set[tuple[str, int, int]]:
        """Return positions that the shortest text and the longest have alike: those are no tokens."""
        found = []
        for length in {min(lengths), max(lengths)} if len(lengths) > 1 else ():
            visitor = TokenScores(self._found[0][2].prepared, length)
            visit(self._gradients, lengths[length][:1], [visitor], everywhere=True)
            found.append(visitor.positions)
        return set.intersection(*found) if found else set()

    def _choose(self) -> None:
        """Choose the queries, the worst first."""
        asked, statistic = self._asked, self._asked.statistic
        every = [(number, query) for number, (_, chosen) in enumerate(self._sets) for query in chosen]
        if asked.which != "worst":
            self._chosen = every[: asked.count]
            self._measured = self._value(0, [query for _, query in self._chosen], known=False)
            if len(every) > asked.count:
                self._notes.append(
                    f"queries: the first {asked.count} of {len(every):,} are shown; `Queries(count=...)` shows more"
                )
            return
        values = torch.cat([self._value(number, chosen) for number, (_, chosen) in enumerate(self._sets)])
        badness = -values if statistic.higher_is_better else values
        finite = badness.isfinite()
        order = badness.masked_fill(~finite, -torch.inf).argsort(descending=True, stable=True)
        order = order[finite[order]][: asked.count]
        self._chosen, self._measured = [every[place] for place in order.tolist()], values[order]
        if unknown := int((~finite).sum()):
            self._notes.append(f"queries: {unknown} examples with a non-finite {statistic.name} are not asked about")
        if not self._chosen:
            raise QueryError(f"queries: none of {len(every):,} examples has a finite {statistic.name}.")

    def _value(self, number: int, indices: list[int], *, known: bool = True) -> Tensor:
        """Return what is measured of examples of a set, ``[q]``; it has to be ``known``, or is NaN else."""
        if type(self._asked.statistic) is Loss:
            told = self._told(number, indices)
            if "loss" in told or not known:
                return told.get("loss", torch.full((len(indices),), torch.nan)).double()
        return measured_values(self._sets[number][0], indices, self._asked.statistic)

    def _told(self, number: int, indices: list[int]) -> dict[str, Tensor]:
        """Return loss, label and prediction of examples of a set, as far as they are known, ``[q]`` on the host."""
        if number not in self._known:
            passes, noted = self._sets[number][0], ExampleColumns(indices, torch.device("cpu"))
            attempt = Attempt()
            with closing(passes.losses(indices, attempt=attempt)) as losses:
                for own, loss in losses:
                    with attempt:
                        noted.add(own, loss_columns(loss))
        found, columns = self._known[number] if number in self._known else noted.gathered()
        return {name: in_order(indices, found, values).cpu() for name, values in columns.items()}

    def _prepare(self, places: Sequence[int], scorer: ExampleScorer) -> None:
        """Get ready to find the pairs of some of the queries, by their places."""
        for number, (passes, _) in enumerate(self._sets):
            own = [place for place in places if self._chosen[place][0] == number]
            if own:
                indices, measuring = self._indices(own), passes.measuring(self._asked.statistic)
                (prepared,) = prepared_queries(self._curvature, measuring, [indices], len(self._examples))
                lists = list(_LISTS[self._asked.normalise].values())
                self._found.append((number, own, StrongestPairs(prepared, self._asked.top, scorer, lists)))
                self._guests.append(Guest(self._found[-1][2]))

    def _indices(self, places: Sequence[int]) -> list[int]:
        return [self._chosen[place][1] for place in places]

    def _rows(self, number: int, places: list[int], strongest: StrongestPairs) -> Columns:
        """Return the pairs of queries of one set, one row each: list by list, proponents first, the strongest first."""
        told, unknown = self._told(number, self._indices(places)), torch.full((len(places),), -1)
        of_query = {
            "number": torch.tensor(places) + 1,
            "query_set": torch.full_like(unknown, number),
            "query": torch.tensor(self._indices(places)),
            "query_label": told.get("label", unknown).long(),
            "query_predicted": told.get("predicted", unknown).long(),
            "query_loss": told.get("loss", unknown * torch.nan).double(),
            "measured": self._measured[places],
        }
        # A positive score lowers what is measured: where more is better, that is an opponent.
        side = int(self._asked.statistic.higher_is_better)
        kinds = ("proponent", side, 1), ("opponent", 1 - side, -1)
        parts = []
        lists, leveraged = _LISTS[self._asked.normalise], self._asked.normalise == "leverage"
        for name, found, rows, plain in zip(lists, *strongest.result(), strict=True):
            scores = found if leveraged else plain
            for kind, side, sign in kinds:
                # Of few examples, the strongest proponents may be none; or fewer than asked for have a score at all.
                row, rank = (found[side] > 0).nonzero(as_tuple=True)
                part: Columns = {column: values[row].numpy() for column, values in of_query.items()}
                part |= {each: np.full(len(row), text, dtype=object) for each, text in (("kind", kind), ("list", name))}
                part |= {"rank": rank.numpy() + 1, "index": rows[side, row, rank].numpy()}
                parts.append(part | {"score": sign * scores[side, row, rank].double().numpy()})
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _title(asked: Queries, count: int, total: int, statistic: Statistic) -> str:
    if asked.which != "worst":
        return f"the first {count} of {total:,} given examples"
    extreme = "smallest" if statistic.higher_is_better else "largest"
    return f"the {count} of {total:,} validation examples with the {extreme} {statistic.name.replace('_', ' ')}"


def with_examples(table: Columns, columns: Mapping[str, NDArray[Any]]) -> Columns:
    """Add what the scores table says of the training examples."""
    order = np.argsort(columns["index"], kind="stable")
    rows = order[np.searchsorted(columns["index"][order], table["index"])]
    size = len(rows)
    own = columns["self_influence"][rows] if "self_influence" in columns else np.full(size, np.nan)
    return table | {
        "relative": table["score"] * inverse_length(torch.as_tensor(own, dtype=torch.float64)).numpy(),
        "label": columns["label"][rows] if "label" in columns else np.full(size, -1),
        "predicted": columns["predicted"][rows] if "predicted" in columns else np.full(size, -1),
        "loss": columns["loss"][rows] if "loss" in columns else np.full(size, np.nan),
    }
