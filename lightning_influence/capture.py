"""Capture: activations and output gradients of every covered layer from one forward and backward pass.

The only file with hooks. Parameters are frozen during a captured pass; the first covered layer on each path makes
the graph start at its output, so that no weight gradient and nothing below that layer is computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils.hooks import RemovableHandle

from lightning_influence.layers import Coverage, LayerError, LayerOperation


@dataclass(frozen=True, eq=False)
class LayerIO:
    """What one parameter block saw in one batch.

    Attributes:
        name: Block name (module path).
        x: Activations ``[k, n, s, i]``, float32 or float64.
        gs: Output gradients ``[k, n, s, o]``, one tensor per draw of labels (one for true labels). Each is the
            derivative of *that example's own* loss, not of the batch mean.
    """

    name: str
    x: Tensor
    gs: Sequence[Tensor]


@dataclass(eq=False)
class _Use:
    """One call of a layer: its raw input, its output's place in the graph, and that output's gradient per draw."""

    input: Tensor
    version: int
    edge: GradientEdge
    gradients: list[Tensor | None] = field(default_factory=list)


class Capture:
    """Hooks on every covered layer, for the duration of a ``with`` block.

    A layer called several times in one forward pass has the positions of all its calls laid end to end: the sum
    over positions is then the exact gradient.

    Args:
        coverage: The layers.

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
        self._handles: list[RemovableHandle] = []
        self._uses: dict[str, list[_Use]] = {}
        self._recording = False
        self._draws = 0

    def __enter__(self) -> Capture:
        try:
            for name, operation in self.coverage.operations.items():
                hook = _ForwardHook(self, name)
                self._handles.append(operation.module.register_forward_hook(hook, with_kwargs=True))
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.clear()

    def forward(self) -> _Forward:
        """Return a context in which layer calls are recorded; recomputation during backward is not."""
        return _Forward(self)

    def clear(self) -> None:
        """Forget the last batch."""
        self._uses, self._draws = {}, 0

    def backward(self, outputs: Sequence[Tensor], gradients: Sequence[Tensor], *, last: bool = True) -> None:
        """Run one backward pass and keep every covered layer's output gradient as a further draw.

        Args:
            outputs: Tensors in the graph of the last forward pass.
            gradients: Gradients to start from, shaped like ``outputs``.
            last: Whether the graph may be freed.
        """
        uses = [use for uses in self._uses.values() for use in uses]
        if not uses:
            raise LayerError("no covered layer was called in the forward pass; does the model's forward use them?")
        edges = [use.edge for use in uses]
        found = torch.autograd.grad(outputs, edges, gradients, retain_graph=not last, allow_unused=True)
        for use, gradient in zip(uses, found, strict=True):
            use.gradients.append(gradient)
        self._draws += 1

    @property
    def precise(self) -> bool:
        """Whether everything captured has at least single precision."""
        return all(
            tensor is None or tensor.dtype in (torch.float32, torch.float64)
            for uses in self._uses.values()
            for use in uses
            for tensor in (use.input, *use.gradients)
        )

    @property
    def order(self) -> list[str]:
        """Names of the layers called in the last forward pass, in order of their first call."""
        return list(self._uses)

    def finite(self, n: int) -> Tensor:
        """Tell which examples have finite inputs and output gradients in every layer: ``[n]`` bool."""
        result: Tensor | None = None
        for name, uses in self._uses.items():
            for use in uses:
                reached = [gradient for gradient in use.gradients if gradient is not None]
                if not reached:
                    continue
                self.coverage.operations[name].check_batch(use.input, n)
                for tensor in (use.input, *reached):
                    # One sum instead of an elementwise test: NaN and inf survive addition.
                    good = torch.isfinite(tensor.reshape(n, -1).sum(1, dtype=_working_dtype(tensor)))
                    result = good if result is None else result & good
        if result is None:
            raise LayerError("the loss does not depend on any covered layer that was called: nothing to attribute.")
        return result

    def layers(self, n: int, keep: Tensor | None = None) -> Iterator[LayerIO]:
        """Yield the layers that took part, one at a time, so that only one is laid out in memory.

        Args:
            n: Number of examples in the batch.
            keep: ``[n]`` bool; the others' activations and gradients are set to zero (they may be NaN).
        """
        for name in self._uses:
            io = self.layer(name, n, keep)
            if io is not None:
                yield io

    def layer(self, name: str, n: int, keep: Tensor | None = None) -> LayerIO | None:
        """Return one layer's activations and output gradients, or None if no gradient reached it."""
        operation = self.coverage.operations[name]
        uses = [use for use in self._uses[name] if any(gradient is not None for gradient in use.gradients)]
        if not uses:
            return None
        activations = []
        gradients: list[list[Tensor]] = [[] for _ in range(self._draws)]
        for use in uses:
            if operation.has_weight:
                _check_unmodified(use, name)
            x = operation.activations(_zeroed(_working(use.input), keep), n)
            if keep is not None:  # the ones of the bias, too
                x = torch.where(keep.view(1, -1, 1, 1), x, 0)
            activations.append(x)
            for draw, raw in enumerate(use.gradients):
                if raw is None:  # this draw's logits do not depend on this call
                    gradients[draw].append(x.new_zeros((*x.shape[:3], operation.shape[1])))
                else:
                    gradients[draw].append(operation.output_gradients(_zeroed(_working(raw), keep), n))
        if len(uses) == 1:
            return LayerIO(name, activations[0], [draw[0] for draw in gradients])
        return LayerIO(name, torch.cat(activations, 2), [torch.cat(draw, 2) for draw in gradients])

    def activations(self, name: str, n: int) -> Tensor:
        """Return the activations ``[k, n, s, i]`` of the last call of a layer."""
        operation: LayerOperation = self.coverage.operations[name]
        return operation.activations(_working(self._uses[name][-1].input), n)


class _ForwardHook:
    """Notes a layer's input and where its output stands in the graph."""

    def __init__(self, capture: Capture, name: str) -> None:
        self.capture = capture
        self.name = name

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        # Without gradients the call adds nothing to the parameters' gradient in training either.
        if not torch.is_grad_enabled():
            return output
        raw: Tensor = args[0] if args else kwargs["input"]
        if not output.requires_grad:
            # A copy, as an in-place activation may not overwrite the leaf itself.
            output = output.detach().requires_grad_().clone()
        if not self.capture._recording:
            # Run again in the backward pass of a checkpointed segment: the same graph, but no further use.
            return output
        # The edge, not the tensor: it stays that of the layer's own output when an in-place activation follows.
        use = _Use(raw.detach(), raw._version, get_gradient_edge(output))
        self.capture._uses.setdefault(self.name, []).append(use)
        return output


class _Forward:
    def __init__(self, capture: Capture) -> None:
        self.capture = capture

    def __enter__(self) -> None:
        self.capture.clear()
        self.capture._recording = True

    def __exit__(self, *error: object) -> None:
        self.capture._recording = False


def _check_unmodified(use: _Use, name: str) -> None:
    if use.input._version != use.version:
        raise LayerError(
            f"the input of layer {name!r} was modified in place after the layer had used it; training would fail on "
            "this too. Use the out-of-place form of that operation."
        )


def _working_dtype(tensor: Tensor) -> torch.dtype:
    return tensor.dtype if tensor.dtype in (torch.float32, torch.float64) else torch.float32


def _working(tensor: Tensor) -> Tensor:
    return tensor.to(_working_dtype(tensor))


def _zeroed(tensor: Tensor, keep: Tensor | None) -> Tensor:
    if keep is None:
        return tensor
    return torch.where(keep.view(-1, *[1] * (tensor.ndim - 1)), tensor, 0)
