"""The report, the ranking, and what to do about it."""

from __future__ import annotations

from lightning_influence.audit.columns import COLUMNS, Column
from lightning_influence.audit.ensemble import EnsembleError
from lightning_influence.audit.queries import Queries
from lightning_influence.audit.relabel import LabelError
from lightning_influence.audit.report import AuditReport
from lightning_influence.audit.unlearning import Unlearner
from lightning_influence.audit.update import ParameterUpdate

__all__ = [
    "COLUMNS",
    "AuditReport",
    "Column",
    "EnsembleError",
    "LabelError",
    "ParameterUpdate",
    "Queries",
    "Unlearner",
]
