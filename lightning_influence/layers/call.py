"""What a call in which parameters meet the batch says about per-example gradients.

A call turns its raw input and the gradient of its output into rows (activations ``x``, output gradients ``g``, see
``per_sample``) for parameters that form a matrix, or into every example's own gradient for parameters that scale or
shift. Readers make them, see ``registry``.

Index legend: ``k`` groups, ``n`` examples, ``m`` rows of an example that lie in one dimension with the examples, ``s``
positions, ``i`` inputs, ``o`` outputs, ``c`` channels.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor

from lightning_influence.core.layout import BatchLayout

Bound: TypeAlias = Literal["input", "gradient", "nothing"]
_TENSORS = ("input", "parameters")


@dataclass(frozen=True)
class Layouts:
    """Where the examples are in the input and in the output of a call."""

    input: BatchLayout = BatchLayout()
    output: BatchLayout = BatchLayout()


@dataclass(frozen=True, eq=False)
class Call:
    """One call.

    Attributes:
        input: What came from the batch, detached.
        parameters: Role (``weight``, ``bias``) to the tensor that was passed in it.
    """

    input: Tensor
    parameters: Mapping[str, Tensor]

    matrix_roles: ClassVar[frozenset[str]] = frozenset()
    """Roles whose gradient is a sum of outer products; the others scale or shift."""
    kind: ClassVar[str] = "linear"
    """Of the rows: ``"linear"``, or ``"embedding"`` for one-hot ones."""
    title: ClassVar[str] = "a function"
    """What messages call it."""
    takes_parts: ClassVar[bool] = False
    """Whether a matrix may be some rows of a parameter."""
    examples_in_input: ClassVar[bool] = True
    """Whether a dimension of the input holds the examples, as one of the output does."""
    bounded_by: ClassVar[Bound] = "nothing"
    """What tells, besides the output's gradient, whether squares of the example's gradient are finite."""

    @property
    def form(self) -> str:
        """How the matrix lies in its parameter, see ``MatrixBlock``."""
        return "linear"

    @property
    def needs_input(self) -> bool:
        """Whether the values of the input enter the gradients."""
        return True

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """Every tensor whose values enter the gradients."""
        return (self.input,) if self.needs_input else ()

    def direct(self, role: str, gradient: Tensor, n: int, layouts: Layouts) -> Tensor:
        """Return every example's own gradient of a parameter that is no matrix: ``[n, *shape]``.

        Args:
            role: Of the parameter.
            gradient: Of the call's output.
            n: Number of examples.
            layouts: Where they are.
        """
        raise NotImplementedError(f"{type(self).__name__} has no parameter that scales or shifts")


@dataclass(frozen=True, eq=False)
class DirectCall(Call):
    """A call whose parameters scale or shift: every example's own gradient is formed."""

    bounded_by: ClassVar[Bound] = "gradient"


@dataclass(frozen=True, eq=False)
class MatrixCall(Call):
    """A call whose weight has a gradient ``Σ_s g_s x_sᵀ``."""

    matrix_roles = frozenset({"weight"})
    bounded_by: ClassVar[Bound] = "input"

    @property
    def needs_input(self) -> bool:
        """Whether the weight is followed: the bias alone does not need the input."""
        return "weight" in self.parameters

    @property
    def geometry(self) -> tuple[object, ...]:
        """What decides, beside the input and its layout, which activations the call lays out."""
        return type(self), *(getattr(self, each.name) for each in fields(self) if each.name not in _TENSORS)

    @abstractmethod
    def activations(self, n: int, layouts: Layouts) -> Tensor:
        """Return ``[k, n, s, i]``."""

    @abstractmethod
    def output_gradients(self, gradient: Tensor, n: int, layouts: Layouts) -> Tensor:
        """Return ``[k, n, s, o]``."""

    def captured(self, n: int, layouts: Layouts, *, ones: bool = False) -> Tensor:
        """Return the activations, with a last column of ones on request.

        Args:
            n: Number of examples.
            layouts: Where they are.
            ones: Whether to add a last column of ones.
        """
        x = self.activations(n, layouts)
        if not ones:
            return x
        widened = x.new_empty((*x.shape[:-1], x.shape[-1] + 1))  # F.pad would write everything twice
        widened[..., :-1], widened[..., -1] = x, 1
        return widened

    def direct(self, role: str, gradient: Tensor, n: int, layouts: Layouts) -> Tensor:
        """Return the bias's gradient: the output gradients summed over positions."""
        return self.output_gradients(gradient, n, layouts).sum(2).transpose(0, 1).reshape(n, -1)


def as_now(function: Callable[..., Tensor], like: Tensor) -> Callable[..., Tensor]:
    """Return a function that runs later under the autocast that is active now."""
    kind = like.device.type
    if not torch.is_autocast_enabled(kind):
        return function
    dtype = torch.get_autocast_dtype(kind)

    def run(*args: Any, **kwargs: Any) -> Tensor:
        with torch.autocast(kind, dtype):
            return function(*args, **kwargs)

    return run


def over_positions(rows: Tensor) -> Tensor:
    """Add up what belongs to each channel of an example, ``[n, m, c, ...] -> [n, c]``."""
    return rows.flatten(3).sum((1, 3)) if rows.ndim > 3 else rows.sum(1)
