"""What is shown of an audit, each under a tag: pictures, tables, histograms, curves. How, is the loggers' matter."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lightning_influence.audit.words import number_text
from lightning_influence.loggers.pictures import diagram
from lightning_influence.loggers.text import escape

_POINTS = 127  # of a curve, as in TensorBoard
# TensorBoard squeezes a table that is wider than its card until words break: in pixels, the card in a window 1280 wide,
# a letter, and what is around a cell.
_CARD, _LETTER, _CELL = 830, 7.5, 27


@dataclass(frozen=True)
class Picture:
    """An image ``[3, H, W]`` uint8."""

    tag: str
    image: Tensor

    def pixels(self) -> NDArray[np.uint8]:
        """Return it as ``[H, W, 3]``, which most packages expect."""
        return np.ascontiguousarray(self.image.permute(1, 2, 0).numpy())


@dataclass(frozen=True)
class Table:
    """Rows of text and numbers; names of classes and examples in it are untrusted.

    Attributes:
        tag: Its name.
        names: Of the columns.
        rows: An entry for each column: a text, an integer or a float.
        head: Markdown above it.
        below: Markdown below it.
    """

    tag: str
    names: Sequence[str]
    rows: Sequence[Sequence[Any]]
    head: str = ""
    below: str = ""

    def columns(self) -> dict[str, list[Any]]:
        """Return the entries by column."""
        return {name: [row[place] for row in self.rows] for place, name in enumerate(self.names)}

    def csv(self) -> str:
        """Return names and rows as comma-separated values."""
        written = io.StringIO()
        csv.writer(written).writerows([self.names, *self.rows])
        return written.getvalue()

    def markdown(self) -> str:
        """Return all of it, the entries escaped: as a table, or where that would be too wide as a list."""
        texts = [[e if isinstance(e, str) else number_text(e) for e in row] for row in self.rows]
        widths = [max(map(len, column)) for column in zip(self.names, *texts, strict=True)]
        names, *rows = [[escape(entry) for entry in line] for line in (self.names, *texts)]
        if not rows:
            written = []
        elif sum(widths) * _LETTER + len(widths) * _CELL <= _CARD:
            words = [any(isinstance(row[place], str) for row in self.rows) for place in range(len(names))]
            rule = [":---" if text else "---:" for text in words]
            written = [f"| {' | '.join(line)} |" for line in (names, rule, *rows)]
        else:
            written = [
                f"* **{first}** " + " &#183; ".join(f"{n} {e}" for n, e in zip(names[1:], others, strict=True))
                for first, *others in rows
            ]
        return "\n\n".join(filter(None, (self.head, "\n".join(written), self.below)))


@dataclass(frozen=True)
class Histogram:
    """How many ``values`` ``[n]`` there are in each bin between the ``edges``."""

    tag: str
    values: NDArray[np.float64]
    edges: NDArray[np.float64]

    def counts(self) -> NDArray[np.int64]:
        """Return the number of values in each bin."""
        return np.histogram(self.values, self.edges)[0]

    def picture(self) -> Picture:
        """Return it drawn, for loggers that know no histograms."""
        outline = np.repeat(self.edges, 2), np.concatenate(([0], np.repeat(self.counts(), 2), [0]))
        return Picture(self.tag, diagram(*outline, title=self.tag))


@dataclass(frozen=True)
class Curve:
    """How a score finds what is ``wanted`` ``[n]``: precision against recall; ``scores`` are from 0 to 1."""

    tag: str
    wanted: NDArray[np.bool_]
    scores: NDArray[np.float64]

    def points(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return recall and precision of so many of the highest scores; what scores the same counts together."""
        order = np.argsort(-self.scores, kind="stable")
        last = np.flatnonzero(np.diff(self.scores[order], append=-1.0))
        found = np.cumsum(self.wanted[order])[last]
        recall, precision = found / max(int(self.wanted.sum()), 1), found / (last + 1)
        chosen = np.unique(np.searchsorted(recall, np.linspace(0, 1, _POINTS)).clip(max=len(recall) - 1))
        return recall[chosen], precision[chosen]

    def picture(self) -> Picture:
        """Return it drawn, for loggers that know no curves."""
        return Picture(self.tag, diagram(*self.points(), title=f"{self.tag}: precision against recall", top=1.0))


@dataclass(frozen=True)
class Page:
    """What the Influence tab of TensorBoard reads: the document of an audit, and its pictures in chunks."""

    tag: str
    blobs: Sequence[bytes]


Exhibit: TypeAlias = Picture | Table | Histogram | Curve | Page
