"""The index of an audit: written beside its last pass, given up without harm to the audit."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lightning_influence.callbacks.lightning import rank_zero_warn
from lightning_influence.core import distributed
from lightning_influence.core.meeting import together
from lightning_influence.curvature import Curvature
from lightning_influence.gradients.passes import ExampleGradients
from lightning_influence.gradients.visitors import Guest, Visitor
from lightning_influence.index import Index, IndexWriter
from lightning_influence.index.writer import told
from lightning_influence.scores.examples import ExampleScorer
from lightning_influence.scores.plan import Companion, InfluenceScores


class IndexReport:
    """Writes an index at the end of training.

    Args:
        settings: How large it is; None for none.
        gradients: Passes over the training data.
        indices: The training examples.
        directory: That of the audit, on rank zero.

    Attributes:
        notes: What a reader should know.
    """

    def __init__(
        self, settings: Index | None, gradients: ExampleGradients, indices: Sequence[int], directory: Path | None
    ) -> None:
        self.notes: list[str] = []
        self._settings, self._gradients, self._indices = settings, gradients, indices
        # A dry run has none.
        self._directory = None if settings is None else distributed.gather_objects(directory)[0]
        self._writer: IndexWriter | None = None
        self._guest: Guest | None = None

    def beside(self, other: Companion | None) -> list[Companion]:
        """Return it after another one."""
        return [self] if other is None else [other, self]

    def on_validation(self, number: int) -> Sequence[Visitor]:
        """Look at nothing."""
        return ()

    def on_training(self, curvature: Curvature | None, own: ExampleScorer) -> Sequence[Guest]:
        """Return who writes the index as the training data go by."""
        if self._directory is None or self._settings is None:
            return ()
        if curvature is None:
            self._give_up("there is no curvature")
            return ()
        with self._or_give_up():
            self._writer = IndexWriter(self._gradients, self._indices, curvature, self._directory, self._settings, own)
            self._guest = Guest(self._writer)
        return [] if self._guest is None else [self._guest]

    def finish(self, result: InfluenceScores) -> None:
        """Complete it, once the pass is over; add what there is to say, and the time that it took."""
        if self._directory is None:
            return
        start = time.perf_counter()
        with self._or_give_up():
            if self._writer is not None and self._guest is not None:
                if self._guest.error is not None:
                    raise self._guest.error
                self.notes.append(told(self._writer.finish()))
        self._writer = self._guest = None
        result.notes.extend(self.notes)
        result.seconds["index"] = time.perf_counter() - start

    @contextmanager
    def _or_give_up(self) -> Iterator[None]:
        try:
            with together():
                yield
        # The audit does not depend on it: no disk that is full may cost it.
        except Exception as error:
            self._give_up(str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}")

    def _give_up(self, reason: str) -> None:
        if self._writer is not None:
            self._writer.give_up()
        self.notes.append(f"no index: {reason}")
        if distributed.rank() == 0:
            rank_zero_warn(f"InfluenceAudit: no index: {reason}")
