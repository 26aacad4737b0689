"""Gaps between groups of people, on soft predictions: differentiable stand-ins for gaps between decisions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from lightning_influence.gradients.passes import ExampleGradients
from lightning_influence.objective.terms import BatchLoss
from lightning_influence.scores.measurements.base import MeasurementError, Statistic, check_sizes
from lightning_influence.scores.measurements.examples import log_odds

Group: TypeAlias = "Tensor | Sequence[int]"


@dataclass(frozen=True, eq=False)
class DemographicParityGap(Statistic):
    """``|E[p | s=1] - E[p | s=0]|``: how much likelier the positive prediction is in one group.

    Args:
        group: ``s`` of every example, 0 or 1 (-1: in neither), over the queries' dataset, ``[len(dataset)]``, by
            dataset index; the model need not see it.
        positive: The class whose probability ``p`` is compared; the 1 of a yes-or-no decision.
    """

    group: Group
    positive: int = 1

    @property
    def name(self) -> str:
        """``"demographic_parity_gap"``."""
        return "demographic_parity_gap"

    @property
    def groups(self) -> tuple[str, ...]:
        """``s=0`` and ``s=1``."""
        return ("s=0", "s=1")

    def values(self, loss: BatchLoss) -> Tensor:
        """Return the probabilities."""
        return log_odds(self.name, loss, self.positive).sigmoid()

    def combined(self, means: Tensor) -> Tensor:
        """Return the size of the difference."""
        difference = means[1] - means[0]
        # Differentiated without the absolute value, whose slope at 0 would be 0; the sign comes back here.
        return -difference if bool(difference < 0) else difference

    def assigned(self, queries: ExampleGradients, indices: Sequence[int]) -> Tensor:
        """Return ``s`` of every example of the dataset; -1 for those that were not asked about."""
        size = len(queries.source)
        wanted = torch.as_tensor(list(indices), dtype=torch.long)
        try:
            every = torch.as_tensor(self.group).cpu()
        except (TypeError, ValueError, RuntimeError) as error:
            raise MeasurementError(
                f"{self.name}: `group` is a {type(self.group).__name__} that no tensor can be made of; expected 0 or 1 "
                "for each example of the queries' dataset, and -1 for those in neither group."
            ) from error
        if every.shape != (size,):
            raise MeasurementError(
                f"{self.name}: `group` has the shape {list(every.shape)}; expected [{size}], one entry for each "
                "example of the queries' dataset."
            )
        found = every[wanted]
        odd = found[(found != 0) & (found != 1) & (found != -1)]
        if len(odd):
            raise MeasurementError(
                f"{self.name}: `group` holds {odd.unique().tolist()[:5]}; expected 0 and 1, and -1 for examples that "
                "are in neither group."
            )
        groups = torch.full((size,), -1, dtype=torch.long)
        groups[wanted] = found.long()
        check_sizes(self.name, {f"s={s}": int((found == s).sum()) for s in (0, 1)})
        return groups


@dataclass(frozen=True, eq=False)
class EqualOpportunityGap(DemographicParityGap):
    """``|E[p | s=1, y=1] - E[p | s=0, y=1]|``: the same among those who deserve it (Hardt et al. 2016, 1610.02413)."""

    @property
    def name(self) -> str:
        """``"equal_opportunity_gap"``."""
        return "equal_opportunity_gap"

    @property
    def groups(self) -> tuple[str, ...]:
        """Those of label ``positive``."""
        return tuple(f"s={s}, y={self.positive}" for s in (0, 1))

    def members(self, loss: BatchLoss, assigned: Tensor) -> Tensor:
        """Return ``s`` of the examples whose given label is the positive class, -1 for the others."""
        labels = None if loss.primary is None else loss.primary.decided(loss.n).get("label")
        if labels is None:
            raise MeasurementError(f"{self.name}: the loss shows no class label of each example.")
        return torch.where(labels.to(assigned.device) == self.positive, assigned, -1)
