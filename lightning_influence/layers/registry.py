"""Recognising calls of torch functions, and what they do with the parameters among their arguments.

Whoever makes them: a layer, a subclass of a layer, a functional call in a user's ``forward``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_influence.layers.call import Call
from lightning_influence.layers.convolution import _read_convolution, _read_transposed_convolution
from lightning_influence.layers.elementwise import (
    _elementwise_reader,
    _read_expand,
    _read_prelu,
    _reversed_div,
    _reversed_pow,
    _reversed_sub,
)
from lightning_influence.layers.embedding import (
    _read_embedding,
    _read_embedding_bag,
    _read_getitem,
)
from lightning_influence.layers.linear import _read_addmm, _read_linear, _read_matmul
from lightning_influence.layers.norm import _norm_reader
from lightning_influence.layers.site import NotUnderstoodError, Site, _Reader


def read_call(site: Site) -> Call | None:
    """Tell what a call does with the parameters among its arguments.

    Returns:
        None if the function is not a known one.

    Raises:
        NotUnderstoodError: If it is known, but used in a way that has no per-example form.
    """
    reader = _READERS.get(site.function)
    if reader is not None and (site.output.is_complex() or any(p.is_complex() for p in site.parameters)):
        raise NotUnderstoodError("with complex numbers")
    return None if reader is None else reader(site)


_READERS: dict[Callable[..., Any], _Reader] = {
    F.linear: _read_linear,
    F.embedding: _read_embedding,
    F.embedding_bag: _read_embedding_bag,
    F.layer_norm: _norm_reader("input normalized_shape weight bias eps", True),
    F.rms_norm: _norm_reader("input normalized_shape weight eps", True),
    F.group_norm: _norm_reader("input num_groups weight bias eps", False),
    F.instance_norm: _norm_reader("input running_mean running_var weight bias use_input_stats momentum eps", False),
    F.batch_norm: _norm_reader("input running_mean running_var weight bias training momentum eps", False),
    F.prelu: _read_prelu,
    torch.prelu: _read_prelu,
    Tensor.__getitem__: _read_getitem,
    **dict.fromkeys((torch.addmm, Tensor.addmm), _read_addmm),
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm), _read_matmul),
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), _read_convolution),
    **dict.fromkeys((F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), _read_transposed_convolution),
    **dict.fromkeys(
        (
            Tensor.expand,
            Tensor.expand_as,
            Tensor.repeat,
            Tensor.tile,
            Tensor.broadcast_to,
            torch.tile,
            torch.broadcast_to,
        ),
        _read_expand,
    ),
}

IN_PLACE: frozenset[Callable[..., Any]]
"""Functions that overwrite their first argument: its value has to be kept before the call."""


def _collect_elementwise() -> frozenset[Callable[..., Any]]:
    in_place = []
    signs = {"add": 1, "sub": -1, "subtract": -1}
    for name in ("add", "sub", "subtract", "mul", "multiply", "div", "divide", "true_divide", "pow", "maximum",
                 "minimum", "where", "lerp", "addcmul", "fmax", "fmin"):  # fmt: skip
        plain = getattr(torch, name)
        reader = _elementwise_reader(plain, signs.get(name))
        _READERS[plain] = reader
        for method in (name, f"{name}_", f"__{name}__", f"__i{name}__", f"__r{name}__"):
            if (found := getattr(Tensor, method, None)) is None:
                continue
            if method.endswith("_") and not method.endswith("__") or method.startswith("__i"):
                in_place.append(found)
            if not method.startswith("__r"):
                _READERS[found] = reader
    for method, plain in (("__rsub__", _reversed_sub), ("__rdiv__", _reversed_div), ("__rpow__", _reversed_pow)):
        _READERS[getattr(Tensor, method)] = _elementwise_reader(plain)
    _READERS[torch.rsub] = _elementwise_reader(torch.rsub)
    return frozenset(in_place)


IN_PLACE = _collect_elementwise()
