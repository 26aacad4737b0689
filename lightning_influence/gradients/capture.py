"""Capture: activations and output gradients of every covered parameter from one forward and backward pass.

Calls of torch functions are watched, not modules: a functional call, a subclass of a layer, or attention's packed
projections are seen like any layer. Nothing in the forward pass is changed. The backward pass starts from the loss and
stops at the outputs of the calls, so that no weight gradient and nothing below the first of them is computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_influence.core.precision import largest_norm, working_dtype
from lightning_influence.gradients.block_rows import (
    Output,
    Use,
    check_batch,
    direct_rows,
    joined,
    kept,
    modified,
    rows_of,
)
from lightning_influence.gradients.coverage import Coverage
from lightning_influence.gradients.forward_uses import ForwardUses
from lightning_influence.gradients.plain_autograd import differentiated
from lightning_influence.layers.blocks import LayerError
from lightning_influence.layers.call import MatrixCall
from lightning_influence.layers.rows import Rows


@dataclass(frozen=True, eq=False)
class LayerIO:
    """What one parameter block saw in one batch.

    Attributes:
        name: Block name.
        xs: Activations ``[k, n, s, i]``, float32 or float64: one for all draws of labels, or one per draw where they
            depend on the labels (embeddings, see ``rows``).
        gs: Output gradients ``[k, n, s, o]``, one per draw of labels (one for true labels), or one that all draws
            share. Each is the derivative of *that example's own* loss, not of the batch mean.
    """

    name: str
    xs: Sequence[Tensor]
    gs: Sequence[Rows]

    @property
    def x(self) -> Tensor:
        """The activations of the first draw."""
        return self.xs[0]


class Capture:
    """Watches every call with a covered parameter, for the duration of a ``with`` block.

    A parameter used several times in one forward pass has the positions of all its uses laid end to end: the sum over
    positions is then the exact gradient.

    Args:
        coverage: The blocks.

    Example:
        >>> with Capture(coverage) as capture:
        ...     with capture.forward():
        ...         loss = task(module, batch)
        ...     capture.backward([loss], [grad])
        ...     for io in capture.layers(n):
        ...         ...
    """

    def __init__(self, coverage: Coverage) -> None:
        self.coverage = coverage
        self._thawed: AbstractContextManager[None] = nullcontext()
        self._uses: list[tuple[str, Use]] = []
        self._outputs: list[Output] = []
        self._computed: dict[str, list[dict[str, Tensor]]] = {}  # one example at a time

    def __enter__(self) -> Capture:
        # Frozen parameters outside of the coverage keep the graph from growing below the first covered one.
        blocks = self.coverage.blocks.values()
        # All of them one by one: the loss still has to depend on something.
        thawed = [block for block in blocks if block.name not in self.coverage.one_by_one] or blocks
        self._thawed = differentiated([p for block in thawed for p in block.parameters.values()])
        self._thawed.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._thawed.__exit__(*error)
        self.clear()

    def forward(self, n: int | None = None) -> ForwardUses:
        """Return a context in which calls are recorded; recomputation during backward is not.

        Args:
            n: Number of examples, which helps to tell paths through the model apart.
        """
        self.clear()
        seen = ForwardUses(self.coverage, n)
        self._uses, self._outputs = seen.uses, seen.outputs
        return seen

    def clear(self) -> None:
        """Forget the last batch."""
        self._uses, self._outputs = [], []
        self._computed = {}

    # ----------------------------------------------------------- backward pass

    def backward(self, outputs: Sequence[Tensor], gradients: Sequence[Tensor], *, last: bool = True) -> None:
        """Run one backward pass and keep every recorded output's gradient as a further draw.

        Args:
            outputs: Tensors in the graph of the last forward pass.
            gradients: Gradients to start from, shaped like ``outputs``.
            last: Whether the graph may be freed.

        Raises:
            LayerError: If nothing was recorded, or a reentrant checkpoint stands in the way.
        """
        if not self._outputs and self.coverage.one_by_one:
            return
        if not self._outputs:
            raise LayerError("no covered layer was called in the forward pass; does the model's forward use them?")
        edges = [output.edge for output in self._outputs]
        try:
            found = torch.autograd.grad(outputs, edges, gradients, retain_graph=not last, allow_unused=True)
        except RuntimeError as error:
            if "use_reentrant" in str(error) or "Checkpointing is not compatible" in str(error):
                raise LayerError(
                    "the model uses reentrant activation checkpointing, under which output gradients can't be taken; "
                    "pass `use_reentrant=False` to `torch.utils.checkpoint.checkpoint` (for transformers models "
                    '`gradient_checkpointing_kwargs={"use_reentrant": False}`).'
                ) from error
            changed = [name for name, use in self._uses if use.changed]
            if changed and "modified by an inplace operation" in str(error):
                raise LayerError(modified(changed[0])) from error
            raise
        for output, gradient in zip(self._outputs, found, strict=True):
            output.add(gradient)

    def add_computed(self, name: str, draws: list[dict[str, Tensor]]) -> None:
        """Add per-example gradients that were computed one example at a time.

        Args:
            name: Block name.
            draws: Parameter name to ``[n, *shape]``, by draw.
        """
        self._computed[name] = draws

    @property
    def held_bytes(self) -> int:
        """Memory that everything captured takes, before any of it is laid out."""
        found = [tensor for _, use in self._uses for tensor in (use.call.input, *use.output.gradients)]
        found += [tensor for draws in self._computed.values() for draw in draws for tensor in draw.values()]
        return sum({id(tensor): tensor.nbytes for tensor in found if tensor is not None}.values())

    def finite(self, n: int) -> Tensor:
        """Tell which examples have inputs and output gradients in every layer whose squares are finite: ``[n]`` bool.

        Everything made of gradients squares them, so that one huge number would spoil the sums that all share.
        """
        norms: list[Tensor] = []  # of all layers together: a device has much to launch as it is
        pairs: list[tuple[Tensor, Tensor]] = []
        for name, use in self._uses:
            if not use.output.reached:
                continue
            check_batch(name, use, n)
            found = [g for g in use.output.gradients if g is not None]
            gs = [_norms(use.layouts.output.by_example(g, n)) for g in found]
            norms += gs
            call = use.call
            # Of elementwise functions not the input: masks are full of infinities, or of numbers that sum to one.
            if call.bounded_by == "gradient" and call.needs_input:
                norms += [_norms(call.direct(role, g, n, use.layouts)) for g in found for role in use.roles]
            elif call.bounded_by == "input" and call.needs_input and call.input.is_floating_point():
                x = _norms(use.layouts.input.by_example(call.input, n))
                norms.append(x)
                pairs += [(x, g) for g in gs]
        for draws in self._computed.values():
            norms += [_norms(tensor) for draw in draws for tensor in draw.values()]
        if not norms:
            raise LayerError("the loss does not depend on any covered layer that was called: nothing to attribute.")
        bounds = [torch.stack(each) for (each,) in _by_type([(norm,) for norm in norms])]
        bounds += [torch.stack(xs) * torch.stack(gs) for xs, gs in _by_type(pairs)]
        return torch.stack([(each <= largest_norm(each.dtype)).all(0) for each in bounds]).all(0)

    # -------------------------------------------------------------------- rows

    def layers(self, n: int, keep: Tensor | None = None, *, drain: bool = False) -> Iterator[LayerIO]:
        """Yield the blocks that took part, one at a time, so that only one is laid out in memory.

        Args:
            n: Number of examples in the batch.
            keep: ``[n]`` bool; the others' activations and gradients are set to zero (they may be NaN).
            drain: Forget each block once the next one is asked for. The capture is of no more use then.
        """
        if drain:
            self._outputs = []  # they hold every gradient
        for name in dict.fromkeys([*(name for name, _ in self._uses), *self._computed]):
            io = self.layer(name, n, keep)
            if io is not None:
                yield io
            if drain:
                del io
                self._uses = [(owner, use) for owner, use in self._uses if owner != name]
                self._computed.pop(name, None)

    def layer(self, name: str, n: int, keep: Tensor | None = None) -> LayerIO | None:
        """Return one block's activations and output gradients, or None if no gradient reached it."""
        block = self.coverage.blocks[name]
        if name in self._computed:
            laid_out = [direct_rows(block, self._computed[name])]
        else:
            laid_out = rows_of(block, [use for owner, use in self._uses if owner == name and use.output.reached], n)
        if not laid_out:
            return None
        if keep is not None:
            laid_out = [([kept(x, keep) for x in xs], [kept(g, keep) for g in gs]) for xs, gs in laid_out]
        return LayerIO(name, *joined(laid_out))

    def same_activations(self, one: str, other: str) -> bool:
        """Tell whether two blocks have the same activations in this batch, before any of them is drained."""
        uses = [[use for owner, use in self._uses if owner == name and use.output.reached] for name in (one, other)]
        return len(uses[0]) == len(uses[1]) and all(a.shares_activations(b) for a, b in zip(*uses, strict=True))

    def features(self, n: int, *, partial: bool = False) -> Tensor | None:
        """Return the inputs of the last linear map or convolution, averaged over positions: ``[n, d]``.

        Args:
            n: Number of examples.
            partial: Whether to take only what the part of the loss that the backward pass began at depends on.
        """
        for _, use in reversed(self._uses):
            call = use.call
            if not isinstance(call, MatrixCall) or (partial and not use.output.reached):
                continue
            x = call.activations(n, use.layouts)
            if partial:
                (gradient, *_) = (g for g in use.output.gradients if g is not None)
                met = call.output_gradients(gradient, n, use.layouts).ne(0).any(-1).any(1).any(0)
                x = x[:, :, met] if bool(met.any()) else x
            return x.mean(2).transpose(0, 1).reshape(n, -1)
        return None


def _norms(rows: Tensor) -> Tensor:
    """Return the length of everything that belongs to each example, ``[n]``."""
    norms: Tensor = torch.linalg.vector_norm(rows.reshape(len(rows), -1), dim=1, dtype=working_dtype(rows.dtype))
    return norms


def _by_type(tuples: Sequence[tuple[Tensor, ...]]) -> Iterator[list[list[Tensor]]]:
    """Yield the columns of those tuples whose tensors are of the same types."""
    for types in dict.fromkeys(tuple(tensor.dtype for tensor in each) for each in tuples):
        alike = [each for each in tuples if tuple(tensor.dtype for tensor in each) == types]
        yield [list(column) for column in zip(*alike, strict=True)]
