"""Losses of class decisions that are written by hand: labels, per-example losses and dynamics as of torch's own."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import reference as ref
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import InfluenceAudit
from lightning_influence.data.source import ExampleSource
from lightning_influence.gradients.discover import discover
from lightning_influence.gradients.passes import ExampleGradients
from lightning_influence.gradients.verify import inspect
from lightning_influence.layers import per_sample
from lightning_influence.objective.task import run_tapped
from lightning_influence.objective.terms import understand

N, C, T = 11, 4, 3
EXACT: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-11}
WEIGHTS = torch.tensor([0.5, 1.0, 2.0, 1.5], dtype=torch.float64)
_Loss = Callable[[Tensor, Tensor], Tensor]


def _smooth(y: Tensor, by: float = 0.1) -> Tensor:
    return torch.full((len(y), C), by / C, dtype=torch.float64).scatter(1, y[:, None], 1 - by + by / C)


def _picked(log_p: Tensor, y: Tensor) -> Tensor:
    return log_p.gather(1, y[:, None]).squeeze(1)


def _categorical(z: Tensor, y: Tensor) -> Tensor:
    return -Categorical(logits=z).log_prob(y).mean()  # type: ignore[no-untyped-call]


def _bernoulli(z: Tensor, y: Tensor) -> Tensor:
    return -Bernoulli(logits=z).log_prob(y).mean()  # type: ignore[no-untyped-call]


# Each with torch's own loss that it is.
CHOICES: dict[str, tuple[_Loss, _Loss]] = {
    "index": (lambda z, y: -torch.log_softmax(z, 1)[range(len(y)), y].mean(), F.cross_entropy),
    "arange": (lambda z, y: -z.log_softmax(-1)[torch.arange(len(y)), y].mean(), F.cross_entropy),
    "gather": (lambda z, y: -_picked(F.log_softmax(z, -1), y).mean(), F.cross_entropy),
    "take along": (lambda z, y: -torch.take_along_dim(F.log_softmax(z, 1), y[:, None], 1).mean(), F.cross_entropy),
    "module": (lambda z, y: nn.NLLLoss()(nn.LogSoftmax(1)(z), y), F.cross_entropy),
    "one-hot": (lambda z, y: -(F.one_hot(y, C) * z.log_softmax(1)).sum(1).mean(), F.cross_entropy),
    "sum": (lambda z, y: -_picked(z.log_softmax(1), y).sum(), lambda z, y: F.cross_entropy(z, y, reduction="sum")),
    "logsumexp": (lambda z, y: (z.logsumexp(1) - z[range(len(y)), y]).mean(), F.cross_entropy),
    "exp, sum, log": (lambda z, y: (z.exp().sum(1).log() - _picked(z, y)).mean(), F.cross_entropy),
    "distribution": (_categorical, F.cross_entropy),
    "softmax, log": (lambda z, y: -_picked(z.softmax(1), y).log().mean(), F.cross_entropy),
    "temperature": (lambda z, y: -_picked((z / 3).log_softmax(1), y).mean(), lambda z, y: F.cross_entropy(z / 3, y)),
    "weights": (
        lambda z, y: -(WEIGHTS[y] * _picked(z.log_softmax(1), y)).mean(),
        lambda z, y: (WEIGHTS[y] * F.cross_entropy(z, y, reduction="none")).mean(),
    ),
    "smoothing": (
        lambda z, y: -(_smooth(y) * z.log_softmax(1)).sum(1).mean(),
        lambda z, y: F.cross_entropy(z, y, label_smoothing=0.1),
    ),
    "smoothing of two parts": (
        lambda z, y: -(0.9 * _picked(z.log_softmax(1), y) + 0.1 * z.log_softmax(1).mean(1)).mean(),
        lambda z, y: F.cross_entropy(z, y, label_smoothing=0.1),
    ),
}
YES_OR_NO: dict[str, _Loss] = {
    "logsigmoid": lambda z, y: -(y * F.logsigmoid(z) + (1 - y) * F.logsigmoid(-z)).mean(),
    "logsigmoid, no first": lambda z, y: -((1 - y) * F.logsigmoid(-z) + y * F.logsigmoid(z)).mean(),
    "sigmoid, log": lambda z, y: -(y * z.sigmoid().log() + (1 - y) * (1 - z.sigmoid()).log()).mean(),
    "softplus": lambda z, y: (F.softplus(z) - y * z).mean(),
    "softplus of a margin": lambda z, y: F.softplus((1 - 2 * y) * z).mean(),
    "softplus of minus a margin": lambda z, y: F.softplus(-((2 * y - 1) * z)).mean(),
    "logsigmoid of a margin": lambda z, y: -F.logsigmoid(z * (2 * y - 1)).mean(),
    "distribution": _bernoulli,
}


def _net(outputs: int = C) -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, outputs)).double()


def _x(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


LABELS = torch.arange(N) * 7 % C


def _check(net: nn.Module, task: Any, own: Any, data: TensorDataset, labels: Tensor | None) -> None:
    """Per-example gradients and losses are those of torch's own loss, labels those that were given."""
    source = ExampleSource(data, batch_size=4)
    gradients = ExampleGradients(net, task, source, discover(net, task, source))
    inspection = inspect(gradients, range(4))
    assert inspection.tapped
    assert inspection.exact_draws is not None or data.tensors[1].ndim > 1
    norms, values, found = [], [], []
    with closing(gradients.run(range(N))) as batches:
        for batch in batches:
            norms.append(torch.stack([per_sample.squared_norms(io.x, io.gs[0]) for io in batch.layers()]).sum(0))
            assert batch.loss.values is not None
            assert batch.loss.primary is not None
            values.append(batch.loss.values)
            if labels is not None:
                found.append(batch.loss.primary.statistics(batch.loss.n)["label"])
    alone = [[tensor[k : k + 1] for tensor in data.tensors] for k in range(N)]
    expected = ref.gradients_alone(net, own, alone)
    torch.testing.assert_close(torch.cat(norms), sum((g**2).flatten(1).sum(1) for g in expected.values()), **EXACT)
    torch.testing.assert_close(torch.cat(values), torch.stack([own(net, each).detach() for each in alone]), **EXACT)
    if labels is not None:
        assert torch.cat(found).equal(labels)


@pytest.mark.parametrize("name", CHOICES)
def test_a_choice_of_a_class(name: str) -> None:
    written, own = CHOICES[name]
    data = TensorDataset(_x(N, 3), LABELS)
    _check(_net(), lambda m, b: written(m(b[0]), b[1]), lambda m, b: own(m(b[0]), b[1]), data, LABELS)


@pytest.mark.parametrize("name", YES_OR_NO)
def test_yes_or_no(name: str) -> None:
    """Margins carry the label in their sign: read as they are, all labels would be the same."""
    written, labels = YES_OR_NO[name], (LABELS % 2).double()

    def task(module: Any, batch: Any) -> Tensor:
        return written(module(batch[0]).squeeze(1), batch[1])

    def own(module: Any, batch: Any) -> Tensor:
        return F.binary_cross_entropy_with_logits(module(batch[0]).squeeze(1), batch[1])

    _check(_net(1), task, own, TensorDataset(_x(N, 3), labels), labels.long())


@pytest.mark.parametrize("form", ["sequence", "flat", "channels"])
def test_tokens_under_a_mask(form: str) -> None:
    """Each example's loss is the sum over its own tokens, divided by the mean number of tokens."""
    y = torch.arange(N * T).reshape(N, T) * 5 % C
    mask = (torch.arange(T) < 1 + torch.arange(N)[:, None] % T).double()

    def task(module: Any, batch: Any) -> Tensor:
        x, labels, kept = batch
        z = module(x)
        if form == "flat":
            each = -_picked(z.flatten(0, 1).log_softmax(1), labels.flatten()).reshape(labels.shape)
        elif form == "channels":
            each = -z.transpose(1, 2).log_softmax(1).gather(1, labels[:, None]).squeeze(1)
        else:
            each = -z.log_softmax(-1).gather(-1, labels[..., None]).squeeze(-1)
        return (each * kept).sum() / kept.sum()

    def own(module: Any, batch: Any) -> Tensor:
        each = F.cross_entropy(module(batch[0]).transpose(1, 2), batch[1], reduction="none")
        return (each * batch[2]).sum() / (mask.sum() / N)

    _check(_net(), task, own, TensorDataset(_x(N, T, 3), y, mask), None)


def test_a_focal_loss_has_labels_but_no_losses() -> None:
    net, x, y = _net(), _x(N, 3), LABELS

    def focal(module: Any, batch: Any) -> Tensor:
        p = _picked(module(batch[0]).softmax(1), batch[1])
        return -((1 - p) ** 2 * p.log()).mean()

    loss = understand(*run_tapped(focal, net, [x, y]), N)
    assert not loss.tapped
    assert loss.primary is not None
    told, plain = loss.primary.statistics(N), understand(*run_tapped(_plain, net, [x, y]), N).primary
    assert plain is not None
    for name, column in plain.statistics(N).items():
        torch.testing.assert_close(told[name], column, rtol=1e-9, atol=1e-12)


def _plain(module: Any, batch: Any) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1])


def test_a_known_loss_beside_it_is_a_term_of_its_own() -> None:
    net, x, y = _net(C + 1), _x(N, 3), LABELS

    def task(module: Any, batch: Any) -> Tensor:
        z = module(batch[0])
        return -_picked(z[:, :C].log_softmax(1), batch[1]).mean() + 0.1 * F.mse_loss(z[:, C], batch[0][:, 0])

    loss = understand(*run_tapped(task, net, [x, y]), N)
    assert loss.tapped
    assert [term.key.kind for term in loss.terms] == ["HandWrittenCrossEntropy", "SquaredError"]


@pytest.mark.parametrize("main_first", [True, False])
def test_labels_are_those_of_the_loss_that_comes_first(main_first: bool) -> None:
    """An auxiliary loss that is written by hand would else have its labels filed as the given ones."""

    def task(module: Any, batch: Any) -> Tensor:
        z, others = module(batch[0]).split([C, 3], 1)
        parts = [lambda: F.cross_entropy(z, batch[1]), lambda: -_picked(others.log_softmax(1), batch[1] % 3).mean()]
        first, second = parts if main_first else parts[::-1]
        return first() + 0.3 * second()

    loss = understand(*run_tapped(task, _net(C + 3), [_x(N, 3), LABELS]), N)
    assert loss.tapped
    assert len(loss.terms) == 2
    assert loss.primary is not None
    assert loss.primary.statistics(N)["label"].equal(LABELS if main_first else LABELS % 3)


def _hand(z: Tensor, y: Tensor) -> Tensor:
    return -_picked(z.log_softmax(1), y).mean()


@pytest.mark.parametrize("same_logits", [False, True])
@pytest.mark.parametrize("main_first", [True, False])
def test_a_known_loss_of_the_same_shape_beside_it(main_first: bool, same_logits: bool) -> None:
    """Taken for the known loss's own logits by their shape, they had the auxiliary's labels filed, and no dynamics."""

    def task(module: Any, batch: Any) -> Tensor:
        z, w = module(batch[0]).split([C, C], 1)
        others = z if same_logits else w
        parts = [lambda: _hand(z, batch[1]), lambda: 0.3 * F.cross_entropy(others, (batch[1] + 1) % C)]
        first, second = parts if main_first else parts[::-1]
        return first() + second()

    def own(module: Any, batch: Any) -> Tensor:
        z, w = module(batch[0]).split([C, C], 1)
        others = z if same_logits else w
        return F.cross_entropy(z, batch[1]) + 0.3 * F.cross_entropy(others, (batch[1] + 1) % C)

    net = _net(2 * C)
    loss = understand(*run_tapped(task, net, [_x(N, 3), LABELS]), N)
    assert loss.tapped
    assert loss.primary is not None
    assert loss.primary.statistics(N)["label"].equal(LABELS if main_first else (LABELS + 1) % C)
    assert ("HandWritten" if main_first else "CrossEntropy at") in loss.labels_of()
    _check(net, task, own, TensorDataset(_x(N, 3), LABELS), LABELS if main_first else (LABELS + 1) % C)


def test_a_softmax_of_known_logits_that_is_only_logged_is_no_loss_of_its_own() -> None:
    def task(module: Any, batch: Any) -> Tensor:
        z = module(batch[0])
        z.softmax(1), z.log_softmax(1)
        return F.cross_entropy(z.view(-1, C), batch[1]) + F.mse_loss(z.exp(), z.exp().detach() + 1)

    loss = understand(*run_tapped(task, _net(), [_x(N, 3), LABELS]), N)
    assert [term.key.kind for term in loss.terms] == ["CrossEntropy", "SquaredError"]
    assert not loss.labels_of()


@pytest.mark.filterwarnings("ignore")
def test_training_and_passes_read_the_labels_of_the_same_loss(tmp_path: Path) -> None:
    def loss(z: Tensor, y: Tensor) -> Tensor:
        return 0.3 * F.cross_entropy(z[:, 2:], y % 2) + _hand(z[:, :2], (y + 1) % 2)

    audit = InfluenceAudit()
    _fit(loss, tmp_path, audit)
    assert audit.report.columns["label"].tolist() == (LABELS % 2).tolist()
    assert any("which comes first in it" in note for note in audit.report.manifest["notes"])
    assert not any("another label" in note for note in audit.report.manifest["notes"])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["logsigmoid", "softplus", "known", "softplus, worse first", "known, worse first"])
def test_preferences_have_no_labels(name: str, tmp_path: Path) -> None:
    """The better one comes first: all were labelled 1, and a review asked whether that is right."""
    losses: dict[str, _Loss] = {
        "logsigmoid": lambda z, y: -F.logsigmoid(z * 2).mean(),
        "softplus": lambda z, y: F.softplus(-z).mean(),
        "known": lambda z, y: F.binary_cross_entropy_with_logits(z, torch.ones_like(z)),
        "softplus, worse first": lambda z, y: F.softplus(z).mean(),
        "known, worse first": lambda z, y: F.binary_cross_entropy_with_logits(z, torch.zeros_like(z)),
    }
    audit = InfluenceAudit()
    _fit(losses[name], tmp_path, audit, 1)
    report = audit.report
    assert not {"label", "predicted", "suggested", "neighbour_disagreement"} & report.columns.keys()
    assert {"loss_mean", "aum", "prob_margin"} <= report.columns.keys()
    assert "none of them can be wrong" in report.health().reason


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("label", [0, 1, 2])
def test_one_of_several_classes_alone_is_no_preference(label: int, tmp_path: Path) -> None:
    """As of the first batches of sorted data: its labels are still labels."""
    audit = InfluenceAudit()
    _fit(lambda z, y: F.cross_entropy(z, torch.full_like(y, label)), tmp_path, audit)
    assert (audit.report.columns["label"] == label).all()
    assert "none of them can be wrong" not in audit.report.health().reason


SILENT: dict[str, _Loss] = {
    "a penalty on the entropy": lambda z, y: (
        -_picked(z.log_softmax(1), y).mean() + 0.1 * (z.softmax(1) * z.log_softmax(1)).sum(1).mean()
    ),
    "a teacher": lambda z, y: (_smooth(y, 0.4) * (_smooth(y, 0.4).log() - z.log_softmax(1))).sum(1).mean(),
    "an energy": lambda z, y: z.logsumexp(1).mean(),
    "a reward that is negative": lambda z, y: ((y - 1.5) * _picked(z.log_softmax(1), y)).mean(),
    "squares of probabilities": lambda z, y: (z.softmax(1) - F.one_hot(y, C)).square().sum(1).mean(),
    "squares of a sigmoid": lambda z, y: (z[:, 0].sigmoid() - y / C).square().mean(),
    "a margin chosen by where": lambda z, y: F.softplus(torch.where(y > 1, -z[:, 0], z[:, 0])).mean(),
    "a soft yes": lambda z, y: (F.softplus(z[:, 0]) - (y + 0.5) / C * z[:, 0]).mean(),
    "hinges of two classes": lambda z, y: F.relu(1 - (z[:, :2].softmax(1)[:, 0] - y / C)).mean(),
}


@pytest.mark.parametrize("name", SILENT)
def test_whatever_else_is_left_alone(name: str) -> None:
    written, net = SILENT[name], _net()
    loss = understand(*run_tapped(lambda m, b: written(m(b), LABELS), net, _x(N, 3)), N)
    assert not loss.terms
    assert not loss.tapped


def test_logits_that_somebody_listens_to_or_overwrites_are_left_alone() -> None:
    net, heard = _net(), []

    def listened(module: Any, batch: Any) -> Tensor:
        z = module(batch)
        z.register_hook(lambda g: heard.append(g))
        return -_picked(z.log_softmax(1), LABELS).mean()

    assert not understand(*run_tapped(listened, net, _x(N, 3)), N).terms
    assert not heard

    def overwritten(module: Any, batch: Any) -> Tensor:
        z = module(batch) * 1
        loss = -_picked(z.log_softmax(1), LABELS).mean()
        z.mul_(2)
        return loss

    assert not understand(*run_tapped(overwritten, net, _x(N, 3)), N).terms


class _Model(L.LightningModule):
    def __init__(self, loss: _Loss, outputs: int = C) -> None:
        super().__init__()
        self.net, self.loss = _net(outputs).float(), loss

    def training_step(self, batch: Any) -> Tensor:
        return self.loss(self.net(batch[0]).squeeze(1), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.5)


def _fit(loss: _Loss, tmp_path: Path, audit: InfluenceAudit | None, outputs: int = C, **options: Any) -> _Model:
    model = _Model(loss, outputs)
    labels = LABELS if outputs > 1 else (LABELS % 2).float()
    loader = DataLoader(TensorDataset(_x(N, 3).float(), labels), 4)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    callbacks = [] if audit is None else [audit]
    L.Trainer(max_epochs=4, default_root_dir=tmp_path, accelerator="cpu", callbacks=callbacks, **quiet, **options).fit(
        model, loader
    )
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["gather", "distribution", "smoothing", "yes or no", "accumulated"])
def test_dynamics_and_scores_of_a_run_are_those_of_the_known_loss(name: str, tmp_path: Path) -> None:
    outputs, options = C, {"accumulate_grad_batches": 2} if name == "accumulated" else {}
    if name == "yes or no":
        outputs, written, own = 1, YES_OR_NO["softplus of a margin"], F.binary_cross_entropy_with_logits
    else:
        written, own = CHOICES["gather" if name == "accumulated" else name]
        written, own = (lambda z, y, f=f: f(z.double(), y).float() for f in (written, own))  # type: ignore[misc]
    reports = []
    for number, loss in enumerate((written, own)):
        audit = InfluenceAudit(curvature="kfac", fisher="exact" if name != "smoothing" else "auto")
        model = _fit(loss, tmp_path / str(number), audit, outputs, **options)
        reports.append(audit.report)
        untouched = _fit(loss, tmp_path, None, outputs, **options)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), untouched.parameters(), strict=True))
    told, expected = reports
    assert told is not None
    assert expected is not None
    assert {"loss_mean", "aum", "el2n", "prob_margin", "label", "times_seen"} <= told.columns.keys()
    assert told.columns.keys() == expected.columns.keys()
    for column, values in expected.columns.items():
        if np.issubdtype(np.asarray(values).dtype, np.number):
            np.testing.assert_allclose(told.columns[column], values, rtol=2e-3, atol=1e-4, err_msg=column)
