"""Rows that the batch picks by index or mask, followed through the graph to the loss.

``logits[mask]`` has as many rows as there are labelled tokens: by chance a multiple of the number of examples, but no
even share for each. The graph knows the mask, so it can tell whose they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lightning_influence.core.layout import BatchLayout


@dataclass(frozen=True, eq=False)
class Picking:
    """How rows got from the tensor that they were picked from to where they are now.

    Attributes:
        source: Shape of the tensor that they were picked from.
        steps: Operations since, the picking first, each with the number of its output.
    """

    source: torch.Size
    steps: Sequence[tuple[Any, int]]

    def owners(self, layout: BatchLayout, n: int) -> tuple[int, Tensor] | None:
        """Follow the examples.

        Args:
            layout: Where they are in the source.
            n: Number of examples.

        Returns:
            The dimension that holds them now and the example of every row there (on the CPU), or None if they can't
            be followed.
        """
        if not layout.fits(self.source, n):
            return None
        each = torch.arange(n)
        rows = self.source[layout.dim] // n
        state: tuple[int, Tensor] | None = (
            layout.dim,
            each.repeat(rows) if layout.order == "minor" else each.repeat_interleave(rows),
        )
        before = self.source
        for node, number in self.steps:
            after = _shape(node, number)
            assert state is not None
            state = _MOVES[node.name()](node, number, *state, before, after)
            if state is None:
                return None
            before = after
        return state


def find_picking(tensor: Tensor) -> Picking | None:
    """Look back through the graph for an operation that picked rows by index or mask.

    The search goes on through what treats every row alike (views, linear maps, activations) and ends at anything else.

    Returns:
        None if no rows were picked.
    """
    steps: list[tuple[Any, int]] = []
    picked, only_reordered = 0, True
    node, number = tensor.grad_fn, tensor.output_nr
    while node is not None and node.name() in _MOVES:
        steps.append((node, number))
        following = _row_input(node, number)
        if node.name() in _PICKS and not _is_parameter(following):
            picked = len(steps)
            only_reordered = only_reordered and _reorders(node)
        if following is None:
            break
        node, number = following
    # Sorted for packing and picked: followed from before the sort. Only put in order again: nothing was picked.
    if not picked or only_reordered:
        return None
    steps = steps[:picked][::-1]
    return Picking(_PICKS[steps[0][0].name()](steps[0][0]), steps)


def _reorders(node: Any) -> bool:
    """Tell whether all rows were picked, each once: sorted sequences brought back into the order of the batch."""
    if node.name() != "IndexSelectBackward0":
        return False
    index, size = node._saved_index, node._saved_self_sym_sizes[node._saved_dim % len(node._saved_self_sym_sizes)]
    return index.numel() == size and torch.equal(index.sort().values, torch.arange(size, device=index.device))


def _is_parameter(place: tuple[Any, int] | None) -> bool:
    """Tell whether a tensor is a parameter: rows looked up in a table are as many as the batch asks for."""
    return place is not None and isinstance(getattr(place[0], "variable", None), nn.Parameter)


# ------------------------------------------------------------------------------------- steps through the graph

_State: TypeAlias = "tuple[int, Tensor] | None"
_Move: TypeAlias = Callable[[Any, int, int, Tensor, torch.Size, torch.Size], _State]


def _shape(node: Any, number: int) -> torch.Size:
    return torch.Size(node._input_metadata[number].shape)


def _row_input(node: Any, number: int) -> tuple[Any, int] | None:
    """The input whose rows are those of the output: the only one of its shape, or the one that the table names."""
    inputs = node.next_functions
    if node.name() in _ROW_INPUT:
        found, output = inputs[_ROW_INPUT[node.name()]]
        return None if found is None else (found, output)
    reached = [(found, output) for found, output in inputs if found is not None]
    if len(inputs) > 1:
        shape = _shape(node, number)
        reached = [(found, output) for found, output in reached if _shape(found, output) == shape]
    return reached[0] if len(reached) == 1 else None


def _kept(node: Any, number: int, dim: int, owner: Tensor, before: torch.Size, after: torch.Size) -> _State:
    return (dim, owner) if before == after else None


def _rowwise(node: Any, number: int, dim: int, owner: Tensor, before: torch.Size, after: torch.Size) -> _State:
    return (dim, owner) if before[:-1] == after[:-1] and dim < len(before) - 1 else None


def _viewed(node: Any, number: int, dim: int, owner: Tensor, before: torch.Size, after: torch.Size) -> _State:
    """Follow a change of shape: the dimension splits, or merges with its neighbours."""
    if before == after:
        return dim, owner
    if len(owner) == 1 or 0 in before:
        return None
    for inner, outer in _blocks(before, after):
        if dim in inner:
            spread = owner.view([len(owner) if d == dim else 1 for d in inner]).expand([before[d] for d in inner])
            found = _one_dimension(spread.reshape([after[d] for d in outer]))
            return None if found is None else (outer[found[0]], found[1])
    return None


def _blocks(before: torch.Size, after: torch.Size) -> list[tuple[list[int], list[int]]]:
    """Split two shapes of the same number of elements into the shortest parts that have as many elements each."""
    blocks: list[tuple[list[int], list[int]]] = []
    a = b = 0
    while a < len(before) and b < len(after):
        inner, outer = [a], [b]
        sizes = [before[a], after[b]]
        a, b = a + 1, b + 1
        while sizes[0] != sizes[1]:
            if sizes[0] < sizes[1]:
                inner.append(a)
                sizes[0] *= before[a]
                a += 1
            else:
                outer.append(b)
                sizes[1] *= after[b]
                b += 1
        blocks.append((inner, outer))
    return blocks


def _one_dimension(owners: Tensor) -> tuple[int, Tensor] | None:
    """Return the only dimension along which the owners differ, and them; None if they differ along several."""
    for dim in range(owners.ndim):
        along: Tensor = owners[tuple(slice(None) if d == dim else 0 for d in range(owners.ndim))]
        if torch.equal(owners, along.view([-1 if d == dim else 1 for d in range(owners.ndim)]).expand_as(owners)):
            return dim, along
    return None


def _permuted(node: Any, number: int, dim: int, owner: Tensor, before: torch.Size, after: torch.Size) -> _State:
    dims = list(range(len(before)))
    name = node.name()
    if name == "PermuteBackward0":
        dims = [_signed(d) % len(before) for d in node._saved_dims]
    else:
        first, second = (0, 1) if name == "TBackward0" else (_signed(node._saved_dim0), _signed(node._saved_dim1))
        dims[first], dims[second] = dims[second], dims[first]
    return dims.index(dim), owner


def _signed(value: int) -> int:
    """Undo the wrap-around of negative numbers saved by a node."""
    return value - 2**64 if value >= 2**63 else value


def _sliced(node: Any, number: int, dim: int, owner: Tensor, before: torch.Size, after: torch.Size) -> _State:
    if _signed(node._saved_dim) % len(before) != dim:
        return dim, owner
    taken = owner[slice(_signed(node._saved_start), _signed(node._saved_end), node._saved_step)]
    return (dim, taken) if len(taken) == after[dim] else None


def _selected(node: Any, number: int, dim: int, owner: Tensor, before: torch.Size, after: torch.Size) -> _State:
    gone = _signed(node._saved_dim) % len(before)
    return None if gone == dim else (dim - (gone < dim), owner)


def _split(node: Any, number: int, dim: int, owner: Tensor, before: torch.Size, after: torch.Size) -> _State:
    if _signed(node._saved_dim) % len(before) != dim:
        return dim, owner
    start = number * node._saved_split_size
    return dim, owner[start : start + after[dim]]


def _indexed(node: Any, number: int, dim: int, owner: Tensor, before: torch.Size, after: torch.Size) -> _State:
    indices: list[Tensor | None] = []
    for index in node._saved_indices:
        masks = index is not None and index.dtype in (torch.bool, torch.uint8)
        indices.extend(index.cpu().nonzero(as_tuple=True) if masks else [None if index is None else index.cpu()])
    places = [d for d, index in enumerate(indices) if index is not None]
    shape = torch.broadcast_shapes(*(index.shape for index in indices if index is not None))
    # The picked dimensions stand where they were if they are neighbours, else in front.
    together = places == list(range(places[0], places[-1] + 1))
    front = places[0] if together else 0
    own = indices[dim] if dim < len(indices) else None
    if own is None:
        passed = sum(d < dim for d in places)
        return dim - passed + (len(shape) if not together or places[0] < dim else 0), owner
    found = _one_dimension(owner[own].expand(shape))
    return None if found is None else (front + found[0], found[1])


def _index_selected(node: Any, number: int, dim: int, owner: Tensor, before: torch.Size, after: torch.Size) -> _State:
    picked = _signed(node._saved_dim) % len(before) == dim
    return (dim, owner[node._saved_index.cpu()]) if picked else (dim, owner)


def _masked(node: Any, number: int, dim: int, owner: Tensor, before: torch.Size, after: torch.Size) -> _State:
    mask = node._saved_mask.cpu()
    shape = torch.broadcast_shapes(before, mask.shape)
    if shape != before:
        return None
    spread = owner.view([-1 if d == dim else 1 for d in range(len(before))]).expand(before)
    return 0, spread[mask.expand(before)]


def _packed(node: Any, number: int, dim: int, owner: Tensor, before: torch.Size, after: torch.Size) -> _State:
    if dim != (0 if node._saved_batch_first else 1):
        return None
    return 0, torch.cat([owner[: int(size)] for size in node._saved_result1])


_ELEMENTWISE = [
    "Abs",
    "Add",
    "Clamp",
    "ClampMin",
    "ClampMax",
    "Clone",
    "Div",
    "Elu",
    "Exp",
    "Gelu",
    "Hardsigmoid",
    "Hardswish",
    "Hardtanh",
    "LeakyRelu",
    "LogSigmoid",
    "LogSoftmax",
    "Mish",
    "Mul",
    "NativeDropout",
    "Neg",
    "Relu",
    "Sigmoid",
    "Silu",
    "Softmax",
    "Softplus",
    "Sub",
    "Tanh",
    "ToCopy",
]
_VIEWS = ("Alias", "ReshapeAlias", "Squeeze", "UnsafeView", "Unsqueeze", "View")

_PICKS: dict[str, Callable[[Any], torch.Size]] = {
    "IndexBackward0": lambda node: torch.Size(node._saved_self_sym_sizes),
    "IndexSelectBackward0": lambda node: torch.Size(node._saved_self_sym_sizes),
    "MaskedSelectBackward0": lambda node: node._saved_self.shape,
    "PackPaddedSequenceBackward0": lambda node: torch.Size(node._saved_input_sym_sizes),
}
_MOVES: dict[str, _Move] = {
    **{f"{name}Backward{k}": _kept for name in _ELEMENTWISE for k in range(2)},
    **{f"{name}Backward{k}": _viewed for name in _VIEWS for k in range(4)},
    **dict.fromkeys(("AddmmBackward0", "MmBackward0", "LinearBackward0", "NativeLayerNormBackward0"), _rowwise),
    **dict.fromkeys(("PermuteBackward0", "TransposeBackward0", "TBackward0"), _permuted),
    "SliceBackward0": _sliced,
    "SelectBackward0": _selected,
    "SplitBackward0": _split,
    "IndexBackward0": _indexed,
    "IndexSelectBackward0": _index_selected,
    "MaskedSelectBackward0": _masked,
    "PackPaddedSequenceBackward0": _packed,
}
# Which input of a matrix product or a norm has the rows.
_ROW_INPUT = {"AddmmBackward0": 1, "MmBackward0": 0, "LinearBackward0": 0, "NativeLayerNormBackward0": 0}
