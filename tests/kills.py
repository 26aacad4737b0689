"""Trainings that are killed: a process trains in forks of itself and kills them at a given moment.

It is given one job after the other and answers with the signal that ended it, 0 if it came to its end. The process
itself never computes anything: a fork of a process with running threads would hang.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import torch
from models import Validated, make_trainer, vectors
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from which_lightning import Callback, ModelCheckpoint, TorchCheckpointIO, pl

from lightning_influence import InfluenceAudit

SIZE, BATCH, EPOCHS = 22, 5, 3
MOMENTS = ("start", "batch", "pass", "audit", "before write", "after write")


@dataclass(frozen=True)
class Job:
    """One training.

    Attributes:
        directory: Where everything goes.
        tracin: Argument of the audit.
        every: Steps between checkpoints; None saves at the ends of epochs.
        moment: What is counted: steps of the passes before training starts, batches of training, steps of the audit's
            passes at epoch ends, steps of the final audit, files of the audit about to be put in place, or just put
            there. None never kills.
        count: The how manieth of them is the last.
        seconds: Kill after that time instead.
    """

    directory: str
    tracin: str | None = "epoch"
    every: int | None = None
    moment: str | None = None
    count: int = 0
    seconds: float | None = None


class EveryEpochAnother(Sampler[int]):
    """An order that depends on the epoch alone, so that a resumed run sees the batches of one that never stopped."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return SIZE

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(SIZE, generator=torch.Generator().manual_seed(self.epoch)).tolist())


class Resumable(DataLoader[Any]):
    """Goes on within an epoch, as torchdata's ``StatefulDataLoader`` does."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.done = self.skipped = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        skipped, self.skipped = self.skipped, 0
        self.done = skipped
        for number, batch in enumerate(super().__iter__()):
            if number >= skipped:
                self.done += 1
                yield batch
        self.done = 0

    def state_dict(self) -> dict[str, int]:
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.skipped = state["done"]


class WholeFiles(TorchCheckpointIO):
    """Lightning's checkpoints are written in place: half a one would be no matter of ours."""

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        super().save_checkpoint(checkpoint, f"{path}.part", storage_options)
        os.rename(f"{path}.part", path)


class Moments:
    """Counts what happens, and kills the process when its moment has come."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.phase = ""
        self.counts: Counter[str] = Counter()
        replace = os.replace

        def counted(*arguments: Any, **settings: Any) -> None:
            self("before write")
            replace(*arguments, **settings)
            self("after write")

        os.replace = counted

    def __call__(self, moment: str, otherwise: str = "") -> None:
        moment = moment or self.phase or otherwise
        self.counts[moment] += 1
        if moment == self.job.moment and self.counts[moment] == self.job.count:
            os.kill(os.getpid(), signal.SIGKILL)


class Killed(Validated):
    """Tells whenever its training step runs."""

    def __init__(self, moments: Moments) -> None:
        super().__init__(lambda module: torch.optim.SGD(module.parameters(), lr=0.2, momentum=0.5))
        self.double()
        self.moment = Mock(side_effect=moments)  # what a step counts is else put back by the audit

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if not self.training:
            # A run that is resumed once it is over has its audit in other hooks.
            self.moment("", "audit" if self.trainer.global_step else "start")
        return super().training_step(batch, batch_idx)

    def on_train_batch_end(self, *_: Any) -> None:
        self.moment("batch")


class Phase(Callback):
    """Knows when the audit's turn is: one is listed before it, one after it."""

    def __init__(self, moments: Moments, before: bool) -> None:
        self.moments, self.before = moments, before

    @property
    def state_key(self) -> str:
        return f"Phase {self.before}"

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.moments.phase = "pass" if self.before else ""
        if not self.before:
            Path(self.moments.job.directory, "an epoch has ended").touch()

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.moments.phase = "audit" if self.before else ""


def train(job: Job) -> None:
    """Train, from the last checkpoint if there is one; leave ``result.json`` if nobody kills."""
    torch.set_num_threads(1)
    torch.manual_seed(3)
    directory, moments = Path(job.directory), Moments(job)
    audit = InfluenceAudit(tracin=job.tracin, dirpath=directory / "influence", verify=False)  # type: ignore[arg-type]
    keeper = ModelCheckpoint(directory / "kept", save_last=True, every_n_train_steps=job.every)
    trainer = make_trainer(
        directory,
        logger=False,
        max_epochs=EPOCHS,
        callbacks=[Phase(moments, True), audit, Phase(moments, False), keeper],
        enable_checkpointing=True,
        plugins=[WholeFiles()],
    )
    loader = Resumable(vectors(SIZE, dtype=torch.float64), batch_size=BATCH, sampler=EveryEpochAnother())
    start = time.perf_counter()
    held_out = DataLoader(vectors(7, 2, dtype=torch.float64), batch_size=4)
    model = Killed(moments)
    trainer.fit(model, loader, held_out, ckpt_path="last")
    result = {
        "directory": None if not audit.has_report else str(audit.report.directory),
        "weights": [trainer.global_step, *(float(p.detach().abs().sum()) for p in model.parameters())],
        "seconds": time.perf_counter() - start,
        "counts": moments.counts,
    }
    (directory / "result.json").write_text(json.dumps(result))


def run(job: Job) -> int:
    """Train in a fork; return the signal that ended it."""
    directory = Path(job.directory)
    (directory / "result.json").unlink(missing_ok=True)
    child = os.fork()
    if not child:
        said = os.open(directory / "said.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(said, 1)
        os.dup2(said, 2)
        try:
            train(job)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
    if job.seconds is not None:
        time.sleep(job.seconds)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def serve(asked: Connection) -> None:
    """Answer one job after the other."""
    while (job := asked.recv()) is not None:
        asked.send(run(job))
