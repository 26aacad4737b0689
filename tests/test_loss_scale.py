"""The loss scale: terms told apart by place, one immutable number for each, whatever the batches."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from contextlib import closing
from typing import Any

import pytest
import reference as ref
import torch
import torch.nn.functional as F
from loss_cases import evaluate
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_influence.curvature import FactorExamples, fit
from lightning_influence.data.source import ExampleSource
from lightning_influence.gradients.discover import discover
from lightning_influence.gradients.passes import ExampleGradients
from lightning_influence.gradients.verify import inspect
from lightning_influence.objective.scale import HeardTerms, LossScale, ScaleError, TermKey, calling_place
from lightning_influence.objective.task import Task
from lightning_influence.scores.examples import score_examples
from lightning_influence.scores.pairs import pairwise_scores, top_scores

N, C, B = 48, 3, 8
WEIGHT = torch.tensor([1.0, 5.0, 0.2]).double()
EXACT: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-11}


def _net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, C + 1)).double()


def _data() -> TensorDataset:
    """Inputs, classes, values, kind: sorted by kind, so that the first batches have examples of one kind only."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(N, 5, generator=generator).double()
    y = torch.randint(0, C, (N,), generator=generator)
    return TensorDataset(x, y, torch.randn(N, generator=generator).double(), (torch.arange(N) >= N // 2).long())


def _passes(task: Task, batch_size: int = B, net: nn.Module | None = None) -> ExampleGradients:
    net = net or _net()
    source = ExampleSource(_data(), batch_size=batch_size)
    return ExampleGradients(net, task, source, discover(net, task, source))


def _norms(passes: ExampleGradients) -> Tensor:
    columns = score_examples(passes, range(N)).columns
    assert bool(columns["finite"].all())
    return columns["grad_norm_squared"]


def _expected(net: nn.Module, own: Callable[[nn.Module, list[Tensor]], Tensor]) -> Tensor:
    """Squared norms of every example's gradient, by plain autograd, one example at a time."""
    examples = [[t[k : k + 1] for t in _data().tensors] for k in range(N)]
    found = ref.gradients_alone(net, lambda module, batch: own(module, list(batch)), [tuple(e) for e in examples])
    return sum((value.flatten(1).square().sum(1) for value in found.values()), torch.zeros(N).double())


def _two_kinds(module: Any, batch: Any) -> Tensor:
    x, y, t, kind = batch
    z, a = module(x), kind == 0
    loss = z.new_zeros(())
    if a.any():
        loss = loss + F.cross_entropy(z[a][:, :C], y[a])
    if (~a).any():
        loss = loss + 0.5 * F.mse_loss(z[~a][:, C], t[~a])
    return loss


def _two_kinds_and_a_sum(module: Any, batch: Any) -> Tensor:
    x, y, t, kind = batch
    z, a = module(x), kind == 0
    loss = z.new_zeros(())
    if a.any():
        loss = loss + F.cross_entropy(z[a][:, :C], y[a])
    if (~a).any():
        loss = loss + 0.1 * F.mse_loss(z[~a][:, C], t[~a], reduction="sum")
    return loss


def _criterion(z: Tensor, y: Tensor) -> Tensor:
    """Called from two places."""
    return F.cross_entropy(z, y)


def _one_helper(module: Any, batch: Any) -> Tensor:
    x, y, _, kind = batch
    z, rare = module(x)[:, :C], kind * (y == 0) == 1
    loss = z.new_zeros(())
    if rare.any():
        loss = loss + 2 * _criterion(z[rare], y[rare])
    return loss + _criterion(z, y)


def _branch(module: Any, batch: Any) -> Tensor:
    x, y, t, kind = batch
    z = module(x)
    loss = F.cross_entropy(z[:, :C], y)
    if bool(kind.any()):
        loss = loss + 3 * (F.mse_loss(z[:, C], t, reduction="none") * kind).sum() / kind.sum()
    return loss


RARE = float(((_data().tensors[3] == 1) & (_data().tensors[1] == 0)).double().mean())

# The loss of a batch, and an example's own loss in every batch.
TASKS: dict[str, tuple[Task, Callable[[nn.Module, list[Tensor]], Tensor]]] = {
    "two kinds": (
        _two_kinds,
        lambda m, e: (
            2 * F.cross_entropy(m(e[0])[:, :C], e[1])
            if int(e[3]) == 0
            else 2 * 0.5 * F.mse_loss(m(e[0])[:, C], e[2])
        ),
    ),
    "two kinds, one of them summed": (
        _two_kinds_and_a_sum,
        lambda m, e: (
            2 * F.cross_entropy(m(e[0])[:, :C], e[1]) if int(e[3]) == 0 else B * 0.1 * F.mse_loss(m(e[0])[:, C], e[2])
        ),
    ),
    "a helper called from two places, the first of them now and then": (
        _one_helper,
        lambda m, e: (
            F.cross_entropy(m(e[0])[:, :C], e[1]) * (1 + 2 / RARE * float(int(e[3]) == 1 and int(e[1]) == 0))
        ),
    ),
    "labels of a half beside a term of all": (
        lambda m, b: (
            F.cross_entropy(z := m(b[0]), torch.where(b[3] == 0, b[1], -100)) + F.mse_loss(z[:, C], b[2])
        ),
        lambda m, e: (
            2 * float(int(e[3]) == 0) * F.cross_entropy(m(e[0]), e[1]) + F.mse_loss(m(e[0])[:, C], e[2])
        ),
    ),
    "a mean by hand in a branch that the first examples do not take": (
        _branch,
        lambda m, e: (
            F.cross_entropy(m(e[0])[:, :C], e[1]) + 3 * F.mse_loss(m(e[0])[:, C], e[2]) * float(int(e[3])) / 0.5
        ),
    ),
    "class weights": (
        lambda m, b: F.cross_entropy(m(b[0])[:, :C], b[1], WEIGHT),
        lambda m, e: (
            WEIGHT[e[1]].sum() * F.cross_entropy(m(e[0])[:, :C], e[1]) / WEIGHT[_data().tensors[1]].mean()
        ),
    ),
    "sum": (
        lambda m, b: 0.5 * F.cross_entropy(m(b[0]), b[1], reduction="sum"),
        lambda m, e: 0.5 * F.cross_entropy(m(e[0]), e[1]),
    ),
    "sums": (
        lambda m, b: (
            F.cross_entropy(z := m(b[0]), b[1], reduction="none").sum() + F.mse_loss(z[:, C], b[2], reduction="sum")
        ),
        lambda m, e: F.cross_entropy(m(e[0]), e[1]) + F.mse_loss(m(e[0])[:, C], e[2]),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TASKS)
def test_an_example_weighs_the_same_in_every_batch(name: str) -> None:
    """Numbered by their order, the second term of a batch without the first had its scale: 75.5 or 12.1 for 30.9.

    The first batches have examples of one kind only, and nothing was calibrated by hand.
    """
    task, own = TASKS[name]
    expected = None
    for size in (3, B, 20, N):
        passes = _passes(task)
        passes.source.pass_batch_size = size
        if expected is None:
            expected = _expected(passes.module, own)
        torch.testing.assert_close(_norms(passes), expected, **EXACT)


MASKED: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "ignore_index": lambda z, y, m: F.cross_entropy(z, torch.where(m, y, -100)),
    "mask": lambda z, y, m: (F.cross_entropy(z, y, reduction="none") * m).sum() / m.sum(),
    "where": lambda z, y, m: torch.where(m, F.cross_entropy(z, y, reduction="none"), 0).sum() / m.sum(),
    "picked losses": lambda z, y, m: F.cross_entropy(z, y, reduction="none")[m].mean(),
    "picked rows": lambda z, y, m: F.cross_entropy(z[m], y[m]),
    "a divisor for each element": lambda z, y, m: (F.cross_entropy(z, y, reduction="none") * m / m.sum()).sum(),
    "a divisor of all, for each element": lambda z, y, m: (F.cross_entropy(z, y, reduction="none") * m / len(y)).sum(),
    "weights of 0": lambda z, y, m: (F.cross_entropy(z, y, reduction="none") * (3.0 * m)).sum() / (3.0 * m).sum(),
}


@pytest.mark.parametrize("name", MASKED)
def test_the_same_mask_is_the_same_loss_however_it_is_written(name: str) -> None:
    """The unit is that of the criterion for one example; what the mask leaves out has no loss and no label."""
    how = MASKED[name]

    def task(module: Any, batch: Any) -> Tensor:
        return how(module(batch[0])[:, :C], batch[1], batch[2] > -0.5)

    keep = (_data().tensors[2] > -0.5).double()
    assert 0.2 < float(keep.mean()) < 0.8
    passes = _passes(task)
    plain = _expected(passes.module, lambda m, e: F.cross_entropy(m(e[0])[:, :C], e[1]))
    for size in (5, B, N):
        passes.source.pass_batch_size = size
        columns = score_examples(passes, range(N)).columns
        torch.testing.assert_close(columns["grad_norm_squared"], plain * keep, **EXACT)
        assert torch.equal(columns["label"] >= 0, keep.bool())


@pytest.mark.parametrize("name", ["two kinds", "class weights"])
def test_nobody_changes_the_scale_of_others(name: str) -> None:
    """`fit("ggn")` left that of its subset on the passes, `pairwise_scores` that of the data on the queries."""
    task, _ = TASKS[name]
    passes = _passes(task)
    few = ExampleSource(TensorDataset(*(t[4::5] for t in _data().tensors)), batch_size=4)
    own = ExampleGradients(passes.module, task, few, passes.coverage)
    before = dict(own.scale or {})
    curvature = fit(
        passes, "ggn", range(N), examples=FactorExamples(N, N, 8), labels=("sampled", "sampled"), damping=0.1
    )
    of_all = dict(_passes(task).calibrate(range(N)).scale or {})
    assert dict(passes.scale or {}) == of_all
    pairwise_scores(passes, range(N), curvature, own, [0, 1])
    top_scores(passes, range(N), curvature, own, [0, 1], 2)
    assert dict(own.scale or {}) == before
    assert dict(own.like(passes).scale or {}) == of_all != before
    assert dict(own.scale or {}) == before
    with pytest.raises(TypeError):
        passes.scale[next(iter(of_all))] = 1.0  # type: ignore[index]
    assert copy.deepcopy(passes.scale) == passes.scale


def test_queries_weigh_as_the_training_data() -> None:
    """A query that is a training example scores as that one, though its own data have other class weights."""
    passes = _passes(TASKS["class weights"][0])
    few = TensorDataset(*(t[:6] for t in _data().tensors))
    queries = ExampleGradients(passes.module, passes.task, ExampleSource(few, batch_size=2), passes.coverage)
    curvature = fit(passes, "identity", range(N), examples=FactorExamples(N, N), labels=("true", "true"))
    scores = pairwise_scores(passes, range(N), curvature, queries, range(6)).scores
    torch.testing.assert_close(scores.diagonal(), _norms(passes)[:6], **EXACT)


def test_a_loop_that_leaves_out_heads_in_some_batches_is_refused() -> None:
    """Whose loss the first call of a batch is can't be told."""

    def task(module: Any, batch: Any) -> Tensor:
        x, y, _, _ = batch
        z, loss = module(x), x.new_zeros(())
        for label in range(C):
            if (y == label).any():
                loss = loss + F.cross_entropy(z[y == label], y[y == label])
        return loss

    with pytest.raises(ScaleError, match=r"CrossEntropy at .*test_loss_scale.py:\d+.* is called 2 or 3 times"):
        _norms(_passes(task, 4))


def test_a_loop_over_all_heads_is_told_apart_by_its_order() -> None:
    def task(module: Any, batch: Any) -> Tensor:
        z = module(batch[0])
        masks = (batch[1] == 0, batch[2] > 0)
        return torch.stack([F.cross_entropy(z, torch.where(m, batch[1], -100)) for m in masks]).sum()

    passes = _passes(task, 16)
    y, t = _data().tensors[1:3]
    shares = [float((y == 0).double().mean()), float((t > 0).double().mean())]
    assert [key.occurrence for key in passes.scale or {}] == [0, 1]
    weights = (y == 0).double() / shares[0] + (t > 0).double() / shares[1]
    expected = _expected(passes.module, lambda m, e: F.cross_entropy(m(e[0]), e[1])) * weights.square()
    torch.testing.assert_close(_norms(passes), expected, **EXACT)


def test_a_term_that_no_training_batch_had_is_refused() -> None:
    """Taken as its own batch has it, it would weigh otherwise in every batch."""
    extra: list[bool] = []

    def task(module: Any, batch: Any) -> Tensor:
        z = module(batch[0])
        loss = F.cross_entropy(z, batch[1], WEIGHT.new_ones(C + 1))
        return loss + F.mse_loss(z[:, 0], batch[2]) if extra else loss

    passes = _passes(task)
    assert passes.scale
    extra.append(True)
    with pytest.raises(ScaleError, match=r"has a term that the loss scale does not know, SquaredError at .*`task=`"):
        _norms(passes)


def test_a_term_in_some_batches_that_has_the_divisor_of_all() -> None:
    """A mean over all examples of a batch that is left out where it would be 0: `1 / n` where it is, and no more."""

    def task(module: Any, batch: Any) -> Tensor:
        x, y, _, kind = batch
        z, some = module(x), (kind == 1) & (y == 0)
        loss = F.cross_entropy(z, y)
        if some.any():
            loss = loss + (F.mse_loss(z[:, C], batch[2], reduction="none") * some).mean()
        return loss

    passes = _passes(task, 4)
    assert sorted((passes.scale or {}).values()) == [1.0, 1.0]


def test_the_trial_before_training_leaves_the_scale_to_be_measured() -> None:
    passes = _passes(TASKS["class weights"][0])
    inspect(passes, range(B))
    assert passes._scale.measure is not None


def test_places() -> None:
    """Two calls in one line, and a helper called from two lines: four places; the same call twice: one."""

    def both() -> tuple[Any, Any]:
        return calling_place(), calling_place()

    first, second = both()
    third, _ = both()
    assert len({first, second, third}) == 3
    assert len({calling_place() for _ in range(3)}) == 1
    key = TermKey("CrossEntropy", first, 1)
    assert str(key).endswith(f"test_loss_scale.py:{first[0][1]} (number 2 there)")
    assert LossScale({key: 2.0})[key] == 2.0


def test_keys_tell_terms_apart_in_any_batch() -> None:
    net, tensors = _net(), _data().tensors
    kinds = [
        [term.key for term in evaluate(_two_kinds, net, [t[part] for t in tensors], 4).terms]
        for part in (slice(0, 4), slice(N - 4, N), slice(N // 2 - 2, N // 2 + 2))
    ]
    assert len(kinds[0]) == len(kinds[1]) == 1
    assert kinds[2] == [*kinds[0], *kinds[1]]


def test_sums_have_gradients_of_the_examples_own_losses() -> None:
    net = _net()
    passes = _passes(lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction="sum"), net=net)
    assert passes.scale is not None
    assert list(passes.scale.values()) == [1.0]
    with closing(passes.run(range(N))) as batches:
        values = torch.cat([batch.loss.values for batch in batches if batch.loss.values is not None])
    x, y, *_ = _data().tensors
    torch.testing.assert_close(values, F.cross_entropy(net(x), y, reduction="none").detach(), **EXACT)


def test_what_training_has_told_survives_a_checkpoint() -> None:
    """In primitives, as Lightning can load nothing else; a checkpoint that says nothing has told nothing."""
    key, other = TermKey("CrossEntropy", (("a.py", 3, 10),), 0), TermKey("SquaredError", (("a.py", 4, 10),), 0)
    heard = HeardTerms()
    assert heard.scale(4, of_mean=True) is None
    for _ in range(3):
        heard.add(((key, 1.0),))
    heard.terms.add(key)
    with tempfile.TemporaryFile() as file:
        torch.save(heard.state_dict(), file)
        file.seek(0)
        again = HeardTerms.of_state(torch.load(file, weights_only=True))
    assert again == heard
    assert again.scale(4, of_mean=True) == LossScale({key: 1.0})
    assert HeardTerms.joined([again, HeardTerms()]).scale(4, of_mean=True) == LossScale({key: 1.0})
    assert HeardTerms.joined([again, HeardTerms(steady=((other, 1.0),))]).scale(4, of_mean=True) is None
    assert HeardTerms.of_state(None).scale(4, of_mean=True) is None
    again.add(((key, 1.0), (other, 1.0)))
    again.add(((key, 1.0),))
    assert again.scale(4, of_mean=True) is None
