"""What the others say of a label: ridge regression against refitting without each example, and the sums of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import CLASSES, Classifier, loader, make_trainer, vectors
from torch import Tensor
from which_lightning import ModelCheckpoint

from lightning_influence import InfluenceAudit, TracIn
from lightning_influence.gradients.visitors import ExampleScores
from lightning_influence.training import evidence, example_sums
from lightning_influence.training.evidence import EvidenceRecord, LabelEvidence, ridge_leave_one_out
from lightning_influence.training.label_record import LabelRecord
from lightning_influence.training.neighbours import nearest_labels, votes

pytestmark = pytest.mark.usefixtures("unverified")

N = 40


def clusters(n: int = N, d: int = 6, *, spread: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % CLASSES
    centres = 2 * torch.randn(CLASSES, d, generator=generator, dtype=torch.float64)
    return centres[labels] + spread * torch.randn(n, d, generator=generator, dtype=torch.float64), labels


# ------------------------------------------------------------------------------------------------------ ridge


def refitted(features: Tensor, labels: Tensor, classes: int, penalty: float) -> np.ndarray:
    """Fit without each example in turn; standardisation and the targets' means are those of all examples."""
    x, y = features.double().numpy(), np.eye(classes)[labels.numpy()]
    deviation = x.std(0)
    x = (x - x.mean(0)) / np.maximum(deviation, evidence._LEAST_DEVIATION * deviation.max())
    frequencies = y.mean(0)
    n, d = x.shape
    found = np.empty_like(y)
    for left in range(n):
        others = np.arange(n) != left
        design = np.concatenate([x[others], np.ones((n - 1, 1))], 1)  # the intercept is not penalised
        system = design.T @ design + penalty * n * np.diag([1.0] * d + [0.0])
        weights = np.linalg.solve(system, design.T @ (y - frequencies)[others])
        found[left] = np.append(x[left], 1) @ weights + frequencies
    return found


def best_penalty(features: Tensor, labels: Tensor, classes: int) -> float:
    y = np.eye(classes)[labels.numpy()]
    errors = {p: ((refitted(features, labels, classes, p) - y) ** 2).sum() for p in evidence._PENALTIES}
    return min(errors, key=lambda penalty: errors[penalty])


@pytest.mark.parametrize(("d", "spread"), [(6, 0.3), (6, 3.0), (N + 20, 1.0), (N + 20, 10.0)])
def test_ridge_is_refitting_without_each_example(d: int, spread: float) -> None:
    features, labels = clusters(d=d, spread=spread)
    found = ridge_leave_one_out(features, labels, CLASSES + 1)
    expected = refitted(features, labels, CLASSES + 1, best_penalty(features, labels, CLASSES + 1))
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found, expected.clip(0, 1), atol=1e-9)
    assert not found[:, CLASSES].any(), "nobody has the last class"
    assert ((expected < 0) | (expected > 1)).any() or spread > 1, "shares are cut to what they can be"


@pytest.mark.parametrize("penalty", evidence._PENALTIES)
def test_every_penalty(penalty: float, monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = clusters()
    monkeypatch.setattr(evidence, "_PENALTIES", (penalty,))
    expected = refitted(features, labels, CLASSES, penalty).clip(0, 1)
    np.testing.assert_allclose(ridge_leave_one_out(features, labels, CLASSES), expected, atol=1e-9)


def test_the_penalty_with_the_least_error_on_left_out_labels_is_taken() -> None:
    """Little for features that tell the classes, much for noise: so it is chosen, and differs."""
    clear, labels = clusters(d=20, spread=0.5)
    noise = torch.randn(N, 20, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    chosen = [best_penalty(features, labels, CLASSES) for features in (clear, noise)]
    assert chosen[0] < chosen[1]
    for features, penalty in zip((clear, noise), chosen, strict=True):
        expected = refitted(features, labels, CLASSES, penalty).clip(0, 1)
        np.testing.assert_allclose(ridge_leave_one_out(features, labels, CLASSES), expected, atol=1e-9)


def test_features_that_say_nothing_or_the_same_twice() -> None:
    """A constant one, one that rounding alone moves, and the same one again, as ReLU networks have them."""
    features, labels = clusters()
    plain = ridge_leave_one_out(features, labels, CLASSES)
    constant = torch.full((N, 1), 7.0, dtype=torch.float64)
    np.testing.assert_allclose(
        ridge_leave_one_out(torch.cat([features, constant], 1), labels, CLASSES), plain, atol=1e-9
    )
    rounding = constant + 1e-9 * torch.randn(N, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    moved = ridge_leave_one_out(torch.cat([features, rounding], 1), labels, CLASSES)
    np.testing.assert_allclose(moved, plain, atol=1e-6)
    twice = torch.cat([features, features], 1)
    expected = refitted(twice, labels, CLASSES, best_penalty(twice, labels, CLASSES)).clip(0, 1)
    np.testing.assert_allclose(ridge_leave_one_out(twice, labels, CLASSES), expected, atol=1e-9)


def test_features_that_say_nothing_at_all_leave_how_frequent_the_others_classes_are() -> None:
    labels = torch.tensor([0] * 6 + [1] * 3)
    found = ridge_leave_one_out(torch.ones(9, 2), labels, 2)
    torch.testing.assert_close(found[0], torch.tensor([5 / 8, 3 / 8], dtype=torch.float64))
    torch.testing.assert_close(found[8], torch.tensor([6 / 8, 2 / 8], dtype=torch.float64))


def test_the_number_of_rows_looked_at_together_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = clusters()
    whole = ridge_leave_one_out(features, labels, CLASSES)
    monkeypatch.setattr(example_sums, "_ROWS", 7)
    torch.testing.assert_close(ridge_leave_one_out(features, labels, CLASSES), whole, rtol=0, atol=1e-12)


def test_neither_units_nor_offsets_nor_the_own_label_matter() -> None:
    features, labels = clusters()
    plain = ridge_leave_one_out(features, labels, CLASSES)
    units = torch.tensor([1e-2, 1.0, 10.0, 2.0, 5.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(ridge_leave_one_out(features * units + 3, labels, CLASSES), plain, rtol=0, atol=1e-9)
    single = features.float()
    torch.testing.assert_close(ridge_leave_one_out(single, labels, CLASSES), plain, rtol=0, atol=1e-4)
    other = labels.clone()
    other[0] = (labels[0] + 1) % CLASSES
    moved = ridge_leave_one_out(features, other, CLASSES)
    assert float((moved[0] - plain[0]).abs().max()) < 1e-9
    assert float((moved[1:] - plain[1:]).abs().max()) > 1e-3


# ----------------------------------------------------------------------------------------------------- record


def noise(seed: int) -> tuple[Tensor, Tensor]:
    """Features that tell no more than chance."""
    return torch.randn(N, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), clusters()[1]


def add(record: EvidenceRecord, data: tuple[Tensor, Tensor], *, trained: bool = True, right: Any = None) -> None:
    features, labels = data
    nearest = nearest_labels(features, labels)
    record.add(torch.arange(len(labels)), features, labels, nearest, trained=trained, right=right)


def both(data: tuple[Tensor, Tensor], classes: int = CLASSES) -> Tensor:
    features, labels = data
    ridge = ridge_leave_one_out(features, labels, classes)
    return (ridge / ridge.sum(1, keepdim=True) + votes(nearest_labels(features, labels), classes)) / 2


def of(record: EvidenceRecord, size: int = N) -> LabelEvidence:
    found = record.about(range(size), None)
    assert found is not None
    return found


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.double(), expected.double(), rtol=0, atol=1e-6)


def test_early_is_the_first_epochs_and_late_all_of_them() -> None:
    record, snapshots = EvidenceRecord(N), [clusters(seed=seed, spread=0.2) for seed in range(5)]
    add(record, snapshots[0], trained=False)
    assert record.about(range(N), None) is None, "before a step was trained"
    for number, snapshot in enumerate(snapshots[1:], 1):
        assert record.complete == (number > evidence._EARLY)
        add(record, snapshot, right=(40.0 * number, 40.0 * number))
    found = of(record)
    told = [both(snapshot) for snapshot in snapshots]
    close(found.early[:], torch.stack(told[1:4]).mean(0))
    close(found.late[:], torch.stack(told[1:]).mean(0))
    close(found.early[:].sum(1), torch.ones(N))
    ridge = sum(ridge_leave_one_out(*snapshot, CLASSES) for snapshot in snapshots[:2])
    near = sum(votes(nearest_labels(*snapshot), CLASSES) for snapshot in snapshots[:2])
    close(found.first[:], (ridge + near) / (ridge + near).sum(1, keepdim=True))
    assert not found.trained[:].any()


def test_snapshots_from_before_the_network_had_begun_to_learn_are_left_out() -> None:
    record = EvidenceRecord(N)
    for snapshot in (noise(1), noise(2), clusters(spread=0.5)):
        add(record, snapshot)
    close(of(record).early[:], both(clusters(spread=0.5)))
    close(of(record).late[:], torch.stack([both(noise(1)), both(noise(2)), both(clusters(spread=0.5))]).mean(0))
    record = EvidenceRecord(N)
    for snapshot in (clusters(spread=0.5), noise(1)):
        add(record, snapshot)
    close(of(record).early[:], both(clusters(spread=0.5)))


def test_a_run_that_learns_slowly_has_more_early_epochs() -> None:
    """As long as it predicts labels well worse than the others tell them."""
    seen = [(10.0, 40.0), (20.0, 80.0), (30.0, 120.0)]  # a quarter right
    record = EvidenceRecord(N)
    snapshots = [clusters(seed=seed, spread=0.2) for seed in range(6)]
    for number, (snapshot, right) in enumerate(
        zip(snapshots, [*seen, (70.0, 160.0), (80.0, 200.0), (120.0, 240.0)], strict=True)
    ):
        assert record.complete == (number > 3)
        add(record, snapshot, right=right)
    told = [both(snapshot) for snapshot in snapshots]
    close(of(record).early[:], torch.stack(told[:4]).mean(0))


def test_no_more_is_asked_once_labels_are_learnt_by_heart() -> None:
    """Training was right more often since the last snapshot than the others can tell: features say what it was told."""
    record, first, second = EvidenceRecord(N), noise(1), noise(2)
    add(record, first, right=(8.0, 40.0))
    add(record, second, right=(48.0, 80.0))  # all of the last 40
    assert record.closed
    assert record.complete
    add(record, clusters(), right=(50.0, 120.0))
    close(of(record).late[:], both(first))
    closed_at_once = EvidenceRecord(N)  # a first epoch that is right throughout is evidence all the same
    add(closed_at_once, noise(1), right=(40.0, 40.0))
    assert not closed_at_once.closed
    close(of(closed_at_once).early[:], both(first))


def test_unknown_labels_and_features_that_are_not_finite() -> None:
    """They are neither rated nor counted."""
    features, labels = clusters()
    features[3, 2] = torch.nan
    features[5] = torch.inf
    features[6, 0] = 1e200  # its square overflows in single precision
    labels[[10, 39]] = -1
    record = EvidenceRecord(N)
    add(record, (features, labels))
    unknown = [3, 5, 6, 10, 39]
    kept = [row for row in range(N) if row not in unknown]
    found = of(record)
    for shares in (found.first, found.early, found.late):
        assert not shares[torch.tensor(unknown)].any()
    close(found.early[torch.tensor(kept)], both((features[kept], labels[kept])))


def test_of_a_past_run_only_labels_that_are_known_are_predicted_rightly() -> None:
    """Else a run that had every known label by heart still seemed to learn."""
    x, y = clusters()
    y[::2] = -1
    record = LabelRecord(N)
    record.heard_of = True
    record.add(ExampleScores(torch.arange(N), {"label": y, "predicted": y.clamp(min=0)}, x), trained=True, right=None)
    assert record._right == (N / 2, N / 2)


@pytest.mark.parametrize("known", [0, 1, 2])
def test_fewer_than_three_labels_tell_nothing(known: int) -> None:
    features, labels = clusters()
    record = EvidenceRecord(N)
    add(record, (features, labels.where(torch.arange(N) < known, -1)))
    assert record.about(range(N), None) is None
    assert not record.closed


def test_classes_that_turn_up_later() -> None:
    features, labels = clusters()
    few = features, labels.clamp(max=1)
    record = EvidenceRecord(N)
    add(record, few)
    assert of(record).early[:].shape == (N, 2)
    add(record, (features, labels))
    close(of(record).late[:], (F.pad(both(few, 2), (0, 1)) + both((features, labels))) / 2)
    for shares in (of(record).early, of(record).first, of(record).late, of(record).trained):
        assert shares[:].shape == (N, CLASSES)


@pytest.mark.parametrize("outputs", [2, 3, 5])
def test_what_training_has_predicted_is_cut_to_the_classes_that_labels_name(outputs: int) -> None:
    record = LabelRecord(N)
    add(record.evidence, clusters())
    trained = torch.rand(4, outputs)
    found = record.about([7, 3, 9, 0], lambda rows: trained.double())
    assert found is not None
    assert found.trained[:].shape == found.early[:].shape == (4, CLASSES)
    shared = min(outputs, CLASSES)
    assert torch.equal(found.trained[:][:, :shared], trained[:, :shared])
    close(found.early[:], both(clusters())[[7, 3, 9, 0]])


@pytest.mark.parametrize("at", range(6))
def test_going_on_from_a_state(at: int) -> None:
    snapshots = [noise(1), *(clusters(seed=seed) for seed in range(4)), noise(3)]
    straight, first = EvidenceRecord(N), EvidenceRecord(N)
    for number, snapshot in enumerate(snapshots):
        add(straight, snapshot, trained=number > 0, right=(9.0 * number, 40.0 * number))
        if number < at:
            add(first, snapshot, trained=number > 0, right=(9.0 * number, 40.0 * number))
    second, state = EvidenceRecord(N), first.state_dict()
    assert all(isinstance(value, Tensor) for value in state.values())
    second.load_state_dict(state)
    for number, snapshot in enumerate(snapshots):
        if number >= at:
            add(second, snapshot, trained=number > 0, right=(9.0 * number, 40.0 * number))
    for name, value in straight.state_dict().items():
        assert torch.equal(second.state_dict()[name], value), name
    again = EvidenceRecord(N)  # what has been handed out did not go on changing
    again.load_state_dict(state)
    for name, value in first.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


SETTINGS = {"epoch": TracIn(), "in flight": TracIn(mode="step"), "seldom": TracIn(every_n_epochs=2), "none": None}


@pytest.mark.parametrize("tracin", SETTINGS.values(), ids=SETTINGS)
def test_a_run_resumed_in_the_middle_has_the_evidence_of_one_that_never_stopped(tracin: Any, tmp_path: Path) -> None:
    class Ends(Exception):
        pass

    class Net(Classifier):
        stops = False

        def on_train_epoch_start(self) -> None:
            if self.stops and self.current_epoch == 2:
                raise Ends

    def trained(directory: Path, *, stops: bool = False, path: str | None = None) -> Any:
        torch.manual_seed(0)
        audit, model = InfluenceAudit(tracin=tracin), Net()
        model.stops = stops
        keeper = ModelCheckpoint(dirpath=directory, filename="{epoch}", save_top_k=-1)
        trainer = make_trainer(directory, callbacks=[audit, keeper], max_epochs=4, enable_checkpointing=True)
        try:
            trainer.fit(model, loader(vectors(60)), ckpt_path=path)
        except Ends:
            assert stops
        assert audit._recording is not None
        return audit._recording.labels.evidence.state_dict()

    straight = trained(tmp_path / "straight")
    stopped = trained(tmp_path / "first", stops=True)
    resumed = trained(tmp_path / "second", path=str(tmp_path / "first" / "epoch=1.ckpt"))
    assert straight["early"].shape == (60, CLASSES)
    assert not torch.equal(stopped["state"], straight["state"])
    for name, value in straight.items():
        torch.testing.assert_close(resumed[name], value, rtol=0, atol=1e-6, msg=name)
