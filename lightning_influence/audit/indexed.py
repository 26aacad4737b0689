"""The index of an audit, and questions to it."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any, get_args

from torch import nn

from lightning_influence.audit.asked import keep_answers
from lightning_influence.audit.columns import Columns
from lightning_influence.audit.store.atomic import StoreError
from lightning_influence.audit.store.store import AuditStore
from lightning_influence.core.errors import check_flag
from lightning_influence.data.given import Data, Indices
from lightning_influence.index import ExampleIndex
from lightning_influence.index.answering import Answers, Order
from lightning_influence.index.files import FOLDER, ExampleIndexError
from lightning_influence.objective.standard_task import TaskName, checked_task
from lightning_influence.objective.task import Task


def index_beside(store: AuditStore) -> ExampleIndex:
    """Return the index in a directory, with the curvature that lies there."""
    return ExampleIndex(store.directory / FOLDER, store.factors)


class Indexed:
    """What a report says about new examples."""

    columns: Columns
    directory: Path | None
    manifest: Any

    @cached_property
    def index(self) -> ExampleIndex:
        """The index, if the audit was made with ``index=True``.

        Raises:
            StoreError: If the audit is not on disk.
            ExampleIndexError: If there is none, or it can't be read.
        """
        if self.directory is None:
            raise StoreError("the audit is not on disk (a dry run, or merged from several), and has no index.")
        return index_beside(AuditStore(self.directory))

    def ask(
        self,
        model: nn.Module,
        batch: Any,
        k: int = 10,
        *,
        task: Task | TaskName | None = None,
        indices: Indices | None = None,
        normalise: Order = "none",
        within: Data | None = None,
        keep: bool = False,
    ) -> Answers:
        """Return the training examples that help and harm new examples most, without the training data.

        It takes an audit with ``InfluenceAudit(index=True)``, and the model with the weights that were audited.

        Args:
            model: The model, say ``MyModule.load_from_checkpoint(path)``; it is left as it is.
            batch: What ``training_step`` takes; or a data set, or a ``DataLoader``.
            k: How many proponents and opponents of each.
            task: The loss, where the audit was made with one in place of ``training_step``.
            indices: Which examples of the batch or data set; all by default.
            normalise: ``"none"``, the strongest; ``"relative"``, the most specific, see ``Queries``.
            within: The training data in another order: indices are then those in it, see ``ExampleIndex.ask``.
            keep: Whether to add the answers to the audit's queries on disk: its table of pairs, and its page.

        Raises:
            StoreError, ValueError: If there is no index, or it is about another model, other weights or layers.
            QueryError: If the loss can't be computed on the batch.

        Example:
            >>> report = AuditReport.load("lightning_logs/version_0")
            >>> print(report.ask(model, batch, k=5))
        """
        then = self.manifest.get("arguments", {}).get("task")
        if task is None and then is not None:
            if then not in get_args(TaskName):
                raise ExampleIndexError(
                    f"the audit was made with `task={then}` in place of `training_step`; pass it here, too."
                )
            task = then
        loss = checked_task(task)
        check_flag("keep", keep)
        if keep and within is not None:
            raise ExampleIndexError("keep=True with `within=`: the audit's queries name examples as it has them.")
        found = self.index.ask(model, batch, k, loss=loss, indices=indices, normalise=normalise, within=within)
        if keep and self.directory is not None:
            list_of = "specific" if normalise == "relative" else "strongest"
            keep_answers(AuditStore(self.directory), self.columns, found, list_of)
        return found
