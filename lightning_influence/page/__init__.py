"""The page on which an audit is looked at and acted on; nothing heavy is imported here."""

from __future__ import annotations

from lightning_influence.page.one_file import one_file
from lightning_influence.page.static_files import static_files

__all__ = ["one_file", "static_files"]
