"""Diff-In against exact Hessians."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import reference as ref
import torch
import torch.nn.functional as F
from torch import Tensor
from trajectory_cases import RATES, N, Q, Run, make_run

from lightning_influence.curvature.choices import random_subset
from lightning_influence.scores.along.diff_in import diff_in_scores
from lightning_influence.scores.queries import QueryError


def expected(run: Run, batch: list[int]) -> Tensor:
    total = torch.zeros(Q, N, dtype=torch.float64)
    for checkpoint in run.trained:
        inputs, labels = run.data.tensors
        hessians = [
            ref.hessian_dense(run.at(checkpoint), F.cross_entropy, inputs[n : n + 1], labels[n : n + 1], list(RATES))
            for n in range(N)
        ]
        term = ref.diff_in_dense(
            run.gradients(checkpoint, run.asked),
            run.gradients(checkpoint, run.data),
            torch.stack(hessians),
            batch,
            run.spread(RATES),
        )
        total -= checkpoint.step * term / len(run.trained)
    return total


def scores(run: Run, batch_size: int | None = None, **options: Any) -> Tensor:
    train, queries = run.passes(batch_size)
    return diff_in_scores(train, range(N), queries, range(Q), run.checkpoints, **options).scores


@pytest.mark.parametrize("batch", [5, 256], ids=["some", "all"])
def test_equals_exact_hessians(batch: int) -> None:
    """A central difference errs by ε² times the third derivative: a shorter step is closer, in double precision."""
    run = make_run()
    reference = expected(run, random_subset(list(range(N)), batch, 0))
    found = scores(run, batch=batch)
    torch.testing.assert_close(found, reference, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(scores(run, batch=batch, step=1e-5), reference, rtol=1e-6, atol=1e-8)
    # Gradients alone would not do.
    plain = sum((run.gradients(c, run.asked) * run.spread(RATES)) @ run.gradients(c, run.data).T for c in run.trained)
    assert isinstance(plain, Tensor)
    assert torch.corrcoef(torch.stack([plain.flatten(), reference.flatten()]))[0, 1].abs() < 0.98


def test_is_the_second_order_of_leaving_an_example_out_of_a_step() -> None:
    """Two steps of gradient descent, worked out by hand: ``δ_2 = η/N (2 g_z - η (H_B g_z + H_z g_B))`` at the start."""
    rate, n = 1e-3, 3
    run = make_run((2,))
    start = run.checkpoints[0]
    inputs, labels = run.data.tensors

    def trained(weight: float) -> Tensor:
        net = run.at(start)
        for _ in range(2):
            losses = F.cross_entropy(net(inputs), labels, reduction="none")
            gradients = torch.autograd.grad(losses.mean() - weight * losses[n] / N, list(net.parameters()))
            with torch.no_grad():
                for p, g in zip(net.parameters(), gradients, strict=True):
                    p -= rate * g
        return torch.cat([p.detach().flatten() for p in net.parameters()])

    delta = (trained(1e-3) - trained(-1e-3)) / 2e-3
    hessians = torch.stack(
        [
            ref.hessian_dense(run.at(start), F.cross_entropy, inputs[m : m + 1], labels[m : m + 1], list(RATES))
            for m in range(N)
        ]
    )
    gradients, unit = run.gradients(start, run.data), torch.eye(len(delta), dtype=torch.float64)
    second = ref.diff_in_dense(unit, gradients, hessians, range(N), torch.full_like(delta, rate))[:, n] / rate
    by_hand = rate / N * (2 * gradients[n] - second)
    error, size = (delta - by_hand).norm(), (rate / N * second).norm()
    assert error < 0.02 * size
    assert (delta - rate / N * 2 * gradients[n]).norm() > 0.9 * size


@pytest.mark.parametrize("batch_size", [4, 12])
def test_neither_batches_nor_memory_matter(batch_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run()
    expected = scores(run, batch=4)
    monkeypatch.setattr("lightning_influence.scores.queries._query_bytes", lambda device: 1)
    torch.testing.assert_close(scores(run, batch_size, batch=4), expected, rtol=1e-7, atol=1e-10)


def test_leaves_no_trace() -> None:
    run = make_run()
    before = copy.deepcopy(run.net.state_dict())
    scores(run)
    assert all(torch.equal(value, before[name]) for name, value in run.net.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in run.net.parameters())


def test_queries_and_examples_without_finite_gradients_have_no_score() -> None:
    run = make_run()
    run.data.tensors[0][4, 1] = torch.inf
    run.asked.tensors[0][2, 0] = torch.inf
    found = scores(run)
    assert found.isnan().all(0).nonzero().flatten().tolist() == [4]
    assert found.isnan().all(1).nonzero().flatten().tolist() == [2]
    assert int(found.isnan().sum()) == Q + N - 1


@pytest.mark.parametrize("options", [{"batch": 0}, {"step": 0.0}, {"step": float("nan")}])
def test_wrong_arguments(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"batch=0; expected an integer|step=\w.*; expected a finite number > 0"):
        scores(make_run(), **options)


def test_queries_of_another_kind() -> None:
    run = make_run()
    run.asked.tensors[1][1] = 9
    with pytest.raises(QueryError, match="can't be run on them"):
        scores(run)
