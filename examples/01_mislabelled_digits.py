"""Find wrong labels in real digits: train a small CNN with 10 % of its labels flipped, and read the audit.

Run with ``make demo``, or ``python examples/01_mislabelled_digits.py --help`` for other settings.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import lightning as L
from digits import Digits, noisy_digits
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.data import DataLoader

from lightning_influence import InfluenceAudit


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
    # Without known_noise in real life: it only measures the detection.
    audit = InfluenceAudit(known_noise=flipped, queries="worst")
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
    print(f"Look at it:  tensorboard --logdir {arguments.logs} (tab Influence)")
    print(f"or:          lightning-influence view {arguments.logs}")


if __name__ == "__main__":
    main()
