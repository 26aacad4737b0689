"""Loggers of real packages, offline: what an audit shows in them, what they can't show, and where it lies."""

from __future__ import annotations

import csv
import json
import os
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import Classifier, Validated, images, loader, make_trainer
from which_lightning import CSVLogger, ModelCheckpoint, TensorBoardLogger, pl

from lightning_influence import InfluenceAudit
from lightning_influence.audit.report import AuditReport
from lightning_influence.loggers.exhibits import Curve, Histogram, Picture, Table
from lightning_influence.loggers.writers import WRITERS, show

pytestmark = pytest.mark.usefixtures("unverified")

LOGGERS: Any = pytest.importorskip(f"{pl.__name__}.loggers")
QUERIES = 2


def audited(tmp_path: Path, logger: Any, **arguments: Any) -> AuditReport:
    audit = InfluenceAudit(**{"queries": "worst", "known_noise": [0, 3, 4], **arguments})
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*failed, all else goes on")
        trainer = make_trainer(tmp_path, callbacks=[audit], logger=logger)
        trainer.fit(Validated(features=36), loader(images()), loader(images(QUERIES, 2)))
    assert audit.report is not None
    return audit.report


def beside_checkpoints(tmp_path: Path, logger: Any) -> None:
    """The audit lies where ModelCheckpoint puts its folder: of this run, not of all."""
    audit, checkpoint = InfluenceAudit(), ModelCheckpoint()
    trainer = make_trainer(tmp_path, callbacks=[audit, checkpoint], logger=logger, enable_checkpointing=True)
    trainer.fit(Classifier(features=36), loader(images()))
    assert audit.report is not None
    assert audit.report.directory == Path(checkpoint.dirpath).parent / "influence"


# ---------------------------------------------------------------------------------------------- Weights & Biases


def wandb_logger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("WANDB_SILENT", "true")
    pytest.importorskip("wandb")
    return LOGGERS.WandbLogger(project="p", save_dir=tmp_path, offline=True, settings={"init_timeout": 60})


def test_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logger = wandb_logger(tmp_path, monkeypatch)
    report = audited(tmp_path, logger)
    run = logger.experiment
    media = Path(run.dir) / "media"
    summary = dict(run.summary)
    run.finish()
    assert report.directory == tmp_path / "p" / run.id / "influence"
    pictures = {path.relative_to(media / "images").as_posix() for path in (media / "images").rglob("*.png")}
    for tag in ("influence/queries/1/strongest", "influence/queries/2/specific"):
        assert any(path.startswith(f"{tag}_") for path in pictures), tag
    (table,) = (media / "table" / "influence" / "queries").glob("table_*.table.json")
    held = json.loads(table.read_text())
    assert held["columns"] == ["query", "given", "predicted", "loss", "list", "kind", "example", "label", "score"]
    assert {type(row[-1]) for row in held["data"]} == {float}, "numbers stay numbers, which sort"
    assert (media / "table" / "influence" / "summary").is_dir()
    assert summary["influence/coverage"] == 1.0
    histogram = summary["influence/tracin/log10"]
    assert sum(histogram["values"]) == len(report)
    assert len(histogram["bins"]) == len(histogram["values"]) + 1
    assert summary["influence/detection/suspicion_auroc"] == report.manifest["detection"]["suspicion"]["auroc"]


def test_wandb_beside_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logger = wandb_logger(tmp_path, monkeypatch)
    beside_checkpoints(tmp_path, logger)
    logger.experiment.finish()


# ---------------------------------------------------------------------------------------------------------- MLflow


def mlflow_logger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: str) -> Any:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.chdir(tmp_path)  # artifacts of a database lie below it
    if store == "file":
        return LOGGERS.MLFlowLogger(save_dir=str(tmp_path / "mlruns"))
    pytest.importorskip("sqlalchemy")
    return LOGGERS.MLFlowLogger(tracking_uri=f"sqlite:///{tmp_path}/runs.db")


@pytest.mark.parametrize("store", ["file", "sqlite"])
def test_mlflow(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    logger = mlflow_logger(tmp_path, monkeypatch, store)
    report = audited(tmp_path, logger)
    client, run = logger.experiment, logger.run_id
    (steps,) = (
        each.path
        for each in client.list_artifacts(run, "influence")
        if each.path.endswith(f"/step_{report_step(report)}")
    )
    files = {each.path.removeprefix(f"{steps}/") for each in client.list_artifacts(run, steps)}
    assert {"queries_1_strongest.png", "tracin_log10.png", "detection_suspicion.png"} <= files
    assert {"queries.json", "summary.json", "detection.json"} <= files or {"queries.csv", "summary.csv"} <= files
    # An audit in the root of a file store is a malformed experiment, named with a stack trace at every listing.
    caplog.clear()
    assert [each.name for each in client.search_experiments(filter_string="name = 'lightning_logs'")]
    assert "Malformed" not in caplog.text
    assert report.directory is not None
    assert report.directory.parent.name == run


@pytest.mark.parametrize("store", ["file", "sqlite"])
def test_mlflow_beside_checkpoints(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    beside_checkpoints(tmp_path, mlflow_logger(tmp_path, monkeypatch, store))


def report_step(report: AuditReport) -> int:
    return int(report.manifest["step"])


# ----------------------------------------------------------------------------------------------------------- Comet


def test_comet(tmp_path: Path) -> None:
    comet = pytest.importorskip("comet_ml")
    settings = {"offline_directory": str(tmp_path), "log_env_details": False, "log_git_metadata": False}
    where: dict[str, Any] = {"online": False, "api_key": "none", "workspace": "w"}
    logger = LOGGERS.CometLogger(project="p", **where, **settings)
    # Lightning disables the experiments that it makes offline, which keep nothing.
    logger._experiment = comet.start(project_name="p", **where, experiment_config=comet.ExperimentConfig(**settings))
    assert logger.experiment.alive
    report = audited(tmp_path, logger)
    logger.experiment.end()
    (archive,) = tmp_path.glob("*.zip")
    with zipfile.ZipFile(archive) as held:
        messages = held.read("messages.json").decode()
    for name in ("influence/queries/1/strongest", "influence/tracin/log10", "influence/detection/suspicion"):
        assert name in messages
    assert f"influence/step_{report_step(report)}/queries.csv" in messages
    assert report.directory == tmp_path / logger.name / logger.version / "influence"


# ------------------------------------------------------------------------------------------- LitLogger and Trackio


def test_litlogger_gets_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    litlogger = pytest.importorskip("litlogger")
    if not hasattr(LOGGERS, "LitLogger") or not hasattr(LOGGERS.LitLogger, "log_file"):
        pytest.skip("this release of Lightning has no LitLogger")
    held: dict[str, Any] = {}

    class Experiment(dict):  # type: ignore[type-arg]
        """In place of one that signs in at lightning.ai."""

        def __init__(self, **_: Any) -> None:
            super().__init__()

        def __missing__(self, key: str) -> Any:
            return self  # of numbers

        def __setitem__(self, key: str, value: Any) -> None:
            held[key] = value

        def __getattr__(self, name: str) -> Callable[..., None]:
            return lambda *_, **__: None

    monkeypatch.setattr(litlogger, "Experiment", Experiment)
    monkeypatch.chdir(tmp_path)
    report = audited(tmp_path, LOGGERS.LitLogger(name="n", root_dir=tmp_path))
    files = {key.partition(f"/influence/step_{report_step(report)}/")[2]: value for key, value in held.items()}
    assert {"queries_1_strongest.png", "queries.csv", "summary.csv", "tracin_log10.png"} <= files.keys()
    with open(files["queries.csv"].path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) > QUERIES
    assert {row["kind"] for row in rows} == {"proponent", "opponent"}
    assert Path(files["queries_1_strongest.png"].path).read_bytes().startswith(b"\x89PNG")


def test_trackio_gets_what_it_calls_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trackio = pytest.importorskip("trackio")
    logged: dict[str, Any] = {}

    class TrackioLogger(LOGGERS.logger.Logger):  # type: ignore[misc]
        """As the one that is proposed for Lightning, with a run that keeps what it is given."""

        name, version = "project", "run"

        def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
            logged.update(metrics)

        def log_hyperparams(self, *_: Any, **__: Any) -> None:
            pass

    report = audited(tmp_path, TrackioLogger())
    assert isinstance(logged["influence/queries/1/strongest"], trackio.Image)
    assert isinstance(logged["influence/queries/table"], trackio.Table)
    assert logged["influence/tracin/log10"].histogram.sum() == len(report)
    assert report.directory == tmp_path / "project" / "run" / "influence"


# ------------------------------------------------------------------------------------------------- all together


@pytest.mark.parametrize("kind", [TensorBoardLogger, CSVLogger])
def test_beside_checkpoints(kind: Any, tmp_path: Path) -> None:
    beside_checkpoints(tmp_path, kind(tmp_path, name="a", version="b"))
    assert (tmp_path / "a" / "b" / "influence" / "manifest.json").is_file()


def test_without_a_logger_it_lies_in_the_root(tmp_path: Path) -> None:
    beside_checkpoints(tmp_path, False)


def test_what_can_show_numbers_only_says_so_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    loggers = [CSVLogger(tmp_path, "one"), CSVLogger(tmp_path, "two"), TensorBoardLogger(tmp_path, "three")]
    with caplog.at_level("INFO", logger=pl.__name__):
        report = audited(tmp_path, loggers)
    said = [line for line in caplog.messages if "can't show pictures" in line]
    assert len(said) == 1
    assert said[0].startswith("influence audit: CSVLogger can't show pictures, tables and histograms")
    for logger in loggers[:2]:
        with open(os.path.join(logger.log_dir, "metrics.csv"), newline="") as file:
            logged = {name for row in csv.DictReader(file) for name, value in row.items() if value}
        assert {"influence/coverage", "influence/candidate_count", "influence/detection/suspicion_auroc"} <= logged
        assert not [name for name in logged if name.startswith("influence/seconds")]
    assert report.status == "complete"


def test_a_server_that_is_gone_is_asked_once_for_each_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call of a client may wait for minutes before it gives up, and an audit shows dozens of things."""
    asked: list[str] = []

    class FarLogger(CSVLogger):
        pass

    def gone(logger: Any, exhibit: Any, step: int) -> None:
        asked.append(type(exhibit).__name__)
        raise ConnectionError("the server is gone")

    monkeypatch.setitem(WRITERS, "FarLogger", {Picture: gone, Table: gone})
    board = TensorBoardLogger(tmp_path, "board")
    audit = InfluenceAudit(queries="worst")
    trainer = make_trainer(tmp_path, callbacks=[audit], logger=[FarLogger(tmp_path, "far"), board])
    with pytest.warns(UserWarning, match=r"showing pictures in FarLogger failed, all else goes on \(ConnectionError"):
        trainer.fit(Validated(features=36), loader(images()), loader(images(QUERIES, 2)))
    assert sorted(asked[:2] + asked[2:]) in (["Histogram", "Picture", "Table"], ["Picture", "Picture", "Table"])
    assert audit.report is not None
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tags = EventAccumulator(board.log_dir).Reload().Tags()
    assert "influence/queries/1/strongest" in tags["images"]
    assert "influence/queries/text_summary" in tags["tensors"]


def test_how_to_make_a_logger_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class MyLogger:
        pass

    class MyOtherLogger(MyLogger):
        pass

    shown: list[Any] = []
    monkeypatch.setitem(WRITERS, "MyLogger", {Picture: lambda logger, one, step: shown.append((one, step))})
    histogram = Histogram("h", np.array([0.1, 0.2, 0.9]), np.array([0.0, 0.5, 1.0]))
    curve = Curve("c", np.array([True, False, False]), np.array([0.9, 0.5, 0.5]))
    for exhibit in (
        Picture("p", torch.zeros(3, 2, 2, dtype=torch.uint8)),
        Table("t", ("a",), [(1,)]),
        histogram,
        curve,
    ):
        show(MyOtherLogger(), exhibit, 7)
    assert [one.tag for one, step in shown if step == 7] == ["p", "h", "c"]
    assert all(isinstance(one, Picture) for one, _ in shown)
    assert shown[1][0].pixels().std() > 0


def test_a_curve_goes_through_what_is_found() -> None:
    wanted = np.array([True, False, True, False])
    recall, precision = Curve("c", wanted, np.array([0.9, 0.8, 0.7, 0.1])).points()
    assert dict(zip(recall.tolist(), precision.tolist(), strict=True)) == {0.5: 1.0, 1.0: pytest.approx(2 / 3)}
    recall, precision = Curve("c", wanted, np.full(4, 0.5)).points()  # equal scores tell nothing
    assert recall.tolist() == [1.0]
    assert precision.tolist() == [0.5]
