"""What a query measures: its loss, its margin, its adversarial loss, a gap between groups, or what the user writes."""

from __future__ import annotations

from lightning_influence.scores.measurements.base import Measured, Measurement, MeasurementError, QuerySets, Statistic
from lightning_influence.scores.measurements.custom import Custom
from lightning_influence.scores.measurements.examples import AdversarialLoss, Loss, Margin
from lightning_influence.scores.measurements.fairness import DemographicParityGap, EqualOpportunityGap
from lightning_influence.scores.measurements.measure import (
    AnyMeasurement,
    MeasurementName,
    MeasurementScores,
    as_measurement,
    mean_gradient,
    mean_loss_gradient,
    measured_values,
    measurement_gradient,
    measurement_scores,
    measurement_value,
)

__all__ = [
    "AdversarialLoss",
    "AnyMeasurement",
    "Custom",
    "DemographicParityGap",
    "EqualOpportunityGap",
    "Loss",
    "Margin",
    "Measured",
    "Measurement",
    "MeasurementError",
    "MeasurementName",
    "MeasurementScores",
    "QuerySets",
    "Statistic",
    "as_measurement",
    "mean_gradient",
    "mean_loss_gradient",
    "measured_values",
    "measurement_gradient",
    "measurement_scores",
    "measurement_value",
]
