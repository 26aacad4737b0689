"""Coverage of small networks, as a trace on some inputs finds it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_influence.data.source import ExampleSource
from lightning_influence.gradients.coverage import Coverage
from lightning_influence.gradients.discover import discover


def covered(net: nn.Module, *inputs: Tensor, **options: Any) -> Coverage:
    """Trace a network on inputs ``[n, ...]``, by the mean of its squared outputs."""
    source = ExampleSource(TensorDataset(*inputs), batch_size=2)
    return discover(net, lambda module, batch: module(*batch).square().mean(), source, **options)
