"""Scores of pairs against dense algebra on the reference's gradients."""

from __future__ import annotations

from typing import Any

import pytest
import reference as ref
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_influence.curvature import Curvature, CurvatureName, FactorExamples, fit
from lightning_influence.discover import discover
from lightning_influence.pairwise import PairwiseScores, pairwise_scores, top_scores
from lightning_influence.passes import ExampleGradients
from lightning_influence.scoring import score_examples
from lightning_influence.source import ExampleSource

N, Q, C = 9, 4, 3
EXACT: dict[str, Any] = {"rtol": 1e-8, "atol": 1e-10}


class Text(nn.Module):
    """Token and position embeddings, a norm, and a head that shares the tokens' table."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places, self.norm = nn.Embedding(7, 4), nn.Embedding(5, 4), nn.LayerNorm(4)
        self.head = nn.Linear(4, 7)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.norm(self.tokens(ids) + self.places(torch.arange(ids.shape[1])))
        output: Tensor = self.head(hidden.tanh()).mean(1)[:, :C]
        return output


def image_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, groups=2), nn.GELU(), nn.Flatten(), nn.Linear(16, 5), nn.Tanh(), nn.Linear(5, C)
    )


def task(module: Any, batch: Any) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1])


MODELS: dict[str, tuple[Any, Any]] = {
    "images": (image_net, lambda n, g: torch.randn(n, 2, 4, 4, generator=g).double()),
    "text": (Text, lambda n, g: torch.randint(7, (n, 5), generator=g)),
}


class Problem:
    """A model, its training data and queries, and the reference's gradients of both."""

    def __init__(self, name: str, batch_size: int = 4) -> None:
        make, draw = MODELS[name]
        generator = torch.Generator().manual_seed(1)
        torch.manual_seed(0)
        self.net = make().double().eval()
        self.data = TensorDataset(draw(N, generator), torch.arange(N) % C)
        self.asked = TensorDataset(draw(Q, generator), torch.arange(Q) % C)
        source = ExampleSource(self.data, batch_size=batch_size)
        coverage = discover(self.net, task, source)
        assert coverage.share == 1
        self.train = ExampleGradients(self.net, task, source, coverage)
        self.queries = ExampleGradients(self.net, task, ExampleSource(self.asked, batch_size=3), coverage)

    def fitted(self, curvature: CurvatureName) -> Curvature:
        everything = FactorExamples(N, N)
        return fit(self.train, curvature, range(N), examples=everything, labels=("true", "true"))

    def blocks(self, data: TensorDataset) -> dict[str, Tensor]:
        """Return per-example gradients by block, `[n, k, o, i]`."""
        own = ref.per_example_gradients(self.net, F.cross_entropy, *data.tensors)
        result = {}
        for name, block in self.train.coverage.blocks.items():
            rows = [block.from_parameters({p: own[p][n] for p in block.parameters}) for n in range(len(data))]
            result[name] = torch.stack(rows)
        return result

    def expected(self, curvature: Curvature, rows: TensorDataset, columns: TensorDataset) -> Tensor:
        """Return `g_rᵀ (C + λ)⁻¹ g_c` with dense matrices."""
        total = torch.zeros(len(rows), len(columns), dtype=torch.float64)
        of_rows, of_columns = self.blocks(rows), self.blocks(columns)
        for name, block in curvature.blocks.items():
            dense = block.to_dense().double() if curvature.name != "identity" else None
            for k in range(block.shape[0]):
                left, right = of_rows[name][:, k].flatten(1), of_columns[name][:, k].flatten(1)
                if dense is not None:
                    damped = dense[k] + curvature.dampings[name] * torch.eye(dense.shape[-1], dtype=torch.float64)
                    right = torch.linalg.solve(damped, right.T).T
                total += left @ right.T
        return total


@pytest.mark.parametrize("curvature", ["ekfac", "kfac", "diagonal", "identity"])
@pytest.mark.parametrize("name", MODELS)
def test_scores_equal_dense_algebra(name: str, curvature: CurvatureName) -> None:
    problem = Problem(name)
    fitted = problem.fitted(curvature)
    found = pairwise_scores(problem.train, range(N), fitted, problem.queries, range(Q))
    expected = problem.expected(fitted, problem.asked, problem.data)
    torch.testing.assert_close(found.scores, expected, **EXACT)
    if curvature != "identity":  # the identity would not do
        plain = problem.expected(problem.fitted("identity"), problem.asked, problem.data)
        assert torch.corrcoef(torch.stack([plain.flatten(), expected.flatten()]))[0, 1] < 0.999


@pytest.mark.parametrize("name", MODELS)
def test_an_example_as_its_own_query(name: str) -> None:
    """The diagonal is self-influence, and training examples may be queries."""
    problem = Problem(name)
    fitted = problem.fitted("ekfac")
    found = pairwise_scores(problem.train, range(N), fitted, problem.train, range(N)).scores
    own = score_examples(problem.train, range(N), curvature=fitted).columns["self_influence"]
    torch.testing.assert_close(found.diagonal(), own, **EXACT)
    torch.testing.assert_close(found, found.T, **EXACT)
    cosines = pairwise_scores(problem.train, range(N), fitted, problem.train, range(N), normalise="cosine").scores
    torch.testing.assert_close(cosines.diagonal(), torch.ones(N).double(), **EXACT)
    assert cosines.abs().max() < 1 + 1e-9
    relative = pairwise_scores(problem.train, range(N), fitted, problem.train, range(N), normalise="relative").scores
    torch.testing.assert_close(relative, found / own.sqrt(), **EXACT)


@pytest.mark.parametrize("batch_size", [1, 4, 9])
@pytest.mark.parametrize("query_bytes", [1, 2000, 2**30], ids=["one query at a time", "some", "all"])
def test_neither_batches_nor_memory_matter(batch_size: int, query_bytes: int) -> None:
    problem = Problem("text", batch_size)
    fitted = problem.fitted("ekfac")
    expected = problem.expected(fitted, problem.asked, problem.data)
    order = [5, 0, 7, 2]
    found = pairwise_scores(problem.train, order, fitted, problem.queries, [2, 0], query_bytes=query_bytes)
    assert found.examples.tolist() == sorted(order)
    assert found.queries.tolist() == [2, 0]
    torch.testing.assert_close(found.scores, expected[[2, 0]][:, sorted(order)], **EXACT)
    top = top_scores(problem.train, order, fitted, problem.queries, [2, 0], 3, query_bytes=query_bytes)
    for row, query in enumerate([2, 0]):
        ranked = [order[place] for place in expected[query, order].argsort(descending=True).tolist()]
        assert top.proponents[row].tolist() == ranked[:3]
        assert top.opponents[row].tolist() == ranked[::-1][:3]
        torch.testing.assert_close(top.proponent_scores[row], expected[query, ranked[:3]], **EXACT)
        torch.testing.assert_close(top.opponent_scores[row], expected[query, ranked[::-1][:3]], **EXACT)


def test_more_asked_for_than_there_is() -> None:
    problem = Problem("images")
    top = top_scores(problem.train, range(N), problem.fitted("identity"), problem.queries, range(Q), 50)
    assert top.proponents.shape == top.opponents.shape == (Q, N)
    assert torch.equal(top.proponents, top.opponents.flip(1))


def test_a_group_is_the_sum_of_its_members() -> None:
    scores = PairwiseScores(torch.arange(2), torch.tensor([3, 5, 8]), torch.tensor([[1.0, 2.0, 4.0], [0.0, -1.0, 1.0]]))
    assert scores.group([8, 3]).tolist() == [5.0, 1.0]
    with pytest.raises(ValueError, match=r"group holds \[4\] indices"):
        scores.group([3, 4])
    with pytest.raises(ValueError, match="group holds repeated indices"):
        scores.group([3, 3])


def test_examples_and_queries_that_are_not_finite() -> None:
    """They are marked, never averaged or ranked, and leave the others alone."""
    problem = Problem("images")
    problem.data.tensors[0][4, 0, 0, 0] = torch.nan
    problem.asked.tensors[0][1, 0, 0, 0] = torch.inf
    fitted = problem.fitted("ekfac")
    found = pairwise_scores(problem.train, range(N), fitted, problem.queries, range(Q)).scores
    missing = torch.isnan(found)
    assert missing[1].all()
    assert missing[:, 4].all()
    assert int(missing.sum()) == N + Q - 1
    top = top_scores(problem.train, range(N), fitted, problem.queries, [0], 50)
    assert 4 not in top.proponents.tolist()[0]
    assert len(top.proponents[0]) == len(top.opponents[0]) == N - 1


def test_nothing_to_score() -> None:
    problem = Problem("images")
    fitted = problem.fitted("identity")
    with pytest.raises(ValueError, match="no query to score"):
        pairwise_scores(problem.train, range(N), fitted, problem.queries, [])
    with pytest.raises(ValueError, match="no training example"):
        top_scores(problem.train, [], fitted, problem.queries, [0])
    typo: Any = "cos"
    with pytest.raises(ValueError, match="normalise='cos'; expected one of 'none', 'relative', 'cosine'"):
        pairwise_scores(problem.train, [0], fitted, problem.queries, [0], normalise=typo)
