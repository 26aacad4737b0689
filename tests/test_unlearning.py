"""Removal and label repair against training anew, where that has a minimum to compare with."""

from __future__ import annotations

from collections import defaultdict, namedtuple
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from lightning_influence.audit.relabel import LabelError, Relabelled, find_label
from lightning_influence.audit.unlearning import Unlearner
from lightning_influence.audit.update import ParameterUpdate
from lightning_influence.curvature import Curvature, FactorExamples, IndefiniteError, fit
from lightning_influence.data.source import ExampleSource
from lightning_influence.gradients.discover import discover
from lightning_influence.gradients.passes import ExampleGradients

DECAY = 0.01


def squares(module: Any, batch: Any) -> Tensor:
    return F.mse_loss(module(batch[0]).squeeze(1), batch[1])


def classify(module: Any, batch: Any) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1])


def passes(net: nn.Module, task: Any, *data: Tensor) -> ExampleGradients:
    source = ExampleSource(TensorDataset(*data), batch_size=64)
    return ExampleGradients(net, task, source, discover(net, task, source))


def curvature_of(gradients: ExampleGradients, name: Any, damping: float) -> Curvature:
    n = len(gradients.source)
    return fit(gradients, name, range(n), examples=FactorExamples(n, n), labels=("exact", "exact"), damping=damping)


def newton_removal(
    gradients: ExampleGradients, curvature: Curvature, removed: Any, n: int, *, leverage: bool = False, **decay: Any
) -> ParameterUpdate:
    return Unlearner(gradients, curvature, range(n), **decay).newton_removal(removed, leverage=leverage)


def label_repair(
    gradients: ExampleGradients, curvature: Curvature, labels: dict[int, int], n: int, known: dict[int, int]
) -> ParameterUpdate:
    return Unlearner(gradients, curvature, range(n), labels=known).label_repair(list(labels), list(labels.values()))


def flat(net: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def minimise(net: nn.Module, task: Any, *data: Tensor) -> nn.Module:
    """Train to the minimum of the mean loss and the L2 term, to rounding."""
    optimizer = torch.optim.LBFGS(
        net.parameters(), max_iter=2000, tolerance_grad=1e-12, tolerance_change=0, history_size=50,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> Tensor:
        optimizer.zero_grad()
        penalty = sum(p.square().sum() for p in net.parameters())
        loss = task(net, data) + 0.5 * DECAY * penalty
        loss.backward()
        return loss

    optimizer.step(closure)
    return net


class Ridge:
    """Linear regression with an L2 term: the loss is quadratic, one Newton step is the whole way."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(30, 5, generator=generator, dtype=torch.float64)
        self.y = self.x[:, 0] - 2 * self.x[:, 1] + 0.5 * torch.randn(30, generator=generator, dtype=torch.float64)
        self.net = self.solved(list(range(30)))
        self.gradients = passes(self.net, squares, self.x, self.y)

    def solved(self, rows: list[int], y: Tensor | None = None) -> nn.Linear:
        y = self.y if y is None else y
        ones = torch.cat([self.x[rows], torch.ones(len(rows), 1).double()], 1)
        matrix = 2 * ones.T @ ones / len(rows) + DECAY * torch.eye(6).double()
        theta = torch.linalg.solve(matrix, 2 * ones.T @ y[rows] / len(rows))
        net = nn.Linear(5, 1).double()
        with torch.no_grad():
            net.weight.copy_(theta[None, :5])
            net.bias.copy_(theta[5:])
        return net


class TestRidge:
    @pytest.mark.parametrize("removed", [[3], [0, 7, 29], list(range(12))], ids=len)
    def test_removal_with_leverage_is_retraining(self, removed: list[int]) -> None:
        ridge = Ridge()
        kept = [n for n in range(30) if n not in removed]
        expected = flat(ridge.solved(kept))
        curvature = curvature_of(ridge.gradients, "ggn", DECAY * len(kept) / 30)
        update = newton_removal(ridge.gradients, curvature, removed, 30, weight_decay=DECAY, leverage=True)
        torch.testing.assert_close(flat(update.applied_to_copy(ridge.net)), expected, rtol=1e-8, atol=1e-10)

        plain = newton_removal(ridge.gradients, curvature, removed, 30, weight_decay=DECAY)
        way = (expected - flat(ridge.net)).norm()
        short = (flat(plain.applied_to_copy(ridge.net)) - expected).norm() / way
        assert short > 0.01, "the curvature of the removed ones is missing"
        identity = newton_removal(
            ridge.gradients, curvature_of(ridge.gradients, "identity", 0.0), removed, 30, weight_decay=DECAY
        )
        assert (flat(identity.applied_to_copy(ridge.net)) - expected).norm() / way > 0.1

    def test_iterative_solvers_do_as_well(self) -> None:
        ridge = Ridge()
        n = 30
        curvature = fit(
            ridge.gradients, "ggn", range(n), examples=FactorExamples(n, n), labels=("exact", "exact"),
            damping=DECAY * 27 / 30, solver="cg",
        )  # fmt: skip
        update = newton_removal(ridge.gradients, curvature, [0, 7, 29], 30, weight_decay=DECAY, leverage=True)
        expected = flat(ridge.solved([i for i in range(n) if i not in (0, 7, 29)]))
        torch.testing.assert_close(flat(update.applied_to_copy(ridge.net)), expected, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("repaired", [[3], [0, 7, 29], list(range(12))], ids=len)
    def test_repair_is_retraining(self, repaired: list[int]) -> None:
        """Other targets leave the curvature of a squared error alone, so the step is exact for any number of them."""
        ridge = Ridge()
        ridge.y = 3 * (ridge.y > 0).double()
        wrong = ridge.y.clone()
        wrong[repaired] = 3 - wrong[repaired]
        ridge.net, expected = ridge.solved(list(range(30)), wrong), flat(ridge.solved(list(range(30)), ridge.y))
        gradients = passes(ridge.net, squares, ridge.x, wrong)
        known = dict(enumerate(wrong.long().tolist()))
        labels = {n: int(ridge.y[n]) for n in repaired}
        way = (expected - flat(ridge.net)).norm()
        missed = {}
        for name, damping in (("ggn", DECAY), ("identity", 0.0)):
            update = label_repair(gradients, curvature_of(gradients, name, damping), labels, 30, known)
            missed[name] = float((flat(update.applied_to_copy(ridge.net)) - expected).norm() / way)
        assert missed["ggn"] < 1e-8
        assert missed["identity"] > 0.1

    def test_weight_decay_by_name(self) -> None:
        ridge = Ridge()
        curvature = curvature_of(ridge.gradients, "ggn", DECAY)

        def step(weight_decay: Any) -> ParameterUpdate:
            return newton_removal(ridge.gradients, curvature, [3], 30, weight_decay=weight_decay)

        every = step({"weight": DECAY, "bias": DECAY})
        torch.testing.assert_close(every.changes["weight"], step(DECAY).changes["weight"])
        torch.testing.assert_close(every.changes["bias"], step(DECAY).changes["bias"])
        only = step({"weight": DECAY})
        assert not torch.allclose(only.changes["bias"], every.changes["bias"], rtol=1e-4)
        assert torch.equal(step({"bias": 0.0}).changes["weight"], step(0.0).changes["weight"])

    def test_what_is_left_has_to_determine_the_weights(self) -> None:
        ridge = Ridge()
        curvature = curvature_of(ridge.gradients, "ggn", 1e-10)
        with pytest.raises(IndefiniteError, match=r"without these 27 examples .* Raise the damping, remove fewer"):
            newton_removal(ridge.gradients, curvature, list(range(27)), 30, leverage=True)


class Logistic:
    """Multinomial logistic regression on real digits, at its minimum."""

    def __init__(self) -> None:
        pixels, labels = load_digits(return_X_y=True)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        x, y = torch.from_numpy(pixels)[order] / 16, torch.from_numpy(labels).long()[order]
        self.x, self.y, self.test = x[:300], y[:300], (x[300:400], y[300:400])
        torch.manual_seed(0)
        self.net = minimise(nn.Linear(64, 10).double(), classify, self.x, self.y)
        self.gradients = passes(self.net, classify, self.x, self.y)

    def retrained(self, x: Tensor, y: Tensor) -> nn.Module:
        net = nn.Linear(64, 10).double()
        net.load_state_dict(self.net.state_dict())
        return minimise(net, classify, x, y)

    def losses(self, net: nn.Module) -> Tensor:
        with torch.no_grad():
            return F.cross_entropy(net(self.test[0]), self.test[1], reduction="none")


@pytest.fixture(scope="module")
def logistic() -> Logistic:
    return Logistic()


def correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])


def test_removal_from_logistic_regression(logistic: Logistic) -> None:
    """Changes of 100 test losses by 8 removals, single and in groups, against training anew."""
    curvature = curvature_of(logistic.gradients, "hessian", DECAY)
    before = logistic.losses(logistic.net)
    true, found, identity = [], [], []
    for removed in [[0], [1], [17], [40], list(range(50, 55)), list(range(100, 120)), list(range(200, 230))]:
        kept = [n for n in range(300) if n not in removed]
        true.append(logistic.losses(logistic.retrained(logistic.x[kept], logistic.y[kept])) - before)
        update = newton_removal(logistic.gradients, curvature, removed, 300, weight_decay=DECAY, leverage=True)
        found.append(logistic.losses(update.applied_to_copy(logistic.net)) - before)
        other = newton_removal(
            logistic.gradients, curvature_of(logistic.gradients, "identity", 0.0), removed, 300, weight_decay=DECAY
        )
        identity.append(logistic.losses(other.applied_to_copy(logistic.net)) - before)
    assert correlation(torch.stack(found), torch.stack(true)) >= 0.99
    assert correlation(torch.stack(identity), torch.stack(true)) < 0.9
    slope = float((torch.stack(found) * torch.stack(true)).sum() / torch.stack(true).square().sum())
    assert slope == pytest.approx(1, abs=0.05)


def test_repair_of_labels_in_logistic_regression(logistic: Logistic) -> None:
    wrong = {n: int((logistic.y[n] + 1) % 10) for n in (4, 9, 33)}
    noisy = logistic.y.clone()
    for index, label in wrong.items():
        noisy[index] = label
    net = logistic.retrained(logistic.x, noisy)
    gradients = passes(net, classify, logistic.x, noisy)
    curvature = curvature_of(gradients, "hessian", DECAY)
    known = dict(enumerate(noisy.tolist()))
    update = label_repair(gradients, curvature, {n: int(logistic.y[n]) for n in wrong}, 300, known)
    way = flat(logistic.net) - flat(net)
    made = flat(update.applied_to_copy(net)) - flat(net)
    assert float(F.cosine_similarity(way, made, dim=0)) > 0.99
    assert float(made.norm() / way.norm()) == pytest.approx(1, abs=0.1)
    true, found = logistic.losses(logistic.net) - logistic.losses(net), None
    with update.applied(net):
        found = logistic.losses(net) - logistic.losses(logistic.net) + true
    assert correlation(found, true) >= 0.99
    identity = label_repair(
        gradients, curvature_of(gradients, "identity", 0.0), {n: int(logistic.y[n]) for n in wrong}, 300, known
    )
    with identity.applied(net):
        assert correlation(logistic.losses(net) - logistic.losses(logistic.net) + true, true) < 0.9


class TestUpdate:
    def update(self, net: nn.Module, size: float = 1e-3) -> ParameterUpdate:
        torch.manual_seed(0)
        return ParameterUpdate({name: size * torch.randn_like(p) for name, p in net.named_parameters()}, "a step")

    def test_undone_bit_by_bit(self) -> None:
        net = nn.Linear(3, 2)
        before = {name: value.clone() for name, value in net.state_dict().items()}
        update = self.update(net, 1e7)
        stop = RuntimeError("stop")
        with pytest.raises(RuntimeError, match="stop"), update.applied(net):
            raise stop if not torch.equal(net.weight, before["weight"]) else AssertionError("nothing has changed")
        assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())

    def test_a_copy_leaves_the_model_alone(self) -> None:
        net = nn.Linear(3, 2)
        before = net.weight.clone()
        changed = self.update(net).applied_to_copy(net)
        torch.testing.assert_close(
            changed.weight - net.weight, self.update(net).changes["weight"], rtol=1e-3, atol=1e-6
        )
        assert torch.equal(net.weight, before)
        self.update(net).apply(net)
        assert torch.equal(net.weight, changed.weight)

    def test_it_says_how_large_it_is(self) -> None:
        net = nn.Linear(2, 1, bias=False)
        with torch.no_grad():
            net.weight.copy_(torch.tensor([[3.0, 4.0]]))
        update = ParameterUpdate({"weight": torch.tensor([[0.3, 0.4]])}, "a step")
        assert update.norm == pytest.approx(0.5)
        assert update.relative_norm(net) == pytest.approx(0.1)
        assert str(update) == "a step: 1 parameters move by 0.5"

    def test_another_model(self) -> None:
        with pytest.raises(ValueError, match=r"Linear has no parameters \['weight', 'bias'\] of the right shape"):
            self.update(nn.Linear(3, 2)).apply(nn.Linear(3, 4))

    def test_large_changes_are_not_to_be_trusted(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("lightning_influence.audit.unlearning._LARGE", 0.01)
        ridge = Ridge()
        update = newton_removal(ridge.gradients, curvature_of(ridge.gradients, "ggn", DECAY), list(range(28)), 30)
        assert any("one Newton step is not to be trusted that far" in note for note in update.notes)


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        ([], "there is no example to remove"),
        ([30], r"\[30\] are not among the training examples; expected distinct indices of the 30"),
        ([-1], r"\[-1\] are not among"),
        ([2, 2], "some are named twice"),
        ([2.0], r"indices must be integers, got \[2.0\]"),
        (torch.arange(30) < 2, r"a mask becomes indices by `np.flatnonzero\(mask\)`"),
        (list(range(30)), "all 30 examples are to be removed; expected some to be left"),
    ],
)
def test_wrong_indices(removed: Any, message: str) -> None:
    ridge = Ridge()
    with pytest.raises(ValueError, match=message):
        newton_removal(ridge.gradients, curvature_of(ridge.gradients, "ggn", DECAY), removed, 30)


def test_non_finite_examples_can_not_be_removed_by_a_step() -> None:
    ridge = Ridge()
    curvature = curvature_of(ridge.gradients, "ggn", DECAY)
    ridge.y[4] = torch.inf
    with pytest.raises(ValueError, match=r"the examples \[4\] have non-finite"):
        newton_removal(ridge.gradients, curvature, [3, 4], 30)


# --------------------------------------------------------------------------------------------------------- labels

Pair = namedtuple("Pair", ["image", "label"])


class Listed(Dataset[Any]):
    def __init__(self, *examples: Any) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Any:
        return self.examples[index]


CASES = {
    "tuple": (lambda n, y: (torch.zeros(3) + n, y), (1,)),
    "tensor": (lambda n, y: (torch.zeros(3) + n, torch.tensor(y)), (1,)),
    "mapping": (lambda n, y: {"input_ids": torch.arange(4) + n, "labels": torch.tensor([y]), "id": n}, ("labels",)),
    "nested": (lambda n, y: (n, {"meta": {"target": y}, "x": [1.0, 2.0]}), (1, "meta", "target")),
    "named": (lambda n, y: Pair(torch.zeros(2) + n, y), (1,)),
    "list": (lambda n, y: [y, torch.zeros(2) + n], (0,)),
    "float": (lambda n, y: (torch.zeros(3) + n, torch.tensor(float(y))), (1,)),
    "default": (lambda n, y: defaultdict(list, x=torch.zeros(2) + n, label=np.int64(y)), ("label",)),
    "read-only": (lambda n, y: MappingProxyType({"x": n + 0.5, "label": y}), ("label",)),
}
LABELS = [0, 1, 2, 1, 0]


@pytest.mark.parametrize("name", CASES)
def test_labels_are_found_and_replaced(name: str) -> None:
    make, path = CASES[name]
    data = Listed(*(make(n, y) for n, y in enumerate(LABELS)))
    known = dict(enumerate(LABELS))
    assert find_label(data, known) == path
    changed = Relabelled(data, {1: 7, 3: 9}, path)
    assert len(changed) == 5
    new = {**known, 1: 7, 3: 9}
    assert find_label(changed, new) == path
    if name != "read-only":
        assert type(changed[1]) is type(data[1])
    assert repr(changed[0]) == repr(data[0])
    assert repr(changed[-2]) == repr(changed[3])
    # The original is as it was.
    assert find_label(data, known) == path


@pytest.mark.parametrize(
    ("data", "labels", "message"),
    [
        (Listed(*((0.5, y) for y in LABELS)), {0: 0, 4: 0}, "all known labels are the same"),
        (Listed(*((0.5, y) for y in LABELS)), {0: 5, 1: 6}, "no place in the examples of Listed holds"),
        (Listed(*((y, y) for y in LABELS)), {0: 0, 1: 1}, "several places"),
    ],
)
def test_labels_that_can_not_be_found(data: Any, labels: dict[int, int], message: str) -> None:
    with pytest.raises(LabelError, match=message):
        find_label(data, labels)


def test_usual_names_win() -> None:
    data = Listed(*({"group": y, "label": y} for y in LABELS))
    assert find_label(data, dict(enumerate(LABELS))) == ("label",)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({5: 1}, r"there are no examples \[5\]; the data set has 5"),
        ({0: 1.5}, "must be integers"),
        ({0: "a"}, "integers"),
        ({0: np.float64(1)}, "integers"),
        ({0: True}, "integers"),
    ],
)
def test_wrong_new_labels(labels: Any, message: str) -> None:
    with pytest.raises(LabelError, match=message):
        Relabelled(Listed(*((0.5, y) for y in LABELS)), labels, (1,))
