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

    Rows are those of the report's columns. Each value is the mean over the example's visits in the epoch, as training
    saw it; NaN where it was not trained on. Empty for an audit that has recorded none.

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
        self._values = dict(values or {})
        self._rivals = self._values.pop(RIVAL, None)

    @classmethod
    def of(cls, kept: Mapping[int, Mapping[str, Tensor]], columns: Columns) -> Curves:
        """Return the curves of some examples.

        Args:
            kept: Epoch to curve name to values by dataset index.
            columns: Of the report: dataset indices, and ``suggested`` if labels are; what is not in an epoch's values
                is NaN.
        """
        indices, values = columns["index"], {}
        for name in (*CURVES, RIVAL):
            if any(name in curves for curves in kept.values()):
                table = np.full((len(indices), len(kept)), np.nan, dtype=np.float32)
                for column, epoch in enumerate(sorted(kept)):
                    known = kept[epoch].get(name)
                    if known is not None:
                        inside = indices < len(known)
                        table[inside, column] = known.numpy()[indices[inside]]
                values[name] = table
        if RIVAL in values and "suggested" in columns:
            rival, probability = np.divmod(values[RIVAL], np.float32(1))
            values[SUGGESTED] = np.where(rival == columns["suggested"][:, None], probability, np.float32(np.nan))
        return cls(sorted(kept) if values else (), values)

    def by_epoch(self, indices: NDArray[np.int64]) -> dict[int, dict[str, Tensor]]:
        """Return the opposite of ``of``."""
        result: dict[int, dict[str, Tensor]] = {}
        kept = {name: table for name, table in self.items() if name != SUGGESTED}
        kept |= {} if self._rivals is None else {RIVAL: self._rivals}
        for column, epoch in enumerate(self.epochs.tolist()):
            result[epoch] = {}
            for name, table in kept.items():
                values = np.full(int(indices.max(initial=-1)) + 1, np.nan, dtype=np.float32)
                values[indices] = table[:, column]
                result[epoch][name] = torch.from_numpy(values)
        return result

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        examples = len(next(iter(self.values()))) if self else 0
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
