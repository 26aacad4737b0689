"""Shares by class: a table of the largest alone beside one of all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from which_lightning import pl

from lightning_influence import InfluenceAudit
from lightning_influence.audit.belief import believe
from lightning_influence.core import distributed
from lightning_influence.training import class_shares, example_sums
from lightning_influence.training.class_shares import ClassShares, largest
from lightning_influence.training.dynamics import TrainingDynamics
from lightning_influence.training.evidence import LabelEvidence

N, CLASSES, KEPT = 60, 9, 4


@pytest.fixture(autouse=True)
def _few_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(class_shares, "_LARGEST", KEPT)
    monkeypatch.setattr(class_shares, "_ALL", 0)
    monkeypatch.setattr(example_sums, "_ROWS", 16)


def sparse(seed: int, rows: int = N) -> Tensor:
    """Shares in quarters, so that sums are exact, of the same four classes of each example."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(N, CLASSES, generator=torch.Generator().manual_seed(0)).argsort(1)[:, :KEPT]
    values = torch.randint(0, 9, (N, KEPT), generator=generator) / 4
    return torch.zeros(N, CLASSES).scatter_(1, order, values)[:rows]


def table(parts: Sequence[Tensor], rows: Tensor | None = None) -> ClassShares:
    made, every = ClassShares(N), torch.arange(N)
    for number, part in enumerate(parts):
        if number % 2:
            made.add(every, *largest(part)) if made.largest_alone else made.add(every, part)
        else:
            made.add(every, part)
    return made


def both(seeds: Sequence[int], monkeypatch: pytest.MonkeyPatch) -> tuple[ClassShares, ClassShares]:
    parts = [sparse(seed) for seed in seeds]
    with monkeypatch.context() as patch:
        patch.setattr(class_shares, "_ALL", N * CLASSES)
        dense = table(parts)
    few = table(parts)
    assert (dense.largest_alone, few.largest_alone) == (False, True)
    return few, dense


def test_where_an_example_has_few_classes_nothing_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    few, dense = both(range(5), monkeypatch)
    assert torch.equal(few[:], dense[:])
    rows = torch.tensor([7, 3, 59])
    assert torch.equal(few[rows], dense[rows])
    assert torch.equal(few.some(rows)[:], dense.some(rows)[:])
    assert torch.equal(few.totals(), dense.totals())
    np.testing.assert_array_equal(few.first(), dense.first())
    assert torch.equal(few.two_largest(), dense.two_largest())
    labels = np.random.default_rng(0).integers(0, CLASSES, N)
    np.testing.assert_array_equal(few.of_labels(labels), dense.of_labels(labels))
    of_few, of_all = few.by_class(), dense.by_class()
    for one in range(CLASSES):
        there, held = of_few(one)
        expected = of_all(one)[1]
        assert torch.equal(torch.zeros(N).index_put_((torch.as_tensor(there),), held), expected)
    twice = ClassShares(N)
    twice.add(torch.arange(N), sparse(0))
    twice.add_table(torch.arange(N), few)
    assert torch.equal(twice[:], dense[:] + sparse(0))
    for each in (few, dense):
        each.divide(each.totals().clamp(min=1e-12))
    assert torch.equal(few[:], dense[:])


def test_what_is_left_out_is_counted() -> None:
    """Each kept sum is at most the true one, and lacks no more than all that was left out of the example."""
    parts = [torch.rand(N, CLASSES, generator=torch.Generator().manual_seed(seed)).square() for seed in range(6)]
    few, true = table(parts), torch.stack(parts).sum(0)
    held = few[:]
    assert bool(((held > 0).sum(1) == KEPT).all())
    torch.testing.assert_close(few.totals(), true.sum(1))
    lacking = few.totals() - held.sum(1)
    gap = (true - held)[held > 0].view(N, KEPT)
    assert bool((gap >= -1e-5).all())
    assert bool((gap <= lacking.unsqueeze(1) + 1e-5).all())
    assert float(gap.max()) > 0.01


def test_growing_in_rows_and_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(class_shares, "_ALL", N * CLASSES)
    made = ClassShares(N)
    made.add(torch.arange(N), sparse(1)[:, :6])
    assert made[:].shape == (N, 6)
    made.add(torch.arange(N), sparse(2))
    assert not made.largest_alone
    expected = F.pad(sparse(1)[:, :6], (0, 3)) + sparse(2)
    assert torch.equal(made[:], expected)
    made.grow(N + 5)
    assert made.largest_alone
    assert torch.equal(made[:], F.pad(expected, (0, 0, 0, 5)))
    made.add(torch.tensor([N + 4]), torch.eye(CLASSES + 3)[-1:])
    made.grow(N + 9)
    assert made[:].shape == (N + 9, CLASSES + 3)
    assert made[:][N + 4].tolist() == torch.eye(CLASSES + 3)[-1].tolist()
    assert made.two_largest()[N + 4].tolist() == [0, 1]


def test_more_classes_than_two_bytes_tell() -> None:
    made, rows = ClassShares(2), torch.arange(2)
    made.add(rows, torch.tensor([[0.0, 1.0, 0, 0, 0, 2.0], [3.0, 0, 0, 0, 0, 0]]))
    state = made.state_dict("votes")
    assert state["votes.which"].dtype == torch.int16
    many = torch.zeros(2, 40_000)
    many[0, 39_999], many[1, 32_767] = 5.0, 7.0
    made.add(rows, many)
    assert made[:].nonzero().tolist() == [[0, 1], [0, 5], [0, 39_999], [1, 0], [1, 32_767]]
    assert made.first().tolist() == [39_999, 32_767]
    of = made.by_class()
    assert [of(one)[0].tolist() for one in (1, 32_767, 39_998, 39_999)] == [[0], [1], [], [0]]


@pytest.mark.parametrize("limit", [0, N * CLASSES])
def test_going_on_from_a_state(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(class_shares, "_ALL", limit)
    parts = [torch.rand(N, CLASSES, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    straight, other = table(parts), ClassShares(N)
    other.load_state_dict("votes", table(parts[:2]).state_dict("votes"))
    for part in parts[2:]:
        other.add(torch.arange(N), part)
    assert torch.equal(other[:], straight[:])
    assert torch.equal(other.totals(), straight.totals())
    other.load_state_dict("votes", {})
    assert other.classes == 0


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_process_has_what_all_have_seen(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [torch.rand(N, CLASSES, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    made = [table([part]) for part in parts]

    def total(own: Sequence[Tensor], *, everywhere: bool) -> list[Tensor]:
        rows = slice(0, len(own[0])) if len(own[0]) == N else torch.arange(N)[asked.pop(0)]
        return [a + b for a, b in zip(own, (made[1 - rank][rows], made[1 - rank]._rest[rows]), strict=True)]

    monkeypatch.setattr(class_shares, "TOGETHER", 4 * CLASSES * 25)
    asked = [slice(0, 25), slice(25, 50), slice(50, 60)]
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "rank", lambda: rank)
    monkeypatch.setattr(distributed, "gather_objects", lambda item: [item, item])
    monkeypatch.setattr(distributed, "sum_across_processes", total)
    held = made[0][:] + made[1][:]
    made[rank].share()
    assert not asked
    if rank:
        assert not made[1][:].any()
        assert not made[1].totals().any()
    else:
        assert torch.equal(made[0][:], held.where(held >= held.topk(KEPT).values[:, -1:], 0))
        torch.testing.assert_close(made[0].totals(), parts[0].sum(1) + parts[1].sum(1))


@pytest.mark.parametrize("right", [0.95, 0.7, 0.4])
def test_beliefs_are_those_of_all_classes(right: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where an example has few of them; the true number of wrong labels decides which way is gone."""
    generator = np.random.default_rng(1)
    monkeypatch.setattr(class_shares, "_ALL", 10**9)
    size = 900
    true = np.arange(size) % CLASSES
    given = np.where(generator.random(size) < right, true, generator.integers(0, CLASSES, size))
    shares = torch.zeros(4, size, CLASSES)
    for part in shares:
        order = torch.from_numpy(generator.permuted(np.tile(np.arange(CLASSES), (size, 1)), axis=1)[:, :KEPT].copy())
        part.scatter_(1, order, torch.rand(size, KEPT, generator=torch.Generator().manual_seed(int(part[0, 0]))))
        part[torch.arange(size), torch.from_numpy(true)] += 2.0
        few = part.topk(KEPT, 1)
        part.zero_().scatter_(1, few.indices, few.values)
    part /= part.sum(1, keepdim=True)
    order = generator.permutation(size)
    of_all = believe(given, LabelEvidence(*map(ClassShares.of, shares)), order)
    monkeypatch.setattr(class_shares, "_ALL", 0)
    tables = []
    for part in shares:
        tables.append(ClassShares(size))
        tables[-1].add(torch.arange(size), part)
    assert all(each.largest_alone for each in tables)
    found = believe(given, LabelEvidence(*tables), order)
    assert found[0].described() == of_all[0].described()
    for name, values in of_all[1].items():
        np.testing.assert_allclose(found[1][name], values, rtol=1e-6, err_msg=name)
    assert of_all[0].noise_rate > 0.5 * (1 - right) * (CLASSES - 1) / CLASSES


class Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, CLASSES))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 0.02)


def test_an_audit_of_many_classes_has_beliefs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They had none, and of what training had predicted only a bound."""
    generator = torch.Generator().manual_seed(3)
    true = torch.arange(180) % CLASSES
    x = 3 * torch.randn(CLASSES, 8, generator=generator)[true] + torch.randn(180, 8, generator=generator) / 2
    given = true.clone()
    given[:18] = (given[:18] + 4) % CLASSES
    found = []
    for limit in (0, 10**9):
        monkeypatch.setattr(class_shares, "_ALL", limit)
        torch.manual_seed(0)
        audit = InfluenceAudit()
        trainer = pl.Trainer(
            max_epochs=4,
            accelerator="cpu",
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            logger=False,
            default_root_dir=str(tmp_path / str(limit)),
            callbacks=[audit],
        )
        trainer.fit(Net(), DataLoader(TensorDataset(x, given), 16, shuffle=True))
        recording = audit._recording
        assert recording is not None
        assert recording.dynamics.probabilities.largest_alone is (limit == 0)
        found.append(audit.report)
    few, of_all = found
    assert few.columns.keys() == of_all.columns.keys()
    assert few.beliefs.verdict == of_all.beliefs.verdict == "told"
    wrong = np.arange(18)
    for report in found:
        at = np.isin(report.columns["index"], wrong)
        assert (report.columns["suggested"][at] == true.numpy()[report.columns["index"][at]]).mean() > 0.9


def test_a_state_of_the_largest_has_no_sums_of_its_own() -> None:
    """What is kept beside the largest belongs to the table, not to the columns of a run."""
    own = TrainingDynamics(N)
    own.sums.add("loss", torch.arange(N), torch.ones(N))
    own.probabilities.add(torch.arange(N), sparse(1))
    resumed = TrainingDynamics(N)
    resumed.load_state_dict(own.state_dict())
    assert resumed.probabilities.largest_alone
    assert resumed.sums.names() == own.sums.names() == ["loss"]
    assert torch.equal(resumed.probabilities.totals(), own.probabilities.totals())
