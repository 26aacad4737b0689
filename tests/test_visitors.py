"""Visitors: many look at one pass, and one that fails leaves the others alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_influence.data.source import ExampleSource
from lightning_influence.gradients.capture import LayerIO
from lightning_influence.gradients.discover import discover
from lightning_influence.gradients.passes import BatchGradients, ExampleGradients
from lightning_influence.gradients.visitors import ExampleColumns, Guest, LossColumns, Visitor, in_order, visit

N = 7


class Counting(ExampleSource):
    """Notes what is fetched."""

    fetched = 0

    def batches(self, indices: Any, size: int | None = None) -> Any:
        self.fetched += len(indices)
        return super().batches(indices, size)


def task(module: Any, batch: Any) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1])


def passes() -> tuple[ExampleGradients, Counting]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    source = Counting(TensorDataset(torch.randn(N, 4).double(), torch.arange(N) % 3), batch_size=3)
    gradients = ExampleGradients(net, task, source, discover(net, task, source))
    assert gradients.scale is not None
    source.fetched, source.pass_batch_size = 0, 3
    return gradients, source


class Diary(Visitor):
    """Writes down what it sees."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def begin(self, batch: BatchGradients) -> None:
        self.seen.append(("begin", batch.indices))

    def add(self, io: LayerIO) -> None:
        self.seen.append((io.name, io.x.shape[1]))

    def end(self, batch: BatchGradients) -> None:
        self.seen.append(("end", batch.indices))


def test_all_look_at_one_pass() -> None:
    gradients, source = passes()
    first, second, losses = Diary(), Diary(), LossColumns(range(N), gradients.device)
    visit(gradients, range(N), [first, losses, second])
    assert source.fetched == N
    assert first.seen == second.seen
    assert [what for what, _ in first.seen[:4]] == ["begin", "0", "2", "end"]
    assert [found for what, found in first.seen if what == "end"] == [[0, 1, 2], [3, 4], [5, 6]]
    assert losses.columns.complete
    order, columns = losses.columns.gathered()
    assert order.tolist() == list(range(N))
    x, y = source.dataset.tensors  # type: ignore[attr-defined]
    torch.testing.assert_close(columns["loss"], F.cross_entropy(gradients.module(x), y, reduction="none").detach())
    assert columns["label"].tolist() == y.tolist()


@pytest.mark.parametrize("when", ["begin", "add", "end"])
def test_a_guest_leaves_with_its_first_error(when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError(f"no {when}")

    gradients, _ = passes()
    bad, good = Diary(), Diary()
    monkeypatch.setattr(bad, when, fail)
    guest = Guest(bad)
    visit(gradients, range(N), [guest, good])
    assert str(guest.error) == f"no {when}"
    assert len(good.seen) == 3 * 4
    assert len(bad.seen) == {"begin": 0, "add": 1, "end": 3}[when]
    with pytest.raises(RuntimeError, match=f"no {when}"):
        visit(gradients, range(N), [bad, good])


def test_rows_of_examples_that_were_left_out_are_unknown() -> None:
    columns = ExampleColumns(range(5), torch.device("cpu"))
    columns.add([3, 0], {"score": torch.tensor([3.0, 0.0])})
    columns.add([4], {"score": torch.tensor([4.0]), "label": torch.tensor([1])})
    assert not columns.complete
    order, found = columns.gathered()
    assert order.tolist() == [0, 3, 4]
    assert found["label"].tolist() == [-1, -1, 1]
    assert in_order([4, 1, 3], order, found["score"]).nan_to_num(-9).tolist() == [4.0, -9.0, 3.0]
    assert in_order([4, 1], order, found["label"]).tolist() == [1, -1]


def test_rows_count_only_where_there_is_memory_for_those_before(monkeypatch: pytest.MonkeyPatch) -> None:
    def short(self: ExampleColumns) -> None:
        raise MemoryError

    columns, values = ExampleColumns(range(4), torch.device("cpu")), torch.arange(4.0)
    with monkeypatch.context() as patch:
        patch.setattr("lightning_influence.gradients.visitors._LEAVING", -1)
        patch.setattr(ExampleColumns, "_leave", short)
        with pytest.raises(MemoryError):
            columns.add([0, 1], {"a": values[:2]})
    for half in ([0], [1], [2, 3]):  # the batch comes again
        columns.add(half, {"a": values[half]})
    found, gathered = columns.gathered()
    assert found.tolist() == [0, 1, 2, 3]
    torch.testing.assert_close(gathered["a"], values)
