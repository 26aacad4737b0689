"""What recording adds to the time of a training step: training dynamics, and TracIn in flight.

Three networks train under a Lightning Trainer in batches of 32: an MLP 784-256-256-10, the CNN of
``examples/01_mislabelled_digits.py`` without its dropout, and a transformer of four layers (width 128, 64 positions).
Batches without recording, with the training dynamics alone, and with TracIn in flight, too, follow each other in one
training run, so that all three meet the machine in the same state. Medians of the time from one batch to the next are
compared; to those with recording their share of what is computed for many batches at once is added. The clock is
CPU time with one thread by default, which other work on the machine disturbs less; ``--wall`` takes the time of day and
all threads. Run ``python benchmarks/in_flight.py``.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import InfluenceAudit

_WARM_UP = 12
WAYS = ("nothing", "dynamics", "in flight")


class Transformer(nn.Module):
    """A classifier of sequences."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(128, 4, 512, dropout=0.0, batch_first=True, norm_first=True)
        self.words = nn.Embedding(100, 128)
        self.layers = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.head = nn.Linear(128, 10)

    def forward(self, ids: Tensor) -> Tensor:
        """Return logits ``[n, 10]`` for ``[n, 64]``."""
        result: Tensor = self.head(self.layers(self.words(ids)).mean(1))
        return result


def mlp() -> nn.Module:
    """784-256-256-10."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)
    )


def cnn() -> nn.Module:
    """Two convolutions and two linear layers."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(32 * 7 * 7, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


class Module(pl.LightningModule):
    """Cross-entropy."""

    def __init__(self, net: nn.Module, optimizer: str) -> None:
        super().__init__()
        self.net, self.optimizer = net, optimizer

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the mean loss."""
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return SGD with momentum, or Adam."""
        if self.optimizer == "adam":
            return torch.optim.Adam(self.parameters(), lr=1e-3)
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


class Alternating(InfluenceAudit):
    """Records in turn nothing, the training dynamics, and TracIn in flight, too; only what it adds to a step."""

    def __init__(self, clock: Callable[[], float]) -> None:
        super().__init__(tracin="step", curvature="identity", verify=False)
        self.clock = clock
        self.steps: dict[str, list[float]] = {way: [] for way in WAYS}
        self.batches = 0
        self.flushed = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Set up, and time what is computed for many batches at once."""
        super().on_train_start(trainer, pl_module)
        recording = self._recording
        assert recording is not None
        assert self._run is not None
        self.in_flight = self._run.flight
        flush = recording.dynamics.flush

        def timed() -> None:
            start = self.clock()
            flush()
            self.flushed += self.clock() - start

        recording.dynamics.flush = timed  # type: ignore[method-assign]

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note the time, and set up what this batch is recorded with."""
        now, way = self.clock(), WAYS[self.batches % 3]
        if self.batches > _WARM_UP and batch_idx:
            self.steps[WAYS[(self.batches - 1) % 3]].append(now - self.before)
        self.batches += 1
        self.before = self.clock()
        assert self._run is not None
        self._run.flight = self.in_flight if way == "in flight" else None
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if way == "nothing":
            self._run.stop_listening()

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        """Record it if this batch is recorded."""
        if WAYS[(self.batches - 1) % 3] != "nothing":
            super().on_before_optimizer_step(trainer, pl_module, optimizer)
        elif self.in_flight is not None and self.in_flight._flight is not None:
            self.in_flight._flight.stepped()

    def on_train_epoch_end(self, *_: Any) -> None:
        """Do nothing."""

    def on_train_end(self, *_: Any) -> None:
        """Compute what waits."""
        assert self._recording is not None
        self._recording.dynamics.flush()

    def result(self) -> tuple[float, float, float]:
        """Return the seconds of a plain step, and what the other two add, as shares of it."""
        plain, dynamics, flight = (statistics.median(self.steps[way]) for way in WAYS)
        share = self.flushed / (2 * self.batches / 3)
        return plain, (dynamics + share) / plain - 1, (flight + share) / plain - 1


def measure(make: Callable[[], nn.Module], data: TensorDataset, optimizer: str, steps: int, clock: Any) -> Any:
    """Train for a while and return what ``Alternating.result`` says."""
    torch.manual_seed(0)
    audit = Alternating(clock)
    with tempfile.TemporaryDirectory() as directory:
        trainer = pl.Trainer(
            max_steps=steps, callbacks=[audit], logger=False, accelerator="cpu", default_root_dir=directory,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(Module(make(), optimizer), DataLoader(data, 32, shuffle=True))
    return audit.result()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600, help="of the MLP; the others take a half and a fourth")
    parser.add_argument("--wall", action="store_true", help="time of day and all threads instead of CPU time")
    parser.add_argument("--only", default="", help="name of a network")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    clock = time.perf_counter if arguments.wall else time.process_time
    if not arguments.wall:
        torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(10, (2000,), generator=generator)
    images = TensorDataset(torch.randn(2000, 1, 28, 28, generator=generator), labels)
    sentences = TensorDataset(torch.randint(100, (2000, 64), generator=generator), labels)
    networks: list[tuple[str, Callable[[], nn.Module], TensorDataset, int]] = [
        ("MLP", mlp, images, arguments.steps),
        ("CNN", cnn, images, arguments.steps // 2),
        ("transformer", Transformer, sentences, arguments.steps // 4),
    ]
    kind = "wall" if arguments.wall else "CPU"
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {kind} time")
    print(f"{'network':<13}{'optimizer':<11}{'step':>10}{'dynamics':>11}{'+ in flight':>13}{'in flight alone':>17}")
    for name, make, data, steps in networks:
        for optimizer in ("sgd", "adam"):
            if arguments.only in ("", name):
                plain, dynamics, both = measure(make, data, optimizer, steps, clock)
                cells = f"{dynamics:>11.1%}{both:>13.1%}{both - dynamics:>17.1%}"
                print(f"{name:<13}{optimizer:<11}{1e3 * plain:>7.2f} ms{cells}", flush=True)


if __name__ == "__main__":
    main()
