"""The chain of curvatures: exact where nothing is lost, and equal to plain algebra where something is."""

from __future__ import annotations

from typing import Any

import pytest
import reference as ref
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_influence.curvature.chain import Chain, curvature_chain
from lightning_influence.data.source import ExampleSource
from lightning_influence.gradients.discover import discover
from lightning_influence.gradients.passes import ExampleGradients
from lightning_influence.objective.task import TaskError

N = 24


def classify(module: Any, batch: Any) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1])


def square(module: Any, batch: Any) -> Tensor:
    return 0.5 * (module(batch[0]) - batch[1]).square().sum(1).mean()


def passes(net: nn.Module, task: Any, *data: Tensor, batch_size: int = 7, layers: Any = None) -> ExampleGradients:
    source = ExampleSource(TensorDataset(*data), batch_size=batch_size)
    return ExampleGradients(net, task, source, discover(net, task, source, layers=layers))


def mlp() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    return net, torch.randn(N, 4).double(), torch.randint(3, (N,))


def chain(batch_size: int = 7) -> Chain:
    net, x, y = mlp()
    return curvature_chain(passes(net, classify, x, y, batch_size=batch_size), range(N))


def by_name(matrix: Tensor, net: nn.Module) -> Tensor:
    """Bring ``[weight, bias]`` of a layer into rows of ``[weight | bias]``, as blocks are laid out."""
    places, start = [], 0
    for layer in (module for module in net.modules() if isinstance(module, nn.Linear)):
        o, i = layer.weight.shape
        weight = start + torch.arange(o * i).view(o, i)
        bias = start + o * i + torch.arange(o).view(o, 1)
        places.append(torch.cat([weight, bias], 1).flatten())
        start += o * (i + 1)
    order = torch.cat(places)
    return matrix[order][:, order]


def test_rungs_and_errors_are_those_of_plain_algebra() -> None:
    net, x, y = mlp()
    found = chain()
    hessian = by_name(ref.hessian_dense(net, F.cross_entropy, x, y), net)
    ggn = by_name(ref.ggn_dense(net, x, "cross_entropy"), net)
    parts = [slice(0, 25), slice(25, 49), slice(49, 64)]
    inside = torch.block_diag(*(ggn[part, part] for part in parts))
    torch.testing.assert_close(found.matrices["hessian"], hessian, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(found.matrices["ggn"], ggn, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(found.matrices["block_ggn"], inside, rtol=1e-8, atol=1e-12)
    assert list(found.blocks.values()) == parts
    assert [(step.start, step.end) for step in found.steps] == [
        ("hessian", "ggn"), ("ggn", "block_ggn"), ("block_ggn", "ekfac"), ("ekfac", "kfac"),
    ]  # fmt: skip
    first, second = found.steps[:2]
    assert first.error == pytest.approx(float((hessian - ggn).norm() / hessian.norm()), rel=1e-8)
    assert second.error == pytest.approx(float((ggn - inside).norm() / ggn.norm()), rel=1e-8)
    assert found.off_block_energy["ggn"] == pytest.approx(second.error**2, rel=1e-8)
    assert found.off_block_energy["kfac"] == pytest.approx(0, abs=1e-12)

    name = list(found.blocks)[1]
    a, b = (torch.linalg.eigvalsh(matrix[parts[1], parts[1]]) for matrix in (hessian, ggn))
    assert first.eigenvalue_overlap[name] == pytest.approx(float(1 - (a - b).norm() / a.norm()), rel=1e-8)
    assert all(step.error > 0.02 for step in found.steps), "the identity at every rung would lose nothing"


def test_what_is_the_same_has_full_overlap() -> None:
    """Blocks of the GGN are those of the block GGN; EK-FAC and K-FAC share their eigenbasis up to its order."""
    _, second, third, last = chain().steps
    assert list(second.eigenvalue_overlap.values()) == pytest.approx([1.0] * 3)
    assert list(second.eigenbasis_overlap.values()) == pytest.approx([1.0] * 3)
    assert 0 < min(third.eigenbasis_overlap.values()) < 0.97
    assert min(last.eigenvalue_overlap.values()) < 0.9


def test_ekfac_is_the_best_in_its_basis() -> None:
    """No other diagonal in the same basis comes closer to the block GGN, K-FAC's least of all."""
    found = chain()
    inside = found.matrices["block_ggn"]
    ekfac, kfac = (float((inside - found.matrices[name]).norm()) for name in ("ekfac", "kfac"))
    assert ekfac < 0.98 * kfac


def test_one_linear_layer_with_squared_error_loses_nothing() -> None:
    """There Hessian = GGN = its only block = ``I ⊗ A``, which Kronecker factors hold exactly."""
    torch.manual_seed(0)
    net = nn.Linear(4, 3).double()
    x, y = torch.randn(N, 4).double(), torch.randn(N, 3).double()

    def half_squares(module: Any, batch: Any) -> Tensor:
        return 1.5 * F.mse_loss(module(batch[0]), batch[1])  # half of the sum over three outputs

    found = curvature_chain(passes(net, half_squares, x, y), range(N))
    ones = torch.cat([x, torch.ones(N, 1).double()], 1)
    expected = torch.kron(torch.eye(3).double(), ones.T @ ones / N)
    for name, matrix in found.matrices.items():
        torch.testing.assert_close(matrix, expected, rtol=1e-7, atol=1e-9, msg=name)
    assert max(step.error for step in found.steps) < 1e-7
    assert found.off_block_energy["hessian"] == pytest.approx(0)


def test_the_output_layer_of_a_piecewise_linear_net_has_no_second_derivatives() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    x, y = torch.randn(N, 4).double(), torch.randint(3, (N,))
    both = curvature_chain(passes(net, classify, x, y), range(N))
    output = curvature_chain(passes(net, classify, x, y, layers=["2"]), range(N))
    assert both.steps[0].error > 0.01
    assert output.steps[0].error < 1e-9


def test_batches_do_not_matter() -> None:
    one, other = chain(5), chain(24)
    for name, matrix in one.matrices.items():
        torch.testing.assert_close(matrix, other.matrices[name], rtol=1e-7, atol=1e-9)


def test_it_can_be_read() -> None:
    lines = str(chain()).splitlines()
    assert lines[0].split() == ["step", "error", "eigenvalues", "eigenbasis"]
    assert lines[2].startswith("GGN -> block GGN")
    assert lines[-1].startswith("energy outside of the layers' blocks: Hessian")


def test_memory_is_estimated_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_influence.curvature.chain.fits", lambda size, device: False)
    monkeypatch.setattr("lightning_influence.curvature.chain.available_bytes", lambda device: 10**6)
    with pytest.raises(
        ValueError, match=r"64 parameters takes dense matrices of .* 1 MB are available .* fewer layers"
    ):
        chain()


def test_a_loss_without_ggn() -> None:
    net, x, _ = mlp()
    with pytest.raises(TaskError, match="the GGN needs a loss made of known calls"):
        curvature_chain(passes(net, square, x, torch.randn(N, 3).double()), range(N))
