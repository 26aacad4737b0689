"""The command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from models import Validated, make_trainer, vectors
from torch.utils.data import DataLoader
from which_lightning import PACKAGE, ModelCheckpoint, pl

from lightning_influence import AuditReport, InfluenceAudit
from lightning_influence.audit.comparison import Comparison
from lightning_influence.cli import main
from lightning_influence.cli.main import CANNOT_TELL, FAILED, TOO_NOISY

pytestmark = [
    pytest.mark.filterwarnings("ignore:no logger"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec"),
]


class Net(Validated):
    """A model as a configuration makes it."""

    def __init__(self, features: int = 5, rate: float = 0.1) -> None:
        super().__init__(lambda module: torch.optim.SGD(module.parameters(), lr=rate), features)
        self.save_hyperparameters()


class Loaded(Net):
    """With data of its own."""

    def train_dataloader(self) -> Any:
        return DataLoader(vectors(30), 8)


class Data(pl.LightningDataModule):
    def __init__(self, n: int = 30, batch_size: int = 8) -> None:
        super().__init__()
        self.n, self.batch_size = n, batch_size

    def train_dataloader(self) -> Any:
        return DataLoader(vectors(self.n), self.batch_size, shuffle=True)

    def val_dataloader(self) -> Any:
        return DataLoader(vectors(16, 2), 8)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, AuditReport]:
    """A run with a checkpoint and an audit."""
    directory = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    audit = InfluenceAudit(curvature="kfac")
    keeper = ModelCheckpoint(directory / "checkpoints")
    trainer = make_trainer(directory, logger=False, enable_checkpointing=True, callbacks=[audit, keeper])
    trainer.fit(Net(), datamodule=Data())
    return directory, audit.report


def config(directory: Path, content: dict[str, Any]) -> str:
    path = directory / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


def named(kind: type) -> str:
    return f"{kind.__module__}.{kind.__name__}"


AUDIT = {"class_path": "lightning_influence.InfluenceAudit", "init_args": {"curvature": "kfac"}}
TRAINER: dict[str, Any] = {
    "max_epochs": 9,
    "accelerator": "gpu",
    "devices": 4,
    "strategy": "ddp",
    "callbacks": [None, {"class_path": "elsewhere.Callback"}, AUDIT],
    "logger": {"class_path": "elsewhere.Logger"},
    "enable_progress_bar": False,
}
CONFIGS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "saved": (
        {
            "seed_everything": 1,
            "trainer": TRAINER,
            "model": {"class_path": named(Net), "init_args": {"rate": 0.1}},
            "data": {"class_path": named(Data), "init_args": {"n": 30}},
            "optimizer": None,
            "lr_scheduler": None,
            "ckpt_path": None,
            "weights_only": None,
        },
        [],
    ),
    "of fit": (
        {
            "fit": {"trainer": TRAINER, "model": {"rate": 0.1}, "data": {"n": 31}},
            "validate": {"trainer": {"accelerator": "cpu"}},
        },
        ["--model", named(Net), "--data", named(Data), "--data.n", "30"],
    ),
    "without an audit": (
        {"model": {"class_path": named(Net)}, "data": named(Data), "trainer": {"enable_progress_bar": False}},
        ["--curvature", "kfac"],
    ),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_configuration_and_a_checkpoint_give_the_audit(
    tmp_path: Path, run: tuple[Path, AuditReport], kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("jsonargparse")
    directory, expected = run
    content, rest = CONFIGS[kind]
    path = next((directory / "checkpoints").glob("*.ckpt"))
    given = ["--config", config(tmp_path, content), "--ckpt_path", str(path), "--dirpath", str(tmp_path / "audit")]
    assert main(["audit", *given, *rest]) == 0, capfd.readouterr().err
    report = AuditReport.load(tmp_path / "audit")
    assert report.columns.keys() == expected.columns.keys()
    for name, values in report.columns.items():
        np.testing.assert_allclose(values.astype(float), expected.columns[name].astype(float), rtol=1e-6, err_msg=name)


def test_a_command_line_of_ones_own(tmp_path: Path, run: tuple[Path, AuditReport]) -> None:
    """Its arguments and links are where its own main has them."""
    pytest.importorskip("jsonargparse")
    directory, expected = run
    (tmp_path / "own_cli.py").write_text(
        f"""
from {PACKAGE}.cli import LightningCLI

class Own(LightningCLI):
    def add_arguments_to_parser(self, parser):
        parser.add_argument("--mine", type=int)
        parser.link_arguments("mine", "data.n")
"""
    )
    sys.path.insert(0, str(tmp_path))
    try:
        given = ["--config", config(tmp_path, {"mine": 30, "model": {"rate": 0.1}, "trainer": TRAINER})]
        given += ["--ckpt_path", str(directory), "--dirpath", str(tmp_path / "audit"), "--data.batch_size", "5"]
        given += ["--cli", "own_cli.Own", "--model", named(Net), "--data", named(Data)]
        assert main(["audit", *given]) == 0
    finally:
        sys.path.remove(str(tmp_path))
    np.testing.assert_allclose(
        AuditReport.load(tmp_path / "audit").columns["loss"], expected.columns["loss"], rtol=1e-6
    )


@pytest.mark.parametrize(
    ("content", "rest", "said"),
    [
        ({"trainer": {}}, [], "names no class of the model"),
        ({"model": {"rate": 1.0}}, [], "names no class of the model .*pass --model package.module.Class"),
        ({"model": named(Net)}, [], "names no data, and Net has no `train_dataloader`; pass --data"),
        ({"model": named(Net), "data": {"n": 3}}, [], "names no class of the data .*pass --data"),
        ({"model": "nowhere.Net"}, [], "nowhere.Net can't be imported .*set PYTHONPATH"),
        ({"model": "pathlib.Path"}, [], "expected the class of a LightningModule"),
        ({"model": named(Loaded)}, ["--ckpt_path", "none.ckpt"], "there is no checkpoint none.ckpt"),
        ({"model": named(Loaded)}, ["--model.features", "4"], "of another model: .*, with features=5"),
        ({"model": named(Loaded)}, ["--batch", "4"], "'--batch': expected --part.name value"),
        ([1, 2], [], r"holds \[1, 2\]; expected the YAML of a LightningCLI"),
    ],
)
def test_what_a_configuration_lacks(
    tmp_path: Path,
    run: tuple[Path, AuditReport],
    content: Any,
    rest: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("jsonargparse")
    given = ["--config", config(tmp_path, content), "--ckpt_path", str(run[0]), "--dirpath", str(tmp_path / "audit")]
    assert main(["audit", *given, *rest]) == FAILED
    error = capsys.readouterr().err
    assert error.startswith("lightning-influence audit: ") or "\nlightning-influence audit: " in error
    import re

    assert re.search(said, error), error


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--model.rate", "fast"], "model.rate=fast; expected float."),
        (["--data.batch_size", "8.5"], "data.batch_size=8.5; expected int."),
        (["--model.raet", "0.1"], "model: Option 'raet' is not accepted; Net takes features, rate."),
        (["--curvature", "ekfax"], "curvature=ekfax; expected one of 'ekfac', 'kfac',"),
        (["--damping", "-1"], "damping=-1.0; expected a number > 0,"),
        (["--trainer.precision", "17"], "trainer.precision=17; expected one of 64, 32, 16 or one of '"),
        (["--trainer.precison", "17"], "'trainer' does not accept option 'precison'."),
    ],
)
def test_what_jsonargparse_refuses_is_told_in_one_sentence(
    wrong: list[str], said: str, tmp_path: Path, run: tuple[Path, AuditReport], capfd: pytest.CaptureFixture[str]
) -> None:
    """It printed its usage and every alternative of the type, 120 lines of it."""
    content = {"model": {"class_path": named(Net)}, "data": {"class_path": named(Data)}}
    assert main(["audit", "--config", config(tmp_path, content), "--ckpt_path", str(run[0]), *wrong]) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if not line.startswith("Seed set")]
    assert line.startswith("lightning-influence audit: ")
    assert said in line


def test_a_model_with_its_own_data(tmp_path: Path, run: tuple[Path, AuditReport]) -> None:
    pytest.importorskip("jsonargparse")
    given = ["--config", config(tmp_path, {"model": named(Loaded)}), "--ckpt_path", str(run[0])]
    assert main(["audit", *given, "--dirpath", str(tmp_path / "audit")]) == 0
    assert len(AuditReport.load(tmp_path / "audit")) == 30


def test_a_configuration_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("jsonargparse")
    assert main(["audit", "--config", str(tmp_path / "no.yaml"), "--ckpt_path", "a.ckpt"]) == FAILED
    assert "no.yaml can't be read" in capsys.readouterr().err
    assert main(["audit", "--config", "no.yaml"]) == FAILED
    assert "there is no checkpoint to audit; pass --ckpt_path" in capsys.readouterr().err


def test_without_jsonargparse_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["audit", "--config", "a.yaml", "--ckpt_path", "a.ckpt"]) == FAILED
    assert "pip install 'lightning-influence[cli]'" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------- report, compare


def test_report_prints_and_writes(
    tmp_path: Path, run: tuple[Path, AuditReport], capsys: pytest.CaptureFixture[str]
) -> None:
    directory, expected = run
    page, table = tmp_path / "a.html", tmp_path / "a.csv"
    assert main(["report", str(directory), "--html", str(page), "--csv", str(table)]) == 0
    assert capsys.readouterr().out == f"{expected}\n"
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert "influence-audit" in page.read_text(encoding="utf-8")
    assert len(table.read_text(encoding="utf-8-sig").splitlines()) == 31
    assert main(["report", str(directory), "--csv", str(table)]) == FAILED
    assert "is there already" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "nowhere")]) == FAILED
    assert "does not exist" in capsys.readouterr().err
    assert main(["report", str(tmp_path)]) == FAILED
    assert "holds no audit" in capsys.readouterr().err


def test_view_says_where_there_is_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["view", str(tmp_path / "nowhere")]) == FAILED
    assert "does not exist; expected the directory of an audit" in capsys.readouterr().err
    assert main(["view", str(tmp_path)]) == FAILED
    assert "holds no audit: expected manifest.json" in capsys.readouterr().err


def with_labels(report: AuditReport, directory: Path, **labels: Any) -> str:
    """The audit with another belief."""
    about = {**report.manifest, "labels": {**report.manifest["labels"], **labels}}
    return str(AuditReport(report.columns, about).save(directory).directory)


def test_exit_codes(tmp_path: Path, run: tuple[Path, AuditReport], capsys: pytest.CaptureFixture[str]) -> None:
    told = with_labels(run[1], tmp_path / "told", verdict="told", noise_rate=0.07, noise_rate_low=0, noise_rate_high=1)
    doubt = with_labels(run[1], tmp_path / "doubt", verdict="cannot tell", reason="too short", noise_rate=0.01)
    assert main(["report", told]) == main(["report", doubt]) == 0
    assert main(["report", told, "--fail-over", "0.05"]) == TOO_NOISY == 3
    assert "more labels are estimated to be wrong: 7.0%" in capsys.readouterr().err
    assert main(["report", told, "--fail-over", "0.07"]) == 0
    assert main(["report", doubt, "--fail-over", "0.05"]) == CANNOT_TELL == 4
    assert "can't be told how many labels are wrong: too short" in capsys.readouterr().err
    for wrong in (["--fail-over", "5"], ["--fail-over", "few"], ["--other"]):
        with pytest.raises(SystemExit) as stopped:
            main(["report", told, *wrong])
        assert stopped.value.code == 2
    assert "'few' is no share; expected a number from 0 to 1" in capsys.readouterr().err


def test_compare(tmp_path: Path, run: tuple[Path, AuditReport], capsys: pytest.CaptureFixture[str]) -> None:
    """Two of the candidates are none any more, one is new, three examples are gone and one label was mended."""
    report = run[1]
    columns = {name: np.array(values[3:]) for name, values in report.columns.items()}
    columns["el2n"], columns["label"][0] = -columns["el2n"], (columns["label"][0] + 1) % 3
    before = np.flatnonzero(columns["candidate"])
    columns["candidate"][before[:2]] = False
    new = int(np.flatnonzero(~report.columns["candidate"][3:])[0])
    columns["candidate"][new] = True
    columns.pop("tracin")
    other = AuditReport(columns, {**report.manifest, "status": "complete"}).save(tmp_path / "other")
    found = Comparison.of(report, other)
    assert found.examples == 27
    assert found.relabelled == 1
    assert found.correlations["el2n"] == pytest.approx(-1)
    assert found.correlations["loss"] == pytest.approx(1)
    assert [int(other.columns["index"][row]) for row in found.entered] == [int(columns["index"][new])]
    gone = {int(index) for index in columns["index"][before[:2]]} | (set(report.candidates.tolist()) & {0, 1, 2})
    assert {int(report.columns["index"][row]) for row in found.left} == gone
    assert main(["compare", str(report.directory), str(other.directory)]) == 0
    printed = capsys.readouterr().out
    assert printed == f"{found}\n"
    assert "30 and 27, 27 in both by index" in printed
    assert "only first  tracin" in printed


def test_ids_tell_examples_apart_where_both_have_them(run: tuple[Path, AuditReport]) -> None:
    columns = dict(run[1].columns)
    columns["id"] = np.asarray([f"file-{index}" for index in columns["index"]], dtype=object)
    moved = {name: values[::-1] for name, values in columns.items()}
    moved["index"] = columns["index"]
    found = Comparison.of(AuditReport(columns, {}), AuditReport(moved, {}))
    assert found.by == "id"
    assert list(found.correlations.values()) == pytest.approx([1.0] * len(found.correlations))
    assert not len(found.entered) + len(found.left)


def test_the_order_of_a_stream_tells_no_examples_apart(run: tuple[Path, AuditReport]) -> None:
    named = {**run[1].columns, "id": np.asarray([f"k{index}" for index in run[1].columns["index"]], dtype=object)}
    stream = AuditReport(named, {"stream": True})
    for both in ((stream, run[1]), (run[1], stream)):
        with pytest.raises(ValueError, match=r"is of a stream.*Audit that one with `ids=`"):
            Comparison.of(*both)
    assert Comparison.of(stream, AuditReport(named, {})).by == "id"


def test_reports_need_neither_lightning_nor_the_rest(run: tuple[Path, AuditReport]) -> None:
    source = f"""
import json, sys
from lightning_influence.cli import main
heavy = ("torch", "numpy", "lightning", "pytorch_lightning")
first = [name for name in heavy if name in sys.modules]
main(["report", {str(run[0])!r}])
print(json.dumps([first, [name for name in heavy[2:] if name in sys.modules]]))
"""
    done = subprocess.run([sys.executable, "-c", source], stdout=subprocess.PIPE, text=True, timeout=120, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == [[], []]


@pytest.mark.parametrize("command", [[], ["audit"], ["report"], ["compare"]])
def test_help(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--help"])
    assert stopped.value.code == 0
    assert "exit codes:" in capsys.readouterr().out
