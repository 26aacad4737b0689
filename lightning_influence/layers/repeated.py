"""Calls without a closed form, made once more for each example."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_influence.core.containers import map_tensors, tensors_in
from lightning_influence.core.layout import BatchLayout
from lightning_influence.core.precision import working
from lightning_influence.layers.call import DirectCall, Layouts, as_now
from lightning_influence.layers.registry import overwrites
from lightning_influence.layers.site import Site


@dataclass(frozen=True, eq=False)
class RepeatedCall(DirectCall):
    """Any function that treats each example alone: run once more for each, and differentiated there.

    Attributes:
        function: The function.
        arguments: Its positional and keyword arguments, detached.
        argument_layouts: Of every tensor among them, in order: where the examples are, None if nowhere.
    """

    function: Callable[..., Tensor] = torch.clone
    arguments: tuple[tuple[Any, ...], Mapping[str, Any]] = ((), {})
    argument_layouts: tuple[BatchLayout | None, ...] = ()

    @classmethod
    def of(cls, site: Site, layouts: tuple[BatchLayout | None, ...]) -> RepeatedCall:
        """Make the call of a site; ``layouts`` tell where the examples are in each of its tensors."""
        arguments = (tuple(site.args), dict(site.kwargs))
        batched = [t for t, layout in zip(tensors_in(arguments), layouts, strict=True) if layout is not None]
        distinct = list({id(tensor): tensor for tensor in site.parameters}.values())
        roles = {f"argument {position}": tensor for position, tensor in enumerate(distinct)}
        raw = (batched or distinct)[0].detach()
        return cls(raw, roles, as_now(site.function, site.output), arguments, layouts)

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """All arguments."""
        return tuple(tensors_in(self.arguments))

    def of_example(self, index: int, n: int, leaves: Mapping[str, Tensor]) -> Tensor:
        """Run the function on one of ``n`` examples, with other tensors in the place of parameters."""
        places = {id(tensor): leaves[role] for role, tensor in self.parameters.items()}
        layouts = iter(self.argument_layouts)

        def own(tensor: Tensor) -> Tensor:
            layout = next(layouts)
            if id(tensor) in places:
                return places[id(tensor)]
            alone = tensor if layout is None else layout.in_place(tensor.detach(), n)[index]
            return alone.clone() if overwrites(self.function) else alone

        args, kwargs = map_tensors(own, self.arguments)
        return self.function(*args, **kwargs)

    def direct(self, role: str, gradient: Tensor, n: int, layouts: Layouts) -> Tensor:
        """Return the gradients of ``n`` calls with one example each."""
        rows = []
        for index, start in enumerate(layouts.output.in_place(gradient, n)):
            with torch.enable_grad():
                leaves = {name: tensor.detach().requires_grad_() for name, tensor in self.parameters.items()}
                output = self.of_example(index, n, leaves)
                (found,) = torch.autograd.grad(output, leaves[role], start.to(output.dtype))
            rows.append(working(found))
        return torch.stack(rows)
