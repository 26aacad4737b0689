"""What an audit holds of a large model at most, counted in its parameters: tensors, not what a process gets."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from live_memory import LiveMemory
from torch import Tensor, nn

from lightning_influence.curvature import FactorExamples, fit
from lightning_influence.curvature.blocks import block, kronecker
from lightning_influence.curvature.curvature import BlockCurvature
from lightning_influence.curvature.sweep import damping_sweep
from lightning_influence.data.source import ExampleSource
from lightning_influence.gradients.discover import discover
from lightning_influence.gradients.passes import ExampleGradients
from lightning_influence.layers.per_sample import forming
from lightning_influence.objective.losses import cross_entropy
from lightning_influence.scores.examples import score_examples
from lightning_influence.training import step_sizes
from lightning_influence.training.optimizers import preconditioners
from lightning_influence.training.step_sizes import block_step_sizes

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
from large_networks import NETWORKS, gpt2, task

N, SIZE = 6, 2


@pytest.fixture
def _scaled_down() -> Iterator[None]:
    """A network of 100,000 parameters beside limits that are a thousandth: it is as large as GPT-2 for them."""
    with (
        patch.object(forming, "_CHUNK_ELEMENTS", 2**12),
        patch.object(forming, "_CACHED_ELEMENTS", 2**10),
        patch.object(cross_entropy, "_PART", 2**9),
        patch.object(block, "KEPT_INVERSES", 2**10),
        patch.object(kronecker, "KEPT_INVERSES", 2**10),
        patch.object(step_sizes, "_KEPT", 2**10),
    ):
        yield


def _passes() -> tuple[nn.Module, ExampleGradients, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model, data = gpt2(1_500, 32, 2, heads=2), NETWORKS["GPT-2"].data(N, True)
    source = ExampleSource(data, batch_size=SIZE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    task(model, data[:SIZE]).backward()
    optimizer.step()
    return model, ExampleGradients(model, task, source, discover(model, task, source)).calibrate(range(N)), optimizer


def _fitted(passes: ExampleGradients) -> BlockCurvature:
    found = fit(passes, "ekfac", range(N), examples=FactorExamples(N, N), labels=("sampled", "sampled"))
    assert isinstance(found, BlockCurvature)
    return found


def _most(run: Callable[[], Any], model: nn.Module) -> float:
    """Return how many times the parameters of a model something holds at most, beside what was there before."""
    with LiveMemory() as memory:
        run()
    return memory.peak / sum(p.numel() * p.element_size() for p in model.parameters())


@pytest.mark.usefixtures("_scaled_down")
def test_an_audit_holds_few_copies_of_a_model() -> None:
    """One of these is the pass's own copy of the weights, and the logits of a batch are half of one.

    With inverses, step sizes and an example's gradient of the tied embedding held whole, and labels drawn from all
    logits at once, it was 7.5 for fitting (of which 2.1 are what is fitted), 5.6 for scoring and 6.0 for the sweep.
    """
    model, passes, optimizer = _passes()
    curvature = _fitted(passes)
    rates = dict.fromkeys(dict(model.named_parameters()), 1.0)

    def score() -> None:
        scales = preconditioners([optimizer], model)
        sizes = block_step_sizes(passes.coverage.blocks, rates, model, scales)
        score_examples(passes, range(N), curvature=curvature, step_sizes=sizes)

    assert _most(lambda: _fitted(passes), model) <= 6.1
    assert _most(score, model) <= 3.9
    assert _most(lambda: damping_sweep(passes, range(N), curvature), model) <= 3.9


def test_what_is_not_held_changes_no_score(request: pytest.FixtureRequest) -> None:
    model, passes, optimizer = _passes()
    rates = dict.fromkeys(dict(model.named_parameters()), 1.0)
    query = {name: torch.randn(block.shape) for name, block in passes.coverage.blocks.items()}

    def found() -> list[Tensor]:
        curvature = _fitted(passes)
        sizes = block_step_sizes(passes.coverage.blocks, rates, model, preconditioners([optimizer], model))
        scores = score_examples(passes, range(N), curvature=curvature, query=query, step_sizes=sizes)
        names = ("self_influence", "harm", "tracin", "grad_norm_squared")
        return [*map(scores.columns.__getitem__, names), damping_sweep(passes, range(N), curvature).self_influence]

    whole = found()
    request.getfixturevalue("_scaled_down")
    for one, other in zip(whole, found(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(one.abs().max()))


@pytest.mark.usefixtures("_scaled_down")
def test_step_sizes_of_large_layers_are_not_kept() -> None:
    model, passes, optimizer = _passes()
    rates = dict.fromkeys(dict(model.named_parameters()), 1.0)
    with LiveMemory() as memory:
        sizes = block_step_sizes(passes.coverage.blocks, rates, model, preconditioners([optimizer], model))
        for name, block in passes.coverage.blocks.items():
            assert sizes[name].shape == block.shape  # type: ignore[union-attr]
    large = max(p.numel() for p in model.parameters())
    assert memory.live <= 4 * sum(p.numel() for p in model.parameters() if p.numel() <= 2**10)
    assert memory.peak <= 4 * 4 * large
