"""The audit of a real run: right numbers under the right indices, in memory, on disk and in the loggers."""

from __future__ import annotations

import copy
import csv
import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference as ref
import torch
import torch.nn.functional as F
from models import (
    CLASSES,
    FEATURES,
    Classifier,
    Named,
    Numbered,
    Validated,
    images,
    loader,
    make_trainer,
    vectors,
)
from sklearn.metrics import average_precision_score, roc_auc_score
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, SubsetRandomSampler, TensorDataset
from tracing import covered
from which_lightning import (
    PACKAGE,
    Callback,
    CSVLogger,
    EarlyStopping,
    MisconfigurationException,
    Strategy,
    TensorBoardLogger,
    pl,
)

from lightning_influence import AuditReport, InfluenceAudit, Queries, TracIn
from lightning_influence.audit.store.store import AuditStore
from lightning_influence.callbacks.bridge import check_strategy
from lightning_influence.callbacks.budget import RunBudget
from lightning_influence.callbacks.query_report import QueryReport
from lightning_influence.callbacks.reporting import Reporter
from lightning_influence.data.source import ExampleSource
from lightning_influence.gradients.passes import ExampleGradients
from lightning_influence.gradients.verify import inspect
from lightning_influence.scores.examples import score_examples
from lightning_influence.scores.plan import InfluencePlan

DOUBLE = vectors(dtype=torch.float64)
CHECKED_COLUMNS = ("times_seen", "loss_mean", "loss_variance", "aum", "el2n", "epochs_wrong", "forgetting", "label")


def fit(
    model: pl.LightningModule, audit: InfluenceAudit, directory: Path, *data: Any, **trainer: Any
) -> tuple[AuditReport, pl.Trainer]:
    callbacks = trainer.pop("callbacks", [audit])
    made = make_trainer(directory, callbacks=callbacks, **trainer)
    made.fit(model, *data)
    assert audit.has_report
    assert audit.report.status == "complete"
    return audit.report, made


def close(actual: Any, expected: Any, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(
        torch.as_tensor(np.asarray(actual)).double(),
        torch.as_tensor(np.asarray(expected)).double(),
        rtol=tolerance,
        atol=tolerance,
        equal_nan=True,
    )


# ----------------------------------------------------------------------------------------- training dynamics


class Diary(Classifier):
    """Notes every example's logits itself, the way a user would without the audit."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.double()
        self.logits: dict[int, list[Tensor]] = {}
        self.labels: dict[int, int] = {}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y, indices = batch
        logits = self(x)
        for row, index in enumerate(indices.tolist()):
            self.logits.setdefault(index, []).append(logits[row].detach().clone())
            self.labels[index] = int(y[row])
        return F.cross_entropy(logits, y)

    def columns(self, size: int) -> dict[str, list[Any]]:
        rows: list[dict[str, Any]] = []
        for index in range(size):
            logits = self.logits.get(index, [])
            label = self.labels.get(index, -1)
            if not logits:
                nothing = dict.fromkeys(CHECKED_COLUMNS, np.nan) | {"prob_margin": np.nan}
                rows.append(nothing | {"times_seen": 0, "label": -1, "mean": [np.nan] * CLASSES})
                continue
            losses, margins, distances, right = [], [], [], []
            mean = torch.zeros(CLASSES, dtype=torch.float64)
            for values in logits:
                probabilities = values.softmax(0)
                mean += probabilities / len(logits)
                losses.append(-float(probabilities[label].log()))
                margins.append(float(values[label] - max(v for k, v in enumerate(values) if k != label)))
                distances.append(float((probabilities - F.one_hot(torch.tensor(label), CLASSES)).norm()))
                right.append(int(values.argmax()) == label)
            rows.append(
                {
                    "times_seen": len(logits),
                    "loss_mean": float(np.mean(losses)),
                    "loss_variance": float(np.var(losses)),
                    "aum": float(np.mean(margins)),
                    "el2n": float(np.mean(distances)),
                    "epochs_wrong": right.count(False),
                    "forgetting": sum(before and not now for before, now in zip(right, right[1:], strict=False)),
                    "label": label,
                    "prob_margin": float(mean[label] - max(v for k, v in enumerate(mean) if k != label)),
                    "mean": mean.tolist(),
                }
            )
        return {name: [row[name] for row in rows] for name in rows[0]}


LOADERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "shuffled": ({"shuffle": True}, {"max_epochs": 5}),
    "in order": ({}, {}),
    "workers": ({"shuffle": True, "num_workers": 2}, {}),
    "persistent workers": ({"shuffle": True, "num_workers": 2, "persistent_workers": True}, {}),
    "many batches ahead": ({"shuffle": True, "num_workers": 2, "prefetch_factor": 4}, {"limit_train_batches": 3}),
    "incomplete batch dropped": ({"shuffle": True, "drop_last": True}, {"max_epochs": 3}),
    "own batches": ({"batch_sampler": [[7, 3], [21, 0, 1, 2], [9], list(range(10, 21))]}, {}),
    "accumulated": ({"shuffle": True}, {"accumulate_grad_batches": 3}),
    "validation within epochs": ({"shuffle": True}, {"val_check_interval": 2}),
    "max_steps": ({"shuffle": True}, {"max_steps": 7, "max_epochs": -1}),
}


@pytest.mark.parametrize(("arguments", "trainer"), LOADERS.values(), ids=LOADERS)
def test_dynamics_are_those_of_a_model_that_notes_them_itself(
    arguments: dict[str, Any], trainer: dict[str, Any], tmp_path: Path
) -> None:
    def lively(module: nn.Module) -> torch.optim.Optimizer:
        # Large steps: predictions change often, so there is something to forget.
        return torch.optim.SGD(module.parameters(), lr=2.0)

    columns: list[dict[str, Any]] = []
    audited = InfluenceAudit(curvature="identity")
    for audit in (None, audited):
        pl.seed_everything(11, verbose=False)
        model = Diary(optimizer=lively)
        made = make_trainer(tmp_path / str(len(columns)), callbacks=[audit] if audit else [], **trainer)
        made.fit(model, loader(Numbered(DOUBLE), **arguments))
        columns.append(dict(audit.report.columns) if audit else model.columns(22))  # type: ignore[union-attr]

    expected, actual = columns
    rows = actual["index"]
    if "limit_train_batches" in trainer or "batch_sampler" in arguments:
        assert rows.tolist() == [n for n in range(22) if expected["times_seen"][n]]
    else:
        assert rows.tolist() == list(range(22))
    for name in CHECKED_COLUMNS:
        if name == "label":
            seen = actual["times_seen"] > 0
            close(actual[name][seen], np.array(expected[name])[rows][seen])
        else:
            close(actual[name], np.array(expected[name])[rows], 1e-9)
    # Mean probabilities are kept in single precision.
    close(actual["prob_margin"], np.array(expected["prob_margin"])[rows], 1e-5)
    assert audited._recording is not None
    evidence = audited._recording.label_evidence(rows.tolist())
    told = audited._recording.labels.neighbours.votes(CLASSES, torch.from_numpy(rows)).numpy()
    if evidence is not None:
        told = np.where(evidence.late[:].sum(1, keepdim=True).numpy() > 0, evidence.late[:].numpy(), told)
    belief = np.nan_to_num(np.array(expected["mean"])[rows]) + told
    for own, shares, support, seen in zip(
        actual["label"], belief, actual["support"], actual["times_seen"] > 0, strict=True
    ):
        other = max(share for number, share in enumerate(shares) if number != own)
        assert support == pytest.approx(shares[own] - other, abs=1e-5) if seen else np.isnan(support)
    assert (actual["suggested"] != actual["label"]).all()
    if trainer.get("max_epochs") == 5:
        assert sum(expected["forgetting"]) > 0


def test_examples_that_no_batch_had_so_far_are_audited_all_the_same(tmp_path: Path) -> None:
    """A shuffled epoch drops its last batch: two examples have not had their turn by chance."""
    report, _ = fit(
        Classifier(), InfluenceAudit(), tmp_path, loader(vectors(), shuffle=True, drop_last=True), max_epochs=1
    )
    never = report.columns["times_seen"] == 0
    assert never.sum() == 2
    assert report.columns["label"].tolist() == vectors().tensors[1].tolist()
    assert np.isfinite(report.columns["self_influence"]).all()
    assert np.isnan(report.columns["loss_mean"][never]).all()
    assert (report.columns["suspicion"][never] == 0).all(), "the mean, not an extreme"
    assert np.isfinite(report.columns["suspicion"]).all()


# ---------------------------------------------------------------------------------------------------- TracIn


class Traveller(Classifier):
    """Keeps its weights of every epoch's end and the learning rates of every step."""

    def __init__(self, optimizer: Callable[[nn.Module], Any]) -> None:
        super().__init__(optimizer)
        self.double()
        self.rates: list[dict[str, float]] = [{}]
        self.weights: list[nn.Module] = []

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        names = {id(parameter): name for name, parameter in self.net.named_parameters()}
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                rate = group["lr"] / (1 - group.get("momentum", 0))
                self.rates[-1][names[id(parameter)]] = self.rates[-1].get(names[id(parameter)], 0.0) + rate

    def on_train_epoch_end(self) -> None:
        self.weights.append(copy.deepcopy(self.net))
        self.rates.append({})

    def tracin(self, data: TensorDataset, ends: list[int] | None = None) -> Tensor:
        """TracIn of the checkpoints at the given epochs' ends; by default at all of them."""
        rates = [rate for rate in self.rates if rate]
        ends = list(range(len(rates))) if ends is None else ends
        gradients, etas, start = [], [], 0
        for end in ends:
            names = rates[0]
            etas.append({name: sum(rate[name] for rate in rates[start : end + 1]) for name in names})
            network = self.weights[end] if end < len(self.weights) else self.net
            gradients.append(ref.per_example_gradients(network, F.cross_entropy, *data.tensors))
            start = end + 1
        return ref.tracin_self(gradients, etas)


def scheduled(module: nn.Module) -> Any:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.3)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def two_groups(module: Any) -> Any:
    biases = [parameter for name, parameter in module.named_parameters() if "bias" in name]
    weights = [parameter for name, parameter in module.named_parameters() if "weight" in name]
    return torch.optim.SGD([{"params": weights, "lr": 0.2}, {"params": biases, "lr": 0.7}], lr=0.1, momentum=0.5)


def last_layer_slow(module: Any) -> Any:
    return torch.optim.SGD([{"params": module.net[1].parameters()}, {"params": module.net[3].parameters(), "lr": 0.01}],
                           lr=0.5)  # fmt: skip


class StopAt(Callback):
    """Asks for the end of training as early stopping does, at the end of an epoch."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.should_stop = trainer.should_stop or trainer.current_epoch == self.epoch


@pytest.mark.parametrize("optimizer", [scheduled, two_groups, last_layer_slow])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_tracin_is_the_sum_over_epoch_ends(optimizer: Any, accumulate: int, tmp_path: Path) -> None:
    model = Traveller(optimizer)
    audit = InfluenceAudit(curvature="identity")
    report, trainer = fit(
        model, audit, tmp_path, loader(DOUBLE, shuffle=True), max_epochs=3, accumulate_grad_batches=accumulate
    )
    assert len(model.weights) == 3
    close(report.columns["tracin"], model.tracin(DOUBLE))
    steps = -(-5 // accumulate)
    assert report.manifest["tracin_steps"] == [steps, 2 * steps, 3 * steps]
    assert trainer.global_step == 3 * steps


@pytest.mark.parametrize(
    ("every", "epochs", "ends"), [(2, 5, [1, 3, 4]), (2, 4, [1, 3]), (3, 2, [1]), (1, 1, [0]), (4, 4, [3])]
)
def test_tracin_every_n_epochs(every: int, epochs: int, ends: list[int], tmp_path: Path) -> None:
    """Steps between checkpoints count towards the next one; the last weights are always a checkpoint."""
    model = Traveller(scheduled)
    audit = InfluenceAudit(curvature="identity", tracin=TracIn(every_n_epochs=every))
    report, _ = fit(model, audit, tmp_path, loader(DOUBLE), max_epochs=epochs)
    close(report.columns["tracin"], model.tracin(DOUBLE, ends))
    assert report.manifest["tracin_steps"] == [5 * (end + 1) for end in ends]


ENDINGS: dict[str, tuple[dict[str, Any], Callable[[InfluenceAudit], list[Callback]]]] = {
    "max_epochs": ({"max_epochs": 3}, lambda audit: [audit]),
    "max_steps at an epoch's end": ({"max_epochs": -1, "max_steps": 15}, lambda audit: [audit]),
    "max_steps within an epoch": ({"max_epochs": -1, "max_steps": 13}, lambda audit: [audit]),
    "stopped by a callback before": ({"max_epochs": 9}, lambda audit: [StopAt(2), audit]),
    "stopped by a callback after": ({"max_epochs": 9}, lambda audit: [audit, StopAt(2)]),
    "early stopping": (
        {"max_epochs": 9},
        lambda audit: [audit, EarlyStopping("val_loss", patience=1, min_delta=1e9)],
    ),
}


@pytest.mark.parametrize(("trainer", "callbacks"), ENDINGS.values(), ids=ENDINGS)
def test_the_last_weights_count_once_however_training_ends(
    trainer: dict[str, Any], callbacks: Any, tmp_path: Path
) -> None:
    class Judged(Traveller, Validated):
        pass

    model = Judged(scheduled)
    audit = InfluenceAudit(curvature="identity", tracin="epoch")
    report, made = fit(model, audit, tmp_path, loader(DOUBLE), loader(DOUBLE), callbacks=callbacks(audit), **trainer)
    expected = model.tracin(DOUBLE)
    close(report.columns["tracin"], expected)
    assert report.manifest["tracin_steps"][-1] == made.global_step
    assert len(report.manifest["tracin_steps"]) == len([rate for rate in model.rates if rate])


def test_without_tracin_there_is_no_such_column(tmp_path: Path) -> None:
    audit = InfluenceAudit(tracin=None)
    report, _ = fit(Classifier(), audit, tmp_path, loader(vectors()))
    assert "tracin" not in report.columns
    assert report.manifest["tracin_steps"] == []


# ------------------------------------------------------------------------------- influence at the final weights


class Convolutional(Validated):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(32, CLASSES))


NETWORKS: dict[str, tuple[Callable[[], Classifier], Callable[[int, int], TensorDataset]]] = {
    "mlp": (Validated, lambda n, seed: vectors(n, seed, dtype=torch.float64)),
    "cnn": (
        Convolutional,
        lambda n, seed: TensorDataset(images(n, seed).tensors[0].double(), images(n, seed).tensors[1]),
    ),
}


def layer_statistics(
    net: nn.Module, name: str, data: TensorDataset, fisher: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``A``, ``B``, the gradients ``[k, m, o, i]`` that the curvature is the mean over, and the number of examples."""
    x, y = data.tensors
    module = net.get_submodule(name)
    if fisher == "empirical":
        inputs, outputs = ref.layer_inputs_and_output_gradients(net, name, F.cross_entropy, x, y)
        return (*ref.second_moments(inputs, outputs), layer_gradients(net, name, data), torch.tensor(len(x)))
    blocks, B = [], None
    for c in range(CLASSES):

        def own_loss(logits: Tensor, _: Tensor, c: int = c) -> Tensor:
            log_probability = logits.log_softmax(1)[0, c]
            return -log_probability * log_probability.detach().exp().sqrt()

        inputs, outputs = ref.layer_inputs_and_output_gradients(net, name, own_loss, x, y)
        A, part = ref.second_moments(inputs, outputs)
        B = part if B is None else B + part
        gradients = ref.per_example_gradients(net, own_loss, x, y)
        blocks.append(ref.gradient_matrix(module, gradients[f"{name}.weight"], gradients[f"{name}.bias"]))
    assert B is not None
    return A, B, torch.cat(blocks, 1), torch.tensor(len(x))


def layer_gradients(net: nn.Module, name: str, data: TensorDataset) -> Tensor:
    gradients = ref.per_example_gradients(net, F.cross_entropy, *data.tensors)
    return ref.gradient_matrix(net.get_submodule(name), gradients[f"{name}.weight"], gradients[f"{name}.bias"])


@pytest.mark.parametrize(
    ("curvature", "fisher", "damping"),
    [
        ("identity", "auto", "relative"),
        ("diagonal", "exact", "relative"),
        ("diagonal", "empirical", 0.01),
        ("kfac", "empirical", "relative"),
        ("kfac", "exact", 0.003),
        ("ekfac", "exact", "relative"),
        ("ekfac", "empirical", 0.02),
    ],
)
@pytest.mark.parametrize("network", NETWORKS)
def test_final_scores_equal_the_dense_reference(
    network: str, curvature: Any, fisher: Any, damping: Any, tmp_path: Path
) -> None:
    make_model, make_data = NETWORKS[network]
    train, validation = make_data(16, 1), make_data(7, 2)
    model = make_model().double()
    audit = InfluenceAudit(curvature=curvature, fisher=fisher, damping=damping, factor_examples=None, tracin=None)
    report, _ = fit(model, audit, tmp_path, loader(train, shuffle=True), loader(validation, batch_size=3))

    scores, harm = torch.zeros(16, dtype=torch.float64), torch.zeros(16, dtype=torch.float64)
    norms = torch.zeros(16, dtype=torch.float64)
    layers = [name for name, module in model.net.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    for name in layers:
        gradients = layer_gradients(model.net, name, train)
        query = layer_gradients(model.net, name, validation).mean(1, keepdim=True)
        A, B, labelled, count = layer_statistics(model.net, name, train, fisher)
        size = gradients[0, 0].numel()
        if curvature == "identity":
            C = torch.eye(size, dtype=torch.float64)[None]
            absolute = 0.0
        else:
            if curvature == "diagonal":
                C = torch.diag((labelled[0].flatten(1) ** 2).sum(0) / count)[None]
            elif curvature == "kfac":
                C = ref.kfac_dense(A, B)
            else:
                Q_A, Q_B = ref.eigenbasis(A, B)
                eigenvalues = ref.ekfac_eigenvalues(labelled, Q_A, Q_B) * labelled.shape[1] / count
                C = ref.ekfac_dense(Q_A, Q_B, eigenvalues)
            absolute = 0.1 * float(C[0].diagonal().mean()) if damping == "relative" else damping
            assert report.manifest["curvature"]["damping"][f"net.{name}"] == pytest.approx(absolute, rel=1e-6)
        scores += ref.quadratic_forms(C, gradients, absolute)
        harm -= ref.bilinear_forms(C, query, gradients, absolute)[0]
        norms += (gradients**2).sum((0, 2, 3))
    close(report.columns["grad_norm_squared"], norms)
    close(report.columns["self_influence"] / scores.numpy(), np.ones(16), 1e-6)
    scale = float(harm.abs().max())
    close(report.columns["harm"] / scale, harm / scale, 1e-6)
    close(report.columns["loss"], F.cross_entropy(model(train.tensors[0]), train.tensors[1], reduction="none").detach())
    assert report.columns["predicted"].tolist() == model(train.tensors[0]).argmax(1).tolist()
    assert report.columns["label"].tolist() == train.tensors[1].tolist()


def standing_still(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.0)


@pytest.mark.parametrize("augment", [False, True])
def test_final_scores_do_not_depend_on_the_loader(augment: bool, tmp_path: Path) -> None:
    """With a learning rate of 0 every run ends with the same weights, whatever its batches were."""
    results = []
    for number, arguments in enumerate(
        [{"batch_size": 22}, {"batch_size": 4, "shuffle": True}, {"batch_size": 3, "num_workers": 2, "shuffle": True}]
    ):
        torch.manual_seed(0)
        model = Validated(standing_still, loss=lambda logits, batch: F.cross_entropy(logits, batch[1])).double()
        torch.manual_seed(number)
        data = Numbered(DOUBLE, augment=augment)
        validation = loader(Numbered(vectors(9, 2, dtype=torch.float64), augment=augment), batch_size=2 + number)
        audit = InfluenceAudit(factor_examples=15)
        # Class labels only look at the audit's own passes here: the real ones see other augmentations.
        report, _ = fit(model, audit, tmp_path / str(number), loader(data, **arguments), validation, max_epochs=1)
        results.append({name: report.columns[name] for name in ("self_influence", "harm", "grad_norm_squared", "loss")})
    for other in results[1:]:
        for name, values in results[0].items():
            close(other[name], values, 1e-8)
    assert np.ptp(results[0]["self_influence"]) > 0


def test_dropout_and_batch_norm_are_in_eval_mode(tmp_path: Path) -> None:
    class Regularised(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(
                nn.Linear(FEATURES, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, CLASSES)
            )
            self.double()

    model = Regularised()
    audit = InfluenceAudit(curvature="identity")
    report, _ = fit(model, audit, tmp_path, loader(DOUBLE))
    model.eval()
    expected = ref.per_example_gradients(model.net, F.cross_entropy, *DOUBLE.tensors)
    close(report.columns["grad_norm_squared"], sum((g**2).flatten(1).sum(1) for g in expected.values()))
    assert report.manifest["coverage"]["share"] == 1.0
    assert report.manifest["coverage"]["covered"]["net.1"] == ["net.1.weight", "net.1.bias"]


def test_several_validation_loaders_are_one_set(tmp_path: Path) -> None:
    class Several(Validated):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            super().validation_step(batch, batch_idx)

    halves = [vectors(4, 2, dtype=torch.float64), vectors(9, 3, dtype=torch.float64)]
    whole = TensorDataset(*(torch.cat(parts) for parts in zip(*(half.tensors for half in halves), strict=True)))
    columns = []
    for validation in ([loader(half) for half in halves], loader(whole)):
        torch.manual_seed(0)
        audit = InfluenceAudit()
        report, _ = fit(Several().double(), audit, tmp_path, loader(DOUBLE), validation)
        columns.append(report.columns["harm"])
    close(columns[0], columns[1])


def test_limited_validation_counts_only_what_is_validated(tmp_path: Path) -> None:
    columns = []
    for validation, limit in ((vectors(12, 2), 2), (Subset(vectors(12, 2), range(8)), 1.0)):
        torch.manual_seed(0)
        report, _ = fit(
            Validated(), InfluenceAudit(), tmp_path, loader(vectors()), loader(validation, 4), limit_val_batches=limit
        )
        columns.append(report.columns["harm"])
    close(columns[0], columns[1])


def test_validation_data_that_cannot_be_queried_are_named(tmp_path: Path) -> None:
    class OnlyBatches:
        def __iter__(self) -> Any:
            return iter(loader(vectors()))

        def __len__(self) -> int:
            return 2

    with pytest.warns(UserWarning, match="validation data are left out.*come from a"):
        report, _ = fit(Validated(), InfluenceAudit(), tmp_path, loader(vectors()), OnlyBatches())
    assert "harm" not in report.columns


def test_validation_batches_of_another_kind_are_a_note(tmp_path: Path) -> None:
    class Different(Classifier):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("spread", batch["x"].std())

    other = [{"x": torch.randn(FEATURES)} for _ in range(6)]
    report, _ = fit(Different(), InfluenceAudit(), tmp_path, loader(vectors()), loader(other))  # type: ignore[arg-type]
    assert "harm" not in report.columns
    assert any("no harm column" in note and "KeyError" in note for note in report.manifest["notes"])


# -------------------------------------------------------------------------------------------- files on disk


@pytest.mark.usefixtures("sure")
def test_everything_is_on_disk_and_comes_back(tmp_path: Path) -> None:
    data = Named(vectors(), ["ant", "bee", "cat"])
    flipped = [1, 5, 8]
    audit = InfluenceAudit(known_noise=flipped, factor_examples=9)
    report, trainer = fit(Validated(), audit, tmp_path, loader(data, shuffle=True), loader(vectors(6, 2)))

    directory = Path(trainer.log_dir) / "influence"
    assert report.directory == directory
    assert {path.name for path in directory.iterdir()} == {
        "manifest.json", "scores.parquet", "candidates.csv", "columns.md", "factors", "checkpoints", "curves",
        "audit.json",
    }  # fmt: skip
    manifest = json.loads((directory / "manifest.json").read_text())
    assert {
        "schema_version", "status", "created", "arguments", "versions", "examples", "nonfinite", "ranked_by",
        "coverage", "curvature", "verification_error", "tracin_steps", "seconds", "notes", "detection",
    } <= set(manifest)  # fmt: skip
    assert manifest["status"] == "complete"
    assert manifest["examples"] == 22
    assert manifest["nonfinite"] == []
    assert manifest["arguments"] == {
        "curvature": "ekfac", "fisher": "auto", "damping": "auto", "solver": "auto", "factor_examples": 9,
        "tracin": {
            "mode": "auto", "every_n_epochs": 1, "every_n_steps": 1, "layers": None, "overhead": 0.1,
            "keep_checkpoints": 10, "keep_bytes": 2**30,
        },
        "layers": None, "uncovered": "report", "queries": None, "task": None, "weights": "last", "verify": True,
    }  # fmt: skip
    assert set(manifest["versions"]) == {
        "python",
        "lightning-influence",
        PACKAGE.partition(".")[0].replace("_", "-"),
        "torch",
    }
    assert manifest["coverage"]["share"] == 1.0
    assert manifest["coverage"]["covered"] == {name: [f"{name}.weight", f"{name}.bias"] for name in ("net.1", "net.3")}
    assert manifest["curvature"]["labels"] == ["sampled", "sampled"]
    assert manifest["curvature"]["examples"] == [9, 9]
    assert 0 <= manifest["verification_error"] < 1e-4
    assert manifest["ranked_by"] == ["support"]

    loaded = AuditReport.load(directory)
    assert set(loaded.columns) == set(report.columns) == {
        "index", "label", "predicted", "suggested", "rank", "candidate", "finite", "times_seen", "suspicion",
        "loss_mean", "loss_variance", "aum", "el2n", "epochs_wrong", "forgetting", "prob_margin", "support",
        "wrong_probability", "neighbour_disagreement", "loss", "grad_norm_squared", "self_influence", "tracin", "harm",
        "nearest", "nearest_cosine", "near_duplicate",
    }  # fmt: skip
    for name, values in report.columns.items():
        assert loaded.columns[name].dtype == values.dtype, name
        np.testing.assert_array_equal(loaded.columns[name], values, err_msg=name)
    assert loaded.ranking.tolist() == report.ranking.tolist()
    assert loaded.candidates.tolist() == report.candidates.tolist()
    assert str(loaded) == str(report)

    with open(directory / "candidates.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["index"]) for row in rows] == report.candidates.tolist()
    names = {"0": "ant", "1": "bee", "2": "cat"}
    assert rows
    for row in rows:
        for column in ("label", "suggested", "predicted"):
            assert row[f"{column}_name"] == names[row[column]]
        assert row["label"] != row["suggested"]

    store = AuditStore.open(directory)
    assert list(store.factors()) == ["net.1", "net.3"]
    tensors, metadata = store.factors()["net.1"]
    assert metadata["kind"] == "ekfac"
    assert json.loads(metadata["dampings"]) == {"net.1": manifest["curvature"]["damping"]["net.1"]}
    assert tensors["eigenvalues"].shape == (1, 6, FEATURES + 1)


def test_the_factors_on_disk_give_the_scores(tmp_path: Path) -> None:
    model = Classifier().double()
    report, _ = fit(model, InfluenceAudit(factor_examples=None), tmp_path, loader(DOUBLE))
    assert report.directory is not None
    store = AuditStore.open(report.directory)
    total = torch.zeros(22, dtype=torch.float64)
    for name in ("1", "3"):
        tensors, metadata = store.factors()[f"net.{name}"]
        bases = tensors["activation_basis"].double(), tensors["gradient_basis"].double()
        C = ref.ekfac_dense(*bases, tensors["eigenvalues"].double())
        (damping,) = json.loads(metadata["dampings"]).values()
        total += ref.quadratic_forms(C, layer_gradients(model.net, name, DOUBLE), damping)
    close(report.columns["self_influence"] / total.numpy(), np.ones(22))


def test_a_used_directory_is_left_alone(tmp_path: Path) -> None:
    first, _ = fit(Classifier(), InfluenceAudit(dirpath=tmp_path / "audit"), tmp_path, loader(vectors()))
    before = {path: path.read_bytes() for path in (tmp_path / "audit").rglob("*") if path.is_file()}
    second, _ = fit(Classifier(), InfluenceAudit(dirpath=tmp_path / "audit"), tmp_path, loader(vectors()))
    third, _ = fit(Classifier(), InfluenceAudit(dirpath=str(tmp_path / "audit")), tmp_path, loader(vectors()))
    directories = [report.directory for report in (first, second, third)]
    assert directories == [tmp_path / "audit", tmp_path / "audit-v1", tmp_path / "audit-v2"]
    assert {path: path.read_bytes() for path in (tmp_path / "audit").rglob("*") if path.is_file()} == before


def test_a_second_fit_makes_a_second_audit(tmp_path: Path) -> None:
    audit, model, data = InfluenceAudit(), Classifier(), loader(vectors())
    report, trainer = fit(model, audit, tmp_path, data)
    trainer.fit_loop.max_epochs = 4
    trainer.fit(model, data)
    assert audit.has_report
    assert audit.report is not report
    assert audit.report.directory == Path(f"{report.directory}-v1")
    assert AuditReport.load(report.directory).status == AuditReport.load(audit.report.directory).status == "complete"


# ---------------------------------------------------------------------------------------------------- loggers


@pytest.mark.usefixtures("sure")
def test_tensorboard_has_the_documented_tags(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    audit = InfluenceAudit(known_noise=[0, 3, 4])
    model = Convolutional()
    report, trainer = fit(model, audit, tmp_path, loader(images()), loader(images(6, 2)), logger=logger, max_epochs=3)
    assert len(report.candidates) > 0
    events = EventAccumulator(
        logger.log_dir, size_guidance={"tensors": 0, "scalars": 0, "images": 0, "histograms": 0}
    ).Reload()
    tags = events.Tags()

    assert {
        "influence/tracin_epoch/log10", "influence/self_influence/ekfac/log10", "influence/tracin/log10",
        "influence/grad_norm_squared/log10", "influence/wrong_probability/log10",
    } == set(tags["histograms"])  # fmt: skip
    # The last epoch's checkpoint is part of the final pass.
    assert [event.step for event in events.Histograms("influence/tracin_epoch/log10")] == [5, 10]
    histogram = events.Histograms("influence/self_influence/ekfac/log10")[-1].histogram_value
    assert histogram.num == 22
    assert histogram.min == pytest.approx(np.log10(report.columns["self_influence"].min()), rel=1e-5)
    assert "influence/candidates" in tags["images"]
    assert "influence/candidates/text_summary" in tags["tensors"]
    (text,) = events.Tensors("influence/candidates/text_summary")
    table = text.tensor_proto.string_val[0].decode()
    assert f"{len(report.candidates)} candidates" in table
    assert f"| {report.candidates[0]} |" in table
    detected = set(report.manifest["detection"])
    assert {"suspicion", "self_influence", "aum", "harm", "tracin"} <= detected
    assert {f"influence/detection/{name}" for name in detected} <= set(tags["tensors"])
    scalars = set(tags["scalars"])
    # Of one point each, those alone that runs are compared by; the others are in two tables.
    final = {tag for tag in scalars if tag.startswith("influence/") and "/dynamics/" not in tag}
    assert final - {"influence/noise_rate"} == {
        "influence/coverage", "influence/candidate_count", "influence/detection/suspicion_auroc"
    }  # fmt: skip
    assert {"influence/dynamics/loss_mean", "influence/dynamics/aum"} <= scalars
    assert "influence/dynamics/contradicted_labels" in scalars
    texts = {
        name: events.Tensors(f"influence/{name}/text_summary")[0].tensor_proto.string_val[0].decode()
        for name in ("summary", "detection")
    }
    assert "| seconds, factors |" in texts["summary"]
    assert all(f"| {name.replace('_', '&#95;')} |" in texts["detection"] for name in detected)
    for tag in scalars:
        steps = [event.step for event in events.Scalars(tag)]
        assert len(steps) == len(set(steps)), f"{tag} is written twice at the steps {steps}"
    assert [event.step for event in events.Scalars("influence/dynamics/loss_mean")] == [5, 10, 15]
    (auroc,) = {event.value for event in events.Scalars("influence/detection/suspicion_auroc")}
    assert auroc == pytest.approx(report.manifest["detection"]["suspicion"]["auroc"], abs=1e-6)


@pytest.mark.usefixtures("sure")
def test_no_tag_has_two_kinds_of_data(tmp_path: Path) -> None:
    """TensorBoard serves one kind per tag and drops the others without a word: once, the first sheet of images."""
    logger = TensorBoardLogger(tmp_path)
    audit = InfluenceAudit(known_noise=[1, 2, 3])
    fit(Classifier(features=36), audit, tmp_path, loader(images()), logger=logger)
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    tags = events.Tags()
    kinds = [set(tags[kind]) for kind in ("scalars", "images", "histograms")]
    assert all(kinds)
    assert sum(map(len, kinds)) == len(set.union(*kinds))


def test_tensorboard_without_images_or_classes(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    data = TensorDataset(torch.randn(12, FEATURES), torch.randn(12, 1))
    model = Classifier(classes=1, loss=lambda outputs, batch: F.mse_loss(outputs, batch[1]))
    fit(model, InfluenceAudit(), tmp_path, loader(data), logger=logger)
    tags = EventAccumulator(logger.log_dir).Reload().Tags()
    assert tags["images"] == []
    assert "influence/candidates/text_summary" in tags["tensors"]


def test_other_loggers_get_the_scalars(tmp_path: Path) -> None:
    report, trainer = fit(Classifier(), InfluenceAudit(known_noise=[2, 9]), tmp_path, loader(vectors()))
    with open(Path(trainer.log_dir) / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    logged = {name: float(value) for row in rows for name, value in row.items() if value}
    assert logged["influence/coverage"] == 1.0
    assert logged["influence/candidate_count"] == len(report.candidates)
    assert logged["influence/detection/suspicion_auroc"] == report.manifest["detection"]["suspicion"]["auroc"]
    assert logged["influence/dynamics/loss_mean"] == pytest.approx(report.columns["loss_mean"].mean())
    assert not any(name.startswith("influence/seconds/") for name in logged)


def test_several_loggers_all_get_their_share(tmp_path: Path) -> None:
    loggers = [CSVLogger(tmp_path, name="csv"), TensorBoardLogger(tmp_path)]
    report, _ = fit(Classifier(), InfluenceAudit(), tmp_path, loader(vectors()), logger=loggers)
    assert report.directory == Path(loggers[0].log_dir) / "influence"
    assert "influence/coverage" in (Path(loggers[0].log_dir) / "metrics.csv").read_text()
    assert "influence/coverage" in EventAccumulator(loggers[1].log_dir).Reload().Tags()["scalars"]


def test_no_logger_is_one_warning_and_disk_only(tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report, _ = fit(Classifier(), InfluenceAudit(), tmp_path, loader(vectors()), logger=False, max_epochs=3)
    messages = [str(warning.message) for warning in caught if "no logger" in str(warning.message)]
    assert messages == [f"no logger: the influence audit goes to disk only, to {tmp_path / 'influence'}"]
    assert AuditReport.load(tmp_path / "influence").status == "complete"
    assert report.directory == tmp_path / "influence"


@pytest.mark.parametrize("batches", [1, 2, True])
def test_fast_dev_run_goes_through_and_writes_nothing(batches: int, tmp_path: Path) -> None:
    audit = InfluenceAudit(dirpath=tmp_path / "audit")
    trainer = make_trainer(tmp_path, callbacks=[audit], fast_dev_run=batches, logger=TensorBoardLogger(tmp_path))
    trainer.fit(Validated(), loader(vectors(), shuffle=True), loader(vectors(6, 2)))
    assert list(tmp_path.iterdir()) == []
    assert audit.has_report
    assert audit.report.directory is None
    assert len(audit.report) > 0


def test_barebones(tmp_path: Path) -> None:
    report, _ = fit(Classifier(), InfluenceAudit(), tmp_path, loader(vectors()), barebones=True)
    assert report.directory == tmp_path / "influence"


def test_known_noise_is_measured_as_scikit_learn_would(tmp_path: Path) -> None:
    """Flipped labels of an easy task are found."""
    generator = torch.Generator().manual_seed(0)
    clean = torch.arange(60) % CLASSES
    x = torch.randn(60, FEATURES, generator=generator) + 4 * F.one_hot(clean, FEATURES)
    flipped = torch.randperm(60, generator=generator)[:6]
    given = clean.clone()
    given[flipped] = (given[flipped] + 1) % CLASSES
    model = Classifier(lambda module: torch.optim.SGD(module.parameters(), lr=0.5, momentum=0.9))
    audit = InfluenceAudit(known_noise=flipped)
    report, _ = fit(model, audit, tmp_path, loader(TensorDataset(x, given), 10, shuffle=True), max_epochs=8)
    truth = np.isin(report.columns["index"], flipped.numpy())
    assert set(report.manifest["detection"]) <= set(report.columns)
    for name, values in report.manifest["detection"].items():
        scores = -report.columns[name] if name in ("aum", "prob_margin", "support") else report.columns[name]
        assert values["auroc"] == pytest.approx(roc_auc_score(truth, scores), abs=1e-6), name
        assert values["average_precision"] == pytest.approx(average_precision_score(truth, scores), abs=1e-6), name
    assert report.manifest["detection"]["suspicion"]["auroc"] > 0.9
    found = sorted(set(report.candidates.tolist()) & set(flipped.tolist()))
    assert len(found) >= 4
    rows = np.searchsorted(report.columns["index"], found)
    assert (report.columns["suggested"][rows] == clean[found].numpy()).mean() > 0.7


# ------------------------------------------------------------------------------------------ losses and tasks


def one_output(loss: Callable[[Tensor, Any], Tensor]) -> Classifier:
    return Classifier(classes=1, loss=loss).double()


def binary() -> TensorDataset:
    x, y = vectors(dtype=torch.float64).tensors
    return TensorDataset(x, (y > 0).double())


def real() -> TensorDataset:
    x = vectors(dtype=torch.float64).tensors[0]
    return TensorDataset(x, x[:, :1] - 0.5 * x[:, 1:2] ** 2)


def brier(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.softmax(1) - F.one_hot(labels, CLASSES)).square().sum(1).mean()


def brier_score(logits: Tensor, batch: Any) -> Tensor:
    return brier(logits, batch[1])


LOSSES: dict[str, tuple[Callable[[], Classifier], Callable[[], TensorDataset], Any]] = {
    "mse": (
        lambda: one_output(lambda outputs, batch: F.mse_loss(outputs, batch[1])),
        real,
        lambda outputs, target: ((outputs - target) ** 2).sum(),
    ),
    "mse module": (
        lambda: one_output(lambda outputs, batch: nn.MSELoss()(outputs, batch[1])),
        real,
        lambda outputs, target: ((outputs - target) ** 2).sum(),
    ),
    "bce": (
        lambda: one_output(lambda logits, batch: F.binary_cross_entropy_with_logits(logits.squeeze(1), batch[1])),
        binary,
        lambda logits, target: F.softplus(logits[0, 0]) - logits[0, 0] * target[0],
    ),
    "nll": (
        lambda: Classifier(loss=lambda logits, batch: F.nll_loss(logits.log_softmax(1), batch[1])).double(),
        lambda: DOUBLE,
        F.cross_entropy,
    ),
    "brier": (lambda: Classifier(loss=brier_score).double(), lambda: DOUBLE, brier),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("curvature", ["identity", "ekfac"])
def test_losses(name: str, curvature: Any, tmp_path: Path) -> None:
    make_model, make_data, own_loss = LOSSES[name]
    model, data = make_model(), make_data()
    report, _ = fit(model, InfluenceAudit(curvature=curvature, damping=0.5), tmp_path, loader(data, shuffle=True))
    gradients = ref.per_example_gradients(model.net, own_loss, *data.tensors)
    norms = sum((g**2).flatten(1).sum(1) for g in gradients.values())
    assert torch.is_tensor(norms)
    close(report.columns["grad_norm_squared"], norms)
    if curvature == "identity":
        close(report.columns["self_influence"], norms / 1.5)
    else:
        # A damped inverse of a positive curvature shrinks every direction, and no direction is free of it.
        assert (report.columns["self_influence"] < norms.numpy() / 0.5).all()
        assert (report.columns["self_influence"] > 0).all()

    classes = name in ("bce", "nll")
    assert (
        ("suggested" in report.columns) == ("label" in report.columns) == ("prob_margin" in report.columns) == classes
    )
    notes = " ".join(report.manifest["notes"])
    if name == "brier":
        assert "no known loss call" in notes
        assert "10 training batches had no known loss call" in notes
        assert report.manifest["curvature"]["labels"] in (
            ["true", "true"],
            ["true"],
            [],
            ("true", "true"),
            ("true",),
            (),
        )
        assert "loss_mean" not in report.columns
        assert report.manifest["ranked_by"] == ["tracin"]
    else:
        assert notes == ""
        own = [float(own_loss(model(x[None]), y[None])) for x, y in zip(*data.tensors, strict=True)]
        close(report.columns["loss"], own)
        assert np.isfinite(report.columns["loss_mean"]).all()
    if not classes:
        assert report.candidates.tolist() == []
        assert report.manifest["labels"]["verdict"] == "cannot tell"
        assert "no single class" in report.manifest["labels"]["reason"]


def test_a_task_of_the_users_own(tmp_path: Path) -> None:
    """The training step adds a penalty on the weights that belongs to no example; the task leaves it out."""

    class Penalised(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) + 0.1 * sum(p.square().sum() for p in self.parameters())

    def task(module: Penalised, batch: Any) -> Tensor:
        return F.cross_entropy(module(batch[0]), batch[1], reduction="none")

    model = Penalised().double()
    report, _ = fit(model, InfluenceAudit(curvature="identity", task=task), tmp_path, loader(DOUBLE))
    gradients = ref.per_example_gradients(model.net, F.cross_entropy, *DOUBLE.tensors)
    close(report.columns["self_influence"], sum((g**2).flatten(1).sum(1) for g in gradients.values()))
    assert report.manifest["arguments"]["task"] == "task"
    # The real training step calls cross-entropy too, so the dynamics are there.
    assert report.columns["times_seen"].tolist() == [2] * 22


def test_manual_optimization_with_a_task(tmp_path: Path) -> None:
    class Manual(Traveller):
        def __init__(self) -> None:
            super().__init__(scheduled)
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
            optimizer.step()
            self.lr_schedulers().step()

    model = Manual()
    audit = InfluenceAudit(curvature="identity", task=lambda module, batch: F.cross_entropy(module(batch[0]), batch[1]))
    report, _ = fit(model, audit, tmp_path, loader(DOUBLE, shuffle=True), max_epochs=3)
    close(report.columns["tracin"], model.tracin(DOUBLE))
    assert report.columns["times_seen"].tolist() == [3] * 22
    assert report.manifest["arguments"]["task"] == "<lambda>"


def test_a_training_step_that_returns_a_dict_or_takes_no_index(tmp_path: Path) -> None:
    class Returns(Classifier):
        def training_step(self, batch: Any) -> Any:  # type: ignore[override]
            return {"loss": F.cross_entropy(self(batch[0]), batch[1]), "more": 1}

    report, _ = fit(Returns(), InfluenceAudit(), tmp_path, loader(vectors()))
    assert report.columns["times_seen"].tolist() == [2] * 22


# ------------------------------------------------------------------------------------------ models and data


class Sequences(Classifier):
    """Tokens into an LSTM in packed rows, of which nothing tells in which order the examples are."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 4)
        self.lstm = nn.LSTM(4, 5, batch_first=True)
        self.net = nn.Sequential(nn.Linear(5, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(self.embedding(x), torch.full((len(x),), 4), batch_first=True)
        states, _ = nn.utils.rnn.pad_packed_sequence(self.lstm(packed)[0], batch_first=True)
        return self.net(states[:, -1])


def sequences() -> TensorDataset:
    return TensorDataset(torch.randint(9, (22, 4)), torch.randint(CLASSES, (22,)))


def test_what_is_not_understood_is_named_with_its_share(tmp_path: Path) -> None:
    data, model = sequences(), Sequences()
    with pytest.warns(
        UserWarning, match=r"covers 19\.7% of the trainable parameters.*lstm.weight_ih_l0 \(used by lstm"
    ):
        report, trainer = fit(model, InfluenceAudit(curvature="identity"), tmp_path, loader(data))
    coverage = report.manifest["coverage"]
    total = sum(parameter.numel() for parameter in model.parameters())
    assert coverage["share"] == pytest.approx((36 + 18) / total)
    assert set(coverage["uncovered"]) == {
        f"lstm.{kind}_{part}_l0" for kind in ("weight", "bias") for part in ("ih", "hh")
    }
    assert "used by lstm" in coverage["uncovered"]["lstm.weight_ih_l0"]
    assert f"{(36 + 18) / total:.1%} of {total:,} trainable parameters" in str(report)
    gradients = ref.per_example_gradients(model, F.cross_entropy, *data.tensors)
    understood = ("embedding.weight", "net.0.weight", "net.0.bias")
    norms = sum((gradients[name] ** 2).flatten(1).sum(1) for name in understood)
    close(report.columns["self_influence"], norms, 1e-4)


def test_what_is_not_understood_is_exact_on_request(tmp_path: Path) -> None:
    data, model = sequences(), Sequences().double()
    audit = InfluenceAudit(curvature="identity", uncovered="exact")
    report, _ = fit(model, audit, tmp_path, loader(data))
    assert report.manifest["coverage"]["share"] == 1.0
    assert report.manifest["arguments"]["uncovered"] == "exact"
    assert "one example at a time: lstm.bias_hh_l0" in str(report)
    gradients = ref.per_example_gradients(model, F.cross_entropy, *data.tensors)
    close(report.columns["self_influence"], sum((g**2).flatten(1).sum(1) for g in gradients.values()))


@pytest.mark.parametrize("dim", [1, 2], ids=["steps", "features"])
def test_what_a_model_selects_before_it_packs_is_no_order_of_the_batch(dim: int, tmp_path: Path) -> None:
    """Taken for one, four features were the order of two rows: an index out of bounds, in the name of the data."""

    class Selecting(Sequences):
        def forward(self, x: Tensor) -> Tensor:
            chosen = self.embedding(x).index_select(dim, torch.tensor([2, 0, 3, 1]))
            lengths = torch.full((len(x),), 4)
            _, (states, _) = self.lstm(nn.utils.rnn.pack_padded_sequence(chosen, lengths, batch_first=True))
            return self.net(states[0])

    with pytest.warns(UserWarning, match="Not covered: lstm.weight_ih_l0"):
        report, _ = fit(Selecting(), InfluenceAudit(curvature="identity"), tmp_path, loader(sequences()))
    assert "used by lstm" in report.manifest["coverage"]["uncovered"]["lstm.weight_ih_l0"]


@pytest.mark.parametrize("layers", ["net.3", ["net.3"], [nn.LayerNorm, "net.3.*"], "*.3"], ids=str)
def test_layers_by_name_and_type(layers: Any, tmp_path: Path) -> None:
    class Normed(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.net.append(nn.LayerNorm(CLASSES))
            self.double()

    model = Normed()
    report, _ = fit(model, InfluenceAudit(curvature="identity", layers=layers), tmp_path, loader(DOUBLE))
    with_norm = isinstance(layers, list) and len(layers) > 1
    chosen = ["net.3", "net.4"] if with_norm else ["net.3"]
    assert list(report.manifest["coverage"]["covered"]) == chosen
    assert report.manifest["coverage"]["uncovered"]["net.1.bias"] == "left out by `layers=`"
    listed = report.manifest["arguments"]["layers"]
    assert listed == (["LayerNorm", "net.3.*"] if with_norm else [layers] if isinstance(layers, str) else layers)
    gradients = ref.per_example_gradients(model.net, F.cross_entropy, *DOUBLE.tensors)
    kept = [g for name, g in gradients.items() if name.startswith(("3.", "4." if with_norm else "3."))]
    close(report.columns["self_influence"], sum((g**2).flatten(1).sum(1) for g in kept))


def test_layers_that_are_frozen_or_thawed_later(tmp_path: Path) -> None:
    class Thaws(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.double()
            self.net[1].requires_grad_(False)

        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 1:
                self.net[1].requires_grad_(True)

    model = Thaws()
    report, _ = fit(model, InfluenceAudit(curvature="identity"), tmp_path, loader(DOUBLE), max_epochs=3)
    gradients = ref.per_example_gradients(model.net, F.cross_entropy, *DOUBLE.tensors)
    close(report.columns["self_influence"], sum((g**2).flatten(1).sum(1) for g in gradients.values()))
    assert report.manifest["coverage"]["share"] == 1.0


def test_a_subset_sampler_audits_its_subset(tmp_path: Path) -> None:
    sampler = SubsetRandomSampler([3, 4, 8, 15, 16, 20])
    report, _ = fit(Classifier(), InfluenceAudit(), tmp_path, loader(vectors(), 4, sampler=sampler))
    assert report.columns["index"].tolist() == [3, 4, 8, 15, 16, 20]
    assert report.columns["times_seen"].tolist() == [2] * 6
    assert report.columns["label"].tolist() == vectors().tensors[1][[3, 4, 8, 15, 16, 20]].tolist()


def test_a_subset_is_numbered_by_its_own_positions(tmp_path: Path) -> None:
    """The index is the one into the data set that was trained on; class names are found below it."""
    data = Subset(Named(vectors(), ["ant", "bee", "cat"]), [3, 4, 8, 15, 16, 20])
    model = Classifier()
    report, trainer = fit(model, InfluenceAudit(curvature="identity"), tmp_path, loader(data, 4, shuffle=True))
    assert report.columns["index"].tolist() == list(range(6))
    x, y = (tensor[[3, 4, 8, 15, 16, 20]] for tensor in vectors().tensors)
    gradients = ref.per_example_gradients(model.net, F.cross_entropy, x, y)
    close(report.columns["self_influence"], sum((g**2).flatten(1).sum(1) for g in gradients.values()), 1e-4)
    header = (Path(trainer.log_dir) / "influence" / "candidates.csv").read_text().splitlines()[0]
    assert "suggested_name" in header


def test_too_few_class_names_do_not_cost_the_audit(tmp_path: Path) -> None:
    data = Named(vectors(), ["ant"])
    report, trainer = fit(Classifier(), InfluenceAudit(), tmp_path, loader(data))
    assert AuditReport.load(Path(trainer.log_dir) / "influence").candidates.tolist() == report.candidates.tolist()


def test_a_collate_function_and_nested_batches(tmp_path: Path) -> None:
    def collate(examples: list[Any]) -> dict[str, Any]:
        x, y = zip(*examples, strict=True)
        return {"inputs": {"x": torch.stack(x)}, "y": torch.stack(y)}

    class Nested(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self(batch["inputs"]["x"]), batch["y"])

        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return {**batch, "inputs": {"x": batch["inputs"]["x"] * 3}}

    model = Nested()
    report, _ = fit(model, InfluenceAudit(curvature="identity"), tmp_path, loader(vectors(), collate_fn=collate))
    x, y = vectors().tensors
    gradients = ref.per_example_gradients(model.net, F.cross_entropy, 3 * x, y)
    close(report.columns["self_influence"], sum((g**2).flatten(1).sum(1) for g in gradients.values()), 1e-4)


def test_the_wait_that_is_announced_counts_the_passes() -> None:
    """Ten seconds an example: 22 for the scores, 44 for the factors; the pairs of queries take no pass of their own."""
    net = Classifier().net
    source = ExampleSource(vectors(), batch_size=5)
    gradients = ExampleGradients(
        net,
        lambda module, batch: F.cross_entropy(module(batch[0]), batch[1]),
        source,
        covered(net, vectors().tensors[0]),
    )
    inspection = inspect(gradients, range(22))
    plan = InfluencePlan.make(gradients.coverage, inspection, 22)
    for queries in (None, QueryReport(Queries())):
        nobody: Any = None
        budget = RunBudget(nobody, nobody, inspection, nobody, Reporter(None, {}, None, queries))
        budget.passed(220.0, 22)
        assert "about 11 min" in budget.announced(plan, gradients.coverage, 22, 0)


@pytest.mark.parametrize("precision", ["64-true", "bf16-mixed", "bf16-true"])
def test_precisions(precision: Any, tmp_path: Path) -> None:
    model = Classifier()
    report, _ = fit(model, InfluenceAudit(curvature="identity"), tmp_path, loader(vectors()), precision=precision)
    gradients = ref.per_example_gradients(model.net, F.cross_entropy, *vectors().tensors)
    expected = sum((g**2).flatten(1).sum(1) for g in gradients.values())
    # Mixed precision: the audit's own passes run in the precision of the weights.
    close(report.columns["self_influence"], expected, {"64-true": 1e-6, "bf16-mixed": 1e-4}.get(precision, 0.2))
    assert np.isfinite(report.columns["loss_mean"]).all()


def test_one_example_per_batch_and_one_batch_per_epoch(tmp_path: Path) -> None:
    for size in (1, 100):
        report, _ = fit(Classifier(), InfluenceAudit(), tmp_path, DataLoader(vectors(7), batch_size=size))
        assert report.columns["times_seen"].tolist() == [2] * 7


def test_the_report_in_words(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger=PACKAGE):
        report, trainer = fit(Validated(), InfluenceAudit(), tmp_path, loader(vectors()), loader(vectors(6, 2)))
    text = str(report)
    # Nobody sees it as it comes: a few lines are enough, and enough to find all of it.
    lines = caplog.text.partition("Influence audit of 22 training examples (complete)")[2].splitlines()
    assert len(lines) <= 8
    assert text.splitlines()[-1] in lines
    assert "all of it: `print(report)`" in caplog.text
    announced = [line for line in caplog.messages if line.startswith("influence audit: ekfac on 2 layers")]
    assert len(announced) == 1
    assert "22 training examples, 6 validation examples; about" in announced[0]
    assert re.search(r"[\d.]+ kB of extra memory", announced[0])
    assert "Influence audit of 22 training examples (complete)" in text
    assert "100.0% of 57 trainable parameters in 2 layers" in text
    assert str(Path(trainer.log_dir) / "influence") in text


@pytest.mark.parametrize("reductions", [("mean", "mean"), ("none", "sum")])
def test_a_loss_that_is_only_logged_is_not_the_training_loss(reductions: tuple[str, str], tmp_path: Path) -> None:
    """A logged loss comes first in the step; the dynamics have to be those of the loss that is returned."""
    aside, returned = reductions

    def plain(logits: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(logits, batch[1], reduction=returned)

    def with_another(logits: Tensor, batch: Any) -> Tensor:
        F.mse_loss(logits, F.one_hot(batch[1], logits.shape[1]).to(logits), reduction=aside)
        return plain(logits, batch)

    found = []
    for name, loss in (("plain", plain), ("other", with_another)):
        torch.manual_seed(0)
        found.append(fit(Classifier(loss=loss), InfluenceAudit(), tmp_path / name, loader(vectors()))[0])
    for name in ("loss_mean", "aum", "el2n", "prob_margin"):
        np.testing.assert_array_equal(found[0].columns[name], found[1].columns[name])


class _Drawing(Dataset[tuple[Tensor, Tensor]]):
    """Draws its augmentation from generators of its own, as many augmentation libraries do."""

    def __init__(self) -> None:
        self.inputs, self.targets = vectors().tensors[:2]
        self.transforms = {"noise": [np.random.default_rng(3), torch.Generator().manual_seed(4)]}

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        ours, theirs = self.transforms["noise"]
        noise = float(ours.normal()) + torch.randn((), generator=theirs)
        return self.inputs[index] + 0.1 * noise, self.targets[index]


def test_generators_of_the_data_set_are_left_alone_and_belong_to_the_example(tmp_path: Path) -> None:
    weights, scores = [], []
    for callbacks, batch_size in (([], 5), ([InfluenceAudit()], 5)):
        torch.manual_seed(0)
        model = Classifier()
        make_trainer(tmp_path / str(len(weights)), callbacks=callbacks).fit(model, loader(_Drawing(), batch_size))
        weights.append([parameter.detach().clone() for parameter in model.parameters()])
    for plain, audited in zip(*weights, strict=True):
        assert torch.equal(plain, audited)
    for batch_size in (4, 11):
        torch.manual_seed(0)
        source = ExampleSource(_Drawing(), batch_size=batch_size)
        coverage = covered(model, vectors().tensors[0])
        gradients = ExampleGradients(model, lambda m, b: F.cross_entropy(m(b[0]), b[1]), source, coverage)
        scores.append(score_examples(gradients, range(22)).columns["grad_norm_squared"])
    # Kept in float64, but computed in float32; other noise would be a tenth of it.
    torch.testing.assert_close(*scores, rtol=1e-5, atol=0)


def test_a_batch_that_collation_drops_does_not_shift_the_others(tmp_path: Path) -> None:
    """Lightning announces no start of a batch that is None; it was drawn all the same."""

    def collate(examples: list[Any]) -> Any:
        numbers = [int(example[2]) for example in examples]
        return None if 7 in numbers else torch.utils.data.default_collate(examples)

    class Noting(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            losses = F.cross_entropy(self(batch[0]), batch[1], reduction="none")
            if self.training:  # not in a pass of the audit
                seen.update(zip(batch[2].tolist(), losses.tolist(), strict=True))
            return losses.mean()

        started = False

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.started = True

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.started = False

    seen: dict[int, float] = {}
    data = TensorDataset(*vectors().tensors[:2], torch.arange(22))
    audit = InfluenceAudit(verify=False, tracin=None)
    trainer = make_trainer(tmp_path, callbacks=[audit], max_epochs=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(Noting(), DataLoader(data, batch_size=5, collate_fn=collate))
    assert audit._recording is not None
    columns = audit._recording.dynamics.columns()
    assert set(columns["times_seen"].nonzero().squeeze(1).tolist()) == set(seen)
    for index, loss in seen.items():
        assert float(columns["loss_mean"][index]) == pytest.approx(loss, rel=1e-5)


def test_a_step_that_draws_random_numbers_is_noted(tmp_path: Path) -> None:
    class Denoising(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self(batch[0] + 0.5 * torch.randn_like(batch[0])), batch[1])

    report, _ = fit(Denoising(), InfluenceAudit(), tmp_path, loader(vectors()))
    assert any("draws random numbers" in note for note in report.manifest["notes"])


def test_repeated_indices_of_a_subset_sampler_count_once(tmp_path: Path) -> None:
    sampler = SubsetRandomSampler([3, 3, 5, 8, 13, 13])
    report, _ = fit(Classifier(), InfluenceAudit(), tmp_path, loader(vectors(), sampler=sampler))
    assert report.columns["index"].tolist() == [3, 5, 8, 13]


def test_strategies_that_split_the_model_are_refused(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, callbacks=[InfluenceAudit()])
    check_strategy(trainer)
    trainer.strategy.__class__ = type("FSDPStrategy", (Strategy,), {})
    with pytest.raises(MisconfigurationException, match="does not support FSDPStrategy.*afterwards on one device"):
        check_strategy(trainer)
