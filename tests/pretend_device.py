"""A device for tests, made of CPU tensors, that is as strict as a real one.

It raises where an accelerator would: for tensors of two devices in one operation (0-dimensional ones of the host and
host indices of device tensors are allowed, as on CUDA), for generators of the host, and for `.numpy()`. Set
`LIMITS.float64` and `LIMITS.linalg` to False for one that has neither, as Apple's MPS.

torch has one key for devices of others (PrivateUse1), and what is registered under it stays: import this in a process
of its own.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.accelerators import Accelerator
from torch import Tensor, nn
from torch.utils import backend_registration
from torch.utils._pytree import tree_flatten, tree_map

NAME = "pretend"
_INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index")
# Norms of vectors are no decomposition: every device has them.
_DECOMPOSING = ("linalg_", "_linalg_", "cholesky", "geqrf", "orgqr", "triangular_solve", "lu_", "ormqr")
# Their kernels resize an empty result, which a wrapper does not follow.
_FACTORIES = ("arange", "eye", "linspace", "randperm", "tril_indices", "triu_indices")


@dataclass
class Limits:
    """What the device can do."""

    float64: bool = True
    linalg: bool = True


LIMITS = Limits()


class _Module(backend_registration._DummyBackendModule):
    """What torch asks of `torch.pretend`."""

    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def synchronize(self, device: Any = None) -> None:
        pass


backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
DEVICE = torch.device(NAME, 0)


class PretendTensor(Tensor):
    """A tensor of the device; `held` is the one of the host that has its numbers."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> PretendTensor:
        options: dict[str, Any] = {"dtype": held.dtype, "layout": held.layout, "device": DEVICE}
        if held.layout == torch.strided:
            options |= {"strides": held.stride(), "storage_offset": held.storage_offset()}
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
        return self.held.tolist()

    def untyped_storage(self) -> Any:
        return self.held.untyped_storage()

    def numpy(self, *args: Any, **options: Any) -> Any:
        raise TypeError(f"can't convert a tensor of {DEVICE} to numpy; use Tensor.cpu() first")

    __array__ = numpy

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(f"a tensor of {DEVICE} was pickled")


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = func._schema.name.removeprefix("aten::")
    everything, _ = tree_flatten((args, kwargs))
    ours = [t for t in everything if isinstance(t, PretendTensor)]
    others = [t for t in everything if isinstance(t, Tensor) and not isinstance(t, PretendTensor)]
    wanted = kwargs.get("device")
    on_device = bool(ours) if wanted is None else torch.device(wanted).type == NAME
    copying = name in ("copy_", "_to_copy", "_copy_from", "_foreach_copy_", "set_")
    generator = kwargs.get("generator")
    if on_device and generator is not None and generator.device.type == "cpu":
        raise RuntimeError(f"{name}: expected a generator of {NAME!r}, found one of the CPU")
    if ours and others and not copying:
        mixed = [t for t in others if t.ndim]
        if name in _INDEXING and isinstance(args[0], PretendTensor):
            indices, _ = tree_flatten(args[1])
            mixed = [t for t in mixed if not any(t is index for index in indices)]
        elif name in _INDEXING or (func._schema.is_mutable and not isinstance(args[0], PretendTensor)):
            mixed = others
        if mixed:
            shapes = [list(t.shape) for t in ours], [list(t.shape) for t in mixed]
            raise RuntimeError(f"{name}: tensors {shapes[0]} are on {DEVICE}, tensors {shapes[1]} on the CPU")
    if ours and not LIMITS.linalg and name.startswith(_DECOMPOSING) and name != "linalg_vector_norm":
        raise NotImplementedError(f"{name} is not implemented for {DEVICE}")

    wrapped = {id(t.held): t for t in ours}
    args, kwargs = tree_map(lambda t: t.held if isinstance(t, PretendTensor) else t, (args, kwargs))
    if wanted is not None:
        kwargs["device"] = torch.device("cpu")
    if name == "_to_copy":
        kwargs.pop("non_blocking", None)
    result = func(*args, **({**kwargs, "pin_memory": False} if kwargs.get("pin_memory") else kwargs))

    def back(value: Any) -> Any:
        if not isinstance(value, Tensor) or not on_device or any(value is t for t in others):
            return wrapped.get(id(value), value) if isinstance(value, Tensor) else value
        if value.dtype == torch.float64 and not LIMITS.float64:
            raise TypeError(f"{name}: can't make a float64 tensor on {DEVICE}, which has no float64")
        return wrapped.get(id(value)) if id(value) in wrapped else PretendTensor(value)

    return tree_map(back, result)


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    if isinstance(target, PretendTensor) and target.dtype == torch.float64 and not LIMITS.float64:
        raise TypeError(f"can't make a float64 tensor on {DEVICE}, which has no float64")
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


class PretendAccelerator(Accelerator):
    """What Lightning asks of an accelerator."""

    def setup_device(self, device: torch.device) -> None:
        pass

    def teardown(self) -> None:
        pass

    def get_device_stats(self, device: Any) -> dict[str, Any]:
        return {}

    @staticmethod
    def parse_devices(devices: Any) -> Any:
        return devices

    @staticmethod
    def get_parallel_devices(devices: Any) -> Any:
        return [DEVICE]

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def name() -> str:
        return NAME
