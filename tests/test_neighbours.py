"""What an example's neighbours say about its label, against distances counted one by one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_influence.metrics import mislabel_detection
from lightning_influence.training import class_shares, neighbours
from lightning_influence.training.neighbours import NeighbourRecord, disagreement, nearest_labels


def shares_of(features: Tensor, labels: Tensor, **options: int) -> Tensor:
    return disagreement(nearest_labels(features, labels, **options), labels)


def _clusters(n: int = 120, classes: int = 4, dimension: int = 6, spread: float = 0.3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    centres = 3 * torch.randn(classes, dimension, generator=generator)
    labels = torch.randint(0, classes, (n,), generator=generator)
    return centres[labels] + spread * torch.randn(n, dimension, generator=generator), labels


def _by_hand(
    features: Tensor, labels: Tensor, k: int, references: Sequence[int] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the shares and, for each example, how far its k-th neighbour is from the next: small is a tie."""
    x, y = features.double().numpy(), labels.numpy()
    usable = [n for n in range(len(x)) if y[n] >= 0 and np.isfinite(x[n]).all()]
    shares, gaps = np.full(len(x), np.nan), np.full(len(x), np.inf)
    if len(usable) < 2:
        return shares, gaps
    mean = np.mean([x[n] for n in usable], axis=0)
    pool = usable if references is None else [usable[r] for r in references]
    for n in usable:
        a = x[n] - mean
        cosines = []
        for m in pool:
            if m == n:
                continue
            b = x[m] - mean
            cosines.append((float(a @ b / np.sqrt((a @ a) * (b @ b))), m))
        cosines.sort(key=lambda pair: -pair[0])
        count = min(k, len(pool) - 1)
        shares[n] = np.mean([y[m] != y[n] for _, m in cosines[:count]])
        if count < len(cosines):
            gaps[n] = cosines[count - 1][0] - cosines[count][0]
    return shares, gaps


def _assert_shares(found: Tensor, expected: tuple[np.ndarray, np.ndarray], most_ties: int = 0) -> None:
    shares, gaps = expected
    clear = gaps > 1e-5  # in float32, closer neighbours may change places
    assert (~clear).sum() <= most_ties
    assert found.dtype == torch.float32
    np.testing.assert_array_equal(np.isnan(found.numpy()), np.isnan(shares))
    np.testing.assert_allclose(found.numpy()[clear], shares[clear], atol=1e-6)


@pytest.mark.parametrize("k", [1, 5, 20, 500])
@pytest.mark.parametrize("spread", [0.3, 3.0])
def test_shares_are_those_of_the_nearest(k: int, spread: float) -> None:
    features, labels = _clusters(spread=spread)
    _assert_shares(shares_of(features, labels, neighbours=k), _by_hand(features, labels, k), most_ties=3)


def test_the_number_of_rows_looked_at_together_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = _clusters(spread=2.0)
    whole = shares_of(features, labels)
    monkeypatch.setattr(neighbours, "_CHUNK_ELEMENTS", 7 * len(labels) + 3)
    assert torch.equal(shares_of(features, labels), whole)


def test_flipped_labels_stand_out() -> None:
    """Of 120 examples, 12 get another label: their neighbours disagree, those of the others don't."""
    features, labels = _clusters()
    flipped = torch.zeros(120, dtype=torch.bool)
    flipped[::10] = True
    noisy = torch.where(flipped, (labels + 1) % 4, labels)
    shares = shares_of(features, noisy, neighbours=10)
    assert float(shares[flipped].min()) > 0.6
    assert float(shares[~flipped].max()) < 0.5
    assert float(mislabel_detection(shares, flipped)["auroc"]) == 1.0
    assert float(shares_of(features, labels, neighbours=10).max()) == 0.0


def test_distances_do_not_depend_on_scale_or_offset() -> None:
    """Cosines of centred features: a common offset, such as positive activations have, says nothing."""
    features, labels = _clusters(spread=2.0)
    plain = shares_of(features, labels)
    _assert_shares(shares_of(4 * features + 50, labels), _by_hand(features, labels, 20), most_ties=5)
    offset = torch.zeros(6)
    offset[0] = 1000.0
    shifted = shares_of(features.double() + offset, labels)
    assert float((shifted - plain).abs().mean()) < 0.01


def test_unknown_labels_and_features_are_neither_rated_nor_counted() -> None:
    features, labels = _clusters(spread=2.0)
    features[3, 2] = torch.nan
    features[50] = torch.inf
    labels[[10, 80]] = -1
    found = shares_of(features, labels, neighbours=7)
    assert found.isnan().nonzero().squeeze(1).tolist() == [3, 10, 50, 80]
    _assert_shares(found, _by_hand(features, labels, 7), most_ties=3)
    kept = [n for n in range(120) if n not in (3, 10, 50, 80)]
    assert torch.equal(found[kept], shares_of(features[kept], labels[kept], neighbours=7))


@pytest.mark.parametrize("known", [[], [5]])
def test_without_two_known_examples_everything_is_unknown(known: list[int]) -> None:
    features, labels = _clusters()
    only = torch.full_like(labels, -1)
    only[known] = labels[known]
    assert bool(shares_of(features, only).isnan().all())
    assert shares_of(features[:0], labels[:0]).shape == (0,)


def test_two_examples_are_each_others_neighbours() -> None:
    features = torch.tensor([[0.0, 1.0], [2.0, 5.0]])
    assert shares_of(features, torch.tensor([0, 1])).tolist() == [1.0, 1.0]
    assert shares_of(features, torch.tensor([1, 1])).tolist() == [0.0, 0.0]


def test_beyond_a_limit_neighbours_come_from_a_subset(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = _clusters(spread=2.0)
    labels[7] = -1
    monkeypatch.setattr(neighbours, "_MAX_REFERENCES", 40)
    found = shares_of(features, labels, neighbours=5, seed=3)
    chosen = torch.randperm(119, generator=torch.Generator().manual_seed(3))[:40].tolist()
    _assert_shares(found, _by_hand(features, labels, 5, chosen), most_ties=3)
    assert not torch.equal(found.nan_to_num(), shares_of(features, labels, neighbours=5, seed=4).nan_to_num())
    assert torch.equal(found.nan_to_num(), shares_of(features, labels, neighbours=5, seed=3).nan_to_num())
    monkeypatch.setattr(neighbours, "_MAX_REFERENCES", 2)
    few = shares_of(features, labels, neighbours=5)
    assert set(few[~few.isnan()].unique().tolist()) <= {0.0, 1.0}, "one of two is the example itself, or is left out"


def test_nothing_is_changed_and_no_random_number_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "_MAX_REFERENCES", 50)
    features, labels = _clusters()
    copies = features.clone(), labels.clone()
    before = torch.get_rng_state()
    shares_of(features, labels)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(features, copies[0])
    assert torch.equal(labels, copies[1])


def test_features_without_any_direction_have_neighbours() -> None:
    """Dead units give the same features for many examples; centred, some may be exactly zero."""
    features = torch.zeros(12, 3)
    features[:6, 0], features[6:, 0] = 1.0, -1.0
    labels = torch.tensor([0] * 6 + [1] * 6)
    assert shares_of(features, labels, neighbours=5).tolist() == [0.0] * 12
    # One example right at the mean is nobody's nearest neighbour.
    features = torch.cat([features, torch.zeros(1, 3)])
    assert shares_of(features, torch.cat([labels, torch.tensor([2])]), neighbours=5).tolist() == [0.0] * 12 + [1.0]
    same = shares_of(torch.ones(12, 3), labels, neighbours=11)
    torch.testing.assert_close(same, torch.full((12,), 6 / 11))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_any_precision_of_features(dtype: torch.dtype) -> None:
    features, labels = _clusters(spread=2.0)
    rounded = features.to(dtype)
    _assert_shares(shares_of(rounded, labels), _by_hand(rounded, labels, 20), most_ties=5)


def test_the_record_of_several_passes() -> None:
    """Votes and disagreement are means over the passes that an example took part in; classes may come later."""
    features, labels = _clusters()
    early = labels.where(labels < 3, 0)  # the last class is not seen in the first pass
    unknown = labels.clone()
    unknown[5] = -1
    indices = torch.arange(len(labels)) + 3
    record = NeighbourRecord(len(labels) + 3)
    assert record.disagreement is None
    for given in (early, unknown):
        record.add(indices, nearest_labels(features, given), given)

    counted = []
    for given in (early, unknown):
        nearest = nearest_labels(features, given)
        assert nearest.shape == (len(labels), 20)
        votes = torch.stack([(nearest == c).double().mean(1) for c in range(5)], 1)
        counted.append(torch.where(given.unsqueeze(1) >= 0, votes, torch.nan))
    expected = torch.stack(counted).nanmean(0)
    every = torch.arange(len(labels) + 3)
    found = record.votes(5, every)
    torch.testing.assert_close(found[3:], expected, rtol=0, atol=1e-6)
    assert not found[:3].any()
    assert found[3:, 4].sum() == 0, "a class that nobody has"
    shares = torch.stack([shares_of(features, given).double() for given in (early, unknown)]).nanmean(0)
    assert record.disagreement is not None
    torch.testing.assert_close(record.disagreement[3:], shares, rtol=0, atol=1e-6)
    assert record.disagreement[:3].isnan().all()

    other = NeighbourRecord(len(labels) + 3)
    other.load_state_dict(record.state_dict())
    assert torch.equal(other.votes(5, every), found)


def test_of_many_classes_the_votes_for_some_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = _clusters()
    found = []
    for classes in (5, 4_000):  # the labels are far apart
        monkeypatch.setattr(class_shares, "_ALL", 100 * len(labels))
        given = labels * (classes // 5)
        record = NeighbourRecord(len(labels))
        for _ in range(3):
            record.add(torch.arange(len(labels)), nearest_labels(features, given), given)
        votes = record.votes(classes, torch.arange(len(labels)))
        found.append(votes[:, :: classes // 5][:, :5])
        assert bool((votes.count_nonzero(1) <= 5).all())
    assert found[0].any()
    assert torch.equal(*found)
