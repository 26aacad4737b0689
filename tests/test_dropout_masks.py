"""Sub-networks: one mask for all examples, whatever the batch; their ensemble against networks with fixed masks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import reference as ref
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_influence.curvature import FactorExamples, fit
from lightning_influence.data.source import ExampleSource
from lightning_influence.gradients.discover import discover
from lightning_influence.gradients.passes import ExampleGradients
from lightning_influence.scores.along.dropout_masks import DropoutMasks, ip_ensemble
from lightning_influence.scores.pairs import PairwiseScores, mean_scores, pairwise_scores

N, Q, C, P = 9, 4, 3, 0.4
EXACT: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-11}


class Fixed(nn.Module):
    """What a dropout is in one sub-network: a product with numbers that no example changes."""

    def __init__(self, factors: Tensor) -> None:
        super().__init__()
        self.register_buffer("factors", factors)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factors


class Sequence(nn.Module):
    """Positions first, examples second: a mask of the shape of one example would differ between examples here."""

    def __init__(self, drop: nn.Module) -> None:
        super().__init__()
        self.inner, self.drop, self.head = nn.Linear(2, 6), drop, nn.Linear(6, C)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.drop(torch.tanh(self.inner(x.transpose(0, 1))))
        result: Tensor = self.head(hidden).mean(0)
        return result


def vectors(drops: Callable[[int, Any], nn.Module]) -> nn.Module:
    first, second = drops(0, [6]), drops(1, [5])
    return nn.Sequential(nn.Linear(8, 6), nn.Tanh(), first, nn.Linear(6, 5), nn.Tanh(), second, nn.Linear(5, C))


def images(drops: Callable[[int, Any], nn.Module]) -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (2, 2, 2)), nn.Conv2d(2, 6, 1), nn.Tanh(), drops(0, [6, 1, 1]), nn.Flatten(), nn.Linear(24, C)
    )


def sequences(drops: Callable[[int, Any], nn.Module]) -> nn.Module:
    return nn.Sequential(nn.Unflatten(1, (4, 2)), Sequence(drops(0, [6])))


# Network, and what is in it where the reference has a fixed mask.
CASES: dict[str, tuple[Any, type[nn.Module]]] = {
    "vectors": (vectors, nn.Dropout),
    "images": (images, nn.Dropout),
    "channels": (images, nn.Dropout2d),
    "sequences": (sequences, nn.Dropout),
}


def task(module: Any, batch: Any) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1])


def data(n: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(n, 8, generator=generator).double(), torch.arange(n) % C)


class Problem:
    def __init__(self, case: str, batch_size: int = 4) -> None:
        self.make, kind = CASES[case]
        torch.manual_seed(0)
        self.net = self.make(lambda call, shape: kind(P)).double()
        self.data, self.asked = data(N, 1), data(Q, 2)
        source = ExampleSource(self.data, batch_size=batch_size)
        coverage = discover(self.net, task, source)
        self.train = ExampleGradients(self.net, task, source, coverage)
        self.queries = ExampleGradients(self.net, task, ExampleSource(self.asked, batch_size=3), coverage)

    def ensemble(self, **options: Any) -> Tensor:
        return ip_ensemble(self.train, range(N), self.queries, range(Q), **options).scores

    def member(self, masks: DropoutMasks) -> Tensor:
        """Return the inner products of one sub-network by plain autograd."""

        def fixed(call: int, shape: list[int]) -> nn.Module:
            on = masks.mask(call, shape[0], P).double() / (1 - P)
            return Fixed(on.view(shape))

        net = self.make(fixed).double()
        net.load_state_dict(self.net.state_dict(), strict=False)
        left, right = (
            ref.flatten_gradients(ref.per_example_gradients(net, F.cross_entropy, *part.tensors))
            for part in (self.asked, self.data)
        )
        return left @ right.T


@pytest.mark.parametrize("case", CASES)
def test_ensemble_is_the_mean_over_networks_with_fixed_masks(case: str) -> None:
    problem = Problem(case)
    members = [problem.member(DropoutMasks(3, number)) for number in range(2)]
    torch.testing.assert_close(problem.ensemble(masks=2, seed=3), torch.stack(members).mean(0), **EXACT)
    # The members are different networks, and none is the whole one.
    whole = fit(problem.train, "identity", range(N), examples=FactorExamples(N, N), labels=("true", "true"))
    plain = pairwise_scores(problem.train, range(N), whole, problem.queries, range(Q)).scores
    for other in (members[1], plain):
        assert (members[0] - other).abs().max() > 0.01 * plain.abs().max()


@pytest.mark.parametrize("batch_size", [1, 9])
@pytest.mark.parametrize("case", CASES)
def test_batches_do_not_matter(case: str, batch_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = Problem(case).ensemble(masks=2)
    monkeypatch.setattr("lightning_influence.scores.queries._query_bytes", lambda device: 1)
    torch.testing.assert_close(Problem(case, batch_size).ensemble(masks=2), expected, **EXACT)


@pytest.mark.parametrize("dropout", [F.dropout, F.dropout1d])
def test_all_examples_have_the_same_units_on(dropout: Any) -> None:
    """With a mask for every example, equal examples would come out different."""
    x = torch.randn(1, 40, 3).expand(6, -1, -1)
    channels = dropout is F.dropout1d
    x = x if channels else x.transpose(1, 2)
    with DropoutMasks(seed=1)():
        found = dropout(x, 0.5, training=False)
        again = dropout(x, 0.5, training=False)
    assert torch.equal(found, found[:1].expand_as(found))
    assert not torch.equal(found, again)  # the second call has another mask
    units = found[0] if channels else found[0].T
    off = (units == units[:, :1]).all(1)
    assert off.tolist() == (~DropoutMasks(seed=1).mask(0, 40, 0.5)).tolist()
    assert 10 < int(off.sum()) < 30


def test_dropout_in_place_and_by_its_other_name() -> None:
    x = torch.ones(3, 20)
    with DropoutMasks()():
        expected = F.dropout(x, 0.5)
    inplace, other = x.clone(), x.clone()
    with DropoutMasks()():
        F.dropout(inplace, 0.5, inplace=True)
    with DropoutMasks()():
        torch.dropout_(other, 0.5, True)
    with DropoutMasks()():
        named = torch.dropout(x, 0.5, False)
    assert all(torch.equal(found, expected) for found in (inplace, other, named))
    assert torch.equal(x, torch.ones(3, 20))


def test_seeds_and_nothing_else_decide() -> None:
    problem = Problem("vectors")
    before, modes = torch.get_rng_state(), [module.training for module in problem.net.modules()]
    kept = copy.deepcopy(problem.net.state_dict())
    first = problem.ensemble(masks=2, seed=5)
    torch.manual_seed(99)
    assert torch.equal(problem.ensemble(masks=2, seed=5), first)
    assert not torch.equal(problem.ensemble(masks=2, seed=6), first)
    torch.set_rng_state(before)
    problem.ensemble(masks=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert [module.training for module in problem.net.modules()] == modes
    assert all(torch.equal(value, kept[name]) for name, value in problem.net.state_dict().items())


def test_passes_within_masks_leave_the_others_alone() -> None:
    problem = Problem("vectors")
    inside = problem.train.within(DropoutMasks())
    whole = fit(problem.train, "identity", range(N), examples=FactorExamples(N, N), labels=("true", "true"))
    plain = pairwise_scores(problem.train, range(N), whole, problem.queries, range(Q)).scores
    masked = pairwise_scores(inside, range(N), whole, problem.queries.within(DropoutMasks()), range(Q)).scores
    torch.testing.assert_close(masked, problem.member(DropoutMasks()), **EXACT)
    again = pairwise_scores(problem.train, range(N), whole, problem.queries, range(Q)).scores
    assert torch.equal(again, plain)


@pytest.mark.parametrize("rate", [None, 0.0])
def test_a_model_without_dropout(rate: float | None) -> None:
    layers = [nn.Linear(8, 5), nn.Tanh(), *([] if rate is None else [nn.Dropout(rate)]), nn.Linear(5, C)]
    net = nn.Sequential(*layers).double()
    source = ExampleSource(data(N, 1), batch_size=4)
    train = ExampleGradients(net, task, source, discover(net, task, source))
    with pytest.raises(
        ValueError, match="Sequential calls no dropout .* average the scores of models of several seeds"
    ):
        ip_ensemble(train, range(N), train, range(N))


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="masks=0; expected an integer >= 1"):
        Problem("vectors").ensemble(masks=0)
    with pytest.raises(ValueError, match=r"dropout of a tensor of the shape \[5\]"), DropoutMasks()():
        F.dropout(torch.ones(5), 0.5)


# ------------------------------------------------------------------------------------------------- means of scores


def scores(values: Any, examples: Any = (0, 1, 5), parts: Any = None) -> PairwiseScores:
    found = torch.tensor(values, dtype=torch.float64)
    return PairwiseScores(torch.arange(len(found)), torch.tensor(examples), found, parts, ["told"])


def test_mean_of_scores() -> None:
    first, second = scores([[1.0, 2, 3]]), scores([[3.0, torch.nan, -3]])
    found = mean_scores([first, second])
    torch.testing.assert_close(found.scores, torch.tensor([[2.0, torch.nan, 0]]).double(), equal_nan=True)
    assert found.notes == ["told"]
    assert found.parts is None
    assert found.group([0, 5]).tolist() == [2.0]
    assert first.scores.tolist() == [[1, 2, 3]]  # not added up in place


def test_mean_of_parts() -> None:
    first, second = (scores([[1.0, 2, 3]], parts={"a": torch.full((1, 3), value)}) for value in (1.0, 4.0))
    found = mean_scores([first, second]).parts
    assert found is not None
    assert found["a"].tolist() == [[2.5] * 3]
    assert mean_scores([first, scores([[1.0, 2, 3]])]).parts is None


def test_scores_of_other_pairs_have_no_mean() -> None:
    with pytest.raises(ValueError, match="pass at least one member"):
        mean_scores([])
    with pytest.raises(ValueError, match="member 1 has scores of other pairs than member 0"):
        mean_scores([scores([[1.0, 2, 3]]), scores([[1.0, 2, 3]], (0, 1, 6))])
