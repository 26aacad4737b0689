"""Rows picked by their values (``h[mask]``), of which every example has a number of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_influence.gradients.follower import name_of

_WRITING = {Tensor.__setitem__} | {
    getattr(owner, name)
    for owner in (torch, Tensor)
    for stem in (*(f"index_{kind}" for kind in ("add", "copy", "put", "fill", "reduce")), "scatter", "scatter_add",
                 "scatter_reduce", "masked_scatter")
    for name in (stem, f"{stem}_")
    if hasattr(owner, name)
}  # fmt: skip
_PICKING = (torch.masked_select, Tensor.masked_select, torch.nonzero, Tensor.nonzero, torch.argwhere, Tensor.argwhere)


class PickedRows:
    """Follows rows that were picked by a mask, as long as they stay rows."""

    def __init__(self) -> None:
        self._tensors: dict[int, Tensor] = {}  # kept alive, or ids could be reused

    def among(self, tensors: Iterable[Tensor]) -> bool:
        """Tell whether any of the tensors holds such rows."""
        return any(id(tensor) in self._tensors for tensor in tensors)

    def follow(
        self,
        func: Callable[..., Any],
        given: int,
        tensors: Sequence[Tensor],
        of_batch: Sequence[bool],
        made: Sequence[Tensor],
    ) -> None:
        """Look at a call in which the batch takes part.

        Args:
            func: The function.
            given: Number of its arguments: ``torch.where`` of nothing but a mask picks, beside two numbers it does not.
            tensors: Those among them.
            of_batch: Whether each comes from the batch: a mask that does not takes as many of every example.
            made: What it made.
        """
        if name_of(func) == "_pad_packed_sequence":  # every row is in its place again
            return
        picks = func in _PICKING or (func == torch.where and given == 1)
        masks = [t for t, own in zip(tensors[1:], of_batch[1:], strict=True) if own and t.dtype == torch.bool]
        picks = picks or (func == Tensor.__getitem__ and bool(masks))
        if name_of(func) == "_pack_padded_sequence":
            picks, made = True, made[:1]
        rows = {len(t) for t in tensors if id(t) in self._tensors and t.ndim}
        # What is written back into a tensor of the whole batch (`back[mask] = rows`) is in its place again.
        whole = tensors[0] if func in _WRITING and tensors and id(tensors[0]) not in self._tensors else None
        for output in made:
            back = whole is not None and output.shape == whole.shape
            if picks or (output.ndim and len(output) in rows and not back):
                self._tensors[id(output)] = output
