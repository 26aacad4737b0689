"""Class names, numbers and tables as the dashboards can show them; class names are untrusted text."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import numpy as np

from lightning_influence.tensorboard.pictures import drawable

UNKNOWN = "–"
_LABEL_LENGTH = 24  # of a class name; longer ones would make a table wider than the page


def label_text(value: Any, label_names: Sequence[str] | None) -> str:
    """Return the class name, else the number; an en dash when unknown. Cut to one short line of visible characters."""
    number = float(value)
    if not math.isfinite(number) or number == -1:
        return UNKNOWN
    if not number.is_integer():
        return f"{number:.4g}"
    label = int(number)
    text = _visible(label_names[label]) if label_names is not None and 0 <= label < len(label_names) else ""
    if not text:
        return str(label)
    return text if len(text) <= _LABEL_LENGTH else text[: _LABEL_LENGTH - 1].rstrip() + "…"


def caption(index: int, given: Any, said: str, other: Any, label_names: Sequence[str] | None) -> str:
    """Return what stands under a picture, for example ``#12 given 3`` and, for another label, ``predicted 8`` below."""
    own, others = (_drawn_label(value, label_names) for value in (given, other))
    text = f"#{int(index)}" + (f" given {own}" if own != UNKNOWN else "")
    return text + (f"\n{said} {others}" if others not in (UNKNOWN, own) else "")


def number_text(value: Any) -> str:
    """Return integers in full, other numbers to three digits, an en dash for NaN."""
    if np.issubdtype(np.asarray(value).dtype, np.integer):
        return str(int(value))
    return UNKNOWN if math.isnan(value) else f"{value:.3g}"


def table(names: Sequence[str], rows: Iterable[Sequence[str]], words: Collection[str]) -> str:
    """Return a table in markdown, all of it escaped; the columns ``words`` are text, the others numbers."""
    lines = ["| " + " | ".join(map(_escape, cells)) + " |" for cells in (names, *rows)]
    lines.insert(1, "| " + " | ".join(":---" if name in words else "---:" for name in names) + " |")
    return "\n".join(lines) + "\n"


def _drawn_label(value: Any, label_names: Sequence[str] | None) -> str:
    """As ``label_text``, but the class number where the font of the pictures lacks a letter of the name."""
    text = label_text(value, label_names)
    return label_text(value, None) if drawable(text).count("?") > text.count("?") else text


def _visible(text: str) -> str:
    """Collapse white space; drop control characters and those that reorder the text around them."""
    # Joiners are not printable either, but emoji and several scripts need them.
    kept = (" " if c.isspace() else c for c in text if c.isspace() or c.isprintable() or c in "\u200c\u200d")
    return " ".join("".join(kept).split())


def _escape(text: str) -> str:
    """Write every ASCII character with a meaning in markdown or HTML as a character reference.

    References and not backslashes, because a backslash inside a table cell means different things to different
    markdown dialects.
    """
    return "".join(c if c.isalnum() or c in " ,.;-+=%/'?$" or ord(c) > 127 else f"&#{ord(c)};" for c in text)
