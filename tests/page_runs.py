"""Real trainings whose audits the page shows: of pictures, of texts and of table rows, each with some wrong labels.

As a program, ``page_runs.py KIND DIRECTORY``, a training waits for a line of its input at the end of each epoch, so
that somebody can look meanwhile.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from models import make_trainer
from sklearn.datasets import load_wine
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from which_lightning import Callback, TensorBoardLogger, pl

from lightning_influence import InfluenceAudit
from lightning_influence.audit.report import AuditReport
from lightning_influence.callbacks import showing

SIZE, WRONG, EPOCHS = 240, 16, 5

MOODS: Mapping[str, tuple[str, ...]] = {
    "praise": ("wonderful", "a joy", "warm and clever", "the best in years", "beautifully made"),
    "complaint": ("a waste of time", "dull", "painfully slow", "broken on arrival", "worse than the last one"),
    "question": ("is it worth it?", "does anyone know?", "who made this?", "can it be returned?", "why so short?"),
}
SUBJECTS = "the film", "this book", "the whole series", "her new record", "the second part", "their latest phone"
ENDS = "I saw it twice.", "My brother agrees.", "That is all.", "We had waited a year for it.", ""


def bars(n: int, seed: int) -> TensorDataset:
    """Pictures with a bright bar in one of four places, which is their class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 4, (n,), generator=generator)
    pixels = torch.rand(n, 1, 8, 8, generator=generator) / 2
    for label in range(4):
        pixels[labels == label, :, 2 * label : 2 * label + 2] += 1
    return TensorDataset(pixels, labels)


def sentences(n: int, seed: int) -> tuple[TensorDataset, list[str]]:
    """Return token ids of short reviews with their moods, and the words."""
    generator = torch.Generator().manual_seed(seed)
    words = sorted({word for part in (*MOODS.values(), SUBJECTS, ENDS) for text in part for word in text.split()})
    place = {word: number + 1 for number, word in enumerate(words)}

    def one_of(choices: tuple[str, ...]) -> str:
        return choices[int(torch.randint(len(choices), (1,), generator=generator))]

    labels = torch.randint(0, len(MOODS), (n,), generator=generator)
    tokens = torch.zeros(n, 20, dtype=torch.long)
    for row, mood in enumerate(labels.tolist()):
        text = f"{one_of(SUBJECTS)} {one_of(list(MOODS.values())[mood])} {one_of(ENDS)}"
        found = [place[word] for word in text.split()]
        tokens[row, : len(found)] = torch.tensor(found)
    return TensorDataset(tokens, labels), ["", *words]


def wines() -> TensorDataset:
    """Return 13 measurements of each of 178 wines, with the cultivar."""
    values, labels = load_wine(return_X_y=True)
    return TensorDataset(torch.tensor(values, dtype=torch.float32), torch.tensor(labels))


class Net(pl.LightningModule):
    """A body that classifies."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self.body(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 0.01)


class Mean(nn.Module):
    """The mean over the tokens."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(1)


def flipped(data: TensorDataset, classes: int) -> TensorDataset:
    """Return the data with some labels that are another class's."""
    given = data.tensors[1].clone()
    given[:: len(given) // WRONG] = (given[:: len(given) // WRONG] + 1) % classes
    return TensorDataset(data.tensors[0], given)


def pictures() -> tuple[nn.Module, TensorDataset, TensorDataset, dict[str, Any]]:
    body = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 4))
    return body, flipped(bars(SIZE, 0), 4), bars(60, 1), {}


def texts() -> tuple[nn.Module, TensorDataset, TensorDataset, dict[str, Any]]:
    (train, words), (validation, _) = sentences(SIZE, 0), sentences(60, 1)
    body = nn.Sequential(nn.Embedding(len(words), 16), Mean(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, len(MOODS)))

    def describe(example: Any) -> str:
        return " ".join(words[token] for token in example[0].tolist() if token)

    return body, flipped(train, len(MOODS)), validation, {"describe": describe}


def rows() -> tuple[nn.Module, TensorDataset, TensorDataset, dict[str, Any]]:
    names, data = load_wine().feature_names, wines()
    body = nn.Sequential(nn.BatchNorm1d(13), nn.Linear(13, 16), nn.ReLU(), nn.Linear(16, 3))

    def describe(example: Any) -> str:
        values = example[0].tolist()
        return ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in zip(names, values, strict=True))

    return body, flipped(data, 3), data, {"describe": describe, "ids": [f"bottle-{k:03}" for k in range(178)]}


Parts = tuple[nn.Module, TensorDataset, TensorDataset, dict[str, Any]]
KINDS: Mapping[str, Callable[[], Parts]] = {"pictures": pictures, "texts": texts, "rows": rows}


def train(
    kind: str, directory: Path, version: str, *callbacks: Any, data: Dataset[Any] | None = None
) -> tuple[AuditReport, Dataset[Any]]:
    """Train with an audit; return it, and what was trained on.

    Args:
        kind: Of ``KINDS``.
        directory: Of the event files.
        version: Of them.
        callbacks: Further ones.
        data: What to train on in place of the kind's own.
    """
    body, own, validation, named = KINDS[kind]()
    data = own if data is None else data
    audit = InfluenceAudit(queries="worst", verify=False, **named)
    logger = TensorBoardLogger(directory, name="", version=version)
    pl.seed_everything(0)
    for module in body.modules():
        getattr(module, "reset_parameters", lambda: None)()
    trainer = make_trainer(directory, max_epochs=EPOCHS, logger=logger, callbacks=[audit, *callbacks])
    trainer.fit(Net(body), DataLoader(data, 32, shuffle=True), DataLoader(validation, 32))
    assert audit.report is not None
    return audit.report, data


class Waiting(Callback):
    """Says which epoch has ended, and waits."""

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        print(f"epoch {trainer.current_epoch}", flush=True)
        sys.stdin.readline()


if __name__ == "__main__":
    showing.SHARE = float("inf")  # epochs this short would not be told of
    train(sys.argv[1], Path(sys.argv[2]), "run", Waiting())
