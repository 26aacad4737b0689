"""What is held of each example: no second copy of features and tables, and few bytes in checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from live_memory import LiveMemory
from models import Classifier, loader, make_trainer, vectors
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_influence import InfluenceAudit
from lightning_influence.audit.belief import believe
from lightning_influence.objective.losses import CrossEntropy, cross_entropy
from lightning_influence.training import example_sums, neighbours
from lightning_influence.training.class_shares import ClassShares
from lightning_influence.training.evidence import EvidenceRecord, LabelEvidence
from lightning_influence.training.example_sums import ExampleSums, narrowed
from lightning_influence.training.neighbours import NeighbourRecord, nearest_examples, nearest_labels

N, D, CLASSES, K = 600, 16, 5, 4


class Largest(TorchDispatchMode):
    """Notes the largest new memory of an operation, in scalars."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        held = {each.untyped_storage().data_ptr() for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)}
        made = func(*args, **(kwargs or {}))
        for each in tree_leaves(made):
            if isinstance(each, Tensor) and each.untyped_storage().data_ptr() not in held:
                self.numbers = max(self.numbers, each.numel())
        return made


def clusters() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, CLASSES, (N,), generator=generator)
    return torch.randn(CLASSES, D, generator=generator)[labels] + 0.5 * torch.randn(N, D, generator=generator), labels


def _labels(features: Tensor, labels: Tensor) -> Any:
    return nearest_labels(features, labels, neighbours=K)


def _examples(features: Tensor, labels: Tensor) -> Any:
    return torch.stack([each.double() for each in nearest_examples(features)])


def _evidence(features: Tensor, labels: Tensor) -> Any:
    record = EvidenceRecord(N)
    nearest = labels.roll(1).unsqueeze(1).repeat(1, K).int()
    record.add(torch.arange(N), features, labels, nearest, trained=True)
    found = record.about(range(N), None)
    assert found is not None
    return torch.cat([found.early[:], found.late[:], found.first[:]])


@pytest.mark.parametrize("look", [_labels, _examples, _evidence])
def test_features_are_never_copied_as_a_whole(
    look: Callable[[Tensor, Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three copies were made, of what is most of the memory; in blocks the numbers are the same."""
    features, labels = clusters()
    monkeypatch.setattr(neighbours, "_MAX_REFERENCES", 50)
    whole = look(features, labels)
    monkeypatch.setattr(neighbours, "_CHUNK_ELEMENTS", 40 * 50)
    monkeypatch.setattr(example_sums, "_ROWS", 64)
    with Largest() as largest:
        found = look(features, labels)
    torch.testing.assert_close(found, whole, rtol=1e-6, atol=1e-6, equal_nan=True)
    assert 0 < largest.numbers <= max(N * CLASSES * 3, N * K) < N * D


def test_votes_are_counted_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = clusters()
    nearest, found = nearest_labels(features, labels), []
    assert nearest.dtype == torch.int32
    for rows in (2**12, 64):
        monkeypatch.setattr(example_sums, "_ROWS", rows)
        record = NeighbourRecord(N)
        record.add(torch.arange(N), nearest, labels)
        assert record.disagreement is not None
        found.append((record.votes(CLASSES, torch.arange(N)), record.disagreement))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


def test_beliefs_of_evidence_in_float32_are_those_of_float64() -> None:
    """They are widened some rows at a time."""
    generator = torch.Generator().manual_seed(1)
    n = 3 * 2**12 + 7
    shares = [torch.rand(n, 4, generator=generator).square() for _ in range(4)]
    labels = torch.randint(-1, 4, (n,), generator=generator).numpy()
    order = np.random.default_rng(0).permutation(n)
    narrow = believe(labels, LabelEvidence(*map(ClassShares.of, shares)), order)
    wide = believe(labels, LabelEvidence(*(ClassShares.of(each.double()) for each in shares)), order)
    assert narrow[0].noise_rate == wide[0].noise_rate
    np.testing.assert_array_equal(narrow[0].joint, wide[0].joint)
    for name, values in narrow[1].items():
        np.testing.assert_array_equal(values, wide[1][name], err_msg=name)


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ([0.0, 3.0, -1.0], torch.int8),
        ([0.0, 300.0], torch.int16),
        ([0.0, 70_000.0], torch.int32),
        ([0.5, 3.0], torch.float32),
        ([0.1, 3.0], torch.float64),
        ([float("nan"), 1.0], torch.float64),
        ([float("inf")], torch.float32),
        ([2.0**40], torch.float32),
        ([], torch.float64),
    ],
)
def test_whole_numbers_are_stored_in_few_bytes(values: list[float], dtype: torch.dtype) -> None:
    column = torch.tensor(values, dtype=torch.float64)
    found = narrowed(column)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), column, rtol=0, atol=0, equal_nan=True)
    if len(values):
        found[0] = 1  # a copy, even of the same type
        assert column[0] != 1 or values[0] == 1


@pytest.mark.parametrize("value", [5, 300, 70_000])
def test_what_is_stored_of_whole_numbers_is_a_copy(value: int) -> None:
    """Of a label beyond 32,767 it was the column itself, in which training goes on."""
    sums = ExampleSums(2, last={"label": -1.0}, whole=("label",))
    sums.put("label", torch.tensor([0]), torch.tensor([value]))
    stored = sums.state_dict()["label"]
    sums.put("label", torch.tensor([0]), torch.tensor([1]))
    assert stored.tolist() == [value, -1]


def test_sums_go_on_from_what_an_earlier_version_has_stored() -> None:
    """In float64 throughout; counts were no integers."""
    sums = [ExampleSums(4, whole=("count",), last={"label": -1.0}) for _ in range(3)]
    rows = torch.tensor([0, 2])
    for each in sums[:2]:
        each.add("count", rows, torch.ones(2))
        each.add("loss", rows, torch.tensor([0.1, 0.7]))
        each.put("label", rows, torch.tensor([3, 1]))
    sums[2].load_state_dict({name: value.double() for name, value in sums[0].state_dict().items()})
    for each in sums[1:]:
        each.add("count", rows, torch.ones(2))
        each.add("loss", rows, torch.tensor([0.2, 0.1]))
    for name in ("count", "loss", "label"):
        assert torch.equal(sums[1][name], sums[2][name])
        assert sums[1][name].dtype == sums[2][name].dtype


def test_a_checkpoint_gains_68_bytes_an_example_and_20_for_each_class(tmp_path: Path) -> None:
    size, classes = 200, 3
    audit = InfluenceAudit()
    trainer = make_trainer(tmp_path, callbacks=[audit], max_epochs=3)
    trainer.fit(Classifier(), loader(vectors(size)))
    parts = audit.state_dict()["parts"]
    rows = [each for each in tree_leaves(parts) if isinstance(each, Tensor) and each.ndim and len(each) == size]
    assert len(rows) > 10
    assert sum(each.nbytes for each in rows) <= size * (68 + 20 * classes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("soft", [False, True])
def test_a_language_model_s_logits_are_not_copied_as_a_whole(dtype: torch.dtype, soft: bool) -> None:
    """Just before the backward pass, where memory is short: they were copied three times, in bfloat16 ten times."""
    torch.manual_seed(0)
    n, positions, classes = 4, 512, 4_096
    logits = torch.randn(n * positions, classes).to(dtype).requires_grad_(True)
    labels = torch.randint(classes, (n * positions,))
    labels[::7] = -100
    target = F.one_hot(labels.clamp(min=0), classes).to(dtype) if soft else labels
    call = CrossEntropy(F.cross_entropy(logits, target), logits, target, "mean")
    whole = call.statistics(n)
    with patch.object(cross_entropy, "_PART", logits.numel()), patch.object(cross_entropy, "_PARTS", 1):
        at_once = call.statistics(n)
    with LiveMemory() as memory:
        assert call.statistics(n).keys() == {"loss", "margin", "el2n", "wrong", "probability", "worst"}
    assert memory.peak <= 1.2 * logits.nbytes
    for name, values in at_once.items():
        torch.testing.assert_close(whole[name], values, rtol=1e-5, atol=1e-6)
    with LiveMemory() as memory:
        assert call.decided(n) == {}
    assert memory.peak == 0
    with LiveMemory() as memory, torch.no_grad():
        call.elements()
    assert memory.peak <= 0.25 * logits.nbytes


def test_labels_are_drawn_from_a_few_rows_of_logits_at_a_time() -> None:
    """They take nine times the logits at once; the gradient that is asked for is one of these."""
    torch.manual_seed(0)
    n, positions, classes = 4, 512, 4_096
    logits, labels = torch.randn(n * positions, classes).requires_grad_(True), torch.randint(classes, (n * positions,))
    labels[::7] = -100
    call = CrossEntropy(F.cross_entropy(logits, labels), logits, labels, "mean")
    noise, scale = torch.rand(n, positions).double(), torch.tensor(0.25)
    with patch.object(cross_entropy, "_PART", logits.numel()), patch.object(cross_entropy, "_PARTS", 1):
        ((_, at_once),) = call.sampled(scale, noise)
    with LiveMemory() as memory:
        ((_, gradient),) = call.sampled(scale, noise)
    assert memory.peak <= 1.4 * logits.nbytes
    torch.testing.assert_close(gradient, at_once, rtol=1e-4, atol=1e-6)


def test_what_memory_is_counted_of() -> None:
    with LiveMemory() as memory:
        one = torch.zeros(100)
        kept = [one + 1, one.view(10, 10)]
        one.add_(1)
        (one * 2).sum()
    assert (memory.live, memory.peak) == (800, 1204)
    del one, kept
    assert memory.live == 0
