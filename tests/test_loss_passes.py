"""Passes over losses of sequences: every example's own, whatever batch it is in and wherever its rows are."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from loss_cases import BATCH_SIZE, LAYOUTS, PICKED, SCALES, Batch, Loss, N, Tagger, sequences, taken
from torch import Tensor, nn
from torch.utils.data import Dataset

from lightning_influence.data.source import ExampleSource
from lightning_influence.gradients.coverage import Uncovered
from lightning_influence.gradients.discover import discover
from lightning_influence.gradients.passes import ExampleGradients
from lightning_influence.gradients.verify import inspect


class Sequences(Dataset[Batch]):
    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        self.data = {
            name: value.to(dtype) if value.is_floating_point() else value for name, value in sequences().items()
        }

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> Batch:
        return {name: value[index] for name, value in self.data.items()}


def _passes(loss: Loss, uncovered: Uncovered = "report", net: nn.Module | None = None) -> ExampleGradients:
    net = Tagger() if net is None else net
    source = ExampleSource(Sequences(next(net.parameters()).dtype), batch_size=BATCH_SIZE)
    return ExampleGradients(net, loss, source, discover(net, loss, source, uncovered=uncovered))


def _everything(gradients: ExampleGradients, size: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Values `[n]` and gradients `[n, k, o, i]` of all examples."""
    gradients.source.pass_batch_size = size
    values, rows = [], dict[str, list[Tensor]]()
    with closing(gradients.run(range(N))) as batches:
        for batch in batches:
            assert batch.loss.values is not None
            values.append(batch.loss.values)
            for io in batch.layers():
                (g,) = io.gs
                assert isinstance(g, Tensor)
                rows.setdefault(io.name, []).append(torch.einsum("knso,knsi->nkoi", g, io.x))
    return torch.cat(values), {name: torch.cat(parts) for name, parts in rows.items()}


@pytest.mark.parametrize("name", SCALES)
def test_passes_do_not_depend_on_the_batch(name: str) -> None:
    """Passes with batches of 3, 4 and 12 examples after training with 4: the sum over 12 tokens is not three sums."""
    loss, sums, divisor = SCALES[name]
    # The loss of these models is in float32, so no more is promised.
    single = "huggingface" in name
    gradients = _passes(loss, net=Tagger().float() if single else None)
    net, batch = gradients.module, Sequences(torch.float32 if single else torch.float64).data
    assert inspect(gradients, range(BATCH_SIZE)).tapped
    exact: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5} if single else {"rtol": 1e-9, "atol": 1e-11}
    own = sums(net(batch["x"]), batch) / divisor(batch)
    (expected,) = torch.autograd.grad(own.sum(), net.get_parameter("head.weight"), retain_graph=True)
    for size in (3, BATCH_SIZE, N):
        values, blocks = _everything(gradients, size)
        torch.testing.assert_close(values, own.detach().to(values), **exact)
        torch.testing.assert_close(blocks["head"].sum(0)[0, :, :-1], expected, **exact)


@pytest.mark.parametrize("name", [*LAYOUTS, *(name for name in PICKED if "precision" not in name)])
def test_examples_are_found_wherever_they_are(name: str) -> None:
    loss = LAYOUTS[name][0] if name in LAYOUTS else PICKED[name]
    gradients = _passes(loss)
    assert inspect(gradients, range(BATCH_SIZE)).tapped
    values, blocks = _everything(gradients, 5)
    net, batch = gradients.module, sequences()
    for index in range(N):
        part = taken(batch, [index])
        # Alone, the mean is over the example's own tokens.
        alone = loss(net, part) * int(part["lengths"]) * N / int(batch["lengths"].sum())
        torch.testing.assert_close(values[index], alone.detach(), rtol=1e-9, atol=1e-11)
        (expected,) = torch.autograd.grad(alone, net.get_parameter("head.weight"))
        torch.testing.assert_close(blocks["head"][index, 0, :, :-1], expected, rtol=1e-9, atol=1e-11)


class _Odd(Tagger):
    """With a parameter that has no rows: its gradients are computed one example at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.power = nn.Parameter(torch.tensor(1.2, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        z = super().forward(x)
        return z.sign() * torch.exp(torch.log(z.abs() + 1e-3) * self.power.cos())


@pytest.mark.parametrize("name", ["sum", "sum by hand", "mean by hand", "tokens"])
def test_gradients_one_at_a_time_weigh_as_those_of_the_batch(name: str) -> None:
    gradients = _passes(SCALES[name][0], "exact", _Odd())
    assert inspect(gradients, range(BATCH_SIZE)).tapped
    net, batch = gradients.module, sequences()
    assert isinstance(net, _Odd)
    _, sums, divisor = SCALES[name]
    (expected,) = torch.autograd.grad((sums(net(batch["x"]), batch) / divisor(batch)).sum(), net.power)
    for size in (3, N):
        _, blocks = _everything(gradients, size)
        torch.testing.assert_close(blocks["power"].sum(), expected, rtol=1e-9, atol=1e-11)


def test_a_weighted_absolute_error_is_that_of_training() -> None:
    def loss(module: Any, batch: Batch) -> Tensor:
        absolute: Any = F.l1_loss
        weight = batch["weight"].view(-1, 1, 1).expand_as(batch["t"])
        return absolute(module(batch["x"]), batch["t"], weight=weight)  # type: ignore[no-any-return]

    gradients = _passes(loss)
    inspect(gradients, range(BATCH_SIZE))
    values, _ = _everything(gradients, 5)
    net, batch = gradients.module, sequences()
    own = batch["weight"] * (net(batch["x"]) - batch["t"]).abs().mean((1, 2)) / batch["weight"].mean()
    torch.testing.assert_close(values, own.detach(), rtol=1e-9, atol=1e-11)
