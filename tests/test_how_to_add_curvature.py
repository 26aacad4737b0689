"""How to add a block curvature, and how to add a solver: each in under 40 lines, from outside of the package."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import pytest
import reference as ref
import torch
from test_curvature import N, Problem
from test_full_curvature import Problem as FullProblem
from torch import Tensor

from lightning_influence.curvature import (
    LADDER,
    SOLVED,
    SOLVERS,
    UNSOLVED,
    BlockCurvature,
    IterativeSolver,
    KroneckerBlock,
    Run,
    Rung,
    Solution,
    System,
    eigendecomposition,
    row_norms,
    row_products,
)
from lightning_influence.curvature.saved import restored
from lightning_influence.layers import second_moment
from lightning_influence.scores import pairwise_scores, score_examples


class FOOF(KroneckerBlock):
    """``C = I ⊗ A``: the moment of the activations alone (Benzing 2022, 2201.12250)."""

    measures = ("covariances",)
    title = "FOOF"

    @classmethod
    def fitted_shapes(cls, shape: tuple[int, int, int], dense: tuple[bool, bool]) -> dict[str, tuple[int, ...]]:
        k, _, i = shape
        return {"eigenvalues": shape, "activation_basis": (k, i, i)}

    def _contributions(self, xs: Sequence[Any], gs: Sequence[Any], examples: int) -> dict[str, Tensor]:
        return {"moment": second_moment(xs[0])}

    def _finish(self, sums: dict[str, Tensor]) -> None:
        values, basis = eigendecomposition(sums["moment"] / sums["examples"].to(sums["moment"].dtype))
        eigenvalues = values.clamp(min=0).unsqueeze(1).expand(self.shape).contiguous()
        self.tensors = {"eigenvalues": eigenvalues, "activation_basis": basis.contiguous()}


def steepest_descent(system: System, g: Tensor, tolerance: float, steps: int) -> Solution:
    """Go down the gradient as far as the quadratic falls."""
    run = Run(system.matvec, g, system.damping)
    x, r = torch.zeros_like(g), run.b
    for _ in range(steps):
        going = row_norms(r) > tolerance
        if not bool(going.any()):
            break
        length = row_products(r, r) / row_products(r, run(r))
        x = x + torch.where(going, length, 0).to(r)[:, None] * r
        r = run.b - run(x)
        run.steps += going
    run.residual = row_norms(r)
    run.kinds = torch.where(run.residual <= tolerance, SOLVED, UNSOLVED)

    def why(kind: int, value: float, residual: float, steps: int) -> str:
        return f"not converged: the relative residual is {residual:.2g} after {steps} steps; raise `damping`."

    return run.solution(x, why)


@pytest.mark.parametrize("part", [FOOF, steepest_descent])
def test_it_takes_less_than_40_lines(part: Any) -> None:
    assert len(inspect.getsource(part).splitlines()) < 40


@pytest.mark.parametrize("net", ["mlp", "tokens"])
def test_a_block_curvature(net: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LADDER, "foof", Rung(FOOF))
    problem = Problem(net)
    curvature = problem.fit("foof", "exact", damping=0.3)
    assert isinstance(curvature, BlockCurvature)
    expected = torch.zeros(N).double()
    for layer, block in curvature.blocks.items():
        x, _ = ref.layer_inputs_and_output_gradients(
            problem.net, layer, torch.nn.functional.cross_entropy, problem.inputs, problem.targets
        )
        rows = x.flatten(1, 2)
        dense = torch.kron(torch.eye(block.shape[1]).double(), rows[0].T @ rows[0] / N)[None]
        torch.testing.assert_close(block.to_dense(), dense, rtol=1e-8, atol=1e-12)
        (gradients,) = problem.per_example(layer)
        expected += ref.quadratic_forms(dense, gradients, 0.3)
    scores = score_examples(problem.gradients, range(N), curvature=curvature).columns
    torch.testing.assert_close(scores["self_influence"], expected, rtol=1e-8, atol=0)
    ratio = expected / scores["grad_norm_squared"]
    assert ratio.max() > 1.2 * ratio.min(), "the identity gives one and the same ratio"
    # What comes with the contract: the damping that the block has of itself, and the way through the disk.
    own = problem.fit("foof", "exact")
    assert own.dampings == pytest.approx({layer: block.damping() for layer, block in curvature.blocks.items()})
    back = restored(curvature.tensors(), problem.gradients.coverage)
    again = score_examples(problem.gradients, range(N), curvature=back).columns
    assert torch.equal(again["self_influence"], scores["self_influence"])


def test_a_solver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SOLVERS, "steepest", IterativeSolver(steepest_descent, tolerance=1e-9, steps=500))
    problem = FullProblem()
    curvature = problem.fit("ggn", 0.2, solver="steepest")
    pairs = pairwise_scores(problem.gradients, range(14), curvature, problem.gradients, range(14)).scores
    torch.testing.assert_close(pairs, problem.expected("ggn", 0.2), rtol=1e-6, atol=1e-7)
    (solve,) = curvature.solves
    assert solve.converged.all()
    assert 2 < int(solve.steps.max()) < 500
    monkeypatch.setitem(SOLVERS, "steepest", IterativeSolver(steepest_descent, tolerance=1e-9, steps=1))
    with pytest.raises(RuntimeError, match="ggn with steepest: .* not converged: the relative residual is .* 1 steps"):
        problem.fit("ggn", 1e-5, solver="steepest").solve(
            {name: torch.randn(1, *block.shape).double() for name, block in problem.gradients.coverage.blocks.items()}
        )


def test_nothing_stays_registered() -> None:
    assert not {"foof"} & LADDER.keys()
    assert SOLVERS.keys() == {"cg", "nystrom", "pcg", "lissa", "woodbury"}
