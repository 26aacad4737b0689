"""Recognising calls of torch functions, and what they do with the parameters among their arguments.

Whoever makes them: a layer, a subclass of a layer, a functional call in a user's ``forward``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_influence.calls import (
    Call,
    ConvolutionCall,
    ElementwiseCall,
    EmbeddingBagCall,
    EmbeddingCall,
    ExpandCall,
    LinearCall,
    NormCall,
    PReLUCall,
    as_now,
)


class NotUnderstoodError(RuntimeError):
    """A function uses a parameter in a way that has no rows; the message says which."""


class NotSeparableError(NotUnderstoodError):
    """A function treats an example according to others in the batch; the message says how."""


@dataclass(frozen=True, eq=False)
class Site:
    """A call of a torch function, as it was made.

    Attributes:
        function: The function.
        args: Its positional arguments; where it overwrote the first, a copy from before.
        kwargs: Its keyword arguments.
        parameters: The parameters among them, views of parameters and tensors made from them alone.
        output: What it returned.
    """

    function: Callable[..., Any]
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    parameters: Sequence[Tensor]
    output: Tensor

    def is_parameter(self, value: Any) -> bool:
        """Tell whether an argument is one of the parameters."""
        return any(value is parameter for parameter in self.parameters)

    def bind(self, names: str) -> dict[str, Any]:
        """Match the arguments to names; missing ones are None."""
        listed = names.split()
        return {**dict.fromkeys(listed), **dict(zip(listed, self.args, strict=False)), **self.kwargs}

    def roles(self, bound: Mapping[str, Any], name: str, **roles: str) -> dict[str, Tensor]:
        """Return role to parameter.

        Args:
            bound: See ``bind``.
            name: Of the function, for messages.
            **roles: Role to the name of the argument.

        Raises:
            NotUnderstoodError: If a parameter is passed as another argument.
        """
        for argument, value in bound.items():
            if argument not in roles.values() and self.is_parameter(value):
                raise NotUnderstoodError(f"as the argument `{argument}` of {name}")
        return {role: bound[argument] for role, argument in roles.items() if self.is_parameter(bound.get(argument))}


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


_Reader = Callable[[Site], Call]


def _read_linear(site: Site) -> Call:
    a = site.bind("input weight bias")
    roles = site.roles(a, "linear", weight="weight", bias="bias")
    if a["weight"].ndim != 2:
        raise NotUnderstoodError("as a vector of weights in linear")
    return LinearCall(a["input"].detach(), roles)


def _read_addmm(site: Site) -> Call:
    a = site.bind("input mat1 mat2")
    roles = site.roles(a, "addmm", weight="mat2", bias="input")
    if a.get("beta", 1) != 1 or a.get("alpha", 1) != 1:
        raise NotUnderstoodError("in addmm with factors")
    if "bias" in roles and a["input"].shape != site.output.shape[-1:]:
        raise NotUnderstoodError("as something else than a bias in addmm")
    return LinearCall(a["mat1"].detach(), roles, transposed=True)


def _read_matmul(site: Site) -> Call:
    left, right = (*site.args, *site.kwargs.values())[:2]
    if site.is_parameter(left) or right.ndim != 2 or left.ndim < 2:
        raise NotUnderstoodError("in a matrix product that is not `input @ weight`")
    return LinearCall(left.detach(), {"weight": right}, transposed=True)


def _read_convolution(site: Site) -> Call:
    a = site.bind("input weight bias stride padding dilation groups")
    roles = site.roles(a, "a convolution", weight="weight", bias="bias")
    d = a["weight"].ndim - 2
    stride, dilation = _per_axis(a["stride"], 1, d), _per_axis(a["dilation"], 1, d)
    kernel = a["weight"].shape[2:]
    if a["padding"] == "same":
        totals = [dilation[axis] * (kernel[axis] - 1) for axis in range(d)]
        padding = tuple((total // 2, total - total // 2) for total in totals)
    elif a["padding"] == "valid":
        padding = ((0, 0),) * d
    else:
        padding = tuple((side, side) for side in _per_axis(a["padding"], 0, d))
    return ConvolutionCall(a["input"].detach(), roles, tuple(kernel), stride, padding, dilation, a["groups"] or 1)


def _read_transposed_convolution(site: Site) -> Call:
    a = site.bind("input weight bias stride padding output_padding groups dilation")
    roles = site.roles(a, "a transposed convolution", weight="weight", bias="bias")
    d = a["weight"].ndim - 2
    stride, dilation = _per_axis(a["stride"], 1, d), _per_axis(a["dilation"], 1, d)
    cut, extra = _per_axis(a["padding"], 0, d), _per_axis(a["output_padding"], 0, d)
    kernel = a["weight"].shape[2:]
    reach = [dilation[axis] * (kernel[axis] - 1) for axis in range(d)]
    padding = tuple((reach[axis] - cut[axis], reach[axis] - cut[axis] + extra[axis]) for axis in range(d))
    groups = a["groups"] or 1
    return ConvolutionCall(a["input"].detach(), roles, tuple(kernel), stride, padding, dilation, groups, True)


def _per_axis(value: Any, default: int, d: int) -> tuple[int, ...]:
    if value is None:
        return (default,) * d
    if isinstance(value, int):
        return (value,) * d
    values = tuple(int(v) for v in value)
    return values if len(values) == d else values * d


def _read_embedding(site: Site) -> Call:
    a = site.bind("input weight padding_idx max_norm norm_type scale_grad_by_freq sparse")
    _check_embedding(a)
    return EmbeddingCall(a["input"], {"weight": a["weight"]}, _padding_idx(a))


def _check_embedding(a: Mapping[str, Any]) -> None:
    if a["max_norm"] is not None:
        raise NotSeparableError("in an embedding with `max_norm`, which changes its weights in every forward pass")
    if a["scale_grad_by_freq"]:
        raise NotSeparableError("in an embedding with `scale_grad_by_freq`, whose gradients depend on the batch")


def _padding_idx(a: Mapping[str, Any]) -> int | None:
    index = a["padding_idx"]
    return None if index is None else int(index) % len(a["weight"])


def _read_getitem(site: Site) -> Call:
    weight, index = site.args
    if isinstance(index, tuple) and len(index) == 1:
        (index,) = index
    if not isinstance(index, Tensor) or index.dtype not in (torch.int64, torch.int32) or weight.ndim != 2:
        raise NotUnderstoodError("in an indexing that is not a look-up of rows")
    return EmbeddingCall(index.long() % len(weight), {"weight": weight})


def _read_embedding_bag(site: Site) -> Call:
    names = (
        "input weight offsets max_norm norm_type scale_grad_by_freq mode sparse per_sample_weights include_last_offset"
        " padding_idx"
    )
    a = site.bind(names)
    _check_embedding(a)
    roles = site.roles(a, "embedding_bag", weight="weight")
    mode = a["mode"] or "mean"
    if mode == "max":
        raise NotUnderstoodError("in an embedding bag with `mode='max'`")
    ids, offsets, padding = a["input"].long(), a["offsets"], _padding_idx(a)
    scales = None if a["per_sample_weights"] is None else a["per_sample_weights"].detach()
    bags: Tensor | None = None
    counted = (
        torch.ones_like(ids, dtype=site.output.dtype) if padding is None else (ids != padding).to(site.output.dtype)
    )
    if ids.ndim == 1:
        starts = (offsets[:-1] if a["include_last_offset"] else offsets).to(ids.device)
        bags = torch.searchsorted(starts.contiguous(), torch.arange(len(ids), device=ids.device), right=True) - 1
        sizes = torch.zeros(len(starts), dtype=site.output.dtype, device=ids.device).index_add_(0, bags, counted)[bags]
    else:
        sizes = counted.sum(1, keepdim=True)
    if mode == "mean":
        scales = counted / sizes.clamp(min=1)
    return EmbeddingBagCall(ids, roles, padding, scales, bags)


def _norm_reader(names: str, features: bool) -> _Reader:
    def read(site: Site) -> Call:
        a = site.bind(names)
        function = site.function
        roles = site.roles(a, function.__name__, weight="weight", bias="bias")
        if a.get("training"):
            raise NotSeparableError("in a batch norm that takes the statistics of the batch")
        plain = {
            name: value for name, value in a.items() if name not in ("input", "weight", "bias") and value is not None
        }

        def normalise(input: Tensor) -> Tensor:
            result: Tensor = function(input, **plain)
            return result

        spans = len(a["normalized_shape"]) if features else 0
        return NormCall(a["input"].detach(), roles, normalise, spans)

    return read


def _read_prelu(site: Site) -> Call:
    a = site.bind("input weight")
    return PReLUCall(a["input"].detach(), site.roles(a, "prelu", weight="weight"))


def _elementwise_reader(plain: Callable[..., Tensor], sign: int | None = None) -> _Reader:
    """Make a reader of an elementwise function; ``sign`` that of its second argument if it adds or subtracts."""

    def read(site: Site) -> Call:
        args, kwargs, output = site.args, site.kwargs, site.output
        places: list[int | str] = [k for k, value in enumerate(args) if site.is_parameter(value)]
        places += [name for name, value in kwargs.items() if site.is_parameter(value)]
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        if len(places) != 1 or output.shape != torch.broadcast_shapes(*(value.shape for value in tensors)):
            raise NotUnderstoodError(f"in a call of {plain.__name__} that is not elementwise in it and the batch")
        (place,) = places
        parameter = args[place] if isinstance(place, int) else kwargs[place]
        adds = 0
        if sign is not None and kwargs.get("alpha", 1) == 1:
            adds = 1 if place == 0 else sign
        others = [value for value in tensors if value is not parameter]
        detached = (
            tuple(value.detach() if isinstance(value, Tensor) else value for value in args),
            {
                name: value.detach() if isinstance(value, Tensor) else value
                for name, value in kwargs.items()
                if name != "out"
            },
        )
        raw = next((value for value in others if value.shape == output.shape), output).detach()
        again = as_now(plain, output)
        return ElementwiseCall(raw, {"weight": parameter}, again, ((), {}) if adds else detached, place, adds)

    return read


def _read_expand(site: Site) -> Call:
    (parameter,) = site.parameters
    if parameter.ndim > site.output.ndim:
        raise NotUnderstoodError("in a repetition that drops dimensions")
    return ExpandCall(site.output.detach(), {"weight": parameter})


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


def _reversed_sub(self: Tensor, other: Any) -> Tensor:
    result: Tensor = other - self
    return result


def _reversed_div(self: Tensor, other: Any) -> Tensor:
    result: Tensor = other / self
    return result


def _reversed_pow(self: Tensor, other: Any) -> Tensor:
    result: Tensor = other**self
    return result


IN_PLACE = _collect_elementwise()
