"""Values that training takes for constants, in replay: against retraining with other weights in float64."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from replay_cases import Loss, PlainRun, Steps, batches_of
from test_replay_report import WithValidation, digits
from test_replay_report import run_of as fitted
from test_replay_scores import N as EXAMPLES
from test_replay_scores import Net, data, trained
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from torch.utils.data import DataLoader

from lightning_influence.replay.backward import example_derivatives
from lightning_influence.replay.scores import replay_scores
from lightning_influence.replay.step import Cotangents

N = 40
_draw = torch.Generator().manual_seed(1)
X = torch.randn(N, 6, dtype=torch.float64, generator=_draw)
Y = torch.randint(0, 3, (N,), generator=_draw)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


def normed() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), nn.GELU(), nn.Dropout(0.2), nn.Linear(8, 3))


def plain(module: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1], reduction="none")


def focal(module: nn.Module, batch: Any) -> Tensor:
    ce = plain(module, batch)
    return (1 - (-ce).exp()).square().detach() * ce


def focal_without_grad(module: nn.Module, batch: Any) -> Tensor:
    logits = module(batch[0])
    with torch.no_grad():
        p = logits.softmax(1).gather(1, batch[1][:, None])[:, 0]
        p.clamp_(min=0.01)
        weight = (1 - p) ** 2
        weight[:2] *= 0.5
    return weight * F.cross_entropy(logits, batch[1], reduction="none")


def data_of(module: nn.Module, batch: Any) -> Tensor:
    logits = module(batch[0])
    return F.cross_entropy(logits, batch[1], reduction="none") * (1 + logits.data.square().sum(1)).rsqrt()


def confidence(module: nn.Module, batch: Any) -> Tensor:
    logits = module(batch[0])
    smoothing = 0.3 * (1 - logits.softmax(1).detach().amax(1, keepdim=True))
    target = F.one_hot(batch[1], 3) * (1 - smoothing) + smoothing / 3
    return -(target * logits.log_softmax(1)).sum(1)


def teacher(module: nn.Module, batch: Any) -> Tensor:
    with torch.no_grad():
        told = module(batch[0] + 0.1).softmax(1)
    logits = module(batch[0])
    return F.cross_entropy(logits, batch[1], reduction="none") + F.kl_div(
        logits.log_softmax(1), told, reduction="none"
    ).sum(1)


def straight_through(module: nn.Module, batch: Any) -> Tensor:
    logits = module(batch[0])
    hard = (3 * logits).tanh()
    return F.cross_entropy(logits + (hard - logits).detach(), batch[1], reduction="none")


def rounded(module: nn.Module, batch: Any) -> Tensor:
    logits = module(batch[0])
    return F.cross_entropy(logits + (logits.round() - logits).detach() + logits.tanh(), batch[1], reduction="none")


CASES: dict[str, Loss] = {
    each.__name__: each for each in (focal, focal_without_grad, data_of, confidence, teacher, straight_through, rounded)
}


def run_of(loss: Loss, **changes: Any) -> PlainRun:
    settings: dict[str, Any] = {
        "make": mlp,
        "optimizer": lambda module: SGD(module.parameters(), 0.1, momentum=0.9),
        "losses": loss,
        "data": (X, Y),
        "batches": batches_of(16, 8, N),
        "query": lambda module: plain(module, (X[:7], Y[:7])).mean(),
    }
    return PlainRun(**{**settings, **changes})


@pytest.mark.parametrize("name", CASES)
def test_detached_values_move_with_the_weights(name: str) -> None:
    """As constants, they put the derivative off by 3 to 60 %."""
    run = run_of(CASES[name])
    found = run.replayed()[0]
    asked = found.abs().argsort(descending=True)[:6]
    torch.testing.assert_close(found[asked], run.differences(asked.tolist()), rtol=1e-6, atol=1e-9)


def test_several_queries_at_once_are_those_one_by_one() -> None:
    run = run_of(confidence)
    inputs: Steps = []
    module = run.train(inputs=inputs)
    derivative, segment, record = run.backward_of(module, inputs)
    ends = torch.randn(3, sum(derivative.sizes), dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    module.train()
    _, together = example_derivatives(derivative, record, segment, Cotangents(ends))
    for end, found in zip(ends, together, strict=True):
        _, alone = example_derivatives(derivative, record, segment, Cotangents(end[None]))
        torch.testing.assert_close(found, alone[0], rtol=1e-9, atol=1e-12)
    assert derivative.constants == []


def test_beside_batch_norm_dropout_accumulation_and_adamw() -> None:
    run = run_of(
        teacher,
        make=normed,
        optimizer=lambda module: AdamW(module.parameters(), 1e-2),
        batches=batches_of(10, 8, N, 2),
    )
    found = run.replayed()[0]
    asked = found.abs().argsort(descending=True)[:6]
    torch.testing.assert_close(found[asked], run.differences(asked.tolist(), 1e-3), rtol=1e-3, atol=1e-6)


# ------------------------------------------------------------------------------------------------- runs of a trainer


class Focal(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y, index = batch
        ce = F.cross_entropy(self(x), y, reduction="none")
        hard = 1 - (-ce).exp()
        return (self.weights[index] * hard.detach() * ce).mean()


class StraightThrough(Net):
    """Its own network has the estimator, so that queries of any kind have it, too."""

    def forward(self, x: Tensor) -> Tensor:
        logits = self.net(x)
        return logits + ((2 * logits).tanh() - logits).detach()


class Taught(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y, index = batch
        with torch.no_grad():
            told = (2 * self(x)).softmax(1)
        logits = self(x)
        return (self.weights[index] * (F.cross_entropy(logits, y, reduction="none"))).mean() + (
            self.weights[index] * F.cross_entropy(logits, told, reduction="none")
        ).mean()


@pytest.mark.parametrize("kind", [Focal, StraightThrough, Taught])
def test_a_run_of_a_trainer_and_queries_of_its_loss(kind: type[Net], tmp_path: Path) -> None:
    """Of a query, too, the loss moves as it does, not as its gradient says."""
    _, rerun, passes = trained(tmp_path, kind)
    queries = [0, 5, 20]
    found = replay_scores(rerun, passes, queries)
    assert found.notes == []
    for example in (3, 11):
        ends = []
        for h in (1e-4, -1e-4):
            weights = torch.ones(EXAMPLES, dtype=torch.float64)
            weights[example] += h
            other, _, _ = trained(tmp_path, partial(kind, weights))
            other.eval().weights = torch.ones(EXAMPLES, dtype=torch.float64)
            batches = [[part[query : query + 1] for part in data().tensors] for query in queries]
            with torch.no_grad():
                ends.append(torch.stack([other.training_step(batch, 0) for batch in batches]))
        expected = -EXAMPLES * (ends[0] - ends[1]) / 2e-4
        torch.testing.assert_close(found.scores[:, example], expected, rtol=1e-5, atol=1e-7)


class Read(WithValidation):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss, prog_bar=True)
        return loss * (1 + 0.1 * float(loss))


class Written(WithValidation):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self(batch[0])
        return F.cross_entropy(logits + 0.1 * (1 * logits).detach().clamp_(-1, 1), batch[1])


class Detached(WithValidation):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self(batch[0])
        return F.cross_entropy(logits + 0.1 * (1 * logits).detach_(), batch[1])


class Frozen(WithValidation):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.requires_grad_(False)
        target = self(batch[0])
        self.requires_grad_(True)
        return F.cross_entropy(self(batch[0]) + 0.1 * target, batch[1])


@pytest.mark.parametrize(
    ("model", "told"),
    [
        (Read, r"numbers that the step reads \(`.item"),
        (Written, "what the step detaches .* inplace"),
        (Detached, "what the step detaches .*`detach_`"),
        (Frozen, "what the step detaches .*`requires_grad_"),
    ],
)
def test_what_can_not_be_followed_is_said_and_put_to_the_test(model: Any, told: str, tmp_path: Path) -> None:
    train = DataLoader(digits(0, 60), 16, shuffle=True)
    report = fitted(tmp_path, model(), train, max_epochs=2).report
    assert "harm_exact" in report.columns
    assert any(re.search(f"harm_exact: this counts as constant.*{told}", note) for note in report.manifest["notes"])
    assert any("harm_exact: self-test" in note for note in report.manifest["notes"])
    scores = report.replay(model(), train, digits(60, 64), range(2), self_test=0)
    assert any(re.search(f"this counts as constant.*{told}", note) for note in scores.notes)


def test_logging_reads_nothing(tmp_path: Path) -> None:
    class Logged(WithValidation):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            self.log("loss", loss, prog_bar=True)
            self.log("half", loss.detach() / 2)
            return loss

    report = fitted(tmp_path, Logged(), DataLoader(digits(0, 60), 16, shuffle=True), max_epochs=1).report
    assert not any("harm_exact" in note for note in report.manifest["notes"])
