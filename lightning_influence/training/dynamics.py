"""Training dynamics: what the run itself says about each example, read off the training pass without a pass of its own.

Per example, over the times it was trained on: mean and variance of the loss, AUM (mean margin between the logit of
the given label and the largest other; Pleiss et al. 2020, 2001.10528), EL2N (distance between predicted and given
distribution; Paul et al. 2021, 2107.07075), how often it was predicted wrong, forgetting events (right, then wrong;
Toneva et al. 2019, 1812.05159), and the margin of the mean predicted probabilities.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_influence.core import distributed
from lightning_influence.core.layout import BatchLayout
from lightning_influence.objective.losses import LossCall
from lightning_influence.training.batch_record import BatchRecord
from lightning_influence.training.class_shares import ClassShares, largest
from lightning_influence.training.example_sums import ExampleSums, in_blocks

# Logits up to this many scalars wait for those of other batches: each call costs more than its arithmetic.
_SMALL = 2**16

RIVAL = "rival"
"""In one number: the likeliest class but the given one, and after the point how likely the last visit found it."""

_PROBABILITIES = "probabilities"
_CLASSES = "classes"  # of the probabilities, where they are not those of all

_Statistics: TypeAlias = Mapping[str, Tensor]


class TrainingDynamics:
    """Sums over the visits of every example.

    Args:
        size: Number of examples of the data set.

    Attributes:
        sums: The sums; ``label``, ``last_wrong`` and ``rival`` are the state at the last visit.
        probabilities: Sums of the predicted probabilities; with several processes, of all of them on rank zero.
        checks_labels: Whether batches whose examples had other labels before are left out.
        contradicted_batches: Their number.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.sums = ExampleSums(
            size,
            last={"label": -1.0, "last_wrong": 1.0, RIVAL: -1.0},
            visits="times_seen",
            whole=("nonfinite", "forgetting", "label"),
        )
        self.probabilities = ClassShares(size)
        # Batches wait on their device: copying each one at once would make a GPU wait in every step.
        self._waiting: list[tuple[BatchRecord, _Statistics]] = []
        self._rows: list[tuple[BatchRecord, Tensor, Tensor]] = []  # logits and labels of calls that are like this one:
        self._like: LossCall | None = None
        self.checks_labels = True
        self.contradicted_batches = 0

    def record_call(self, batch: BatchRecord, call: LossCall) -> None:
        """File one training batch by its loss call, see ``record``.

        Small logits of plain class decisions are copied, and what they say is computed for many batches at once.
        """
        n = len(batch.indices or ())
        if not (alone := call.single_rows(n)) or call.input.numel() > _SMALL:
            with torch.no_grad():
                self.record(batch, (replace(call, layout=BatchLayout()) if alone else call).statistics(n))
        else:
            if self._waiting or (self._like is not None and not self._like.alike(call)):
                self.flush()
            if self._like is None:
                self._like = call.copied()
            # Copies, as what follows in the step may overwrite them.
            self._rows.append((batch, call.input.detach().clone(), call.target.clone()))

    def record(self, batch: BatchRecord, statistics: _Statistics) -> None:
        """File one training batch.

        Args:
            batch: Of ``n`` examples; repeats (padding) count once.
            statistics: ``LossCall.statistics(n)``.

        Raises:
            ValueError: If the numbers of indices and examples differ.
        """
        n, known = statistics["loss"].shape[0], len(batch.indices or ())
        if known != n:
            raise ValueError(f"{n} examples in the batch, but {known} dataset indices were recorded for it.")
        if self._rows:
            self.flush()
        self._waiting.append((batch, self._as_kept(statistics)))

    def _as_kept(self, statistics: _Statistics) -> _Statistics:
        """Return what a batch tells; of many classes, what is kept of them: the rest need not wait, nor travel."""
        found = dict(statistics)
        if "probabilities" in found and RIVAL not in found:  # of a batch that has waited it is known
            found[RIVAL] = _rivals(found["probabilities"], found["label"])
            self.probabilities.have(found["probabilities"].shape[1])
            if self.probabilities.largest_alone:
                found["probabilities"], found[_CLASSES] = largest(found["probabilities"])
        return found

    def flush(self) -> None:
        """Add the waiting batches to the sums."""
        waiting, self._waiting = self._waiting, []
        rows, self._rows = self._rows, []
        like, self._like = self._like, None
        for batch, statistics in waiting:
            self._file([batch], statistics)
        if like is not None:
            batches, *parts = zip(*rows, strict=True)
            logits, labels = map(torch.cat, parts)
            call = replace(like, input=logits, target=labels, layout=BatchLayout())
            self._file(batches, call.statistics(len(logits)))

    def _file(self, batches: Sequence[BatchRecord], statistics: _Statistics) -> None:
        """Add batches that lie end to end, in turn where one has examples of another."""
        of = np.repeat(np.arange(len(batches)), [len(batch.indices or ()) for batch in batches])
        indices = np.fromiter(chain.from_iterable(batch.indices or () for batch in batches), np.int64)
        found: _Statistics = {name: value.cpu() for name, value in self._as_kept(statistics).items()}
        for places in _rounds(indices, of):
            rows, taken = torch.from_numpy(indices), found
            if len(places) < len(indices):
                rows, taken = _rows(rows, taken, torch.from_numpy(places))
            if self.checks_labels and "label" in taken and "label" in self.sums:
                rows, taken = self._uncontradicted(rows, taken, batches, of[places])
            self._add(rows, taken)

    def _uncontradicted(
        self, rows: Tensor, taken: _Statistics, batches: Sequence[BatchRecord], of: NDArray[np.int64]
    ) -> tuple[Tensor, _Statistics]:
        """Leave out batches with examples that had another label before: they hold others than it seems."""
        before, label = self.sums["label"][rows], taken["label"]
        differs = (before >= 0) & (label >= 0) & (before != label)
        if not differs.any():
            return rows, taken
        wrong = np.unique(of[differs.numpy()])
        self.contradicted_batches += len(wrong)
        for k in wrong:
            batches[k].contradicted = True
        return _kept(rows, taken, torch.from_numpy(~np.isin(of, wrong)))

    def relabelled(self, indices: Tensor, labels: Tensor) -> list[int]:
        """Return the examples that had another label in training than when they were fetched again: it was not they.

        Args:
            indices: Dataset indices ``[n]``.
            labels: When they were fetched, ``[n]``; negative ones are unknown.
        """
        if not self.checks_labels or "label" not in self.sums:
            return []
        trained = self.sums["label"][indices]
        found: list[int] = indices[(trained >= 0) & (labels >= 0) & (trained != labels)].tolist()
        return found

    def _add(self, rows: Tensor, taken: _Statistics) -> None:
        if "label" in taken:  # an ignored label leaves nothing to record, and nothing wrong with the example
            rows, taken = _kept(rows, taken, taken["label"] >= 0)
        finite = torch.isfinite(taken["loss"])
        sums = self.sums
        sums.add("nonfinite", rows, ~finite)
        rows, taken = _kept(rows, taken, finite)
        sums.add("times_seen", rows, torch.ones(len(rows)))
        for name in ("loss", "worst", "margin", "el2n", "wrong", "probability"):
            if name in taken:
                sums.add(name, rows, taken[name])
        if "probabilities" in taken:
            self.probabilities.add(rows, taken["probabilities"], taken.get(_CLASSES))
        sums.add("loss_squared", rows, taken["loss"].double().square())
        if "wrong" in taken:
            before = sums.put("last_wrong", rows, taken["wrong"])
            sums.add("forgetting", rows, (before < 0.5) & (taken["wrong"].double() >= 0.5))
        for name in ("label", RIVAL):
            if name in taken:
                sums.put(name, rows, taken[name])

    def grow(self, size: int) -> None:
        """Have room for more examples."""
        self.size = size
        self.sums.grow(size)
        self.probabilities.grow(size)

    def columns(self, rows: Tensor | None = None) -> dict[str, Tensor]:
        """Return one column per score; NaN (or -1) for examples that were never trained on.

        Args:
            rows: Of ``n`` examples; all by default.
        """
        self.flush()
        if "times_seen" not in self.sums:
            return {}
        sums, at = self.sums, torch.arange(self.size) if rows is None else rows
        seen = sums["times_seen"][at]
        count = torch.where(seen > 0, seen.double(), torch.nan)
        mean = sums["loss"][at] / count
        result = {
            "times_seen": seen.long(),
            "loss_mean": mean,
            "loss_variance": (sums["loss_squared"][at] / count - mean.square()).clamp(min=0),
        }
        for name, column in (("worst", "loss_worst"), ("margin", "aum"), ("el2n", "el2n")):
            if name in sums:
                result[column] = sums[name][at] / count
        if "wrong" in sums:
            result["epochs_wrong"] = torch.where(seen > 0, sums["wrong"][at], torch.nan)
            result["forgetting"] = torch.where(seen > 0, sums["forgetting"][at].double(), torch.nan)
        if "label" in sums:
            result["label"] = sums["label"][at].long()
        if self.probabilities.classes:
            known = torch.where(seen > 0, result["label"], -1)
            result["prob_margin"] = torch.cat([self._margin(some, given) for some, given in in_blocks(at, known)])
        return result

    def _margin(self, rows: Tensor, labels: Tensor) -> Tensor:
        probabilities = self.mean_probabilities(rows)
        assert probabilities is not None
        return margin_of_label(probabilities, labels)[0]

    def predicted_rightly(self) -> tuple[float, float] | None:
        """Return how many visits so far were of examples that were predicted rightly, and of how many."""
        if "wrong" not in self.sums:
            return None
        visits = float(self.sums["times_seen"].sum())
        return visits - float(self.sums["wrong"].sum()), visits

    def mean_probabilities(self, rows: Tensor) -> Tensor | None:
        """Return the mean predicted probabilities over the visits of ``n`` examples; NaN without one.

        ``[n, c]`` float64, eight bytes for each class: ask for some rows at a time. None if there are no classes.
        """
        if not self.probabilities.classes:
            return None
        seen = self.sums["times_seen"][rows]
        return self.probabilities[rows].double() / torch.where(seen > 0, seen.double(), torch.nan).unsqueeze(1)

    def state_dict(self) -> dict[str, Tensor]:
        """Return tensors only, for a Lightning checkpoint."""
        self.flush()
        return self.sums.state_dict() | self.probabilities.state_dict(_PROBABILITIES)

    def load_state_dict(self, state: _Statistics) -> None:
        """Go on from a checkpoint."""
        shares = {name: value for name, value in state.items() if name.startswith(_PROBABILITIES)}
        self.sums.load_state_dict({name: value for name, value in state.items() if name not in shares})
        self.probabilities.load_state_dict(_PROBABILITIES, shares if distributed.rank() == 0 else {})
        self._waiting, self._rows, self._like = [], [], None


def margin_of_label(shares: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return how far shares by class ``[n, c]`` are for the given labels ``[n]``, and the best of the other classes.

    NaN and -1 where the label or the shares are unknown, or there is but one class.
    """
    if shares.shape[1] < 2:
        return torch.full((len(shares),), torch.nan, dtype=shares.dtype), torch.full_like(labels, -1)
    own = labels.clamp(min=0).unsqueeze(1)
    others, best = shares.scatter(1, own, -torch.inf).max(1)
    margin = shares.gather(1, own).squeeze(1) - others
    known = (labels >= 0) & margin.isfinite()
    return torch.where(known, margin, torch.nan), torch.where(known, best, -1)


def _rivals(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Return the likeliest class but the given one plus its probability, below 1, ``[n]`` float32; -1 for none."""
    if probabilities.shape[1] < 2:
        return torch.full_like(labels, -1, dtype=torch.float32)
    others = probabilities.float().scatter(1, labels.clamp(min=0).unsqueeze(1), -1.0)
    probability, rival = others.max(1)
    below = torch.nextafter((rival + 1).float(), probability.new_zeros(()))
    return torch.minimum(rival + probability, below)


def _rounds(indices: NDArray[np.int64], of: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    """Yield the places of examples to be added at once: none comes twice, as what it was before has to be known then.

    Args:
        indices: Of the examples of batches that lie end to end.
        of: Number of the batch of each; of examples that a batch repeats, the first is taken.
    """
    order = np.argsort(indices, kind="stable")
    again = np.flatnonzero(indices[order][1:] == indices[order][:-1])
    before = np.full(len(indices), -1)  # batch that had the example before
    before[order[again + 1]] = of[order[again]]
    places = np.flatnonzero(before < of)
    latest = np.full(of.max(initial=-1) + 1, -1)  # by batch: the last one before it that had one of its examples
    np.maximum.at(latest, of[places], before[places])
    starts = [0]
    for batch, other in enumerate(latest):
        if other >= starts[-1]:
            starts.append(batch)
    yield from np.split(places, np.searchsorted(of[places], starts[1:]))


def _rows(rows: Tensor, taken: _Statistics, which: Tensor) -> tuple[Tensor, _Statistics]:
    return rows[which], {name: value[which] for name, value in taken.items()}


def _kept(rows: Tensor, taken: _Statistics, keep: Tensor) -> tuple[Tensor, _Statistics]:
    """Leave rows out, if there are any to be left out: else nothing has to be copied."""
    return (rows, taken) if bool(keep.all()) else _rows(rows, taken, keep)
