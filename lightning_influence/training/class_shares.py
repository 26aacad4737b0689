"""Shares by class of many examples: of all classes, or of the largest where all would be too many numbers.

Index legend: ``n`` examples, ``c`` classes, ``m`` of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from lightning_influence.core import distributed
from lightning_influence.training.example_sums import TOGETHER, in_blocks, lengthened

# Numbers of a table of all classes (200 MB). Beyond, so many classes of each example are kept. Of digits in pairs (100
# classes, a fifth of 8,000 labels wrong) 1,748 of 1,760 candidates and all their suggestions are those of all classes;
# in threes (1,000 classes) 99.5 % of all suggestions.
_ALL, _LARGEST = 5 * 10**7, 16
_NONE = -1  # no class
_NARROW = 2**15 - 2  # classes that are told in two bytes


class ClassShares:
    """Sums of shares by class, ``[size, c]``, to which more is added as a run goes on.

    With many examples and classes only the largest of each example are kept. Those of other classes count as 0; the sum
    over all classes is known.

    Args:
        size: Number of examples.

    Attributes:
        classes: As many as have been named.
    """

    def __init__(self, size: int) -> None:
        self.size, self.classes = size, 0
        self._values = torch.zeros(size, 0)
        self._which: Tensor | None = None  # classes of the values; None for all in their order
        self._rest = torch.zeros(0)  # sums of classes that are not kept

    @classmethod
    def of(cls, shares: Tensor) -> ClassShares:
        """Return a table of shares ``[n, c]``, all of which are kept."""
        table = cls(len(shares))
        table._values, table.classes = shares, shares.shape[1]
        return table

    @property
    def largest_alone(self) -> bool:
        """Whether only the largest are kept."""
        return self._which is not None

    # ---------------------------------------------------------------------------------------------------- filling it

    def have(self, classes: int) -> None:
        """Have room for more classes."""
        more, self.classes = max(0, classes - self.classes), max(classes, self.classes)
        if self._which is None and self.classes > _LARGEST and self.size * self.classes > _ALL:
            held, self._rest = self._values, torch.zeros(self.size)
            self._values = held.new_zeros(self.size, _LARGEST)
            narrow = torch.int16 if self.classes <= _NARROW else torch.int32
            self._which = torch.full((self.size, _LARGEST), _NONE, dtype=narrow)
            self._put(torch.arange(self.size), held)
        elif self._which is None and more:
            self._values = F.pad(self._values, (0, more))
        elif self._which is not None and self.classes > _NARROW:
            self._which = self._which.int()

    def add(self, rows: Tensor, shares: Tensor, which: Tensor | None = None) -> None:
        """Add shares to distinct rows ``[n]``: of the first ``m`` classes, or what ``largest`` has made of these."""
        if which is None:
            self.have(shares.shape[1])
        if self._which is None:
            self._values[:, : shares.shape[1]].index_add_(0, rows, shares.float())
        elif which is None:
            for at, part in in_blocks(rows, shares):
                self._merge(at, *largest(part))
        else:
            self._merge(rows, shares, which)

    def add_table(self, rows: Tensor, other: ClassShares) -> None:
        """Add the table of distinct rows ``[n]``."""
        self.have(other.classes)
        if other._which is None:
            self.add(rows, other._values)
        else:
            self._merge(rows, torch.cat([other._values, other._rest.unsqueeze(1)], 1), other._which)

    def _merge(self, rows: Tensor, shares: Tensor, which: Tensor) -> None:
        assert self._which is not None
        shares = shares.float()
        self._rest[rows] += shares[:, -1]
        values = torch.cat([self._values[rows], shares[:, :-1]], 1)
        classes, order = torch.cat([self._which[rows], which.to(self._which.dtype)], 1).sort(1)
        values = values.gather(1, order)
        again = classes[:, 1:] == classes[:, :-1]  # each at most twice, but for those that are none
        values[:, 1:] += values[:, :-1].masked_fill(~again, 0)
        values[:, :-1].masked_fill_(again, 0)
        self._keep(rows, values, classes)

    def _put(self, rows: Tensor, shares: Tensor) -> None:
        """Set rows to shares ``[n, c]``."""
        if self._which is None:
            self._values[rows] = shares
            return
        for at, part in in_blocks(rows, shares):
            self._values[at], self._which[at], self._rest[at] = 0, _NONE, 0
            self._merge(at, *largest(part))

    def _keep(self, rows: Tensor, values: Tensor, classes: Tensor) -> None:
        assert self._which is not None
        kept, places = values.topk(_LARGEST, 1)
        self._rest[rows] += values.sum(1) - kept.sum(1)
        self._values[rows] = kept
        self._which[rows] = classes.gather(1, places).masked_fill(kept == 0, _NONE)

    def divide(self, by: Tensor) -> None:
        """Divide rows by numbers ``[size]``."""
        self._values /= by.unsqueeze(1)
        if self._which is not None:
            self._rest /= by

    def grow(self, size: int) -> None:
        """Have room for more examples."""
        self.size, self._values = size, lengthened(self._values, size)
        if self._which is not None:
            self._which, self._rest = lengthened(self._which, size, _NONE), lengthened(self._rest, size)
        self.have(self.classes)

    def share(self) -> None:
        """Let rank zero have the sums of all processes, and others begin anew; to be called by all of them."""
        if distributed.world_size() == 1:
            return
        self.have(max(distributed.gather_objects(self.classes)))
        step = max(1, TOGETHER // max(1, 4 * self.classes))
        for start in range(0, self.size if self.classes else 0, step):
            rows = torch.arange(start, min(start + step, self.size))
            own = [self[rows], *([] if self._which is None else [self._rest[rows]])]
            total, *rest = distributed.sum_across_processes(own, everywhere=False)
            self._put(rows, total if distributed.rank() == 0 else torch.zeros_like(total))
            for value in rest if distributed.rank() == 0 else ():
                self._rest[rows] += value

    # ---------------------------------------------------------------------------------------------------- reading it

    def __getitem__(self, rows: Tensor | slice) -> Tensor:
        """Return shares of some examples, ``[n, c]``."""
        values = self._values[rows]
        if self._which is None:
            return values
        classes = self._which[rows].long().clamp(min=0)  # of what is none there are zeros
        return values.new_zeros(len(values), self.classes).scatter_add_(1, classes, values)

    def some(self, rows: Tensor) -> ClassShares:
        """Return the table of some examples."""
        found = ClassShares(len(rows))
        found.classes, found._values = self.classes, self._values[rows]
        if self._which is not None:
            found._which, found._rest = self._which[rows], self._rest[rows]
        return found

    def totals(self) -> Tensor:
        """Return the sums over all classes ``[size]``."""
        return self._values.sum(1) if self._which is None else self._values.sum(1) + self._rest

    def first(self) -> NDArray[np.int64]:
        """Return the class of the largest share, of equal ones the lowest, ``[size]``."""
        values = self._values.numpy()
        found: NDArray[np.int64] = values.argmax(1)
        if self._which is not None:
            best = np.where(values == values.max(1, keepdims=True), self._which.numpy(), self.classes)
            found = best.min(1).clip(min=0).astype(np.int64)
        return found

    def two_largest(self) -> Tensor:
        """Return the largest two shares, in ascending order, ``[size, 2]``."""
        return torch.cat([part.topk(2, 1).values.flip(1) for (part,) in in_blocks(self._values)])

    def of_labels(self, labels: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the shares of labels ``[size]``."""
        given = torch.from_numpy(labels).unsqueeze(1)
        if self._which is None:
            found = self._values.gather(1, given).squeeze(1)
        else:
            found = (self._values * (self._which == given)).sum(1)
        return found.double().numpy()

    def by_class(self) -> Callable[[int], tuple[NDArray[np.int64] | slice, Tensor]]:
        """Return what tells of a class the examples that it is kept of, and their shares."""
        if self._which is None:
            return lambda one: (slice(None), self._values[:, one])
        flat = self._which.flatten()
        order = flat.argsort(stable=True)
        ends = torch.searchsorted(flat[order], torch.arange(self.classes + 1, dtype=flat.dtype)).tolist()

        def found(one: int) -> tuple[NDArray[np.int64], Tensor]:
            places = order[ends[one] : ends[one + 1]]
            return (places // _LARGEST).numpy(), self._values.flatten()[places]

        return found

    # -------------------------------------------------------------------------------------------------------- state

    def state_dict(self, name: str) -> dict[str, Tensor]:
        """Return tensors by names that begin with one, for a Lightning checkpoint."""
        if self._which is None:
            return {name: self._values.clone()} if self.classes else {}
        parts = {"which": self._which, "rest": self._rest, "classes": torch.tensor(self.classes)}
        return {name: self._values.clone()} | {f"{name}.{part}": value.clone() for part, value in parts.items()}

    def load_state_dict(self, name: str, state: Mapping[str, Tensor]) -> None:
        """Go on from a checkpoint."""
        self.__init__(self.size)  # type: ignore[misc]
        if name in state:
            self._values = state[name].float().clone()
            self.classes = int(state.get(f"{name}.classes", torch.tensor(self._values.shape[1])))
            if f"{name}.which" in state:
                self._which, self._rest = state[f"{name}.which"].clone(), state[f"{name}.rest"].clone()


def largest(shares: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest of shares ``[n, c]`` and the sum of the others, ``[n, m + 1]``, and the classes ``[n, m]``."""
    found, which = shares.topk(min(_LARGEST, shares.shape[1]), 1)
    return torch.cat([found, (shares.sum(1) - found.sum(1)).unsqueeze(1)], 1), which
