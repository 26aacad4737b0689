"""Calls that training makes in every batch: read once, and known again by their arguments."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_influence.gradients.block_rows import Output, Source, Use
from lightning_influence.layers.blocks import ParameterBlock
from lightning_influence.layers.call import Call, Layouts
from lightning_influence.layers.linear import LinearCall
from lightning_influence.layers.site import Site

# What a call of these does with its parameters, its arguments but the first tell.
_TOLD_BY_ARGUMENTS = frozenset(
    {F.linear, F.conv1d, F.conv2d, F.conv3d, F.layer_norm, F.rms_norm, F.group_norm, F.embedding}
)


@dataclass(frozen=True, eq=False)
class Reading:
    """What a call does with its parameters, to be known again in the next batch.

    Attributes:
        call: The call, without its input.
        layouts: Where the examples are.
        blocks: Block name to role to parameter.
        rest: Its positional arguments but the first.
        named: Its keyword arguments.
        parameters: Number of parameters among them.
        dtype: Of its output.
    """

    call: Call
    layouts: Layouts
    blocks: dict[str, dict[str, Source]]
    rest: tuple[Any, ...]
    named: dict[str, Any]
    parameters: int
    dtype: torch.dtype

    @classmethod
    def of(
        cls, site: Site, call: Call, layouts: Layouts, owners: Mapping[int, tuple[str, Tensor, ParameterBlock]]
    ) -> Reading:
        """Note what was read."""
        blocks: dict[str, dict[str, Source]] = {}
        for role, tensor in call.parameters.items():
            name, parameter, block = owners[id(tensor)]
            blocks.setdefault(block.name, {})[role] = Source(parameter, ((name, parameter),))
        without = replace(call, input=call.input.new_empty(0))  # the batch would else be held
        return cls(
            without, layouts, blocks, tuple(site.args[1:]), dict(site.kwargs), len(site.parameters), site.output.dtype
        )

    def is_of(self, args: tuple[Any, ...], kwargs: dict[str, Any], passed: Sequence[Tensor], output: Tensor) -> bool:
        """Tell whether a call of the same function has the very same arguments but for the first."""
        same = len(args) == len(self.rest) + 1 and kwargs.keys() == self.named.keys()
        same = same and len(passed) == self.parameters and output.dtype is self.dtype
        named = all(value is self.named[name] for name, value in kwargs.items())
        return same and named and all(map(operator.is_, args[1:], self.rest))


class Row:
    """The use of a linear map with a row per example whose arguments were met before: all that a step has to note.

    Attributes:
        reading: What the call does with its parameters.
        x: Its input, ``[n, i]``.
        output: Its output, for its place in the graph.
        version: Of its input.
        gradient: Of its output, once it is there.
        held: False once it has let go of all these.
    """

    __slots__ = ("gradient", "held", "output", "reading", "version", "x")

    def __init__(self, reading: Reading, x: Tensor, output: Output) -> None:
        self.reading, self.x, self.output, self.version = reading, x, output, x._version
        self.gradient: Tensor | None = None
        self.held = True

    def use(self, roles: dict[str, Source]) -> Use:
        """Return the same, told in full, and let go."""
        reading, x, output = self.reading, self.x, self.output
        output.add(self.gradient)
        self.let_go()
        return Use(replace(reading.call, input=x), reading.layouts, output, (self.version,), roles)

    def is_of(self, reading: Reading, x: Tensor) -> bool:
        """Tell whether the very same rows are told of."""
        return self.reading is reading and self.x.data_ptr() == x.data_ptr() and self.x.shape == x.shape

    def let_go(self) -> None:
        """Hold nothing any more: the graph holds the hook, and that this, until all of the pass is over.

        The output holds the graph in turn, which nothing but the garbage collector would then end.
        """
        if self.held:
            self.held = False
            del self.x, self.gradient, self.output


def told_by_arguments(site: Site) -> bool:
    """Tell whether a call with the same arguments but the first does the same with its parameters."""
    rest = [*site.args[1:], *site.kwargs.values()]
    known = site.function in _TOLD_BY_ARGUMENTS and len(site.args) > 0
    if not known or any(isinstance(value, list) for value in rest):
        return False
    # No buffers, and nothing that was made for this batch and would be held.
    return sum(isinstance(value, Tensor) for value in rest) == len(site.parameters) and not site.is_parameter(
        site.args[0]
    )


def is_of_rows(reading: Reading) -> bool:
    """Tell whether a call that was read is a linear map that may have a row per example."""
    call, layouts = reading.call, reading.layouts
    plain = type(call) is LinearCall and not call.transposed and "weight" in call.parameters
    return plain and not reading.named and len(reading.blocks) == 1 and layouts.input.dim == layouts.output.dim == 0
