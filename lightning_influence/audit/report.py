"""The report of an audit: its tables and its manifest, in memory or on disk."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from lightning_influence.audit import acting, ensemble
from lightning_influence.audit.columns import PAIRS_NEEDED, Columns, candidate_rows
from lightning_influence.audit.ranking import ingredients, rank
from lightning_influence.audit.relabel import Relabelled
from lightning_influence.audit.store.atomic import StoreError
from lightning_influence.audit.store.store import AuditStore
from lightning_influence.audit.summary import summary
from lightning_influence.training.checkpoints import Checkpoint

# Columns that every audit has, interrupted ones included.
_NEEDED = ("index", "rank", "candidate", "finite")


@dataclass(frozen=True, eq=False, repr=False)
class AuditReport:
    """What an audit found, in memory or read back from its directory.

    Attributes:
        columns: Column name to array ``[n]``, one row per training example, sorted by dataset index. See
            ``columns.COLUMNS`` for meanings, units and signs.
        manifest: Status, arguments, versions, coverage, timings and notes.
        directory: Where it lies on disk, if anywhere.
        pairs: If there were queries: column name to array, one row per query and strong proponent or opponent. See
            ``columns.PAIR_DESCRIPTIONS``.

    Example:
        >>> report = AuditReport.load("lightning_logs/version_0/influence")
        >>> report.candidates[:10]  # dataset indices, the most suspicious first
    """

    columns: Columns
    manifest: Mapping[str, Any] = field(default_factory=dict)
    directory: Path | None = None
    pairs: Columns | None = None

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> AuditReport:
        """Read an audit back from its directory.

        An audit whose run was interrupted holds what had been recorded by then; see ``status``.

        Raises:
            StoreError: If the directory holds no readable audit.
        """
        store = AuditStore.open(directory)
        report = cls(store.read_scores(), store.manifest, store.directory, store.read_pairs())
        for table, needed in ((report.columns, _NEEDED), (report.pairs, PAIRS_NEEDED)):
            if table is not None and (missing := [name for name in needed if name not in table]):
                raise StoreError(
                    f"{store.directory} holds a table that is none of an audit: the columns {missing} are missing. Run "
                    "the audit again."
                )
        try:
            str(report)
        except Exception as error:  # of a manifest that somebody else wrote, anything may have another form
            raise StoreError(
                f"{store.directory / 'manifest.json'} can't be read: it is not what an audit writes "
                f"({type(error).__name__}: {error})."
            ) from error
        return report

    @classmethod
    def ensemble(cls, reports: Sequence[AuditReport]) -> AuditReport:
        """Merge audits of several runs (seeds) on the same data, and rank anew.

        Scores are averaged as they are, labels voted on; see ``ensemble.merged_columns``.

        Args:
            reports: Complete audits, two at least.

        Returns:
            A report in memory; ``manifest["ensemble"]`` names the directories of its members.

        Raises:
            EnsembleError: If the audits are about other data, or one of them is not complete.

        Example:
            >>> report = AuditReport.ensemble([AuditReport.load(directory) for directory in directories])
        """
        sources = [str(each.directory or f"audit {number}") for number, each in enumerate(reports)]
        columns, left_out = ensemble.merged_columns([each.columns for each in reports])
        manifest = ensemble.merged_manifest([each.manifest for each in reports], sources, left_out)
        ranked = rank(columns)
        manifest |= {
            "examples": len(ranked["index"]),
            "nonfinite": ranked["index"][~ranked["finite"]],
            "ranked_by": list(ingredients(ranked)),
        }
        return cls(ranked, manifest)

    def __len__(self) -> int:
        """Return the number of training examples."""
        return len(self.columns["index"])

    @property
    def status(self) -> str:
        """``"complete"``, ``"recording"`` or ``"interrupted"``."""
        return str(self.manifest.get("status", "complete"))

    @property
    def ranking(self) -> NDArray[np.int64]:
        """Dataset indices of all examples, the most suspicious first, ``[n]``."""
        order = np.argsort(self.columns["rank"], kind="stable")
        return np.asarray(self.columns["index"][order], dtype=np.int64)

    @property
    def candidates(self) -> NDArray[np.int64]:
        """Dataset indices of the examples proposed for review, the most suspicious first."""
        return np.asarray(self.columns["index"][candidate_rows(self.columns)], dtype=np.int64)

    @property
    def nonfinite(self) -> NDArray[np.int64]:
        """Dataset indices of the examples with a non-finite loss or gradient."""
        return np.asarray(self.columns["index"][~self.columns["finite"].astype(bool)], dtype=np.int64)

    def save(self, directory: str | os.PathLike[str]) -> AuditReport:
        """Write the audit to a new directory, without the curvature's factors and the checkpoints of the run.

        An existing audit is never overwritten: a version suffix is added.

        Returns:
            The report as it lies there.

        Raises:
            StoreError: If the place can't be written.
        """
        store = AuditStore.create(directory)
        for write in self.files().values():
            write(store)
        store.write_manifest({**self.manifest, "status": self.status})
        return replace(self, directory=store.directory)

    def files(self, label_names: Sequence[str] | None = None) -> dict[str, Callable[[AuditStore], None]]:
        """Return what writes each file of the audit but the manifest, by what is in it.

        Args:
            label_names: Class number to name, for the candidates.
        """
        files: dict[str, Callable[[AuditStore], None]] = {
            "scores": lambda store: store.write_scores(self.columns),
            "candidates": lambda store: store.write_candidates(self.columns, label_names=label_names),
        }
        if (pairs := self.pairs) is not None:
            files["pairs"] = lambda store: store.write_pairs(pairs)
        return files

    def checkpoints(self) -> Sequence[Checkpoint]:
        """Return the checkpoints that were kept during training, in order; each is read when it is asked for.

        Raises:
            StoreError: If the audit is not on disk, or a file of it is damaged.
        """
        if self.directory is None:
            raise StoreError("the audit is not on disk (a dry run?), and neither are checkpoints of its run.")
        return AuditStore.open(self.directory).checkpoints()

    # ------------------------------------------------------------ acting on it

    def clean_indices(self, drop: float | int | None = None) -> list[int]:
        """Return which examples to keep for another training, ``Subset(dataset, report.clean_indices())``.

        Args:
            drop: What to leave out: the candidates (None), a share of the audited examples (``0.05``) or a number of
                them (``200``), the most suspicious. Examples with a non-finite loss or gradient are left out anyway.

        Returns:
            Sorted dataset indices; examples that were not audited are not among them.

        Raises:
            ValueError: If ``drop`` is out of range.
        """
        return acting.clean_indices(self.columns, drop)

    def relabelled(
        self, dataset: Dataset[Any], indices: Sequence[int] | None = None, *, min_margin: float = 0.0
    ) -> Relabelled:
        """Return the data set with the suggested labels on the candidates; the data set itself is left as it is.

        Args:
            dataset: The training data set that was audited: examples that are tuples, lists or mappings, nested or
                not. Where in them the label lies is found by comparison with the given labels.
            indices: The examples to relabel, for example those that a person has confirmed; by default the candidates.
            min_margin: Leave labels alone unless the mean probability of the suggested class over the run is ahead of
                that of the given one by at least this, from 0 to 1.

        Raises:
            LabelError: If the audit suggests no labels (regression), this is not the data set that was audited, or
                the place of the labels can't be told.
            ValueError: If an index is not in the audit or named twice, or ``min_margin`` is out of range.
        """
        size = self.manifest.get("dataset_size")
        return acting.relabelled(
            self.columns, dataset, self.candidates.tolist(), indices=indices, min_margin=min_margin, size=size
        )

    def __repr__(self) -> str:
        where = f", {str(self.directory)!r}" if self.directory else ""
        return f"AuditReport({len(self):,} examples, {len(self.candidates):,} candidates, {self.status}{where})"

    def __str__(self) -> str:
        return summary(self.columns, self.manifest, self.pairs, self.directory)
