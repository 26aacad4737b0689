"""What an example's neighbours say about its label."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_influence.training.example_sums import lengthened

# Neighbours are looked for among at most so many examples: the cost then grows with N, not with N².
_MAX_REFERENCES = 10_000
_CHUNK_ELEMENTS = 2**20
# Votes are kept up to this many scalars (400 MB).
_VOTE_BUDGET = 10**8
# The nearest is compared with this one of the nearest; copies by chance that are expected in a data set.
_CROWD, _FALSE_PAIRS = 6, 0.1
_ROUNDING = 2e-7  # of cosines in float32
NEAR = "nearest", "nearest_cosine", "near_duplicate"
"""Columns of what ``nearest_examples`` tells."""
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
    return nearest_by_label(features, labels, neighbours=neighbours, seed=seed)[0]


def nearest_by_label(
    features: Tensor, labels: Tensor, *, neighbours: int = 20, seed: int = 0
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor] | None]:
    """Return what ``nearest_labels`` does, and by the way ``nearest_examples``; None for that if labels are unknown."""
    # By their length: of a huge vector, whose squares overflow, there are no cosines.
    finite = torch.isfinite(features.float().norm(dim=1))
    usable = (labels >= 0) & finite
    rows = usable.nonzero().squeeze(1)
    if len(rows) < 2:
        return labels.new_full((len(labels), 0), -1), None
    own, near = labels[rows], _Nearest(len(labels))
    k = min(neighbours, len(rows) - 1, _MAX_REFERENCES - 1)
    result = labels.new_full((len(labels), k), -1)
    for chunk, values, places in _nearest(_unit(features[rows]), k, seed):
        result[rows[chunk]] = own[places]
        near.add(rows[chunk], values, rows[places[:, 0]])
    return result, near.told(len(rows)) if torch.equal(usable, finite) else None


def _unit(features: Tensor) -> Tensor:
    features = features.float()
    unit = features - features.mean(0)
    unit /= unit.norm(dim=1, keepdim=True).clamp(min=1e-12)  # in place: features are what takes memory
    return unit


def _nearest(unit: Tensor, k: int, seed: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield some rows, and of their ``k`` nearest among the references the cosines and rows, the nearest first."""
    generator = torch.Generator().manual_seed(seed)
    references = torch.randperm(len(unit), generator=generator)[:_MAX_REFERENCES].sort().values.to(unit.device)
    among = unit[references]
    step = max(1, _CHUNK_ELEMENTS // len(references))
    room = among.new_empty(min(step, len(unit)), len(references))
    for start in range(0, len(unit), step):
        chunk = torch.arange(start, min(start + step, len(unit)), device=unit.device)
        cosines = torch.mm(unit[chunk], among.T, out=room[: len(chunk)])
        place = torch.searchsorted(references, chunk).clamp_(max=len(references) - 1)
        itself = references[place] == chunk
        cosines[itself.nonzero().squeeze(1), place[itself]] = -torch.inf
        found = cosines.topk(k, 1)
        yield chunk, found.values, references[found.indices]


def nearest_examples(features: Tensor, *, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return each example's nearest other example by features, how near it is, and which are likely copies.

    A copy is far nearer than the sixth nearest. How much nearer the nearest is by chance follows from the dimension of
    the features: with ``d`` of them that count, the ratio of both squared distances to the power ``d / 2`` has the
    distribution Beta(1, 5). ``d`` is read off the median ratio, and so few ratios are taken for copies that one false
    pair is expected in ten data sets. Of more than five copies of an example none is recognised.

    Args:
        features: ``[n, d]``; distances and references as in ``nearest_labels``.
        seed: Seed of the random reference set.

    Returns:
        Rows of the nearest ``[n]``, -1 where unknown; cosines ``[n]``, NaN there; and whether it is a copy ``[n]``.
    """
    rows = torch.isfinite(features.float().norm(dim=1)).nonzero().squeeze(1)
    near = _Nearest(len(features))
    if len(rows) > 1:
        for chunk, values, places in _nearest(_unit(features[rows]), min(_CROWD, len(rows) - 1), seed):
            near.add(rows[chunk], values, rows[places[:, 0]])
    return near.told(len(rows))


def near_columns(indices: Tensor, found: tuple[Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
    """Return the columns ``NEAR`` of examples with these dataset indices, from what ``nearest_examples`` found."""
    near, cosines, copies = found
    return dict(zip(NEAR, (torch.where(near >= 0, indices.cpu()[near], -1), cosines, copies), strict=True))


class _Nearest:
    """Gathers what ``nearest_examples`` returns of ``n`` examples, from the cosines of their nearest, in order."""

    def __init__(self, n: int) -> None:
        self._found = torch.full((n,), -1, dtype=torch.long)
        self._cosines, self._ratios = torch.full((n,), torch.nan), torch.full((n,), torch.nan)

    def add(self, rows: Tensor, values: Tensor, first: Tensor) -> None:
        at = rows.cpu()
        self._found[at], self._cosines[at] = first.cpu(), values[:, 0].cpu()
        if values.shape[1] >= _CROWD:
            nearest, last = (1 - values[:, [0, _CROWD - 1]]).clamp(min=_ROUNDING).cpu().T
            self._ratios[at] = nearest / last

    def told(self, searched: int) -> tuple[Tensor, Tensor, Tensor]:
        usual = float(self._ratios.nanmedian())
        copies = self._ratios < 0
        if 0 < usual < 1:
            half_dimension = math.log(1 - 0.5 ** (1 / (_CROWD - 1))) / math.log(usual)
            copies = self._ratios < (_FALSE_PAIRS / (_CROWD - 1) / searched) ** (1 / half_dimension)
        return self._found, self._cosines, copies


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
