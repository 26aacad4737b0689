"""What an audit of a stream keeps of each example: peak memory of whole runs over streams of several lengths.

Each run trains in a process of its own on examples that are made when they are asked for, 3 kB each, called by texts of
ten letters; its peak is what the system tells. The slope between the shortest and the longest stream is bytes an
example. Run ``python benchmarks/streams.py``.
"""

from __future__ import annotations

import argparse
import logging
import os
import resource
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_influence import InfluenceAudit

FEATURES = 768
LENGTHS = (5_000, 20_000)


class Made(IterableDataset[Any]):
    """Examples that are made when they are asked for."""

    def __init__(self, size: int, classes: int) -> None:
        self.size, self.classes = size, classes

    def __iter__(self) -> Iterator[Any]:
        generator = torch.Generator().manual_seed(0)
        for k in range(self.size):
            x = torch.randn(FEATURES, generator=generator)
            yield {"x": x, "y": int(x[: self.classes].argmax()), "key": f"row{k:07d}"}


class Network(pl.LightningModule):
    """A perceptron with one hidden layer."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(FEATURES, 32), nn.ReLU(), nn.Linear(32, classes))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch["x"]), batch["y"])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def peak(size: int, classes: int, tracin: str) -> int:
    """Train and audit on a stream of a length; return the largest memory of this process, in bytes."""
    logging.disable(logging.WARNING)
    torch.manual_seed(0)
    quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    callbacks = [InfluenceAudit(sample_id="key", tracin=tracin)] if tracin != "no audit" else []  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory() as directory, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = pl.Trainer(
            max_epochs=2,
            accelerator="cpu",
            enable_checkpointing=False,
            default_root_dir=directory,
            callbacks=callbacks,
            **quiet,
        )
        trainer.fit(Network(classes), DataLoader(Made(size, classes), 64))
    assert not callbacks or len(callbacks[0].report.columns["id"]) == size
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def slope(classes: int, tracin: str) -> float:
    """Return bytes an example, between the shortest and the longest stream."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    peaks = []
    for size in LENGTHS:
        command = [sys.executable, __file__, "--size", str(size), "--classes", str(classes), "--tracin", tracin]
        told = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
        peaks.append(int(told.split()[-1]))
    return (peaks[1] - peaks[0]) / (LENGTHS[1] - LENGTHS[0])


def main() -> None:
    """Print a line for each way to audit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int)
    parser.add_argument("--classes", type=int, default=2)
    parser.add_argument("--tracin", default="epoch")
    options = parser.parse_args()
    if options.size:
        print(peak(options.size, options.classes, options.tracin))
        return
    for classes in (2, 10):
        for tracin in ("no audit", "step", "epoch"):
            print(f"{classes:3d} classes, {tracin:9s} {slope(classes, tracin):8.0f} bytes an example", flush=True)


if __name__ == "__main__":
    main()
