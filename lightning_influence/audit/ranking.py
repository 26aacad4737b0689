"""Which examples are suspicious.

The ranking follows what was measured (MNIST-5k and digits; MLP and CNN; 5 to 30 epochs; 10 to 30 % flips, symmetric
and pairwise): the *trajectory* finds wrong labels, influence at the final weights alone does not, as a network that has
memorised a wrong label is no longer surprised by it. How hard an example is to fit (EL2N), what its neighbours say, and
how sure the run is of another label complement each other, so candidates are ranked by the sum of their z-scores. All
columns stay in the table; influence earns its place there by saying which predictions an example harms.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_influence.audit.columns import COLUMNS, Columns

# Without class decisions there is no label to contradict; the most suspicious share is proposed instead.
_FALLBACK_SHARE = 0.05


def rank(columns: Columns) -> dict[str, NDArray[Any]]:
    """Add the audit's own columns to the scores.

    Args:
        columns: Score columns ``[n]``, with ``index``.

    Returns:
        A new mapping with ``suspicion``, ``rank`` (1 = most suspicious), ``candidate`` and ``finite`` added, and the
        columns that are computed from others. Candidates are the examples whose suggested label (of run and neighbours
        together, see ``columns``) differs from the given one; without class decisions, the most suspicious 5 %.
        Examples that are not finite rank last. With nothing to rank by, ``suspicion`` is NaN and the order that of the
        data set.
    """
    result = dict(columns)
    _add_computed(result)
    size = len(result["index"])
    finite = result.get("finite", np.ones(size, dtype=bool)).astype(bool)
    suspicion = np.where(finite & bool(ingredients(result)), _suspicion(result, finite), np.nan)
    order = np.lexsort((result["index"], -np.nan_to_num(suspicion, nan=-np.inf)))
    ranks = np.empty(size, dtype=np.int64)
    ranks[order] = np.arange(1, size + 1)
    if "suggested" in result and "label" in result:
        known = (result["suggested"] >= 0) & (result["label"] >= 0)
        candidate = finite & known & (result["suggested"] != result["label"])
    else:
        candidate = np.isfinite(suspicion) & (ranks <= np.ceil(_FALLBACK_SHARE * finite.sum()))
    return result | {"suspicion": suspicion, "rank": ranks, "candidate": candidate, "finite": finite}


def ingredients(columns: Columns) -> tuple[str, ...]:
    """Return the names of the columns that the ranking combines: of the first group of which one is there."""
    groups: dict[int, list[str]] = {}
    for name, column in COLUMNS.items():
        if column.ranks is not None and name in columns and np.isfinite(columns[name]).any():
            groups.setdefault(column.ranks, []).append(name)
    return tuple(groups[min(groups)]) if groups else ()


def _add_computed(columns: dict[str, NDArray[Any]]) -> None:
    for name, column in COLUMNS.items():
        if column.values is not None and name not in columns:
            try:
                values = np.asarray(column.values(columns))
                if values.shape != columns["index"].shape:
                    raise ValueError(f"its shape is {values.shape}; expected {columns['index'].shape}")
                columns[name] = values
            except KeyError:  # a column that this audit has not
                continue
            except Exception as error:  # the scores that are there may not be lost to it
                warnings.warn(f"no column {name!r}: {type(error).__name__}: {error}", stacklevel=3)


def _suspicion(columns: Columns, finite: NDArray[Any]) -> NDArray[np.float64]:
    total = np.zeros(len(finite))
    for name in ingredients(columns):
        values = COLUMNS[name].suspicion(columns[name])
        usable = finite & np.isfinite(values)
        centred = values - values[usable].mean() if usable.any() else values
        spread = centred[usable].std() if usable.any() else 0.0
        # An example that was never trained on says nothing: the mean, not an extreme.
        total += np.where(usable, centred, 0.0) / (spread if spread > 0 else 1.0)
    return total
