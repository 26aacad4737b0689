"""GGN, Hessian, K-FAC and EK-FAC as matrices against an independent implementation, curvlinops 3.0.1.

Only where it is right: zero padding, one group. Labels are those of the exact expectation, ``FisherType.TYPE2`` there.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from curvlinops import (
    EKFACLinearOperator,
    FisherType,
    GGNLinearOperator,
    HessianLinearOperator,
    KFACLinearOperator,
)
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_influence.curvature import (
    BlockCoordinates,
    FactorExamples,
    FlatParameters,
    GGNProduct,
    HessianProduct,
    fit,
)
from lightning_influence.data.source import ExampleSource
from lightning_influence.gradients.discover import discover
from lightning_influence.gradients.passes import ExampleGradients

N, CLASSES = 18, 4


def mlp() -> tuple[nn.Module, Tensor]:
    net = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 5, bias=False), nn.GELU(), nn.Linear(5, CLASSES))
    return net, torch.randn(N, 6)


def cnn() -> tuple[nn.Module, Tensor]:
    net = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1),
        nn.GELU(),
        nn.Conv2d(3, 2, (3, 2), stride=2, padding=(1, 0), bias=False),
        nn.Flatten(),
        nn.Linear(12, CLASSES),
    )
    return net, torch.randn(N, 2, 5, 5)


@pytest.fixture(params=[mlp, cnn], ids=["mlp", "cnn"])
def setting(request: pytest.FixtureRequest) -> tuple[ExampleGradients, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    net, inputs = request.param()
    net, inputs = net.double(), inputs.double()
    labels = torch.randint(CLASSES, (N,))

    def task(module: Any, batch: Any) -> Tensor:
        return F.cross_entropy(module(batch[0]), batch[1])

    source = ExampleSource(TensorDataset(inputs, labels), batch_size=6)
    gradients = ExampleGradients(net, task, source, discover(net, task, source))
    return gradients, [(inputs[s : s + 6], labels[s : s + 6]) for s in range(0, N, 6)]


def dense(operator: Any, size: int) -> Tensor:
    matrix: Tensor = operator @ torch.eye(size, dtype=torch.float64)
    return matrix


@pytest.mark.parametrize(
    ("ours", "theirs"), [(GGNProduct, GGNLinearOperator), (HessianProduct, HessianLinearOperator)], ids=["ggn", "H"]
)
def test_products(setting: Any, ours: Any, theirs: Any) -> None:
    gradients, batches = setting
    product = ours(gradients, range(N))
    operator = theirs(gradients.module, nn.CrossEntropyLoss(), list(gradients.module.parameters()), batches)
    expected = dense(operator, product.flat.size)
    torch.testing.assert_close(product.to_dense(), expected, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "theirs"), [("kfac", KFACLinearOperator), ("ekfac", EKFACLinearOperator)], ids=["kfac", "ekfac"]
)
def test_factors(setting: Any, name: Any, theirs: Any) -> None:
    gradients, batches = setting
    every = FactorExamples(N, N)
    fitted = fit(gradients, name, range(N), examples=every, labels=("exact", "exact"))
    blocks = gradients.coverage.blocks
    operator = theirs(
        gradients.module,
        nn.CrossEntropyLoss(),
        list(gradients.module.parameters()),
        batches,
        fisher_type=FisherType.TYPE2,
        separate_weight_and_bias=False,
    )
    coordinates, flat = BlockCoordinates(blocks), FlatParameters.of(gradients.module)
    places = coordinates.places_in(flat)
    expected = dense(operator, flat.size)[places][:, places]
    found = torch.block_diag(*(fitted.blocks[block].to_dense()[0] for block in blocks))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-10)
    # Unlike the identity, whose cosine with it is far from 1.
    assert float(expected.diagonal().sum() / (len(expected) ** 0.5 * expected.norm())) < 0.9
