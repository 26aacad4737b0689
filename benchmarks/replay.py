"""What a replay costs, in trainings: the run once more to see that it is the same, and back through it with queries.

All of it in one process, CPU time. Trainings are those of Lightning's trainer without loggers, of which a plain loop is
a part: the share is in the table.

    python benchmarks/replay.py                 digits MLP and CNN, some minutes
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import lightning as L
import torch
from replay_runs import Setting, passes, settings, train
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence.replay.scores import replay_measurement, replay_scores


def seconds(work: Callable[[], object], times: int = 3) -> float:
    """Return the least CPU time that something took."""
    taken = []
    for _ in range(times):
        start = time.process_time()
        work()
        taken.append(time.process_time() - start)
    return min(taken)


def fitted(setting: Setting) -> None:
    """Train by a trainer."""

    class Classifier(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = setting.net()

        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return setting.optimizer(self.parameters())

    trainer = L.Trainer(
        max_epochs=setting.epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = DataLoader(TensorDataset(*setting.data), setting.batch_size, shuffle=True, drop_last=True)
    trainer.fit(Classifier(), data)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="digits", help="part of a title")
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--queries", type=int, nargs="*", default=[1, 8, 32])
    chosen = parser.parse_args()
    asked = " | ".join(f"{q} queries" for q in chosen.queries)
    print(f"| in trainings | one training | plain loop | verified | mean of 50 queries | {asked} |")
    print("|" + " --- |" * (5 + len(chosen.queries)))
    for setting in settings():
        if chosen.only not in setting.title:
            continue
        train(setting)  # the first one has more to set up
        plain = seconds(partial(fitted, setting), chosen.times)
        loop = seconds(partial(train, setting), chosen.times) / plain
        module, rerun = train(setting, record=True)
        assert rerun is not None
        queries = passes(module, setting.queries, passes(module, setting.data))
        verified = seconds(rerun.verify, chosen.times) / plain
        every = [(queries, range(len(setting.queries[1])))]
        whole = seconds(partial(replay_measurement, rerun, every), chosen.times) / plain
        found = [
            seconds(partial(replay_scores, rerun, queries, range(q)), chosen.times) / plain for q in chosen.queries
        ]
        cells = " | ".join(f"{value:.1f}" for value in (loop, verified, whole, *found))
        print(f"| {setting.title} | {plain:.2f} s | {cells} |", flush=True)


if __name__ == "__main__":
    main()
