"""Scores by replay of a run that a trainer has made: against the same training with another weight of an example."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import make_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from which_lightning import pl

from lightning_influence import InfluenceAudit
from lightning_influence.data import ExampleSource
from lightning_influence.gradients import ExampleGradients, discover
from lightning_influence.objective import TrainingStepTask
from lightning_influence.replay import ReplayError, Rerun
from lightning_influence.replay.scores import replay_measurement, replay_scores
from lightning_influence.scores.measurements import AdversarialLoss, DemographicParityGap, MeasurementError

N = 36
CHEAP: dict[str, Any] = {"curvature": "identity", "tracin": None, "verify": False}


class Net(pl.LightningModule):
    """Its training counts examples with weights of its own."""

    def __init__(self, weights: Tensor | None = None, plain: bool = False) -> None:
        super().__init__()
        self.weights = torch.ones(N, dtype=torch.float64) if weights is None else weights
        self.net = nn.Sequential(
            nn.Conv2d(1, 3, 3, bias=False),
            nn.BatchNorm2d(3),
            nn.GELU(),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(12, 3),
        )
        self.plain = plain

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y, index = batch
        if self.training:
            x = x + 0.1 * torch.randn_like(x)
        if self.plain:
            return F.cross_entropy(self(x), y)
        return (self.weights[index] * F.cross_entropy(self(x), y, reduction="none")).mean()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), 5e-3, weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def data(dtype: torch.dtype = torch.float64) -> TensorDataset:
    draw = torch.Generator().manual_seed(0)
    return TensorDataset(
        torch.randn(N, 1, 6, 6, generator=draw, dtype=torch.float64).to(dtype),
        torch.randint(0, 3, (N,), generator=draw),
        torch.arange(N),
    )


def trained(directory: Path, make: Callable[[], Net], **arguments: Any) -> tuple[Net, Rerun, ExampleGradients]:
    """Train with all that a recipe may have; return the run, and passes over its data."""
    pl.seed_everything(3, verbose=False)
    model = make()
    settings: dict[str, Any] = {"precision": "64-true", "max_epochs": 3, "accumulate_grad_batches": 2}
    examples = data(torch.float32 if arguments.get("precision", "64-true") != "64-true" else torch.float64)
    audit = InfluenceAudit(record=True, **CHEAP)
    trainer = make_trainer(directory, callbacks=[audit], gradient_clip_val=0.5, **{**settings, **arguments})
    trainer.fit(model, DataLoader(examples, 6, shuffle=True))
    source, task = ExampleSource(examples, batch_size=6), TrainingStepTask()
    passes = ExampleGradients(model, task, source, discover(model, task, source))
    return model, Rerun(audit.training_record, model, source=source), passes


def loss_of(model: Net, query: int) -> float:
    x, y, _ = data().tensors
    model.eval()
    with torch.no_grad():
        return float(F.cross_entropy(model(x[query : query + 1]), y[query : query + 1]))


def test_scores_are_what_another_weight_of_an_example_does(tmp_path: Path) -> None:
    model, rerun, passes = trained(tmp_path, Net)
    rerun.verify()
    queries, asked = [0, 5, 20], [3, 11]
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    flags = [(parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    found = replay_scores(rerun, passes, queries)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert modes == [module.training for module in model.modules()]
    now = [(parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    assert all(one[0] == other[0] and one[1] is other[1] for one, other in zip(flags, now, strict=True))
    assert found.queries.tolist() == queries
    assert found.examples.tolist() == list(range(N))
    for example in asked:
        ends = []
        for h in (1e-4, -1e-4):
            weights = torch.ones(N, dtype=torch.float64)
            weights[example] += h
            other, _, _ = trained(tmp_path, partial(Net, weights))
            ends.append(torch.tensor([loss_of(other, query) for query in queries], dtype=torch.float64))
        expected = -N * (ends[0] - ends[1]) / 2e-4
        torch.testing.assert_close(found.scores[:, example], expected, rtol=1e-6, atol=1e-8)


def test_sets_gaps_attacks_and_functions_are_measured_at_the_end(tmp_path: Path) -> None:
    model, rerun, passes = trained(tmp_path, partial(Net, plain=True))
    chosen = list(range(12))
    each = replay_scores(rerun, passes, chosen, "loss")
    whole = replay_measurement(rerun, [(passes, chosen)], "loss")
    torch.testing.assert_close(whole.scores, each.scores.mean(0), rtol=1e-6, atol=1e-9)
    assert whole.measured.value == pytest.approx(sum(loss_of(model, query) for query in chosen) / 12)

    def gap(module: Any, batch: Any) -> Tensor:
        p = module(batch[0]).softmax(1)[:, 1]
        return (p[batch[2] % 2 == 1].mean() - p[batch[2] % 2 == 0].mean()).abs()

    found = replay_measurement(rerun, [(passes, chosen)], DemographicParityGap(torch.arange(N) % 2))
    by_hand = replay_measurement(rerun, [(passes, chosen)], gap)
    torch.testing.assert_close(found.scores, by_hand.scores, rtol=1e-6, atol=1e-9)
    assert found.measured.value == pytest.approx(by_hand.measured.value)
    margins = replay_scores(rerun, passes, chosen[:2], "margin")
    assert float((margins.scores * each.scores[:2]).sum()) < 0  # what lowers the loss raises the margin
    attacked = replay_scores(rerun, passes, chosen[:2], AdversarialLoss(1e-9))
    torch.testing.assert_close(attacked.scores, each.scores[:2], rtol=1e-4, atol=1e-6)
    with pytest.raises(MeasurementError, match="of a whole set"):
        replay_scores(rerun, passes, chosen, gap)


def test_mixed_precision_is_that_of_the_run(tmp_path: Path) -> None:
    """bfloat16 has 3 digits: scores are those of the precise run to a tenth, and not of another."""
    _, precise, passes = trained(tmp_path, partial(Net, plain=True), precision="32-true")
    expected = replay_scores(precise, passes, [0, 1, 2, 3]).scores
    _, mixed, passes = trained(tmp_path, partial(Net, plain=True), precision="bf16-mixed")
    mixed.verify()
    found = replay_scores(mixed, passes, [0, 1, 2, 3]).scores
    together = torch.stack([expected.flatten(), found.flatten()])
    assert float(torch.corrcoef(together)[0, 1]) > 0.9


def test_a_buffer_that_moves_is_refused(tmp_path: Path) -> None:
    class Moving(Net):
        def __init__(self) -> None:
            super().__init__(plain=True)
            self.register_buffer("smooth", torch.zeros((), dtype=torch.float64))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            self.smooth.mul_(0.9).add_(loss.detach(), alpha=0.1)
            return loss

    _, rerun, passes = trained(tmp_path, Moving)
    with pytest.raises(ReplayError, match=r"the buffers smooth have changed in training"):
        replay_scores(rerun, passes, [0])


def test_queries_and_costs_out_of_range_are_refused(tmp_path: Path) -> None:
    _, rerun, passes = trained(tmp_path, partial(Net, plain=True))
    with pytest.raises(ValueError, match="at least one index"):
        replay_scores(rerun, passes, [])
    with pytest.raises(ValueError, match=r"max_cost=-1; expected a number of seconds > 0"):
        replay_scores(rerun, passes, [0], max_cost=-1)
