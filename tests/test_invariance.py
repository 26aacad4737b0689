"""The same numbers whatever the batch size, the workers and the order, and nothing moved along the way."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from lightning_influence.curvature import BLOCKS, Curvature, FactorExamples, fit
from lightning_influence.data.source import DataError, ExampleSource
from lightning_influence.gradients.coverage import Uncovered
from lightning_influence.gradients.discover import discover
from lightning_influence.gradients.passes import ExampleGradients
from lightning_influence.gradients.verify import inspect
from lightning_influence.gradients.visitors import ExampleScores
from lightning_influence.scores.examples import score_examples
from lightning_influence.scores.measurements import mean_gradient

N, CLASSES = 22, 4
# Only the order of summation may differ.
SAME: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-12}
EVERY = FactorExamples(10**9, 10**9)
# Batches of one, of sizes that leave one example and several over, and everything at once.
BATCH_SIZES = (1, 7, 8, N)


def cnn() -> nn.Sequential:
    torch.manual_seed(0)
    return (
        nn.Sequential(
            nn.Conv2d(2, 4, 3, stride=2, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(inplace=True),
            nn.Conv2d(4, 4, 3, groups=2, padding=1),
            nn.Dropout(0.5),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(36, CLASSES),
        )
        .double()
        .train()
    )


class Words(nn.Module):
    """A padded look-up that is the head, too, attention with time first, and a recurrent layer."""

    def __init__(self, recurrent: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(CLASSES, 4, padding_idx=1)
        self.place = nn.Parameter(torch.randn(1, 3, 4))
        self.attention, self.norm = nn.MultiheadAttention(4, 2, dropout=0.5), nn.LayerNorm(4)
        self.body: nn.Module = nn.GRU(4, 4, batch_first=True) if recurrent else nn.Linear(4, 4)
        self.head = nn.Linear(4, CLASSES)
        self.head.weight = self.words.weight
        self.double().train()

    def forward(self, ids: Tensor) -> Tensor:
        hidden = (self.words(ids) + self.place).transpose(0, 1)
        hidden = self.norm(self.attention(hidden, hidden, hidden)[0]).transpose(0, 1)
        if isinstance(self.body, nn.GRU):  # packed, which only autograd understands
            hidden = pack_padded_sequence(hidden, torch.full((len(ids),), ids.shape[1]), batch_first=True)
        out = self.body(hidden)
        if isinstance(out, tuple):
            out = pad_packed_sequence(out[0], batch_first=True)
        result: Tensor = self.head(torch.tanh(out[0] if isinstance(out, tuple) else out)).mean(1)
        return result


def sentences() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(CLASSES, (N, 3), generator=generator), torch.arange(N) % CLASSES


def images() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(N, 2, 6, 6, generator=generator).double(), torch.arange(N) % CLASSES


def task(module: Any, batch: Any) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1])


def passes(
    dataset: Dataset[Any],
    batch_size: int,
    workers: int = 0,
    *,
    net: nn.Module | None = None,
    task: Any = task,
    uncovered: Uncovered = "report",
) -> ExampleGradients:
    source = ExampleSource(dataset, batch_size=batch_size, num_workers=workers)
    net = net or cnn()
    coverage = discover(net, task, source, uncovered=uncovered)
    assert coverage.share == 1.0
    return ExampleGradients(net, task, source, coverage)


def audit(
    gradients: ExampleGradients,
    indices: Sequence[int] = range(N),
    name: Any = "ekfac",
    labels: Any = ("sampled", "exact"),
    examples: FactorExamples = EVERY,
) -> tuple[Curvature, ExampleScores]:
    curvature = fit(gradients, name, indices, examples=examples, labels=labels)
    query = curvature.solve(mean_gradient(gradients, indices[: N // 2] if len(indices) > 5 else indices))
    return curvature, score_examples(gradients, indices, curvature=curvature, query=query, features=True)


def about(name: str) -> Callable[[str], str]:
    """Put a name before the message of a failed comparison."""
    return lambda message: f"{name}: {message}"


def assert_same(found: tuple[Curvature, ExampleScores], expected: tuple[Curvature, ExampleScores]) -> None:
    for layer, block in expected[0].blocks.items():
        torch.testing.assert_close(found[0].blocks[layer].to_dense(), block.to_dense(), **SAME)
        assert found[0].dampings[layer] == pytest.approx(expected[0].dampings[layer], rel=1e-9)
    assert torch.equal(found[1].indices, expected[1].indices)
    assert found[1].columns.keys() == expected[1].columns.keys()
    for name, column in expected[1].columns.items():
        torch.testing.assert_close(found[1].columns[name], column, **SAME, msg=about(name))
    torch.testing.assert_close(found[1].features, expected[1].features)


class TestBatches:
    @pytest.mark.parametrize("labels", [("sampled", "sampled"), ("sampled", "exact"), ("true", "true")], ids="-".join)
    @pytest.mark.parametrize("name", BLOCKS)
    def test_batch_size(self, name: str, labels: tuple[str, str]) -> None:
        """With sampled labels too: each example has a stream of its own, whoever is in the batch beside it."""
        dataset = TensorDataset(*images())
        expected = audit(passes(dataset, N), name=name, labels=labels)
        assert expected[1].columns["self_influence"].min() > 0
        for batch_size in BATCH_SIZES[:-1]:
            assert_same(audit(passes(dataset, batch_size), name=name, labels=labels), expected)

    @pytest.mark.parametrize(
        ("name", "recurrent"), [("ekfac", False), ("kfac", False), ("diagonal", False), ("ekfac", True)]
    )
    def test_batch_size_for_blocks_of_every_kind(self, name: str, recurrent: bool) -> None:
        """The recurrent layer's gradients are computed one example at a time, in whatever batch it comes."""
        results = []
        for batch_size in (N, 7):
            gradients = passes(TensorDataset(*sentences()), batch_size, net=Words(recurrent), uncovered="exact")
            assert bool(gradients.coverage.one_by_one) == recurrent
            results.append(audit(gradients, name=name))
        assert results[0][1].columns["self_influence"].min() > 0
        assert_same(results[1], results[0])

    def test_workers(self) -> None:
        dataset = TensorDataset(*images())
        expected = audit(passes(dataset, 5))
        assert_same(audit(passes(dataset, 5, workers=2)), expected)

    def test_room_for_larger_batches(self) -> None:
        """The passes' batch size may grow beyond that of training, which is what a summed loss is scaled by."""

        def summed(module: Any, batch: Any) -> Tensor:
            return F.cross_entropy(module(batch[0]), batch[1], reduction="sum")

        results = []
        for size in (5, 1, 8, N):
            gradients = passes(TensorDataset(*images()), 5, task=summed)
            gradients.source.pass_batch_size = size
            results.append(audit(gradients))
            assert_same(results[-1], results[0])

    @pytest.mark.parametrize("labels", [("sampled", "sampled"), ("sampled", "exact")], ids="-".join)
    @pytest.mark.parametrize("workers", [0, 2])
    def test_order(self, labels: Any, workers: int) -> None:
        shuffled = torch.randperm(N, generator=torch.Generator().manual_seed(2)).tolist()
        gradients = passes(TensorDataset(*images()), 7, workers)
        results = []
        for order in (list(range(N)), shuffled):
            curvature = fit(gradients, "ekfac", order, examples=EVERY, labels=labels)
            query = curvature.solve(mean_gradient(gradients, [n for n in order if n % 3 == 0]))
            results.append(
                (curvature, score_examples(gradients, order, curvature=curvature, query=query, features=True))
            )
        assert_same(results[1], results[0])

    def test_random_subset_for_the_factors(self) -> None:
        dataset = TensorDataset(*images())
        sizes = FactorExamples(14, 9)
        expected = audit(passes(dataset, N), examples=sizes)
        for batch_size in (1, 4):
            assert_same(audit(passes(dataset, batch_size), examples=sizes), expected)

    def test_some_of_the_examples(self) -> None:
        """Scores belong to the data set's index, not to the position in the list asked for."""
        gradients = passes(TensorDataset(*images()), 4)
        curvature, whole = audit(gradients)
        some = score_examples(gradients, [17, 3, 8, 21, 0], curvature=curvature)
        assert some.indices.tolist() == [0, 3, 8, 17, 21]
        for name, column in some.columns.items():
            torch.testing.assert_close(column, whole.columns[name][some.indices], **SAME)

    def test_loss_per_example(self) -> None:
        """A task may return `[n]` losses of a kind that is not known; a last batch of one has them as well."""

        def own(module: Any, batch: Any) -> Any:
            logits = module(batch[0])
            return logits.logsumexp(1) - logits.gather(1, batch[1][:, None])[:, 0]

        dataset = TensorDataset(*images())
        expected = audit(passes(dataset, N, task=task), labels=("true", "true"))[1].columns
        for batch_size in BATCH_SIZES:
            found = audit(passes(dataset, batch_size, task=own), labels=("true", "true"))[1].columns
            for name in ("loss", "self_influence", "grad_norm_squared", "harm"):
                torch.testing.assert_close(found[name], expected[name], **SAME)

    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    def test_class_weights(self, reduction: str) -> None:
        """Such a mean is over weights: without one reference an example's scale is that of its batch."""
        weights = torch.tensor([0.1, 1.0, 4.0, 0.5]).double()

        def weighted(module: Any, batch: Any) -> Tensor:
            return F.cross_entropy(module(batch[0]), batch[1], weights, reduction=reduction)

        dataset = TensorDataset(*images())
        results = []
        for batch_size in (7, N, 1):
            gradients = passes(dataset, batch_size, task=weighted)
            columns = score_examples(gradients, range(N)).columns
            results.append((columns["loss"], columns["grad_norm_squared"]))
        for found in results[1:]:
            torch.testing.assert_close(found, results[0], **SAME)
        whole = F.cross_entropy(cnn().eval()(images()[0]), images()[1], weights, reduction=reduction)
        divisor = N if reduction == "sum" else 1
        torch.testing.assert_close(results[0][0].mean(), whole.detach() / divisor, **SAME)


class Augmented(Dataset[Any]):
    """Adds noise from every global stream, as augmentations do; also counts on state that workers copy."""

    def __init__(self, kind: str) -> None:
        self.inputs, self.targets = images()
        self.kind = kind

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        value = self.inputs[index]
        if self.kind == "torch":
            value = value + 0.5 * torch.randn(value.shape).double()
        elif self.kind == "numpy":
            value = value + torch.from_numpy(np.random.normal(0, 0.5, value.shape))
        elif self.kind == "python":
            value = value + random.gauss(0, 1) + random.choice([0.0, 0.1])
        elif self.kind == "sometimes" and random.random() < 0.5:
            value = value + np.random.normal() * torch.rand(())
        elif self.kind == "rare class" and int(self.targets[index]) == 2:
            # Neither the first example nor the last nor the one in the middle is of this class.
            value = value + 0.5 * torch.randn(value.shape).double()
        return value, self.targets[index]


class TestAugmentation:
    @pytest.mark.parametrize("kind", ["torch", "numpy", "python", "sometimes", "rare class"])
    def test_belongs_to_the_example(self, kind: str) -> None:
        """Drawn from a stream in order, it would be another with every batch, worker and subset."""
        dataset = Augmented(kind)
        expected = audit(passes(dataset, N))
        plain = audit(passes(Augmented("none"), N))
        assert (expected[1].columns["loss"] - plain[1].columns["loss"]).abs().max() > 1e-3, "nothing was augmented"
        for batch_size in (1, 7):
            gradients = passes(dataset, batch_size)
            random.random()
            np.random.rand()
            torch.rand(())
            assert_same(audit(gradients), expected)
        some = score_examples(gradients, [10, 21, 3, 2], curvature=expected[0]).columns
        torch.testing.assert_close(some["loss"], expected[1].columns["loss"][[2, 3, 10, 21]], **SAME)

    @pytest.mark.parametrize("kind", ["torch", "sometimes"])
    def test_workers(self, kind: str) -> None:
        dataset = Augmented(kind)
        expected = audit(passes(dataset, 5))
        for batch_size in (3, 7):
            assert_same(audit(passes(dataset, batch_size, workers=2)), expected)

    def test_differs_between_examples(self) -> None:
        dataset = Augmented("torch")
        dataset.inputs[:] = 0
        ((_, (values, _)),) = passes(dataset, N).source.batches(range(N))
        assert len({float(value.sum()) for value in values}) == N


class TestNothingMoves:
    @pytest.mark.parametrize("kind", ["none", "torch", "numpy", "python"])
    @pytest.mark.parametrize("workers", [0, 2])
    def test_random_streams(self, kind: str, workers: int) -> None:
        """Training goes on with the same numbers, whatever pass is run in between."""
        gradients = passes(Augmented(kind), 5, workers)
        steps: dict[str, Callable[[], Any]] = {
            "fit": lambda: fit(
                gradients, "ekfac", range(N), examples=FactorExamples(9, 9), labels=("sampled", "exact")
            ),
            "scores": lambda: score_examples(gradients, range(N)),
            "mean gradient": lambda: mean_gradient(gradients, range(N)),
            "calibrate": lambda: gradients.calibrate(range(N)),
            "losses": lambda: list(gradients.losses(range(N))),
            "inspect": lambda: inspect(gradients, range(N)),
            "discover": lambda: discover(gradients.module, task, gradients.source),
        }
        for name, step in steps.items():
            before = self.streams()
            step()
            assert self.streams() == before, name

    def streams(self) -> tuple[Any, ...]:
        of_numpy: Any = np.random.get_state()
        return random.getstate(), of_numpy[1].tolist(), torch.get_rng_state().tolist()

    def test_model(self) -> None:
        net = cnn()
        net[0].weight.requires_grad_(False)
        net[3].eval()
        before = {name: value.clone() for name, value in net.state_dict().items()}
        flags = [p.requires_grad for p in net.parameters()], [m.training for m in net.modules()]
        keys = list(net.state_dict())
        gradients = passes(TensorDataset(*images()), 7, net=net)
        inspect(gradients, range(N))
        audit(gradients)
        assert list(net.state_dict()) == keys
        assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
        assert all(p.grad is None for p in net.parameters())
        assert flags == ([p.requires_grad for p in net.parameters()], [m.training for m in net.modules()])

    def test_tensors_of_the_user(self) -> None:
        """A prompt that is learned outside of the model, a data set that requires gradients: none gets a `.grad`."""
        prompt = torch.ones(2, 6, 6, requires_grad=True, dtype=torch.float64)
        inputs, targets = images()
        inputs.requires_grad_()

        def prompted(module: Any, batch: Any) -> Tensor:
            return F.cross_entropy(module(batch[0] + prompt), batch[1])

        expected = audit(passes(TensorDataset((inputs + prompt).detach(), targets), 7))
        assert_same(audit(passes(TensorDataset(inputs, targets), 7, task=prompted)), expected)
        error = inspect(passes(TensorDataset(inputs, targets), 7, task=prompted), range(7)).largest_error
        assert error is not None
        assert error < 1e-10
        assert prompt.grad is None
        assert inputs.grad is None

    def test_dropout_is_off(self) -> None:
        """Masks would make every score a matter of luck."""
        gradients = passes(TensorDataset(*images()), 7)
        torch.manual_seed(1)
        first = audit(gradients)
        torch.manual_seed(2)
        assert_same(audit(gradients), first)


class TestSource:
    def test_batches_come_in_the_order_asked_for(self) -> None:
        source = ExampleSource(TensorDataset(torch.arange(N)), batch_size=4)
        wanted = [5, 3, 3, 21, 0, 8]
        batches = list(source.batches(wanted))
        assert [indices for indices, _ in batches] == [[5, 3, 3, 21], [0, 8]]
        assert [batch[0].tolist() for _, batch in batches] == [[5, 3, 3, 21], [0, 8]]
        source.pass_batch_size = 3
        assert [indices for indices, _ in source.batches(wanted)] == [[5, 3, 3], [21, 0, 8]]
        # No example is left over alone: it would meet steps that squeeze the batch away.
        assert [indices for indices, _ in source.batches(wanted, 5)] == [[5, 3, 3, 21], [0, 8]]
        assert [indices for indices, _ in source.batches(wanted, 1)] == [[index] for index in wanted]

    def test_of_a_loader(self) -> None:
        """Its data set, collation and workers; not its sampler, which shuffles and repeats."""

        def collate(items: list[Any]) -> Tensor:
            return -torch.stack([item[0] for item in items])

        loader = DataLoader(
            TensorDataset(torch.arange(N)), batch_size=6, shuffle=True, drop_last=True, collate_fn=collate
        )
        source = ExampleSource.from_loader(loader)
        assert (len(source), source.batch_size, source.num_workers) == (N, 6, 0)
        assert torch.cat([batch for _, batch in source.batches(range(N))]).tolist() == [-n for n in range(N)]
        assert ExampleSource.from_loader(loader, batch_size=9).batch_size == 9

    def test_streams_are_refused(self) -> None:
        class Stream(IterableDataset[Any]):
            def __iter__(self) -> Any:
                return iter([1])

        class NoLength:
            def __getitem__(self, index: int) -> int:
                return index

        datasets: list[Any] = [Stream(), NoLength()]
        for dataset in datasets:
            with pytest.raises(DataError, match=rf"{type(dataset).__name__} is a stream.*`__getitem__` and `__len__`"):
                ExampleSource(dataset)
        with pytest.raises(DataError, match="Stream is a stream"):
            ExampleSource.from_loader(DataLoader(Stream()))
        with pytest.raises(DataError, match="the data come from a list; expected a torch `DataLoader`"):
            ExampleSource.from_loader([torch.ones(2)])
        with pytest.raises(DataError, match=r"has `batch_size=None`.*Let the DataLoader make the batches"):
            ExampleSource.from_loader(DataLoader(TensorDataset(torch.arange(N)), batch_size=None))
