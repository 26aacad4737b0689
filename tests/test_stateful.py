"""Steps, data sets and collation with state of their own: training is bitwise that without the audit, or refused."""

from __future__ import annotations

import collections
import copy
import functools
import itertools
import multiprocessing
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import CLASSES, FEATURES, make_trainer, vectors
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, default_collate
from which_lightning import MisconfigurationException, pl

from lightning_influence import InfluenceAudit
from lightning_influence.data.contents import digest
from lightning_influence.data.repeatable import DataError
from lightning_influence.data.source import ExampleSource
from lightning_influence.gradients.discover import trace_model
from lightning_influence.objective.task import TrainingStepTask

pytestmark = pytest.mark.filterwarnings("ignore:no logger")

TENSORS = vectors().tensors
CALLS = 0
TALLY = {"calls": 0}
STREAM = random.Random(3)


class Net(pl.LightningModule):
    """A linear model; what its step does besides is in ``extra``."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(FEATURES, CLASSES)
        self.told: list[float] = []

    def extra(self, x: Tensor, logits: Tensor) -> Tensor | float:
        return 0.0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self.net(batch[0])
        return F.cross_entropy(logits, batch[1]) + self.extra(batch[0], logits)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.net.parameters(), lr=0.3)


def trained(
    make: Callable[[], Net], data: Callable[[], Dataset[Any]], directory: Path, *audits: Any, **arguments: Any
) -> list[Tensor]:
    """Train and return the weights, what the model has told, and what the random streams go on with."""
    pl.seed_everything(5, verbose=False)
    dataset, model = data(), make()
    trainer = make_trainer(directory / str(len(audits)), callbacks=list(audits), logger=False)
    trainer.fit(model, DataLoader(dataset, 4, shuffle=True, **arguments))
    return [*(value.clone() for value in model.state_dict().values()), torch.tensor(model.told), torch.rand(2)]


def check(make: Callable[[], Net], data: Callable[[], Dataset[Any]], directory: Path, **arguments: Any) -> list[str]:
    """Compare training with and without the audit; return the audit's notes."""
    audit = InfluenceAudit(curvature="diagonal")
    without, with_audit = (trained(make, data, directory, *audits, **arguments) for audits in ((), (audit,)))
    for one, other in zip(without, with_audit, strict=True):
        assert torch.equal(one, other)
    assert audit.has_report
    assert audit.report.status == "complete"
    return list(audit.report.manifest["notes"])


# --------------------------------------------------------------------------------------------------------- steps


class Teacher(Net):
    """A mean teacher, moved by the step itself."""

    def __init__(self, move: Callable[[nn.Module, nn.Module], None]) -> None:
        super().__init__()
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)
        self.move = move

    def extra(self, x: Tensor, logits: Tensor) -> Tensor:
        with torch.no_grad():
            self.move(self.teacher, self.net)
        return F.mse_loss(logits.softmax(1), self.teacher(x).softmax(1))


def by_data(teacher: nn.Module, student: nn.Module) -> None:
    for t, s in zip(teacher.parameters(), student.parameters(), strict=True):
        t.data = t.data * 0.9 + s.data * 0.1


def by_copy(teacher: nn.Module, student: nn.Module) -> None:
    for t, s in zip(teacher.parameters(), student.parameters(), strict=True):
        t.copy_(0.9 * t + 0.1 * s)


def by_lerp(teacher: nn.Module, student: nn.Module) -> None:
    for t, s in zip(teacher.parameters(), student.parameters(), strict=True):
        t.lerp_(s, 0.1)


def by_state(teacher: nn.Module, student: nn.Module) -> None:
    new = student.state_dict()
    teacher.load_state_dict({name: 0.9 * value + 0.1 * new[name] for name, value in teacher.state_dict().items()})


def by_numpy(teacher: nn.Module, student: nn.Module) -> None:
    for t, s in zip(teacher.parameters(), student.parameters(), strict=True):
        array = t.numpy()
        array += 0.1 * (s.detach().numpy() - array)


@pytest.mark.parametrize("move", [by_data, by_copy, by_lerp, by_state, by_numpy])
def test_a_teacher_that_the_step_moves(move: Callable[[nn.Module, nn.Module], None], tmp_path: Path) -> None:
    """Moved by extra passes as well, the teacher ends elsewhere (by 4e-2), and the student with it (1e-3)."""
    notes = check(lambda: Teacher(move), vectors, tmp_path)
    assert any("the step changes teacher.weight, teacher.bias: extra passes put that back" in note for note in notes)


class Meter:
    """A user's own statistics."""

    def __init__(self) -> None:
        self.sum = self.n = 0.0

    def update(self, value: float, n: int) -> None:
        self.sum, self.n = self.sum + value * n, self.n + n


class Bank:
    """A memory bank without ``__dict__``."""

    __slots__ = ("counts", "place", "rows")

    def __init__(self) -> None:
        self.rows = torch.zeros(6, CLASSES)
        self.place = 0
        self.counts: collections.Counter[int] = collections.Counter()

    def push(self, row: Tensor) -> None:
        self.rows[self.place] = row
        self.counts[self.place] += 1
        self.place = (self.place + 1) % len(self.rows)


class Metered(Net):
    def __init__(self) -> None:
        super().__init__()
        self.meter = Meter()

    def extra(self, x: Tensor, logits: Tensor) -> float:
        self.meter.update(float(logits.detach().mean()), len(x))
        return 0.0

    def on_train_epoch_end(self) -> None:
        self.told += [self.meter.n, self.meter.sum]
        self.meter = Meter()


class Banked(Net):
    """A bank within an object within a list."""

    def __init__(self) -> None:
        super().__init__()
        self.held = [Meter()]
        self.held[0].bank = Bank()  # type: ignore[attr-defined]

    def extra(self, x: Tensor, logits: Tensor) -> Tensor:
        bank: Bank = self.held[0].bank  # type: ignore[attr-defined]
        penalty = 0.1 * (logits @ bank.rows.clone().T).logsumexp(1).mean()
        bank.push(logits[0].detach())
        return penalty * (1 + bank.counts[0] % 3)


class Queued(Net):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("queue", torch.zeros(6, CLASSES))
        self.place = 0

    def extra(self, x: Tensor, logits: Tensor) -> Tensor:
        penalty = 0.1 * (logits @ self.queue.clone().T).logsumexp(1).mean()
        self.queue.data[self.place] = logits[0].detach()
        self.place = (self.place + 1) % 6
        return penalty


class Clipped(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        with torch.no_grad():
            for parameter in self.net.parameters():
                parameter.clamp_(-0.3, 0.3)
        return super().training_step(batch, batch_idx)


class Summed(Net):
    """The sum is written to in place and joins the graph of each loss."""

    def __init__(self) -> None:
        super().__init__()
        self.total = torch.zeros(())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.total += loss
        return loss

    def on_train_epoch_end(self) -> None:
        self.told.append(float(self.total.detach()))


def counting() -> Callable[[], int]:
    calls = 0

    def count() -> int:
        nonlocal calls
        calls += 1
        return calls

    return count


class Weighted(Net):
    """The weight of a penalty depends on how often the step was called; ``count`` says who knows."""

    def __init__(self, count: Callable[[], int]) -> None:
        super().__init__()
        self.count = count

    def extra(self, x: Tensor, logits: Tensor) -> Tensor:
        return logits.square().mean() * (0.02 * (self.count() % 7))


class Global(Net):
    def __init__(self) -> None:
        super().__init__()
        globals()["CALLS"] = TALLY["calls"] = 0

    def extra(self, x: Tensor, logits: Tensor) -> Tensor:
        global CALLS
        CALLS += 1
        TALLY["calls"] += 2
        return logits.square().mean() * (0.02 * ((CALLS + TALLY["calls"]) % 7))


class OfClass(Net):
    calls = 0

    def __init__(self) -> None:
        super().__init__()
        OfClass.calls = 0

    def extra(self, x: Tensor, logits: Tensor) -> Tensor:
        type(self).calls += 1
        return logits.square().mean() * (0.02 * (self.calls % 7))


def make_remembering() -> Callable[[], int]:
    def remembering(seen: list[int] = []) -> int:  # noqa: B006
        seen[:] = [seen[0] + 1] if seen else [1]
        return seen[0]

    return remembering


class Iterated(Net):
    def __init__(self) -> None:
        super().__init__()
        self.numbers, self.weights = itertools.count(), itertools.cycle([0.1, 0.2, 0.3])

    def extra(self, x: Tensor, logits: Tensor) -> Tensor:
        return logits.square().mean() * (0.02 * (next(self.numbers) % 7) * next(self.weights))


def test_a_step_with_iterators(tmp_path: Path) -> None:
    check(Iterated, vectors, tmp_path)


STEPS: dict[str, tuple[Callable[[], Net], str]] = {
    "meter": (Metered, "meter.sum, meter.n"),
    "bank in an object": (Banked, "held[0].bank.place, held[0].bank.rows, held[0].bank.counts[0]"),
    "queue in a buffer": (Queued, "place, queue"),
    "clipped weights": (Clipped, "net.weight"),
    "sum with a graph": (Summed, "total"),
    "closure": (lambda: Weighted(counting()), "calls"),
    "partial": (lambda: Weighted(functools.partial(lambda seen: seen.append(0) or len(seen), [])), "count[0]"),
    "default argument": (lambda: Weighted(make_remembering()), "count[0]"),
    "global": (Global, "CALLS"),
    "class attribute": (OfClass, "OfClass.calls"),
}


@pytest.mark.parametrize("name", STEPS)
def test_a_step_with_state(name: str, tmp_path: Path) -> None:
    make, paths = STEPS[name]
    notes = [note for note in check(make, vectors, tmp_path) if note.startswith("the step changes")]
    assert len(notes) == 1
    for path in paths.split(", "):
        assert path in notes[0]


def test_every_batch_of_a_pass_starts_where_training_stands(tmp_path: Path) -> None:
    """Else the scores of later batches would be those of a teacher that has come closer."""
    found = []
    for size in (2, 11):
        audit = InfluenceAudit(curvature="diagonal", tracin=None)
        original = ExampleSource.batches

        def in_size(
            self: ExampleSource, indices: Any, _: Any = None, size: int = size, original: Any = original
        ) -> Any:
            return original(self, indices, size if len(indices) == 22 else None)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ExampleSource, "batches", in_size)
            trained(lambda: Teacher(by_copy), vectors, tmp_path, audit)
        assert audit.has_report
        found.append(audit.report.columns["grad_norm_squared"])
    np.testing.assert_allclose(*found, rtol=1e-3)


# ----------------------------------------------------------------------------------------------------- data sets


class Data(Dataset[tuple[Tensor, Tensor]]):
    """Vectors; what a fetch does to them depends on a state of its own."""

    def __init__(self) -> None:
        self.x, self.y = (tensor.clone() for tensor in TENSORS)
        self.calls = 0

    def __len__(self) -> int:
        return len(self.x)

    def shift(self, index: int) -> Any:
        self.calls += 1
        return 0.02 * (self.calls % 11)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index] + self.shift(index), self.y[index]


class Late(Data):
    """Others only after some fetches: the first look can't tell."""

    def shift(self, index: int) -> float:
        self.calls += 1
        return 0.5 * (self.calls > 30)


class Slots(Data):
    __slots__ = ("count",)

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def shift(self, index: int) -> float:
        self.count += 1
        return 0.02 * (self.count % 11)


class Closure(Data):
    def __init__(self) -> None:
        super().__init__()
        self.count = counting()

    def shift(self, index: int) -> float:
        return 0.02 * (self.count() % 11)


class OfModule(Data):
    def __init__(self) -> None:
        super().__init__()
        globals()["CALLS"] = 0

    def shift(self, index: int) -> float:
        global CALLS
        CALLS += 1
        return 0.02 * (CALLS % 11)


class OfDataClass(Data):
    seen = 0

    def __init__(self) -> None:
        super().__init__()
        OfDataClass.seen = 0

    def shift(self, index: int) -> float:
        type(self).seen += 1
        return 0.02 * (self.seen % 11)


class Iterating(Data):
    def __init__(self) -> None:
        super().__init__()
        self.numbers = itertools.count()

    def shift(self, index: int) -> float:
        return 0.02 * (next(self.numbers) % 11)


class Pool(Data):
    """Mixes in what it has handed out before."""

    def __init__(self) -> None:
        super().__init__()
        self.pool: collections.deque[Tensor] = collections.deque(maxlen=3)

    def shift(self, index: int) -> Any:
        mixed = 0.1 * sum(self.pool)
        self.pool.append(self.x[index])
        return mixed


class Overwritten(Data):
    """Augments its own data in place."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x = self.x[index]
        x *= 0.99
        return x, self.y[index]


class Shared(Data):
    def __init__(self) -> None:
        super().__init__()
        self.count = multiprocessing.Value("i", 0)

    def shift(self, index: int) -> float:
        self.count.value += 1
        return 0.02 * (self.count.value % 11)


@pytest.mark.parametrize(
    "data", [Data, Late, Slots, Closure, OfModule, OfDataClass, Iterating, Pool, Overwritten, Shared]
)
def test_a_data_set_with_state(data: Callable[[], Data], tmp_path: Path) -> None:
    """Loaded in the process of training, whose state it is; examples are a function of their index all the same."""
    notes = check(Net, data, tmp_path)
    assert data is Iterating or any("fetching examples changes" in note for note in notes)
    dataset = data()
    source = ExampleSource(dataset, batch_size=22)
    examples = [next(source.batches(order))[1][0] for order in (range(22), range(21, -1, -1))]
    assert torch.equal(examples[0], examples[1].flip(0))


def drawing(generator: Any, draw: str) -> Callable[[], Any]:
    return lambda: getattr(generator, draw)()


class Augmented(Data):
    def __init__(self, draw: Callable[[], Any]) -> None:
        super().__init__()
        self.draw = draw

    def shift(self, index: int) -> Any:
        return 0.2 * self.draw()


class Drawer:
    __slots__ = ("stream",)

    def __init__(self) -> None:
        self.stream = np.random.default_rng(3)

    def __call__(self) -> float:
        return float(self.stream.random())


def of_module() -> float:
    return STREAM.random()


def of_torch(generator: torch.Generator) -> Callable[[], Tensor]:
    return lambda: torch.rand(FEATURES, generator=generator)


GENERATORS: dict[str, Callable[[], Callable[[], Any]]] = {
    "closure": lambda: drawing(np.random.RandomState(3), "rand"),
    "closure, torch": lambda: of_torch(torch.Generator().manual_seed(3)),
    "slots": Drawer,
    "bound method": lambda: random.Random(3).random,
    "module": lambda: STREAM.seed(3) or of_module,
}


@pytest.mark.parametrize("name", GENERATORS)
def test_a_generator_wherever_it_is(name: str, tmp_path: Path) -> None:
    """It is seeded for every example in a pass, and stands where training left it afterwards."""
    check(Net, lambda: Augmented(GENERATORS[name]()), tmp_path)
    source = ExampleSource(Augmented(GENERATORS[name]()), batch_size=3)
    rows = {index: row for indices, (x, _) in source.batches(range(22)) for index, row in zip(indices, x, strict=True)}
    ((_, (alone, _)),) = source.batches([7])
    assert torch.equal(alone[0], rows[7])


def test_what_is_filled_stays_filled_within_a_pass(capsys: pytest.CaptureFixture[str]) -> None:
    """A cache beside a counter is no reason to read every example from disk again."""

    class Cached(Data):
        def __init__(self) -> None:
            super().__init__()
            self.cache: dict[int, Tensor] = {}

        def shift(self, index: int) -> float:
            super().shift(index)
            if index not in self.cache:
                self.cache[index] = self.x[index]
                print("read")  # a list would be put back
            return 0.0

    dataset = Cached()
    source = ExampleSource(dataset, batch_size=4)
    next(source.batches([0]))  # the look
    capsys.readouterr()
    list(source.batches([*range(8), *range(8)]))
    assert capsys.readouterr().out == 8 * "read\n"
    assert dataset.cache == {}


def test_collation_with_a_counter(tmp_path: Path) -> None:
    class Collate:
        def __init__(self) -> None:
            self.batches = 0

        def __call__(self, examples: list[Any]) -> Any:
            self.batches += 1
            x, y = default_collate(examples)
            return x * (1 + 0.1 * (self.batches % 5)), y

    collate = Collate()
    source = ExampleSource(vectors(), batch_size=2, collate_fn=collate)
    first, *_, last = (batch[0] for _, batch in source.batches([0, 1] * 5))
    assert torch.equal(first, last)
    assert collate.batches == 0


def of_the_system() -> float:
    return int.from_bytes(os.urandom(8), "big") / 2**64  # one byte is the same twice in 256


class Large(Overwritten):
    """Too large to be copied for every pass."""

    def __init__(self) -> None:
        super().__init__()
        self.x = torch.cat([self.x, torch.zeros(2**17, FEATURES)])

    def __len__(self) -> int:
        return 22


def test_what_the_data_refuse_is_no_failure_of_the_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was taken for one, and the gradients were computed one example at a time."""

    def refuses(*_: Any) -> Any:
        raise DataError("no example has an index")

    source = ExampleSource(vectors())
    monkeypatch.setattr(source, "one_batch", refuses)
    with pytest.raises(DataError, match="no example has an index"):
        trace_model(Net(), TrainingStepTask(), source, indices=range(9))


@pytest.mark.parametrize("data", [lambda: Augmented(of_the_system), Large], ids=["system", "overwritten"])
def test_other_examples_every_time_are_refused_with_that_reason(data: Callable[[], Data], tmp_path: Path) -> None:
    """Not with that of a later check: \"its loss depends on the other examples\"."""
    with pytest.raises(MisconfigurationException, match=r"hands out something else for the same index .*example \d+,"):
        trained(Net, data, tmp_path, InfluenceAudit())


def test_state_that_workers_share_is_refused(tmp_path: Path) -> None:
    """They go on fetching while an extra pass does, and it can't be put back under their hands."""
    with pytest.raises(DataError, match=r"changes Shared\.count\._obj, which the 1 workers"):
        next(ExampleSource(Shared(), num_workers=1).batches(range(4)))


@pytest.mark.parametrize("workers", [0, 2])
def test_whoever_iterates_draws_from_their_own_streams(workers: int) -> None:
    """Fetches are seeded by the index: the streams went on from the last example's."""
    source = ExampleSource(Augmented(lambda: torch.rand(FEATURES)), batch_size=4, num_workers=workers)
    found = []
    for batches in (source.batches(range(22)), range(6)):
        pl.seed_everything(1, verbose=False)
        found.append([(torch.rand(1), random.random(), np.random.rand()) for _ in batches])
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        (torch.tensor([1.0, torch.nan]), torch.tensor([1.0, torch.nan]), True),
        (torch.tensor([1.0]), torch.tensor([1.0], dtype=torch.float64), False),
        ({"x": [np.zeros(2), "a"]}, {"x": [np.zeros(2), "a"]}, True),
        ({"x": [np.zeros(2), "a"]}, {"x": [np.ones(2), "a"]}, False),
        ((1, float("nan")), (1, float("nan")), True),
        ([1, 2], [1], False),
        (np.array(["a", None], dtype=object), np.array(["a", None], dtype=object), True),
    ],
)
def test_the_same_example(one: Any, other: Any, expected: bool) -> None:
    assert (digest(one) == digest(other)) is expected
