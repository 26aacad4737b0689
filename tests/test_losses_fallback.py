"""Losses that no known call explains: true gradients all the same, and no number that would be a guess."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from lightning_influence.data.source import ExampleSource
from lightning_influence.gradients.discover import discover
from lightning_influence.gradients.passes import ExampleGradients, Labels
from lightning_influence.gradients.verify import VerificationError, inspect
from lightning_influence.objective.task import Task, TaskError

N, T, E, C = 11, 7, 3, 5
EXACT: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-11}


def _net() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(E, 6), nn.Tanh(), nn.Linear(6, C)).double()


def _data() -> TensorDataset:
    """Sequences, their words (1 to 3 letters, 0 is blank), one class, one sign."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(N, T, E, generator=generator, dtype=torch.float64)
    words = torch.randint(1, C, (N, 3), generator=generator)
    lengths = torch.randint(1, 4, (N,), generator=generator)
    steps = torch.randint(6, T + 1, (N,), generator=generator)
    signs = torch.randint(0, 2, (N,), generator=generator) * 2.0 - 1
    return TensorDataset(x, words, lengths, steps, signs.double())


def _ctc(module: Any, batch: Any, reduction: str = "mean") -> Tensor:
    x, words, lengths, steps, _ = batch
    log_probabilities = module(x).log_softmax(-1).transpose(0, 1)
    return F.ctc_loss(log_probabilities, words, steps, lengths, reduction=reduction)


def _by_hand(module: Any, batch: Any) -> Tensor:
    z, y = module(batch[0])[:, 0], batch[1][:, 0]
    return -(torch.log_softmax(z, 1)[range(len(y)), y]).mean()


def _cosine(module: Any, batch: Any) -> Tensor:
    z = module(batch[0])
    return F.cosine_embedding_loss(z[:, 0], z[:, 1], batch[4], margin=0.1)


def _triplet(module: Any, batch: Any) -> Tensor:
    z = module(batch[0])
    return F.triplet_margin_loss(z[:, 0], z[:, 1], z[:, 2], margin=2.0)


def _focal(module: Any, batch: Any) -> Tensor:
    """A known call inside a function of its own: the loss is not a sum of its elements any more."""
    each = F.cross_entropy(module(batch[0])[:, 0], batch[1][:, 0], reduction="none")
    return ((1 - (-each).exp()) ** 2 * each).mean()


def _partly_known(module: Any, batch: Any) -> Tensor:
    z = module(batch[0])
    return F.cross_entropy(z[:, 0], batch[1][:, 0]) + 0.1 * F.soft_margin_loss(z[:, 1, 0], batch[4])


UNKNOWN: dict[str, Callable[[Any, Any], Tensor]] = {
    "ctc": _ctc,
    "cosine": _cosine,
    "triplet": _triplet,
    "soft margin": lambda m, b: F.soft_margin_loss(m(b[0])[:, 0, 0], b[4]),
    "multi margin": lambda m, b: F.multi_margin_loss(m(b[0])[:, 0], b[1][:, 0]),
    "focal": _focal,
    "partly known": _partly_known,
}


def _passes(task: Task, data: Dataset[Any] | None = None, net: nn.Module | None = None) -> ExampleGradients:
    net = _net() if net is None else net
    source = ExampleSource(_data() if data is None else data, batch_size=4)
    return ExampleGradients(net, task, source, discover(net, task, source))


def _run(gradients: ExampleGradients, indices: Sequence[int], labels: Labels = "true") -> dict[str, Tensor]:
    """Every example's gradient of every block, `[n, k, o, i]`."""
    rows: dict[str, list[Tensor]] = {}
    with closing(gradients.run(indices, labels)) as batches:
        for batch in batches:
            for io in batch.layers():
                (g,) = io.gs
                assert isinstance(g, Tensor)
                rows.setdefault(io.name, []).append(torch.einsum("knso,knsi->nkoi", g, io.x))
    return {name: torch.cat(parts) for name, parts in rows.items()}


def _alone(net: nn.Module, task: Task, data: TensorDataset) -> list[dict[str, Tensor]]:
    """Autograd's gradients of the loss of every example in a batch of its own."""
    result = []
    for index in range(N):
        loss = task(net, [tensor[index : index + 1] for tensor in data.tensors])
        found = torch.autograd.grad(loss, list(net.parameters()))
        result.append(dict(zip(dict(net.named_parameters()), found, strict=True)))
    return result


def _assert_as_alone(found: dict[str, Tensor], alone: list[dict[str, Tensor]]) -> None:
    assert set(found) == {"0", "2"}
    for name, blocks in found.items():
        for index, block in enumerate(blocks[:, 0]):
            torch.testing.assert_close(block[:, :-1], alone[index][f"{name}.weight"], **EXACT)
            torch.testing.assert_close(block[:, -1], alone[index][f"{name}.bias"], **EXACT)


@pytest.mark.parametrize("name", UNKNOWN)
def test_gradients_of_unknown_losses_are_those_of_the_examples_alone(name: str) -> None:
    task, data = UNKNOWN[name], _data()
    gradients = _passes(task, data)
    inspection = inspect(gradients, range(4))
    assert not inspection.tapped
    assert inspection.exact_draws is None or name in ("focal", "partly known")
    _assert_as_alone(_run(gradients, range(N)), _alone(gradients.module, task, data))
    with closing(gradients.run(range(N))) as batches:
        assert all(batch.loss.values is None for batch in batches)


@pytest.mark.parametrize("name", ["ctc", "cosine", "triplet"])
@pytest.mark.parametrize("labels", ["sampled", "exact"])
def test_unknown_losses_have_no_pseudo_labels(name: str, labels: Labels) -> None:
    with pytest.raises(TaskError, match=r'no known loss call was seen.*fisher="empirical"'):
        _run(_passes(UNKNOWN[name]), range(N), labels)


@pytest.mark.parametrize(
    "task",
    [
        pytest.param(lambda m, b: _ctc(m, b, "sum"), id="ctc"),
        pytest.param(lambda m, b: F.soft_margin_loss(m(b[0])[:, 0, 0], b[4], reduction="sum"), id="soft margin"),
    ],
)
def test_an_unknown_sum_is_refused(task: Task) -> None:
    """Gradients times the number of examples would be those of a mean: 4 times too large here."""
    with pytest.raises(VerificationError, match=r"is not the mean of the losses of its examples.*one loss per example"):
        inspect(_passes(task), range(4))


@pytest.mark.parametrize("name", ["ctc", "by hand"])
def test_a_loss_per_example_has_values(name: str) -> None:
    """The way out that the messages name: a task that returns `[n]`."""

    def task(module: Any, batch: Any) -> Tensor:
        own: Tensor
        if name == "ctc":
            own = _ctc(module, batch, "none") / batch[2]
            return own
        z, y = module(batch[0])[:, 0], batch[1][:, 0]
        own = -torch.log_softmax(z, 1)[range(len(y)), y]
        return own

    data = _data()
    gradients = _passes(task, data)
    inspect(gradients, range(4))
    alone_task = _ctc if name == "ctc" else _by_hand
    alone = _alone(gradients.module, alone_task, data)
    _assert_as_alone(_run(gradients, range(N)), alone)
    values = []
    with closing(gradients.run(range(N))) as batches:
        for batch in batches:
            assert batch.loss.values is not None
            values.append(batch.loss.values)
    one_by_one = [alone_task(gradients.module, [t[n : n + 1] for t in data.tensors]) for n in range(N)]
    torch.testing.assert_close(torch.cat(values), torch.stack(one_by_one).detach(), **EXACT)


# ------------------------------------------------------------------------------------- losses under wrong examples


def _reversed_rows(module: Any, batch: Any) -> Tensor:
    """Rows from the last example to the first: a step that the search for owners does not follow."""
    return F.cross_entropy(module(batch[0])[:, 0].flip(0), batch[1][:, 0].flip(0))


def _reversed_rows_by_example(module: Any, batch: Any) -> Tensor:
    return F.cross_entropy(module(batch[0])[:, 0].flip(0), batch[1][:, 0].flip(0), reduction="none").mean()


def _rotated(module: Any, batch: Any) -> Tensor:
    return F.mse_loss(module(batch[0]).roll(1, 0), torch.zeros(len(batch[0]), T, C).double())


@pytest.mark.parametrize("task", [_reversed_rows, _reversed_rows_by_example, _rotated])
def test_a_loss_filed_under_another_example_is_found(task: Task) -> None:
    """Per-example gradients add up and are the right ones: only the losses of examples alone tell."""
    gradients = _passes(task)
    with pytest.raises(VerificationError, match=r"example \d has another (loss|squared gradient norm) in a batch"):
        inspect(gradients, range(4))
    with closing(gradients.run(range(4), whole=True)) as batches:
        values = next(batches).loss.values
    alone = [task(gradients.module, [t[n : n + 1] for t in _data().tensors]) for n in range(4)]
    assert values is not None
    assert not torch.allclose(values, torch.stack(alone).detach())


@pytest.mark.parametrize("traced", [True, False])
@pytest.mark.parametrize("steps", [3, 4, 8])
def test_time_major_losses_are_right_or_refused(steps: int, traced: bool) -> None:
    """`[s·n, c]` rows, also where `s` equals the number of examples: shared out as `[n·s, c]` they would be mixed.

    Two tiny batches tell where the examples are; where those could not be run, no loss is filed under another example.
    """

    def task(module: Any, batch: Any) -> Tensor:
        z = module(batch[0]).transpose(0, 1).flatten(0, 1)
        return F.cross_entropy(z, batch[1].T.flatten())

    generator = torch.Generator().manual_seed(1)
    x = torch.randn(N, steps, E, generator=generator, dtype=torch.float64)
    data = TensorDataset(x, torch.randint(0, C, (N, steps), generator=generator))
    gradients = _passes(task, data)
    if not traced:
        gradients.coverage.trace.forms = {}
        with pytest.raises(VerificationError, match="another loss in a batch than alone"):
            inspect(gradients, range(4))
        return
    inspect(gradients, range(4))
    alone = [task(gradients.module, [t[n : n + 1] for t in data.tensors]).detach() for n in range(4)]
    with closing(gradients.run(range(4), whole=True)) as batches:
        values = next(batches).loss.values
    assert values is not None
    torch.testing.assert_close(values, torch.stack(alone), **EXACT)
