"""`task="classification"` and its kin, and training that mixes examples."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, default_collate

from lightning_influence import InfluenceAudit
from lightning_influence.metrics import mislabel_detection
from lightning_influence.objective.scale import TaskError
from lightning_influence.objective.standard_task import StandardTask, suggested

N, C = 6, 4
X, Y = torch.randn(N, 3, generator=torch.Generator().manual_seed(0)), torch.arange(N) % C
BITS = Y % 2


class Model(nn.Module):
    """A linear model whose outputs are handed on by a function."""

    def __init__(self, outputs: int = C, after: Callable[[Tensor], Any] = lambda z: z) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.after = nn.Linear(3, outputs), after

    def forward(self, x: Tensor) -> Any:
        return self.after(self.net(x))


class ByName(Model):
    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> Any:  # type: ignore[override]
        return SimpleNamespace(loss=None, logits=self.net(pixel_values))


class Whole(Model):
    def forward(self, batch: Any) -> Any:
        return self.net(batch["x"])


class TwoInputs(Model):
    def forward(self, first: Tensor, second: Tensor) -> Any:  # type: ignore[override]
        return self.net(first + second)


def _z(model: Model) -> Tensor:
    return model.net(X)


SOFT = F.one_hot(Y, C) * 0.8 + 0.05


# Name, model, batch, its loss by hand.
def _plain(model: Model) -> Tensor:
    return F.cross_entropy(_z(model), Y)


FITTING: dict[str, tuple[str, Model, Any, Callable[[Model], Tensor]]] = {
    "a pair": ("classification", Model(), (X, Y), _plain),
    "a list with more": ("classification", Model(), [X, Y, torch.arange(N)], _plain),
    "two inputs": ("classification", TwoInputs(), (X, X, Y), lambda m: F.cross_entropy(m.net(2 * X), Y)),
    "a dict": ("classification", Model(), {"image": X, "label": Y}, _plain),
    "a dict as it is": ("classification", Whole(), {"x": X, "y": Y}, _plain),
    "by name, logits": (
        "classification",
        ByName(),
        {"pixel_values": X, "labels": Y, "path": ["a"] * N},
        _plain,
    ),
    "a tuple of outputs": (
        "classification",
        Model(after=lambda z: (z, z)),
        (X, Y),
        _plain,
    ),
    "labels of one column": ("classification", Model(), (X, Y[:, None]), _plain),
    "distributions": ("classification", Model(), (X, SOFT), lambda m: F.cross_entropy(_z(m), SOFT)),
    "log-probabilities": (
        "classification",
        Model(after=lambda z: z.log_softmax(1)),
        (X, Y),
        _plain,
    ),
    "probabilities": (
        "classification",
        Model(after=lambda z: z.softmax(1)),
        (X, Y),
        _plain,
    ),
    "tokens": (
        "classification",
        Model(),
        (X[:, None].expand(N, 5, 3), Y[:, None].expand(N, 5)),
        _plain,
    ),
    "pixels": (
        "classification",
        Model(after=lambda z: z[:, :, None, None].expand(N, C, 2, 3)),
        (X, Y[:, None, None].expand(N, 2, 3)),
        _plain,
    ),
    "one logit": (
        "classification",
        Model(1),
        (X, BITS.float()),
        lambda m: F.binary_cross_entropy_with_logits(_z(m).squeeze(1), BITS.float()),
    ),
    "one probability": (
        "classification",
        Model(1, lambda z: z.sigmoid().squeeze(1)),
        (X, BITS),
        lambda m: F.binary_cross_entropy_with_logits(_z(m).squeeze(1), BITS.float()),
    ),
    "many labels": (
        "binary",
        Model(),
        (X, F.one_hot(Y, C)),
        lambda m: F.binary_cross_entropy_with_logits(_z(m), F.one_hot(Y, C).float()),
    ),
    "numbers": ("regression", Model(1), (X, X[:, 0]), lambda m: F.mse_loss(_z(m).squeeze(1), X[:, 0])),
    "several numbers": ("regression", Model(3), (X, X), lambda m: F.mse_loss(_z(m), X)),
}


@pytest.mark.parametrize("name", FITTING)
def test_the_loss_and_the_line_that_computes_it(name: str) -> None:
    word, module, batch, expected = FITTING[name]
    task = StandardTask(word)  # type: ignore[arg-type]
    torch.testing.assert_close(task(module, batch), expected(module))
    line = task.written_out(module, batch)
    torch.testing.assert_close(eval(line, {"F": F, "module": module, "batch": batch}), expected(module))  # noqa: S307


UNFIT: dict[str, tuple[str, Model, Any, str]] = {
    "one tensor": ("classification", Model(), X, r"batch is a Tensor; expected \(inputs, labels\)"),
    "no labels": ("classification", Model(), {"image": X}, r"no labels among \['image'\]; expected one of labels"),
    "which inputs": ("classification", Model(), {"a": X, "b": X, "label": Y}, r"which of \['a', 'b'\] are the inputs"),
    "names": ("classification", Model(), (X, ["a"] * N), r"`batch\[1\]` is a list; expected a tensor of labels"),
    "numbers for classes": ("classification", Model(), (X, X[:, 0]), r'labels are torch.float32.*task="regression"'),
    "numbers for one logit": ("classification", Model(1), (X, X[:, 0]), r"one output for each; expected 0 and 1"),
    "another shape": ("classification", Model(), (X, Y[:, None].expand(N, 5)), r"outputs \(6, 4\) do not fit labels"),
    "too many numbers": ("regression", Model(2), (X, X[:, 0]), r"outputs \(6, 2\) do not fit labels \(6,\)"),
    "no outputs": ("classification", Model(after=lambda z: "z"), (X, Y), "returned a str; expected logits"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_what_does_not_fit_says_so(name: str) -> None:
    word, module, batch, message = UNFIT[name]
    with pytest.raises(TaskError, match=message):
        StandardTask(word)(module, batch)  # type: ignore[arg-type]
    assert suggested(module, batch) is None or word == "regression" or "numbers" in name


def test_a_model_of_the_next_token_is_not_taken_for_one_of_its_own() -> None:
    class Next(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Embedding(5, 5)

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.net(input_ids)  # type: ignore[no-any-return]

    ids = torch.arange(12).reshape(3, 4) % 5
    with pytest.raises(TaskError, match="tokens themselves, so the model is trained on the next ones"):
        StandardTask("classification")(Next(), {"input_ids": ids, "labels": ids})


def test_another_word() -> None:
    with pytest.raises(ValueError, match=r"task='segmentation'; expected one of \"classification\", \"binary\""):
        InfluenceAudit(task="segmentation")  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------------ mixing


def _images() -> tuple[TensorDataset, Tensor]:
    """Noisy prototypes, a tenth of the labels flipped, and which."""
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(300) % C
    x = torch.randn(C, 1, 8, 8, generator=g)[labels] + torch.randn(300, 1, 8, 8, generator=g)
    flipped = torch.randperm(300, generator=g)[:30]
    labels[flipped] = (labels[flipped] + 1) % C
    return TensorDataset(x, labels), flipped


def _lam() -> float:
    return float(torch.distributions.Beta(0.4, 0.4).sample())  # type: ignore[no-untyped-call]


class Images(L.LightningModule):
    """A small CNN without a step."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()
        )
        self.head = nn.Linear(64, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.net(x))  # type: ignore[no-any-return]

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 3e-3)


class TwoLosses(Images):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        lam, other = _lam(), torch.randperm(len(x))
        z = self(lam * x + (1 - lam) * x[other])
        return lam * F.cross_entropy(z, y) + (1 - lam) * F.cross_entropy(z, y[other])


class Mixed(Images):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, t = _mixed(*batch)
        return F.cross_entropy(self(x), t)


class MixedByHand(Images):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, t = _mixed(*batch)
        return torch.sum(-t * F.log_softmax(self(x), -1), -1).mean()


class Mixing(Images):
    """The batches come mixed."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])


def _mixed(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    lam, t = _lam(), F.one_hot(y, C).float()
    return lam * x + (1 - lam) * x.roll(1, 0), lam * t + (1 - lam) * t.roll(1, 0)


def _collate(examples: Any) -> Any:
    return _mixed(*default_collate(examples))


def _fit(model: Images, audit: InfluenceAudit, tmp_path: Path) -> None:
    L.seed_everything(0, verbose=False)
    collate = _collate if isinstance(model, Mixing) else None
    trainer = L.Trainer(
        max_epochs=10,
        default_root_dir=tmp_path,
        accelerator="cpu",
        callbacks=[audit],
        **dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False),  # type: ignore[arg-type]
    )
    trainer.fit(model, DataLoader(_images()[0], 32, shuffle=True, collate_fn=collate))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model", [TwoLosses, Mixed, MixedByHand, Mixing])
def test_mixing_is_refused_with_the_line_that_works(model: type[Images], tmp_path: Path) -> None:
    line = r"F\.cross_entropy\(module\(batch\[0\]\), batch\[1\]\)\)`, in short `task=\"classification\"`"
    with pytest.raises(MisconfigurationException, match=rf"InfluenceAudit\(task=lambda module, batch: {line}"):
        _fit(model(), InfluenceAudit(), tmp_path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model", [TwoLosses, Mixed, MixedByHand, Mixing])
def test_the_audit_of_a_run_that_mixes_finds_the_flips(model: type[Images], tmp_path: Path) -> None:
    """Dynamics of such a run are of two examples at once: kept, soft labels rank the flips at 0.5."""
    audit = InfluenceAudit(task="classification")
    _fit(model(), audit, tmp_path)
    report, flipped = audit.report, _images()[1]
    assert report is not None
    for column in ("suspicion", "wrong_probability"):
        scores = torch.as_tensor(report.columns[column])
        assert mislabel_detection(scores, torch.isin(torch.arange(300), flipped))["auroc"] > 0.95
    assert "aum" not in report.columns
    notes = str(report)
    assert "training mixes the labels of examples" in notes
    assert 'is `task="classification"`, F.cross_entropy(module(batch[0]), batch[1])' in " ".join(notes.split())
    assert ("passes make batches without _collate" in notes) == (model is Mixing)


class MixedLater(Mixed):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return (
            super().training_step(batch, batch_idx)
            if self.current_epoch > 1
            else F.cross_entropy(self(batch[0]), batch[1])
        )


@pytest.mark.filterwarnings("ignore")
def test_a_run_that_begins_to_mix_has_no_curves_either(tmp_path: Path) -> None:
    """They are differences of the dynamics' sums: those from before the first mixed batch went on by themselves."""
    audit = InfluenceAudit(task="classification")
    _fit(MixedLater(), audit, tmp_path)
    assert audit.report is not None
    assert "aum" not in audit.report.columns
    assert len(audit.report.curves) == 0
