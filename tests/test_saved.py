"""Curvature that was written to disk and read back: equal to the last bit, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_curvature import CLASSES, NETS, N
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_influence import Influence
from lightning_influence.audit.store.store import AuditStore
from lightning_influence.curvature import BLOCKS, Curvature, FactorExamples, fit
from lightning_influence.curvature.saved import restored
from lightning_influence.data.source import ExampleSource
from lightning_influence.gradients.discover import discover
from lightning_influence.gradients.passes import ExampleGradients
from lightning_influence.scores.examples import score_examples
from lightning_influence.scores.measurements import mean_gradient


def problem(net: str = "mlp", dtype: torch.dtype = torch.float64, **options: Any) -> ExampleGradients:
    torch.manual_seed(0)
    module, inputs = NETS[net]()
    # Dead inputs and units, whose rows are no part of any decomposition.
    inputs = inputs.to(dtype).clamp(min=0) if inputs.is_floating_point() else inputs
    source = ExampleSource(TensorDataset(inputs, torch.arange(N) % CLASSES), batch_size=5)

    def task(module: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(module(batch[0]), batch[1])

    module = module.to(dtype).eval()
    return ExampleGradients(module, task, source, discover(module, task, source, **options))


def fitted(gradients: ExampleGradients, name: Any, **options: Any) -> Curvature:
    return fit(gradients, name, range(N), examples=FactorExamples(N, N), labels=("exact", "exact"), **options)


def through_disk(curvature: Curvature, tmp_path: Path) -> dict[str, tuple[dict[str, Tensor], dict[str, str]]]:
    store = AuditStore.create(tmp_path / "influence")
    for file, (tensors, about) in curvature.tensors().items():
        store.write_factors(file, tensors, about)
    return store.factors()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("name", [*BLOCKS, "ggn"])
def test_equal_to_the_last_bit(name: str, net: str, dtype: torch.dtype, tmp_path: Path) -> None:
    gradients = problem(net, dtype)
    curvature = fitted(gradients, name)
    back = restored(through_disk(curvature, tmp_path), gradients.coverage)
    assert (back.name, back.dampings, back.labels) == (name, curvature.dampings, curvature.labels)
    assert (back.examples, back.weights) == (curvature.examples, curvature.weights)
    assert (back.blockwise is None) == (curvature.blockwise is None)
    mean = mean_gradient(gradients, range(N))
    query, again = curvature.solve(mean), back.solve(mean)
    for layer, vector in query.items():
        assert torch.equal(vector, again[layer])
    expected = score_examples(gradients, range(N), curvature=curvature, query=query).columns
    found = score_examples(gradients, range(N), curvature=back, query=again).columns
    for column in ("self_influence", "harm"):
        assert torch.equal(expected[column], found[column])
    if name != "identity":
        assert not torch.allclose(found["self_influence"], found["grad_norm_squared"])


def test_refused(tmp_path: Path) -> None:
    gradients = problem()
    files = through_disk(fitted(gradients, "ekfac"), tmp_path)

    def refused(match: str, files: Any = files, coverage: Any = gradients.coverage) -> None:
        with pytest.raises(ValueError, match=match):
            restored(files, coverage)

    refused(r"there are no factors, expected some for \['0', '2', '4'\]: fit the curvature again", {})
    refused(r"those of \['0', '2', '4'\], the covered layers are \['0', '4'\]: pass the model and the `layers=`",
            coverage=problem(layers=["0", "4"]).coverage)  # fmt: skip
    refused(r"those of \['0', '2'\], the covered", {name: files[name] for name in ("0", "2")})
    refused(r"of '0' are \{.*torch.float64.* needs \{.*torch.float32.*in its precision",
            coverage=problem(dtype=torch.float32).coverage)  # fmt: skip
    old = {name: (tensors, {"kind": "ekfac", "damping": "0.1"}) for name, (tensors, _) in files.items()}
    refused(
        r"of '0' say nothing of \['curvature', 'dampings', 'weights', 'labels', 'examples'\], as in earlier versions",
        old,
    )
    mixed = files | {"2": (files["2"][0], files["2"][1] | {"kind": "kfac", "curvature": "kfac"})}
    refused(r"the factors are of \[\('ekfac', 'ekfac'\), \('kfac', 'kfac'\)\]; expected one of identity", mixed)
    short = files | {"2": ({"eigenvalues": files["2"][0]["eigenvalues"]}, files["2"][1])}
    refused(r"of '2' are \{'eigenvalues': .*needs \{.*'gradient_basis'", short)
    with torch.no_grad():
        gradients.module.get_parameter("2.weight")[0, 0] += 1e-9
    refused(r"other weights of '2' \(their checksum was \w{8}, now it is \w{8}\): load the checkpoint of that training")


def test_products_are_not_kept(tmp_path: Path) -> None:
    gradients = problem()
    files = through_disk(fitted(gradients, "ggn", solver="cg"), tmp_path)
    with pytest.raises(ValueError, match=r"curvature='ggn' was solved by products .* but the ekfac for self-influence"):
        restored(files, gradients.coverage)


class Swapped(nn.Module):
    """Two layers, defined in either order."""

    def __init__(self, first: str) -> None:
        super().__init__()
        for name in ("body", "head") if first == "body" else ("head", "body"):
            setattr(self, name, nn.Linear(*((4, 3) if name == "body" else (3, CLASSES))).double())

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(x).tanh())
        return out


def test_a_matrix_is_over_the_layers_in_the_order_of_then(tmp_path: Path) -> None:
    """The same layers and weights, defined in another order, gave other scores without a word."""
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(N, 4).double(), torch.arange(N) % CLASSES)
    one, other = Swapped("body"), Swapped("head")
    other.load_state_dict(one.state_dict())
    influence = Influence(one, F.cross_entropy, data).fit("ggn", damping=0.1)
    influence.save(tmp_path / "factors")
    files = AuditStore.open(tmp_path / "factors").factors()
    again = Influence(other, F.cross_entropy, data)
    back = restored(files, again.coverage)
    expected = score_examples(influence.training, range(N), curvature=influence.curvature).columns["self_influence"]
    found = score_examples(again.training, range(N), curvature=back).columns["self_influence"]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", ["ekfac", "kfac", "ggn"])
@pytest.mark.parametrize("first", [torch.float32, torch.float64], ids=str)
def test_layers_of_several_dtypes(name: Any, first: torch.dtype, tmp_path: Path) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 3).to(first)
            self.b = nn.Linear(3, CLASSES).to(torch.float32 if first == torch.float64 else torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.b(self.a(x.to(self.a.weight)).tanh().to(self.b.weight))
            return out

    torch.manual_seed(0)
    data, net = TensorDataset(torch.randn(N, 4), torch.arange(N) % CLASSES), Mixed()
    influence = Influence(net, F.cross_entropy, data).fit(name, damping=0.1)
    assert influence.self_influence().isfinite().all()
    influence.save(tmp_path / "factors")
    back = Influence.load(tmp_path / "factors", net, F.cross_entropy, data)
    assert torch.equal(back.self_influence(), influence.self_influence())
