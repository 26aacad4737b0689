"""The derivative of a training's end by its examples' weights, against retraining with other weights in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from replay_cases import PlainRun, Steps, batches_of
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, RMSprop

from lightning_influence.core import memory
from lightning_influence.objective.task import run_tapped
from lightning_influence.replay.backward import Cost, check_record, example_derivatives
from lightning_influence.replay.differentiable_calls import statistics_of
from lightning_influence.replay.record import ReplayError
from lightning_influence.replay.step import Cotangents
from lightning_influence.replay.weighting import Weighting, weighting

N, NEVER = 40, 39
_draw = torch.Generator().manual_seed(1)
X = torch.randn(N, 6, dtype=torch.float64, generator=_draw)
IMAGES = torch.randn(N, 1, 8, 8, dtype=torch.float64, generator=_draw)
TOKENS = torch.randint(0, 11, (N, 5), generator=_draw)
Y = torch.randint(0, 3, (N,), generator=_draw)
ASKED = slice(0, 7)  # queries are training examples here: what is asked of them does not matter


def losses(module: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1], reduction="none")


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


def normed() -> nn.Module:
    # Without biases before a norm: their gradient is rounding, which Adam would divide by itself.
    return nn.Sequential(
        nn.Linear(6, 8, bias=False),
        nn.BatchNorm1d(8),
        nn.GELU(),
        nn.Dropout(0.2),
        nn.Linear(8, 8, bias=False),
        nn.BatchNorm1d(8, momentum=None),
        nn.Tanh(),
        nn.LayerNorm(8),
        nn.Linear(8, 3),
    )


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, bias=False),
        nn.BatchNorm2d(3),
        nn.GELU(),
        nn.AvgPool2d(2),
        nn.Conv2d(3, 4, 2, bias=False),
        nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
        nn.GELU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16, 3),
    )


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, activation="gelu", batch_first=True)
        self.out = nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.layer(self.embed(tokens)).mean(1))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase] = nn.LSTM) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 4)
        self.layer = kind(4, 5, 2, dropout=0.1, batch_first=True, bidirectional=True)
        self.out = nn.Linear(10, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.layer(self.embed(tokens))[0][:, -1])


class Looked(nn.Module):
    """Its gradients are sparse."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8, sparse=True)
        self.out = nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(torch.tanh(self.embed(tokens)).mean(1))


class Shared(nn.Module):
    """One layer twice, and one that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.again = self.first
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.out = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.frozen(self.again(torch.tanh(self.first(x))))))


def sgd(module: nn.Module) -> SGD:
    return SGD([p for p in module.parameters() if p.requires_grad], 0.05, momentum=0.9, nesterov=True)


def in_groups(module: Any) -> SGD:
    slow = {"params": module.first.parameters(), "lr": 0.02, "weight_decay": 0.1, "dampening": 0.2}
    return SGD([slow, {"params": [module.frozen.weight, *module.out.parameters()], "momentum": 0}], 0.1, momentum=0.9)


def run_of(make: Callable[[], nn.Module], optimizer: Any, inputs: Tensor = X, **settings: Any) -> PlainRun:
    batches = settings.pop("batches", None) or batches_of(24, 8, NEVER, settings.pop("accumulation", 1))
    return PlainRun(
        make, optimizer, losses, [inputs, Y], batches, lambda m: F.cross_entropy(m(inputs[ASKED]), Y[ASKED]), **settings
    )


def relative_error(run: PlainRun, found: Tensor, h: float = 1e-3, examples: Sequence[int] = (3, 11)) -> float:
    expected = run.differences(examples, h)
    return float((found[list(examples)] - expected).abs().max() / expected.abs().max())


SMOOTH = {
    "plain": (mlp, lambda m: SGD(m.parameters(), 0.1), X),
    "momentum and L2": (mlp, lambda m: SGD(m.parameters(), 0.1, momentum=0.9, weight_decay=0.01), X),
    "dampening": (mlp, lambda m: SGD(m.parameters(), 0.1, momentum=0.9, dampening=0.3), X),
    "maximize": (mlp, lambda m: SGD(m.parameters(), 0.01, momentum=0.9, maximize=True), X),
    "Nesterov, norms, dropout": (normed, sgd, X),
    "images": (cnn, lambda m: SGD(m.parameters(), 0.01, momentum=0.9, nesterov=True), IMAGES),
    "transformer": (Transformer, sgd, TOKENS),
    "LSTM": (Recurrent, sgd, TOKENS),
    "GRU": (lambda: Recurrent(nn.GRU), sgd, TOKENS),
    "sparse": (Looked, lambda m: SGD(m.parameters(), 0.1), TOKENS),
    "shared and frozen": (Shared, sgd, X),
    "groups": (Shared, in_groups, X),
}


@pytest.mark.parametrize("case", SMOOTH)
def test_gradient_descent_on_smooth_networks_as_retraining(case: str) -> None:
    make, optimizer, inputs = SMOOTH[case]
    run = run_of(make, optimizer, inputs)
    found = run.replayed()[0]
    assert relative_error(run, found, 3e-4) < 1e-7  # 1e-12 to 1e-9, which is that of the differences
    assert found[NEVER] == 0  # it is in no batch; others are in several, and twice in some


@pytest.mark.parametrize(
    ("optimizer", "settings"),
    [
        (Adam, {"weight_decay": 0.01}),
        (Adam, {"betas": (0.5, 0.9), "eps": 1e-3}),
        (AdamW, {"weight_decay": 0.1}),
        (AdamW, {"maximize": True}),
        (RMSprop, {"weight_decay": 0.01}),
        (RMSprop, {"centered": True, "momentum": 0.5, "eps": 1e-4}),
    ],
)
def test_adaptive_optimizers_as_retraining(optimizer: Any, settings: dict[str, Any]) -> None:
    run = run_of(normed, lambda m: optimizer(m.parameters(), 0.005, **settings))
    assert relative_error(run, run.replayed()[0], 1e-4) < 1e-6


@pytest.mark.parametrize(
    "settings",
    [
        {"clip": 0.3},
        {"clip": 0.05, "clip_by": "value"},
        {"schedule": lambda step: 0.9**step},
        {"accumulation": 3},
        {"accumulation": 2, "clip": 0.3, "schedule": lambda step: min(1.0, step / 8)},
    ],
)
def test_clipping_schedules_and_accumulation_as_retraining(settings: dict[str, Any]) -> None:
    run = run_of(normed, sgd, **settings)
    # Clipping by value has corners: no step of the differences may be over one.
    h = 1e-6 if settings.get("clip_by") == "value" else 3e-4
    assert relative_error(run, run.replayed()[0], h) < (1e-5 if h < 1e-4 else 1e-7)


def test_the_plain_product_of_gradients_is_something_else() -> None:
    run = run_of(mlp, lambda m: SGD(m.parameters(), 0.1))
    inputs: Steps = []
    module = run.train(inputs=inputs)
    query = torch.autograd.grad(run.query(module), list(module.parameters()))
    found = torch.zeros(N, dtype=torch.float64)
    for step in inputs:
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                parameter.copy_(step.state.parameters[name])
        for index in step.record.batches[0].indices:
            own = losses(module, [X[[index]], Y[[index]]]).sum() / 8
            parts = torch.autograd.grad(own, list(module.parameters()))
            found[index] -= 0.1 * sum(float((p * q).sum()) for p, q in zip(parts, query, strict=True))
    # It has the right order of size, and is 30 % off: what follows a step counts.
    assert relative_error(run, found) > 0.05
    assert relative_error(run, run.replayed()[0]) < 1e-7


def test_least_squares_by_full_batches_in_closed_form() -> None:
    x, y, rate, steps = X, X @ torch.arange(6.0, dtype=torch.float64) + torch.sin(5 * X[:, 0]), 0.1, 24
    run = PlainRun(
        lambda: nn.Linear(6, 1, bias=False),
        lambda m: SGD(m.parameters(), rate),
        lambda m, batch: (m(batch[0]).squeeze(1) - batch[1]).square(),
        [x, y],
        [[list(range(N))]] * steps,
        lambda m: m(torch.ones(1, 6, dtype=torch.float64)).sum(),
    )
    torch.manual_seed(0)
    theta = nn.Linear(6, 1, bias=False).double().weight.detach()[0]
    inverse = torch.linalg.inv(x.T @ x)
    contraction = torch.eye(6, dtype=torch.float64) - 2 * rate / N * x.T @ x
    end = inverse @ x.T @ y
    expected = torch.zeros(N, dtype=torch.float64)
    # θ_K = θ* + A^K (θ_0 - θ*); of a step, w_z moves θ by -2 rate/N x (xᵀθ - y), which the steps after it contract.
    for k in range(steps):
        at = end + torch.linalg.matrix_power(contraction, k) @ (theta - end)
        after = torch.linalg.matrix_power(contraction, steps - 1 - k) @ torch.ones(6, dtype=torch.float64)
        expected += -2 * rate / N * (x @ at - y) * (x @ after)
    torch.testing.assert_close(run.replayed()[0], expected, rtol=1e-10, atol=1e-12)


# ------------------------------------------------------------------------------------------------------- the statistics


def test_running_statistics_count() -> None:
    run = run_of(normed, sgd)
    inputs: Steps = []
    module = run.train(inputs=inputs)
    derivative, segment, record = run.backward_of(module, inputs)
    end = run.end(module, derivative)
    whole = run.replayed()[0]
    without = replace_statistics(end)
    module.train()
    _, partial = example_derivatives(derivative, record, segment, without)
    # What goes through the statistics alone is 20 % and more.
    assert float((partial[0] - whole).norm() / whole.norm()) > 0.1


def replace_statistics(end: Cotangents) -> Cotangents:
    return Cotangents(end.parameters, {}, {name: torch.zeros_like(part) for name, part in end.statistics.items()})


def test_a_batch_norm_that_is_frozen_on_the_way() -> None:
    class Frozen(nn.Module):
        count: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.layers = normed()
            self.register_buffer("count", torch.tensor(0))

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                self.count += 1
                frozen = bool(self.count > 12)
                self.layers[1].training = not frozen
            return self.layers(x)

    run = run_of(Frozen, sgd)
    assert relative_error(run, run.replayed()[0], 3e-4) < 1e-7


def test_batch_norm_of_several_processes_is_refused() -> None:
    with pytest.raises(ReplayError, match=r"1 is a SyncBatchNorm.*sync_batchnorm=False"):
        statistics_of(nn.Sequential(nn.Linear(2, 2), nn.SyncBatchNorm(2)))


# --------------------------------------------------------------------------------------------------------- many queries


@pytest.mark.parametrize("make", [normed, cnn, Transformer, Recurrent])
def test_many_queries_as_one_by_one(make: Any) -> None:
    inputs = {normed: X, cnn: IMAGES}.get(make, TOKENS)
    run = run_of(make, sgd, inputs, batches=batches_of(5, 8, NEVER))
    steps: Steps = []
    module = run.train(inputs=steps)
    derivative, segment, record = run.backward_of(module, steps)
    generator = torch.Generator().manual_seed(0)
    p = sum(derivative.sizes)
    ends = [torch.randn(p, dtype=torch.float64, generator=generator) for _ in range(3)]
    statistics = {
        name: torch.stack([torch.full_like(b, k + 1.0) for k in range(3)]) for name, b in derivative.statistics.items()
    }
    module.train()
    _, together = example_derivatives(derivative, record, segment, Cotangents(torch.stack(ends), {}, statistics))
    for k, end in enumerate(ends):
        alone = Cotangents(end[None], {}, {name: part[k : k + 1] for name, part in statistics.items()})
        _, found = example_derivatives(derivative, record, segment, alone)
        torch.testing.assert_close(together[k], found[0], rtol=1e-9, atol=1e-12)


# ------------------------------------------------------------------------------------------------------ kinds of losses

_CLASS_WEIGHTS = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)


def _weighted(module: nn.Module, batch: Any) -> Tensor:
    each = F.cross_entropy(module(batch[0]), batch[1], _CLASS_WEIGHTS, reduction="none")
    return each * len(each) / _CLASS_WEIGHTS[batch[1]].sum()


def _by_hand(module: nn.Module, batch: Any) -> Tensor:
    z = module(batch[0])
    return z.logsumexp(1) - z[range(len(z)), batch[1]]


def _focal(module: nn.Module, batch: Any) -> Tensor:
    p = module(batch[0]).softmax(1)[range(len(batch[1])), batch[1]]
    return -((1 - p) ** 2) * p.log()


def _penalty(module: nn.Module) -> Tensor:
    return 0.05 * sum((p.square().sum() for p in module.parameters()), torch.tensor(0.0, dtype=torch.float64))


def _one_hot(target: Tensor) -> Tensor:
    return F.one_hot(target, 3).double()


Task = Callable[[nn.Module, Any], Tensor]
# The task, and its examples' own losses written out.
TASKS: dict[str, tuple[Task, Task]] = {
    "mean": (lambda m, b: F.cross_entropy(m(b[0]), b[1]), losses),
    "class weights": (lambda m, b: F.cross_entropy(m(b[0]), b[1], _CLASS_WEIGHTS), _weighted),
    "sum": (
        lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction="sum") / 20,
        lambda m, b: losses(m, b) * len(b[1]) / 20,
    ),
    "ignored": (
        lambda m, b: F.cross_entropy(m(b[0]), b[1], ignore_index=0),
        lambda m, b: losses(m, b) * (b[1] != 0) * len(b[1]) / (b[1] != 0).sum(),
    ),
    "single, masked": (
        lambda m, b: (losses(m, b) * (b[1] != 0)).sum() / (b[1] != 0).sum(),
        lambda m, b: losses(m, b) * (b[1] != 0) * len(b[1]) / (b[1] != 0).sum(),
    ),
    "several outputs": (
        lambda m, b: F.mse_loss(m(b[0]), _one_hot(b[1])),
        lambda m, b: (m(b[0]) - _one_hot(b[1])).square().mean(1),
    ),
    "divergence": (
        lambda m, b: F.kl_div(F.log_softmax(m(b[0]), 1), _one_hot(b[1]) * 0.8 + 0.2 / 3, reduction="batchmean"),
        lambda m, b: F.kl_div(F.log_softmax(m(b[0]), 1), _one_hot(b[1]) * 0.8 + 0.2 / 3, reduction="none").sum(1),
    ),
    "two terms": (
        lambda m, b: F.cross_entropy(m(b[0]), b[1]) + 0.3 * F.mse_loss(m(b[0]), _one_hot(b[1])),
        lambda m, b: losses(m, b) + 0.3 * (m(b[0]) - _one_hot(b[1])).square().mean(1),
    ),
    "a weight that is learnt": (
        lambda m, b: F.cross_entropy(m(b[0]), b[1]) * m[0].bias.exp().sum(),
        lambda m, b: losses(m, b) * m[0].bias.exp().sum(),
    ),
    "one per example": (losses, losses),
    "by hand": (lambda m, b: _by_hand(m, b).mean(), _by_hand),
    "focal": (lambda m, b: _focal(m, b).mean(), _focal),
}


def found_out(run: PlainRun, task: Task) -> Weighting:
    """Return how a task is weighted, as told by two batches of a run."""
    torch.manual_seed(0)
    module = run.make().double().train()
    chosen = [run.batches[0][0], run.batches[1][0]]

    def evaluate(number: int, tap: Any) -> Any:
        return run_tapped(task, module, [part[chosen[number]] for part in run.data], tap)

    return weighting(evaluate, [len(indices) for indices in chosen], {})


@pytest.mark.parametrize("case", TASKS)
def test_a_task_is_weighted_as_its_examples_are(case: str) -> None:
    task, own = TASKS[case]
    run = replace(run_of(mlp, sgd), losses=own)
    assert relative_error(run, run.replayed(task, found_out(run, task))[0], 3e-4) < 1e-7


def test_a_penalty_on_weights_belongs_to_no_example() -> None:
    def task(module: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(module(batch[0]), batch[1]) + _penalty(module)

    run = replace(run_of(mlp, sgd), penalty=_penalty)
    assert relative_error(run, run.replayed(task, found_out(run, task))[0], 3e-4) < 1e-7


@pytest.mark.parametrize(
    ("task", "match"),
    [
        (lambda m, b: m(b[0]).square().mean(), "no known loss call"),
        (lambda m, b: F.cross_entropy(m(b[0]), b[1]) + m(b[0]).square().mean(), "belongs to no example"),
        (lambda m, b: F.mse_loss(m(b[0]).mean(0), torch.ones(3, dtype=torch.float64)), "can't be shared out"),
        (lambda m, b: F.mse_loss(m(b[0]), _one_hot(b[1])).sqrt(), "belongs to no example"),
    ],
)
def test_losses_without_the_examples_own_are_refused(task: Task, match: str) -> None:
    with pytest.raises(ReplayError, match=rf"{match}.*returns one loss per example"):
        found_out(run_of(mlp, sgd), task)


def test_a_task_that_returns_the_examples_own_losses_only_at_times_is_refused() -> None:
    found = Weighting({}, single=True)
    with pytest.raises(ReplayError, match=r"a loss of the shape \[\] for 2 examples"):
        found.loss(lambda m, b: m(b[0]).mean(), mlp().double(), [X[:2]], torch.ones(2, requires_grad=True))


def test_a_part_of_the_loss_that_shows_up_later_is_noticed() -> None:
    def own(module: nn.Module, batch: Any) -> Tensor:
        return losses(module, batch) + module(batch[0]).square().mean()

    run = replace(run_of(mlp, sgd), losses=own)
    with pytest.raises(ReplayError, match=r"at step 23 the losses of the examples are not the whole loss"):
        run.replayed(lambda m, b: own(m, b).mean(), Weighting({}))


# ------------------------------------------------------------------------------------------------------------ refusals


def test_a_loss_that_is_not_finite_is_named_before_anything_runs() -> None:
    run = run_of(mlp, sgd)
    inputs: Steps = []
    module = run.train(inputs=inputs)
    odd = inputs[7].record.batches[0]
    steps = [step.record for step in inputs]
    steps[7] = replace(steps[7], batches=[replace(odd, loss=float("nan"))])
    _, _, record = run.backward_of(module, inputs)
    with pytest.raises(ReplayError, match=r"the loss of step 7 was not finite \(nan\)"):
        check_record(replace(record, steps=steps))


def test_weights_of_three_digits_are_refused() -> None:
    run = run_of(mlp, sgd)
    inputs: Steps = []
    _, _, record = run.backward_of(run.train(inputs=inputs), inputs)
    with pytest.raises(ReplayError, match=r"in precision 'bf16-true', whose weights have too few digits"):
        check_record(replace(record, recipe=replace(record.recipe, precision="bf16-true")))


@pytest.mark.parametrize(
    ("optimizer", "match"),
    [
        (lambda m: torch.optim.Adagrad(m.parameters()), r"trained by Adagrad.*SGD, Adam, AdamW, RMSprop"),
        (lambda m: Adam(m.parameters(), amsgrad=True), r"amsgrad=True.*amsgrad=False"),
    ],
)
def test_other_optimizers_are_refused(optimizer: Any, match: str) -> None:
    with pytest.raises(ReplayError, match=match):
        run_of(mlp, optimizer).replayed()


def test_a_step_that_something_else_has_changed_is_noticed() -> None:
    class Halved(SGD):
        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.grad.mul_(0.5)
            return super().step(closure)

    run = run_of(mlp, lambda m: Halved(m.parameters(), 0.1))
    with pytest.raises(ReplayError, match=r"step 23 ended elsewhere"):
        run.replayed(optimizer="SGD")


def test_what_torch_differentiates_only_once_is_named() -> None:
    def task(module: nn.Module, batch: Any) -> Tensor:
        z = F.log_softmax(module(batch[0]), 1).unsqueeze(0).expand(4, -1, -1)
        lengths = torch.full((len(batch[1]),), 4), torch.ones(len(batch[1]), dtype=torch.long)
        return F.ctc_loss(z, batch[1].clamp(min=1).unsqueeze(1), *lengths, reduction="none")

    run = replace(run_of(mlp, sgd), losses=task)
    with pytest.raises(ReplayError, match=r"can't differentiate twice.*ctc_loss_backward"):
        run.replayed()


def test_what_takes_too_long_is_refused_after_three_steps() -> None:
    run, told, taken = run_of(mlp, sgd), list[Cost](), list[int]()
    with pytest.raises(ReplayError, match=r"would take .* seconds \(24 steps, .* more than max_cost=1e-06"):
        run.replayed(max_cost=1e-6, told=told.append, advance=taken.append)
    assert len(taken) == 3
    assert told[0].seconds == 24 * (told[0].step + told[0].rerun)


def test_what_does_not_fit_into_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    run, taken = run_of(mlp, sgd), list[int]()
    monkeypatch.setattr(memory, "available_bytes", lambda device: 20_000)
    with pytest.raises(ReplayError, match=r"1 queries take .* of memory, .* and 20 kB are available"):
        run.replayed(advance=taken.append)
    assert not taken


def test_nothing_is_divided_by_a_gradient_that_has_not_been_yet() -> None:
    """An embedding whose row no batch has looked up: v = 0, where the square root has no derivative."""
    run = run_of(Recurrent, lambda m: Adam(m.parameters(), 0.01), TOKENS % 9)
    found = run.replayed()[0]
    assert bool(found.isfinite().all())
    assert relative_error(run, found, 1e-4) < 1e-6
