"""Training dynamics: what the run itself says about each example, read off the training pass without a pass of its own.

Per example, over the times it was trained on: mean and variance of the loss, AUM (mean margin between the logit of
the given label and the largest other; Pleiss et al. 2020, 2001.10528), EL2N (distance between predicted and given
distribution; Paul et al. 2021, 2107.07075), how often it was predicted wrong, forgetting events (right, then wrong;
Toneva et al. 2019, 1812.05159), and the margin of the mean predicted probabilities.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_influence.core import distributed
from lightning_influence.core.layout import BatchLayout
from lightning_influence.objective.losses import LossCall

# Logits up to this many scalars wait for those of other batches: each call costs more than its arithmetic.
_SMALL = 2**16
# Mean probabilities are kept up to this many scalars (400 MB); beyond, their columns are left out.
_PROBABILITY_BUDGET = 10**8
_FLUSH_EVERY = 64
# Not sums, but the state at the last visit, and what it is before the first.
_STATES = {"label": -1.0, "last_wrong": 1.0}
_REMEMBERED = 256
# What a trainer does to a loss: it is divided, or scaled.
_FACTORS = ("DivBackward0", "MulBackward0")
_REDUCTIONS = ("none", "mean", "sum")
_PICKING = ("IndexBackward0", "IndexSelectBackward0", "MaskedSelectBackward0", "PackPaddedSequenceBackward0")
# Operations with several inputs, and the one of them that has the rows.
_ROWS_IN = {"AddmmBackward0": 1}


class TrainingDynamics:
    """Sums over the visits of every example.

    Args:
        size: Number of examples of the data set.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.sums: dict[str, Tensor] = {}
        # What all processes knew when they last told each other; the rest of the sums is this process's own.
        self._common: dict[str, Tensor] = {}
        # Batches wait on their device, either here or there: copying each one at once would make a GPU wait in every
        # step, and each call costs more than its arithmetic.
        self._waiting: list[tuple[Sequence[int], dict[str, Tensor]]] = []
        self._rows: list[tuple[Sequence[int], Tensor, Tensor]] = []  # logits and labels
        self._like: LossCall | None = None  # the call that the rows are alike
        self._first: NDArray[np.int64] | None = None  # scratch space of `_rounds`
        self.checks_labels = True
        self.contradicted_batches = 0
        # The last of them; tuples are the very ones that were handed in.
        self.contradicted: deque[Sequence[int]] = deque(maxlen=_REMEMBERED)

    def record_call(self, indices: Sequence[int], call: LossCall) -> None:
        """File one training batch by its loss call, see ``record``.

        Small logits of plain class decisions are copied, and what they say is computed for many batches at once.
        """
        n = len(indices)
        if call.single_rows(n):
            self.record_rows(indices, call)
        else:
            self.record(indices, call.statistics(n))

    def record_rows(self, indices: Sequence[int], call: LossCall) -> None:
        """File one training batch by a loss call with a row per example, see ``LossCall.single_rows``."""
        if call.input.numel() > _SMALL:
            self.record(indices, replace(call, layout=BatchLayout()).statistics(len(indices)))
            return
        if self._waiting or self._like is None or not self._like.alike(call):
            self.flush()
            self._like = call.copied()
        # What follows in the step may overwrite them.
        self._rows.append((tuple(indices), call.input.detach().clone(), call.target.clone()))
        if len(self._rows) >= _FLUSH_EVERY:
            self.flush()

    def record(self, indices: Sequence[int], statistics: Mapping[str, Tensor]) -> None:
        """File one training batch.

        Args:
            indices: Dataset indices of its ``n`` examples; repeats (padding) count once.
            statistics: ``LossCall.statistics(n)``.

        Raises:
            ValueError: If the numbers of indices and examples differ.
        """
        n = statistics["loss"].shape[0]
        if len(indices) != n:
            raise ValueError(f"{n} examples in the batch, but {len(indices)} dataset indices were recorded for it.")
        if self._rows:
            self.flush()
        self._waiting.append((tuple(indices), self._within_budget(statistics)))
        if len(self._waiting) >= _FLUSH_EVERY:
            self.flush()

    def _within_budget(self, statistics: Mapping[str, Tensor]) -> dict[str, Tensor]:
        statistics = dict(statistics)
        if "probabilities" in statistics and self.size * statistics["probabilities"].shape[1] > _PROBABILITY_BUDGET:
            del statistics["probabilities"]
        return statistics

    def flush(self) -> None:
        """Add the waiting batches to the sums."""
        waiting, self._waiting = self._waiting, []
        rows, self._rows = self._rows, []
        for indices, statistics in waiting:
            self._file([indices], statistics)
        if rows and self._like is not None:
            batches, logits, labels = zip(*rows, strict=True)
            call = replace(self._like, input=torch.cat(logits), target=torch.cat(labels), layout=BatchLayout())
            self._file(batches, self._within_budget(call.statistics(sum(map(len, batches)))))

    def _file(self, batches: Sequence[Sequence[int]], statistics: Mapping[str, Tensor]) -> None:
        """Add batches that lie end to end, in turn where one has examples of another."""
        indices = np.fromiter(chain.from_iterable(batches), np.int64)
        indices[indices < 0] += self.size
        found = {name: value.cpu() for name, value in statistics.items()}
        sizes = list(map(len, batches))
        for rows, taken in self._rounds(indices, sizes):
            own, values = torch.from_numpy(indices[taken]), {name: value[rows] for name, value in found.items()}
            if self.checks_labels and "label" in values:
                own, values = self._uncontradicted(own, values, batches, np.repeat(np.arange(len(sizes)), sizes)[taken])
            self._add(own, values)

    def _uncontradicted(
        self, rows: Tensor, taken: dict[str, Tensor], batches: Sequence[Sequence[int]], of: NDArray[np.int64]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Leave out batches with examples that had another label before: they hold others than it seems."""
        if "label" not in self.sums:
            return rows, taken
        before, label = self.sums["label"][rows], taken["label"]
        differs = (before >= 0) & (label >= 0) & (before != label)
        if not bool(differs.any()):
            return rows, taken
        wrong = np.unique(of[differs.numpy()])
        self.contradicted_batches += len(wrong)
        self.contradicted.extend(batches[k] for k in wrong)
        return _rows(rows, taken, torch.from_numpy(~np.isin(of, wrong)))

    def _rounds(self, indices: NDArray[np.int64], sizes: Sequence[int]) -> Iterator[tuple[slice | Tensor, Any]]:
        """Lay batches end to end, as long as no example comes again: whether it was right before has to be known then.

        Args:
            indices: Of the examples of all batches.
            sizes: Of the batches.

        Yields:
            What to take, as an index of tensors and of arrays; of examples that a batch repeats, the first.
        """
        if self._first is None:
            self._first = np.empty(self.size, np.int64)
        places, ends = np.arange(len(indices)), np.cumsum(sizes)
        start, stop = 0, len(indices)
        while start < stop:
            left = indices[start:]
            self._first[left[::-1]] = places[start:][::-1]  # backwards: the first one stays
            first = self._first[left]
            again = np.flatnonzero(first != places[start:])
            end, repeats = stop, again[:0]
            if len(again):
                batch, own = (np.searchsorted(ends, where, "right") for where in (first[again], again + start))
                others = np.flatnonzero(batch != own)
                if len(others):
                    end = int(ends[own[others[0]] - 1])
                repeats = again[again + start < end]
            if len(repeats):
                kept = np.delete(places[start:end], repeats)
                yield torch.from_numpy(kept), kept
            else:
                yield slice(start, end), slice(start, end)
            start = end

    def _add(self, rows: Tensor, taken: dict[str, Tensor]) -> None:
        if "label" in taken:  # an ignored label leaves nothing to record, and nothing wrong with the example
            rows, taken = _kept(rows, taken, taken["label"] >= 0)
        finite = torch.isfinite(taken["loss"])
        self._sum("nonfinite", rows, (~finite).double())
        rows, taken = _kept(rows, taken, finite)
        self._sum("times_seen", rows, torch.ones(len(rows), dtype=torch.float64))
        for name in ("loss", "margin", "el2n", "wrong"):
            if name in taken:
                self._sum(name, rows, taken[name].double())
        self._sum("loss_squared", rows, taken["loss"].double().square())
        if "wrong" in taken:
            wrong = taken["wrong"].double()
            before = self._column("last_wrong", 1.0)
            self._sum("forgetting", rows, ((before.index_select(0, rows) < 0.5) & (wrong >= 0.5)).double())
            before.index_copy_(0, rows, wrong)
        if "label" in taken:
            self._column("label", -1.0).index_copy_(0, rows, taken["label"].double())
        if "probabilities" in taken:
            if "probabilities" not in self.sums:
                self.sums["probabilities"] = torch.zeros(self.size, taken["probabilities"].shape[1])
            self.sums["probabilities"].index_add_(0, rows, taken["probabilities"].float())

    def addends(self) -> list[Tensor]:
        """Return what is to be summed over the processes, each of which has seen its own part of the batches."""
        self.flush()
        # A process without records must not stay away from the collective: all raise then, instead of waiting.
        seen = self.sums.get("times_seen", torch.zeros(self.size, dtype=torch.float64))
        visited = (seen > self._common.get("times_seen", 0.0)).double()
        # States at the last visit are taken from who has visited the example since.
        return [
            value * visited if name in _STATES else value - self._common.get(name, 0.0)
            for name, value in sorted(self.sums.items())
        ] + [visited]

    def take(self, totals: Sequence[Tensor]) -> None:
        """Take over what all processes have seen: the sums of their ``addends``."""
        visitors = totals[-1]
        for name, total in zip(sorted(self.sums), totals, strict=False):
            before = self._common.get(name, torch.full_like(total, _STATES.get(name, 0.0)))
            last = total / visitors.clamp(min=1) if name in _STATES else before + total
            self.sums[name] = torch.where(visitors > 0, last, before) if name in _STATES else last
        self._common = {name: value.clone() for name, value in self.sums.items()}

    def gathered(self) -> TrainingDynamics:
        """Let every process know what all have seen, and return that; to be called by all of them."""
        if distributed.world_size() > 1:
            self.take(distributed.sum_across_processes(self.addends()))
        return self

    def columns(self) -> dict[str, Tensor]:
        """Return one column per score, ``[size]``; NaN (or -1) for examples that were never trained on."""
        self.flush()
        if "times_seen" not in self.sums:
            return {}
        seen = self.sums["times_seen"]
        count = torch.where(seen > 0, seen, torch.nan)
        mean = self.sums["loss"] / count
        result = {
            "times_seen": seen.long(),
            "loss_mean": mean,
            "loss_variance": (self.sums["loss_squared"] / count - mean.square()).clamp(min=0),
        }
        for name, column in (("margin", "aum"), ("el2n", "el2n")):
            if name in self.sums:
                result[column] = self.sums[name] / count
        if "wrong" in self.sums:
            result["epochs_wrong"] = torch.where(seen > 0, self.sums["wrong"], torch.nan)
            result["forgetting"] = torch.where(seen > 0, self.sums["forgetting"], torch.nan)
        if "label" in self.sums:
            result["label"] = self.sums["label"].long()
        if (probabilities := self.mean_probabilities()) is not None:
            margin, suggested = self._mean_probability_margin(probabilities, count)
            result |= {"prob_margin": margin, "suggested": suggested}
        return result

    def mean_probabilities(self) -> Tensor | None:
        """Return the mean predicted probabilities over the visits, ``[size, c]``; NaN without one, None if not kept."""
        if "probabilities" not in self.sums:
            return None
        seen = self.sums["times_seen"]
        return self.sums["probabilities"].double() / torch.where(seen > 0, seen, torch.nan).unsqueeze(1)

    def _mean_probability_margin(self, probabilities: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        """Margin of the given label in the mean probabilities, and the class with the largest of them."""
        label = self.sums["label"].long()
        own = label.clamp(min=0).unsqueeze(1)
        others = probabilities.scatter(1, own, -torch.inf).amax(1)
        margin = probabilities.gather(1, own).squeeze(1) - others
        known = (label >= 0) & torch.isfinite(count)
        return torch.where(known, margin, torch.nan), torch.where(known, probabilities.nan_to_num().argmax(1), -1)

    def state_dict(self) -> dict[str, Tensor]:
        """Return tensors only, for a Lightning checkpoint."""
        self.flush()
        return {name: value.clone() for name, value in self.sums.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a checkpoint.

        Raises:
            ValueError: If it was written for a data set of another size.
        """
        sizes = {value.shape[0] for value in state.values()}
        if sizes - {self.size}:
            raise ValueError(
                f"the checkpoint holds training dynamics of {sizes.pop()} examples, the data set has {self.size}: it "
                "was written for other training data. Resume with those, or start a new run."
            )
        self.sums = {name: value.clone() for name, value in state.items()}
        self._common = {name: value.clone() for name, value in state.items()}
        self._waiting, self._rows = [], []

    def _column(self, name: str, fill: float) -> Tensor:
        if name not in self.sums:
            self.sums[name] = torch.full((self.size,), fill, dtype=torch.float64)
        return self.sums[name]

    def _sum(self, name: str, rows: Tensor, values: Tensor) -> None:
        self._column(name, 0.0).index_add_(0, rows, values)  # a fifth of the time of indexing


def _rows(rows: Tensor, taken: dict[str, Tensor], which: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    return rows[which], {name: value[which] for name, value in taken.items()}


def _kept(rows: Tensor, taken: dict[str, Tensor], keep: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Leave rows out, if there are any to be left out: else nothing has to be copied."""
    return (rows, taken) if bool(keep.all()) else _rows(rows, taken, keep)


def trained_elements(loss: Tensor, call: LossCall) -> LossCall:
    """Return a call whose elements are known not to count where the batch loss gives them no weight: a mask by hand.

    Only where the task has the elements in its hands (``reduction="none"``); what is run backward is the little that
    it did with them, long before training's own backward pass.
    """
    if call.reduction != "none" or call.output.ndim == 0 or _is_plain_mean(loss, call.output):
        return call
    (coefficient,) = torch.autograd.grad(loss, call.output, retain_graph=True, allow_unused=True)
    return call if coefficient is None else call.counting(coefficient.detach() != 0)


def _is_plain_mean(loss: Tensor, elements: Tensor) -> bool:
    """Tell whether a loss is a multiple of the mean or sum of elements, of which none can be left out then."""
    node: Any = loss.grad_fn
    while node is not None and node.name() in _FACTORS:
        factors = [following for following, _ in node.next_functions if following is not None]
        node = factors[0] if len(factors) == 1 else None
    whole = node is not None and node.name() in ("MeanBackward0", "SumBackward0")
    return whole and node.next_functions[0][0] is elements.grad_fn
