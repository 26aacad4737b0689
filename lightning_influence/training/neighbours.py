"""What an example's neighbours say about its label."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_influence.training.example_sums import lengthened

# Neighbours are looked for among at most so many examples: the cost then grows with N, not with N².
_MAX_REFERENCES = 10_000
_CHUNK_ELEMENTS = 2**20
# Votes are kept up to this many scalars (400 MB).
_VOTE_BUDGET = 10**8
_STATE = ("disagreement", "passes", "votes")


def nearest_labels(features: Tensor, labels: Tensor, *, neighbours: int = 20, seed: int = 0) -> Tensor:
    """Return the labels of each example's nearest neighbours.

    Distances are cosines between centred features; an example is not its own neighbour. Beyond 10,000 examples,
    neighbours are looked for in a random 10,000 of them.

    Args:
        features: ``[n, d]``, such as the inputs of the last layer.
        labels: ``[n]`` integers; negative ones are unknown, neither rated nor counted.
        neighbours: Number of neighbours.
        seed: Seed of the random reference set.

    Returns:
        ``[n, k]``, nearest first, with ``k`` at most ``neighbours``; -1 for unknown labels and features without
        finite squares.
    """
    # By their length: of a huge vector, whose squares overflow, there are no cosines.
    usable = (labels >= 0) & torch.isfinite(features.float().norm(dim=1))
    rows = usable.nonzero().squeeze(1)
    if len(rows) < 2:
        return labels.new_full((len(labels), 0), -1)
    unit = features[rows].float()  # a copy, and the only one: features are what takes memory
    unit -= unit.mean(0)
    unit /= unit.norm(dim=1, keepdim=True).clamp(min=1e-12)
    own = labels[rows]
    generator = torch.Generator().manual_seed(seed)
    references = torch.randperm(len(rows), generator=generator)[:_MAX_REFERENCES].sort().values.to(rows.device)
    among = unit[references]
    k = min(neighbours, len(references) - 1)
    result = labels.new_full((len(labels), k), -1)
    step = max(1, _CHUNK_ELEMENTS // len(references))
    room = among.new_empty(min(step, len(rows)), len(references))
    for start in range(0, len(rows), step):
        chunk = torch.arange(start, min(start + step, len(rows)), device=rows.device)
        cosines = torch.mm(unit[chunk], among.T, out=room[: len(chunk)])
        place = torch.searchsorted(references, chunk).clamp_(max=len(references) - 1)
        itself = references[place] == chunk
        cosines[itself.nonzero().squeeze(1), place[itself]] = -torch.inf
        result[rows[chunk]] = own[references[cosines.topk(k, 1).indices]]
    return result


def disagreement(nearest: Tensor, labels: Tensor) -> Tensor:
    """Return the share of each example's nearest neighbours that carry another label.

    Args:
        nearest: See ``nearest_labels``.
        labels: The examples' own, ``[n]``.

    Returns:
        ``[n]`` between 0 and 1; NaN for unknown labels and non-finite features.
    """
    if not nearest.shape[1]:
        return torch.full((len(labels),), torch.nan, device=labels.device)
    shares = (nearest != labels.unsqueeze(1)).float().mean(1)
    return shares.masked_fill(nearest[:, 0] < 0, torch.nan)


def votes(nearest: Tensor, classes: int) -> Tensor:
    """Return the share of each class among the nearest neighbours, ``[n, classes]``.

    Args:
        nearest: Labels ``[n, k]``, see ``nearest_labels``; none of them unknown.
        classes: Number of classes.
    """
    share = torch.full(nearest.shape, 1 / max(nearest.shape[1], 1), device=nearest.device)
    return torch.zeros(len(nearest), classes, device=nearest.device).scatter_add_(1, nearest, share)


class NeighbourRecord:
    """What the neighbours of every example have said over a run, at every pass that looked for them.

    Args:
        size: Number of examples of the data set.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._disagreement = torch.zeros(size, dtype=torch.float64)
        self._passes = torch.zeros(size, dtype=torch.float64)
        self._votes = torch.zeros(size, 0)

    def add(self, indices: Tensor, nearest: Tensor, labels: Tensor) -> None:
        """Add one pass.

        Args:
            indices: Dataset indices ``[n]``.
            nearest: Labels of their neighbours ``[n, k]``, see ``nearest_labels``.
            labels: ``[n]`` integers.
        """
        shares = disagreement(nearest, labels).cpu().double()
        known = shares.isfinite()
        rows = indices.cpu()[known]
        self._disagreement[rows] += shares[known]
        self._passes[rows] += 1
        if not len(rows):
            return
        nearest = nearest.cpu()[known]
        classes = max(self._votes.shape[1], 1 + int(nearest.max()))
        if self.size * classes <= _VOTE_BUDGET:
            self._votes = F.pad(self._votes, (0, classes - self._votes.shape[1]))
            self._votes[rows] += votes(nearest, classes)

    @property
    def disagreement(self) -> Tensor | None:
        """Mean share of neighbours with another label, ``[size]``, NaN where unknown; None before the first pass."""
        return self._disagreement / self._passes if bool(self._passes.any()) else None

    def votes(self, classes: int) -> Tensor:
        """Return the mean share of neighbours of each class, ``[size, classes]``; zeros where unknown."""
        kept = self._votes[:, :classes].double() / self._passes.clamp(min=1).unsqueeze(1)
        return F.pad(kept, (0, classes - kept.shape[1]))

    def grow(self, size: int) -> None:
        """Have room for more examples."""
        self.size = size
        self._disagreement, self._passes, self._votes = (
            lengthened(column, size) for column in (self._disagreement, self._passes, self._votes)
        )

    def state_dict(self) -> dict[str, Tensor]:
        """Return tensors only, for a Lightning checkpoint."""
        return dict(zip(_STATE, (self._disagreement.clone(), self._passes.clone(), self._votes.clone()), strict=True))

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a checkpoint."""
        self._disagreement, self._passes, self._votes = (state[name].clone() for name in _STATE)
