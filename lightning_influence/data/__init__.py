"""Examples by index: fetched in any order, the same each time, and known again in a batch."""

from __future__ import annotations

from lightning_influence.data.source import DataError, ExampleSource

__all__ = [
    "DataError",
    "ExampleSource",
]
