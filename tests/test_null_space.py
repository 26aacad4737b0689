"""EK-FAC where a factor has fewer rows than dimensions: no score depends on which basis of its null space comes out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from architectures import ARCHITECTURES, Batch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_influence import Influence
from lightning_influence.curvature.blocks import ekfac, kfac
from lightning_influence.curvature.blocks.eigenvectors import averaged, eigenvectors, null_columns

N, CLASSES = 6, 3


def wide() -> tuple[nn.Module, TensorDataset]:
    """Six examples of eleven inputs, one of them always zero, through a hidden layer of nine units."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(11, 9), nn.Tanh(), nn.LayerNorm(9), nn.Linear(9, CLASSES)).double()
    inputs = torch.randn(N, 11).double()
    inputs[:, 4] = 0
    return net, TensorDataset(inputs, torch.arange(N) % CLASSES)


def full() -> tuple[nn.Module, TensorDataset]:
    """Forty examples of four inputs; logits that are squashed, so that their gradients do not add up to zero."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, CLASSES), nn.Tanh()).double()
    return net, TensorDataset(torch.randn(40, 4).double(), torch.arange(40) % CLASSES)


def fitted(make: Callable[[], tuple[nn.Module, TensorDataset]]) -> Influence:
    net, data = make()
    return Influence(net, nn.CrossEntropyLoss(), data).fit("ekfac", factor_examples=N if make is wide else None)


def rotated(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Decompose, and turn the columns of each null space by a random rotation."""
    values, vectors = eigenvectors(matrices)
    for null, inside in zip(null_columns(values, values.dtype), vectors, strict=True):
        count = int(null.sum())
        turn = torch.linalg.qr(torch.randn(count, count, generator=torch.Generator().manual_seed(1)).to(inside))[0]
        inside[:, null] = inside[:, null] @ turn
    return values, vectors


def scores(influence: Influence, data: TensorDataset) -> dict[str, Tensor]:
    # Elsewhere than on the examples that the curvature was fitted on: their gradients leave the space that those span.
    elsewhere = TensorDataset(data.tensors[0].flip(1) + 1, data.tensors[1])
    return {"self": influence.self_influence(), "pairs": influence.pairs(elsewhere).scores}


@pytest.mark.parametrize("mended", [True, False])
def test_rotating_a_null_space_changes_nothing(mended: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the mean over its columns, self-influence moves by a few per cent."""
    if not mended:
        monkeypatch.setattr(ekfac, "averaged", lambda values, null: values)
    expected = scores(fitted(wide), wide()[1])
    monkeypatch.setattr(kfac, "eigenvectors", rotated)
    found = scores(fitted(wide), wide()[1])
    for name, value in expected.items():
        moved = float(((found[name] - value).abs() / value.abs().max()).max())
        assert moved < 1e-10 if mended else moved > 1e-3, name


def test_full_factors_are_left_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the last bit."""
    found = fitted(full).curvature
    monkeypatch.setattr(ekfac, "averaged", lambda values, null: values)
    expected = fitted(full).curvature
    for name, (tensors, _) in expected.tensors().items():
        for key, value in tensors.items():
            assert torch.equal(found.tensors()[name][0][key], value), (name, key)


def test_mean_over_rows_and_columns() -> None:
    """A side of its own for each group; where there is nothing to average, the same bits."""
    values = torch.arange(24.0).reshape(2, 3, 4)
    columns = torch.tensor([[True, True, False, False], [False, False, False, False]])
    found = averaged(values, columns)
    assert found[0].tolist() == [[0.5, 0.5, 2, 3], [4.5, 4.5, 6, 7], [8.5, 8.5, 10, 11]]
    assert torch.equal(found[1], values[1])
    both = averaged(found.mT, torch.tensor([[True, True, False]] * 2)).mT
    assert both[0].tolist() == [[2.5, 2.5, 4, 5], [2.5, 2.5, 4, 5], [8.5, 8.5, 10, 11]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_null_columns_are_those_that_the_rows_leave(dtype: torch.dtype) -> None:
    """Four rows in nine dimensions, of very different lengths, and no row at all."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(4, 9, generator=generator).to(dtype) * torch.tensor([[1.0], [0.3], [0.1], [0.1]], dtype=dtype)
    moments = torch.stack([rows.mT @ rows, torch.zeros(9, 9, dtype=dtype)]).double()
    null = null_columns(eigenvectors(moments)[0], dtype)
    assert null.tolist() == [[True] * 5 + [False] * 4, [True] * 9]


def test_noise_in_the_data_moves_the_scores_as_little() -> None:
    """A ResNet on seven pictures: 4e-3 without the mean over null columns, for noise of 1e-13."""
    architecture = ARCHITECTURES["ResNet"]
    torch.manual_seed(0)
    net = architecture.make().double().eval()
    generator = torch.Generator().manual_seed(3)

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        found: Tensor = model(**batch).loss
        return found

    found = []
    for noise in (0.0, 1e-13):
        data = architecture.data()
        for example in data:
            shape = example["pixel_values"].shape
            example["pixel_values"] += noise * torch.randn(shape, generator=generator, dtype=torch.float64)
        found.append(Influence(net, loss, data).fit("ekfac").self_influence())
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=0)
