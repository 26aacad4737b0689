"""What a loss weighs in a real run: sums, masks, kinds, penalties, epochs, parameters that nobody trains."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import make_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from which_lightning import Callback, MisconfigurationException, pl

from lightning_influence import InfluenceAudit
from lightning_influence.callbacks import training_passes
from lightning_influence.gradients import passes

N, C, B = 24, 3, 4
_generator = torch.Generator().manual_seed(0)
X = torch.randn(N, 5, generator=_generator).double()
Y = X[:, :C].argmax(1)
V = torch.randn(N, generator=_generator).double()
KIND = (torch.arange(N) >= N // 2).long()
DATA = TensorDataset(X, Y, V, KIND)
Loss = Callable[[Any, Tensor, Any], Tensor]
CLOSE: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-10}


class Net(pl.LightningModule):
    """A linear probe on features; `loss(module, outputs, batch)` is what it is trained on."""

    def __init__(self, loss: Loss, optimizer: Callable[[Any], torch.optim.Optimizer] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.back, self.head = nn.Linear(5, 6).double(), nn.Linear(6, C + 1).double()
        self.loss = loss
        self.optimizer = optimizer or (lambda parameters: torch.optim.SGD(parameters, 0.1))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.back(x)))  # type: ignore[no-any-return]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(self, self(batch[0]), batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer(self.parameters())


def run(
    directory: Path, net: pl.LightningModule, *, batch_size: int = B, seed: int = 1, **arguments: Any
) -> InfluenceAudit:
    callbacks = [arguments.pop("callback")] if "callback" in arguments else []
    audit = InfluenceAudit(dirpath=directory / "audit", **arguments)
    torch.manual_seed(seed)
    trainer = make_trainer(directory, callbacks=[*callbacks, audit], max_epochs=3)
    trainer.fit(net, DataLoader(DATA, batch_size, shuffle=True))
    assert audit.has_report
    assert audit.report.status == "complete"
    return audit


def columns(audit: InfluenceAudit) -> dict[str, np.ndarray[Any, Any]]:
    assert audit.has_report
    return dict(audit.report.columns)


def norms(net: Any, own: Callable[[Tensor, int], Tensor], parameters: Any = None) -> Tensor:
    """Squared gradient norms of the examples' own losses, by autograd."""
    parameters = list(net.parameters()) if parameters is None else list(parameters)
    found = []
    for k in range(N):
        gradients = torch.autograd.grad(own(net(X[k : k + 1]), k), parameters, allow_unused=True)
        found.append(sum(float(g.square().sum()) for g in gradients if g is not None))
    return torch.tensor(found, dtype=torch.float64)


def check(audit: InfluenceAudit, net: Any, own: Callable[[Tensor, int], Tensor], **keywords: Any) -> None:
    found = torch.from_numpy(columns(audit)["grad_norm_squared"])
    torch.testing.assert_close(found, norms(net, own, **keywords), **CLOSE)


# ---------------------------------------------------------------------------------------------------------- sums


def _sgd(rate: float, decay: float, momentum: float = 0.0) -> Callable[[Any], torch.optim.Optimizer]:
    return lambda p: torch.optim.SGD(p, rate, momentum=momentum, weight_decay=decay)


def _summed(module: Any, z: Tensor, batch: Any) -> Tensor:
    return F.cross_entropy(z, batch[1], reduction="sum")


def _summed_by_hand(module: Any, z: Tensor, batch: Any) -> Tensor:
    return F.cross_entropy(z, batch[1], reduction="none").sum()


def _mean(module: Any, z: Tensor, batch: Any) -> Tensor:
    return F.cross_entropy(z, batch[1])


OPTIMIZERS = {
    "SGD": (_sgd(0.02, 0.0), _sgd(0.02 * B, 0.0)),
    "momentum and weight decay": (_sgd(0.01, 0.04, 0.5), _sgd(0.01 * B, 0.01, 0.5)),
    "Adam": (lambda p: torch.optim.Adam(p, 0.01, eps=4e-8), lambda p: torch.optim.Adam(p, 0.01, eps=1e-8)),
}


@pytest.mark.parametrize("tracin", ["epoch", "step"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("loss", [_summed, _summed_by_hand])
def test_a_sum_is_the_mean_at_as_many_times_the_rate(tmp_path: Path, loss: Loss, optimizer: str, tracin: Any) -> None:
    """The very same steps, so the very same audit; `loss` was batch size times the own loss, TracIn its square."""
    of_sum, of_mean = OPTIMIZERS[optimizer]
    settings: dict[str, Any] = {"tracin": tracin, "curvature": "ggn", "damping": "trainer"}
    summed = columns(run(tmp_path / "sum", Net(loss, of_sum), **settings))
    meant = columns(run(tmp_path / "mean", Net(_mean, of_mean), **settings))
    for name in ("loss", "loss_mean", "grad_norm_squared", "self_influence"):
        np.testing.assert_allclose(summed[name], meant[name], rtol=1e-6, atol=1e-9, err_msg=name)
    # Adam's steps have no unit: as many examples in a batch loss as it is the sum of, though.
    np.testing.assert_allclose(summed["tracin"], meant["tracin"], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("batch_size", [1, 3, 8, N])
def test_the_columns_of_a_sum_do_not_depend_on_the_batch_size(tmp_path: Path, batch_size: int) -> None:
    net = Net(lambda m, z, b: F.mse_loss(z[:, 0], b[2], reduction="sum"), _sgd(0.0, 0.0))
    audit = run(tmp_path, net, batch_size=batch_size, damping=0.1)
    check(audit, net, lambda z, k: F.mse_loss(z[:, 0], V[k : k + 1]))
    own = (net(X)[:, 0] - V).square().detach()
    torch.testing.assert_close(torch.from_numpy(columns(audit)["loss"]), own, **CLOSE)
    torch.testing.assert_close(torch.from_numpy(columns(audit)["loss_mean"]), own, **CLOSE)


# --------------------------------------------------------------------------------------------------------- kinds


@pytest.mark.parametrize("room", [5, N])
def test_two_kinds_of_examples_whatever_the_batches_of_the_passes(
    tmp_path: Path, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loss(module: Any, z: Tensor, batch: Any) -> Tensor:
        a, total = batch[3] == 0, z.new_zeros(())
        if bool(a.any()):
            total = total + F.cross_entropy(z[a][:, :C], batch[1][a])
        if not bool(a.all()):
            total = total + 0.1 * F.mse_loss(z[~a][:, C], batch[2][~a], reduction="sum")
        return total

    monkeypatch.setattr("lightning_influence.callbacks.beginning.roomy_batch_size", lambda *_: room)
    net = Net(loss)
    audit = run(tmp_path, net, batch_size=8)
    check(
        audit,
        net,
        lambda z, k: (
            F.cross_entropy(z[:, :C], Y[k : k + 1]) / 0.5
            if int(KIND[k]) == 0
            else 8 * 0.1 * F.mse_loss(z[:, C], V[k : k + 1])
        ),
    )


def _heads(module: Any, z: Tensor, batch: Any) -> Tensor:
    return F.cross_entropy(z[:, :C], batch[1]) + 0.5 * F.mse_loss(z[:, C], batch[2])


@pytest.mark.parametrize(
    ("loss", "needed"),
    [
        (_mean, False),
        (lambda m, z, b: 0.5 * nn.functional.mse_loss(z[:, :1], b[2][:, None]), False),
        (lambda m, z, b: F.l1_loss(z[:, 0], b[2]) + F.mse_loss(z[:, 1], b[2]), False),
        (lambda m, z, b: F.cross_entropy(z, b[1], torch.tensor([1.0, 2.0, 3.0, 1.0]).double()), True),
        (_heads, True),  # some labels may be ignored
    ],
)
def test_what_training_has_told_needs_no_pass(
    tmp_path: Path, loss: Loss, needed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[int] = []
    original = passes.measured_scale

    def counted(*arguments: Any) -> Any:
        measured.append(1)
        return original(*arguments)

    monkeypatch.setattr(passes, "measured_scale", counted)
    run(tmp_path, Net(loss))
    assert len(measured) == needed


def test_a_task_is_not_what_training_has_told(tmp_path: Path) -> None:
    """Training takes a plain mean, the audit is asked about a weighted one."""
    weight = torch.tensor([1.0, 5.0, 0.2, 1.0]).double()
    net = Net(_mean)
    audit = run(tmp_path, net, task=lambda m, b: F.cross_entropy(m(b[0]), b[1], weight))
    check(audit, net, lambda z, k: weight[Y[k]] * F.cross_entropy(z, Y[k : k + 1]) / weight[Y].mean())


# --------------------------------------------------------------------------------------------------------- masks

KNOWN = torch.arange(N) % 3 != 1
_LABELS = torch.where(KNOWN, Y, -1)


def _by(how: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Loss:
    return lambda m, z, b: how(z, b[1], KNOWN.gather(0, (b[2][:, None] == V).double().argmax(1)))


def _each(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z, y, reduction="none")


MASKS: dict[str, Loss] = {
    "ignore_index": _by(lambda z, y, m: F.cross_entropy(z, torch.where(m, y, -1), ignore_index=-1)),
    "mask": _by(lambda z, y, m: (_each(z, y) * m).sum() / m.sum()),
    "clamped": _by(lambda z, y, m: (_each(z, y) * m).sum() / m.sum().clamp(min=1)),
    "picked losses": _by(lambda z, y, m: _each(z, y)[m].mean()),
    "where": _by(lambda z, y, m: torch.where(m, _each(z, y), 0.0).sum() / m.sum()),
    "weights": _by(lambda z, y, m: _each(z, y) @ (m.double() / m.sum())),
    "soft labels": _by(lambda z, y, m: (_each(z, F.one_hot(y, C + 1).double()) * m).sum() / m.sum()),
    "picked rows": _by(lambda z, y, m: F.cross_entropy(z[m], y[m])),
    "class weight": _by(
        lambda z, y, m: F.cross_entropy(z, torch.where(m, y, C), torch.tensor([1.0, 1.0, 1.0, 0.0]).double())
    ),
}


@pytest.fixture(scope="module")
def ignored(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    audit = run(tmp_path_factory.mktemp("ignored"), Net(MASKS["ignore_index"]), batch_size=8)
    assert audit.has_report
    return columns(audit) | {"candidates": audit.report.candidates}


@pytest.mark.parametrize("name", list(MASKS)[1:])
def test_what_is_masked_by_hand_is_not_trained_on(tmp_path: Path, name: str, ignored: dict[str, Any]) -> None:
    """Examples without a label were the top candidates, as the loss that nobody trains on stays high."""
    audit = run(tmp_path, Net(MASKS[name]), batch_size=8)
    found = columns(audit)
    assert audit.has_report
    assert audit.report.candidates.tolist() == ignored["candidates"].tolist()
    assert (found["label"] >= 0).tolist() == KNOWN.tolist()
    assert not found["grad_norm_squared"][~KNOWN.numpy()].any()
    for column in ("loss_mean", "aum", "el2n", "grad_norm_squared", "tracin"):
        np.testing.assert_allclose(found[column], ignored[column], rtol=1e-7, atol=1e-10, err_msg=column)


@pytest.mark.parametrize("by_hand", [False, True])
def test_masked_yes_or_no_decisions(tmp_path: Path, by_hand: bool) -> None:
    def how(z: Tensor, y: Tensor, m: Tensor) -> Tensor:
        target, weight = (y == 0).double(), m.double()
        if by_hand:
            each = F.binary_cross_entropy_with_logits(z[:, 0], target, reduction="none")
            return (each * weight).sum() / len(y)
        return F.binary_cross_entropy_with_logits(z[:, 0], target, weight=weight)

    net = Net(_by(how))
    audit = run(tmp_path, net)
    assert (columns(audit)["label"] >= 0).tolist() == KNOWN.tolist()
    check(audit, net, lambda z, k: KNOWN[k] * F.binary_cross_entropy_with_logits(z[:, 0], (Y[k : k + 1] == 0).double()))


def test_a_mask_changes_nothing_in_training(tmp_path: Path) -> None:
    """Its elements' coefficients are asked for in the middle of a training step."""
    weights = []
    for audited in (True, False):
        net = Net(MASKS["mask"])
        torch.manual_seed(1)
        trainer = make_trainer(tmp_path / str(audited), callbacks=[InfluenceAudit()] if audited else [], max_epochs=2)
        trainer.fit(net, DataLoader(DATA, B, shuffle=True))
        weights.append([p.detach().clone() for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


# ------------------------------------------------------------------------------------------------- verification


def _entropy_of_mean(module: Any, z: Tensor, batch: Any) -> Tensor:
    mean = z.softmax(1).mean(0)
    return F.cross_entropy(z, batch[1]) + 0.01 * (mean * mean.log()).sum()


def _centred(module: Any, z: Tensor, batch: Any) -> Tensor:
    return F.cross_entropy(z, batch[1]) + 0.01 * z.mean(0).square().sum()


def _decorrelated(module: Any, z: Tensor, batch: Any) -> Tensor:
    features = torch.tanh(module.back(batch[0]))
    return F.cross_entropy(z, batch[1]) + 0.01 * (features.T @ features / len(z)).square().sum()


def _untapped_and_centred(module: Any, z: Tensor, batch: Any) -> Tensor:
    return (z.logsumexp(1) - z.gather(1, batch[1][:, None])[:, 0]).mean() + 0.01 * z.mean(0).square().sum()


@pytest.mark.parametrize("loss", [_entropy_of_mean, _centred, _decorrelated, _untapped_and_centred])
def test_a_penalty_on_the_batch_of_small_weight_is_refused(tmp_path: Path, loss: Loss) -> None:
    """The losses hardly differ, in the batch and alone; the gradients do."""
    trainer = make_trainer(tmp_path, callbacks=[InfluenceAudit()])
    with pytest.raises(MisconfigurationException, match=r"another gradient in \w+ in a batch than alone .*`task=`"):
        trainer.fit(Net(loss), DataLoader(DATA, 8))
    assert trainer.global_step == 0


# --------------------------------------------------------------------------------------------------------- epochs


def _annealed(module: Any, z: Tensor, batch: Any) -> Tensor:
    weight = [1.0, 0.6, 0.2][module.current_epoch]  # there is no fourth epoch
    return F.cross_entropy(z, batch[1]) + weight * z.square().mean(1).mean()


@pytest.mark.parametrize("tracin", [None, "epoch", "step"])
def test_the_final_pass_is_in_the_last_epoch(tmp_path: Path, tracin: Any) -> None:
    net = Net(_annealed)
    audit = run(tmp_path, net, tracin=tracin)
    check(audit, net, lambda z, k: F.cross_entropy(z, Y[k : k + 1]) + 0.2 * z.square().mean())
    assert net.current_epoch == 3
    removal = audit.unlearner("ekfac").newton_removal([0])
    assert np.isfinite(removal.relative_norm(net))
    assert net.current_epoch == 3


def test_passes_at_ends_of_epochs_are_in_their_epoch(tmp_path: Path) -> None:
    """The step sizes of three epochs, each with the gradient of its own weight."""

    class Norms(Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            weight = [1.0, 0.6, 0.2][trainer.current_epoch]
            own = norms(pl_module, lambda z, k: F.cross_entropy(z, Y[k : k + 1]) + weight * z.square().mean())
            found.append(own * 0.1 * (N // B))

    found: list[Tensor] = []
    audit = run(tmp_path, Net(_annealed), callback=Norms())
    torch.testing.assert_close(torch.from_numpy(columns(audit)["tracin"]), torch.stack(found).sum(0), **CLOSE)


# ------------------------------------------------------------------------------------------------ what is trained


class Probe(Net):
    """Trains the head alone; the rest is frozen, or just left out of the optimizer."""

    def __init__(self, frozen: bool) -> None:
        super().__init__(_mean)
        self.back.requires_grad_(not frozen)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.head.parameters(), 0.2)


@pytest.mark.parametrize("curvature", ["ggn", "ekfac", "identity"])
@pytest.mark.parametrize("tracin", ["epoch", "step"])
def test_what_no_optimizer_holds_counts_as_frozen(tmp_path: Path, tracin: Any, curvature: Any) -> None:
    audits = [
        run(tmp_path / str(frozen), Probe(frozen), tracin=tracin, curvature=curvature, damping=0.1)
        for frozen in (True, False)
    ]
    frozen, left_out = map(columns, audits)
    for name in ("self_influence", "tracin", "grad_norm_squared", "loss"):
        np.testing.assert_allclose(left_out[name], frozen[name], rtol=1e-9, atol=1e-12, err_msg=name)
    assert audits[1].has_report
    assert audits[1].report.manifest["coverage"]["share"] == 1.0
    assert "36 others are in no optimizer" in audits[1].report.manifest["coverage"]["summary"]


def test_parameters_that_join_the_optimizer_later_are_followed(tmp_path: Path) -> None:
    class Thawing(Callback):
        def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                trainer.optimizers[0].add_param_group({"params": list(pl_module.back.parameters()), "lr": 0.05})

    class Norms(Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
            def own(z: Tensor, k: int) -> Tensor:
                return F.cross_entropy(z, Y[k : k + 1])

            total = 0.2 * norms(pl_module, own, pl_module.head.parameters())
            if trainer.current_epoch:
                total = total + 0.05 * norms(pl_module, own, pl_module.back.parameters())
            found.append(total * (N // B))

    found: list[Tensor] = []
    net, audit = Probe(False), InfluenceAudit()
    torch.manual_seed(1)
    make_trainer(tmp_path, callbacks=[Thawing(), Norms(), audit], max_epochs=3).fit(net, DataLoader(DATA, B))
    torch.testing.assert_close(torch.from_numpy(columns(audit)["tracin"]), torch.stack(found).sum(0), **CLOSE)
    check(audit, net, lambda z, k: F.cross_entropy(z, Y[k : k + 1]))


# --------------------------------------------------------------------------------------------------- exact labels


@pytest.mark.parametrize("curvature", ["diagonal", "kfac", "ekfac", "block_ggn", "ggn", "hessian"])
def test_the_exact_fisher_of_several_decisions_is_refused_before_training(tmp_path: Path, curvature: Any) -> None:
    def loss(module: Any, z: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(z.repeat_interleave(2, 0)[:, :C], batch[1].repeat_interleave(2))

    trainer = make_trainer(tmp_path, callbacks=[InfluenceAudit(curvature=curvature, fisher="exact")])
    with pytest.raises(MisconfigurationException, match=r'fisher="exact": .*no closed form.*use `fisher="sampled"`'):
        trainer.fit(Net(loss), DataLoader(DATA, B))
    assert trainer.global_step == 0


def test_the_scale_of_a_run_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scales: list[Any] = []
    original = training_passes.TrainingPasses.scaled

    def noted(self: Any, *arguments: Any) -> Any:
        found = original(self, *arguments)
        scales.append(found.scale)
        return found

    monkeypatch.setattr(training_passes.TrainingPasses, "scaled", noted)
    weight = torch.tensor([1.0, 2.0, 3.0, 1.0]).double()
    run(tmp_path, Net(lambda m, z, b: F.cross_entropy(z, b[1], weight)))
    assert len(scales) == 3
    assert all(scale is scales[0] for scale in scales)


# ------------------------------------------------------------------------------------- what the passes do not see


class Numbered(Net):
    """Its loss may depend on the number of the batch."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.number = batch_idx
        return self.loss(self, self(batch[0]), batch)


def _aux(z: Tensor, batch: Any) -> Tensor:
    return 0.3 * F.mse_loss(z[:, C], batch[2])


@pytest.mark.parametrize(
    "loss",
    [
        lambda m, z, b: _mean(m, z, b) * (1.0 if m.number % 2 == 0 else 0.25),
        lambda m, z, b: _mean(m, z, b) + (_aux(z, b) if m.number % 3 == 2 else 0.0),
        lambda m, z, b: _mean(m, z, b) if m.number % 2 else _aux(z, b),
    ],
)
def test_a_loss_that_depends_on_the_number_of_its_batch_is_noted(tmp_path: Path, loss: Loss) -> None:
    report = run(tmp_path, Numbered(loss)).report
    assert report is not None
    assert any("the loss depends on `batch_idx`, which is 0 in all passes" in note for note in report.manifest["notes"])


def test_terms_that_only_training_has_are_noted(tmp_path: Path) -> None:
    """Gradients were those of half the loss, verified."""
    for number, condition in enumerate((lambda m: m.training, lambda m: m.global_step % 2 == 1)):
        net = Net(lambda m, z, b, condition=condition: _mean(m, z, b) + (_aux(z, b) if condition(m) else 0.0))
        report = run(tmp_path / str(number), net).report
        assert report is not None
        (note,) = (note for note in report.manifest["notes"] if "training has had terms" in note)
        assert "SquaredError" in note
        assert "CrossEntropy" not in note


def test_a_number_that_is_not_used_and_terms_that_are_not_trained_on_are_not_noted(tmp_path: Path) -> None:
    def loss(module: Any, z: Tensor, batch: Any) -> Tensor:
        module.log(f"auxiliary {module.number}", _aux(z, batch))
        return _mean(module, z, batch)

    report = run(tmp_path, Numbered(loss)).report
    assert report is not None
    assert not any("batch_idx" in note or "terms of the loss" in note for note in report.manifest["notes"])
