"""What preconditioners save: steps of conjugate gradients with the GGN of a small network, for several dampings.

The network and the queries are those of the digits in ``lds.py``. The GGN is formed once, so that a step is a matrix
product and the exact block-diagonal GGN can be tried as a preconditioner, too: no approximation of it, EK-FAC included,
can be expected to do better than it does itself. Run ``make solvers``.

    python benchmarks/solvers.py --cnn          what ``solver="woodbury"`` takes for 100 queries of a CNN
"""

from __future__ import annotations

import argparse
import importlib.metadata
import time
from collections.abc import Callable
from pathlib import Path

import torch
from lds_methods import digits, task
from networks import digits as images_of_digits
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_influence import Influence
from lightning_influence.curvature import (
    BlockCoordinates,
    BlockCurvature,
    FactorExamples,
    GGNProduct,
    cg,
    fit,
    nystrom_preconditioner,
    sampled,
)
from lightning_influence.scores import prepared_queries

Product = Callable[[Tensor], Tensor]
QUERIES = 20
TOLERANCE = 1e-4
FACTORS = (10.0, 1.0, 0.1)
EXAMPLES, ASKED = 2000, 100


def main() -> None:
    """Count steps and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="markdown file to write")
    parser.add_argument("--cnn", action="store_true", help="100 queries of a convolutional network instead")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    if arguments.cnn:
        convolutional()
        return
    setting = digits()
    setting.train_full()
    setting.become(0)
    influence, everything = setting.influence(), range(setting.examples)
    gradients = influence.training
    coordinates = BlockCoordinates(gradients.coverage.blocks)
    product = GGNProduct(gradients, everything, parameters=coordinates.parameters)
    places = coordinates.places_in(product.flat)
    matrix = product.to_dense().double()[places][:, places]
    identity = fit(gradients, "identity", everything, examples=FactorExamples(1, 1), labels=("true", "true"))
    prepared = next(iter(prepared_queries(identity, influence.queries(setting.asked)[0], [list(range(QUERIES))])))
    systems = coordinates.join(prepared.vectors).double()
    ekfac = fit(
        gradients,
        "ekfac",
        everything,
        examples=FactorExamples(setting.examples, setting.examples),
        labels=("exact", "exact"),
    )
    assert isinstance(ekfac, BlockCurvature)
    by_block = torch.zeros_like(matrix)
    for part in coordinates.slices().values():
        by_block[part, part] = matrix[part, part]

    lines = ["| damping λ | none | EK-FAC | exact block GGN | Nyström, rank 100 |", "|---|---|---|---|---|"]
    for factor in FACTORS:
        damping = factor * setting.trainer_damping
        inverse = torch.linalg.inv(by_block + damping * torch.eye(len(matrix), dtype=torch.float64))
        sketch = nystrom_preconditioner(lambda v: v @ matrix, systems, 100, damping)
        preconditioners: list[Product | None] = [
            None,
            lambda v, damping=damping: _in_blocks(ekfac, coordinates, v, damping),
            lambda v, inverse=inverse: v @ inverse,
            sketch,
        ]
        cells = []
        for preconditioner in preconditioners:
            solution = cg(
                lambda v: v @ matrix,
                systems,
                damping,
                preconditioner=preconditioner,
                tolerance=TOLERANCE,
                max_steps=2000,
            )
            cells.append(f"{solution.steps.double().mean():.0f}" + ("" if solution.converged.all() else " (no)"))
        lines.append(f"| {damping:.1e} ({factor:g} x trainer) | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    text = (
        "# Steps of conjugate gradients, by preconditioner\n\n"
        f"Written by `benchmarks/solvers.py`, torch {importlib.metadata.version('torch')}. {setting.title}, "
        f"{coordinates.size:,} parameters, GGN of {setting.examples:,} examples, mean over {QUERIES} queries, relative "
        f"residual {TOLERANCE:g}.\n\n" + "\n".join(lines) + "\n\n"
        "The large eigenvalues of this GGN belong to directions that run across layers. A block-diagonal "
        "preconditioner, be it the exact blocks, does not see them, so EK-FAC saves nothing here; on a model of one "
        "layer it takes less than half the steps (`tests/test_products.py`). The sketch, which is the default, does.\n"
    )
    print(text)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(text)


def convolutional() -> None:
    """Print seconds and residuals for 100 queries of a CNN, by the number of gradients that make the GGN."""
    images, labels = images_of_digits(EXAMPLES + ASKED)
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1),
        nn.GELU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.GELU(),
        nn.Conv2d(32, 32, 3, padding=1),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(32 * 49, 54),
        nn.GELU(),
        nn.Linear(54, 10),
    )
    optimizer, epochs = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9), 8
    for _ in range(epochs):
        for chosen in torch.randperm(EXAMPLES).split(32):
            optimizer.zero_grad()
            task(net, (images[chosen], labels[chosen])).backward()
            optimizer.step()
    damping = 0.1 / (0.02 * epochs * -(-EXAMPLES // 32))
    influence = Influence(net, task, TensorDataset(images[:EXAMPLES], labels[:EXAMPLES]), batch_size=256)
    asked = TensorDataset(images[EXAMPLES:], labels[EXAMPLES:])
    product = GGNProduct(influence.training, range(EXAMPLES))
    start = time.process_time()
    product(torch.randn(4, product.flat.size))
    each = (time.process_time() - start) / 4
    print(f"{product.flat.size:,} parameters; a product of {ASKED} vectors: {ASKED * each:.0f} s (from 4)", flush=True)
    found: dict[int, Tensor] = {}
    for count in (8192, 4096, 2048, 1024):
        sampled._MOST, start = count, time.process_time()
        fitted = influence.fit("ggn", damping=damping, solver="woodbury")
        found[count] = fitted.pairs(asked).scores
        (solve,) = fitted.curvature.solves
        agreement = torch.stack([rank_correlation(a, b) for a, b in zip(found[count], found[8192], strict=True)])
        print(
            f"| {count:,} gradients | {time.process_time() - start:.0f} s | {float(solve.residual.max()):.3f} | "
            f"{float(agreement.mean()):.4f} (least {float(agreement.min()):.4f}) | {solve.steps.max()} steps |",
            flush=True,
        )


def rank_correlation(a: Tensor, b: Tensor) -> Tensor:
    """Return Spearman's correlation."""
    return torch.corrcoef(torch.stack([each.argsort().argsort().double() for each in (a, b)]))[0, 1]


def _in_blocks(curvature: BlockCurvature, coordinates: BlockCoordinates, v: Tensor, damping: float) -> Tensor:
    parts = coordinates.split(v.float())
    solved = {name: curvature.blocks[name].solve(part, damping) for name, part in parts.items()}
    return coordinates.join(solved).double()


if __name__ == "__main__":
    main()
