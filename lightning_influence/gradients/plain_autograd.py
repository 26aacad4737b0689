"""Gradients by plain autograd, one example at a time: of parameters that have no rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeAlias

import torch
from torch import Tensor

from lightning_influence.core.precision import working
from lightning_influence.gradients.coverage import Coverage

Start: TypeAlias = "tuple[list[Tensor], list[Tensor]]"
"""Tensors, and gradients with respect to them, to run backward from."""

# Steps that `squeeze()` the batch away do not meet a batch of one.
_COPIES = 2


def gradients_one_by_one(
    coverage: Coverage, indices: Sequence[int], starts: Callable[[int, int], Sequence[Start]]
) -> dict[str, list[dict[str, Tensor]]]:
    """Return the gradients of parameters that have no rows, by a forward and backward pass per example.

    Args:
        coverage: Its ``one_by_one`` names the blocks.
        indices: The examples of a batch, ``n`` of them.
        starts: Takes an example and a number of copies; returns where to run backward from with a batch of these, for
            every draw of labels.

    Returns:
        Block name to its parameters' gradients ``[n, ...]``, for every draw of labels.
    """
    owned = [(b, name, p) for b in sorted(coverage.one_by_one) for name, p in coverage.blocks[b].parameters.items()]
    tensors = [parameter for _, _, parameter in owned]
    rows: list[list[list[Tensor]]] = []  # draw, parameter, example
    with differentiated(tensors):
        for index in indices:
            begun = starts(index, _COPIES)
            rows = rows or [[[] for _ in tensors] for _ in begun]
            for number, (outputs, gradients) in enumerate(begun):
                more = number + 1 < len(begun)
                found = torch.autograd.grad(outputs, tensors, gradients, retain_graph=more, materialize_grads=True)
                for column, gradient in zip(rows[number], found, strict=True):
                    column.append(working(gradient.to_dense() / _COPIES))
    result: dict[str, list[dict[str, Tensor]]] = {block: [{} for _ in rows] for block in coverage.one_by_one}
    for number, columns in enumerate(rows):
        for (block, name, _), column in zip(owned, columns, strict=True):
            result[block][number][name] = torch.stack(column)
    return result


@contextmanager
def differentiated(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Let tensors require gradients meanwhile."""
    flags = [tensor.requires_grad for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.requires_grad_(True)
        yield
    finally:
        for tensor, flag in zip(tensors, flags, strict=True):
            tensor.requires_grad_(flag)
