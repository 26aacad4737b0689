"""The page on which an audit is looked at and acted on; nothing heavy is imported here."""

from __future__ import annotations

from lightning_influence.page.assets import static_files
from lightning_influence.page.embedding import one_file

__all__ = ["one_file", "static_files"]
