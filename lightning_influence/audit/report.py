"""The report of an audit: its tables and its manifest, in memory or on disk."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from lightning_influence.audit import acting, ensemble
from lightning_influence.audit.acting import PRECISION, Advice
from lightning_influence.audit.belief import LabelBeliefs
from lightning_influence.audit.columns import PAIRS_NEEDED, Columns, candidate_rows
from lightning_influence.audit.curves import Curves
from lightning_influence.audit.glossary import glossary
from lightning_influence.audit.health import FIRST_LOOK
from lightning_influence.audit.indexed import Indexed
from lightning_influence.audit.ranking import ingredients, judged
from lightning_influence.audit.relabel import Relabelled
from lightning_influence.audit.replayed import Replayed
from lightning_influence.audit.review import Review, read_review, write_review
from lightning_influence.audit.shown import ReportViews
from lightning_influence.audit.store.atomic import StoreError
from lightning_influence.audit.store.store import AuditStore
from lightning_influence.audit.summary import summary
from lightning_influence.training.checkpoints import Checkpoint

# Columns that every audit has, interrupted ones included.
_NEEDED = ("index", "rank", "candidate", "finite")


@dataclass(frozen=True, eq=False, repr=False)
class AuditReport(ReportViews, Replayed, Indexed):
    """What an audit found, in memory or read back from its directory.

    Attributes:
        columns: Column name to array ``[n]``, one row per training example, sorted by dataset index. See
            ``columns.COLUMNS`` for meanings, units and signs.
        manifest: Status, arguments, versions, coverage, timings and notes.
        directory: Where it lies on disk, if anywhere.
        pairs: If there were queries: column name to array, one row per query and strong proponent or opponent. See
            ``columns.PAIR_DESCRIPTIONS``.
        curves: Loss, margin and probability of the given label over the epochs, ``[n, epochs]`` each; see ``Curves``.

    Example:
        >>> report = AuditReport.load("lightning_logs/version_0/influence")
        >>> report.candidates[:10]  # dataset indices, the most suspicious first
    """

    columns: Columns
    manifest: Mapping[str, Any] = field(default_factory=dict)
    directory: Path | None = None
    pairs: Columns | None = None
    curves: Curves = field(default_factory=Curves)

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> AuditReport:
        """Read an audit back from its directory.

        An audit whose run was interrupted holds what had been recorded by then; see ``status``.

        Raises:
            StoreError: If the directory holds no readable audit.
        """
        store = AuditStore.open(directory)
        report = cls(store.read_scores(), store.manifest, store.directory, store.read_pairs())
        _check_readable(report, store.directory)
        return replace(report, curves=Curves.of(store.curves.read(), report.columns))

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
        beliefs = ensemble.merged_beliefs([each.manifest for each in reports])
        ranked, _ = judged(columns, beliefs=beliefs)
        manifest |= {
            "labels": beliefs.described(),
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
            label_names: Class number to name, for the candidates; by default those of the manifest.
        """
        names = self.manifest.get("label_names") if label_names is None else label_names
        files: dict[str, Callable[[AuditStore], None]] = {
            "scores": lambda store: store.write_scores(self.columns),
            "candidates": lambda store: store.write_candidates(self.columns, label_names=names),
            "glossary": lambda store: store.write_glossary(self.glossary()),
        }
        if self.curves:
            files["curves"] = lambda store: store.curves.write(
                self.curves.epochs.tolist(), lambda epoch: self.curves.of_epoch(epoch, self.columns["index"])
            )
        if (pairs := self.pairs) is not None:
            files["pairs"] = lambda store: store.write_pairs(pairs)
        return files

    def glossary(self) -> str:
        """Return what the columns of the tables mean, in markdown; on disk, `columns.md` says it beside them."""
        return glossary(self.columns, self.pairs)

    def checkpoints(self) -> Sequence[Checkpoint]:
        """Return the checkpoints that were kept during training, in order; each is read when it is asked for.

        Raises:
            StoreError: If the audit is not on disk, or a file of it is damaged.
        """
        if self.directory is None:
            raise StoreError("the audit is not on disk (a dry run?), and neither are checkpoints of its run.")
        return AuditStore.open(self.directory).checkpoints()

    # ------------------------------------------------------------ acting on it

    @cached_property
    def beliefs(self) -> LabelBeliefs:
        """What the audit believes of the labels as a whole: how many are wrong, and whether the run can tell."""
        return LabelBeliefs.read(self.manifest.get("labels", {}))

    def advice(self, precision: float = PRECISION) -> Advice:
        """Return which labels are so probably wrong that one may act on them without looking at each.

        Candidates by falling ``wrong_probability``, as many as are expected to be wrong at least to the share
        ``precision``; none where the run cannot tell, and none of a class of which most would be gone.

        Raises:
            ValueError: If ``precision`` is out of range.

        Example:
            >>> print(report.advice())
        """
        return acting.advice(self.columns, self.beliefs, precision)

    def clean_indices(self, drop: float | int | None = None, *, precision: float = PRECISION) -> list[int]:
        """Return which examples to keep for another training, ``Subset(dataset, report.clean_indices())``.

        Args:
            drop: What to leave out: what is sure enough, see ``advice`` (None), a share of the audited examples
                (``0.05``) or a number of them (``200``), the most suspicious. Examples with a non-finite loss or
                gradient are left out anyway.
            precision: How sure is enough.

        Returns:
            Sorted dataset indices; examples that were not audited are not among them. Where nothing is sure enough a
            warning says so.

        Raises:
            ValueError: If ``drop`` or ``precision`` is out of range.
        """
        return acting.clean_indices(self.columns, self.advice(precision), drop)

    def write_review(self, path: str | os.PathLike[str], most: int | None = None) -> Path:
        """Write a table as ``candidates.csv`` is, of the first in the ranking: for a person to fill in.

        Args:
            path: Of a new file, what people have filled in is not overwritten.
            most: How many; by default those that ``health()`` says to inspect, the first 50 if that is none.
        """
        return write_review(self, path, (self.health().inspect or FIRST_LOOK) if most is None else most)

    def apply_review(self, source: Any) -> Review:
        """Read back what a person has filled in.

        ``decision``: ``keep``, ``relabel`` (to ``new_label``, or else as the audit suggests), ``drop``, or nothing;
        ``new_label``: a class by number or name. Rows and columns may move, go and come.

        Args:
            source: Path of a CSV, relative to the working directory or to that of the audit, as any spreadsheet saves
                it; a data frame; or a mapping such as ``{17: 3, 42: "drop"}``.

        Raises:
            ReviewError: If rows can't be understood, contradict themselves, or are about another audit; all are named.
        """
        return read_review(self, source)

    def relabelled(
        self,
        dataset: Dataset[Any],
        indices: Sequence[int] | None = None,
        *,
        labels: Mapping[int, int] | None = None,
        precision: float = PRECISION,
    ) -> Relabelled:
        """Return the data set with the suggested labels where it is sure enough; the data set itself is left as it is.

        Args:
            dataset: The training data set that was audited: examples that are tuples, lists or mappings, nested or
                not. Where in them the label lies is found by comparison with the given labels.
            indices: The examples to relabel, for example those that a person has confirmed; by default those of
                ``advice``. Where nothing is sure enough a warning says so.
            labels: Dataset index to new label, in place of ``indices`` and the suggestions.
            precision: How sure is enough.

        Raises:
            LabelError: If the audit suggests no labels (regression), this is not the data set that was audited, the
                place of the labels can't be told, or the audit has seen no such class.
            ValueError: If an index is not in the audit or named twice, or ``precision`` is out of range.
        """
        size, advised = self.manifest.get("dataset_size"), self.advice(precision)
        found = acting.relabelled(self.columns, dataset, advised.indices, indices=indices, labels=labels, size=size)
        if indices is None and labels is None:
            acting.tell_of_nothing(advised)
        return found

    def __repr__(self) -> str:
        where = f", {str(self.directory)!r}" if self.directory else ""
        return f"AuditReport({len(self):,} examples, {len(self.candidates):,} candidates, {self.status}{where})"

    def __str__(self) -> str:
        return summary(self.columns, self.manifest, self.pairs, self.directory)


def _check_readable(report: AuditReport, directory: Path) -> None:
    """Raise ``StoreError`` for tables that are none of an audit, and for a manifest that can't be told in words."""
    for table, needed in ((report.columns, _NEEDED), (report.pairs, PAIRS_NEEDED)):
        if table is not None and (missing := [name for name in needed if name not in table]):
            raise StoreError(
                f"{directory} holds a table that is none of an audit: the columns {missing} are missing. Run "
                "the audit again."
            )
    try:
        str(report)
    except Exception as error:  # of a manifest that somebody else wrote, anything may have another form
        raise StoreError(
            f"{directory / 'manifest.json'} can't be read: it is not what an audit writes "
            f"({type(error).__name__}: {error})."
        ) from error
