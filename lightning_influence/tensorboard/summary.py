"""What an audit writes into TensorBoard event files, for the stock dashboards.

Tags (`<tag>`, `<name>` and `<column>` are the caller's or a column of the scores table):

| tag | dashboard | content | written by |
|---|---|---|---|
| `<tag>/log10` | Histograms | log10 of the positive finite values | `write_histogram` |
| `<tag>/zero`, `<tag>/negative`, `<tag>/non_finite` | Scalars | values the histogram leaves out | `write_histogram` |
| `influence/candidates` | Images | the nine most suspicious examples | `write_candidates` |
| `influence/candidates/2`, `/3`, … | Images | the next nine each | `write_candidates` |
| `influence/candidates/text_summary` | Text | table of the same examples | `write_candidates` |
| `influence/detection/<column>` | PR Curves | how well the column finds known label noise | `write_detection` |
| `influence/detection/<column>_auroc` | Scalars | the same as one number | `write_detection` |
| `influence/queries/1`, `/2`, … | Images | a query, its proponents and its opponents | `query_sheets.write_queries` |
| `influence/queries/text_summary` | Text | table of the same pairs | `query_sheets.write_queries` |
| `influence/<name>` | Scalars | numbers about the audit itself | `write_scalars` |

Functions that take `columns` expect the scores table: one array of length `N` per column name, all in the same order of
examples. Class names are untrusted text and are escaped before they reach a dashboard.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_influence.audit.columns import LOW_IS_SUSPICIOUS, SCORE_COLUMNS
from lightning_influence.tensorboard.pictures import candidate_grid, drawable, visible

__all__ = [
    "CANDIDATES_TAG",
    "DETECTION_TAG",
    "SCALAR_TAG",
    "Writer",
    "candidate_grid",
    "candidates_markdown",
    "top_candidates",
    "write_candidates",
    "write_detection",
    "write_histogram",
    "write_scalars",
]

SCALAR_TAG = "influence/{name}"
CANDIDATES_TAG = "influence/candidates"
FURTHER_CANDIDATES_TAG = "influence/candidates/{sheet}"
DETECTION_TAG = "influence/detection/{column}"
DETECTION_AUROC_TAG = "influence/detection/{column}_auroc"
HISTOGRAM_TAG = "{tag}/log10"
LEFT_OUT_TAG = "{tag}/{reason}"

_TABLE_SCORES = ("suspicion", "self_influence", "harm", "loss_mean", "aum", "tracin", "loss", "el2n", "epochs_wrong")
# The text dashboard breaks numbers and words anywhere once a table is wider than the page, so columns are left out
# beyond this many characters (some 900 pixels).
_TABLE_WIDTH = 110
_UNKNOWN = "–"
_LABEL_LENGTH = 28  # class names longer than this are cut, or one of them would fill the table

# The dashboard draws 30 bars whatever it is given; somewhat more source bins keep its re-binning smooth.
_BINS = 40

# The Images dashboard shrinks a sheet to a card some 350 pixels wide, and the Time Series dashboard to one 210 pixels
# high. Captions stay readable in the first and pictures recognisable in the second only on small sheets.
_SHEET_COLUMNS = 3
_SHEET_IMAGES = 9

Columns = Mapping[str, npt.NDArray[Any]]


class Writer(Protocol):
    """The part of `torch.utils.tensorboard.SummaryWriter` that is used here."""

    def add_scalar(self, tag: str, scalar_value: Any, global_step: int, /) -> Any:
        """Write one number."""

    def add_histogram(self, tag: str, values: Any, global_step: int, bins: Any, /) -> Any:
        """Write a histogram with the given bin edges."""

    def add_image(self, tag: str, img_tensor: Any, global_step: int, /) -> Any:
        """Write a `[3, h, w]` uint8 image."""

    def add_text(self, tag: str, text_string: str, global_step: int, /) -> Any:
        """Write markdown."""

    def add_pr_curve(self, tag: str, labels: Any, predictions: Any, global_step: int, /) -> Any:
        """Write a precision-recall curve of predictions in [0, 1]."""


# ------------------------------------------------------------------------------------------------ numbers


def write_scalars(writer: Writer, scalars: Mapping[str, Any], step: int) -> list[str]:
    """Write numbers under `influence/<name>`.

    Args:
        writer: event file writer.
        scalars: name to float, or to anything `float()` takes; None and non-finite values are left out, because the
            dashboard draws nothing for them.
        step: global step.

    Returns:
        The names that were left out.
    """
    left_out = []
    for name, value in scalars.items():
        number = math.nan if value is None else float(value)
        if math.isfinite(number):
            writer.add_scalar(SCALAR_TAG.format(name=name), number, step)
        else:
            left_out.append(name)
    return left_out


def write_histogram(writer: Writer, tag: str, values: Tensor | npt.ArrayLike, step: int) -> None:
    """Write the histogram of log10 of the positive finite values under `<tag>/log10`.

    Influence scores span many decades: a plain histogram is a single bar at zero. Values that have no logarithm are
    counted in scalars `<tag>/zero`, `<tag>/negative` and `<tag>/non_finite`, each written only when it is not 0. With
    no positive finite value there is no histogram.

    Args:
        writer: event file writer.
        tag: the quantity, for example `influence/self_influence`.
        values: `[N]`, any shape is flattened, may be empty.
        step: global step.
    """
    flat = _to_numpy(values).astype(np.float64).reshape(-1)
    finite = flat[np.isfinite(flat)]
    left_out = {
        "zero": int((finite == 0).sum()),
        "negative": int((finite < 0).sum()),
        "non_finite": flat.size - finite.size,
    }
    for reason, count in left_out.items():
        if count:
            writer.add_scalar(LEFT_OUT_TAG.format(tag=tag, reason=reason), float(count), step)
    positive = finite[finite > 0]
    if positive.size:
        logs = np.log10(positive)
        writer.add_histogram(HISTOGRAM_TAG.format(tag=tag), logs, step, _bin_edges(logs))


def _bin_edges(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Edges on multiples of 1, 2 or 5 times a power of ten, so that histograms of several steps share them."""
    low, high = float(values.min()), float(values.max())
    # Rice's rule: few values in many bins are a comb, not a shape.
    bins = int(np.clip(math.ceil(2 * values.size ** (1 / 3)), 8, _BINS))
    # Equal values still get a bin of a tenth of a decade instead of an infinitely thin one.
    wanted = max((high - low) / bins, 0.01)
    power = 10.0 ** math.floor(math.log10(wanted))
    width = next(step * power for step in (5, 2, 1) if step * power <= wanted * (1 + 1e-9))
    first = math.floor(low / width)
    last = max(math.floor(high / width) + 1, first + 1)
    return np.arange(first, last + 1, dtype=np.float64) * width


# ------------------------------------------------------------------------------------------------ candidates


def top_candidates(columns: Columns, limit: int = 50) -> npt.NDArray[np.int64]:
    """Rows of the scores table to show, most suspicious first.

    Args:
        columns: the scores table with `rank` (1 = most suspicious); with `candidate`, only rows where it is true.
        limit: at most so many rows.

    Returns:
        `[k]` row positions, `k <= limit`. `columns["index"][rows]` are the examples whose images `write_candidates`
        takes.

    Raises:
        ValueError: If `rank` is missing, columns differ in length, or `limit < 1`.
    """
    if limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    if "rank" not in columns:
        raise ValueError(f"the scores table needs a 'rank' column, got {sorted(columns)}")
    _count_rows(columns)
    rank = np.asarray(columns["rank"])
    rows = np.arange(rank.size)
    if "candidate" in columns:
        rows = rows[np.asarray(columns["candidate"]).astype(bool)]
    rows = rows[np.argsort(rank[rows], kind="stable")]
    return rows[:limit].astype(np.int64)


def candidates_markdown(columns: Columns, *, label_names: Sequence[str] | None, limit: int = 50) -> str:
    """GitHub-style table of the most suspicious examples.

    Shown are rank, index, given and suggested label, suspicion and the main score columns, each only where the table
    has it, and as many scores as fit beside the class names. Unknown values (NaN, label -1) are an en dash.

    Args:
        columns: the scores table, see `top_candidates`.
        label_names: name of each class, or None to show class numbers. The names are untrusted: everything that
            markdown or HTML gives a meaning to is written as a character reference.
        limit: at most so many rows.

    Raises:
        ValueError: See `top_candidates`.
    """
    rows = top_candidates(columns, limit)
    total = _count_rows(columns)
    candidates = int(np.asarray(columns["candidate"]).astype(bool).sum()) if "candidate" in columns else total
    if rows.size == 0:
        return f"**No candidates** among {total:,} training examples."

    head = f"**{candidates:,} candidates** among {total:,} training examples"
    head += f"; the {rows.size} most suspicious are shown." if rows.size < candidates else ", most suspicious first."
    cells = {
        "given" if name == "label" else name: [label_text(value, label_names) for value in columns[name][rows]]
        if name in ("label", "suggested")
        else [number_text(value) for value in columns[name][rows]]
        for name in ("rank", "index", "label", "suggested", *_TABLE_SCORES)
        if name in columns
    }
    widths = {name: 3 + max(len(text) for text in (name, *column)) for name, column in cells.items()}
    for name in reversed(_TABLE_SCORES[1:]):
        if name in cells and sum(widths[shown] for shown in cells) > _TABLE_WIDTH:
            del cells[name]
    low = [name for name in cells if name in LOW_IS_SUSPICIOUS]
    if low:
        head += f" High scores are suspicious; for {' and '.join(low)}, low ones are."
    lines = [
        "| " + " | ".join(cells) + " |",
        "| " + " | ".join(":---" if name in ("given", "suggested") else "---:" for name in cells) + " |",
    ]
    lines += ["| " + " | ".join(escape(text) for text in texts) + " |" for texts in zip(*cells.values(), strict=True)]
    return head + "\n\n" + "\n".join(lines) + "\n"


def write_candidates(
    writer: Writer,
    columns: Columns,
    *,
    images: Tensor | None,
    label_names: Sequence[str] | None = None,
    step: int,
    limit: int = 50,
) -> None:
    """Write the table of candidates and, with `images`, their pictures, both under `influence/candidates`.

    The pictures come on sheets of nine, the most suspicious ones first; the second sheet is `influence/candidates/2`.

    Args:
        writer: event file writer.
        columns: the scores table, see `top_candidates`.
        images: `[k, C, H, W]`, the inputs of the first `k` rows of `top_candidates(columns, limit)`, in that order; or
            None where the inputs are no images.
        label_names: name of each class, or None to show class numbers.
        step: global step.
        limit: at most so many candidates.

    Raises:
        ValueError: If there are more images than candidates to show; see also `top_candidates` and `candidate_grid`.
    """
    rows = top_candidates(columns, limit)
    if images is not None and len(images) > rows.size:
        raise ValueError(
            f"got {len(images)} images for {rows.size} candidates; pass the images of "
            f"columns['index'][top_candidates(columns, limit={limit})], in that order"
        )
    writer.add_text(CANDIDATES_TAG, candidates_markdown(columns, label_names=label_names, limit=limit), step)
    if images is None:
        return
    for sheet, first in enumerate(range(0, len(images), _SHEET_IMAGES), start=1):
        shown = images[first : first + _SHEET_IMAGES]
        captions = [_caption(columns, int(row), label_names) for row in rows[first : first + len(shown)]]
        tag = CANDIDATES_TAG if sheet == 1 else FURTHER_CANDIDATES_TAG.format(sheet=sheet)
        writer.add_image(tag, candidate_grid(shown, captions, columns=_SHEET_COLUMNS), step)


def _caption(columns: Columns, row: int, label_names: Sequence[str] | None) -> str:
    """For example `#12  given 3 → suggests 8`; the part after the arrow only where another label is suggested."""
    parts = [f"#{int(columns['index'][row])}" if "index" in columns else f"#{row}"]
    given, suggested = (
        drawn_label_text(columns[name][row], label_names) if name in columns else _UNKNOWN
        for name in ("label", "suggested")
    )
    if given != _UNKNOWN:
        parts.append(f"given {given}")
    if suggested not in (_UNKNOWN, given):
        parts[-1] += f" → suggests {suggested}"
    return "  ".join(parts)


def label_text(value: Any, label_names: Sequence[str] | None) -> str:
    """The class name, else the number; an en dash when unknown. Cut to one short line of visible characters."""
    number = float(value)
    if not math.isfinite(number):
        return _UNKNOWN
    if not number.is_integer():
        return f"{number:.4g}"
    label = int(number)
    if label == -1:
        return _UNKNOWN
    if label_names is None or not 0 <= label < len(label_names):
        return str(label)
    text = visible(str(label_names[label]))
    if not text:
        return str(label)
    return text if len(text) <= _LABEL_LENGTH else text[: _LABEL_LENGTH - 1].rstrip() + "…"


def drawn_label_text(value: Any, label_names: Sequence[str] | None) -> str:
    """As `_label_text`, but the class number where the font of the pictures lacks a letter of the name."""
    text = label_text(value, label_names)
    return label_text(value, None) if drawable(text).count("?") > text.count("?") else text


def number_text(value: Any) -> str:
    """Integers in full, other numbers to three digits, an en dash for NaN."""
    if np.issubdtype(np.asarray(value).dtype, np.integer):
        return str(int(value))
    number = float(value)
    return _UNKNOWN if math.isnan(number) else f"{number:.3g}"


def escape(text: str) -> str:
    """Every ASCII character with a meaning in markdown or HTML as a character reference, newlines as spaces.

    References and not backslashes, because a backslash inside a table cell means different things to different
    markdown dialects.
    """
    harmless = " ,.;-+=%/'?$"
    return "".join(
        character if character.isalnum() or character in harmless or ord(character) > 127 else f"&#{ord(character)};"
        for character in " ".join(text.split())
    )


# ------------------------------------------------------------------------------------------------ detection


def write_detection(
    writer: Writer, columns: Columns, is_mislabelled: Tensor | npt.ArrayLike, step: int
) -> dict[str, float]:
    """Write how well every score column finds known label noise.

    For each score column present, a precision-recall curve `influence/detection/<column>` and the area under the ROC
    curve `influence/detection/<column>_auroc`. Columns of `LOW_IS_SUSPICIOUS` are negated. NaN scores rank last. A
    column without a single number is left out.

    The thresholds of a curve are not scores but `1 - sqrt(share of the ranking above)`: the dashboard offers 127 evenly
    spaced ones, and with a few percent of label noise everything of interest happens at the top of the ranking.

    Args:
        writer: event file writer.
        columns: the scores table, `N` rows.
        is_mislabelled: `[N]`, true where the label is known to be wrong.
        step: global step.

    Returns:
        Column to AUROC. Empty, with a warning, when no example or every example is mislabelled.

    Raises:
        ValueError: If `is_mislabelled` is not `[N]`, or the columns differ in length.
    """
    positive = _to_numpy(is_mislabelled).astype(bool)
    count = _count_rows(columns)
    if positive.shape != (count,):
        raise ValueError(
            f"is_mislabelled must have one entry for each of the {count} rows of the scores table, got shape "
            f"{list(positive.shape)}; bring it into the order of columns['index']"
        )
    if positive.all() or not positive.any():
        warnings.warn(
            f"{int(positive.sum())} of {count} examples are mislabelled: there is nothing to detect, and no detection "
            f"curve is written",
            stacklevel=2,
        )
        return {}
    result = {}
    for column in SCORE_COLUMNS:
        if column not in columns:
            continue
        scores = _to_numpy(columns[column]).astype(np.float64)
        if np.isnan(scores).all():
            continue
        ranks = _average_ranks(-scores if column in LOW_IS_SUSPICIOUS else scores)
        predictions = 1 - np.sqrt((count - ranks) / (count - 1))
        writer.add_pr_curve(DETECTION_TAG.format(column=column), positive, predictions, step)
        positives = int(positive.sum())
        pairs_in_order = ranks[positive].sum() - positives * (positives + 1) / 2
        result[column] = float(pairs_in_order / (positives * (count - positives)))
        writer.add_scalar(DETECTION_AUROC_TAG.format(column=column), result[column], step)
    return result


def _average_ranks(scores: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Ranks 1..n, n = highest; ties share their average rank; NaN below everything else."""
    known = ~np.isnan(scores)
    codes = np.zeros(scores.size, dtype=np.int64)
    codes[known] = np.unique(scores[known], return_inverse=True)[1] + 1
    size = np.bincount(codes)
    last = np.cumsum(size)
    return ((last - size + 1 + last) / 2)[codes]


def _count_rows(columns: Columns) -> int:
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"the columns of the scores table must have one length, got {lengths}")
    return next(iter(lengths.values()), 0)


def _to_numpy(values: Tensor | npt.ArrayLike) -> npt.NDArray[Any]:
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        # numpy has no bfloat16.
        return (values.float() if values.dtype == torch.bfloat16 else values).numpy()
    return np.asarray(values)
