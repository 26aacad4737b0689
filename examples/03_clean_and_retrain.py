"""Does acting on the audit help? Retrain on what it leaves, and on the labels that it suggests.

A small network learns 4,000 real digits, 10 % of them with flipped labels, long enough to memorise most. Then it is
trained again from the same start: without what the audit is sure enough of, with its suggested labels there, without as
many random examples, and as an oracle would that knows the flips. What counts is the accuracy on 1,000 clean digits
that neither training nor audit has seen.

Run with ``make clean-and-retrain``, or ``python examples/03_clean_and_retrain.py --seeds 3`` for the mean of three.
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from digits import Digits, noisy_digits
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from lightning_influence import InfluenceAudit

EPOCHS = 20


class Memoriser(Digits):
    """Wide layers and no dropout: a network that learns wrong labels by heart, so that they cost accuracy."""

    def __init__(self, net: str = "mlp") -> None:
        super().__init__(learning_rate=0.05)
        mlp = (nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
        without_dropout = [layer for layer in self.net if not isinstance(layer, nn.Dropout)]
        self.net = nn.Sequential(*(mlp if net == "mlp" else without_dropout))

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        # The rate falls to nothing: else where training happens to stop is a percent of noise.
        schedule = CosineAnnealingLR(optimizer, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def trained(data: Dataset[Any], net: str, epochs: int, seed: int, *callbacks: L.Callback) -> Digits:
    """Train from scratch; every training of a seed starts with the same weights."""
    L.seed_everything(seed, verbose=False)
    model = Memoriser(net)
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(data, batch_size=32, shuffle=True))
    return model


@torch.no_grad()
def accuracy(model: Digits, test: TensorDataset) -> float:
    """Return the share of test digits that the model reads rightly."""
    images, labels = test.tensors
    return float((model.eval()(images).argmax(1) == labels).double().mean())


def run(net: str, seed: int, epochs: int, noise: float, logs: Path) -> dict[str, float]:
    """Train, audit, act on it, and return the test accuracy of every training."""
    train, test, flipped = noisy_digits(noise, seed)
    everything = set(range(len(train)))

    audit = InfluenceAudit(known_noise=flipped, dirpath=logs / f"seed_{seed}")  # known_noise only measures detection
    found = {"all examples, flips included": accuracy(trained(train, net, epochs, seed, audit), test)}
    report = audit.report
    assert report is not None

    print(report.advice())
    kept = report.clean_indices()
    random = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[: len(kept)].tolist()
    true_labels, _, _ = noisy_digits(0.0, seed)  # the same digits in the same order
    data: dict[str, Dataset[Any]] = {
        "without as many random examples": Subset(train, random),
        "without what is sure enough": Subset(train, kept),
        "without the most suspicious tenth": Subset(train, report.clean_indices(drop=0.1)),
        "with the suggested labels": report.relabelled(train),
        "without the flips (oracle)": Subset(train, sorted(everything - set(flipped.tolist()))),
        "with the true labels (oracle)": true_labels,
    }
    for name, examples in data.items():
        found[name] = accuracy(trained(examples, net, epochs, seed), test)

    dropped, wrong = everything - set(kept), set(flipped.tolist())
    right = sum(int(train[n][1]) != int(true_labels[n][1]) for n in dropped)
    print(f"seed {seed}: {len(dropped)} left out, {right} of the {len(wrong)} flips among them")
    return found


def recovered(found: dict[str, float], name: str, oracle: str) -> str:
    """Say how much of what the oracle gains over all examples is gained without knowing the flips."""
    before = found["all examples, flips included"]
    gained, possible = found[name] - before, found[oracle] - before
    return f"{gained / possible:.0%} of {possible:+.1%}" if possible > 0 else "the flips do no harm here"


def main() -> None:
    """Run the seeds and print their mean."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1, help="how many")
    parser.add_argument("--net", choices=("mlp", "cnn"), default="mlp")
    parser.add_argument("--seed", type=int, default=0, help="the first one")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--noise", type=float, default=0.1, help="share of training labels to flip")
    parser.add_argument("--logs", type=Path, default=Path("demo_logs/clean_and_retrain"))
    arguments = parser.parse_args()
    # Six trainings in a row: what Lightning says about each is not what this is about.
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")

    start = time.perf_counter()
    seeds = range(arguments.seed, arguments.seed + arguments.seeds)
    runs = [run(arguments.net, seed, arguments.epochs, arguments.noise, arguments.logs) for seed in seeds]
    mean = {name: sum(each[name] for each in runs) / len(runs) for name in runs[0]}
    print(f"\n{'accuracy on 1,000 clean test digits':<38}{'mean':>8}" + "".join(f"{f'seed {s}':>9}" for s in seeds))
    for name, value in mean.items():
        print(f"{name:<38}{value:>8.1%}" + "".join(f"{each[name]:>9.1%}" for each in runs))
    removal = recovered(mean, "without what is sure enough", "without the flips (oracle)")
    tenth = recovered(mean, "without the most suspicious tenth", "without the flips (oracle)")
    repair = recovered(mean, "with the suggested labels", "with the true labels (oracle)")
    print(
        f"\nRecovered of what the oracle recovers: {removal} by removal, {tenth} by removal of a tenth, "
        f"{repair} by repair."
    )
    print(f"Took {time.perf_counter() - start:.0f} s.")


if __name__ == "__main__":
    main()
