"""What an audit keeps of each example: peak memory of whole fits, and what checkpoints gain.

Each fit is in a process of its own, with and without the audit, on examples that are made when they are asked for (as a
data set with an index, and as a stream whose ids are texts of ten letters), so that memory is that of training and
audit, not of data; its peak is what the system tells. Differences between two lengths are bytes an example, which do
not depend on how much the libraries take. Run ``make memory``; ``--sites`` tells of one audited fit what is held at the
moment when memory is at its peak, by the line that made it.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import resource
import subprocess
import sys
import tempfile
import threading
import tracemalloc
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_influence import InfluenceAudit

INPUTS, WIDTH, BATCH = 64, 32, 256
MB = 2**20
WAVES = torch.arange(1, INPUTS + 1) ** 0.5


def example(k: int, classes: int) -> dict[str, Any]:
    """Return an example that is made of its number."""
    x = torch.sin(k * WAVES)
    return {"x": x, "y": int(x[:classes].argmax()), "key": f"row{k:07d}"}


class Made(Dataset[Any]):
    """Examples that are made when they are asked for, by number."""

    def __init__(self, size: int, classes: int) -> None:
        self.size, self.classes = size, classes

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, k: int) -> dict[str, Any]:
        return example(k, self.classes)


class Flow(IterableDataset[Any]):
    """The same in a stream."""

    def __init__(self, size: int, classes: int) -> None:
        self.size, self.classes = size, classes

    def __iter__(self) -> Iterator[Any]:
        return (example(k, self.classes) for k in range(self.size))


class Network(pl.LightningModule):
    """A perceptron with one hidden layer."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(INPUTS, WIDTH), nn.ReLU(), nn.Linear(WIDTH, classes))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch["x"]), batch["y"])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def fit(kind: str, size: int, classes: int, tracin: str) -> dict[str, int]:
    """Train, with an audit or without; return the largest memory of this process and the size of a checkpoint."""
    logging.disable(logging.WARNING)
    torch.manual_seed(0)
    quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    audit: list[Any] = []
    if tracin != "plain":
        way: Any = None if tracin == "none" else tracin
        audit = [InfluenceAudit(sample_id="key" if kind == "stream" else None, tracin=way)]
    data: Any = Flow(size, classes) if kind == "stream" else Made(size, classes)
    with tempfile.TemporaryDirectory() as directory, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = pl.Trainer(
            max_epochs=2,
            accelerator="cpu",
            enable_checkpointing=False,
            default_root_dir=directory,
            callbacks=audit,
            **quiet,
        )
        trainer.fit(Network(classes), DataLoader(data, BATCH))
        assert not audit or len(audit[0].report) == size
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        trainer.save_checkpoint(path := Path(directory) / "last.ckpt")
        return {"peak": peak, "checkpoint": path.stat().st_size}


def in_process(kind: str, size: int, classes: int, tracin: str, *more: str) -> str:
    """Return what a process of its own prints."""
    command = [sys.executable, __file__, "--fit", kind, str(size), str(classes), tracin, *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    return subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout


class Watch:
    """Looks at what is held whenever memory has grown: arrays by the line that made them, tensors by shape."""

    def __init__(self) -> None:
        self.peak, self.found = 0, ""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Watch:
        tracemalloc.start(8)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(0.02):
            with open("/proc/self/statm") as file:
                now = int(file.read().split()[1]) * resource.getpagesize()
            if now > self.peak + 4 * MB:
                self.peak, self.found = now, held(now)


def held(now: int) -> str:
    """Return the largest things that are held."""
    tensors: Counter[str] = Counter()
    seen = set()
    for each in gc.get_objects():
        if type(each) is Tensor and (place := each.untyped_storage().data_ptr()) not in seen:
            seen.add(place)
            tensors[f"tensor {list(each.shape)} {each.dtype}"] += each.untyped_storage().nbytes()
    arrays = tracemalloc.take_snapshot().statistics("lineno")
    lines = [f"{now / MB:.0f} MB resident"]
    lines += [f"{size / MB:8.1f} MB  {what}" for what, size in tensors.most_common(12)]
    lines += [f"{each.size / MB:8.1f} MB  {each.traceback}" for each in arrays[:15]]
    return "\n".join(lines)


def main() -> None:
    """Print a line for each kind of data and way to audit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, nargs=2, default=(20_000, 200_000))
    parser.add_argument("--classes", type=int, nargs="+", default=(2, 10))
    parser.add_argument("--tracin", nargs="+", default=("step", "epoch"))
    parser.add_argument("--kinds", nargs="+", default=("map", "stream"))
    parser.add_argument("--sites", action="store_true")
    parser.add_argument("--fit", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.fit:
        kind, size, classes, tracin = options.fit
        if options.sites:
            with Watch() as watch:
                fit(kind, int(size), int(classes), tracin)
            print(watch.found)
        else:
            print(json.dumps(fit(kind, int(size), int(classes), tracin)))
        return
    few, many = options.examples
    print(f"torch {torch.__version__}, {WIDTH} features, beside plain training", flush=True)
    for kind in options.kinds:
        for classes in options.classes:
            if options.sites:
                print(kind, classes, in_process(kind, many, classes, options.tracin[0], "--sites"), flush=True)
                continue
            plain = [json.loads(in_process(kind, size, classes, "plain")) for size in (few, many)]
            for tracin in options.tracin:
                found = [json.loads(in_process(kind, size, classes, tracin)) for size in (few, many)]
                extra = {name: [a[name] - b[name] for a, b in zip(found, plain, strict=True)] for name in plain[0]}
                each = {name: (values[1] - values[0]) / (many - few) for name, values in extra.items()}
                print(
                    f"{kind:7s}{classes:4d} classes, tracin={tracin:6s}"
                    f"{extra['peak'][0] / MB:7.0f} MB at {few:,},{extra['peak'][1] / MB:7.0f} MB at {many:,}:"
                    f"{each['peak']:7.0f} bytes an example, {each['checkpoint']:5.0f} in checkpoints",
                    flush=True,
                )


if __name__ == "__main__":
    main()
