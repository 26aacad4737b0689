"""Modules that other processes hold a part of, as the one model that they all train: for the time of extra passes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_influence.core import distributed
from lightning_influence.core.meeting import meet
from lightning_influence.core.memory import is_out_of_memory, readable
from lightning_influence.core.torch_private import fsdp_modules, other_parameters, shard_of, without_fsdp
from lightning_influence.core.weights import checksum, parameters_of, swapped

# Shard to the parameter that stands for it in passes: the same one each time, as what is known of it goes by identity.
_whole: Any = WeakTensorKeyDictionary()
_under_way: WeakSet[nn.Module] = WeakSet()


def is_shard(tensor: Tensor) -> bool:
    """Tell whether a tensor is a ``DTensor``, of which each process holds a part."""
    return shard_of(tensor) is not None


def gathered(tensor: Tensor) -> Tensor:
    """Return all of a tensor that processes hold parts of; to be called on all of them. Others are returned as is."""
    shard = shard_of(tensor)
    if shard is None:
        return tensor
    device = torch.device(tensor.device_mesh.device_type)  # type: ignore[attr-defined]
    torch.empty(2 * tensor.numel(), dtype=tensor.dtype, device=device)  # fails before the others wait for this one
    meet("gathered", [tuple(tensor.shape), tensor.dtype])
    everything: Tensor = tensor.detach().to(device).full_tensor()  # type: ignore[attr-defined]
    same = everything.untyped_storage().data_ptr() == shard.untyped_storage().data_ptr()
    return everything.clone() if same else everything  # what each process holds whole is no copy


def names_of(module: nn.Module) -> dict[int, str]:
    """Return parameter names by id: of the parameters, and of the shards that an optimizer holds in their place."""
    names = {id(parameter): name for name, parameter in parameters_of(module).items()}
    for shard, parameter in list(_whole.items()):
        for one, other in ((shard, parameter), (parameter, shard)):
            if id(one) in names:
                names[id(other)] = names[id(one)]
    return names


def is_split(module: nn.Module) -> bool:
    """Tell whether ``fully_shard`` has split some of a module over processes."""
    return bool(fsdp_modules(module))


def apart(module: nn.Module) -> list[str]:
    """Return the parameters of which each process has its own; to be asked on all processes.

    They are those that no ``fully_shard`` splits, if they are trained or are not the same everywhere.
    """
    parts = fsdp_modules(module)
    for part in parts:
        part.reshard()
    split = {id(p) for part in parts for p in part.parameters() if is_shard(p)}
    left = [(name, p) for name, p in parameters_of(module).items() if id(p) not in split]
    told = zip(*distributed.gather_objects([_described(p.detach()) for _, p in left]), strict=True)
    return [name for (name, p), each in zip(left, told, strict=True) if p.requires_grad or len(set(each)) > 1]


@contextmanager
def whole(module: nn.Module) -> Iterator[None]:
    """Let a module be the one model that all processes train, within a ``with`` block; to be entered by all of them.

    What ``fully_shard`` has split is gathered, in the precision of the shards, and its hooks are left out: processes
    may make as many passes as they like. Buffers, of which each process has its own, are those of rank zero, as in
    checkpoints. Afterwards every shard, buffer and hook is what it was; what is written to parameters within is lost.

    Args:
        module: The model. One that is whole already is left alone.
    """
    if module in _under_way:
        yield
        return
    _under_way.add(module)
    with ExitStack() as guards:
        guards.callback(_under_way.discard, module)
        guards.enter_context(without_fsdp(module))
        guards.enter_context(_gathered_parameters(module))
        guards.enter_context(_buffers_of_rank_zero(module))
        yield


@contextmanager
def _gathered_parameters(module: nn.Module) -> Iterator[None]:
    places = [
        (part, name, shard)
        for part in module.modules()
        for name, shard in part._parameters.items()
        if shard is not None and is_shard(shard)
    ]
    shards = list({id(shard): shard for _, _, shard in places}.values())
    try:
        for shard in shards:
            everything = _gathered_or_refused(shard, shards)
            if shard not in _whole:
                _whole[shard] = nn.Parameter(everything, requires_grad=False)
            _whole[shard].data = everything
            _whole[shard].requires_grad = shard.requires_grad
        with other_parameters((part, name, _whole[shard]) for part, name, shard in places):
            yield
    finally:
        for kept in (_whole[shard] for shard in shards if shard in _whole):
            # The shape stays, without memory; a pass outside would get nothing that looks like a number.
            nothing = torch.nan if kept.is_floating_point() else 0
            kept.data = torch.full((), nothing, dtype=kept.dtype, device=kept.device).expand(kept.shape)


@contextmanager
def standing_in(module: nn.Module) -> Iterator[None]:
    """Let a module hold what stands for its shards in passes, without values: for who asks which parameters it has."""
    for part in fsdp_modules(module) if module not in _under_way else ():
        part.reshard()
    places = [
        (part, name, shard)
        for part in module.modules()
        for name, shard in part._parameters.items()
        if shard is not None and is_shard(shard) and shard in _whole
    ]
    for *_, shard in places:
        _whole[shard].requires_grad = shard.requires_grad
    with other_parameters((part, name, _whole[shard]) for part, name, shard in places):
        yield


def _gathered_or_refused(shard: Tensor, shards: list[nn.Parameter]) -> Tensor:
    try:
        return gathered(shard)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        size = sum(each.numel() * each.element_size() for each in shards)
        raise RuntimeError(
            f"extra passes are made of the whole model, {readable(size)} of parameters on each process, for which "
            f"{shard.device} has no memory left. Audit a checkpoint of it where there is."
        ) from error


@contextmanager
def _buffers_of_rank_zero(module: nn.Module) -> Iterator[None]:
    if distributed.world_size() == 1:
        yield
        return
    buffers = list(module.buffers())
    told = list(zip(*distributed.gather_objects([_described(buffer) for buffer in buffers]), strict=False))
    # Those that are alike but for their values: what differs more can't be that of another.
    others = [k for k, each in enumerate(told) if all(each) and len({kind for kind, _ in each}) == 1 < len(set(each))]
    places = {str(k): buffers[k] for k in others}
    with torch.no_grad():
        first = distributed.rank() == 0
        given = [buffer.detach() if first else torch.zeros_like(buffer) for buffer in places.values()]
        # Sums in which all but one are zeros; there are none of truth values.
        given = distributed.sum_across_processes([g.to(torch.uint8) if g.dtype == torch.bool else g for g in given])
    with swapped(places, dict(zip(places, given, strict=True))):
        yield


def _described(tensor: Tensor) -> tuple[str, str] | None:
    """Return what processes compare of a tensor; None of one that can't be written to, or read as bytes."""
    odd = tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta or tensor.is_inference()
    return None if odd or is_shard(tensor) else (f"{tuple(tensor.shape)} {tensor.dtype}", checksum([tensor]))
