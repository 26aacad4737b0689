"""Names of torch that it does not promise to keep: all that isolation needs of them is here."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["TorchDispatchMode", "eagerly", "is_compiled", "meets_compiled", "set_version"]


def versions(tensors: Iterable[Tensor]) -> tuple[int, ...]:
    """Return how often each tensor was changed in place."""
    return tuple([tensor._version for tensor in tensors])


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
