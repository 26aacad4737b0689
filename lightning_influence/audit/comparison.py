"""Two audits side by side: what both measure, who is a candidate in one of them, how many labels are wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lightning_influence.audit.columns import COLUMNS, Columns
from lightning_influence.audit.health import health
from lightning_influence.audit.report import AuditReport
from lightning_influence.audit.words import called
from lightning_influence.curvature.sweep import rank_correlation
from lightning_influence.gradients.coverage import listed

_LISTED = 10
_FEWEST = 2
# Columns that say who an example is, or whose numbers have no order.
_OF_NOBODY = ("rank", "index", "dataset", "original_index", "label", "predicted", "suggested", "candidate", "finite")


@dataclass(frozen=True, eq=False)
class Comparison:
    """What two audits have in common.

    Attributes:
        first: One audit.
        second: The other one.
        by: How examples are recognised: ``"id"`` if both audits have ids, else ``"index"``.
        examples: How many both have.
        relabelled: How many of these have another given label in the second.
        correlations: Column to Spearman's rank correlation, over the examples for which both have a number.
        entered: Rows of the second audit: candidates that are none in the first, the most suspicious first.
        left: Rows of the first audit: candidates that are none in the second.
    """

    first: AuditReport
    second: AuditReport
    by: str
    examples: int
    relabelled: int
    correlations: Mapping[str, float]
    entered: NDArray[np.int64]
    left: NDArray[np.int64]

    @classmethod
    def of(cls, first: AuditReport, second: AuditReport) -> Comparison:
        """Compare two audits."""
        a, b = first.columns, second.columns
        by = "id" if "id" in a and "id" in b else "index"
        _, rows, others = np.intersect1d(a[by].astype(str), b[by].astype(str), return_indices=True)
        common = [name for name in (*COLUMNS, *a) if name in a and name in b]
        numbers = [name for name in dict.fromkeys(common) if name not in _OF_NOBODY and a[name].dtype.kind in "iuf"]
        relabelled = int((a["label"][rows] != b["label"][others]).sum()) if "label" in common else 0
        correlations = {name: _correlation(a[name][rows], b[name][others]) for name in numbers}
        entered, left = _others(second, first, by), _others(first, second, by)
        return cls(first, second, by, len(rows), relabelled, correlations, entered, left)

    def __str__(self) -> str:
        both = self.first, self.second
        lines = [f"{'first:':<9}{_name(self.first)}", f"{'second:':<9}{_name(self.second)}", ""]
        lines.append(
            f"  examples    {len(self.first):,} and {len(self.second):,}, {self.examples:,} in both by {self.by}"
        )
        if self.relabelled:
            lines.append(f"  labels      {self.relabelled:,} of these have another label in the second")
        for title, told in (("weights", _weights), ("wrong", _wrong)):
            lines.append(f"  {title:<12}{told(self.first)}")
            lines.append(f"  {'':<12}{told(self.second)}")
        lines.append(f"  candidates  {' and '.join(f'{len(each.candidates):,}' for each in both)}")
        for title, report, rows in (("entered", self.second, self.entered), ("left", self.first, self.left)):
            names = listed([called(report.columns, row) for row in rows], _LISTED)
            lines.append(f"    {title:<10}{len(rows):,}{f': {names}' if len(rows) else ''}")
        lines.append("  rank correlation of the columns that both have")
        width = max(map(len, self.correlations), default=0)
        lines += (f"    {name:<{width}}  {value:6.3f}" for name, value in self.correlations.items())
        for which, (one, other) in (("first", both), ("second", both[::-1])):
            if only := sorted(one.columns.keys() - other.columns.keys()):
                lines.append(f"  only {which:<7}{', '.join(only)}")
        return "\n".join(lines)


def _correlation(a: NDArray[Any], b: NDArray[Any]) -> float:
    x, y = (torch.from_numpy(values.astype(np.float64)) for values in (a, b))
    known = x.isfinite() & y.isfinite()
    return rank_correlation(x[known], y[known]) if int(known.sum()) >= _FEWEST else float("nan")


def _others(report: AuditReport, than: AuditReport, by: str) -> NDArray[np.int64]:
    """Return the rows of the candidates that are none of another audit, the most suspicious first."""
    columns: Columns = report.columns
    rows = np.flatnonzero(columns["candidate"])
    there = than.columns[by][than.columns["candidate"].astype(bool)].astype(str)
    rows = rows[~np.isin(columns[by][rows].astype(str), there)]
    return rows[np.argsort(columns["rank"][rows], kind="stable")]


def _name(report: AuditReport) -> str:
    return str(report.directory or "in memory")


def _weights(report: AuditReport) -> str:
    return str(report.manifest.get("audited_weights", {}).get("told", "not recorded"))


def _wrong(report: AuditReport) -> str:
    lines: Sequence[tuple[str, str]] = health(report.columns, report.manifest).lines()
    return dict(lines)["wrong"]
