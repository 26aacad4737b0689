"""A device for tests, made of CPU tensors, that is as strict as a real one.

It raises where an accelerator would: for tensors of two devices in one operation (0-dimensional ones of the host and
host indices of device tensors are allowed, as on CUDA), for generators of the host, for `.numpy()`, and, under
`torch.use_deterministic_algorithms`, for what CUDA has no deterministic kernel of. Set `LIMITS.float64` and
`LIMITS.linalg` to False for one that has neither, as Apple's MPS.

torch has one key for devices of others (PrivateUse1), and what is registered under it stays: import this in a process
of its own.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils import backend_registration

NAME = "pretend"
_INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index")
_COPYING = ("copy_", "_to_copy", "_copy_from", "_foreach_copy_", "set_")
# Norms of vectors are no decomposition: every device has them.
_DECOMPOSING = ("linalg_", "_linalg_", "cholesky", "geqrf", "orgqr", "triangular_solve", "lu_", "ormqr")
# Their kernels resize an empty result, which a wrapper does not follow.
_FACTORIES = ("arange", "eye", "linspace", "randperm", "tril_indices", "triu_indices")
# As the documentation of `torch.use_deterministic_algorithms` lists them.
_BACKWARDS = ("upsample_", "grid_sampler_", "reflection_pad", "adaptive_", "_adaptive_", "avg_pool3d", "fractional_max")
_NOT_DETERMINISTIC = ("nll_loss2d_forward", "_ctc_loss_backward", "put_", "histc", "kthvalue", "max_unpool2d")
_NOT_DETERMINISTIC += ("max_unpool3d",)


# What the host waits for: numbers it reads, sizes that depend on them, decompositions that tell how they went.
_READ = (
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "unique",
    "_unique",
    "bincount",
    "equal",
    "_linalg",
    "linalg_",
)


class LIMITS:
    """What the device can do."""

    float64 = linalg = True


class WAITS:
    """How often the host has waited for the device; copies between the two are such waits, unless asked not to be."""

    count = 0
    where: ClassVar[Counter[str]] = Counter()

    @classmethod
    def add(cls, name: str) -> None:
        """Count one, by the innermost place of the package that it happens in."""
        cls.count += 1
        cls.where[f"{name} in {_place()}"] += 1


def _place() -> str:
    frame = sys._getframe(2)
    while frame is not None:
        file = frame.f_code.co_filename
        if "/lightning_influence/" in file and frame.f_code.co_name != "__torch_function__":
            return f"{file.rpartition('/lightning_influence/')[2]}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "elsewhere"


backend_registration._setup_privateuseone_for_python_backend(NAME)
DEVICE = torch.device(NAME, 0)


class PretendTensor(Tensor):
    """A tensor of the device; `held` is the one of the host that has its numbers."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> PretendTensor:
        strided = held.layout == torch.strided
        places = {"strides": held.stride(), "storage_offset": held.storage_offset()} if strided else {}
        options = {"dtype": held.dtype, "layout": held.layout, "device": DEVICE, **places}
        result: PretendTensor = Tensor._make_wrapper_subclass(cls, held.shape, **options)
        result.held = held
        return result

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            copy = PretendTensor(self.held.detach().clone())
            made = nn.Parameter(copy) if isinstance(self, nn.Parameter) else copy
            memo[id(self)] = made.requires_grad_(self.requires_grad)
        return memo[id(self)]

    def tolist(self) -> Any:
        WAITS.add("tolist")
        return self.held.tolist()

    untyped_storage = property(lambda self: self.held.untyped_storage)

    def numpy(self, *args: Any, **options: Any) -> Any:
        raise TypeError(f"can't convert a tensor of {DEVICE} to numpy; use Tensor.cpu() first")

    __array__ = numpy


def _mapped(value: Any, function: Callable[[Tensor], Any]) -> Any:
    """Apply a function to the tensors among arguments or results, which lie one list deep at most."""
    if isinstance(value, Tensor):
        return function(value)
    return type(value)([_mapped(v, function) for v in value]) if isinstance(value, (list, tuple)) else value


def _is_deterministic(func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> bool:
    if name in ("cumsum", "cumsum_"):
        return not (kwargs.get("dtype") or args[0].dtype).is_floating_point
    if name == "bincount":
        return len(args) < 2 or args[1] is None
    if name in ("median", "nanmedian"):
        return not func._overloadname.startswith("dim")  # the one that returns indices
    if name.startswith("scatter_reduce"):
        return args[4] != "prod"
    return name not in _NOT_DETERMINISTIC and not ("backward" in name and name.startswith(_BACKWARDS))


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = func._schema.name.removeprefix("aten::")
    ours: list[PretendTensor] = []
    others: list[Tensor] = []

    def held(tensor: Tensor) -> Tensor:
        if type(tensor) is PretendTensor:
            ours.append(tensor)
            return tensor.held
        others.append(tensor)
        return tensor

    inner = [_mapped(value, held) for value in args]
    options = {key: _mapped(value, held) for key, value in kwargs.items()}
    wanted, generator = kwargs.get("device"), kwargs.get("generator")
    on_device = bool(ours) if wanted is None else torch.device(wanted).type == NAME
    crossing = bool(others) if ours else on_device
    if wanted is not None and name in _COPYING:
        crossing = bool(ours) != on_device
    read = bool(ours) and name.startswith(_READ) and name != "linalg_vector_norm"
    goes_on = kwargs.get("non_blocking") or (name == "copy_" and any(args[2:3]))
    if read or (crossing and name in _COPYING and not goes_on):
        WAITS.add(name)
    if on_device and generator is not None and generator.device.type == "cpu":
        raise RuntimeError(f"{name}: expected a generator of {NAME!r}, found one of the CPU")
    if ours and others and name not in _COPYING:
        mixed = [t for t in others if t.ndim]
        if name in _INDEXING and type(args[0]) is PretendTensor:
            mixed = [t for t in mixed if not any(t is index for index in args[1])]
        elif name in _INDEXING or (func._schema.is_mutable and type(args[0]) is not PretendTensor):
            mixed = others
        if mixed:
            shapes = [list(t.shape) for t in ours], [list(t.shape) for t in mixed]
            raise RuntimeError(f"{name}: tensors {shapes[0]} are on {DEVICE}, tensors {shapes[1]} on the CPU")
    if ours and torch.are_deterministic_algorithms_enabled() and not _is_deterministic(func, name, args, kwargs):
        raise RuntimeError(f"{name} does not have a deterministic implementation")
    if ours and not LIMITS.linalg and name.startswith(_DECOMPOSING) and name != "linalg_vector_norm":
        raise NotImplementedError(f"{name} is not implemented for {DEVICE}")
    if wanted is not None:
        options["device"] = torch.device("cpu")
    for unknown in ("non_blocking", "pin_memory"):
        options.pop(unknown, None)

    def back(result: Tensor) -> Tensor:
        for tensor in ours:  # changed in place
            if result is tensor.held:
                return tensor
        if not on_device or any(result is t for t in others):
            return result
        if result.dtype == torch.float64 and not LIMITS.float64:
            raise TypeError(f"{name}: can't make a float64 tensor on {DEVICE}, which has no float64")
        return PretendTensor(result)

    return _mapped(func(*inner, **options), back)


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    if isinstance(target, PretendTensor) and target.dtype == torch.float64 and not LIMITS.float64:
        raise TypeError(f"can't make a float64 tensor on {DEVICE}, which has no float64")
    if not non_blocking:
        WAITS.add("_copy_from")
    inside = [t.held if isinstance(t, PretendTensor) else t for t in (source, target)]
    inside[1].copy_(inside[0])
    return target


_EVERYTHING = torch.library.Library("_", "IMPL")
_EVERYTHING.fallback(lambda func, *args, **kwargs: _run(func, args, kwargs), "PrivateUse1")
_ATEN = torch.library.Library("aten", "IMPL")
_OPERATIONS = [torch.ops.aten.empty.memory_format, torch.ops.aten.empty_strided.default]
for _name in _FACTORIES:
    _packet = getattr(torch.ops.aten, _name)
    _OPERATIONS += [getattr(_packet, overload) for overload in _packet.overloads() if not overload.endswith("out")]
for _operation in _OPERATIONS:
    with suppress(RuntimeError):
        _ATEN.impl(_operation, lambda *args, _op=_operation, **kwargs: _run(_op, args, kwargs), "PrivateUse1")
for _key in ("CPU", "PrivateUse1"):
    with suppress(RuntimeError):
        _ATEN.impl("_copy_from", _copy_from, _key)
