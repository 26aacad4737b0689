"""TracIn in flight: what training's own passes say is what the weights of every step say, replayed."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference as ref
import torch
import torch.nn.functional as F
from models import CLASSES, leftovers, loader, make_trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import Dataset, TensorDataset
from which_lightning import MisconfigurationException, MixedPrecision, TensorBoardLogger, pl

from lightning_influence import AuditReport, InfluenceAudit, TracIn
from lightning_influence.data.source import ExampleSource
from lightning_influence.gradients.block_rows import Output, Use
from lightning_influence.gradients.discover import discover
from lightning_influence.training.batch_record import BatchRecord
from lightning_influence.training.flight.flight import Flight, Visit
from lightning_influence.training.flight.pace import Pace
from lightning_influence.training.flight.step_norms import StepNorms
from lightning_influence.training.tracin import VisitSums

pytestmark = pytest.mark.usefixtures("unverified")

N = 11


class Indexed(Dataset[Any]):
    def __init__(self, data: TensorDataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        return (*self.data[index], index)


@dataclass
class Seen:
    """One training batch: the weights, its examples, and the step that it went into."""

    net: nn.Module
    indices: list[int]
    rates: dict[str, float]
    scales: dict[str, Tensor]


class Pilot(pl.LightningModule):
    """Notes the weights of every batch, and the learning rates and optimizer state of every step."""

    def __init__(self, net: nn.Module, optimizer: Callable[[nn.Module], Any], loss: Any = F.cross_entropy) -> None:
        super().__init__()
        self.net, self.seen, self._optimizer, self._loss = net.double(), [], optimizer, loss
        self.waiting: list[Seen] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y, indices = batch
        if self.trainer.training and torch.is_grad_enabled() and self.recording:
            self.waiting.append(Seen(copy.deepcopy(self.net), indices.tolist(), {}, {}))
        result: Tensor = self._loss(self.net(x), y)
        return result

    recording = False

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.recording = True

    def on_before_backward(self, loss: Tensor) -> None:
        self.recording = False

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        names = {id(parameter): name for name, parameter in self.net.named_parameters()}
        rates, scales = {}, {}
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                name = names[id(parameter)]
                rates[name] = group["lr"] / (1 - group.get("momentum", 0))
                state = optimizer.state.get(parameter)
                if state and "exp_avg_sq" in state:
                    second = state["exp_avg_sq"] / (1 - group["betas"][1] ** float(state["step"]))
                    # An entry that no step has moved has no scale yet: it counts for nothing, not 1/ε times.
                    scales[name] = (1 / (second.sqrt() + group["eps"])).masked_fill(state["exp_avg_sq"] == 0, 0.0)
        for seen in self.waiting:
            seen.rates, seen.scales = rates, {name: scale.clone() for name, scale in scales.items()}
        self.seen += self.waiting
        self.waiting = []

    def configure_optimizers(self) -> Any:
        return self._optimizer(self.net)

    def replayed(self, data: TensorDataset, only: str = "", loss: Any = F.cross_entropy) -> Tensor:
        """The sum over the batches, from the weights that each was trained at, one example at a time."""
        total = torch.zeros(len(data), dtype=torch.float64)
        for seen in self.seen:
            x, y = (tensor[seen.indices] for tensor in data.tensors)
            gradients = ref.per_example_gradients(seen.net, loss, x, y)
            for name, gradient in gradients.items():
                if name.startswith(only):
                    squares = gradient.square() * seen.scales.get(name, torch.ones(()))
                    total[seen.indices] += seen.rates[name] * squares.flatten(1).sum(1)
        return total


class Convolutions(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(2, 4, 3, groups=2, padding=1), nn.GroupNorm(2, 4), nn.ReLU(inplace=True), nn.MaxPool2d(2),
            nn.Conv2d(4, 3, 2, bias=False), nn.Flatten(), nn.Linear(12, CLASSES),
        )  # fmt: skip


class Words(nn.Module):
    """An embedding, self-attention, layer norms and an in-place activation; time first within."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.words, self.norm = nn.Embedding(7, 8, padding_idx=0), nn.LayerNorm(8)
        self.attention, self.inner = nn.MultiheadAttention(8, 2), nn.Linear(8, 8)
        self.head = nn.Linear(8, CLASSES)
        if tied:
            self.again = nn.Linear(8, 7)
            self.again.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.norm(self.words(ids)).transpose(0, 1)
        hidden = hidden + self.attention(hidden, hidden, hidden, need_weights=False)[0]
        hidden = F.relu(self.inner(self.inner(hidden)), inplace=True)
        if hasattr(self, "again"):
            hidden = hidden + self.again(hidden).mean(-1, keepdim=True)
        result: Tensor = self.head(hidden.mean(0))
        return result


class Functional(nn.Module):
    """No layers: functions with parameters, one of them through a checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.first = nn.Parameter(torch.randn(6, 5, generator=generator))
        self.scale = nn.Parameter(torch.ones(6))
        self.second = nn.Linear(6, 6)
        self.third = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(F.linear(x, self.first) * self.scale)
        hidden = checkpoint(lambda h: torch.tanh(self.second(h)), hidden, use_reentrant=False)
        result: Tensor = self.third(hidden)
        return result


def vectors(n: int = N) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 5, generator=generator, dtype=torch.float64)
    return TensorDataset(x, torch.randint(CLASSES, (n,), generator=generator))


def pictures() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, 2, 6, 6, generator=generator, dtype=torch.float64)
    return TensorDataset(x, torch.randint(CLASSES, (N,), generator=generator))


def sentences() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(
        torch.randint(0, 7, (N, 4), generator=generator), torch.randint(CLASSES, (N,), generator=generator)
    )


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, CLASSES))


def shared() -> nn.Module:
    """One weight is used twice: its squares are not the sum of those of its uses."""
    inner = nn.Linear(6, 6, bias=False)
    return nn.Sequential(
        nn.Linear(5, 6), nn.Tanh(), inner, nn.Dropout(0.0), nn.ReLU(inplace=True), inner, nn.Linear(6, CLASSES)
    )


NETS: dict[str, tuple[Callable[[], nn.Module], Callable[[], TensorDataset]]] = {
    "mlp": (mlp, vectors),
    "shared": (shared, vectors),
    "convolutions": (Convolutions, pictures),
    "words": (Words, sentences),
    "tied": (lambda: Words(tied=True), sentences),
    "functional": (Functional, vectors),
}


def sgd(net: nn.Module) -> Any:
    return torch.optim.SGD(net.parameters(), lr=0.05)


def groups(net: nn.Module) -> Any:
    biases = [p for name, p in net.named_parameters() if name.endswith("bias")]
    others = [p for name, p in net.named_parameters() if not name.endswith("bias")]
    optimizer = torch.optim.SGD([{"params": others}, {"params": biases, "lr": 0.02, "momentum": 0.5}], lr=0.05)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def adam(net: nn.Module) -> Any:
    return torch.optim.AdamW(net.parameters(), lr=0.01, weight_decay=0.1)


def fly(
    path: Path, pilot: Pilot, data: TensorDataset, tracin: TracIn | str = "step", batch_size: int = 4, **trainer: Any
) -> AuditReport:
    audit = InfluenceAudit(curvature="identity", tracin=tracin)  # type: ignore[arg-type]
    made = make_trainer(path, callbacks=[audit], **trainer)
    made.fit(pilot, loader(Indexed(data), batch_size, shuffle=True))
    assert leftovers(made, pilot) == []
    assert audit.has_report
    return audit.report


def close(report: AuditReport, expected: Tensor, tolerance: float = 1e-9) -> None:
    actual = torch.from_numpy(report.columns["tracin"])
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=1e-14, equal_nan=True)


# ------------------------------------------------------------------------------------------- the replayed sum


@pytest.mark.parametrize("optimizer", [sgd, groups, adam])
@pytest.mark.parametrize("kind", NETS)
def test_is_the_replayed_sum(kind: str, optimizer: Any, tmp_path: Path) -> None:
    make, examples = NETS[kind]
    torch.manual_seed(1)
    pilot, data = Pilot(make(), optimizer), examples()
    report = fly(tmp_path, pilot, data, max_epochs=3)
    if optimizer is adam:  # before its first step Adam has no state: those examples are taken at their other visits
        first, others = pilot.seen[0].indices, pilot.seen[1:]
        pilot.seen = others
        expected = pilot.replayed(data)
        expected[first] *= 3 / 2
    else:
        expected = pilot.replayed(data)
    assert bool((expected > 0).all())
    close(report, expected)
    assert not [note for note in report.manifest["notes"] if "lacks" in note]


@pytest.mark.parametrize("kind", ["mlp", "words"])
def test_is_the_sum_at_standing_weights_for_tiny_rates_and_single_examples(kind: str, tmp_path: Path) -> None:
    """Nothing moves: every epoch adds ``η ‖g‖²``, as a pass at the end of training says it."""
    make, examples = NETS[kind]
    torch.manual_seed(1)
    net, data = make().double(), examples()
    gradients = ref.per_example_gradients(net, F.cross_entropy, *data.tensors)
    pilot = Pilot(net, lambda module: torch.optim.SGD(module.parameters(), lr=1e-9))
    report = fly(tmp_path, pilot, data, batch_size=1, max_epochs=2)
    close(report, ref.tracin_self([gradients], [2e-9]), 1e-6)
    torch.testing.assert_close(
        torch.from_numpy(report.columns["tracin"]), 2e-9 * torch.from_numpy(report.columns["grad_norm_squared"]),
        rtol=1e-6, atol=0,
    )  # fmt: skip


@pytest.mark.parametrize("accumulate", [2, 3])
def test_accumulated_batches_count_with_the_step_they_go_into(accumulate: int, tmp_path: Path) -> None:
    """Lightning divides their losses: without undoing it scores would be off by ``accumulate²``."""
    torch.manual_seed(1)
    pilot, data = Pilot(mlp(), groups), vectors()
    report = fly(tmp_path, pilot, data, accumulate_grad_batches=accumulate)
    assert len({tuple(seen.rates.items()) for seen in pilot.seen}) == 2 * -(-3 // accumulate)
    close(report, pilot.replayed(data))


def test_a_backward_pass_with_a_graph_of_its_own(tmp_path: Path) -> None:
    """Gradients are part of a graph then, where they are measured, too."""

    class SecondOrder(Pilot):
        def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
            loss.backward(create_graph=True)

    torch.manual_seed(1)
    pilot, data = SecondOrder(shared(), groups), vectors()
    with pytest.warns(UserWarning, match="Using backward"):
        report = fly(tmp_path, pilot, data)
    close(report, pilot.replayed(data))


def test_clipping_comes_later(tmp_path: Path) -> None:
    torch.manual_seed(1)
    pilot, data = Pilot(mlp(), sgd), vectors()
    close(fly(tmp_path, pilot, data, gradient_clip_val=1e-3), pilot.replayed(data))


def test_bfloat16(tmp_path: Path) -> None:
    torch.manual_seed(1)
    net, data = mlp(), vectors()
    pilot = Pilot(net, sgd)
    pilot.float()
    single = TensorDataset(data.tensors[0].float(), data.tensors[1])
    report = fly(tmp_path, pilot, single, precision="bf16-mixed")
    close(report, pilot.replayed(data), 0.05)


def test_a_scaled_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a gradient scaler does, whose factor is read from the trainer."""
    from lightning_influence.callbacks import bridge

    class Scaled(Pilot):
        def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
            (1024 * loss).backward()

    monkeypatch.setattr(bridge, "loss_scale", lambda trainer: 1024.0)
    torch.manual_seed(1)
    pilot, data = Scaled(mlp(), lambda net: torch.optim.SGD(net.parameters(), lr=1e-5)), vectors()
    close(fly(tmp_path, pilot, data), pilot.replayed(data))


def test_a_step_that_a_gradient_scaler_skips_does_not_count(tmp_path: Path) -> None:
    """In float16 the first batch overflows at this scale: its scores would be infinite."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, backoff_factor=2.0**-30)
    torch.manual_seed(1)
    net, data = mlp(), vectors()
    pilot = Pilot(net, sgd)
    pilot.float()
    single = TensorDataset(data.tensors[0].float(), data.tensors[1])
    report = fly(
        tmp_path, pilot, single, max_epochs=3, plugins=[MixedPrecision("16-mixed", "cpu", scaler)]
    )  # fmt: skip
    assert scaler.get_scale() == 2.0**10
    skipped, following = pilot.seen[:2]
    weights = zip(skipped.net.parameters(), following.net.parameters(), strict=True)
    assert all(torch.equal(before, after) for before, after in weights)
    pilot.seen = pilot.seen[1:]
    expected = pilot.replayed(data)
    expected[skipped.indices] *= 3 / 2  # its examples are taken at their other visits
    close(report, expected, 0.05)


def test_the_histogram_of_an_epoch_in_tensorboard(tmp_path: Path) -> None:
    torch.manual_seed(1)
    logger = TensorBoardLogger(tmp_path)
    report = fly(tmp_path, Pilot(mlp(), sgd), vectors(), logger=logger)
    events = EventAccumulator(logger.log_dir, size_guidance={"histograms": 0}).Reload()
    first, last = events.Histograms("influence/tracin_epoch/log10")
    assert (first.step, last.step) == (3, 6)
    assert first.histogram_value.num == last.histogram_value.num == N
    assert last.histogram_value.sum == pytest.approx(np.log10(report.columns["tracin"]).sum(), rel=1e-5)
    assert first.histogram_value.sum < last.histogram_value.sum


def test_a_sum_over_examples_weighs_them_alike_in_every_batch(tmp_path: Path) -> None:
    """Four, four, three: the scale of the small batch would be 3/4 squared of the others'.

    A sum of 4 at a rate is the mean at 4 times the rate.
    """

    def loss(logits: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(logits, y, reduction="sum")

    torch.manual_seed(1)
    pilot, data = Pilot(mlp(), sgd, loss), vectors()
    close(fly(tmp_path, pilot, data), 4 * pilot.replayed(data))


def test_a_part_of_the_layers(tmp_path: Path) -> None:
    torch.manual_seed(1)
    pilot, data = Pilot(mlp(), sgd), vectors()
    report = fly(tmp_path, pilot, data, TracIn(mode="step", layers=["net.2"]))
    close(report, pilot.replayed(data, only="2."))
    (note,) = (note for note in report.manifest["notes"] if "in flight" in note)
    assert "covers 42.4% of the trainable parameters, as `layers` ask for" in note


def test_layers_that_there_are_not(tmp_path: Path) -> None:
    """An error before the first step leaves no directory that would look like an audit."""
    with pytest.raises(
        MisconfigurationException, match=r"`layers=` names \['net\.7'\], which match no supported layer"
    ):
        fly(tmp_path, Pilot(mlp(), sgd), vectors(), TracIn(mode="step", layers=["net.7"]))
    assert list(tmp_path.rglob("influence*")) == []


class OneByOne(nn.Module):
    """A loop over the examples: it can't be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.net(row) for row in x])


def test_a_model_of_which_nothing_can_be_measured(tmp_path: Path) -> None:
    """The column was 0 for every example."""
    with pytest.raises(MisconfigurationException, match=r'in flight would be 0 .*net\.net\.0\.weight .*"epoch"'):
        fly(tmp_path, Pilot(OneByOne(), sgd), vectors(), TracIn(mode="step"))


@pytest.mark.parametrize("index", [0, 7])
def test_one_step_on_an_example_lowers_its_loss_by_its_score(index: int, tmp_path: Path) -> None:
    """To first order: what is left over falls with the square of the rate."""
    data = vectors()
    single = TensorDataset(*(tensor[index : index + 1] for tensor in data.tensors))
    left_over = []
    for rate in (4e-3, 2e-3):
        torch.manual_seed(1)
        pilot = Pilot(mlp(), lambda net, rate=rate: torch.optim.SGD(net.parameters(), lr=rate))
        before = F.cross_entropy(pilot.net(single.tensors[0]), single.tensors[1])
        report = fly(tmp_path / str(rate), pilot, single, batch_size=1, max_epochs=1)
        lowered = float(before - F.cross_entropy(pilot.net(single.tensors[0]), single.tensors[1]))
        left_over.append(abs(lowered - report.columns["tracin"][0]))
        assert lowered == pytest.approx(report.columns["tracin"][0], rel=0.05)
    assert left_over[1] == pytest.approx(left_over[0] / 4, rel=0.05)


# ------------------------------------------------------------------------------------------------ what is not seen


def test_what_is_not_seen_is_named(tmp_path: Path) -> None:
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.again, self.last = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, CLASSES)
            self.norm = nn.BatchNorm1d(6)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.norm(x @ self.first.weight.t() + self.first.bias)
            hidden = checkpoint(self.again, hidden, use_reentrant=self.training)
            result: Tensor = self.last(hidden)
            return result

    torch.manual_seed(1)
    report = fly(tmp_path, Pilot(Hidden(), sgd), vectors())
    (note,) = (note for note in report.manifest["notes"] if "in flight" in note)
    assert "it lacks net.first" in note
    assert "net.again (no gradient came by in the training pass)" in note
    assert "net.norm (it is used in a batch norm that takes the statistics of the batch)" in note
    assert report.columns["tracin"].min() > 0  # of the last layer


def test_manual_optimization_is_refused(tmp_path: Path) -> None:
    pilot = Pilot(mlp(), sgd)
    pilot.automatic_optimization = False
    audit = InfluenceAudit(tracin="step", task=lambda module, batch: F.cross_entropy(module.net(batch[0]), batch[1]))
    with pytest.raises(MisconfigurationException, match=r'it optimizes manually. Pass `tracin="epoch"`'):
        make_trainer(tmp_path, callbacks=[audit]).fit(pilot, loader(Indexed(vectors())))


def test_a_failure_ends_the_recording_and_not_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Tensor:
        raise ArithmeticError("out of numbers")

    monkeypatch.setattr(StepNorms, "of_uses", fail)
    with pytest.warns(UserWarning, match="TracIn in flight is incomplete.*out of numbers"):
        report = fly(tmp_path, Pilot(mlp(), sgd), vectors())
    assert report.status == "complete"
    assert any("out of numbers" in note for note in report.manifest["notes"])


# --------------------------------------------------------------------------------------------------- some batches


def test_an_example_counts_for_all_its_visits_where_some_are_measured(tmp_path: Path) -> None:
    """At standing weights the sum is then the full one, however often chance has measured an example."""
    torch.manual_seed(1)
    net, data = mlp().double(), vectors()
    gradients = ref.per_example_gradients(net, F.cross_entropy, *data.tensors)
    pilot = Pilot(net, lambda module: torch.optim.SGD(module.parameters(), lr=1e-9))
    report = fly(tmp_path, pilot, data, TracIn(mode="step", every_n_steps=3), batch_size=2, max_epochs=8)
    close(report, ref.tracin_self([gradients], [8e-9]), 1e-6)
    assert "TracIn in flight: one of 3 batches was measured" in report.manifest["notes"]


def test_what_chance_never_measured_is_unknown_and_still_an_example(tmp_path: Path) -> None:
    torch.manual_seed(1)
    tracin = TracIn(mode="step", every_n_steps=6)
    report = fly(tmp_path, Pilot(mlp(), sgd), vectors(), tracin, batch_size=2, max_epochs=1)
    unknown = np.isnan(report.columns["tracin"])
    # One of the six batches, the last of which holds a single example.
    assert unknown.sum() in (9, 10)
    assert report.columns["finite"].all()


def test_one_of_so_many_consecutive_batches_is_drawn() -> None:
    pace = Pace(4)
    drawn = [pace.due() for _ in range(400)]
    runs = [drawn[start : start + 4] for start in range(0, 400, 4)]
    assert all(sum(run) == 1 for run in runs)
    # Every place in turn by chance: data in a fixed order would else never measure some examples.
    assert min(sum(place) for place in zip(*runs, strict=True)) > 10
    again = Pace(4)
    again.load_state_dict({"every": 4, "dynamics": None, "added": None, "batches": 100})
    assert [again.due() for _ in range(300)] == drawn[100:]


@pytest.mark.parametrize(("slow", "budget", "every"), [(1.5, 0.1, 5), (1.05, 0.1, 1), (1.3, 0.15, 2), (0.9, 0.1, 1)])
def test_a_budget_sets_the_pace(slow: float, budget: float, every: int) -> None:
    pace = Pace(1, budget)
    while pace.timing:
        pace.took(pace_due := pace.due(), slow if pace_due else 1.0)
    assert pace.every == every
    assert pace.dynamics == 0
    assert f"for a budget of {budget:.1%}" in (pace.note() or "")
    assert sum(pace.due() for _ in range(60)) == pytest.approx(60 / every, abs=1)


@pytest.mark.parametrize(
    ("dynamics", "slow", "every"),
    [
        (0.0, 0.5, 5),
        (0.04, 0.5, 9),  # six parts of a hundred are left
        (0.04, 0.06, 1),
        (0.095, 0.05, 5),  # next to nothing is left: a tenth of the budget is taken
        (0.2, 0.05, 5),
    ],
)
def test_a_budget_counts_the_dynamics(dynamics: float, slow: float, every: int) -> None:
    """Every batch takes them, and one of 6 what waited for it: a median would not see that."""
    pace, budget = Pace(1, 0.1), 0.1
    number = 0
    while pace.timing:
        due, number = pace.due(), number + 1
        once = dynamics / 2 * 6 if number % 16 == 12 else 0.0
        pace.took(due, 1.0 + dynamics / 2 + once + slow * due, dynamics / 2 + once)
    assert pace.dynamics == pytest.approx(dynamics)
    assert pace.added == pytest.approx(slow)
    assert pace.every == every
    assert dynamics + slow / every <= budget or dynamics > 0.9 * budget
    again = Pace(1, budget)
    again.load_state_dict(pace.state_dict())
    assert again.note() == pace.note()
    assert ("hardly any room" in (pace.note() or "")) == (dynamics > 0.09)


def test_what_a_measurement_leaves_to_the_next_batch_is_not_taken_for_its_cost() -> None:
    """The batch after a measured one pays for the memory that was let go, here three times what measuring takes."""
    pace, before = Pace(1, 0.1), False
    while pace.timing:
        due = pace.due()
        pace.took(due, 1.0 + 0.25 * due + 0.75 * (before and not due))
        before = due
    assert pace.added == pytest.approx(0.25)
    assert pace.every == 3


def test_what_the_first_batches_take_longer_is_not_taken_for_the_cost_of_all() -> None:
    pace, measured = Pace(1, 0.1), 0
    while pace.timing:
        due = pace.due()
        measured += due
        pace.took(due, 1.0 + due * (0.2 if measured <= 18 else 0.09))
    assert pace.added == pytest.approx(0.09)
    assert pace.every == 1


def test_a_budget_is_kept_on_a_machine_that_slows_down() -> None:
    """Batches get slower by a percent each: medians over all of them would find a measured one too little longer."""
    pace, number = Pace(1, 0.1), 0
    while pace.timing:
        due, number = pace.due(), number + 1
        pace.took(due, (1.0 + 0.5 * due) * (1 + 0.01 * number))
    assert pace.added is not None
    assert 0.5 < pace.added < 0.7
    assert pace.every in (6, 7)


def test_a_budget_is_kept_where_measurements_disagree() -> None:
    pace, number = Pace(1, 0.1), 0
    while pace.timing:
        due, number = pace.due(), number + 1
        pace.took(due, 1.0 + (0.1, 0.2, 0.5, 0.6)[number // 16 % 4] * due)
    assert pace.added == pytest.approx(0.6, abs=0.1)


class Twice(nn.Sequential):
    """The same weights twice."""

    def __init__(self) -> None:
        shared = nn.Linear(6, 6)
        super().__init__(shared, nn.ReLU(), shared, nn.Linear(6, 3))


def once() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 3))


def mean_square(module: nn.Module, batch: Any) -> Tensor:
    return module(batch[0]).flatten(1).square().mean()


def flight_of(net: nn.Module, x: Tensor) -> Flight:
    coverage = discover(net, mean_square, ExampleSource(TensorDataset(x), batch_size=len(x)))
    return Flight(coverage, [torch.optim.SGD(net.parameters(), lr=0.1)])


def watched(flight: Flight, net: nn.Module, x: Tensor) -> tuple[Visit, Tensor]:
    visit, tap = flight.watch(len(x))
    tap.start()
    loss = mean_square(net, (x,))
    tap.stop()
    tap.forget()
    visit.start(float(len(x)))
    return visit, loss


def test_a_second_backward_pass_is_no_second_visit() -> None:
    """The first has let go of the gradients: an error in a hook would end the backward pass, and training."""
    net, x = once(), torch.randn(4, 6)
    found = []
    for passes in (1, 2):
        visit, loss = watched(flight_of(net, x), net, x)
        for _ in range(passes):
            loss.backward(retain_graph=True)
        visit.finish()
        assert visit.complete
        found.append(visit.increments({(0, 0): 0.1}))
    assert torch.equal(*found)


def test_a_backward_pass_before_that_of_training_is_no_visit() -> None:
    net, x = once(), torch.randn(4, 6)
    flight = flight_of(net, x)
    visit, loss = watched(flight, net, x)
    visit.finish()
    first = visit.increments({(0, 0): 1.0})
    assert first.tolist() == [0.0] * 4, "no gradient has come by"
    visit, tap = flight.watch(4)
    tap.start()
    loss = mean_square(net, (x,))
    torch.autograd.grad(loss, list(net.parameters()), retain_graph=True)  # a gradient penalty, say
    tap.stop()
    tap.forget()
    visit.start(4.0)
    loss.backward()
    visit.finish()
    own = [torch.autograd.grad(mean_square(net, (x[k : k + 1],)), list(net.parameters())) for k in range(4)]
    expected = torch.stack([torch.stack([g.square().sum() for g in each]).sum() for each in own])
    torch.testing.assert_close(visit.increments({(0, 0): 1.0}), expected.double(), rtol=1e-4, atol=1e-8)


def ours() -> list[object]:
    """What we keep of calls and their gradients, and all tensors."""
    return [o for o in gc.get_objects() if type(o) in (Output, Use, Tensor)]


@pytest.mark.parametrize("make", [once, Twice])
@pytest.mark.parametrize("shape", [(4, 6), (4, 5, 6)], ids=["rows", "positions"])
def test_the_graph_keeps_nothing_for_us(shape: tuple[int, ...], make: Callable[[], nn.Module]) -> None:
    """Hooks live as long as the graph, and with them what they hold: of a deep network, every layer's gradient.

    If that holds the graph in turn, only the garbage collector ends both, a layer at a time: of weights that are used
    twice, hundreds of batches were kept with their activations and gradients.
    """
    net, x = make(), torch.randn(shape)
    flight = flight_of(net, x)

    def run(backward: bool = True) -> Tensor:
        visit, loss = watched(flight, net, x)
        if backward:
            loss.backward()
            visit.finish()
            assert visit.complete
        visit.let_go()
        return loss

    run()
    assert flight.missing == {}
    net.zero_grad()
    gc.collect()
    gc.disable()
    try:
        before = len(ours())
        loss = run()
        held = [o for o in ours() if isinstance(o, Output) and o.gradients]
        assert held == []
        assert loss.grad_fn is not None, "the graph is still there"
        for backward in (True, False, False, True):
            loss = run(backward)
        del loss, held
        net.zero_grad()
        assert len(ours()) == before
    finally:
        gc.enable()


def test_sums_of_visits() -> None:
    sums = VisitSums(4)
    sums.add(BatchRecord((0, 1, 1)), torch.tensor([1.0, 1.125, 2.0]))
    sums.add(BatchRecord((0, 2)), None)
    sums.add(BatchRecord((0, 3), contradicted=True), torch.ones(2))  # who knows whose they are
    assert sums.values().tolist()[:2] == [2.0, 3.125]
    assert sums.values().isnan().tolist() == [False, False, True, False]
    assert sums.unmeasured.tolist() == [False, False, True, False]
    assert [sums.first_time(step) for step in (0, 1, 1, 0, 2)] == [True, True, False, False, True]
    again = VisitSums(4)
    again.load_state_dict(sums.state_dict())
    again.add(BatchRecord((2,)), torch.tensor([4.0]))
    assert again.values().tolist() == [2.0, 3.125, 8.0, 0.0]
    assert not again.first_time(2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "batch"}, r"mode='batch'; expected one of 'auto', 'epoch', 'step'"),
        ({"every_n_epochs": 0}, r"every_n_epochs=0; expected an integer >= 1"),
        ({"every_n_epochs": True}, r"every_n_epochs=True; expected an integer >= 1"),
        ({"mode": "step", "every_n_steps": 2.0}, r"every_n_steps=2.0; expected an integer >= 1"),
        ({"mode": "step", "overhead": 0}, r"overhead=0; expected a share of the training time > 0"),
        ({"overhead": 0.1}, r'overhead=0.1 is about TracIn in flight; pass mode="step"'),
        ({"every_n_steps": 2}, r"every_n_steps=2 is about TracIn in flight"),
        ({"layers": ["net"]}, r"layers=\['net'\] is about TracIn in flight"),
        ({"keep_checkpoints": -1}, r"keep_checkpoints=-1; expected an integer >= 0"),
        ({"keep_bytes": "1 GB"}, r"keep_bytes='1 GB'; expected an integer >= 0"),
    ],
)
def test_settings_out_of_range(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TracIn(**arguments)
