"""Weights of a module: by name, told apart, and others for the time of a block."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from zlib import crc32

import torch
from torch import Tensor, nn

from lightning_influence.core.torch_private import eager_name


def parameters_of(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters by the names that blocks have, compiled or not; a tied one by its first.

    Raises:
        TypeError: If it is no module.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"the model is a {type(module).__name__}; expected a torch module.")
    return {eager_name(name): parameter for name, parameter in module.named_parameters()}


def places_of(module: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by such names."""
    return {**parameters_of(module), **{eager_name(name): buffer for name, buffer in module.named_buffers()}}


def checksum(tensors: Iterable[Tensor]) -> str:
    """Return what tells values from others, on any device."""
    result = 0
    for tensor in tensors:
        result = crc32(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data, result)
    return f"{result:08x}"


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
