"""What is trained in a cell of ``make detection``: a net with the audit, and five folds of it for cleanlab."""

from __future__ import annotations

import logging
import tempfile
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from detection_cells import RECIPE, Cell, network, optimizer
from detection_data import Noisy, noisy
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import AuditReport, InfluenceAudit

BATCH, FOLDS = RECIPE["batch"], RECIPE["folds"]


class Classifier(L.LightningModule):
    """A network of features and head, written as if there were no audit."""

    def __init__(self, cell: Cell, net: nn.Sequential) -> None:
        super().__init__()
        self.cell, self.net = cell, net

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(inputs)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return optimizer(self.cell, self.parameters())


class Recorder(L.Callback):
    """Keeps what labels can be judged by: features after every epoch, and what each epoch of training predicted.

    Features are those of the whole data in evaluation mode, before training and after epochs 1 to 8 and every third
    one from then on.

    Args:
        audit: Whose dynamics are read; it comes before this callback.
        inputs: Of the training examples.
    """

    def __init__(self, audit: InfluenceAudit, inputs: Tensor) -> None:
        self.audit, self.inputs = audit, inputs
        self.epochs: list[int] = []
        self.features: list[NDArray[Any]] = []
        self.predicted: list[NDArray[Any]] = []
        self.seen: list[NDArray[Any]] = []
        self._before: Tensor | float = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._snapshot(pl_module, 0)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        epoch = trainer.current_epoch + 1
        if epoch <= 8 or epoch % 3 == 0:
            self._snapshot(pl_module, epoch)
        dynamics = self.audit._recording.dynamics  # type: ignore[union-attr]
        dynamics.flush()
        total = dynamics.probabilities[:].clone()
        self.seen.append((total - self._before).numpy().astype(np.float16))
        self._before = total

    def _snapshot(self, module: Any, epoch: int) -> None:
        module.eval()
        with torch.no_grad():
            features = torch.cat([module.net[0](part) for part in self.inputs.split(512)])
            predicted = module.net[1](features).softmax(1)
        module.train()
        self.epochs.append(epoch)
        self.features.append(features.numpy().astype(np.float16))
        self.predicted.append(predicted.numpy().astype(np.float16))

    def save(self, path: Path, data: Noisy, report: AuditReport) -> None:
        """Write everything as one file of arrays."""
        recording: Any = self.audit._recording
        path.parent.mkdir(parents=True, exist_ok=True)
        seen = np.stack(self.seen)
        evidence, every = recording.labels.evidence.state_dict(), torch.arange(recording.size)
        np.savez(
            path,
            given=data.given,
            true=data.true,
            wrong=data.wrong,
            epochs=np.array(self.epochs),
            features=np.stack(self.features),
            eval_probabilities=np.stack(self.predicted),
            seen_probabilities=seen,
            seen_accuracy=(seen.argmax(2) == data.given).mean(1),
            mean_probabilities=recording.dynamics.mean_probabilities(every).numpy(),
            votes=recording.labels.neighbours.votes(data.classes, every).numpy(),
            **{f"evidence_{name}": np.asarray(values) for name, values in evidence.items()},
            **{f"column_{name}": values for name, values in report.columns.items()},
        )


def audited(cell: Cell, seed: int, record: Path | None = None) -> tuple[Noisy, AuditReport, TensorDataset]:
    """Train with the audit.

    Returns:
        The data, the audit, and the data set that was trained on.
    """
    data = noisy(cell, seed)
    train = TensorDataset(data.inputs, torch.from_numpy(data.given))
    L.seed_everything(seed, verbose=False)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrong = np.flatnonzero(data.wrong).tolist()
        audit = InfluenceAudit(known_noise=wrong or None, dirpath=folder)
        recorder = Recorder(audit, data.inputs)
        trainer = L.Trainer(
            max_epochs=cell.epochs,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[audit] if record is None else [audit, recorder],
        )
        net = network(cell.net, data.inputs.shape[1:], data.classes)
        trainer.fit(Classifier(cell, net), DataLoader(train, batch_size=BATCH, shuffle=True))
        report = audit.report
    if record is not None:
        recorder.save(record, data, report)
    return data, report, train


def out_of_sample(cell: Cell, seed: int) -> NDArray[np.float64]:
    """Train the net on four fifths of the data at a time, as the audited one was, and predict the fifth.

    Returns:
        Probabilities ``[n, classes]``.
    """
    from sklearn.model_selection import StratifiedKFold

    data = noisy(cell, seed)
    labels = torch.from_numpy(data.given)
    probabilities = np.zeros((len(labels), data.classes))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of classes with fewer members than folds
        folds = list(StratifiedKFold(FOLDS, shuffle=True, random_state=seed).split(labels, labels))
    for number, (rest, fifth) in enumerate(folds):
        torch.manual_seed(100 * seed + number)
        net = network(cell.net, data.inputs.shape[1:], data.classes)
        steps = optimizer(cell, net.parameters())
        for _ in range(cell.epochs):
            for rows in torch.from_numpy(rest)[torch.randperm(len(rest))].split(BATCH):
                steps.zero_grad()
                F.cross_entropy(net(data.inputs[rows]), labels[rows]).backward()
                steps.step()
        net.eval()
        with torch.no_grad():
            probabilities[fifth] = net(data.inputs[torch.from_numpy(fifth)]).double().softmax(1).numpy()
    return probabilities
