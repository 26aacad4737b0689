"""How to add a layer: a call that says what its rows are, and a reader registered for the function."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_influence.data import ExampleSource
from lightning_influence.gradients import ExampleGradients, discover, inspect
from lightning_influence.layers import READERS, Call, Layouts, MatrixCall, Site, reads
from lightning_influence.layers.repeated import RepeatedCall


@dataclass(frozen=True, eq=False)
class BilinearCall(MatrixCall):
    """``xᵀ W_o y + b_o``: a linear map of the outer products of ``x`` and ``y``."""

    other: Tensor | None = None

    def activations(self, n: int, layouts: Layouts) -> Tensor:
        assert self.other is not None
        outer = torch.einsum("...i,...j->...ij", self.input, self.other).flatten(-2)
        return layouts.input.by_example(outer, n).reshape(1, n, -1, outer.shape[-1])

    def output_gradients(self, gradient: Tensor, n: int, layouts: Layouts) -> Tensor:
        return layouts.output.by_example(gradient, n).reshape(1, n, -1, gradient.shape[-1])


@pytest.fixture
def _bilinear() -> Iterator[None]:
    @reads(F.bilinear)
    def read_bilinear(site: Site) -> Call:
        a = site.bind("input1 input2 weight bias")
        roles = site.roles(a, "bilinear", weight="weight", bias="bias")
        return BilinearCall(a["input1"].detach(), roles, a["input2"].detach())

    yield
    del READERS[F.bilinear]


def passes(net: nn.Module) -> ExampleGradients:
    def task(module: Any, batch: Any) -> Tensor:
        return F.cross_entropy(module(batch[0][..., :3].tanh(), batch[0][..., 3:].sin()).mean(1), batch[1])

    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(6, 2, 7, generator=generator).double(), torch.arange(6) % 4)
    source = ExampleSource(data, batch_size=3)
    return ExampleGradients(net, task, source, discover(net, task, source))


@pytest.mark.usefixtures("_bilinear")
def test_rows_of_an_added_layer_are_those_of_autograd() -> None:
    """Summed, alone and in batches of copies; with 60 + 4 parameters as one matrix, which Kronecker factors need."""
    gradients = passes(nn.Bilinear(3, 4, 4).double())
    assert gradients.coverage.blocks[""].shape == (1, 4, 13)
    error = inspect(gradients, range(6)).largest_error
    assert error is not None
    assert error < 1e-12


def test_without_it_the_function_is_run_once_more_for_every_example() -> None:
    gradients = passes(nn.Bilinear(3, 4, 4).double())
    uses = gradients.coverage.trace.uses(next(gradients.module.parameters()))
    assert [use.call for use in uses] == [RepeatedCall]
    assert inspect(gradients, range(6)).largest_error is not None
