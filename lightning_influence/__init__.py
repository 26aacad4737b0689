"""Training-data attribution and data audits for PyTorch Lightning.

The names below are imported when they are first used, so `import lightning_influence` costs next to nothing
and TensorBoard can load the plugin without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_influence.audit.queries import Queries
    from lightning_influence.audit.report import AuditReport
    from lightning_influence.callbacks import InfluenceAudit
    from lightning_influence.index.settings import Index
    from lightning_influence.influence import Influence, open_index
    from lightning_influence.metrics import LinearDatamodelingScore, MislabelDetection
    from lightning_influence.objective.task import Task, TrainingStepTask
    from lightning_influence.replay.settings import Record
    from lightning_influence.scores.along.tracin import tracin_scores
    from lightning_influence.scores.measurements import (
        AdversarialLoss,
        DemographicParityGap,
        EqualOpportunityGap,
        Margin,
    )
    from lightning_influence.scores.pairs import mean_scores
    from lightning_influence.training.checkpoints import Checkpoint
    from lightning_influence.training.settings import TracIn
    from lightning_influence.training.step_sizes import StepSizes

    __version__: str

_MODULES = {
    "AdversarialLoss": "lightning_influence.scores.measurements",
    "AuditReport": "lightning_influence.audit.report",
    "Checkpoint": "lightning_influence.training.checkpoints",
    "DemographicParityGap": "lightning_influence.scores.measurements",
    "EqualOpportunityGap": "lightning_influence.scores.measurements",
    "Index": "lightning_influence.index.settings",
    "Influence": "lightning_influence.influence",
    "InfluenceAudit": "lightning_influence.callbacks",
    "LinearDatamodelingScore": "lightning_influence.metrics",
    "Margin": "lightning_influence.scores.measurements",
    "MislabelDetection": "lightning_influence.metrics",
    "Queries": "lightning_influence.audit.queries",
    "Record": "lightning_influence.replay.settings",
    "StepSizes": "lightning_influence.training.step_sizes",
    "Task": "lightning_influence.objective.task",
    "TracIn": "lightning_influence.training.settings",
    "TrainingStepTask": "lightning_influence.objective.task",
    "mean_scores": "lightning_influence.scores.pairs",
    "open_index": "lightning_influence.influence",
    "tracin_scores": "lightning_influence.scores.along.tracin",
}

# Written out, not derived from the table: type checkers and editors read it.
__all__ = [
    "AdversarialLoss",
    "AuditReport",
    "Checkpoint",
    "DemographicParityGap",
    "EqualOpportunityGap",
    "Index",
    "Influence",
    "InfluenceAudit",
    "LinearDatamodelingScore",
    "Margin",
    "MislabelDetection",
    "Queries",
    "Record",
    "StepSizes",
    "Task",
    "TracIn",
    "TrainingStepTask",
    "__version__",
    "mean_scores",
    "open_index",
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
