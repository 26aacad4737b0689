"""Every training batch is filed under its own examples, whoever iterates, skips, repeats, sorts or drops what."""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import CLASSES, FEATURES, Classifier, loader, make_trainer, vectors
from own_processes import METHOD
from torch import Tensor, nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
    get_worker_info,
)
from torchdata.stateful_dataloader import StatefulDataLoader
from which_lightning import MisconfigurationException, ModelCheckpoint, pl

from lightning_influence import AuditReport, InfluenceAudit, TracIn
from lightning_influence.data.collation import Collating, DataError
from lightning_influence.data.probing import learn
from lightning_influence.data.source import ExampleSource
from lightning_influence.data.tagging import Drawn, Registry, _kept

SIZE = 22
DATA = TensorDataset(*vectors().tensors, torch.arange(SIZE))


class Noting(Classifier):
    """Knows by the third part of its batches what it was trained on."""

    def __init__(self, lr: float = 0.5) -> None:
        super().__init__(lambda module: torch.optim.SGD(module.parameters(), lr=lr))
        self.losses: dict[int, list[float]] = {k: [] for k in range(SIZE)}
        self.order: list[list[int]] = []
        self.listens = False

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.listens = True

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.listens = False

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        losses = F.cross_entropy(self(batch[0]), batch[1], reduction="none")
        if self.listens:
            self.order.append([int(k) for k in batch[2]])
            for k, loss in dict(zip(self.order[-1], losses.tolist(), strict=True)).items():  # repeats count once
                self.losses[k].append(loss)
        return F.cross_entropy(self(batch[0]), batch[1])


def trained(
    directory: Path, loader: Any, *more: pl.Callback, audit: InfluenceAudit | None = None, **arguments: Any
) -> tuple[AuditReport, Noting]:
    torch.manual_seed(3)
    model, audit = Noting(), audit or InfluenceAudit(curvature="identity")
    make_trainer(directory, callbacks=[audit, *more], **arguments).fit(model, loader)
    assert audit.has_report
    return audit.report, model


def check(report: AuditReport, model: Noting) -> None:
    """Visits and losses are those that the model itself has noted."""
    columns = report.columns
    assert columns["times_seen"].tolist() == [len(model.losses[k]) for k in columns["index"]]
    seen = columns["times_seen"] > 0
    expected = [np.mean(model.losses[k]) for k in columns["index"][seen]]
    np.testing.assert_allclose(columns["loss_mean"][seen], expected, rtol=1e-5)


def counted_for_nobody(report: AuditReport) -> list[str]:
    return [note for note in report.manifest["notes"] if "count for nobody" in note]


# ------------------------------------------------------------------------------------------ somebody else iterates


class Peeks(pl.Callback):
    """Looks at a batch in the middle of an epoch."""

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step % 3 == 1:
            next(iter(trainer.train_dataloader))


class Probes(pl.Callback):
    """Goes through all training data at the end of an epoch, for nearest neighbours."""

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        assert sum(len(batch[1]) for batch in trainer.train_dataloader) == SIZE


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("other", [Peeks, Probes])
def test_others_iterate_the_loader(other: type[pl.Callback], workers: int, tmp_path: Path) -> None:
    """One queue of drawn indices had 22 of 22 examples wrong after a peek."""
    report, model = trained(tmp_path, DataLoader(DATA, 4, shuffle=True, num_workers=workers), other())
    check(report, model)
    assert report.manifest["notes"] == []
    gc.collect()


def test_others_iterate_a_loader_of_persistent_workers(tmp_path: Path) -> None:
    """They share its only iterator: the epoch ends early, with the right examples in what is left."""
    loader = DataLoader(DATA, 4, shuffle=True, num_workers=2, persistent_workers=True)
    report, model = trained(tmp_path, loader, Probes(), max_epochs=3)
    check(report, model)
    assert counted_for_nobody(report) == []
    del loader
    gc.collect()


class Slow(Dataset[Any]):
    """The first batch takes longer than those after it."""

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> Any:
        time.sleep(0.2 * (index == 0))
        return DATA[index]


def test_batches_that_arrive_out_of_order(tmp_path: Path) -> None:
    audit = InfluenceAudit(curvature="identity", tracin=None)
    report, model = trained(tmp_path, DataLoader(Slow(), 4, num_workers=2, in_order=False), audit=audit, max_epochs=1)
    assert model.order[0] != [0, 1, 2, 3]
    check(report, model)
    assert report.manifest["notes"] == []
    gc.collect()


# --------------------------------------------------------------------------------------- loaders of a kind of their own


class Reverses(DataLoader[Any]):
    def __iter__(self) -> Any:
        return reversed(list(super().__iter__()))


class Repeats(DataLoader[Any]):
    def __iter__(self) -> Any:
        for batch in super().__iter__():
            yield batch
            yield batch

    def __len__(self) -> int:
        return 2 * super().__len__()


class Skips(DataLoader[Any]):
    def __iter__(self) -> Any:
        return (batch for number, batch in enumerate(super().__iter__()) if number % 2)

    def __len__(self) -> int:
        return super().__len__() // 2


class Renames(DataLoader[Any]):
    def __iter__(self) -> Any:
        return ((batch[0], batch[1], batch[2]) for batch in super().__iter__())


class Merges(DataLoader[Any]):
    def __iter__(self) -> Any:
        batches = super().__iter__()
        return ([torch.cat(pair) for pair in zip(a, b, strict=True)] for a, b in zip(batches, batches, strict=False))

    def __len__(self) -> int:
        return super().__len__() // 2


class Cuts(DataLoader[Any]):
    def __iter__(self) -> Any:
        return ([part[:2] for part in batch] for batch in super().__iter__())


class Mixes(DataLoader[Any]):
    """Inputs of one batch, labels of the one before."""

    def __iter__(self) -> Any:
        before = None
        for batch in super().__iter__():
            if before is not None and len(batch[0]) == len(before[0]):
                yield [batch[0], before[1], batch[2]]
            before = batch


class Shuffles(DataLoader[Any]):
    """Moves the rows within the tensors of the batch."""

    def __iter__(self) -> Any:
        for batch in super().__iter__():
            for part in batch:
                part.copy_(part.flip(0))
            yield batch


class Exchanges(DataLoader[Any]):
    """The same, giving the tensors other memory."""

    def __iter__(self) -> Any:
        for batch in super().__iter__():
            for part in batch:
                part.data = part.flip(0)
            yield batch


class Scales(DataLoader[Any]):
    """Overwrites inputs, not labels and numbers."""

    def __iter__(self) -> Any:
        for batch in super().__iter__():
            batch[0].mul_(1.5)
            yield batch


class Elsewhere(DataLoader[Any]):
    def _get_iterator(self) -> Any:
        return iter([default_collate([self.dataset[k] for k in range(4)])])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", [Reverses, Repeats, Skips, Renames, Scales])
def test_loaders_that_hand_on_what_was_made(kind: Any, workers: int, tmp_path: Path) -> None:
    report, model = trained(tmp_path, kind(DATA, 4, shuffle=True, num_workers=workers))
    check(report, model)
    assert counted_for_nobody(report) == []
    gc.collect()


@pytest.mark.parametrize("kind", [Merges, Cuts, Mixes, Elsewhere, Shuffles, Exchanges])
def test_loaders_that_make_batches_of_their_own(kind: Any, tmp_path: Path) -> None:
    audit = InfluenceAudit(curvature="identity", tracin="step", verify=False)
    report, model = trained(tmp_path, kind(DATA, 4), audit=audit)
    assert len(model.order) > 0
    assert "times_seen" not in report.columns or not report.columns["times_seen"].any()
    assert not report.columns["tracin"].any()
    (note,) = counted_for_nobody(report)
    assert f"{len(model.order)} of {len(model.order)} training batches" in note
    assert "merged, cut, copied" in note


def test_a_copy_of_the_loader_draws_for_itself(tmp_path: Path) -> None:
    """A copy whose iterators were the original's would draw from its generator, and change the order of training."""

    class Copies(pl.Callback):
        def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
            assert len(list(copy.deepcopy(trainer.train_dataloader))) == 6

    orders = []
    for callbacks in ([], [InfluenceAudit(curvature="identity"), Copies()]):
        torch.manual_seed(3)
        model = Noting()
        loader = DataLoader(DATA, 4, shuffle=True, generator=torch.Generator().manual_seed(1))
        make_trainer(tmp_path / str(len(callbacks)), callbacks=callbacks).fit(model, loader)
        orders.append(model.order)
    assert orders[0] == orders[1]


class Asks(Dataset[Any]):
    """Looks at itself from inside a worker."""

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> Any:
        info = get_worker_info()
        assert info is None or info.dataset is self
        assert not hasattr(self, "started") or self.started == info.id  # type: ignore[union-attr]
        return DATA[index]


def start(worker: int) -> None:
    get_worker_info().dataset.started = worker  # type: ignore[union-attr]


def test_workers_have_the_users_own_data_set(tmp_path: Path) -> None:
    loader = DataLoader(Asks(), 4, num_workers=2, worker_init_fn=start)
    audit = InfluenceAudit(curvature="identity", tracin=None, verify=False)
    report, model = trained(tmp_path, loader, audit=audit, max_epochs=1)
    check(report, model)
    source, indices = ExampleSource.from_loader(loader), list(range(SIZE))
    met = [index for chosen, _ in source.batches(indices, 4) for index in chosen]
    assert met == indices, "workers of passes have it, too"
    assert loader.worker_init_fn is start
    assert counted_for_nobody(report) == []
    gc.collect()


def test_workers_that_are_started_afresh(tmp_path: Path) -> None:
    """What they are sent has to be picklable."""
    loader = DataLoader(DATA, 4, shuffle=True, num_workers=1, multiprocessing_context=METHOD)
    audit = InfluenceAudit(curvature="identity", tracin=None, verify=False)
    report, model = trained(tmp_path, loader, audit=audit, max_epochs=1)
    check(report, model)
    assert counted_for_nobody(report) == []
    gc.collect()


# ------------------------------------------------------------------------------------------------------- resuming


class Resumable(DataLoader[Any]):
    """What Lightning asks of a loader that goes on in the middle of an epoch."""

    done = skip = 0

    def state_dict(self) -> dict[str, Any]:
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.skip = state["done"]

    def __iter__(self) -> Any:
        batches, self.done, self.skip = super().__iter__(), self.skip, 0
        for _ in range(self.done):
            next(batches)
        for batch in batches:
            self.done += 1
            yield batch


class StopsAt(pl.Callback):
    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == 8:
            trainer.should_stop = True


@pytest.mark.parametrize(("kind", "workers"), [(Resumable, 0), (StatefulDataLoader, 0), (StatefulDataLoader, 2)])
def test_going_on_in_the_middle_of_an_epoch(kind: Any, workers: int, tmp_path: Path) -> None:
    """The sampler is asked for the whole epoch again, the loader hands on what is left of it."""
    kept = ModelCheckpoint(tmp_path, every_n_train_steps=8, save_top_k=-1, filename="mid")
    _, model = trained(
        tmp_path / "a", kind(DATA, 4, num_workers=workers), StopsAt(), kept, enable_checkpointing=True, max_epochs=3
    )
    before, audit = model.losses, InfluenceAudit(curvature="identity")
    model = Noting()
    model.losses = before
    trainer = make_trainer(tmp_path / "b", callbacks=[audit], max_epochs=3)
    trainer.fit(model, kind(DATA, 4, num_workers=workers), ckpt_path=tmp_path / "mid.ckpt")
    assert model.order[0] == [8, 9, 10, 11]
    assert audit.has_report
    check(audit.report, model)
    assert audit.report.columns["times_seen"].tolist() == [3] * SIZE
    assert counted_for_nobody(audit.report) == []
    gc.collect()


# -------------------------------------------------------------------------------------------------------- the registry


def test_batches_are_held_by_nobody_but_their_owner() -> None:
    registry = Registry()
    batches: list[Any] = [{"x": torch.zeros(2), "more": [torch.ones(2), "text"]} for _ in range(100)]
    for number, batch in enumerate(batches):
        registry.add(batch, Drawn(number))
    assert [registry.find(batch).indices for batch in reversed(batches)] == list(reversed(range(100)))  # type: ignore[union-attr]
    assert registry.find({"x": batches[0]["x"], "more": batches[1]["more"]}) is None
    assert registry.find([batches[0]["x"]]) is None
    del batches, batch
    assert registry._known == {}


def test_batches_without_anything_to_point_to() -> None:
    registry = Registry()
    batches = [["a", 1], ["b", 2]]
    for number, batch in enumerate(batches):
        registry.add(batch, Drawn(number))
    assert [registry.find(batch).indices for batch in reversed(batches)] == [1, 0]  # type: ignore[union-attr]
    assert registry.find(["a", 1]) is None


# ---------------------------------------------------------------------------------------------------- collate functions


class Texts(Dataset[Any]):
    """Sequences of tokens in order of their length, each with its label and number."""

    def __init__(self, broken: int | None = None) -> None:
        self.broken = broken

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> Any:
        if index == self.broken:
            return None
        generator = torch.Generator().manual_seed(index)
        return torch.randint(1, 20, (10 - index // 3,), generator=generator), index % CLASSES, index


class Bags(Noting):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.EmbeddingBag(20, 6, padding_idx=0), nn.Linear(6, CLASSES))


def padded(items: list[Any], *, left: bool = False) -> Any:
    side = "left" if left else "right"
    return (
        nn.utils.rnn.pad_sequence([item[0] for item in items], batch_first=True, padding_side=side),
        torch.tensor([item[1] for item in items]),
        [item[2] for item in items],
    )


def sorts(items: list[Any]) -> Any:
    return padded(sorted(items, key=lambda item: -len(item[0])))


def sorts_and_pads_left(items: list[Any]) -> Any:
    return padded(sorted(items, key=lambda item: len(item[0])), left=True)


def sorts_now_and_then(items: list[Any]) -> Any:
    """Only batches with the shortest text, which hardly any look has in it."""
    return sorts(items[::-1]) if any(item[2] == SIZE - 1 for item in items) else padded(items)


def cuts(items: list[Any]) -> Any:
    return padded([(item[0][:4], *item[1:]) for item in sorted(items, key=lambda item: item[1])])


def drops(items: list[Any]) -> Any:
    return padded([item for item in items if item is not None])


def refills(items: list[Any]) -> Any:
    present = [item for item in items if item is not None]
    return padded([Texts()[0] if item is None else item for item in items]) if present else None


def bags(
    directory: Path, data: Dataset[Any], collate: Callable[..., Any], **arguments: Any
) -> tuple[AuditReport, Bags]:
    torch.manual_seed(3)
    audit, model = InfluenceAudit(), Bags()
    loader = DataLoader(data, 5, shuffle=True, collate_fn=collate, **arguments)
    make_trainer(directory, callbacks=[audit]).fit(model, loader)
    assert audit.has_report
    return audit.report, model


def own_norms(model: Bags, data: Dataset[Any], indices: Any) -> list[float]:
    norms = []
    for k in indices:
        tokens, label, _ = data[int(k)]
        loss = F.cross_entropy(model(tokens[None]), torch.tensor([label]))
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        norms.append(sum(float(gradient.double().square().sum()) for gradient in gradients))
    return norms


@pytest.mark.parametrize(
    ("collate", "workers"), [(sorts, 0), (sorts, 2), (sorts_and_pads_left, 0), (sorts_now_and_then, 0)]
)
def test_collate_functions_that_sort(collate: Callable[..., Any], workers: int, tmp_path: Path) -> None:
    """Filed in the order of drawing, all 22 mean losses were those of others. The passes know the order, too."""
    report, model = bags(tmp_path, Texts(), collate, num_workers=workers)
    check(report, model)
    assert report.manifest["notes"] == []
    norms = own_norms(model, Texts(), report.columns["index"])
    np.testing.assert_allclose(report.columns["grad_norm_squared"], norms, rtol=1e-4)
    gc.collect()


class Ladder(Texts):
    """No two of them are of one length."""

    def __getitem__(self, index: int) -> Any:
        generator = torch.Generator().manual_seed(index)
        return torch.randint(1, 20, (3 + index,), generator=generator), index % CLASSES, index


@pytest.mark.parametrize("collate", [sorts, sorts_and_pads_left])
def test_a_collate_function_that_sorts_by_what_all_differ_in(collate: Callable[..., Any], tmp_path: Path) -> None:
    """It leaves only copies in place: the model counted as untraceable, each example got a pass, large ones none."""
    report, model = bags(tmp_path, Ladder(), collate)
    check(report, model)
    assert report.manifest["notes"] == []
    assert set(report.manifest["coverage"]["covered"]) == {"net.0", "net.1"}
    assert "one example at a time" not in report.manifest["coverage"]["summary"]
    norms = own_norms(model, Ladder(), report.columns["index"])
    np.testing.assert_allclose(report.columns["grad_norm_squared"], norms, rtol=1e-4)
    gc.collect()


def test_a_collate_function_that_sorts_and_cuts(tmp_path: Path) -> None:
    report, model = bags(tmp_path, Texts(), cuts)
    check(report, model)
    assert report.manifest["notes"] == []


def test_a_collate_function_that_drops_a_broken_example(tmp_path: Path) -> None:
    """One missing file ended the audit at the end of training."""
    report, model = bags(tmp_path, Texts(broken=7), drops)
    check(report, model)
    assert report.columns["index"].tolist() == [k for k in range(SIZE) if k != 7]
    assert report.manifest["notes"] == ["1 of 22 examples are not scored: 7 (the collate function leaves it out)"]
    norms = own_norms(model, Texts(), report.columns["index"])
    np.testing.assert_allclose(report.columns["grad_norm_squared"], norms, rtol=1e-4)
    assert np.isfinite(report.columns["tracin"]).all()


def test_a_collate_function_that_puts_another_in_its_place(tmp_path: Path) -> None:
    """Batches with example 0 in place of the broken one count for nobody; the others are right."""
    report, model = bags(tmp_path, Texts(broken=7), refills)
    (note,) = counted_for_nobody(report)
    assert "rows of no example that was drawn" in note
    assert f"2 of {len(model.order)} training batches" in note
    assert 7 not in report.columns["index"]


def numbers_lost(items: list[Any]) -> Any:
    """Sorts, and hands on nothing that was in the examples but a label that many share."""
    items = sorted(items, key=lambda item: item[0].sum())
    return torch.stack([item[0].float() * 2 + 1 for item in items]), torch.tensor([item[1] for item in items])


class Plain(Dataset[Any]):
    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> Any:
        return DATA[index][:2]


def test_an_order_that_cannot_be_followed_is_refused(tmp_path: Path) -> None:
    audit = InfluenceAudit()
    loader = DataLoader(Plain(), 5, shuffle=True, collate_fn=numbers_lost)
    with pytest.raises(MisconfigurationException, match="numbers_lost puts examples in an order of its own.*number"):
        make_trainer(tmp_path, callbacks=[audit]).fit(Classifier(), loader)


def test_what_was_refused_is_refused_again() -> None:
    """The second look at the same source took it for a collate function that keeps the order."""
    source = ExampleSource(Plain(), batch_size=5, collate_fn=numbers_lost)
    for _ in range(2):
        with pytest.raises(DataError, match="in an order of its own"):
            _ = source.collation


def image(index: int) -> Any:
    generator = torch.Generator().manual_seed(index)
    boxes = {"boxes": torch.rand(1 + index % 3, 4, generator=generator)}
    return {"image": torch.randn(3, 4, 4, generator=generator), "target": boxes, "label": index % 2}


def pops(items: list[Any]) -> Any:
    """Takes the examples apart, as collators of features do."""
    labels = [item.pop("label") for item in items[::-1]]
    return {"pixels": torch.stack([item.pop("image") for item in items[::-1]]), "labels": torch.tensor(labels)}


@pytest.mark.parametrize(
    ("collate", "expected"),
    [
        (lambda items: [(item["image"], item["target"]) for item in items], [0, 1, 2, 3]),
        (lambda items: tuple(zip(*((i["label"], i["target"]) for i in items[::-1]), strict=True)), [3, 2, 1, 0]),
        (pops, [3, 2, 1, 0]),
        (lambda items: torch.stack([item["image"] for item in items if item["label"]]), [1, 3]),
    ],
    ids=["list", "detection", "popped", "filter"],
)
def test_what_is_learned_of_a_collate_function(collate: Any, expected: list[int]) -> None:
    collated = Collating(collate, learn(image, 40, collate))([image(k) for k in range(4)])
    assert collated.order.tolist() == expected


@pytest.mark.parametrize("repeated", [lambda items: items + items, lambda items: [i for i in items for _ in range(3)]])
def test_several_rows_of_an_example_are_refused(repeated: Any, tmp_path: Path) -> None:
    """They ended in an error of torch about sizes 40 and 20."""
    loader = DataLoader(DATA, 5, shuffle=True, collate_fn=lambda items: default_collate(repeated(items)))
    with pytest.raises(MisconfigurationException, match="makes several rows of one example.*sampler"):
        make_trainer(tmp_path, callbacks=[InfluenceAudit()]).fit(Classifier(), loader)


class FromTheEnd:
    """A batch sampler that counts from the end."""

    def __iter__(self) -> Any:
        return iter([[-1, 0, -2], [3, -5]])

    def __len__(self) -> int:
        return 2


def test_indices_that_count_from_the_end(tmp_path: Path) -> None:
    audit = InfluenceAudit(curvature="identity", tracin="step")
    report, model = trained(tmp_path, DataLoader(DATA, batch_sampler=FromTheEnd()), audit=audit)
    check(report, model)
    assert report.columns["index"].tolist() == sorted(k % len(DATA) for k in (-1, 0, -2, 3, -5))
    assert not any("failed" in note for note in report.manifest["notes"])


# ------------------------------------------------------------------------------------------------------ rows end to end


class Graphs(Dataset[Any]):
    """Nodes with a label each; nearly all examples have four."""

    sizes = [4] * 16 + [5, 3] * 3

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> Any:
        generator = torch.Generator().manual_seed(index)
        n = self.sizes[index]
        return torch.randn(n, FEATURES, generator=generator), torch.randint(CLASSES, (n,), generator=generator)


class RareGraphs(Graphs):
    sizes = [4] * 21 + [8]


def joins(items: list[Any]) -> Any:
    return torch.cat([item[0] for item in items]), torch.cat([item[1] for item in items])


def joins_by_size(items: list[Any]) -> Any:
    return joins(sorted(items, key=lambda item: len(item[1])))


@pytest.mark.parametrize("data", [Graphs(), RareGraphs()], ids=["some", "one"])
@pytest.mark.parametrize("collate", [joins, joins_by_size])
def test_rows_of_several_lengths(data: Graphs, collate: Callable[..., Any], tmp_path: Path) -> None:
    """Sums of 3, 4 and 5 that are multiples of the batch size were read as equal: 72 % off at full coverage."""
    torch.manual_seed(3)
    audit, model = InfluenceAudit(tracin="step"), Classifier()
    make_trainer(tmp_path, callbacks=[audit]).fit(model, DataLoader(data, 4, shuffle=True, collate_fn=collate))
    report = audit.report
    assert report is not None
    mean = sum(data.sizes) / SIZE
    expected = []
    for k in range(SIZE):
        x, y = data[k]
        loss = F.cross_entropy(model(x), y, reduction="sum") / mean
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        expected.append(sum(float(gradient.double().square().sum()) for gradient in gradients))
    np.testing.assert_allclose(report.columns["grad_norm_squared"], expected, rtol=1e-4)
    assert report.manifest["coverage"]["share"] == 1
    assert any("rows of several lengths lie end to end" in note for note in report.manifest["notes"])


# ---------------------------------------------------------------------------------------------- never drawn, other data


def test_examples_that_are_never_drawn_are_not_audited(tmp_path: Path) -> None:
    weights = [0.0] * 5 + [1.0] * (SIZE - 5)
    loader = DataLoader(DATA, 4, sampler=WeightedRandomSampler(weights, SIZE))
    report, model = trained(tmp_path, loader, max_epochs=3)
    seen = [k for k in range(SIZE) if model.losses[k]]
    assert report.columns["index"].tolist() == seen
    check(report, model)
    assert (
        f"{SIZE - len(seen)} examples of the data set were never drawn, and are not audited" in report.manifest["notes"]
    )
    assert np.isfinite(report.columns["tracin"]).all()


class Reloads(Noting):
    """Makes a loader for every epoch."""

    def __init__(self, make: Callable[[int], Dataset[Any]]) -> None:
        super().__init__()
        self.make, self.round = make, -1

    def train_dataloader(self) -> Any:
        self.round += 1
        return DataLoader(self.make(self.round), 4, shuffle=True)


def grown(round_: int) -> Dataset[Any]:
    return TensorDataset(*(part[: 10 + 6 * round_] for part in DATA.tensors))


def corrected(round_: int) -> Dataset[Any]:
    x, y, k = DATA.tensors
    return TensorDataset(x, (y + (round_ == 0)) % CLASSES, k)


class Shifted(Dataset[Any]):
    def __init__(self, by: int) -> None:
        self.by = by

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> Any:
        return DATA[(index + self.by) % SIZE]


@pytest.mark.parametrize(
    ("make", "changes"),
    [(grown, [1, 2]), (corrected, [1]), (lambda round_: Shifted(round_ // 2), [2])],
    ids=["more", "labels", "moved"],
)
def test_other_data_are_not_mixed_with_the_last(make: Any, changes: list[int], tmp_path: Path) -> None:
    audit, model = InfluenceAudit(), Reloads(make)
    make_trainer(tmp_path, callbacks=[audit], max_epochs=3, reload_dataloaders_every_n_epochs=1).fit(model)
    report, last = audit.report, make(2)
    assert report is not None
    assert report.columns["index"].tolist() == list(range(len(last)))
    assert report.columns["label"].tolist() == [int(last[k][1]) for k in range(len(last))]
    assert report.columns["times_seen"].tolist() == [3 - changes[-1]] * len(last)
    assert any(f"changed with the epochs {changes}" in note for note in report.manifest["notes"])
    numbers = [int(last[k][2]) for k in report.columns["index"]]
    expected = [np.mean(model.losses[k][changes[-1] - 3 :]) for k in numbers]
    np.testing.assert_allclose(report.columns["loss_mean"], expected, rtol=1e-5)


def test_the_same_data_loaded_again_are_one_run(tmp_path: Path) -> None:
    audit, model = InfluenceAudit(), Reloads(lambda round_: Shifted(0))
    make_trainer(tmp_path, callbacks=[audit], max_epochs=3, reload_dataloaders_every_n_epochs=1).fit(model)
    assert audit.has_report
    check(audit.report, model)
    assert audit.report.manifest["notes"] == []


# --------------------------------------------------------------------------------------------------------------- labels


class Relabelled(Dataset[Any]):
    """Draws a new label each time, as label noise for regularisation does."""

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> Any:
        x, _, k = DATA[index]
        return x, int(torch.randint(CLASSES, ())), k


@pytest.mark.parametrize("tracin", ["epoch", "step"])
def test_a_batch_with_other_labels_than_before_counts_for_nobody(tracin: Any, tmp_path: Path) -> None:
    class Changes(pl.Callback):
        """One label is another from the second epoch on, behind the back of everybody."""

        def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
            data.tensors[1][3] = (DATA.tensors[1][3] + (trainer.current_epoch > 0)) % CLASSES

        def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
            data.tensors[1][3] = DATA.tensors[1][3]

    data = TensorDataset(DATA.tensors[0], DATA.tensors[1].clone(), DATA.tensors[2])
    audit = InfluenceAudit(curvature="identity", tracin=TracIn(mode=tracin))
    report, model = trained(tmp_path, DataLoader(data, 4, shuffle=True), Changes(), audit=audit, max_epochs=3)
    contradicted = [order for order in model.order[6:] if 3 in order]
    assert len(contradicted) == 2
    expected = [3 - sum(k in order for order in contradicted) for k in range(SIZE)]
    assert report.columns["times_seen"].tolist() == expected
    (note,) = counted_for_nobody(report)
    assert note.startswith("2 of 18 training batches count for nobody: they had other labels")
    if tracin == "step":
        assert audit._recording is not None
        assert audit._recording.visits is not None
        assert audit._recording.visits.sums["visits"].tolist() == expected


def test_labels_that_are_drawn_anew_lose_nothing(tmp_path: Path) -> None:
    report, model = trained(tmp_path, DataLoader(Relabelled(), 4, shuffle=True), max_epochs=3)
    check(report, model)
    assert counted_for_nobody(report) == []
    assert any("other labels each time" in note for note in report.manifest["notes"])


class Moving(Classifier):
    """Moves the inputs of a batch in training alone: what a look in evaluation mode sees is in order."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, labels = batch[0], batch[1]
        if self.training:
            places = torch.randperm(len(inputs))
            inputs, labels = inputs[places], labels[places]
        return F.cross_entropy(self(inputs), labels)


@pytest.mark.parametrize("tracin", ["epoch", "step"])
def test_rows_that_move_in_training_alone(tracin: Any, tmp_path: Path) -> None:
    """A few batches have the right labels by chance: what they say would be filed under other examples, too."""
    audit = InfluenceAudit(tracin=tracin, curvature="identity")
    make_trainer(tmp_path, callbacks=[audit], max_epochs=6).fit(Moving(), loader(vectors()))
    assert audit.has_report
    assert not {"loss_mean", "aum", "el2n"} & audit.report.columns.keys()
    assert ("tracin" in audit.report.columns) == (tracin == "epoch")
    assert any("what training said of each example is left out" in note for note in audit.report.manifest["notes"])


class WithoutTheNinth(DataLoader[Any]):
    def __iter__(self) -> Any:
        return (batch for batch in super().__iter__() if 9 not in batch[2])


def test_examples_that_a_loader_keeps_to_itself_are_not_audited(tmp_path: Path) -> None:
    x, y = vectors().tensors
    audit = InfluenceAudit(curvature="identity")
    data = WithoutTheNinth(TensorDataset(x, y, torch.arange(len(x))), batch_size=4)
    make_trainer(tmp_path, callbacks=[audit]).fit(Classifier(), data)
    assert audit.has_report
    assert audit.report.columns["index"].tolist() == [k for k in range(len(x)) if k not in range(8, 12)]
    assert any("4 examples of the data set were never drawn" in note for note in audit.report.manifest["notes"])


@pytest.mark.parametrize("drawn", [[3, -1], [np.int64(3), -1], [torch.tensor(3), torch.tensor(-1)], np.array([3, -1])])
def test_integers_of_whatever_kind_are_kept_as_such(drawn: Any) -> None:
    assert np.frombuffer(_kept(drawn), np.int64).tolist() == [3, -1]


@pytest.mark.parametrize("drawn", [[True, False], [0.5], ["a"], [(0, 1), (2, 3)], [2**70], [None]])
def test_what_is_no_index_is_left_as_it_is(drawn: Any) -> None:
    assert _kept(drawn) is drawn
