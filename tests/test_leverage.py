"""Scores divided by one minus the leverage: what leaving an example out really does, where that is known exactly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_influence import Influence
from lightning_influence.objective.task import run_tapped
from lightning_influence.objective.terms import TaskError, understand
from lightning_influence.scores.leverage import curvature_along_gradients, inverse_rest

N, Q, RIDGE = 9, 4, 0.02
EXACT: dict[str, Any] = {"rtol": 1e-7, "atol": 1e-9}
Loss = Callable[[Tensor, Tensor], Tensor]


def squares(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.mse_loss(outputs, targets)


def logistic(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(outputs[:, 0], targets)


def two_classes(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets.long())


def log_probabilities(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.nll_loss(F.log_softmax(outputs, 1), targets.long())


class Fitted:
    """A linear model at the minimum of its mean loss with a ridge, and leave-one-out by one Newton step."""

    def __init__(self, loss: Loss, outputs: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.loss, x = loss, torch.randn(N + Q, 5, generator=generator).double()
        y = torch.randn(N + Q, outputs, generator=generator).double() if loss is squares else torch.arange(N + Q) % 2.0
        self.data, self.asked = TensorDataset(x[:N], y[:N]), TensorDataset(x[N:], y[N:])
        self.net = nn.Linear(5, outputs).double()
        self.start = torch.zeros(outputs * 6, dtype=torch.float64)
        everyone = torch.ones(N, dtype=torch.float64)
        for _ in range(8):
            self.start = self.start + self.newton(everyone)
        with torch.no_grad():
            self.net.weight.copy_(self.start[: outputs * 5].view(outputs, 5))
            self.net.bias.copy_(self.start[outputs * 5 :])

    def total(self, parameters: Tensor, weights: Tensor) -> Tensor:
        outputs = self.net.out_features
        weight, bias = parameters[: outputs * 5].view(outputs, 5), parameters[outputs * 5 :]
        x, y = self.data.tensors
        each = torch.stack([self.loss(x[[n]] @ weight.T + bias, y[[n]]) for n in range(N)])
        return (each * weights).sum() + N * RIDGE / 2 * parameters.square().sum()

    def newton(self, weights: Tensor) -> Tensor:
        gradient = torch.func.grad(self.total)(self.start, weights)
        return -torch.linalg.solve(torch.func.hessian(self.total)(self.start, weights), gradient)

    @property
    def left_out(self) -> Tensor:
        """``N`` times how losses of queries change to first order in the step that leaves one out, ``[q, n]``."""
        steps = torch.stack([self.newton(torch.ones(N).double().index_fill(0, torch.tensor([n]), 0)) for n in range(N)])
        x, y = self.asked.tensors
        rows = []
        for q in range(Q):
            found = torch.autograd.grad(self.loss(self.net(x[[q]]), y[[q]]), [self.net.weight, self.net.bias])
            rows.append(torch.cat([part.flatten() for part in found]))
        return N * torch.stack(rows) @ steps.T

    def influence(self) -> Influence:
        task = lambda module, batch: self.loss(module(batch[0]), batch[1])  # noqa: E731
        return Influence(self.net, task, self.data, batch_size=4)


@pytest.mark.parametrize(
    ("loss", "outputs"),
    [(squares, 1), (squares, 3), (logistic, 1), (two_classes, 2), (log_probabilities, 2)],
    ids=["one output", "three outputs", "logistic", "two classes", "log-probabilities"],
)
def test_leaving_one_out_is_exact(loss: Loss, outputs: int) -> None:
    """Of least squares it is retraining; of logistic regression one Newton step. Plain scores are off by a quarter."""
    fitted = Fitted(loss, outputs)
    influence = fitted.influence().fit("ggn", damping=RIDGE, solver="dense")
    found = influence.pairs(fitted.asked, normalise="leverage").scores
    torch.testing.assert_close(found, fitted.left_out, **EXACT)
    plain = influence.pairs(fitted.asked).scores
    assert (plain - fitted.left_out).norm() > 0.25 * fitted.left_out.norm()
    identity = fitted.influence().fit("identity", damping=RIDGE).pairs(fitted.asked, normalise="leverage").scores
    assert (identity - fitted.left_out).norm() > 0.25 * fitted.left_out.norm()
    top = influence.top(fitted.asked, k=2, normalise="leverage")
    strongest = found.sort(1, descending=True)
    torch.testing.assert_close(top.proponents, strongest.indices[:, :2])
    torch.testing.assert_close(top.proponent_scores, strongest.values[:, :2])


def pixels(outputs: Tensor, targets: Tensor) -> Tensor:
    weight = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    labels = (targets[:, 0] * 3).long().remainder(3).masked_fill(targets[:, 1] > 0.5, -100)
    return F.cross_entropy(outputs, labels, weight, ignore_index=-100, reduction="sum")


def divergence(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.kl_div(F.log_softmax(outputs.flatten(1), 1), F.softmax(targets.flatten(1), 1), reduction="batchmean")


def both(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.mse_loss(outputs, targets) + 0.5 * pixels(outputs, targets) / len(outputs)


@pytest.mark.parametrize("loss", [squares, pixels, divergence, both])
def test_curvature_along_the_gradient_equals_the_hessian(loss: Loss) -> None:
    """Also with several decisions an example, ignored ones, class weights, and two terms."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.rand(4, 3, 2, generator=generator).double()
    net = nn.Conv1d(3, 3, 1).double()
    inputs = torch.randn(4, 3, 2, generator=generator).double()

    def task(module: Any, batch: Any) -> Tensor:
        return loss(module(batch[0]), batch[1])

    value, calls = run_tapped(task, net, (inputs, targets))
    found = curvature_along_gradients(understand(value, calls, 4))
    # A sum over a batch grows with it: the examples' own losses average to that of the batch.
    times = 4 if loss is pixels else 1
    outputs = net(inputs).detach()
    for n in range(4):
        own = lambda z, n=n: times * loss(z.view(1, 3, 2), targets[[n]])  # noqa: E731
        u, bent = torch.func.grad(own)(outputs[n].flatten()), torch.func.hessian(own)(outputs[n].flatten())
        torch.testing.assert_close(found[n], (u @ bent @ u / (u @ u) ** 2).nan_to_num(), **EXACT)


def test_no_leverage_divides_by_nothing() -> None:
    found = inverse_rest(torch.tensor([0.0, 4.0, 1e9]), torch.tensor([0.0, 1.0, 1.0]), 8)
    torch.testing.assert_close(found, torch.tensor([1.0, 2.0, 100.0]))
    task = lambda module, batch: F.mse_loss(module(batch), torch.zeros(2, 1))  # noqa: E731
    value, calls = run_tapped(task, nn.Linear(1, 1, bias=False), torch.zeros(2, 1))
    assert curvature_along_gradients(understand(value, calls, 2)).tolist() == [0.0, 0.0]


def test_a_loss_that_is_not_known() -> None:
    fitted = Fitted(squares, 1)
    influence = Influence(fitted.net, lambda m, b: (m(b[0]) - b[1]).pow(4).mean((1,)), fitted.data).fit("identity")
    with pytest.raises(TaskError, match='normalise="leverage" needs a loss made of known calls alone'):
        influence.pairs(fitted.asked, normalise="leverage")
