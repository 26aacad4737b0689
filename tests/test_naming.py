"""Ids, origins and descriptions of examples: what they are called, wherever an audit shows them."""

from __future__ import annotations

import csv
import io
import random
import re
import warnings
from collections import UserDict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from models import Classifier, Named, Validated, images, loader, make_trainer, vectors
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset, random_split
from which_lightning import MisconfigurationException, TensorBoardLogger

from lightning_influence import InfluenceAudit
from lightning_influence.audit.belief import LabelBeliefs
from lightning_influence.audit.columns import COLUMNS, PAIR_DESCRIPTIONS, Column
from lightning_influence.audit.descriptions import description
from lightning_influence.audit.ensemble import EnsembleError
from lightning_influence.audit.glossary import glossary
from lightning_influence.audit.naming import ExampleNames, origins
from lightning_influence.audit.ranking import judged, rank
from lightning_influence.audit.relabel import Relabelled
from lightning_influence.audit.report import AuditReport
from lightning_influence.audit.store.tables import candidates_csv
from lightning_influence.callbacks import bridge
from lightning_influence.data import ExampleSource
from lightning_influence.loggers.candidate_sheets import candidates_table
from lightning_influence.loggers.pictures import sheet

pytestmark = pytest.mark.usefixtures("unverified")

N = 22
NAMES = [f"set/{k:03d}.png" for k in range(N)]


def audited(audit: InfluenceAudit, directory: Path, data: Any, **arguments: Any) -> AuditReport:
    torch.manual_seed(0)
    features = int(np.prod(data[0][0].shape))
    validation = arguments.pop("validation", None)
    model = Validated(features=features) if validation is not None else Classifier(features=features)
    trainer = make_trainer(directory, callbacks=[audit], **arguments)
    trainer.fit(model, loader(data, shuffle=True), *(() if validation is None else (loader(validation),)))
    assert audit.has_report
    return audit.report


def told(report: AuditReport) -> list[dict[str, str]]:
    assert report.directory is not None
    with open(report.directory / "candidates.csv", encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file, strict=True))


def numbered(n: int, first: int = 0) -> TensorDataset:
    """Every example holds its own number."""
    return TensorDataset(torch.arange(first, first + n))


# ------------------------------------------------------------------------------------------------------- ids


@pytest.mark.parametrize(
    "ids",
    [
        NAMES,
        tuple(NAMES),
        np.array(NAMES),
        pd.Series(NAMES, index=range(100, 100 + N)),
        pd.Index(NAMES),
        [name.encode() for name in NAMES],
        [Path(name) for name in NAMES],
        lambda index: NAMES[index],
    ],
    ids=["list", "tuple", "numpy", "series", "index", "bytes", "paths", "function"],
)
def test_ids_of_any_kind_name_the_right_examples(ids: Any) -> None:
    found = ExampleNames(vectors(), ids).columns(np.array([21, 3, 0]))
    assert found["id"].tolist() == ["set/021.png", "set/003.png", "set/000.png"]
    assert found.keys() == {"id"}


@pytest.mark.parametrize(
    "ids", [range(7, 7 + N), torch.arange(7, 7 + N), np.arange(7.0, 7 + N), [np.int8(k + 7) for k in range(N)]]
)
def test_whole_numbers_stay_numbers(ids: Any) -> None:
    found = ExampleNames(vectors(), ids).columns([2, 1])["id"]
    assert found.dtype == np.int64
    assert found.tolist() == [9, 8]


def test_what_is_no_whole_number_is_text() -> None:
    """Numbers beyond 64 bits, mixed columns and file names that are not Unicode can be stored all the same."""
    ids = [2**70, "a\udcff", 1.5, "0042", *range(N - 4)]
    found = ExampleNames(vectors(), ids).columns(range(5))["id"]
    assert found.tolist() == [str(2**70), r"a\udcff", "1.5", "0042", "0"]
    found[1].encode()


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (NAMES[:-1], r"ids: 21 are given; expected 22, one for each training example \(TensorDataset\)\."),
        ([*NAMES[:-1], NAMES[3]], r"examples 3 and 21 are both called 'set/003.png' \(1 ids are not the first"),
        ([*NAMES[:-1], None], r"1 of 22 are missing .*, of examples \[21\]; expected one for each"),
        ([*range(N - 1), float("nan")], r"1 of 22 are missing"),
        (pd.Series([*NAMES[:-2], pd.NA, ""]), r"2 of 22 are missing .*, of examples \[20, 21\]"),
        ([1, "1", *range(2, N)], r"examples 0 and 1 are both called '1'"),
        (lambda index: NAMES[index % 5], r"examples 0 and 5 are both called"),
        (lambda index: {}[index], r"ids\(0\) failed \(KeyError: 0\); expected a function from dataset index to id"),
    ],
)
def test_ids_that_do_not_fit_are_refused_before_training(ids: Any, message: str, tmp_path: Path) -> None:
    audit = InfluenceAudit(ids=ids)
    model = Classifier()
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(MisconfigurationException, match=f"InfluenceAudit: .*{message}"):
        make_trainer(tmp_path, callbacks=[audit]).fit(model, loader(vectors()))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert not list(tmp_path.rglob("influence"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ids": "names.txt"}, r"ids is a str; expected one id for each training example.*or a function"),
        ({"ids": {0: "a"}}, r"ids is a dict; expected"),
        ({"ids": {"a", "b"}}, r"ids is a set; expected"),
        ({"ids": iter(NAMES)}, r"ids is a list_iterator; expected"),
        ({"ids": pd.DataFrame({"a": [1], "b": [2]})}, r"ids is a DataFrame of shape \(1, 2\); expected"),
        ({"ids": torch.zeros(3, 2)}, r"ids is a Tensor of shape \(3, 2\); expected"),
        ({"ids": 3}, r"ids is a int; expected"),
        ({"describe": "text"}, r"describe='text'; expected a function .* or a tokenizer with `decode`"),
    ],
)
def test_what_can_not_be_ids_is_refused_at_once(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InfluenceAudit(**arguments)


def test_ids_of_the_data_set_that_a_split_was_made_of() -> None:
    """A data module splits where nobody else looks: what one has is the names of all files."""
    full = vectors(30)
    train, validation = random_split(full, [22, 8], generator=torch.Generator().manual_seed(0))
    names = ExampleNames(train, [f"file {k}" for k in range(30)])
    found = names.columns(range(22))
    assert found["id"].tolist() == [f"file {k}" for k in train.indices]
    assert found["original_index"].tolist() == list(train.indices)
    assert names.columns(range(8), validation)["id"].tolist() == [f"file {k}" for k in validation.indices]
    assert "id" not in names.columns(range(5), vectors())
    with pytest.raises(ValueError, match=r"expected 22, .*\(Subset\), or 30, one for each of those it is taken from"):
        ExampleNames(train, NAMES[:5])


def test_an_example_that_is_drawn_twice_has_its_name_twice() -> None:
    """Oversampling repeats examples, not ids: those of the original are still distinct."""
    oversampled = Subset(numbered(4), [0, 1, 1, 1, 2, 3])
    assert ExampleNames(oversampled, list("abcd")).columns(range(6))["id"].tolist() == list("abbbcd")


# --------------------------------------------------------------------------------------------------- origins


def test_positions_in_the_originals() -> None:
    a, b = numbered(10), numbered(5, first=100)
    part = Subset(a, [9, -3, 2])  # negative indices count from the end
    both = ConcatDataset([part, ConcatDataset([b, a])])
    chosen = Subset(both, torch.tensor([17, 0, 3, 1, 8]))
    at = np.arange(5)
    index, which, roots = origins(chosen, at)
    assert index.tolist() == [9, 9, 0, 7, 0]
    assert which.tolist() == [2, 0, 1, 0, 2]
    assert [root is expected for root, expected in zip(roots, (a, b, a), strict=True)] == [True] * 3
    held = [int(roots[w][int(i)][0]) for i, w in zip(index, which, strict=True)]
    assert held == [int(chosen[k][0]) for k in range(5)]


def test_columns_of_origins_only_where_there_are_some() -> None:
    plain = numbered(6)
    assert ExampleNames(plain).columns([0, 1]) == {}
    assert ExampleNames(Relabelled(plain, {0: 1}, (0,))).columns([0, 1]) == {}
    assert ExampleNames(Relabelled(Subset(plain, [4, 2]), {0: 1}, (0,))).columns([0])["original_index"].tolist() == [4]
    assert ExampleNames(Subset(plain, range(6))).columns([3]).keys() == {"original_index"}
    assert ExampleNames(ConcatDataset([plain])).columns([3]).keys() == {"original_index"}
    assert ExampleNames(ConcatDataset([plain, plain])).columns([7]).keys() == {"original_index", "dataset"}
    assert ExampleNames(Subset({"a": 1}, ["a"])).columns([0]) == {}  # type: ignore[arg-type]


def test_a_selection_of_a_hugging_face_data_set() -> None:
    import pyarrow as pa

    class Selected:
        _data = pa.table({"x": range(50)})
        _indices = pa.table({"indices": pa.array([42, 7, 13], pa.uint64())})

        def __len__(self) -> int:
            return 3

    Selected.__module__ = "datasets.arrow_dataset"
    names = ExampleNames(Selected(), [f"row {k}" for k in range(50)])
    found = names.columns([1, 2])
    assert found["original_index"].tolist() == [7, 13]
    assert found["id"].tolist() == ["row 7", "row 13"]
    assert ExampleNames(Subset(Selected(), [2])).columns([0])["original_index"].tolist() == [13]  # type: ignore[arg-type]


# ----------------------------------------------------------------------------------------------- everywhere


@pytest.mark.usefixtures("sure")
def test_ids_and_images_are_everywhere(tmp_path: Path) -> None:
    full = images(30)
    train, validation = Subset(full, range(29, 7, -1)), Subset(full, range(8))
    names = [f"digits/{k:04d}.png" for k in range(30)]
    logger = TensorBoardLogger(tmp_path)
    fetched: list[Any] = []

    def describe(example: Any) -> Image.Image:
        fetched.append(example)
        return Image.new("RGB", (40, 20), "red")

    audit = InfluenceAudit(ids=names, describe=describe, queries="worst")
    report = audited(audit, tmp_path, train, validation=validation, logger=logger)
    index = report.columns["index"]
    assert report.columns["original_index"].tolist() == (29 - index).tolist()
    assert report.columns["id"].tolist() == [names[29 - k] for k in index]
    assert "text" not in report.columns
    assert "dataset" not in report.columns

    assert report.directory is not None
    read = AuditReport.load(report.directory)
    assert read.columns["id"].tolist() == report.columns["id"].tolist()
    assert str(read) == str(report)
    meaning = pq.read_schema(report.directory / "scores.parquet").field("id").metadata[b"description"].decode()
    assert meaning == "name of the example, as given by `ids=`"
    rows = told(report)
    assert rows
    assert [row["id"] for row in rows] == [names[29 - int(row["index"])] for row in rows]
    assert f"  {rows[0]['id']}  " in str(report)

    assert read.pairs is not None
    assert read.pairs["id"].tolist() == [names[29 - k] for k in read.pairs["index"]]
    assert read.pairs["original_index"].tolist() == (29 - read.pairs["index"]).tolist()
    assert read.pairs["query_original_index"].tolist() == read.pairs["query"].tolist()
    assert read.pairs["query_id"].tolist() == [names[k] for k in read.pairs["query"]]
    assert f"#{read.pairs['query'][0]} {read.pairs['query_id'][0]} given" in str(report)
    meaning = pq.read_schema(report.directory / "pairs.parquet").field("query_id").metadata[b"description"].decode()
    assert meaning == "of the query: name of the example, as given by `ids=`"

    events = EventAccumulator(logger.log_dir, size_guidance={"images": 0})
    events.Reload()
    for tag in ("influence/candidates", "influence/queries/1/strongest"):
        drawn = np.array(Image.open(io.BytesIO(events.Images(tag)[0].encoded_image_string)))
        assert ((drawn == (255, 0, 0)).all(-1)).sum() >= 160 * 80  # the images are grey
    text = events.Tensors("influence/candidates/text_summary")[0].tensor_proto.string_val[0].decode()
    assert rows[0]["id"] in text
    shown = (read.pairs["rank"] <= 5).sum() + 2 * len({*read.pairs["number"].tolist()})  # in two lists
    # Once to try it out, once to see that it is no text; then the candidates, the queries and their pairs.
    # For the page, all training examples, as there are few, and each query.
    assert len(fetched) == 2 + len(rows) + shown + len(index) + len({*read.pairs["query"].tolist()})


@pytest.mark.usefixtures("sure")
def test_texts_are_everywhere(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    audit = InfluenceAudit(describe=lambda example: f"x is {example[0][0]:.3f}\n=1", queries="worst")
    data = vectors()
    report = audited(audit, tmp_path, data, validation=vectors(7, 2), logger=logger)
    candidates = report.candidates.tolist()
    assert candidates
    expected = {k: f"x is {data[k][0][0]:.3f} =1" for k in range(N)}  # as many as one looks at in any case
    assert dict(zip(report.columns["index"].tolist(), report.columns["text"].tolist(), strict=True)) == expected
    assert AuditReport.load(report.directory).columns["text"].tolist() == report.columns["text"].tolist()  # type: ignore[arg-type]
    assert [row["text"] for row in told(report)] == [expected[k] for k in candidates]
    assert expected[candidates[0]] in str(report)
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    assert {"influence/candidates", "influence/queries/1/strongest"} <= set(events.Tags()["images"])
    for tag in ("candidates", "queries/texts"):
        text = events.Tensors(f"influence/{tag}/text_summary")[0].tensor_proto.string_val[0].decode()
        assert "x is " in text
    assert candidates_table(report.columns, None).names[-1] == "text"


def test_an_interrupted_audit_has_its_ids(tmp_path: Path) -> None:
    class Broken(Classifier):
        def on_train_epoch_end(self) -> None:
            if self.trainer.current_epoch:
                raise RuntimeError("stop")

    audit = InfluenceAudit(ids=NAMES)
    trainer = make_trainer(tmp_path, callbacks=[audit])
    with pytest.raises(RuntimeError, match="stop"):
        trainer.fit(Broken(), loader(vectors()))
    read = AuditReport.load(Path(str(trainer.log_dir)) / "influence")
    assert read.status == "interrupted"
    assert read.columns["id"].tolist() == [NAMES[k] for k in read.columns["index"]]


def test_data_that_are_loaded_again_and_are_others_lose_their_ids(tmp_path: Path) -> None:
    class Reloaded(Classifier):
        def train_dataloader(self) -> DataLoader[Any]:
            return loader(vectors(N if not self.trainer.current_epoch else N - 2, seed=self.trainer.current_epoch))

    audit = InfluenceAudit(ids=NAMES)
    with pytest.warns(UserWarning, match=r"are others, and have no ids. ids: 22 are given; expected 20"):
        make_trainer(tmp_path, callbacks=[audit], reload_dataloaders_every_n_epochs=1).fit(Reloaded())
    assert audit.has_report
    assert len(audit.report) == N - 2
    assert "id" not in audit.report.columns


@pytest.mark.usefixtures("sure")
def test_class_names_are_printed(tmp_path: Path) -> None:
    data = Named(vectors(), ["ant", "bee", "cat\x1b[2J"])
    report = audited(InfluenceAudit(queries="worst"), tmp_path, data, validation=vectors(7, 2))
    lines = str(report).split("candidates  ")[1].splitlines()
    place = lines[1].split().index("given")
    printed = {line.split()[place] for line in lines[2:12] if line.split()[0].isdigit()}
    assert printed <= {"ant", "bee", "cat[2J"}
    assert "\x1b" not in str(report)
    assert re.search(r"given (ant|bee|cat\[2J), predicted (ant|bee|cat)", str(report))
    assert str(AuditReport.load(report.directory)) == str(report)  # type: ignore[arg-type]
    saved = report.save(tmp_path / "elsewhere")
    assert {row["label_name"] for row in told(saved)} <= set(data.classes)


# -------------------------------------------------------------------------------------------- descriptions


@pytest.mark.parametrize(
    ("value", "shape"),
    [
        (torch.rand(3, 8, 6), (3, 8, 6)),
        (torch.rand(8, 6), (1, 8, 6)),
        (torch.rand(8, 6, 3), (3, 8, 6)),
        (torch.rand(1, 1, 8, 6), (1, 8, 6)),
        (torch.zeros(4, 8, 6, dtype=torch.uint8), (3, 8, 6)),
        (torch.rand(3, 8, 6, requires_grad=True, dtype=torch.bfloat16), (3, 8, 6)),
        (np.zeros((8, 6, 3), np.uint8), (3, 8, 6)),
        (np.zeros((3, 8, 6)), (3, 8, 6)),
        (np.zeros((8, 6), bool)[::-1], (1, 8, 6)),
        (np.zeros((8, 6, 4), np.uint16), (3, 8, 6)),
        *((Image.new(mode, (6, 8)), (1 if mode in ("L", "1", "I", "F", "I;16") else 3, 8, 6)) for mode in (
            "RGB", "RGBA", "L", "LA", "1", "P", "CMYK", "I", "F", "I;16")),
    ],
)  # fmt: skip
def test_images_of_any_kind(value: Any, shape: tuple[int, ...]) -> None:
    image = description(lambda example: value, None)
    assert isinstance(image, Tensor)
    assert (image.shape, image.dtype, image.requires_grad) == (shape, torch.float32, False)
    sheet([(image, "it")], 1)


def test_colours_and_orientation_are_kept() -> None:
    picture = Image.new("RGB", (6, 4), (255, 0, 0))
    picture.putpixel((5, 0), (0, 0, 255))
    image = description(lambda example: picture, None)
    assert isinstance(image, Tensor)
    assert image[:, 0, 5].tolist() == [0, 0, 255]
    assert image[:, 3, 0].tolist() == [255, 0, 0]


def test_photographs_are_made_small_and_thin_ones_are_possible() -> None:
    for size in ((4000, 3000), (1, 5000)):
        image = description(lambda example, size=size: torch.ones(3, *size), None)
        assert isinstance(image, Tensor)
        assert image.numel() < 3 * 600 * 600
        assert bool((image == 1).all())


@pytest.mark.parametrize("value", [{"a": 1}, torch.zeros(5), np.zeros((2, 3, 4, 5)), 3.5, ["a"], torch.zeros(3, 0, 4)])
def test_what_is_neither_text_nor_image_is_said(value: Any) -> None:
    names = ExampleNames(vectors(), describe=lambda example: value)
    with pytest.warns(UserWarning, match=r"example 3, a tuple, can't be described.*expected a text"):
        assert names.shown([3]) is None


def test_errors_are_said_once_and_cost_only_their_example(tmp_path: Path) -> None:
    def describe(example: Any) -> str:
        if example[0][0] < 0:
            raise KeyError("left")
        return "right"

    data = vectors()
    left = [k for k in range(N) if data[k][0][0] < 0]
    names = ExampleNames(data, describe=describe)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = names.shown([next(k for k in range(N) if k not in left), *range(N)])
        names.texts(range(N))
    assert found == ["right", *("" if k in left else "right" for k in range(N))]
    assert len(said) == 1
    assert f"example {left[0]}, a tuple, can't be described" in str(said[0].message)
    assert "KeyError: 'left'" in str(said[0].message)

    calls = []

    def hopeless(example: Any) -> str:
        calls.append(example)
        raise OSError("the volume is gone")

    with pytest.warns(UserWarning, match="the volume is gone"):
        assert ExampleNames(data, describe=hopeless).shown(range(N)) is None
    assert len(calls) == 3
    with pytest.warns(UserWarning, match="the volume is gone"):
        report = audited(InfluenceAudit(describe=hopeless, queries="worst"), tmp_path, data, validation=vectors(7, 2))
    assert report.status == AuditReport.load(report.directory).status == "complete"  # type: ignore[arg-type]
    assert "text" not in report.columns


def test_only_the_first_are_fetched_and_a_description_that_fails_is_known_before_training(tmp_path: Path) -> None:
    class Counted(Dataset[Any]):
        def __init__(self) -> None:
            self.data, self.describing = vectors(60), False

        def __len__(self) -> int:
            return len(self.data)

        def __getitem__(self, index: int) -> Any:
            return self.data[index]

    fetched, epochs = [], []

    def describe(example: Any) -> str:
        fetched.append(example)
        epochs.append(model.trainer.global_step)
        return "something"

    data, model = Counted(), Classifier()
    audit = InfluenceAudit(describe=describe)
    make_trainer(tmp_path, callbacks=[audit], logger=TensorBoardLogger(tmp_path)).fit(model, loader(data))
    assert audit.has_report
    assert epochs[0] == 0
    columns = audit.report.columns
    assert sorted(columns["rank"][columns["text"] == "something"]) == [*range(1, 51)]
    assert len(fetched) == 60  # the others for the page, none twice


def test_what_to_look_at_is_described_where_the_run_cannot_tell(tmp_path: Path) -> None:
    """A regression has no candidates: the table that a person fills in had no word of the examples."""
    audit = InfluenceAudit(describe=lambda example: f"x is {example[0][0]:.3f}", trusted=[0, 1, 2])
    data = TensorDataset(torch.randn(20, 5), torch.randn(20, 3))
    model = Classifier(features=5, classes=3, loss=lambda out, batch: torch.nn.functional.mse_loss(out, batch[1]))
    make_trainer(tmp_path, callbacks=[audit]).fit(model, loader(data))
    assert not len(audit.report.candidates)
    assert "and trusted labels do not change that" in audit.report.beliefs.reason
    with audit.report.write_review(tmp_path / "review.csv").open() as file:
        assert all(row["text"].startswith("x is ") for row in csv.DictReader(file))


def test_nothing_is_left_behind() -> None:
    """Random streams, the data set's state, and the data themselves, which a careless description writes to."""

    class Stateful(Dataset[Any]):
        def __init__(self) -> None:
            self.data, self.count, self.generator = vectors(), 0, torch.Generator().manual_seed(3)

        def __len__(self) -> int:
            return N

        def __getitem__(self, index: int) -> Any:
            self.count += 1
            torch.rand(1, generator=self.generator)
            return self.data[index]

    def describe(example: Any) -> str:
        torch.rand(1)
        np.random.rand()
        random.random()
        return str(example[0].mul_(100))

    data = Stateful()
    held, state = data.data.tensors[0].clone(), data.generator.get_state()
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    expected = torch.rand(1), np.random.rand(), random.random()
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    assert ExampleNames(data, lambda index: f"{index} {torch.rand(1)}", describe).shown([1, 2, 3]) is not None
    assert (torch.rand(1), np.random.rand(), random.random()) == expected
    assert data.count == 0
    assert torch.equal(data.generator.get_state(), state)
    assert torch.equal(data.data.tensors[0], held)


@pytest.mark.usefixtures("sure")
def test_a_run_is_the_same_with_and_without_names(tmp_path: Path) -> None:
    found = []
    for name, arguments in (("plain", {}), ("named", {"ids": NAMES, "describe": lambda example: str(torch.rand(1))})):
        torch.manual_seed(0)
        model, audit = Classifier(), InfluenceAudit(**arguments)
        make_trainer(tmp_path / name, callbacks=[audit]).fit(model, loader(vectors(), shuffle=True))
        found.append((model, audit))
    (plain, first), (named, second) = found
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), named.parameters(), strict=True))
    assert first.state_key == second.state_key  # a checkpoint of one resumes with the other
    assert first.has_report
    assert second.has_report
    assert {*second.report.columns} - {*first.report.columns} == {"id", "text"}
    for name, values in first.report.columns.items():
        np.testing.assert_array_equal(values, second.report.columns[name])


# ---------------------------------------------------------------------------------------------------- tokens


class Tokenizer:
    """Decodes numbers to letters; 0 is padding, 1 a special token."""

    pad_token_id = 0

    def decode(self, tokens: list[int], skip_special_tokens: bool = False) -> str:
        kept = [token for token in tokens if not (skip_special_tokens and token == 1)]
        return "".join(chr(ord("a") + token - 2) for token in kept)


class Plain:
    def __init__(self) -> None:
        self.decode = lambda tokens: "".join(chr(ord("a") + token) for token in tokens)


IDS = torch.tensor([1, 4, 2, 21, 0, 0])


@pytest.mark.parametrize(
    "example",
    [
        {"input_ids": IDS, "attention_mask": IDS.ne(0).long(), "labels": 3},
        {"labels": torch.full((6,), 2), "input_ids": IDS.tolist()},
        UserDict(attention_mask=torch.ones(6).long(), tokens=IDS.numpy()),
        (IDS, torch.tensor(3)),
        (IDS.to(torch.int32), 3),
        ({"text": {"input_ids": IDS[None]}}, torch.tensor([1.0, 2.0])),
        [torch.rand(6), IDS, IDS.roll(-1)],
        IDS,
        torch.cat((IDS, torch.tensor([-100]))),
    ],
)
def test_tokens_are_found_and_decoded(example: Any) -> None:
    assert description(Tokenizer(), example) == "cat"


def test_padding_that_only_the_mask_knows() -> None:
    example = {"input_ids": torch.tensor([2, 0, 19, 7, 7]), "attention_mask": torch.tensor([1, 1, 1, 0, 0])}
    assert description(Plain(), example) == "cat"


def test_several_choices_and_long_texts() -> None:
    assert description(Tokenizer(), (torch.tensor([[4, 2, 21], [3, 2, 21]]), 1)) == "cat | bat"
    long = description(Tokenizer(), torch.full((10_000,), 2))
    assert isinstance(long, str)
    assert 100 < len(long) <= 500


def test_tokens_one_by_one() -> None:
    """Spaces tell where words begin; of control characters nothing is shown."""
    words = ["<pad>", " a", "cat", "s\u202e", "\n", " \x00b\t", ""]

    class Words:
        pad_token_id = 0

        def decode(self, tokens: list[int]) -> str:
            return "".join(words[token] for token in tokens)

    data = [(torch.tensor([1, 2, 3, 4, 5, 6, 0, 0]), 1), ({"input_ids": torch.ones(2, 3).long()}, 0)]
    names, source = ExampleNames(data, describe=Words()), ExampleSource(data, batch_size=2)
    assert names.tokens([0, 1], source) == {0: [" a", "cat", "s", " ", " b ", "", None, None]}  # of several texts, none
    assert ExampleNames(data, describe=str).tokens([0], source) == ExampleNames(data).tokens([0], source) == {}


def test_a_tokenizer_without_tokens_is_said() -> None:
    names = ExampleNames([{"pixels": torch.rand(3), "label": 1}], describe=Tokenizer())
    with pytest.warns(UserWarning, match=r"example 0, a dict with pixels, label, .* no sequence of integers to decode"):
        assert names.shown([0]) is None


def test_a_real_tokenizer() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    words = ["[PAD]", "[UNK]", "[CLS]", "a", "good", "film"]
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: k for k, word in enumerate(words)}, "[UNK]"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]"
    )
    example = fast("a good film", padding="max_length", max_length=8)
    assert description(fast, example) == "a good film"
    assert description(raw, (torch.tensor([2, 3, 4, 5]),)).endswith("a good film")  # type: ignore[union-attr]


# ----------------------------------------------------------------------------------------------- spreadsheets


@pytest.mark.parametrize(
    ("name", "cell"),
    [
        ("=1+1", "'=1+1"), ("+x", "'+x"), ("@a", "'@a"), ("-2", "'-2"), (" =1", "' =1"), ("\t=1", "'\t=1"),
        ("0042", "'0042"), ("1e5", "'1e5"), ("1.50", "'1.50"), ("2024-01-02", "'2024-01-02"), ("1/2", "'1/2"),
        ("12:30", "'12:30"), ("12345678901234567890", "'12345678901234567890"), ("MARCH1", "'MARCH1"),
        ("2-Sep", "'2-Sep"), ("TRUE", "'TRUE"), ("12", "12"), ("0", "0"), ("a,b", "a,b"), ('say "hi"', 'say "hi"'),
        ("two\nlines", "two\nlines"), ("img_0042.png", "img_0042.png"), ("market1", "market1"), ("1a", "1a"),
        ("märz/ü.png", "märz/ü.png"), ("猫", "猫"), ("v1.0.2-beta", "v1.0.2-beta"),
    ],
)  # fmt: skip
def test_ids_come_through_spreadsheets(name: str, cell: str) -> None:
    """Nothing runs as a formula, and nothing is turned into a number or a date and written back as another name."""
    columns = {"rank": [1], "candidate": [True], "id": np.array([name], dtype=object)}
    content = candidates_csv(columns)
    assert content.startswith(b"\xef\xbb\xbf") == (not name.isascii())
    row = next(csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline=""), strict=True))
    assert row["id"] == cell
    assert cell.removeprefix("'") == name


def test_long_whole_numbers_come_through_spreadsheets() -> None:
    columns = {"rank": [1, 2, 3], "candidate": [True] * 3, "id": np.array([7, -5, 2**62])}
    assert candidates_csv(columns) == f"decision,rank,id\r\n,1,7\r\n,2,-5\r\n,3,'{2**62}\r\n".encode()


# --------------------------------------------------------------------------------------------------- ensembles


def member(ids: Any = None, text: Any = None, seed: int = 0) -> AuditReport:
    columns: dict[str, Any] = {"index": np.arange(4), "el2n": np.random.default_rng(seed).random(4)}
    columns |= {} if ids is None else {"id": np.array(list(ids), dtype=object)}
    columns |= {} if text is None else {"text": np.array(text, dtype=object)}
    return AuditReport(rank(columns), {"status": "complete", "label_names": ["a", "b"]})


def test_an_ensemble_keeps_names(tmp_path: Path) -> None:
    found = AuditReport.ensemble([member("abcd", ["x", "", "", ""]), member("abcd", ["", "y", "", ""], 1)])
    assert found.columns["id"].tolist() == list("abcd")
    assert found.columns["text"].tolist() == ["x", "y", "", ""]
    assert found.manifest["label_names"] == ["a", "b"]
    assert AuditReport.load(found.save(tmp_path).directory).columns["id"].tolist() == list("abcd")  # type: ignore[arg-type]
    for pair in ((member(), member("abcd", seed=1)), (member("abcd"), member(seed=1))):
        assert AuditReport.ensemble(pair).columns["id"].tolist() == list("abcd")
    with pytest.raises(EnsembleError, match="audit 1 has another column 'id' than audit 0"):
        AuditReport.ensemble([member("abcd"), member("abce")])


# --------------------------------------------------------------------------------------------------- glossary


def test_the_docs_explain_every_column() -> None:
    page = (Path(__file__).parent.parent / "docs" / "scores.md").read_text(encoding="utf-8")
    expected = glossary()
    assert expected in page, f"docs/scores.md has to end with this:\n\n{expected}"
    assert all(f"| `{name}` | {column.meaning} |" in expected for name, column in COLUMNS.items())
    assert all(f"| `{name}` | {meaning} |" in expected for name, meaning in PAIR_DESCRIPTIONS.items())


def test_the_folder_explains_its_own_columns(tmp_path: Path) -> None:
    report = audited(InfluenceAudit(ids=NAMES), tmp_path, vectors())
    assert report.directory is not None
    text = (report.directory / "columns.md").read_text(encoding="utf-8")
    assert text == report.glossary() == AuditReport.load(report.directory).glossary()
    listed = set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE))
    assert listed == {*report.columns}
    assert "`query`" not in text
    both = AuditReport(report.columns | {"mine": np.zeros(N)}, pairs={"query": np.zeros(1), "query_id": np.zeros(1)})
    assert "| `mine` |" in both.glossary()
    assert "| `query_id` | of the query: name of the example" in both.glossary()


def test_tables_explain_what_they_show(monkeypatch: pytest.MonkeyPatch) -> None:
    columns: dict[str, Any] = {name: np.arange(4.0) for name in ("el2n", "self_influence", "harm")}
    columns["suggested"] = np.arange(4)
    ranked, _ = judged({"index": np.arange(4), **columns}, beliefs=LabelBeliefs("told", noise_rate=0.5))
    told = " ".join(str(AuditReport(ranked)).split())
    shown = candidates_table(ranked, None).markdown().split("\n\n")[2].replace("&#58;", ":").replace("&#95;", "_")
    for name in ("suspicion", "el2n", "self_influence", "harm"):
        assert f"{name}: {COLUMNS[name].legend}" in told
        assert f"{name}: {COLUMNS[name].legend}"[:40].split(">")[0] in shown
    monkeypatch.setitem(COLUMNS, "el2n", Column("el2n", "x", "high", shown=("table",), legend="how odd"))
    assert "el2n: how odd" in str(AuditReport(ranked))


def test_a_text_is_drawn_in_the_place_of_a_picture() -> None:
    def drawn(text: str) -> Tensor:
        return sheet([(text, "#1")], 1)

    empty, short, long = drawn(""), drawn("good"), drawn("good film, " * 100)
    assert empty.shape == short.shape == long.shape
    ink = [int((each < 100).any(0).sum()) for each in (empty, short, long)]
    assert ink[0] < ink[1] < ink[2] / 5
    changed = (long != empty).any(0).nonzero()
    assert int(changed[:, 1].max()) < 12 + 192  # within the picture, and above its caption
    assert int(changed[:, 0].max()) < 12 + 192
    assert torch.equal(drawn("naïve"), drawn("naive"))
    # A row of question marks would be taken for what the example says.
    assert torch.equal(drawn("這部電影非常好看"), drawn("(letters that this font has not: see the text)"))


def test_class_names_are_looked_up_below_subsets() -> None:
    assert bridge.label_names(Subset(Named(vectors(), ["a"]), [0])) == ["a"]
