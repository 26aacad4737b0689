"""Scores with the curvature of all parameters at once (GGN, Hessian) against dense float64 algebra."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import reference as ref
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_influence.curvature import (
    BlockCoordinates,
    Curvature,
    FactorExamples,
    FlatParameters,
    GGNProduct,
    IndefiniteError,
    SolverError,
    choices,
    fit,
)
from lightning_influence.curvature.fit import check_curvature
from lightning_influence.curvature.implicit import ImplicitCurvature, mean_eigenvalues
from lightning_influence.curvature.registry import fitted_bytes
from lightning_influence.curvature.sampled import Effort, _chances, sampled_inverse
from lightning_influence.curvature.solve.cg import cg
from lightning_influence.curvature.solve.nystrom import nystrom_preconditioner
from lightning_influence.curvature.solve.solvers import SOLVERS, cheapest
from lightning_influence.data.source import ExampleSource
from lightning_influence.gradients.discover import discover
from lightning_influence.gradients.passes import ExampleGradients
from lightning_influence.objective.task import TaskError
from lightning_influence.scores.examples import score_examples
from lightning_influence.scores.pairs import pairwise_scores

N, C = 14, 3
EVERY = FactorExamples(N, N)


def classify(module: Any, batch: Any) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1])


def mlp() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, C)), torch.randn(N, 4)


def cnn() -> tuple[nn.Module, Tensor]:
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, groups=2), nn.GroupNorm(2, 4), nn.GELU(), nn.Flatten(), nn.Linear(16, C, bias=False)
    )
    return net, torch.randn(N, 2, 4, 4)


def embedding() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Embedding(6, 3), nn.Flatten(), nn.Linear(9, C)), torch.randint(0, 6, (N, 3))


def tokens() -> tuple[nn.Module, Tensor]:
    """Positions that share weights, few enough that factors are smaller than gradients; the head is the embedding."""
    net = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8), nn.Tanh(), Mean(), nn.Linear(8, 9, bias=False), Few())
    net[4].weight = net[0].weight
    return net, torch.randint(0, 9, (N, 3))


class Mean(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.mean(1)


class Few(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        return inputs[:, :C]


def sometimes() -> tuple[nn.Module, Tensor]:
    """A layer that batches of positive inputs do not reach, its gradients as factors."""
    return Sometimes(), torch.randn(N, 4)


class Sometimes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, C)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.first(inputs).tanh()
        chosen = inputs[:, 0] < 0
        if chosen.any():
            hidden = hidden + self.second(hidden) * chosen.unsqueeze(1)
        return self.last(hidden)


MODELS = {"mlp": mlp, "cnn": cnn, "embedding": embedding}


class Problem:
    """A small network and its dense algebra."""

    def __init__(self, name: str = "mlp", dtype: torch.dtype = torch.float64, batch_size: int = 4) -> None:
        torch.manual_seed(0)
        net, inputs = (MODELS | {"tokens": tokens, "sometimes": sometimes})[name]()
        self.net = net.to(dtype)
        self.inputs = inputs.to(dtype) if inputs.is_floating_point() else inputs
        self.targets = torch.randint(0, C, (N,))
        source = ExampleSource(TensorDataset(self.inputs, self.targets), batch_size=batch_size)
        self.gradients = ExampleGradients(self.net, classify, source, discover(self.net, classify, source))

    def dense(self, name: str) -> Tensor:
        if name == "ggn":
            return ref.ggn_dense(self.net, self.inputs, "cross_entropy")
        return ref.hessian_dense(self.net, F.cross_entropy, self.inputs, self.targets)

    def rows(self) -> Tensor:
        alone = [(self.inputs[n : n + 1], self.targets[n : n + 1]) for n in range(N)]
        return ref.flatten_gradients(ref.gradients_alone(self.net, classify, alone))

    def damping_vector(self, dampings: dict[str, float]) -> Tensor:
        """One λ per scalar, in the order of ``named_parameters()``."""
        by_name = {p: dampings[b.name] for b in self.gradients.coverage.blocks.values() for p in b.parameters}
        return torch.cat(
            [torch.full((p.numel(),), by_name[name], dtype=torch.float64) for name, p in self.net.named_parameters()]
        )

    def expected(self, name: str, damping: Tensor | float) -> Tensor:
        matrix = self.dense(name)
        matrix = matrix + torch.diag(torch.as_tensor(damping, dtype=torch.float64).expand(len(matrix)))
        g = self.rows()
        return g @ torch.linalg.solve(matrix, g.T)

    def fit(self, name: Any, damping: Any, **options: Any) -> Curvature:
        return fit(
            self.gradients, name, range(N), examples=EVERY, labels=("exact", "exact"), damping=damping, **options
        )


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", ["ggn", "hessian"])
class TestDense:
    def test_scores(self, model: str, name: str) -> None:
        problem = Problem(model)
        damping = 0.05 if name == "ggn" else 2.0
        curvature = problem.fit(name, damping)
        expected = problem.expected(name, damping)
        found = score_examples(problem.gradients, range(N), curvature=curvature).columns
        torch.testing.assert_close(found["self_influence"], expected.diagonal(), rtol=1e-8, atol=0)
        pairs = pairwise_scores(problem.gradients, range(N), curvature, problem.gradients, range(N)).scores
        torch.testing.assert_close(pairs, expected, rtol=1e-7, atol=1e-10)
        torch.testing.assert_close(found["grad_norm_squared"], problem.rows().square().sum(1), rtol=1e-9, atol=0)
        # The identity would give another ranking, not only another scale.
        ratio = expected.diagonal() / problem.rows().square().sum(1)
        assert ratio.max() > (2 if name == "ggn" else 1.02) * ratio.min()

    def test_one_damping_for_each_block(self, model: str, name: str) -> None:
        problem = Problem(model)
        floor = 0.05 if name == "ggn" else 2.0
        dampings = {block: floor * (1 + 3 * k) for k, block in enumerate(problem.gradients.coverage.blocks)}
        expected = problem.expected(name, problem.damping_vector(dampings))
        for solver in ("dense", "pcg"):
            curvature = problem.fit(name, dampings, solver=solver)
            pairs = pairwise_scores(problem.gradients, range(N), curvature, problem.gradients, range(N)).scores
            torch.testing.assert_close(pairs, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("solver", ["cg", "nystrom", "pcg", "lissa", "woodbury"])
def test_iterative_solvers_agree_with_the_dense_one(solver: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tolerance, steps = (1e-9, 100) if solver != "lissa" else (1e-2, 150)
    monkeypatch.setitem(SOLVERS, solver, replace(SOLVERS[solver], tolerance=tolerance, steps=steps))
    monkeypatch.setattr("lightning_influence.curvature.implicit._BATCH", N)
    problem = Problem()
    curvature = problem.fit("ggn", 0.05, solver=solver)
    pairs = pairwise_scores(problem.gradients, range(N), curvature, problem.gradients, range(N)).scores
    close = {"rtol": 1e-6, "atol": 1e-7} if solver != "lissa" else {"rtol": 0.05, "atol": 0.05}
    torch.testing.assert_close(pairs, problem.expected("ggn", 0.05), **close)
    (solve,) = curvature.solves
    assert bool(solve.converged.all())
    assert solve.products > 0
    plain = problem.rows() @ problem.rows().T
    # With the identity the pairs would be these up to a factor: their cosine with the right ones is far from 1.
    assert float(F.cosine_similarity(plain.flatten(), problem.expected("ggn", 0.05).flatten(), dim=0)) < 0.97


def test_no_process_takes_a_dense_matrix_that_another_has_no_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "lightning_influence.core.distributed.gather_objects", lambda own: [own, ("nystrom", ["no room"])]
    )
    curvature = Problem().fit("ggn", 0.05)
    assert isinstance(curvature, ImplicitCurvature)
    assert "no room" in curvature.notes


@pytest.mark.parametrize("solver", ["cg", "nystrom", "pcg", "lissa", "woodbury"])
def test_self_influence_without_a_dense_matrix_is_that_of_the_blocks(solver: Any) -> None:
    problem = Problem()
    own = score_examples(problem.gradients, range(N), curvature=problem.fit("ekfac", 0.05)).columns
    curvature = problem.fit("ggn", 0.05, solver=solver)
    found = score_examples(problem.gradients, range(N), curvature=curvature).columns
    torch.testing.assert_close(found["self_influence"], own["self_influence"], rtol=1e-10, atol=0)
    assert any("self_influence is that of EK-FAC" in note for note in curvature.notes)


class TestWoodbury:
    """Some of the gradients that the GGN is the mean square of; of so small data, by default all of them."""

    @pytest.mark.parametrize("batch_size", [1, 4])
    @pytest.mark.parametrize("formed", [2**25, 1], ids=["at once", "by inputs"])
    @pytest.mark.parametrize("model", [*MODELS, "tokens", "sometimes"])
    def test_all_gradients_make_the_ggn(
        self, model: str, formed: int, batch_size: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("lightning_influence.curvature.sampled._FORMED", formed)
        problem = Problem(model, batch_size=batch_size)
        dampings = {block: 0.05 * (1 + 3 * k) for k, block in enumerate(problem.gradients.coverage.blocks)}
        curvature = problem.fit("ggn", dampings, solver="woodbury")
        pairs = pairwise_scores(problem.gradients, range(N), curvature, problem.gradients, range(N)).scores
        expected = problem.expected("ggn", problem.damping_vector(dampings))
        torch.testing.assert_close(pairs, expected, rtol=1e-7, atol=1e-10)
        (solve,) = curvature.solves
        assert (solve.products, float(solve.residual.max())) == (1, pytest.approx(0, abs=1e-8))
        assert "measured for 4 of 14 systems" in curvature.notes[-1]

    @pytest.mark.parametrize("few", [{"_MOST": 8}, {"_EXACT": 2}], ids=["few", "sampled labels"])
    def test_some_gradients_take_the_others_to_arrive(
        self, few: dict[str, int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As a preconditioner they save steps; taken for all of them they would be far off."""
        for name, value in few.items():
            monkeypatch.setattr(f"lightning_influence.curvature.sampled.{name}", value)
        problem, steps = Problem(), {}
        for solver in ("cg", "woodbury"):
            monkeypatch.setitem(SOLVERS, solver, replace(SOLVERS[solver], tolerance=1e-6))
            curvature = problem.fit("ggn", 1e-3, solver=solver)
            pairs = pairwise_scores(problem.gradients, range(N), curvature, problem.gradients, range(N)).scores
            torch.testing.assert_close(pairs, problem.expected("ggn", 1e-3), rtol=1e-2, atol=1e-2)
            steps[solver] = curvature.solves[0].steps.double().mean()
        assert "woodbury and conjugate gradients to a relative residual of" in curvature.notes[-1]
        assert 0 < steps["woodbury"] < steps["cg"]
        monkeypatch.setitem(SOLVERS, "woodbury", replace(SOLVERS["woodbury"], tolerance=10.0))
        monkeypatch.setattr("lightning_influence.curvature.implicit._ACCEPTED", 10.0)
        alone = problem.fit("ggn", 1e-3, solver="woodbury")
        found = pairwise_scores(problem.gradients, range(N), alone, problem.gradients, range(N)).scores
        assert (found - problem.expected("ggn", 1e-3)).norm() > 0.05 * found.norm()
        assert float(alone.solves[0].residual.max()) > 0.05

    @pytest.mark.parametrize("count", [1, 5, 30, 59, 60, 100])
    def test_chances_add_up(self, count: int) -> None:
        lengths = torch.cat([torch.logspace(-3, 3, 60, dtype=torch.float64), torch.zeros(4).double()]).view(16, 4)
        chances = _chances(lengths, count)
        assert float(chances.sum()) == pytest.approx(min(count, 60))
        assert float(chances.max()) <= 1
        unsure = (chances > 0) & (chances < 1)
        ratios = (chances / lengths)[unsure]
        assert len(ratios) < 2 or float(ratios.max() / ratios.min()) == pytest.approx(1)
        assert not chances.flatten()[-4:].any()

    def test_a_damping_that_rounding_loses_is_refused_in_words(self) -> None:
        """LAPACK's own error would pass by those who go on without the scores of queries."""
        problem = Problem(dtype=torch.float32)
        problem.inputs.mul_(30)
        curvature = problem.fit("ggn", 1e-12, solver="woodbury")
        with pytest.raises(SolverError, match=r"woodbury: .* within the rounding of torch.float32: .*Raise `damping`"):
            pairwise_scores(problem.gradients, range(N), curvature, problem.gradients, range(N))

    def test_processes_take_as_many_gradients_as_the_smallest_has_room_for(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        problem = Problem()
        coordinates = BlockCoordinates(problem.gradients.coverage.blocks)
        dampings = dict.fromkeys(coordinates.blocks, 0.05)
        kept = (4 + 1 + 5) + (5 + 1 + C)  # of a gradient: activations and output gradients of two layers
        monkeypatch.setattr(
            "lightning_influence.core.distributed.gather_objects",
            lambda own: [own, 4 * 5 * 8 * kept],  # a quarter of which is taken
        )
        counted: list[int] = []
        monkeypatch.setattr(
            "lightning_influence.curvature.sampled._chances",
            lambda lengths, count: (counted.append(count), _chances(lengths, count))[1],
        )
        sampled_inverse(problem.gradients, range(N), coordinates, dampings, torch.zeros(1, dtype=torch.float64))
        assert counted == [5]

    def test_the_hessian_is_no_sum_of_squares(self) -> None:
        with pytest.raises(ValueError, match='solver="woodbury" needs a curvature without negative eigenvalues'):
            Problem().fit("hessian", 2.0, solver="woodbury")


class TestAuto:
    """Where a matrix is too large, the solver follows from what it is expected to take."""

    @pytest.mark.parametrize(
        ("systems", "once", "each", "expected"),
        [
            (1, 34, 0, "nystrom"),  # 35 steps of one vector, against a sample and one product to measure the residual
            (1, 33, 0, "woodbury"),
            (100, 1375, 0, "woodbury"),  # 80 vectors of a sketch and 13 steps of 100, against four to measure
            (100, 1376, 0, "nystrom"),
            (100, 376, 10, "nystrom"),
            (100, 375, 10, "woodbury"),
        ],
    )
    def test_the_cheaper_one(self, systems: int, once: float, each: float, expected: str) -> None:
        system = Problem().fit("ggn", 0.05, solver="cg")._system  # type: ignore[attr-defined]
        effort = Effort(exact=True, count=1, product=1, once=once, each=each)
        assert cheapest(system, effort, systems) == expected
        # One gradient drawn for each example makes another GGN: no cheaper way to this one.
        assert cheapest(system, replace(effort, exact=False, once=0), systems) == "nystrom"
        _ = system.sampled
        assert cheapest(system, replace(effort, once=1e9), systems) == "woodbury", "what is there costs nothing"

    def test_scores_are_those_of_the_matrix(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(choices, "_DENSE_BY_ITSELF", 0)
        problem = Problem()
        curvature = problem.fit("ggn", 0.05)
        assert isinstance(curvature, ImplicitCurvature)
        pairs = pairwise_scores(problem.gradients, range(N), curvature, problem.gradients, range(N)).scores
        torch.testing.assert_close(pairs, problem.expected("ggn", 0.05), rtol=1e-7, atol=1e-10)
        assert "ggn was solved with woodbury to a relative residual" in curvature.notes[-1]

    def test_what_it_is_reckoned_by(self) -> None:
        """Two layers of 25 and 18 weights with 5 + 5 and 6 + 3 activations and output gradients."""
        problem = Problem()
        coordinates = BlockCoordinates(problem.gradients.coverage.blocks)
        effort = Effort.of(problem.gradients, range(N), coordinates, torch.zeros(1))
        assert (effort.exact, effort.count, effort.product) == (True, N * C, 8 * N * 43)
        assert effort.once == 2 * (N * C + N) * 43 + N * C * (N * C * (19 + N * C) + 43)
        assert effort.each == 2 * N * C * 43


class TestNystrom:
    def test_a_sketch_is_no_larger_than_there_is_room_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        ranks: list[int] = []
        monkeypatch.setattr(
            "lightning_influence.curvature.solve.solvers.nystrom_preconditioner",
            lambda matvec, like, rank, damping: (
                ranks.append(rank),
                nystrom_preconditioner(matvec, like, rank, damping),
            )[1],
        )
        for free in (10**9, 2 * 5 * 52 * 43, 1):
            monkeypatch.setattr(
                "lightning_influence.curvature.solve.solvers.available_bytes", lambda device, free=free: free
            )
            problem = Problem()
            curvature = problem.fit("ggn", 0.05, solver="nystrom")
            pairs = pairwise_scores(problem.gradients, range(N), curvature, problem.gradients, range(N)).scores
            torch.testing.assert_close(pairs, problem.expected("ggn", 0.05), rtol=1e-3, atol=1e-3)
        assert ranks == [80, 5, 1]

    def spectrum(self) -> tuple[Tensor, Tensor]:
        """A matrix with 6 large eigenvalues and a flat rest, in a random basis."""
        generator = torch.Generator().manual_seed(0)
        basis = torch.linalg.qr(torch.randn(60, 60, generator=generator, dtype=torch.float64))[0]
        values = torch.cat([torch.logspace(0, 4, 6, dtype=torch.float64), torch.full((54,), 1e-4).double()])
        return (basis * values) @ basis.T, torch.randn(9, 60, generator=generator, dtype=torch.float64)

    def test_large_eigenvalues_cost_no_steps(self) -> None:
        matrix, g = self.spectrum()
        sketch = nystrom_preconditioner(lambda v: v @ matrix, g, 12, 1e-2)
        plain = cg(lambda v: v @ matrix, g, 1e-2, tolerance=1e-8)
        better = cg(lambda v: v @ matrix, g, 1e-2, preconditioner=sketch, tolerance=1e-8)
        expected = torch.linalg.solve(matrix + 1e-2 * torch.eye(60).double(), g.T).T
        torch.testing.assert_close(better.require(), expected, rtol=1e-5, atol=1e-5)
        assert int(better.steps.max()) <= int(plain.steps.min()) // 2

    def test_a_full_sketch_is_the_inverse(self) -> None:
        matrix, g = self.spectrum()
        sketch = nystrom_preconditioner(lambda v: v @ matrix, g, 100, 1e-2)
        inverse = torch.linalg.inv(matrix + 1e-2 * torch.eye(60).double())
        torch.testing.assert_close(sketch(g), (1e-2 + 1e-4) * g @ inverse, rtol=1e-3, atol=1e-6)

    def test_what_it_can_not_do(self) -> None:
        matrix, g = self.spectrum()
        with pytest.raises(ValueError, match="not positive semidefinite"):
            nystrom_preconditioner(lambda v: -(v @ matrix), g, 5, 1.0)
        with pytest.raises(ValueError, match='solver="nystrom" needs a curvature without negative eigenvalues'):
            Problem().fit("hessian", 2.0, solver="nystrom")


def test_relative_damping_is_a_share_of_the_mean_eigenvalue_weighted_with_itself() -> None:
    problem = Problem()
    matrix = problem.dense("ggn")
    mean = float(matrix.square().sum() / matrix.trace())
    assert mean > 2 * float(matrix.diagonal().mean())
    exact = problem.fit("ggn", None)
    assert exact.dampings == pytest.approx({"0": 0.1 * mean, "2": 0.1 * mean}, rel=1e-9)
    estimated = problem.fit("ggn", None, solver="pcg")
    assert estimated.dampings["0"] == pytest.approx(0.1 * mean, rel=0.3)


def test_the_estimates_are_exact_for_diagonals_and_unbiased() -> None:
    diagonal = torch.arange(1.0, 8.0).double()
    assert mean_eigenvalues(lambda v: v * diagonal, diagonal) == pytest.approx((4.0, 20.0))
    root = torch.randn(30, 30, generator=torch.Generator().manual_seed(0)).double()
    matrix = root @ root.T
    found = [mean_eigenvalues(lambda v: v @ matrix, matrix[0], seed=seed) for seed in range(50)]
    assert sum(mean for mean, _ in found) / 50 == pytest.approx(float(matrix.diagonal().mean()), rel=0.03)
    squares = float(matrix.square().sum()) / 30
    assert sum(square for _, square in found) / 50 == pytest.approx(squares, rel=0.05)


def test_coordinates_are_a_permutation_of_the_parameters() -> None:
    problem = Problem("cnn")
    coordinates = BlockCoordinates(problem.gradients.coverage.blocks)
    flat = FlatParameters.of(problem.net)
    places = coordinates.places_in(flat)
    assert sorted(places.tolist()) == list(range(flat.size))
    vectors = {name: torch.randn(2, *block.shape).double() for name, block in coordinates.blocks.items()}
    line = coordinates.join(vectors)
    for name, vector in coordinates.split(line).items():
        assert torch.equal(vector, vectors[name])
    by_parameter = {}
    for name, block in coordinates.blocks.items():
        by_parameter |= block.to_parameters(vectors[name])
    in_line = torch.cat([by_parameter[name].flatten(1) for name in flat.parameters], 1)
    assert torch.equal(in_line[:, places], line)


def test_layers_can_be_chosen() -> None:
    """The curvature of a part of the parameters, the others fixed."""
    problem = Problem()
    source = problem.gradients.source
    coverage = discover(problem.net, classify, source, layers=["2"])
    gradients = ExampleGradients(problem.net, classify, source, coverage)
    curvature = fit(gradients, "ggn", range(N), examples=EVERY, labels=("exact", "exact"), damping=0.05)
    names = ["2.weight", "2.bias"]
    matrix = ref.ggn_dense(problem.net, problem.inputs, "cross_entropy", names)
    alone = [(problem.inputs[n : n + 1], problem.targets[n : n + 1]) for n in range(N)]
    rows = ref.flatten_gradients(ref.gradients_alone(problem.net, classify, alone), names)
    expected = ref.quadratic_forms(matrix[None], rows[None, :, :, None].transpose(2, 3), 0.05)
    found = score_examples(gradients, range(N), curvature=curvature).columns["self_influence"]
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=0)


# ------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("solver", ["dense", "pcg"])
def test_an_indefinite_hessian_is_refused_with_the_way_out(solver: Any) -> None:
    problem = Problem()
    least = float(torch.linalg.eigvalsh(problem.dense("hessian"))[0])
    assert least < -0.01
    with pytest.raises(IndefiniteError, match="Raise `damping` above .* or use the GGN"):
        problem.fit("hessian", -0.5 * least, solver=solver)
    problem.fit("hessian", -1.5 * least, solver=solver)


@pytest.mark.parametrize("damping", [0.0, -1.0, float("nan")])
def test_no_damping_on_a_singular_curvature(damping: float) -> None:
    problem = Problem()
    assert float(torch.linalg.eigvalsh(problem.dense("ggn"))[0]) < 1e-10
    with pytest.raises(ValueError, match=r"damping|singular"):
        problem.fit("ggn", damping)
    with pytest.raises(ValueError, match=r"damping|singular"):
        problem.fit("ekfac", damping)


def test_a_solver_that_does_not_arrive_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem()
    monkeypatch.setitem(SOLVERS, "cg", replace(SOLVERS["cg"], steps=1))
    curvature = problem.fit("ggn", 1e-6, solver="cg")
    with pytest.raises(SolverError, match=r"ggn with cg: .*not converged: .* take more"):
        pairwise_scores(problem.gradients, range(N), curvature, problem.gradients, [0])
    assert not bool(curvature.solves[-1].converged.any())
    # Between the tolerance and what can be used at all: used, and said.
    monkeypatch.setitem(SOLVERS, "cg", replace(SOLVERS["cg"], steps=6))
    curvature = problem.fit("ggn", 0.05, solver="cg")
    pairwise_scores(problem.gradients, range(N), curvature, problem.gradients, [0])
    assert any("to a relative residual of" in note for note in curvature.notes)


def test_a_dense_matrix_that_does_not_fit_is_not_formed(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem()
    monkeypatch.setattr(choices, "fits", lambda size, device: False)
    monkeypatch.setattr(choices, "available_bytes", lambda device: 1000)
    curvature = problem.fit("ggn", 0.05, solver="dense")
    assert any("1 kB are available: an iterative solver was taken instead" in note for note in curvature.notes)
    pairs = pairwise_scores(problem.gradients, range(N), curvature, problem.gradients, range(N)).scores
    torch.testing.assert_close(pairs, problem.expected("ggn", 0.05), rtol=1e-3, atol=1e-3)


def test_memory_is_estimated_before_anything_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem()
    monkeypatch.setattr("lightning_influence.curvature.registry.available_bytes", lambda device: 1500)
    coverage = problem.gradients.coverage
    assert fitted_bytes("diagonal", coverage) < 1500 < fitted_bytes("ekfac", coverage)
    with pytest.raises(ValueError, match=r"curvature='ekfac' needs .* the largest: .* Use `curvature=\"diagonal\"`"):
        check_curvature(problem.gradients, "ekfac", range(N))
    check_curvature(problem.gradients, "diagonal", range(N))


def test_what_the_ggn_is_not_defined_for_is_found_before_training() -> None:
    problem = Problem()
    unknown = ExampleGradients(
        problem.net,
        lambda module, batch: (module(batch[0]).logsumexp(1) - module(batch[0])[:, 0]).mean(),
        problem.gradients.source,
        problem.gradients.coverage,
    )
    with pytest.raises(TaskError, match="the GGN needs a loss made of known calls"):
        check_curvature(unknown, "ggn", range(N))
    check_curvature(unknown, "hessian", range(N))


def test_non_finite_examples_are_left_out_of_the_curvature() -> None:
    problem = Problem()
    problem.inputs[3] = torch.nan
    good = [n for n in range(N) if n != 3]
    curvature = problem.fit("ggn", 0.05)
    assert any("1 examples with a non-finite loss or gradient are not in the ggn" in note for note in curvature.notes)
    found = score_examples(problem.gradients, range(N), curvature=curvature).columns["self_influence"]
    assert found.isnan().nonzero().flatten().tolist() == [3]
    matrix = ref.ggn_dense(problem.net, problem.inputs[good], "cross_entropy")
    rows = problem.rows()[good]
    expected = (rows @ torch.linalg.solve(matrix + 0.05 * torch.eye(len(matrix)), rows.T)).diagonal()
    torch.testing.assert_close(found[good], expected, rtol=1e-8, atol=0)
    pairs = pairwise_scores(
        problem.gradients, range(N), problem.fit("ggn", 0.05, solver="pcg"), problem.gradients, [3, 0]
    )
    assert bool(pairs.scores[0].isnan().all())
    assert int(pairs.scores[1].isnan().sum()) == 1


def test_products_are_not_asked_for_more_than_the_parameters() -> None:
    product = GGNProduct(Problem().gradients, range(N))
    assert product.semidefinite
    assert product.to_dense().shape == (43, 43)
