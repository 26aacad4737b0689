"""Elementwise functions of a parameter and the batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_influence.core.containers import map_tensors, tensors_in
from lightning_influence.core.layout import BatchLayout
from lightning_influence.core.precision import working
from lightning_influence.layers.call import Call, DirectCall, Layouts, as_now
from lightning_influence.layers.registry import IN_PLACE, reads
from lightning_influence.layers.site import NotUnderstoodError, Site


@dataclass(frozen=True, eq=False)
class ElementwiseCall(DirectCall):
    """An elementwise function of a parameter and the batch, with broadcasting.

    Attributes:
        function: Out-of-place form.
        arguments: Its arguments, detached.
        position: Role to the place (index or name) of the parameter among them.
        sign: Of the parameter where the function only adds or subtracts it: no argument's value matters then; else 0.
    """

    function: Callable[..., Tensor] = torch.add
    arguments: tuple[tuple[Any, ...], Mapping[str, Any]] = ((), {})
    position: int | str = 0
    sign: int = 0

    @property
    def needs_input(self) -> bool:
        """Whether it does more than add."""
        return not self.sign

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """The other arguments."""
        return tuple(tensors_in(self.arguments))

    def direct(self, role: str, gradient: Tensor, n: int, layouts: Layouts) -> Tensor:
        """Differentiate the function once more, with the parameter spread over the examples."""
        parameter = self.parameters[role]
        if self.sign:
            spread = gradient * self.sign
        else:
            args, kwargs = list(self.arguments[0]), dict(self.arguments[1])
            with torch.enable_grad():
                leaf = parameter.detach().expand(gradient.shape).requires_grad_()
                if isinstance(self.position, int):
                    args[self.position] = leaf
                else:
                    kwargs[self.position] = leaf
                output = self.function(*args, **kwargs)
                (spread,) = torch.autograd.grad(output, leaf, gradient.to(output.dtype))
                spread = working(spread)
        return _reduced(spread, parameter.shape, n, layouts.output)


@dataclass(frozen=True, eq=False)
class ExpandCall(DirectCall):
    """A parameter repeated for every example: ``cls_token.expand(n, -1, -1)``."""

    @property
    def needs_input(self) -> bool:
        """False: there is no input."""
        return False

    def direct(self, role: str, gradient: Tensor, n: int, layouts: Layouts) -> Tensor:
        """Return each example's part of the gradient."""
        return _reduced(gradient, self.parameters[role].shape, n, layouts.output)


def _reduced(gradient: Tensor, shape: torch.Size, n: int, layout: BatchLayout) -> Tensor:
    """Sum the gradient of a broadcast tensor over everything but the examples: ``[n, *shape]``."""
    rows = layout.in_place(gradient, n)
    padded = (1,) * (rows.ndim - 1 - len(shape)) + tuple(shape)
    for dim, size in enumerate(padded, start=1):
        if size == 1:
            rows = rows.sum(dim, keepdim=True)
    return rows.reshape((n, *shape))


@reads(
    Tensor.expand,
    Tensor.expand_as,
    Tensor.repeat,
    Tensor.tile,
    Tensor.broadcast_to,
    torch.tile,
    torch.broadcast_to,
)
def _read_expand(site: Site) -> Call:
    (parameter,) = site.parameters
    if parameter.ndim > site.output.ndim:
        raise NotUnderstoodError("in a repetition that drops dimensions")
    return ExpandCall(site.output.detach(), {"weight": parameter})


def _read_elementwise(plain: Callable[..., Tensor], sign: int | None, site: Site) -> Call:
    """Read an elementwise function.

    Args:
        plain: Its out-of-place form.
        sign: That of its second argument if it adds or subtracts.
        site: The call.
    """
    arguments: dict[int | str, Any] = dict(enumerate(site.args)) | dict(site.kwargs)
    places = [place for place, value in arguments.items() if site.is_parameter(value)]
    tensors = [value for value in arguments.values() if isinstance(value, Tensor)]
    output = site.output
    if len(places) != 1 or output.shape != torch.broadcast_shapes(*(value.shape for value in tensors)):
        raise NotUnderstoodError(f"in a call of {plain.__name__} that is not elementwise in it and the batch")
    (place,) = places
    parameter = arguments[place]
    adds = sign is not None and site.kwargs.get("alpha", 1) == 1
    detached = map_tensors(Tensor.detach, (site.args, {k: v for k, v in site.kwargs.items() if k != "out"}))
    others = [value for value in tensors if value is not parameter]
    return ElementwiseCall(
        next((value for value in others if value.shape == output.shape), output).detach(),
        {"weight": parameter},
        as_now(plain, output),
        ((), {}) if adds else detached,
        place,
        0 if not adds else 1 if place == 0 else sign or 0,
    )


def _register() -> None:
    signs = {"add": 1, "sub": -1, "subtract": -1}
    for name in ("add", "sub", "subtract", "mul", "multiply", "div", "divide", "true_divide", "pow", "maximum",
                 "minimum", "where", "lerp", "addcmul", "fmax", "fmin"):  # fmt: skip
        plain = getattr(torch, name)
        methods = [getattr(Tensor, method, None) for method in (name, f"__{name}__")]
        in_place = [getattr(Tensor, method, None) for method in (f"{name}_", f"__i{name}__")]
        functions = [function for function in (plain, *methods, *in_place) if function is not None]
        reads(*functions)(partial(_read_elementwise, plain, signs.get(name)))
        IN_PLACE.update(function for function in in_place if function is not None)
    # `Tensor.where` takes the condition second.
    for function in (Tensor.__rsub__, Tensor.__rdiv__, Tensor.__rpow__, torch.rsub, Tensor.where):
        reads(function)(partial(_read_elementwise, function, None))


_register()
