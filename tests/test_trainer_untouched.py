"""What a step does to its trainer, takes from streams and keeps in caches is no matter of extra passes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import CLASSES, FEATURES, make_trainer, vectors
from torch import Tensor, nn
from torch.utils.data import DataLoader
from which_lightning import MisconfigurationException, pl

from lightning_influence import InfluenceAudit

pytestmark = pytest.mark.filterwarnings("ignore:no logger", "ignore:Detected call of", "ignore:The epoch parameter")


class Counting(pl.Callback):
    """A callback of the user's own that the step tells things."""

    def __init__(self) -> None:
        self.calls = 0
        self.losses: list[float] = []
        self.total = torch.zeros(())


class Net(pl.LightningModule):
    """A linear model; ``also`` is what its step does besides."""

    def __init__(self, also: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.net = nn.Linear(FEATURES, CLASSES)
        self.also = also

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.also(self, loss.detach())
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.3)
        first = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3)
        second = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        return [optimizer], [torch.optim.lr_scheduler.SequentialLR(optimizer, [first, second], [3])]


def fitted(model: Net, directory: Path, *audits: InfluenceAudit) -> list[Any]:
    """Train; return what could differ."""
    pl.seed_everything(5, verbose=False)
    nn.init.normal_(model.net.weight)
    nn.init.zeros_(model.net.bias)
    callback = Counting()
    trainer = make_trainer(directory / str(len(audits)), callbacks=[*audits, callback], logger=False)
    trainer.fit(model, DataLoader(vectors(), 4, shuffle=True))
    rates = [group["lr"] for group in trainer.optimizers[0].param_groups]
    schedule = trainer.lr_scheduler_configs[0].scheduler.state_dict()
    told = [callback.calls, callback.losses, callback.total.item()]
    return [model.net.weight.tolist(), rates, str(schedule), told]


def decays(model: Any, loss: Tensor) -> None:
    for group in model.optimizers().param_groups:
        group["lr"] *= 0.97


def schedules(model: Any, loss: Tensor) -> None:
    model.lr_schedulers().step()


def tells(model: Any, loss: Tensor) -> None:
    callback = next(each for each in model.trainer.callbacks if isinstance(each, Counting))
    callback.calls += 1
    callback.losses.append(float(loss))
    callback.total += loss


def stops(model: Any, loss: Tensor) -> None:
    """Stops early, but in a pass over the data it would have at once."""
    model.trainer.noted = getattr(model.trainer, "noted", 0) + 1
    if model.trainer.noted > 9:
        model.trainer.should_stop = True


@pytest.mark.parametrize("tracin", ["epoch", "step"])
def test_a_step_that_stops_the_training(tracin: Any, tmp_path: Path) -> None:
    audit = InfluenceAudit(curvature="identity", tracin=tracin)
    assert fitted(Net(stops), tmp_path) == fitted(Net(stops), tmp_path, audit)


@pytest.mark.parametrize("weights", [None, torch.arange(1.0, CLASSES + 1)])
def test_a_step_that_does_nothing_besides_has_no_note(weights: Tensor | None, tmp_path: Path) -> None:
    """Class weights take a pass of their own, within another."""

    class Plain(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self.net(batch[0]), batch[1], weight=weights)

    audit = InfluenceAudit(curvature="identity")
    fitted(Plain(lambda *_: None), tmp_path, audit)
    assert audit.has_report
    assert audit.report.manifest["notes"] == []


@pytest.mark.parametrize("tracin", ["epoch", "step"])
@pytest.mark.parametrize(("also", "named"), [(decays, "'lr'"), (schedules, "LinearLR"), (tells, "Counting.losses")])
def test_what_a_step_does_to_its_trainer(also: Any, named: str, tracin: Any, tmp_path: Path) -> None:
    """Rates that a step lowers were lowered by every pass, too."""
    audit = InfluenceAudit(curvature="identity", tracin=tracin)
    assert fitted(Net(also), tmp_path) == fitted(Net(also), tmp_path, audit)
    assert audit.has_report
    assert any("the step changes" in note and named in note for note in audit.report.manifest["notes"])


@functools.cache
def running(size: int) -> Tensor:
    """A buffer that lives in a cache."""
    return torch.zeros(size)


def caches(model: Any, loss: Tensor) -> None:
    running(2).add_(loss)


def test_what_a_cache_holds_is_put_back(tmp_path: Path) -> None:
    totals = []
    for audits in ((), (InfluenceAudit(curvature="identity"),)):
        running(2).zero_()
        fitted(Net(caches), tmp_path, *audits)
        totals.append(running(2).tolist())
    assert totals[0] == totals[1]


class Streaming(Net):
    """Takes from an iterator that its own hook has made."""

    def __init__(self, make: Callable[[], Iterator[Any]]) -> None:
        super().__init__(lambda model, _: next(model.stream))
        self.make = make

    def on_train_start(self) -> None:
        self.stream = self.make()


@pytest.mark.parametrize(
    ("make", "name"),
    [
        pytest.param(lambda: (k for k in range(1000)), "generator", id="generator"),
        pytest.param(lambda: map(abs, range(1000)), "map", id="map"),
        pytest.param(lambda: iter(DataLoader(vectors(60), 1)), "_SingleProcessDataLoaderIter", id="loader"),
        pytest.param(lambda: iter(DataLoader(vectors(60), 1, num_workers=1)), "_MultiProcessing", id="workers"),
    ],
)
def test_a_stream_that_the_step_takes_from_is_refused(make: Any, name: str, tmp_path: Path) -> None:
    """Training would miss what the passes have taken; nothing is taken by the time it is refused."""
    model = Streaming(make)
    with pytest.raises(MisconfigurationException, match=f"would take from a {name}.*Pass `task=`"):
        fitted(model, tmp_path, InfluenceAudit())
    with torch.no_grad():
        first, again = next(model.stream), next(make())
    assert torch.equal(first[0], again[0]) if isinstance(first, list) else first == again


def test_a_stream_that_a_task_leaves_alone(tmp_path: Path) -> None:
    audit = InfluenceAudit(
        curvature="identity", task=lambda model, batch: F.cross_entropy(model.net(batch[0]), batch[1])
    )
    fitted(Streaming(lambda: (k for k in range(1000))), tmp_path, audit)
    assert audit.has_report
    assert audit.report.status == "complete"


class Prepares(Net):
    """Sets up in its hooks what its step needs."""

    def __init__(self, hook: str) -> None:
        super().__init__(lambda model, loss: model.losses.append(float(loss)))
        setattr(self, hook, lambda: setattr(self, "losses", []))


@pytest.mark.parametrize("hook", ["on_train_start", "on_train_epoch_start"])
def test_what_a_hook_of_the_model_sets_up_is_there(hook: str, tmp_path: Path) -> None:
    """Callbacks come before the model's own hooks: the first look failed by an AttributeError of the step."""
    models, audit = (Prepares(hook), Prepares(hook)), InfluenceAudit(curvature="identity")
    assert fitted(models[0], tmp_path) == fitted(models[1], tmp_path, audit)
    assert models[0].losses == models[1].losses
    assert audit.has_report
    assert audit.report.status == "complete"
