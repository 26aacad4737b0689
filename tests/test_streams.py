"""Streams: everything is filed by ids, and met again by going over the loader once more."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import CLASSES, Classifier, Validated, make_trainer, vectors
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate, get_worker_info
from which_lightning import CombinedLoader, MisconfigurationException, ModelCheckpoint, pl

from lightning_influence import AuditReport, InfluenceAudit, Queries
from lightning_influence.data import stream
from lightning_influence.data.collation import DataError
from lightning_influence.data.ids import IdBook, ids_in
from lightning_influence.data.rows import Row, UnlikeError, joined, without_rows
from lightning_influence.data.stream import StreamSource

SIZE = 22
DATA = vectors(SIZE)


def name(k: int) -> str:
    return f"shard/{k:03d}"


class Stream(IterableDataset[Any]):
    """Vectors, labels and keys, shared out over workers; every epoch in another order if there is a generator."""

    def __init__(self, shuffled: bool = False, size: int = SIZE) -> None:
        self.random = random.Random(5) if shuffled else None
        self.size = size

    def order(self) -> list[int]:
        order = list(range(self.size))
        if self.random is not None:
            self.random.shuffle(order)
        return order

    def example(self, k: int) -> Any:
        x, y = DATA[k % SIZE]
        return x, y, name(k)

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        part = slice(None) if info is None else slice(info.id, None, info.num_workers)
        return map(self.example, self.order()[part])


def fitted(
    directory: Path,
    train: Any,
    *,
    audit: InfluenceAudit | None = None,
    model: Callable[[], pl.LightningModule] | None = None,
    validation: Any = None,
    **arguments: Any,
) -> tuple[InfluenceAudit | None, Any]:
    torch.manual_seed(3)
    made = model() if model else Validated() if validation is not None else Classifier()
    callbacks = [*arguments.pop("callbacks", []), *([audit] if audit is not None else [])]
    make_trainer(directory, callbacks=callbacks, **arguments).fit(made, train, validation)
    return audit, made


def report_of(directory: Path, train: Any, **arguments: Any) -> AuditReport:
    arguments.setdefault("audit", InfluenceAudit(sample_id=2))
    audit, _ = fitted(directory, train, **arguments)
    assert audit is not None
    return audit.report


def by_id(report: AuditReport, column: str) -> dict[Any, Any]:
    return dict(zip(report.columns["id"].tolist(), report.columns[column].tolist(), strict=True))


SCORES = (
    "loss_mean",
    "el2n",
    "aum",
    "times_seen",
    "self_influence",
    "harm",
    "tracin",
    "neighbour_disagreement",
    "loss",
)


@pytest.mark.parametrize("tracin", ["epoch", "step"])
def test_a_stream_has_the_scores_of_the_same_data_with_an_index(tracin: Any, tmp_path: Path) -> None:
    validation = DataLoader(vectors(10, seed=4), 5)
    stream = report_of(
        tmp_path, DataLoader(Stream(), 4), validation=validation, audit=InfluenceAudit(sample_id=2, tracin=tracin)
    )
    plain = report_of(tmp_path, DataLoader(DATA, 4), validation=validation, audit=InfluenceAudit(tracin=tracin))
    assert len(stream.columns["id"]) == SIZE
    for column in SCORES:
        expected = dict(zip(map(name, plain.columns["index"].tolist()), plain.columns[column].tolist(), strict=True))
        found = by_id(stream, column)
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-9), column


class Growing(Stream):
    """Longer than there was room for when the first examples came, and longer in each epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.epoch = 0

    def __iter__(self) -> Iterator[Any]:
        self.epoch += 1
        return map(self.example, range(400 * self.epoch))


def test_a_stream_that_grows_in_later_epochs(tmp_path: Path) -> None:
    audit = InfluenceAudit(sample_id=2)
    report = report_of(tmp_path, DataLoader(Growing(), 50), audit=audit, max_epochs=3)
    times = report.columns["times_seen"]
    assert times.tolist() == [3] * 400 + [2] * 400 + [1] * 400
    assert np.isfinite(report.columns["loss_mean"]).all()
    assert len(report.columns["id"]) == 1200


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("tracin", ["epoch", "step"])
def test_training_is_the_same_bit_by_bit(workers: int, tracin: Any, tmp_path: Path) -> None:
    """The data set shuffles with a generator of its own, which passes in the middle of training would have moved."""

    def weights(audit: InfluenceAudit | None) -> list[Tensor]:
        loader = DataLoader(Stream(shuffled=True), 4, num_workers=workers)
        _, model = fitted(tmp_path, loader, audit=audit, max_epochs=3)
        return [*model.parameters(), torch.get_rng_state(), torch.tensor(random.getstate()[1])]

    random.seed(0)
    alone = weights(None)
    random.seed(0)
    audited = weights(InfluenceAudit(sample_id=lambda batch: batch[2], tracin=tracin))
    assert all(torch.equal(a, b) for a, b in zip(alone, audited, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_shuffled_streams_are_filed_by_id(workers: int, tmp_path: Path) -> None:
    class Noting(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if self.trainer.training and torch.is_grad_enabled() and self.net[1].weight.requires_grad:
                values = F.cross_entropy(self(batch[0]), batch[1], reduction="none").tolist()
                for key, value in zip(batch[2], values, strict=True):
                    noted.setdefault(key, []).append(value)
            return super().training_step(batch, batch_idx)

    noted: dict[str, list[float]] = {}
    loader = DataLoader(Stream(shuffled=True), 4, num_workers=workers)
    report = report_of(tmp_path, loader, model=Noting, audit=InfluenceAudit(sample_id=2, tracin=None))
    assert by_id(report, "times_seen") == dict.fromkeys(map(name, range(SIZE)), 2)
    expected = {key: np.mean(values) for key, values in noted.items()}
    assert by_id(report, "loss_mean") == pytest.approx(expected, rel=1e-5)
    assert not [note for note in report.manifest["notes"] if "again" in note]


# ------------------------------------------------------------------------------------------ what batches are made of


@dataclasses.dataclass
class Batch:
    x: Tensor
    y: Tensor
    key: list[str]
    weight: float = 1.0


Tuple = namedtuple("Tuple", ["x", "y", "key", "nothing"])


def _as_dict(x: Tensor, y: Tensor, keys: list[str]) -> Any:
    return {"inputs": {"x": x, "shift": [x[:, 0], None]}, "y": y, "key": keys, "task": "cls", "nothing": None}


def _as_dataclass(x: Tensor, y: Tensor, keys: list[str]) -> Any:
    return Batch(x, y, keys)


def _as_tuple(x: Tensor, y: Tensor, keys: list[str]) -> Any:
    return Tuple(x, y, keys, None)


def _as_arrays(x: Tensor, y: Tensor, keys: list[str]) -> Any:
    return [x, y, np.asarray(keys, dtype=object)]


KINDS: dict[str, tuple[Callable[..., Any], Callable[[Any], Any], Any]] = {
    "nested dict": (_as_dict, lambda batch: (batch["inputs"]["x"], batch["y"]), "key"),
    "dataclass": (_as_dataclass, lambda batch: (batch.x, batch.y), "key"),
    "named tuple": (_as_tuple, lambda batch: (batch.x, batch.y), "key"),
    "arrays": (_as_arrays, lambda batch: (batch[0], batch[1]), lambda batch: batch[2]),
}


class Batches(IterableDataset[Any]):
    """Hands out whole batches, the last one smaller."""

    def __init__(self, make: Callable[..., Any], size: int = 4) -> None:
        self.make, self.size = make, size

    def __iter__(self) -> Iterator[Any]:
        for start in range(0, SIZE, self.size):
            x, y = DATA[start : start + self.size]
            yield self.make(x, y, [name(start + k) for k in range(len(x))])


class Unpacking(Classifier):
    def __init__(self, unpack: Callable[[Any], Any]) -> None:
        super().__init__()
        self.unpack = unpack

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = self.unpack(batch)
        return F.cross_entropy(self(x), y)


@pytest.mark.parametrize("kind", KINDS)
def test_data_sets_that_hand_out_batches(kind: str, tmp_path: Path) -> None:
    make, unpack, sample_id = KINDS[kind]
    audit = InfluenceAudit(sample_id=sample_id)
    report = report_of(
        tmp_path, DataLoader(Batches(make), batch_size=None), audit=audit, model=lambda: Unpacking(unpack)
    )
    plain = report_of(tmp_path, DataLoader(DATA, 4), audit=InfluenceAudit())
    expected = dict(zip(map(name, plain.columns["index"].tolist()), plain.columns["self_influence"], strict=True))
    assert by_id(report, "self_influence") == pytest.approx(expected, rel=1e-5)


class Keyed(Dataset[Any]):
    """A map-style data set with keys of its own."""

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, key: str) -> Any:
        x, y = DATA[int(key[-3:])]
        return x, y, key


@pytest.mark.parametrize("whole", [False, True])
def test_samplers_that_yield_names(whole: bool, tmp_path: Path) -> None:
    keys = [name(k) for k in range(SIZE)]
    if whole:
        batches = [keys[start : start + 4] for start in range(0, SIZE, 4)]
        loader: DataLoader[Any] = DataLoader(Keyed(), batch_sampler=batches)
    else:
        loader = DataLoader(Keyed(), 4, sampler=keys)
    report = report_of(tmp_path, loader)
    assert sorted(by_id(report, "self_influence")) == keys


class Padded(Stream):
    """Texts of several lengths, padded by batches."""

    def example(self, k: int) -> Any:
        x, y = DATA[k]
        return torch.arange(1, 3 + k % 4), y, name(k)


def pad(items: list[Any]) -> Any:
    tokens = torch.nn.utils.rnn.pad_sequence([item[0] for item in items], batch_first=True)
    return tokens, torch.stack([item[1] for item in items]), [item[2] for item in items]


class Texts(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(8, 5, padding_idx=0)

    def forward(self, tokens: Tensor) -> Tensor:
        mask = (tokens > 0).unsqueeze(-1)
        return self.net((self.embedding(tokens) * mask).sum(1) / mask.sum(1))


def test_batches_that_are_padded_to_several_lengths(tmp_path: Path) -> None:
    report = report_of(tmp_path, DataLoader(Padded(), 4, collate_fn=pad), model=Texts)
    plain = report_of(tmp_path, DataLoader(list(Padded()), 4, collate_fn=pad), model=Texts, audit=InfluenceAudit())
    expected = dict(zip(map(name, plain.columns["index"].tolist()), plain.columns["self_influence"], strict=True))
    assert by_id(report, "self_influence") == pytest.approx(expected, rel=1e-5)


# --------------------------------------------------------------------------------------------------- how they end


class Endless(Stream):
    def order(self) -> Any:
        return itertools.cycle(range(self.size))

    def __iter__(self) -> Iterator[Any]:
        return map(self.example, self.order())


@pytest.mark.parametrize("limit", [{"limit_train_batches": 6}, {"max_steps": 6, "max_epochs": -1}])
def test_endless_streams(limit: dict[str, int], tmp_path: Path) -> None:
    report = report_of(tmp_path, DataLoader(Endless(), 4), **limit)
    assert by_id(report, "times_seen").keys() == {name(k) for k in range(SIZE)}
    assert sum("had had before" in note for note in report.manifest["notes"]) == 1  # 24 examples of 22


class Passing(Stream):
    """Goes on with examples that nobody has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.start = 0

    def __iter__(self) -> Iterator[Any]:
        for k in range(self.start, self.start + 12):
            self.start += 1
            yield self.example(k)


@pytest.mark.filterwarnings("ignore:the influence audit")
def test_a_stream_that_does_not_hold_examples_again(tmp_path: Path) -> None:
    """What training has told is kept, and said to be all that there is."""
    audit, _ = fitted(tmp_path, DataLoader(Passing(), 4), audit=InfluenceAudit(sample_id=2, tracin=None))
    assert audit is not None
    with pytest.raises(RuntimeError, match="Passing holds none of the 24 examples again"):
        _ = audit.report
    (directory,) = tmp_path.rglob("influence")
    assert sorted(AuditReport.load(directory).columns["times_seen"]) == [1] * 24


class Fewer(Stream):
    def __init__(self) -> None:
        super().__init__()
        self.rounds = 0

    def order(self) -> list[int]:
        self.rounds += 1
        return list(range(SIZE if self.rounds < 3 else SIZE - 5))


def test_a_stream_that_yields_fewer_examples_later(tmp_path: Path) -> None:
    report = report_of(tmp_path, DataLoader(Fewer(), 4), audit=InfluenceAudit(sample_id=2, tracin=None))
    assert len(report.columns["id"]) == SIZE - 5
    (note,) = (note for note in report.manifest["notes"] if "not scored" in note)
    assert note.startswith("5 of 22 examples are not scored")
    assert "did not hold it again" in note


class Once(IterableDataset[Any]):
    def __init__(self) -> None:
        self.examples = (Stream().example(k) for k in range(SIZE))

    def __iter__(self) -> Iterator[Any]:
        yield from self.examples


def test_a_stream_that_can_be_read_only_once(tmp_path: Path) -> None:
    message = r"Once can be read only once, as it holds an iterator \(examples\).*makes a new iterator each time"
    with pytest.raises(MisconfigurationException, match=message):
        report_of(tmp_path, DataLoader(Once(), 4))


# ---------------------------------------------------------------------------------------------------- bad ids


def xy() -> Unpacking:
    return Unpacking(lambda batch: (batch["x"], batch["y"]))


class Relabelled(Stream):
    def __init__(self, key: Callable[[int], Any]) -> None:
        super().__init__()
        self.key = key

    def example(self, k: int) -> Any:
        x, y, _ = super().example(k)
        return {"x": x, "y": y, "key": self.key(k)}


def loose(items: list[Any]) -> Any:
    batch = default_collate([{"x": item["x"], "y": item["y"]} for item in items])
    return batch | {"key": [item["key"] for item in items]}


@pytest.mark.parametrize(
    ("key", "sample_id", "message"),
    [
        (name, "id", r"sample_id='id' can't read the ids of a batch \(KeyError: 'id'\).*a dict with 'x', 'y', 'key'"),
        (name, lambda batch: batch["id"], r"KeyError: 'id'.*a dict with 'x', 'y', 'key'"),
        (name, lambda batch: batch["key"][:3], r"gives 3 ids for a batch of 4 examples"),
        (name, lambda batch: "shard", r"gives 1 ids for a batch of 4 examples"),
        (name, "x", r"gives a table of shape \(4, 5\)"),
        (name, lambda batch: [batch["y"], batch["y"]], r"gives 2 columns \(a tensor of shape \(4,\), ...\)"),
        (lambda k: None, "key", r"gives no id \(None, NaN or an empty text\) for 4 of the 4 examples"),
        (lambda k: float("nan") if k == 1 else float(k), "key", r"for 1 of the 4 examples.*places \[1\]"),
        (lambda k: "", "key", r"gives no id"),
        (lambda k: "same", "key", r"gives 4 examples of the first batch the id 'same'.*1 ids of 1 are shared"),
        (lambda k: k // 2, "key", r"gives 2 examples of the first batch the id 0.*2 ids of 2 are shared"),
    ],
)
def test_bad_ids_are_refused_before_the_first_step(key: Any, sample_id: Any, message: str, tmp_path: Path) -> None:
    model = xy()
    before = [p.clone() for p in model.parameters()]
    audit = InfluenceAudit(sample_id=sample_id)
    with pytest.raises(MisconfigurationException, match=message):
        fitted(tmp_path, DataLoader(Relabelled(key), 4, collate_fn=loose), audit=audit, model=lambda: model)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        (lambda k: torch.tensor(100 + k), list(range(100, 100 + SIZE))),
        (lambda k: f"ä{k}".encode(), [f"ä{k}" for k in range(SIZE)]),
        (lambda k: float(k), list(range(SIZE))),
        (lambda k: np.int32(k), list(range(SIZE))),
        (lambda k: 2**70 + k, [str(2**70 + k) for k in range(SIZE)]),
        (lambda k: ("shard", k), [str(("shard", k)) for k in range(SIZE)]),
        (lambda k: k if k % 2 else f"x{k}", [str(k) if k % 2 else f"x{k}" for k in range(SIZE)]),
    ],
)
def test_ids_of_all_kinds(key: Any, expected: list[Any], tmp_path: Path) -> None:
    loader = DataLoader(Relabelled(key), 4, collate_fn=loose)
    report = report_of(tmp_path, loader, audit=InfluenceAudit(sample_id="key"), model=xy)
    assert report.columns["id"].tolist() == expected


def test_ids_that_come_again_are_counted_and_named(tmp_path: Path) -> None:
    """Later than in the first batch it may be a stream that repeats itself: training goes on."""
    loader = DataLoader(Relabelled(lambda k: name(k % 20)), 4, collate_fn=loose)
    report = report_of(tmp_path, loader, audit=InfluenceAudit(sample_id="key"), model=xy)
    (note,) = (note for note in report.manifest["notes"] if "had had before" in note)
    assert note.startswith("examples came 4 times")
    assert "'shard/000', 'shard/001'" in note
    assert len(report.columns["id"]) == 20


def test_ids_that_fail_later_leave_a_note(tmp_path: Path) -> None:
    loader = DataLoader(Relabelled(lambda k: None if k == 9 else name(k)), 4, collate_fn=loose)
    report = report_of(tmp_path, loader, audit=InfluenceAudit(sample_id="key", tracin=None), model=xy)
    assert any("2 of 12 training batches count for nobody" in note for note in report.manifest["notes"])
    assert len(report.columns["id"]) == SIZE - 4


@pytest.mark.parametrize("sample_id", [3.5, True, ["key"], {"key"}])
def test_what_can_not_be_a_sample_id(sample_id: Any) -> None:
    with pytest.raises(ValueError, match=r"sample_id=.*expected the name of the column"):
        InfluenceAudit(sample_id=sample_id)


@pytest.mark.parametrize("loader", [DataLoader(Stream(), 4), DataLoader(Batches(_as_dict), batch_size=None)])
def test_without_ids_the_line_that_works_is_printed(loader: Any, tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=r'`InfluenceAudit\(sample_id=lambda batch: batch\["key"\]\)`'):
        report_of(tmp_path, loader, audit=InfluenceAudit())


# ------------------------------------------------------------------------------------------- the rest of an audit


@pytest.mark.parametrize("limit", [{}, {"limit_val_batches": 1}])
def test_validation_streams_give_harm(limit: dict[str, int], tmp_path: Path) -> None:
    class Held(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return iter(held)

    held = [*vectors(10, seed=4)]
    stream = report_of(tmp_path, DataLoader(Stream(), 4), validation=DataLoader(Held(), 5), **limit)
    plain = report_of(tmp_path, DataLoader(Stream(), 4), validation=DataLoader(held, 5), **limit)
    assert by_id(stream, "harm") == pytest.approx(by_id(plain, "harm"), rel=1e-5)


def test_queries_name_ids(tmp_path: Path) -> None:
    audit = InfluenceAudit(sample_id=2, queries=Queries("worst", count=3))
    report = report_of(tmp_path, DataLoader(Stream(), 4), validation=DataLoader(vectors(10, seed=4), 5), audit=audit)
    plain = report_of(
        tmp_path,
        DataLoader(DATA, 4),
        validation=DataLoader(vectors(10, seed=4), 5),
        audit=InfluenceAudit(queries=Queries("worst", count=3)),
    )
    assert report.pairs is not None
    assert plain.pairs is not None
    assert report.pairs["id"].tolist() == [name(k) for k in plain.pairs["index"].tolist()]


def test_candidates_and_the_report_name_ids(tmp_path: Path) -> None:
    report = report_of(tmp_path, DataLoader(Stream(), 4))
    assert report[name(7)]["id"] == name(7)
    directory = next(tmp_path.rglob("candidates.csv"))
    assert "id" in directory.read_text().splitlines()[0]
    loaded = AuditReport.load(directory.parent)
    assert loaded.columns["id"].tolist() == report.columns["id"].tolist()


def test_a_run_that_is_resumed_goes_on_with_its_ids(tmp_path: Path) -> None:
    """The first batches after resuming are others than those before: numbers in order of appearance would be, too."""

    def run(epochs: int, stream: Stream, path: Any = None) -> AuditReport:
        torch.manual_seed(3)
        audit = InfluenceAudit(sample_id=2)
        saving = ModelCheckpoint(tmp_path / f"{epochs}", save_last=True)
        trainer = make_trainer(tmp_path, callbacks=[audit, saving], max_epochs=epochs, enable_checkpointing=True)
        trainer.fit(Classifier(), DataLoader(stream, 4), ckpt_path=path)
        return audit.report

    stream = Stream(shuffled=True)
    run(1, stream)
    resumed = run(2, stream, tmp_path / "1" / "last.ckpt")
    whole = run(2, Stream(shuffled=True))
    for column in ("times_seen", "loss_mean", "self_influence"):
        assert by_id(resumed, column) == pytest.approx(by_id(whole, column), rel=1e-5)


def test_what_is_saved_once_training_is_over_knows_whose_it_is(tmp_path: Path) -> None:
    """Else the ids that come next would be given the numbers, and the records, of those that came first."""
    audit, model = InfluenceAudit(sample_id=2), Classifier()
    trainer = make_trainer(tmp_path, callbacks=[audit], max_epochs=1)
    trainer.fit(model, DataLoader(Stream(shuffled=True), 4))
    trainer.save_checkpoint(tmp_path / "over.ckpt")
    assert audit.report.manifest["stream"]
    held = torch.load(tmp_path / "over.ckpt", weights_only=True)["callbacks"][audit.state_key]["stream"]
    book = IdBook()
    book.load_state_dict(held["ids"])
    assert book.ids() == audit.report.columns["id"].tolist()


@pytest.mark.parametrize("streamed", [True, False])
def test_records_by_index_are_not_those_of_a_stream(streamed: bool, tmp_path: Path) -> None:
    """Of the same size, nothing else would tell that example 3 is not the third that comes."""
    loaders = DataLoader(Stream(), 4), DataLoader(DATA, 4)
    audits = InfluenceAudit(sample_id=2), InfluenceAudit()
    first, second = (0, 1) if streamed else (1, 0)
    trainer = make_trainer(tmp_path, callbacks=[audits[first]], max_epochs=1)
    trainer.fit(Classifier(), loaders[first])
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    with pytest.raises(MisconfigurationException, match="filed by .*, and these data are filed by"):
        make_trainer(tmp_path, callbacks=[audits[second]]).fit(
            Classifier(), loaders[second], ckpt_path=tmp_path / "last.ckpt"
        )


def test_after_training(tmp_path: Path) -> None:
    """With records, all is as it was; without, the same scores; of what the stream no longer holds nothing is told."""
    audit, model = InfluenceAudit(sample_id=2, queries="worst"), Validated()
    validation = DataLoader(vectors(8, 2), 4)
    trainer = make_trainer(tmp_path, callbacks=[audit])
    trainer.fit(model, DataLoader(Stream(), 4), validation)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    torch.save(model.state_dict(), tmp_path / "weights.ckpt")

    def after(path: str, size: int = SIZE) -> AuditReport:
        again = InfluenceAudit(sample_id=2, queries="worst")
        loader = DataLoader(Stream(size=size), 4)
        return again.audit(Validated(), loader, ckpt_path=tmp_path / path, val_dataloaders=validation)

    for path, columns in (("last.ckpt", SCORES), ("weights.ckpt", ("self_influence", "harm", "loss"))):
        report = after(path)
        for column in columns:
            assert by_id(report, column) == pytest.approx(by_id(audit.report, column), rel=1e-5, abs=1e-7), column
    fewer = after("last.ckpt", SIZE - 6)
    assert fewer.columns["id"].tolist() == [name(k) for k in range(SIZE - 6)]
    assert "times_seen" in fewer.columns
    assert any(note.startswith(f"6 of {SIZE} examples are not scored") for note in fewer.manifest["notes"])


def test_after_training_who_waits_for_the_end_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "_PATIENCE", 0.0)
    audit = InfluenceAudit(sample_id=2, dirpath=tmp_path)
    with pytest.warns(UserWarning, match="Stream has handed out 0 batches so far.*limit_train_batches=") as caught:
        audit.audit(Classifier(), DataLoader(Stream(), 4))
    assert sum("so far" in str(warning.message) for warning in caught) == 1


def test_after_training_on_other_data(tmp_path: Path) -> None:
    class Renamed(Stream):
        def example(self, k: int) -> Any:
            x, y, key = super().example(k)
            return x, y, f"new/{key}"

    trainer = make_trainer(tmp_path, callbacks=[InfluenceAudit(sample_id=2)])
    trainer.fit(Classifier(), DataLoader(Stream(), 4))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    for sample_id, loader, told in (
        (2, DataLoader(Renamed(), 4), "4 of the first batch are none of these"),
        (None, DataLoader(DATA, 4), "filed by the ids of a stream"),
    ):
        with pytest.warns(UserWarning, match=told):
            report = InfluenceAudit(sample_id=sample_id).audit(Classifier(), loader, ckpt_path=tmp_path / "last.ckpt")
        assert len(report) == SIZE
        assert "times_seen" not in report.columns


def test_a_dry_run(tmp_path: Path) -> None:
    report = report_of(tmp_path, DataLoader(Stream(), 4), fast_dev_run=1)
    assert len(report.columns["index"]) == 4


def test_the_finished_audit_can_be_asked(tmp_path: Path) -> None:
    audit, _ = fitted(tmp_path, DataLoader(Stream(), 4), audit=InfluenceAudit(sample_id=2))
    plain, _ = fitted(tmp_path, DataLoader(DATA, 4), audit=InfluenceAudit())
    assert audit is not None
    assert plain is not None
    found, expected = (each.influence("ggn").remove([3, 11]) for each in (audit, plain))
    for name_, change in expected.changes.items():
        torch.testing.assert_close(found.changes[name_], change, rtol=1e-4, atol=1e-7)


def test_another_loader_of_batches(tmp_path: Path) -> None:
    """Not a DataLoader: its iterator may be shared with training, so that passes wait for the end."""

    class Pipeline:
        def __iter__(self) -> Iterator[Any]:
            return iter(DataLoader(Stream(), 4))

    report = report_of(tmp_path, Pipeline())
    assert len(report.columns["id"]) == SIZE
    assert report.manifest["tracin_steps"] == [12]


# ------------------------------------------------------------------------------------------------- the parts


def test_a_book_numbers_ids_in_their_order() -> None:
    book, ids = IdBook(), [f"{k * 7919 % 10_007}" for k in range(10_000)]
    assert book.add(ids) == list(range(10_000))
    assert book.add(reversed(ids)) == list(range(10_000))[::-1]
    assert book.find(["nobody", ids[5]]) == [-1, 5]
    assert book[np.array([3, 9_999])].tolist() == [ids[3], ids[9_999]]
    assert book.ids() == ids


@pytest.mark.parametrize("ids", [[7, -3, 2**40], ["a", "", "shard/é", "x" * 300], [1, "two", 2**70], []])
def test_a_book_goes_on_from_what_a_checkpoint_holds(ids: list[Any]) -> None:
    """A list of ids is what earlier versions have written."""
    book = IdBook()
    book.add(ids)
    for state in (book.state_dict(), book.ids()):
        other = IdBook()
        other.load_state_dict(state)
        assert other.ids() == book.ids()
        assert other.add([*ids, "new"]) == list(range(len(ids) + 1))


def test_rows_of_several_batches() -> None:
    a = {"x": torch.arange(6).reshape(3, 2), "boxes": [torch.zeros(k, 4) for k in range(3)], "names": ["a", "b", "c"]}
    b = {"x": torch.arange(4).reshape(2, 2), "boxes": [torch.ones(5, 4)] * 2, "names": ["d", "e"]}
    found = joined([Row(a, 2, 3), Row(a, 2, 3), Row(b, 0, 2)])
    assert found["x"].tolist() == [[4, 5], [4, 5], [0, 1]]
    assert [len(each) for each in found["boxes"]] == [2, 2, 5]
    assert found["names"] == ["c", "c", "d"]
    with pytest.raises(UnlikeError):
        joined([Row(a, 0, 3), Row(b | {"more": 1}, 0, 2)])
    targets = [[torch.zeros(3, 4, 4)] * 2, [{"label": torch.tensor(k)} for k in range(2)]]
    picked = joined([Row(targets, 1, 2)])
    assert len(picked[0]) == 1
    assert picked[1][0]["label"] == 1


class Weighted(Classifier):
    """Whose batches bring the weights of their classes along."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y, _, weights = batch["rows"] if isinstance(batch, dict) else batch
        return F.cross_entropy(self.net(x), y, weight=weights)


def weighing(rows: list[Any]) -> Any:
    return (*default_collate(rows), torch.tensor([1.0, 2.0, 3.0]))


@pytest.mark.parametrize("size", [CLASSES, CLASSES + 1, 5])
@pytest.mark.parametrize("nested", [False, True])
def test_class_weights_are_no_rows(size: int, nested: bool, tmp_path: Path) -> None:
    """With as many weights as examples (or parts as examples: four), a batch of another size has to tell."""

    def collate(rows: list[Any]) -> Any:
        return {"rows": weighing(rows)} if nested else weighing(rows)

    stream = report_of(
        tmp_path,
        DataLoader(Stream(), size, collate_fn=collate),
        model=Weighted,
        audit=InfluenceAudit(sample_id=lambda batch: (batch["rows"] if nested else batch)[2]),
    )
    plain = report_of(
        tmp_path, DataLoader([*Stream()], size, collate_fn=collate), model=Weighted, audit=InfluenceAudit()
    )
    assert stream.columns["index"].tolist() == plain.columns["index"].tolist()
    for column in ("self_influence", "tracin", "loss", "loss_mean"):
        np.testing.assert_allclose(stream.columns[column], plain.columns[column], rtol=1e-4, atol=1e-9)


def test_what_has_another_length_than_the_batch() -> None:
    batch = {"x": torch.zeros(3, 2), "weights": torch.ones(3), "boxes": [torch.zeros(2)] * 3, "names": ("a", "b", "c")}
    other = {**batch, "x": torch.zeros(2, 2), "boxes": [torch.zeros(3)] * 2, "names": ("d", "e")}
    assert [*without_rows(batch, 3)] == []
    assert [*without_rows(other, 2)] == [("weights",)]
    assert joined([Row(batch, 2, 3, {("weights",)})])["weights"].tolist() == [1.0] * 3
    assert len(Row(batch, 2, 3, {("weights",)}).example()["weights"]) == 3


def test_the_book_is_not_asked_for_what_a_batch_does_not_hold() -> None:
    assert ids_in({"key": "only"}, "key") == ["only"]
    with pytest.raises(DataError, match="a list of Tensor, Tensor"):
        ids_in([torch.zeros(2), torch.zeros(2)], "key")
    assert len(StreamSource(DataLoader(Stream(), 4), 2).at_hand) == 4
    assert CLASSES == 3


# --------------------------------------------------------------------------------------------- several loaders


class Unwrapping(Validated):
    """Takes its batches out of what the trainer puts around them."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        while not isinstance(batch[next(iter(batch))] if isinstance(batch, dict) else batch[0], Tensor):
            batch = next(iter(batch.values())) if isinstance(batch, dict) else batch[0]
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "around",
    [
        lambda loader: [loader],
        lambda loader: {"labelled": loader},
        lambda loader: {"a": [loader]},
        lambda loader: CombinedLoader({"a": loader}, "min_size"),
    ],
)
def test_one_loader_in_a_container(around: Callable[[Any], Any], stream: bool, tmp_path: Path) -> None:
    validation = DataLoader(vectors(10, seed=4), 5)
    if stream:
        loader, audit = DataLoader(Stream(), 4), InfluenceAudit(sample_id=2)
    else:
        loader, audit = DataLoader(DATA, 4), InfluenceAudit()
    found = report_of(tmp_path, around(loader), audit=audit, model=Unwrapping, validation=validation)
    plain = report_of(tmp_path, DataLoader(DATA, 4), audit=InfluenceAudit(), model=Validated, validation=validation)
    for column in SCORES:
        np.testing.assert_allclose(found.columns[column], plain.columns[column], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("sample_id", [None, 2])
@pytest.mark.parametrize("mode", ["max_size_cycle", "min_size"])
def test_several_loaders_at_once_are_refused(mode: Any, sample_id: Any, tmp_path: Path) -> None:
    data = Stream() if sample_id else [*Stream()]
    loaders = CombinedLoader({"a": DataLoader(data, 4), "b": DataLoader(data, 4)}, mode)
    with pytest.raises(MisconfigurationException, match=r"goes over 2 loaders at once \(a, b\).*\(loader='a'\)"):
        fitted(tmp_path, loaders, audit=InfluenceAudit(sample_id=sample_id), model=Unwrapping)


# ------------------------------------------------------------------------------------------------ what is shown


class Pictures(Stream):
    def example(self, k: int) -> Any:
        generator = torch.Generator().manual_seed(k)
        return torch.rand(1, 6, 6, generator=generator), DATA[k][1], name(k)


def test_pictures_and_texts_of_a_stream(tmp_path: Path) -> None:
    """They are fetched by going over it once more; an example is what a data set would return."""
    asked: list[str] = []

    def describe(example: Any) -> str:
        asked.append(example[2])
        return f"picture {example[2]} of {tuple(example[0].shape)}"

    audit = InfluenceAudit(sample_id=2, describe=describe)
    audit, _ = fitted(tmp_path, DataLoader(Pictures(), 4), audit=audit, model=lambda: Classifier(features=36))
    assert audit is not None
    assert asked
    names = audit._run.reporter.names  # type: ignore[union-attr]
    assert names.shown([3, 20]) == [f"picture {name(k)} of (1, 6, 6)" for k in (3, 20)]
    plain, _ = fitted(
        tmp_path, DataLoader(Pictures(), 4), audit=InfluenceAudit(sample_id=2), model=lambda: Classifier(features=36)
    )
    images = plain._run.reporter.names.shown([3, 20])  # type: ignore[union-attr]
    assert [torch.equal(image, Pictures().example(k)[0]) for image, k in zip(images, (3, 20), strict=True)] == [
        True
    ] * 2


@pytest.mark.parametrize("argument", ["known_noise", "trusted"])
def test_a_stream_has_no_indices_to_know_of(argument: str, tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=f"{argument} holds indices, and a stream has none"):
        report_of(tmp_path, DataLoader(Stream(), 4), audit=InfluenceAudit(sample_id=2, **{argument: [1]}))  # type: ignore[arg-type]


def test_data_with_an_index_are_named_by_ids(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=r"TensorDataset has an index.*`ids=` names them"):
        report_of(tmp_path, DataLoader(DATA, 4))


# ------------------------------------------------------------------------------------------- keys, whole batches


class ByName(Dataset[Any]):
    """Its keys are names, as those of a directory or a database are."""

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, key: Any) -> Any:
        k = int(key.removeprefix("shard/"))
        return (*DATA[k], key)


class Whole(Dataset[Any]):
    """Hands out whole batches, of several sizes."""

    ENDS = (0, 3, 8, 12, 19, SIZE)

    def __init__(self, make: Callable[[list[int]], Any]) -> None:
        self.make = make

    def __len__(self) -> int:
        return len(self.ENDS) - 1

    def __getitem__(self, index: int) -> Any:
        return self.make(list(range(*self.ENDS[index : index + 2])))


def as_mapping(rows: list[int]) -> Any:
    x, y = DATA[rows]
    return {"x": x, "y": y, "meta": {"key": [name(k) for k in rows], "from": "a shard"}, "n": len(rows)}


def as_examples(rows: list[int]) -> Any:
    return [{"x": DATA[k][0], "y": DATA[k][1], "meta": {"key": name(k)}} for k in rows]


class Reading(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if isinstance(batch, list):
            batch = default_collate(batch)
        return F.cross_entropy(self.net(batch["x"]), batch["y"])


@pytest.mark.parametrize(
    ("make", "sample_id"),
    [
        (as_mapping, lambda batch: batch["meta"]["key"]),
        (as_examples, lambda batch: [each["meta"]["key"] for each in batch]),
    ],
)
@pytest.mark.parametrize("shuffle", [False, True])
def test_a_data_set_that_hands_out_whole_batches(make: Any, sample_id: Any, shuffle: bool, tmp_path: Path) -> None:
    loader = DataLoader(Whole(make), batch_size=None, shuffle=shuffle)
    report = report_of(tmp_path, loader, model=Reading, audit=InfluenceAudit(sample_id=sample_id))
    assert set(report.columns["times_seen"].tolist()) == {2}
    own = dict(zip(map(name, range(SIZE)), DATA.tensors[1].tolist(), strict=True))
    assert by_id(report, "label") == own


def test_a_sampler_of_keys(tmp_path: Path) -> None:
    keys = [name(k) for k in range(SIZE)]
    found = report_of(tmp_path, DataLoader(ByName(), 4, sampler=keys))
    plain = report_of(tmp_path, DataLoader(DATA, 4), audit=InfluenceAudit())
    assert found.columns["id"].tolist() == keys
    for column in ("self_influence", "tracin", "loss_mean"):
        np.testing.assert_allclose(found.columns[column], plain.columns[column], rtol=1e-5)
    with pytest.raises(MisconfigurationException, match="ByName can't be asked for its examples by number.*sample_id="):
        fitted(tmp_path, DataLoader(ByName(), 4, sampler=keys), audit=InfluenceAudit())
