"""Names, labels and numbers as one short line of text; names of classes and examples are untrusted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from lightning_influence.audit.columns import Columns

UNKNOWN = "–"
_LABEL_LENGTH = 24  # of a class name; longer ones would make a table wider than the page
_NAME_LENGTH, _TEXT_LENGTH = 40, 100  # of an id, of what an example says
_SHORT_NAME = 24  # of an id among others


def visible(text: str) -> str:
    """Collapse white space; drop control characters and those that reorder the text around them."""
    # Joiners are not printable either, but emoji and several scripts need them.
    kept = (" " if c.isspace() else c for c in text if c.isspace() or c.isprintable() or c in "\u200c\u200d")
    return " ".join("".join(kept).split())


def cut(text: str, length: int) -> str:
    """Return as much of a text as a length allows, with an ellipsis where more was."""
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def label_text(value: Any, label_names: Sequence[str] | None) -> str:
    """Return the class name, else the number; an en dash when unknown. Cut to one short line of visible characters."""
    number = float(value)
    if not math.isfinite(number) or number == -1:
        return UNKNOWN
    if not number.is_integer():
        return f"{number:.4g}"
    label = int(number)
    text = visible(label_names[label]) if label_names is not None and 0 <= label < len(label_names) else ""
    return cut(text, _LABEL_LENGTH) if text else str(label)


def number_text(value: Any, digits: int = 3) -> str:
    """Return integers in full, other numbers to some digits, an en dash for NaN."""
    if np.issubdtype(np.asarray(value).dtype, np.integer):
        return str(int(value))
    return UNKNOWN if math.isnan(value) else f"{value:.{digits}g}"


def id_text(value: Any, length: int = _NAME_LENGTH) -> str:
    """Return what an example is called; of a long path the end, which tells files apart."""
    text = visible(str(value))
    return text if len(text) <= length else f"…{text[1 - length :].lstrip()}"


def called(table: Columns, row: int, index: str = "index", names: str = "id") -> str:
    """Return the index of an example and, where it has one, its id."""
    name = id_text(table[names][row], _SHORT_NAME) if names in table else ""
    return f"{int(table[index][row])} {name}".rstrip()


def cell_text(
    name: str, value: Any, label_names: Sequence[str] | None = None, *, label: bool = False, digits: int = 3
) -> str:
    """Return an entry of the scores table.

    Args:
        name: Its column.
        value: The entry.
        label_names: Name of each class, or None to show class numbers.
        label: Whether it is the number of a class.
        digits: Of a number that is no integer.
    """
    if name == "id":
        return id_text(value)
    if isinstance(value, str):
        return cut(visible(value), _TEXT_LENGTH)
    return label_text(value, label_names) if label else number_text(value, digits)
