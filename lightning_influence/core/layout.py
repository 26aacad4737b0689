"""Where the examples of a batch are in a tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_influence.core.precision import wide

Order = Literal["whole", "major", "minor"]


@dataclass(frozen=True)
class BatchLayout:
    """The dimension that holds the examples, and in which order if it holds more than them.

    Attributes:
        dim: The dimension.
        order: ``"whole"``: its size is the number of examples ``n``. ``"major"``: it holds ``n * m`` rows, those of one
            example side by side (``[N, S, I]`` flattened to ``[N·S, I]``). ``"minor"``: ``m * n`` rows, one of each
            example in turn (``[S, N, I]`` flattened).
    """

    dim: int = 0
    order: Order = "whole"

    def fits(self, shape: torch.Size, n: int) -> bool:
        """Tell whether a tensor of this shape can hold ``n`` examples so."""
        if len(shape) <= self.dim:
            return False
        return shape[self.dim] == n if self.order == "whole" else shape[self.dim] % n == 0

    def by_example(self, tensor: Tensor, n: int) -> Tensor:
        """Bring the examples to the front: ``[n, m, ...]``, the other dimensions in their order."""
        moved = tensor.movedim(self.dim, 0)
        if self.order == "whole":
            return moved.unsqueeze(1)
        if self.order == "major":
            return moved.reshape(n, -1, *moved.shape[1:])
        return moved.reshape(-1, n, *moved.shape[1:]).transpose(0, 1)

    def in_place(self, tensor: Tensor, n: int) -> Tensor:
        """Bring the examples to the front and leave their rows where they were: ``[n, ..., m, ...]``."""
        return self.by_example(tensor, n).movedim(1, 1 + self.dim)


def find_layout(small: torch.Size, large: torch.Size, sizes: tuple[int, int]) -> BatchLayout | None:
    """Return the layout that two shapes of the same tensor tell, in batches of two sizes.

    Rows that share a dimension with the examples are taken for ``"major"``; ``settle_order`` looks at the values.

    Returns:
        None if no dimension grows in proportion to the batch, or more than one does.
    """
    if len(small) != len(large):
        return None
    grown = [dim for dim, (a, b) in enumerate(zip(small, large, strict=True)) if a != b]
    if len(grown) != 1:
        return None
    (dim,) = grown
    rows, rest = divmod(large[dim], sizes[1])
    if rest or small[dim] != rows * sizes[0]:
        return None
    return BatchLayout(dim, "whole" if rows == 1 else "major")


def settle_order(layout: BatchLayout, tensor: Tensor, n: int) -> Order | None:
    """Tell the order of rows from values: the first and the last example of the batch are copies, others are not.

    Args:
        layout: Where the rows are.
        tensor: A tensor of a batch whose last example is a copy of its first.
        n: Number of examples in that batch.

    Returns:
        None if the values do not tell (all examples alike, or noise on all of them).
    """
    values = wide(tensor.detach()) if tensor.is_floating_point() else tensor.detach().long()
    finite = values[torch.isfinite(values)].abs()
    scale = float(finite.max()) if len(finite) and tensor.is_floating_point() else 0.0  # numbers of tokens have none
    orders: tuple[Order, Order] = ("major", "minor")
    alike: list[Order] = []
    for order in orders:
        rows = BatchLayout(layout.dim, order).by_example(values, n)
        if torch.allclose(rows[0], rows[-1], rtol=1e-3 if scale else 0, atol=1e-4 * scale, equal_nan=True):
            alike.append(order)
    return alike[0] if len(alike) == 1 else None
