"""Everything that a user can hand to the door and that is wrong: what it was, what was expected, and the way out."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_influence import (
    AdversarialLoss,
    Checkpoint,
    DemographicParityGap,
    Influence,
    StepSizes,
    mean_scores,
)

N, Q = 24, 6
X, Y = torch.randn(N, 5, generator=torch.Generator().manual_seed(0)), torch.arange(N) % 3


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Dropout(0.2), nn.Linear(4, 3))


@dataclass(eq=False)
class Broken(Dataset[Any]):
    """Twenty-four examples, of which the one of index 20 is broken."""

    how: str

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> Any:
        if index != 20:
            return X[index], Y[index]
        if self.how == "raises":
            raise KeyError("20.png")
        shapes = {"empty": None, "long": (torch.zeros(6), Y[20]), "label": (X[20], torch.tensor(7))}
        return shapes[self.how]


class Door:
    """One object for all cases, and data that are as they should be."""

    def __init__(self) -> None:
        self.net = network()
        self.train, self.test = TensorDataset(X, Y), TensorDataset(X[:Q] + 1, Y[:Q])
        self.plain = Influence(self.net, F.cross_entropy, self.train)
        self.fitted = self.plain.fit("ekfac")
        self.pairs, self.top = self.fitted.pairs(self.test, [0, 1]), self.fitted.top(self.test, [0, 1], k=2)
        optimizer, self.sizes = torch.optim.SGD(self.net.parameters(), lr=0.1), StepSizes(self.net)
        self.sizes.record(optimizer)
        self.checkpoint = Checkpoint.of(self.net, 1, step_sizes=self.sizes.sums, steps=1, optimizer="SGD")
        self.along = self.fitted.along([self.checkpoint])

    def new(self, data: Any = None, loss: Any = F.cross_entropy, net: Any = None, **options: Any) -> Influence:
        return Influence(self.net if net is None else net, loss, self.train if data is None else data, **options)

    def of(self, **options: Any) -> Checkpoint:
        return Checkpoint.of(self.net, **{"step": 1, **options})

    def gap(self, group: Any) -> Any:
        return self.fitted.measure(self.test, DemographicParityGap(group=group))

    @property
    def wrong_labels(self) -> TensorDataset:
        return TensorDataset(X[:Q], torch.tensor([0, 1, 2, 0, 7, 1]))


@pytest.fixture(scope="module")
def door() -> Door:
    return Door()


def diverged() -> nn.Module:
    net = network()
    with torch.no_grad():
        net[0].weight[0, 0] = torch.nan
    return net


def labels_of_seven(model: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1].long())


Case = tuple[Callable[[Door], Any], str]
IN_DATA: dict[str, Case] = {
    "a label out of range": (lambda d: d.new(Broken("label")).fit(), r"on example 20 \(IndexError: Target 7 is out of"),
    "and products": (lambda d: d.new(Broken("label")).fit("ggn", damping=1), r"on example 20 \(IndexError: Target 7"),
    "and one forward pass": (lambda d: d.new(Broken("label")).scores(), r"on example 20 .*mend .*, or leave it out\."),
    "and workers": (
        lambda d: d.new(DataLoader(Broken("raises"), 8, num_workers=1)).fit(),
        r"Broken can't give a batch of example 20 \(KeyError: '20.png'\)",
    ),
    "a file that is gone": (lambda d: d.new(Broken("raises")).fit(), r"of example 20 \(KeyError: '20.png'\): mend"),
    "an example that is None": (lambda d: d.new(Broken("empty")).fit(), r"of example 20 \(TypeError: default_collate"),
    "shapes that differ": (lambda d: d.new(Broken("long")).fit(), r"batch of examples .*20.*equal size"),
    "labels of queries": (lambda d: d.fitted.top(d.wrong_labels), r"queries: .* on example 4 \(IndexError"),
    "labels of a set": (lambda d: d.fitted.measure(d.wrong_labels, "margin"), r"on example 4 \(IndexError: Target 7"),
    "labels forward only": (lambda d: d.fitted.value(d.wrong_labels), r"on example 4 \(IndexError: Target 7"),
    "labels of validation": (lambda d: d.fitted.scores(validation=d.wrong_labels), r"on example 4 \(IndexError"),
    "queries of another shape": (
        lambda d: d.fitted.pairs(TensorDataset(torch.randn(3, 7), Y[:3])),
        r"on examples 0, 1, 2 \(RuntimeError: mat1 and mat2",
    ),
    "a late error of a task": (
        lambda d: d.new(Broken("label"), labels_of_seven).fit(),
        r"the loss can't be computed on example 20",
    ),
}
IN_MODEL: dict[str, Case] = {
    "weights": (lambda d: d.new(net=diverged()), r"\['0.weight'\] of Sequential hold numbers that are not finite"),
    "a tuple": (lambda d: d.new(loss=lambda m, b: (m(b[0]).sum(), 1)), "returned tuple instead of a loss tensor"),
    "a dict": (lambda d: d.new(loss=lambda m, b: {"loss": m(b[0]).sum()}), "returned dict instead of a loss tensor"),
    "a float": (lambda d: d.new(loss=lambda m, b: 1.0), "returned float instead of a loss tensor: one floating-point"),
    "an integer tensor": (lambda d: d.new(loss=lambda m, b: torch.tensor(3)), "returned a tensor of torch.int64"),
    "a complex one": (lambda d: d.new(loss=lambda m, b: m(b[0]).sum() * 1j), "returned a tensor of torch.complex64"),
    "an error": (lambda d: d.new(loss=lambda m, b: b[5]), r"on a batch of the training data \(IndexError: list index"),
    "verify": (lambda d: d.new(verify="no"), "verify='no'; expected True or False"),
    "examples by name": (lambda d: d.new(examples="all"), "indices must be integers, got"),
    "bytes": (lambda d: d.new(examples=b"12"), "indices must be integers, got"),
    "a mapping": (lambda d: d.new(examples={1: 2}), "the values of a mapping would be ignored; pass its keys"),
}
IN_ARGUMENTS: dict[str, Case] = {
    "factor_examples": (
        lambda d: d.plain.fit(factor_examples=torch.tensor([1, 2])),
        r'factor_examples=tensor\(\[1, 2\]\); expected an integer >= 1, or "auto"',
    ),
    "by_layer": (lambda d: d.fitted.pairs(d.test, by_layer="0"), "by_layer='0'; expected True or False"),
    "a path that is a number": (lambda d: d.fitted.pairs(d.test, path=3), "path is 3; expected a path"),
    "an empty path": (lambda d: d.fitted.pairs(d.test, path=""), "path is ''; expected a path"),
    "a group by name": (lambda d: d.pairs.group("a"), "indices must be integers, got"),
    "a group twice": (lambda d: d.pairs.group(torch.tensor([1, 1])), "holds repeated indices; expected distinct"),
    "a group as a mask": (lambda d: d.pairs.group(Y == 0), r"indices must be integers, got \[True, .*flatnonzero"),
    "the mean of the strongest": (lambda d: mean_scores([d.top]), "a member is a TopScores; expected `PairwiseScores`"),
    "the mean of tensors": (lambda d: mean_scores([d.pairs, d.pairs.scores]), "a member is a Tensor; expected"),
    "the mean of nothing": (lambda d: mean_scores(None), "a member is a NoneType; expected `PairwiseScores`"),
    "the mean of text": (lambda d: mean_scores("ab"), "a member is a str; expected `PairwiseScores`"),
    "a measurement that fails": (
        lambda d: d.fitted.measure(d.test, lambda m, b: b[9]),
        r"measurement can't be computed on the queries \(IndexError: .*It is called with \(module, batch\)",
    ),
    "one that takes less": (lambda d: d.fitted.value(d.test, lambda m: 1), r"can't be computed on the queries \(TypeE"),
    "a group of texts": (lambda d: d.gap(["a", "b"] * 3), "`group` is a list that no tensor can be made of; expected"),
    "a group that is text": (lambda d: d.gap("g"), "`group` is a str that no tensor can be made of"),
    "epsilon": (lambda d: AdversarialLoss.fgsm("a"), "epsilon='a'; expected a finite number > 0"),  # type: ignore[arg-type]
    "steps": (lambda d: AdversarialLoss.pgd(0.1, 2.5), "steps=2.5; expected an integer >= 1"),  # type: ignore[arg-type]
    "leverage": (lambda d: d.fitted.remove([1], leverage="yes"), "leverage='yes'; expected True or False"),
    "a decay that is text": (lambda d: d.fitted.remove([1], weight_decay="a"), "weight_decay='a'; expected a finite"),
    "a negative decay": (lambda d: d.fitted.remove([1], weight_decay=-1.0), "weight_decay=-1.0; expected a finite"),
    "a decay of NaN": (lambda d: d.along.source(d.test, weight_decay=np.nan), "weight_decay=nan; expected a finite"),
    "a decay of nobody": (
        lambda d: d.fitted.remove([1], weight_decay={"zz": 0.1}),
        r"weight_decay names \['zz'\]; expected parameters of the model, such as \['0.weight'",
    ),
    "an update of nothing": (lambda d: d.fitted.remove([1]).applied_to_copy(None), "the model is a NoneType; expected"),
    "masks": (lambda d: d.plain.dropout_ensemble(d.test, masks="3"), "masks='3'; expected an integer >= 1"),
    "masks by half": (lambda d: d.plain.dropout_ensemble(d.test, masks=2.5), "masks=2.5; expected an integer >= 1"),
    "a seed": (lambda d: d.plain.dropout_ensemble(d.test, seed=-1), "seed=-1; expected an integer >= 0"),
    "no checkpoints": (lambda d: d.fitted.along(None), "there is a NoneType, not a list of checkpoints; pass those"),
    "a stream of checkpoints": (
        lambda d: d.fitted.along(each for each in [d.checkpoint]),
        "there is a generator, not a list of checkpoints",
    ),
    "checkpoints by step": (lambda d: d.fitted.along({1: d.checkpoint}), "there is a dict, not a list of checkpoints"),
    "segments": (lambda d: d.along.source(d.test, segments="a"), "segments='a'; expected an integer >= 1"),
    "a batch": (lambda d: d.along.diff_in(d.test, batch=2.5), "batch=2.5; expected an integer >= 1"),
    "a drawn batch": (lambda d: d.along.diff_in(d.test, seed="a"), "seed='a'; expected an integer >= 0"),
    "save": (lambda d: d.fitted.save(""), "the directory is ''; expected a path"),
    "load": (lambda d: Influence.load(None, d.net, None, d.train), "the directory is None; expected a path"),  # type: ignore[arg-type]
}
IN_CHECKPOINTS: dict[str, Case] = {
    "of no model": (lambda d: Checkpoint.of("net", 1), "the model is a str; expected a torch module"),  # type: ignore[arg-type]
    "step": (lambda d: d.of(step="a"), "step='a'; expected an integer >= 0"),
    "steps": (lambda d: d.of(steps=-1), "steps=-1; expected an integer >= 0"),
    "a size": (lambda d: d.of(step_sizes={"0.bias": "a"}), r"step_sizes\['0.bias'\]='a'; expected the sum of learning"),
    "a size of NaN": (lambda d: d.of(step_sizes={"0.bias": np.nan}), r"step_sizes\['0.bias'\]=nan; expected"),
    "a size of nobody": (lambda d: d.of(step_sizes={"zz": 0.1}), r"step_sizes\['zz'\]=0.1; expected .* by its name"),
    "preconditioner": (lambda d: d.of(preconditioner=[1]), r"preconditioner=\[1\]; expected tensors shaped like the"),
    "its shape": (
        lambda d: d.of(preconditioner={"0.bias": torch.ones(2)}),
        r"preconditioner\['0.bias'\]=a tensor of shape \[2\]; expected tensors shaped like the parameters",
    ),
    "optimizer": (lambda d: d.of(optimizer=3), "optimizer is a int; expected its name, such as 'SGD'"),
    "sizes of no model": (lambda d: StepSizes("net"), "the model is a str; expected a torch module"),  # type: ignore[arg-type]
    "sizes of no optimizer": (lambda d: d.sizes.record("sgd"), "the optimizer is a str; expected one of torch"),
}
CASES = {f"{part}: {name}": case for part, cases in
         (("data", IN_DATA), ("model", IN_MODEL), ("argument", IN_ARGUMENTS), ("checkpoint", IN_CHECKPOINTS))
         for name, case in cases.items()}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_what_is_wrong_is_told(name: str, door: Door) -> None:
    """By this package, not by whatever it meets inside, and in one sentence."""
    use, message = CASES[name]
    with pytest.raises((ValueError, TypeError, RuntimeError), match=message) as raised:
        use(door)
    assert "lightning_influence" in traceback.extract_tb(raised.value.__traceback__)[-1].filename
    assert "\n" not in str(raised.value)


def test_a_file_of_scores_is_not_replaced(door: Door, tmp_path: Path) -> None:
    """It was, without a word, once the scores were complete."""
    path = tmp_path / "scores.npy"
    np.save(path, np.ones(3))
    with pytest.raises(ValueError, match=r"scores.npy', which exists; expected a new file: delete that one, or pass"):
        door.fitted.pairs(door.test, path=path)
    assert np.load(path).tolist() == [1, 1, 1]
    assert [file.name for file in tmp_path.iterdir()] == ["scores.npy"]


def test_what_stands_for_a_list_will_do(door: Door) -> None:
    assert torch.equal(mean_scores(each for each in [door.pairs]).scores, door.pairs.scores)
    assert torch.equal(mean_scores(door.pairs).scores, door.pairs.scores)  # type: ignore[arg-type]
    assert torch.equal(door.pairs.group(3), door.pairs.scores[:, 3])
    assert door.of(step=np.int64(3)).step == 3


def test_none_is_blamed_where_nothing_passes_any_more(door: Door) -> None:
    """As after an error on the device, where each further call fails, too."""
    device = {"failed": False}

    def loss(model: Any, batch: Any) -> Tensor:
        if device["failed"]:
            raise RuntimeError("device-side assert triggered")
        return F.cross_entropy(model(batch[0]), batch[1])

    influence = door.new(loss=loss)
    device["failed"] = True
    with pytest.raises(RuntimeError, match=r"on examples .* and 14 more \(RuntimeError: device-side assert"):
        influence.scores()
