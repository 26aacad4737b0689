"""SOURCE against matrix exponentials, and where it is the influence function and where TracIn."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any, cast

import pytest
import reference as ref
import torch
import torch.distributed as dist
import torch.nn.functional as F
from own_processes import together
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from trajectory_cases import RATES, C, N, Q, Run, make_run, scaled, task

from lightning_influence.curvature import BLOCKS, BlockCurvature, FactorExamples, fit
from lightning_influence.curvature.solve.chebyshev import exponential_mean, matrix_exponential_mean
from lightning_influence.data.source import ExampleSource
from lightning_influence.gradients.discover import discover
from lightning_influence.gradients.passes import ExampleGradients
from lightning_influence.scores.along.diff_in import diff_in_scores
from lightning_influence.scores.along.source import At, source_scores, training_segments
from lightning_influence.scores.along.z0 import z0_scores
from lightning_influence.scores.pairs import pairwise_scores
from lightning_influence.scores.queries import QueryError
from lightning_influence.training.checkpoints import Checkpoint, CheckpointError

EXACT: dict[str, Any] = {"rtol": 1e-8, "atol": 1e-10}
EVERY = FactorExamples(N, N)
DECAY = {"0.weight": 0.02, "0.bias": 0.02, "2.weight": 0.0, "2.bias": 0.0}


def source(run: Run, checkpoints: list[Checkpoint], batch_size: int | None = None, **options: Any) -> Tensor:
    train, queries = run.passes(batch_size)
    options = {"labels": ("exact", "exact"), **options}
    return source_scores(train, range(N), queries, range(Q), checkpoints, **options).scores


def adaptive(run: Run) -> list[Checkpoint]:
    """Return the run's checkpoints as if gradients had been scaled, a hundredfold apart; some entries never moved."""
    generator = torch.Generator().manual_seed(3)

    def scales() -> dict[str, Tensor]:
        found = {}
        for name, p in run.net.named_parameters():
            scale = torch.rand(p.shape, generator=generator, dtype=torch.float64).mul(2).sub(1).mul(math.log(10)).exp()
            found[name] = scale.masked_fill(torch.rand(p.shape, generator=generator) < 0.1, 0.0)
        return found

    return [replace(c, preconditioner=scales(), optimizer="Adam") for c in run.checkpoints]


def sizes_of(run: Run, group: list[Checkpoint]) -> Tensor:
    """Return ``Σ η P`` over a group of checkpoints, ``[P]``."""
    every = [
        torch.cat([c.preconditioner.get(n, torch.ones_like(p)).flatten() for n, p in c.parameters.items()])
        * run.spread(dict(c.step_sizes))
        for c in group
    ]
    return torch.stack(every).sum(0)


def dense(run: Run, groups: list[list[Checkpoint]], at: At, decay: dict[str, float]) -> list[Any]:
    """Return segments for the reference, with the GGN of every layer."""
    names = list(RATES)
    layer = torch.tensor([int(name[0]) for name, p in run.net.named_parameters() for _ in range(p.numel())])
    segments: list[Any] = []
    for group in groups:
        steps = sum(c.steps for c in group)
        mean = {name: sum(c.steps / steps * c.parameters[name] for c in group) for name in names}
        average = replace(group[-1], parameters=cast("Any", mean))
        curvature = ref.ggn_dense(run.at(average), run.data.tensors[0], "cross_entropy", names)
        curvature = curvature * (layer.unsqueeze(1) == layer) + torch.diag(run.spread(decay))
        sizes = sizes_of(run, group)
        places = [(average, 1.0)] if at == "average" else [(c, c.steps / steps) for c in group]
        segments.append((curvature, sizes, sum(share * run.gradients(c, run.data) for c, share in places)))
    return segments


# ------------------------------------------------------------------------------------------------------ exactness


@pytest.mark.parametrize("at", ["checkpoints", "average"])
@pytest.mark.parametrize("segments", [1, 2, 3])
@pytest.mark.parametrize("decay", [DECAY, dict.fromkeys(RATES, 0.0)], ids=["decay", "singular"])
def test_segments_equal_matrix_exponentials(segments: int, at: At, decay: dict[str, float]) -> None:
    """Also with a singular curvature, as that of a softmax is without weight decay, and step sizes that differ."""
    run = make_run()
    first, second, third = run.trained
    groups = {1: [[first, second, third]], 2: [[first, second], [third]], 3: [[first], [second], [third]]}[segments]
    reference, ends = dense(run, groups, at, decay), run.gradients(third, run.asked)
    expected = ref.source_dense(ends, reference)
    found = source(run, run.checkpoints, segments=segments, curvature="block_ggn", weight_decay=decay, at=at)
    torch.testing.assert_close(found, expected, **EXACT)
    identity = source(run, run.checkpoints, segments=segments, curvature="identity", weight_decay=decay, at=at)
    assert torch.corrcoef(torch.stack([identity.flatten(), expected.flatten()]))[0, 1] < 0.99
    if segments > 1:
        # What comes after an early segment takes back a part of what it did.
        undiminished = sum(ref.source_dense(ends, [part]) for part in reference)
        assert (found - undiminished).abs().max() > 0.05 * expected.abs().max()


@pytest.mark.parametrize("segments", [1, 3])
@pytest.mark.parametrize("decay", [DECAY, dict.fromkeys(RATES, 0.0)], ids=["decay", "singular"])
def test_scaled_gradients_equal_matrix_exponentials(segments: int, decay: dict[str, float]) -> None:
    """Adam's elementwise scale, which has no eigenbasis in common with the curvature."""
    run = make_run()
    checkpoints = adaptive(run)
    groups = [checkpoints[1:]] if segments == 1 else [[c] for c in checkpoints[1:]]
    ends = run.gradients(checkpoints[-1], run.asked)
    expected = ref.source_dense(ends, dense(run, groups, "checkpoints", decay))
    options: dict[str, Any] = {"segments": segments, "weight_decay": decay}
    found = source(run, checkpoints, curvature="block_ggn", **options)
    torch.testing.assert_close(found, expected, **EXACT)
    for wrong in (
        source(run, run.checkpoints, curvature="block_ggn", **options),
        source(run, checkpoints, **options, curvature="identity"),
    ):
        assert (wrong - expected).norm() > 0.1 * expected.norm()


@pytest.mark.parametrize("largest", [1e-3, 1.0, 300.0, 1e5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_chebyshev_polynomials_reach_rounding(largest: float, dtype: torch.dtype) -> None:
    """Also with most eigenvalues at zero, which the rounding of the largest moves."""
    basis = torch.linalg.qr(torch.randn(20, 20, generator=torch.Generator().manual_seed(0)).double())[0]
    values = torch.cat([torch.zeros(12), torch.rand(7, generator=torch.Generator().manual_seed(1)), torch.ones(1)])
    values = values.double() * largest
    matrix = ((basis * values) @ basis.T).to(dtype)
    v = torch.randn(3, 20, generator=torch.Generator().manual_seed(2)).to(dtype)
    found = matrix_exponential_mean(lambda x: x @ matrix, v)
    expected = v.double() @ (basis * exponential_mean(values)) @ basis.T
    tolerance = torch.finfo(dtype).eps * (1000 + largest)
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    nothing = matrix_exponential_mean(torch.zeros_like, v)
    assert torch.equal(nothing, v)


@pytest.mark.parametrize("curvature", ["ekfac", "kfac", "diagonal", "block_ggn"])
def test_long_training_in_one_segment_is_the_influence_function(curvature: Any) -> None:
    """Weight decay makes the curvature positive definite; without it there would be no inverse to compare with."""
    run = make_run()
    last = run.trained[-1]
    with last.loaded(run.net):
        train, queries = run.passes()
        fitted = fit(train, curvature, range(N), examples=EVERY, labels=("exact", "exact"), damping=0.05)
        influence = pairwise_scores(train, range(N), fitted, queries, range(Q)).scores
    long = [scaled(last, 1e6)]
    found = source(run, long, segments=1, curvature=curvature, weight_decay=0.05)
    torch.testing.assert_close(found, influence, **EXACT)
    assert (source(run, long, segments=1, curvature="identity", weight_decay=0.05) - influence).abs().max() > 0.1
    # As long as it really was, training has not got there: that is what SOURCE is about.
    assert (source(run, [last], segments=1, curvature=curvature, weight_decay=0.05) - influence).abs().max() > 0.1


def test_short_training_is_tracin() -> None:
    """``Σ_t η_t ⟨g_q, g_z(θ_t)⟩``, whatever the segments; as long as training really was, the curvature counts."""
    run = make_run()
    ends = run.gradients(run.trained[-1], run.asked)
    tracin = sum((ends * run.spread(dict(c.step_sizes))) @ run.gradients(c, run.data).T for c in run.trained)
    short = [scaled(c, 1e-7) for c in run.trained]
    assert isinstance(tracin, Tensor)
    # The gradients of several checkpoints are weighed by their steps, as by their step sizes if rates do not change.
    for segments in (1, 3):
        torch.testing.assert_close(1e7 * source(run, short, segments=segments), tracin, rtol=1e-5, atol=1e-6)
        assert (source(run, run.trained, segments=segments) - tracin).abs().max() > 0.1 * tracin.abs().max()


def regression(rate: float, steps: int, spread: float = 1.0) -> tuple[ExampleGradients, list[Checkpoint], Tensor]:
    """Linear regression, whose GGN is the Hessian: passes, a checkpoint after every step, and scores by retraining.

    Gradients are multiplied elementwise by fixed numbers from ``1 / spread`` to ``spread``. Scores are ``N`` times the
    derivative of the final losses by how much of an example is left out, ``[N, N]``.
    """
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(N, 4, generator=generator).double(), torch.randn(N, 2, generator=generator).double()
    torch.manual_seed(0)
    net = nn.Linear(4, 2).double()
    start = [p.detach().clone() for p in net.parameters()]
    scales = [spread ** (2 * torch.rand(p.shape, generator=generator).double() - 1) for p in start]

    def losses(w: Tensor, b: Tensor) -> Tensor:
        return F.mse_loss(x @ w.T + b, y, reduction="none").mean(1)

    def trained(weights: Tensor) -> list[list[Tensor]]:
        path = [[p.clone().requires_grad_(True) for p in start]]
        for _ in range(steps):
            found = torch.autograd.grad(losses(*path[-1]) @ weights / N, path[-1])
            moved = [p - rate * scale * g for p, scale, g in zip(path[-1], scales, found, strict=True)]
            path.append([p.detach().requires_grad_(True) for p in moved])
        return path

    expected = torch.zeros(N, N, dtype=torch.float64)
    for n in range(N):
        part = 1e-3 * F.one_hot(torch.tensor(n), N).double()
        less, more = (losses(*trained(1 + sign * part)[-1]).detach() for sign in (-1, 1))
        expected[:, n] = N * (less - more) / 2e-3
    run = [
        Checkpoint(
            step,
            {"weight": w.detach(), "bias": b.detach()},
            {},
            {"weight": rate, "bias": rate},
            1,
            dict(zip(("weight", "bias"), scales, strict=True)) if spread > 1 else {},
        )
        for step, (w, b) in enumerate(trained(torch.ones(N).double())[1:], 1)
    ]

    def mean_squares(module: Any, batch: Any) -> Tensor:
        return F.mse_loss(module(batch[0]), batch[1])

    source = ExampleSource(TensorDataset(x, y), batch_size=N)
    return ExampleGradients(net, mean_squares, source, discover(net, mean_squares, source)), run, expected


@pytest.mark.parametrize("spread", [1.0, 5.0], ids=["plain", "scaled"])
def test_a_segment_for_every_step_is_what_training_does(spread: float) -> None:
    """Up to the order of one step: gradients are those after it, and ``1 - η λ`` is ``exp(-η λ)``.

    The influence function is off by more than the scores themselves, as training stops early; plain steps in the place
    of scaled ones are off, too.
    """

    def error(rate: float, steps: int, curvature: Any = "block_ggn", *, plain: bool = False) -> float:
        passes, run, expected = regression(rate, steps, spread)
        run = [replace(c, preconditioner={}) for c in run] if plain else run
        found = source_scores(
            passes, range(N), passes, range(N), run, labels=("exact", "exact"), segments=steps, curvature=curvature
        ).scores
        return float((found - expected).norm() / expected.norm())

    coarse = error(0.04, 8)
    assert coarse < 0.07
    assert error(0.02, 16) < 0.6 * coarse
    assert error(0.02, 16, "identity") > 0.1
    assert spread == 1 or error(0.02, 16, plain=True) > 0.3
    passes, run, expected = regression(0.02, 16, spread)
    with run[-1].loaded(passes.module):
        fitted = fit(passes, "block_ggn", range(N), examples=EVERY, labels=("exact", "exact"), damping=1e-6)
        influence = pairwise_scores(passes, range(N), fitted, passes, range(N)).scores
    assert (influence - expected).norm() > expected.norm()


@pytest.mark.parametrize("name", BLOCKS)
def test_functions_of_every_block_equal_dense_ones(name: str) -> None:
    run = make_run()
    train, _ = run.passes()
    fitted = fit(train, cast("Any", name), range(N), examples=EVERY, labels=("exact", "exact"))
    assert isinstance(fitted, BlockCurvature)
    for block in fitted.blocks.values():
        v = torch.randn(5, *block.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        values, vectors = torch.linalg.eigh(block.to_dense()[0].double())
        expected = v.flatten(1) @ ((vectors * torch.exp(-3 * values)) @ vectors.T)
        found = block.apply(lambda x: torch.exp(-3 * x), v)
        torch.testing.assert_close(found.flatten(1), expected, **EXACT)
        torch.testing.assert_close(block.apply(lambda x: x, v), block.matvec(v), **EXACT)


# ----------------------------------------------------------------------------------------------------- invariances


@pytest.mark.parametrize("batch_size", [4, 12])
def test_neither_batches_nor_memory_matter(batch_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run()
    expected = source(run, run.checkpoints)
    monkeypatch.setattr("lightning_influence.scores.queries._query_bytes", lambda device: 1)
    torch.testing.assert_close(source(run, run.checkpoints, batch_size), expected, **EXACT)


def test_leaves_no_trace_and_scores_what_it_is_asked_for() -> None:
    run = make_run()
    before = copy.deepcopy(run.net.state_dict())
    train, queries = run.passes()
    order = [7, 0, 11, 7]
    found = source_scores(train, order, queries, [3, 1], run.checkpoints, labels=("true", "true"), examples=EVERY)
    assert (found.examples.tolist(), found.queries.tolist()) == ([0, 7, 11], [3, 1])
    assert found.group([0, 11]).shape == (2,)
    assert all(torch.equal(value, before[name]) for name, value in run.net.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in run.net.parameters())


def test_examples_without_finite_gradients_have_no_score() -> None:
    run = make_run()
    inputs = run.data.tensors[0].clone()
    inputs[4, 1] = torch.inf
    run.data = TensorDataset(inputs, run.data.tensors[1])
    found = source(run, run.checkpoints)
    assert found.isnan().all(0).nonzero().flatten().tolist() == [4]
    assert int(found.isnan().sum()) == Q


def _everything(run: Run) -> list[Tensor]:
    train, queries = run.passes()
    return [
        source(run, run.checkpoints, segments=2),
        z0_scores(train, range(N), queries, [2, 0, 3], run.checkpoints).scores,
        diff_in_scores(train, range(N), queries, range(Q), run.trained, batch=7).scores,
    ]


def _two_processes(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    try:
        torch.save(_everything(make_run()), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_two_processes_give_what_one_gives(tmp_path: Any) -> None:
    together(_two_processes, str(tmp_path))
    for rank in range(2):
        for found, expected in zip(torch.load(tmp_path / f"{rank}.pt"), _everything(make_run()), strict=True):
            # Derivatives by differences of gradients are good to six digits.
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


# -------------------------------------------------------------------------------------------------------- segments


def test_segments_share_the_checkpoints_and_weigh_them_by_their_steps() -> None:
    run = make_run((1, 3, 2, 2, 4))
    segments = training_segments(run.trained, 2)
    assert [[c.step for c in s.checkpoints] for s in segments] == [[1, 4], [6, 8, 12]]
    first, second = run.trained[:2]
    mean = 0.25 * first.parameters["0.weight"] + 0.75 * second.parameters["0.weight"]
    torch.testing.assert_close(segments[0].average.parameters["0.weight"], mean)
    assert segments[0].average.step_sizes["2.weight"] == pytest.approx(4 * 0.1)


def test_counters_are_not_averaged() -> None:
    a = Checkpoint(1, {"w": torch.zeros(1)}, {"mean": torch.tensor([2.0]), "count": torch.tensor(3)}, {"w": 1.0}, 1)
    b = Checkpoint(2, {"w": torch.ones(1)}, {"mean": torch.tensor([4.0]), "count": torch.tensor(8)}, {"w": 1.0}, 1)
    (segment,) = training_segments([a, b], 1)
    assert float(segment.average.buffers["mean"]) == 3
    assert int(segment.average.buffers["count"]) == 8


# ------------------------------------------------------------------------------------------------------- bad input


def test_checkpoints_of_another_model() -> None:
    run = make_run()
    other = [replace(run.trained[0], parameters={"0.weight": torch.zeros(7, 7)}), *run.trained[1:]]
    for score in (
        lambda *a: source_scores(*a, labels=("true", "true"), segments=3), diff_in_scores, z0_scores
    ):  # fmt: skip
        train, queries = run.passes()
        with pytest.raises(CheckpointError):
            score(train, range(N), queries, range(Q), other)
    with pytest.raises(CheckpointError, match=r"'0.weight' has the shape \[7, 7\] in the checkpoint of step 4"):
        source(run, other)


def test_checkpoints_of_another_optimizer() -> None:
    run = make_run()
    train, queries = run.passes()
    part = {"0.weight": torch.ones(3, 4)}
    every = {name: torch.ones_like(value) for name, value in run.trained[0].parameters.items()}

    def of(**changes: Any) -> list[Checkpoint]:
        return [replace(c, **changes) for c in run.trained]

    steps = r"the checkpoints of the steps \[4, 6, 12\] are of"
    both: list[tuple[list[Checkpoint], str]] = [
        (of(step_sizes={}, steps=0), "none of 3 checkpoints knows the steps it stands for"),
        (run.trained[::-1], r"are of the steps \[12, 6, 4\]; expected those of one run, in the order"),
        ([], "there is no checkpoint"),
    ]
    unheard = of(optimizer="NAdam"), of(optimizer="Adam, Lion", preconditioner=part), of(optimizer="Adam")
    understood = of(preconditioner=part), of(optimizer="Adam, SGD", preconditioner=part)
    understood += (of(optimizer="MyAdam", preconditioner=every),)
    for checkpoints, message in [*both, *((each, f"{steps} an unknown optimizer.* Use TracIn") for each in unheard)]:
        with pytest.raises(CheckpointError, match=message):
            source(run, checkpoints)
    for checkpoints in understood:
        assert source(run, checkpoints).isfinite().all()
    refused = [*unheard, *understood]
    for checkpoints, message in [
        *both,
        *((each, f"{steps} an adaptive optimizer or an unknown one") for each in refused),
    ]:
        with pytest.raises(CheckpointError, match=message):
            diff_in_scores(train, range(N), queries, range(Q), checkpoints)


def test_arguments_that_do_not_go_together() -> None:
    run = make_run()
    with pytest.raises(ValueError, match="segments=4 with 3 checkpoints that stand for steps"):
        source(run, run.checkpoints, segments=4)
    with pytest.raises(ValueError, match="segments=0"):
        source(run, run.checkpoints, segments=0)
    with pytest.raises(ValueError, match="at='end'; expected one of 'checkpoints', 'average'"):
        source(run, run.checkpoints, at="end")
    with pytest.raises(ValueError, match="curvature='ggn' is not block-diagonal; expected one of identity"):
        source(run, run.checkpoints, curvature="ggn")
    train, _ = run.passes()
    other, _ = make_run().passes()
    with pytest.raises(ValueError, match="the queries run through another model"):
        source_scores(train, range(N), other, range(Q), run.checkpoints, labels=("true", "true"))


def test_queries_of_another_kind() -> None:
    run = make_run()
    train, _ = run.passes()
    odd = ExampleSource(TensorDataset(torch.randn(Q, 9).double(), torch.arange(Q) % C), batch_size=2)
    queries = ExampleGradients(run.net, task, odd, train.coverage)
    with pytest.raises(QueryError, match="can't be run on them"):
        source_scores(train, range(N), queries, range(Q), run.checkpoints, labels=("true", "true"))
