"""Two processes under DDP give the audit of one process that sees the same global batches."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import CLASSES, FEATURES, Validated, loader, make_trainer, vectors
from own_processes import METHOD, as_ranks
from torch import Tensor, nn
from torch.utils.data import DistributedSampler, Sampler, SubsetRandomSampler, TensorDataset
from which_lightning import DDPStrategy, ModelCheckpoint, pl

from lightning_influence import AuditReport, DemographicParityGap, InfluenceAudit, Queries, TracIn

# An odd number: the sampler pads the last batch with an example that was seen before.
SIZE, QUERIES, EPOCHS, PER_PROCESS = 23, 7, 3, 4
SUBSET = [1, 4, 5, 9, 12, 13, 17, 20, 22]
PATIENCE = 200


@dataclass
class Scenario:
    """One training run."""

    audit: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    shuffle: bool = False
    bad: tuple[int, ...] = ()
    resume: bool = False
    subset: bool = False
    epochs: int = EPOCHS
    fails: bool = False

    def padding(self) -> list[int]:
        """Examples that were used to fill up a last batch."""
        batches = GlobalBatches(self.shuffle)
        padding = set()
        for epoch in range(self.epochs):
            batches.set_epoch(epoch)
            padding.add(list(batches)[-1][-1])
        return sorted(padding)


SCENARIOS = {
    "ekfac": Scenario(audit={"verify": True}),
    "kfac": Scenario(audit={"curvature": "kfac", "fisher": "empirical", "factor_examples": 11, "damping": 0.01}),
    "every second epoch": Scenario(audit={"curvature": "identity", "tracin": TracIn(every_n_epochs=2)}),
    "in flight": Scenario(audit={"curvature": "identity", "tracin": "step"}, shuffle=True),
    "in flight, resumed": Scenario(audit={"curvature": "identity", "tracin": "step"}, resume=True),
    "limited": Scenario(audit={"curvature": "diagonal"}, trainer={"limit_train_batches": 2}),
    "shuffled": Scenario(audit={"curvature": "identity"}, shuffle=True, epochs=8),
    "not finite": Scenario(bad=(2, 9, 15)),
    "resumed": Scenario(audit={"curvature": "identity"}, resume=True),
    "subset": Scenario(audit={"curvature": "identity"}, subset=True),
    "queries": Scenario(
        audit={"queries": Queries(count=3, top=4, measurement=DemographicParityGap([0, 1, 1, 0, 1, 0, 0]))}
    ),
}


class GlobalBatches(Sampler[list[int]]):
    """For one process: the examples of all processes' batches together, in the order of ``DistributedSampler``."""

    epoch = 0

    def __init__(self, shuffle: bool) -> None:
        self.shuffle = shuffle
        self.sampler = self  # where Lightning looks for `set_epoch`

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-SIZE // (2 * PER_PROCESS))

    def __iter__(self) -> Iterator[list[int]]:
        order = list(range(SIZE))
        if self.shuffle:
            order = torch.randperm(SIZE, generator=torch.Generator().manual_seed(self.epoch)).tolist()
        order += order[: SIZE % 2]
        size = 2 * PER_PROCESS
        return iter([order[start : start + size] for start in range(0, len(order), size)])


class Model(Validated):
    """Large steps, so that predictions change between epochs; steps with gradients that are not finite are skipped."""

    def __init__(self) -> None:
        super().__init__(lambda module: torch.optim.SGD(module.parameters(), lr=1.0))
        self.double()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        if not all(bool(torch.isfinite(parameter.grad).all()) for parameter in self.parameters()):
            for parameter in self.parameters():
                parameter.grad.zero_()


class FailingOnOneRank(Model):
    """Passes fail on rank 1 alone: after the first epoch, and at the end. Training does not."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if not self.training and self.global_rank == 1 and self.global_step in (3, 3 * EPOCHS):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().training_step(batch, batch_idx)


def train(scenario: Scenario, devices: int, directory: Path, *, audited: bool = True) -> tuple[Any, nn.Module]:
    data = vectors(SIZE, dtype=torch.float64)
    x = data.tensors[0].clone()
    x[list(scenario.bad)] = torch.nan
    data = TensorDataset(x, data.tensors[1])
    queries = vectors(QUERIES, 2, dtype=torch.float64)

    def fit(epochs: int, folder: str, ckpt_path: str | None = None) -> tuple[Any, nn.Module]:
        torch.manual_seed(3)
        model = FailingOnOneRank() if scenario.fails else Model()
        if scenario.subset:
            train_loader = loader(data, PER_PROCESS, sampler=SubsetRandomSampler(SUBSET))
        elif devices == 1:
            train_loader = loader(data, batch_sampler=GlobalBatches(scenario.shuffle))
        elif scenario.shuffle:
            train_loader = loader(data, PER_PROCESS, shuffle=True)
        else:  # Lightning would shuffle
            rank = int(os.environ.get("LOCAL_RANK", "0"))
            in_order = DistributedSampler(data, devices, rank, shuffle=False)
            train_loader = loader(data, PER_PROCESS, sampler=in_order)
        keeper = ModelCheckpoint(dirpath=directory / folder / "kept", filename="{step}", save_top_k=-1)
        audit = InfluenceAudit(**{"verify": False, **scenario.audit})
        trainer = make_trainer(
            directory / folder,
            max_epochs=epochs,
            devices=devices,
            strategy="ddp" if devices > 1 else "auto",
            callbacks=[audit, keeper] if audited else [keeper],
            enable_checkpointing=True,
            **scenario.trainer,
        )
        trainer.fit(model, train_loader, loader(queries, 3), ckpt_path=ckpt_path)
        return trainer, model

    if scenario.resume:
        fit(EPOCHS - 1, "first")
        return fit(EPOCHS, "run", str(directory / "first" / "kept" / f"step={3 * (EPOCHS - 1)}.ckpt"))
    return fit(scenario.epochs, "run")


def weights(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def main(directory: Path) -> None:
    """Run all scenarios in this process group."""
    failed = {}
    for name, scenario in SCENARIOS.items():
        trainer, model = train(scenario, 2, directory / name)
        failed[name] = f"{trainer.state.status}"
        np.save(directory / name / f"weights{trainer.global_rank}.npy", weights(model).numpy())
    # Before another one: processes that wait for each other would never come to it.
    _, model = train(Scenario(fails=True), 2, directory / "fails on one rank")
    np.save(directory / "fails on one rank" / "weights.npy", weights(model).numpy())
    _, model = train(SCENARIOS["ekfac"], 2, directory / "without", audited=False)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        np.save(directory / "without" / "weights.npy", weights(model).numpy())


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return as_ranks(main, tmp_path_factory.mktemp("ddp"), PATIENCE)


def report_below(directory: Path) -> AuditReport:
    # One process writes: a second one would have been given `influence-v1`.
    (manifest,) = directory.glob("run/csv/version_*/influence*/manifest.json")
    return AuditReport.load(manifest.parent)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENARIOS)
def test_two_processes_give_the_table_of_one(name: str, two_processes: Path, tmp_path: Path) -> None:
    scenario = SCENARIOS[name]
    there = report_below(two_processes / name)
    _, model = train(scenario, 1, tmp_path)
    here = report_below(tmp_path)

    assert there.status == here.status == "complete"
    assert there.manifest["notes"] == here.manifest["notes"]
    if scenario.subset:  # other batches: only what is audited can be compared
        assert there.columns["index"].tolist() == here.columns["index"].tolist() == SUBSET
        return
    for rank in range(2):
        trained = np.load(two_processes / name / f"weights{rank}.npy")
        np.testing.assert_allclose(trained, weights(model).numpy(), rtol=1e-10, atol=1e-12)
    assert there.manifest["tracin_steps"] == here.manifest["tracin_steps"]
    assert set(there.columns) == set(here.columns) >= {"loss_mean", "tracin", "self_influence", "harm", "forgetting"}
    assert there.columns["index"].tolist() == here.columns["index"].tolist()
    if not scenario.trainer:
        assert there.columns["index"].tolist() == list(range(SIZE))
    for column in sorted(there.columns):
        ours, theirs = here.columns[column], there.columns[column]
        if column == "forgetting":
            # Two processes see a padding example at once: there is no order of its visits to forget in.
            ours, theirs = np.delete(ours, scenario.padding()), np.delete(theirs, scenario.padding())
        np.testing.assert_allclose(theirs, ours, rtol=1e-5, atol=1e-7, equal_nan=True, err_msg=column)
    assert there.nonfinite.tolist() == list(scenario.bad)
    assert there.candidates.tolist() == here.candidates.tolist()
    assert there.beliefs.verdict == here.beliefs.verdict
    for name in ("noise_rate", "low", "high", "joint"):
        ours, theirs = getattr(here.beliefs, name), getattr(there.beliefs, name)
        assert (ours is None) == (theirs is None)
        np.testing.assert_allclose(theirs, ours, rtol=1e-6) if ours is not None else None
    assert (there.pairs is None) == (here.pairs is None) == ("queries" not in scenario.audit)
    if there.pairs is not None and here.pairs is not None:
        assert "influence_on_demographic_parity_gap" in there.columns
        for column, values in here.pairs.items():
            if values.dtype.kind == "f":
                np.testing.assert_allclose(there.pairs[column], values, rtol=1e-6, err_msg=column)
            else:
                assert there.pairs[column].tolist() == values.tolist(), column
    if scenario.shuffle:
        assert here.columns["forgetting"].sum() > 0, "nothing was forgotten: the scenario proves too little"


@pytest.mark.slow
def test_training_in_two_processes_is_bitwise_the_same(two_processes: Path) -> None:
    without = np.load(two_processes / "without" / "weights.npy")
    for rank in range(2):
        assert np.load(two_processes / "ekfac" / f"weights{rank}.npy").tobytes() == without.tobytes()


@pytest.mark.slow
def test_what_fails_on_one_process_ends_no_training(two_processes: Path) -> None:
    directory = two_processes / "fails on one rank"
    assert np.load(directory / "weights.npy").tobytes() == np.load(two_processes / "without" / "weights.npy").tobytes()
    report = report_below(directory)
    assert report.status == "interrupted"
    assert "memory has run out with a single example (CUDA out of memory)" in report.manifest["error"]
    assert report.columns["times_seen"].sum() == EPOCHS * (SIZE + 1), "what was recorded is kept, of all processes"


class Picklable(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(FEATURES, CLASSES)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.layer(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.slow
def test_processes_of_their_own_leave_their_report_to_who_has_started_them(tmp_path: Path) -> None:
    audit = InfluenceAudit(tracin=None)
    copied, strategy = copy.deepcopy(audit), DDPStrategy(start_method=METHOD)
    trainer = make_trainer(tmp_path, max_epochs=1, devices=2, strategy=strategy, callbacks=[audit])
    with pytest.raises(RuntimeError, match="has not run"):
        _ = audit.report
    trainer.fit(Picklable(), loader(vectors(SIZE), PER_PROCESS))
    assert audit.has_report
    assert not copied.has_report
    assert audit.report.directory is not None
    assert audit.report.columns.keys() == AuditReport.load(audit.report.directory).columns.keys()
    assert len(audit.report) == SIZE
    with pytest.raises(RuntimeError, match=r"which are gone with what they had set up: call `audit\(model, data\)`"):
        audit.influence()
    assert not list(Path(tempfile.gettempdir()).glob(f"{audit._child._file.stem}*")), "the note is taken"


def test_a_note_is_for_who_waits_and_about_the_last_training(tmp_path: Path) -> None:
    """A process that has got the callback to train with (a sweep's worker) keeps what it has; so does a later fit."""
    audit = InfluenceAudit(tracin=None)
    own, audit._child._process = audit._child._process, -1
    make_trainer(tmp_path, fast_dev_run=True, callbacks=[audit]).fit(Picklable(), loader(vectors()))
    assert audit.report.directory is None
    assert audit._child._file.exists()
    audit._child._process = own
    make_trainer(tmp_path, max_epochs=1, callbacks=[audit]).fit(Picklable(), loader(vectors()))
    assert audit.report.directory is not None
