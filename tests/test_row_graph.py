"""What the graph of a network in one single way tells of its linear maps, and that it tells of no other network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import CLASSES
from test_in_flight import Pilot, close, fly, groups, vectors
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import TensorDataset

from lightning_influence import TracIn
from lightning_influence.data.source import ExampleSource
from lightning_influence.gradients.discover import discover
from lightning_influence.training.flight.flight import Flight, Visit
from lightning_influence.training.flight.reliance import Reliance
from lightning_influence.training.flight.row_graph import RowGraph
from lightning_influence.training.tracin import Increments

N = 6


class Net(nn.Module):
    """Linear maps with and without a bias, one of them used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner = nn.Linear(5, 6), nn.Linear(6, 6, bias=False)
        self.last, self.other = nn.Linear(6, CLASSES), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.dropout(torch.tanh(self.first(x)), 0.5)
        hidden = F.relu(self.inner(self.inner(hidden)))
        result: Tensor = self.last(hidden)
        return result


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(N, 5), torch.randint(CLASSES, (N,))


def loss_of(net: Net, forward: Callable[[Net, Tensor], Tensor] = Net.forward) -> Tensor:
    x, y = batch()
    return F.cross_entropy(forward(net, x), y) / 2


def maps_of(loss: Tensor) -> list[Any]:
    """The nodes of linear maps, the last one first."""
    found, node = [], loss.grad_fn
    while node is not None:
        linear = {"AddmmBackward0": 1, "MmBackward0": 0}.get(node.name())
        if linear is not None:
            found.append(node)
        node = node.next_functions[linear or 0][0]
    return found


def learned(net: Net) -> RowGraph[str]:
    loss = loss_of(net)
    keys = dict(zip(maps_of(loss), ("last", "inner", "again", "first"), strict=True))
    graph = RowGraph.of(loss, keys)
    assert graph is not None
    return graph


def test_tells_the_inputs_of_all_linear_maps() -> None:
    net = Net()
    graph, inputs = learned(net), []
    hooks = [m.register_forward_pre_hook(lambda _, args: inputs.append(args[0])) for m in net.children()]
    loss = loss_of(net)
    told = graph.follow(loss, N)
    assert told is not None
    assert [key for key, _, _ in told] == ["last", "inner", "again", "first"]
    assert [node for _, _, node in told] == maps_of(loss)
    assert len(inputs) == 4
    assert all(x.data_ptr() == seen.data_ptr() for (_, x, _), seen in zip(told, reversed(inputs), strict=True))
    assert all(torch.equal(x, seen) for (_, x, _), seen in zip(told, reversed(inputs), strict=True))
    for hook in hooks:
        hook.remove()


def other_kind(net: Net, x: Tensor) -> Tensor:
    hidden = F.dropout(torch.sigmoid(net.first(x)), 0.5)
    return net.last(F.relu(net.inner(net.inner(hidden))))


def other_weights(net: Net, x: Tensor) -> Tensor:
    hidden = F.dropout(torch.tanh(net.first(x)), 0.5)
    return net.other(F.relu(net.inner(net.inner(hidden))))


def weights_of_a_weight(net: Net, x: Tensor) -> Tensor:
    hidden = F.dropout(torch.tanh(net.first(x)), 0.5)
    return F.linear(F.relu(net.inner(net.inner(hidden))), net.last.weight * 1.0, net.last.bias)


def further_input(net: Net, x: Tensor) -> Tensor:
    hidden = torch.tanh(net.first(x))
    hidden = hidden * net.other.bias.sum()  # as dropout is a product, too
    return net.last(F.relu(net.inner(net.inner(hidden))))


def other_bias(net: Net, x: Tensor) -> Tensor:
    hidden = F.dropout(torch.tanh(net.first(x)), 0.5)
    return F.linear(F.relu(net.inner(net.inner(hidden))), net.last.weight, net.other.bias)


def transposed_weight(net: Net, x: Tensor) -> Tensor:
    hidden = F.dropout(torch.tanh(net.first(x)), 0.5)
    return net.last(F.relu(net.inner(hidden) @ net.inner.weight))


def scaled_map(net: Net, x: Tensor) -> Tensor:
    hidden = F.dropout(torch.tanh(net.first(x)), 0.5)
    hidden = F.relu(net.inner(net.inner(hidden)))
    return torch.addmm(net.last.bias, hidden, net.last.weight.t(), alpha=3)


def longer_at_the_end(net: Net, x: Tensor) -> Tensor:
    return net(x.requires_grad_() * 1.0)


def shorter(net: Net, x: Tensor) -> Tensor:
    return net.last(F.relu(net.inner(F.dropout(torch.tanh(net.first(x)), 0.5))))


def two_ways(net: Net, x: Tensor) -> Tensor:
    return net(x) + net.other(torch.tanh(net.first(x)))


def recomputed(net: Net, x: Tensor) -> Tensor:
    return checkpoint(net, x, use_reentrant=False)


def one_row_fewer(net: Net, x: Tensor) -> Tensor:
    hidden = F.dropout(torch.tanh(net.first(x)), 0.5)
    return F.pad(net.last(F.relu(net.inner(net.inner(hidden)))[:-1]), (0, 0, 0, 1))


@pytest.mark.parametrize(
    "forward",
    [
        other_kind, other_weights, other_bias, weights_of_a_weight, transposed_weight, scaled_map, further_input,
        longer_at_the_end, shorter, two_ways, recomputed, one_row_fewer,
    ],
)  # fmt: skip
def test_another_graph_is_not_read(forward: Callable[[Net, Tensor], Tensor]) -> None:
    net = Net()
    graph = learned(net)
    assert graph.follow(loss_of(net), N) is not None
    assert graph.follow(loss_of(net, forward), N) is None


def test_another_number_of_rows_is_not_read() -> None:
    net = Net()
    assert learned(net).follow(loss_of(net), N + 1) is None


@pytest.mark.parametrize("forward", [two_ways, further_input, weights_of_a_weight, transposed_weight, scaled_map])
def test_what_is_not_learned(forward: Callable[[Net, Tensor], Tensor]) -> None:
    loss = loss_of(Net(), forward)
    maps = maps_of(loss)
    assert maps
    assert RowGraph.of(loss, {maps[0]: "last"}) is None


def test_casts_are_not_learned() -> None:
    """Behind them any weights could be."""
    net = Net()
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(net)
    assert RowGraph.of(loss, {maps_of(loss)[0]: "last"}) is None


def test_a_map_that_is_not_on_the_way_can_not_be_told() -> None:
    net = Net()
    loss, other = loss_of(net), loss_of(net)
    assert RowGraph.of(loss, {maps_of(other)[0]: "last"}) is None
    assert RowGraph.of(loss, {}) is None


def test_an_input_that_was_overwritten() -> None:
    net = Net()
    graph = learned(net)

    def overwrite(net: Net, x: Tensor) -> Tensor:
        logits = net(x)
        x.zero_()
        return logits

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        graph.follow(loss_of(net, overwrite), N)


# --------------------------------------------------------------------------------------------------- in flight


class Counting:
    """How many batches were told by the graph alone."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.told: list[bool] = []
        read = Flight._read_graph

        def counted(flight: Flight, loss: Tensor) -> bool:
            self.told.append(read(flight, loss))
            return self.told[-1]

        monkeypatch.setattr(Flight, "_read_graph", counted)


class Rows(nn.Sequential):
    """One weight is used twice: its squares are not the sum of those of its uses."""

    def __init__(self) -> None:
        inner = nn.Linear(6, 6)
        super().__init__(
            nn.Linear(5, 6), nn.Tanh(), inner, nn.Dropout(0.0), nn.ReLU(inplace=True), inner, nn.Linear(6, CLASSES)
        )


def test_the_sum_is_the_replayed_one_where_most_batches_are_told_by_the_graph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counting = Counting(monkeypatch)
    torch.manual_seed(1)
    pilot, data = Pilot(Rows(), groups), vectors(62)  # the last batch of every epoch is smaller
    report = fly(tmp_path, pilot, data, max_epochs=4)
    # The first tells what the calls are like, the second what the graph is like, sixteen agree; then two of an epoch.
    assert counting.told == [True] * (4 * 16 - 18 - 2 * 2)
    close(report, pilot.replayed(data))


def test_accumulated_and_skipped_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counting = Counting(monkeypatch)
    torch.manual_seed(1)
    pilot, data = Pilot(Rows(), lambda net: torch.optim.SGD(net.parameters(), lr=1e-9)), vectors(64)
    every = TracIn(mode="step", every_n_steps=2)
    report = fly(tmp_path, pilot, data, every, max_epochs=8, accumulate_grad_batches=2)
    assert len(counting.told) > 20
    assert all(counting.told)
    seen = report.columns["times_seen"] == 8
    assert seen.all()
    close(report, pilot.replayed(data), 1e-5)  # nothing moves: any visit says what all do


class Moody(nn.Module):
    """Takes another way once, late in its training."""

    def __init__(self, late: int) -> None:
        super().__init__()
        self.first, self.last, self.late, self.calls = nn.Linear(5, 6), nn.Linear(6, CLASSES), late, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += torch.is_grad_enabled() and self.training
        hidden = torch.tanh(self.first(x))
        result: Tensor = self.last(hidden if self.calls != self.late else hidden.sigmoid())
        return result


def task(module: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1])


def flight_of(net: nn.Module, data: TensorDataset) -> Flight:
    net.eval()
    coverage = discover(net, task, ExampleSource(data, batch_size=N))
    net.train()
    return Flight(coverage, [torch.optim.SGD(net.parameters(), lr=0.1)])


def fly_once(flight: Flight, net: nn.Module, data: TensorDataset, **backward: Any) -> tuple[bool, Visit | None]:
    """One batch; tells whether it was watched, and what it said."""
    tap = flight.tap(N) if flight.needs_tap else None
    if tap is None:
        flight.without_tap(N)
    else:
        tap.start()
    loss = task(net, data.tensors)
    if tap is not None:
        tap.stop()
        tap.forget()
    flight.start(range(N), float(N), loss)
    loss.backward(**backward)
    return tap is not None, flight.finish()


def test_a_batch_that_takes_another_way_is_not_measured_and_ends_the_reading() -> None:
    torch.manual_seed(0)
    net, data = Moody(30), TensorDataset(*batch())
    flight = flight_of(net, data)
    watched, visits = zip(*(fly_once(flight, net, data) for _ in range(40)), strict=True)
    measured = [visit is not None for visit in visits]
    # The first tells what the calls are like, the second what the graph is like, sixteen agree.
    assert list(watched) == [True] * 18 + [False] * 12 + [True] * 10
    assert measured == [True] * 29 + [False] + [True] * 10


@pytest.mark.parametrize("lie", ["fewer", "other rows", "another weight"])
def test_a_graph_that_tells_of_other_rows_than_were_seen_is_never_relied_upon(
    lie: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    net, data = Moody(-1), TensorDataset(*batch())
    flight, follow = flight_of(net, data), RowGraph.follow
    compared = []

    def lying(graph: RowGraph[Any], loss: Tensor, n: int) -> Any:
        told = follow(graph, loss, n)
        assert told is not None
        compared.append(len(told))
        (first, *rest) = told
        if lie == "fewer":
            return rest
        if lie == "other rows":
            return [first._replace(x=first.x.clone()), *rest]
        return [first._replace(key=rest[0].key), *rest]

    monkeypatch.setattr(RowGraph, "follow", lying)
    assert all(fly_once(flight, net, data)[0] for _ in range(80))
    assert len(compared) == Reliance.DISAGREEING - 1  # the first batch has no rows yet: a disagreement, too


def test_what_disagrees_once_has_to_agree_again() -> None:
    reliance = Reliance()
    for _ in range(15):
        reliance.compared(True)
    reliance.compared(False)
    for _ in range(15):
        reliance.compared(True)
    assert reliance.needs_watching
    reliance.compared(True)
    assert not reliance.needs_watching
    reliance.doubted(2)
    reliance.compared(True)
    assert reliance.needs_watching
    reliance.compared(True)
    assert not reliance.needs_watching
    reliance.failed()
    assert reliance.needs_watching


def test_a_second_backward_pass_is_no_second_visit() -> None:
    """The first has let go of the rows: an error in a hook would end the backward pass, and training."""
    torch.manual_seed(0)
    net, data = Moody(-1), TensorDataset(*batch())
    flight = flight_of(net, data)
    for _ in range(20):
        fly_once(flight, net, data)
    _, once = fly_once(flight, net, data)
    flight.without_tap(N)
    loss = task(net, data.tensors)
    flight.start(range(N), float(N), loss)
    loss.backward(retain_graph=True)
    loss.backward()
    twice = flight.finish()
    assert once is not None
    assert twice is not None
    rates = {(0, 0): 0.1}
    assert torch.equal(*(Increments.joined([visit.increments(rates)]) for visit in (once, twice)))


class SecondOrder(Pilot):
    """Keeps the graph of its backward passes: gradients are part of a graph then, where they are measured, too."""

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        loss.backward(create_graph=True)


@pytest.mark.filterwarnings("ignore:Using backward")
def test_a_backward_pass_with_a_graph_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counting = Counting(monkeypatch)
    torch.manual_seed(1)
    pilot, data = SecondOrder(Rows(), groups), vectors(62)
    report = fly(tmp_path, pilot, data, max_epochs=2)
    assert any(counting.told)
    close(report, pilot.replayed(data))


def test_bfloat16_is_watched_to_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counting = Counting(monkeypatch)
    torch.manual_seed(1)
    pilot, data = Pilot(Rows(), groups), vectors(62)
    pilot.float()
    single = TensorDataset(data.tensors[0].float(), data.tensors[1])
    report = fly(tmp_path, pilot, single, max_epochs=2, precision="bf16-mixed")
    assert counting.told == []
    close(report, pilot.replayed(data), 0.05)


def test_a_graph_that_can_not_be_read_ends_the_recording_and_not_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> bool:
        raise ArithmeticError("no way")

    monkeypatch.setattr(Flight, "_read_graph", fail)
    with pytest.warns(UserWarning, match="TracIn in flight is incomplete.*no way"):
        report = fly(tmp_path, Pilot(Rows(), groups), vectors(62), max_epochs=3)
    assert report.status == "complete"
    assert any("no way" in note for note in report.manifest["notes"])
