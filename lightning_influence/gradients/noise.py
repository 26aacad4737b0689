"""Random numbers that belong to an example, whatever batch it is in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class ExampleNoise:
    """Uniform numbers that belong to the example: the same in every batch, on every device and process.

    Args:
        seed: Of the run.
        draw: Number of the draw of labels.
        indices: Dataset indices of the ``n`` examples of a batch.
    """

    def __init__(self, seed: int, draw: int, indices: Sequence[int]) -> None:
        self.seed, self.draw = seed, draw
        self.indices = np.array(indices, dtype=np.int64).astype(np.uint64)
        self._calls = 0

    def __call__(self, shape: tuple[int, ...]) -> Tensor:
        """Return ``[n, *shape]`` in float64, others with every call."""
        # SplitMix64 (Steele et al. 2014): the stream of (seed, draw, call, example) begins at a hash of the four.
        state = np.zeros(1, dtype=np.uint64)
        for part in (self.seed, self.draw, self._calls):
            state = _mixed(state ^ np.uint64(part % 2**64))
        starts = _mixed(state ^ self.indices)
        steps = np.arange(1, math.prod(shape) + 1, dtype=np.uint64) * _GOLDEN
        numbers = (_mixed(starts[:, None] + steps) >> np.uint64(11)) * 2.0**-53
        self._calls += 1
        return torch.from_numpy(numbers.reshape(len(starts), *shape)).clamp_(1e-16, 1 - 1e-16)


def _mixed(values: np.ndarray[Any, np.dtype[np.uint64]]) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """Return the outputs of SplitMix64 for a state, bits well mixed."""
    values = values + _GOLDEN
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
