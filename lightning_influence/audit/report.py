"""The audit: which examples are suspicious, and the report that says so.

The ranking follows what was measured (MNIST-5k and digits; MLP and CNN; 5 to 30 epochs; 10 to 30 % flips, symmetric
and pairwise): the *trajectory* finds wrong labels, influence at the final weights alone does not, as a network that has
memorised a wrong label is no longer surprised by it. How hard an example is to fit (EL2N), what its neighbours say, and
how sure the run is of another label complement each other, so candidates are ranked by the sum of their z-scores. All
columns stay in the table; influence earns its place there by saying which predictions an example harms.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from lightning_influence.audit import acting, ensemble
from lightning_influence.audit.columns import COLUMN_DESCRIPTIONS, LOW_IS_SUSPICIOUS, PAIR_DESCRIPTIONS
from lightning_influence.audit.relabel import Relabelled
from lightning_influence.audit.store.encoding import check_manifest
from lightning_influence.audit.store.store import AuditStore, StoreError
from lightning_influence.training.checkpoints import Checkpoint

Columns = Mapping[str, NDArray[Any]]

# The sum of z-scores of these, or of the first group that is present at all.
_INGREDIENTS = (
    ("el2n", "neighbour_disagreement", "prob_margin"),
    ("loss_mean", "tracin"),
    ("self_influence", "loss"),
    ("grad_norm_squared",),
)
# Columns that every audit has.
_NEEDED = {"index": "iu", "rank": "iu", "candidate": "b", "finite": "b"}
# Without class decisions there is no label to contradict; the most suspicious share is proposed instead.
_FALLBACK_SHARE = 0.05


@dataclass(frozen=True, eq=False)
class AuditReport:
    """What an audit found, in memory or read back from its directory.

    Attributes:
        columns: Column name to array ``[n]``, one row per training example, sorted by dataset index. See
            ``columns.COLUMN_DESCRIPTIONS`` for meanings, units and signs.
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
        columns, pairs = store.read_scores(), store.read_pairs()
        _check_table(columns, _NEEDED, COLUMN_DESCRIPTIONS, store)
        if pairs is not None:
            _check_table(pairs, PAIR_DESCRIPTIONS, PAIR_DESCRIPTIONS, store)
        manifest = store.manifest
        try:
            check_manifest(manifest)
        except ValueError as error:
            raise StoreError(f"{store.directory / 'manifest.json'} can't be read: {error}.") from error
        return cls(columns, manifest, store.directory, pairs)

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
            "ranked_by": list(ingredients(columns)),
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
        flagged = self.columns["candidate"].astype(bool)
        order = np.argsort(self.columns["rank"][flagged], kind="stable")
        return np.asarray(self.columns["index"][flagged][order], dtype=np.int64)

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
        store.write_manifest(self.manifest)
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

    def __str__(self) -> str:
        """Return the summary table."""
        return summary(self)


def _check_table(table: Columns, needed: Iterable[str], known: Iterable[str], store: AuditStore) -> None:
    """Raise ``StoreError`` if a table is none of an audit, whoever wrote it."""
    missing = [name for name in needed if name not in table]
    numbers = [name for name in known if name in table and name != "kind"]
    wrong = [name for name in numbers if table[name].dtype.kind not in _NEEDED.get(name, "biuf")]
    if missing or wrong:
        found = f"the columns {missing} are missing" if missing else f"{wrong[0]} is {table[wrong[0]].dtype}"
        raise StoreError(f"{store.directory} holds a table that is none of an audit: {found}. Run the audit again.")


def rank(columns: Columns) -> dict[str, NDArray[Any]]:
    """Add the audit's own columns to the scores.

    Args:
        columns: Score columns ``[n]``, with ``index``.

    Returns:
        A new mapping with ``suspicion``, ``rank`` (1 = most suspicious), ``candidate`` and ``finite`` added.
        Candidates are the examples whose suggested label (of run and neighbours together, see ``columns``) differs from
        the given one; without class decisions, the most suspicious 5 %. Examples that are not finite rank
        last.

    Raises:
        ValueError: If there is no column to rank by.
    """
    result = dict(columns)
    size = len(columns["index"])
    finite = columns.get("finite", np.ones(size, dtype=bool)).astype(bool)
    suspicion = np.where(finite, _suspicion(columns, finite), np.nan)
    order = np.lexsort((columns["index"], -np.nan_to_num(suspicion, nan=-np.inf)))
    ranks = np.empty(size, dtype=np.int64)
    ranks[order] = np.arange(1, size + 1)
    if "suggested" in columns and "label" in columns:
        known = (columns["suggested"] >= 0) & (columns["label"] >= 0)
        candidate = finite & known & (columns["suggested"] != columns["label"])
    else:
        candidate = finite & (ranks <= np.ceil(_FALLBACK_SHARE * finite.sum()))
    return result | {"suspicion": suspicion, "rank": ranks, "candidate": candidate, "finite": finite}


def ingredients(columns: Columns) -> tuple[str, ...]:
    """Return the names of the columns that the ranking combines."""
    for group in _INGREDIENTS:
        present = tuple(name for name in group if name in columns and np.isfinite(columns[name]).any())
        if present:
            return present
    raise ValueError(f"nothing to rank by: none of {sum(_INGREDIENTS, ())} among the columns {sorted(columns)}.")


def _suspicion(columns: Columns, finite: NDArray[Any]) -> NDArray[np.float64]:
    total = np.zeros(len(finite))
    for name in ingredients(columns):
        values = columns[name].astype(np.float64)
        usable = finite & np.isfinite(values)
        centred = values - values[usable].mean() if usable.any() else values
        spread = centred[usable].std() if usable.any() else 0.0
        # An example that was never trained on says nothing: the mean, not an extreme.
        z = np.where(usable, centred, 0.0) / (spread if spread > 0 else 1.0)
        total += -z if name in LOW_IS_SUSPICIOUS else z
    return total


def summary(report: AuditReport, rows: int = 10) -> str:
    """Return the report as a few lines of text: what was covered, what was found, where it lies.

    Args:
        report: The report.
        rows: Number of candidates to list.
    """
    manifest = report.manifest
    lines = [f"Influence audit of {len(report):,} training examples ({report.status})"]
    if coverage := manifest.get("coverage"):
        lines.append(f"  coverage    {coverage['summary']}")
    if seconds := manifest.get("seconds"):
        spent = ", ".join(f"{name} {_told(value, '.1f')} s" for name, value in seconds.items())
        lines.append(f"  time        {spent}")
    if swept := manifest.get("damping_sweep"):
        pairs = zip(swept["factors"], swept["stability"], strict=False)
        told = ", ".join(
            f"{_told(stability, '.2f')} with {_told(factor, 'g')} x" for factor, stability in pairs if factor != 1
        )
        lines.append(f"  damping     rank correlation of self_influence: {told} (on {swept['examples']} examples)")
    for note in manifest.get("notes", ()):
        lines.append(f"  note        {note}")
    bad = report.nonfinite
    if len(bad):
        listed = ", ".join(map(str, bad[:10])) + (" ..." if len(bad) > 10 else "")
        lines.append(f"  non-finite  {len(bad)} examples, left out of the factors: {listed}")
    candidates = report.candidates
    share = len(candidates) / max(len(report), 1)
    ranked_by = " + ".join(manifest.get("ranked_by", ()))
    lines.append(f"  candidates  {len(candidates):,} ({share:.1%}){f' ranked by {ranked_by}' if ranked_by else ''}")
    lines += _table(report, candidates[:rows])
    lines += _queries(report)
    if detection := manifest.get("detection"):
        lines.append("  against the known label noise (recall: share found in the first 10 %)")
        lines.append(f"    {'column':<24}{'AUROC':>8}{'AP':>8}{'recall':>8}")
        for name, values in detection.items():
            numbers = "".join(_told(values[key], "8.3f") for key in ("auroc", "average_precision", "recall_at"))
            lines.append(f"    {name:<24}{numbers}")
    if report.directory is not None:
        lines.append(f"  saved in    {report.directory}")
    return "\n".join(lines)


def _told(value: float | None, form: str) -> str:
    """Return a number as text; in a manifest that was read, null stands for NaN."""
    return format(float("nan") if value is None else value, form)


def _queries(report: AuditReport, named: int = 3) -> list[str]:
    """Return a line for every query, with its strongest proponents and opponents."""
    about = report.manifest.get("queries")
    if not about:
        return []
    lines = [f"  queries     {about['title']}"]
    if "value" in about:
        lines[0] += f"; {about['measurement']} of all {about['examples']:,}: {_told(about['value'], '.4g')}"
    pairs = report.pairs
    if pairs is None:
        return lines
    for number in np.unique(pairs["number"]):
        own = pairs["number"] == number
        first = int(np.flatnonzero(own)[0])
        told = f"    #{int(pairs['query'][first])}"
        if pairs["query_label"][first] >= 0:
            told += f" given {int(pairs['query_label'][first])}, predicted {int(pairs['query_predicted'][first])}"
        told += f", {about['per_query']} {pairs['measured'][first]:.3g}"
        for kind in ("proponent", "opponent"):
            rows = np.flatnonzero(own & (pairs["kind"] == kind))[:named]
            strongest = ", ".join(f"{int(pairs['index'][row])} ({pairs['score'][row]:+.3g})" for row in rows)
            told += f"; {kind}s {strongest or 'none'}"
        lines.append(told)
    return lines


def _table(report: AuditReport, indices: NDArray[np.int64]) -> list[str]:
    names = [
        name
        for name in ("rank", "index", "label", "suggested", "suspicion", "el2n", "self_influence", "harm")
        if name in report.columns
    ]
    if not len(indices):
        return []
    titles = {"label": "given"}
    lines = ["    " + "".join(f"{titles.get(name, name):>15}" for name in names)]
    position = {int(index): row for row, index in enumerate(report.columns["index"])}
    for index in indices:
        row = position[int(index)]
        cells = [report.columns[name][row] for name in names]
        lines.append("    " + "".join(f"{cell:>15.4g}" for cell in cells))
    return lines
