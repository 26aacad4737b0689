"""Other weights for the time of a block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


def write(places: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Write values into the parameters and buffers of the same names."""
    with torch.no_grad():
        for name, value in values.items():
            places[name].copy_(value)


@contextmanager
def swapped(places: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> Iterator[None]:
    """Write values into parameters and buffers within a ``with`` block; afterwards every bit is as it was."""
    before = {name: places[name].detach().clone() for name in values}
    try:
        write(places, values)
        yield
    finally:
        write(places, before)
