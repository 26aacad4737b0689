"""Normalisations and PReLU: scale and shift of each feature."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_influence.layers.call import Bound, Call, DirectCall, Layouts, over_positions
from lightning_influence.layers.registry import reads
from lightning_influence.layers.site import NotSeparableError, Site


@dataclass(frozen=True, eq=False)
class NormCall(DirectCall):
    """A normalisation with an affine part, or what else scales each feature.

    Attributes:
        normalise: What is scaled, of the input: the same normalisation without the affine part.
        features: Number of last dimensions that the weight spans; 0 for a weight per channel (dimension 1).
    """

    normalise: Callable[[Tensor], Tensor] = torch.clone
    features: int = 0

    bounded_by: ClassVar[Bound] = "input"

    @property
    def needs_input(self) -> bool:
        """Whether there is a weight to scale with the normalised input."""
        return "weight" in self.parameters

    def direct(self, role: str, gradient: Tensor, n: int, layouts: Layouts) -> Tensor:
        """Return ``Σ g x̂`` for the weight and ``Σ g`` for the bias, over all positions."""
        scaled = gradient * self.normalise(self.input) if role == "weight" else gradient
        rows = layouts.output.by_example(scaled, n)
        if self.parameters[role].numel() == 1:  # one slope for all
            return rows.flatten(1).sum(1).view(n, *self.parameters[role].shape)
        if self.features:
            shape = rows.shape[-self.features :]
            return rows.reshape(n, -1, *shape).sum(1)
        return over_positions(rows)


_SIGNATURES: dict[Callable[..., Any], str] = {
    F.layer_norm: "input normalized_shape weight bias eps",
    F.rms_norm: "input normalized_shape weight eps",
    F.group_norm: "input num_groups weight bias eps",
    F.instance_norm: "input running_mean running_var weight bias use_input_stats momentum eps",
    F.batch_norm: "input running_mean running_var weight bias training momentum eps",
}


@reads(*_SIGNATURES)
def _read_norm(site: Site) -> Call:
    a = site.bind(_SIGNATURES[site.function])
    roles = site.roles(a, site.function.__name__, weight="weight", bias="bias")
    if a.get("training"):
        raise NotSeparableError("in a batch norm that takes the statistics of the batch")
    plain = {name: value for name, value in a.items() if name not in ("input", "weight", "bias") and value is not None}
    return NormCall(a["input"].detach(), roles, partial(site.function, **plain), len(a.get("normalized_shape", ())))


@reads(F.prelu, torch.prelu)
def _read_prelu(site: Site) -> Call:
    a = site.bind("input weight")
    return NormCall(a["input"].detach(), site.roles(a, "prelu", weight="weight"), partial(torch.clamp, max=0))
