"""Products with GGN and Hessian against dense ones, and influence made with them against retraining."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import reference as ref
import torch
import torch.distributed as dist
import torch.nn.functional as F
from own_processes import together
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.data import Dataset, TensorDataset

from lightning_influence.curvature.products import product as product_module
from lightning_influence.curvature.products import product as products
from lightning_influence.curvature.products import second_derivatives
from lightning_influence.curvature.products.flat import FlatParameters
from lightning_influence.curvature.products.ggn import GGNProduct
from lightning_influence.curvature.products.hessian import HessianProduct
from lightning_influence.curvature.products.product import CurvatureProduct
from lightning_influence.curvature.solve.cg import cg
from lightning_influence.curvature.solve.lissa import lissa
from lightning_influence.curvature.solve.solution import Solution
from lightning_influence.curvature.solve.spectrum import (
    IndefiniteError,
    largest_eigenvalue,
    require_positive_definite,
    smallest_eigenvalue,
)
from lightning_influence.data.source import ExampleSource
from lightning_influence.gradients.discover import discover
from lightning_influence.gradients.passes import ExampleGradients
from lightning_influence.layers import per_sample
from lightning_influence.objective.losses import ElementwiseLoss, reads, registry
from lightning_influence.objective.task import Task, TaskError

N, C = 11, 3
EXACT: dict[str, Any] = {"rtol": 1e-8, "atol": 1e-11}
Loss = Callable[[Tensor, Tensor], Tensor]


def classify(module: Any, batch: Any) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1])


def passes(net: nn.Module, task: Task, data: Dataset[Any], batch_size: int = 4, **options: Any) -> ExampleGradients:
    source = ExampleSource(data, batch_size=batch_size, **options)
    return ExampleGradients(net, task, source, discover(net, task, source))


# ------------------------------------------------------------------------------------------------------------ models


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(3, 2, batch_first=True)
        self.head = nn.Linear(2, C)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.rnn(x)[0][:, -1])
        return logits


class Attention(nn.Module):
    """With a parameter of its own, which no layer holds."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.head = nn.Linear(4, C)

    def forward(self, x: Tensor) -> Tensor:
        y = x * self.scale
        logits: Tensor = self.head((y + self.attention(y, y, y, need_weights=False)[0]).mean(1))
        return logits


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight
        self.head = nn.Linear(4, C)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.second(self.first(x).tanh()).sigmoid())
        return logits


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4, bias=False), nn.ELU(), nn.Linear(4, C))


def cnn() -> nn.Module:
    norm = nn.BatchNorm2d(2)
    norm.register_buffer("running_mean", torch.randn(2))
    norm.register_buffer("running_var", torch.rand(2) + 0.5)
    return nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1, padding_mode="circular"),
        norm,
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(8, C),
    )


def embedding() -> nn.Module:
    return nn.Sequential(nn.Embedding(6, 3), nn.LayerNorm(3), nn.Flatten(), nn.Linear(9, 5), nn.GELU(), nn.Linear(5, C))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "mlp": (mlp, lambda: torch.randn(N, 4)),
    "tied": (Tied, lambda: torch.randn(N, 4)),
    "cnn": (cnn, lambda: torch.randn(N, 1, 4, 4)),
    "lstm": (Recurrent, lambda: torch.randn(N, 3, 3)),
    "attention": (Attention, lambda: torch.randn(N, 3, 4)),
    "embedding": (embedding, lambda: torch.randint(0, 6, (N, 3))),
}


class Problem(NamedTuple):
    net: nn.Module
    inputs: Tensor
    targets: Tensor

    @property
    def data(self) -> TensorDataset:
        return TensorDataset(self.inputs, self.targets)

    def passes(self, task: Task = classify, batch_size: int = 4) -> ExampleGradients:
        return passes(self.net, task, self.data, batch_size)


def problem(name: str = "mlp") -> Problem:
    make, inputs = MODELS[name]
    torch.manual_seed(0)
    net, x = make().double().eval(), inputs()
    return Problem(net, x.double() if x.is_floating_point() else x, torch.randint(0, C, (N,)))


def reference(kind: type[CurvatureProduct], p: Problem, names: Sequence[str] | None = None) -> Tensor:
    # The fused kernels, which the reference would else take, can't be differentiated twice.
    with second_derivatives.sdpa_kernel(second_derivatives.SDPBackend.MATH):
        if kind is HessianProduct:
            return ref.hessian_dense(p.net, F.cross_entropy, p.inputs, p.targets, names)
        return ref.ggn_dense(p.net, p.inputs, "cross_entropy", names)


BOTH = pytest.mark.parametrize("kind", [GGNProduct, HessianProduct], ids=["ggn", "hessian"])


# ---------------------------------------------------------------------------------------------------- flat parameters


class TestFlatParameters:
    def test_there_and_back(self) -> None:
        net = Attention()
        flat = FlatParameters.of(net)
        assert list(flat.parameters) == [name for name, _ in net.named_parameters()]
        assert flat.size == sum(p.numel() for p in net.parameters())
        tensors = {name: torch.randn(2, 5, *p.shape) for name, p in net.named_parameters()}
        line = torch.cat([tensor.reshape(2, 5, -1) for tensor in tensors.values()], 2)
        assert line.shape == (2, 5, flat.size)
        torch.testing.assert_close(line[1, 2], nn.utils.parameters_to_vector([t[1, 2] for t in tensors.values()]))
        back = flat.unflatten(line)
        assert back.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert torch.equal(back[name], tensor)

    def test_order_is_that_of_the_module_and_ties_count_once(self) -> None:
        net = Tied()
        net.head.bias.requires_grad_(False)
        assert list(FlatParameters.of(net).parameters) == ["first.weight", "first.bias", "head.weight"]
        chosen = FlatParameters.of(net, ["head.bias", "first.weight"])
        assert list(chosen.parameters) == ["first.weight", "head.bias"]

    def test_dtype_is_at_least_float32(self) -> None:
        assert FlatParameters.of(nn.Linear(2, 2).bfloat16()).dtype == torch.float32
        net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double())
        assert FlatParameters.of(net).dtype == torch.float64

    def test_wrong_names(self) -> None:
        with pytest.raises(ValueError, match=r"Linear has no parameters \['wieght'\]"):
            FlatParameters.of(nn.Linear(3, 2), ["wieght"])
        with pytest.raises(ValueError, match="Linear has no trainable parameter"):
            FlatParameters.of(nn.Linear(3, 2).requires_grad_(False))


# ----------------------------------------------------------------------------------------------------------- products


@BOTH
class TestAgainstTheReference:
    @pytest.mark.parametrize("name", MODELS)
    def test_dense(self, kind: type[CurvatureProduct], name: str) -> None:
        p = problem(name)
        expected = reference(kind, p)
        mean = expected.diagonal().mean() * torch.eye(len(expected)).double()
        assert (expected - mean).norm() > 0.3 * expected.norm(), "a multiple of the identity would pass"
        found = kind(p.passes(), range(N)).to_dense()
        torch.testing.assert_close(found, expected, **EXACT)
        assert torch.equal(found, found.T)

    def test_batches_of_vectors(self, kind: type[CurvatureProduct]) -> None:
        p = problem()
        matrix, product = reference(kind, p), kind(p.passes(), range(N))
        product._chunk = 3
        v = torch.randn(7, len(matrix)).double()
        torch.testing.assert_close(product(v), v @ matrix, **EXACT)
        torch.testing.assert_close(product(v[0]), matrix @ v[0], **EXACT)
        assert product(v[:0]).shape == (0, len(matrix))
        single = product(v.float())
        assert single.dtype == torch.float32
        torch.testing.assert_close(single.double(), v @ matrix, rtol=1e-5, atol=1e-6)

    def test_some_parameters(self, kind: type[CurvatureProduct]) -> None:
        """In any order, frozen ones too."""
        p = problem()
        frozen = p.net.get_parameter("0.bias").requires_grad_(False)
        names = ["4.weight", "0.bias", "2.weight"]
        product = kind(p.passes(), range(N), parameters=names)
        frozen.requires_grad_(True)
        assert list(product.flat.parameters) == ["0.bias", "2.weight", "4.weight"]
        expected = reference(kind, p, ["0.bias", "2.weight", "4.weight"])
        torch.testing.assert_close(product.to_dense(), expected, **EXACT)

    def test_neither_batch_size_nor_holding_nor_chunks_matter(
        self, kind: type[CurvatureProduct], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        p = problem("cnn")
        v = torch.randn(5, sum(w.numel() for w in p.net.parameters())).double()
        expected = v @ reference(kind, p)
        for size, hold, chunk in ((1, 10**9, 1), (3, 0, 2), (N, 10**9, 1000), (100, 0, None)):
            monkeypatch.setattr(product_module, "_HOLD", hold)
            product = kind(p.passes(), range(N), batch_size=size)
            product._chunk = chunk
            assert product.held == (hold > 0)
            for _ in range(2):
                torch.testing.assert_close(product(v), expected, **EXACT)

    def test_a_subset_of_the_examples(self, kind: type[CurvatureProduct]) -> None:
        p = problem()
        chosen = [7, 2, 9]
        part = Problem(p.net, p.inputs[chosen], p.targets[chosen])
        product = kind(p.passes(), chosen)
        assert product.examples == 3
        torch.testing.assert_close(product.to_dense(), reference(kind, part), **EXACT)

    def test_one_by_one_where_vectorising_fails(
        self, kind: type[CurvatureProduct], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Custom kernels can't be vectorised; the products then take a loop, and are the same."""
        p = problem()
        product = kind(p.passes(), range(N))
        v = torch.randn(3, product.flat.size).double()
        expected = product(v)
        assert product._twice.vectorised

        def refuse(*arguments: Any) -> Any:
            raise RuntimeError("Batching rule not implemented")

        monkeypatch.setattr(torch.func, "vmap", refuse)
        torch.testing.assert_close(product(v), expected, rtol=1e-12, atol=1e-14)
        assert not product._twice.vectorised


def test_ggn_is_the_hessian_for_the_output_layer_of_a_piecewise_linear_net() -> None:
    """And not below it, where the network is not linear in the parameters of two layers at a time."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, C)).double()
    p = Problem(net, torch.randn(N, 4).double(), torch.randint(0, C, (N,)))
    last = ["2.weight", "2.bias"]
    pair = [kind(p.passes(), range(N), parameters=last).to_dense() for kind in (GGNProduct, HessianProduct)]
    torch.testing.assert_close(*pair, **EXACT)
    ggn, hessian = (kind(p.passes(), range(N)).to_dense() for kind in (GGNProduct, HessianProduct))
    assert (ggn - hessian).norm() > 0.05 * hessian.norm()
    assert torch.linalg.eigvalsh(ggn)[0] > -1e-12
    assert torch.linalg.eigvalsh(hessian)[0] < -1e-3


# -------------------------------------------------------------------------------------------------------------- losses

WEIGHT = torch.tensor([0.5, 1.0, 3.0]).double()


@dataclass(frozen=True)
class LossCase:
    """A task and the same loss for one example, with the share that the data set gives it."""

    task: Task
    own: Callable[[Tensor, Tensor, float], Tensor]
    targets: Callable[[Tensor], Tensor] = lambda labels: labels
    share: Callable[[Tensor], float] = lambda labels: 1.0
    plain: bool = False  # the GGN is that of plain cross-entropy


def on_targets(loss: Loss) -> Task:
    return lambda module, batch: loss(module(batch[0]), batch[1])


def soft(labels: Tensor) -> Tensor:
    return (torch.eye(C)[labels] * 0.7 + 0.1).double()


LOSSES = {
    "class weights": LossCase(
        on_targets(lambda o, t: F.cross_entropy(o, t, WEIGHT)),
        lambda o, t, mean: F.cross_entropy(o, t, WEIGHT, reduction="sum") / mean,
        share=lambda labels: float(WEIGHT[labels].mean()),
    ),
    "smoothed": LossCase(
        on_targets(lambda o, t: F.cross_entropy(o, t, label_smoothing=0.2)),
        lambda o, t, _: F.cross_entropy(o, t, label_smoothing=0.2),
        plain=True,
    ),
    "soft targets": LossCase(
        on_targets(F.cross_entropy), lambda o, t, _: F.cross_entropy(o, t), targets=soft, plain=True
    ),
    "log-probabilities": LossCase(
        on_targets(lambda o, t: F.nll_loss(o.log_softmax(1), t)),
        lambda o, t, _: F.cross_entropy(o, t),
        plain=True,
    ),
    "binary": LossCase(
        on_targets(lambda o, t: F.binary_cross_entropy_with_logits(o, t, pos_weight=WEIGHT)),
        lambda o, t, _: F.binary_cross_entropy_with_logits(o, t, pos_weight=WEIGHT),
        targets=lambda labels: torch.eye(C)[labels].double(),
    ),
    "squared": LossCase(on_targets(F.mse_loss), lambda o, t, _: F.mse_loss(o, t), targets=soft),
    "two calls": LossCase(
        on_targets(lambda o, t: F.cross_entropy(o, t.argmax(1)) + 0.3 * F.mse_loss(o, t)),
        lambda o, t, _: F.cross_entropy(o, t.argmax(1)) + 0.3 * F.mse_loss(o, t),
        targets=soft,
    ),
    "one loss per example": LossCase(
        on_targets(lambda o, t: F.cross_entropy(o, t, reduction="none")),
        lambda o, t, _: F.cross_entropy(o, t),
        plain=True,
    ),
}


INFORMATION: dict[str, Loss] = {
    "absolute": F.l1_loss,
    "huber": lambda o, t: F.huber_loss(o, t, delta=0.5),
    "probabilities": lambda o, t: F.binary_cross_entropy(o.sigmoid(), t),
    "rates": lambda o, t: F.poisson_nll_loss(o.exp(), t, log_input=False),
    "normal": lambda o, t: F.gaussian_nll_loss(o[:, :1], t[:, :1], o[:, 1:2].exp()),
    "divergence": lambda o, t: F.kl_div(o.log_softmax(1), 0.5 * t, reduction="batchmean"),
}


def dense_ggn(p: Problem, own: Loss) -> Tensor:
    """The GGN with the loss Hessian by differentiating twice in the logits, one example at a time."""
    tensors = list(p.net.parameters())
    total = torch.zeros((), dtype=torch.float64)
    for x, t in zip(p.inputs.split(1), p.targets.split(1), strict=True):
        outputs = p.net(x)
        rows = [torch.autograd.grad(o, tensors, retain_graph=True, materialize_grads=True) for o in outputs[0]]
        jacobian = torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows])
        hessian = torch.autograd.functional.hessian(lambda o, t=t: own(o[None], t), outputs[0].detach())
        total = total + jacobian.T @ hessian @ jacobian / len(p.inputs)
    return total


def test_how_to_add_a_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """`F.soft_margin_loss` of labels -1 and 1, with its curvature; the library does not know it otherwise."""
    monkeypatch.setattr(registry, "READERS", dict(registry.READERS))  # undone at the end

    @reads(F.soft_margin_loss)
    @dataclass(frozen=True, eq=False)
    class SoftMargin(ElementwiseLoss):
        def losses(self, predictions: Tensor) -> Tensor:
            return F.soft_margin_loss(predictions, self.target, reduction="none")

        def curvature(self) -> Tensor:
            return self.values().sigmoid() * (-self.values()).sigmoid()

    p = problem()
    p = p._replace(targets=2 * soft(p.targets).round() - 1)
    gradients = p.passes(on_targets(F.soft_margin_loss))
    expected = ref.per_example_gradients(p.net, F.soft_margin_loss, p.inputs, p.targets)["4.weight"]
    outer: Tensor = torch.zeros(())
    for labels in ("true", "exact"):
        with closing(gradients.run(range(N), labels)) as batches:
            layers = [{io.name: io for io in batch.layers()}["4"] for batch in batches]
        draws = [
            torch.cat([per_sample.formed(io.x, io.gs[k])[:, 0] for io in layers]) for k in range(len(layers[0].gs))
        ]
        if labels == "true":
            torch.testing.assert_close(draws[0][:, :, :-1], expected, **EXACT)
        else:
            outer = torch.stack([rows.flatten(1).T @ rows.flatten(1) / N for rows in draws]).sum(0)
    ggn = GGNProduct(gradients, range(N)).to_dense()
    torch.testing.assert_close(ggn, dense_ggn(p, F.soft_margin_loss), **EXACT)
    torch.testing.assert_close(outer.diagonal().sum(), ggn.diagonal()[-5 * C :].sum(), **EXACT)


class TestLosses:
    @pytest.mark.parametrize("name", LOSSES)
    @pytest.mark.parametrize("batch_size", [2, N])
    def test_every_known_loss(self, name: str, batch_size: int) -> None:
        """Every example weighs what it weighs in the whole data set, whatever batch it is in."""
        case = LOSSES[name]
        p = problem()
        share = case.share(p.targets)
        p = p._replace(targets=case.targets(p.targets))

        def own(o: Tensor, t: Tensor) -> Tensor:
            return case.own(o, t, share)

        ggn = GGNProduct(p.passes(case.task, batch_size), range(N))
        torch.testing.assert_close(ggn.to_dense(), dense_ggn(p, own), **EXACT)
        assert case.plain == torch.allclose(ggn.to_dense(), reference(GGNProduct, problem()), rtol=1e-2)
        hessian = HessianProduct(p.passes(case.task, batch_size), range(N))
        torch.testing.assert_close(hessian.to_dense(), ref.hessian_dense(p.net, own, p.inputs, p.targets), **EXACT)

    def test_ignored_targets(self) -> None:
        """A mean over the tokens that count: examples with more of them weigh more."""
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, C)).double()
        x, t = torch.randn(N, 5, 3).double(), torch.randint(0, C, (N, 5))
        t[torch.rand(N, 5) < 0.3] = -100
        t[0, 1:] = -100
        counted = float((t >= 0).sum()) / N

        def own(o: Tensor, t: Tensor) -> Tensor:
            return F.cross_entropy(o.transpose(1, 2), t, reduction="sum") / counted

        gradients = passes(net, lambda m, b: F.cross_entropy(m(b[0]).transpose(1, 2), b[1]), TensorDataset(x, t), 3)
        expected = ref.hessian_dense(net, own, x, t)
        torch.testing.assert_close(HessianProduct(gradients, range(N)).to_dense(), expected, **EXACT)
        ggn = GGNProduct(gradients, range(N), parameters=["2.weight", "2.bias"]).to_dense()
        torch.testing.assert_close(ggn, ref.hessian_dense(net, own, x, t, ["2.weight", "2.bias"]), **EXACT)

    def test_a_penalty_is_part_of_the_hessian_and_refused_by_the_ggn(self) -> None:
        p = problem()

        def penalised(module: Any, batch: Any) -> Tensor:
            penalty = torch.stack([w.square().sum() for w in module.parameters()]).sum()
            return classify(module, batch) + 0.5 * 0.1 * penalty

        eye = torch.eye(sum(w.numel() for w in p.net.parameters())).double()
        found = HessianProduct(p.passes(penalised), range(N)).to_dense()
        torch.testing.assert_close(found, reference(HessianProduct, p) + 0.1 * eye, **EXACT)
        with pytest.raises(TaskError, match=r"made of known calls .* has a part besides them .* use the Hessian"):
            GGNProduct(p.passes(penalised), range(N))

    def test_known_calls_in_a_formula_of_the_task(self) -> None:
        """The weight of one call depends on the other: its derivative is part of the Hessian."""

        def geometric(o: Tensor, t: Tensor) -> Tensor:
            return (F.cross_entropy(o, t, reduction="none") * F.cross_entropy(-o, t, reduction="none")).sqrt()

        p = problem()
        found = HessianProduct(p.passes(on_targets(geometric)), range(N)).to_dense()
        torch.testing.assert_close(found, ref.hessian_dense(p.net, geometric, p.inputs, p.targets), **EXACT)

    def test_an_unknown_loss(self) -> None:
        p = problem()

        def unknown(o: Tensor, t: Tensor) -> Tensor:
            return torch.mean((1 - o.softmax(1).gather(1, t[:, None])) ** 2)

        found = HessianProduct(p.passes(on_targets(unknown)), range(N)).to_dense()
        torch.testing.assert_close(found, ref.hessian_dense(p.net, unknown, p.inputs, p.targets), **EXACT)
        with pytest.raises(TaskError, match="this one has none of them"):
            GGNProduct(p.passes(on_targets(unknown)), range(N))

    @pytest.mark.parametrize("name", INFORMATION)
    def test_losses_whose_curvature_is_no_hessian(self, name: str) -> None:
        """What the passes that fit EK-FAC take for the curvature: 0 for the absolute error if it were the Hessian."""
        torch.manual_seed(0)
        net = nn.Linear(4, C).double()
        data = TensorDataset(torch.randn(N, 4).double(), soft(torch.randint(0, C, (N,))))
        gradients = passes(net, on_targets(INFORMATION[name]), data)
        expected = torch.zeros(5 * C, 5 * C).double()
        with closing(gradients.run(range(N), "exact")) as batches:
            for batch in batches:
                (io,) = batch.layers()
                for g in io.gs:
                    blocks = torch.cat(list(per_sample.gradients(io.x, g)), 1)[0]  # [n, o, i]
                    rows = torch.cat([blocks[:, :, :-1].flatten(1), blocks[:, :, -1]], 1)
                    expected += rows.T @ rows / N
        assert expected.norm() > 0.01
        torch.testing.assert_close(GGNProduct(gradients, range(N)).to_dense(), expected, **EXACT)

    def test_either_side_of_a_squared_error_may_be_the_prediction(self) -> None:
        """Or both: what counts is the derivative of their difference."""

        class Difference(nn.Module):
            def __init__(self, net: nn.Module) -> None:
                super().__init__()
                self.net = net

            def forward(self, x: Tensor) -> Tensor:
                y: Tensor = self.net(x)
                return y - y.flip(1)

        p = problem()
        for task, outputs in (
            (lambda o, t: F.mse_loss(soft(t), o), p.net),
            (lambda o, t: F.mse_loss(o, o.flip(1)), Difference(p.net)),
        ):
            found = GGNProduct(p.passes(on_targets(task)), range(N)).to_dense()
            torch.testing.assert_close(found, ref.ggn_dense(outputs, p.inputs, "mse") / C, **EXACT)

    def test_targets_and_weights_that_the_ggn_has_no_meaning_for(self) -> None:
        p = problem()
        moving = on_targets(lambda o, t: F.cross_entropy(o, o.flip(1).softmax(1)))
        with pytest.raises(TaskError, match="the target of a loss call depends on the parameters"):
            GGNProduct(p.passes(moving), range(N))
        negative = on_targets(lambda o, t: F.mse_loss(o, soft(t)) - F.cross_entropy(o, t))
        with pytest.raises(ValueError, match=r"with a negative weight .* GGN need weights >= 0.*or the Hessian"):
            GGNProduct(p.passes(negative), range(N))
        HessianProduct(p.passes(negative), range(N))


@BOTH
def test_half_precision(kind: type[CurvatureProduct]) -> None:
    """Weights, class weights and soft targets in bfloat16; the vectors stay in float32."""
    p, half = problem(), problem()
    p = p._replace(targets=soft(p.targets))
    half = Problem(half.net.bfloat16(), p.inputs.bfloat16(), p.targets.bfloat16())
    exact, product = (
        kind(one.passes(on_targets(lambda o, t: F.cross_entropy(o, t, WEIGHT.to(o.dtype)))), range(N))
        for one in (p, half)
    )
    assert (exact.flat.dtype, product.flat.dtype) == (torch.float64, torch.float32)
    v = torch.ones(2, product.flat.size)
    assert (product(v) - exact(v)).norm() < 0.1 * exact(v).norm()


def test_parameters_that_the_loss_is_linear_in_or_does_not_know() -> None:
    net = nn.Sequential(nn.Linear(4, C)).double()
    data = TensorDataset(torch.randn(N, 4).double(), torch.randint(0, C, (N,)))
    linear = passes(net, lambda m, b: m(b[0]).mean(), data)
    assert (HessianProduct(linear, range(N)).to_dense() == 0).all()
    two = nn.ModuleDict({"used": nn.Linear(4, C), "idle": nn.Linear(2, 2)}).double()
    gradients = passes(two, lambda m, b: F.cross_entropy(m["used"](b[0]), b[1]), data)
    for kind in (GGNProduct, HessianProduct):
        matrix = kind(gradients, range(N)).to_dense()
        idle = 4 * C + C
        assert (matrix[idle:] == 0).all()
        assert (matrix[:idle, :idle].diagonal() > 0).all()
        assert (kind(gradients, range(N), parameters=["idle.weight"]).to_dense() == 0).all()


# ------------------------------------------------------------------------------------------- what passes have to keep


class Disturbed(nn.Module):
    """Dropout, batch statistics, noise of its own, and a habit of writing on itself."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Tanh(), nn.Linear(5, C))
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(x + 0.1 * torch.randn(x.shape[1:]).to(x))
        self.seen.append(y)
        return y


@BOTH
class TestIsolation:
    def test_nothing_is_left_behind(self, kind: type[CurvatureProduct]) -> None:
        torch.manual_seed(0)
        net = Disturbed()
        net.net[4].bias.requires_grad_(False)
        before = {name: value.clone() for name, value in net.state_dict().items()}
        data = TensorDataset(torch.randn(N, 4), torch.randint(0, C, (N,)))
        state = torch.get_rng_state()
        product = kind(passes(net, classify, data), range(N))
        with torch.no_grad():
            product(torch.randn(2, product.flat.size, generator=torch.Generator()))
        assert torch.equal(torch.get_rng_state(), state)
        assert net.seen == []
        assert all(module.training for module in net.modules())
        assert [name for name, p in net.named_parameters() if not p.requires_grad] == ["net.4.bias"]
        assert all(p.grad is None for p in net.parameters())
        for name, value in net.state_dict().items():
            assert torch.equal(value, before[name]), name

    def test_it_is_the_same_matrix_every_time(
        self, kind: type[CurvatureProduct], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A step with random numbers of its own: with new ones in every product, no solver would get anywhere."""
        torch.manual_seed(0)
        data = TensorDataset(torch.randn(N, 4), torch.randint(0, C, (N,)))
        for hold in (0, 10**9):
            monkeypatch.setattr(product_module, "_HOLD", hold)
            product = kind(passes(Disturbed(), classify, data), range(N))
            v = torch.randn(2, product.flat.size)
            assert torch.equal(product(v), product(v))

    def test_a_step_may_spoil_its_batch(self, kind: type[CurvatureProduct]) -> None:
        """It empties the dictionary and scales the inputs in place; held batches must come out fresh every time."""

        def spoils(module: Any, batch: dict[str, Any]) -> Tensor:
            labels = batch["rest"].pop(0)
            x = batch.pop("x")
            return F.cross_entropy(module(x.mul_(3)), labels)

        def collate(rows: list[Any]) -> dict[str, Any]:
            xs, ys = zip(*rows, strict=True)
            return {"x": torch.stack(xs), "rest": [torch.stack(ys), ("text", 3, None)]}

        p = problem()
        p = p._replace(inputs=p.inputs / 3)
        gradients = passes(p.net, spoils, p.data, collate_fn=collate)
        expected = reference(kind, p._replace(inputs=3 * p.inputs))
        product = kind(gradients, range(N))
        assert product.held
        for _ in range(2):
            torch.testing.assert_close(product.to_dense(), expected, **EXACT)


class Pair:
    """A batch that is no plain container."""

    def __init__(self, rows: list[Any]) -> None:
        self.x, self.y = (torch.stack(column) for column in zip(*rows, strict=True))


class TestHolding:
    def test_batches_are_loaded_once_if_they_fit(self, monkeypatch: pytest.MonkeyPatch) -> None:
        p = problem()
        loads: list[int] = []
        batches = ExampleSource.batches

        def counted(self: ExampleSource, *arguments: Any) -> Iterator[Any]:
            loads.append(1)
            return batches(self, *arguments)

        monkeypatch.setattr(ExampleSource, "batches", counted)
        gradients = p.passes()
        assert gradients.scale
        # Batches of 4, 4 and 3 examples, each with 4 float64 numbers and a label.
        for room, held in ((11 * 5 * 8, True), (11 * 5 * 8 - 1, False), (3 * 5 * 8, False)):
            monkeypatch.setattr(product_module, "_HOLD", room)
            product = GGNProduct(gradients, range(N))
            assert product.held == held
            loads.clear()
            for _ in range(3):
                product(product.gradient)
            assert len(loads) == (0 if held else 3)
            torch.testing.assert_close(product.to_dense(), reference(GGNProduct, p), **EXACT)

    def test_batches_of_unknown_kind_are_loaded_every_time(self) -> None:
        p = problem()
        gradients = passes(
            p.net,
            lambda m, b: F.cross_entropy(m(b.x), b.y),
            p.data,
            collate_fn=Pair,
        )
        product = GGNProduct(gradients, range(N))
        assert not product.held
        torch.testing.assert_close(product.to_dense(), reference(GGNProduct, p), **EXACT)

    def test_fewer_vectors_at_a_time_where_a_batch_takes_much(self, monkeypatch: pytest.MonkeyPatch) -> None:
        p = problem()
        assert GGNProduct(p.passes(), range(N))._chunk == 256
        monkeypatch.setattr(products, "_ROOM", 20_000)
        small, large = (GGNProduct(p.passes(), range(N), batch_size=size)._chunk or 0 for size in (N, 2))
        assert 1 <= small < large < 256
        monkeypatch.setattr(products, "_ROOM", 1)
        product = GGNProduct(p.passes(), range(N))
        assert product._chunk == 1
        torch.testing.assert_close(product.to_dense(), reference(GGNProduct, p), **EXACT)


# -------------------------------------------------------------------------------------------------- what can go wrong


@BOTH
class TestNonFinite:
    def test_such_examples_are_left_out_and_listed(self, kind: type[CurvatureProduct]) -> None:
        p = problem()
        p.inputs[3] = math.nan
        p.inputs[8] = math.inf
        good = [index for index in range(N) if index not in (3, 8)]
        product = kind(p.passes(), range(N))
        assert product.left_out == [3, 8]
        assert product.examples == N - 2
        clean = Problem(p.net, p.inputs[good], p.targets[good])
        torch.testing.assert_close(product.to_dense(), reference(kind, clean), **EXACT)
        p.inputs[:] = math.nan
        with pytest.raises(ValueError, match="no example counts"):
            kind(p.passes(), range(N))

    def test_a_gradient_may_be_non_finite_where_the_loss_is_not(self, kind: type[CurvatureProduct]) -> None:
        class Root(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.scale, self.head = nn.Parameter(torch.ones(())), nn.Linear(4, C)

            def forward(self, x: Tensor) -> Tensor:
                logits: Tensor = self.head((self.scale * x).sqrt())
                return logits

        torch.manual_seed(0)
        net = Root().double()
        x = torch.rand(N, 4).double() + 0.1
        x[5, 2] = 0
        product = kind(passes(net, classify, TensorDataset(x, torch.randint(0, C, (N,)))), range(N))
        assert product.left_out == [5]
        assert torch.isfinite(product.to_dense()).all()


class _Counted(int):
    """An index that counts how often a set or dictionary asks for it."""

    asked = 0

    def __hash__(self) -> int:
        _Counted.asked += 1
        return int(self) % 2**61


def test_the_work_of_leaving_examples_out_grows_with_their_number_and_not_with_its_square() -> None:
    counts = []
    for n in (16, 64):
        inputs = torch.randn(n, 2)
        inputs[::4] = math.nan
        gradients = passes(nn.Linear(2, C), classify, TensorDataset(inputs, torch.zeros(n, dtype=torch.long)))
        gradients.calibrate(range(n))
        _Counted.asked = 0
        product = GGNProduct(gradients, [_Counted(index) for index in range(n)], batch_size=4)
        assert product.left_out == list(range(0, n, 4))
        counts.append(_Counted.asked)
    assert 0 < counts[1] <= 4.5 * counts[0]


def test_a_pole_of_the_second_derivative_is_an_error() -> None:
    net = nn.Linear(1, 1, bias=False).double()
    nn.init.zeros_(net.weight)
    data = TensorDataset(torch.ones(4, 1).double(), torch.zeros(4))
    gradients = passes(net, lambda m, b: (m(b[0]).relu() ** 1.5).sum() + m(b[0]).abs().pow(1.5).mean(), data)
    product = HessianProduct(gradients, range(4))
    assert product.gradient == 0
    with pytest.raises(ValueError, match="a product with the curvature is non-finite .* have a pole"):
        product(torch.ones(1).double())
    assert not torch.isfinite(product(torch.full((1,), math.inf).double())).any(), "what a solver asks, it shall get"


class Once(torch.autograd.Function):
    """As a fused kernel: its way back is no function that autograd knows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.exp()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        result: Tensor = g * x.exp()
        return result


class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 4), nn.Linear(4, C)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = Once.apply(self.first(x))
        logits: Tensor = self.head(hidden)
        return logits


@BOTH
class TestSecondDerivatives:
    def test_a_way_back_that_is_cut_is_found(self, kind: type[CurvatureProduct]) -> None:
        """Autograd raises nothing here: the products of everything below the kernel would come out as zero."""
        data = TensorDataset(torch.randn(N, 4), torch.randint(0, C, (N,)))
        net = Fused()
        message = r"autograd raises no error: first.weight \(0% found\), first.bias \(0% found\).*`ekfac`"
        with pytest.raises(TaskError, match=message):
            kind(passes(net, classify, data), range(N))
        above = kind(passes(net, classify, data), range(N), parameters=["head.weight", "head.bias"])
        assert above.to_dense().norm() > 0.1

    def test_an_operation_that_has_none_is_named(self, kind: type[CurvatureProduct]) -> None:
        def task(module: Any, batch: Any) -> Tensor:
            scores = module(batch[0])
            lengths = torch.full((len(scores),), 2)
            symbols = scores.reshape(-1, 1, C).expand(-1, 2, -1).transpose(0, 1).log_softmax(2)
            paths = F.ctc_loss(symbols, torch.ones(len(scores), 1).long(), lengths, lengths - 1, reduction="none")
            return F.cross_entropy(scores + paths[:, None] * torch.arange(C), batch[1])

        net = nn.Linear(4, C).double()
        data = TensorDataset(torch.randn(N, 4).double(), torch.randint(0, C, (N,)))
        with pytest.raises(TaskError, match=r"can't be differentiated twice.*_ctc_loss_backward.*`ekfac`"):
            kind(passes(net, task, data), range(N))


def test_wrong_arguments() -> None:
    p = problem()
    product = GGNProduct(p.passes(), range(N))
    size = product.flat.size
    with pytest.raises(ValueError, match=rf"vectors have the shape \(2, {size + 1}\); expected \[q, {size}\]"):
        product(torch.ones(2, size + 1))
    with pytest.raises(ValueError, match="size is 12; expected 1 to 11, the number of examples"):
        next(product.random_batches(12))


def test_the_mean_gradient_comes_with_it() -> None:
    p = problem()
    expected = ref.flatten_gradients(ref.per_example_gradients(p.net, F.cross_entropy, p.inputs, p.targets)).mean(0)
    torch.testing.assert_close(GGNProduct(p.passes(), range(N)).gradient, expected, **EXACT)


def test_random_batches_average_to_the_whole() -> None:
    """Every epoch takes each example once; other seeds take them in another order."""
    p = problem()
    product = GGNProduct(p.passes(), range(10))
    v = torch.randn(2, product.flat.size).double()
    for seed in (0, 1):
        parts = [batch(v) for batch in itertools.islice(product.random_batches(5, seed=seed), 4)]
        torch.testing.assert_close(parts[0] + parts[1], 2 * product(v), **EXACT)
        torch.testing.assert_close(parts[2] + parts[3], 2 * product(v), **EXACT)
        assert not torch.allclose(parts[0], parts[2], rtol=1e-3)
    first, other = (next(product.random_batches(5, seed=seed))(v) for seed in (0, 1))
    assert not torch.allclose(first, other, rtol=1e-3)


def _two_processes(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    try:
        p = problem()
        p.inputs[4] = math.nan
        result: dict[str, Any] = {}
        for kind in (GGNProduct, HessianProduct):
            product = kind(p.passes(), range(N))
            batch = next(product.random_batches(3))
            result[kind.__name__] = (product.to_dense(), product.gradient, product.left_out, batch(product.gradient))
            # One process has no example that counts.
            result[f"one {kind.__name__}"] = kind(p.passes(), [2, 4]).to_dense()
        torch.save(result, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_two_processes_give_what_one_gives(tmp_path: Path) -> None:
    together(_two_processes, str(tmp_path))
    both = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    p = problem()
    p.inputs[4] = math.nan
    for kind in (GGNProduct, HessianProduct):
        product = kind(p.passes(), range(N))
        batch = next(product.random_batches(3))
        for found in both:
            matrix, gradient, left_out, part = found[kind.__name__]
            torch.testing.assert_close(matrix, product.to_dense(), **EXACT)
            torch.testing.assert_close(gradient, product.gradient, **EXACT)
            torch.testing.assert_close(part, batch(product.gradient), **EXACT)
            assert left_out == [4]
            torch.testing.assert_close(found[f"one {kind.__name__}"], kind(p.passes(), [2, 4]).to_dense(), **EXACT)


# ------------------------------------------------------------------------------------------------ solving with products


class Digits(NamedTuple):
    x: Tensor
    y: Tensor

    @classmethod
    def load(cls, start: int, stop: int) -> Digits:
        # Here, as it takes longer to import than the processes below to do their work.
        from sklearn.datasets import load_digits

        bunch = load_digits()
        order = torch.randperm(len(bunch.target), generator=torch.Generator().manual_seed(0))[start:stop]
        x = torch.from_numpy(bunch.data).double()[order] / 16
        return cls(x, torch.from_numpy(bunch.target).long()[order])

    @property
    def data(self) -> TensorDataset:
        return TensorDataset(self.x, self.y)


class Logistic:
    """Multinomial logistic regression, ``mean loss + wd/2 ‖θ‖²``, trained by Newton steps with plain algebra."""

    decay = 1e-2

    def __init__(self, train: Digits) -> None:
        self.x = torch.cat([train.x, torch.ones(len(train.x), 1).double()], 1)
        self.y = F.one_hot(train.y, 10).double()
        self.theta = torch.zeros(10, self.x.shape[1]).double()
        for _ in range(30):
            self.factor = torch.linalg.cholesky(self.hessian())
            step = torch.cholesky_solve(self.gradient(self.theta[None]).reshape(-1, 1), self.factor)
            self.theta = self.theta - step.reshape(self.theta.shape)
            if step.norm() < 1e-12:
                break

    def gradient(self, theta: Tensor, weights: Tensor | None = None) -> Tensor:
        """Gradients of ``m`` models ``[m, 10, 65]``, with weights ``[m, n]`` of the examples."""
        residual = torch.einsum("mci,ni->mnc", theta, self.x).softmax(2) - self.y
        if weights is not None:
            residual = residual * weights[..., None]
        return torch.einsum("mnc,ni->mci", residual, self.x) / len(self.x) + self.decay * theta

    def hessian(self) -> Tensor:
        probabilities = (self.x @ self.theta.T).softmax(1)
        bend = torch.diag_embed(probabilities) - probabilities[:, :, None] * probabilities[:, None]
        inner = torch.einsum("nab,ni,nj->aibj", bend, self.x, self.x) / len(self.x)
        size = self.theta.numel()
        return inner.reshape(size, size) + self.decay * torch.eye(size).double()

    def without(self, chosen: Sequence[int]) -> Tensor:
        """Train once more without each of the examples, ``[m, 10, 65]``, until the gradient vanishes."""
        weights = torch.ones(len(chosen), len(self.x)).double()
        weights[range(len(chosen)), list(chosen)] = 0
        theta = self.theta.expand(len(chosen), -1, -1)
        for _ in range(100):
            gradient = self.gradient(theta, weights)
            if gradient.abs().max() < 1e-13:
                return theta
            theta = theta - torch.cholesky_solve(gradient.flatten(1).T, self.factor).T.reshape(theta.shape)
        raise AssertionError("retraining did not converge")

    def module(self) -> nn.Linear:
        net = nn.Linear(self.x.shape[1] - 1, 10).double()
        with torch.no_grad():
            net.weight.copy_(self.theta[:, :-1])
            net.bias.copy_(self.theta[:, -1])
        return net


@pytest.fixture(scope="module")
def logistic() -> tuple[Logistic, Digits, Digits]:
    train, held_out = Digits.load(0, 1000), Digits.load(1000, 1100)
    return Logistic(train), train, held_out


@pytest.fixture(scope="module")
def small() -> tuple[nn.Linear, Digits, ExampleGradients, Tensor]:
    """The model of 300 examples, with the gradients of 4 queries."""
    train, held_out = Digits.load(0, 300), Digits.load(1000, 1004)
    net = Logistic(train).module()
    queries = ref.flatten_gradients(ref.per_example_gradients(net, F.cross_entropy, held_out.x, held_out.y))
    return net, train, passes(net, classify, train.data, 150), queries


def losses(theta: Tensor, data: Digits) -> Tensor:
    """Losses ``[m, n]`` of models ``[m, 10, 65]``."""
    x = torch.cat([data.x, torch.ones(len(data.x), 1).double()], 1)
    log_probabilities = torch.einsum("mci,ni->mnc", theta, x).log_softmax(2)
    return -log_probabilities.gather(2, data.y.expand(len(theta), -1)[..., None])[..., 0]


def pearson(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.reshape(-1), b.reshape(-1)]))[0, 1])


def test_influence_with_the_exact_hessian_is_leaving_one_out(logistic: tuple[Logistic, Digits, Digits]) -> None:
    """60 points × 100 queries, retrained to the last digit: .998; without the Hessian .58."""
    model, train, held_out = logistic
    chosen = torch.randperm(len(train.x), generator=torch.Generator().manual_seed(1))[:60].tolist()
    truth = losses(model.without(chosen), held_out) - losses(model.theta[None], held_out)  # [60, 100]

    net = model.module()
    product = HessianProduct(passes(net, classify, train.data, 500), range(len(train.x)))
    torch.testing.assert_close(product.gradient, -model.decay * nn.utils.parameters_to_vector(net.parameters()))
    queries, points = (
        ref.flatten_gradients(ref.per_example_gradients(net, F.cross_entropy, data.x, data.y))
        for data in (held_out, Digits(train.x[chosen], train.y[chosen]))
    )
    solved = cg(product, queries, model.decay, tolerance=1e-8)
    scores = points @ solved.require().T  # [60, 100]
    assert pearson(scores, truth) > 0.99
    assert pearson(points @ queries.T, truth) < 0.8
    # Removing a point changes a query's loss by about its score over the number of examples.
    slope = float((scores * truth).sum() / scores.square().sum()) * len(train.x)
    assert slope == pytest.approx(1, abs=0.1)


def kronecker_inverse(net: nn.Linear, data: Digits, damping: float) -> Callable[[Tensor], Tensor]:
    """EK-FAC of the one layer, made by the reference: `[q, p]`, weight first, then bias."""
    x = torch.cat([data.x, torch.ones(len(data.x), 1).double()], 1)
    probabilities = net(data.x).softmax(1).detach()
    gs = [(probabilities - F.one_hot(torch.tensor(c), 10)) * probabilities[:, c : c + 1].sqrt() for c in range(10)]
    b = torch.stack([g.T @ g for g in gs]).sum(0) / len(x)
    _, q_a = torch.linalg.eigh(x.T @ x / len(x))
    _, q_b = torch.linalg.eigh(b)
    squares = torch.stack([((g @ q_b).square().T @ (x @ q_a).square()) for g in gs]).sum(0) / len(x)

    def inverse(v: Tensor) -> Tensor:
        blocks = torch.cat([v[:, :-10].reshape(-1, 10, x.shape[1] - 1), v[:, -10:, None]], 2)
        solved = q_b @ ((q_b.T @ blocks @ q_a) / (squares + damping)) @ q_a.T
        return torch.cat([solved[:, :, :-1].flatten(1), solved[:, :, -1]], 1)

    return inverse


def test_all_solvers_agree_on_a_convex_problem(small: tuple[nn.Linear, Digits, ExampleGradients, Tensor]) -> None:
    net, train, gradients, g = small
    damping = 0.05
    product = GGNProduct(gradients, range(len(train.x)))
    matrix = product.to_dense()
    # Convex and linear in the parameters: the two curvatures are the same.
    torch.testing.assert_close(HessianProduct(gradients, range(len(train.x)))(g), g @ matrix, **EXACT)
    truth = torch.linalg.solve(matrix + damping * torch.eye(len(matrix)).double(), g.T).T
    kronecker = kronecker_inverse(net, train, damping)
    diagonal = 1 / (matrix.diagonal() + damping)
    found: dict[str, Solution] = {
        "cg": cg(product, g, damping, tolerance=1e-6),
        "diagonal": cg(product, g, damping, preconditioner=lambda v: v * diagonal, tolerance=1e-6),
        "ekfac": cg(product, g, damping, preconditioner=kronecker, tolerance=1e-6),
        "lissa": lissa(itertools.repeat(product), g, damping, matvec=product, tolerance=1e-5, steps=400),
    }
    for name, solution in found.items():
        off = (solution.require() - truth).norm(dim=1) / truth.norm(dim=1)
        assert off.max() < 1e-4, name
    assert (kronecker(g) - truth).norm() > 0.1 * truth.norm(), "the preconditioner alone is no solution"
    assert found["ekfac"].steps.max() < found["cg"].steps.min()

    noisy = lissa(product.random_batches(100), g, damping, matvec=product, steps=200, tolerance=0.3)
    assert ((noisy.require() - truth).norm(dim=1) / truth.norm(dim=1)).max() < 0.1

    too_long = 3 / (largest_eigenvalue(product, g).value + damping)
    diverged = lissa(product.random_batches(100), g, damping, matvec=product, steps=100, step_size=too_long)
    assert torch.isfinite(diverged.solution).all()
    assert diverged.reason.startswith("4 of 4 systems were not solved. [4] diverged: step_size")


def test_a_preconditioner_pays_where_damping_is_small(
    small: tuple[nn.Linear, Digits, ExampleGradients, Tensor],
) -> None:
    """Condition number beyond 1e4; the inverse of EK-FAC takes less than half the passes over the data."""
    net, train, gradients, g = small
    damping = 1e-4
    product = GGNProduct(gradients, range(len(train.x)))
    plain = cg(product, g, damping, tolerance=1e-4, max_steps=1000)
    helped = cg(product, g, damping, preconditioner=kronecker_inverse(net, train, damping), tolerance=1e-4)
    assert helped.converged.all()
    assert helped.steps.max() < plain.steps.min() / 2


def test_the_hessian_of_a_network_is_refused_until_the_damping_is_large_enough() -> None:
    """Half trained, it has an eigenvalue far below 0; the GGN of the same network has none."""
    p = problem()
    gradients = p.passes()
    hessian = HessianProduct(gradients, range(N))
    g = torch.randn(3, hessian.flat.size).double()
    eigenvalues = torch.linalg.eigvalsh(reference(HessianProduct, p))
    smallest = float(eigenvalues[0])
    assert smallest < -0.01
    assert smallest_eigenvalue(hessian, g).value == pytest.approx(smallest, rel=0.02)
    assert largest_eigenvalue(hessian, g).value == pytest.approx(float(eigenvalues[-1]), rel=0.02)
    with pytest.raises(IndefiniteError, match=rf"an eigenvalue of {smallest:.2g}"):
        require_positive_definite(hessian, g, -0.5 * smallest)
    for found in (
        cg(hessian, g, -0.5 * smallest),
        lissa(itertools.repeat(hessian), g, -0.5 * smallest, matvec=hessian, steps=3000),
    ):
        assert not found.converged.any()
        assert torch.isfinite(found.solution).all()
        assert found.reasons[0].startswith("indefinite: the curvature has an eigenvalue of -0.")
    damping = -1.5 * smallest
    require_positive_definite(hessian, g, damping)
    assert cg(hessian, g, damping).converged.all()
    ggn = GGNProduct(gradients, range(N))
    require_positive_definite(ggn, g, -0.1 * smallest)
    assert cg(ggn, g, -0.1 * smallest).converged.all()
