"""Solvers against dense algebra in float64, and what they say where there is no answer."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_influence.curvature.solve import cg as conjugate_gradients
from lightning_influence.curvature.solve import lissa as descent
from lightning_influence.curvature.solve.cg import cg
from lightning_influence.curvature.solve.lissa import lissa
from lightning_influence.curvature.solve.solution import Solution, SolverError
from lightning_influence.curvature.solve.spectrum import (
    IndefiniteError,
    Matvec,
    factorised,
    largest_eigenvalue,
    require_positive_definite,
    row_products,
    smallest_eigenvalue,
)

P, Q = 30, 4


def matrix(eigenvalues: Tensor, seed: int = 0) -> Tensor:
    """Return a symmetric matrix with these eigenvalues and random eigenvectors."""
    generator = torch.Generator().manual_seed(seed)
    p = len(eigenvalues)
    basis, _ = torch.linalg.qr(torch.randn(p, p, generator=generator, dtype=torch.float64))
    return torch.mm(basis * eigenvalues.double(), basis.T)


def spectrum(condition: float, p: int = P) -> Tensor:
    return torch.logspace(-math.log10(condition), 0, p, dtype=torch.float64)


def right(q: int = Q, p: int = P, seed: int = 1) -> Tensor:
    return torch.randn(q, p, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def times(C: Tensor) -> Matvec:
    return lambda v: v @ C.to(v.dtype)


class Counting:
    """A product that notes how many vectors it is given."""

    def __init__(self, C: Tensor) -> None:
        self.C, self.rows = C, list[int]()

    def __call__(self, v: Tensor) -> Tensor:
        self.rows.append(len(v))
        return v @ self.C.to(v.dtype)


def exact(C: Tensor, g: Tensor, damping: float) -> Tensor:
    solution: Tensor = torch.linalg.solve(C + damping * torch.eye(len(C)).double(), g.T)
    return solution.T


def error(solution: Solution, C: Tensor, g: Tensor, damping: float) -> float:
    truth = exact(C, g.double(), damping)
    return float((solution.solution.double() - truth).norm() / truth.norm())


def batches_of(C: Tensor, noise: float, seed: int = 0) -> Iterator[Matvec]:
    """Positive semidefinite matrices whose mean is ``C``: it is taken in a few of its factors at a time."""
    values, vectors = torch.linalg.eigh(C)
    root = vectors * values.sqrt()
    generator = torch.Generator().manual_seed(seed)
    while True:
        weights = 1 + noise * (2 * torch.randint(0, 2, (len(C),), generator=generator).double() - 1)
        yield times((root * weights) @ root.T)


SOLVERS: dict[str, Callable[[Tensor, Tensor, float], Solution]] = {
    "cg": lambda C, g, damping: cg(times(C), g, damping, tolerance=1e-8),
    "pcg": lambda C, g, damping: cg(
        times(C), g, damping, preconditioner=lambda v: v / (C.diagonal() + damping), tolerance=1e-8
    ),
    "lissa": lambda C, g, damping: lissa(
        itertools.repeat(m := times(C)), g, damping, matvec=m, tolerance=1e-7, steps=2_500
    ),
}


@pytest.fixture(params=SOLVERS)
def solve(request: pytest.FixtureRequest) -> Callable[[Tensor, Tensor, float], Solution]:
    return SOLVERS[request.param]


class TestAllOfThem:
    def test_agree_with_a_dense_solve(self, solve: Callable[..., Solution]) -> None:
        C, g = matrix(spectrum(1e3)), right()
        found = solve(C, g, 1e-2)
        assert found.converged.all()
        assert found.reason == ""
        assert error(found, C, g, 1e-2) < 1e-5
        assert torch.equal(found.require(), found.solution)
        # The identity, or forgetting the damping, would be far off.
        truth = exact(C, g, 1e-2)
        assert torch.nn.functional.cosine_similarity(g, truth).max() < 0.8
        assert (exact(C, g, 0) - truth).norm() > 0.5 * truth.norm()

    def test_residual_is_that_of_the_solution(self, solve: Callable[..., Solution]) -> None:
        C, g = matrix(spectrum(1e2)), right()
        found = solve(C, g, 0.05)
        true = (found.solution @ C + 0.05 * found.solution - g).norm(dim=1) / g.norm(dim=1)
        torch.testing.assert_close(found.residual, true, rtol=1e-3, atol=1e-14)

    def test_systems_do_not_depend_on_each_other(self, solve: Callable[..., Solution]) -> None:
        """In a batch, alone, of another size and sign; also beside a zero system, whose answer is zero."""
        C, g = matrix(spectrum(1e2)), right()
        scales = torch.tensor([1e-30, 1.0, -1e20, 0.0]).double()
        together = solve(C, g * scales[:, None], 0.05)
        assert together.converged.all()
        for row, scale in enumerate(scales.tolist()):
            alone = solve(C, g[row : row + 1], 0.05).solution[0]
            # Each is off by its residual over the smallest eigenvalue, at most 1e-7 of ``‖g‖`` / 0.06, and no further.
            apart = (together.solution[row] - scale * alone).norm()
            assert apart <= 2 * 1e-7 / 0.06 * abs(scale) * g[row].norm()
        assert (together.solution[3] == 0).all()
        assert together.residual[3] == 0

    def test_indefinite_is_reported_and_never_nan(self, solve: Callable[..., Solution]) -> None:
        """A saddle: without the check the answer is the stationary point of a function without a minimum."""
        eigenvalues = spectrum(1e2)
        eigenvalues[0] = -0.3
        C, g = matrix(eigenvalues), right()
        found = solve(C, g, 0.1)
        assert not found.converged.any()
        assert torch.isfinite(found.solution).all()
        assert torch.isfinite(found.residual).all()
        for reason in found.reasons:
            assert reason.startswith("indefinite: the curvature has an eigenvalue of -0.")
            assert "Raise `damping` above" in reason
            assert "use the GGN" in reason
        with pytest.raises(SolverError, match=r"4 of 4 systems were not solved\. \[4\] indefinite"):
            found.require()
        assert solve(C, g, 0.4).converged.all(), "with enough damping there is a minimum"

    def test_a_singular_matrix_without_damping_is_reported(self, solve: Callable[..., Solution]) -> None:
        eigenvalues = spectrum(10)
        eigenvalues[:3] = 0
        found = solve(matrix(eigenvalues), right(), 0.0)
        assert not found.converged.any()
        assert torch.isfinite(found.solution).all()
        assert "`damping`" in found.reason

    def test_single_precision(self, solve: Callable[..., Solution]) -> None:
        C, g = matrix(spectrum(100)).float(), right().float()
        found = solve(C, g, 0.1)
        assert found.solution.dtype == torch.float32
        assert error(found, C.double(), g, 0.1) < 1e-5

    def test_no_system_at_all(self, solve: Callable[..., Solution]) -> None:
        found = solve(matrix(spectrum(10)), right(0), 0.1)
        assert found.solution.shape == (0, P)
        assert found.reasons == ()
        assert found.require().shape == (0, P)

    @pytest.mark.parametrize(
        ("g", "damping", "message"),
        [
            (torch.tensor([[1.0] * P, [math.nan] * P]), 0.1, r"non-finite entries in the rows \[1\]; leave"),
            (torch.ones(2, P), -0.1, "damping is -0.1; expected a number >= 0"),
            (torch.ones(2, P), math.inf, "damping is inf; expected"),
            (torch.ones(2, P), True, "damping is True; expected"),
        ],
    )
    def test_wrong_arguments(self, solve: Callable[..., Solution], g: Tensor, damping: float, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            solve(matrix(spectrum(10)).float(), g, damping)


class TestConjugateGradients:
    def test_ends_after_as_many_steps_as_there_are_eigenvalues(self) -> None:
        found = cg(times(matrix(torch.arange(1.0, 4).repeat_interleave(P // 3))), right(), 0.5, tolerance=1e-10)
        assert found.converged.all()
        assert found.steps.tolist() == [3] * Q

    def test_a_preconditioner_saves_steps(self) -> None:
        """Without it in the recursion the steps stay the same; with it in the wrong place the solution changes."""
        scales = torch.logspace(-2, 2, P).double()
        C = scales[:, None] * matrix(spectrum(5)) * scales
        g = right()
        plain = cg(times(C), g, 1e-3, tolerance=1e-8, max_steps=1000)
        inverse = 1 / (C.diagonal() + 1e-3)
        helped = cg(times(C), g, 1e-3, preconditioner=lambda v: v * inverse, tolerance=1e-8, max_steps=1000)
        assert helped.converged.all()
        assert error(helped, C, g, 1e-3) < 1e-6
        assert helped.steps.max() < plain.steps.min() / 2
        perfect = torch.linalg.inv(C + 1e-3 * torch.eye(P).double())
        assert cg(times(C), g, 1e-3, preconditioner=times(perfect), tolerance=1e-6).steps.max() <= 2

    def test_solved_systems_leave_the_batch(self) -> None:
        """A product is a pass over the data for every vector: a system that is done must not go along."""
        C = matrix(spectrum(1e4))
        g = right(3)
        _, vectors = torch.linalg.eigh(C)
        g[0] = vectors[:, 3]  # one step
        g[1] = vectors[:, 2] + vectors[:, 20]  # two steps
        product = Counting(C)
        found = cg(product, g, 1e-3, tolerance=1e-6)
        assert found.converged.all()
        assert found.steps[:2].tolist() == [1, 2]
        assert product.rows[:4] == [3, 2, 1, 1]
        assert found.products == len(product.rows)

    def test_too_few_steps_are_reported(self) -> None:
        C, g = matrix(spectrum(1e4)), right()
        found = cg(times(C), g, 1e-4, tolerance=1e-8, max_steps=7)
        assert not found.converged.any()
        assert found.steps.tolist() == [7] * Q
        message = r"not converged: the relative residual is [\d.]+ after 7 steps.*raise `damping`.*`preconditioner=`"
        with pytest.raises(SolverError, match=message):
            found.require()
        # What was reached is worth something: closer to the solution than nothing is.
        assert error(found, C, g, 1e-4) < 0.9

    def test_the_limit_of_single_precision_is_reported_not_hidden(self) -> None:
        """The recursion goes on to "converge"; the residual of the solution itself tells otherwise."""
        C, g = matrix(spectrum(1e5)).float(), right().float()
        found = cg(times(C), g, 0.0, tolerance=1e-7, max_steps=2000)
        assert not found.converged.any()
        assert all(reason.startswith("rounding: the relative residual is") for reason in found.reasons)
        true = (found.solution.double() @ C.double() - g.double()).norm(dim=1) / g.double().norm(dim=1)
        torch.testing.assert_close(found.residual, true, rtol=0.5, atol=0)

    def test_a_restart_recovers_what_rounding_lost(self) -> None:
        """Products that are 0.1 % off at first: the recursion would end with that error in the solution."""
        C, g = matrix(spectrum(1e2)), right()
        off = C + 1e-3 * matrix(spectrum(2), seed=3)
        product = Counting(C)

        def at_first_off(v: Tensor) -> Tensor:
            exactly = product(v)
            return v @ off if len(product.rows) <= 15 else exactly

        found = cg(at_first_off, g, 0.01, tolerance=1e-8)
        assert found.converged.all(), found.reason
        assert error(found, C, g, 0.01) < 1e-6

    def test_a_restart_that_makes_it_worse_is_not_taken(self, monkeypatch: pytest.MonkeyPatch) -> None:
        C, g = matrix(spectrum(1e2)), right()
        sweep = conjugate_gradients._sweep
        ends: list[Tensor] = []

        def worse_later(*arguments: Any) -> Any:
            found = sweep(*arguments)
            # The recursion is a little off, as in single precision; the second time by more than it gains.
            ends.append(found.x + 1e-5 * 10 ** (3 * len(ends)))
            return found._replace(x=ends[-1])

        monkeypatch.setattr(conjugate_gradients, "_sweep", worse_later)
        found = cg(times(C), g / g.norm(dim=1, keepdim=True), 0.01, tolerance=1e-8)
        assert len(ends) == 2
        torch.testing.assert_close(found.solution, ends[0])
        assert all(reason.startswith("rounding: the relative residual is") for reason in found.reasons)

    def test_only_the_systems_that_meet_it_fail_with_an_indefinite_matrix(self) -> None:
        eigenvalues = spectrum(10)
        eigenvalues[0] = -0.3
        C, g = matrix(eigenvalues), right(3)
        _, vectors = torch.linalg.eigh(C)
        g[1] = vectors[:, 5] + vectors[:, 6]
        found = cg(times(C), g, 0.1, tolerance=1e-6)
        assert found.converged.tolist() == [False, True, False]
        assert found.reasons[1] == ""
        with pytest.raises(SolverError, match=r"2 of 3 systems were not solved\. \[2\] indefinite"):
            found.require()

    def test_a_preconditioner_that_is_not_positive_is_reported(self) -> None:
        found = cg(times(matrix(spectrum(10))), right(), 0.1, preconditioner=lambda v: -v)
        assert found.reasons[0].startswith("preconditioner: it is not positive definite")
        assert (found.solution == 0).all()

    def test_non_finite_products_are_reported(self) -> None:
        found = cg(lambda v: v * math.nan, right(), 0.1)
        assert found.reasons[0].startswith("non-finite: a product has non-finite entries")
        assert (found.solution == 0).all()


class TestLiSSA:
    def test_random_batches(self) -> None:
        """Averaged over the second half: the last iterate alone is 5 times as far off."""
        C, g = matrix(spectrum(20)), right()
        found = lissa(batches_of(C, 0.5), g, 0.1, matvec=times(C), steps=4000, tolerance=0.05)
        assert found.converged.all(), found.reason
        assert error(found, C, g, 0.1) < 0.03
        assert found.steps.tolist() == [4000] * Q

    def test_stopping_early_is_additional_damping(self) -> None:
        """Twenty steps of size α are closer to a damping of ``λ + 1/(20 α)`` than to λ."""
        C, g = matrix(spectrum(1e4)), right()
        found = lissa(itertools.repeat(m := times(C)), g, 1e-4, matvec=m, steps=20, step_size=0.9, tolerance=1e-6)
        assert not found.converged.any()
        assert additional_damping(found.reasons[0]) == pytest.approx(1 / 18, rel=0.05)
        reached = found.solution

        def distance(damping: float) -> float:
            return float((reached - exact(C, g, damping)).norm() / reached.norm())

        assert distance(1e-4 + 1 / 18) < 0.4
        assert distance(1e-4) > 10

    def test_default_step_size_is_below_its_bound(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Also for the largest of the batches, whose eigenvalues exceed that of the mean."""
        seen: list[float] = []
        bound = descent._step_bound

        def noted(matvecs: Iterable[Matvec], g: Tensor, damping: float) -> float:
            seen.append(bound(matvecs, g, damping))
            return seen[-1]

        monkeypatch.setattr(descent, "_step_bound", noted)
        C, g = matrix(spectrum(20)), right()
        lissa(batches_of(C, 0.5), g, 0.1, matvec=times(C), steps=10)
        few = lissa(itertools.repeat(m := times(C)), g, 0.1, matvec=m, steps=10)
        assert additional_damping(few.reasons[0]) == pytest.approx(1 / (10 * 0.9 * seen[1]), rel=0.05)
        assert 1 / (1.5 + 0.1) * 0.9 < seen[0] < 1 / (1.2 + 0.1)
        assert seen[1] == pytest.approx(1 / 1.1, rel=0.02)
        assert seen[1] <= 1 / 1.1

    @pytest.mark.parametrize("factor", [2.5, 30.0, 1e6, 1e300])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_a_step_that_is_too_long_is_reported(self, factor: float, dtype: torch.dtype) -> None:
        """It doubles the iterate, or worse: without the check the result is infinity, then NaN."""
        C, g = matrix(spectrum(1e2)).to(dtype), right().to(dtype)
        factor = min(factor, torch.finfo(dtype).max / 10)
        found = lissa(
            itertools.repeat(m := times(C)), g, 0.01, matvec=m, steps=3000, step_size=factor / 1.01, tolerance=1e-3
        )
        assert not found.converged.any()
        assert torch.isfinite(found.solution).all()
        assert torch.isfinite(found.residual).all()
        for reason in found.reasons:
            assert reason.startswith(f"diverged: step_size {factor / 1.01:.3g} is too large")
            assert "pass less than 0.98" in reason or "pass less than 0.99" in reason
        assert (found.steps < 60).all()

    def test_a_stream_that_ends_and_wrong_arguments(self) -> None:
        C, g = matrix(spectrum(10)), right()
        found = lissa([times(C)] * 5, g, 0.1, matvec=times(C), steps=100)
        assert found.steps.tolist() == [5] * Q
        assert found.reasons[0].startswith("not converged: the relative residual is")
        with pytest.raises(
            ValueError, match=r"largest eigenvalue of the curvature is -0\.0\d+ and damping is 0.*Raise `damping`"
        ):
            lissa([times(-C)], g, 0.0, matvec=times(-C))


def additional_damping(reason: str) -> float:
    """The additional damping that the text names."""
    return float(reason.partition("additional damping of ")[2].partition(". ")[0])


class TestExtremeEigenvalues:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("p", [1, 2, 7, 400])
    def test_both_ends(self, p: int, dtype: torch.dtype) -> None:
        """Well inside 60 products, though most of the spectrum is near 0 as for networks."""
        eigenvalues = torch.cat([torch.linspace(-0.02, 0.05, max(p - 2, 0)), torch.tensor([-0.4, 3.0])])[-p:]
        C = matrix(eigenvalues).to(dtype)
        like = torch.zeros(p, dtype=dtype)
        for find, expected in ((largest_eigenvalue, eigenvalues.max()), (smallest_eigenvalue, eigenvalues.min())):
            found = find(times(C), like, max_steps=60)
            assert found.value == pytest.approx(float(expected), rel=1e-2)
            assert found.error <= max(1e-2 * abs(found.value), 1e-6)
            assert abs(found.value - float(expected)) <= found.error + 1e-6

    def test_a_zero_matrix(self) -> None:
        assert largest_eigenvalue(lambda v: 0 * v, right()) == (0, 0, 0)

    def test_the_error_tells_that_steps_were_too_few(self) -> None:
        C = matrix(torch.linspace(0, 1, 400))
        few = largest_eigenvalue(times(C), torch.zeros(400).double(), max_steps=4)
        assert few.value + few.error < 1.2
        assert few.value < 0.99
        assert few.error > 0.01

    def test_an_indefinite_curvature_is_refused_with_its_eigenvalue(self) -> None:
        eigenvalues = torch.linspace(0, 1, P)
        eigenvalues[3] = -0.04
        C = matrix(eigenvalues)
        message = r"an eigenvalue of -0\.0[34]\d* or below.*Raise `damping` above 0\.04\d* at least, or use the GGN"
        with pytest.raises(IndefiniteError, match=message):
            require_positive_definite(times(C), right(), 0.03)
        assert require_positive_definite(times(C), right(), 0.05).value == pytest.approx(-0.04, rel=0.1)

    def test_a_semidefinite_curvature_needs_damping_but_is_no_saddle(self) -> None:
        C = matrix(torch.cat([torch.zeros(20), torch.linspace(0.5, 1, 10)]))
        with pytest.raises(IndefiniteError, match="singular: within rounding.*raise `damping`"):
            require_positive_definite(times(C), right(), 0.0)
        assert abs(require_positive_definite(times(C), right(), 1e-9).value) < 1e-12

    @pytest.mark.parametrize("least", [3e-17, -3e-17, 1e-16, -1e-16, 0.0])
    @pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
    @pytest.mark.parametrize("seed", range(3))
    def test_whether_a_matrix_is_singular_does_not_depend_on_the_sign_of_rounding(
        self, least: float, scale: float, seed: int
    ) -> None:
        """A factorisation breaks down for one of the signs, and a Rayleigh quotient is positive for the other."""
        C = scale * matrix(torch.cat([torch.full((4,), least), torch.linspace(0.5, 1, 8)]), seed)
        with pytest.raises(IndefiniteError, match="singular: within rounding"):
            require_positive_definite(times(C), right(1, 12), 0.0)
        _, singular = factorised(C, C.dtype)
        assert singular is not None
        assert abs(singular[0]) <= singular[1] <= 1e-14 * scale
        # The least damping that is more than rounding makes it regular, for all of them.
        damping = 1e-12 * scale
        assert require_positive_definite(times(C), right(1, 12), damping).value < damping
        assert factorised(C + damping * torch.eye(12), C.dtype)[1] is None

    @pytest.mark.parametrize("size", [2, 50])
    def test_matrices_of_single_precision_are_judged_by_their_own_rounding(self, size: int) -> None:
        for seed in range(5):
            values = torch.linspace(0.5, 1, size)
            values[0] = 0
            C = matrix(values, seed).float().double()
            assert factorised(C, torch.float32)[1] is not None
            assert factorised(C + 1e-5 * torch.eye(size), torch.float32)[1] is None

    def test_wrong_products_and_arguments(self) -> None:
        with pytest.raises(ValueError, match="a product has non-finite entries"):
            largest_eigenvalue(lambda v: v * math.inf, right())
        with pytest.raises(ValueError, match="damping is -1; expected"):
            require_positive_definite(times(matrix(spectrum(10))), right(), -1)


def test_inner_products_of_long_vectors_are_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """A million float32 terms of alternating sign: summed in float32 the rest is noise. Also over several chunks."""
    monkeypatch.setattr("lightning_influence.curvature.solve.spectrum._CHUNK", 1000)
    a = torch.randn(2, 100_001)
    b = torch.randn(2, 100_001)
    torch.testing.assert_close(row_products(a, b), (a.double() * b.double()).sum(1), rtol=1e-12, atol=0)
