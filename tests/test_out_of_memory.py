"""Memory that runs out in a pass, wherever that is: the batch comes again in halves, and every number is the same."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import Classifier, loader, make_trainer, vectors
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import TensorDataset

from lightning_influence import AuditReport, Influence, InfluenceAudit, Queries
from lightning_influence.curvature import Curvature, FactorExamples, fit
from lightning_influence.data.source import ExampleSource
from lightning_influence.gradients.attempts import Attempt, RoomError
from lightning_influence.gradients.discover import discover
from lightning_influence.gradients.passes import BatchGradients, ExampleGradients
from lightning_influence.gradients.verify import inspect, roomy_batch_size
from lightning_influence.gradients.visitors import Guest, LossColumns, Visitor, visit
from lightning_influence.scores.examples import ExampleScorer
from lightning_influence.scores.measurements import Loss, measured_values
from lightning_influence.scores.plan import InfluencePlan, influence_scores
from lightning_influence.scores.products import StrongestPairs
from lightning_influence.scores.queries import prepared_queries

N, Q = 12, 5
STEP = 211  # of operations that memory runs out at
EVERY = FactorExamples(N, N)


class Exhausted(TorchDispatchMode):
    """A device whose memory runs out: at a number of its operations that take some, or with so many examples.

    Args:
        at: Number of the operation, counted within attempts only.
        size: Examples of an attempt that are too many.
    """

    def __init__(self, at: int | None = None, size: int | None = None) -> None:
        super().__init__()
        self.at, self.size, self.count, self.raised = at, size, 0, 0
        self.inside: list[Attempt] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        takes = not func._schema.is_mutable and all(each.alias_info is None for each in func._schema.returns)
        if self.inside and takes:
            self.count += 1
            if self.count - 1 == self.at or (self.size is not None and self.inside[-1].size >= self.size):
                self.raised += 1
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return func(*args, **(kwargs or {}))


@contextmanager
def exhausted(monkeypatch: pytest.MonkeyPatch, **limits: int | None) -> Iterator[Exhausted]:
    device, enter, leave = Exhausted(**limits), Attempt.__enter__, Attempt.__exit__

    def entered(attempt: Attempt) -> Attempt:
        device.inside.append(attempt)
        return enter(attempt)

    def left(attempt: Attempt, *error: Any) -> bool:
        device.inside.pop()
        return leave(attempt, *error)

    with monkeypatch.context() as patched, device, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="memory has run out")
        patched.setattr(Attempt, "__enter__", entered)
        patched.setattr(Attempt, "__exit__", left)
        yield device


def task(module: Any, batch: Any) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1], weight=torch.tensor([1.0, 3.0, 0.5]).double())


def network() -> nn.Module:
    torch.manual_seed(0)
    first = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.GELU(), nn.Flatten()
    net = nn.Sequential(*first, nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    net(torch.randn(32, 1, 4, 4).double())  # statistics of its own
    return net


def passes(count: int = N, seed: int = 1, net: nn.Module | None = None, batch_size: int = 5) -> ExampleGradients:
    net, generator = net or network(), torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 1, 4, 4, generator=generator).double()
    labels = torch.randint(3, (count,), generator=generator)
    source = ExampleSource(TensorDataset(inputs, labels), batch_size=batch_size)
    return ExampleGradients(net, task, source, discover(net, task, source))


class Pairs:
    """Looks for the strongest pairs, and notes the losses of the queries."""

    def __init__(self, training: ExampleGradients, queries: ExampleGradients) -> None:
        self.training, self.queries = training, queries
        self.losses = LossColumns(range(Q), training.device)

    def on_validation(self, number: int) -> list[Visitor]:
        return [self.losses]

    def on_training(self, curvature: Curvature | None, own: ExampleScorer) -> list[Guest]:
        (prepared,) = prepared_queries(curvature, self.queries.like(self.training), [list(range(Q))], N)
        self.strongest = StrongestPairs(prepared, 3, own, ("none", "relative"))
        return [Guest(self.strongest)]


def everything(training: ExampleGradients, queries: ExampleGradients) -> dict[str, Tensor]:
    """Fit, measure validation data, score, sweep, and look for pairs."""
    plan = InfluencePlan("ekfac", ("sampled", "sampled"), EVERY)
    companion = Pairs(training, queries)
    found = influence_scores(training, range(N), plan, queries=[(queries, range(Q))], companions=[companion])
    assert found.curvature is not None
    assert found.sweep is not None
    assert found.scores.features is not None
    rows = dict(found.scores.columns) | {"features": found.scores.features, "sweep": found.sweep.self_influence}
    rows |= {f"pairs {k}": part for k, part in enumerate(companion.strongest.result())}
    rows |= {f"query {name}": values for name, values in companion.losses.columns.gathered()[1].items()}
    rows["layers"] = torch.tensor(list(found.sweep.layer_shares.values()))
    assert found.curvature.blockwise is not None
    return rows | {name: block.eigenvalues for name, block in found.curvature.blockwise.blocks.items()}


def check(found: dict[str, Tensor], expected: dict[str, Tensor], where: str = "") -> None:
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-6, atol=1e-9, err_msg=f"{where}{name}")


def test_every_number_is_the_same_wherever_memory_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the forward or backward pass, in each visitor's look at a batch, and where it files what it has found."""
    expected = everything(passes(), passes(Q, 2))
    with exhausted(monkeypatch) as device:
        everything(passes(), passes(Q, 2))
    assert device.count > 1_000
    for at in range(STEP // 2, device.count, STEP):
        training, queries = passes(), passes(Q, 2)
        with exhausted(monkeypatch, at=at) as device_at:
            check(everything(training, queries), expected, f"operation {at}, ")
        assert device_at.raised == 1
        shrunk = [source.room.shrunk for source in (training.source, queries.source) if source.room.shrunk is not None]
        assert shrunk in ([(5, 3)], [(4, 2)], [(3, 2)], [(2, 1)]), at


class Sizes(LossColumns):
    """Notes the sizes of batches, too."""

    def __init__(self, gradients: ExampleGradients) -> None:
        super().__init__(range(N), gradients.device)
        self.sizes: list[int] = []

    def end(self, batch: BatchGradients) -> None:
        super().end(batch)
        self.sizes.append(len(batch.indices))


def test_the_size_that_has_room_is_kept_and_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    training = passes()
    training = training.calibrate(range(N))
    source, sizes, more = training.source, Sizes(training), Sizes(training)
    with exhausted(monkeypatch, size=4) as device:
        visit(training, range(N), [sizes])
        assert (device.raised, sizes.sizes) == (1, [2, 3, 2, 3, 2])
        visit(training, range(N), [more])
    assert (device.raised, more.sizes) == (1, [3, 3, 3, 3])
    assert source.room.notes() == [
        "memory ran out in passes over 5 examples at a time: they went on with 3, which changes no score"
    ]
    assert passes().source.room.notes() == []
    with pytest.warns(UserWarning, match="memory has run out in a pass over 5 examples at a time; it goes on with 3"):
        passes().source.room.shrink(5, 3)


def test_what_has_no_room_by_itself_is_told_with_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    for run in (
        lambda: visit(passes(), range(N), [Sizes(passes())]),
        lambda: inspect(passes(), range(N)),
        lambda: fit(passes(), "ggn", range(N), examples=EVERY, labels=("exact", "exact"), solver="cg"),
    ):
        with exhausted(monkeypatch, size=1), pytest.raises(RoomError, match="with a single example .*`layers=`"):
            run()
    net = network()
    monkeypatch.setattr(net[-1], "forward", lambda *_: torch.empty(2**60))  # type: ignore[index]
    with pytest.raises(RoomError, match="with 3 examples, which is as few as it takes .*`layers=`"):
        passes(net=net)


def test_the_look_before_training_takes_half_as_many(monkeypatch: pytest.MonkeyPatch) -> None:
    gradients = passes(40, batch_size=32)
    with exhausted(monkeypatch, size=9):
        inspection = inspect(gradients, range(40))
    assert inspection.examples == 8
    assert inspection.largest_error is not None
    assert roomy_batch_size(inspection, gradients.source, gradients.device) == 8


@pytest.mark.parametrize("solver", ["dense", "woodbury", "cg"])
def test_what_nobody_visits_comes_in_halves(solver: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products, outer products and samples of the GGN, losses of queries."""

    def run(size: int | None) -> dict[str, Tensor]:
        data, asked = (gradients.source.dataset for gradients in (passes(), passes(Q, 2)))
        with exhausted(monkeypatch, size=size) as device:
            influence = Influence(network(), task, data, batch_size=5)
            influence = influence.fit("ggn", solver=solver, damping=0.1)
            found = {"scores": torch.as_tensor(influence.pairs(asked).scores)}
            found["measured"] = measured_values(passes(), range(N), Loss())
            assert (device.raised > 3) == (size is not None)
        return found

    check(run(4), run(None))


def test_a_guest_that_has_no_room_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    """But not before a single example was tried."""
    training, tried = passes(), list[int]()

    class Heavy(Visitor):
        def begin(self, batch: BatchGradients) -> None:
            tried.append(len(batch.indices))
            raise torch.OutOfMemoryError("out of memory")

    guest, sizes = Guest(Heavy()), Sizes(training)
    with pytest.warns(UserWarning, match="memory has run out"):
        visit(training, range(N), [guest, sizes])
    assert isinstance(guest.error, torch.OutOfMemoryError)
    assert tried == [5, 2, 1]
    assert sum(sizes.sizes) == N


@pytest.mark.parametrize("what", ["factors", "scores", "sweep"])
def test_what_needs_less_is_scored_all_the_same(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, training, queries = everything(passes(), passes(Q, 2)), passes(), passes(Q, 2)
    method = {"factors": "update", "scores": "scores", "sweep": "self_influences"}[what]

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    companion = Pairs(training, queries)
    monkeypatch.setattr(f"lightning_influence.curvature.blocks.{OWNERS[method]}.{method}", fail)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="memory has run out")
        plan = InfluencePlan("ekfac", ("sampled", "sampled"), EVERY)
        found = influence_scores(training, range(N), plan, queries=[(queries, range(Q))], companions=[companion])
    assert found.sweep is None
    assert len(found.notes) == 1
    assert ("self_influence" in found.scores.columns) == (what == "sweep")
    for name, values in found.scores.columns.items():
        torch.testing.assert_close(values, expected[name], rtol=1e-6, atol=1e-9)


OWNERS = {"update": "block.CurvatureBlock", "scores": "kronecker.KroneckerBlock"}
OWNERS["self_influences"] = "kronecker.KroneckerBlock"


def audited(path: Path, around: Callable[[], Any]) -> AuditReport:
    audit, data = InfluenceAudit(tracin="epoch", queries=Queries("worst", count=3), dirpath=path / "audit"), vectors(24)
    torch.manual_seed(0)
    trainer = make_trainer(path, callbacks=[audit], max_epochs=2)
    with around():
        trainer.fit(Validating(), loader(data, 8, shuffle=True), loader(vectors(10, 3), 8))
    assert audit.report is not None
    return audit.report


class Validating(Classifier):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self._loss(self(batch[0]), batch))


def test_an_audit_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before training, at the end of an epoch, and after: with room for three examples instead of eight."""

    @contextmanager
    def nothing() -> Iterator[None]:
        yield

    expected = audited(tmp_path / "plain", nothing)
    found = audited(tmp_path / "short", lambda: exhausted(monkeypatch, size=4))
    assert found.columns.keys() == expected.columns.keys()
    for name in ("self_influence", "harm", "tracin", "loss"):
        np.testing.assert_allclose(found.columns[name], expected.columns[name], rtol=1e-4, atol=1e-6, err_msg=name)
    told = [note for note in found.manifest["notes"] if "memory ran out" in note]
    assert told == ["memory ran out in passes over 8 examples at a time: they went on with 2, which changes no score"]
    assert not any("memory" in note for note in expected.manifest["notes"])
