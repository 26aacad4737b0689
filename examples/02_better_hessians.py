"""What each approximation of the Hessian gives away, on a network that was just trained.

Trains a small network on handwritten digits, computes Hessian, GGN, block GGN, EK-FAC and K-FAC as dense matrices,
and draws what is lost on the way down. Run ``python examples/02_better_hessians.py --help`` for settings.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import lightning as L
import matplotlib as mpl
import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt
from matplotlib.colors import LogNorm
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import Influence
from lightning_influence.curvature import TITLES, Chain

COLOURS = dict(zip(TITLES, ("#1b1b3a", "#3d5a98", "#2a9d8f", "#e9a23b", "#c8553d"), strict=True))


class Digits(L.LightningModule):
    """A multilayer perceptron."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(64, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, 10)
        )

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.03, momentum=0.9, weight_decay=1e-3)


def digits() -> TensorDataset:
    """Return 1,400 digits of 8 x 8 pixels, standardised."""
    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:1400]
    inputs = torch.from_numpy(pixels).float()[order]
    return TensorDataset((inputs - inputs.mean(0)) / (inputs.std(0) + 1e-6), torch.from_numpy(labels).long()[order])


def chain_of(module: Digits, data: TensorDataset) -> Chain:
    """Compute the chain, in float64: the smallest eigenvalues are part of the picture."""
    inputs, labels = data.tensors
    net = module.net.double().eval()
    return Influence(net, F.cross_entropy, TensorDataset(inputs.double(), labels), batch_size=200).chain()


def draw(chain: Chain, path: Path) -> None:
    """Draw the error of every step, the spectra, and the GGN with its blocks."""
    mpl.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(15, 4.8), width_ratios=(1.15, 1, 1), layout="constrained"
    )

    names = [f"{TITLES[step.start]}\n→ {TITLES[step.end]}" for step in chain.steps]
    errors = [step.error for step in chain.steps]
    bars = left.bar(names, errors, color=[COLOURS[step.end] for step in chain.steps], width=0.62)
    left.bar_label(bars, [f"{error:.2f}" for error in errors], padding=3)
    left.set_title("What each step gives away", loc="left", weight="bold")
    left.set_ylabel("‖A − B‖ / ‖A‖  (Frobenius)")
    left.set_ylim(0, max(errors) * 1.15)

    for name, matrix in chain.matrices.items():
        values = torch.linalg.eigvalsh(matrix).flip(0).clamp(min=1e-12)
        middle.plot(range(1, len(values) + 1), values, color=COLOURS[name], label=TITLES[name], linewidth=1.8)
    middle.set(xscale="log", yscale="log", ylim=(1e-7, None), xlabel="rank", ylabel="eigenvalue")
    middle.set_title("Positive eigenvalues of each curvature", loc="left", weight="bold")
    middle.legend(frameon=False)

    size = len(chain.matrices["ggn"])
    pixel = max(1, size // 500)
    shown = F.max_pool2d(chain.matrices["ggn"].abs()[None, None].float(), pixel)[0, 0]
    image = right.imshow(
        shown,
        norm=LogNorm(float(shown.max()) * 1e-4, float(shown.max())),
        cmap="magma",
        extent=(0, size, size, 0),
        interpolation="nearest",
    )
    for part in list(chain.blocks.values())[:-1]:
        right.axhline(part.stop, color="white", linewidth=0.8)
        right.axvline(part.stop, color="white", linewidth=0.8)
    centres = [(part.start + part.stop) / 2 for part in chain.blocks.values()]
    labels = [f"layer {number}" for number in range(1, len(centres) + 1)]
    right.set_xticks(centres, labels)
    right.set_yticks(centres, labels, rotation=90, va="center")
    right.tick_params(length=0)
    right.spines[:].set_visible(False)
    share = chain.off_block_energy["ggn"]
    right.set_title(f"|GGN|: {share:.0%} of its energy lies between layers", loc="left", weight="bold")
    figure.colorbar(image, ax=right, shrink=0.8, label="absolute value")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    """Train, compute, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=20, help="hidden units per layer (default 20)")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("better_hessians.png"), help="picture to write")
    arguments = parser.parse_args()

    L.seed_everything(arguments.seed, verbose=False)
    data, module = digits(), Digits(arguments.width)
    trainer = L.Trainer(
        max_epochs=arguments.epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(data, batch_size=32, shuffle=True, drop_last=True))
    start = time.perf_counter()
    chain = chain_of(module, data)
    print(f"\n{chain}\n")
    draw(chain, arguments.out)
    print(f"{len(chain.matrices['ggn']):,} parameters, chain in {time.perf_counter() - start:.0f} s.")
    print(f"The picture:  {arguments.out}")


if __name__ == "__main__":
    main()
