"""The audit directory on disk."""

from __future__ import annotations

from lightning_influence.audit.store.atomic import StoreError
from lightning_influence.audit.store.store import AuditStore

__all__ = [
    "AuditStore",
    "StoreError",
]
