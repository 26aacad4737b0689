"""Normalisations: scale and shift of each feature."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_influence.layers.call import Call, DirectCall, Layouts
from lightning_influence.layers.site import NotSeparableError, Site, _Reader


@dataclass(frozen=True, eq=False)
class NormCall(DirectCall):
    """A normalisation with an affine part.

    Attributes:
        normalise: The same normalisation without the affine part.
        features: Number of last dimensions that the weight spans; 0 for a weight per channel (dimension 1).
    """

    normalise: Callable[[Tensor], Tensor] = torch.clone
    features: int = 0

    @property
    def needs_input(self) -> bool:
        """Whether there is a weight to scale with the normalised input."""
        return "weight" in self.parameters

    def batched_ndim(self) -> int:
        """Return one more than the normalised dimensions."""
        return max(self.features + 1, 2)

    def direct(self, role: str, gradient: Tensor, n: int, layouts: Layouts) -> Tensor:
        """Return ``Σ g x̂`` for the weight and ``Σ g`` for the bias, over all positions."""
        scaled = gradient * self.normalise(self.input) if role == "weight" else gradient
        rows = layouts.output.by_example(scaled, n)
        if self.features:
            shape = rows.shape[-self.features :]
            return rows.reshape(n, -1, *shape).sum(1)
        return rows.flatten(3).sum((1, 3)) if rows.ndim > 3 else rows.sum(1)


def _norm_reader(names: str, features: bool) -> _Reader:
    def read(site: Site) -> Call:
        a = site.bind(names)
        function = site.function
        roles = site.roles(a, function.__name__, weight="weight", bias="bias")
        if a.get("training"):
            raise NotSeparableError("in a batch norm that takes the statistics of the batch")
        plain = {
            name: value for name, value in a.items() if name not in ("input", "weight", "bias") and value is not None
        }

        def normalise(input: Tensor) -> Tensor:
            result: Tensor = function(input, **plain)
            return result

        spans = len(a["normalized_shape"]) if features else 0
        return NormCall(a["input"].detach(), roles, normalise, spans)

    return read
