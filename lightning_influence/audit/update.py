"""A change of parameters: to look at, to try on a copy, and to apply for good."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from torch import Tensor, nn

from lightning_influence.core import weights
from lightning_influence.core.precision import wide

_Module = TypeVar("_Module", bound=nn.Module)


@dataclass(frozen=True, eq=False)
class ParameterUpdate:
    """A change of parameters, to look at, to try on a copy, and to apply for good.

    Attributes:
        changes: Parameter name, as in ``named_parameters()``, to what is added to it.
        title: What it is.
        notes: What its user should know.
    """

    changes: Mapping[str, Tensor]
    title: str
    notes: list[str] = field(default_factory=list)

    @property
    def norm(self) -> float:
        """Euclidean length of the change."""
        return _length(self.changes.values())

    def relative_norm(self, module: nn.Module) -> float:
        """Return the length of the change over that of the parameters it changes."""
        return self.norm / _length(self._parameters(module).values())

    def applied_to_copy(self, module: _Module) -> _Module:
        """Return a copy of the module with the change made; the module stays as it is."""
        changed = copy.deepcopy(module)
        self.apply(changed)
        return changed

    def apply(self, module: nn.Module) -> None:
        """Make the change, for good; ``applied`` undoes it.

        Raises:
            ValueError: If the module has no such parameters.
        """
        parameters = self._parameters(module)
        weights.write(parameters, self._changed(parameters))

    @contextmanager
    def applied(self, module: nn.Module) -> Iterator[None]:
        """Make the change within a ``with`` block; afterwards every bit is as it was."""
        parameters = self._parameters(module)
        with weights.swapped(parameters, self._changed(parameters)):
            yield

    def __repr__(self) -> str:
        lines = [f"{self.title}: {len(self.changes)} parameters move by {self.norm:.3g}"]
        return "\n".join(lines + [f"  note  {note}" for note in self.notes])

    def _changed(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        return {name: parameter.detach() + self.changes[name].to(parameter) for name, parameter in parameters.items()}

    def _parameters(self, module: nn.Module) -> dict[str, nn.Parameter]:
        every = weights.parameters_of(module)
        wrong = [name for name, value in self.changes.items() if name not in every or every[name].shape != value.shape]
        if wrong:
            raise ValueError(f"{type(module).__name__} has no parameters {wrong} of the right shape; pass the model.")
        return {name: every[name] for name in self.changes}


def _length(tensors: Iterable[Tensor]) -> float:
    return math.sqrt(sum(float(wide(tensor.detach()).square().sum()) for tensor in tensors))
