"""Rows that the batch picks by index or mask, followed through the graph to the loss.

``logits[mask]`` has as many rows as there are labelled tokens: by chance a multiple of the number of examples, but no
even share for each. The graph knows the mask, so it can tell whose they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from lightning_influence.core.layout import BatchLayout
from lightning_influence.core.torch_private import ahead_of, name_of, saved, shape_of


class Rows(NamedTuple):
    """Whose the rows of a tensor are.

    Attributes:
        dim: The dimension that holds them.
        owner: The example of each, on the CPU.
    """

    dim: int
    owner: Tensor


@dataclass(frozen=True, eq=False)
class Picking:
    """How rows got from the tensor that they were picked from to where they are now.

    Attributes:
        source: Shape of the tensor that they were picked from.
        steps: Operations since, the picking first, each with the number of its output.
    """

    source: torch.Size
    steps: Sequence[tuple[Any, int]]

    def owners(self, layout: BatchLayout, n: int) -> Rows | None:
        """Follow the examples.

        Args:
            layout: Where they are in the source.
            n: Number of examples.

        Returns:
            Where they are now, or None if they can't be followed.
        """
        if not layout.fits(self.source, n):
            return None
        each, count = torch.arange(n), self.source[layout.dim] // n
        owner = each.repeat(count) if layout.order == "minor" else each.repeat_interleave(count)
        rows: Rows | None = Rows(layout.dim, owner)
        before = self.source
        for node, number in self.steps:
            step = _Step(node, number, before, shape_of(node, number))
            rows = None if rows is None else _MOVES[node.name()](step, rows)
            before = step.after
        return rows


def find_picking(tensor: Tensor) -> Picking | None:
    """Look back through the graph for an operation that picked rows by index or mask.

    The search goes on through what treats every row alike (views, linear maps, activations) and ends at anything else.

    Returns:
        None if no rows were picked.
    """
    if not _may_pick(tensor.grad_fn, tensor.output_nr):  # asked in every training step
        return None
    steps: list[tuple[Any, int]] = []
    picked, only_reordered, source = 0, True, torch.Size()
    node, number = tensor.grad_fn, tensor.output_nr
    while node is not None and (name := name_of(node)) in _MOVES:
        steps.append((node, number))
        following = _row_input(name, node, number)
        if following is None or not _has_rows(name, node, number, following):
            break
        # Rows looked up in a table of parameters are as many as the batch asks for: they are not picked from it.
        if name in _PICKS and not isinstance(getattr(following[0], "variable", None), nn.Parameter):
            picked, source = len(steps), shape_of(*following)
            only_reordered = only_reordered and _reorders(node, source)
        node, number = following
    # Sorted for packing and picked: followed from before the sort. Only put in order again: nothing was picked.
    if not picked or only_reordered:
        return None
    return Picking(source, steps[:picked][::-1])


def _reorders(node: Any, source: torch.Size) -> bool:
    """Tell whether all rows were picked, each once: sorted sequences brought back into the order of the batch."""
    if node.name() != "IndexSelectBackward0":
        return False
    index, size = saved(node, "index"), source[saved(node, "dim") % len(source)]
    return index.numel() == size and torch.equal(index.sort().values, torch.arange(size, device=index.device))


def _may_pick(node: Any, number: int) -> bool:
    """Tell whether there is something that may have picked rows, without a look at shapes where there is no choice."""
    while node is not None and (name := name_of(node)) in _MOVES:
        if name in _PICKS:
            return True
        node, number = _row_input(name, node, number) or (None, 0)
    return False


def _has_rows(name: str, node: Any, number: int, following: tuple[Any, int]) -> bool:
    """Tell whether the rows of an input are those of the output: a constant may have made many of one."""
    return name in _ROW_INPUT or len(ahead_of(node)) == 1 or shape_of(*following) == shape_of(node, number)


def _row_input(name: str, node: Any, number: int) -> tuple[Any, int] | None:
    """The input that may have the rows of the output: the one that the table names, or the only one of its shape."""
    ahead = ahead_of(node)
    if name in _ROW_INPUT:
        ahead = (ahead[_ROW_INPUT[name]],)
    reached = [place for place in ahead if place[0] is not None]
    if len(reached) > 1:
        reached = [place for place in reached if shape_of(*place) == shape_of(node, number)]
    return reached[0] if len(reached) == 1 else None


# ----------------------------------------------------------------------------------------- steps through the graph


class _Step(NamedTuple):
    """An operation, the number of its output, and the shapes before and after it."""

    node: Any
    number: int
    before: torch.Size
    after: torch.Size

    def saved(self, name: str) -> int:
        """Return a saved number."""
        return _signed(saved(self.node, name))

    @property
    def dim(self) -> int:
        """The dimension that it is about."""
        return self.saved("dim") % len(self.before)


def _signed(value: int) -> int:
    """Undo the wrap-around of negative numbers saved by a node."""
    return value - 2**64 if value >= 2**63 else value


_Move: TypeAlias = Callable[[_Step, Rows], "Rows | None"]


def _kept(step: _Step, rows: Rows) -> Rows | None:
    return rows if step.before == step.after else None


def _rowwise(step: _Step, rows: Rows) -> Rows | None:
    return rows if step.before[:-1] == step.after[:-1] and rows.dim < len(step.before) - 1 else None


def _viewed(step: _Step, rows: Rows) -> Rows | None:
    """Follow a change of shape: dimensions split, or merge with their neighbours."""
    before, after = step.before, step.after
    if before == after:
        return rows
    if len(rows.owner) == 1 or 0 in before:
        return None
    # Only the dimensions between those that stay at the front and at the end have changed.
    front = _alike(before, after)
    end = _alike(before[front:][::-1], after[front:][::-1])
    if rows.dim < front:
        return rows
    if rows.dim >= len(before) - end:
        return Rows(rows.dim + len(after) - len(before), rows.owner)
    spread = _spread(Rows(rows.dim - front, rows.owner), before[front : len(before) - end])
    found = _one_dimension(spread.reshape(after[front : len(after) - end]))
    return None if found is None else Rows(front + found.dim, found.owner)


def _alike(a: Sequence[int], b: Sequence[int]) -> int:
    """Count the sizes that are the same from the start."""
    return next((k for k, pair in enumerate(zip(a, b, strict=False)) if pair[0] != pair[1]), min(len(a), len(b)))


def _spread(rows: Rows, shape: Sequence[int]) -> Tensor:
    """Return the owner of every element."""
    return rows.owner.view([-1 if d == rows.dim else 1 for d in range(len(shape))]).expand(*shape)


def _one_dimension(owners: Tensor) -> Rows | None:
    """Return the only dimension along which the owners differ, and them; None if they differ along several."""
    if not owners.numel():
        return Rows(owners.shape.index(0), owners.new_empty(0))
    for dim in range(owners.ndim):
        along = Rows(dim, owners[tuple(slice(None) if d == dim else 0 for d in range(owners.ndim))])
        if torch.equal(owners, _spread(along, owners.shape)):
            return along
    return None


def _permuted(step: _Step, rows: Rows) -> Rows | None:
    dims = list(range(len(step.before)))
    if step.node.name() == "PermuteBackward0":
        dims = [_signed(dim) % len(dims) for dim in saved(step.node, "dims")]
    else:
        first, second = (0, 1) if step.node.name() == "TBackward0" else (step.saved("dim0"), step.saved("dim1"))
        dims[first], dims[second] = dims[second], dims[first]
    return Rows(dims.index(rows.dim), rows.owner)


def _selected(step: _Step, rows: Rows) -> Rows | None:
    return None if step.dim == rows.dim else Rows(rows.dim - (step.dim < rows.dim), rows.owner)


def _taken(step: _Step, rows: Rows) -> Rows | None:
    """Follow what takes a part of one dimension."""
    if step.dim != rows.dim:
        return rows
    owner = rows.owner[_TAKEN[step.node.name()](step)]
    return Rows(rows.dim, owner) if len(owner) == step.after[step.dim] else None


def _split(step: _Step) -> slice:
    start = step.number * saved(step.node, "split_size")
    return slice(start, start + step.after[step.dim])


def _indexed(step: _Step, rows: Rows) -> Rows | None:
    indices: list[slice | Tensor] = []
    sizes: list[int] = []
    for index in saved(step.node, "indices"):
        mask = index is not None and index.dtype in (torch.bool, torch.uint8)
        indices.append(slice(None) if index is None else index.cpu().bool() if mask else index.cpu())
        sizes += [1] if index is None else step.before[len(sizes) :][: index.ndim if mask else 1]
    # One element is enough of what no index picks from: logits may have many classes.
    sizes += [1] * (len(step.before) - len(sizes))
    sizes[rows.dim] = len(rows.owner)
    return _one_dimension(_spread(rows, sizes)[tuple(indices)])


def _masked(step: _Step, rows: Rows) -> Rows | None:
    mask = saved(step.node, "mask").cpu()
    if torch.broadcast_shapes(step.before, mask.shape) != step.before:
        return None
    return Rows(0, _spread(rows, step.before)[mask.expand(step.before)])


def _packed(step: _Step, rows: Rows) -> Rows | None:
    if rows.dim != (0 if saved(step.node, "batch_first") else 1):
        return None
    return Rows(0, torch.cat([rows.owner[: int(size)] for size in saved(step.node, "result1")]))


_ELEMENTWISE = """
    Abs Add Clamp ClampMin ClampMax Clone Div Elu Exp Gelu Hardsigmoid Hardswish Hardtanh LeakyRelu LogSigmoid
    LogSoftmax Mish Mul NativeDropout Neg Relu Sigmoid Silu Softmax Softplus Sub Tanh ToCopy
"""
_VIEWS = "Alias ReshapeAlias Squeeze UnsafeView Unsqueeze View"
# Which input of a matrix product or a norm has the rows.
_ROW_INPUT = {"AddmmBackward0": 1, "MmBackward0": 0, "LinearBackward0": 0, "NativeLayerNormBackward0": 0}
_TAKEN: dict[str, Callable[[_Step], Any]] = {
    "SliceBackward0": lambda step: slice(step.saved("start"), step.saved("end"), saved(step.node, "step")),
    "SplitBackward0": _split,
    "IndexSelectBackward0": lambda step: saved(step.node, "index").cpu(),
}
_PICKS = {"IndexBackward0", "IndexSelectBackward0", "MaskedSelectBackward0", "PackPaddedSequenceBackward0"}
_MOVES: dict[str, _Move] = {
    **{f"{name}Backward{k}": _kept for name in _ELEMENTWISE.split() for k in range(2)},
    **{f"{name}Backward{k}": _viewed for name in _VIEWS.split() for k in range(4)},
    **dict.fromkeys(_ROW_INPUT, _rowwise),
    **dict.fromkeys(("PermuteBackward0", "TransposeBackward0", "TBackward0"), _permuted),
    **dict.fromkeys(_TAKEN, _taken),
    "SelectBackward0": _selected,
    "IndexBackward0": _indexed,
    "MaskedSelectBackward0": _masked,
    "PackPaddedSequenceBackward0": _packed,
}
