"""What features tell of the labels over a run: by neighbours at every pass, and early, before labels are known."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_influence.core import distributed
from lightning_influence.core.indices import Indices
from lightning_influence.gradients.visitors import ExampleScores
from lightning_influence.training.class_shares import ClassShares
from lightning_influence.training.evidence import EvidenceRecord, LabelEvidence
from lightning_influence.training.example_sums import in_blocks
from lightning_influence.training.neighbours import NeighbourRecord, nearest_labels


class LabelRecord:
    """Looks at features, and keeps none of them.

    Args:
        size: Number of examples of the data set.

    Attributes:
        neighbours: What the neighbours have said at every pass.
        evidence: What was told of the labels in the first epochs.
        heard_of: Whether snapshots are of a training that nobody listened to, from its checkpoints.
        unknown: Why there is no evidence, if that is known.
    """

    def __init__(self, size: int) -> None:
        self.neighbours = NeighbourRecord(size)
        self.evidence = EvidenceRecord(size)
        self.heard_of = False
        self.unknown = ""
        self._right = 0.0, 0.0  # of those predicted in such snapshots, and all

    def add(self, scores: ExampleScores, *, trained: bool, right: tuple[float, float] | None) -> None:
        """Add a snapshot: ``features`` and ``label`` of examples; the rest as ``EvidenceRecord.add``.

        With several processes, to be called by all of them: what is kept is kept by rank zero, which has the features.
        """
        labels, features = scores.columns.get("label"), scores.features
        if features is None or labels is None:
            return
        if distributed.rank() == 0:
            self._add(scores, features, labels, trained=trained, right=right)

    def _add(
        self,
        scores: ExampleScores,
        features: Tensor,
        labels: Tensor,
        *,
        trained: bool,
        right: tuple[float, float] | None,
    ) -> None:
        nearest, trained = nearest_labels(features, labels), trained or self.heard_of
        if self.heard_of and "predicted" in scores.columns:  # what the batches would have told
            found = scores.columns["predicted"][labels >= 0] == labels[labels >= 0]
            right = self._right = self._right[0] + float(found.sum()), self._right[1] + len(found)
        if trained:
            self.neighbours.add(scores.indices, nearest, labels)
        self.evidence.add(scores.indices, features, labels, nearest, trained=trained, right=right)

    def about(self, indices: Indices, predicted: Callable[[Tensor], Tensor | None]) -> LabelEvidence | None:
        """Return the evidence on the labels of some examples; None before a step was trained.

        Args:
            indices: Dataset indices, ``n`` of them.
            predicted: Mean predictions of training for some examples, see ``TrainingDynamics.mean_probabilities``.
        """
        every = torch.as_tensor(indices, dtype=torch.long)
        trained = ClassShares(len(every))
        for rows, places in in_blocks(every, torch.arange(len(every))):
            if (probabilities := predicted(rows)) is not None:
                votes = self.neighbours.votes(probabilities.shape[1], rows)
                trained.add(places, (probabilities.nan_to_num() + votes)[:, : self.evidence.classes])
        return self.evidence.about(indices, trained)

    def grow(self, size: int) -> None:
        """Have room for more examples."""
        self.neighbours.grow(size)
        self.evidence.grow(size)

    def state_dict(self) -> dict[str, Any]:
        """Return tensors only, for a Lightning checkpoint."""
        return {"neighbours": self.neighbours.state_dict(), "evidence": self.evidence.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.neighbours.load_state_dict(state["neighbours"])
        self.evidence.load_state_dict(state["evidence"])
