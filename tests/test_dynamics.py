"""Training dynamics against a straightforward re-implementation that keeps every visit."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lightning_influence.objective.losses import read_call
from lightning_influence.training import class_shares, dynamics, loss_graph
from lightning_influence.training.batch_record import BatchRecord
from lightning_influence.training.dynamics import TrainingDynamics
from lightning_influence.training.heard_losses import HeardLosses

SIZE, CLASSES = 17, 4
Visit = tuple[list[int], dict[str, Tensor]]


def _statistics(n: int, generator: torch.Generator, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Random statistics of one batch, as `LossCall.statistics` returns them."""
    return {
        "loss": torch.rand(n, generator=generator, dtype=dtype) * 3,
        "margin": torch.randn(n, generator=generator, dtype=dtype),
        "el2n": torch.rand(n, generator=generator, dtype=dtype),
        "wrong": torch.randint(0, 2, (n,), generator=generator).to(dtype),
        "label": torch.zeros(n, dtype=torch.long),
        "predicted": torch.zeros(n, dtype=torch.long),
        "probabilities": torch.randn(n, CLASSES, generator=generator, dtype=dtype).softmax(1),
    }


def _visits(batches: int = 40, seed: int = 0, never: Sequence[int] = (3,)) -> list[Visit]:
    """Batches of different sizes over a part of the examples; each example has one label throughout."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES, (SIZE,), generator=generator)
    allowed = torch.tensor([n for n in range(SIZE) if n not in never])
    result = []
    for _ in range(batches):
        n = int(torch.randint(1, 9, (), generator=generator))
        indices = allowed[torch.randperm(len(allowed), generator=generator)[:n]]
        statistics = _statistics(n, generator)
        statistics["label"] = labels[indices]
        result.append((indices.tolist(), statistics))
    return result


def _recorded(visits: Sequence[Visit], size: int = SIZE) -> TrainingDynamics:
    recorded = TrainingDynamics(size)
    for indices, statistics in visits:
        recorded.record(BatchRecord(tuple(indices)), statistics)
    return recorded


def _by_hand(visits: Sequence[Visit], size: int = SIZE) -> dict[str, np.ndarray]:
    """Keep the history of every example, then look at it."""
    history: list[list[dict[str, Any]]] = [[] for _ in range(size)]
    for indices, statistics in visits:
        here: set[int] = set()
        for position, index in enumerate(indices):
            if index in here or not np.isfinite(float(statistics["loss"][position])):
                here.add(index)
                continue
            here.add(index)
            history[index].append({name: value[position].numpy() for name, value in statistics.items()})
    columns: dict[str, list[float]] = {
        name: []
        for name in (
            *("times_seen", "loss_mean", "loss_variance", "aum", "el2n", "epochs_wrong", "forgetting"),
            *("label", "prob_margin"),
        )
    }
    for visits_of_one in history:
        losses = np.array([visit["loss"] for visit in visits_of_one], dtype=float)
        wrong = [bool(visit["wrong"] >= 0.5) for visit in visits_of_one]
        columns["times_seen"].append(len(losses))
        if not len(losses):
            for name in columns:
                if name != "times_seen":
                    columns[name].append(-1 if name == "label" else np.nan)
            continue
        columns["loss_mean"].append(losses.mean())
        columns["loss_variance"].append(losses.var())
        columns["aum"].append(np.mean([visit["margin"] for visit in visits_of_one]))
        columns["el2n"].append(np.mean([visit["el2n"] for visit in visits_of_one]))
        columns["epochs_wrong"].append(np.sum([visit["wrong"] for visit in visits_of_one]))
        columns["forgetting"].append(sum(not a and b for a, b in zip(wrong, wrong[1:], strict=False)))
        label = int(visits_of_one[-1]["label"])
        mean = np.mean([visit["probabilities"] for visit in visits_of_one], axis=0)
        columns["label"].append(label)
        columns["prob_margin"].append(mean[label] - np.delete(mean, label).max())
    return {name: np.array(values, dtype=float) for name, values in columns.items()}


def _assert_columns(found: dict[str, Tensor], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        # Probabilities are summed in float32, to save memory.
        tolerance = 1e-6 if name == "prob_margin" else 1e-12
        np.testing.assert_allclose(found[name].numpy(), values, rtol=tolerance, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("batches", [1, 40, 150])
def test_columns_over_random_visits(batches: int, seed: int) -> None:
    """150 batches are more than wait at a time."""
    visits = _visits(batches, seed)
    found = _recorded(visits).columns()
    _assert_columns(found, _by_hand(visits))
    if batches == 150:
        assert int(found["forgetting"].nan_to_num().max()) >= 2, "the test has something to count"


def test_looking_in_between_changes_nothing() -> None:
    visits = _visits()
    recorded = TrainingDynamics(SIZE)
    for number, visit in enumerate(visits):
        recorded.record(BatchRecord(tuple(visit[0])), visit[1])
        if number % 7 == 0:
            _assert_columns(recorded.columns(), _by_hand(visits[: number + 1]))
            sums = recorded.sums
            sums.be_told(sums.names())
            for rows in (slice(0, 5), slice(5, None)):
                sums.take(rows, sums.addends(rows))
    _assert_columns(recorded.columns(), _by_hand(visits))


def test_examples_that_were_never_seen_are_unknown() -> None:
    columns = _recorded(_visits(never=(0, 3, 16))).columns()
    for index in (0, 3, 16):
        for name, values in columns.items():
            if name == "times_seen":
                assert values[index] == 0
            elif name == "label":
                assert values[index] == -1
            else:
                assert bool(values[index].isnan()), name
    others = [n for n in range(SIZE) if n not in (0, 3, 16)]
    assert all(bool(values[others].isfinite().all()) for values in columns.values())
    assert {columns[name].dtype for name in ("times_seen", "label")} == {torch.int64}


def test_nothing_recorded_is_no_columns() -> None:
    assert TrainingDynamics(SIZE).columns() == {}
    assert TrainingDynamics(SIZE).state_dict() == {}


def test_a_repeat_in_a_batch_counts_once() -> None:
    """A distributed sampler pads its last batch with examples it has had: here 5 and 2, with other numbers."""
    generator = torch.Generator().manual_seed(1)
    statistics = _statistics(6, generator)
    padded = _recorded([([5, 2, 9, 5, 2, 5], statistics)])
    plain = _recorded([([5, 2, 9], {name: value[:3] for name, value in statistics.items()})])
    for name, values in plain.columns().items():
        torch.testing.assert_close(padded.columns()[name], values, rtol=0, atol=0, equal_nan=True)
    assert padded.columns()["times_seen"].sum() == 3


@pytest.mark.parametrize(
    ("wrong", "events"),
    [
        ([1, 1, 1], 0),  # never known, so never forgotten
        ([0, 0, 0], 0),
        ([1, 0, 0], 0),  # learned
        ([0, 1, 1], 1),
        ([0, 1, 0, 1], 2),
        ([1, 0, 1, 0], 1),
    ],
)
def test_forgetting_is_from_right_to_wrong(wrong: list[int], events: int) -> None:
    recorded = TrainingDynamics(2)
    generator = torch.Generator().manual_seed(0)
    for one in wrong:
        # The other example is always wrong: it must not be mixed up.
        statistics = _statistics(2, generator) | {"wrong": torch.tensor([1.0, one])}
        recorded.record(BatchRecord((0, 1)), statistics)
    assert recorded.columns()["forgetting"].tolist() == [0, events]
    assert recorded.columns()["epochs_wrong"].tolist() == [len(wrong), sum(wrong)]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_losses_that_are_not_finite_are_counted_and_left_out(value: float) -> None:
    visits = _visits()
    bad = {0: 0, 5: 0, 11: 0}
    for number in (4, 9, 20):
        indices, statistics = visits[number]
        for name in ("loss", "margin", "el2n", "probabilities"):
            statistics[name][0] = value
        bad[number] = indices[0]
    recorded = _recorded(visits)
    _assert_columns(recorded.columns(), _by_hand(visits))
    expected = np.zeros(SIZE)
    for number in (4, 9, 20):
        expected[bad[number]] += 1
    assert recorded.sums["nonfinite"].tolist() == expected.tolist()


def test_an_ignored_label_is_not_a_loss_that_is_not_finite() -> None:
    """Unlabelled examples (`ignore_index`) have no loss, but there is nothing wrong with them."""
    logits, target = torch.randn(4, CLASSES), torch.tensor([1, -100, 0, -100])
    call = read_call(F.cross_entropy, (logits, target), {}, F.cross_entropy(logits, target))
    assert call is not None
    recorded = TrainingDynamics(SIZE)
    recorded.record(BatchRecord((7, 8, 9, 10)), call.statistics(4))
    columns = recorded.columns()
    assert columns["times_seen"][7:11].tolist() == [1, 0, 1, 0]
    assert columns["label"][7:11].tolist() == [1, -1, 0, -1]
    assert columns["prob_margin"][7:11].isnan().tolist() == [False, True, False, True]
    assert recorded.sums["nonfinite"].tolist() == [0.0] * SIZE


def test_columns_of_losses_that_say_less() -> None:
    """A squared error has no classes; several labels per example have no single one."""
    statistics = _statistics(3, torch.Generator().manual_seed(0))
    squared = {name: statistics[name] for name in ("loss", "el2n")}
    assert set(_recorded([([0, 1, 2], squared)]).columns()) == {"times_seen", "loss_mean", "loss_variance", "el2n"}
    several = squared | {name: statistics[name] for name in ("margin", "wrong")}
    columns = _recorded([([0, 1, 2], several)]).columns()
    assert set(columns) == {
        *("times_seen", "loss_mean", "loss_variance", "el2n", "aum", "epochs_wrong", "forgetting"),
    }


@pytest.mark.parametrize("grows", [False, True])
def test_of_many_classes_the_largest_probabilities_are_kept(grows: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is known of each example is the sum over its visits, but for what was too small when others came."""
    monkeypatch.setattr(class_shares, "_LARGEST", CLASSES - 1)
    monkeypatch.setattr(class_shares, "_ALL", SIZE * CLASSES if grows else 0)
    visits, expected = _visits(), _by_hand(_visits())
    recorded = _recorded(visits[:20])
    assert recorded.probabilities.largest_alone is not grows
    if grows:  # a stream turns out to be longer
        recorded.flush()
        recorded.grow(SIZE + 1)
    for indices, statistics in visits[20:]:
        recorded.record(BatchRecord(tuple(indices)), statistics)
    found = {name: column[:SIZE] for name, column in recorded.columns().items()}
    assert recorded.probabilities.largest_alone
    margin, exact = found.pop("prob_margin"), torch.as_tensor(expected["prob_margin"])
    _assert_columns(found, {name: v for name, v in expected.items() if name != "prob_margin"})
    seen = exact.isfinite()
    assert torch.equal(margin.isfinite(), seen)
    held = recorded.mean_probabilities(torch.arange(SIZE))
    assert held is not None
    rest = 1 - held.sum(1)
    assert bool(((margin - exact).abs() <= rest + 1e-6)[seen].all())
    assert 0 < float(rest[seen].max()) < 0.5
    other = TrainingDynamics(recorded.size)
    other.load_state_dict(recorded.state_dict())
    torch.testing.assert_close(other.columns()["prob_margin"][:SIZE], margin, rtol=0, atol=0, equal_nan=True)


def test_the_margin_of_a_label_and_the_best_of_the_others() -> None:
    """The given label is never the best of the others, however sure the shares are of it."""
    shares = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.2, 0.7], [0.5, 0.5, 0.0], [0.2, 0.8, 0.0], [torch.nan] * 3])
    margin, best = dynamics.margin_of_label(shares, torch.tensor([0, 1, 1, -1, 0]))
    torch.testing.assert_close(margin, torch.tensor([0.5, -0.5, 0.0, torch.nan, torch.nan]), equal_nan=True)
    assert best.tolist() == [1, 2, 0, -1, -1]
    margin, best = dynamics.margin_of_label(torch.ones(2, 1), torch.tensor([0, -1]))  # one class has no other
    assert margin.isnan().all()
    assert best.tolist() == [-1, -1]


def test_small_differences_of_large_losses_have_a_variance() -> None:
    """Sums are in float64: 1000 ± 1 in float32 would leave the variance 1 with an error of some percent."""
    recorded = TrainingDynamics(1)
    for number in range(200):
        loss = torch.tensor([1001.0 if number % 2 else 999.0])
        recorded.record(BatchRecord((0,)), {"loss": loss, "el2n": loss})
    assert float(recorded.columns()["loss_variance"]) == pytest.approx(1.0, rel=1e-6)
    constant = TrainingDynamics(1)
    for _ in range(50):
        constant.record(BatchRecord((0,)), {"loss": torch.tensor([0.1]), "el2n": torch.zeros(1)})
    assert 0 <= float(constant.columns()["loss_variance"]) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_any_precision_of_statistics(dtype: torch.dtype) -> None:
    visits = [
        (indices, {name: v.to(dtype) if v.is_floating_point() else v for name, v in statistics.items()})
        for indices, statistics in _visits()
    ]
    exact = [
        (indices, {name: v.double() if v.is_floating_point() else v for name, v in statistics.items()})
        for indices, statistics in visits
    ]
    _assert_columns(_recorded(visits).columns(), _by_hand(exact))


def test_what_is_recorded_is_not_changed() -> None:
    indices, statistics = _visits()[0]
    copies = {name: value.clone() for name, value in statistics.items()}
    recorded = TrainingDynamics(SIZE)
    recorded.record(BatchRecord(tuple(indices)), statistics)
    statistics["extra"] = torch.zeros(())
    _assert_columns(recorded.columns(), _by_hand([(indices, copies)]))
    assert all(torch.equal(statistics[name], value) for name, value in copies.items())


@pytest.mark.parametrize("count", [0, 2, 4])
def test_the_number_of_indices_must_be_that_of_examples(count: int) -> None:
    statistics = _statistics(3, torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=rf"3 examples in the batch, but {count} dataset indices"):
        TrainingDynamics(SIZE).record(BatchRecord(tuple(range(count))), statistics)


# --------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("split", [0, 1, 20, 40])
def test_going_on_from_a_checkpoint(split: int) -> None:
    visits = _visits()
    file = io.BytesIO()
    torch.save(_recorded(visits[:split]).state_dict(), file)
    file.seek(0)
    resumed = TrainingDynamics(SIZE)
    resumed.record(
        BatchRecord(tuple(visits[0][0])), visits[0][1]
    )  # what a run had before it was told to go on from elsewhere
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for visit in visits[split:]:
        resumed.record(BatchRecord(tuple(visit[0])), visit[1])
    _assert_columns(resumed.columns(), _by_hand(visits))


def test_a_state_holds_tensors_only_and_does_not_go_on_changing() -> None:
    """A checkpoint may be written by another thread while training goes on."""
    visits = _visits()
    recorded = _recorded(visits[:20])
    state = recorded.state_dict()
    assert all(isinstance(value, Tensor) for value in state.values())
    first, second = TrainingDynamics(SIZE), TrainingDynamics(SIZE)
    first.load_state_dict(state)
    for visit in visits[20:]:
        recorded.record(BatchRecord(tuple(visit[0])), visit[1])
        first.record(BatchRecord(tuple(visit[0])), visit[1])
    recorded.flush()
    first.flush()
    second.load_state_dict(state)
    _assert_columns(second.columns(), _by_hand(visits[:20]))


# -------------------------------------------------------------------------------------- what the graph tells of a loss


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_graph_tells_what_the_call_does(dtype: torch.dtype, weighted: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(6, CLASSES, generator=generator, dtype=dtype)).requires_grad_()
    target = torch.tensor([0, 3, -1, 2, 1, 1])
    weight = torch.rand(CLASSES, generator=generator, dtype=dtype) if weighted else None
    loss = F.cross_entropy(logits, target, weight, ignore_index=-1)
    heard = read_call(F.cross_entropy, (logits, target, weight), {"ignore_index": -1}, loss)
    told = loss_graph.call_in_graph(1024.0 * (loss / 4))
    assert heard is not None
    assert told is not None
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    for name, values in heard.statistics(6).items():
        torch.testing.assert_close(
            told.statistics(6)[name], values, rtol=tolerance, atol=tolerance, equal_nan=True, msg=name
        )


@pytest.mark.parametrize(
    "loss",
    [
        lambda x, y: F.cross_entropy(x, y) + x.square().mean(),
        lambda x, y: F.cross_entropy(x, y, label_smoothing=0.1),
        lambda x, y: F.cross_entropy(x.bfloat16(), y),
        lambda x, y: F.mse_loss(x[:, 0], y.float()),
        lambda x, y: checkpoint(F.cross_entropy, x, y, use_reentrant=False),
    ],
)
def test_a_graph_that_tells_less(loss: Any) -> None:
    """A penalty, other losses, rounded logits; and a checkpoint, which would run the loss once more to tell."""
    x, y = torch.randn(6, CLASSES, requires_grad=True), torch.zeros(6, dtype=torch.long)
    assert loss_graph.call_in_graph(loss(x, y)) is None


@pytest.mark.parametrize(
    "logits",
    [
        lambda x, w, some: x[some] @ w,
        lambda x, w, some: F.dropout((x @ w).relu(), 0.5)[some],
        lambda x, w, some: F.dropout(x[some] @ w, 0.5) * torch.ones(6, 1),
        lambda x, w, some: torch.ones(6, 1) * F.gelu(x[some]).reshape(6, 2, 2).flatten(1) @ w,
    ],
)
def test_rows_that_a_later_step_picks_are_not_those_of_the_examples(logits: Any) -> None:
    x, w, y = torch.randn(6, 4, requires_grad=True), torch.randn(4, CLASSES, requires_grad=True), torch.arange(6) % 3
    losses, batch = HeardLosses(), BatchRecord(tuple(range(6)))
    plain = losses.read(batch, F.cross_entropy(logits(x, w, slice(None)), y), None, {})
    assert plain is not None
    assert not losses._failed
    assert losses.read(batch, F.cross_entropy(logits(x, w, [1, 0, 2, 2, 4, 5]), y), None, {}) is None
    assert losses._failed  # it is listened to again from now on
