"""Z0-Inf: exact where losses are linear along the path and the path spans the parameters; its bound by the variance."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import reference as ref
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from trajectory_cases import RATES, C, N, Q, make_run

from lightning_influence.data.source import ExampleSource
from lightning_influence.gradients.discover import discover
from lightning_influence.gradients.passes import ExampleGradients
from lightning_influence.objective.task import TaskError
from lightning_influence.scores.along.z0 import loss_paths, z0_scores
from lightning_influence.training.checkpoints import Checkpoint, CheckpointError

EXACT: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-11}


def flat(checkpoint: Checkpoint) -> Tensor:
    return torch.cat([checkpoint.parameters[name].flatten() for name in RATES])


def linear_run(moves: Tensor, rate: float = 1.0) -> tuple[nn.Linear, list[Checkpoint]]:
    """A model whose output is its loss, and checkpoints that go along the rows of `moves`, `[t, 4]`."""
    net = nn.Linear(3, 1).double()
    checkpoints = [Checkpoint.of(net, 0)]
    for step, move in enumerate(moves, 1):
        with torch.no_grad():
            net.weight += move[:3]
            net.bias += move[3]
        checkpoints.append(Checkpoint.of(net, step, step_sizes={"weight": rate, "bias": rate}, steps=1))
    return net, checkpoints


def output(module: Any, batch: Any) -> Tensor:
    result: Tensor = module(batch[0]).squeeze(1)
    return result


def passes(net: nn.Module, task: Any, *data: Tensor, batch_size: int = 4) -> ExampleGradients:
    source = ExampleSource(TensorDataset(*data), batch_size=batch_size)
    return ExampleGradients(net, task, source, discover(net, task, source))


def test_linear_losses_along_a_path_that_spans_the_parameters_give_inner_products() -> None:
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(4, 4, generator=generator).double())[0]
    net, checkpoints = linear_run(basis * torch.tensor([[0.1], [3.0], [0.5], [1.0]]).double(), rate=0.25)
    x, y = (torch.randn(n, 3, generator=generator).double() for n in (9, 5))
    found = z0_scores(passes(net, output, x), range(9), passes(net, output, y), range(5), checkpoints)
    inner = y @ x.T + 1  # the gradient is the input and, of the bias, 1
    torch.testing.assert_close(found.scores, 0.25 * inner, **EXACT)
    # Half of the path sees half of the gradient only.
    half = z0_scores(passes(net, output, x), range(9), passes(net, output, y), range(5), checkpoints[:3]).scores
    seen = torch.cat([y, torch.ones(5, 1)], 1) @ basis[:2].T @ basis[:2] @ torch.cat([x, torch.ones(9, 1)], 1).T
    torch.testing.assert_close(half, 0.25 * seen, **EXACT)
    assert (half - found.scores).abs().max() > 0.1


@pytest.mark.parametrize("batch_size", [1, 5, 12])
def test_scores_equal_the_reference(batch_size: int) -> None:
    run = make_run()
    train, queries = run.passes(batch_size)
    found = z0_scores(train, range(N), queries, [3, 0, 0, 1], run.checkpoints)
    of_queries, of_examples = (
        torch.stack([run.losses(c, data) for c in run.checkpoints]) for data in (run.asked, run.data)
    )
    weights = [flat(c) for c in run.checkpoints]
    sizes = [run.spread(dict(c.step_sizes)) for c in run.trained]
    expected = ref.z0_dense(of_queries, of_examples, weights, sizes)
    torch.testing.assert_close(found.scores, expected[[3, 0, 0, 1]], **EXACT)
    # Step sizes count; without any, all are one.
    plain = [replace(c, step_sizes={}) for c in run.checkpoints]
    found = z0_scores(train, range(N), queries, range(Q), plain)
    unscaled = ref.z0_dense(of_queries, of_examples, weights, [torch.ones_like(size) for size in sizes])
    torch.testing.assert_close(found.scores, unscaled, **EXACT)
    assert torch.corrcoef(torch.stack([unscaled.flatten(), expected.flatten()]))[0, 1] < 0.999


def test_an_adaptive_optimizer_scales_every_entry() -> None:
    run = make_run()
    factors = {name: 0.5 + torch.rand(p.shape).double() for name, p in run.net.named_parameters()}
    adam = [run.checkpoints[0], *(replace(c, preconditioner=factors) for c in run.trained)]
    found = z0_scores(*_pair(run), adam).scores
    every = torch.cat([factors[name].flatten() for name in RATES])
    expected = ref.z0_dense(
        *(torch.stack([run.losses(c, data) for c in run.checkpoints]) for data in (run.asked, run.data)),
        [flat(c) for c in run.checkpoints],
        [run.spread(dict(c.step_sizes)) * every for c in run.trained],
    )
    torch.testing.assert_close(found, expected, **EXACT)


def _pair(run: Any) -> tuple[Any, ...]:
    train, queries = run.passes()
    return train, range(N), queries, range(Q)


def test_losses_that_depend_on_their_batch_are_scaled_as_calibrated() -> None:
    run = make_run()
    weight = torch.tensor([0.2, 1.0, 3.0]).double()

    def task(module: Any, batch: Any) -> Tensor:
        return F.cross_entropy(module(batch[0]), batch[1], weight=weight)

    found = []
    for batch_size in (2, 5):
        train = passes(run.net, task, *run.data.tensors, batch_size=batch_size)
        found.append(loss_paths(train, range(N), run.checkpoints[:1])[1])
    torch.testing.assert_close(found[0], found[1], **EXACT)
    of_class = run.losses(run.checkpoints[0], run.data) * weight[run.data.tensors[1]]
    ratio = found[0][0] / of_class
    torch.testing.assert_close(ratio, ratio[:1].expand(N), **EXACT)


def test_leaves_no_trace() -> None:
    run = make_run()
    before = copy.deepcopy(run.net.state_dict())
    z0_scores(*_pair(run), run.checkpoints)
    assert all(torch.equal(value, before[name]) for name, value in run.net.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in run.net.parameters())


def test_non_finite_losses_have_no_score() -> None:
    run = make_run()
    inputs = run.data.tensors[0].clone()
    inputs[4, 1] = torch.nan
    run.data = TensorDataset(inputs, run.data.tensors[1])
    scores = z0_scores(*_pair(run), run.checkpoints).scores
    assert scores.isnan().all(0).nonzero().flatten().tolist() == [4]
    assert int(scores.isnan().sum()) == Q


def test_bad_input() -> None:
    run = make_run()
    with pytest.raises(CheckpointError, match="1 checkpoints; expected two at least"):
        z0_scores(*_pair(run), run.checkpoints[:1])
    with pytest.raises(CheckpointError, match="of the steps 4 and 5 hold the same weights"):
        z0_scores(*_pair(run), [run.trained[0], replace(run.trained[0], step=5)])
    with pytest.raises(CheckpointError, match=r"checkpoint of step 0 lacks the trainable parameters"):
        z0_scores(*_pair(run), [replace(run.checkpoints[0], parameters={}), run.trained[0]])

    def total(module: Any, batch: Any) -> Tensor:
        result: Tensor = (module(batch[0]) - F.one_hot(batch[1], C)).square().sum(1).mean()
        return result

    train = passes(run.net, total, *run.data.tensors)
    with pytest.raises(TaskError, match="the losses of the examples are not known"):
        z0_scores(train, range(N), train, range(Q), run.checkpoints)
