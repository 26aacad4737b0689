"""Layers that project the same input share its factor: found by tracing, held against every batch."""

from __future__ import annotations

import math
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from own_processes import together
from test_saved import through_disk
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_influence.curvature import Curvature, FactorExamples, fit
from lightning_influence.curvature.curvature import BlockCurvature
from lightning_influence.curvature.registry import decompositions, fitted_bytes
from lightning_influence.curvature.saved import restored
from lightning_influence.data.source import ExampleSource
from lightning_influence.gradients.coverage import Coverage
from lightning_influence.gradients.discover import discover
from lightning_influence.gradients.passes import ExampleGradients
from lightning_influence.scores.examples import score_examples

N, S, D, CLASSES = 12, 3, 6, 4


class Attention(nn.Module):
    """Projections of one input, as ``kind`` says; keys and values may come to be those of something else."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        bias = kind != "no bias"
        self.value, self.query, self.key = (nn.Linear(D, D, bias=bias) for _ in range(3))  # not in the order of calls
        if kind == "convolutions":
            self.value, self.query, self.key = (nn.Conv1d(D, D, 2, padding=1, dilation=2) for _ in range(3))
        self.out = nn.Linear(D, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        memory = x
        flagged = x[:, :1, :1] > 1.5
        if self.kind == "other memory" and bool(flagged.any()):
            memory = torch.where(flagged, x.flip(-1), x)
        if self.kind == "another layer's input":
            memory = x.tanh()
        cast = (lambda t: t.clone()) if self.kind == "copies" else (lambda t: t)
        if self.kind == "convolutions":
            q, k, v = (m(x.mT).mT for m in (self.query, self.key, self.value))
        else:
            q, k, v = self.query(cast(x)), self.key(cast(memory)), self.value(cast(memory))
        weights = (q @ k.mT / math.sqrt(D)).softmax(-1)
        return self.out((weights @ v).mean(1))  # type: ignore[no-any-return]


def passes(kind: str, batch_size: int = 4) -> ExampleGradients:
    torch.manual_seed(0)
    module = Attention(kind).double().eval()
    inputs = torch.randn(N, S, D, dtype=torch.float64)
    inputs[:, 0, 0], inputs[7::2, 0, 0] = -1, 2  # what tracing sees, and what only later batches do, of every other
    source = ExampleSource(TensorDataset(inputs, torch.arange(N) % CLASSES), batch_size=batch_size)

    def task(module: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(module(batch[0]), batch[1])

    return ExampleGradients(module, task, source, discover(module, task, source))


def fitted(gradients: ExampleGradients, name: Any = "ekfac") -> BlockCurvature:
    found = fit(gradients, name, range(N), examples=FactorExamples(N, N), labels=("exact", "exact"))
    assert isinstance(found, BlockCurvature)
    return found


def self_influence(gradients: ExampleGradients, curvature: Curvature) -> Tensor:
    return score_examples(gradients, range(N), curvature=curvature).columns["self_influence"]


def bases(curvature: BlockCurvature) -> dict[str, int]:
    return {name: id(block.tensors["activation_basis"]) for name, block in curvature.blocks.items()}


def apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nothing be shared."""
    monkeypatch.setattr(Coverage, "shared_inputs", property(lambda self: {}))


@pytest.mark.parametrize("name", ["ekfac", "kfac", "diagonal", "block_ggn", "identity"])
@pytest.mark.parametrize("kind", ["bias", "no bias", "copies", "convolutions"])
def test_scores_are_those_of_factors_of_their_own(kind: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gradients = passes(kind)
    assert gradients.coverage.shared_inputs == {"query": "value", "key": "value"}
    shared = fitted(gradients, name)
    scores = self_influence(gradients, shared)
    if name in ("ekfac", "kfac"):
        found = bases(shared)
        assert found["value"] == found["query"] == found["key"] != found["out"]
    apart(monkeypatch)
    own = fitted(gradients, name)
    assert torch.equal(scores, self_influence(gradients, own))
    assert float(scores.std()) > 0
    if name in ("ekfac", "kfac"):
        assert len(set(bases(own).values())) == 4


def test_what_only_a_later_batch_tells_apart_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    gradients = passes("other memory")
    assert gradients.coverage.shared_inputs == {"query": "value", "key": "value"}  # as traced
    found = fitted(gradients)
    where = bases(found)
    assert where["query"] != where["value"] == where["key"]
    scores = self_influence(gradients, found)
    apart(monkeypatch)
    own = fitted(gradients)
    assert torch.allclose(scores, self_influence(gradients, own), rtol=1e-9)
    # With the factor of keys and values in the place of their own, queries would be solved with another one.
    mine, wrong = (own.blocks[name].tensors["activation_basis"] for name in ("query", "key"))
    assert float((mine.mT @ wrong).abs().amax(-1).min()) < 0.999


def test_another_input_is_not_shared() -> None:
    assert passes("another layer's input").coverage.shared_inputs == {"key": "value"}


def test_memory_and_time_count_what_is_shared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    coverage = passes("no bias").coverage
    less, fewer = fitted_bytes("ekfac", coverage), sum(map(len, decompositions("ekfac", coverage).values()))
    apart(monkeypatch)
    assert fitted_bytes("ekfac", coverage) - less == 2 * 4 * D * D
    assert sum(map(len, decompositions("ekfac", coverage).values())) - fewer == 2
    # Scoring keeps the inverses of the eigenvalues.
    kept = sum(each.numel() for block in fitted(passes("no bias")).blocks.values() for each in block.tensors.values())
    eigenvalues = sum(block.eigenvalues.numel() for block in fitted(passes("no bias")).blocks.values())
    assert fitted_bytes("diagonal", coverage) == 8 * eigenvalues
    assert fitted_bytes("ekfac", coverage) >= 4 * (kept + eigenvalues)


def test_stored_once_and_read_back(tmp_path: Path) -> None:
    gradients = passes("bias")
    found = fitted(gradients)
    files = through_disk(found, tmp_path)
    assert [name for name, (tensors, _) in files.items() if "activation_basis" in tensors] == ["out", "value"]
    back = restored(files, gradients.coverage)
    assert isinstance(back, BlockCurvature)
    assert len(set(bases(back).values())) == 2
    assert torch.equal(self_influence(gradients, found), self_influence(gradients, back))
    files["value"][0].pop("activation_basis")
    with pytest.raises(ValueError, match=r"the factors of 'value' are .*needs .*'activation_basis'.*or fit the curv"):
        restored(files, gradients.coverage)


def test_files_of_earlier_versions_have_a_factor_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gradients = passes("bias")
    scores = self_influence(gradients, fitted(gradients))
    with monkeypatch.context() as before:
        apart(before)
        files = through_disk(fitted(gradients), tmp_path)
    assert all("activation_basis" in tensors and "shared" not in about for tensors, about in files.values())
    assert torch.equal(scores, self_influence(gradients, restored(files, gradients.coverage)))


def _process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    try:
        found = {}
        for kind in ("bias", "other memory"):
            curvature = fitted(passes(kind))
            found[kind] = [(name, dict(block.tensors)) for name, block in curvature.blocks.items()]
            assert len(set(bases(curvature).values())) == (2 if kind == "bias" else 3)
        torch.save(found, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_what_one_process_tells_apart_parts_on_all(tmp_path: Path) -> None:
    # Of two processes only the second sees the examples that tell queries from keys.
    together(_process, str(tmp_path))
    for kind in ("bias", "other memory"):
        alone = fitted(passes(kind))
        for rank in range(2):
            for name, tensors in torch.load(tmp_path / f"{rank}.pt")[kind]:
                block = alone.blocks[name]
                for side in ("eigenvalues", "activation_basis"):
                    assert tensors[side].shape == block.tensors[side].shape
                assert torch.allclose(tensors["eigenvalues"], block.eigenvalues, rtol=1e-6, atol=1e-12)
