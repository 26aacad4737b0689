"""How far a run stands up for a label: its own mean prediction and its neighbours, taken together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import loader, make_trainer
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from which_lightning import pl

from lightning_influence import AuditReport, InfluenceAudit
from lightning_influence.gradients.visitors import ExampleScores
from lightning_influence.training import heard_losses
from lightning_influence.training.batch_record import BatchRecord
from lightning_influence.training.evidence import EvidenceRecord
from lightning_influence.training.recording import Recording

pytestmark = pytest.mark.usefixtures("unverified")

SIZE, CLASSES = 40, 3


def recording(own: float) -> tuple[Recording, torch.Tensor]:
    """Two clusters; example 0 lies in the first and carries the label of the second, which the run half believes."""
    labels = torch.arange(SIZE) % 2
    features = nn.functional.one_hot(labels, 2).float() + 0.01 * torch.randn(
        SIZE, 2, generator=torch.Generator().manual_seed(0)
    )
    given = labels.clone()
    given[0] = 1
    probabilities = 0.9 * nn.functional.one_hot(given, CLASSES).float() + 0.1 / CLASSES
    probabilities[0] = torch.tensor([1 - own, own, 0.0])
    record = Recording(SIZE, nn.Linear(2, CLASSES))
    statistics = {"loss": torch.ones(SIZE), "label": given, "probabilities": probabilities}
    batch = BatchRecord(tuple(range(SIZE)))
    record._note(batch)
    record.dynamics.record(batch, statistics)
    columns = {"label": given, "loss": torch.ones(SIZE), "finite": torch.ones(SIZE, dtype=torch.bool)}
    record.add_pass(1, ExampleScores(torch.arange(SIZE), columns, features))
    return record, given


def test_neighbours_outvote_a_label_that_is_known_by_heart() -> None:
    record, given = recording(own=0.6)
    columns = record.columns(range(SIZE))
    assert columns["prob_margin"][0] > 0, "the mean prediction alone stands up for the wrong label"
    assert columns["support"][0] < 0
    assert (columns["support"][1:] > 0).all()
    assert columns["suggested"].tolist() == [0, *(1 - given[1:]).tolist()], "the best other class, right or wrong"


def test_a_sure_run_outvotes_its_neighbours() -> None:
    record, given = recording(own=1.0)
    # All its neighbours say 0, which weighs as much as the run's own certainty: one dissenting neighbour decides.
    told = record.labels
    told.neighbours._votes[:][0], told.evidence = torch.tensor([0.95, 0.05]), EvidenceRecord(SIZE)
    support = record.columns(range(SIZE))["support"]
    assert support[0] == pytest.approx(0.1, abs=1e-6), "1 - .95 + .05"
    assert (support > 0).all()


def test_what_was_told_before_labels_were_known_stands_in_for_the_neighbours() -> None:
    record, _ = recording(own=0.6)
    evidence = record.label_evidence(range(SIZE))
    assert evidence is not None
    evidence.late[:][1] = 0  # an example that turned up later
    record.labels.neighbours._votes[:][0] = torch.tensor([0.0, 1.0])
    support = record.columns(range(SIZE), evidence=evidence)["support"]
    late = evidence.late[:][0]
    assert support[0] == pytest.approx(0.6 - 0.4 - float(late[0] - late[1]), abs=1e-6)
    assert support[0] < 0
    assert support[1] == pytest.approx(record.columns(range(SIZE))["support"][1])
    assert record.columns(range(SIZE))["support"][0] > 0
    assert record.local_columns()["support"][0] < 0, "so far"


def test_without_a_pass_the_run_speaks_alone() -> None:
    record = Recording(2, nn.Linear(2, CLASSES))
    probabilities = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.2, 0.7]])
    record.dynamics.record(
        BatchRecord((0, 1)), {"loss": torch.ones(2), "label": torch.tensor([1, 2]), "probabilities": probabilities}
    )
    columns = record.columns([0, 1])
    np.testing.assert_allclose(columns["support"], [-0.5, 0.5], atol=1e-6)
    assert columns["suggested"].tolist() == [0, 1]
    assert "neighbour_disagreement" not in columns


# ------------------------------------------------------------------------------------------- batches nobody listens to


class Switching(pl.LightningModule):
    """Cross-entropy, and another loss for some of the batches."""

    def __init__(self, other: Callable[[int], bool] = lambda batch: False) -> None:
        super().__init__()
        self.net, self.other, self.batch = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, CLASSES)), other, -1

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        logits, labels = self.net(batch[0]), batch[1]
        if self.trainer.training and torch.is_grad_enabled():
            self.batch = self.trainer.global_step
        if self.other(self.batch):
            return F.mse_loss(logits, F.one_hot(labels, CLASSES).float())
        return F.cross_entropy(logits, labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def _train(path: Path, module: Switching) -> tuple[AuditReport, list[bool]]:
    torch.manual_seed(0)
    module.net.apply(lambda layer: layer.reset_parameters() if isinstance(layer, nn.Linear) else None)
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(torch.randn(60, 4, generator=generator), torch.arange(60) % CLASSES)
    audit = InfluenceAudit(tracin=None, curvature="identity")
    heard: list[bool] = []

    class Watch(pl.Callback):
        def on_before_zero_grad(self, *_: Any) -> None:
            assert audit._run is not None
            assert audit._run.listener.batch is not None
            heard.append(audit._run.listener.batch.tap is not None)

    make_trainer(path, callbacks=[audit, Watch()], max_epochs=3).fit(module, loader(data, 3))
    assert audit.has_report
    return audit.report, heard


def test_the_graph_is_relied_upon_once_it_has_agreed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report, heard = _train(tmp_path / "a", Switching())
    assert heard == [True] * 16 + [False] * 4 + ([True] * 2 + [False] * 18) * 2
    monkeypatch.setattr(heard_losses, "_AGREEING", 10**6)
    all_heard, listened = _train(tmp_path / "b", Switching())
    assert all(listened)
    for name, values in all_heard.columns.items():
        np.testing.assert_allclose(report.columns[name], values, rtol=1e-5, atol=1e-6, err_msg=name)


def test_a_loss_that_changes_at_the_start_of_an_epoch_is_heard(tmp_path: Path) -> None:
    report, heard = _train(tmp_path, Switching(lambda step: 20 <= step < 40))
    assert heard == [True] * 16 + [False] * 4 + [True] * 36 + [False] * 4
    assert report.columns["times_seen"].tolist() == [3] * 60


def test_a_loss_that_changes_in_the_middle_of_an_epoch_costs_one_batch(tmp_path: Path) -> None:
    report, heard = _train(tmp_path, Switching(lambda step: step >= 30))
    assert heard == [True] * 16 + [False] * 4 + [True] * 2 + [False] * 9 + [True] * 29
    assert sorted(report.columns["times_seen"].tolist()) == [2] * 3 + [3] * 57
    assert any("1 training batches had no known loss call" in note for note in report.manifest["notes"])


def test_what_is_missing_is_part_of_the_state() -> None:
    """A recording that was given up is not taken up again by a resumed run, and says why."""
    before, after = Recording(5, nn.Linear(2, 2)), Recording(5, nn.Linear(2, 2))
    before.gaps.untapped, before.gaps.failed_passes = 3, [1, 4]
    before.notes.append("no checkpoints were kept")
    with pytest.warns(UserWarning, match="training dynamics are incomplete"):
        before.fail("training dynamics are incomplete", ValueError("odd"))
    assert not after.gaps.failures
    after.load_state_dict(before.state_dict())
    assert after.gaps.failures
    assert after.remarks() == before.remarks()
    assert len(after.remarks()) == 4
