"""What the calls with a block's parameters contribute to its rows.

Index legend: ``k`` groups, ``n`` examples, ``s`` positions, ``i`` inputs, ``o`` outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from lightning_influence.core.precision import working, working_dtype
from lightning_influence.core.torch_private import base_of, place_of, versions
from lightning_influence.gradients.trace import view_of
from lightning_influence.layers.blocks import LayerError, MatrixBlock, ParameterBlock
from lightning_influence.layers.call import Call, Layouts, MatrixCall
from lightning_influence.layers.embedding import EmbeddingCall
from lightning_influence.layers.rows import Joined, OneHot, Rows, join

RowsByDraw = tuple[list[Tensor], list[Rows]]
"""Activations and output gradients, each one for all draws of labels or one per draw."""


@dataclass(eq=False)
class Output:
    """The output of one call: its place in the graph, and its gradient per draw.

    Attributes:
        edge: Where the gradient arrives.
        window: For an output that is a view of what has the edge: strides of that base, then size, strides and offset
            of the output in it.
        gradients: One per draw; None where the draw does not depend on the output.
    """

    edge: GradientEdge
    window: tuple[tuple[int, ...], torch.Size, tuple[int, ...], int] | None = None
    gradients: list[Tensor | None] = field(default_factory=list)

    @classmethod
    def of(cls, output: Tensor) -> Output:
        """Note where the gradient of an output arrives.

        The edge, not the tensor: it stays that of the output itself when an in-place operation follows. What is written
        into a view (``F.linear`` with a bias returns one for 3-D inputs) stands behind its base in the graph, and the
        view's own edge would be a dead end.
        """
        base = base_of(output)
        if base is None or base.is_leaf or 0 in output.stride():  # a repeated tensor: its base adds up the examples
            return cls(get_gradient_edge(output))
        offset = int(output.storage_offset() - base.storage_offset())
        return cls(get_gradient_edge(base), (base.stride(), output.shape, output.stride(), offset))

    def add(self, gradient: Tensor | None) -> None:
        """Keep the gradient of a further draw."""
        if gradient is not None and self.window is not None:
            of_base, size, stride, offset = self.window
            if gradient.stride() != of_base:
                laid_out = torch.empty_strided(gradient.shape, of_base, dtype=gradient.dtype, device=gradient.device)
                gradient = laid_out.copy_(gradient)
            gradient = gradient.as_strided(size, stride, gradient.storage_offset() + offset)
        self.gradients.append(gradient)

    @property
    def reached(self) -> bool:
        """Whether any draw depends on it."""
        return any(gradient is not None for gradient in self.gradients)


@dataclass(frozen=True, eq=False)
class Source:
    """A tensor made from parameters alone.

    Attributes:
        tensor: The tensor, in the graph.
        parameters: Full names and parameters that it was made from.
        looked_up: For rows looked up in one parameter: their indices.
    """

    tensor: Tensor
    parameters: tuple[tuple[str, Tensor], ...]
    looked_up: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Use:
    """One call, as far as one block takes part in it.

    Attributes:
        call: The call.
        layouts: Where the examples are.
        output: Its output.
        versions: Of the tensors whose values it needs.
        roles: Role to what was passed in it.
    """

    call: Call
    layouts: Layouts
    output: Output
    versions: tuple[int, ...]
    roles: dict[str, Source]

    @property
    def changed(self) -> bool:
        """Whether a tensor whose values it needs was overwritten since."""
        return versions(self.call.inputs) != self.versions

    def shares_activations(self, other: Use) -> bool:
        """Tell whether both lay out the same activations for their weights."""
        mine, theirs = self.call, other.call
        if not isinstance(mine, MatrixCall) or not isinstance(theirs, MatrixCall) or mine.geometry != theirs.geometry:
            return False
        if any("weight" not in use.roles for use in (self, other)) or ("bias" in self.roles) != ("bias" in other.roles):
            return False
        a, b = mine.input, theirs.input
        if self.layouts.input != other.layouts.input or (a.shape, a.dtype) != (b.shape, b.dtype):
            return False
        return place_of(a) == place_of(b) or torch.equal(a, b)


def rows_of(block: ParameterBlock, uses: Sequence[Use], n: int) -> list[RowsByDraw]:
    """Lay out the rows of a block: those of every matrix-like use, and the sum of all others.

    Args:
        block: The block.
        uses: Its uses that a gradient has reached.
        n: Number of examples.

    Raises:
        LayerError: If the examples can't be told apart, or an input was overwritten.
    """
    laid_out: list[RowsByDraw] = []
    direct: list[dict[str, Tensor]] = []  # name to [n, *shape], by draw
    for use in uses:
        check_batch(block.name, use, n)
        if use.changed:
            raise LayerError(modified(block.name))
        draws = [None if gradient is None else working(gradient) for gradient in use.output.gradients]
        if isinstance(block, MatrixBlock) and "weight" in use.roles and "weight" in use.call.matrix_roles:
            laid_out.append(_matrix_rows(block, use, draws, n))
            continue
        found = [_direct_gradients(use, draw, n) for draw in draws]
        looked_up = next((source.looked_up for source in use.roles.values() if source.looked_up is not None), None)
        if looked_up is not None and isinstance(block, MatrixBlock):
            laid_out.append(_position_rows(block, looked_up, [next(iter(draw.values())) for draw in found], n))
            continue
        direct = direct or [{} for _ in draws]
        for total, own in zip(direct, found, strict=True):
            for role, gradient in own.items():
                for name, value in _to_parameters(use.roles[role], gradient, block).items():
                    total[name] = total[name] + value if name in total else value
    if direct:
        laid_out.append(direct_rows(block, direct))
    return laid_out


def direct_rows(block: ParameterBlock, draws: Sequence[dict[str, Tensor]]) -> RowsByDraw:
    """Lay out per-example gradients ``[n, *shape]`` by parameter name, by draw."""
    pairs = [block.direct_rows(draw) for draw in draws]
    return [x for x, _ in pairs], [pairs[0][1]]


def joined(uses: Sequence[RowsByDraw]) -> RowsByDraw:
    """Lay the positions of several uses end to end, one-hot rows first."""
    if len(uses) == 1:
        return uses[0]
    ordered = sorted(uses, key=lambda use: isinstance(use[1][0], Tensor))
    draws_x, draws_g = max(len(xs) for xs, _ in uses), max(len(gs) for _, gs in uses)
    xs: list[Tensor] = [torch.cat([_draw(x, draw) for x, _ in ordered], 2) for draw in range(draws_x)]
    gs = [join([_draw(g, draw) for _, g in ordered]) for draw in range(draws_g)]
    return xs, gs


def _matrix_rows(block: MatrixBlock, use: Use, draws: Sequence[Tensor | None], n: int) -> RowsByDraw:
    call, view = use.call, view_of(use.roles["weight"].tensor, block.weight)
    if view is None or (isinstance(call, EmbeddingCall) and view.transposed):
        raise LayerError(unknown([block.name], "through another tensor than in the first batch"))
    if isinstance(call, MatrixCall):
        return block.linear_rows(call, draws, n, use.layouts, view.start, "bias" in use.roles)
    assert isinstance(call, EmbeddingCall)
    like = next(draw for draw in draws if draw is not None)
    pairs = [call.rows(torch.zeros_like(like) if draw is None else draw, n, use.layouts) for draw in draws]
    return [block.widened(x) for x, _ in pairs], [pairs[0][1]]


def _direct_gradients(use: Use, draw: Tensor | None, n: int) -> dict[str, Tensor]:
    """Return per-example gradients ``[n, *shape]`` of what was passed, by role."""
    if draw is not None:
        return {role: use.call.direct(role, draw, n, use.layouts) for role in use.roles}
    like = next(gradient for gradient in use.output.gradients if gradient is not None)
    dtype, device = working_dtype(like.dtype), like.device
    return {r: torch.zeros((n, *source.tensor.shape), dtype=dtype, device=device) for r, source in use.roles.items()}


def _position_rows(block: MatrixBlock, indices: Tensor, draws: Sequence[Tensor], n: int) -> RowsByDraw:
    """Lay out gradients ``[n, *indices, i]`` of rows that were looked up without the batch."""
    flat = indices.reshape(1, -1).expand(n, -1)
    xs: list[Tensor] = [block.widened(draw.reshape(1, n, flat.shape[1], -1)) for draw in draws]
    return xs, [OneHot(flat, block.shape[1])]


def _to_parameters(source: Source, gradient: Tensor, block: ParameterBlock) -> dict[str, Tensor]:
    """Carry per-example gradients ``[n, *shape]`` of a tensor over to the parameters that it was made from."""
    own = [(name, parameter) for name, parameter in source.parameters if name in block.parameters]
    if len(source.parameters) == 1 and source.tensor is source.parameters[0][1]:
        return {own[0][0]: gradient}
    starts, targets = gradient.to(source.tensor.dtype), [parameter for _, parameter in own]
    found = [
        torch.autograd.grad(source.tensor, targets, start, retain_graph=True, materialize_grads=True)
        for start in starts
    ]
    columns = zip(own, zip(*found, strict=True), strict=True)
    return {name: working(torch.stack(column)) for (name, _), column in columns}


def _draw(rows: Sequence[Any], draw: int) -> Any:
    return rows[draw] if len(rows) > 1 else rows[0]


def kept(rows: Any, keep: Tensor) -> Any:
    """Zero the rows of the examples that ``keep`` (``[n]`` bool) leaves out."""
    if isinstance(rows, OneHot):
        return rows.keep(keep)
    if isinstance(rows, Joined):
        return Joined(rows.onehot.keep(keep), kept(rows.dense, keep))
    return torch.where(keep.view(1, -1, 1, 1), rows, 0)


def check_batch(name: str, use: Use, n: int) -> None:
    """Raise ``LayerError`` unless the examples are where they should be."""
    call, layouts = use.call, use.layouts
    reached = next((g for g in use.output.gradients if g is not None), None)
    wrong = call.needs_input and call.examples_in_input and not layouts.input.fits(call.input.shape, n)
    if wrong or (reached is not None and not layouts.output.fits(reached.shape, n)):
        raise LayerError(
            f"layer {name!r} got an input of shape {tuple(call.input.shape)} for a batch of {n} examples; one "
            "dimension has to hold the examples, alone or with the same number of rows for each, for its gradients to "
            "be told apart by example. Keep the batch dimension, compute the gradients one example at a time "
            '(`uncovered="exact"`), or leave the layer out by `layers=` or by freezing it (requires_grad=False).'
        )


def modified(name: str) -> str:
    """Return the message for an input that was overwritten."""
    return (
        f"the input of layer {name!r} was modified in place after the layer had used it; training would fail on this "
        "too. Use the out-of-place form of that operation."
    )


def unknown(names: Sequence[str], how: str) -> str:
    """Return the message for parameters that are used in another way than before."""
    return (
        f"the parameters of layer {', '.join(map(repr, names))} are used {how}, in a way that was not seen in the "
        "first batch: their gradients can't be told apart by example. Leave the layer out by `layers=`, or freeze it."
    )
