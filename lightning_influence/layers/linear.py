"""Linear maps: matrix products with a weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_influence.core.precision import working
from lightning_influence.layers.call import Call, Layouts, MatrixCall
from lightning_influence.layers.registry import reads
from lightning_influence.layers.site import NotUnderstoodError, Site


@dataclass(frozen=True, eq=False)
class LinearCall(MatrixCall):
    """``x Wᵀ + b`` with any number of dimensions; ``transposed``: ``x W + b``."""

    transposed: bool = False

    title = "a matrix product"
    takes_parts = True

    @property
    def form(self) -> str:
        """``"transposed"`` for ``[i, o]``."""
        return "transposed" if self.transposed else "linear"

    def activations(self, n: int, layouts: Layouts) -> Tensor:
        """``[..., i] -> [1, n, s, i]``."""
        return layouts.input.by_example(working(self.input), n).reshape(1, n, -1, self.input.shape[-1])

    def output_gradients(self, gradient: Tensor, n: int, layouts: Layouts) -> Tensor:
        """``[..., o] -> [1, n, s, o]``."""
        return layouts.output.by_example(gradient, n).reshape(1, n, -1, gradient.shape[-1])


@reads(F.linear)
def _read_linear(site: Site) -> Call:
    a = site.bind("input weight bias")
    roles = site.roles(a, "linear", weight="weight", bias="bias")
    if a["weight"].ndim != 2:
        raise NotUnderstoodError("as a vector of weights in linear")
    return LinearCall(a["input"].detach(), roles)


@reads(torch.addmm, Tensor.addmm)
def _read_addmm(site: Site) -> Call:
    a = site.bind("input mat1 mat2")
    roles = site.roles(a, "addmm", weight="mat2", bias="input")
    if a.get("beta", 1) != 1 or a.get("alpha", 1) != 1:
        raise NotUnderstoodError("in addmm with factors")
    if "bias" in roles and a["input"].shape != site.output.shape[-1:]:
        raise NotUnderstoodError("as something else than a bias in addmm")
    return LinearCall(a["mat1"].detach(), roles, transposed=True)


@reads(torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm)
def _read_matmul(site: Site) -> Call:
    left, right = (*site.args, *site.kwargs.values())[:2]
    if site.is_parameter(left) or right.ndim != 2 or left.ndim < 2:
        raise NotUnderstoodError("in a matrix product that is not `input @ weight`")
    return LinearCall(left.detach(), {"weight": right}, transposed=True)
