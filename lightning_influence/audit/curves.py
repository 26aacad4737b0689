"""Curves of the examples over the epochs of training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_influence.audit.columns import Columns
from lightning_influence.training.curves import CURVES
from lightning_influence.training.dynamics import RIVAL

SUGGESTED = "suggested_probability"

_BARS = "▁▂▃▄▅▆▇█"
_GAP = "·"
_WIDEST = 32


class Curves(Mapping[str, NDArray[np.float32]]):
    """Curve name (``loss``, ``margin``, ``probability``, ...) to values ``[n, e]``, for each example and epoch.

    Each is put together when it is asked for. Rows are those of the report's columns. Each value is the mean over the
    example's visits in the epoch, as training saw it; NaN where it was not trained on. Empty for an audit that has
    recorded none.

    ``probability`` is that of the given label, ``suggested_probability`` that of the label that the audit suggests, at
    the last visit in the epoch. It is known where that was the likeliest class but the given one: the others are not
    kept, as it is the end of training that tells which label is suggested. Of candidates nearly all of it is there.

    Attributes:
        epochs: Numbers of the epochs, ascending, ``[e]``; of long runs a part, evenly spaced, with the last.

    Example:
        >>> report.curves.epochs, report.curves["loss"][report.columns["candidate"]].mean(0)
    """

    def __init__(self, epochs: Sequence[int] = (), values: Mapping[str, NDArray[np.float32]] | None = None) -> None:
        self.epochs = np.asarray(epochs, dtype=np.int64)
        self._names = list(values or ())
        self._rows = np.arange(max(map(len, (values or {}).values()), default=0))
        self._kept = [
            {name: np.asarray(table[:, column]) for name, table in (values or {}).items()}
            for column in range(len(self.epochs))
        ]
        self._suggested: NDArray[np.int32] | None = None  # by dataset index

    @classmethod
    def of(cls, kept: Mapping[int, Mapping[str, Tensor]], columns: Columns) -> Curves:
        """Return the curves of some examples; what is kept is not copied.

        Args:
            kept: Epoch to curve name to values by dataset index.
            columns: Of the report: dataset indices, and ``suggested`` if labels are; what is not in an epoch's values
                is NaN.
        """
        indices = columns["index"]
        names = [name for name in CURVES if any(name in curves for curves in kept.values())]
        if "suggested" in columns and any(RIVAL in curves for curves in kept.values()):
            names.append(SUGGESTED)
        made = cls(sorted(kept) if names else ())
        made._names, made._rows = names, indices
        made._kept = [{name: values.numpy() for name, values in kept[epoch].items()} for epoch in made.epochs.tolist()]
        if SUGGESTED in names:
            made._suggested = np.full(int(indices.max(initial=-1)) + 1, -1, dtype=np.int32)
            made._suggested[indices] = columns["suggested"]
        return made

    def of_example(self, row: int) -> dict[str, NDArray[np.float32]]:
        """Return the curves of one example by its row in the report, ``[e]`` each."""
        return {name: self._table(name, self._rows[row : row + 1])[0] for name in self}

    def of_epoch(self, epoch: int, indices: NDArray[np.int64]) -> dict[str, Tensor]:
        """Return the values of an epoch by dataset index, the opposite of ``of``."""
        result, place = {}, self.epochs.tolist().index(epoch)
        for name in [name for name in (*self, RIVAL) if name in self._kept[place]]:
            values = np.full(int(indices.max(initial=-1)) + 1, np.nan, dtype=np.float32)
            values[indices] = self._column(name, place, self._rows)
            result[name] = torch.from_numpy(values)
        return result

    def _table(self, name: str, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        columns = [self._column(name, place, rows) for place in range(len(self.epochs))]
        return np.stack(columns, axis=1)

    def _column(self, name: str, place: int, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        if name == SUGGESTED and self._suggested is not None:
            rival, probability = np.divmod(self._column(RIVAL, place, rows), np.float32(1))
            return np.where(rival == self._suggested[rows], probability, np.float32(np.nan))
        known = self._kept[place].get(name, np.empty(0, np.float32))
        values = np.full(len(rows), np.nan, dtype=np.float32)
        inside = rows < len(known)
        values[inside] = known[rows[inside]]
        return values

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        if name not in self._names:
            raise KeyError(name)
        return self._table(name, self._rows)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __repr__(self) -> str:
        examples = len(self._rows) if self else 0
        return f"Curves({', '.join(self) or 'none'}: {examples:,} examples, {len(self.epochs)} epochs)"


def sparkline(values: NDArray[np.float32]) -> str:
    """Return a curve as a row of bars, the lowest for its least value; a dot where there is none."""
    if len(values) > _WIDEST:
        values = values[np.linspace(0, len(values) - 1, _WIDEST).round().astype(int)]
    finite = values[np.isfinite(values)].astype(np.float64)
    low, high = (finite.min(), finite.max()) if len(finite) else (0.0, 0.0)
    steps = len(_BARS) - 1
    return "".join(
        _BARS[round((float(value) - low) / ((high - low) or 1.0) * steps)] if np.isfinite(value) else _GAP
        for value in values
    )
