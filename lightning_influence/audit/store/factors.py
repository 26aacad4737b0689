"""All factors of an audit directory, as ``curvature.saved.restored`` takes them."""

from __future__ import annotations

import os

from torch import Tensor

from lightning_influence.audit.store.store import AuditStore


def read_factors(directory: str | os.PathLike[str]) -> dict[str, tuple[dict[str, Tensor], dict[str, str]]]:
    """Return block name to tensors on the CPU and text, of every stored block; empty if there is none.

    Raises:
        StoreError: If there is no audit, or a file is damaged.
    """
    store = AuditStore.open(directory)
    return {name: store.read_factors(name) for name in store.factor_names()}
