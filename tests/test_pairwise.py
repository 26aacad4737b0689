"""Scores of pairs against dense algebra on the reference's gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import reference as ref
import torch
import torch.distributed as dist
import torch.nn.functional as F
from own_processes import together
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from torch.utils.flop_counter import FlopCounterMode

from lightning_influence.curvature import BlockCurvature, Curvature, CurvatureName, FactorExamples, fit
from lightning_influence.curvature.sweep import damping_sweep
from lightning_influence.data.source import ExampleSource
from lightning_influence.gradients.discover import discover
from lightning_influence.gradients.passes import ExampleGradients
from lightning_influence.gradients.visitors import visit
from lightning_influence.scores import queries
from lightning_influence.scores.examples import ExampleScorer, score_examples
from lightning_influence.scores.pairs import PairwiseScores, pairwise_scores, top_scores
from lightning_influence.scores.products import PairColumns, inverse_length
from lightning_influence.scores.queries import PreparedQueries, QueryError, prepared_queries, query_chunks

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


def vector_net() -> nn.Module:
    """One position per example in every layer, two groups in the first."""
    return nn.Sequential(
        nn.Conv2d(2, 8, 4, groups=2), nn.Flatten(), nn.Tanh(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, C, bias=False)
    )


def mean_net() -> nn.Module:
    """Positions of any number, with their mean at the end."""
    return nn.Sequential(nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, C), _Mean())


class _Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def task(module: Any, batch: Any) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1])


MODELS: dict[str, tuple[Any, Any]] = {
    "images": (image_net, lambda n, g: torch.randn(n, 2, 4, 4, generator=g).double()),
    "text": (Text, lambda n, g: torch.randint(7, (n, 5), generator=g)),
    "vectors": (vector_net, lambda n, g: torch.randn(n, 2, 4, 4, generator=g).double()),
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
def test_neither_batches_nor_memory_matter(batch_size: int, query_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_influence.scores.queries._query_bytes", lambda device: 4 * query_bytes)
    problem = Problem("text", batch_size)
    fitted = problem.fitted("ekfac")
    expected = problem.expected(fitted, problem.asked, problem.data)
    order = [5, 0, 7, 2]
    found = pairwise_scores(problem.train, order, fitted, problem.queries, [2, 0])
    assert found.examples.tolist() == sorted(order)
    assert found.queries.tolist() == [2, 0]
    torch.testing.assert_close(found.scores, expected[[2, 0]][:, sorted(order)], **EXACT)
    top = top_scores(problem.train, order, fitted, problem.queries, [2, 0], 3)
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


def test_lengths_that_nothing_can_be_divided_by() -> None:
    """What has no gradient has no relative score; what an inexact solver has left negative is not known."""
    squared = torch.tensor([4.0, 0.0, 1e-40, -1.0, torch.nan], dtype=torch.float64)
    expected = torch.tensor([0.5, 0.0, 0.0, torch.nan, torch.nan], dtype=torch.float64)
    torch.testing.assert_close(inverse_length(squared), expected, equal_nan=True)


def test_nothing_to_score() -> None:
    problem = Problem("images")
    fitted = problem.fitted("identity")
    with pytest.raises(ValueError, match="no query to score"):
        pairwise_scores(problem.train, range(N), fitted, problem.queries, [])
    with pytest.raises(ValueError, match="no training example"):
        top_scores(problem.train, [], fitted, problem.queries, [0])
    typo: Any = "cos"
    with pytest.raises(ValueError, match="normalise='cos'; expected one of 'none', 'relative', 'cosine', 'leverage'"):
        pairwise_scores(problem.train, [0], fitted, problem.queries, [0], normalise=typo)


def test_as_many_queries_at_a_time_as_memory_has_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem("text")
    blocks = problem.train.coverage.blocks.values()
    size = 8 * problem.train.coverage.covered_parameters  # float64
    largest = 8 * max(k * o * i for k, o, i in (block.shape for block in blocks))

    def at_a_time(left: int, name: CurvatureName, dense: int = 4096) -> int:
        monkeypatch.setattr("lightning_influence.scores.queries._query_bytes", lambda device: left)
        monkeypatch.setattr("lightning_influence.curvature.choices._DENSE_BY_ITSELF", dense)
        fitted = problem.fitted(name)
        return len(query_chunks(problem.train, range(100), fitted)[0])

    # Block by block there is one vector of each query; an inverse of all blocks at once takes gradients and solutions.
    assert at_a_time(9 * size + 4 * largest, "ekfac") == 9
    assert at_a_time(9 * size + 4 * largest - 1, "ekfac") == 8
    assert at_a_time(9 * size, "ggn") == 9 // 4
    assert at_a_time(60 * size, "ggn", dense=0) == 60 // 20
    assert at_a_time(0, "ekfac") == 1


@pytest.mark.parametrize(("free", "expected"), [(None, 2**32), (2**30, 2**30), (2**32, 2**32), (2**36, 2**35)])
def test_queries_may_take_half_of_the_memory_that_is_free(
    free: int | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_influence.core.memory.available_bytes", lambda device: free)
    assert queries._query_bytes(torch.device("cpu")) == expected


# ------------------------------------------------------------------------------------------------ in a file, by layer


class TestFile:
    def test_the_file_holds_the_scores(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("lightning_influence.scores.queries._query_bytes", lambda device: 8000)
        problem = Problem("text")
        fitted = problem.fitted("ekfac")
        path = tmp_path / "scores.npy"
        order = [5, 0, 7, 2]
        found = pairwise_scores(problem.train, order, fitted, problem.queries, range(Q), path=path)
        expected = problem.expected(fitted, problem.asked, problem.data)[:, sorted(order)]
        torch.testing.assert_close(found.scores, expected.float(), rtol=1e-6, atol=1e-6)
        read = np.load(path, mmap_mode="r")
        assert read.dtype == np.float32
        assert np.array_equal(read, found.scores.numpy())
        torch.testing.assert_close(found.group([7, 0]), expected[:, [0, 3]].sum(1), rtol=1e-5, atol=1e-5)
        assert [entry.name for entry in tmp_path.iterdir()] == ["scores.npy"]

    def test_what_fails_leaves_nothing_behind(self, tmp_path: Path) -> None:
        problem = Problem("text")
        fitted = problem.fitted("identity")
        path = tmp_path / "scores.npy"
        (tmp_path / "other.npy").write_text("of an earlier run")
        broken = ExampleGradients(problem.net, failing, problem.train.source, problem.train.coverage)
        with pytest.raises(RuntimeError, match="never mind"):
            pairwise_scores(broken, range(N), fitted, problem.queries, range(Q), path=path)
        assert [entry.name for entry in tmp_path.iterdir()] == ["other.npy"]

    def test_paths_that_will_not_do(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        problem = Problem("text")
        fitted = problem.fitted("identity")

        def score(path: Path) -> None:
            pairwise_scores(problem.train, range(N), fitted, problem.queries, range(Q), path=path)

        for wrong in (tmp_path / "scores.bin", tmp_path / "nowhere" / "scores.npy"):
            with pytest.raises(ValueError, match=r"expected a file name ending in '\.npy', in a folder that exists"):
                score(wrong)
        usage = type("Usage", (), {"free": 10})
        monkeypatch.setattr("lightning_influence.scores.matrix_file.shutil.disk_usage", lambda folder: usage)
        with pytest.raises(ValueError, match=r"4 x 9 scores take 144 bytes on disk, and 10 bytes are free"):
            score(tmp_path / "scores.npy")
        assert list(tmp_path.iterdir()) == []


def failing(module: Any, batch: Any) -> Tensor:
    raise RuntimeError("never mind")


@pytest.mark.parametrize("solver", ["dense", "nystrom"])
def test_parts_by_layer_add_up(solver: Any) -> None:
    """Also with a full curvature: the score is a sum over layers of what each contributes."""
    problem = Problem("images")
    everything = FactorExamples(N, N)
    for name in ("ekfac", "ggn"):
        fitted = fit(
            problem.train, name, range(N), examples=everything, labels=("true", "true"), damping=0.1, solver=solver
        )  # fmt: skip
        found = pairwise_scores(problem.train, range(N), fitted, problem.queries, range(Q), by_layer=True)
        assert found.parts is not None
        assert list(found.parts) == list(problem.train.coverage.blocks)
        torch.testing.assert_close(torch.stack(list(found.parts.values())).sum(0), found.scores, **EXACT)
        of_queries = fitted.solve(problem.blocks(problem.asked))
        for layer, of_examples in problem.blocks(problem.data).items():
            expected = of_queries[layer].flatten(1) @ of_examples.flatten(1).T
            torch.testing.assert_close(found.parts[layer], expected, rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="a normalised score is no sum over layers"):
        pairwise_scores(
            problem.train, range(N), fitted, problem.queries, range(Q), by_layer=True, normalise="cosine"
        )  # fmt: skip
    with pytest.raises(ValueError, match="by_layer=True keeps the parts in memory"):
        pairwise_scores(problem.train, range(N), fitted, problem.queries, range(Q), by_layer=True, path="x.npy")


# ------------------------------------------------------------------------------------------------------- eigenbasis

# So many training examples decide for each basis, whatever the layer.
FEW, MANY = 1, 10**6
VECTOR_LAYERS = ["0", "3", "5"]


def references(problem: Problem, fitted: Curvature) -> dict[str, tuple[Tensor, Tensor, Tensor, float]]:
    """Return by layer the dense curvature, the gradients of queries and of training examples, and the damping."""
    net, result = problem.net, {}
    of_queries, of_examples = (
        ref.per_example_gradients(net, F.cross_entropy, *data.tensors) for data in (problem.asked, problem.data)
    )
    for layer in fitted.dampings:
        module = net.get_submodule(layer)
        left, right = (
            ref.gradient_matrix(module, own[f"{layer}.weight"], own.get(f"{layer}.bias"))
            for own in (of_queries, of_examples)
        )
        x, g = ref.layer_inputs_and_output_gradients(net, layer, F.cross_entropy, *problem.data.tensors)
        A, B = ref.second_moments(x, g)
        dense = ref.kfac_dense(A, B)
        if fitted.name == "ekfac":
            bases = ref.eigenbasis(A, B)
            dense = ref.ekfac_dense(*bases, ref.ekfac_eigenvalues(right, *bases))
        damping = 0.1 * float(dense.diagonal(dim1=1, dim2=2).mean())
        assert fitted.dampings[layer] == pytest.approx(damping, rel=1e-9)
        result[layer] = dense, left, right, damping
    return result


def prepared_for(problem: Problem, fitted: Curvature, examples: int | None) -> PreparedQueries:
    (prepared,) = prepared_queries(fitted, problem.queries, [list(range(Q))], examples)
    return prepared


def rotated_layers(prepared: PreparedQueries) -> list[str]:
    return [layer for layer, basis in prepared.bases.items() if basis is not None]


def columns(problem: Problem, prepared: PreparedQueries, fitted: Curvature | None = None, *how: Any) -> Tensor:
    """Return the scores, and their parts by layer, of one way to prepare queries, `[m, q, n]`."""
    pieces: list[tuple[Tensor, Tensor]] = []
    own = ExampleScorer(problem.train, range(N), fitted)
    visitor = PairColumns(torch.arange(N), prepared, lambda places, scores: pieces.append((places, scores)), own, *how)
    visit(problem.train, range(N), [own, visitor])
    visitor.finish()
    assert torch.cat([places for places, _ in pieces]).tolist() == list(range(N))
    return torch.cat([scores for _, scores in pieces], 2)


class TestEigenbasis:
    """Vectors stay in the eigenbasis, and training examples are rotated, where that costs less."""

    @pytest.mark.parametrize("batch_size", [1, 4, 9])
    @pytest.mark.parametrize("curvature", ["ekfac", "kfac"])
    def test_both_bases_give_the_scores_of_dense_algebra(self, curvature: CurvatureName, batch_size: int) -> None:
        problem = Problem("vectors", batch_size)
        fitted = problem.fitted(curvature)
        by_layer = references(problem, fitted)
        parts = torch.stack([ref.bilinear_forms(C, left, right, d) for C, left, right, d in by_layer.values()])
        of_queries = sum(ref.quadratic_forms(C, left, d) for C, left, _, d in by_layer.values())
        of_examples = sum(ref.quadratic_forms(C, right, d) for C, _, right, d in by_layer.values())
        scores = parts.sum(0)
        for examples, rotated in ((FEW, VECTOR_LAYERS), (MANY, []), (None, [])):
            prepared = prepared_for(problem, fitted, examples)
            assert rotated_layers(prepared) == rotated
            torch.testing.assert_close(prepared.self_influence, of_queries, **EXACT)
            found = columns(problem, prepared, fitted, "none", VECTOR_LAYERS)
            torch.testing.assert_close(found, torch.cat([scores[None], parts]), **EXACT)
            relative = columns(problem, prepared, fitted, "relative")[0]
            torch.testing.assert_close(relative, scores / of_examples.sqrt(), **EXACT)
            cosines = columns(problem, prepared, fitted, "cosine")[0]
            torch.testing.assert_close(cosines, relative / of_queries.sqrt()[:, None], **EXACT)
        # The identity would not do, and neither would training examples that are not rotated.
        plain = sum(ref.bilinear_forms(torch.zeros_like(C), *both, 1.0) for C, *both, _ in by_layer.values())
        assert torch.corrcoef(torch.stack([plain.flatten(), scores.flatten()]))[0, 1] < 0.99
        prepared = prepared_for(problem, fitted, FEW)
        unrotated = columns(problem, PreparedQueries(prepared.vectors, prepared.self_influence))[0]
        assert torch.corrcoef(torch.stack([unrotated.flatten(), scores.flatten()]))[0, 1] < 0.9

    @pytest.mark.parametrize("normalise", ["none", "relative", "cosine"])
    @pytest.mark.parametrize(("query_bytes", "rotated"), [(1, ["3"]), (2**30, VECTOR_LAYERS)], ids=["one", "all"])
    def test_what_calls_decide_for(
        self, normalise: Any, query_bytes: int, rotated: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """With one query at a time, 9 examples are too many for the first and the last layer."""
        monkeypatch.setattr("lightning_influence.scores.queries._query_bytes", lambda device: 4 * query_bytes)
        problem = Problem("vectors")
        fitted = problem.fitted("ekfac")
        expected = columns(problem, prepared_for(problem, fitted, None), fitted, normalise)[0]
        chosen: list[list[str]] = []

        def recorded(*arguments: Any) -> Any:
            for prepared in prepared_queries(*arguments):
                chosen.append(rotated_layers(prepared))
                yield prepared

        monkeypatch.setattr("lightning_influence.scores.pairs.prepared_queries", recorded)
        arguments = (problem.train, range(N), fitted, problem.queries, range(Q))
        found = pairwise_scores(*arguments, normalise=normalise).scores
        torch.testing.assert_close(found, expected, **EXACT)
        top = top_scores(*arguments, N, normalise=normalise)
        torch.testing.assert_close(top.proponent_scores, expected.sort(descending=True).values, **EXACT)
        assert torch.equal(top.proponents, expected.argsort(descending=True))
        assert chosen == 2 * (Q if query_bytes == 1 else 1) * [rotated]

    def test_the_rule_counts_what_is_computed(self) -> None:
        """What the bases cost apart from each other is what the rule compares; each is taken where it costs less."""
        problem = Problem("vectors")
        fitted = problem.fitted("ekfac")
        assert problem.train.scale
        assert problem.queries.scale
        sizes = [(k, o, i) for k, o, i in (block.shape for block in problem.train.coverage.blocks.values())]
        assert sizes == [(2, 4, 17), (1, 6, 9), (1, 3, 6)]

        def multiplications(examples: int | None) -> int:
            with FlopCounterMode(display=False) as counter:
                columns(problem, prepared_for(problem, fitted, examples))
            return int(counter.get_total_flops()) // 2

        rotated = sum(k * (Q + N) * (i * i + o * o) for k, o, i in sizes)
        rotated_back = sum(k * 2 * Q * o * i * (i + o) for k, o, i in sizes)
        assert multiplications(FEW) - multiplications(MANY) == rotated - rotated_back < -rotated_back / 2
        # (4 + n)(9² + 6²) against 2·4·9·6·(9 + 6) = 6480
        assert "3" in rotated_layers(prepared_for(problem, fitted, 51))
        assert "3" not in rotated_layers(prepared_for(problem, fitted, 52))

    @pytest.mark.parametrize("batch_size", [1, 9])
    def test_queries_with_one_position_and_examples_with_more(self, batch_size: int) -> None:
        """The queries' positions decide; examples that have others are rotated all the same."""
        MODELS["means"] = mean_net, lambda n, g: torch.randn(n, 5 if n == N else 1, 7, generator=g).double()
        try:
            problem = Problem("means", batch_size)
        finally:
            del MODELS["means"]
        fitted = problem.fitted("ekfac")
        prepared = prepared_for(problem, fitted, FEW)
        assert rotated_layers(prepared) == ["0", "2"]
        expected = sum(ref.bilinear_forms(*reference) for reference in references(problem, fitted).values())
        torch.testing.assert_close(columns(problem, prepared)[0], expected, **EXACT)

    def test_layers_and_curvatures_that_keep_the_basis_of_the_parameters(self) -> None:
        """More than one position, one-hot rows, solving that is not elementwise or needs no basis."""
        for model, kept in (("images", "0"), ("text", "tokens")):
            problem = Problem(model)
            fitted = problem.fitted("ekfac")
            prepared = prepared_for(problem, fitted, FEW)
            assert kept in prepared.bases.keys() - rotated_layers(prepared)
            assert len(rotated_layers(prepared)) > 0
            expected = problem.expected(fitted, problem.asked, problem.data)
            torch.testing.assert_close(columns(problem, prepared)[0], expected, **EXACT)
        problem, everything = Problem("images"), FactorExamples(N, N)
        for name in ("identity", "diagonal", "block_ggn", "ggn"):
            fitted = fit(problem.train, cast("Any", name), range(N), examples=everything, labels=("true", "exact"))
            assert rotated_layers(prepared_for(problem, fitted, FEW)) == []


# ------------------------------------------------------------------------------------------------------- bad input


def other_queries(problem: Problem, inputs: Tensor, labels: Tensor) -> ExampleGradients:
    source = ExampleSource(TensorDataset(inputs, labels), batch_size=2)
    return ExampleGradients(problem.net, task, source, problem.train.coverage)


@pytest.mark.parametrize(
    ("inputs", "labels", "cause"),
    [
        (torch.randn(6, 2, 4, 4).double(), torch.tensor([0, 1, 2, 0, C, 1]), "IndexError"),
        (torch.randn(6, 3, 4, 4).double(), torch.zeros(6).long(), "RuntimeError"),
    ],
    ids=["classes", "shapes"],
)
def test_queries_of_another_kind(inputs: Tensor, labels: Tensor, cause: str) -> None:
    """Found before any training example is visited."""
    problem = Problem("images")
    fitted = problem.fitted("identity")
    queries = other_queries(problem, inputs, labels)
    assert problem.train.scale
    problem.train.task = failing  # type: ignore[assignment]
    for score in (pairwise_scores, top_scores):
        with pytest.raises(QueryError, match=rf"run on them: .* on example.* \({cause}: .*\. Queries need") as caught:
            score(problem.train, range(N), fitted, queries, range(6))
        assert type(caught.value.__cause__).__name__ == cause


def test_running_out_of_memory_is_no_matter_of_the_queries() -> None:
    def hungry(module: Any, batch: Any) -> Tensor:
        raise MemoryError("too much")

    problem = Problem("images")
    queries = other_queries(problem, *problem.asked.tensors)
    queries.task = hungry  # type: ignore[assignment]
    with pytest.raises(MemoryError, match="too much"):
        pairwise_scores(problem.train, range(N), problem.fitted("identity"), queries, range(Q))


def test_scores_that_do_not_fit_into_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    problem = Problem("images")
    fitted = problem.fitted("identity")
    monkeypatch.setattr("lightning_influence.core.memory.available_bytes", lambda device: 200)
    with pytest.raises(
        ValueError, match=r"4 x 9 scores take 288 bytes of memory, and 200 bytes are available; pass `p"
    ):
        pairwise_scores(problem.train, range(N), fitted, problem.queries, range(Q))
    with pytest.raises(ValueError, match=r"with their parts by 3 layers take .* leave out by_layer=True"):
        pairwise_scores(problem.train, range(N), fitted, problem.queries, range(Q), by_layer=True)
    # In a file there is room; queries are taken one at a time then.
    found = pairwise_scores(problem.train, range(N), fitted, problem.queries, range(Q), path=tmp_path / "s.npy")
    expected = problem.expected(fitted, problem.asked, problem.data)
    torch.testing.assert_close(found.scores, expected.float(), rtol=1e-5, atol=1e-6)


def test_what_does_not_belong_together() -> None:
    problem, other = Problem("images"), Problem("images")
    fitted = problem.fitted("identity")
    with pytest.raises(ValueError, match="the queries run through another model"):
        pairwise_scores(problem.train, range(N), fitted, other.queries, range(Q))
    source = problem.train.source
    last = ExampleGradients(problem.net, task, source, discover(problem.net, task, source, layers=["5"]))
    with pytest.raises(ValueError, match=r"the queries and the training data differ in the layers \['0', '3'\]"):
        pairwise_scores(problem.train, range(N), fitted, last, range(Q))
    with pytest.raises(ValueError, match=r"the curvature and the training data differ in the layers"):
        pairwise_scores(last, range(N), fitted, last, range(Q))
    with pytest.raises(ValueError, match="count is 0"):
        top_scores(problem.train, range(N), fitted, problem.queries, range(Q), 0)


# ------------------------------------------------------------------------------------------------- several processes


def everything_of(problem: Problem, folder: str) -> dict[str, Any]:
    """All that a process can ask for, GGN and sweep included; an odd number of examples for two processes."""
    all_ = FactorExamples(N, N)
    result: dict[str, Any] = {}
    for name, solver in (("ekfac", "auto"), ("ggn", "dense"), ("ggn", "nystrom")):
        fitted = fit(
            problem.train, cast("Any", name), range(N), examples=all_, labels=("true", "exact"), damping=0.1,
            solver=cast("Any", solver),
        )  # fmt: skip
        found = pairwise_scores(problem.train, range(N), fitted, problem.queries, range(Q), by_layer=True)
        filed = pairwise_scores(
            problem.train, range(N), fitted, problem.queries, range(Q), path=f"{folder}/{name}-{solver}.npy"
        )  # fmt: skip
        top = top_scores(problem.train, range(N), fitted, problem.queries, range(Q), 3)
        own = score_examples(problem.train, range(N), curvature=fitted).columns["self_influence"]
        result[f"{name} {solver}"] = (found.scores, found.parts, top.proponents, own)
        torch.testing.assert_close(filed.scores, found.scores.float())
        if isinstance(fitted, BlockCurvature):
            sweep = damping_sweep(problem.train, range(N), fitted)
            result["sweep"] = (sweep.self_influence, torch.tensor(sweep.stability), sweep.layer_shares)
    return result


def _two_processes(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    try:
        torch.save(everything_of(Problem("images"), folder), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_two_processes_give_what_one_gives(tmp_path: Path) -> None:
    together(_two_processes, str(tmp_path))
    alone = tmp_path / "alone"
    alone.mkdir()
    expected = everything_of(Problem("images"), str(alone))
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert found.keys() == expected.keys()
        for name, values in found.items():
            for value, other in zip(values, expected[name], strict=True):
                # Conjugate gradients stop at a residual, and rounding may cost or save a step.
                close: dict[str, Any] = {"rtol": 1e-3, "atol": 1e-4} if "nystrom" in name else EXACT
                torch.testing.assert_close(value, other, **close)
