"""The damping sweep against fits of their own, and what it says about rankings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_influence.curvature import BLOCKS, BlockCurvature, FactorExamples, fit
from lightning_influence.curvature.sweep import Sweeper, damping_sweep, rank_correlation
from lightning_influence.data.source import ExampleSource
from lightning_influence.gradients.discover import discover
from lightning_influence.gradients.passes import ExampleGradients
from lightning_influence.gradients.visitors import visit
from lightning_influence.layers import per_sample
from lightning_influence.layers.rows import Joined, OneHot, some
from lightning_influence.scores.examples import score_examples

N = 40
EVERY = FactorExamples(N, N)


def task(module: Any, batch: Any) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1])


def passes(batch_size: int = 7, bad: int | None = None) -> ExampleGradients:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.GELU(), nn.Flatten(), nn.Linear(12, 6), nn.Tanh(), nn.Linear(6, 3))
    inputs, labels = torch.randn(N, 1, 4, 4), torch.randint(3, (N,))
    if bad is not None:
        inputs[bad] = torch.inf
    source = ExampleSource(TensorDataset(inputs.double(), labels), batch_size=batch_size)
    net = net.double()
    return ExampleGradients(net, task, source, discover(net, task, source))


def fitted(gradients: ExampleGradients, name: Any, damping: Any = None) -> BlockCurvature:
    curvature = fit(gradients, name, range(N), examples=EVERY, labels=("exact", "exact"), damping=damping)
    assert isinstance(curvature, BlockCurvature)
    return curvature


@pytest.mark.parametrize("name", BLOCKS)
def test_every_column_is_what_a_fit_with_that_damping_gives(name: str) -> None:
    gradients = passes()
    curvature = fitted(gradients, name)
    sweep = damping_sweep(gradients, range(N), curvature, (0.1, 30.0))
    assert sweep.factors == (0.1, 1.0, 30.0)
    for column, factor in enumerate(sweep.factors):
        dampings = {layer: factor * value for layer, value in curvature.dampings.items()}
        own = score_examples(gradients, range(N), curvature=fitted(gradients, name, dampings)).columns
        torch.testing.assert_close(sweep.self_influence[:, column], own["self_influence"], rtol=1e-10, atol=0)
        expected = spearmanr(own["self_influence"], sweep.self_influence[:, 1]).statistic
        assert sweep.stability[column] == pytest.approx(expected, abs=1e-12)
    if name == "identity":
        assert sweep.stability == pytest.approx((1, 1, 1))
    else:
        # The sweep of the identity would be flat.
        assert min(sweep.stability) < 0.999
        assert sweep.overlap[1] == 1.0


def test_batches_do_not_matter() -> None:
    curvature = fitted(passes(), "ekfac")
    first, second = (damping_sweep(passes(size), range(N), curvature) for size in (3, 40))
    torch.testing.assert_close(first.self_influence, second.self_influence, rtol=1e-9, atol=0)
    assert first.stability == pytest.approx(second.stability)


def test_non_finite_examples_are_left_out_of_the_ranking() -> None:
    gradients = passes(bad=5)
    sweep = damping_sweep(gradients, [7, 5, 2, 11], fitted(gradients, "ekfac"))
    assert sweep.indices.tolist() == [2, 5, 7, 11]
    assert sweep.self_influence.isnan().all(1).tolist() == [False, True, False, False]
    assert all(-1 <= value <= 1 for value in sweep.stability)


@pytest.mark.parametrize("batch_size", [3, 40])
def test_a_sweep_over_some_of_a_pass(batch_size: int) -> None:
    """In the pass that scores all examples, it gives what a pass over its own examples gives."""
    gradients, chosen = passes(batch_size, bad=5), [30, 5, 2, 11, 39]
    curvature = fitted(gradients, "ekfac")
    sweeper = Sweeper(chosen, curvature, gradients.device)
    visit(gradients, range(N), [sweeper])
    found, expected = sweeper.result(), damping_sweep(gradients, chosen, curvature)
    assert found.indices.tolist() == expected.indices.tolist() == sorted(chosen)
    close: dict[str, Any] = {"rtol": 1e-10, "atol": 0, "equal_nan": True}
    torch.testing.assert_close(found.self_influence, expected.self_influence, **close)
    assert found.stability == expected.stability
    assert found.layer_shares == pytest.approx(expected.layer_shares)


@pytest.mark.parametrize("kind", ["dense", "one-hot", "kept", "joined"])
def test_rows_of_some_examples(kind: str) -> None:
    """Those of an embedding, too, and of a parameter that is used in both ways."""
    torch.manual_seed(0)
    indices, keep = torch.randint(5, (4, 3)), torch.tensor([True, True, False, True])
    onehot = OneHot(indices, 5).keep(keep) if kind == "kept" else OneHot(indices, 5)
    dense = torch.randn(1, 4, 2, 5)
    rows = {"dense": dense, "joined": Joined(onehot, dense)}.get(kind, onehot)
    x = torch.randn(1, 4, rows.shape[2], 2)
    chosen = torch.tensor([2, 0])
    found = per_sample.formed(some(x, chosen), some(rows, chosen))
    torch.testing.assert_close(found, per_sample.formed(x, rows)[chosen])


def test_it_can_be_read() -> None:
    gradients = passes()
    text = str(damping_sweep(gradients, range(N), fitted(gradients, "ekfac"), (0.1, 10)))
    assert text.splitlines()[0] == "damping   rank correlation   same top 10 %"
    assert "     1 x              1.000            100%" in text
    assert len(text.splitlines()) == 4


def test_ties_share_their_rank() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        a, b = torch.randint(5, (2, 30), generator=generator).double()
        assert rank_correlation(a, b) == pytest.approx(spearmanr(a, b).statistic, abs=1e-12)
    assert rank_correlation(torch.ones(3), torch.ones(3)) == 1.0
    assert rank_correlation(torch.ones(3), torch.arange(3.0)) == 0.0


@pytest.mark.parametrize("factors", [(0.0,), (-1.0, 1.0)])
def test_wrong_factors(factors: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="expected positive multiples"):
        damping_sweep(passes(), range(N), fitted(passes(), "diagonal"), factors)


def test_nothing_to_rank() -> None:
    gradients = passes(bad=5)
    with pytest.raises(ValueError, match="0 examples have finite gradients"):
        damping_sweep(gradients, [5], fitted(gradients, "diagonal"))
