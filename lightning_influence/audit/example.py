"""Everything that an audit knows about one example."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_influence.audit.columns import COLUMNS, Columns, column_of
from lightning_influence.audit.curves import Curves, sparkline
from lightning_influence.audit.words import cell_text, label_text, number_text

_LISTED = 10  # pairs
_SAID = "index", "id", "text", "rank", "candidate"  # before the columns are listed


@dataclass(frozen=True, eq=False, repr=False)
class Example:
    """One training example of an audit.

    Attributes:
        index: Its position in the data set.
        values: What the audit says of it, by column.
        percentiles: Share of the examples that are less suspicious, by column that rates examples, from 0 to 1.
        pairs: Its rows in the table of pairs: the queries that it is a strong proponent or opponent of.
        curves: Curve name to values by epoch, ``[e]``.
        epochs: Their numbers.

    Example:
        >>> print(report[17])
        >>> report[17]["wrong_probability"]
    """

    index: int
    values: Mapping[str, Any]
    percentiles: Mapping[str, float]
    pairs: tuple[Mapping[str, Any], ...]
    examples: int
    curves: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    epochs: tuple[int, ...] = ()
    _names: Sequence[str] | None = field(default=None)

    @property
    def label(self) -> int:
        """The given label; -1 if the audit knows none."""
        return int(self.values.get("label", -1))

    @property
    def suggested(self) -> int:
        """The label that the audit suggests instead; -1 for none."""
        return int(self.values.get("suggested", -1))

    @property
    def wrong_probability(self) -> float:
        """How likely it is that the given label is wrong; NaN if the audit doesn't know."""
        return float(self.values.get("wrong_probability", np.nan))

    @property
    def rank(self) -> int:
        """Its place in the ranking, 1 = most suspicious."""
        return int(self.values["rank"])

    def __getitem__(self, column: str) -> Any:
        return self.values[column]

    def __str__(self) -> str:
        named = f" ({cell_text('id', self.values['id'])})" if "id" in self.values else ""
        lines = [f"Example {self.index}{named}, rank {self.rank:,} of {self.examples:,}" + self._candidate()]
        if self.label >= 0:
            lines.append(f"  {self._labels()}")
        if "text" in self.values and self.values["text"]:
            lines.append(f"  {cell_text('text', self.values['text'])}")
        known = [name for name in COLUMNS if name in self.values]
        names = [name for name in dict.fromkeys((*known, *self.values)) if name not in _SAID]
        width = max(map(len, names))
        for name in names:
            value = self.values[name]
            place = f"{self.percentiles[name]:>6.1%}" if name in self.percentiles else ""
            shown = str(value) if isinstance(value, bool) else cell_text(name, value)
            lines.append(f"  {name:<{width}}{shown:>12}{place:>8}  {column_of(name).description}".rstrip())
        if self.percentiles:
            lines.append("  (per cent: share of the examples that are less suspicious by this column)")
        lines += self._over_epochs()
        for pair in self.pairs[:_LISTED]:
            query = f"query {pair['number']}, example {pair['query']} of set {pair['query_set']}"
            lines.append(f"  {pair['kind']} {pair['rank']} of {query}: {pair['score']:+.3g}")
        if len(self.pairs) > _LISTED:
            lines.append(f"  and {len(self.pairs) - _LISTED} pairs more")
        return "\n".join(lines)

    __repr__ = __str__

    def _over_epochs(self) -> list[str]:
        if not self.curves:
            return []
        width = max(map(len, self.curves))
        each = [
            f"    {name:<{width}}  {sparkline(values)}  {' to '.join(number_text(values[k]) for k in (0, -1))}"
            for name, values in self.curves.items()
        ]
        return [f"  over the epochs {self.epochs[0]} to {self.epochs[-1]}, as training saw it:", *each]

    def _candidate(self) -> str:
        return ", a candidate" if self.values.get("candidate") else ""

    def _labels(self) -> str:
        told = f"given {label_text(self.label, self._names)}"
        if self.suggested >= 0:
            told += f", suggested {label_text(self.suggested, self._names)}"
        chance = self.wrong_probability
        return told + ("" if np.isnan(chance) else f"; the label is wrong with a probability of {chance:.0%}")


def example_of(
    columns: Columns, pairs: Columns | None, manifest: Mapping[str, Any], index: Any, curves: Curves
) -> Example:
    """Return what is known of an example; see ``AuditReport.__getitem__``."""
    row = row_of(columns, index)
    values = {name: _plain(column[row]) for name, column in columns.items()}
    percentiles = {}
    for name, column in columns.items():
        about = column_of(name)
        if about.direction:
            scores = about.suspicion(column)
            known = scores[np.isfinite(scores)]
            if np.isfinite(scores[row]) and len(known) > 1:
                percentiles[name] = float((known < scores[row]).sum() / (len(known) - 1))
    about_it = np.flatnonzero(pairs["index"] == values["index"]) if pairs is not None else ()
    told = tuple({name: _plain(pairs[name][each]) for name in pairs} for each in about_it) if pairs is not None else ()
    over = curves.of_example(row)
    epochs, names = tuple(curves.epochs.tolist()), manifest.get("label_names")
    return Example(values["index"], values, percentiles, told, len(columns["index"]), over, epochs, names)


def row_of(columns: Columns, index: Any) -> int:
    """Return the row of an example by its dataset index, or by its id.

    Raises:
        KeyError: If there is none.
        TypeError: For what is no index.
    """
    if isinstance(index, str) and "id" in columns:
        rows = np.flatnonzero(columns["id"].astype(object) == index)
        if not len(rows):
            raise KeyError(f"the audit has no example with the id {index!r}; expected one of `report.columns['id']`.")
        return int(rows[0])
    if isinstance(index, bool) or not hasattr(index, "__index__"):
        raise TypeError(
            f"report[{index!r}]: expected one dataset index, as `report[17]`; for several there is "
            "`report.to_pandas().loc[...]`."
        )
    number = operator.index(index)
    rows = np.flatnonzero(columns["index"] == number)
    if not len(rows):
        known = columns["index"]
        said = f"{len(known):,} examples from {known.min()} to {known.max()}" if len(known) else "no example"
        negative = " (a dataset index does not count from the end)" if number < 0 else ""
        raise KeyError(f"the audit has no example {number}{negative}; it holds {said}.")
    return int(rows[0])


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value
