"""Lightning callbacks: when to record, fit and score. What is recorded, fitted and scored is the engine's business."""

from lightning_influence.callbacks.influence_audit import InfluenceAudit

__all__ = ["InfluenceAudit"]
