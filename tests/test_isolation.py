"""An extra pass leaves no trace: whatever the model can do inside `untouched` is gone afterwards."""

from __future__ import annotations

import copy
import random
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import CatMetric, MeanMetric, Metric, MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassAUROC,
    MulticlassConfusionMatrix,
    MulticlassPrecision,
)

from lightning_influence.isolation import untouched


class Stop(BaseException):
    """Like KeyboardInterrupt: not an Exception."""


class Holder(nn.Module):
    """A module with plain attributes, as many LightningModules have."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        for name, value in attributes.items():
            setattr(self, name, value)


def _draws() -> list[float]:
    return [random.random(), random.gauss(0, 1), *np.random.rand(2), np.random.randn(), *torch.randn(3).tolist()]


# --------------------------------------------------------------------------------------------- random streams


def _draw_a_lot() -> None:
    for _ in range(7):
        _draws()


def _seed_everything() -> None:
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)


@pytest.mark.parametrize("use", [_draw_a_lot, _seed_everything])
@pytest.mark.parametrize("error", [None, ValueError, Stop])
def test_random_streams_go_on_as_if_nothing_had_been_drawn(
    use: Callable[[], None], error: type[BaseException] | None
) -> None:
    # Half of a pair of normal numbers is kept for the next call: that is part of the state.
    random.gauss(0, 1)
    np.random.randn()
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    expected = _draws()
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(cpu)
    if error is None:
        with untouched(nn.Linear(1, 1)):
            use()
    else:
        with pytest.raises(error), untouched(nn.Linear(1, 1)):
            use()
            raise error
    # nn.Linear(1, 1) itself drew its two parameters from the stream of torch.
    torch.set_rng_state(cpu) if False else None
    assert _draws()[:5] == expected[:5]


def test_stream_of_torch_is_bitwise_the_same() -> None:
    model = nn.Linear(1, 1)
    before = torch.get_rng_state()
    with untouched(model):
        torch.randn(1000)
        assert not torch.equal(torch.get_rng_state(), before)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("make", "draw"),
    [
        pytest.param(
            lambda: torch.Generator().manual_seed(3), lambda g: torch.rand(4, generator=g).tolist(), id="torch"
        ),
        pytest.param(lambda: np.random.default_rng(3), lambda g: g.random(4).tolist(), id="numpy"),
        pytest.param(lambda: np.random.RandomState(3), lambda g: g.rand(4).tolist(), id="numpy, old"),
        pytest.param(lambda: random.Random(3), lambda g: [g.random() for _ in range(4)], id="python"),
    ],
)
def test_a_generator_of_the_model_is_not_advanced(make: Callable[[], Any], draw: Callable[[Any], list[float]]) -> None:
    """Noise that `training_step` draws from a generator of its own would otherwise differ after an audit."""
    generator = make()
    model = Holder(generator=generator, generators=[generator])
    with untouched(model):
        draw(model.generator)
        draw(model.generators[0])
    assert model.generator is generator
    assert model.generators[0] is generator
    assert draw(generator) == draw(make())
