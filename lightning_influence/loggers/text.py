"""Captions and text as loggers can show them; names of classes and examples are untrusted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning_influence.audit.columns import Columns
from lightning_influence.audit.words import UNKNOWN as UNKNOWN
from lightning_influence.audit.words import id_text
from lightning_influence.audit.words import label_text as label_text
from lightning_influence.audit.words import number_text as number_text
from lightning_influence.loggers.pictures import drawable

_ID_LENGTH = 19  # letters below a picture


def caption(index: int, given: Any, said: str, other: Any, label_names: Sequence[str] | None) -> str:
    """Return what stands under a picture, for example ``#12 given 3`` and, for another label, ``predicted 8`` below."""
    own, others = (_drawn_label(value, label_names) for value in (given, other))
    text = f"#{int(index)}" + (f" given {own}" if own != UNKNOWN else "")
    return text + (f"\n{said} {others}" if others not in (UNKNOWN, own) else "")


def id_line(columns: Columns, row: int, name: str = "id") -> str:
    """Return another line of a caption, with the id of an example if it has one."""
    return f"\n{id_text(columns[name][row], _ID_LENGTH)}" if name in columns else ""


def _drawn_label(value: Any, label_names: Sequence[str] | None) -> str:
    """As ``label_text``, but the class number where the font of the pictures lacks a letter of the name."""
    text = label_text(value, label_names)
    return label_text(value, None) if drawable(text).count("?") > text.count("?") else text


def escape(text: str) -> str:
    """Write every ASCII character with a meaning in markdown or HTML as a character reference.

    References and not backslashes, because a backslash inside a table cell means different things to different
    markdown dialects.
    """
    return "".join(c if c.isalnum() or c in " ,.;-+=%/'?$" or ord(c) > 127 else f"&#{ord(c)};" for c in text)
