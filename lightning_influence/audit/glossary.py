"""What the columns of an audit's tables mean, as a page; generated, so that it says what the code does."""

from __future__ import annotations

from collections.abc import Iterable

from lightning_influence.audit.columns import COLUMNS, INFLUENCE_ON, PAIR_DESCRIPTIONS, column_of, meaning_in_pairs

_INFLUENCE_ON = "influence on what `queries=` measures; negative: training on the example raises it"


def glossary(columns: Iterable[str] | None = None, pairs: Iterable[str] | None = None) -> str:
    """Return the page, in markdown.

    Args:
        columns: Names of the columns of the scores table; by default all that there may be.
        pairs: Names of those of the table of pairs; None for no such table, unless all columns are asked for.
    """
    everything = columns is None
    present = [*COLUMNS, f"{INFLUENCE_ON}<measurement>"] if columns is None else list(columns)
    names = [name for name in COLUMNS if name in present] + [name for name in present if name not in COLUMNS]
    rows = []
    for name in names:
        column = column_of(name)
        meaning = _INFLUENCE_ON if name.startswith(INFLUENCE_ON) else column.meaning
        rows.append((name, meaning, column.direction or ""))
    text = "One row for each training example (`scores.parquet`; `candidates.csv`: those to review, worst first).\n\n"
    text += _table(("column", "meaning", "suspicious"), rows)
    if everything or pairs is not None:
        text += "\nOne row for each query and training example that matters to it (`pairs.parquet`).\n\n"
        told = PAIR_DESCRIPTIONS if pairs is None else pairs
        text += _table(("column", "meaning"), [(name, meaning_in_pairs(name)) for name in told])
    return text


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head)]
    lines += [(f"`{name}`", *(cell.replace("|", "\\|") for cell in cells)) for name, *cells in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
