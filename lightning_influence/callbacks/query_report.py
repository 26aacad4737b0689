"""Queries of an audit: from the callback's argument to what the reporter writes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_influence.audit.naming import ExampleNames
from lightning_influence.audit.queries import Columns, Queries, QueryPairs, QuerySearch
from lightning_influence.audit.replayed_queries import with_replayed
from lightning_influence.callbacks import bridge
from lightning_influence.callbacks.lightning import MisconfigurationException, Trainer, rank_zero_warn
from lightning_influence.core import distributed
from lightning_influence.core.errors import short
from lightning_influence.core.meeting import together
from lightning_influence.core.memory import is_out_of_memory
from lightning_influence.curvature import Curvature, SolverError
from lightning_influence.data.source import DataError
from lightning_influence.gradients.passes import ExampleGradients
from lightning_influence.gradients.visitors import Guest, Visitor
from lightning_influence.loggers.exhibits import Exhibit
from lightning_influence.loggers.query_sheets import queries
from lightning_influence.scores.examples import ExampleScorer
from lightning_influence.scores.measurements import MeasurementError, QuerySets
from lightning_influence.scores.pairs import PairwiseScores
from lightning_influence.scores.queries import QueryError


def checked_queries(queries: Any) -> Queries | None:
    """Return the callback's argument in full.

    Raises:
        ValueError: If it is something else.
    """
    if queries is None or isinstance(queries, Queries):
        return queries
    if queries == "worst" or isinstance(queries, DataLoader):
        return Queries(queries)
    raise ValueError(
        f'queries={short(queries)}; expected None, "worst" (the validation examples with the highest '
        "loss), a DataLoader, "
        "or `Queries(...)`."
    )


def described(queries: Queries | None) -> dict[str, Any] | None:
    """Return the argument in terms of JSON."""
    if queries is None:
        return None
    which = queries.which if isinstance(queries.which, str) else type(queries.which.dataset).__name__
    return {
        "which": which,
        "count": queries.count,
        "top": queries.top,
        "measurement": queries.measured.name,
        "normalise": queries.normalise,
        **({} if queries.method == "influence" else {"method": queries.method}),
    }


class QueryReport:
    """Asks an audit's queries.

    Args:
        asked: What is asked.
    """

    def __init__(self, asked: Queries) -> None:
        self.asked = asked
        self.pairs: QueryPairs | None = None
        self.notes: list[str] = []
        self._sets: QuerySets = []
        self._search: QuerySearch | None = None
        self._validated = False  # whether the queries are validation examples

    def check(self, trainer: Trainer, gradients: ExampleGradients, validation: QuerySets) -> None:
        """Take the measurement once before the first step, so that nothing fails after hours of training.

        Raises:
            MisconfigurationException: If the loader can't be visited by index, or the measurement can't be made on
                the query set.
        """
        sets = self.sets(trainer, gradients, validation)
        # A dry run sees a few examples only, which need not have all that the measurement asks for.
        if not self.asked.of_set or not sets or bridge.is_dry_run(trainer):
            return
        try:
            self.asked.measured.measure([(queries.with_scale(None), chosen) for queries, chosen in sets])
        # A user's function may raise anything, and so may a task that meets another kind of batch.
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise MisconfigurationException(
                f"InfluenceAudit(queries=...): {self.asked.measured.name} can't be measured on the query set: {error}"
            ) from error

    def begin(
        self, trainer: Trainer, gradients: ExampleGradients, indices: Sequence[int], validation: QuerySets
    ) -> QueryReport:
        """Get ready to look at the passes at the end of training."""
        with self._or_give_up():
            self._sets = self.sets(trainer, gradients, validation)
            self._validated = self._sets is validation
            if self._sets:
                self._search = QuerySearch(gradients, indices, self._sets, self.asked)
            else:
                self._give_up("there are no validation examples to choose them from; pass a DataLoader as `queries=`")
        return self

    def on_validation(self, number: int) -> Sequence[Visitor]:
        """Look at the validation examples, if the queries are among them."""
        return self._search.on_validation(number) if self._search is not None and self._validated else ()

    def on_training(self, curvature: Curvature | None, own: ExampleScorer) -> Sequence[Guest]:
        """Look for the queries' pairs, with the fitted curvature."""
        if self._search is None:
            return ()
        if curvature is None:
            self._give_up("there is no curvature to score them with")
            return ()
        visitors: Sequence[Guest] = ()
        with self._or_give_up():
            visitors = self._search.on_training(curvature, own)
        return visitors

    def find(self, columns: Columns, seconds: dict[str, float], names: ExampleNames | None = None) -> Columns:
        """Return what the queries add to the scores table, once the passes are over; add the time that it took.

        Args:
            columns: The scores table.
            seconds: By what they were spent on.
            names: Of the training examples: where they have tokens, the pairs' scores are told by token.
        """
        start = time.perf_counter()
        with self._or_give_up():
            self.pairs = None if self._search is None else self._search.result(columns)
        if names is not None:
            self._by_token(names)
        seconds["queries"] += time.perf_counter() - start
        self._search = None  # it holds gradients
        if self.pairs is None:
            return {}
        self.notes += self.pairs.notes
        return self.pairs.columns

    def _by_token(self, names: ExampleNames) -> None:
        if self.pairs is None or self._search is None:
            return
        try:
            texts = names.tokens(np.unique(self.pairs.table["index"]).tolist(), self._search.source)
            told = self._search.tokens(self.pairs.table, texts)
            self.pairs = replace(self.pairs, table=self.pairs.table | told)
            if not told and names.tokenized:
                why = "no layer has a position for each" if texts else "examples hold no sequence of integers to decode"
                self.notes.append(f"pairs are not told by token: {why}")
        except Exception as error:  # the pairs are there without
            self.notes.append(f"pairs are not told by token: {type(error).__name__}: {error}")

    def add_replayed(
        self, scores: Mapping[int, PairwiseScores], columns: Mapping[str, Any], names: ExampleNames
    ) -> Columns:
        """Add lists by replay; return the table of all pairs.

        Args:
            scores: Of the queries of each set, by its number.
            columns: The scores table.
            names: Of the training examples.
        """
        assert self.pairs is not None
        self.pairs = replace(self.pairs, table=with_replayed(self.pairs.table, scores, self.asked, columns))
        self.name(names)
        return self.pairs.table

    @property
    def datasets(self) -> list[Any]:
        """The data set of each query set."""
        return [passes.source.dataset for passes, _ in self._sets]

    def name(self, names: ExampleNames) -> None:
        """Add ids and original indices to the table of pairs."""
        if self.pairs is not None:
            added = names.in_pairs(self.pairs.table, self.datasets)
            self.pairs = replace(self.pairs, table=self.pairs.table | added)

    def exhibits(self, names: ExampleNames, label_names: Sequence[str] | None) -> Iterator[Exhibit]:
        """Yield table and pictures, if there are any pairs."""
        if self.pairs is None:
            return

        def images(of: int | None, indices: list[int]) -> Sequence[Tensor | str] | None:
            return names.shown(indices, None if of is None else self.datasets[of])

        yield from queries(
            self.pairs.table, images=images, measured=self.pairs.about["per_query"], label_names=label_names
        )

    def sets(self, trainer: Trainer, gradients: ExampleGradients, validation: QuerySets) -> QuerySets:
        """Return passes over the data of each query set, and the examples that may be asked about."""
        if not isinstance(self.asked.which, DataLoader):
            return validation
        try:
            # Of a stream without end as many as are asked about are enough.
            batches = None if self.asked.of_set else self.asked.count
            source, drawn = bridge.query_examples(self.asked.which, batches)
        except DataError as error:
            raise MisconfigurationException(f"InfluenceAudit(queries=...): {error}") from error
        if bridge.is_dry_run(trainer):
            drawn = drawn[: self.asked.count]
        if not drawn:
            raise MisconfigurationException("InfluenceAudit(queries=...): the loader's dataset is empty.")
        return [(gradients.on(source), drawn)]

    @contextmanager
    def _or_give_up(self) -> Iterator[None]:
        try:
            with together():
                yield
        except (QueryError, MeasurementError, SolverError) as error:
            self._give_up(str(error))
        # The scores of the training examples do not depend on it: no data set that raises may cost them.
        except Exception as error:
            self._give_up(f"{type(error).__name__}: {error}")

    def _give_up(self, reason: str) -> None:
        self._search = None
        self.notes.append(f"no pairs of queries: {reason}")
        if distributed.rank() == 0:
            rank_zero_warn(f"InfluenceAudit: no pairs of queries: {reason}")
