"""What a tapped loss call says about each example, against formulas written out by hand."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_influence.objective.losses import CrossEntropy, LossCall, known_loss, known_losses, read_call
from lightning_influence.objective.losses.binary import BinaryCrossEntropy, BinaryProbabilities
from lightning_influence.objective.losses.divergence import Divergence
from lightning_influence.objective.losses.normal import NormalLikelihood
from lightning_influence.objective.losses.poisson import PoissonLikelihood
from lightning_influence.objective.losses.regression import AbsoluteError, HuberError, SmoothAbsoluteError, SquaredError

N = 6
EXACT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-12}
COEFFICIENT = 0.3


@dataclass(frozen=True)
class Case:
    """One way to call a loss: `r` rows for `N` examples, and what its terms are by the book."""

    function: Callable[..., Tensor]
    input: tuple[int, ...]
    target: Callable[[], Tensor]
    kwargs: Callable[[], dict[str, Any]] = field(default=dict)
    channels_first: bool = True

    def make(self) -> tuple[Tensor, Tensor, dict[str, Any]]:
        generator = torch.Generator().manual_seed(1)
        logits = 1.5 * torch.randn(self.input, generator=generator, dtype=torch.float64)
        return logits, self.target(), self.kwargs()

    def inputs(self, logits: Tensor) -> Tensor:
        """What the function takes: log-probabilities, probabilities, rates, else the logits themselves."""
        if self.function is F.nll_loss:
            return logits.log_softmax(1)
        if self.function is F.kl_div:
            return logits.log_softmax(self.class_dim)
        if self.function is F.binary_cross_entropy:
            return logits.sigmoid()
        return logits.exp() if self.rates else logits

    @property
    def class_dim(self) -> int:
        return 1 if len(self.input) == 2 or self.channels_first else len(self.input) - 1

    @property
    def rates(self) -> bool:
        return self.function is F.poisson_nll_loss and self.kwargs().get("log_input") is False

    def call(self, reduction: str, coefficient: float = COEFFICIENT) -> tuple[LossCall, Tensor, Tensor, Tensor]:
        """Return the call, its logits, the batch loss made from it and the derivative of that by its output."""
        logits, target, kwargs = self.make()
        logits.requires_grad_()
        inputs = self.inputs(logits)
        kwargs = {**kwargs, "reduction": reduction}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch on the mean of `kl_div`
            output = self.function(inputs, target, **kwargs)
        loss = coefficient * output
        if reduction == "none":  # every element with a weight of its own
            loss = (loss * torch.linspace(0.5, 2, output.numel(), dtype=torch.float64).view(output.shape)).sum()
        call = read_call(self.function, (inputs, target), kwargs, output)
        assert call is not None
        (derivative,) = torch.autograd.grad(loss, output, retain_graph=True)
        return call, logits, loss, derivative


def _generator(seed: int = 2) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _classes(*shape: int, c: int = 4, ignored: int | None = None) -> Callable[[], Tensor]:
    def make() -> Tensor:
        target = torch.randint(0, c, shape, generator=_generator())
        if ignored is not None:
            target.view(-1)[1::3] = ignored
        return target

    return make


def _soft(*shape: int, total: float = 1.0) -> Callable[[], Tensor]:
    return lambda: total * torch.rand(shape, generator=_generator(), dtype=torch.float64).softmax(1)


def _bits(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randint(0, 2, shape, generator=_generator()).double()


def _numbers(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.rand(shape, generator=_generator(), dtype=torch.float64)


def _counts(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randint(0, 5, shape, generator=_generator()).double()


WEIGHT = torch.tensor([0.5, 1.0, 2.0, 3.0], dtype=torch.float64)
CROSS_ENTROPY = {
    "plain": Case(F.cross_entropy, (N, 4), _classes(N)),
    "class weights": Case(F.cross_entropy, (N, 4), _classes(N), lambda: {"weight": WEIGHT}),
    "ignored": Case(F.cross_entropy, (N, 4), _classes(N, ignored=-100)),
    "ignored, other index": Case(F.cross_entropy, (N, 4), _classes(N, ignored=2), lambda: {"ignore_index": 2}),
    "smoothing": Case(F.cross_entropy, (N, 4), _classes(N), lambda: {"label_smoothing": 0.2}),
    "weights, ignored, smoothing": Case(
        F.cross_entropy,
        (N, 4),
        _classes(N, ignored=-1),
        lambda: {"weight": WEIGHT, "label_smoothing": 0.2, "ignore_index": -1},
    ),
    "soft": Case(F.cross_entropy, (N, 4), _soft(N, 4)),
    "soft, not summing to one": Case(F.cross_entropy, (N, 4), _soft(N, 4, total=1.7)),
    "soft, weights, smoothing": Case(
        F.cross_entropy, (N, 4), _soft(N, 4), lambda: {"weight": WEIGHT, "label_smoothing": 0.2}
    ),
    "soft, not summing to one, smoothing": Case(
        F.cross_entropy, (N, 4), _soft(N, 4, total=1.7), lambda: {"label_smoothing": 0.2}
    ),
    "tokens": Case(F.cross_entropy, (3 * N, 4), _classes(3 * N)),
    "tokens, ignored, weights": Case(
        F.cross_entropy, (3 * N, 4), _classes(3 * N, ignored=-100), lambda: {"weight": WEIGHT}
    ),
    "pixels": Case(F.cross_entropy, (N, 4, 2, 3), _classes(N, 2, 3)),
    "pixels, everything": Case(
        F.cross_entropy,
        (N, 4, 3),
        _classes(N, 3, ignored=3),
        lambda: {"weight": WEIGHT, "label_smoothing": 0.1, "ignore_index": 3},
    ),
    "pixels, soft": Case(F.cross_entropy, (N, 4, 3), _soft(N, 4, 3)),
    "nll": Case(F.nll_loss, (N, 4), _classes(N)),
    "nll, weights, ignored": Case(
        F.nll_loss, (N, 4), _classes(N, ignored=1), lambda: {"weight": WEIGHT, "ignore_index": 1}
    ),
    "nll, pixels": Case(F.nll_loss, (N, 4, 3), _classes(N, 3)),
}
BINARY = {
    "one output": Case(F.binary_cross_entropy_with_logits, (N,), _bits(N)),
    "one column": Case(F.binary_cross_entropy_with_logits, (N, 1), _bits(N, 1)),
    "multilabel": Case(F.binary_cross_entropy_with_logits, (N, 3), _bits(N, 3)),
    "soft": Case(F.binary_cross_entropy_with_logits, (N, 3), _numbers(N, 3)),
    "pos_weight": Case(
        F.binary_cross_entropy_with_logits, (N, 3), _bits(N, 3), lambda: {"pos_weight": WEIGHT[:3], "weight": None}
    ),
    "pos_weight, one": Case(
        F.binary_cross_entropy_with_logits, (N,), _bits(N), lambda: {"pos_weight": torch.tensor(3.0)}
    ),
    "element weights": Case(
        F.binary_cross_entropy_with_logits, (N, 3), _bits(N, 3), lambda: {"weight": _numbers(N, 3)()}
    ),
    "weights by column and pos_weight": Case(
        F.binary_cross_entropy_with_logits,
        (N, 3),
        _numbers(N, 3),
        lambda: {"weight": WEIGHT[1:], "pos_weight": WEIGHT[:3]},
    ),
    "weights by example": Case(
        F.binary_cross_entropy_with_logits, (N, 3), _bits(N, 3), lambda: {"weight": _numbers(N, 1)()}
    ),
    "pixels": Case(F.binary_cross_entropy_with_logits, (N, 1, 2, 2), _bits(N, 1, 2, 2)),
    "rows": Case(F.binary_cross_entropy_with_logits, (2 * N, 2), _bits(2 * N, 2)),
}
SQUARED = {
    "one output": Case(F.mse_loss, (N,), _numbers(N)),
    "outputs": Case(F.mse_loss, (N, 3), _numbers(N, 3)),
    "image": Case(F.mse_loss, (N, 1, 2, 2), _numbers(N, 1, 2, 2)),
    "rows": Case(F.mse_loss, (2 * N, 3), _numbers(2 * N, 3)),
    "weights": Case(F.mse_loss, (N, 3), _numbers(N, 3), lambda: {"weight": _numbers(N, 3)()}),
    "weights of padding": Case(F.mse_loss, (2 * N, 3), _numbers(2 * N, 3), lambda: {"weight": _bits(2 * N, 3)()}),
}
PROBABILITIES = {
    "one output": Case(F.binary_cross_entropy, (N,), _bits(N)),
    "outputs": Case(F.binary_cross_entropy, (N, 3), _numbers(N, 3)),
    "element weights": Case(F.binary_cross_entropy, (N, 3), _bits(N, 3), lambda: {"weight": _numbers(N, 3)()}),
    "weights by example": Case(F.binary_cross_entropy, (N, 3), _bits(N, 3), lambda: {"weight": _numbers(N, 1)()}),
    "pixels": Case(F.binary_cross_entropy, (N, 1, 2, 2), _bits(N, 1, 2, 2)),
}
DIVERGENCE = {
    "plain": Case(F.kl_div, (N, 4), _soft(N, 4)),
    "log target": Case(F.kl_div, (N, 4), lambda: _soft(N, 4)().log(), lambda: {"log_target": True}),
    "not summing to one": Case(F.kl_div, (N, 4), _soft(N, 4, total=1.7)),
    "tokens": Case(F.kl_div, (3 * N, 4), _soft(3 * N, 4)),
    "positions": Case(F.kl_div, (N, 3, 4), _soft(N, 3, 4), channels_first=False),
    "pixels": Case(F.kl_div, (N, 4, 3), _soft(N, 4, 3)),
}
RESIDUALS = {
    "absolute": Case(F.l1_loss, (N, 3), _numbers(N, 3)),
    "absolute, rows": Case(F.l1_loss, (2 * N, 3), _numbers(2 * N, 3)),
    "absolute, weights": Case(F.l1_loss, (N, 3), _numbers(N, 3), lambda: {"weight": _numbers(N, 3)()}),
    "huber": Case(F.huber_loss, (N, 3), _numbers(N, 3)),
    "huber, delta": Case(F.huber_loss, (N, 1, 2, 2), _numbers(N, 1, 2, 2), lambda: {"delta": 0.4}),
    "huber, weights": Case(F.huber_loss, (N, 3), _numbers(N, 3), lambda: {"weight": _numbers(N, 3)()}),
    "smooth": Case(F.smooth_l1_loss, (N, 3), _numbers(N, 3)),
    "smooth, beta": Case(F.smooth_l1_loss, (N,), _numbers(N), lambda: {"beta": 0.3}),
    "smooth, beta 0": Case(F.smooth_l1_loss, (N, 3), _numbers(N, 3), lambda: {"beta": 0.0}),
}
LIKELIHOODS = {
    "counts": Case(F.poisson_nll_loss, (N, 3), _counts(N, 3)),
    "counts, full": Case(F.poisson_nll_loss, (N,), _counts(N), lambda: {"full": True}),
    "counts, rates": Case(F.poisson_nll_loss, (N, 3), _counts(N, 3), lambda: {"log_input": False, "eps": 1e-15}),
    "normal": Case(F.gaussian_nll_loss, (N, 3), _numbers(N, 3), lambda: {"var": _numbers(N, 3)()}),
    "normal, full": Case(F.gaussian_nll_loss, (N, 3), _numbers(N, 3), lambda: {"var": _numbers(N, 1)(), "full": True}),
    "normal, one variance": Case(F.gaussian_nll_loss, (2 * N, 3), _numbers(2 * N, 3), lambda: {"var": 0.7}),
    "normal, small variances": Case(
        F.gaussian_nll_loss, (N, 3), _numbers(N, 3), lambda: {"var": _bits(N)(), "eps": 0.1}
    ),
}
CASES = {
    f"{kind}: {name}": case
    for kind, cases in (
        ("cross-entropy", CROSS_ENTROPY),
        ("binary", BINARY),
        ("squared", SQUARED),
        ("probabilities", PROBABILITIES),
        ("divergence", DIVERGENCE),
        ("residual", RESIDUALS),
        ("likelihood", LIKELIHOODS),
    )
    for name, case in cases.items()
}
REDUCTIONS = ("mean", "sum", "none")


# --------------------------------------------------------------------------------------------------- by the book


def book_terms(case: Case, logits: Tensor, target: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Return the loss terms and their shares of the denominator of a mean, both shaped `[r, ...]`."""
    ones = torch.ones_like(logits)
    weight = kwargs.get("weight")
    residual = logits - target if target.shape == logits.shape else None
    if residual is not None and case.function in (F.mse_loss, F.l1_loss):
        terms = residual**2 if case.function is F.mse_loss else residual.abs()
        return (terms, ones) if weight is None else (terms * weight, weight)  # torch: a mean over the weights
    if residual is not None and case.function in (F.huber_loss, F.smooth_l1_loss):
        size, edge = residual.abs(), kwargs.get("delta", kwargs.get("beta", 1.0))
        terms = torch.where(size <= edge, residual**2 / 2, edge * (size - edge / 2))
        if case.function is F.smooth_l1_loss:
            terms = terms / edge if edge else size
        return terms * (1.0 if weight is None else weight), ones
    if case.function is F.poisson_nll_loss:
        log_rate = logits
        terms = log_rate.exp() - target * log_rate
        stirling = target * target.log() - target + 0.5 * (2 * math.pi * target).log()
        return terms + (torch.where(target > 1, stirling, 0) if kwargs.get("full") else 0), ones
    if case.function is F.gaussian_nll_loss:
        var = torch.as_tensor(kwargs["var"], dtype=torch.float64)
        var = (var if var.ndim in (0, logits.ndim) else var.unsqueeze(1)).clamp(min=kwargs.get("eps", 1e-6))
        constant = 0.5 * math.log(2 * math.pi) if kwargs.get("full") else 0.0
        return 0.5 * (var.log() + (logits - target) ** 2 / var) + constant, ones
    if case.function is F.kl_div:
        log_p = logits.log_softmax(case.class_dim)
        log_t = target if kwargs.get("log_target") else target.log()
        return log_t.exp() * (log_t - log_p), ones
    if case.function in (F.binary_cross_entropy_with_logits, F.binary_cross_entropy):
        positive, negative = torch.sigmoid(logits), torch.sigmoid(-logits)
        pos_weight = kwargs.get("pos_weight")
        terms = -(target * (1.0 if pos_weight is None else pos_weight) * positive.log() + (1 - target) * negative.log())
        return terms * (1.0 if weight is None else weight), ones
    classes = logits.shape[1]
    smoothing, ignore = kwargs.get("label_smoothing", 0.0), kwargs.get("ignore_index", -100)
    weight = torch.ones(classes, dtype=torch.float64) if weight is None else weight
    log_p = logits.movedim(1, -1).log_softmax(-1)
    if target.is_floating_point():
        distribution, share = target.movedim(1, -1), torch.ones(log_p.shape[:-1], dtype=torch.float64)
    else:
        kept = (target != ignore).double()
        known = torch.where(target == ignore, 0, target)
        distribution = torch.eye(classes, dtype=torch.float64)[known] * kept.unsqueeze(-1)
        share = weight[known] * kept
    smooth = ((1 - smoothing) * distribution + smoothing / classes) * (share != 0).unsqueeze(-1)
    return -(weight * smooth * log_p).sum(-1), share


def book_own_losses(case: Case, logits: Tensor, reduction: str, coefficient: float = COEFFICIENT) -> Tensor:
    """Return every example's own loss, whose mean is the batch loss made in `Case.call`: `[N]`."""
    _, target, kwargs = case.make()
    terms, share = book_terms(case, logits, target, kwargs)
    if reduction == "none":
        terms = terms * torch.linspace(0.5, 2, terms.numel(), dtype=torch.float64).view(terms.shape)
    total = share.sum() if reduction == "mean" else 1.0
    return N * coefficient * terms.reshape(N, -1).sum(1) / total


def book_hessians(case: Case, logits: Tensor, reduction: str) -> list[Tensor]:
    """Return the Hessian of every example's own loss by its own logits, each `[P, P]`."""
    size = logits.numel() // N
    if case.function is F.l1_loss or case.kwargs().get("beta") == 0.0:
        # The Hessian is 0. Of a Laplace distribution around the prediction it is the Fisher information: 1 for every
        # element, as the mean square of the gradients +-1, times the element's weight in its example's own loss.
        _, target, kwargs = case.make()
        weight = kwargs.get("weight")
        share = book_terms(case, logits.detach(), target, kwargs)[1]
        each = torch.full(case.input, N * COEFFICIENT, dtype=torch.float64) * (1.0 if weight is None else weight)
        if reduction == "none":
            each = each * torch.linspace(0.5, 2, each.numel(), dtype=torch.float64).view(each.shape)
        return list(torch.diag_embed((each / (share.sum() if reduction == "mean" else 1.0)).reshape(N, size)))
    whole = torch.autograd.functional.hessian(lambda z: book_own_losses(case, z, reduction).sum(), logits.detach())
    blocks = whole.reshape(N, size, N, size)
    return [blocks[n, :, n, :] for n in range(N)]


def to_logits(case: Case, gradient: Tensor, logits: Tensor) -> Tensor:
    """Carry a gradient by the input of the loss back to the logits."""
    logits = logits.detach().requires_grad_()
    inputs = case.inputs(logits)
    if case.function is F.kl_div:
        inputs = inputs.movedim(case.class_dim, 1)
    (result,) = torch.autograd.grad(inputs, logits, gradient)
    return result


# ------------------------------------------------------------------------------------ terms, weights, own losses


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", CASES)
def test_terms_and_own_losses(name: str, reduction: str) -> None:
    case = CASES[name]
    call, logits, loss, derivative = case.call(reduction)
    _, target, kwargs = case.make()
    terms, share = book_terms(case, logits, target, kwargs)
    if isinstance(call, Divergence):  # classes second, as everywhere
        terms, share = terms.movedim(case.class_dim, 1), share.movedim(case.class_dim, 1)
    torch.testing.assert_close(call.elements(), terms, **EXACT)
    torch.testing.assert_close(call.weights(), share, **EXACT)
    values = call.per_example(call.elements() * call.scale(derivative, N), N)
    torch.testing.assert_close(values, book_own_losses(case, logits, reduction), **EXACT)
    torch.testing.assert_close(values.mean(), loss, **EXACT)
    assert call.rows_match(N)
    # The gradients of the own losses are what autograd gives for the batch, row by row.
    (own,) = torch.autograd.grad(values.sum(), logits, retain_graph=True)
    (batch,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(own, N * batch, **EXACT)


@pytest.mark.parametrize("name", CASES)
def test_the_reference_replaces_the_batch(name: str) -> None:
    """With a reference the scale no longer depends on the rest of the batch."""
    case = CASES[name]
    call, logits, _, derivative = case.call("mean")
    _, target, kwargs = case.make()
    terms, share = book_terms(case, logits, target, kwargs)
    assert call.mean_weight(N) == pytest.approx(float(share.sum()) / N, rel=1e-12)
    assert float(call.scale(derivative, N)) == pytest.approx(COEFFICIENT * N / float(share.sum()), rel=1e-12)
    assert float(call.scale(derivative, N, 1.75)) == pytest.approx(COEFFICIENT / 1.75, rel=1e-12)
    call, _, _, derivative = case.call("sum")
    assert float(call.scale(derivative, N)) == pytest.approx(COEFFICIENT * N, rel=1e-12)
    call, _, _, derivative = case.call("none")
    weights = N * derivative
    placed = weights.movedim(case.class_dim, 1) if case.function is F.kl_div else weights
    assert torch.equal(call.scale(derivative, N), placed)


@pytest.mark.parametrize(
    ("name", "varies"),
    [
        ("cross-entropy: plain", False),
        ("cross-entropy: smoothing", False),
        ("cross-entropy: soft", False),
        ("cross-entropy: soft, weights, smoothing", False),
        ("cross-entropy: class weights", True),
        # One decision per example: without a label it just has no loss, and the others weigh as ever.
        ("cross-entropy: ignored", False),
        ("cross-entropy: nll", False),
        ("cross-entropy: tokens", True),
        ("cross-entropy: tokens, ignored, weights", True),
        ("cross-entropy: nll, weights, ignored", True),
        ("binary: element weights", False),
        ("squared: outputs", False),
    ],
)
def test_which_means_depend_on_their_batch(name: str, varies: bool) -> None:
    assert (CASES[name].call("mean")[0].steady_divisor(N, alone=True) is None) is varies
    assert CASES[name].call("sum")[0].steady_divisor(N, alone=True) is None
    assert CASES[name].call("none")[0].steady_divisor(N, alone=True) is None


@pytest.mark.parametrize(("rows", "n", "match"), [(12, 6, True), (12, 12, True), (12, 5, False), (4, 8, False)])
def test_rows_are_shared_out_evenly(rows: int, n: int, match: bool) -> None:
    logits, target = torch.zeros(rows, 3), torch.zeros(rows, dtype=torch.long)
    call = read_call(F.cross_entropy, (logits, target), {}, torch.zeros(()))
    assert call is not None
    assert call.rows_match(n) is match


def test_a_single_example_without_a_batch_dimension() -> None:
    """`F.cross_entropy(logits[0], target[0])` has classes in its first dimension: not rows that could be shared out."""
    logits, target = torch.zeros(3), torch.tensor(1)
    call = read_call(F.cross_entropy, (logits, target), {}, F.cross_entropy(logits, target))
    assert call is None or not call.rows_match(1)


# ------------------------------------------------------------------------------------------------------ Hessians


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", CASES)
def test_exact_gradients_are_a_root_of_the_hessian(name: str, reduction: str) -> None:
    case = CASES[name]
    call, logits, _, derivative = case.call(reduction)
    draws = call.exact_draws(N)
    several_decisions = name.startswith(("cross", "divergence")) and logits.numel() > 4 * N
    assert draws == (None if several_decisions else logits.numel() // N)
    if draws is None:
        return
    columns = [to_logits(case, column, logits) for ((_, column), *_) in call.exact(call.scale(derivative, N), N)]
    assert len(columns) == draws
    flat = torch.stack(columns).reshape(draws, N, -1)
    for n, hessian in enumerate(book_hessians(case, logits, reduction)):
        torch.testing.assert_close(flat[:, n].T @ flat[:, n], hessian, **EXACT)


def _repeated(case: Case, reduction: str, copies: int) -> tuple[list[LossCall], list[Tensor], Tensor]:
    """For every example a call with many copies of it, and the scale that it has in its batch."""
    call, logits, _, derivative = case.call(reduction)
    scale = call.scale(derivative, N)
    _, target, kwargs = case.make()
    calls, scales = [], []
    for n in range(N):
        rows = logits.shape[0] // N
        own = slice(n * rows, (n + 1) * rows)
        settings = {
            key: value[own].repeat(copies, *[1] * (value.ndim - 1)) if _by_row(value, logits) else value
            for key, value in kwargs.items()
        }
        inputs = case.inputs(logits.detach())[own].repeat(copies, *[1] * (logits.ndim - 1))
        targets = target[own].repeat(copies, *[1] * (target.ndim - 1))
        repeated = read_call(case.function, (inputs, targets), settings, torch.zeros(()))
        assert repeated is not None
        calls.append(repeated)
        scales.append(scale if scale.ndim == 0 else scale[own].repeat(copies, *[1] * (scale.ndim - 1)))
    return calls, scales, logits


def _by_row(value: Any, logits: Tensor) -> bool:
    """Weights and variances by row; a vector is one of class weights, which are fewer or more than the rows."""
    return isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == logits.shape[0]


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", CASES)
def test_sampled_gradients_have_the_hessian_as_their_second_moment(name: str, reduction: str) -> None:
    """Over thousands of labels: mean zero, second moment within 6 standard errors of the Hessian (6,000 entries)."""
    case = CASES[name]
    copies = 20_000 if math.prod(case.input) <= 12 * N else 4_000
    calls, scales, logits = _repeated(case, reduction, copies)
    hessians = book_hessians(case, logits, reduction)
    generator = np.random.default_rng(0)
    rows = logits.shape[0] // N
    for n, (call, scale) in enumerate(zip(calls, scales, strict=True)):
        shape = call.noise_shape(copies)
        noise = torch.from_numpy(generator.random((copies, *shape))).clamp(1e-16, 1 - 1e-16)
        ((_, gradient), *_) = call.sampled(scale, noise)
        assert gradient.shape == call.input.shape
        own = logits.detach()[n * rows : (n + 1) * rows]
        at_logits = to_logits(case, gradient, own.repeat(copies, *[1] * (own.ndim - 1))).reshape(copies, -1)
        products = at_logits.unsqueeze(2) * at_logits.unsqueeze(1)
        for samples, expected in ((at_logits, torch.zeros(at_logits.shape[1])), (products, hessians[n])):
            error = samples.std(0) / math.sqrt(copies)
            # Where pairs of rare labels decide, a handful of draws more is no surprise.
            rare = 10 * float(samples.abs().max()) / copies
            assert bool(((samples.mean(0) - expected).abs() <= 6 * error + rare).all())


def test_labels_are_drawn_by_their_part_of_the_curvature() -> None:
    """Evenly spread noise gives each class its part of the trace .62 = .5 * .38 + .3 * .78 + .2 * .98, of 2,000.

    Drawn from the model itself the lengths would be sqrt(.38), sqrt(.78) and sqrt(.98), and for a model that is sure
    nearly always nearly zero.
    """
    shares = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    logits = shares.log().expand(2000, 3)
    call = read_call(F.cross_entropy, (logits, torch.zeros(2000, dtype=torch.long)), {}, torch.zeros(()))
    assert call is not None
    noise = ((torch.arange(2000, dtype=torch.float64) + 0.5) / 2000).unsqueeze(1)
    ((_, gradients),) = call.sampled(torch.ones((), dtype=torch.float64), noise)
    labels = gradients.abs().argmax(1)
    parts = torch.tensor([0.19, 0.234, 0.196], dtype=torch.float64) / 0.62
    assert ((torch.bincount(labels) - 2000 * parts).abs() <= 2).all()
    torch.testing.assert_close(gradients.square().sum(1), torch.full((2000,), 0.62, dtype=torch.float64), **EXACT)
    hessian = shares.diag() - shares.outer(shares)
    torch.testing.assert_close(gradients.T @ gradients / 2000, hessian, rtol=0, atol=1e-3)
    torch.testing.assert_close(gradients.mean(0), torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-3)


def test_a_model_without_doubt_has_no_curvature() -> None:
    logits = torch.tensor([[800.0, 0.0, -800.0]], dtype=torch.float64)
    call = read_call(F.cross_entropy, (logits, torch.zeros(1, dtype=torch.long)), {}, torch.zeros(()))
    assert call is not None
    for noise in (1e-16, 0.3, 1 - 1e-16):
        ((_, gradient), *_) = call.sampled(torch.ones(()), torch.full((1, 1), noise, dtype=torch.float64))
        assert gradient.tolist() == [[0.0, 0.0, 0.0]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_noise_at_its_ends_gives_finite_gradients(dtype: torch.dtype) -> None:
    """In lower precision the largest uniform number becomes 1: no class beyond the last, no infinite normal."""
    noise = torch.tensor([1e-16, 1 - 1e-16], dtype=torch.float64)
    scale = torch.ones(())
    logits = torch.tensor([[3.0, -2.0, 0.5], [60.0, 0.0, -60.0]], dtype=dtype)
    targets = torch.tensor([0, 1])
    counts = torch.ones_like(logits)
    for function, values, target in (
        (F.cross_entropy, logits, targets),
        (F.nll_loss, logits.float().log_softmax(1).to(dtype), targets),
        (F.kl_div, logits.float().log_softmax(1).to(dtype), counts / 3),
        (F.binary_cross_entropy_with_logits, logits, counts),
        # 0 and 1 are probabilities, too
        (F.binary_cross_entropy, (logits.float() / 60).clamp(0, 1).to(dtype), counts),
        (F.mse_loss, logits, counts),
        (F.l1_loss, logits, counts),
        (F.huber_loss, logits, counts),
        (F.smooth_l1_loss, logits, counts),
        (F.poisson_nll_loss, logits / 20, counts),
    ):
        call = read_call(function, (values, target), {}, torch.zeros(()))
        assert call is not None
        shape = (2, *call.noise_shape(2))
        ((_, gradient), *_) = call.sampled(scale, noise.view(2, *[1] * (len(shape) - 1)).expand(shape))
        assert bool(gradient.isfinite().all())
        assert gradient.shape == logits.shape


@pytest.mark.parametrize("function", [F.cross_entropy, F.binary_cross_entropy_with_logits, F.mse_loss])
def test_a_negative_weight_is_refused(function: Callable[..., Tensor]) -> None:
    logits = torch.randn(4, 2)
    target = torch.zeros(4, dtype=torch.long) if function is F.cross_entropy else torch.zeros(4, 2)
    call = read_call(function, (logits, target), {}, torch.zeros(()))
    assert call is not None
    for ask in (
        lambda: call.sampled(torch.tensor(-0.25), torch.full((4, *call.noise_shape(4)), 0.5)),
        lambda: list(call.exact(torch.tensor(-0.25), len(call.input))),
    ):
        with pytest.raises(ValueError, match=r'negative weight \(-0\.\d+\).*fisher="empirical"'):
            ask()


def test_a_negative_class_weight_is_refused() -> None:
    logits, target, weight = torch.randn(4, 2), torch.tensor([0, 0, 1, 0]), torch.tensor([1.0, -2.0])
    call = read_call(F.cross_entropy, (logits, target, weight), {}, torch.zeros(()))
    assert call is not None
    with pytest.raises(ValueError, match=r"negative weight \(-2\)"):
        list(call.exact(torch.tensor(1.0), len(call.input)))


# ---------------------------------------------------------------------------------------------------- statistics


def _decisions(case: Case) -> Iterator[tuple[int, np.ndarray, np.ndarray | None]]:
    """Yield example, logits `[c]` and target distribution `[c]` (None if ignored) of every class decision."""
    logits, target, kwargs = case.make()
    classes = logits.shape[1]
    z = logits.movedim(1, -1).reshape(-1, classes).numpy()
    soft = target.is_floating_point()
    t = target.movedim(1, -1).reshape(-1, classes).numpy() if soft else target.reshape(-1).numpy()
    for row in range(len(z)):
        if soft:
            distribution = t[row]
        else:
            distribution = None if t[row] == kwargs.get("ignore_index", -100) else np.eye(classes)[t[row]]
        yield row * N // len(z), z[row], distribution


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("cross")])
def test_statistics_of_class_decisions(name: str) -> None:
    case = CASES[name]
    collected: dict[str, list[list[float]]] = {
        key: [[] for _ in range(N)] for key in ("loss", "margin", "probability", "el2n", "wrong")
    }
    single: dict[str, list[Any]] = {"predicted": [], "label": [], "probabilities": []}
    for n, z, distribution in _decisions(case):
        p = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
        single["predicted"].append(int(z.argmax()))
        single["probabilities"].append(p)
        single["label"].append(-1 if distribution is None else int(distribution.argmax()))
        if distribution is None:
            continue
        label = int(distribution.argmax())
        collected["loss"][n].append(-float((distribution * np.log(p)).sum()))
        collected["margin"][n].append(float(z[label] - max(np.delete(z, label))))
        collected["probability"][n].append(float(p[label]))
        collected["el2n"][n].append(float(np.sqrt(((p - distribution) ** 2).sum())))
        collected["wrong"][n].append(float(z.argmax() != label))
    statistics = case.call("mean")[0].statistics(N)
    for key, values in collected.items():
        expected = torch.tensor([np.mean(v) if v else np.nan for v in values], dtype=torch.float64)
        torch.testing.assert_close(statistics[key], expected, equal_nan=True, **EXACT)
    if len(single["label"]) > N or case.input[2:]:
        assert set(statistics) == {*collected, "worst"}
        largest = torch.tensor([max(v, default=np.nan) for v in collected["loss"]], dtype=torch.float64)
        torch.testing.assert_close(statistics["worst"], largest, equal_nan=True, **EXACT)
    else:
        assert set(statistics) == set(collected) | set(single)
        assert statistics["predicted"].tolist() == single["predicted"]
        assert statistics["label"].tolist() == single["label"]
        expected = torch.from_numpy(np.stack(single["probabilities"]))
        torch.testing.assert_close(statistics["probabilities"], expected, **EXACT)
    assert not any(value.requires_grad for value in statistics.values())


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith(("binary", "probabilities"))])
def test_statistics_of_binary_outputs(name: str) -> None:
    case = CASES[name]
    logits, target, _ = case.make()
    z, t = logits.reshape(N, -1).numpy(), target.reshape(N, -1).numpy()
    p = 1 / (1 + np.exp(-z))
    expected = {
        "loss": -(t * np.log(p) + (1 - t) * np.log(1 - p)),
        "margin": np.where(t > 0.5, z, -z) if set(np.unique(t)) <= {0, 1} else z * (2 * t - 1),
        "probability": np.where(t > 0.5, p, 1 - p),
        # The two-class probability vectors (p, 1 - p) and (t, 1 - t).
        "el2n": np.sqrt((p - t) ** 2 + ((1 - p) - (1 - t)) ** 2),
        "wrong": ((z > 0) != (t > 0.5)).astype(float),
    }
    statistics = case.call("mean")[0].statistics(N)
    for key, values in expected.items():
        torch.testing.assert_close(statistics[key], torch.from_numpy(values.mean(1)), **EXACT)
    if z.shape[1] > 1:  # several labels: no single class to suggest
        assert set(statistics) == {*expected, "worst"}
        torch.testing.assert_close(statistics["worst"], torch.from_numpy(expected["loss"].max(1)), **EXACT)
        return
    assert set(statistics) == set(expected) | {"predicted", "label", "probabilities"}
    assert statistics["predicted"].tolist() == (z[:, 0] > 0).astype(int).tolist()
    assert statistics["label"].tolist() == t[:, 0].astype(int).tolist()
    probabilities = torch.from_numpy(np.stack([1 - p[:, 0], p[:, 0]], 1))
    torch.testing.assert_close(statistics["probabilities"], probabilities, **EXACT)


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith(("squared", "residual", "likelihood"))])
def test_statistics_of_numbers(name: str) -> None:
    """Loss without the element weights, over what has one, and the distance of prediction and target."""
    case = CASES[name]
    logits, target, kwargs = case.make()
    weight = kwargs.pop("weight", None)
    counted = torch.ones_like(logits) if weight is None else (weight > 0).double()
    terms, _ = book_terms(case, logits, target, kwargs)
    prediction = logits.exp() if case.function is F.poisson_nll_loss else logits
    statistics = case.call("sum")[0].statistics(N)
    assert set(statistics) == {"loss", "el2n"}
    loss = (terms * counted).reshape(N, -1).sum(1) / counted.reshape(N, -1).sum(1)
    torch.testing.assert_close(statistics["loss"], loss, **EXACT)
    distance = ((prediction - target) * counted).reshape(N, -1).norm(dim=1)
    torch.testing.assert_close(statistics["el2n"], distance, **EXACT)
    assert not any(value.requires_grad for value in statistics.values())


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("divergence")])
def test_statistics_of_divergences(name: str) -> None:
    case = CASES[name]
    logits, target, kwargs = case.make()
    terms, _ = book_terms(case, logits, target, kwargs)
    t = target.exp() if kwargs.get("log_target") else target
    t, z, own = (value.movedim(case.class_dim, -1).reshape(N, -1, 4) for value in (t, logits, terms))
    p, label = z.softmax(-1), t.argmax(-1)
    log_p = z.log_softmax(-1)
    others = log_p.scatter(-1, label.unsqueeze(-1), -math.inf).amax(-1)
    expected = {
        "loss": own.sum(-1),
        "margin": log_p.gather(-1, label.unsqueeze(-1)).squeeze(-1) - others,
        "probability": p.gather(-1, label.unsqueeze(-1)).squeeze(-1),
        "el2n": (p - t).norm(dim=-1),
        "wrong": (z.argmax(-1) != label).double(),
    }
    statistics = case.call("sum")[0].statistics(N)
    for key, values in expected.items():
        torch.testing.assert_close(statistics[key], values.mean(1), **EXACT)
    single = z.shape[1] == 1
    assert set(statistics) == set(expected) | ({"predicted", "label", "probabilities"} if single else {"worst"})
    if not single:
        torch.testing.assert_close(statistics["worst"], expected["loss"].amax(1), **EXACT)
    if single:
        assert statistics["label"].tolist() == label[:, 0].tolist()
        torch.testing.assert_close(statistics["probabilities"], p[:, 0], **EXACT)


@pytest.mark.parametrize("function", [F.cross_entropy, F.nll_loss])
def test_an_impossible_class_leaves_the_loss_finite(function: Callable[..., Tensor]) -> None:
    """Logits masked with -inf (classes that can't be): torch's loss is finite, so the example's must be."""
    logits = torch.tensor([[1.0, 2.0, -torch.inf], [0.5, -torch.inf, 0.0]])
    values = logits.log_softmax(1) if function is F.nll_loss else logits
    target = torch.tensor([0, 2])
    call = read_call(function, (values, target), {}, function(values, target))
    assert call is not None
    expected = function(values, target, reduction="none")
    assert bool(expected.isfinite().all())
    statistics = call.statistics(2)
    torch.testing.assert_close(statistics["loss"], expected)
    torch.testing.assert_close(statistics["margin"], torch.tensor([-1.0, -0.5]))
    noise = torch.tensor([[0.99], [0.01]], dtype=torch.float64)
    assert bool(call.sampled(torch.ones(()), noise)[0][1].isfinite().all())
    assert all(bool(column.isfinite().all()) for ((_, column),) in call.exact(torch.ones(()), len(call.input)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_statistics_of_half_precision_logits_are_computed_in_float32(dtype: torch.dtype) -> None:
    logits = torch.tensor([[9.0, 0.0], [0.0, 7.0]], dtype=dtype)
    call = read_call(F.cross_entropy, (logits, torch.tensor([0, 1])), {}, torch.zeros((), dtype=dtype))
    assert call is not None
    statistics = call.statistics(2)
    expected = F.cross_entropy(logits.float(), torch.tensor([0, 1]), reduction="none")
    assert float(expected[0]) < 2e-4
    torch.testing.assert_close(statistics["loss"], expected, rtol=1e-5, atol=0)
    assert {statistics[key].dtype for key in ("loss", "margin", "el2n", "probabilities")} == {torch.float32}


# ------------------------------------------------------------------------------------------------- reading calls


@pytest.mark.filterwarnings("ignore:size_average and reduce args")
@pytest.mark.filterwarnings("ignore:reduction")
@pytest.mark.parametrize(
    "function",
    [
        F.cross_entropy,
        F.nll_loss,
        F.binary_cross_entropy_with_logits,
        F.binary_cross_entropy,
        F.mse_loss,
        F.l1_loss,
        F.smooth_l1_loss,
        F.poisson_nll_loss,
        F.kl_div,
    ],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize("size_average", [None, True, False])
@pytest.mark.parametrize("reduce", [None, True, False])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_deprecated_arguments_mean_what_torch_takes_them_for(
    function: Callable[..., Tensor], size_average: bool | None, reduce: bool | None, reduction: str
) -> None:
    logits = torch.randn(N, 4, dtype=torch.float64).log_softmax(1)
    logits = logits.exp() if function is F.binary_cross_entropy else logits
    hard = function in (F.cross_entropy, F.nll_loss)
    target = _classes(N)() if hard else _bits(N, 4)()
    kwargs = {"size_average": size_average, "reduce": reduce, "reduction": reduction}
    output = function(logits, target, **kwargs)
    call = read_call(function, (logits, target), kwargs, output)
    assert call is not None
    reduce_elements: dict[str, Callable[[Tensor], Tensor]] = {
        "mean": torch.mean,
        "sum": torch.sum,
        "none": torch.clone,
    }
    torch.testing.assert_close(reduce_elements[call.reduction](call.elements()), output, **EXACT)


def test_positional_and_keyword_arguments_are_the_same_call() -> None:
    logits, target = torch.randn(N, 4, dtype=torch.float64), _classes(N, ignored=1)()
    out = torch.zeros(())
    calls = [
        read_call(F.cross_entropy, (logits, target, WEIGHT, None, 1, None, "sum", 0.1), {}, out),
        read_call(
            F.cross_entropy,
            (),
            {
                "label_smoothing": 0.1,
                "reduction": "sum",
                "ignore_index": 1,
                "weight": WEIGHT,
                "target": target,
                "input": logits,
            },
            out,
        ),
    ]
    for call in calls:
        assert isinstance(call, CrossEntropy)
        assert call.input is logits
        assert call.target is target
        assert call.class_weights is WEIGHT
        assert (call.ignore_index, call.reduction, call.label_smoothing) == (1, "sum", 0.1)
        assert not call.log_probabilities
    call = read_call(F.nll_loss, (logits, target, WEIGHT, None, 1), {"reduction": "none"}, out)
    assert isinstance(call, CrossEntropy)
    assert (call.ignore_index, call.reduction, call.label_smoothing) == (1, "none", 0.0)
    assert call.log_probabilities
    bits, by_element = _bits(N, 4)(), _numbers(N, 4)()
    call = read_call(F.binary_cross_entropy_with_logits, (logits, bits, by_element), {"pos_weight": WEIGHT}, out)
    assert isinstance(call, BinaryCrossEntropy)
    assert call.element_weights is by_element
    assert call.pos_weight is WEIGHT
    assert isinstance(read_call(F.mse_loss, (logits, bits), {}, out), SquaredError)


def test_what_is_not_understood_is_not_read() -> None:
    out = torch.zeros(())
    # [N, 1] against [N] broadcasts to [N, N]: every example would depend on every target.
    for function in (F.mse_loss, F.l1_loss, F.huber_loss, F.smooth_l1_loss, F.poisson_nll_loss):
        assert read_call(function, (torch.zeros(N, 1), torch.zeros(N)), {}, out) is None
        assert read_call(function, (torch.zeros(N), torch.zeros(N, 1)), {}, out) is None
        assert read_call(function, (torch.zeros(()), torch.zeros(N)), {}, out) is None
    assert read_call(F.gaussian_nll_loss, (torch.zeros(N, 1), torch.zeros(N), torch.ones(N, 1)), {}, out) is None
    variance_of_batch = torch.ones(1, 3)
    assert read_call(F.gaussian_nll_loss, (torch.zeros(N, 3), torch.zeros(N, 3), variance_of_batch), {}, out) is None
    # Logits instead of log-probabilities: no distribution, so no pseudo-labels.
    assert read_call(F.kl_div, (torch.randn(N, 3), torch.rand(N, 3)), {}, out) is None
    assert known_loss(F.cross_entropy)
    assert not known_loss(F.soft_margin_loss)
    assert not known_loss(torch.add)
    assert known_losses().startswith("F.binary_cross_entropy, F.binary_cross_entropy_with_logits, F.cross_entropy")


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("function", [F.mse_loss, F.l1_loss, F.huber_loss, F.smooth_l1_loss])
@pytest.mark.parametrize(
    ("prediction", "target"),
    [((N, 3), ()), ((N, 3), (3,)), ((N, 3), (1, 3)), ((N, 3), (N, 1)), ((N, 1), (N, 3)), ((N, 1, 2), (N, 3, 2))],
)
def test_broadcasting_that_keeps_examples_apart(
    function: Callable[..., Tensor], prediction: tuple[int, ...], target: tuple[int, ...], reduction: str
) -> None:
    z = torch.randn(prediction, generator=_generator(), dtype=torch.float64, requires_grad=True)
    t = torch.rand(target, generator=_generator(), dtype=torch.float64)
    output = function(z, t, reduction=reduction)
    call = read_call(function, (z, t), {"reduction": reduction}, output)
    assert call is not None
    coefficient = torch.ones_like(output)
    values = call.per_example(call.elements() * call.scale(coefficient, N), N)
    torch.testing.assert_close(values.mean(), output.sum(), **EXACT)
    # An example alone has the same loss: the shapes do not pair it with others.
    every = t.expand(torch.broadcast_shapes(z.shape, t.shape))
    alone = [function(z[n : n + 1], every[n : n + 1], reduction=reduction).sum() for n in range(N)]
    torch.testing.assert_close(values, torch.stack(alone) * (1 if reduction == "mean" else N), **EXACT)
    # The gradients of the broadcast prediction come back to the prediction.
    ((tensor, gradient), *_) = call.sampled(torch.ones(()), torch.full((N, *call.noise_shape(N)), 0.3).double())
    assert torch.autograd.grad(tensor, z, gradient)[0].shape == z.shape


@pytest.mark.parametrize("kind", [F.mse_loss, F.l1_loss, F.huber_loss, F.smooth_l1_loss])
@pytest.mark.parametrize("learned", ["input", "target", "both"])
def test_either_argument_may_be_the_prediction(kind: Callable[..., Tensor], learned: str) -> None:
    """`F.mse_loss(target, prediction)` is as common; two predictions (consistency losses) move against each other."""
    a, b = torch.randn(2, N, 3, generator=_generator(), dtype=torch.float64)
    a.requires_grad_(learned != "target")
    b.requires_grad_(learned != "input")
    call = read_call(kind, (a, b), {}, kind(a, b))
    assert call is not None
    assert call.in_graph
    noise = torch.rand(N, *call.noise_shape(N), generator=_generator(), dtype=torch.float64)
    starts = [call.sampled(torch.ones(()), noise), *call.exact(torch.ones(()), N)]
    for (first, gradient), (second, opposite) in starts:
        assert first is call.input
        assert second is call.target
        assert torch.equal(gradient, -opposite)
    assert len(starts) == 1 + 3


@pytest.mark.parametrize(
    ("shape", "own"), [((N, 3), (N, 3)), ((N, 3), (N, 1)), ((N, 3), (N,)), ((2 * N, 2), (2 * N, 2))]
)
@pytest.mark.parametrize("learned", ["both", "mean", "variance"])
def test_a_learned_variance_has_fisher_information_of_its_own(
    shape: tuple[int, ...], own: tuple[int, ...], learned: str
) -> None:
    """The loss is quadratic in the target, so the mean Hessian over targets is that of the two at one deviation."""
    mean = torch.randn(shape, generator=_generator(), dtype=torch.float64)
    log_variance = torch.randn(own, generator=_generator(3), dtype=torch.float64)
    size, rows = (math.prod(shape) // N, math.prod(own) // N)

    def own_losses(parameters: Tensor, target: Tensor) -> Tensor:
        m, v = parameters[:, :size].reshape(shape), parameters[:, size:].reshape(own).exp()
        terms = F.gaussian_nll_loss(m, target, v, reduction="none")
        return terms.reshape(N, -1).sum(1) * (N * COEFFICIENT / math.prod(shape))

    parameters = torch.cat([mean.reshape(N, -1), log_variance.reshape(N, -1)], 1)
    deviation = log_variance.exp().sqrt().reshape(own if len(own) == len(shape) else (*own, 1)).expand(shape)
    expected = torch.zeros(N, size + rows, size + rows, dtype=torch.float64)
    for target in (mean + deviation, mean - deviation):
        whole = torch.autograd.functional.hessian(lambda p, t=target: own_losses(p, t).sum(), parameters)
        expected += torch.stack([whole[n, :, n] for n in range(N)]) / 2
    kept = {"both": slice(None), "mean": slice(size), "variance": slice(size, None)}[learned]
    expected = expected[:, kept, kept]

    mean.requires_grad_(learned != "variance")
    log_variance.requires_grad_(learned != "mean")
    output = F.gaussian_nll_loss(mean, mean.detach() + 1, log_variance.exp())
    call = read_call(F.gaussian_nll_loss, (mean, mean.detach() + 1, log_variance.exp()), {}, output)
    assert isinstance(call, NormalLikelihood)
    leaves = [leaf for leaf in (mean, log_variance) if leaf.requires_grad]

    def at_leaves(pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
        tensors, gradients = zip(*[pair for pair in pairs if pair[0].requires_grad], strict=True)
        found = torch.autograd.grad(
            tensors, leaves, gradients, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return torch.cat([g.reshape(N, -1) for g in found], 1)

    scale = call.scale(torch.tensor(COEFFICIENT, dtype=torch.float64), N)
    columns = [at_leaves(pairs) for pairs in call.exact(scale, N)]
    assert len(columns) == call.exact_draws(N)
    torch.testing.assert_close(sum(torch.einsum("ni,nj->nij", c, c) for c in columns), expected, **EXACT)
    generator = np.random.default_rng(0)
    draws = 4000
    samples = torch.stack(
        [
            at_leaves(call.sampled(scale, torch.from_numpy(generator.random((N, *call.noise_shape(N))))))
            for _ in range(draws)
        ]
    )
    products = torch.einsum("dni,dnj->dnij", samples, samples)
    error = products.std(0) / math.sqrt(draws)
    assert bool(((products.mean(0) - expected).abs() <= 6 * error + 1e-12).all())


def test_the_divergence_of_a_batch_may_be_divided_by_its_rows() -> None:
    for shape in ((N, 4), (N, 3, 4)):
        logits = torch.randn(shape, dtype=torch.float64)
        target = torch.rand(shape, dtype=torch.float64).softmax(-1)
        output = F.kl_div(logits.log_softmax(-1), target, reduction="batchmean")
        call = read_call(F.kl_div, (logits.log_softmax(-1), target), {"reduction": "batchmean"}, output)
        assert isinstance(call, Divergence)
        values = call.per_example(call.elements() * call.scale(torch.ones(()), N), N)
        torch.testing.assert_close(values.mean(), output, **EXACT)
        expected = F.kl_div(logits.log_softmax(-1), target, reduction="none").reshape(N, -1).sum(1)
        torch.testing.assert_close(values, expected, **EXACT)


def test_log_odds_of_a_divergence_are_those_of_the_likeliest_given_class() -> None:
    log_p = torch.randn(N, 4, generator=_generator(), dtype=torch.float64).log_softmax(1)
    target = torch.rand(N, 4, generator=_generator(), dtype=torch.float64).softmax(1)
    call = read_call(F.kl_div, (log_p, target), {}, torch.zeros(()))
    assert call is not None
    for positive in (None, 2):
        odds = call.log_odds(N, positive)
        p = log_p.exp()[torch.arange(N), target.argmax(1) if positive is None else positive]
        assert odds is not None
        torch.testing.assert_close(odds, (p / (1 - p)).log(), **EXACT)


def test_outliers_have_no_curvature_in_a_huber_loss() -> None:
    z, t = torch.tensor([[0.0, 5.0], [0.0, -5.0]], dtype=torch.float64), torch.full((2, 2), 0.5, dtype=torch.float64)
    noise = torch.full((2, 1, 2), 0.9, dtype=torch.float64)
    for function, inside in ((F.huber_loss, 1.0), (F.smooth_l1_loss, 1.0)):
        call = read_call(function, (z, t), {}, torch.zeros(()))
        assert call is not None
        ((_, gradient), *_) = call.sampled(torch.ones((), dtype=torch.float64), noise)
        assert gradient[:, 1].tolist() == [0.0, 0.0]
        assert gradient[:, 0].tolist() == pytest.approx([1.2815515655446 * inside] * 2)


@pytest.mark.parametrize(
    ("function", "kind"),
    [
        (F.binary_cross_entropy, BinaryProbabilities),
        (F.l1_loss, AbsoluteError),
        (F.huber_loss, HuberError),
        (F.smooth_l1_loss, SmoothAbsoluteError),
        (F.poisson_nll_loss, PoissonLikelihood),
    ],
)
def test_kinds(function: Callable[..., Tensor], kind: type) -> None:
    call = read_call(function, (torch.full((N, 2), 0.5), torch.ones(N, 2)), {}, torch.zeros(()))
    assert type(call) is kind
