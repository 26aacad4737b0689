"""Measurements that the user writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_influence.core.errors import told
from lightning_influence.core.isolation import untouched
from lightning_influence.core.precision import wide, wide_zeros
from lightning_influence.scores.measurements.base import (
    Measured,
    Measurement,
    MeasurementError,
    QuerySets,
    check_gradient,
)


@dataclass(frozen=True, eq=False)
class Custom(Measurement):
    """A function ``(module, batch) -> number`` of a set of examples, differentiated by autograd.

    The whole set comes as one batch, on every process: whatever the function does with it (a gap, a ratio, a rank
    correlation), the result does not depend on batches. Of several query loaders, each set comes as a batch, and the
    result is their mean, weighted by size.

    Args:
        function: Called with the module in eval mode and a batch on its device; returns a tensor of one number that
            depends on the module's parameters.
    """

    function: Callable[[Any, Any], Tensor]

    @property
    def name(self) -> str:
        """The function's name."""
        name = str(getattr(self.function, "__name__", type(self.function).__name__))
        return "measurement" if name == "<lambda>" else name

    def measure(self, sets: QuerySets, *, gradient: bool = True) -> Measured:
        """Measure all sets, see the class."""
        queries = sets[0][0]
        blocks = queries.coverage.blocks
        owned = {name: parameter for block in blocks.values() for name, parameter in block.parameters.items()}
        with untouched(queries.module, self.function):
            for parameter in owned.values():
                parameter.requires_grad_(True)
            value, parts = self.differentiated(sets, list(owned.values()) if gradient else [])
        sums = dict(zip(owned, parts, strict=False))
        result = {
            name: block.from_parameters({own: sums[own] for own in block.parameters})
            for name, block in blocks.items()
            if gradient
        }
        if gradient:
            check_gradient(self.name, result)
        return Measured(value, result, {"all": sum(len(indices) for _, indices in sets)})

    def differentiated(self, sets: QuerySets, tensors: Sequence[Tensor]) -> tuple[float, list[Tensor]]:
        """Return value and derivatives, each set as one batch."""
        total = sum(len(indices) for _, indices in sets)
        value, sums = wide_zeros((), sets[0][0].device), [torch.zeros_like(tensor) for tensor in tensors]
        for passes, indices in sets:
            for own, batch in passes.source.batches(indices, len(indices)):
                with told(self._failed):
                    returned = passes.applied(self.function, batch)
                found, weight = self._checked(returned), len(own) / total
                value += weight * wide(found.detach())
                parts = torch.autograd.grad(found, tensors, allow_unused=True) if tensors else ()
                for place, part in zip(sums, parts, strict=True):
                    if part is not None:
                        place += weight * part.to_dense() if part.is_sparse else weight * part
        return float(value), sums

    def _failed(self, words: str) -> MeasurementError:
        return MeasurementError(
            f"{self.name} can't be computed on the queries ({words}). It is called with (module, batch), and returns a "
            "tensor with one number for the whole set."
        )

    def _checked(self, found: Any) -> Tensor:
        if not isinstance(found, Tensor) or found.numel() != 1:
            what = f"the shape {list(found.shape)}" if isinstance(found, Tensor) else f"type {type(found).__name__}"
            raise MeasurementError(
                f"{self.name} returned {what}; expected a tensor with one number for the whole set of queries. Reduce "
                "it (`.mean()`), and leave out `.item()`."
            )
        if not found.requires_grad:
            raise MeasurementError(
                f"{self.name} does not depend on the covered parameters: what it returned has no gradient. Compute it "
                "from the model's outputs, without `detach`, `no_grad`, `argmax` or rounding."
            )
        if not bool(found.isfinite()):
            raise MeasurementError(f"{self.name} is {float(found)}; expected a finite number.")
        return found.reshape(())
