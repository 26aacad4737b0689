"""What others say about an example's label while the network has not yet learnt it by heart.

Late features carry the given label, right or wrong; those of the first epochs do not yet. Two closed forms read them
without the example's own label: ridge regression that leaves it out, and the votes of its nearest neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_influence.core.indices import Indices
from lightning_influence.core.precision import exact
from lightning_influence.training.class_shares import ClassShares
from lightning_influence.training.example_sums import in_blocks
from lightning_influence.training.neighbours import finite_rows, picked, votes

# Penalties of the ridge, shares of the number of examples; the one with the least error on left-out labels is taken.
_PENALTIES = (1e-3, 1e-2, 1e-1, 1.0)
# A feature that hardly varies is not blown up to unit variance: this share of the largest deviation at least.
_LEAST_DEVIATION = 1e-3
# Epochs that the belief is made of at least; more while the run predicts labels well worse than the others tell them.
_EARLY = 3
# Examples with a label.
_FEWEST = 3
_SUMS = ("first", "early", "late")
# Well worse, in accuracy. Snapshots that are so behind a later one are left out: the network had not begun to learn.
_BEHIND = 0.05
_STATE = ("epochs", "early", "late", "closed", "done", "best", "right", "visits")


def ridge_leave_one_out(features: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Predict each example's label from its features by ridge regression on all the others.

    In closed form from one eigendecomposition ``[d, d]``: with the hat matrix ``H`` of all examples and targets ``Y``,
    the prediction without example ``i`` is ``((H Y)_i - H_ii Y_i) / (1 - H_ii)``.

    Args:
        features: ``[n, d]``, finite; they are standardised.
        labels: ``[n]`` from 0 to below ``classes``.
        classes: Number of classes ``c``.

    Returns:
        ``[n, c]`` float64, each between 0 and 1; rows sum to about 1.
    """
    return torch.cat(list(_left_out(features, labels, classes)))


def _left_out(features: Tensor, labels: Tensor, classes: int) -> Iterator[Tensor]:
    """Yield the predictions of ``ridge_leave_one_out`` block by block, where the labels are."""
    n, device = len(features), labels.device
    mean = features.mean(0)
    spread = exact(features.std(0, correction=0).to(device))
    spread = spread.clamp(min=max(_LEAST_DEVIATION * float(spread.max()), torch.finfo(spread.dtype).tiny))
    frequencies = exact(torch.bincount(labels, minlength=classes)) / n

    def chunks() -> Iterator[tuple[Tensor, Tensor]]:
        for part, given in in_blocks(features, labels):
            yield exact((part - mean).to(device)) / spread, F.one_hot(given, classes).to(frequencies) - frequencies

    gram = sum(x.T @ x for x, _ in chunks())
    eigenvalues, basis = torch.linalg.eigh(gram)
    targets = basis.T @ sum(x.T @ y for x, y in chunks())  # [d, c]

    def left_out(u: Tensor, y: Tensor, penalty: float) -> Tensor:
        inverse = 1 / (eigenvalues.clamp(min=0) + penalty * n)
        leverage = (u.square() @ inverse + 1 / n).unsqueeze(1)
        found: Tensor = ((u * inverse) @ targets - leverage * y) / (1 - leverage).clamp(min=1e-6)
        return found

    errors = [0.0] * len(_PENALTIES)
    for x, y in chunks():
        u = x @ basis  # what takes the time, the same for all penalties
        errors = [e + float((left_out(u, y, p) - y).square().sum()) for e, p in zip(errors, _PENALTIES, strict=True)]
    penalty = _PENALTIES[errors.index(min(errors))]
    for x, y in chunks():
        yield (left_out(x @ basis, y, penalty) + frequencies).clamp(0, 1)


@dataclass(frozen=True, eq=False)
class LabelEvidence:
    """What is known of the labels of some examples, without their own: shares by class, ``[n, c]``.

    Attributes:
        first: Mean of ridge and votes, before training and after its first epoch; rows sum to 1, or to 0 where an
            example turned up later.
        early: The same over the snapshots of the first epochs.
        late: The same over all snapshots until the run knew the labels by heart.
        trained: Mean predicted probabilities over the run plus the mean votes.
    """

    first: ClassShares
    early: ClassShares
    late: ClassShares
    trained: ClassShares


class EvidenceRecord:
    """Sums of what ridge and neighbours say, over the snapshots of a run; the features are not kept.

    Args:
        size: Number of examples of the data set.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._sums = {name: ClassShares(size) for name in _SUMS}
        # Epochs looked at for `early`, snapshots in two of the sums, whether another would tell nothing, whether
        # `early` is complete, accuracy of its best snapshot, and what training had predicted by the last one.
        self._state = dict.fromkeys(_STATE, 0.0)

    @property
    def classes(self) -> int:
        """How many there are, as labels name them."""
        return max(shares.classes for shares in self._sums.values())

    @property
    def closed(self) -> bool:
        """Whether another snapshot would tell nothing."""
        return bool(self._state["closed"])

    @property
    def complete(self) -> bool:
        """Whether there are enough snapshots, so that none is worth a pass of its own."""
        return self.closed or bool(self._state["done"])

    def end_early(self) -> None:
        """Take further snapshots for late ones."""
        self._state["done"] = 1.0

    def close(self) -> None:
        """Take no more snapshots."""
        self._state["closed"] = 1.0

    def add(
        self,
        indices: Tensor,
        features: Tensor,
        labels: Tensor,
        nearest: Tensor,
        *,
        trained: bool,
        right: tuple[float, float] | None = None,
    ) -> None:
        """Add a snapshot.

        Args:
            indices: Dataset indices ``[n]``.
            features: Penultimate features ``[n, d]``.
            labels: ``[n]`` integers, negative if unknown.
            nearest: Labels of their neighbours, see ``nearest_labels``.
            trained: Whether a step has been trained before.
            right: Visits so far whose label training has predicted rightly, and all visits. Once their share, since
                the last snapshot, is more than the others can tell, labels are learnt by heart, and features say what
                they were told.
        """
        usable = ((labels >= 0) & finite_rows(features).to(labels.device)).nonzero().squeeze(1)
        indices, features, labels, nearest = (picked(each, usable) for each in (indices, features, labels, nearest))
        rows = indices.cpu()
        classes = max(self.classes, 1 + int(labels.max()) if len(labels) else 0)
        if self.closed or len(rows) < _FEWEST:
            return
        state, as_seen = self._state, self._as_seen(right)
        both, right_ones = ClassShares(len(rows)), torch.zeros(3, dtype=torch.long)
        parts = in_blocks(rows, labels, nearest, torch.arange(len(rows)))
        for ridge, (at, given, near, places) in zip(_left_out(features, labels, classes), parts, strict=True):
            share, near = ridge.cpu(), votes(near, classes).cpu()
            if not state["late"]:
                self._sums["first"].add(at, share + near)
            mean = (share / share.sum(1, keepdim=True).clamp(min=1e-12) + near) / 2
            right_ones += torch.stack([(given.cpu() == says.argmax(1)).sum() for says in (share, near, mean)])
            both.add(places, mean)
        by_ridge, by_votes, by_both = (right_ones.double() / len(rows)).tolist()
        if not trained:
            return
        if as_seen > max(by_ridge, by_votes) and state["late"]:
            self.close()
            return
        self._sums["late"].add_table(rows, both)
        state["late"] += 1
        if not state["done"]:
            self._add_early(rows, both, by_both)
            state["done"] = float(state["epochs"] >= _EARLY and not as_seen < by_both - _BEHIND)

    def _add_early(self, rows: Tensor, both: ClassShares, told: float) -> None:
        state = self._state
        state["epochs"] += 1
        if told > state["best"] + _BEHIND:
            self._sums["early"], state["early"] = ClassShares(self.size), 0.0
        if told >= state["best"] - _BEHIND:
            self._sums["early"].add_table(rows, both)
            state["early"] += 1
        state["best"] = max(state["best"], told)

    def _as_seen(self, right: tuple[float, float] | None) -> float:
        """Return the share of predictions since the last snapshot that were right; NaN if nothing is known of it."""
        if right is None:
            return float("nan")
        before = self._state["right"], self._state["visits"]
        self._state["right"], self._state["visits"] = right
        return (right[0] - before[0]) / (right[1] - before[1]) if right[1] > before[1] else float("nan")

    def about(self, indices: Indices, trained: ClassShares | None) -> LabelEvidence | None:
        """Return the evidence on the labels of some examples; None before a step was trained.

        Args:
            indices: Dataset indices ``[n]``.
            trained: Mean probabilities and votes of the same classes, if the run has kept them.
        """
        if not self._state["late"]:
            return None
        rows = torch.as_tensor(indices, dtype=torch.long)
        found = {name: value.some(rows) for name, value in self._sums.items()}
        for shares in found.values():  # an example that turned up later was in fewer snapshots
            shares.divide(shares.totals().clamp(min=1e-12))
        found["trained"] = ClassShares(len(rows)) if trained is None else trained
        for shares in found.values():
            shares.have(self.classes)
        return LabelEvidence(**found)

    def grow(self, size: int) -> None:
        """Have room for more examples."""
        self.size = size
        for shares in self._sums.values():
            shares.grow(size)

    def state_dict(self) -> dict[str, Tensor]:
        """Return tensors only, for a Lightning checkpoint; ``late`` is not among them as long as it is ``early``."""
        state = torch.tensor([self._state[name] for name in _STATE], dtype=torch.float64)
        parts = {name: shares.state_dict(name) for name, shares in self._sums.items()}
        early, late = (list(parts[name].values()) for name in ("early", "late"))
        if len(early) == len(late) and all(map(torch.equal, early, late)):
            del parts["late"]
        return {"state": state} | {name: value for part in parts.values() for name, value in part.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a checkpoint."""
        for name, shares in self._sums.items():
            shares.load_state_dict(name if name in state else "early", state)
        self._state = dict(zip(_STATE, state["state"].tolist(), strict=True))
