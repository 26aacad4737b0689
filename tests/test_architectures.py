"""Audits of known architectures, trained for two steps, against autograd one example at a time."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference as ref
import torch
from architectures import ARCHITECTURES, Architecture, Batch, Wrapped
from models import make_trainer
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_influence import AuditReport, Influence, InfluenceAudit


def own_loss(module: Any, batch: Batch) -> Tensor:
    loss: Tensor = module.training_step(batch, 0)
    return loss


def alone(architecture: Architecture, module: Wrapped) -> dict[str, Tensor]:
    """Return every example's gradients from a batch of its own, without padding, in float64.

    A mean over the words of a batch gives every word the same weight: the loss of an example is the sum over its own
    words, over the mean number of words.
    """
    examples = Architecture(architecture.make, architecture.examples).data()
    gradients = ref.gradients_alone(module.eval(), own_loss, [architecture.collate([example]) for example in examples])
    words = torch.tensor([architecture.weigh(example) for example in examples]).double()
    scale = words / words.mean()
    return {name: scale.view(-1, *[1] * (g.ndim - 1)) * g.double() for name, g in gradients.items()}


def door(architecture: Architecture, module: Wrapped, data: Any, batch_size: int) -> Influence:
    # Parts of T5 are in single precision whatever its weights are, which the look at a float64 model does not expect.
    loader = DataLoader(data, batch_size=batch_size, collate_fn=architecture.collate)
    return Influence(module, None, loader, verify=False)


def tolerance(architecture: Architecture) -> float:
    return 1e-6 if architecture.dtype == torch.float64 else 2e-3


@cache
def audited(name: str, directory: Path) -> tuple[AuditReport, Wrapped]:
    architecture = ARCHITECTURES[name]
    torch.manual_seed(0)
    # Half a hundred layers of this one: its factors take longer than everything else here.
    audit = InfluenceAudit(curvature="identity" if name == "MobileNetV2" else "ekfac")
    module = architecture.module()
    data: Any = architecture.data()
    loader = DataLoader(data, batch_size=4, collate_fn=architecture.collate, shuffle=True)
    make_trainer(directory, callbacks=[audit], max_steps=2).fit(module, loader)
    assert audit.has_report
    return audit.report, module


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_audit(name: str, directory: Path) -> None:
    """Everything that is trained is understood, and every example has its own gradient's norm."""
    architecture = ARCHITECTURES[name]
    report, module = audited(name, directory)
    assert report.status == "complete"
    coverage = report.manifest["coverage"]
    assert coverage["share"] >= 0.99, coverage["uncovered"]
    expected = torch.zeros(len(report)).double()
    for parameter, gradient in alone(architecture, module).items():
        if parameter not in coverage["uncovered"]:
            expected += gradient.flatten(1).square().sum(1)
    found = torch.as_tensor(np.asarray(report.columns["grad_norm_squared"]))
    torch.testing.assert_close(found, expected, rtol=tolerance(architecture), atol=0)
    assert expected.max() > 1.01 * expected.min()
    assert np.isfinite(report.columns["self_influence"]).all()


@pytest.mark.parametrize("name", ["BERT", "GPT-2", "T5", "ViT", "Swin", "ResNet", "ConvNeXt"])
def test_self_influence(name: str, directory: Path) -> None:
    """`gᵀ (C + λ)⁻¹ g`, where `g` is what autograd gives for the example alone and `C` what was fitted."""
    architecture = ARCHITECTURES[name]
    _, module = audited(name, directory)
    gradients = alone(architecture, module)
    influence = door(architecture, module, architecture.data(), 3)
    influence = influence.fit("ekfac", fisher="empirical", factor_examples=None)
    vectors: dict[str, Tensor] = {}
    for block in influence.coverage.blocks.values():
        rows = [block.from_parameters({key: gradients[key][i] for key in block.parameters}) for i in influence.examples]
        vectors[block.name] = torch.stack(rows).to(architecture.dtype)
    solved = influence.curvature.solve(vectors)
    expected = sum((solved[key] * vectors[key]).flatten(1).sum(1).double() for key in vectors)
    scores = influence.scores().columns
    torch.testing.assert_close(scores["self_influence"], expected, rtol=10 * tolerance(architecture), atol=0)
    ratio = scores["self_influence"] / scores["grad_norm_squared"]
    assert ratio.max() > 1.1 * ratio.min(), "the identity gives one and the same ratio"


@pytest.mark.parametrize("order", ["lengths differ at first", "lengths agree at first"])
def test_the_length_of_the_longest_text_does_not_matter(order: str) -> None:
    """Padding changes shapes from batch to batch, and without any, T5 takes another path to its relative biases."""
    architecture = ARCHITECTURES["T5"]
    torch.manual_seed(0)
    module = architecture.module().eval()
    data: Any = architecture.data()
    if order == "lengths agree at first":
        data.sort(key=lambda example: len(example["input_ids"]) != 7)
    results = [door(architecture, module, data, size).scores().columns for size in (2, 7)]
    assert all(bool(columns["finite"].all()) for columns in results)
    norms = [columns["grad_norm_squared"] for columns in results]
    torch.testing.assert_close(norms[0], norms[1], rtol=1e-6, atol=0)
