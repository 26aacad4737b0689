"""A small run with its checkpoints, and what plain autograd says about it, for the tests of trajectory methods."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import reference as ref
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_influence.data.source import ExampleSource
from lightning_influence.gradients.discover import discover
from lightning_influence.gradients.passes import ExampleGradients
from lightning_influence.training.checkpoints import Checkpoint

N, Q, C = 12, 4, 3
# Another one for every parameter of a layer; scores must not depend on their being equal.
RATES = {"0.weight": 0.3, "0.bias": 0.3, "2.weight": 0.1, "2.bias": 0.1}


def task(module: Any, batch: Any) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1])


def make_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, C)).double()


@dataclass
class Run:
    """A network, four checkpoints of its training (the starting weights first), data and queries."""

    net: nn.Sequential
    data: TensorDataset
    asked: TensorDataset
    checkpoints: list[Checkpoint]
    batch_size: int = 5

    @property
    def trained(self) -> list[Checkpoint]:
        return self.checkpoints[1:]

    def passes(self, batch_size: int | None = None) -> tuple[ExampleGradients, ExampleGradients]:
        source = ExampleSource(self.data, batch_size=batch_size or self.batch_size)
        coverage = discover(self.net, task, source)
        asked = ExampleSource(self.asked, batch_size=3)
        return (
            ExampleGradients(self.net, task, source, coverage),
            ExampleGradients(self.net, task, asked, coverage),
        )

    def at(self, checkpoint: Checkpoint) -> nn.Sequential:
        """Return a copy of the network with the checkpoint's weights."""
        net = copy.deepcopy(self.net)
        net.load_state_dict({**net.state_dict(), **checkpoint.parameters})
        return net

    def gradients(self, checkpoint: Checkpoint, data: TensorDataset) -> Tensor:
        """Return per-example gradients `[n, P]`, in the order of `named_parameters()`."""
        return ref.flatten_gradients(
            ref.per_example_gradients(self.at(checkpoint), F.cross_entropy, *data.tensors), list(RATES)
        )

    def losses(self, checkpoint: Checkpoint, data: TensorDataset) -> Tensor:
        with torch.no_grad():
            return F.cross_entropy(self.at(checkpoint)(data.tensors[0]), data.tensors[1], reduction="none")

    def spread(self, values: dict[str, float]) -> Tensor:
        """Return `[P]` with one value for all scalars of a parameter."""
        return torch.cat(
            [torch.full((p.numel(),), values[name], dtype=torch.float64) for name, p in self.net.named_parameters()]
        )


def make_run(steps: Sequence[int] = (4, 2, 6)) -> Run:
    """Train with plain gradient steps, and take a checkpoint after each number of them."""
    net = make_net()
    generator = torch.Generator().manual_seed(1)
    data, asked = (TensorDataset(torch.randn(n, 4, generator=generator).double(), torch.arange(n) % C) for n in (N, Q))
    optimizer = torch.optim.SGD([{"params": [p], "lr": RATES[name]} for name, p in net.named_parameters()])
    checkpoints = [Checkpoint.of(net, 0)]
    for count in steps:
        for _ in range(count):
            optimizer.zero_grad()
            task(net, data.tensors).backward()
            optimizer.step()
        sizes = {name: rate * count for name, rate in RATES.items()}
        checkpoints.append(Checkpoint.of(net, checkpoints[-1].step + count, step_sizes=sizes, steps=count))
    optimizer.zero_grad(set_to_none=True)
    return Run(net, data, asked, checkpoints)


def scaled(checkpoint: Checkpoint, factor: float) -> Checkpoint:
    """Return the checkpoint as if the learning rates had been other ones."""
    return replace(checkpoint, step_sizes={name: factor * size for name, size in checkpoint.step_sizes.items()})
