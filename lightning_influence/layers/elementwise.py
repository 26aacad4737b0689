"""Elementwise functions of a parameter and the batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_influence.core.containers import tensors_in
from lightning_influence.core.layout import BatchLayout
from lightning_influence.core.precision import working
from lightning_influence.layers.call import Call, DirectCall, Layouts, as_now
from lightning_influence.layers.site import NotUnderstoodError, Site, _Reader


@dataclass(frozen=True, eq=False)
class PReLUCall(DirectCall):
    """``F.prelu``: one slope for all, or one per channel (dimension 1)."""

    def direct(self, role: str, gradient: Tensor, n: int, layouts: Layouts) -> Tensor:
        """Return ``Σ g x`` over the positions with a negative input."""
        rows = layouts.output.by_example(gradient * self.input.clamp(max=0), n)
        if self.parameters[role].numel() == 1:
            return rows.flatten(1).sum(1, keepdim=True)
        return rows.flatten(3).sum((1, 3)) if rows.ndim > 3 else rows.sum(1)


@dataclass(frozen=True, eq=False)
class ElementwiseCall(DirectCall):
    """An elementwise function of a parameter and the batch, with broadcasting.

    Attributes:
        function: Out-of-place form.
        arguments: Its arguments, detached.
        position: Role to the place (index or name) of the parameter among them.
        shifts: Whether the gradient is that of the output itself up to its sign: then no argument's value matters.
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


def _read_prelu(site: Site) -> Call:
    a = site.bind("input weight")
    return PReLUCall(a["input"].detach(), site.roles(a, "prelu", weight="weight"))


def _elementwise_reader(plain: Callable[..., Tensor], sign: int | None = None) -> _Reader:
    """Make a reader of an elementwise function; ``sign`` that of its second argument if it adds or subtracts."""

    def read(site: Site) -> Call:
        args, kwargs, output = site.args, site.kwargs, site.output
        places: list[int | str] = [k for k, value in enumerate(args) if site.is_parameter(value)]
        places += [name for name, value in kwargs.items() if site.is_parameter(value)]
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        if len(places) != 1 or output.shape != torch.broadcast_shapes(*(value.shape for value in tensors)):
            raise NotUnderstoodError(f"in a call of {plain.__name__} that is not elementwise in it and the batch")
        (place,) = places
        parameter = args[place] if isinstance(place, int) else kwargs[place]
        adds = 0
        if sign is not None and kwargs.get("alpha", 1) == 1:
            adds = 1 if place == 0 else sign
        others = [value for value in tensors if value is not parameter]
        detached = (
            tuple(value.detach() if isinstance(value, Tensor) else value for value in args),
            {
                name: value.detach() if isinstance(value, Tensor) else value
                for name, value in kwargs.items()
                if name != "out"
            },
        )
        raw = next((value for value in others if value.shape == output.shape), output).detach()
        again = as_now(plain, output)
        return ElementwiseCall(raw, {"weight": parameter}, again, ((), {}) if adds else detached, place, adds)

    return read


def _read_expand(site: Site) -> Call:
    (parameter,) = site.parameters
    if parameter.ndim > site.output.ndim:
        raise NotUnderstoodError("in a repetition that drops dimensions")
    return ExpandCall(site.output.detach(), {"weight": parameter})


def _reversed_sub(self: Tensor, other: Any) -> Tensor:
    result: Tensor = other - self
    return result


def _reversed_div(self: Tensor, other: Any) -> Tensor:
    result: Tensor = other / self
    return result


def _reversed_pow(self: Tensor, other: Any) -> Tensor:
    result: Tensor = other**self
    return result
