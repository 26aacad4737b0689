"""Measurements against autograd on the whole set at once, attacks written by hand, and training anew."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from own_processes import together
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.data import Dataset, TensorDataset

from lightning_influence.curvature import Curvature, FactorExamples, fit
from lightning_influence.data.source import ExampleSource
from lightning_influence.gradients.discover import discover
from lightning_influence.gradients.passes import ExampleGradients
from lightning_influence.scores.examples import score_examples
from lightning_influence.scores.measurements import (
    AdversarialLoss,
    Custom,
    DemographicParityGap,
    EqualOpportunityGap,
    Loss,
    Margin,
    Measurement,
    MeasurementError,
    Statistic,
    as_measurement,
    measured_values,
    measurement_gradient,
    measurement_scores,
    measurement_value,
)
from lightning_influence.scores.pairs import pairwise_scores

N, FEATURES, CLASSES = 23, 5, 3
EXACT: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-12}


def cross_entropy(module: Any, batch: Any) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1])


def negative_log(module: Any, batch: Any) -> Tensor:
    return F.nll_loss(module(batch[0]).log_softmax(1), batch[1])


def logistic(module: Any, batch: Any) -> Tensor:
    return F.binary_cross_entropy_with_logits(module(batch[0]).squeeze(1), batch[1].double())


def sigmoid_first(module: Any, batch: Any) -> Tensor:
    return F.binary_cross_entropy(module(batch[0]).sigmoid(), batch[1].double().unsqueeze(1))


class Problem:
    """A small network, its data, and its passes in batches of any size."""

    def __init__(self, task: Any, classes: int, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.task = task
        self.net = nn.Sequential(
            nn.Linear(FEATURES, 4), nn.Tanh(), nn.Dropout(0.5), nn.Linear(4, classes if classes > 2 else 1)
        ).double()
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(N, FEATURES, generator=generator, dtype=torch.float64)
        self.y = torch.randint(classes, (N,), generator=generator)
        self.s = torch.randint(2, (N,), generator=generator)
        self.x[:, 0] += self.s  # without it, the groups would hardly differ

    def passes(self, batch_size: int = 6, data: Dataset[Any] | None = None, task: Any = None) -> ExampleGradients:
        source = ExampleSource(data or TensorDataset(self.x, self.y), batch_size=batch_size)
        task = task or self.task
        return ExampleGradients(self.net, task, source, discover(self.net, task, source))

    def logits(self, rows: Any = slice(None)) -> Tensor:
        """By the model in eval mode, as logits of several classes: of two, the first has the logit 0."""
        self.net.eval()
        outputs = self.net(self.x[rows])
        self.net.train()
        return outputs if outputs.shape[1] > 1 else torch.cat([torch.zeros_like(outputs), outputs], 1)

    def gradient(self, value: Tensor) -> dict[str, Tensor]:
        """Plain autograd, by block: weight, then bias."""
        found = torch.autograd.grad(value, list(self.net.parameters()), allow_unused=True, retain_graph=True)
        w0, b0, w1, b1 = (
            torch.zeros_like(p) if g is None else g for g, p in zip(found, self.net.parameters(), strict=True)
        )
        return {"0": torch.cat([w0, b0[:, None]], 1)[None], "3": torch.cat([w1, b1[:, None]], 1)[None]}


def multi() -> Problem:
    return Problem(cross_entropy, CLASSES)


def binary() -> Problem:
    return Problem(logistic, 2)


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "cross-entropy": multi,
    "nll": lambda: Problem(negative_log, CLASSES),
    "binary": binary,
    "probabilities": lambda: Problem(sigmoid_first, 2),
}


def close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, **EXACT)


# ------------------------------------------------------------------------------------------------------- by example


@pytest.mark.parametrize("kind", PROBLEMS)
@pytest.mark.parametrize("batch_size", [2, N])
def test_loss_and_margin_are_means_over_the_set(kind: str, batch_size: int) -> None:
    problem = PROBLEMS[kind]()
    chosen = [3, 0, 22, 7, 15, 9, 4]
    log_p = problem.logits(chosen).log_softmax(1)
    own = log_p.gather(1, problem.y[chosen, None]).squeeze(1)
    margins = own - (1 - own.exp()).log()
    for name, values in (("loss", -own), ("margin", margins)):
        passes = problem.passes(batch_size)
        assert measurement_value(passes, chosen, cast("Any", name)) == pytest.approx(values.mean().item(), rel=1e-9)
        close(measurement_gradient(passes, chosen, cast("Any", name)), problem.gradient(values.mean()))
        # In eval mode: the network is left in train mode, where dropout would make every call another one.
        assert problem.net.training
        torch.testing.assert_close(
            measured_values(passes, chosen, cast("Statistic", as_measurement(cast("Any", name)))), values.detach()
        )


def test_a_query_by_itself_is_measured_by_its_margin() -> None:
    """Pairs of margins: the query's gradient alone is replaced."""
    problem = multi()
    passes = problem.passes()
    curvature = fitted(passes, "ggn", 0.1)
    chosen = [4, 1, 20]
    found = pairwise_scores(passes, range(N), curvature, passes.measuring(Margin()), chosen)
    for row, query in enumerate(chosen):
        alone = measurement_scores(passes, range(N), curvature, passes, [query], "margin")
        torch.testing.assert_close(found.scores[row], alone.scores, **EXACT)
    plain = pairwise_scores(passes, range(N), curvature, passes, chosen)
    # Training that lowers the loss of a query raises its margin.
    correlation = torch.corrcoef(torch.stack([found.scores.flatten(), plain.scores.flatten()]))[0, 1]
    assert correlation < -0.8


def test_ignored_labels_have_no_margin() -> None:
    problem = multi()
    problem.y[[2, 5]] = -100
    passes = problem.passes()
    kept = [n for n in range(N) if n not in (2, 5)]
    log_p = problem.logits(kept).log_softmax(1).gather(1, problem.y[kept, None]).squeeze(1)
    expected = (log_p - (1 - log_p.exp()).log()).mean()
    measured = Margin().measure([(passes, range(N))])
    assert (measured.value, measured.left_out) == (pytest.approx(float(expected)), 2)
    close(measured.gradient, problem.gradient(expected))


def test_examples_that_are_not_finite_are_left_out_and_counted() -> None:
    problem = multi()
    problem.x[4, 1] = torch.nan
    kept = [n for n in range(N) if n != 4]
    gap = DemographicParityGap(problem.s)
    p = problem.logits(kept).softmax(1)[:, 1]
    s = problem.s[kept]
    expected = (p[s == 1].mean() - p[s == 0].mean()).abs()
    measured = gap.measure([(problem.passes(), range(N))])
    assert measured.left_out == 1
    assert sum(measured.counts.values()) == N - 1
    assert measured.value == pytest.approx(float(expected), rel=1e-9)
    close(measured.gradient, problem.gradient(expected))


# ----------------------------------------------------------------------------------------------------------- attacks


def attacked(problem: Problem, epsilon: float, steps: int, step: float, bounds: tuple[float, float] | None) -> Tensor:
    """An attack on one example after the other, with autograd through the model in eval mode."""
    problem.net.eval()
    rows = []
    for x, y in zip(problem.x, problem.y, strict=True):
        changed = x.clone()
        for _ in range(steps):
            leaf = changed.clone().requires_grad_(True)
            (slope,) = torch.autograd.grad(problem.task(problem.net, (leaf[None], y[None])), leaf)
            changed = torch.clamp(changed + step * slope.sign(), x - epsilon, x + epsilon)
            if bounds is not None:
                changed = changed.clamp(*bounds)
        rows.append(changed)
    problem.net.train()
    return torch.stack(rows)


@pytest.mark.parametrize("kind", ["cross-entropy", "binary"])
@pytest.mark.parametrize("batch_size", [1, 6])
def test_adversarial_loss_is_that_of_an_attack_by_hand(kind: str, batch_size: int) -> None:

    for measurement, arguments in (
        (AdversarialLoss.fgsm(0.3), (0.3, 1, 0.3, None)),
        (AdversarialLoss.fgsm(0.3, bounds=(-0.5, 0.5)), (0.3, 1, 0.3, (-0.5, 0.5))),
        (AdversarialLoss.pgd(0.3, 5), (0.3, 5, 0.15, None)),
    ):
        problem = PROBLEMS[kind]()
        passes = problem.passes(batch_size)
        clean = measurement_value(passes, range(N), "loss")
        found = measurement_value(passes, range(N), measurement)
        gradient = measurement_gradient(passes, range(N), measurement)
        problem.x = attacked(problem, *arguments)
        log_p = problem.logits().log_softmax(1).gather(1, problem.y[:, None]).squeeze(1)
        assert found == pytest.approx(float(-log_p.mean()), rel=1e-9)
        assert measurement.bounds is not None or found > clean + 0.02
        close(gradient, problem.gradient(-log_p.mean()))


def test_more_steps_find_worse_inputs() -> None:
    """FGSM's step along the sign is right only for a linear model."""
    problem = multi()
    with torch.no_grad():
        problem.net[0].weight *= 4
    values = [measurement_value(problem.passes(), range(N), AdversarialLoss.pgd(0.5, steps)) for steps in (1, 2, 20)]
    assert values[0] < values[-1]


@pytest.mark.parametrize("container", ["dict", "named", "list"])
def test_the_attack_finds_its_input_in_any_batch(container: str) -> None:
    problem = multi()
    batch_type = namedtuple("Batch", ["y", "x"])  # noqa: PYI024

    class Wrapped(Dataset[Any]):
        def __len__(self) -> int:
            return N

        def __getitem__(self, index: int) -> Any:
            x, y = problem.x[index], problem.y[index]
            return {"y": y, "in": {"x": x}} if container == "dict" else batch_type(y, x) if container == "named" else [
                y, x
            ]  # fmt: skip

    def task(module: Any, batch: Any) -> Tensor:
        x = batch["in"]["x"] if container == "dict" else batch[1]
        y = batch["y"] if container == "dict" else batch[0]
        return F.cross_entropy(module(x), y)

    expected = measurement_value(problem.passes(), range(N), AdversarialLoss.fgsm(0.2))
    found = measurement_value(problem.passes(data=Wrapped(), task=task), range(N), AdversarialLoss.fgsm(0.2))
    assert found == pytest.approx(expected, rel=1e-9)


def test_inputs_that_cannot_be_attacked() -> None:
    problem = multi()
    weights = torch.ones(N, dtype=torch.float64)

    def task(module: Any, batch: Any) -> Tensor:
        return F.cross_entropy(module(batch[1]), batch[2])

    passes = problem.passes(data=TensorDataset(weights, problem.x, problem.y), task=task)
    with pytest.raises(MeasurementError, match=r"does not depend on the tensor of shape \[6\].*`inputs=`"):
        measurement_value(passes, range(N), AdversarialLoss.fgsm(0.2))
    named = AdversarialLoss.fgsm(0.2, inputs=lambda batch: batch[1])
    expected = measurement_value(problem.passes(), range(N), AdversarialLoss.fgsm(0.2))
    assert measurement_value(passes, range(N), named) == pytest.approx(expected, rel=1e-9)
    copied = AdversarialLoss.fgsm(0.2, inputs=lambda batch: batch[1].clone())
    with pytest.raises(MeasurementError, match="found no tensor to attack in a batch of type"):
        measurement_value(passes, range(N), copied)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"epsilon": 0.0}, "epsilon=0.0; expected a finite number > 0"),
        ({"epsilon": float("nan")}, "epsilon=nan"),
        ({"epsilon": 0.1, "steps": 0}, "steps=0; expected an integer >= 1"),
    ],
)
def test_attacks_out_of_range(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdversarialLoss(**arguments)


# -------------------------------------------------------------------------------------------------------------- gaps


def gap_of(problem: Problem, rows: list[int], positive: int, among: int | None = None) -> Tensor:
    p = problem.logits(rows).softmax(1)[:, positive]
    s, y = problem.s[rows], problem.y[rows]
    inside = torch.ones_like(s, dtype=torch.bool) if among is None else y == among
    return (p[inside & (s == 1)].mean() - p[inside & (s == 0)].mean()).abs()


@pytest.mark.parametrize("kind", PROBLEMS)
@pytest.mark.parametrize("batch_size", [6, N])
def test_gaps_of_the_whole_set_come_from_any_batches(kind: str, batch_size: int) -> None:
    """A mean of the gaps of batches is another number: with batches of six, a third too large here and more."""
    problem = PROBLEMS[kind]()
    data = TensorDataset(problem.x, problem.y, problem.s)
    group = problem.s
    rows = [n for n in range(N - 1, 0, -1)]
    passes = problem.passes(batch_size, data)
    positives = (1, 2) if kind in ("cross-entropy", "nll") else (1, 0)
    for positive in positives:
        for gap, among in (
            (DemographicParityGap(group, positive), None),
            (EqualOpportunityGap(group, positive), positive),
        ):
            expected = gap_of(problem, rows, positive, among)
            assert measurement_value(passes, rows, gap) == pytest.approx(float(expected), rel=1e-9)
            close(measurement_gradient(passes, rows, gap), problem.gradient(expected))


class Tokens(nn.Module):
    """One-hot rows, dense ones of the same parameter, a norm, and a packed recurrent layer, left to autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm, self.cell = nn.Embedding(7, 4), nn.LayerNorm(4), nn.GRU(4, 4, batch_first=True)
        self.head = nn.Linear(4, 7)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        lengths = torch.full((len(ids),), ids.shape[1])
        _, last = self.cell(pack_padded_sequence(self.norm(self.table(ids)), lengths, batch_first=True))
        output: Tensor = self.head(last[0])[:, :CLASSES]
        return output


def test_groups_are_told_apart_in_rows_of_every_kind() -> None:
    torch.manual_seed(2)
    net = Tokens().double()
    ids, y, s = torch.randint(7, (N, 5)), torch.randint(CLASSES, (N,)), torch.randint(2, (N,))
    source = ExampleSource(TensorDataset(ids, y), batch_size=4)
    coverage = discover(net, cross_entropy, source, uncovered="exact")
    assert coverage.one_by_one
    assert coverage.share == 1
    passes = ExampleGradients(net, cross_entropy, source, coverage)
    found = measurement_gradient(passes, range(N), EqualOpportunityGap(s))
    p = net(ids).softmax(1)[:, 1]
    gap = (p[(s == 1) & (y == 1)].mean() - p[(s == 0) & (y == 1)].mean()).abs()
    own = dict(net.named_parameters())
    expected = dict(zip(own, torch.autograd.grad(gap, list(own.values())), strict=True))
    for name, block in coverage.blocks.items():
        for parameter, value in block.to_parameters(found[name]).items():
            torch.testing.assert_close(value, expected.pop(parameter), **EXACT)
    assert not expected


def test_the_sign_of_a_gap_is_put_back() -> None:
    """Whichever group is ahead: swapped names of the groups give the same gap and the same gradient."""
    problem = multi()
    passes = problem.passes()
    one = DemographicParityGap(problem.s).measure([(passes, range(N))])
    other = DemographicParityGap(1 - problem.s).measure([(passes, range(N))])
    assert one.value == pytest.approx(other.value)
    assert one.value > 0
    close(one.gradient, other.gradient)
    step = {name: value / sum(float(v.square().sum()) for v in one.gradient.values()) for name, value in
            one.gradient.items()}  # fmt: skip
    with torch.no_grad():  # a step down the gradient makes it smaller by as much as the gradient says
        size = one.value / 100
        for block, (weight, bias) in {"0": problem.net[0].parameters(), "3": problem.net[3].parameters()}.items():
            weight -= size * step[block][0, :, :-1]
            bias -= size * step[block][0, :, -1]
    assert measurement_value(passes, range(N), DemographicParityGap(problem.s)) == pytest.approx(
        0.99 * one.value, rel=1e-3
    )


def test_a_gap_of_nothing_has_a_gradient() -> None:
    """At 0, the slope of the absolute value would be 0."""
    means = torch.tensor([0.5, 0.5], requires_grad=True)
    (slopes,) = torch.autograd.grad(DemographicParityGap([0, 1]).combined(means), means)
    assert slopes.tolist() == [-1, 1]


def test_examples_in_neither_group() -> None:
    problem = multi()
    group = problem.s.clone()
    group[[0, 7, 9]] = -1
    rows = [n for n in range(N) if n not in (0, 7, 9)]
    found = measurement_value(problem.passes(), range(N), DemographicParityGap(group))
    assert found == pytest.approx(float(gap_of(problem, rows, 1)), rel=1e-9)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: DemographicParityGap(torch.ones(N)), r"no example of the query set is in the group 's=0' \(s=0: 0, "
                                                        rf"s=1: {N}\)"),
        (lambda p: DemographicParityGap(torch.zeros(N)), rf"group 's=1' \(s=0: {N}, s=1: 0"),
        (lambda p: EqualOpportunityGap((p.y == 1).long()), r"group 's=0, y=1' \(s=0, y=1: 0, s=1, y=1: \d+\)"),
        (lambda p: DemographicParityGap(p.s[:5]), rf"`group` has the shape \[5\]; expected \[{N}\]"),
        (lambda p: DemographicParityGap(p.y), r"`group` holds \[2\]; expected 0 and 1"),
        (lambda p: DemographicParityGap(p.s, positive=3), "there is no class 3 among 3; expected 0 to 2"),
    ],
)  # fmt: skip
def test_groups_that_are_empty_or_wrong(make: Any, message: str) -> None:
    problem = multi()
    with pytest.raises(MeasurementError, match=message):
        measurement_gradient(problem.passes(), range(N), make(problem))


def test_classes_of_a_yes_or_no_decision() -> None:
    problem = binary()
    with pytest.raises(MeasurementError, match="no class 2 in a loss of yes-or-no decisions; expected 0 or 1"):
        measurement_value(problem.passes(), range(N), DemographicParityGap(problem.s, positive=2))


def test_losses_that_show_no_class_decision() -> None:
    problem = Problem(lambda module, batch: F.mse_loss(module(batch[0])[:, 0], batch[1].double()), CLASSES)
    for measurement in (Margin(), DemographicParityGap(problem.s)):
        with pytest.raises(MeasurementError, match="needs one class decision for each example.*Pass a function"):
            measurement_value(problem.passes(), range(N), measurement)


# ------------------------------------------------------------------------------------------------------ user's own


def spread(module: Any, batch: Any) -> Tensor:
    """No mean over examples: the standard deviation of a prediction over the set."""
    return module(batch[0])[:, 0].softmax(0).std()


def mean_entropy(module: Any, batch: Any) -> Tensor:
    p = module(batch[0]).softmax(1)
    return -(p * p.log()).sum(1).mean()


@pytest.mark.parametrize("batch_size", [4, N])
def test_a_function_gets_the_whole_set(batch_size: int) -> None:
    problem = multi()
    rows = [5, 1, 17, 20, 3, 9, 11]
    expected = problem.logits(rows)[:, 0].softmax(0).std()
    passes = problem.passes(batch_size)
    assert measurement_value(passes, rows, spread) == pytest.approx(float(expected), rel=1e-9)
    close(measurement_gradient(passes, rows, spread), problem.gradient(expected))
    p = problem.logits(rows).softmax(1)
    expected = -(p * p.log()).sum(1).mean()
    measurement = Custom(mean_entropy)
    assert measurement.name == "mean_entropy"
    close(measurement_gradient(passes, rows, measurement), problem.gradient(expected))
    assert problem.net.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in problem.net.parameters())


def test_several_sets_are_one() -> None:
    problem = multi()
    sets = [(problem.passes(4), [1, 5, 8]), (problem.passes(7), [0, 2, 3, 4, 20])]
    rows = [1, 5, 8, 0, 2, 3, 4, 20]
    curvature = fitted(problem.passes(), "identity", 0.0)
    for measurement in ("loss", DemographicParityGap(problem.s), Custom(mean_entropy)):
        one = measurement_scores(
            problem.passes(), range(N), curvature, problem.passes(), rows, cast("Any", measurement)
        )
        two = measurement_scores(problem.passes(), range(N), curvature, sets, measurement=cast("Any", measurement))
        assert one.measured.value == pytest.approx(two.measured.value, rel=1e-9)
        torch.testing.assert_close(one.scores, two.scores, **EXACT)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            lambda module, batch: module(batch[0]).sum(1),
            r"returned the shape \[23\]; expected a tensor with one number",
        ),
        (lambda module, batch: float(module(batch[0]).mean()), "returned type float; expected a tensor.*`.item\\(\\)`"),
        (lambda module, batch: batch[0].mean(), "does not depend on the covered parameters.*no gradient"),
        (lambda module, batch: module(batch[0]).argmax(1).double().mean(), "does not depend on the covered"),
        (lambda module, batch: module(batch[0]).mean() * 0, r"does not depend.*\(0, 3\).*exactly zero"),
        (lambda module, batch: module(batch[0]).mean() / 0, "is (-?inf); expected a finite number"),
        (lambda module, batch: (module(batch[0]) * 0).norm(), "gradient is (not finite|exactly zero)"),
    ],
)
def test_functions_that_measure_nothing(function: Any, message: str) -> None:
    with pytest.raises(MeasurementError, match=message):
        measurement_gradient(multi().passes(), range(N), function)


@pytest.mark.parametrize("measurement", ["gap", 3, Loss])
def test_what_is_no_measurement(measurement: Any) -> None:
    with pytest.raises(ValueError, match="expected 'loss' or 'margin', an instance"):
        as_measurement(measurement)


def test_no_query_to_measure() -> None:
    with pytest.raises(MeasurementError, match="there is no query to measure"):
        measurement_value(multi().passes(), [], "loss")


def test_single_losses_that_are_not_known() -> None:
    problem = Problem(lambda module, batch: module(batch[0]).square().mean(), CLASSES)
    passes = problem.passes()
    outputs = problem.logits()
    assert measurement_value(passes, range(N), "loss") == pytest.approx(float(outputs.square().mean()), rel=1e-9)
    close(measurement_gradient(passes, range(N), "loss"), problem.gradient(outputs.square().mean()))
    with pytest.raises(MeasurementError, match="the loss of single examples is not known.*one loss per example"):
        measured_values(passes, range(N), Loss())


# --------------------------------------------------------------------------------- influence on what is measured


def fitted(passes: ExampleGradients, name: Any, damping: float) -> Curvature:
    n = len(passes.source)
    return fit(passes, name, range(n), examples=FactorExamples(n, n, n), labels=("exact", "exact"), damping=damping)


DECAY = 0.02


def trained(x: Tensor, y: Tensor, start: nn.Module | None = None) -> nn.Linear:
    """Logistic regression at the minimum of the mean loss and an L2 term."""
    net = nn.Linear(x.shape[1], 1).double()
    with torch.no_grad():
        for p, q in zip(net.parameters(), start.parameters() if start else net.parameters(), strict=True):
            p.copy_(q if start else torch.zeros_like(p))
    for _ in range(12 if start is None else 6):
        with torch.no_grad():
            ones = torch.cat([x, torch.ones(len(x), 1).double()], 1)
            theta = torch.cat([net.weight[0], net.bias])
            p = (ones @ theta).sigmoid()
            slope = ones.T @ (p - y) / len(x) + DECAY * theta
            matrix = ones.T @ (ones * (p * (1 - p))[:, None]) / len(x) + DECAY * torch.eye(len(theta)).double()
            theta = theta - torch.linalg.solve(matrix, slope)
            net.weight.copy_(theta[None, :-1])
            net.bias.copy_(theta[-1:])
    return net


@pytest.mark.parametrize(
    "kind", ["loss", "margin", "fgsm", "pgd", "demographic_parity_gap", "equal_opportunity_gap", "custom"]
)
def test_scores_predict_what_training_without_an_example_does(kind: str) -> None:
    """To first order exact: correlation .99 and slope 1 with leave-one-out; the identity stays below .8."""
    generator = torch.Generator().manual_seed(3)
    n, q = 120, 80
    # Features of very different scales: where the identity is no stand-in for the curvature.
    scales = torch.tensor([3.0, 1.0, 0.3, 0.1, 1.0]).double()
    x = torch.randn(n + q, 5, generator=generator, dtype=torch.float64) * scales
    s = (x[:, 4] > 0).long()
    y = (x[:, 0] / 3 + x[:, 1] + 5 * x[:, 3] + torch.randn(n + q, generator=generator).double() > 0).double()
    measurement: Measurement = {
        "loss": Loss(),
        "margin": Margin(),
        "fgsm": AdversarialLoss.fgsm(0.1),
        "pgd": AdversarialLoss.pgd(0.1, 5),
        "demographic_parity_gap": DemographicParityGap(s[n:]),
        "equal_opportunity_gap": EqualOpportunityGap(s[n:]),
        "custom": Custom(lambda module, batch: module(batch[0]).sigmoid().std()),
    }[kind]

    def passes(net: nn.Module, rows: slice) -> ExampleGradients:
        source = ExampleSource(TensorDataset(x[rows], y[rows]), batch_size=32)

        def task(module: Any, batch: Any) -> Tensor:
            return F.binary_cross_entropy_with_logits(module(batch[0]).squeeze(1), batch[1])

        return ExampleGradients(net, task, source, discover(net, task, source))

    net = trained(x[:n], y[:n])
    train, queries = passes(net, slice(0, n)), passes(net, slice(n, n + q))
    scores = {
        name: measurement_scores(train, range(n), fitted(train, name, DECAY), queries, range(q), measurement)
        for name in ("ggn", "identity")
    }
    before = scores["ggn"].measured.value
    assert measurement_value(queries, range(q), measurement) == pytest.approx(before, rel=1e-9)
    query = fitted(train, "ggn", DECAY).solve(measurement_gradient(queries, range(q), measurement))
    harm = score_examples(train, range(n), query=query).columns["harm"]
    torch.testing.assert_close(scores["ggn"].scores, -harm, **EXACT)

    chosen = range(0, n, 6)
    changes = []
    for left in chosen:
        kept = [row for row in range(n) if row != left]
        without = trained(x[kept], y[kept], net)
        changes.append(measurement_value(passes(without, slice(n, n + q)), range(q), measurement) - before)
    truth = torch.tensor(changes, dtype=torch.float64)
    predicted = {name: found.scores[list(chosen)] / n for name, found in scores.items()}
    pearson = {name: float(torch.corrcoef(torch.stack([value, truth]))[0, 1]) for name, value in predicted.items()}
    slope = float(predicted["ggn"] @ truth / predicted["ggn"].square().sum())
    assert pearson["ggn"] > 0.99
    assert slope == pytest.approx(1, abs=0.15), "removing an example changes the measurement by + score / N"
    assert pearson["identity"] < 0.9


# ------------------------------------------------------------------------------------------------- several processes


def everything() -> list[Tensor]:
    problem = multi()
    passes = problem.passes(4, TensorDataset(problem.x, problem.y, problem.s))
    found: list[Tensor] = []
    for measurement in (
        Loss(), Margin(), AdversarialLoss.pgd(0.2, 3), DemographicParityGap(problem.s),
        EqualOpportunityGap(problem.s), Custom(spread),
    ):  # fmt: skip
        measured = measurement.measure([(passes, range(N))])
        found += [torch.tensor(measured.value), *measured.gradient.values()]
    return [*found, measured_values(passes, [5, 2, 8], Margin())]


def _two_processes(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    try:
        torch.save(everything(), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_two_processes_measure_what_one_does(tmp_path: Path) -> None:
    together(_two_processes, str(tmp_path))
    for rank in range(2):
        for found, expected in zip(torch.load(tmp_path / f"{rank}.pt"), everything(), strict=True):
            torch.testing.assert_close(found, expected, **EXACT)
