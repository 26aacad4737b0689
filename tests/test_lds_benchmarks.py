"""The arithmetic of the benchmarks' ground truth: models trained together, margins, and the score itself."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
NAMES = ("retraining", "replay_runs", "networks")


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, Any]]:
    pytest.importorskip("mlxtend")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import replay_runs
    import retraining

    yield retraining, replay_runs
    for name in NAMES:
        sys.modules.pop(name, None)


def truth_of(retraining: Any, members: torch.Tensor, losses: torch.Tensor) -> Any:
    return retraining.GroundTruth(members, -(losses.double().exp() - 1).log().unsqueeze(1))


def test_margins_are_those_of_the_losses(modules: Any) -> None:
    retraining, _ = modules
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 5, 4), torch.tensor([0, 3, 1, 2, 2])
    logits[0, 0] = torch.tensor([60.0, 0.0, 0.0, 0.0])
    margins = retraining.log_odds(logits, labels)
    losses = retraining.GroundTruth(torch.ones(3, 1), margins.unsqueeze(1)).losses[:, 0]
    expected = F.cross_entropy(logits.double().flatten(0, 1), labels.repeat(3), reduction="none").view(3, 5)
    torch.testing.assert_close(losses, expected)
    assert losses[0, 0] == 0  # a probability that rounds to 1
    probabilities = logits.double().softmax(-1).gather(-1, labels.expand(3, -1).unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(margins[1:], (probabilities / (1 - probabilities)).log()[1:])


def test_queries_that_never_change_are_left_out_and_constant_predictions_count_as_nothing(modules: Any) -> None:
    retraining, _ = modules
    torch.manual_seed(0)
    members = (torch.rand(30, 12) < 0.5).float()
    scores = torch.randn(3, 12)
    losses = 20 - members @ scores.T
    losses[:, 2] = 1.0
    truth = truth_of(retraining, members, losses)
    assert truth.varies.tolist() == [True, True, False]
    assert retraining.datamodeling_score(scores, truth, draws=2).value == pytest.approx(1.0)
    scores[1] = 0  # the same for every subset
    assert retraining.datamodeling_score(scores, truth, draws=2).value == pytest.approx(0.5)


@pytest.mark.parametrize("optimizer", [partial(torch.optim.SGD, lr=0.1, momentum=0.9), torch.optim.AdamW])
def test_models_trained_together_are_those_of_a_plain_loop(modules: Any, optimizer: Any) -> None:
    retraining, replay_runs = modules
    torch.manual_seed(0)
    inputs, labels = torch.randn(20, 1, 4, 4, dtype=torch.float64), torch.randint(3, (20,))

    def net() -> nn.Module:
        layers = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.GELU(), nn.Flatten(), nn.Linear(16, 3)
        return nn.Sequential(*layers).double()

    setting = replay_runs.Setting("made up", net, (inputs, labels), (inputs[:5], labels[:5]), optimizer, 6, 4)
    weights = torch.ones(3, 20, dtype=torch.float64)
    weights[0, :4], weights[1, 7] = 0, 0.5
    found = replay_runs.retrained(setting, weights, seed=5)
    for row, margins in zip(weights, found, strict=True):
        torch.manual_seed(5)
        module = net()
        steps = optimizer(module.parameters())
        for indices in setting.order(5):
            steps.zero_grad()
            each = F.cross_entropy(module(inputs[indices]), labels[indices], reduction="none")
            (each * row[indices]).mean().backward()
            steps.step()
        module.eval()
        expected = retraining.log_odds(module(inputs[:5]).detach(), labels[:5])
        torch.testing.assert_close(margins, expected)
    assert (found[0] - found[2]).abs().max() > 0.01
    plain, _ = replay_runs.train(setting, seed=5)  # the run itself, of weights that are all 1
    expected = retraining.log_odds(plain.eval()(inputs[:5]).detach(), labels[:5])
    torch.testing.assert_close(found[2], expected)
