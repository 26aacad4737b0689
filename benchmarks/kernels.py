"""Counts what a device would have to launch."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

FREE = ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "detach", "_unsafe_view", "alias")


class Kernels(TorchDispatchMode):
    """Counts operations that are no views and no plain allocations."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        views = any(each.alias_info is not None and not each.alias_info.is_write for each in func._schema.returns)
        self.count += not views and func._schema.name.removeprefix("aten::") not in FREE
        return func(*args, **(kwargs or {}))
