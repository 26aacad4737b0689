"""What an example's neighbours say about its label."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_influence.training.class_shares import ClassShares
from lightning_influence.training.example_sums import in_blocks, lengthened, narrowed

# Neighbours are looked for among at most so many examples: the cost then grows with N, not with N².
_MAX_REFERENCES = 10_000
_CHUNK_ELEMENTS = 2**20
# The nearest is compared with this one of the nearest; copies by chance that are expected in a data set.
_CROWD, _FALSE_PAIRS = 6, 0.1
_ROUNDING = 2e-7  # of cosines in float32
_STATE = ("disagreement", "passes")


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
        ``[n, k]`` int32 where the labels are, nearest first, with ``k`` at most ``neighbours``; -1 for unknown labels
        and features without finite squares.
    """
    rows = ((labels >= 0) & finite_rows(features).to(labels.device)).nonzero().squeeze(1)
    if len(rows) < 2:
        return labels.new_full((len(labels), 0), -1, dtype=torch.int32)
    own = labels[rows].int()
    k = min(neighbours, len(rows) - 1, _MAX_REFERENCES - 1)
    result = own.new_full((len(labels), k), -1)
    for chunk, _, places in _nearest(picked(features, rows), k, seed, labels.device):
        result[rows[chunk]] = own[places]
    return result


def finite_rows(features: Tensor) -> Tensor:
    """Return which rows ``[n]`` have finite squares: of a huge vector, whose squares overflow, there are no cosines."""
    return torch.isfinite(features.float().norm(dim=1))


def picked(features: Tensor, rows: Tensor) -> Tensor:
    """Return distinct sorted rows of a table; all of them are not copied: features are what takes memory."""
    return features if len(rows) == len(features) else features[rows.to(features.device)]


def _nearest(features: Tensor, k: int, seed: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield some rows, and of their ``k`` nearest among the references the cosines and rows, the nearest first."""
    features = features.float()
    n, mean = len(features), features.mean(0)
    generator = torch.Generator().manual_seed(seed)
    references = torch.randperm(n, generator=generator)[:_MAX_REFERENCES].sort().values

    def unit(part: Tensor) -> Tensor:
        centred = (part - mean).to(device)
        return centred.div_(centred.norm(dim=1, keepdim=True).clamp(min=1e-12))

    among, references = unit(features[references.to(features.device)]), references.to(device)
    step = max(1, _CHUNK_ELEMENTS // len(references))
    room = among.new_empty(min(step, n), len(references))
    for start in range(0, n, step):
        chunk = torch.arange(start, min(start + step, n), device=device)
        cosines = torch.mm(unit(features[start : start + step]), among.T, out=room[: len(chunk)])
        place = torch.searchsorted(references, chunk).clamp_(max=len(references) - 1)
        itself = references[place] == chunk
        cosines[itself.nonzero().squeeze(1), place[itself]] = -torch.inf
        found = cosines.topk(k, 1)
        yield chunk, found.values, references[found.indices]


def nearest_examples(
    features: Tensor, *, seed: int = 0, device: torch.device | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return each example's nearest other example by features, how near it is, and which are likely copies.

    A copy is far nearer than the sixth nearest. How much nearer the nearest is by chance follows from the dimension of
    the features: with ``d`` of them that count, the ratio of both squared distances to the power ``d / 2`` has the
    distribution Beta(1, 5). ``d`` is read off the median ratio, and so few ratios are taken for copies that one false
    pair is expected in ten data sets. Of more than five copies of an example none is recognised.

    Args:
        features: ``[n, d]``; distances and references as in ``nearest_labels``.
        seed: Seed of the random reference set.
        device: Where distances are computed, a part of the features at a time; by default where these are.

    Returns:
        Rows of the nearest ``[n]``, -1 where unknown; cosines ``[n]``, NaN there; and whether it is a copy ``[n]``.
    """
    n = len(features)
    found = torch.full((n,), -1, dtype=torch.long)
    cosines, ratios = torch.full((n,), torch.nan), torch.full((n,), torch.nan)
    rows = finite_rows(features).nonzero().squeeze(1)
    if len(rows) < 2:
        return found, cosines, ratios < 0
    rows, own = rows.cpu(), picked(features, rows)
    for chunk, values, places in _nearest(own, min(_CROWD, len(rows) - 1), seed, device or features.device):
        at = rows[chunk.cpu()]
        found[at], cosines[at] = rows[places[:, 0].cpu()], values[:, 0].cpu()
        distances = (1 - values).clamp(min=_ROUNDING)
        ratios[at] = (distances[:, 0] / distances[:, -1]).cpu() if values.shape[1] == _CROWD else torch.nan
    usual = float(ratios.nanmedian())
    if not 0 < usual < 1:
        return found, cosines, ratios < 0
    half_dimension = math.log(1 - 0.5 ** (1 / (_CROWD - 1))) / math.log(usual)
    return found, cosines, ratios < (_FALSE_PAIRS / (_CROWD - 1) / len(rows)) ** (1 / half_dimension)


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
    shares = torch.cat([(a != b.unsqueeze(1)).float().mean(1) for a, b in in_blocks(nearest, labels)])
    return shares.masked_fill(nearest[:, 0] < 0, torch.nan)


def votes(nearest: Tensor, classes: int) -> Tensor:
    """Return the share of each class among the nearest neighbours, ``[n, classes]``.

    Args:
        nearest: Labels ``[n, k]``, see ``nearest_labels``; none of them unknown.
        classes: Number of classes.
    """
    result = torch.zeros(len(nearest), classes, device=nearest.device)
    for counted, near in in_blocks(result, nearest):
        counted.scatter_add_(1, near.long(), torch.full_like(near, 1 / max(near.shape[1], 1), dtype=result.dtype))
    return result


class NeighbourRecord:
    """What the neighbours of every example have said over a run, at every pass that looked for them.

    Args:
        size: Number of examples of the data set.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._disagreement = torch.zeros(size, dtype=torch.float64)
        self._passes = torch.zeros(size, dtype=torch.int32)
        self._votes = ClassShares(size)

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
        nearest = picked(nearest.cpu(), known.nonzero().squeeze(1))
        classes = max(self._votes.classes, 1 + int(nearest.max()))
        for at, near in in_blocks(rows, nearest):
            self._votes.add(at, votes(near, classes))

    @property
    def disagreement(self) -> Tensor | None:
        """Mean share of neighbours with another label, ``[size]``, NaN where unknown; None before the first pass."""
        return self._disagreement / self._passes if bool(self._passes.any()) else None

    def votes(self, classes: int, rows: Tensor) -> Tensor:
        """Return the mean share of neighbours of each class, ``[n, classes]`` of ``n`` rows; zeros where unknown."""
        kept = self._votes[rows][:, :classes].double() / self._passes[rows].clamp(min=1).unsqueeze(1)
        return F.pad(kept, (0, classes - kept.shape[1]))

    def grow(self, size: int) -> None:
        """Have room for more examples."""
        self.size = size
        self._disagreement, self._passes = (lengthened(column, size) for column in (self._disagreement, self._passes))
        self._votes.grow(size)

    def state_dict(self) -> dict[str, Tensor]:
        """Return tensors only, for a Lightning checkpoint."""
        columns = dict(zip(_STATE, map(narrowed, (self._disagreement, self._passes)), strict=True))
        return columns | self._votes.state_dict("votes")

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a checkpoint."""
        self._disagreement, self._passes = (
            state[name].to(own.dtype, copy=True)
            for name, own in zip(_STATE, (self._disagreement, self._passes), strict=True)
        )
        self._votes.load_state_dict("votes", state)
