"""Steps that run a layer on some rows of some batches, as for examples that a mask names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import CLASSES, FEATURES, make_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from which_lightning import MisconfigurationException, pl

from lightning_influence import InfluenceAudit

N = 40
_draw = torch.Generator().manual_seed(0)
X, U = torch.randn(2, N, FEATURES, generator=_draw)
Y = torch.randint(CLASSES, (N,), generator=_draw)


class Picking(pl.LightningModule):
    """Asks for the outputs at further inputs to be small, of those examples that have some."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, CLASSES))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y, mask, u = batch
        loss = F.cross_entropy(self.net(x), y)
        if mask.any():
            loss = loss + 0.5 * self.net(u[mask]).square().sum() / len(x)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


class Labelled(Picking):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y, mask, u = batch
        loss = F.cross_entropy(self.net(x), y)
        if mask.any():
            loss = loss + F.cross_entropy(self.net(u[mask]), y[mask], reduction="sum") / len(x)
        return loss


class Weighing(Picking):
    """The way out that is advised."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y, mask, u = batch
        further = 0.5 * self.net(u).square().sum(1) * mask
        return (F.cross_entropy(self.net(x), y, reduction="none") + further).mean()


def fitted(folder: Path, model: Picking, masked: list[int], **arguments: Any) -> InfluenceAudit:
    mask = torch.zeros(N, dtype=torch.bool)
    mask[masked] = True
    torch.manual_seed(0)
    audit = InfluenceAudit(**arguments)
    data = TensorDataset(X, Y, mask, U)
    make_trainer(folder, callbacks=[audit], max_epochs=1).fit(model, DataLoader(data, 4))
    return audit


@pytest.mark.parametrize("masked", [[7], list(range(0, N, 2))], ids=["one", "half"])
@pytest.mark.parametrize("kind", [Picking, Labelled])
def test_it_is_known_before_training(kind: type[Picking], masked: list[int], tmp_path: Path) -> None:
    """It failed once training was over, and said to leave out the whole network."""
    model = kind()
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(MisconfigurationException, match=r'used by linear on rows .* Pass `uncovered="exact"`'):
        fitted(tmp_path / "report", model, masked)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    if kind is Labelled:  # the scale of a term that few batches have is another matter
        return
    report = fitted(tmp_path / "exact", model, masked, uncovered="exact").report
    norms = []
    for k in range(N):
        batch = [part[k : k + 1] for part in (X, Y, torch.isin(torch.arange(N), torch.tensor(masked)), U)]
        found = torch.autograd.grad(model.training_step(batch, 0), list(model.parameters()))
        norms.append(sum(float(each.square().sum()) for each in found))
    np.testing.assert_allclose(report.columns["grad_norm_squared"], norms, rtol=1e-4)


def test_what_comes_late_says_what_to_do(tmp_path: Path) -> None:
    """Of more examples than are looked at, rare ones are met after training."""

    class Late(Picking):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y, mask, u = batch
            return super().training_step((x, y, mask & (self.current_epoch > 0), u), batch_idx)

    mask = torch.arange(N) % 2 == 0
    audit = InfluenceAudit(tracin=None)
    loader = DataLoader(TensorDataset(X, Y, mask, U), 4)
    make_trainer(tmp_path, callbacks=[audit], max_epochs=3).fit(Late(), loader)
    with pytest.raises(RuntimeError, match=r"run it on all rows and weigh what it gives by the mask"):
        _ = audit.report
    assert fitted(tmp_path / "way", Weighing(), [7]).has_report
