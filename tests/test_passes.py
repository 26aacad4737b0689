"""Passes over the data and the look at the first batch: every example's own gradients, whatever batch it is in."""

from __future__ import annotations

import random
import weakref
from collections import namedtuple
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import replace
from itertools import chain, repeat
from typing import Any
from unittest.mock import Mock, call

import numpy as np
import pytest
import reference as ref
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler, Subset, TensorDataset
from which_lightning import CombinedLoader

from lightning_influence.data.source import DataError, ExampleSource
from lightning_influence.gradients import passes
from lightning_influence.gradients.coverage import Coverage, cover
from lightning_influence.gradients.discover import discover
from lightning_influence.gradients.noise import ExampleNoise
from lightning_influence.gradients.passes import ExampleGradients
from lightning_influence.gradients.trace import Trace
from lightning_influence.gradients.verify import (
    Inspection,
    VerificationError,
    batch_gradient,
    inspect,
    looked_at,
    roomy_batch_size,
)
from lightning_influence.layers import per_sample
from lightning_influence.objective.task import TaskError

N, C = 21, 4
EXACT: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-11}
WEIGHT = torch.tensor([0.5, 1.0, 2.0, 3.0], dtype=torch.float64)
Task = Callable[[Any, Any], Tensor]


def _data(n: int = N, shape: tuple[int, ...] = (3,)) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, *shape, generator=generator, dtype=torch.float64)
    return TensorDataset(x, torch.randint(0, C, (n,), generator=generator))


def _net(outputs: int = C) -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, outputs)).double()


def _cross_entropy(module: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1])


def _gradients(
    task: Task = _cross_entropy,
    net: nn.Module | None = None,
    data: Dataset[Any] | None = None,
    batch_size: int = 8,
    coverage: Coverage | None = None,
    **options: Any,
) -> ExampleGradients:
    net = _net() if net is None else net
    source = ExampleSource(_data() if data is None else data, batch_size=batch_size)
    if coverage is None:
        to_device = options.get("to_device", lambda batch: batch)
        coverage = discover(net, task, source, to_device=to_device)
    return ExampleGradients(net, task, source, coverage, **options)


def _collect(
    gradients: ExampleGradients, indices: Sequence[int], labels: passes.Labels = "true", draw: int = 0
) -> dict[str, dict[int, Tensor]]:
    """Return every example's gradients `[draws, k, o, i]` by layer and dataset index."""
    result: dict[str, dict[int, Tensor]] = {}
    with closing(gradients.run(indices, labels, draw=draw)) as batches:
        for batch in batches:
            for io in batch.layers():
                formed = torch.stack([torch.einsum("knso,knsi->nkoi", g, io.x) for g in io.gs], 1)
                result.setdefault(io.name, {}).update(zip(batch.indices, formed, strict=True))
    return result


def _assert_same(first: dict[str, dict[int, Tensor]], second: dict[str, dict[int, Tensor]]) -> None:
    assert first.keys() == second.keys()
    for name in first:
        assert first[name].keys() == second[name].keys()
        for index in first[name]:
            torch.testing.assert_close(first[name][index], second[name][index], **EXACT)


def _assert_reference(
    found: dict[str, dict[int, Tensor]],
    net: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    data: TensorDataset,
    forward: Callable[[nn.Module, Tensor], Tensor] | None = None,
) -> None:
    """Compare with one backward pass per example of `loss`, the example's own."""
    if forward is None:
        expected = ref.per_example_gradients(net, loss, *data.tensors)
    else:
        batches = [(x[None], y[None]) for x, y in zip(*data.tensors, strict=True)]
        expected = ref.gradients_alone(net, lambda net, batch: loss(forward(net, batch[0]), batch[1]), batches)
    assert found
    for name, rows in found.items():
        matrix = ref.gradient_matrix(net.get_submodule(name), expected[f"{name}.weight"], expected.get(f"{name}.bias"))
        for index, gradient in rows.items():
            torch.testing.assert_close(gradient[0], matrix[:, index], **EXACT)


# ------------------------------------------------------------------------------------------------------- sources


def _fetched(source: ExampleSource, indices: Sequence[int]) -> tuple[list[int], list[Tensor]]:
    order: list[int] = []
    batches: list[Tensor] = []
    for batch_indices, batch in source.batches(indices):
        assert len(batch_indices) == len(batch[0]) <= source.batch_size
        order.extend(batch_indices)
        batches.append(batch[0])
    return order, batches


@pytest.mark.parametrize("batch_size", [1, 2, 4, 5, 20, 21, 100])
@pytest.mark.parametrize("workers", [0, pytest.param(2, id="two workers")])
def test_examples_come_in_the_given_order(batch_size: int, workers: int) -> None:
    if workers and batch_size != 4:
        batch_size = 5  # processes take time to start: two sizes are enough
    data = _data()
    source = ExampleSource(data, batch_size=batch_size, num_workers=workers)
    for indices in (list(range(N)), list(range(N))[::-1], [7, 3, 20, 0, 11], [4]):
        order, batches = _fetched(source, indices)
        assert order == indices
        assert torch.equal(torch.cat(batches), data.tensors[0][indices])
        assert len(batches) == -(-len(indices) // batch_size)
        if workers:
            break
    assert len(source) == N
    assert list(source.batches([])) == []
    assert [len(batch) for batch, _ in source.batches(range(9), 3)] == [3, 3, 3], "another size for one pass"
    source.pass_batch_size = 7
    assert [len(batch) for batch, _ in source.batches(range(14))] == [7, 7], "another size for all passes"
    assert source.batch_size == batch_size


class _OwnBatches:
    """A batch sampler as users write it: only iteration."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __iter__(self) -> Iterator[list[int]]:
        order = list(np.random.permutation(N))
        yield from (order[start : start + self.size] for start in range(0, N, self.size))


def _collate(examples: list[Any]) -> tuple[Tensor, Tensor]:
    return torch.stack([x + 100 for x, _ in examples]), torch.stack([y for _, y in examples])


@pytest.mark.parametrize(
    ("loader", "batch_size"),
    [
        pytest.param(lambda d: DataLoader(d, batch_size=6, shuffle=True), 6, id="shuffled"),
        pytest.param(lambda d: DataLoader(d, batch_size=6, drop_last=True), 6, id="dropping the last"),
        pytest.param(lambda d: DataLoader(d), 1, id="one by one"),
        pytest.param(
            lambda d: DataLoader(d, batch_sampler=BatchSampler(RandomSampler(d), 5, drop_last=True)),
            5,
            id="batch sampler",
        ),
        pytest.param(lambda d: DataLoader(d, batch_sampler=_OwnBatches(3)), 32, id="batch sampler without a size"),
    ],
)
def test_a_source_from_a_loader_has_every_example_in_order(
    loader: Callable[[Dataset[Any]], DataLoader[Any]], batch_size: int
) -> None:
    data = _data()
    source = ExampleSource.from_loader(loader(data))
    assert source.batch_size == batch_size
    order, batches = _fetched(source, range(N))
    assert order == list(range(N))
    assert torch.equal(torch.cat(batches), data.tensors[0])
    assert ExampleSource.from_loader(loader(data), batch_size=9).batch_size == 9


def test_a_source_from_a_loader_collates_as_the_loader_does() -> None:
    data = _data()
    source = ExampleSource.from_loader(DataLoader(data, batch_size=6, collate_fn=_collate))
    _, batches = _fetched(source, range(N))
    assert torch.equal(torch.cat(batches), data.tensors[0] + 100)


class _Numbered(Dataset[Any]):
    """Tells which worker, with which set-up, has fetched an example."""

    offset = 0

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Tensor:
        worker = torch.utils.data.get_worker_info()
        return torch.tensor([index, -1 if worker is None else worker.id, _Numbered.offset])


def _set_up_worker(worker: int) -> None:
    _Numbered.offset = 10 + worker


def test_workers_are_set_up_as_for_the_loader() -> None:
    loader = DataLoader(_Numbered(), batch_size=3, num_workers=2, worker_init_fn=_set_up_worker)
    rows = torch.cat([batch for _, batch in ExampleSource.from_loader(loader).batches(range(12))])
    assert rows[:, 0].tolist() == list(range(12))
    assert rows[:, 1].tolist() == [0, 0, 0, 1, 1, 1] * 2
    assert rows[:, 2].tolist() == [10, 10, 10, 11, 11, 11] * 2
    # So few examples are fetched by the process itself, which is not a worker and not set up as one.
    (alone,) = [batch for _, batch in ExampleSource.from_loader(loader).batches(range(3))]
    assert alone[:, 1:].tolist() == [[-1, 0]] * 3


class _Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(4))


class _NoLength(Dataset[Any]):
    def __getitem__(self, index: int) -> int:
        return index


@pytest.mark.parametrize(
    ("loader", "match"),
    [
        (lambda: DataLoader(_data(), batch_size=None), r"`batch_size=None`.*whole batches.*`batch_sampler=`"),
        (lambda: DataLoader(_Stream(), batch_size=2), r"_Stream is a stream.*`__getitem__` and `__len__`"),
        (lambda: DataLoader(_Stream(), batch_size=None), r"_Stream is a stream"),
        (lambda: [1, 2], r"come from a list; expected a torch `DataLoader`"),
        (lambda: CombinedLoader({"a": DataLoader(_data())}), r"come from a CombinedLoader; expected a torch"),
    ],
)
def test_loaders_whose_examples_have_no_index(loader: Callable[[], Any], match: str) -> None:
    with pytest.raises(DataError, match=match):
        ExampleSource.from_loader(loader())


@pytest.mark.parametrize("dataset", [_Stream(), _NoLength()])
def test_datasets_without_an_index_or_a_length(dataset: Dataset[Any]) -> None:
    with pytest.raises(DataError, match=rf"{type(dataset).__name__} is a stream"):
        ExampleSource(dataset)


# ------------------------------------------------------------------------------------------- random augmentations


class _Augmented(Dataset[Any]):
    """Adds noise from one of the global streams, or from all."""

    def __init__(self, *streams: str) -> None:
        self.streams = streams
        self.fetched = Mock()  # a list would be put back

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> Tensor:
        self.fetched(index)
        noise = {
            "python": lambda: random.random(),
            "numpy": lambda: np.random.rand(),
            "torch": lambda: float(torch.rand(())),
        }
        return torch.tensor([float(index), *(noise[stream]() for stream in self.streams)], dtype=torch.float64)


@pytest.mark.parametrize("streams", [("python",), ("numpy",), ("torch",), ("python", "numpy", "torch")])
def test_an_augmentation_belongs_to_its_example(streams: tuple[str, ...]) -> None:
    """The same in every pass, batch size and order; different for different examples."""
    first = torch.cat([b for _, b in ExampleSource(_Augmented(*streams), batch_size=N).batches(range(N))])
    torch.manual_seed(99)
    random.seed(99)
    np.random.seed(99)
    for batch_size, indices in ((1, range(N)), (4, range(N)), (7, range(N - 1, -1, -1)), (3, range(0, N, 2))):
        source = ExampleSource(_Augmented(*streams), batch_size=batch_size)
        for _ in range(2):
            rows = torch.cat([b for _, b in source.batches(indices)])
            assert torch.equal(rows, first[list(indices)])
    assert all(len(first[:, column].unique()) == N for column in range(1, 1 + len(streams)))


def test_an_augmentation_is_the_same_in_workers_and_subsets() -> None:
    data = Subset(_Augmented("numpy", "torch"), list(range(N)))
    alone, by_workers = (
        torch.cat([b for _, b in ExampleSource(data, batch_size=4, num_workers=workers).batches(range(N))])
        for workers in (0, 2)
    )
    assert torch.equal(alone, by_workers)
    assert len(alone[:, 1].unique()) == N


def test_an_augmentation_of_some_examples_only() -> None:
    """Say of a rare class: none of the examples that one might try first draws a number."""

    class Some(_Augmented):
        def __getitem__(self, index: int) -> Tensor:
            self.streams = ("torch", "numpy") if index in (1, 2, 15) else ()
            row = super().__getitem__(index)
            return F.pad(row, (0, 3 - len(row)))

    first = torch.cat([b for _, b in ExampleSource(Some(), batch_size=N).batches(range(N))])
    assert (first[:, 1:].sum(1) > 0).nonzero().squeeze(1).tolist() == [1, 2, 15]
    again = torch.cat([b for _, b in ExampleSource(Some(), batch_size=2).batches(range(N))])
    assert torch.equal(first, again)


def test_a_pass_fetches_every_example_once() -> None:
    data = _Augmented("python", "numpy", "torch")
    source = ExampleSource(data, batch_size=N)
    source.repeatable(range(N))  # the look before
    data.fetched.reset_mock()
    list(source.batches(range(N)))
    list(source.batches(range(5)))
    assert data.fetched.mock_calls == [call(index) for index in (*range(N), *range(5))]


# -------------------------------------------------------------------------------------------- gradients of a pass


@pytest.mark.parametrize("batch_size", [1, 4, 20, 21])
def test_true_gradients_are_those_of_the_reference(batch_size: int) -> None:
    gradients = _gradients(batch_size=batch_size)
    indices = [*range(N - 1, 2, -1), 0]
    found = _collect(gradients, indices)
    assert list(found) == ["0", "2"]
    assert list(found["0"]) == indices
    _assert_reference(found, gradients.module, F.cross_entropy, _data())


def test_batch_statistics_dropout_and_augmentation_do_not_make_the_batch_matter() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(), nn.Dropout(), nn.Linear(36, C)
    ).double()
    net(torch.randn(8, 2, 5, 5, dtype=torch.float64))  # running statistics

    class Noisy(Dataset[Any]):
        def __init__(self) -> None:
            self.plain = _data(shape=(2, 5, 5))

        def __len__(self) -> int:
            return N

        def __getitem__(self, index: int) -> Any:
            x, y = self.plain[index]
            return x + torch.randn_like(x), y

    by_size = [_collect(_gradients(net=net, data=Noisy(), batch_size=size), range(N)) for size in (3, 8, 21)]
    _assert_same(by_size[0], by_size[1])
    _assert_same(by_size[0], by_size[2])
    # Only the order of the sums differs, not the noise.
    assert float((by_size[0]["0"][0] - by_size[0]["0"][1]).abs().max()) > 1e-3


OWN_LOSSES: dict[str, tuple[Task, Callable[[Tensor, Tensor], Tensor]]] = {
    # The loss of the batch, and the own loss of an example as it must be in every batch (loader of batch size 8).
    "class weights": (
        lambda m, b: F.cross_entropy(m(b[0]), b[1], WEIGHT),
        lambda z, y: WEIGHT[y] * F.cross_entropy(z, y) / WEIGHT[_data().tensors[1]].mean(),
    ),
    "ignored": (
        lambda m, b: F.cross_entropy(m(b[0]), b[1], ignore_index=1),
        lambda z, y: (y != 1) * F.cross_entropy(z, y),
    ),
    "nll with weights": (
        lambda m, b: F.nll_loss(m(b[0]).log_softmax(1), b[1], weight=WEIGHT),
        lambda z, y: WEIGHT[y] * F.cross_entropy(z, y) / WEIGHT[_data().tensors[1]].mean(),
    ),
    "sum": (
        lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction="sum"),
        lambda z, y: F.cross_entropy(z, y),
    ),
    "sum with weights": (
        lambda m, b: 0.5 * F.cross_entropy(m(b[0]), b[1], WEIGHT, reduction="sum"),
        lambda z, y: 0.5 * WEIGHT[y] * F.cross_entropy(z, y),
    ),
    "squared, sum": (
        lambda m, b: F.mse_loss(m(b[0]), torch.eye(C, dtype=torch.float64)[b[1]], reduction="sum"),
        lambda z, y: (z - torch.eye(C, dtype=torch.float64)[y]).square().sum(),
    ),
    "weighted mean and a sum": (
        lambda m, b: F.cross_entropy(z := m(b[0]), b[1], WEIGHT) + 0.1 * F.cross_entropy(z, b[1], reduction="sum"),
        lambda z, y: (WEIGHT[y] / WEIGHT[_data().tensors[1]].mean() + 0.8) * F.cross_entropy(z, y),
    ),
    "plain": (_cross_entropy, F.cross_entropy),
    "smoothing": (
        lambda m, b: F.cross_entropy(m(b[0]), b[1], label_smoothing=0.2),
        lambda z, y: F.cross_entropy(z, y, label_smoothing=0.2),
    ),
}


@pytest.mark.parametrize("batch_size", [4, 8, 20, 21])
@pytest.mark.parametrize("name", OWN_LOSSES)
def test_after_calibration_an_example_weighs_the_same_in_every_batch(name: str, batch_size: int) -> None:
    task, own = OWN_LOSSES[name]
    net, data = _net(), _data()
    source = ExampleSource.from_loader(DataLoader(data, batch_size=8, shuffle=True))
    source.pass_batch_size = batch_size
    gradients = ExampleGradients(net, task, source, discover(net, task, source))
    found = _collect(gradients, range(N))
    _assert_reference(found, net, lambda z, y: own(z, y).sum(), data)
    sampled = _collect(gradients, range(N), "sampled", draw=1)
    # Passes over other data (here the same, one by one) take the scale over.
    one_by_one = ExampleGradients(net, task, ExampleSource(data, batch_size=1), gradients.coverage).like(gradients)
    _assert_same(sampled, _collect(one_by_one, range(N), "sampled", draw=1))
    _assert_same(_collect(gradients, range(N), "exact"), _collect(one_by_one, range(N), "exact"))
    expected = torch.stack([own(net(x[None]), y[None]).sum().detach() for x, y in zip(*data.tensors, strict=True)])
    with closing(gradients.run(range(N))) as batches:
        values = torch.cat([batch.loss.values for batch in batches if batch.loss.values is not None])
    torch.testing.assert_close(values, expected, **EXACT)


def test_ignored_labels_that_come_late_are_scaled_alike_in_every_batch() -> None:
    """The first batch has all its labels; later batches of 4 and of 8 keep other shares of theirs."""
    data = _data()
    data.tensors[1][8::2] = -100
    found = []
    for batch_size in (4, 8):
        gradients = _gradients(data=data, batch_size=batch_size)
        found.append(_collect(gradients, range(N)))
    _assert_same(*found)


@pytest.mark.parametrize("reads", [False, True])
def test_calibration_visits_one_batch_or_all_of_them_once(reads: bool) -> None:
    """One tells for all only if the task can't have branched on its values."""
    calls = Mock()

    def task(module: nn.Module, batch: Any) -> Tensor:
        calls(len(batch[0]))
        return _cross_entropy(module, batch) * (2 if reads and batch[0].mean() > 100 else 1)

    gradients = _gradients(task, batch_size=4)
    calls.reset_mock()
    assert gradients.scale is gradients.measuring(None).within(nullcontext).on(gradients.source).scale
    assert sum(size for (size,), _ in calls.call_args_list) == (4 + N if reads else 4)
    assert list((gradients.scale or {}).values()) == [1.0]


# --------------------------------------------------------------------------------------------------------- labels


@pytest.mark.parametrize(
    "loss",
    [
        pytest.param(lambda z, y: F.cross_entropy(z, y), id="cross-entropy"),
        pytest.param(lambda z, y: F.binary_cross_entropy_with_logits(z, F.one_hot(y, C).double()), id="multilabel"),
        pytest.param(lambda z, y: F.mse_loss(z, F.one_hot(y, C).double()), id="squared"),
        pytest.param(lambda z, y: F.cross_entropy(z, y) + F.mse_loss(2 * z, F.one_hot(y, C).double()), id="two terms"),
    ],
)
def test_sampled_labels_belong_to_the_example(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    def task(module: nn.Module, batch: Any) -> Tensor:
        return loss(module(batch[0]), batch[1])

    first = _collect(_gradients(task, batch_size=21), range(N), "sampled", draw=3)
    for size, indices in ((1, range(N)), (5, range(N - 1, -1, -1)), (8, range(1, N, 3))):
        again = _collect(_gradients(task, batch_size=size), indices, "sampled", draw=3)
        _assert_same(again, {name: {n: rows[n] for n in indices} for name, rows in first.items()})
    for other in (
        _collect(_gradients(task), range(N), "sampled", draw=4),
        _collect(_gradients(task, seed=1), range(N), "sampled", draw=3),
    ):
        same = [torch.allclose(first["2"][n], other["2"][n]) for n in range(N)]
        assert sum(same) < N, "another draw or seed gives other labels"


def test_labels_of_different_examples_are_independent() -> None:
    """400 copies of one example: labels fall by their part of the curvature, in classes of 400 q ± 4 deviations."""
    x = torch.zeros(400, 3, dtype=torch.float64)
    net = _net()
    gradients = _gradients(net=net, data=TensorDataset(x, torch.zeros(400, dtype=torch.long)), batch_size=100)
    p = net(x[:1]).softmax(1)[0].detach()
    found = _collect(gradients, range(400), "sampled", draw=1)["2"]
    bias = torch.stack([found[n][0, 0, :, -1] for n in range(400)])
    counts = torch.bincount(bias.abs().argmax(1), minlength=C).double()
    q = p * (p - torch.eye(C).double()).square().sum(1)
    q = q / q.sum()
    assert bool(((counts - 400 * q).abs() <= 4 * (400 * q * (1 - q)).sqrt()).all())


def test_labels_of_different_terms_are_independent() -> None:
    """Two equal terms agree on the label by chance only; with one label for both, the cross terms would not vanish."""
    gradients = _gradients(lambda m, b: F.cross_entropy(m(b[0]), b[1]) + F.cross_entropy(m(b[0]), b[1]))
    p = gradients.module(_data().tensors[0]).softmax(1).detach()
    found = _collect(gradients, range(N), "sampled")["2"]
    # The layer is called twice, and the gradient of its bias is the sum of both, each as long as the Hessian's trace.
    both = torch.stack([found[n][0, 0, :, -1] for n in range(N)]).square().sum(1)
    ratios = both / (1 - p.square().sum(1))
    assert int(torch.isclose(ratios, torch.full_like(ratios, 4.0)).sum()) < N / 2
    assert 1.2 < float(ratios.mean()) < 2.8
    assert float(ratios.min()) < 1.5


def test_exact_labels_give_the_fisher_of_every_example() -> None:
    gradients = _gradients(batch_size=8)
    found = _collect(gradients, range(N), "exact")
    expected = ref.class_gradients(gradients.module, _data().tensors[0], C)
    for name, rows in found.items():
        for n, gradient in rows.items():
            per_class = torch.cat(
                [expected[f"{name}.weight"][n].flatten(2), expected[f"{name}.bias"][n].unsqueeze(2)], 2
            )
            assert len(gradient) == C
            mine, dense = gradient.flatten(1), per_class.flatten(1)
            torch.testing.assert_close(mine.T @ mine, dense.T @ dense, **EXACT)


def test_exact_labels_of_several_rows_per_example() -> None:
    """Squared error of two rows per example: the exact Fisher is that of 2·C independent outputs, or is refused."""
    net = _net()
    x = torch.randn(6, 2, 3, dtype=torch.float64)
    target = torch.zeros(6, 2, C, dtype=torch.float64)

    def task(module: nn.Module, batch: Any) -> Tensor:
        return F.mse_loss(module(batch[0]).reshape(-1, C), batch[1].reshape(-1, C))

    gradients = _gradients(task, net, TensorDataset(x, target), batch_size=3)
    with closing(gradients.losses(range(6))) as losses:
        draws = {loss.exact_draws() for _, loss in losses}
    if draws == {None}:
        with pytest.raises(TaskError, match="no closed form"):
            _collect(gradients, range(6), "exact")
        return
    found = _collect(gradients, range(6), "exact")["2"]
    # The Hessian of each own loss by its 2·C outputs is 2 / (2·C).
    hidden = torch.cat([net[1](net[0](x)), torch.ones(6, 2, 1, dtype=torch.float64)], 2)
    assert draws == {2 * C}
    for n in range(6):
        mine = found[n].flatten(1)
        second_moment = torch.einsum("si,sj->ij", hidden[n], hidden[n]) / C
        expected = torch.kron(torch.eye(C, dtype=torch.float64), second_moment).detach()
        torch.testing.assert_close(mine.T @ mine, expected, **EXACT)


@pytest.mark.parametrize(
    ("task", "labels", "match"),
    [
        (
            lambda m, b: F.soft_margin_loss(z := m(b[0]), torch.ones_like(z)),
            "sampled",
            r'no known loss call was seen.*fisher="empirical"',
        ),
        (lambda m, b: F.soft_margin_loss(z := m(b[0]), torch.ones_like(z)), "exact", r"no known loss call was seen"),
        (
            lambda m, b: F.cross_entropy(m(b[0]).repeat(2, 1), b[1].repeat(2)),
            "exact",
            r'several decisions per example\); use `fisher="sampled"`',
        ),
    ],
)
def test_labels_that_cannot_be_had(task: Task, labels: passes.Labels, match: str) -> None:
    with pytest.raises(TaskError, match=match):
        _collect(_gradients(task), range(N), labels)


# --------------------------------------------------------------------------------------------- what a pass leaves


def _streams() -> Any:
    of_numpy: Any = np.random.get_state()
    return torch.get_rng_state().tolist(), random.getstate(), of_numpy[1].tolist()


def _traces(net: nn.Module) -> dict[str, Any]:
    return {
        "requires_grad": [p.requires_grad for p in net.parameters()],
        "modes": [m.training for m in net.modules()],
        "hooks": [len(m._forward_hooks) for m in net.modules()],
        "grads": [p.grad for p in net.parameters()],
        "buffers": [b.tolist() for b in net.buffers()],
        "function modes": torch._C._len_torch_function_stack(),
        "gradients enabled": torch.is_grad_enabled(),
    }


class _Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        first = _net(6)
        first[0].bias.requires_grad_(False)
        self.net = nn.Sequential(first, nn.BatchNorm1d(6), nn.Dropout(), nn.Linear(6, C)).double()
        self.net[1].eval()
        self.losses: list[float] = []

    def forward(self, x: Tensor) -> Any:
        return self.net(x)


def _counting(module: Any, batch: Any) -> Tensor:
    torch.rand(3)
    random.random()
    loss = _cross_entropy(module, batch)
    module.losses.append(loss.item())
    return loss


_attempt = Mock()


def _failing(module: Any, batch: Any) -> Tensor:
    _attempt()
    return _counting(module, batch)


def test_stored_tensors_are_looked_up_as_a_loader_would() -> None:
    """Batches of a plain tensor data set are rows of its tensors, without a look at each example."""
    data = _data()
    found = list(ExampleSource(data, batch_size=3).batches([4, 1, 3, 0, 2]))
    expected = DataLoader(data, batch_sampler=[[4, 1, 3], [0, 2]])
    assert [indices for indices, _ in found] == [[4, 1, 3], [0, 2]]
    for (_, batch), other in zip(found, expected, strict=True):
        assert type(batch) is type(other)
        assert all(torch.equal(a, b) for a, b in zip(batch, other, strict=True))


def test_noise_belongs_to_the_example() -> None:
    """Uniform, the same in any batch, another for each seed, draw, call and example."""
    whole = ExampleNoise(0, 1, range(4000))
    first, second = whole((5,)), whole((5,))
    assert torch.equal(ExampleNoise(0, 1, [7, 3])((5,)), first[[7, 3]])
    others = [ExampleNoise(seed, draw, range(4000))((5,)) for seed, draw in ((1, 1), (0, 2), (1, 0))]
    for other in (second, *others):
        assert not torch.equal(first, other)
        assert abs(float(torch.corrcoef(torch.stack([first.flatten(), other.flatten()]))[0, 1])) < 4 / 20_000**0.5
    counts = torch.histc(first.float(), 10, 0, 1)
    assert (counts - 2000).abs().max() < 5 * 1800**0.5
    between = torch.corrcoef(first.T) - torch.eye(5).double()
    assert between.abs().max() < 5 / 4000**0.5


@pytest.mark.parametrize("ending", ["all", "closed early", "consumer raises", "task raises"])
@pytest.mark.parametrize("pass_", ["true", "sampled", "exact", "losses", "calibrate"])
def test_the_model_is_as_before_however_a_pass_ends(ending: str, pass_: Any) -> None:
    net = _Normed()
    task = _failing if ending == "task raises" else _counting
    weighted = (lambda m, b: 0 * task(m, b) + F.cross_entropy(m(b[0]), b[1], WEIGHT)) if pass_ == "calibrate" else task
    _attempt.side_effect = None
    gradients = _gradients(weighted, net, batch_size=8)
    # It fails with any batch from then on: which examples do so is looked for, by halves.
    _attempt.side_effect = chain([None], repeat(ZeroDivisionError("in the task")))
    before, streams = _traces(net), _streams()
    assert len(set(before["modes"])) == len(set(before["requires_grad"])) == 2
    seen = 0

    def consume() -> None:
        nonlocal seen
        if pass_ == "calibrate":
            assert gradients.scale
            return
        iterator = gradients.losses(range(N)) if pass_ == "losses" else gradients.run(range(N), pass_)
        with closing(iterator) as batches:
            for _ in batches:
                seen += 1
                # What is covered takes part in the graph, what is frozen does not, and no weight gradient is kept.
                assert [p.requires_grad for p in net.parameters()] == before["requires_grad"]
                assert all(p.grad is None for p in net.parameters())
                assert not any(m.training for m in net.modules())
                if ending == "closed early":
                    break
                if ending == "consumer raises" and seen == 2:
                    raise KeyError("of the consumer")

    if ending == "task raises":
        with pytest.raises(TaskError, match=r"on examples .* \(ZeroDivisionError: in the task\)"):
            consume()
    elif ending == "consumer raises" and pass_ != "calibrate":
        with pytest.raises(KeyError, match="of the consumer"):
            consume()
    else:
        consume()
    assert _traces(net) == before
    assert _streams() == streams
    assert net.losses == []


def test_training_goes_on_after_a_pass() -> None:
    gradients = _gradients()
    _collect(gradients, range(N))
    x, y = _data().tensors
    F.cross_entropy(gradients.module(x), y).backward()
    assert all(p.grad is not None for p in gradients.module.parameters())


# --------------------------------------------------------------------------------------------------- other duties


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("batch_size", [4, 21])
def test_an_example_that_is_not_finite_is_told_and_leaves_the_others(value: float, batch_size: int) -> None:
    data = _data()
    clean = _collect(_gradients(), range(N))
    data.tensors[0][5, 1] = value
    gradients = _gradients(data=data, batch_size=batch_size)
    finite: dict[int, bool] = {}
    with closing(gradients.run(range(N))) as batches:
        for batch in batches:
            finite.update(zip(batch.indices, batch.finite.tolist(), strict=True))
            assert batch.counted == sum(batch.finite.tolist())
    assert [n for n in range(N) if not finite[n]] == [5]
    found = _collect(gradients, range(N))
    assert all(not bool(rows[5].any()) for rows in found.values())
    for name in clean:
        clean[name][5] = torch.zeros_like(clean[name][5])
    _assert_same(found, clean)


def test_a_loss_that_overflows_is_told_though_its_gradient_is_finite() -> None:
    """In float32 the square of 1e25 is infinite, its derivative is not."""
    data = TensorDataset(_data().tensors[0].float(), _data().tensors[1])

    def task(module: nn.Module, batch: Any) -> Tensor:
        huge = torch.where(batch[0][:, :1] == data.tensors[0][5, 0], 1e25, 0.0)
        return F.mse_loss(module(batch[0]), huge.expand(-1, C))

    with closing(_gradients(task, _net().float(), data).run(range(N))) as batches:
        finite = [flag for batch in batches for flag in batch.finite.tolist()]
    assert finite == [n != 5 for n in range(N)]


def test_passes_have_a_size_of_their_own_and_many_draws_that_of_training() -> None:
    gradients = _gradients()
    gradients.source.pass_batch_size = 16
    labels: passes.Labels
    for labels, sizes in (("true", [16, 5]), ("sampled", [16, 5]), ("exact", [8, 8, 5])):
        with closing(gradients.run(range(N), labels)) as batches:
            assert [len(batch.indices) for batch in batches] == sizes
    with closing(gradients.losses(range(N))) as losses:
        assert [len(indices) for indices, _ in losses] == [16, 5]


@pytest.mark.parametrize("everywhere", [False, True])
def test_each_process_has_its_share(everywhere: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes.distributed, "share", lambda indices: list(indices)[1::2])
    gradients = _gradients()
    with closing(gradients.run(range(N), everywhere=everywhere)) as batches:
        seen = [index for batch in batches for index in batch.indices]
    assert seen == (list(range(N)) if everywhere else list(range(1, N, 2)))
    with closing(gradients.losses(range(N))) as losses:
        assert [index for indices, _ in losses for index in indices] == list(range(1, N, 2))


def test_progress_and_forward_context_see_every_batch() -> None:
    shown: list[Any] = []
    entered: list[int] = []

    @contextmanager
    def bar(title: str, examples: int) -> Iterator[Callable[[int], None]]:
        shown.append((title, examples))
        yield shown.append
        shown.append("end")

    def context() -> AbstractContextManager[None]:
        entered.append(1)
        return nullcontext()

    gradients = _gradients(progress=bar, forward_context=context)
    assert gradients.scale
    entered.clear()
    with closing(gradients.run(range(N), title="a pass")) as batches:
        assert len(list(batches)) == 3
    assert shown == [("a pass", N), 8, 8, N - 16, "end"]
    assert len(entered) == 3
    batch_gradient(gradients, next(iter(gradients.source.batches([0, 1])))[1], 2)
    assert len(entered) == 4


def test_autocast_as_the_forward_context() -> None:
    """Captured gradients are float32 at least; autocast changes them by no more than bfloat16 rounds."""
    net = _net().float()
    data = TensorDataset(_data().tensors[0].float(), _data().tensors[1])
    plain = _collect(_gradients(net=net, data=data), range(N))
    autocast = _gradients(net=net, data=data, forward_context=lambda: torch.autocast("cpu", dtype=torch.bfloat16))
    found = _collect(autocast, range(N))
    for name in plain:
        for n in range(N):
            assert found[name][n].dtype == torch.float32
            assert float((found[name][n] - plain[name][n]).norm() / plain[name][n].norm()) < 0.05


Pair = namedtuple("Pair", ["x", "y"])


def test_batches_are_moved_with_their_structure() -> None:
    x, y = _data().tensors
    seen = Mock()

    class Nested(Dataset[Any]):
        def __len__(self) -> int:
            return N

        def __getitem__(self, index: int) -> Any:
            return {"pair": Pair(x[index], y[index]), "more": [x[index], (str(index),)]}

    def task(module: nn.Module, batch: Any) -> Tensor:
        seen(batch)
        return F.cross_entropy(module(batch["pair"].x), batch["pair"].y)

    plain = _collect(_gradients(), range(N))
    gradients = _gradients(task, data=Nested())
    assert gradients.scale
    seen.reset_mock()
    _assert_same(_collect(gradients, range(N)), plain)
    (batch,) = seen.mock_calls[0].args
    assert type(batch["pair"]) is Pair
    assert isinstance(batch["more"], list)
    assert batch["more"][1][0][:2] == ("0", "1")
    doubled = _gradients(data=TensorDataset(x / 2, y), to_device=lambda batch: [2 * batch[0], batch[1]])
    _assert_same(_collect(doubled, range(N)), plain)


def test_a_batch_of_one_is_avoided_for_steps_that_squeeze() -> None:
    """`net(x).squeeze()` loses the batch dimension of one last example, which the loader may have dropped."""

    def task(module: nn.Module, batch: Any) -> Tensor:
        return F.binary_cross_entropy_with_logits(module(batch[0]).squeeze(), (batch[1] > 1).double())

    net = _net(1)
    found = _collect(_gradients(task, net, batch_size=5), range(N))
    _assert_reference(found, net, lambda z, y: F.binary_cross_entropy_with_logits(z[:, 0], (y > 1).double()), _data())


# ------------------------------------------------------------------------------------------- the look at a batch


class _Tied(nn.Module):
    """One layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.last = nn.Linear(3, 5), nn.Linear(5, 5), nn.Linear(5, C)

    def forward(self, x: Tensor) -> Any:
        return self.last(self.again(torch.tanh(self.again(torch.tanh(self.first(x))))))


def _convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, groups=2),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 3, 3, stride=2, padding=1, padding_mode="circular"),
        nn.Flatten(),
        nn.Dropout(),
        nn.Linear(27, C),
    )


def _half_frozen() -> nn.Module:
    net = _net()
    net[0].bias.requires_grad_(False)
    net[2].weight.requires_grad_(False)
    return net


def _functional_weight(module: Any, batch: Any) -> Tensor:
    hidden = module[1](module[0](batch[0]))
    return F.cross_entropy(module[2](hidden) + F.linear(hidden, module[2].weight), batch[1])


def _only_functional(module: Any, batch: Any) -> Tensor:
    return F.cross_entropy(F.linear(module[1](module[0](batch[0])), module[2].weight), batch[1])


def _tokens(module: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(module(batch[0]).flatten(0, 1), batch[1].unsqueeze(1).expand(-1, 5).flatten())


def _squeezed(module: nn.Module, batch: Any) -> Tensor:
    return F.binary_cross_entropy_with_logits(module(batch[0]).squeeze(), (batch[1] > 1).double())


def _time_major(module: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(module(batch[0].transpose(0, 1)).mean(0), batch[1])


def _flattened(module: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(module(batch[0].flatten(0, 1)).unflatten(0, (-1, 5)).mean(1), batch[1])


def _flattened_time_major(module: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(module(batch[0].transpose(0, 1).flatten(0, 1)).unflatten(0, (5, -1)).mean(0), batch[1])


def _untapped(module: nn.Module, batch: Any) -> Any:
    return (module(batch[0]) - F.one_hot(batch[1], C)).abs().sum(1)


RIGHT: dict[str, tuple[Callable[[], nn.Module], Task, tuple[int, ...], bool, int | None]] = {
    # name: model, task, shape of an input, tapped, draws of the exact Fisher
    "plain": (_net, _cross_entropy, (3,), True, C),
    "convolutions": (_convolutional, _cross_entropy, (2, 5, 5), True, C),
    "a layer used twice": (_Tied, _cross_entropy, (3,), True, C),
    "half frozen": (_half_frozen, _cross_entropy, (3,), True, C),
    "weight used functionally, too": (_net, _functional_weight, (3,), True, C),
    "weight used only functionally": (_net, _only_functional, (3,), True, C),
    "tokens": (_net, _tokens, (5, 3), True, None),
    "time-major logits": (
        _net,
        lambda m, b: F.cross_entropy(m(b[0]).transpose(0, 1).reshape(-1, C), b[1].repeat(5)),
        (5, 3),
        True,
        None,
    ),
    "none, then sum": (
        _net,
        lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction="none").sum(),
        (3,),
        True,
        C,
    ),
    "time first": (_net, _time_major, (5, 3), True, C),
    "time first, as many steps as examples": (_net, _time_major, (8, 3), True, C),
    "examples and time in one dimension": (_net, _flattened, (5, 3), True, C),
    "time and examples in one dimension": (_net, _flattened_time_major, (5, 3), True, C),
    "class weights": (_net, OWN_LOSSES["class weights"][0], (3,), True, C),
    "ignored": (_net, OWN_LOSSES["ignored"][0], (3,), True, C),
    "sum": (_net, OWN_LOSSES["sum"][0], (3,), True, C),
    "weighted mean and a sum": (_net, OWN_LOSSES["weighted mean and a sum"][0], (3,), True, 2 * C),
    "smoothing": (_net, OWN_LOSSES["smoothing"][0], (3,), True, C),
    "none, then mean": (
        _net,
        lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction="none").mean(),
        (3,),
        True,
        C,
    ),
    "squared": (_net, lambda m, b: F.mse_loss(m(b[0]), F.one_hot(b[1], C).double()), (3,), True, C),
    "squeezed": (lambda: _net(1), _squeezed, (3,), True, 1),
    "a logged loss without gradients": (
        _net,
        lambda m, b: (torch.no_grad()(F.mse_loss)(z := m(b[0]), z), F.cross_entropy(z, b[1]))[1],
        (3,),
        True,
        C,
    ),
    "untapped, mean": (_net, lambda m, b: _untapped(m, b).mean(), (3,), False, None),
    "untapped, per example": (_net, _untapped, (3,), False, None),
    "an input that requires a gradient": (
        _net,
        lambda m, b: F.cross_entropy(m(b[0].clone().requires_grad_()), b[1]),
        (3,),
        True,
        C,
    ),
}


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("batch", [8, 5], ids=["full batch", "smaller batch"])
@pytest.mark.parametrize("name", RIGHT)
def test_right_gradients_pass(name: str, batch: int, calibrated: bool) -> None:
    model, task, shape, tapped, classes = RIGHT[name]
    torch.manual_seed(3)
    gradients = _gradients(task, model().double(), _data(shape=shape))
    if calibrated:
        gradients = gradients.calibrate(range(N))
    seen = inspect(gradients, range(batch))
    assert isinstance(seen, Inspection)
    assert seen.largest_error is not None
    assert seen.largest_error < 1e-10
    assert seen.tapped is tapped
    assert seen.exact_draws == classes
    assert list(seen.positions) == list(gradients.coverage.blocks)
    assert (gradients._scale.measure is None) is calibrated, "a look is no reason to visit all data"


def test_right_gradients_pass_in_float32() -> None:
    net = _convolutional().float()
    data = _data(shape=(2, 5, 5))
    gradients = _gradients(net=net, data=TensorDataset(data.tensors[0].float(), data.tensors[1]))
    error = inspect(gradients, range(8)).largest_error
    assert error is not None
    assert 0 < error < 1e-4


def test_what_the_look_at_a_batch_tells() -> None:
    gradients = _gradients(net=_convolutional().double(), data=_data(shape=(2, 5, 5)), batch_size=4)
    seen = inspect(gradients, range(N))
    # Whatever is asked for, one batch is looked at: 25 and 9 positions, then one.
    assert seen.positions == {"0": 25, "1": 1, "3": 9, "6": 1}
    # Inputs (padded by the layer itself where that is circular) and output gradients as they lie, then the patches.
    held = [4 * 2 * 25 + 4 * 4 * 25, 2 * 4 * 4 * 25, 4 * 4 * 49 + 4 * 3 * 9, 4 * 27 + 4 * C]
    assert seen.batch_bytes == 8 * (sum(held) + 2 * 4 * 25 * (9 + 1))
    assert inspect(gradients, range(N), verify=False).largest_error is None


def test_drained_layers_are_the_same_and_are_let_go() -> None:
    gradients = _gradients(net=_convolutional().double(), data=_data(shape=(2, 5, 5)))
    with closing(gradients.run(range(8))) as batches:
        expected = [(io.name, io.x.clone(), io.gs[0].clone()) for io in next(batches).layers()]
    with closing(gradients.run(range(8))) as batches:
        batch = next(batches)
        captured = [weakref.ref(use.call.input) for _, use in batch.capture._uses]
        for number, ((name, x, g), io) in enumerate(zip(expected, batch.drained(), strict=True)):
            assert all(tensor() is None for tensor in captured[: max(0, number - 1)]), "but for the layer before"
            assert captured[number]() is not None
            assert io.name == name
            assert torch.equal(io.x, x)
            assert torch.equal(io.gs[0], g)
        del io
        assert list(batch.layers()) == []


@pytest.mark.parametrize(
    ("training_batch", "taken"), [(1, 1), (2, 2), (16, 16), (20, 16), (32, 16), (64, 32), (65, 32)]
)
def test_half_a_training_batch_is_looked_at(training_batch: int, taken: int) -> None:
    assert looked_at(training_batch) == taken
    gradients = _gradients(data=_data(70), batch_size=training_batch)
    assert inspect(gradients, range(70), verify=False).examples == taken


def test_passes_take_as_many_examples_as_have_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small ones by the hundreds; of large ones what was looked at, which is half of what training holds."""
    small = Inspection({}, True, None, 16 * 5_000, None, 0.1, 16)
    source, host = ExampleSource(_data(70), batch_size=64), torch.device("cpu")

    def size(inspection: Inspection, device: torch.device = host) -> int:
        return roomy_batch_size(inspection, source, device)

    assert size(small) == 512
    assert size(replace(small, batch_bytes=16 * 2**19)) == 32
    assert size(replace(small, batch_bytes=16 * 2**22)) == 16
    assert size(replace(small, batch_bytes=64 * 2**22, examples=64)) == 64
    # An accelerator takes what training has room for, and more where its memory allows it.
    for free, taken in ((0, 64), (2**33, 256)):
        monkeypatch.setattr("lightning_influence.gradients.verify.available_bytes", lambda device, free=free: free)
        assert size(replace(small, batch_bytes=16 * 2**22), torch.device("cuda")) == taken
    source.room.shrunk = 64, 32
    assert size(small) == 32


@pytest.mark.parametrize("size", [3, 100])
def test_a_training_batch_is_looked_at_whatever_the_size_of_passes(size: int) -> None:
    gradients = _gradients()
    gradients.source.pass_batch_size = size
    seen = inspect(gradients, range(N))
    assert seen.examples == 8
    assert seen.largest_error is not None
    assert seen.largest_error < 1e-10


def test_a_single_example_can_be_looked_at() -> None:
    error = inspect(_gradients(), [3]).largest_error
    assert error is not None
    assert error < 1e-10


def test_examples_that_are_not_finite_are_not_compared() -> None:
    data = _data()
    data.tensors[0][2] = torch.nan
    seen = inspect(_gradients(data=data), range(8))
    assert seen.largest_error is not None
    assert seen.largest_error < 1e-10
    assert seen.examples == 8
    with pytest.raises(VerificationError, match=r"do not add up"):
        inspect(_gradients(_l2_penalty, data=data), range(8))
    data.tensors[0][:] = torch.nan
    assert inspect(_gradients(data=data), range(8)).largest_error is None


def test_no_example_to_look_at() -> None:
    with pytest.raises(VerificationError, match=r"no training example.*empty"):
        inspect(_gradients(), [])


@pytest.mark.parametrize("augmented", [False, True])
def test_looking_leaves_the_random_streams_alone(augmented: bool) -> None:
    class Noisy(Dataset[Any]):
        def __len__(self) -> int:
            return N

        def __getitem__(self, index: int) -> Any:
            x, y = _data()[index]
            return (x + torch.randn_like(x) + random.random() * np.random.rand(), y) if augmented else (x, y)

    gradients = _gradients(data=Noisy())
    before = _streams()
    assert inspect(gradients, range(8)).largest_error is not None
    assert _streams() == before


def _l2_penalty(module: Any, batch: Any) -> Any:
    return _cross_entropy(module, batch) + 0.01 * sum(p.square().sum() for p in module.parameters())


def _penalty_in_place(module: Any, batch: Any) -> Tensor:
    loss = _cross_entropy(module, batch)
    loss += 0.01 * module[0].weight.square().sum()
    return loss


def _batch_norm(module: Any, batch: Any) -> Tensor:
    return F.cross_entropy(F.batch_norm(module(batch[0]), None, None, training=True), batch[1])


def _batch_norm_of_images(module: Any, batch: Any) -> Tensor:
    images = batch[0].reshape(-1, 3, 2, 2)
    return F.cross_entropy(module(F.batch_norm(images, None, None, training=True).mean((2, 3))), batch[1])


def _normalised(module: Any, batch: Any) -> Tensor:
    logits = module(batch[0])
    return F.cross_entropy((logits - logits.mean(0)) / logits.std(0), batch[1])


def _mixup(module: Any, batch: Any) -> Tensor:
    x, y = batch
    share, other = random.uniform(0.3, 0.7), torch.arange(len(x)).roll(1)
    z = module(share * x + (1 - share) * x[other])
    return share * F.cross_entropy(z, y) + (1 - share) * F.cross_entropy(z, y[other])


def _contrastive(module: Any, batch: Any) -> Tensor:
    z = F.normalize(module(batch[0]), dim=1)
    return F.cross_entropy(z @ z.roll(1, 1).T, torch.arange(len(z)))


def _untapped_interaction(module: Any, batch: Any) -> Any:
    z = module(batch[0])
    return (z - z.mean(0)).abs().sum(1).mean()


DEPENDS = r"has another gradient in a batch than alone|depends on the other examples"
WRONG: dict[str, tuple[Task, tuple[int, ...], str]] = {
    "penalty": (_l2_penalty, (3,), r"do not add up .*a penalty on the weights"),
    "penalty added in place": (_penalty_in_place, (3,), r"do not add up .*in: 0 \("),
    "batch statistics": (_batch_norm, (3,), DEPENDS),
    "batch statistics of images": (_batch_norm_of_images, (12,), DEPENDS),
    "batch statistics by hand": (_normalised, (3,), DEPENDS),
    "mixup": (_mixup, (3,), DEPENDS),
    "contrastive": (_contrastive, (3,), DEPENDS),
    "untapped sum": (
        lambda m, b: _untapped(m, b).sum(),
        (3,),
        r"is not the mean of the losses of its examples alone.*one loss per example",
    ),
    "untapped interaction": (_untapped_interaction, (3,), r"is not the mean of the losses|" + DEPENDS),
    "logits in another order": (lambda m, b: F.cross_entropy(m(b[0]).flip(0), b[1].flip(0)), (3,), r"example 0 "),
    "examples in another order inside the model": (
        lambda m, b: F.cross_entropy(m(b[0].flip(0)).flip(0), b[1]),
        (3,),
        DEPENDS,
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_gradients_are_found(name: str) -> None:
    task, shape, match = WRONG[name]
    gradients = _gradients(task, data=_data(shape=shape))
    before = _traces(gradients.module)
    with pytest.raises(VerificationError, match=match):
        inspect(gradients, range(8))
    assert _traces(gradients.module) == before
    assert inspect(gradients, range(8), verify=False).largest_error is None, "the way out"


@pytest.mark.parametrize("steps", [5, 8], ids=["fewer steps than examples", "as many steps as examples"])
def test_time_major_inputs(steps: int) -> None:
    """Two tiny batches tell where the examples are; without them, they are run one at a time."""
    data, net = _data(shape=(steps, 3)), _net()
    gradients = _gradients(_time_major, net, data)
    _assert_reference(
        _collect(gradients, range(N)), net, F.cross_entropy, data, forward=lambda net, x: net(x.transpose(0, 1)).mean(0)
    )
    untraced = _gradients(_time_major, net, data, coverage=cover(net, trace=Trace(failure="not tried")))
    assert untraced.coverage.one_by_one == {"0.weight", "0.bias", "2.weight", "2.bias"}
    inspect(untraced, range(8))
    first: dict[str, Tensor] = {}
    second: dict[str, Tensor] = {}
    for each, found in ((gradients, first), (untraced, second)):
        with closing(each.run(range(N), whole=True)) as batches:
            for io in next(batches).layers():
                formed = per_sample.formed(io.x, io.gs[0])
                found.update(each.coverage.blocks[io.name].to_parameters(formed))
    assert first.keys() == second.keys()
    for key, value in first.items():
        torch.testing.assert_close(second[key], value, **EXACT)


def test_more_of_a_mean_is_not_taken_for_a_sum() -> None:
    """Two examples only: sum and mean differ by a factor of 2, which must be seen here, too."""
    with pytest.raises(VerificationError, match=r"is not the mean"):
        inspect(_gradients(lambda m, b: _untapped(m, b).sum()), range(2))
    assert inspect(_gradients(lambda m, b: _untapped(m, b).mean()), range(2)).largest_error is not None
