"""The graph of a network that is one single way from the data to the loss, read for the inputs of its linear maps.

To watch the calls of a small network takes a tenth of its training step, to walk its graph a fiftieth. What the graph
is like is learned from batches whose calls were watched; a later graph that differs anywhere is not read.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

from torch import Tensor

T = TypeVar("T")


class _Places(NamedTuple):
    """Where a node of a linear map has what it was made from, and under which name it keeps its input."""

    input: int
    weight: int
    bias: int | None
    saved: str


_LINEAR = {"AddmmBackward0": _Places(1, 2, 0, "mat1"), "MmBackward0": _Places(0, 1, None, "self")}


class Map(NamedTuple, Generic[T]):
    """A linear map in a graph.

    Attributes:
        key: What it is known by.
        x: Its input, ``[n, i]``.
        node: Of its output.
    """

    key: T
    x: Tensor
    node: Any


@dataclass(frozen=True, eq=False)
class _Link(Generic[T]):
    """One operation on the way from the loss back to the data.

    Attributes:
        kind: Type of its node.
        inputs: Number of its inputs.
        place: The one that leads on.
        linear: Where a linear map has what.
        parameters: Of a linear map: weight and bias, None where there is none or it does not move.
        key: Of a linear map that is asked for.
    """

    kind: type
    inputs: int
    place: int
    linear: _Places | None = None
    parameters: tuple[Tensor | None, Tensor | None] = (None, None)
    key: T | None = None


class RowGraph(Generic[T]):
    """What the graphs of all batches have in common.

    Args:
        links: From the loss to the data.
    """

    def __init__(self, links: tuple[_Link[T], ...]) -> None:
        self._links = links

    @classmethod
    def of(cls, loss: Tensor, keys: Mapping[Any, T]) -> RowGraph[T] | None:
        """Learn a graph, None if there is more than one way to the data.

        Args:
            loss: Before its backward pass.
            keys: Node to the key of its linear map, for those that are asked for.
        """
        links: list[_Link[T]] = []
        node: Any = loss.grad_fn
        while node is not None:
            inputs, places = node.next_functions, _LINEAR.get(node.name())
            if places is not None:
                parameters = _parameters(node, inputs, places)
                if parameters is None:
                    return None
                links.append(_Link(type(node), len(inputs), places.input, places, parameters, keys.get(node)))
            else:
                leading = [place for place, (following, _) in enumerate(inputs) if following is not None]
                if len(leading) > 1:
                    return None
                links.append(_Link(type(node), len(inputs), leading[0] if leading else 0))
            node = inputs[links[-1].place][0] if inputs else None
        found = sum(link.key is not None for link in links)
        return cls(tuple(links)) if found == len(keys) > 0 else None

    def follow(self, loss: Tensor, n: int) -> list[Map[T]] | None:
        """Return the linear maps that are asked for, None if the graph of a batch is another.

        Args:
            loss: Before its backward pass.
            n: Number of rows that every map has to have.

        Raises:
            RuntimeError: If an input was overwritten.
        """
        found: list[Map[T]] = []
        node: Any = loss.grad_fn
        for link in self._links:
            inputs = getattr(node, "next_functions", ())  # None at the end of a shorter way
            if type(node) is not link.kind or len(inputs) != link.inputs:
                return None
            if link.linear is not None:
                parameters = _parameters(node, inputs, link.linear)
                same = parameters is not None and all(map(operator.is_, parameters, link.parameters))
                if not same:
                    return None
                if link.key is not None:
                    x = _kept(node, link.linear.saved)
                    if x is None or len(x) != n:
                        return None
                    found.append(Map(link.key, x, node))
            elif len(inputs) > 1 and any(
                other is not None for place, (other, _) in enumerate(inputs) if place != link.place
            ):
                return None
            node = inputs[link.place][0] if inputs else None
        return found if node is None else None


def _parameters(node: Any, inputs: Any, places: _Places) -> tuple[Tensor | None, Tensor | None] | None:
    """Return weight and bias of a linear map, None for one that does not move.

    None in place of both for a map that has anything else in their places (cast or reparametrised weights), or scales.
    """
    if getattr(node, "_saved_alpha", 1) != 1 or getattr(node, "_saved_beta", 1) != 1:
        return None
    found: list[Tensor | None] = []
    for place, transposed in ((places.weight, True), (places.bias, False)):
        start = None if place is None else inputs[place][0]
        if start is not None and transposed:
            if start.name() != "TBackward0":
                return None
            start = start.next_functions[0][0]
        parameter = getattr(start, "variable", None)  # of what accumulates its gradient
        if start is not None and parameter is None:
            return None
        found.append(parameter)
    return found[0], found[1]


def _kept(node: Any, name: str) -> Tensor | None:
    """Return a tensor that a node keeps, None if asking for it would compute it (checkpoints, offloading)."""
    try:
        packed = getattr(node, f"_raw_saved_{name}").unpack_hook is not None
    except AttributeError:  # older versions of torch do not tell
        return None
    kept: Tensor | None = None if packed else getattr(node, f"_saved_{name}")
    return kept
