"""Capture: activations and output gradients of every covered parameter from one forward and backward pass.

Calls of torch functions are watched, not modules: a functional call, a subclass of a layer, or attention's packed
projections are seen like any layer. Nothing in the forward pass is changed. The backward pass starts from the loss and
stops at the outputs of the calls, so that no weight gradient and nothing below the first of them is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from lightning_influence.core.containers import tensors_in
from lightning_influence.core.precision import largest_norm, working_dtype
from lightning_influence.gradients.block_rows import (
    Output,
    Source,
    Use,
    check_batch,
    direct_rows,
    joined,
    kept,
    modified,
    rows_of,
    unknown,
)
from lightning_influence.gradients.coverage import Coverage
from lightning_influence.gradients.trace import TracedUse
from lightning_influence.gradients.tracer import repeated_call
from lightning_influence.gradients.watch import FunctionWatch, name_of, outputs_of
from lightning_influence.layers.blocks import LayerError, NewPathError, ParameterBlock
from lightning_influence.layers.call import Call, Layouts, MatrixCall
from lightning_influence.layers.elementwise import ElementwiseCall, PReLUCall
from lightning_influence.layers.embedding import EmbeddingCall
from lightning_influence.layers.norm import NormCall
from lightning_influence.layers.patches import Activations, laid_out
from lightning_influence.layers.registry import read_call
from lightning_influence.layers.repeated import RepeatedCall
from lightning_influence.layers.rows import Rows
from lightning_influence.layers.site import NotUnderstoodError, Site


@dataclass(frozen=True, eq=False)
class LayerIO:
    """What one parameter block saw in one batch.

    Attributes:
        name: Block name.
        activations: ``[k, n, s, i]``, float32 or float64: one for all draws of labels, or one per draw where they
            depend on the labels (embeddings, see ``rows``). Those of convolutions are not laid out yet.
        gs: Output gradients ``[k, n, s, o]``, one per draw of labels (one for true labels), or one that all draws
            share. Each is the derivative of *that example's own* loss, not of the batch mean.
    """

    name: str
    activations: Sequence[Activations]
    gs: Sequence[Rows]

    @cached_property
    def xs(self) -> Sequence[Tensor]:
        """The activations, laid out."""
        return laid_out(self.activations)

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
        self._followed: dict[int, tuple[str, Tensor, ParameterBlock]] = {
            id(parameter): (name, parameter, block)
            for block in coverage.blocks.values()
            if block.name not in coverage.one_by_one
            for name, parameter in block.parameters.items()
        }
        self._flags: list[tuple[Tensor, bool]] = []
        self._order: list[tuple[str, Use]] = []
        self._outputs: list[Output] = []
        self._sources: dict[int, Source] = {}
        # Id of a parameter to the number of its uses so far and the traced paths that began like this.
        self._positions: dict[int, tuple[int, list[list[TracedUse]]]] = {}
        self._computed: dict[str, list[dict[str, Tensor]]] = {}
        self._examples: int | None = None

    def __enter__(self) -> Capture:
        # Frozen parameters outside of the coverage keep the graph from growing below the first covered one.
        thawed = [parameter for _, parameter, _ in self._followed.values()]
        if not thawed:  # all of them one by one: the loss still has to depend on something
            thawed = [p for block in self.coverage.blocks.values() for p in block.parameters.values()]
        self._flags = [(parameter, parameter.requires_grad) for parameter in thawed]
        for parameter, _ in self._flags:
            parameter.requires_grad_(True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for parameter, flag in self._flags:
            parameter.requires_grad_(flag)
        self._flags = []
        self.clear()

    def forward(self, n: int | None = None) -> _Forward:
        """Return a context in which calls are recorded; recomputation during backward is not.

        Args:
            n: Number of examples, which helps to tell paths through the model apart.
        """
        self._examples = n
        return _Forward(self)

    def clear(self) -> None:
        """Forget the last batch."""
        self._order, self._outputs, self._computed = [], [], {}
        self._sources, self._positions = {}, {}

    # ------------------------------------------------------------ forward pass

    def begin(self) -> None:
        """Start to follow the parameters through a forward pass."""
        self.clear()
        self._sources = {
            id(parameter): Source(parameter, ((name, parameter),)) for name, parameter, _ in self._followed.values()
        }

    @property
    def followed(self) -> Container[int]:
        """Ids of the covered parameters, and of what the running forward pass has made from them alone."""
        return self._sources

    def after(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
        before: tuple[Any, ...] | None = None,
    ) -> None:
        """Record a call in which a covered parameter met the batch; ``before`` holds what it has overwritten."""
        # Without gradients the call adds nothing to the parameters' gradient in training either.
        if not torch.is_grad_enabled() or not any(id(t) in self._sources for t in tensors_in((args, kwargs))):
            return
        made = [tensor for tensor in outputs_of(func, args, output) if tensor.requires_grad]
        if not made:
            return
        passed = [tensor for tensor in tensors_in((args, kwargs)) if id(tensor) in self._sources]
        sources = [self._sources[id(tensor)] for tensor in passed]
        parameters = dict((name, parameter) for source in sources for name, parameter in source.parameters)
        traced = [self._traced(func, parameter, made[0]) for parameter in parameters.values()]
        use = next((use for use in traced if use is not None), None)
        if use is not None and use.kind == "penalty":
            return
        if use is None and not _meets_the_batch(func, passed, made):
            use = TracedUse("shared", func)
        if use is not None and use.kind == "shared":
            indices = self._looked_up(func, args, kwargs, passed, made)
            for tensor in made:
                self._sources[id(tensor)] = Source(tensor, tuple(parameters.items()), indices)
            return
        site = Site(func, args if before is None else before, kwargs, passed, made[0])
        names = sorted({self._followed[id(parameter)][2].name for parameter in parameters.values()})
        call: Call | None
        if use is not None and use.call is RepeatedCall and len(use.arguments) == len(list(tensors_in((args, kwargs)))):
            call = repeated_call(site, use.arguments)
        else:
            try:
                call = read_call(site)
            except NotUnderstoodError as error:
                raise LayerError(unknown(names, str(error))) from None
        if call is None or (use is not None and use.kind == "unknown"):
            raise LayerError(unknown(names, f"by {name_of(func)}, which is not a supported function"))
        self._record(call, use.layouts if use is not None else Layouts(), made[0])

    def _traced(self, func: Callable[..., Any], parameter: Tensor, output: Tensor) -> TracedUse | None:
        """Return what the trace says of the next use of a parameter, None if the parameter was not traced.

        Raises:
            NewPathError: If no traced path goes on like this.
        """
        key = id(parameter)
        if key not in self.coverage.trace.paths:
            return None
        number, paths = self._positions.get(key, (0, self.coverage.trace.paths[key]))
        following = [
            (path, use)
            for path in paths
            if (use := _next_use(path, number, func)) is not None and use.fits(output, self._examples)
        ]
        if any(use.kind == "batched" for _, use in following):
            # An output that has the examples where a batched use has them was not made without them.
            following = [(path, use) for path, use in following if use.kind != "shared"]
        if not following or any(use != following[0][1] for _, use in following):
            name = self._followed[key][0]
            raise NewPathError(unknown([name], f"by {name_of(func)}"))
        self._positions[key] = number + 1, [path for path, _ in following]
        return following[0][1]

    def _looked_up(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        passed: Sequence[Tensor],
        made: Sequence[Tensor],
    ) -> Tensor | None:
        """Return the indices of rows looked up in a parameter without the batch (position embeddings)."""
        if len(passed) != 1 or len(made) != 1 or id(passed[0]) not in self._followed:
            return None
        try:
            call = read_call(Site(func, args, kwargs, passed, made[0]))
        except NotUnderstoodError:
            return None
        plain = type(call) is EmbeddingCall and call.padding_idx is None
        return call.input if plain and call is not None else None

    def _record(self, call: Call, layouts: Layouts, output: Tensor) -> None:
        place = Output.of(output)
        self._outputs.append(place)
        roles: dict[str, dict[str, Source]] = {}
        for role, tensor in call.parameters.items():
            source = self._sources[id(tensor)]
            for _, parameter in source.parameters:
                roles.setdefault(self._followed[id(parameter)][2].name, {})[role] = source
        for name, of_block in roles.items():
            use = Use(call, layouts, place, tuple(tensor._version for tensor in call.inputs), of_block)
            self._order.append((name, use))

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
        edges = [place.edge for place in self._outputs]
        try:
            found = torch.autograd.grad(outputs, edges, gradients, retain_graph=not last, allow_unused=True)
        except RuntimeError as error:
            if "use_reentrant" in str(error) or "Checkpointing is not compatible" in str(error):
                raise LayerError(
                    "the model uses reentrant activation checkpointing, under which output gradients can't be taken; "
                    "pass `use_reentrant=False` to `torch.utils.checkpoint.checkpoint` (for transformers models "
                    '`gradient_checkpointing_kwargs={"use_reentrant": False}`).'
                ) from error
            changed = [name for name, use in self._order if use.changed]
            if changed and "modified by an inplace operation" in str(error):
                raise LayerError(modified(changed[0])) from error
            raise
        for place, gradient in zip(self._outputs, found, strict=True):
            place.add(gradient)

    def add_computed(self, name: str, draws: list[dict[str, Tensor]]) -> None:
        """Add per-example gradients that were computed one example at a time.

        Args:
            name: Block name.
            draws: Parameter name to ``[n, *shape]``, by draw.
        """
        self._computed[name] = draws

    @property
    def precise(self) -> bool:
        """Whether everything captured has at least single precision."""
        return all(
            tensor is None or not tensor.is_floating_point() or tensor.dtype in (torch.float32, torch.float64)
            for _, use in self._order
            for tensor in (use.call.input, *use.output.gradients)
        )

    @property
    def order(self) -> list[str]:
        """Names of the blocks used in the last forward pass, in order of their first use."""
        return list(dict.fromkeys(name for name, _ in self._order))

    def finite(self, n: int) -> Tensor:
        """Tell which examples have inputs and output gradients in every layer whose squares are finite: ``[n]`` bool.

        Everything made of gradients squares them, so that one huge number would spoil the sums that all share.
        """
        result: Tensor | None = None
        for name, use in self._order:
            if not use.output.reached:
                continue
            check_batch(name, use, n)
            found = [g for g in use.output.gradients if g is not None]
            gs = [_norms(use.layouts.output.by_example(g, n)) for g in found]
            norms = list(gs)
            call = use.call
            # Of elementwise functions not the input: masks are full of infinities, or of numbers that sum to one.
            if isinstance(call, (ElementwiseCall, PReLUCall)) and call.needs_input:
                norms += [_norms(call.direct(role, g, n, use.layouts)) for g in found for role in use.roles]
            elif isinstance(call, (MatrixCall, NormCall)) and call.needs_input and call.input.is_floating_point():
                x = _norms(use.layouts.input.by_example(call.input, n))
                norms += [x, *(x * g for g in gs)]
            result = _squarable(norms, result)
        for draws in self._computed.values():
            result = _squarable([_norms(tensor) for draw in draws for tensor in draw.values()], result)
        if result is None:
            raise LayerError("the loss does not depend on any covered layer that was called: nothing to attribute.")
        return result

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
        for name in [*self.order, *self._computed]:
            io = self.layer(name, n, keep)
            if io is not None:
                yield io
            if drain:
                del io
                self._order = [(owner, use) for owner, use in self._order if owner != name]
                self._computed.pop(name, None)

    def layer(self, name: str, n: int, keep: Tensor | None = None) -> LayerIO | None:
        """Return one block's activations and output gradients, or None if no gradient reached it."""
        block = self.coverage.blocks[name]
        if name in self._computed:
            laid_out = [direct_rows(block, self._computed[name])]
        else:
            laid_out = rows_of(block, [use for owner, use in self._order if owner == name and use.output.reached], n)
        if not laid_out:
            return None
        if keep is not None:
            laid_out = [([kept(x, keep) for x in xs], [kept(g, keep) for g in gs]) for xs, gs in laid_out]
        return LayerIO(name, *joined(laid_out))

    def features(self, n: int) -> Tensor | None:
        """Return the inputs of the last linear map or convolution, averaged over positions: ``[n, d]``."""
        for _, use in reversed(self._order):
            if isinstance(use.call, MatrixCall):
                return use.call.activations(n, use.layouts).mean(2).transpose(0, 1).reshape(n, -1)
        return None


class _Forward:
    """Lets a capture watch one forward pass."""

    def __init__(self, capture: Capture) -> None:
        self.capture = capture
        self.watch = _Watch(capture)

    def __enter__(self) -> None:
        self.capture.begin()
        self.watch.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.watch.__exit__(*error)


class _Watch(FunctionWatch):
    """Tells a capture of every call."""

    def __init__(self, capture: Capture) -> None:
        super().__init__()
        self.capture = capture

    @property
    def followed(self) -> Container[int]:
        return self.capture.followed

    def after(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
        before: tuple[Any, ...] | None,
    ) -> None:
        self.capture.after(func, args, kwargs, output, before)


def _norms(rows: Tensor) -> Tensor:
    """Return the length of everything that belongs to each example, ``[n]``."""
    norms: Tensor = torch.linalg.vector_norm(rows.reshape(len(rows), -1), dim=1, dtype=working_dtype(rows.dtype))
    return norms


def _squarable(norms: Sequence[Tensor], so_far: Tensor | None) -> Tensor | None:
    """Tell where all norms can be squared and added up; NaN can't."""
    for each in norms:
        good = each <= largest_norm(each.dtype)
        so_far = good if so_far is None else so_far & good
    return so_far


def _next_use(path: list[TracedUse], number: int, func: Callable[..., Any]) -> TracedUse | None:
    """Return the use at a place of a path if it is by this function."""
    if number < len(path):
        return path[number] if path[number].function == func else None
    # A loop that runs longer than in the trace: more of the same, if all of the same kind are alike.
    same = [use for use in path if use.function == func]
    return same[0] if same and path[-1].function == func and all(use == same[0] for use in same) else None


def _meets_the_batch(func: Callable[..., Any], passed: Sequence[Tensor], made: Sequence[Tensor]) -> bool:
    """Tell, without a trace, whether a call has other arguments than parameters: only views are known not to."""
    return not all(tensor._base is not None and any(tensor._base is p for p in passed) for tensor in made)
