"""EK-FAC factors and self-influence against an independent implementation, kronfluence 1.0.1.

Only where it is right: zero padding, one group, a summed loss. Its labels can't be handed in, so both sides take
the true ones (the empirical Fisher).
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_influence import Influence
from lightning_influence.curvature import Curvature, CurvatureName, EKFACBlock

N, CLASSES = 60, 5


def mlp() -> tuple[nn.Module, Tensor]:
    net = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 16, bias=False), nn.GELU(), nn.Linear(16, CLASSES))
    return net, torch.randn(N, 20)


def cnn() -> tuple[nn.Module, Tensor]:
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(6, 8, (3, 2), stride=2, padding=(1, 0), bias=False),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, dilation=2, padding=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 16, CLASSES),
    )
    return net, torch.randn(N, 3, 8, 8)


class SummedCrossEntropy(Task):
    """The loss has to be summed there: with a mean, gradients would be `1/batch` of each example's own."""

    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
        assert not sample
        return F.cross_entropy(model(batch[0]), batch[1], reduction="sum")

    def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
        return self.compute_train_loss(batch, model)


def theirs(net: nn.Module, dataset: TensorDataset, folder: Path) -> tuple[dict[str, dict[str, Tensor]], Tensor]:
    """Return every factor by kind and layer, and the self-influence `[n]`."""
    task = SummedCrossEntropy()
    # Freezes the parameters and renames those of the layers.
    model = prepare_model(copy.deepcopy(net), task)
    analyzer = Analyzer("audit", model, task, cpu=True, disable_tqdm=True, output_dir=str(folder))
    analyzer.fit_all_factors(
        "factors",
        dataset,
        per_device_batch_size=20,
        factor_args=FactorArguments(strategy="ekfac", use_empirical_fisher=True),
    )
    analyzer.compute_self_scores(
        "scores",
        "factors",
        dataset,
        per_device_train_batch_size=20,
        score_args=ScoreArguments(damping_factor=None),
    )
    loaded = analyzer.load_covariance_matrices("factors"), analyzer.load_all_factors("factors")
    factors = {kind: layers for part in loaded for kind, layers in part.items()}
    return factors, analyzer.load_self_scores("scores")["all_modules"].double()


def ours(net: nn.Module, dataset: TensorDataset, name: CurvatureName = "ekfac") -> tuple[Curvature, dict[str, Tensor]]:
    influence = Influence(net, F.cross_entropy, dataset, batch_size=16)
    influence = influence.fit(name, fisher="empirical", damping="relative", factor_examples=None)
    return influence.curvature, influence.scores().columns


@pytest.mark.filterwarnings("ignore:.*GradScaler.*:FutureWarning")
@pytest.mark.parametrize("make", [mlp, cnn])
def test_factors_and_self_influence(make: Any, tmp_path: Path) -> None:
    net, inputs = make()
    # Gradients at a random start are nearly the same for all examples of a class; some scale tells them apart.
    with torch.no_grad():
        for parameter in net.parameters():
            parameter *= 1.5
    dataset = TensorDataset(inputs, torch.arange(N) % CLASSES)
    factors, expected = theirs(net.eval(), dataset, tmp_path)
    curvature, found = ours(net, dataset)
    kfac, _ = ours(net, dataset, "kfac")

    assert set(curvature.blocks) == set(factors["activation_covariance"])
    for layer, block in curvature.blocks.items():
        assert isinstance(block, EKFACBlock)
        for kind, basis in zip(("activation", "gradient"), block.basis, strict=True):
            covariance = factors[f"{kind}_covariance"][layer]
            assert basis is not None
            rotated = basis[0].mT @ covariance @ basis[0]
            off_diagonal = rotated - rotated.diagonal().diag()
            assert off_diagonal.norm() < 1e-4 * covariance.norm(), (layer, kind)
            assert (covariance - covariance.diagonal().diag()).norm() > 0.05 * covariance.norm()

        # The moments' size: K-FAC is their product. Our activations are summed over positions, theirs are a mean.
        of_x, of_g = (
            factors[f"{kind}_covariance"][layer] / factors[f"num_{kind}_covariance_processed"][layer]
            for kind in ("activation", "gradient")
        )
        positions = factors["num_activation_covariance_processed"][layer].item() / N
        product = torch.kron(of_g, positions * of_x)
        assert (kfac.blocks[layer].to_dense()[0] - product).norm() < 1e-4 * product.norm()

        # In their basis, as eigenvectors are only unique up to sign, and up to a rotation where eigenvalues coincide.
        lam = factors["lambda_matrix"][layer] / factors["num_lambda_processed"][layer]
        Q_A, Q_B = (factors[f"{kind}_eigenvectors"][layer] for kind in ("activation", "gradient"))
        dense = torch.kron(Q_B, Q_A) @ torch.diag(lam.reshape(-1)) @ torch.kron(Q_B, Q_A).T
        error = (block.to_dense()[0] - dense).norm() / dense.norm()
        assert error < 1e-3, layer
        assert float(block.damping()) == pytest.approx(0.1 * float(lam.mean()), rel=1e-3)

    torch.testing.assert_close(found["self_influence"], expected, rtol=1e-3, atol=0)
    # The best multiple of the squared gradient norms is nowhere near.
    norms = found["grad_norm_squared"]
    identity = norms * (expected / norms).median()
    assert ((identity - expected).abs() / expected).max() > 0.2
