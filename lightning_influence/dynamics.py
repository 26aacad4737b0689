"""Training dynamics: what the run itself says about each example, read off the training pass without a pass of its own.

Per example, over the times it was trained on: mean and variance of the loss, AUM (mean margin between the logit of
the given label and the largest other; Pleiss et al. 2020, 2001.10528), EL2N (distance between predicted and given
distribution; Paul et al. 2021, 2107.07075), how often it was predicted wrong, forgetting events (right, then wrong;
Toneva et al. 2019, 1812.05159), and the margin of the mean predicted probabilities.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from lightning_influence import distributed
from lightning_influence.losses import CrossEntropy, LossCall

# Logits up to this many scalars wait for those of other batches: each call costs more than its arithmetic.
_SMALL = 2**16
# Mean probabilities are kept up to this many scalars (400 MB); beyond, their columns are left out.
_PROBABILITY_BUDGET = 10**8
_FLUSH_EVERY = 64


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
        # Batches wait here on their device: copying each one at once would make a GPU wait in every step.
        self._waiting: list[tuple[Sequence[int], dict[str, Tensor] | CrossEntropy]] = []

    def record_call(self, indices: Sequence[int], call: LossCall) -> None:
        """File one training batch by its loss call, see ``record``.

        Small logits of plain class decisions are copied, and what they say is computed for many batches at once.
        """
        n = len(indices)
        if type(call) is CrossEntropy and call.single_rows(n) and call.input.numel() <= _SMALL:
            self._wait(indices, call.copied())
        else:
            self.record(indices, call.statistics(n))

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
        self._wait(indices, self._within_budget(statistics))

    def _within_budget(self, statistics: Mapping[str, Tensor]) -> dict[str, Tensor]:
        statistics = dict(statistics)
        if "probabilities" in statistics and self.size * statistics["probabilities"].shape[1] > _PROBABILITY_BUDGET:
            del statistics["probabilities"]
        return statistics

    def _wait(self, indices: Sequence[int], entry: dict[str, Tensor] | CrossEntropy) -> None:
        self._waiting.append((list(indices), entry))
        if len(self._waiting) >= _FLUSH_EVERY:
            self.flush()

    def flush(self) -> None:
        """Add the waiting batches to the sums."""
        waiting, self._waiting = self._waiting, []
        while waiting:
            batches, entry = [waiting[0][0]], waiting[0][1]
            if isinstance(entry, CrossEntropy):
                calls = [entry]
                for indices, other in waiting[1:]:
                    if not isinstance(other, CrossEntropy) or not entry.alike(other):
                        break
                    batches.append(indices)
                    calls.append(other)
                entry = self._within_budget(entry.joined(calls).statistics(sum(map(len, batches))))
            statistics, start = {name: value.cpu() for name, value in entry.items()}, 0
            for indices in _rounds(batches):
                rows = slice(start, start + len(indices))
                self._add(indices, {name: value[rows] for name, value in statistics.items()})
                start = rows.stop
            waiting = waiting[len(batches) :]

    def _add(self, indices: Sequence[int], statistics: dict[str, Tensor]) -> None:
        rows, taken = torch.tensor(indices), statistics
        if len(set(indices)) < len(indices):
            first: dict[int, int] = {}
            for position, index in enumerate(indices):
                first.setdefault(index, position)
            rows, taken = _rows(rows, taken, torch.tensor(list(first.values())))
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
            self._sum("forgetting", rows, ((before[rows] < 0.5) & (wrong >= 0.5)).double())
            before[rows] = wrong
        if "label" in taken:
            self._column("label", -1.0)[rows] = taken["label"].double()
        if "probabilities" in taken:
            if "probabilities" not in self.sums:
                self.sums["probabilities"] = torch.zeros(self.size, taken["probabilities"].shape[1])
            self.sums["probabilities"][rows] += taken["probabilities"].float()

    def gathered(self) -> TrainingDynamics:
        """Return the dynamics of all processes together: each has seen its own part of the batches."""
        self.flush()
        total = TrainingDynamics(self.size)
        total.sums = dict(self.sums)
        if distributed.world_size() > 1:
            added = {name: value - self._common.get(name, 0.0) for name, value in self.sums.items()}
            # A process without records must not stay away from the collective: all raise then, instead of waiting.
            visited = (added.get("times_seen", torch.zeros(self.size)) > 0).double()
            # Not sums, but the state at the last visit: taken from who has visited the example since.
            latest = [name for name in ("label", "last_wrong") if name in self.sums]
            names = sorted(set(added) - set(latest))
            parts = [added[name] for name in names] + [self.sums[name] * visited for name in latest] + [visited]
            *reduced, visitors = distributed.sum_across_processes(parts)
            for name, value in zip(names, reduced, strict=False):
                total.sums[name] = self._common.get(name, 0.0) + value
            for name, value in zip(latest, reduced[len(names) :], strict=True):
                before = self._common.get(name, torch.full_like(value, 1.0 if name == "last_wrong" else -1.0))
                total.sums[name] = torch.where(visitors > 0, value / visitors.clamp(min=1), before)
        return total

    def synchronise(self) -> None:
        """Let every process know what all have seen; to be called by all of them."""
        if distributed.world_size() > 1:
            self.sums = self.gathered().sums
            self._common = {name: value.clone() for name, value in self.sums.items()}

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
        self._waiting = []

    def _column(self, name: str, fill: float) -> Tensor:
        if name not in self.sums:
            self.sums[name] = torch.full((self.size,), fill, dtype=torch.float64)
        return self.sums[name]

    def _sum(self, name: str, rows: Tensor, values: Tensor) -> None:
        self._column(name, 0.0)[rows] += values


def _rows(rows: Tensor, taken: dict[str, Tensor], which: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    return rows[which], {name: value[which] for name, value in taken.items()}


def _kept(rows: Tensor, taken: dict[str, Tensor], keep: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Leave rows out, if there are any to be left out: else nothing has to be copied."""
    return (rows, taken) if bool(keep.all()) else _rows(rows, taken, keep)


def _rounds(batches: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Lay batches end to end, as long as no example comes again: whether it was right before has to be known then."""
    indices: list[int] = []
    seen: set[int] = set()
    for batch in batches:
        if not seen.isdisjoint(batch):
            yield indices
            indices, seen = [], set()
        indices.extend(batch)
        seen.update(batch)
    yield indices
