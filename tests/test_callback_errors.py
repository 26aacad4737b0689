"""Bad input gets a clear error before the first step; what goes wrong later costs neither training nor the records."""

from __future__ import annotations

import gc
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference as ref
import torch
import torch.nn.functional as F
from models import Classifier, Stream, Validated, leftovers, loader, make_trainer, vectors
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler, Subset, SubsetRandomSampler, TensorDataset
from which_lightning import (
    Callback,
    CombinedLoader,
    EarlyStopping,
    MisconfigurationException,
    StochasticWeightAveraging,
    pl,
)

from lightning_influence import AuditReport, InfluenceAudit
from lightning_influence.audit.store.store import AuditStore
from lightning_influence.callbacks import run as audit_run

FAILED = "the influence audit failed; training is not affected"


def check_clean(
    trainer: pl.Trainer, model: nn.Module, data: DataLoader[Any] | None = None, sampler: Any = None
) -> None:
    assert leftovers(trainer, model) == []
    assert all(parameter.requires_grad for parameter in model.parameters())
    if data is not None:
        assert data.batch_sampler is sampler


@pytest.fixture
def _no_workers_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Collected in the middle of a later test, the loader's workers can take 10 s to end: they are not waited for."""
    yield
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.1)
    gc.collect()


# -------------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"curvature": "kfak"}, r"curvature='kfak'; expected one of 'ekfac', 'kfac', 'diagonal', 'identity'"),
        ({"curvature": None}, r"curvature=None; expected one of 'ekfac'"),
        ({"fisher": "true"}, r"fisher='true'; expected one of 'auto', 'exact', 'sampled', 'empirical'"),
        ({"curvature": "hessian", "solver": "nystrom"}, r'solver="nystrom" needs a curvature without negative eig'),
        ({"damping": 0.0}, r"damping=0.0; expected a number > 0, \"relative\""),
        ({"damping": -1}, r"damping=-1; expected a number > 0"),
        ({"damping": float("nan")}, r"damping=nan; expected a number > 0"),
        ({"damping": float("inf")}, r"damping=inf; expected a number > 0"),
        ({"damping": "best"}, r"damping='best'; expected a number > 0, \"relative\""),
        ({"damping": True}, r"damping=True; expected a number > 0"),
        ({"factor_examples": 0}, r"factor_examples=0; expected an integer >= 1, or \"auto\", None for all examples"),
        ({"factor_examples": 2.5}, r"factor_examples=2.5; expected an integer >= 1"),
        ({"factor_examples": "all"}, r"factor_examples='all'; expected an integer >= 1, or \"auto\""),
        ({"tracin": "batch"}, r"""tracin='batch'; expected "auto" .*"epoch" .*, "step" \(in flight\), None, or """),
        ({"tracin": 1}, r"tracin=1; expected"),
        ({"tracin": True}, r"tracin=True; expected"),
        ({"task": "loss"}, r"task='loss'; expected one of .* or a function \(module, batch\) -> loss"),
        ({"task": 3}, r"task=3 is not callable; expected a function \(module, batch\) -> loss"),
        ({"known_noise": []}, r"known_noise=\[\] holds no indices; expected a list"),
        ({"known_noise": [0.5]}, r"known_noise: indices must be integers, got \[0.5\]"),
        ({"known_noise": [True, False]}, r"known_noise: indices must be integers.*np.flatnonzero"),
        ({"known_noise": {1, 2}}, r"known_noise: indices=\{1, 2\}: a set has no order"),
        ({"trusted": {1: 2}}, r"trusted: .*values of a mapping would be ignored"),
        ({"trusted": 300}, r"trusted=300 holds no indices; expected a list"),
        ({"trusted": "all"}, r"trusted: indices must be integers, got \['all'\]"),
        ({"known_noise": [[1, 2]]}, r"known_noise: indices must be integers, got \[\[1, 2\]\]"),
        ({"known_noise": [-1, 2]}, r"known_noise holds negative or repeated indices; expected distinct .* >= 0"),
        ({"known_noise": [2, 2]}, r"known_noise holds negative or repeated indices"),
    ],
)
def test_arguments_out_of_range(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InfluenceAudit(**arguments)


@pytest.mark.parametrize(
    "indices",
    [[3, 1], (3, 1), torch.tensor([3, 1]), np.array([3, 1]), np.array([3, 1], dtype=np.uint8), range(1, 4, 2)],
)
def test_known_noise_in_every_form(indices: Any) -> None:
    noise = InfluenceAudit(known_noise=indices).arguments.known_noise
    assert noise is not None
    assert sorted(noise.tolist()) == [1, 3]


def test_arguments_go_by_name() -> None:
    with pytest.raises(TypeError, match="positional"):
        InfluenceAudit("ekfac")  # type: ignore[misc]


# ------------------------------------------------------------------------- combinations, before the first step


class Stepless(Classifier):
    """Counts its steps: an error must come before the first."""

    steps = 0

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        type(self).steps += 1


class Manual(Stepless):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class Recurrent(Stepless):
    """Nothing but a recurrent layer is trained, on packed rows, of which nothing tells in which order they are."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.GRU(1, 3, batch_first=True))

    def forward(self, x: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x.unsqueeze(2), torch.full((len(x),), x.shape[1]), batch_first=True)
        last: Tensor = self.net(packed)[1][0]
        return last


class Frozen(Stepless):
    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(False)


class Lossless(Stepless):
    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        return None


class Detached(Stepless):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx).detach()


class Summed(Stepless):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.multi_margin_loss(self(batch[0]), batch[1], reduction="sum")


class Contrastive(Stepless):
    """Each example's loss depends on the others of its batch."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self(batch[0])
        return F.cross_entropy(logits - logits.mean(0), batch[1])


class Penalised(Stepless):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) + sum(p.square().sum() for p in self.parameters())


class Fetching(Stepless):
    def training_step(self, dataloader_iter: Any) -> Tensor:  # type: ignore[override]
        batch, _, _ = next(dataloader_iter)
        return F.cross_entropy(self(batch[0]), batch[1])


class Endless(Dataset[Any]):
    def __getitem__(self, index: int) -> Any:
        return vectors()[index]


class ByPair(Dataset[Any]):
    """Takes ``(index, size)`` pairs, as data sets with images of several sizes do."""

    def __len__(self) -> int:
        return 22

    def __getitem__(self, index: Any) -> Any:
        return vectors()[index[0] if isinstance(index, tuple) else index]


COMBINATIONS: dict[str, tuple[type[Stepless], Callable[[], Any], dict[str, Any], str]] = {
    "stream": (
        Stepless,
        lambda: DataLoader(Stream(), batch_size=4),
        {},
        "Stream is a stream.*`__getitem__` and `__len__`",
    ),
    "no length": (Stepless, lambda: DataLoader(Endless(), sampler=[0, 1, 2], batch_size=2), {}, "Endless is a stream"),
    "no batches": (Stepless, lambda: DataLoader(vectors(), batch_size=None), {}, "batch_size=None.*`batch_size=` or"),
    "list of batches": (
        Stepless,
        lambda: list(loader(vectors())),
        {},
        "come from a list of batches; expected a torch `DataLoader`",
    ),
    "two loaders": (
        Stepless,
        lambda: CombinedLoader({"a": loader(vectors()), "b": loader(vectors())}, "min_size"),
        {},
        "goes over 2 loaders at once \(a, b\).*loader=",
    ),
    "manual optimization": (
        Manual,
        lambda: loader(vectors()),
        {},
        r"can't re-run the `training_step` of Manual: with manual optimization.*InfluenceAudit\(task=...\)",
    ),
    "no supported layer": (
        Recurrent,
        lambda: loader(vectors()),
        {},
        'no trainable parameter whose.*Found: used by gru on rows picked by their values.*`?uncovered="exact"',
    ),
    "all frozen": (
        Frozen,
        lambda: loader(vectors()),
        {},
        r"no trainable parameter whose.*Found: no parameter requires a gradient\.$",
    ),
    "no such layer": (
        Stepless,
        lambda: loader(vectors()),
        {"layers": ["net.1", "net.7"]},
        r"`layers=` names \['net\.7'\], which match no supported layer; did you mean \['net",
    ),
    "no loss": (
        Lossless,
        lambda: loader(vectors()),
        {},
        "`training_step` returned NoneType instead of a loss.*`task=`",
    ),
    "detached loss": (Detached, lambda: loader(vectors()), {}, "the loss does not depend on any layer"),
    "sum of untapped losses": (Summed, lambda: loader(vectors()), {}, "not the mean of the losses.*`task=`"),
    "examples that depend on each other": (Contrastive, lambda: loader(vectors()), {}, "its loss depends on the other"),
    "penalty": (Penalised, lambda: loader(vectors()), {}, "do not add up.*net.1.*`task=`.*`verify=False`"),
    "fetches itself": (Fetching, lambda: loader(vectors()), {}, r"training_step\(dataloader_iter\).*`task=`"),
    "task without a loss": (
        Stepless,
        lambda: loader(vectors()),
        {"task": lambda module, batch: module(batch[0])},
        r"has the shape \(5, 3\); expected a scalar",
    ),
    "noise beyond the data": (
        Stepless,
        lambda: loader(vectors()),
        {"known_noise": [3, 22]},
        "known_noise holds the index 22; the data have 22 examples",
    ),
}


@pytest.mark.parametrize(("kind", "make_data", "arguments", "message"), COMBINATIONS.values(), ids=COMBINATIONS)
def test_combinations_that_cannot_work(
    kind: type[Stepless], make_data: Any, arguments: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model, data = kind(), make_data()
    sampler = getattr(data, "batch_sampler", None)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    kind.steps = 0
    trainer = make_trainer(tmp_path, callbacks=[InfluenceAudit(**arguments)])
    with pytest.raises(MisconfigurationException, match=message):
        trainer.fit(model, data)
    assert kind.steps == 0
    assert leftovers(trainer, model) == []
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    # Those of two loaders come in a new dict each time.
    assert getattr(data, "batch_sampler", None) == sampler
    # Nothing that would look like an audit.
    assert list(tmp_path.rglob("manifest.json")) == []


@pytest.mark.usefixtures("_no_workers_left")
@pytest.mark.parametrize("workers", [0, 2])
def test_samplers_that_yield_no_integers(workers: int, tmp_path: Path) -> None:
    data = loader(ByPair(), batch_sampler=[[(0, 32), (1, 32)], [(2, 64), (3, 64)]], num_workers=workers)
    sampler, Stepless.steps = data.batch_sampler, 0
    model = Stepless()
    trainer = make_trainer(tmp_path, callbacks=[InfluenceAudit()])
    with pytest.raises(MisconfigurationException, match=r"sampler yields.*\(0, 32\).*expected .*integer"):
        trainer.fit(model, data)
    assert Stepless.steps == 0
    check_clean(trainer, model, data, sampler)


def test_no_train_loader(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="train_dataloader"):
        make_trainer(tmp_path, callbacks=[InfluenceAudit()]).fit(Classifier())


def test_an_unwritable_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    model, data = Stepless(), loader(vectors())
    sampler, Stepless.steps = data.batch_sampler, 0
    trainer = make_trainer(tmp_path, callbacks=[InfluenceAudit(dirpath=tmp_path / "file" / "audit")])
    with pytest.raises(MisconfigurationException, match="Cannot create an audit directory at .*file/audit.*`dirpath=`"):
        trainer.fit(model, data)
    assert Stepless.steps == 0
    check_clean(trainer, model, data, sampler)


def test_verification_can_be_left_out(tmp_path: Path) -> None:
    audit = InfluenceAudit(verify=False)
    make_trainer(tmp_path, callbacks=[audit]).fit(Contrastive(), loader(vectors()))
    assert audit.has_report
    assert audit.report.manifest["verification_error"] is None


def test_other_stages_need_nothing(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, callbacks=[InfluenceAudit()])
    trainer.validate(Validated(), DataLoader(vectors(), batch_size=4), verbose=False)
    assert list(tmp_path.rglob("influence")) == []


def test_no_training_batches(tmp_path: Path) -> None:
    audit = InfluenceAudit()
    make_trainer(tmp_path, callbacks=[audit], limit_train_batches=0).fit(Classifier(), loader(vectors()))
    assert not audit.has_report
    assert list(tmp_path.rglob("manifest.json")) == []


@pytest.mark.parametrize("after", [True, False])
def test_weight_averaging_after_the_audit(after: bool, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    averaging = StochasticWeightAveraging(swa_lrs=0.01)
    callbacks: list[Callback] = [InfluenceAudit(), averaging] if after else [averaging, InfluenceAudit()]
    make_trainer(tmp_path, callbacks=callbacks).fit(Classifier(), loader(vectors()))
    warned = [w for w in recwarn if "comes after InfluenceAudit" in str(w.message)]
    assert len(warned) == after


# ---------------------------------------------------------------------------------------- non-finite examples

BAD = [4, 11, 17]


class Guarded(Validated):
    """Skips steps whose gradients are not finite, as many training loops do."""

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        gradients = [parameter.grad for parameter in self.parameters() if parameter.grad is not None]
        if not all(bool(torch.isfinite(gradient).all()) for gradient in gradients):
            for gradient in gradients:
                gradient.zero_()


def with_bad_rows(value: float) -> TensorDataset:
    x, y = (tensor.clone() for tensor in vectors(dtype=torch.float64).tensors)
    x[BAD, 2] = value
    return TensorDataset(x, y)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("curvature", ["kfac", "ekfac"])
def test_examples_that_are_not_finite(value: float, curvature: Any, tmp_path: Path) -> None:
    model, data = Guarded().double(), with_bad_rows(value)
    validation = TensorDataset(*(tensor.clone() for tensor in vectors(6, 2, dtype=torch.float64).tensors))
    validation.tensors[0][1] = value
    audit = InfluenceAudit(curvature=curvature, fisher="empirical", damping=0.01, factor_examples=None)
    trainer = make_trainer(tmp_path, callbacks=[audit], max_epochs=3)
    trainer.fit(model, loader(data, batch_size=3, shuffle=True), loader(validation))

    report = audit.report
    assert report is not None
    assert report.status == "complete"
    assert report.nonfinite.tolist() == BAD
    assert list(report.manifest["nonfinite"]) == BAD
    assert "non-finite  3 examples, left out of the factors: 4, 11, 17" in str(report)
    columns = report.columns
    # The loss itself is finite behind tanh(inf).
    of_losses = ("loss", "loss_mean") if np.isnan(value) else ()
    for name in ("self_influence", "harm", "grad_norm_squared", "tracin", "suspicion", *of_losses):
        assert np.flatnonzero(~np.isfinite(columns[name])).tolist() == BAD, name
    assert sorted(columns["rank"][BAD].tolist()) == [20, 21, 22]
    assert not columns["candidate"][BAD].any()
    loaded = AuditReport.load(Path(trainer.log_dir) / "influence")
    assert loaded.nonfinite.tolist() == BAD

    good = [n for n in range(22) if n not in BAD]
    x, y = data.tensors[0][good], data.tensors[1][good]
    norms = torch.zeros(19, dtype=torch.float64)
    scores, harm = norms.clone(), norms.clone()
    kept = [0, 2, 3, 4, 5]
    queries = ref.per_example_gradients(model.net, F.cross_entropy, *(tensor[kept] for tensor in validation.tensors))
    gradients = ref.per_example_gradients(model.net, F.cross_entropy, x, y)
    for name in ("1", "3"):
        module = model.net.get_submodule(name)
        G = ref.gradient_matrix(module, gradients[f"{name}.weight"], gradients[f"{name}.bias"])
        q = ref.gradient_matrix(module, queries[f"{name}.weight"], queries[f"{name}.bias"]).mean(1, keepdim=True)
        norms += (G**2).sum((0, 2, 3))
        A, B = ref.second_moments(*ref.layer_inputs_and_output_gradients(model.net, name, F.cross_entropy, x, y))
        C = ref.kfac_dense(A, B)
        if curvature == "ekfac":
            Q_A, Q_B = ref.eigenbasis(A, B)
            C = ref.ekfac_dense(Q_A, Q_B, ref.ekfac_eigenvalues(G, Q_A, Q_B))
        scores += ref.quadratic_forms(C, G, 0.01)
        harm -= ref.bilinear_forms(C, q, G, 0.01)[0]
    np.testing.assert_allclose(columns["grad_norm_squared"][good], norms, rtol=1e-8)
    np.testing.assert_allclose(columns["self_influence"][good], scores, rtol=1e-6)
    np.testing.assert_allclose(columns["harm"][good], harm, rtol=1e-6, atol=1e-8)


def test_losses_that_are_infinite(tmp_path: Path) -> None:
    """An infinite target makes an infinite loss, not a NaN; the other examples of its batch keep theirs."""
    x = vectors().tensors[0]
    y = x[:, :1].clone()
    y[BAD] = float("inf")
    model = Guarded(classes=1, loss=lambda outputs, batch: F.mse_loss(outputs, batch[1]))
    audit = InfluenceAudit()
    make_trainer(tmp_path, callbacks=[audit]).fit(model, loader(TensorDataset(x, y), 3, shuffle=True))
    assert audit.has_report
    assert audit.report.nonfinite.tolist() == BAD
    for name in ("self_influence", "grad_norm_squared", "loss", "loss_mean"):
        assert np.flatnonzero(~np.isfinite(audit.report.columns[name])).tolist() == BAD, name


def test_masked_logits_make_an_infinite_loss(tmp_path: Path) -> None:
    """A class that is ruled out for an example (logit -inf) and yet its label: the loss is inf, its gradient finite."""

    class Masked(Guarded):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y, ruled_out = batch
            logits = self(x).masked_fill(F.one_hot(ruled_out, 4)[:, :3].bool(), -torch.inf)
            return F.cross_entropy(logits, y)

    x, y = vectors().tensors
    ruled_out = torch.full_like(y, 3)
    ruled_out[BAD] = y[BAD]
    audit = InfluenceAudit()
    make_trainer(tmp_path, callbacks=[audit]).fit(Masked(), loader(TensorDataset(x, y, ruled_out), 3, shuffle=True))
    assert audit.has_report
    assert audit.report.nonfinite.tolist() == BAD
    assert np.flatnonzero(~np.isfinite(audit.report.columns["self_influence"])).tolist() == BAD


def test_a_first_batch_that_is_not_finite_is_no_reason_to_stop(tmp_path: Path) -> None:
    x, y = (tensor.clone() for tensor in vectors().tensors)
    x[:5] = float("nan")
    audit = InfluenceAudit()
    make_trainer(tmp_path, callbacks=[audit]).fit(Guarded(), loader(TensorDataset(x, y)))
    assert audit.has_report
    assert audit.report.nonfinite.tolist() == [0, 1, 2, 3, 4]


# ----------------------------------------------------------------------------- failures of the audit, softly


def trained(directory: Path, model: pl.LightningModule, audits: list[Callback], **arguments: Any) -> pl.Trainer:
    trainer = make_trainer(directory, callbacks=audits, **arguments)
    trainer.fit(model, loader(vectors()))
    return trainer


def seeded(make: Callable[[], Classifier]) -> Classifier:
    torch.manual_seed(5)
    return make()


def diverging() -> Classifier:
    return Classifier(lambda module: torch.optim.SGD(module.parameters(), lr=1e38))


def test_weights_that_became_nan(tmp_path: Path) -> None:
    plain = seeded(diverging)
    trained(tmp_path / "plain", plain, [])
    model, audit = seeded(diverging), InfluenceAudit()
    with pytest.warns(UserWarning, match=FAILED):
        trainer = trained(tmp_path, model, [audit])
    assert all(bool(torch.isnan(parameter).any()) for parameter in plain.parameters())
    for mine, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=0, equal_nan=True)
    assert trainer.state.finished
    assert not audit.has_report
    report = AuditReport.load(Path(trainer.log_dir) / "influence")
    assert report.status == "interrupted"
    assert "no example was counted" in report.manifest["error"]
    assert len(report) == 22
    # The first steps of training were still finite.
    assert np.isfinite(report.columns["loss_mean"]).any()
    check_clean(trainer, model)


def test_an_exception_in_the_final_audit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of everything")

    monkeypatch.setattr(audit_run, "influence_scores", fail)
    model, audit = seeded(Classifier), InfluenceAudit()
    with pytest.warns(UserWarning, match=f"(?s){FAILED}.*kept in .*influence.*out of everything"):
        trainer = trained(tmp_path, model, [audit])
    assert trainer.state.finished
    assert not audit.has_report
    report = AuditReport.load(Path(trainer.log_dir) / "influence")
    assert report.status == "interrupted"
    assert "out of everything" in report.manifest["error"]
    assert report.columns["times_seen"].tolist() == [2] * 22
    # Of the first epoch's end; the last one's was part of the pass that failed.
    assert np.isfinite(report.columns["tracin"]).all()
    check_clean(trainer, model)


class BreaksInPasses(Validated):
    """The training step works in training and fails when the audit runs it again."""

    broken_from_epoch = 0
    error: type[BaseException] = RuntimeError

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if not self.training and self.current_epoch >= self.broken_from_epoch and self.trainer.global_step:
            raise self.error("not in eval mode")
        return super().training_step(batch, batch_idx)


def test_an_exception_at_an_epochs_end_does_not_stop_training(tmp_path: Path) -> None:
    plain = seeded(BreaksInPasses)
    trained(tmp_path / "plain", plain, [], max_epochs=3)
    model, audit = seeded(BreaksInPasses), InfluenceAudit()
    with pytest.warns(UserWarning, match="(?s)influence audit.*not in eval mode"):
        trainer = trained(tmp_path, model, [audit], max_epochs=3)
    assert trainer.state.finished
    assert trainer.current_epoch == 3
    assert all(module.training for module in model.modules())
    for mine, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=0)
    report = AuditReport.load(Path(trainer.log_dir) / "influence")
    assert report.status == "interrupted"
    assert "not in eval mode" in report.manifest["error"]
    assert len(report) == 22
    check_clean(trainer, model)


def test_a_directory_that_vanishes_does_not_stop_training(tmp_path: Path) -> None:
    class Vanishes(Callback):
        def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            if trainer.current_epoch == 1:
                shutil.rmtree(tmp_path / "gone")
                (tmp_path / "gone").write_text("a file now")

    model, audit = seeded(Classifier), InfluenceAudit(dirpath=tmp_path / "gone" / "audit")
    with pytest.warns(UserWarning, match="influence audit"):
        trainer = trained(tmp_path, model, [audit, Vanishes()], max_epochs=3)
    assert trainer.state.finished
    assert trainer.current_epoch == 3
    check_clean(trainer, model)


@pytest.mark.parametrize("bad", [(12,), (0, 5, 21), tuple(range(8))])
def test_a_training_step_that_skips_bad_batches(bad: tuple[int, ...], tmp_path: Path) -> None:
    """``return None`` for a loss that is not finite is a common guard: the bad are named, the rest is scored."""

    class Skips(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:  # type: ignore[override]
            loss = super().training_step(batch, batch_idx)
            return loss if bool(torch.isfinite(loss)) else None

    x, y = (tensor.clone() for tensor in vectors().tensors)
    x[list(bad)] = float("nan")
    audit, model = InfluenceAudit(curvature="identity"), Skips()
    trainer = make_trainer(tmp_path, callbacks=[audit])
    trainer.fit(model, loader(TensorDataset(x, y)))
    assert audit.has_report
    assert audit.report.status == "complete"
    rest = [index for index in range(len(x)) if index not in bad]
    assert audit.report.columns["index"].tolist() == rest
    assert any("are not scored" in note and "returns no loss" in note for note in audit.report.manifest["notes"])
    for index in rest[:3]:
        loss = F.cross_entropy(model(x[index : index + 1]), y[index : index + 1])
        own = sum(float(g.square().sum()) for g in torch.autograd.grad(loss, list(model.parameters())))
        row = rest.index(index)
        assert audit.report.columns["grad_norm_squared"][row] == pytest.approx(own, rel=1e-4)
    check_clean(trainer, model)


def test_a_training_step_that_never_returns_a_loss(tmp_path: Path) -> None:
    class Silent(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
            super().training_step(batch, batch_idx)

    trainer = make_trainer(tmp_path, callbacks=[InfluenceAudit()])
    with pytest.raises(MisconfigurationException, match="returned NoneType instead of a loss"):
        trainer.fit(Silent(), loader(vectors()))


def test_harm_without_a_validation_during_training(tmp_path: Path) -> None:
    """The validation data are loaded for the audit then; they would else be left out without a word."""
    audit = InfluenceAudit()
    trainer = make_trainer(tmp_path, callbacks=[audit], check_val_every_n_epoch=100)
    trainer.fit(Validated(), loader(vectors()), loader(vectors()))
    assert audit.has_report
    assert "harm" in audit.report.columns


# ------------------------------------------------------------------------------------- fit ends with an error


class Explodes(Validated):
    """Raises in the third batch of the second epoch, in training mode only."""

    error: type[BaseException] = RuntimeError

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.training and self.current_epoch == 1 and self.trainer.fit_loop.batch_idx == 2:
            raise self.error("lightning struck")
        return super().training_step(batch, batch_idx)


class ExplodesInValidation(Validated):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if self.current_epoch == 1:
            raise RuntimeError("lightning struck")


class ExplodesBackward(Validated):
    def on_after_backward(self) -> None:
        if self.current_epoch == 1:
            raise RuntimeError("lightning struck")


@pytest.fixture
def _interrupt_signal() -> Iterator[None]:
    """Lightning switches Ctrl-C off while it shuts down."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


def check_interrupted(trainer: pl.Trainer, model: nn.Module, audit: InfluenceAudit, error: str) -> AuditReport:
    check_clean(trainer, model)
    assert not audit.has_report
    report = AuditReport.load(Path(trainer.log_dir) / "influence")
    assert report.status == "interrupted"
    assert error in report.manifest["error"]
    assert len(report) == 22
    assert sorted(report.columns["rank"].tolist()) == list(range(1, 23))
    assert np.isfinite(report.columns["loss_mean"]).all()
    assert np.isfinite(report.columns["tracin"]).all()
    assert report.columns["label"].tolist() == vectors().tensors[1].tolist()
    assert "(interrupted)" in str(report)
    return report


@pytest.mark.usefixtures("_no_workers_left")
@pytest.mark.parametrize("kind", [Explodes, ExplodesInValidation, ExplodesBackward])
def test_an_exception_in_the_second_epoch(kind: type[Validated], tmp_path: Path) -> None:
    model, audit, data = kind(), InfluenceAudit(), loader(vectors(), shuffle=True, num_workers=2)
    sampler = data.batch_sampler
    trainer = make_trainer(tmp_path, callbacks=[audit], max_epochs=3)
    with pytest.raises(RuntimeError, match="lightning struck"):
        trainer.fit(model, data, loader(vectors(6, 2)))
    report = check_interrupted(trainer, model, audit, "lightning struck")
    assert data.batch_sampler is sampler
    seen = {Explodes: 32, ExplodesInValidation: 44, ExplodesBackward: 27}[kind]
    assert report.columns["times_seen"].sum() == seen


@pytest.mark.usefixtures("_interrupt_signal")
def test_ctrl_c_in_training(tmp_path: Path) -> None:
    class Interrupted(Explodes):
        error = KeyboardInterrupt

    model, audit, data = Interrupted(), InfluenceAudit(), loader(vectors(), shuffle=True)
    sampler = data.batch_sampler
    trainer = make_trainer(tmp_path, callbacks=[audit], max_epochs=3)
    with pytest.raises(SystemExit):
        trainer.fit(model, data)
    check_interrupted(trainer, model, audit, "KeyboardInterrupt")
    assert data.batch_sampler is sampler


@pytest.mark.parametrize("epoch", [0, 1])
@pytest.mark.usefixtures("_interrupt_signal")
def test_ctrl_c_in_a_pass(epoch: int, tmp_path: Path) -> None:
    """In the pass at the first epoch's end, and in the final audit."""

    class Interrupted(BreaksInPasses):
        broken_from_epoch = epoch
        error = KeyboardInterrupt

    model, audit = Interrupted(), InfluenceAudit()
    trainer = make_trainer(tmp_path, callbacks=[audit])
    with pytest.raises(SystemExit):
        trainer.fit(model, loader(vectors()))
    check_clean(trainer, model)
    report = AuditReport.load(Path(trainer.log_dir) / "influence")
    assert report.status == "interrupted"
    assert "KeyboardInterrupt" in report.manifest["error"]
    assert report.columns["times_seen"].tolist() == [epoch + 1] * 22


def test_an_exception_before_the_first_batch_leaves_an_empty_audit(tmp_path: Path) -> None:
    class Early(Callback):
        def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            raise RuntimeError("lightning struck")

    model, audit = Classifier(), InfluenceAudit()
    trainer = make_trainer(tmp_path, callbacks=[audit, Early()])
    with pytest.raises(RuntimeError, match="lightning struck"):
        trainer.fit(model, loader(vectors()))
    check_clean(trainer, model)
    directory = Path(trainer.log_dir) / "influence"
    assert AuditStore.open(directory).status == "interrupted"
    report = AuditReport.load(directory)
    assert len(report) == len(report.candidates) == 0
    assert "interrupted" in str(report)


def test_a_failed_second_fit_leaves_the_first_audit_alone(tmp_path: Path) -> None:
    class FailsLater(Validated):
        fails = False

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            if self.fails:
                raise RuntimeError("lightning struck")
            super().validation_step(batch, batch_idx)

    model, audit = FailsLater(), InfluenceAudit()
    trainer = make_trainer(tmp_path, callbacks=[audit], num_sanity_val_steps=1)
    data = loader(vectors()), loader(vectors(6, 2))
    trainer.fit(model, *data)
    directory = Path(trainer.log_dir) / "influence"
    before = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    model.fails = True
    trainer.fit_loop.max_epochs = 4
    # In the sanity check, that is before the second audit has begun.
    with pytest.raises(RuntimeError, match="lightning struck"):
        trainer.fit(model, *data)
    with pytest.raises(RuntimeError, match="lightning struck"):
        trainer.validate(model, data[1], verbose=False)
    assert {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()} == before
    check_clean(trainer, model)


def test_training_can_go_on_after_an_exception(tmp_path: Path) -> None:
    model, audit, data = Explodes(), InfluenceAudit(), loader(vectors())
    trainer = make_trainer(tmp_path, callbacks=[audit], max_epochs=3)
    with pytest.raises(RuntimeError, match="lightning struck"):
        trainer.fit(model, data)
    first = Path(trainer.log_dir) / "influence"
    again = make_trainer(tmp_path, callbacks=[audit], max_epochs=1)
    again.fit(model, data)
    assert AuditReport.load(first).status == "interrupted"
    assert audit.has_report
    assert audit.report.status == "complete"
    assert audit.report.columns["times_seen"].tolist() == [1] * 22


def test_early_stopping_on_what_the_audit_must_not_touch(tmp_path: Path) -> None:
    """A callback that raises in the end does not cost the audit that came before it."""

    class Raises(Callback):
        def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            raise RuntimeError("lightning struck")

    audit = InfluenceAudit()
    trainer = make_trainer(tmp_path, callbacks=[audit, EarlyStopping("val_loss"), Raises()])
    with pytest.raises(RuntimeError, match="lightning struck"):
        trainer.fit(Validated(), loader(vectors()), loader(vectors(6, 2)))
    assert audit.has_report
    assert AuditReport.load(Path(trainer.log_dir) / "influence").status == "complete"


# -------------------------------------------------------------- what is not the audit's fault, and what is not lost


class Unsized(Sampler[list[int]]):
    """Batches without a length, on which Lightning trains."""

    sampler = None  # Lightning 2.5 looks for one

    def __iter__(self) -> Iterator[list[int]]:
        yield from ([k, k + 1] for k in range(0, 22, 2))


def test_loaders_without_a_length(tmp_path: Path) -> None:
    """The whole audit was lost at its end."""
    batches: Any = Unsized()
    audit = InfluenceAudit()
    data = DataLoader(vectors(), batch_sampler=batches)
    make_trainer(tmp_path, callbacks=[audit]).fit(Validated(), data, DataLoader(vectors(), batch_sampler=batches))
    assert audit.has_report
    assert len(audit.report) == 22
    assert np.isfinite(audit.report.columns["harm"]).all()


def test_validation_examples_are_those_that_the_sampler_draws(tmp_path: Path) -> None:
    """Queries came from, and `harm` was about, examples of one data set that the model was trained on."""
    found = {}
    for way in ("sampler", "subset"):
        torch.manual_seed(0)
        data = vectors(40)
        train: Any = DataLoader(Subset(data, range(30)), batch_size=6)
        held: Any = DataLoader(Subset(data, range(30, 40)), batch_size=5)
        if way == "sampler":
            held = DataLoader(data, batch_size=5, sampler=SubsetRandomSampler(range(30, 40)))
        audit = InfluenceAudit(queries="worst", factor_examples=None, fisher="empirical")
        make_trainer(tmp_path / way, callbacks=[audit]).fit(Validated(), train, held)
        assert audit.has_report
        assert audit.report.pairs is not None
        found[way] = audit.report
    assert set(np.asarray(found["sampler"].pairs["query"])) <= set(range(30, 40))
    np.testing.assert_allclose(found["sampler"].columns["harm"], found["subset"].columns["harm"], rtol=1e-4, atol=1e-6)


def test_a_fit_that_is_refused_leaves_the_report_of_the_one_before(tmp_path: Path) -> None:
    audit = InfluenceAudit()
    make_trainer(tmp_path / "one", callbacks=[audit]).fit(Classifier(), loader(vectors()))
    report = audit.report
    assert report is not None
    with pytest.raises(MisconfigurationException):
        make_trainer(tmp_path / "two", callbacks=[audit]).fit(Classifier(), DataLoader(Stream(), batch_size=2))
    assert audit.report is report
    assert audit.influence("identity").self_influence().isfinite().all()


def test_epochs_that_a_stop_can_not_end_are_not_the_last(tmp_path: Path) -> None:
    """Every pass was left to the last epoch once a stop was asked for, which `min_epochs` put off."""

    class Impatient(Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            trainer.should_stop = True

    audit = InfluenceAudit(tracin="epoch")
    trainer = make_trainer(tmp_path, callbacks=[Impatient(), audit], max_epochs=9, min_epochs=4)
    trainer.fit(Classifier(), loader(vectors()))
    assert audit.has_report
    assert len(audit.report.manifest["tracin_steps"]) == 4


def test_loaders_that_are_made_anew_without_notice(tmp_path: Path) -> None:
    """There were no samples to compare the data with, and the comparison ended training."""

    class Anew(Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            trainer.reload_dataloaders_every_n_epochs = 1

    class Reloading(Classifier):
        def train_dataloader(self) -> Any:
            return loader(vectors())

    audit = InfluenceAudit()
    make_trainer(tmp_path, callbacks=[audit, Anew()], max_epochs=3).fit(Reloading())
    assert audit.has_report
    assert (audit.report.columns["times_seen"] == 3).all()


def test_an_error_of_a_later_test_is_not_the_audits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(Classifier):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            raise RuntimeError("in test")

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("audit failed")

    monkeypatch.setattr(audit_run, "influence_scores", broken)
    audit, model = InfluenceAudit(), Failing()
    trainer = make_trainer(tmp_path, callbacks=[audit])
    with pytest.warns(UserWarning, match=FAILED):
        trainer.fit(model, loader(vectors()))
    with pytest.raises(RuntimeError, match="in test"):
        trainer.test(model, loader(vectors()), verbose=False)
    (manifest,) = tmp_path.rglob("manifest.json")
    assert "audit failed" in manifest.read_text()
    assert "in test" not in manifest.read_text()


def test_numbers_of_numpy_leave_checkpoints_readable(tmp_path: Path) -> None:
    audit = InfluenceAudit(damping=np.float64(0.1), factor_examples=np.int64(20))  # type: ignore[arg-type]
    trainer = make_trainer(tmp_path, callbacks=[audit])
    trainer.fit(Classifier(), loader(vectors()))
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    assert "callbacks" in torch.load(tmp_path / "run.ckpt", weights_only=True)
