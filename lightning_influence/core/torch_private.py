"""Names of torch that it does not promise to keep: what the package needs of them is here, and tested one by one."""

from __future__ import annotations

import sys
import types
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import _pop_mode, _push_mode

__all__ = [
    "ahead_of",
    "argument_of_caller",
    "base_of",
    "eager_name",
    "eagerly",
    "event_writer",
    "filled_rows",
    "fsdp_modules",
    "has_hooks",
    "is_compiled",
    "is_packed",
    "is_view",
    "leave_mode",
    "meets_compiled",
    "name_of",
    "other_parameters",
    "packed_rows",
    "place_of",
    "saved",
    "set_version",
    "shape_of",
    "shard_of",
    "version",
    "versions",
    "visible_attention",
    "without_fsdp",
]

# The function, with a `has_torch_function` of its own that says no: the calls that it makes can be watched.
visible_attention = types.FunctionType(
    F.multi_head_attention_forward.__code__,
    {**F.multi_head_attention_forward.__globals__, "has_torch_function": lambda arguments: False},
    "multi_head_attention_forward",
    F.multi_head_attention_forward.__defaults__,
)


packed_rows: Callable[..., tuple[Tensor, Tensor]] = torch._VF._pack_padded_sequence
filled_rows: Callable[..., tuple[Tensor, Tensor]] = torch._VF._pad_packed_sequence


def event_writer(summary_writer: Any) -> Any:
    """Return what a ``SummaryWriter`` writes its event file with; opened again if it was closed."""
    return summary_writer._get_file_writer()


def leave_mode(mode: object) -> None:
    """Take a mode off the stack of function modes, from the middle if need be."""
    above: list[Any] = []
    while torch._C._len_torch_function_stack():
        found = _pop_mode()
        if found is mode:
            break
        above.append(found)
    for other in reversed(above):
        _push_mode(other)


def argument_of_caller(function: Callable[..., Any], name: str) -> Any:
    """Return a local variable of the innermost running call of a function; None if there is none.

    For arguments that a function of torch hands to no mode, ``weight`` of ``F.l1_loss``.
    """
    frame = sys._getframe()
    while frame.f_back is not None and frame.f_code is not function.__code__:
        frame = frame.f_back
    return frame.f_locals.get(name) if frame.f_code is function.__code__ else None


_NAMES: dict[type, str] = {}


def name_of(node: Any) -> str:
    """Return the name of a node of the graph. Of each type it is asked once: a text is made of it anew each time."""
    name = _NAMES.get(type(node))
    if name is None:
        name = str(node.name())
        if name == type(node).__name__:  # what torch has no type of its own for shares one
            _NAMES[type(node)] = name
    return name


def ahead_of(node: Any) -> tuple[tuple[Any, int], ...]:
    """Return the nodes of the graph that a node hands gradients to, each with the number of the output there."""
    found: tuple[tuple[Any, int], ...] = node.next_functions
    return found


def saved(node: Any, name: str) -> Any:
    """Return what a node of the graph has saved for the backward pass."""
    return getattr(node, f"_saved_{name}")


def is_packed(node: Any, name: str) -> bool:
    """Tell whether to ask a node for what it has saved would compute it: recomputed, or on another device."""
    return getattr(node, f"_raw_saved_{name}").unpack_hook is not None


def shape_of(node: Any, number: int = 0) -> torch.Size:
    """Return the shape of an output of a node of the graph."""
    return torch.Size(node._input_metadata[number].shape)


def is_view(tensor: Tensor) -> bool:
    """Tell whether a tensor is a view of another."""
    return tensor._is_view()


def base_of(tensor: Tensor) -> Tensor | None:
    """Return the tensor that another is a view of."""
    return tensor._base


def eager_name(path: str) -> str:
    """Drop what ``torch.compile`` puts into module paths."""
    return path.replace("_orig_mod.", "").removesuffix("._orig_mod").removesuffix("_orig_mod")


def has_hooks(tensor: Tensor) -> bool:
    """Tell whether somebody wants to be told of a tensor's gradient."""
    return bool(tensor._backward_hooks)


def version(tensor: Tensor) -> int:
    """Return how often a tensor was changed in place."""
    return tensor._version


def versions(tensors: Iterable[Tensor]) -> tuple[int, ...]:
    """Return how often each tensor was changed in place."""
    return tuple([tensor._version for tensor in tensors])


def place_of(tensor: Tensor) -> tuple[object, ...]:
    """Return what tells values apart without looking at them, as long as both are held: where they lie, and since when.

    Equal places hold equal values.
    """
    return tensor.data_ptr(), tensor._version, tensor.dtype, tensor.shape, tensor.stride()


def set_version(tensor: Tensor, version: int) -> None:
    """Set the count of in-place changes, which tells graphs whether what they have saved is still there."""
    torch._C._autograd._unsafe_set_version_counter((tensor,), (version,))


def eagerly() -> AbstractContextManager[Any]:
    """Return a context in which nothing that ``torch.compile`` has wrapped is compiled, or runs compiled."""
    # Nothing is compiled before the compiler is imported, which takes seconds.
    return torch.compiler.set_stance("force_eager") if _may_compile() else nullcontext()


def is_compiled(value: object) -> bool:
    """Tell whether a module or a function is one that ``torch.compile`` has wrapped."""
    if not _may_compile():
        return False
    if isinstance(value, nn.Module):
        wrapped = isinstance(value, torch._dynamo.eval_frame.OptimizedModule)
        return wrapped or getattr(value, "_compiled_call_impl", None) is not None
    own = getattr(value, "__dict__", {})
    return "_torchdynamo_orig_callable" in own and not own.get("_torchdynamo_disable")


class meets_compiled(AbstractContextManager["meets_compiled"]):
    """Notices whether something compiled is called that was not called so before; it then ends there.

    Attributes:
        found: Whether it was.
    """

    def __init__(self) -> None:
        self.found = False
        self._stance = torch.compiler.set_stance("fail_on_recompile") if _may_compile() else nullcontext()

    def __enter__(self) -> meets_compiled:
        self._stance.__enter__()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> bool:
        self._stance.__exit__(kind, error, traceback)
        self.found = isinstance(error, RuntimeError) and "fail_on_recompile" in str(error)
        return self.found


def _may_compile() -> bool:
    return "torch._dynamo" in sys.modules


def shard_of(tensor: Tensor) -> Tensor | None:
    """Return the part of a ``DTensor`` that this process holds; None of what is none."""
    # Asked of every parameter: its package, which takes long to import, is there where there are such tensors.
    known = sys.modules.get("torch.distributed.tensor")
    return tensor._local_tensor if known is not None and isinstance(tensor, known.DTensor) else None


@contextmanager
def other_parameters(places: Iterable[tuple[nn.Module, str, nn.Parameter]]) -> Iterator[None]:
    """Let modules hold other parameters within a ``with`` block, of whatever kind they are."""
    places = list(places)
    before = [module._parameters[name] for module, name, _ in places]
    recurrent = {id(module): module for module, _, _ in places if isinstance(module, nn.RNNBase)}.values()
    lists = [{name: vars(module)[name] for name in ("_flat_weights", "_flat_weight_refs")} for module in recurrent]
    try:
        for module, name, parameter in places:
            module._parameters[name] = parameter
        for module in recurrent:  # they hold them twice
            module._init_flat_weights()
        yield
    finally:
        for (module, name, _), own in zip(places, before, strict=True):
            module._parameters[name] = own
        for module, kept in zip(recurrent, lists, strict=True):
            vars(module).update(kept)


def fsdp_modules(module: nn.Module) -> list[Any]:
    """Return the modules that ``fully_shard`` was called with."""
    return [part for part in module.modules() if hasattr(type(part), "_get_fsdp_state")]


@contextmanager
def without_fsdp(module: nn.Module) -> Iterator[None]:
    """Leave out what ``fully_shard`` does before and after a module's forward, within a ``with`` block."""
    parts = fsdp_modules(module)
    for part in parts:
        part.reshard()  # the outermost one stays gathered after an evaluation
    tables = [(vars(part), name) for part in parts for name in ("_forward_pre_hooks", "_forward_hooks")]
    before = [own[name] for own, name in tables]
    states = {id(state): state for state in (part._get_fsdp_state() for part in parts)}.values()
    try:
        for own, name in tables:
            own[name] = OrderedDict((key, hook) for key, hook in own[name].items() if not _is_fsdp(hook))
        for state in states:  # of methods that are registered as forward ones
            state._pre_forward = lambda module, args, kwargs: (args, kwargs)
            state._post_forward = lambda module, args, output: output
        yield
    finally:
        for (own, name), table in zip(tables, before, strict=True):
            own[name] = table
        for state in states:
            vars(state).pop("_pre_forward", None)
            vars(state).pop("_post_forward", None)


def _is_fsdp(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("torch.distributed.fsdp.")
