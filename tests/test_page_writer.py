"""What a training writes for the page: while it goes on, when it is over, and when something fails."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import make_trainer
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from which_lightning import TensorBoardLogger, pl

from lightning_influence import InfluenceAudit
from lightning_influence.audit.descriptions import guessed
from lightning_influence.audit.report import AuditReport
from lightning_influence.audit.store.store import AuditStore
from lightning_influence.callbacks import page_writer
from lightning_influence.loggers.pictures import thumbnail

pytestmark = pytest.mark.usefixtures("unverified")

SIZE = 48


class Net(pl.LightningModule):
    def __init__(self, features: int = 36) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(features, 3))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.body(batch[0].float()), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


class Apart(Dataset[Any]):
    """Examples that can't be fetched once training is over."""

    def __init__(self, data: Dataset[Any]) -> None:
        self.data, self.gone = data, False

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> Any:
        if self.gone:
            raise OSError("the disk is gone")
        return self.data[index]


def images(seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (SIZE,), generator=generator)
    pixels = torch.rand(SIZE, 1, 6, 6, generator=generator)
    pixels[torch.arange(SIZE), 0, 2 * labels] += 1
    return TensorDataset(pixels, labels)


def train(directory: Path, data: Any, *others: Any, net: Any = None, epochs: int = 3, **arguments: Any) -> Any:
    audit = InfluenceAudit(verify=False, **arguments)
    logger = TensorBoardLogger(directory, name="", version="run")
    trainer = make_trainer(directory, max_epochs=epochs, logger=logger, callbacks=[audit, *others])
    loaders = DataLoader(data, 16, shuffle=True), DataLoader(images(1) if net is None else data, 16)
    trainer.fit(net or Net(), *loaders)
    return audit


def document(report: AuditReport) -> dict[str, Any]:
    assert report.directory is not None
    found: dict[str, Any] = json.loads((report.directory / "audit.json").read_bytes())
    return found


def chunks(report: AuditReport) -> list[list[str]]:
    assert report.directory is not None
    return [json.loads(path.read_bytes()) for path in sorted(report.directory.glob("pictures-*.json"))]


def decoded(report: AuditReport, place: list[int]) -> Any:
    kind, _, text = chunks(report)[place[0]][place[1]].partition(",")
    assert kind == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))


def events(directory: Path) -> EventAccumulator:
    reader = EventAccumulator(str(directory / "run"), size_guidance={"tensors": 0})
    reader.Reload()
    return reader


def blobs(reader: EventAccumulator, tag: str) -> list[list[bytes]]:
    return [list(event.tensor_proto.string_val) for event in reader.Tensors(tag)]


# ------------------------------------------------------------------------------------------------- what is written


def test_document_and_pictures_beside_the_audit_and_in_the_event_file(tmp_path: Path) -> None:
    data = images()
    report = train(tmp_path, data, queries="worst").report
    found = document(report)
    assert (found["status"], found["examples"], found["name"]) == ("complete", SIZE, "run/influence")
    assert (found["epochs_done"], found["epochs_planned"]) == (3, 3)
    assert len(found["pictures"]) == SIZE  # of so few, each
    for index in (0, 17):
        pixels = data[index][0][0].numpy()
        wanted = (pixels - pixels.min()) / (pixels.max() - pixels.min()) * 255
        assert np.abs(decoded(report, found["pictures"][str(index)]) - wanted).max() <= 0.5 + 1e-3
    assert report.pairs is not None
    asked = {f"0/{query}" for query in report.pairs["query"]}
    assert set(found["query_pictures"]) == asked
    queried = int(report.pairs["query"][0])
    assert decoded(report, found["query_pictures"][f"0/{queried}"]).argmax() == images(1)[queried][0].argmax()
    reader = events(tmp_path)
    written = [(report.directory / "audit.json").read_bytes()]
    written += [path.read_bytes() for path in sorted(report.directory.glob("pictures-*.json"))]
    assert blobs(reader, "audit/influence") == [written]


def test_of_every_epoch_while_training_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_influence.callbacks.showing.SHARE", 1e9)
    seen = []

    class Look(pl.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            seen.append(json.loads((tmp_path / "run" / "influence" / "audit.json").read_bytes()))

    train(tmp_path, images(), Look())
    assert [(each["status"], each["epochs_done"], each["epochs_planned"]) for each in seen] == [
        ("recording", epoch, 3) for epoch in (1, 2, 3)
    ]
    assert [len(each["curves"]["epochs"]) for each in seen] == [1, 2, 3]
    assert {each["epoch"] for each in seen[1]["histories"]} == {0, 1}
    assert not seen[-1]["pictures"]
    recorded = blobs(events(tmp_path), "recording/influence")
    assert [json.loads(blob)["epochs_done"] for (blob,) in recorded] == [1, 2, 3, 3]  # and before the last pass


def test_long_trainings_keep_event_files_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_influence.callbacks.showing.SHARE", 1e9)
    monkeypatch.setattr(page_writer, "_WHILE_TRAINING", 30_000)
    train(tmp_path, images(), epochs=12)
    recorded = blobs(events(tmp_path), "recording/influence")
    assert 1 <= len(recorded) < 12
    assert sum(len(blob) for (blob,) in recorded) <= 30_000 * 12**0.5


def test_an_interrupted_training_says_so(tmp_path: Path) -> None:
    class Stop(pl.Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 2:
                raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        train(tmp_path, images(), Stop())
    found = json.loads((tmp_path / "run" / "influence" / "audit.json").read_bytes())
    assert (found["status"], found["epochs_done"]) == ("interrupted", 2)
    assert json.loads(blobs(events(tmp_path), "recording/influence")[-1][0])["status"] == "interrupted"


def test_texts_of_examples_and_queries(tmp_path: Path) -> None:
    def said(example: Any) -> str:
        return f"<b>brightest {int(example[0].argmax())}</b>"

    data = images()
    found = document(train(tmp_path, data, queries="worst", describe=said).report)
    assert found["texts"] == {str(index): said(data[index]) for index in range(SIZE)}
    assert not found["pictures"]
    assert {text for text in found["query_texts"].values()} <= {said(images(1)[index]) for index in range(SIZE)}
    assert len(found["query_texts"]) == 8


def test_rows_of_a_table_are_told_in_numbers(tmp_path: Path) -> None:
    data = TensorDataset(torch.arange(SIZE * 2.0).reshape(SIZE, 2) / 100, torch.arange(SIZE) % 3)
    found = document(train(tmp_path, data, net=Net(2)).report)
    assert found["texts"]["30"] == "0.6, 0.61"


def test_pictures_keep_to_their_budget_and_queries_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_writer, "_PICTURES", 1_500)
    report = train(tmp_path, images(), queries="worst").report
    found = document(report)
    assert len(found["query_pictures"]) == 8
    assert 0 < len(found["pictures"]) < SIZE // 2
    assert sum(len(text) for chunk in chunks(report) for text in chunk) < 1_500 * 4 / 3 + 40 * 30


def test_of_many_examples_the_first_are_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_writer, "_PICTURED", 12)
    report = train(tmp_path, images()).report
    found = document(report)["pictures"]
    assert len(found) == 12
    assert set(report.candidates[:6]) <= {int(index) for index in found}


def test_slow_data_cost_no_more_than_patience(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_writer, "_PATIENCE", -1.0)
    assert len(document(train(tmp_path, images()).report)["pictures"]) == 1


# ---------------------------------------------------------------------------------------------------- what fails


def test_examples_that_cannot_be_fetched_cost_their_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = Apart(images())
    write = page_writer.PageWriter.write

    def after(*arguments: Any) -> None:
        data.gone = True
        write(*arguments)

    monkeypatch.setattr(page_writer.PageWriter, "write", after)
    with pytest.warns(UserWarning, match="the disk is gone"):
        report = train(tmp_path, data).report
    assert document(report)["status"] == "complete"
    assert not document(report)["pictures"]


@pytest.mark.parametrize("name", ["files", "shown_indices", "thumbnail"])
def test_a_page_that_cannot_be_made_leaves_the_audit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("a page")

    monkeypatch.setattr(page_writer, name, broken)
    with pytest.warns(UserWarning, match="failed, all else goes on .ZeroDivisionError: a page"):
        report = train(tmp_path, images()).report
    assert AuditReport.load(report.directory).status == "complete"
    # None is better than that of a training that still goes on.
    assert (report.directory / "audit.json").exists() == (name == "thumbnail")


def test_a_full_disk_leaves_no_page_of_the_time_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = AuditStore._write

    def full(self: AuditStore, file_name: str, content: bytes) -> None:
        if file_name.startswith("pictures"):
            raise OSError(28, "No space left on device")
        write(self, file_name, content)

    monkeypatch.setattr(AuditStore, "_write", full)
    with pytest.warns(UserWarning, match="writing the page to .* failed"):
        report = train(tmp_path, images()).report
    assert AuditReport.load(report.directory).status == "complete"
    assert not (report.directory / "audit.json").exists()
    assert blobs(events(tmp_path), "audit/influence")


def test_too_large_a_document_is_not_in_the_event_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(page_writer, "_LARGEST", 1_000)
    report = train(tmp_path, images()).report
    assert document(report)["status"] == "complete"
    assert "audit/influence" not in events(tmp_path).Tags()["tensors"]


# ------------------------------------------------------------------------------------------------- single examples


@pytest.mark.parametrize(
    ("image", "size", "mode", "kind"),
    [
        (torch.rand(1, 28, 28), (28, 28), "L", "PNG"),
        (torch.rand(3, 32, 48) * 9 - 4, (48, 32), "RGB", "PNG"),
        (torch.rand(3, 64, 64), (64, 64), "RGB", "PNG"),
        (torch.rand(3, 480, 640), (96, 72), "RGB", "JPEG"),
        (torch.rand(4, 100, 10), (10, 96), "L", "JPEG"),
        (torch.full((1, 5, 5), float("nan")), (5, 5), "L", "PNG"),
    ],
)
def test_thumbnails(image: Tensor, size: tuple[int, int], mode: str, kind: str) -> None:
    encoded = thumbnail(image)
    found = Image.open(io.BytesIO(encoded))
    assert (found.size, found.mode, found.format) == (size, mode, kind)
    assert len(encoded) < 15_000


@pytest.mark.parametrize(
    ("example", "told"),
    [
        ({"age": 41, "income": 17.25, "name": torch.tensor(2)}, "age 41, income 17.25, name 2"),
        (("a long\n review", 1), "a long review"),
        ({"title": "one", "body": "two", "label": 3}, "one | two"),
        ((torch.tensor([0.123456, 2.0]), 1), "0.1235, 2"),
        ((np.array([0.5, 2.0]), 1), "0.5, 2"),
        ((torch.tensor([5, 7, 9]), 1), None),
        (7, None),
        ({"label": 3}, None),
    ],
)
def test_what_is_told_of_an_example_that_nobody_describes(example: Any, told: str | None) -> None:
    assert guessed(example) == told


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1"])
def test_images_before_they_are_tensors(mode: str) -> None:
    picture = Image.fromarray(np.kron(np.eye(4), np.ones((4, 5))).astype(np.uint8) * 255).convert(mode)
    for example in ((picture, 3), {"label": 3, "pixels": np.asarray(picture.convert("RGB"))}):
        found = guessed(example)
        assert isinstance(found, Tensor)
        assert found.shape[1:] == (16, 20)
        assert Image.open(io.BytesIO(thumbnail(found))).convert("L").getpixel((0, 0)) == 255


@pytest.mark.parametrize("shape", [(3, 8, 8), (8, 8, 3), (1, 8, 9), (8, 9)])
def test_images_are_found_in_whatever_layout(shape: tuple[int, ...]) -> None:
    found = guessed((torch.rand(shape), 1))
    assert isinstance(found, Tensor)
    assert found.shape[0] in (1, 3)
    assert found.shape[1:] in ((8, 8), (8, 9))
