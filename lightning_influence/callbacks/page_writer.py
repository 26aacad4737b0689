"""The page of an audit: its document and pictures, beside its other files and in the event files of TensorBoard."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_influence.audit.naming import ExampleNames
from lightning_influence.audit.report import AuditReport
from lightning_influence.audit.store.store import AuditStore
from lightning_influence.callbacks.display import tolerated
from lightning_influence.callbacks.lightning import Trainer, rank_zero_info
from lightning_influence.callbacks.showing import Showing
from lightning_influence.core.memory import readable
from lightning_influence.loggers.exhibits import Page
from lightning_influence.loggers.pictures import thumbnail
from lightning_influence.page.document import AUDIT, files, shown_indices

_PICTURES = 15_000_000  # bytes, which are 20 MB as text
_PICTURED = 1_000  # training examples
_PATIENCE = 60.0  # seconds for fetching them, of data that are slow
_LARGEST = 64_000_000  # bytes of a document in an event file, which TensorBoard keeps in memory
_WHILE_TRAINING = 2_000_000  # bytes, times the root of the number of epochs, that event files get before the end


@dataclass
class _Shown:
    """What is shown of examples, by whatever names them."""

    texts: dict[Any, str]
    pictures: dict[Any, bytes]


class PageWriter:
    """Writes what the page reads; rank zero has one.

    Args:
        store: The audit directory, None to write nothing.
        showing: Hands it to the loggers.
        said: What has been said to have failed.
    """

    def __init__(self, store: AuditStore | None, showing: Showing, said: set[str]) -> None:
        self._store, self._showing, self._said = store, showing, said
        self._last = self._written = 0  # bytes in event files before the end

    def write_partial(self, trainer: Trainer, report: AuditReport, epochs: int) -> None:
        """Write what there is so far.

        Args:
            trainer: The trainer.
            report: Of that.
            epochs: How many are done.
        """
        if self._store is None:
            return
        made = files(report, name=self._name, epochs=(epochs, _planned(trainer, epochs)))
        self._store.write_page(made)
        over = report.status != "recording"
        if over or self._written + max(self._last, len(made[AUDIT])) <= _WHILE_TRAINING * max(epochs, 1) ** 0.5:
            self._last = len(made[AUDIT])
            self._written += self._last
            self._log(trainer, "recording", made)

    def write(
        self, trainer: Trainer, report: AuditReport, names: ExampleNames, query_sets: Sequence[Any], epochs: int
    ) -> None:
        """Write the whole page of an audit that is over.

        Args:
            trainer: The trainer.
            report: The audit.
            names: Of the training examples.
            query_sets: The data set of each query set.
            epochs: How many are done.
        """
        if self._store is None:
            return
        made: dict[str, bytes] = {}
        with tolerated("making the page", self._said):
            examples, queries = self._shown(report, names, query_sets)
            made = files(
                report,
                name=self._name,
                texts=examples.texts,
                query_texts=queries.texts,
                pictures=examples.pictures,
                query_pictures=queries.pictures,
                epochs=(epochs, _planned(trainer, epochs)),
            )
        with tolerated(f"writing the page to {self._store.directory}", self._said):
            self._store.write_page(made)  # without one, that of the time of training goes
        if made:
            self._log(trainer, "audit", made)

    @property
    def _name(self) -> str:
        return "" if self._store is None else "/".join(self._store.directory.parts[-2:])

    def _log(self, trainer: Trainer, series: str, made: dict[str, bytes]) -> None:
        assert self._store is not None
        document, *pictures = made[AUDIT], *(content for name, content in made.items() if name != AUDIT)
        if len(document) > _LARGEST:
            rank_zero_info(
                f"influence audit: of {readable(len(document))}, it is not in TensorBoard's Influence tab; "
                f"`lightning-influence view {self._store.directory}` shows it."
            )
            return
        page = Page(f"{series}/{self._store.directory.name}", [document, *pictures])
        self._showing.show(trainer, "the page", lambda: [page])

    def _shown(self, report: AuditReport, names: ExampleNames, query_sets: Sequence[Any]) -> tuple[_Shown, _Shown]:
        """Return what is shown of training examples, and of queries by set and position in it."""
        examples, queries = _Shown({}, {}), _Shown({}, {})
        end, pairs = time.perf_counter() + _PATIENCE, report.pairs
        room = _PICTURES
        if pairs is not None:
            asked = list(dict.fromkeys(zip(pairs["query_set"].tolist(), pairs["query"].tolist(), strict=True)))
            for number, dataset in enumerate(query_sets):
                keys = [key for key in asked if key[0] == number]
                room = self._add(queries, keys, names, [query for _, query in keys], dataset, room, end)
        indices = shown_indices(report, _PICTURED)
        self._add(examples, indices, names, indices, None, room, end)
        return examples, queries

    def _add(
        self,
        shown: _Shown,
        keys: Iterable[Any],
        names: ExampleNames,
        indices: Sequence[int],
        dataset: Any,
        room: int,
        end: float,
    ) -> int:
        """Add pictures and texts as long as there is room and time; return how many bytes are left."""
        with tolerated("fetching examples for the page", self._said), closing(names.each(indices, dataset)) as found:
            for key, example in zip(keys, found, strict=False):
                if isinstance(example, Tensor):
                    picture = thumbnail(example)
                    room -= len(picture)
                    if room < 0:
                        break
                    shown.pictures[key] = picture
                elif example:
                    shown.texts[key] = example
                if time.perf_counter() > end:
                    break
        return max(room, 0)


def _planned(trainer: Trainer, epochs: int) -> int | None:
    """Return how many epochs there will be; None where nobody knows, and for a training that was elsewhere."""
    most = trainer.max_epochs
    return None if most is None or most < max(epochs, 0) else most
