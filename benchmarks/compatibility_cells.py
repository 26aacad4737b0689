"""Workflows of one environment and one package of Lightning, each with and without the audit; a line of JSON for each.

Run by ``compatibility.py``.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from compatibility_table import DATA, LOGGERS, OPTIMIZATION, PACKAGES
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from lightning_influence import AuditReport, InfluenceAudit

N, FEATURES, CLASSES, BATCH, EPOCHS = 96, 6, 3, 16, 2
# Rows that a subset leaves out are at the end, so that its examples are those of the others.
SPARE = 8
PATIENCE = 20.0
"""Seconds."""


def rows(n: int) -> tuple[Tensor, Tensor]:
    """Return inputs and labels."""
    generator = torch.Generator().manual_seed(0)
    centres = 2 * torch.randn(CLASSES, FEATURES, generator=generator)
    y = torch.arange(N + SPARE) % CLASSES
    x = centres[y] + torch.randn(N + SPARE, FEATURES, generator=generator)
    return x[:n], y[:n]


class Columns(Dataset[dict[str, Any]]):
    """Rows as a mapping, as data sets of Hugging Face hand them out."""

    def __init__(self) -> None:
        self.x, self.y = rows(N)

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"x": self.x[index], "y": self.y[index], "key": f"row-{index}"}


class Streamed(IterableDataset[dict[str, Any]]):
    """The same rows as a stream."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (Columns()[index] for index in range(N))


def as_huggingface() -> Any:
    """Return a data set of Hugging Face."""
    from datasets import Dataset as Table

    x, y = rows(N)
    table = Table.from_dict({"x": x.tolist(), "y": y.tolist(), "key": [f"row-{index}" for index in range(N)]})
    return table.with_format("torch")


def model_of(pl: Any, manual: bool) -> Any:
    """Return the same network for every workflow."""

    class Model(pl.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = not manual
            self.net = nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, CLASSES))
            self.number = nn.Linear(FEATURES, 1)

        def loss(self, batch: Any) -> Tensor:
            # Of another loader, with a head of their own: scores of the first stay what they are.
            if isinstance(batch, dict) and "numbers" in batch:
                x, y = batch["numbers"]
                return self.loss(batch["classes"]) + F.mse_loss(self.number(x).squeeze(1), y.float())
            x, y = (batch["x"], batch["y"]) if isinstance(batch, dict) else batch
            return F.cross_entropy(self.net(x), y)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = self.loss(batch)
            if manual:
                optimizer = self.optimizers()
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    torch.manual_seed(1)
    return Model()


def data_of(pl: Any, kind: str) -> Any:
    """Return what ``fit`` is given."""
    if kind == "DataModule":

        class Data(pl.LightningDataModule):  # type: ignore[misc, name-defined]
            def train_dataloader(self) -> DataLoader[Any]:
                return DataLoader(TensorDataset(*rows(N)), BATCH)

        return Data()
    if kind.startswith("two loaders"):
        return {
            "classes": DataLoader(TensorDataset(*rows(N)), BATCH),
            "numbers": DataLoader(TensorDataset(*rows(8)), 4),
        }
    dataset: Any = {
        "DataLoader": lambda: TensorDataset(*rows(N)),
        "Hugging Face": as_huggingface,
        "Subset": lambda: Subset(TensorDataset(*rows(N + SPARE)), range(N)),
        "stream": Streamed,
        "stream, `sample_id=`": Streamed,
    }[kind]()
    return DataLoader(dataset, BATCH)


def logger_of(pl: Any, kind: str, directory: Path) -> tuple[Any, Callable[[], bool]]:
    """Return a logger, and what tells whether the audit is in it; the first is None if its package is not here."""
    loggers = importlib.import_module(f"{pl.__name__}.loggers")
    if kind == "none":
        return False, lambda: True
    if kind == "TensorBoard":
        return loggers.TensorBoardLogger(
            directory
        ), lambda: b"influence/self_influence" in everything(directory, "events*")
    if kind == "CSV":
        return loggers.CSVLogger(directory), lambda: b"influence/" in everything(directory, "metrics.csv")
    if kind == "W&B":
        if not find_spec("wandb"):
            return None, bool
        os.environ |= {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_DIR": str(directory)}
        return loggers.WandbLogger(save_dir=directory, offline=True), lambda: written(directory, "*.wandb")
    if not find_spec("mlflow"):
        return None, bool
    mlflow = loggers.MLFlowLogger(tracking_uri=(directory / "mlruns").as_uri())
    return mlflow, lambda: any("influence" in str(path) for path in (directory / "mlruns").rglob("metrics/*"))


def everything(directory: Path, pattern: str) -> bytes:
    """Return what all files of a name hold."""
    return b"".join(path.read_bytes() for path in directory.rglob(pattern) if path.is_file())


def written(directory: Path, pattern: str) -> bool:
    """Tell whether files of a name hold something of the audit, some seconds from now at the latest.

    W&B's service goes on writing after ``finish`` has returned: of 20 offline runs of nothing but a number and a
    picture, without Lightning and without us, 2 had an incomplete file then, and a whole one half a second later.
    """
    deadline = time.monotonic() + PATIENCE
    while b"influence" not in everything(directory, pattern):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def run(pl: Any, data: str, optimization: str, logger: str, audited: bool) -> dict[str, Any]:
    """Train once; return the weights and what became of the audit."""
    manual = optimization != "automatic"
    options: dict[str, Any] = {"sample_id": "key"} if "sample_id" in data else {}
    if "loader=" in data:
        options["loader"] = "classes"
    if "task" in optimization:
        options["task"] = lambda module, batch: module.loss(batch)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if data == "Hugging Face" and not find_spec("datasets"):
            return {"outcome": "not installed"}
        made, holds = logger_of(pl, logger, Path(folder))
        if made is None:
            return {"outcome": "not installed"}
        audit = InfluenceAudit(**options) if audited else None
        trainer = pl.Trainer(
            max_epochs=EPOCHS,
            accelerator="cpu",
            logger=made,
            callbacks=[audit] if audit else [],
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            default_root_dir=folder,
        )
        model = model_of(pl, manual)
        try:
            trainer.fit(model, data_of(pl, data))
            if made:
                made.finalize("success")
            if logger == "W&B":  # its file is whole then
                importlib.import_module("wandb").finish()
        except Exception as error:
            ours = type(error).__name__ == "MisconfigurationException" and "InfluenceAudit" in str(error)
            words = str(error) if ours else f"{type(error).__name__}: {error}"
            return {"outcome": "refused" if ours else "failed", "words": words}
        finally:
            if logger == "W&B":  # after a refusal: else the next logger would go on with this run
                importlib.import_module("wandb").finish()
        found: dict[str, Any] = {"weights": [parameter.tolist() for parameter in model.parameters()]}
        if audit is None:
            return found | {"outcome": "trained"}
        if not audit.has_report:
            return found | {"outcome": "silent"}
        report: AuditReport = audit.report
        order = np.argsort(report.columns["index"])
        return found | {
            "outcome": "right" if report.status == "complete" and len(order) == N else f"{report.status}, {len(order)}",
            "scores": report.columns["self_influence"][order].tolist(),
            "shown": holds(),
            "on disk": AuditReport.load(report.directory).status if report.directory else "nowhere",
        }


def judged(found: dict[str, Any], plain: dict[str, Any], reference: list[float]) -> dict[str, Any]:
    """Compare with the training alone, and with the scores of the plainest workflow."""
    outcome = found["outcome"]
    if outcome == "right":
        faults = []
        if found["weights"] != plain["weights"]:
            faults.append("training differs")
        if not np.allclose(found["scores"], reference, rtol=1e-4):
            faults.append("scores differ")
        if found["on disk"] != "complete":
            faults.append(f"on disk {found['on disk']}")
        if not found["shown"]:
            faults.append("nothing in the logger")
        outcome = "right" if not faults else "wrong: " + ", ".join(faults)
    return {"outcome": outcome, "words": found.get("words", "")}


def main() -> None:
    """Run all workflows of one package."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("package", choices=PACKAGES)
    package = parser.parse_args().package
    logging.disable(logging.WARNING)
    try:
        pl = importlib.import_module(package)
    except ImportError:
        print(json.dumps({"missing": package}))
        return
    names = ("lightning", "pytorch-lightning", "torch", "tensorboard", "wandb", "mlflow-skinny", "datasets")
    print(json.dumps({"versions": {name: _version(name) for name in names}}), flush=True)
    reference = run(pl, "DataLoader", "automatic", "none", True)["scores"]
    for data in DATA:
        for optimization in OPTIMIZATION:
            plain = run(pl, data, optimization, "none", False)
            for logger in LOGGERS:
                cell = {"data": data, "optimization": optimization, "logger": logger}
                found = judged(run(pl, data, optimization, logger, True), plain, reference)
                print(json.dumps(cell | found), flush=True)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
