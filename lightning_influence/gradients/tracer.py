"""How parameters meet the batch: seen once, in two tiny batches of different size.

What grows with the batch holds the examples; what does not is computed without them (position embeddings, relative
attention biases, reparametrised weights). Rows that share a dimension with the examples are told apart by values: the
last example of the larger batch is a copy of its first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_influence.core.containers import tensors_in
from lightning_influence.core.errors import Forgiving
from lightning_influence.core.layout import BatchLayout, Order, find_layout, settle_order
from lightning_influence.core.torch_private import place_of
from lightning_influence.gradients.follower import Arguments, Follower, Owners, name_of
from lightning_influence.gradients.picked_rows import PickedRows
from lightning_influence.gradients.trace import Trace, TracedUse, view_of
from lightning_influence.layers.call import Call, Layouts, MatrixCall
from lightning_influence.layers.elementwise import ExpandCall
from lightning_influence.layers.registry import read_call
from lightning_influence.layers.repeated import RepeatedCall
from lightning_influence.layers.site import NotSeparableError, NotUnderstoodError, Site

# What they return has the values of their first argument: adapters of another precision cast one input, each anew.
_COPIES = (Tensor.to, Tensor.type, Tensor.type_as, Tensor.float, Tensor.clone, Tensor.contiguous)


@dataclass(frozen=True)
class Shapes:
    """Shapes of one call's tensors, and the ids of parameters among them."""

    function: Callable[..., Any]
    parameters: tuple[int, ...]
    arguments: tuple[torch.Size, ...]
    outputs: tuple[torch.Size, ...]

    def is_like(self, other: Shapes) -> bool:
        """Tell whether the other can be the same call in another batch."""
        same = self.function == other.function and self.parameters == other.parameters
        return same and len(self.arguments) == len(other.arguments) and len(self.outputs) == len(other.outputs)


@dataclass(frozen=True)
class _Growth:
    """Shapes of one call in the smaller and in the larger batch, and the number of examples of both."""

    then: Shapes
    now: Shapes
    sizes: tuple[int, int]

    @property
    def of_arguments(self) -> list[bool]:
        return [a != b for a, b in zip(self.then.arguments, self.now.arguments, strict=True)]

    @property
    def of_outputs(self) -> bool:
        return self.then.outputs != self.now.outputs

    @property
    def argument_layouts(self) -> tuple[BatchLayout | None, ...]:
        """Where the examples are in each argument; None if nowhere, or if it can't be told."""
        pairs = zip(self.then.arguments, self.now.arguments, strict=True)
        return tuple(find_layout(small, large, self.sizes) for small, large in pairs)

    @property
    def output_layout(self) -> BatchLayout | None:
        return find_layout(self.then.outputs[0], self.now.outputs[0], self.sizes)


class Tracer(Follower):
    """Notes the shapes of every call; the smaller batch's at hand, follows parameters through the larger one.

    Args:
        parameters: The parameters to follow, by name; they require gradients.
        sizes: Number of examples of the smaller and of the larger batch.
        smaller: The calls of the same forward pass on the smaller batch; None in that pass itself.
        hidden: Trainable parameters of modules that the model does not register.

    Raises:
        NotUnderstoodError: While active, if the two passes do not make the same calls with parameters.
    """

    def __init__(
        self,
        parameters: Owners,
        sizes: tuple[int, int],
        smaller: Sequence[Shapes] | None = None,
        hidden: Sequence[Tensor] = (),
    ) -> None:
        super().__init__({} if smaller is None else parameters)
        self.calls: list[Shapes] = []
        self.trace = Trace(parameters=list(parameters.values()), steps=self._recurrent.steps)
        self._registered = {id(p) for p in parameters.values()}
        self._hidden = {id(p) for p in hidden}
        self._smaller, self._sizes = smaller, sizes
        self._next = 0  # of the smaller batch's calls
        self._growth: _Growth | None = None  # of the call at hand
        self._batched = False  # whether the batch takes part in it
        self._from_batch: dict[int, Tensor] = {}
        self._picked = PickedRows()
        self._copies: dict[object, object] = {}  # where a copy lies, to where its original does
        self._activations: dict[object, object] = {}

    def after(
        self, func: Callable[..., Any], arguments: Arguments, made: Sequence[Tensor], before: tuple[Any, ...]
    ) -> None:
        """Compare the shapes with those of the smaller batch, and note what became of parameters."""
        tensors = list(tensors_in(arguments))
        parameters = tuple(id(t) for t in tensors if id(t) in self._registered)
        call = Shapes(func, parameters, tuple(t.shape for t in tensors), tuple(t.shape for t in made))
        if self._smaller is None:
            self.calls.append(call)
            return
        then = self._in_smaller(call, any(id(t) in self.sources for t in tensors))
        self._growth = None if then is None else _Growth(then, call, self._sizes)
        grown = self._growth is None or any(self._growth.of_arguments)
        self._batched = grown or any(id(t) in self._from_batch for t in tensors)
        if self._batched:
            grows = [True] * len(tensors) if self._growth is None else self._growth.of_arguments
            of_batch = [new or id(t) in self._from_batch for new, t in zip(grows, tensors, strict=True)]
            self._picked.follow(func, sum(map(len, arguments)), tensors, of_batch, made)
            self._from_batch.update((id(t), t) for t in made)
            if func in _COPIES:
                origin = place_of(tensors[0])
                self._copies.setdefault(place_of(made[0]), self._copies.get(origin, origin))
        if torch.is_grad_enabled():
            self._note_strangers(func, tensors)
        else:
            # Not what an in-place call makes of a leaf, either: a teacher that follows the model, clipped weights.
            self.trace.without_gradients.update(id(t) for t in tensors if id(t) in self.sources)
        super().after(func, arguments, made, before)

    def _in_smaller(self, call: Shapes, follows: bool) -> Shapes | None:
        """Return the same call in the smaller batch; a loop over examples makes more of those without parameters."""
        smaller = self._smaller or ()
        if self._next < len(smaller) and smaller[self._next].is_like(call):
            self._next += 1
            return smaller[self._next - 1]
        if not follows:
            return None
        for number in range(self._next, len(smaller)):
            if smaller[number].is_like(call):
                self._next = number + 1
                return smaller[number]
        raise NotUnderstoodError("the model makes other calls for another size of the batch")

    def meets_batch(self, site: Site, owners: Owners) -> bool:
        """Note what the call does with the parameters."""
        func, growth = site.function, self._growth
        assert growth is not None
        if not self._batched and not growth.of_outputs:
            use = TracedUse("shared", func)
        elif growth.of_outputs:
            use = self._batched_use(site, growth)
        elif any(growth.of_arguments):
            use = TracedUse("unknown", func, reason=f"summed over the batch by {name_of(func)}")
        elif any(id(t) in self._from_batch and t.numel() > 1 for t in tensors_in((site.args, site.kwargs))):
            use = TracedUse("unknown", func, reason=f"used by {name_of(func)} on rows of some of the examples")
        else:
            use = TracedUse("penalty", func)
        for parameter in owners.values():
            self.trace.paths.setdefault(id(parameter), [[]])[0].append(replace(use, ndim=site.output.ndim))
        return use.kind != "shared"

    def _batched_use(self, site: Site, growth: _Growth) -> TracedUse:
        """Tell what a call in which parameters meet the batch does with them."""
        func, name = site.function, name_of(site.function)
        if self._picked.among(tensors_in((site.args, site.kwargs))):
            reason = f"used by {name} on rows picked by their values, of which every example has a number of its own"
            return TracedUse("unknown", func, reason=reason)
        if len(growth.now.outputs) != 1:
            return TracedUse("unknown", func, reason=f"used by {name}, which is not a supported function")
        try:
            call = read_call(site)
            if call is None:
                raise NotUnderstoodError(f"by {name}, which is not a supported function")
            use = self._use_of(func, call, self._layouts(site, growth, call))
            if any(use.views[role] is None for role in call.parameters if role in call.matrix_roles):
                raise NotUnderstoodError(f"by {name} as a reparametrised weight")
            return use
        except NotSeparableError as error:
            return TracedUse("unknown", func, reason=f"used {error}")
        except NotUnderstoodError as error:
            repeated = self._repeated_use(site, growth) or TracedUse("unknown", func)
            return replace(repeated, reason=f"used {error}")

    def _layouts(self, site: Site, growth: _Growth, call: Call) -> Layouts:
        """Tell where the examples are in the input and the output of a call."""
        layouts = dict(zip(map(id, tensors_in((site.args, site.kwargs))), growth.argument_layouts, strict=True))
        raw = _raw_input(call, site) if call.examples_in_input else None
        of_input, of_output = self._ordered(
            (None if raw is None else layouts[id(raw)], growth.output_layout),
            (site.output if raw is None else raw, site.output),
        )
        name = name_of(site.function)
        if of_output is None or (raw is not None and call.needs_input and of_input is None):
            raise NotUnderstoodError(f"by {name} on a tensor whose batch dimension can't be told")
        if isinstance(call, ExpandCall):
            # Without the batch, only dimensions of size 1 may have been repeated.
            shape = of_output.in_place(site.output, self._sizes[1]).shape[1:]
            (parameter,) = call.parameters.values()
            padded = (1,) * (len(shape) - parameter.ndim) + tuple(parameter.shape)
            if any(own not in (1, size) for own, size in zip(padded, shape, strict=True)):
                raise NotUnderstoodError(f"by {name} over more than the examples")
        return Layouts(of_input or of_output, of_output)

    def _use_of(
        self, func: Callable[..., Any], call: Call, layouts: Layouts, arguments: tuple[BatchLayout | None, ...] = ()
    ) -> TracedUse:
        roles, views = {}, {}
        for role, tensor in call.parameters.items():
            owners = [parameter for _, parameter in self.sources[id(tensor)].parameters]
            roles[role] = tuple(map(id, owners))
            views[role] = view_of(tensor, owners[0]) if len(owners) == 1 else None
        size = max(tensor.numel() for tensor in call.parameters.values()) if arguments else 0
        groups = getattr(call, "groups", 1)
        kind = type(call)
        return TracedUse(
            *("batched", func, layouts, kind, call.form, groups, roles, views, arguments),
            repeated_size=size,
            activations=self._activations_of(call, layouts),
        )

    def _activations_of(self, call: Call, layouts: Layouts) -> object:
        """Return what stands for the activations of a matrix."""
        if not isinstance(call, MatrixCall) or "weight" not in call.parameters:
            return None
        place = place_of(call.input)
        key = self._copies.get(place, place), call.geometry, layouts.input, "bias" in call.parameters
        return self._activations.setdefault(key, object())

    def _repeated_use(self, site: Site, growth: _Growth) -> TracedUse | None:
        """Try whether a function gives the same for an example alone; None if so, or if examples can't be told."""
        n, of_arguments, grown = self._sizes[1], growth.argument_layouts, growth.of_arguments
        if any(layout is None for layout, grows in zip(of_arguments, grown, strict=True) if grows):
            return None
        tensors = [*tensors_in((site.args, site.kwargs)), site.output]
        *layouts, of_output = self._ordered((*of_arguments, growth.output_layout), tensors)
        if of_output is None:
            return None
        call = RepeatedCall.of(site, tuple(layouts))
        of_input = next((layout for layout in layouts if layout is not None), of_output)
        same = False
        with Forgiving():  # whatever a function makes of a batch of one
            with torch.no_grad():
                alone = call.of_example(1, n, call.parameters)
            together = of_output.in_place(site.output.detach(), n)[1]
            scale = float(together.abs().max()) if together.numel() else 0.0
            same = alone.shape == together.shape and torch.allclose(alone, together, rtol=1e-3, atol=1e-4 * scale)
        return self._use_of(site.function, call, Layouts(of_input, of_output), tuple(layouts)) if same else None

    def _ordered(self, layouts: Sequence[BatchLayout | None], tensors: Sequence[Tensor]) -> list[BatchLayout | None]:
        """Tell in which order rows of examples lie, the same in all tensors of a call, from any of them.

        Returns:
            The layouts, with None for those that can't be told.
        """
        n = self._sizes[1]
        open_ = [(a, t) for a, t in zip(layouts, tensors, strict=True) if a is not None and a.order != "whole"]
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

    def _note_strangers(self, func: Callable[..., Any], tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            trained = tensor.requires_grad or id(tensor) in self._hidden
            if isinstance(tensor, nn.Parameter) and trained and id(tensor) not in self._registered:
                note = f"a parameter of shape {tuple(tensor.shape)} used by {name_of(func)}"
                if note not in self.trace.outside:
                    self.trace.outside.append(note)


def _raw_input(call: Call, site: Site) -> Tensor | None:
    """Return the argument that the call's input was read from."""
    for tensor in tensors_in((site.args, site.kwargs)):
        same = tensor.data_ptr() == call.input.data_ptr() and tensor.shape == call.input.shape
        if same and not site.is_parameter(tensor):
            return tensor
    return None
