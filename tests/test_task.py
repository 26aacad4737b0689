"""The user's own `training_step` as the definition of every example's loss."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from loss_cases import evaluate
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from which_lightning import Callback, LightningModule, Trainer

from lightning_influence.objective.losses import CrossEntropy
from lightning_influence.objective.losses.binary import BinaryCrossEntropy
from lightning_influence.objective.losses.poisson import PoissonLikelihood
from lightning_influence.objective.losses.regression import AbsoluteError, HuberError, SmoothAbsoluteError, SquaredError
from lightning_influence.objective.scale import LossScale, ScaleTally
from lightning_influence.objective.tap import LossTap
from lightning_influence.objective.task import TaskError, TrainingStepTask
from lightning_influence.objective.terms import BatchLoss

N, C = 8, 3
EXACT = {"rtol": 1e-12, "atol": 1e-12}
WEIGHT = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)


def _batch(n: int = N) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, C, (n,), generator=generator)


def _net() -> nn.Module:
    return nn.Linear(4, C).double()


def _task(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Any, Any], Tensor]:
    """A task from a loss of logits and labels."""
    return lambda module, batch: loss(module(batch[0]), batch[1])


def _onehot(y: Tensor) -> Tensor:
    return torch.eye(C, dtype=torch.float64)[y]


def _nll(z: Tensor, y: Tensor) -> Tensor:
    return z.logsumexp(1) - z.gather(1, y.unsqueeze(1)).squeeze(1)


# ----------------------------------------------------------------------------------------------------- the tap


class Nested(nn.Module):
    """A loss module inside a module inside a module."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.criterion = nn.ModuleDict({"main": nn.Sequential()})
        self.criterion["main"].loss = loss

    def forward(self, z: Tensor, target: Tensor) -> Tensor:
        return self.criterion["main"].loss(z, target)


@pytest.mark.parametrize(
    ("function", "module", "kind", "hard"),
    [
        pytest.param(F.cross_entropy, nn.CrossEntropyLoss, CrossEntropy, True, id="cross-entropy"),
        pytest.param(F.nll_loss, nn.NLLLoss, CrossEntropy, True, id="nll"),
        pytest.param(F.binary_cross_entropy_with_logits, nn.BCEWithLogitsLoss, BinaryCrossEntropy, False, id="binary"),
        pytest.param(F.mse_loss, nn.MSELoss, SquaredError, False, id="squared"),
        pytest.param(F.l1_loss, nn.L1Loss, AbsoluteError, False, id="absolute"),
        pytest.param(F.huber_loss, nn.HuberLoss, HuberError, False, id="huber"),
        pytest.param(F.smooth_l1_loss, nn.SmoothL1Loss, SmoothAbsoluteError, False, id="smooth"),
        pytest.param(F.poisson_nll_loss, nn.PoissonNLLLoss, PoissonLikelihood, False, id="counts"),
    ],
)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_functions_and_modules_are_seen(
    function: Callable[..., Tensor], module: type[nn.Module], kind: type, hard: bool, reduction: str
) -> None:
    z = torch.randn(N, C, requires_grad=True)
    target = _batch()[1] if hard else torch.rand(N, C)
    for form in (
        lambda: function(z, target, reduction=reduction),
        lambda: module(reduction=reduction)(z, target),
        lambda: Nested(module(reduction=reduction))(z, target),
    ):
        expected = form()
        with LossTap() as tap:
            output = form()
        assert torch.equal(output, expected)
        assert len(tap.calls) == 1, "exactly one, also where one loss calls another inside torch"
        (call,) = tap.calls
        assert type(call) is kind
        assert call.input is z
        assert call.target is target
        assert call.reduction == reduction
        assert torch.equal(call.output, expected)


def test_the_settings_of_a_module_are_seen() -> None:
    z, y = torch.randn(N, C, requires_grad=True), _batch()[1]
    with LossTap() as tap:
        nn.CrossEntropyLoss(weight=WEIGHT.float(), ignore_index=1, label_smoothing=0.1)(z, y)
        nn.BCEWithLogitsLoss(weight=torch.ones(C), pos_weight=WEIGHT.float())(z, torch.ones(N, C))
    cross, binary = tap.calls
    assert isinstance(cross, CrossEntropy)
    assert isinstance(binary, BinaryCrossEntropy)
    assert torch.equal(cross.class_weights, WEIGHT.float())
    assert (cross.ignore_index, cross.label_smoothing) == (1, 0.1)
    assert torch.equal(binary.pos_weight, WEIGHT.float())
    assert torch.equal(binary.element_weights, torch.ones(C))


def test_calls_without_a_gradient_are_not_kept() -> None:
    z, y = torch.randn(N, C, requires_grad=True), _batch()[1]
    with LossTap() as tap:
        F.cross_entropy(z.detach(), y)
        with torch.no_grad():
            F.cross_entropy(z, y)
        F.soft_margin_loss(z, torch.ones_like(z))
        # The gradient goes through the soft labels alone: the curvature of the logits is not asked for.
        F.cross_entropy(z.detach(), z.softmax(1))
    assert tap.calls == []


def test_the_tap_is_gone_after_an_error_in_the_task() -> None:
    def task(module: Any, batch: Any) -> Tensor:
        raise ZeroDivisionError("of the user")

    with pytest.raises(ZeroDivisionError, match="of the user"):
        evaluate(task, _net(), _batch(), N)
    assert torch._C._len_torch_function_stack() == 0


# ----------------------------------------------------------------------------------- each example's own loss


LOSSES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    # name: the loss of the batch, every example's own loss [n]
    "mean": (lambda z, y: F.cross_entropy(z, y), _nll),
    "module": (lambda z, y: nn.CrossEntropyLoss()(z, y), _nll),
    "nll": (lambda z, y: F.nll_loss(z.log_softmax(1), y), _nll),
    "sum": (lambda z, y: F.cross_entropy(z, y, reduction="sum"), lambda z, y: N * _nll(z, y)),
    "sum over n": (lambda z, y: F.cross_entropy(z, y, reduction="sum") / len(y), _nll),
    "none, mean": (lambda z, y: F.cross_entropy(z, y, reduction="none").mean(), _nll),
    "none, own weights": (
        lambda z, y: (F.cross_entropy(z, y, reduction="none") * torch.arange(N)).mean(),
        lambda z, y: torch.arange(N) * _nll(z, y),
    ),
    "class weights": (
        lambda z, y: F.cross_entropy(z, y, WEIGHT),
        lambda z, y: WEIGHT[y] * _nll(z, y) * N / WEIGHT[y].sum(),
    ),
    "ignored": (
        lambda z, y: F.cross_entropy(z, y, ignore_index=1),
        lambda z, y: (y != 1) * _nll(z, y) * N / (y != 1).sum(),
    ),
    "smoothing": (
        lambda z, y: F.cross_entropy(z, y, label_smoothing=0.3),
        lambda z, y: 0.7 * _nll(z, y) - 0.1 * z.log_softmax(1).sum(1),
    ),
    "scaled": (lambda z, y: 0.3 * F.cross_entropy(z, y), lambda z, y: 0.3 * _nll(z, y)),
    "negated twice": (lambda z, y: F.cross_entropy(z, y).neg().neg(), _nll),
    "binary": (
        lambda z, y: F.binary_cross_entropy_with_logits(z[:, 0], (y > 0).double()),
        lambda z, y: F.softplus(z[:, 0]) - z[:, 0] * (y > 0),
    ),
    "multilabel": (
        lambda z, y: F.binary_cross_entropy_with_logits(z, _onehot(y)),
        lambda z, y: (F.softplus(z) - z * _onehot(y)).mean(1),
    ),
    "squared": (lambda z, y: F.mse_loss(z, _onehot(y)), lambda z, y: (z - _onehot(y)).square().mean(1)),
    "squared, sum": (
        lambda z, y: F.mse_loss(z, _onehot(y), reduction="sum"),
        lambda z, y: N * (z - _onehot(y)).square().sum(1),
    ),
    "squared, weights": (
        lambda z, y: F.mse_loss(z, _onehot(y), weight=1 + _onehot(y)),
        lambda z, y: N * ((1 + _onehot(y)) * (z - _onehot(y)).square()).sum(1) / (N * (C + 1)),
    ),
    "probabilities": (
        lambda z, y: F.binary_cross_entropy(z[:, 0].sigmoid(), (y > 0).double()),
        lambda z, y: F.softplus(z[:, 0]) - z[:, 0] * (y > 0),
    ),
    "counts": (
        lambda z, y: F.poisson_nll_loss(z, _onehot(y), reduction="sum"),
        lambda z, y: N * (z.exp() - z * _onehot(y)).sum(1),
    ),
    "divergence": (
        lambda z, y: F.kl_div(z.log_softmax(1), 0.8 * _onehot(y) + 0.2 / C, reduction="batchmean"),
        lambda z, y: F.kl_div(z.log_softmax(1), 0.8 * _onehot(y) + 0.2 / C, reduction="none").sum(1),
    ),
    "squared, target first": (lambda z, y: F.mse_loss(_onehot(y), z), lambda z, y: (z - _onehot(y)).square().mean(1)),
    "two heads, one on some examples": (
        lambda z, y: F.cross_entropy(z, y) + 0.3 * F.mse_loss(z[y > 0, 0], z.new_ones(int((y > 0).sum()))),
        lambda z, y: _nll(z, y) + 0.3 * ((y > 0) * (z[:, 0] - 1).square()) * N / (y > 0).sum(),
    ),
    "three terms and a logged one": (
        lambda z, y: (
            F.cross_entropy(z, y)
            + 0.3 * F.cross_entropy(2 * z, y, reduction="sum") / N
            + 0.1 * (F.mse_loss(z, _onehot(y), reduction="none") * torch.arange(N).unsqueeze(1)).mean()
            + 0 * F.huber_loss(z, _onehot(y)).detach()
        ),
        lambda z, y: _nll(z, y) + 0.3 * _nll(2 * z, y) + 0.1 * (torch.arange(N) * (z - _onehot(y)).square().mean(1)),
    ),
    "two terms": (
        lambda z, y: F.cross_entropy(z, y) + 0.5 * F.mse_loss(z, _onehot(y)),
        lambda z, y: _nll(z, y) + 0.5 * (z - _onehot(y)).square().mean(1),
    ),
    "two terms of two kinds of reduction": (
        lambda z, y: 0.7 * F.cross_entropy(z, y, WEIGHT) + 0.01 * F.mse_loss(z, _onehot(y), reduction="sum"),
        lambda z, y: 0.7 * WEIGHT[y] * _nll(z, y) * N / WEIGHT[y].sum() + 0.01 * N * (z - _onehot(y)).square().sum(1),
    ),
    "tokens": (
        lambda z, y: F.cross_entropy(torch.stack([z, 2 * z], 1).flatten(0, 1), y.repeat_interleave(2)),
        lambda z, y: (_nll(z, y) + _nll(2 * z, y)) / 2,
    ),
    "a loss per example": (lambda z, y: _nll(z, y), _nll),
    "a tapped loss per example": (
        lambda z, y: 2 * F.cross_entropy(z, y, reduction="none"),
        lambda z, y: 2 * _nll(z, y),
    ),
    "shape [1]": (lambda z, y: F.cross_entropy(z, y).reshape(1), _nll),
    # In-place operations change the very tensor that the tap saw.
    "scaled in place": (lambda z, y: F.cross_entropy(z, y).mul_(0.3), lambda z, y: 0.3 * _nll(z, y)),
    "none, weighted in place": (
        lambda z, y: F.cross_entropy(z, y, reduction="none").mul_(torch.arange(N)).mean(),
        lambda z, y: torch.arange(N) * _nll(z, y),
    ),
    "two terms, added in place": (
        lambda z, y: F.cross_entropy(z, y).add_(0.5 * F.mse_loss(z, _onehot(y))),
        lambda z, y: _nll(z, y) + 0.5 * (z - _onehot(y)).square().mean(1),
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_values_and_gradients_are_each_examples_own(name: str) -> None:
    loss, own = LOSSES[name]
    net, batch = _net(), _batch()
    logits: list[Tensor] = []

    def task(module: nn.Module, data: Any) -> Tensor:
        logits.append(module(data[0]))
        return loss(logits[-1], data[1])

    result = evaluate(task, net, batch, N)
    assert isinstance(result, BatchLoss)
    expected = own(logits[0], batch[1])
    assert result.loss.shape == ()
    assert result.n == N
    assert result.values is not None
    torch.testing.assert_close(result.values, expected.detach(), **EXACT)
    torch.testing.assert_close(result.values.mean(), result.loss.detach(), **EXACT)
    assert not result.values.requires_grad
    if name != "a loss per example":
        assert result.tapped
        assert not result.remainder
    outputs, gradients = result.true_outputs()
    (from_outputs,) = torch.autograd.grad(outputs, logits[0], gradients, retain_graph=True)
    (from_book,) = torch.autograd.grad(expected.sum(), logits[0])
    torch.testing.assert_close(from_outputs, from_book, **EXACT)


@pytest.mark.parametrize("name", [name for name in LOSSES if "in place" not in name])
def test_scales_of_the_fisher_are_those_of_the_own_losses(name: str) -> None:
    """The exact Fisher at the logits equals the Hessian of each example's own loss (all losses here have it so)."""
    loss, own = LOSSES[name]
    z = torch.randn(N, C, dtype=torch.float64, requires_grad=True)
    result = evaluate(lambda module, batch: loss(z, batch[1]), _net(), _batch(), N)
    draws = result.exact_draws()
    if name in ("a loss per example", "tokens"):
        assert draws is None
        return
    assert draws is not None
    hessian = torch.autograd.functional.hessian(lambda v: own(v, _batch()[1]).sum(), z.detach())
    fisher = torch.zeros(N, C, C, dtype=torch.float64)
    passes = list(result.exact_outputs())
    assert len(passes) == draws
    for number, (outputs, gradients) in enumerate(passes):
        last = number == draws - 1
        (g,) = torch.autograd.grad(outputs, z, gradients, retain_graph=not last) if outputs[0] is not z else gradients
        fisher += g.unsqueeze(2) * g.unsqueeze(1)
    torch.testing.assert_close(fisher, torch.stack([hessian[n, :, n] for n in range(N)]), rtol=1e-9, atol=1e-10)


def test_labels_are_sampled_independently_for_each_term() -> None:
    z = torch.randn(N, C, dtype=torch.float64, requires_grad=True)
    loss, _ = LOSSES["two terms"]
    result = evaluate(lambda module, batch: loss(z, batch[1]), _net(), _batch(), N)
    shapes: list[tuple[int, ...]] = []

    def noise(shape: tuple[int, ...]) -> Tensor:
        shapes.append(shape)
        return torch.full((N, *shape), 0.25 * len(shapes), dtype=torch.float64)

    inputs, gradients = result.sampled_outputs(noise)
    assert shapes == [(1,), (1, C)]
    assert all(tensor is z for tensor in inputs)
    p = z.detach().softmax(1)
    # The first half of the noise is for the negative sign; 0.25 is the middle of that.
    lengths = 1 - 2 * p + p.square().sum(1, keepdim=True)
    parts = p * lengths
    sampled = (parts.cumsum(1) < 0.5 * parts.sum(1, keepdim=True)).sum(1)
    weights = (parts.sum(1, keepdim=True) / lengths.gather(1, sampled.unsqueeze(1))).sqrt()
    torch.testing.assert_close(gradients[0], -weights * (p - _onehot(sampled)), **EXACT)
    # The normal quantile of 0.5 is 0.
    torch.testing.assert_close(gradients[1], torch.zeros(N, C, dtype=torch.float64), rtol=0, atol=1e-12)


def test_gradients_have_the_precision_of_the_logits() -> None:
    z = torch.randn(N, C, dtype=torch.bfloat16, requires_grad=True)
    result = evaluate(lambda module, batch: F.cross_entropy(z, batch[1]), _net(), _batch(), N)
    _, sampled = result.sampled_outputs(lambda shape: torch.full((N, *shape), 0.5, dtype=torch.float64))
    assert sampled[0].dtype == torch.bfloat16
    assert {gradients[0].dtype for _, gradients in result.exact_outputs()} == {torch.bfloat16}


def test_a_reference_replaces_the_scale_of_the_batch() -> None:
    net, (x, y) = _net(), _batch()
    logits: list[Tensor] = []

    def task(module: nn.Module, batch: Any) -> Tensor:
        logits.append(module(batch[0]))
        total = F.cross_entropy(logits[-1], batch[1], WEIGHT)
        return total + 0.1 * F.mse_loss(logits[-1], _onehot(batch[1]), reduction="sum")

    scale = LossScale(dict(zip(evaluate(task, net, (x, y), N).scale, (1.25, 32.0), strict=True)))
    logits.clear()
    whole = evaluate(task, net, (x, y), N, scale)
    parts = [evaluate(task, net, (x[part], y[part]), len(y[part]), scale) for part in (slice(3), slice(3, N))]
    z = logits[0]
    expected = WEIGHT[y] * _nll(z, y) / 1.25 + 32 * 0.1 * (z - _onehot(y)).square().sum(1)
    torch.testing.assert_close(whole.values, expected.detach(), **EXACT)
    torch.testing.assert_close(torch.cat([part.values for part in parts]), expected.detach(), **EXACT)
    outputs, gradients = whole.true_outputs()
    (by_logits,) = torch.autograd.grad(outputs, z, gradients, retain_graph=True)
    torch.testing.assert_close(by_logits, torch.autograd.grad(expected.sum(), z)[0], **EXACT)


def test_an_ignored_label_is_no_loss_and_leaves_the_others_as_they_are() -> None:
    """The mean over 8 - k labels is not the mean of the own losses, which do not depend on k."""
    net, (x, y) = _net(), _batch()
    own = evaluate(_task(LOSSES["ignored"][0]), net, (x, y), N)
    tally = ScaleTally()
    tally.add(N, {term.key: term.share(N) for term in own.terms})
    result = evaluate(_task(LOSSES["ignored"][0]), net, (x, y), N, tally.scale(N))
    z = net(x)
    expected = (y != 1) * _nll(z, y)
    assert 0 < int((y == 1).sum()) < N
    assert result.tapped
    torch.testing.assert_close(result.values, expected.detach(), **EXACT)
    wanted = torch.autograd.grad(expected.sum(), net.weight)[0]
    outputs, gradients = result.true_outputs()
    torch.testing.assert_close(torch.autograd.grad(outputs, net.weight, gradients)[0], wanted, **EXACT)


@pytest.mark.parametrize("n", [1, 2])
def test_a_loss_per_example_also_for_the_last_small_batch(n: int) -> None:
    """A batch of one gives `[1]`, which is still a loss per example: without it the last row of a table is missing."""
    net, (x, y) = _net(), _batch(n)
    result = evaluate(_task(_nll), net, (x, y), n)
    assert result.values is not None
    torch.testing.assert_close(result.values, _nll(net(x), y).detach(), **EXACT)


# ------------------------------------------------------------------------------------------- what is not the loss


@pytest.mark.parametrize("where", ["before", "after"])
@pytest.mark.parametrize("how", ["used in the graph", "detached", "without gradients"])
def test_an_auxiliary_loss_that_is_only_logged_is_dropped(where: str, how: str) -> None:
    def task(module: nn.Module, batch: Any) -> Tensor:
        z = module(batch[0])

        def log() -> None:
            if how == "without gradients":
                with torch.no_grad():
                    F.mse_loss(z, _onehot(batch[1]))
            else:
                F.mse_loss(z.detach() if how == "detached" else z, _onehot(batch[1]))

        if where == "before":
            log()
        loss = F.cross_entropy(z, batch[1])
        if where == "after":
            log()
        return loss

    result = evaluate(task, _net(), _batch(), N)
    assert result.tapped
    assert [type(term.call) for term in result.terms] == [CrossEntropy]
    assert isinstance(result.primary, CrossEntropy)


def test_the_first_term_of_the_loss_is_primary() -> None:
    result = evaluate(_task(LOSSES["two terms"][0]), _net(), _batch(), N)
    assert [type(term.call) for term in result.terms] == [CrossEntropy, SquaredError]
    assert isinstance(result.primary, CrossEntropy)


def _penalty(module: nn.Module) -> Tensor:
    return 0.01 * sum(p.square().sum() for p in module.parameters())


def _margin(z: Tensor) -> Tensor:
    return F.soft_margin_loss(z, torch.ones_like(z))


@pytest.mark.parametrize(
    "task",
    [
        pytest.param(lambda m, b: F.cross_entropy(m(b[0]), b[1]) + _penalty(m), id="penalty"),
        pytest.param(lambda m, b: F.cross_entropy(z := m(b[0]), b[1]) + _margin(z), id="unknown term"),
        pytest.param(lambda m, b: F.cross_entropy(m(b[0]), b[1]).exp(), id="function of the loss"),
        pytest.param(lambda m, b: F.cross_entropy(m(b[0]), b[1]).add_(_penalty(m)), id="penalty added in place"),
    ],
)
def test_a_part_that_the_tap_did_not_see_is_flagged(task: Callable[[Any, Any], Tensor]) -> None:
    result = evaluate(task, _net(), _batch(), N)
    assert result.terms
    assert result.remainder
    assert not result.tapped
    assert result.values is None
    outputs, gradients = result.true_outputs()
    assert outputs == [result.loss]
    assert gradients[0].item() == N


def test_a_loss_without_any_known_call() -> None:
    result = evaluate(_task(lambda z, y: _margin(z)), _net(), _batch(), N)
    assert result.terms == ()
    assert not result.tapped
    assert result.primary is None
    assert result.values is None
    assert result.exact_draws() is None


def test_a_call_whose_rows_are_not_shared_out_evenly_is_not_a_term() -> None:
    """Seven of eight examples, say those with a box in the picture: which ones is not known."""
    result = evaluate(_task(lambda z, y: F.cross_entropy(z[:7], y[:7])), _net(), _batch(), N)
    assert not result.tapped
    assert result.values is None


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_non_finite_example_leaves_the_others_known(value: float, reduction: str) -> None:
    x, y = _batch()
    x[3] = 1e200 if value == torch.inf else torch.nan

    def task(module: nn.Module, batch: Any) -> Tensor:
        out = F.mse_loss(module(batch[0]), _onehot(batch[1]), reduction=reduction)
        return out.mean() if reduction == "none" else out

    result = evaluate(task, _net(), (x, y), N)
    assert not bool(result.loss.isfinite())
    assert result.tapped
    assert result.values is not None
    assert result.values.isfinite().tolist() == [n != 3 for n in range(N)]
    if value == torch.nan:
        assert bool(result.values[3].isnan())


def test_a_nan_that_the_known_calls_do_not_have_is_not_swallowed() -> None:
    result = evaluate(lambda m, b: F.cross_entropy(m(b[0]), b[1]) + torch.nan * m.weight.sum(), _net(), _batch(), N)
    assert result.remainder
    assert result.values is None


# --------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("loss", "shape"),
    [
        (lambda z, y: F.cross_entropy(z, y, reduction="none").unsqueeze(1), r"\(8, 1\)"),
        (lambda z, y: F.cross_entropy(z, y, reduction="none")[:5], r"\(5,\)"),
        (lambda z, y: z, r"\(8, 3\)"),
        (lambda z, y: z[:0].sum(1), r"\(0,\)"),
    ],
)
def test_a_loss_of_the_wrong_shape(loss: Callable[[Tensor, Tensor], Tensor], shape: str) -> None:
    with pytest.raises(TaskError, match=rf"batch of 8 examples has the shape {shape}.*scalar.*\[8\]"):
        evaluate(_task(loss), _net(), _batch(), N)


@pytest.mark.parametrize(
    "loss",
    [
        pytest.param(lambda z, y: F.cross_entropy(z.detach(), y), id="detached"),
        pytest.param(lambda z, y: torch.no_grad()(F.cross_entropy)(z, y), id="no_grad"),
        pytest.param(lambda z, y: torch.tensor(0.5), id="constant"),
    ],
)
def test_a_loss_that_does_not_depend_on_the_model(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    with pytest.raises(TaskError, match=r"does not depend on any layer.*no_grad"):
        evaluate(_task(loss), _net(), _batch(), N)


# --------------------------------------------------------------------------------------------------- training_step


class Base(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = _net()
        self.seen: list[Any] = []

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])


class OnlyBatch(Base):
    def training_step(self, batch: Any) -> Tensor:
        return self.loss(batch)


class WithIndex(Base):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen.append(batch_idx)
        return self.loss(batch)


class OtherNames(Base):
    def training_step(self, b: Any, i: int) -> Tensor:
        self.seen.append(i)
        return self.loss(b)


class WithLoader(Base):
    def training_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        self.seen.append((batch_idx, dataloader_idx))
        return self.loss(batch)


class AnyArguments(Base):
    def training_step(self, *args: Any) -> Tensor:
        self.seen.append(args[1:])
        return self.loss(args[0])


class KeywordOnly(Base):
    def training_step(self, batch: Any, *, weight: float = 1.0) -> Tensor:
        return weight * self.loss(batch)


class AnyKeywords(Base):
    def training_step(self, batch: Any, **kwargs: Any) -> Tensor:
        return self.loss(batch)


class ReturnsDict(Base):
    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        return {"logits": None, "loss": self.loss(batch)}


@pytest.mark.parametrize(
    ("kind", "seen"),
    [
        (OnlyBatch, []),
        (WithIndex, [0]),
        (OtherNames, [0]),
        (WithLoader, [(0, 0)]),
        (AnyArguments, [(0,)]),
        (KeywordOnly, []),
        (AnyKeywords, []),
        (ReturnsDict, []),
    ],
)
def test_signatures_of_training_step(kind: type[Base], seen: list[Any]) -> None:
    """Those that a Trainer accepts."""
    module = kind()
    result = evaluate(TrainingStepTask(), module, _batch(), N)
    z = module.net(_batch()[0])
    torch.testing.assert_close(result.values, _nll(z, _batch()[1]).detach(), **EXACT)
    assert module.seen == seen


class Fetches(Base):
    def training_step(self, dataloader_iter: Any) -> Tensor:
        raise AssertionError("must not be called")


class ReturnsNone(Base):
    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.loss(batch)


class ReturnsOtherDict(Base):
    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        return {"objective": self.loss(batch)}


class ReturnsNumber(Base):
    def training_step(self, batch: Any, batch_idx: int) -> float:
        return self.loss(batch).item()


@pytest.mark.parametrize(
    ("module", "match"),
    [
        (Fetches, r"training_step\(dataloader_iter\).*pass `task="),
        (ReturnsNone, r"returned NoneType instead of a loss tensor.*pass `task="),
        (ReturnsOtherDict, r"instead of a loss tensor \(or a dict with the key 'loss'\)"),
        (ReturnsNumber, r"returned float instead"),
        (_net, r"Linear has no `training_step`.*pass `task="),
    ],
)
def test_training_steps_that_cannot_be_the_task(module: Callable[[], nn.Module], match: str) -> None:
    with pytest.raises(TaskError, match=match):
        evaluate(TrainingStepTask(), module(), _batch(), N)


class Logs(Base):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("loss", loss, on_step=True, prog_bar=True)
        self.log_dict({"a": loss, "b": 1.0})
        return loss


def test_logging_is_muted_without_a_trainer() -> None:
    module = Logs()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Lightning warns when there is no trainer to log to
        evaluate(TrainingStepTask(), module, _batch(), N)
    assert not {"log", "log_dict"} & set(module.__dict__)


def test_logging_is_back_after_an_error_and_an_own_log_is_kept() -> None:
    class Fails(Base):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.log("x", 1.0)
            raise ZeroDivisionError("in the step")

    module = Fails()
    logged: list[str] = []

    def own(name: str, value: Any) -> None:
        logged.append(name)

    module.log = own
    with pytest.raises(ZeroDivisionError, match="in the step"):
        evaluate(TrainingStepTask(), module, _batch(), N)
    assert logged == []
    assert module.__dict__["log"] is own
    assert "log_dict" not in module.__dict__


class RunsAgain(Callback):
    """Runs the step again where Lightning refuses to log."""

    def __init__(self) -> None:
        self.values: Tensor | None = None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        before = dict(trainer.callback_metrics)
        self.values = evaluate(TrainingStepTask(), pl_module, _batch(), N).values
        assert trainer.callback_metrics.keys() == before.keys()


def test_a_step_that_logs_can_run_again_at_the_end_of_training(tmp_path: Path) -> None:
    class Trained(Logs):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    again = RunsAgain()
    trainer = Trainer(
        max_epochs=1,
        callbacks=[again],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        default_root_dir=tmp_path,
    )
    trainer.fit(Trained(), DataLoader(TensorDataset(*_batch()), batch_size=4))
    assert again.values is not None
    assert again.values.shape == (N,)
