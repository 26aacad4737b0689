"""TracIn: the steps that the optimizer really takes, and self-influence against the dense reference."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from typing import Any

import pytest
import reference as ref
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from tracing import covered

from lightning_influence.data.source import ExampleSource
from lightning_influence.gradients.discover import discover
from lightning_influence.gradients.passes import ExampleGradients
from lightning_influence.layers import per_sample
from lightning_influence.scores.examples import score_examples
from lightning_influence.training import optimizers
from lightning_influence.training.step_sizes import StepSizes, block_step_sizes, self_influence
from lightning_influence.training.tracin import TracInScores

EXACT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-12}


def _conv_net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, groups=2), nn.Tanh(), nn.Conv2d(4, 3, 2, bias=False), nn.Flatten(), nn.Linear(27, 4)
    ).double()


class Words(nn.Module):
    """A look-up that is the head, too, and norms: blocks of every kind, with rows of either kind in one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.place = nn.Embedding(4, 6), nn.Parameter(0.1 * torch.randn(3, 6))
        self.norm, self.inner = nn.LayerNorm(6), nn.Linear(6, 6)
        self.head = nn.Linear(6, 4)
        self.head.weight = self.words.weight
        self.double()

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.norm(self.words(ids) + self.place)
        result: Tensor = self.head(torch.tanh(self.inner(hidden))).mean(1)
        return result


def _words(n: int = 12) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 4, (n, 3), generator=generator)
    return TensorDataset(ids, torch.randint(0, 4, (n,), generator=generator))


def _data(n: int = 12) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 2, 6, 6, generator=generator, dtype=torch.float64)
    return TensorDataset(x, torch.randint(0, 4, (n,), generator=generator))


def _gradients(net: nn.Module, data: TensorDataset, batch_size: int = 5) -> ExampleGradients:
    def task(module: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(module(batch[0]), batch[1])

    source = ExampleSource(data, batch_size=batch_size)
    return ExampleGradients(net, task, source, discover(net, task, source))


# ----------------------------------------------------------------------------------------------------- step sizes


def test_learning_rates_are_kept_by_parameter_group() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    optimizer = torch.optim.SGD(
        [
            {"params": net[0].parameters(), "lr": 0.5},
            {"params": [net[1].weight], "lr": 0.25, "momentum": 0.75},
            {"params": [net[1].bias], "lr": torch.tensor(0.125)},
        ],
        lr=1.0,
    )
    sizes = StepSizes(net)
    sizes.record(optimizer)
    assert sizes.steps == 1
    assert sizes.sums == {"0.weight": 0.5, "0.bias": 0.5, "1.weight": 1.0, "1.bias": 0.125}


def test_the_learning_rates_of_a_schedule_add_up_until_they_are_taken() -> None:
    net = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    sizes = StepSizes(net)
    for _ in range(3):
        sizes.record(optimizer)
        optimizer.step()
        schedule.step()
    assert sizes.steps == 3
    assert sizes.take() == {"weight": 1.75, "bias": 1.75}
    assert (sizes.sums, sizes.steps, sizes.take()) == ({}, 0, {})
    sizes.record(optimizer)
    assert sizes.take() == {"weight": 0.125, "bias": 0.125}


def test_several_optimizers_and_frozen_or_foreign_parameters() -> None:
    net, other = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)), nn.Linear(1, 1)
    net[0].bias.requires_grad_(False)
    sizes = StepSizes(net)
    sizes.record(torch.optim.SGD(net[0].parameters(), lr=0.5))
    sizes.record(torch.optim.Adam([*net[1].parameters(), *other.parameters()], lr=0.25))
    assert sizes.sums == {"0.weight": 0.5, "1.weight": 0.25, "1.bias": 0.25}
    assert sizes.steps == 2


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.9},
        {"momentum": 0.5, "nesterov": True},
        {"momentum": 0.9, "dampening": 0.9},
        {"momentum": 0.8, "dampening": 0.3},
    ],
    ids=str,
)
def test_a_step_size_is_how_far_a_constant_gradient_moves_the_weights(options: dict[str, Any]) -> None:
    """Measured on torch's own SGD, once momentum has built up."""
    net = nn.Linear(1, 1, bias=False).double()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, **options)
    sizes = StepSizes(net)
    positions = []
    for _ in range(300):
        net.weight.grad = torch.full_like(net.weight, 2.0)
        sizes.record(optimizer)
        optimizer.step()
        positions.append(float(net.weight.detach()))
    moved = (positions[-2] - positions[-1]) / 2.0
    assert sizes.sums["weight"] / sizes.steps == pytest.approx(moved, rel=1e-6)


def test_step_sizes_of_layers() -> None:
    net = _conv_net()
    net[4].bias.requires_grad_(False)
    blocks = covered(net, torch.randn(4, 2, 6, 6).double()).blocks
    sums = {"0.weight": 1.0, "0.bias": 2.0, "2.weight": 3.0, "4.weight": 4.0}
    sizes = dict(block_step_sizes(blocks, sums, net))
    two = sizes.pop("0")
    assert isinstance(two, Tensor)
    assert (two[..., :-1].unique().tolist(), two[..., -1].unique().tolist()) == ([1.0], [2.0])
    assert sizes == {"2": 3.0, "4": 4.0}
    assert block_step_sizes(blocks, {}, net) == {"0": 0.0, "2": 0.0, "4": 0.0}


def test_step_sizes_of_tied_and_of_bare_parameters() -> None:
    """A parameter is found by what it is: under its second name (of the head), too."""
    net = Words()
    net.inner.weight.requires_grad_(False)
    blocks = _gradients(net, _words()).coverage.blocks
    sums = {
        "words.weight": 1.0,
        "place": 2.0,
        "norm.weight": 3.0,
        "norm.bias": 4.0,
        "inner.bias": 5.0,
        "head.bias": 6.0,
    }
    sizes = dict(block_step_sizes(blocks, sums, net))
    expected = {"words": [1.0, 6.0], "place": 2.0, "norm": [3.0, 4.0], "inner.bias": 5.0}
    assert {k: v.unique().tolist() if isinstance(v, Tensor) else v for k, v in sizes.items()} == expected


# ----------------------------------------------------------------------------------------------- self-influence


RATES: dict[str, Callable[[str], float]] = {
    "one rate": lambda name: 0.3,
    "rates of weights and biases": lambda name: 0.7 if name.endswith("bias") else 0.3,
    "no rate for biases": lambda name: 0.0 if name.endswith("bias") else 0.3,
    "no rate for weights": lambda name: 0.7 if name.endswith("bias") else 0.0,
    "rates of layers": lambda name: 0.1 * (1 + ord(name[0]) % 8),
    "all different": lambda name: 0.1 * (1 + ord(name[0]) % 8) + (0.0 if name.endswith("bias") else 0.01),
}
FROZEN: dict[str, Callable[[str], bool]] = {
    "nothing": lambda name: False,
    "biases": lambda name: name.endswith("bias"),
    "some weights": lambda name: name in ("0.weight", "4.weight", "norm.weight", "inner.weight"),
    "the first layer": lambda name: name.startswith(("0", "words")),
}
NETS: dict[str, tuple[Callable[[], nn.Module], Callable[[], TensorDataset]]] = {
    "convolutions": (_conv_net, _data),
    "words": (Words, _words),
}


@pytest.mark.parametrize("frozen", FROZEN)
@pytest.mark.parametrize("rates", RATES)
@pytest.mark.parametrize("kind", NETS)
def test_self_influence_is_that_of_the_reference(kind: str, rates: str, frozen: str) -> None:
    make, examples = NETS[kind]
    net, data = make(), examples()
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(not FROZEN[frozen](name))
    gradients = _gradients(net, data)
    assert gradients.coverage.share == 1.0
    etas = {name: RATES[rates](name) for name, p in net.named_parameters() if p.requires_grad}
    sizes = block_step_sizes(gradients.coverage.blocks, etas, net)
    own = ref.per_example_gradients(net, F.cross_entropy, *data.tensors)
    expected = ref.tracin_self([own], [etas])
    scores = score_examples(gradients, range(len(data)), step_sizes=sizes)
    torch.testing.assert_close(scores.columns["tracin"], expected, **EXACT)
    # By block, too: one wrong block may hide in the sum of all.
    with closing(gradients.run(range(len(data)))) as batches:
        for batch in batches:
            for io in batch.layers():
                block = gradients.coverage.blocks[io.name]
                part = self_influence(io, per_sample.squared_norms(io.x, io.gs[0]), sizes[io.name])
                of_block = {name: own[name][batch.indices] for name in block.parameters}
                torch.testing.assert_close(part, ref.tracin_self([of_block], [etas]), **EXACT)


def test_a_sum_over_checkpoints() -> None:
    """Two checkpoints of a training run, with the step sizes of the steps that each stands for."""
    net, data = _conv_net(), _data()
    parameters = list(net.parameters())
    groups: list[dict[str, Any]] = [{"params": parameters[:2]}, {"params": parameters[2:], "lr": 0.2, "momentum": 0.5}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    gradients, sizes, running = _gradients(net, data), StepSizes(net), TracInScores(len(data))
    checkpoints, etas = [], []
    for step in range(1, 5):
        optimizer.zero_grad()
        F.cross_entropy(net(data.tensors[0]), data.tensors[1]).backward()
        sizes.record(optimizer)
        optimizer.step()
        if step % 2 == 0:
            taken = sizes.take()
            layers = block_step_sizes(gradients.coverage.blocks, taken, net)
            scores = score_examples(gradients, range(len(data)), step_sizes=layers)
            assert running.add(step, scores.indices.tolist(), scores.columns["tracin"])
            checkpoints.append(ref.per_example_gradients(net, F.cross_entropy, *data.tensors))
            etas.append({name: 0.2 if name.startswith("0") else 0.8 for name in taken})
    torch.testing.assert_close(running.values, ref.tracin_self(checkpoints, etas), **EXACT)
    assert running.checkpoints == [2, 4]


@pytest.mark.parametrize("index", [0, 7])
def test_one_step_on_an_example_lowers_its_loss_by_its_tracin(index: int) -> None:
    """First order in the learning rate: halving it halves the share that is left over."""
    data = _data()
    x, y = data.tensors[0][index : index + 1], data.tensors[1][index : index + 1]
    left_over = []
    for rate in (2e-4, 1e-4):
        net = _conv_net()
        parameters = list(net.parameters())
        groups: list[dict[str, Any]] = [{"params": parameters[:2]}, {"params": parameters[2:], "lr": 3 * rate}]
        optimizer = torch.optim.SGD(groups, lr=rate)
        gradients, sizes = _gradients(net, data), StepSizes(net)
        before = F.cross_entropy(net(x), y)
        before.backward()
        sizes.record(optimizer)
        layers = block_step_sizes(gradients.coverage.blocks, sizes.take(), net)
        predicted = float(score_examples(gradients, [index], step_sizes=layers).columns["tracin"])
        optimizer.step()
        lowered = float(before.detach() - F.cross_entropy(net(x), y).detach())
        assert predicted > 0
        assert lowered == pytest.approx(predicted, rel=0.02)
        left_over.append(abs(lowered - predicted) / predicted)
    assert left_over[1] == pytest.approx(left_over[0] / 2, rel=0.1)


# --------------------------------------------------------------------------------------------------- running sums


def test_a_step_that_was_added_is_not_added_again() -> None:
    running = TracInScores(4)
    assert running.add(10, [2, 0], torch.tensor([1.0, 2.0]))
    assert not running.add(10, [2, 0], torch.tensor([100.0, 100.0])), "a resumed run passes here again"
    assert running.add(20, iter([3, 2]), torch.tensor([5.0, 0.5], dtype=torch.bfloat16))
    assert running.values.tolist() == [2.0, 0.0, 1.5, 5.0]
    assert running.values.dtype == torch.float64
    assert running.checkpoints == [10, 20]


def test_a_gradient_that_is_not_finite_stays_visible() -> None:
    running = TracInScores(3)
    running.add(1, [0, 1, 2], torch.tensor([1.0, torch.nan, 1.0]))
    running.add(2, [0, 1, 2], torch.ones(3))
    assert running.values.isnan().tolist() == [False, True, False]
    assert running.values[[0, 2]].tolist() == [2.0, 2.0]


class TestScalesOfSteps:
    def test_an_entry_that_no_step_has_moved_has_none(self) -> None:
        """Its 1/ε would make the first example with a rare word outweigh all others by eight orders."""
        net = torch.nn.Embedding(4, 2)
        optimizer = torch.optim.Adam(net.parameters())
        net(torch.tensor([0])).sum().backward()
        optimizer.step()
        scale = optimizers.preconditioner(optimizer, optimizer.param_groups[0], net.weight)
        assert scale is not None
        assert (scale[0] > 0.5).all()
        assert (scale[1:] == 0).all()

    def test_a_state_is_not_yet_a_step(self) -> None:
        net = torch.nn.Linear(2, 1)
        adagrad = torch.optim.Adagrad(net.parameters(), lr_decay=0.1)  # has its state from the start
        assert optimizers.preconditioner(adagrad, adagrad.param_groups[0], net.weight) is None
        adam = torch.optim.Adam(net.parameters())
        adam.state[net.weight] = {  # as after a step that a gradient scaler has skipped
            "step": torch.tensor(0.0), "exp_avg": torch.zeros(1, 2), "exp_avg_sq": torch.zeros(1, 2)
        }  # fmt: skip
        assert optimizers.preconditioner(adam, adam.param_groups[0], net.weight) is None

    def test_an_optimizer_made_of_sgd_takes_steps_of_its_own(self) -> None:
        class LARS(torch.optim.SGD):
            def step(self, closure: Any = None) -> Any:
                return super().step(closure)

        net = torch.nn.Linear(2, 1)
        sizes = StepSizes(net)
        sizes.record(LARS(net.parameters(), lr=0.1))
        assert sizes.unknown == {"LARS"}
        assert list(sizes.history().adaptive) == ["LARS"]
