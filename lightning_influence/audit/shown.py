"""A report in a notebook: HTML that stands alone, a data frame, figures. What these need is imported when asked for."""

from __future__ import annotations

import importlib
import io
from collections.abc import Mapping
from functools import partial
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_influence.audit.columns import Columns, candidate_rows, column_of, scored, shown_in
from lightning_influence.audit.curves import Curves
from lightning_influence.audit.example import Example, example_of, row_of
from lightning_influence.audit.health import Health, flows, health
from lightning_influence.audit.words import called, cell_text, label_text

_ROWS = 10  # candidates in a notebook
_PANELS = 12  # classes, or columns, in a figure
_CLASSES = 30  # in a matrix
_NUMBERED = 12  # classes, up to which a matrix has its numbers written in
_BINS = 40
_PLOTS = "suspicion", "classes", "curves"
_USUAL, _CANDIDATE = "0.65", "tab:red"

_STYLE = """
.influence-audit table {border-collapse: collapse; margin: .6em 0}
.influence-audit th, .influence-audit td {border: 0; border-bottom: 1px solid rgba(128, 128, 128, .35);
  padding: .25em .7em; text-align: right; white-space: nowrap;
  max-width: 28em; overflow: hidden; text-overflow: ellipsis}
.influence-audit th.word, .influence-audit td.word {text-align: left}
.influence-audit dl {display: grid; grid-template-columns: max-content auto; gap: .15em 1em; margin: .6em 0}
.influence-audit dt {opacity: .7} .influence-audit dd {margin: 0}
.influence-audit pre {font-size: .9em}
.influence-audit pre, .influence-audit .wide {overflow-x: auto}
"""


class ReportViews:
    """How a report is looked at: as a whole, one example, or a figure."""

    columns: Columns
    manifest: Mapping[str, Any]
    pairs: Columns | None
    curves: Curves

    __iter__ = None  # else, by `__getitem__`, over the indices from 0 to the first that was not audited

    def __getitem__(self, index: int | str) -> Example:
        """Return everything about the example with a dataset index, or an id where there are any; it prints nicely.

        Raises:
            KeyError: If the audit has no such example.
            TypeError: For a slice, or what else is no index.
        """
        return example_of(self.columns, self.pairs, self.manifest, index, self.curves)

    def health(self) -> Health:
        """Return how good the labels are: how many are wrong, in which classes, and how many examples to look at."""
        return health(self.columns, self.manifest)

    def to_pandas(self) -> Any:
        """Return the columns as a data frame, by dataset index.

        Raises:
            ImportError: If pandas is not installed.
        """
        return data_frame(self.columns)

    def plot(self, what: str = "suspicion", *, index: int | None = None) -> Any:
        """Return a figure of matplotlib; it is not shown, but by notebooks, and ``.savefig(path)`` saves it.

        Args:
            what: ``"suspicion"``: its histogram in each class, with the candidates; ``"classes"``: how many labels of
                one class are likely of another; ``"curves"``: loss, margin and probability over the epochs, of the
                candidates and of the others.
            index: An example, to see where it lies among all, and its curves.

        Raises:
            ImportError: If matplotlib is not installed.
            ValueError: If there is no such plot, or nothing to be seen in it.
        """
        return plot(self.columns, self.manifest, what, index, self.curves)

    def _repr_html_(self) -> str:
        return html(self.columns, self.manifest, repr(self), str(self), self.health())


def html(columns: Columns, manifest: Mapping[str, Any], title: str, summary: str, found: Health) -> str:
    """Return the report as a piece of HTML that stands alone; everything in it is escaped.

    Args:
        columns: Of the report.
        manifest: Of the report.
        title: One line.
        summary: What is printed of the report, for whoever unfolds it.
        found: The health of the labels.
    """
    lines = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in found.lines())
    return (
        f'<div class="influence-audit"><style>{_STYLE}</style><b>{escape(title)}</b><dl>{lines}</dl>'
        f"{_candidates(columns, manifest.get('label_names'))}"
        f"<details><summary>all of it as text</summary><pre>{escape(summary)}</pre></details></div>"
    )


def _candidates(columns: Columns, names: Any) -> str:
    rows = candidate_rows(columns)
    if not len(rows):
        return ""
    shown = shown_in("table", columns)
    if "wrong_probability" in columns and "wrong_probability" not in shown:
        shown.append("wrong_probability")
    words = set(shown_in("names", columns)) | {name for name in shown if columns[name].dtype.kind in "OU"}
    align = {name: ' class="word"' if name in words else "" for name in shown}
    head = "".join(f'<th{align[name]} title="{escape(column_of(name).meaning)}">{escape(name)}</th>' for name in shown)
    body = "".join(
        f"<tr>{''.join(f'<td{align[name]}>{_cell(columns, name, row, names)}</td>' for name in shown)}</tr>"
        for row in rows[:_ROWS]
    )
    more = f"<div>and {len(rows) - _ROWS:,} candidates more</div>" if len(rows) > _ROWS else ""
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{more}'


def _cell(columns: Columns, name: str, row: int, names: Any) -> str:
    label = "names" in column_of(name).shown
    return escape(cell_text(name, columns[name][row], names, label=label))


def data_frame(columns: Columns) -> Any:
    """Return the columns as a data frame of pandas, see ``AuditReport.to_pandas``."""
    pandas = _needed("pandas", "`report.columns` are the same as a dict of arrays")
    index = pandas.Index(columns["index"], name="index")
    return pandas.DataFrame({name: values for name, values in columns.items() if name != "index"}, index=index)


def plot(columns: Columns, manifest: Mapping[str, Any], what: str, index: int | None, curves: Curves) -> Any:
    """Return a figure, see ``AuditReport.plot``."""
    if what not in _PLOTS or (index is not None and what != _PLOTS[0]):
        raise ValueError(
            f"plot({what!r}{'' if index is None else f', index={index}'}): expected one of "
            f"{', '.join(map(repr, _PLOTS))}, or an index alone, `plot(index=17)`."
        )
    row = None if index is None else row_of(columns, index)
    _needed("matplotlib", "`report.to_pandas()` has the numbers")
    if row is not None:
        return _of_example(columns, row, curves)
    if what == "curves":
        return _of_curves(columns, curves)
    draw = _of_classes if what == "classes" else _of_suspicion
    return draw(columns, manifest)


def _of_suspicion(columns: Columns, manifest: Mapping[str, Any]) -> Any:
    """Draw histograms of suspicion, one for each of the largest classes."""
    scores, candidate = columns["suspicion"].astype(np.float64), columns["candidate"].astype(bool)
    finite = np.isfinite(scores)
    if not finite.any():
        raise ValueError("there is nothing to plot: the audit has no column to rank by, so that no suspicion is known.")
    labels = columns.get("label", np.full(len(scores), -1))
    numbers, counts = np.unique(labels[finite & (labels >= 0)], return_counts=True)
    largest = np.sort(numbers[np.argsort(-counts, kind="stable")][:_PANELS])
    parts = [(f"class {label_text(n, manifest.get('label_names'))}", labels == n) for n in largest]
    parts = parts if len(parts) > 1 else [("all examples", np.ones(len(scores), dtype=bool))]
    figure, axes = _panels(len(parts), sharex=True, sharey=True)
    bins = np.linspace(*_range(scores[finite]), _BINS)
    for axis, (title, own) in zip(axes, parts, strict=True):
        for kind, color, chosen in (("others", _USUAL, ~candidate), ("candidates", _CANDIDATE, candidate)):
            axis.hist(scores[own & finite & chosen], bins, color=color, alpha=0.8, label=kind)
        axis.set_yscale("symlog")
        axis.set_title(
            f"{title}: {int((own & candidate).sum())} of {int(own.sum()):,}", fontsize="medium", parse_math=False
        )
    axes[0].legend(fontsize="small")
    more = f" (the largest of {len(numbers)} classes)" if len(numbers) > len(parts) > 1 else ""
    figure.supxlabel("suspicion")
    figure.supylabel("examples")
    figure.suptitle(f"{int(candidate.sum()):,} candidates among {len(scores):,} examples{more}")
    return figure


def _of_classes(columns: Columns, manifest: Mapping[str, Any]) -> Any:
    """Draw how many labels of each class are likely of another."""
    counts = flows(columns, manifest.get("labels") or {})
    if not counts:
        raise ValueError("there is nothing to plot: the audit contradicts no label, or the loss has no classes.")
    weight: dict[int, float] = {}
    for pair, count in counts.items():
        weight |= {number: weight.get(number, 0.0) + count for number in pair}
    shown = sorted(sorted(weight, key=lambda number: -weight[number])[:_CLASSES])
    matrix = np.array([[counts.get((given, other), 0.0) for other in shown] for given in shown])
    figure, (axis,) = _panels(1, size=max(4.0, 0.35 * len(shown) + 2))
    image = axis.imshow(matrix, cmap="Reds", vmin=0)
    names = [label_text(number, manifest.get("label_names")) for number in shown]
    axis.set_xticks(range(len(shown)), names, rotation=90, parse_math=False)
    axis.set_yticks(range(len(shown)), names, parse_math=False)
    axis.set_xlabel("likely class")
    axis.set_ylabel("given class")
    for given, row in enumerate(matrix if len(shown) <= _NUMBERED else ()):
        for other, count in enumerate(row):
            color = "white" if count > matrix.max() / 2 else "black"
            axis.text(other, given, f"{count:.0f}" if count >= 0.5 else "", ha="center", va="center", color=color)
    more = f" (of {len(weight)} classes the {len(shown)} with most)" if len(weight) > len(shown) else ""
    axis.set_title(f"labels that are likely of another class{more}", fontsize="medium")
    figure.colorbar(image, ax=axis, shrink=0.8)
    return figure


def _of_curves(columns: Columns, curves: Curves) -> Any:
    """Draw the median, and where the middle eight of ten are, of the candidates and of the others."""
    if not curves:
        raise ValueError("there is nothing to plot: the audit has no curves (an earlier version, an ensemble).")
    candidate = columns["candidate"].astype(bool)
    figure, axes = _panels(len(curves))
    for axis, (name, table) in zip(axes, curves.items(), strict=True):
        for kind, color, chosen in (("others", _USUAL, ~candidate), ("candidates", _CANDIDATE, candidate)):
            _band(axis, curves.epochs, table[chosen], color, kind)
        _over_epochs(axis, name)
    axes[0].legend(fontsize="small")
    figure.suptitle(f"{int(candidate.sum()):,} candidates among {len(candidate):,} examples: median, 10 % to 90 %")
    return figure


def _band(axis: Any, epochs: NDArray[np.int64], table: NDArray[np.float32], color: str, label: str) -> None:
    known = [(epoch, column[np.isfinite(column)]) for epoch, column in zip(epochs, table.T, strict=True)]
    told = [(epoch, *np.quantile(column, (0.1, 0.5, 0.9))) for epoch, column in known if len(column)]
    if told:
        at, low, middle, high = map(np.asarray, zip(*told, strict=True))
        axis.fill_between(at, low, high, color=color, alpha=0.25, linewidth=0)
        axis.plot(at, middle, color=color, label=label, marker="o" if len(at) == 1 else "")


def _over_epochs(axis: Any, name: str) -> None:
    axis.set_title(f"{name} over epochs", fontsize="medium")
    axis.set_xlabel("epoch", fontsize="small")
    axis.xaxis.get_major_locator().set_params(integer=True)


def _of_example(columns: Columns, row: int, curves: Curves) -> Any:
    """Draw where an example lies among all, in the columns that rate examples."""
    every = {name: columns[name] for name in scored(columns) if np.isfinite(columns[name][row])}
    if not every and not curves:
        raise ValueError(f"there is nothing to plot: no score of the example {columns['index'][row]} is finite.")
    chosen = dict(list(every.items())[: _PANELS - len(curves)])
    figure, axes = _panels(len(curves) + len(chosen))
    for axis, (name, table) in zip(axes, curves.items(), strict=False):
        _band(axis, curves.epochs, table, _USUAL, "all")
        axis.plot(curves.epochs, table[row], color=_CANDIDATE, marker=".")
        _over_epochs(axis, name)
    for axis, (name, values) in zip(axes[len(curves) :], chosen.items(), strict=True):
        axis.hist(values[np.isfinite(values)], _BINS, color=_USUAL)
        axis.axvline(values[row], color=_CANDIDATE)
        axis.set_yscale("symlog")
        high = "" if column_of(name).direction == "high" else " (low = suspicious)"
        axis.set_title(f"{name}{high}", fontsize="medium", parse_math=False)
    figure.supylabel("examples")
    title = f"example {called(columns, row)}, rank {columns['rank'][row]:,} of {len(columns['rank']):,}"
    figure.suptitle(title, parse_math=False)
    return figure


def _panels(count: int, size: float = 2.4, **shared: bool) -> tuple[Any, list[Any]]:
    """Return a figure that pyplot knows nothing of, and its panels."""
    across = 2 if count == 4 else min(count, 4 if count > 4 else 3)
    down = -(-count // across)
    # A single panel, or few of them, would be too small.
    width, height = max(across * size * 1.25, 5.0), max(down * size, 3.2)
    figure = importlib.import_module("matplotlib.figure").Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False, **shared).flat
    panels = list(axes)
    for axis in panels[count:]:
        axis.remove()
    for axis in panels[max(count - across, 0) : count]:
        axis.tick_params(labelbottom=True)  # whatever is shared with a panel below that is not there
    # A notebook shows it, whether or not pyplot was imported there.
    figure._repr_png_ = partial(_png, figure)
    return figure, panels[:count]


def _png(figure: Any) -> bytes:
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    return drawn.getvalue()


def _range(values: Any) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _needed(name: str, otherwise: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"this needs {name}: `pip install {name}`. Without it, {otherwise}.") from error
