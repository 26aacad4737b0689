"""Checkpoints: what they keep, and that putting one into a model leaves no trace."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_influence.training.checkpoints import Checkpoint, CheckpointError


def net() -> nn.Sequential:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    module[0].bias.requires_grad_(False)
    return module


def test_keeps_what_training_changes_and_not_what_is_frozen() -> None:
    checkpoint = Checkpoint.of(net(), 3)
    assert set(checkpoint.parameters) == {"0.weight", "1.weight", "1.bias", "2.weight", "2.bias"}
    assert set(checkpoint.buffers) == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    assert checkpoint.bytes == 4 * (12 + 4 + 4 + 8 + 2) + 4 * 8 + 8


def test_is_a_copy() -> None:
    module = net()
    checkpoint = Checkpoint.of(module, 3)
    with torch.no_grad():
        module[0].weight.zero_()
    assert float(checkpoint.parameters["0.weight"].abs().min()) > 0


def test_loading_gives_the_old_outputs_and_leaves_no_trace() -> None:
    module, x = net(), torch.randn(5, 3)
    before = module.eval()(x)
    checkpoint = Checkpoint.of(module, 3)
    for _ in range(3):
        module.train()(10 + torch.randn(8, 3))
    with torch.no_grad():
        module[2].weight.mul_(3)
    now = {name: value.clone() for name, value in module.state_dict().items()}
    with checkpoint.loaded(module):
        # Without the running statistics this is off by far: the inputs since then have a mean of ten.
        assert torch.equal(module.eval()(x), before)
    assert all(torch.equal(value, now[name]) for name, value in module.state_dict().items())
    assert module[0].weight.requires_grad
    assert not module[0].bias.requires_grad


def test_an_error_inside_leaves_no_trace_either() -> None:
    module = net()
    checkpoint = Checkpoint.of(module, 3)
    with torch.no_grad():
        module[0].weight.zero_()

    def fail() -> None:
        with checkpoint.loaded(module):
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert not module[0].weight.any()


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (nn.Sequential(nn.Linear(3, 4)), "holds '1.weight', which Sequential has not"),
        (nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)), r"'0.weight' has the shape \[4, 3\]"),
        (nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)), r"lacks the trainable .*'0.bias'"),
    ],
)
def test_another_model_is_refused(other: nn.Module, message: str) -> None:
    with pytest.raises(CheckpointError, match=message), Checkpoint.of(net(), 3).loaded(other):
        pass
