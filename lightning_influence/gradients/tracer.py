"""How parameters meet the batch: seen once, in two tiny batches of different size.

What grows with the batch holds the examples; what does not is computed without them (position embeddings, relative
attention biases, reparametrised weights). Rows that share a dimension with the examples are told apart by values: the
last example of the larger batch is a copy of its first.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_influence.core.containers import tensors_in
from lightning_influence.core.layout import BatchLayout, Order, find_layout, settle_order
from lightning_influence.gradients.trace import Trace, TracedUse, view_of
from lightning_influence.gradients.watch import FunctionWatch, name_of, outputs_of
from lightning_influence.layers.call import Call, Layouts, as_now
from lightning_influence.layers.elementwise import ExpandCall
from lightning_influence.layers.registry import read_call
from lightning_influence.layers.repeated import RepeatedCall
from lightning_influence.layers.site import NotSeparableError, NotUnderstoodError, Site


@dataclass(frozen=True)
class _Shapes:
    """Shapes of one call's tensors."""

    function: Callable[..., Any]
    arguments: tuple[torch.Size, ...]
    outputs: tuple[torch.Size, ...]

    @classmethod
    def of(cls, func: Callable[..., Any], args: Any, kwargs: Any, made: Sequence[Tensor]) -> _Shapes:
        return cls(func, tuple(t.shape for t in tensors_in((args, kwargs))), tuple(t.shape for t in made))


class ShapeRecorder(FunctionWatch):
    """Notes the shapes of every call, for a later ``Tracer`` to compare with."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[_Shapes] = []

    @property
    def followed(self) -> Container[int]:
        """Nothing: values do not matter here."""
        return frozenset()

    def after(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
        before: tuple[Any, ...] | None,
    ) -> None:
        """Note the shapes."""
        if made := outputs_of(func, args, output):
            self.calls.append(_Shapes.of(func, args, kwargs, made))


@dataclass(frozen=True, eq=False)
class _Event:
    """One call in the larger batch, next to the same call in the smaller one.

    Attributes:
        site: The call, the parameters among its arguments and its first output.
        made: All outputs.
        then: Shapes in the smaller batch.
        now: Shapes in this batch.
        sizes: Number of examples of both.
    """

    site: Site
    made: Sequence[Tensor]
    then: _Shapes
    now: _Shapes
    sizes: tuple[int, int]

    @property
    def grown(self) -> list[bool]:
        """Which arguments grow with the batch."""
        return [a != b for a, b in zip(self.then.arguments, self.now.arguments, strict=True)]

    @property
    def output_grown(self) -> bool:
        """Whether any output grows with the batch."""
        return self.then.outputs != self.now.outputs

    @property
    def of_arguments(self) -> tuple[BatchLayout | None, ...]:
        """Where the examples are in each argument; None if nowhere, or if it can't be told."""
        pairs = zip(self.then.arguments, self.now.arguments, strict=True)
        return tuple(find_layout(small, large, self.sizes) for small, large in pairs)

    @property
    def of_output(self) -> BatchLayout | None:
        """Where the examples are in the first output."""
        return find_layout(self.then.outputs[0], self.now.outputs[0], self.sizes)

    @property
    def repeatable(self) -> bool:
        """Whether the call can be made once more for each example: it is known where every tensor has them."""
        layouts = [layout for layout, grown in zip(self.of_arguments, self.grown, strict=True) if grown]
        return all(layout is not None for layout in (self.of_output, *layouts))


class Tracer(FunctionWatch):
    """Follows parameters through the larger of two batches, the smaller one's shapes at hand.

    Args:
        parameters: The parameters to follow; they require gradients.
        smaller: The calls of the same forward pass on fewer examples.
        sizes: Number of examples of the smaller and of this batch.
        hidden: Trainable parameters of modules that the model does not register.

    Raises:
        NotUnderstoodError: While active, if the two passes do not make the same calls.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        smaller: Sequence[_Shapes],
        sizes: tuple[int, int],
        hidden: Sequence[Tensor] = (),
    ) -> None:
        super().__init__()
        self.trace = Trace(parameters=list(parameters))
        self._known = {id(p) for p in parameters}
        self._hidden = {id(p) for p in hidden}
        self._smaller = smaller
        self._sizes = sizes
        self._number = 0
        # Tensors made from parameters alone, by id: the tensor (or its id could be reused) and its parameters.
        self._shared: dict[int, tuple[Tensor, tuple[int, ...]]] = {id(p): (p, (id(p),)) for p in parameters}
        self._from_batch: dict[int, Tensor] = {}
        # Rows picked by their values (``h[mask]``): how many an example has differs from batch to batch.
        self._picked: dict[int, Tensor] = {}

    @property
    def followed(self) -> Container[int]:
        """Ids of the parameters, and of what was made from parameters alone."""
        return self._shared

    def after(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
        before: tuple[Any, ...] | None,
    ) -> None:
        """Compare the shapes with those of the smaller batch, and note what became of parameters."""
        made = outputs_of(func, args, output)
        if not made:
            return
        now = _Shapes.of(func, args, kwargs, made)
        then = self._smaller[self._number] if self._number < len(self._smaller) else None
        self._number += 1
        same = then is not None and then.function == func and len(then.arguments) == len(now.arguments)
        if then is None or not same or len(then.outputs) != len(now.outputs):
            raise NotUnderstoodError("the model makes other calls for another size of the batch")
        if func == F.batch_norm and _takes_statistics(args, kwargs):
            self.trace.batch_statistics = True
        tensors = list(tensors_in((args, kwargs)))
        self._note_strangers(func, tensors)
        parameters = [t for t in tensors if id(t) in self._shared]
        site = Site(func, args if before is None else before, kwargs, parameters, made[0])
        event = _Event(site, made, then, now, self._sizes)
        batched = any(event.grown) or any(id(t) in self._from_batch for t in tensors)
        if batched:
            self._from_batch.update((id(t), t) for t in made)
            self._follow_picked(func, tensors, made)
        if not torch.is_grad_enabled():
            # Not what an in-place call makes of a leaf, either: a teacher that follows the model, clipped weights.
            self.trace.without_gradients.update(map(id, parameters))
            return
        differentiable = [t for t in made if t.requires_grad]
        if not parameters or not differentiable:
            return
        sources = tuple(dict.fromkeys(source for t in parameters for source in self._shared[id(t)][1]))
        if not batched and not event.output_grown:
            use = TracedUse("shared", func)
            self._shared.update((id(t), (t, sources)) for t in differentiable)
        elif event.output_grown:
            use = self._batched_use(event)
        elif any(event.grown):
            use = TracedUse("unknown", func, reason=f"summed over the batch by {name_of(func)}")
        elif any(id(t) in self._from_batch and t.numel() > 1 for t in tensors):
            reason = f"used by {name_of(func)} on rows of some of the examples"
            use = TracedUse("unknown", func, reason=reason)
        else:
            use = TracedUse("penalty", func)
        for source in sources:
            self.trace.paths.setdefault(source, [[]])[0].append(replace(use, ndim=made[0].ndim))

    def _batched_use(self, event: _Event) -> TracedUse:
        """Tell what a call in which parameters meet the batch does with them."""
        site, name = event.site, name_of(event.site.function)
        if any(id(t) in self._picked for t in tensors_in((site.args, site.kwargs))):
            reason = f"used by {name} on rows picked by their values, of which every example has a number of its own"
            return TracedUse("unknown", site.function, reason=reason)
        if len(event.made) != 1:
            return TracedUse("unknown", site.function, reason=f"used by {name}, which is not a supported function")
        try:
            call = read_call(site)
            if call is None:
                raise NotUnderstoodError(f"by {name}, which is not a supported function")
            use = self._use_of(site.function, call, self._layouts(event, call))
            if any(use.views[role] is None for role in call.parameters if role in call.matrix_roles):
                raise NotUnderstoodError(f"by {name} as a reparametrised weight")
            return use
        except NotSeparableError as error:
            return TracedUse("unknown", site.function, reason=f"used {error}")
        except NotUnderstoodError as error:
            use = TracedUse("unknown", site.function, reason=f"used {error}")
            repeated = self._repeated_use(event) if event.repeatable else None
            return use if repeated is None else replace(repeated, reason=use.reason)

    def _layouts(self, event: _Event, call: Call) -> Layouts:
        """Tell where the examples are in the input and the output of a call."""
        of_output = event.of_output
        layouts = dict(zip(map(id, tensors_in((event.site.args, event.site.kwargs))), event.of_arguments, strict=True))
        raw = self._raw_input(call, event.site) if call.examples_in_input else None
        of_input = None if raw is None else layouts[id(raw)]
        wanted = raw is not None and call.needs_input
        of_input, of_output = self._ordered(
            (of_input, of_output), (event.site.output if raw is None else raw, event.site.output)
        )
        if of_output is None or (wanted and of_input is None):
            name = name_of(event.site.function)
            raise NotUnderstoodError(f"by {name} on a tensor whose batch dimension can't be told")
        if isinstance(call, ExpandCall):
            # Without the batch, only dimensions of size 1 may have been repeated.
            shape = of_output.in_place(event.site.output, self._sizes[1]).shape[1:]
            (parameter,) = call.parameters.values()
            padded = (1,) * (len(shape) - parameter.ndim) + tuple(parameter.shape)
            if any(own not in (1, size) for own, size in zip(padded, shape, strict=True)):
                raise NotUnderstoodError(f"by {name_of(event.site.function)} over more than the examples")
        return Layouts(of_input or of_output, of_output)

    def _use_of(
        self, func: Callable[..., Any], call: Call, layouts: Layouts, arguments: tuple[BatchLayout | None, ...] = ()
    ) -> TracedUse:
        roles = {role: self._shared[id(t)][1] for role, t in call.parameters.items()}
        views = {}
        for role, tensor in call.parameters.items():
            owner = self._shared[roles[role][0]][0] if len(roles[role]) == 1 else None
            views[role] = None if owner is None else view_of(tensor, owner)
        transposed, groups = getattr(call, "transposed", False), getattr(call, "groups", 1)
        size = max(tensor.numel() for tensor in call.parameters.values()) if arguments else 0
        return TracedUse(
            "batched", func, layouts, type(call), transposed, groups, roles, views, arguments, repeated_size=size
        )

    def _repeated_use(self, event: _Event) -> TracedUse | None:
        """Try whether a function gives the same for an example alone."""
        site, n = event.site, self._sizes[1]
        tensors = [*tensors_in((site.args, site.kwargs)), site.output]
        *layouts, of_output = self._ordered((*event.of_arguments, event.of_output), tensors)
        if of_output is None:
            return None
        call = repeated_call(site, tuple(layouts))
        of_input = next((layout for layout in layouts if layout is not None), of_output)
        try:
            with torch.no_grad():
                alone = call.of_example(1, n, call.parameters)
            together = of_output.in_place(site.output.detach(), n)[1]
            scale = float(together.abs().max()) if together.numel() else 0.0
            same = alone.shape == together.shape and torch.allclose(alone, together, rtol=1e-3, atol=1e-4 * scale)
        except Exception:  # whatever a function makes of a batch of one
            same = False
        if not same:
            return None
        return self._use_of(site.function, call, Layouts(of_input, of_output), tuple(layouts))

    @staticmethod
    def _raw_input(call: Call, site: Site) -> Tensor | None:
        """Return the argument that the call's input was read from."""
        for tensor in tensors_in((site.args, site.kwargs)):
            same = tensor.data_ptr() == call.input.data_ptr() and tensor.shape == call.input.shape
            if same and not site.is_parameter(tensor):
                return tensor
        return None

    def _ordered(self, layouts: Sequence[BatchLayout | None], tensors: Sequence[Tensor]) -> list[BatchLayout | None]:
        """Tell in which order rows of examples lie, the same in all tensors of a call, from any of them.

        Returns:
            The layouts, with None for those that can't be told.
        """
        n = self._sizes[1]
        open_ = [
            (layout, tensor)
            for layout, tensor in zip(layouts, tensors, strict=True)
            if layout is not None and layout.order != "whole"
        ]
        orders = [settle_order(layout, tensor, n) for layout, tensor in open_]
        order: Order | None = next((found for found in orders if found is not None), None)
        if open_ and order is None:
            self.trace.ambiguous = True
        result: list[BatchLayout | None] = []
        for layout in layouts:
            if layout is None or layout.order == "whole":
                result.append(layout)
            else:
                result.append(None if order is None else BatchLayout(layout.dim, order))
        return result

    def _follow_picked(self, func: Callable[..., Any], tensors: Sequence[Tensor], made: Sequence[Tensor]) -> None:
        """Follow rows that were picked by a mask, as long as they stay rows."""
        picks = func in _PICKING or (func == torch.where and len(tensors) == 1)
        picks = picks or (func == Tensor.__getitem__ and any(t.dtype == torch.bool for t in tensors[1:]))
        if name_of(func) == "_pad_packed_sequence":  # every row is in its place again
            return
        if name_of(func) == "_pack_padded_sequence":
            self._picked[id(made[0])] = made[0]
            return
        rows = {len(t) for t in tensors if id(t) in self._picked and t.ndim}
        first = tensors[0] if tensors else None
        for output in made:
            # What is written back into a tensor of the whole batch (`back[mask] = rows`) is in its place again.
            back = (
                func in _WRITING and first is not None and id(first) not in self._picked and output.shape == first.shape
            )
            if picks or (output.ndim and len(output) in rows and not back):
                self._picked[id(output)] = output

    def _note_strangers(self, func: Callable[..., Any], tensors: Sequence[Tensor]) -> None:
        if not torch.is_grad_enabled():
            return
        for tensor in tensors:
            trained = tensor.requires_grad or id(tensor) in self._hidden
            if isinstance(tensor, nn.Parameter) and trained and id(tensor) not in self._known:
                note = f"a parameter of shape {tuple(tensor.shape)} used by {name_of(func)}"
                if note not in self.trace.outside:
                    self.trace.outside.append(note)


_WRITING = {Tensor.__setitem__} | {
    getattr(owner, name)
    for owner in (torch, Tensor)
    for stem in (*(f"index_{kind}" for kind in ("add", "copy", "put", "fill", "reduce")), "scatter", "scatter_add",
                 "scatter_reduce", "masked_scatter")
    for name in (stem, f"{stem}_")
    if hasattr(owner, name)
}  # fmt: skip
_PICKING = (torch.masked_select, Tensor.masked_select, torch.nonzero, Tensor.nonzero, torch.argwhere, Tensor.argwhere)


def repeated_call(site: Site, layouts: tuple[BatchLayout | None, ...]) -> RepeatedCall:
    """Make the call that runs a function once more for every example.

    Args:
        site: The call.
        layouts: Where the examples are in each of its tensors.
    """
    arguments = (tuple(site.args), dict(site.kwargs))
    batched = [t for t, layout in zip(tensors_in(arguments), layouts, strict=True) if layout is not None]
    distinct = {id(tensor): tensor for tensor in site.parameters}
    roles = {f"argument {position}": tensor for position, tensor in enumerate(distinct.values())}
    raw = (batched or list(distinct.values()))[0].detach()
    return RepeatedCall(raw, roles, as_now(site.function, site.output), arguments, layouts)


def _takes_statistics(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    names = ("input", "running_mean", "running_var", "weight", "bias", "training")
    return bool({**dict(zip(names, args, strict=False)), **kwargs}.get("training"))
