"""Training-data attribution and data audits for PyTorch Lightning.

The names below are imported when they are first used, so `import lightning_influence` costs next to nothing
and TensorBoard can load the plugin without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_influence.audit import AuditReport
    from lightning_influence.callbacks import InfluenceAudit
    from lightning_influence.measurements import AdversarialLoss, DemographicParityGap, EqualOpportunityGap, Margin
    from lightning_influence.metrics import LinearDatamodelingScore, MislabelDetection
    from lightning_influence.query_pairs import Queries
    from lightning_influence.task import Task, TrainingStepTask
    from lightning_influence.tracin import TracIn
    from lightning_influence.tracin_pairs import tracin_scores

    __version__: str

_MODULES = {
    "AdversarialLoss": "lightning_influence.measurements",
    "AuditReport": "lightning_influence.audit",
    "DemographicParityGap": "lightning_influence.measurements",
    "EqualOpportunityGap": "lightning_influence.measurements",
    "InfluenceAudit": "lightning_influence.callbacks",
    "LinearDatamodelingScore": "lightning_influence.metrics",
    "Margin": "lightning_influence.measurements",
    "MislabelDetection": "lightning_influence.metrics",
    "Queries": "lightning_influence.query_pairs",
    "Task": "lightning_influence.task",
    "TracIn": "lightning_influence.tracin",
    "TrainingStepTask": "lightning_influence.task",
    "tracin_scores": "lightning_influence.tracin_pairs",
}

# Written out, not derived from the table: type checkers and editors read it.
__all__ = [
    "AdversarialLoss",
    "AuditReport",
    "DemographicParityGap",
    "EqualOpportunityGap",
    "InfluenceAudit",
    "LinearDatamodelingScore",
    "Margin",
    "MislabelDetection",
    "Queries",
    "Task",
    "TracIn",
    "TrainingStepTask",
    "__version__",
    "tracin_scores",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("lightning-influence")
    elif name in _MODULES:
        value = getattr(importlib.import_module(_MODULES[name]), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
