"""Several training loaders at once: the examples of one are audited, with their own part of the loss."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import CLASSES, FEATURES, make_trainer, vectors
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset
from which_lightning import CombinedLoader, MisconfigurationException, ModelCheckpoint, pl

from lightning_influence import AuditReport, InfluenceAudit
from lightning_influence.gradients.attempts import RoomError

A_SIZE, B_SIZE = 24, 12
A = TensorDataset(*vectors(A_SIZE).tensors, torch.arange(A_SIZE))
B = TensorDataset(vectors(B_SIZE, seed=2).tensors[0], torch.linspace(-1, 1, B_SIZE))
MODES = ("min_size", "max_size_cycle", "max_size")


class Joint(pl.LightningModule):
    """Classes of one loader, numbers of the other, one trunk; ``heard`` is what was trained on, by index."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.classes, self.number = (nn.Linear(FEATURES, 6), nn.Linear(6, CLASSES), nn.Linear(6, 1))
        self.heard: list[tuple[int, float]] = []

    def hidden(self, x: Tensor) -> Tensor:
        return torch.tanh(self.trunk(x))

    def about_a(self, batch: Any) -> Tensor:
        logits = self.classes(self.hidden(batch[0]))
        if self.training:
            losses = F.cross_entropy(logits.detach(), batch[1], reduction="none")
            self.heard += zip(batch[2].tolist(), losses.tolist(), strict=True)
        return F.cross_entropy(logits, batch[1])

    def about_b(self, batch: Any) -> Tensor:
        return F.mse_loss(self.number(self.hidden(batch[0])).squeeze(1), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        a, b = (batch["a"], batch["b"]) if isinstance(batch, dict) else batch
        losses = [of(each) for of, each in ((self.about_a, a), (self.about_b, b)) if each is not None]
        return torch.stack(losses).sum()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", F.cross_entropy(self.classes(self.hidden(batch[0])), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Together(Joint):
    """One forward pass for both."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        a, b = batch["a"], batch["b"]
        hidden = self.hidden(torch.cat([b[0], a[0]]))
        n = len(b[0])
        number, logits = self.number(hidden[:n]).squeeze(1), self.classes(hidden[n:])
        return F.mse_loss(number, b[1]) + F.cross_entropy(logits, a[1])


def loaders(mode: str = "max_size_cycle", *, a: Any = A, b: Any = B, sizes: tuple[int, int] = (4, 3)) -> Any:
    shuffled = [not isinstance(each, IterableDataset) for each in (a, b)]
    made = [DataLoader(d, n, shuffle=s) for d, n, s in zip((a, b), sizes, shuffled, strict=True)]
    return CombinedLoader({"a": made[0], "b": made[1]}, mode)


def fitted(
    directory: Path,
    train: Any = None,
    *audits: InfluenceAudit,
    model: Callable[[], Any] = Joint,
    validation: Any = None,
    **arguments: Any,
) -> Any:
    torch.manual_seed(3)
    made, train = model(), loaders() if train is None else train
    callbacks = [*arguments.pop("callbacks", []), *audits]
    make_trainer(directory, callbacks=callbacks, **arguments).fit(made, train, validation)
    return made


def report_of(directory: Path, train: Any = None, audit: InfluenceAudit | None = None, **arguments: Any) -> Any:
    audit = audit or InfluenceAudit(loader="a")
    made = fitted(directory, train, audit, **arguments)
    return audit.report, made


def gradients_of(module: nn.Module, loss: Callable[[int], Tensor], size: int) -> Tensor:
    rows = [torch.autograd.grad(loss(k), list(module.parameters()), materialize_grads=True) for k in range(size)]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


# ------------------------------------------------------------------------------------------------- the numbers


@pytest.mark.parametrize("mode", MODES)
def test_training_is_the_same_and_every_visit_counts(mode: str, tmp_path: Path) -> None:
    """Of a loader that comes to its end before the other, and of one that starts again."""
    audits = InfluenceAudit(loader="a"), InfluenceAudit(loader="b")
    plain = fitted(tmp_path / "plain", loaders(mode))
    made = fitted(tmp_path, loaders(mode), *audits)
    for expected, found in zip(plain.parameters(), made.parameters(), strict=True):
        assert torch.equal(expected, found)
    assert made.heard == plain.heard
    columns = audits[0].report.columns
    for place, index in enumerate(columns["index"].tolist()):
        own = [loss for k, loss in plain.heard if k == index]
        assert columns["times_seen"][place] == len(own)
        np.testing.assert_allclose(columns["loss_mean"][place], np.mean(own), rtol=1e-5)
    assert columns["label"].tolist() == A.tensors[1][columns["index"]].tolist()
    assert audits[1].report.columns["loss_mean"].shape == (B_SIZE,)


@pytest.mark.parametrize("model", [Joint, Together])
@pytest.mark.parametrize("which", ["a", "b"])
def test_an_example_has_its_own_part_of_the_loss(which: str, model: Any, tmp_path: Path) -> None:
    # Each example has one of the other loader beside it: as many of these count, if there are more.
    a = A if which == "a" else TensorDataset(*A[:B_SIZE])
    audit = InfluenceAudit(loader=which, curvature="ggn", damping=0.1)
    report, made = report_of(tmp_path, loaders(a=a), audit, model=model)
    made.eval()
    parts = {"a": (made.about_a, a, len(a)), "b": (made.about_b, B, B_SIZE)}

    def rows(name: str) -> Tensor:
        about, data, size = parts[name]
        return gradients_of(made, lambda k: about([tensor[k : k + 1] for tensor in data.tensors]), size)

    found, own = report.columns, rows(which)
    np.testing.assert_allclose(found["grad_norm_squared"], own.square().sum(1), rtol=1e-4, atol=1e-8)
    about, data, size = parts[which]
    losses = [float(about([tensor[k : k + 1] for tensor in data.tensors])) for k in range(size)]
    np.testing.assert_allclose(found["loss"], losses, rtol=1e-4, atol=1e-7)
    # The curvature is that of the whole loss: what others hold in place counts, though they are not audited.
    curvature = ggn(made, a) + 0.1 * torch.eye(own.shape[1])
    expected = (own @ torch.linalg.inv(curvature) * own).sum(1)
    np.testing.assert_allclose(found["self_influence"], expected, rtol=1e-3, atol=1e-6)
    alone = ggn(made, a, parts=which) + 0.1 * torch.eye(own.shape[1])
    assert not np.allclose(found["self_influence"], (own @ torch.linalg.inv(alone) * own).sum(1), rtol=1e-2)


def ggn(made: Any, a: TensorDataset = A, parts: str = "ab") -> Tensor:
    """Return the curvature of the sum of both mean losses, densely."""
    size = sum(p.numel() for p in made.parameters())
    total = torch.zeros(size, size)
    if "a" in parts:
        logits = made.classes(made.hidden(a.tensors[0]))
        for row in logits:
            jacobian = _rows(made, row)
            p = row.detach().softmax(0)
            total += jacobian.T @ (torch.diag(p) - torch.outer(p, p)) @ jacobian / len(a)
    if "b" in parts:
        for number in made.number(made.hidden(B.tensors[0])).squeeze(1):
            jacobian = _rows(made, number.reshape(1))
            total += 2 * jacobian.T @ jacobian / B_SIZE
    return total


def _rows(made: Any, outputs: Tensor) -> Tensor:
    parameters = list(made.parameters())
    rows = [torch.autograd.grad(o, parameters, retain_graph=True, materialize_grads=True) for o in outputs]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


def test_features_are_those_of_the_examples(tmp_path: Path) -> None:
    """The last linear map of the step is that of the other loader, or holds rows of both."""

    class Last(Joint):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.about_a(batch["a"]) + self.about_b(batch["b"])

    class Alone(Joint):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.about_a(batch["a"])

    nearest = []
    for model in (Alone, Last, Together):
        report, _ = report_of(tmp_path, model=model, max_epochs=1)
        nearest.append(report.columns["nearest_cosine"])
    # After one epoch the weights are nearly those of the start, in which all three agree.
    for found in nearest[1:]:
        assert np.corrcoef(found, nearest[0])[0, 1] > 0.5


def test_harm_queries_and_the_finished_audit(tmp_path: Path) -> None:
    """Validation data stand where the loader's examples do."""
    validation = DataLoader(vectors(8, seed=4), 4)

    class Validated(Joint):
        def about_a(self, batch: Any) -> Tensor:
            return F.cross_entropy(self.classes(self.hidden(batch[0])), batch[1])

    audit = InfluenceAudit(loader="a", queries="worst", curvature="ggn", damping=0.1)
    report, made = report_of(tmp_path, audit=audit, model=Validated, validation=validation)
    made.eval()
    x, y = vectors(8, seed=4).tensors
    query = gradients_of(made, lambda k: made.about_a([x[k : k + 1], y[k : k + 1]]), 8).mean(0)
    own = gradients_of(made, lambda k: made.about_a([tensor[k : k + 1] for tensor in A.tensors]), A_SIZE)
    expected = -own @ torch.linalg.solve(ggn(made) + 0.1 * torch.eye(own.shape[1]), query)
    np.testing.assert_allclose(report.columns["harm"], expected, rtol=1e-3, atol=1e-6)
    assert report.pairs is not None
    removed = audit.influence("ggn").remove([3, 11])
    assert removed.changes.keys() == dict(made.named_parameters()).keys()


def test_afterwards(tmp_path: Path) -> None:
    audit = InfluenceAudit(loader="a", tracin=None)
    report, made = report_of(tmp_path, audit=audit)
    found = InfluenceAudit(loader="a", tracin=None, dirpath=tmp_path / "later").audit(made, loaders())
    for column in ("self_influence", "loss", "grad_norm_squared"):
        np.testing.assert_allclose(found.columns[column], report.columns[column], rtol=1e-6)


def test_a_run_that_is_resumed_goes_on_with_each_loader(tmp_path: Path) -> None:
    def audits() -> tuple[InfluenceAudit, InfluenceAudit]:
        return InfluenceAudit(loader="a"), InfluenceAudit(loader="b")

    whole = audits()
    fitted(tmp_path / "whole", loaders(), *whole, max_epochs=3)
    first, second = audits(), audits()
    saving = ModelCheckpoint(tmp_path / "kept", save_last=True)
    fitted(tmp_path / "1", loaders(), *first, callbacks=[saving], enable_checkpointing=True, max_epochs=2)
    torch.manual_seed(4)
    trainer = make_trainer(tmp_path / "2", callbacks=list(second), max_epochs=3)
    trainer.fit(Joint(), loaders(), ckpt_path=tmp_path / "kept/last.ckpt")
    for expected, found in zip(whole, second, strict=True):
        assert found.report.columns["times_seen"].sum() == expected.report.columns["times_seen"].sum()


# --------------------------------------------------------------------------------------------------- the loaders


class Rows(IterableDataset[Any]):
    def __init__(self, data: TensorDataset) -> None:
        self.data = data

    def __iter__(self) -> Iterator[Any]:
        return ((*self.data[k][:2], torch.tensor(k)) for k in range(len(self.data)))


class Batches(Dataset[Any]):
    """Hands out whole batches."""

    def __len__(self) -> int:
        return B_SIZE // 3

    def __getitem__(self, index: int) -> Any:
        return [tensor[3 * index : 3 * index + 3] for tensor in B.tensors]


def _taken_apart(rows: list[Any]) -> Any:
    return [torch.stack([x for x, _ in reversed(rows)]), torch.stack([y for _, y in reversed(rows)])]


@pytest.mark.parametrize(
    "other",
    [
        lambda: DataLoader(Rows(B), 3),
        lambda: DataLoader(Batches(), batch_size=None),
        lambda: DataLoader(B, 3, collate_fn=_taken_apart),
        lambda: DataLoader(B, 3, num_workers=1),
        lambda: DataLoader(B, 1),
        lambda: DataLoader(TensorDataset(*B[:1]), 1),
    ],
)
def test_what_the_other_loader_may_be(other: Callable[[], Any], tmp_path: Path) -> None:
    """A stream, whole batches, a collate function that reorders, workers, single examples, one single example."""
    report, made = report_of(tmp_path, {"a": DataLoader(A, 4), "b": other()})
    made.eval()
    own = gradients_of(made, lambda k: made.about_a([tensor[k : k + 1] for tensor in A.tensors]), A_SIZE)
    np.testing.assert_allclose(report.columns["grad_norm_squared"], own.square().sum(1), rtol=1e-4, atol=1e-8)
    assert not report.columns["times_seen"].min() < 2


def test_a_stream_among_several(tmp_path: Path) -> None:
    train = {"a": DataLoader(Rows(A), 4), "b": DataLoader(B, 3)}
    found, made = report_of(tmp_path, train, InfluenceAudit(loader="a", sample_id=2))
    assert found.columns["id"].tolist() == list(range(A_SIZE))
    plain, _ = report_of(tmp_path, {"a": DataLoader(A, 4), "b": DataLoader(B, 3)})
    for column in ("loss_mean", "grad_norm_squared", "loss", "times_seen"):
        np.testing.assert_allclose(found.columns[column], plain.columns[column], rtol=1e-5)


@pytest.mark.parametrize("around", [lambda a, b: [a, b], lambda a, b: (a, b)])
def test_a_list_of_loaders(around: Any, tmp_path: Path) -> None:
    report, _ = report_of(tmp_path, around(DataLoader(A, 4), DataLoader(B, 3)), InfluenceAudit(loader=1))
    assert len(report.columns["index"]) == B_SIZE
    assert report.manifest["arguments"]["loader"] == 1
    assert any("the loader '1'" in note for note in report.manifest["notes"])


def test_nested_loaders(tmp_path: Path) -> None:
    class Nested(Joint):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step({"a": batch["labelled"][0], "b": batch["more"]}, batch_idx)

    train = {"labelled": [DataLoader(A, 4)], "more": DataLoader(B, 3)}
    report, _ = report_of(tmp_path, train, InfluenceAudit(loader="labelled/0"), model=Nested)
    assert len(report.columns["index"]) == A_SIZE


def test_loaders_that_are_loaded_again(tmp_path: Path) -> None:
    class Loading(Joint):
        def train_dataloader(self) -> Any:
            return {"a": DataLoader(A, 4, shuffle=True), "b": DataLoader(B, 3, shuffle=True)}

    audit = InfluenceAudit(loader="a")
    torch.manual_seed(3)
    made = Loading()
    make_trainer(tmp_path, callbacks=[audit], reload_dataloaders_every_n_epochs=1, max_epochs=3).fit(made)
    assert audit.report.columns["times_seen"].tolist() == [3] * A_SIZE


# ---------------------------------------------------------------------------------------------- what is refused


class Pairs(Joint):
    """A contrastive loss: neither part of a pair has a loss of its own."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        a, b = (self.hidden(batch[name][0]) for name in ("a", "b"))
        n = min(len(a), len(b))
        return F.cross_entropy(a[:n] @ b[:n].T, torch.arange(n))


class ByHand(Joint):
    def about_b(self, batch: Any) -> Tensor:
        return (self.number(self.hidden(batch[0])).squeeze(1) - batch[1]).square().mean()


class Weighted(Joint):
    """The loss of one loader is weighed by what the other one holds."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.about_a(batch["a"]) * batch["b"][0].square().mean()


@pytest.mark.parametrize(
    ("model", "which", "match"),
    [
        (Pairs, "a", r"examples of this loader and of others \('b'\).*pass `task=`.*`?batch\[\"a\"\]"),
        (Weighted, "a", r"examples of this loader and of others \('b'\)"),
        (ByHand, "b", r"loader='b': part of the loss depends on its examples, and is no known loss call"),
    ],
)
def test_losses_that_have_no_part_of_their_own(model: Any, which: str, match: str, tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=match):
        report_of(tmp_path, {"a": DataLoader(A, 4), "b": DataLoader(B, 4)}, InfluenceAudit(loader=which), model=model)


class Replay(pl.LightningModule):
    """Examples of a buffer after the new ones, one call of the loss for both."""

    def __init__(self, buffer_first: bool = False) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(FEATURES, 6), nn.Tanh(), nn.Linear(6, CLASSES))
        self.order = ("b", "a") if buffer_first else ("a", "b")
        self.heard: list[tuple[int, float]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = (torch.cat([batch[name][part] for name in self.order]) for part in (0, 1))
        logits = self.net(x)
        if self.training:
            a = batch["a"]
            losses = F.cross_entropy(self.net(a[0]).detach(), a[1], reduction="none")
            self.heard += zip(a[2].tolist(), losses.tolist(), strict=True)
        return F.cross_entropy(logits, y)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("buffer_first", [False, True])
@pytest.mark.parametrize("size", [3, 4])
def test_a_replay_buffer(buffer_first: bool, size: int, tmp_path: Path) -> None:
    """A mean over both batches: an example weighs in it as in a pass, where both have one size."""
    buffer = TensorDataset(*vectors(B_SIZE, seed=2).tensors, torch.arange(B_SIZE))
    train = loaders(b=buffer, sizes=(4, size))
    report, made = report_of(tmp_path, train, model=lambda: Replay(buffer_first))
    made.eval()
    x, y, _ = A.tensors
    own = gradients_of(made, lambda k: F.cross_entropy(made.net(x[k : k + 1]), y[k : k + 1]) / 2, A_SIZE)
    np.testing.assert_allclose(report.columns["grad_norm_squared"], own.square().sum(1), rtol=1e-4, atol=1e-8)
    assert report.columns["label"].tolist() == y.tolist()
    for place, index in enumerate(report.columns["index"].tolist()):
        heard = [loss for k, loss in made.heard if k == index]
        np.testing.assert_allclose(report.columns["loss_mean"][place], np.mean(heard), rtol=1e-5)


def test_a_part_that_is_written_by_hand_is_no_matter_if_it_is_that_of_others(tmp_path: Path) -> None:
    report, made = report_of(tmp_path, model=ByHand)
    made.eval()
    own = gradients_of(made, lambda k: made.about_a([tensor[k : k + 1] for tensor in A.tensors]), A_SIZE)
    np.testing.assert_allclose(report.columns["grad_norm_squared"], own.square().sum(1), rtol=1e-4, atol=1e-8)
    assert any("lacks a part of the loss" in note for note in report.manifest["notes"])


class Later(Joint):
    """At first the loss is that of one loader; that of the other one joins in later."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.about_a(batch["a"])
        return loss if self.current_epoch < 1 else loss + self.about_b(batch["b"])


class OwnLater(Joint):
    """A further term of the loader's own joins in later."""

    def about_a(self, batch: Any) -> Tensor:
        loss = super().about_a(batch)
        return (
            loss if self.current_epoch < 1 else loss + F.mse_loss(self.hidden(batch[0]), torch.zeros(len(batch[0]), 6))
        )


class OthersByHandLater(Joint):
    """A part that is about the other loader, and is no known loss, joins in later."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.about_a(batch["a"])
        if self.current_epoch < 1:
            return loss
        return loss + 0.3 * self.number(self.hidden(batch["b"][0])).square().mean()


class Shrunk(Joint):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) + 0.01 * self.number.weight.square().sum()


class OwnByHandLater(Joint):
    def about_a(self, batch: Any) -> Tensor:
        loss = super().about_a(batch)
        return loss if self.current_epoch < 1 else loss + 0.3 * self.hidden(batch[0]).square().mean()


class OwnByHandLaterAlone(OwnByHandLater):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.about_a(batch["a"])


@pytest.mark.parametrize(
    ("model", "told", "lacking"),
    [
        (OthersByHandLater, "their part of the loss", True),
        (Shrunk, "their part of the loss", True),
        (OwnByHandLater, "their part of the loss", True),
        (OwnByHandLaterAlone, "a loss that does not depend on those of 'b'", False),
    ],
)
def test_parts_that_are_no_known_loss(model: Any, told: str, lacking: bool, tmp_path: Path) -> None:
    """What can't be told apart is left out, and said to be; without, those of others count as the examples' own."""
    report, made = report_of(tmp_path, model=model, max_epochs=3)
    made.eval()

    class AtTheEnd(model):  # type: ignore[misc]
        current_epoch = 0 if model is OwnByHandLater else 2

    made.__class__ = AtTheEnd
    own = gradients_of(made, lambda k: made.about_a([tensor[k : k + 1] for tensor in A.tensors]), A_SIZE)
    np.testing.assert_allclose(report.columns["grad_norm_squared"], own.square().sum(1), rtol=1e-4, atol=1e-8)
    notes = report.manifest["notes"]
    assert any(f"the loader 'a', and {told}" in note for note in notes)
    assert any("their losses lack what is no known loss call" in note for note in notes) is lacking


class AllByHand(Joint):
    def about_a(self, batch: Any) -> Tensor:
        return (self.hidden(batch[0]).sum(1) - 1).square().mean()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.about_a(batch["a"])
        if self.current_epoch < 1:
            return loss
        return loss + 0.3 * self.number(self.hidden(batch["b"][0])).square().mean()


def test_parts_that_can_not_be_told_apart_any_more(tmp_path: Path) -> None:
    audit = InfluenceAudit(loader="a")
    with pytest.warns(UserWarning, match=r"part of the loss depends on its examples, and is no known loss call"):
        fitted(tmp_path, loaders(), audit, model=AllByHand, max_epochs=2)
    with pytest.raises(RuntimeError, match="is no known loss call"):
        _ = audit.report


def test_another_loader_of_a_single_example(tmp_path: Path) -> None:
    """Nothing changes with it, so that a part written by hand may be about either."""

    class Both(AllByHand):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.about_a(batch["a"]) + self.number(self.hidden(batch["b"][0])).square().mean()

    train = {"a": DataLoader(A, 4), "b": DataLoader(TensorDataset(*B[:1]), 1)}
    with pytest.raises(MisconfigurationException, match=r"no known loss call.*\('b' of a single example\).*`task=`"):
        report_of(tmp_path / "both", train, model=Both)
    by_hand = InfluenceAudit(loader="a", task=lambda module, batch: module.about_a(batch["a"]))
    report_of(tmp_path / "task", train, by_hand, model=Both)
    report, made = report_of(tmp_path / "others", train, model=ByHand)
    made.eval()
    own = gradients_of(made, lambda k: made.about_a([tensor[k : k + 1] for tensor in A.tensors]), A_SIZE)
    np.testing.assert_allclose(report.columns["grad_norm_squared"], own.square().sum(1), rtol=1e-4, atol=1e-8)


def test_a_weight_of_zero_is_no_part_of_its_own(tmp_path: Path) -> None:
    """What rounding leaves of a loss beside its terms changes with the examples, too: 5 of 6 such sums were refused."""

    class Ramped(Joint):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            hidden = self.hidden(batch["a"][0])
            zeros, weight = torch.zeros_like(hidden), float(self.current_epoch)
            own = self.about_a(batch["a"]) * 0.13 + F.mse_loss(hidden, zeros) + F.l1_loss(hidden, zeros) * 0.76
            return (own + F.smooth_l1_loss(hidden, zeros)) / 3 * 0.85 + weight * self.about_b(batch["b"])

    for seed in range(3):
        torch.manual_seed(seed)
        x = torch.randn(A_SIZE, FEATURES)
        report_of(tmp_path / str(seed), loaders(a=TensorDataset(x, *A.tensors[1:])), model=Ramped)


@pytest.mark.parametrize("model", [Joint, ByHand])
def test_a_loader_of_a_single_example(model: Any, tmp_path: Path) -> None:
    """Nothing changes with it, so that nothing of the loss is known to be about it; a task says what is."""
    train = {"a": DataLoader(TensorDataset(*(tensor[:1] for tensor in A.tensors)), 1), "b": DataLoader(B, 4)}
    with pytest.raises(MisconfigurationException, match=r"loader='a'.*has a single example.*`task=`"):
        report_of(tmp_path / "step", train, model=model)
    by_hand = InfluenceAudit(loader="a", task=lambda module, batch: module.about_a(batch["a"]))
    report, made = report_of(tmp_path / "task", train, by_hand, model=model)
    made.eval()
    own = gradients_of(made, lambda k: made.about_a([tensor[k : k + 1] for tensor in A.tensors]), 1)
    np.testing.assert_allclose(report.columns["grad_norm_squared"], own.square().sum(1), rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("own", [True, False])
def test_memory_that_runs_out_in_a_look_is_no_answer(own: bool, tmp_path: Path) -> None:
    """Of a step that a task stands for, any error means that it tells nothing; this one says nothing of the step."""

    class Full(Joint):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            raise torch.OutOfMemoryError if own else ValueError

    train = {"a": DataLoader(A, 4), "b": DataLoader(B, 4)}
    audit = InfluenceAudit(loader="a", task=lambda module, batch: module.about_a(batch["a"]))
    with pytest.raises(RoomError if own else ValueError) as raised:
        fitted(tmp_path, train, audit, model=Full)
    assert ("own_terms_of_step" in [frame.name for frame in raised.traceback]) is own


class ByTurns(Joint):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.about_b(batch["b"]) if batch_idx % 2 else self.about_a(batch["a"])


@pytest.mark.parametrize("model", [Later, OwnLater])
def test_terms_that_join_in_later(model: Any, tmp_path: Path) -> None:
    """Without the parts being told apart anew, an example's loss is that of its company, too, or there is no audit."""
    report, made = report_of(tmp_path, model=model, max_epochs=3)
    made.eval()

    class AtTheEnd(model):  # type: ignore[misc]
        current_epoch = 2

    made.__class__ = AtTheEnd
    own = gradients_of(made, lambda k: made.about_a([tensor[k : k + 1] for tensor in A.tensors]), A_SIZE)
    np.testing.assert_allclose(report.columns["grad_norm_squared"], own.square().sum(1), rtol=1e-4, atol=1e-8)


def test_batches_whose_loss_is_that_of_others_count_for_nobody(tmp_path: Path) -> None:
    audit = InfluenceAudit(loader="a")
    made = fitted(tmp_path, {"a": DataLoader(A, 4), "b": DataLoader(B, 4)}, audit, model=ByTurns)
    columns = audit.report.columns
    for place, index in enumerate(columns["index"].tolist()):
        heard = [loss for k, loss in made.heard if k == index]
        if heard:
            np.testing.assert_allclose(columns["loss_mean"][place], np.mean(heard), rtol=1e-5)
        else:
            assert np.isnan(columns["loss_mean"][place])


class Weights(Replay):
    """The elements of one call for both loaders, weighed by hand."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (x, y, index), (u, v, _) = batch["a"], batch["b"]
        losses = F.cross_entropy(self.net(torch.cat([x, u])), torch.cat([y, v]), reduction="none")
        if self.training:
            self.heard += zip(index.tolist(), losses[: len(x)].tolist(), strict=True)
        return losses[: len(x)].mean() + 0.2 * losses[len(x) :].mean()


def test_elements_of_both_loaders(tmp_path: Path) -> None:
    buffer = TensorDataset(*vectors(B_SIZE, seed=2).tensors, torch.arange(B_SIZE))
    report, made = report_of(tmp_path, loaders(b=buffer), model=Weights)
    for place, index in enumerate(report.columns["index"].tolist()):
        heard = [loss for k, loss in made.heard if k == index]
        np.testing.assert_allclose(report.columns["loss_mean"][place], np.mean(heard), rtol=1e-5)


def only_a(module: Any, batch: Any) -> Tensor:
    x, y, _ = batch["a"]
    return F.cross_entropy(module.classes(module.hidden(x)), y)


@pytest.mark.parametrize("model", [Pairs, Joint])
def test_a_task_about_one_loader(model: Any, tmp_path: Path) -> None:
    """Training tells the dynamics where its own step has a part that is about the loader."""
    train = {"a": DataLoader(A, 4), "b": DataLoader(B, 4)}
    report, made = report_of(tmp_path, train, InfluenceAudit(loader="a", task=only_a), model=model)
    made.eval()
    own = gradients_of(made, lambda k: only_a(made, {"a": [t[k : k + 1] for t in A.tensors]}), A_SIZE)
    np.testing.assert_allclose(report.columns["grad_norm_squared"], own.square().sum(1), rtol=1e-4, atol=1e-8)
    assert ("loss_mean" in report.columns) is (model is Joint)
    assert any("does not depend on those of 'b'" in note for note in report.manifest["notes"])


def test_a_standard_task_about_one_loader(tmp_path: Path) -> None:
    class Called(Pairs):
        def forward(self, x: Tensor) -> Tensor:
            return self.classes(self.hidden(x))

    audit = InfluenceAudit(loader="a", task="classification")
    train = {"a": DataLoader(A, 4), "b": DataLoader(B, 4)}
    report, _ = report_of(tmp_path, train, audit, model=Called)
    assert any('F.cross_entropy(module(batch["a"][0]), batch["a"][1])' in note for note in report.manifest["notes"])


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({}, r"goes over 2 loaders at once \(a, b\).*`InfluenceAudit\(loader='a'\)`.*another audit"),
        ({"loader": "c"}, r"loader='c': training goes over 'a', 'b'; expected one of these"),
        ({"loader": 0}, r"loader=0: training goes over 'a', 'b'"),
        ({"loader": "a", "tracin": "step"}, r"TracIn in flight.*'a': the step goes over 'b', too.*tracin=\"epoch\""),
    ],
)
def test_arguments_that_do_not_fit_the_loaders(arguments: Any, match: str, tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=match):
        fitted(tmp_path, loaders(), InfluenceAudit(**arguments))


def test_a_name_for_the_only_loader(tmp_path: Path) -> None:
    with pytest.raises(
        MisconfigurationException, match=r"loader='a': training goes over one loader.*leave `loader` out"
    ):
        fitted(tmp_path, DataLoader(A, 4), InfluenceAudit(loader="a"))
    with pytest.raises(ValueError, match=re.escape("loader=True; expected the key")):
        InfluenceAudit(loader=True)


def test_a_loader_that_can_be_read_by_nobody_else(tmp_path: Path) -> None:
    class Pipeline:
        def __iter__(self) -> Iterator[Any]:
            return iter(DataLoader(B, 3))

    with pytest.raises(MisconfigurationException, match=r"the loader 'b' is needed.*may share its iterator"):
        report_of(tmp_path, {"a": DataLoader(A, 4), "b": Pipeline()})


def test_reports_are_told_apart(tmp_path: Path) -> None:
    audits = InfluenceAudit(loader="a"), InfluenceAudit(loader="b")
    fitted(tmp_path, loaders(), *audits)
    saved = [AuditReport.load(audit.report.directory) for audit in audits]
    assert [each.manifest["arguments"]["loader"] for each in saved] == ["a", "b"]
