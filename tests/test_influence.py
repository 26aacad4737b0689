"""The public door: what a user without a Trainer writes, gets, and is told."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference as ref
import torch
import torch.nn.functional as F
import trajectory_cases
from models import Classifier, make_trainer, vectors
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, SubsetRandomSampler, TensorDataset
from which_lightning import pl

from lightning_influence import AuditReport, Checkpoint, Influence, InfluenceAudit, StepSizes
from lightning_influence.audit.relabel import LabelError
from lightning_influence.audit.store.atomic import StoreError
from lightning_influence.core import progress
from lightning_influence.core.reachable import Walk
from lightning_influence.data.source import DataError
from lightning_influence.gradients.verify import VerificationError
from lightning_influence.influence import AlongTraining
from lightning_influence.layers.blocks import LayerError
from lightning_influence.objective.terms import TaskError
from lightning_influence.scores.queries import QueryError
from lightning_influence.training.checkpoints import CheckpointError

N, Q = 20, 6
DAMPING = 0.3


class Trained:
    """A small network trained on a few vectors, and what plain autograd says about it."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(N + Q, 5, generator=generator, dtype=torch.float64)
        y = (x[:, :3] + 0.5 * torch.randn(N + Q, 3, generator=generator)).argmax(1)
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
        self.train_set, self.test_set = TensorDataset(x[:N], y[:N]), TensorDataset(x[N:], y[N:])
        optimizer = torch.optim.SGD(self.net.parameters(), lr=0.2)
        for _ in range(30):
            optimizer.zero_grad()
            F.cross_entropy(self.net(x[:N]), y[:N]).backward()
            optimizer.step()
        optimizer.zero_grad()

    @property
    def influence(self) -> Influence:
        return Influence(self.net, F.cross_entropy, self.train_set)

    def gradients(self, data: TensorDataset) -> Tensor:
        return ref.flatten_gradients(ref.per_example_gradients(self.net, F.cross_entropy, *data.tensors))

    def scores(self, left: Tensor) -> Tensor:
        """`g_qᵀ (GGN + λ)⁻¹ g_z` with plain linear algebra, `[q, N]`."""
        ggn = ref.ggn_dense(self.net, self.train_set.tensors[0], "cross_entropy")
        right = self.gradients(self.train_set)
        return left @ torch.linalg.solve(ggn + DAMPING * torch.eye(len(ggn), dtype=torch.float64), right.T)


@pytest.fixture(scope="module")
def trained() -> Trained:
    return Trained()


@pytest.fixture(scope="module")
def fitted(trained: Trained) -> Influence:
    return trained.influence.fit("ggn", damping=DAMPING)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_influence_of_three_test_images_takes_five_lines_and_one_import(trained: Trained) -> None:
    program = """
from lightning_influence import AuditReport, Checkpoint, Influence, InfluenceAudit
influence = Influence(model, loss, train_set).fit("ekfac")
top = influence.top(test_set, [3, 4, 5])
"""
    assert len(program.strip().splitlines()) <= 5
    assert program.count("import ") == 1
    names: dict[str, Any] = {"model": trained.net, "loss": nn.CrossEntropyLoss()}
    names |= {"train_set": trained.train_set, "test_set": trained.test_set}
    exec(program, names)
    top, pairs = names["top"], names["influence"].pairs(trained.test_set, [3, 4, 5]).scores
    assert top.proponents.shape == (3, 10)
    assert torch.equal(top.proponents, pairs.argsort(1, descending=True)[:, :10])
    assert torch.equal(top.opponents, pairs.argsort(1)[:, :10])
    # Not plain inner products: what curvature does to them.
    plain = trained.gradients(trained.test_set)[3:] @ trained.gradients(trained.train_set).T
    assert torch.corrcoef(torch.stack([plain.flatten(), pairs.flatten()]))[0, 1] < 0.98


# ------------------------------------------------------------------------------------------------ the right numbers


class TestScores:
    def test_pairs(self, trained: Trained, fitted: Influence) -> None:
        expected = trained.scores(trained.gradients(trained.test_set))
        found = fitted.pairs(trained.test_set)
        close(found.scores, expected)
        assert found.queries.tolist() == list(range(Q))
        close(fitted.pairs(trained.test_set, [4, 1]).scores, expected[[4, 1]])

    def test_identity_is_the_product_of_gradients(self, trained: Trained) -> None:
        plain = trained.influence.fit("identity")
        rows, own = trained.gradients(trained.test_set), trained.gradients(trained.train_set)
        close(plain.pairs(trained.test_set).scores, rows @ own.T)
        cosines = F.normalize(rows, dim=1) @ F.normalize(own, dim=1).T
        close(plain.pairs(trained.test_set, normalise="cosine").scores, cosines)
        parts = plain.pairs(trained.test_set, by_layer=True).parts
        assert parts is not None
        close(parts["2"], rows[:, 24:] @ own[:, 24:].T)

    def test_self_influence(self, trained: Trained, fitted: Influence) -> None:
        expected = trained.scores(trained.gradients(trained.train_set)).diagonal()
        close(fitted.self_influence(), expected)
        close(fitted.self_influence([7, 2, 7]), expected[[7, 2, 7]])
        close(fitted.self_influence(3), expected[[3]])
        close(fitted.pairs(trained.train_set, [5]).scores[0, 5], expected[5])

    def test_columns(self, trained: Trained, fitted: Influence) -> None:
        columns = fitted.scores(validation=trained.test_set).columns
        x, y = trained.train_set.tensors
        close(columns["loss"], F.cross_entropy(trained.net(x), y, reduction="none").detach())
        close(columns["harm"], -trained.scores(trained.gradients(trained.test_set).mean(0, keepdim=True))[0])
        assert torch.equal(columns["label"], y)
        before = trained.influence.scores([3, 5])
        assert "self_influence" not in before.columns
        assert before.indices.tolist() == [3, 5]

    def test_measurement(self, trained: Trained, fitted: Influence) -> None:
        x, y = trained.test_set.tensors
        net = copy.deepcopy(trained.net)
        logits = net(x[:3])
        rest = logits.masked_fill(F.one_hot(y[:3], 3).bool(), -torch.inf).logsumexp(1)
        margin = (logits[range(3), y[:3]] - rest).mean()
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(margin, list(net.parameters()))])
        margin = margin.detach()
        found = fitted.measure(trained.test_set, "margin", range(3))
        close(found.scores, trained.scores(gradient[None])[0])
        assert found.measured.value == pytest.approx(float(margin), rel=1e-12)
        assert trained.influence.value(trained.test_set, "margin", range(3)) == pytest.approx(float(margin), rel=1e-12)

    def test_chain_and_sweep(self, trained: Trained, fitted: Influence) -> None:
        close(
            trained.influence.chain().matrices["ggn"].trace(),
            ref.ggn_dense(trained.net, trained.train_set.tensors[0], "cross_entropy").trace(),
        )
        assert len(trained.influence.fit("kfac").damping_sweep().stability) == 5
        with pytest.raises(ValueError, match="ggn would have to be factorised anew for every damping"):
            fitted.damping_sweep()


def test_removal_and_repair_are_retraining_for_ridge_regression() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(30, 5, generator=generator, dtype=torch.float64)
    y = (x[:, 0] > 0).double() + 0.1 * x[:, 1].round()
    decay = 0.01

    def solved(rows: list[int], y: Tensor) -> nn.Linear:
        ones = torch.cat([x[rows], torch.ones(len(rows), 1).double()], 1)
        theta = torch.linalg.solve(
            2 * ones.T @ ones / len(rows) + decay * torch.eye(6).double(), 2 * ones.T @ y[rows] / len(rows)
        )
        net = nn.Linear(5, 1).double()
        net.load_state_dict({"weight": theta[None, :5], "bias": theta[5:]})
        return net

    def flat(net: nn.Module) -> Tensor:
        return torch.cat([p.detach().flatten() for p in net.parameters()])

    net = solved(list(range(30)), y)
    influence = Influence(net, lambda model, batch: F.mse_loss(model(batch[0])[:, 0], batch[1]), TensorDataset(x, y))
    removed = [0, 7, 29]
    update = influence.fit("ggn", damping=decay * 27 / 30).remove(removed, leverage=True, weight_decay=decay)
    expected = flat(solved([n for n in range(30) if n not in removed], y))
    torch.testing.assert_close(flat(update.applied_to_copy(net)), expected, rtol=1e-8, atol=1e-10)
    one = influence.fit("ggn", damping=decay).remove(3, weight_decay=decay)
    assert "removal of 1 of 30" in str(one)


def test_repair_goes_towards_the_new_labels(trained: Trained, fitted: Influence) -> None:
    x, y = trained.train_set.tensors
    new = (y[:2] + 1) % 3
    update = fitted.repair([0, 1], new.tolist())
    # To first order training with other labels is what the difference of their gradients does.
    before = trained.gradients(TensorDataset(x[:2], y[:2]))
    after = trained.gradients(TensorDataset(x[:2], new))
    ggn = ref.ggn_dense(trained.net, x, "cross_entropy") + DAMPING * torch.eye(39, dtype=torch.float64)
    expected = torch.linalg.solve(ggn, (before - after).sum(0)) / N
    close(torch.cat([update.changes[name].flatten() for name, _ in trained.net.named_parameters()]), expected)
    close(fitted.repair(0, int(new[0])).changes["2.bias"], fitted.repair([0], [int(new[0])]).changes["2.bias"])
    with pytest.raises(LabelError, match=r"new labels \{0: 7\} are none"):
        fitted.repair(0, 7)


@pytest.fixture(scope="module")
def run() -> trajectory_cases.Run:
    return trajectory_cases.make_run()


def along(run: trajectory_cases.Run, checkpoints: list[Checkpoint]) -> AlongTraining:
    return Influence(run.net, trajectory_cases.task, run.data, batch_size=5).along(checkpoints)


class TestAlong:
    def test_tracin(self, run: trajectory_cases.Run) -> None:
        expected = torch.zeros(trajectory_cases.Q, trajectory_cases.N, dtype=torch.float64)
        own = torch.zeros(trajectory_cases.N, dtype=torch.float64)
        for point in run.trained:
            sizes, examples = run.spread(dict(point.step_sizes)), run.gradients(point, run.data)
            expected += (run.gradients(point, run.asked) * sizes) @ examples.T
            own += (examples.square() * sizes).sum(1)
        scores = along(run, run.trained)
        close(scores.tracin(run.asked).scores, expected)
        close(scores.tracin(run.asked, 2).scores, expected[[2]])
        close(scores.self_influence(), own)

    def test_z0(self, run: trajectory_cases.Run) -> None:
        paths = [torch.stack([run.losses(point, data) for point in run.checkpoints]) for data in (run.asked, run.data)]
        weights = [torch.cat([p.flatten() for p in point.parameters.values()]) for point in run.checkpoints]
        sizes = [run.spread(dict(point.step_sizes)) for point in run.trained]
        expected = ref.z0_dense(*paths, weights, sizes)
        scores = along(run, run.checkpoints)
        close(scores.z0(run.asked).scores, expected)

    def test_source_of_small_steps_is_tracin(self, run: trajectory_cases.Run) -> None:
        tiny = [
            trajectory_cases.replace(p, step_sizes={k: 1e-7 * v for k, v in p.step_sizes.items()}) for p in run.trained
        ]
        scores = along(run, tiny)
        found = scores.source(run.asked, segments=1, curvature="kfac").scores
        last = run.gradients(run.trained[-1], run.asked)
        total = run.spread({name: sum(p.step_sizes[name] for p in tiny) for name in tiny[0].step_sizes})
        shares = [p.steps / sum(p.steps for p in tiny) for p in tiny]
        mean = torch.stack([s * run.gradients(p, run.data) for s, p in zip(shares, tiny, strict=True)]).sum(0)
        torch.testing.assert_close(found, (last * total) @ mean.T, rtol=1e-4, atol=0)

    def test_diff_in_takes_the_batch_it_is_told(self, run: trajectory_cases.Run) -> None:
        scores = along(run, run.trained)
        whole = scores.diff_in(run.asked).scores
        assert whole.shape == (trajectory_cases.Q, trajectory_cases.N)
        assert not torch.allclose(whole, scores.diff_in(run.asked, batch=3).scores)

    def test_no_checkpoints(self, run: trajectory_cases.Run) -> None:
        with pytest.raises(CheckpointError, match="there is no checkpoint"):
            along(run, [])

    def test_weights_come_back(self, run: trajectory_cases.Run) -> None:
        before = copy.deepcopy(run.net.state_dict())
        along(run, run.trained).tracin(run.asked)
        assert all(torch.equal(before[name], value) for name, value in run.net.state_dict().items())


def test_dropout_ensemble(trained: Trained) -> None:
    net = nn.Sequential(trained.net[0], nn.Tanh(), nn.Dropout(0.5), trained.net[2])
    influence = Influence(net, F.cross_entropy, trained.train_set)
    one, two = (influence.dropout_ensemble(trained.test_set, [1], masks=1, seed=seed).scores for seed in (0, 1))
    assert one.shape == (1, N)
    assert not torch.allclose(one, two)
    with pytest.raises(ValueError, match="calls no dropout"):
        trained.influence.dropout_ensemble(trained.test_set)


# ---------------------------------------------------------------------------------------- what is taken, in which form


class Module(pl.LightningModule):
    """As a user of Lightning has it."""

    def __init__(self, net: nn.Module, loss: Callable[..., Tensor]) -> None:
        super().__init__()
        self.net, self.loss = net, loss

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return loss


WEIGHTS = torch.tensor([1.0, 5.0, 0.2], dtype=torch.float64)


class TestLosses:
    @pytest.mark.parametrize(
        "loss",
        [
            nn.CrossEntropyLoss(weight=WEIGHTS),
            partial(F.cross_entropy, weight=WEIGHTS),
            lambda model, batch: F.cross_entropy(model(batch[0]), batch[1], weight=WEIGHTS),
        ],
        ids=["module", "partial", "function"],
    )
    def test_every_form_of_a_weighted_loss(self, trained: Trained, loss: Any) -> None:
        # Every example by itself, and the mean over the sum of weights: what a batch divides by is another matter.
        x, y = trained.train_set.tensors
        net = copy.deepcopy(trained.net)
        terms = N * F.cross_entropy(net(x), y, weight=WEIGHTS, reduction="none") / WEIGHTS[y].sum()
        rows = [torch.autograd.grad(t, list(net.parameters()), retain_graph=True) for t in terms]
        own = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
        influence = Influence(trained.net, loss, trained.train_set, batch_size=4).fit("identity")
        # Over all batches: the shares of the classes in a batch of four average out only nearly.
        found = influence.self_influence() / own.square().sum(1)
        torch.testing.assert_close(found, found.mean().expand(N), rtol=1e-9, atol=0)
        assert 0.5 < float(found.mean()) < 2

    def test_a_loss_at_several_places_of_a_script_is_one(self, trained: Trained) -> None:
        influence = Influence(trained.net, F.cross_entropy, trained.train_set, batch_size=4)
        first = influence.fit("identity").self_influence(0)
        close(influence.fit("identity").pairs(trained.train_set, 0).scores[:, 0], first)

    @pytest.mark.parametrize("reduction", ["sum", "none"])
    def test_other_reductions(self, trained: Trained, reduction: str) -> None:
        influence = Influence(trained.net, nn.CrossEntropyLoss(reduction=reduction), trained.train_set)
        close(
            influence.fit("ggn", damping=DAMPING).self_influence(),
            trained.influence.fit("ggn", damping=DAMPING).self_influence(),
        )

    def test_training_step(self, trained: Trained, fitted: Influence) -> None:
        module = Module(trained.net, F.cross_entropy)
        own = Influence(module, None, trained.train_set).fit("ggn", damping=DAMPING)
        close(own.self_influence(), fitted.self_influence())

    def test_unknown_loss_is_said(self, trained: Trained) -> None:
        def hinge(model: Any, batch: Any) -> Tensor:
            right = model(batch[0]).gather(1, batch[1][:, None])
            return (1 + model(batch[0]) - right).clamp(min=0).sum(1)

        influence = Influence(trained.net, hinge, trained.train_set).fit("kfac")
        assert influence.curvature.labels == ("true",)
        assert any("for the whole loss: the Fisher is empirical" in note for note in influence.notes)


class TestData:
    @pytest.mark.parametrize("indices", [3, [3], (3,), torch.tensor(3), torch.tensor([3]), np.int64(3), np.array([3])])
    def test_one_index_or_many(self, trained: Trained, fitted: Influence, indices: Any) -> None:
        assert fitted.top(trained.test_set, indices, 1).queries.tolist() == [3]

    def test_loader(self, trained: Trained, fitted: Influence) -> None:
        def swapped(examples: list[Any]) -> dict[str, Tensor]:
            return {"y": torch.stack([y for _, y in examples]), "x": torch.stack([x for x, _ in examples])}

        def loss(model: Any, batch: Any) -> Tensor:
            return F.cross_entropy(model(batch["x"]), batch["y"])

        loader, asked = (
            DataLoader(data, batch_size=size, shuffle=True, collate_fn=swapped)
            for data, size in ((trained.train_set, 7), (trained.test_set, 4))
        )
        influence = Influence(trained.net, loss, loader).fit("ggn", damping=DAMPING)
        assert influence.training.source.batch_size == 7
        close(influence.pairs(asked, 2).scores, fitted.pairs(trained.test_set, 2).scores)

    def test_loader_that_draws_some_of_the_examples(self, trained: Trained) -> None:
        loader = DataLoader(trained.train_set, batch_size=4, sampler=SubsetRandomSampler([9, 4, 2, 11, 0]))
        influence = Influence(trained.net, F.cross_entropy, loader)
        assert influence.examples == [0, 2, 4, 9, 11]
        assert influence.fit("kfac").curvature.examples == (5,)
        with pytest.raises(ValueError, match=r"training set has no example \[1\]; expected indices among 5 from 0"):
            influence.fit("identity").remove(1)
        alone = Influence(trained.net, F.cross_entropy, trained.train_set, examples=[9, 4, 2, 11, 0])
        assert alone.examples == influence.examples

    def test_model_data_and_streams_are_left_alone(self, trained: Trained) -> None:
        net = copy.deepcopy(trained.net)
        net.insert(1, nn.BatchNorm1d(4).double())
        net.train()
        net[0].weight.grad = torch.ones_like(net[0].weight)
        before, state = copy.deepcopy(net.state_dict()), torch.get_rng_state()
        influence = Influence(net, F.cross_entropy, DataLoader(trained.train_set, shuffle=True, batch_size=4)).fit()
        influence.top(trained.test_set, [0, 1])
        assert net.training
        assert torch.equal(torch.get_rng_state(), state)
        assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
        assert torch.equal(net[0].weight.grad, torch.ones_like(net[0].weight))
        # Scores are those of evaluation mode.
        close(
            influence.self_influence(), Influence(net.eval(), F.cross_entropy, trained.train_set).fit().self_influence()
        )

    def test_fit_returns_another_one(self, trained: Trained) -> None:
        influence = trained.influence
        one, two = influence.fit("identity"), influence.fit("kfac")
        assert [one.curvature.name, two.curvature.name] == ["identity", "kfac"]
        assert one.training is two.training, "calibrated once"
        with pytest.raises(RuntimeError, match="there is no curvature yet"):
            _ = influence.curvature


# ------------------------------------------------------------------------------------------------- what a user is told


def test_a_test_set_is_collated_as_the_training_data(trained: Trained) -> None:
    """A list of texts of several lengths can't be without the collate function of the training loader."""

    def collate(examples: list[Any]) -> list[Tensor]:
        return [torch.stack([one["x"] for one in examples]), torch.tensor([one["y"] for one in examples])]

    train, test = (
        [{"x": x, "y": int(y), "text": [0] * int(y)} for x, y in zip(*data.tensors, strict=True)]
        for data in (trained.train_set, trained.test_set)
    )
    loader: DataLoader[Any] = DataLoader(train, batch_size=4, collate_fn=collate)  # type: ignore[arg-type]
    influence = Influence(trained.net, F.cross_entropy, loader).fit("identity")
    expected = trained.influence.fit("identity").pairs(trained.test_set).scores
    close(influence.pairs(test).scores, expected)


def test_lists_are_looked_up_not_walked_through(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a list of 1,000 examples holds was compared before and after every batch: 4 s instead of 0.2 s."""
    found = trained.influence.fit("identity").pairs(trained.test_set, 0).scores
    listed = [(x, int(y)) for x, y in zip(*trained.train_set.tensors, strict=True)]
    visit, visited = Walk._visit, []

    def noted(self: Walk, path: str, value: Any, expected: bool) -> Iterator[Any]:
        visited.append(value)
        return visit(self, path, value, expected)

    monkeypatch.setattr(Walk, "_visit", noted)
    influence = Influence(trained.net, F.cross_entropy, listed)
    close(influence.fit("identity").pairs(trained.test_set, 0).scores, found)
    assert visited
    assert not any(value is listed for value in visited)


def test_notes_on_what_has_no_score(trained: Trained) -> None:
    inputs, labels = (part.clone() for part in trained.test_set.tensors)
    inputs[[1, 3]] = torch.nan
    fitted = trained.influence.fit("identity")
    top = fitted.top(TensorDataset(inputs, labels), [0, 1, 3], k=2)
    for found in (top, fitted.pairs(TensorDataset(inputs, labels), [0, 1, 3])):
        assert found.notes == ["queries whose loss or gradients are not finite have no scores: 1, 3"]
    assert "  1: proponents none; opponents none" in repr(top).splitlines()
    assert re.fullmatch(r"  0: proponents \d+ \(\S+\), \d+ \(\S+\); opponents \d+ .*\)", repr(top).splitlines()[1])


@pytest.mark.parametrize("watched", [True, False])
def test_long_passes_show_how_far_they_are(
    trained: Trained, watched: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a screen, once they take two seconds."""
    monkeypatch.setattr(progress, "_DELAY", 0)
    monkeypatch.setattr("sys.stderr.isatty", lambda: watched, raising=False)
    trained.influence.fit("identity").pairs(trained.test_set)
    assert ("0/20 [" in capsys.readouterr().err) == watched
    monkeypatch.setattr(progress, "_DELAY", 60)
    trained.influence.fit("identity").pairs(trained.test_set)
    assert not capsys.readouterr().err


class Last(nn.Module):
    def forward(self, value: Any) -> Tensor:
        last: Tensor = value[1][0][-1]
        return last


class Pack(nn.Module):
    """Rows of which nothing tells in which order the examples are."""

    def forward(self, value: Tensor) -> Any:
        return nn.utils.rnn.pack_padded_sequence(value, torch.full((len(value),), value.shape[1]), batch_first=True)


def test_notes_on_parameters_that_are_left_out(trained: Trained) -> None:
    net = nn.Sequential(Pack(), nn.LSTM(3, 4, batch_first=True), Last(), nn.Linear(4, 2)).double()
    data = TensorDataset(torch.randn(8, 5, 3).double(), torch.arange(8) % 2)
    (note,) = Influence(net, F.cross_entropy, data).notes
    assert re.match(
        r"scores leave out 4 trainable parameters, 1.weight_ih_l0 \(used by lstm.* and 1 more; `uncov", note
    )
    assert not Influence(net, F.cross_entropy, data, uncovered="exact").notes
    assert not Influence(trained.net, F.cross_entropy, trained.train_set, layers="2").notes  # that was asked for


class Stream(IterableDataset[Any]):
    """Without indices."""

    def __iter__(self) -> Iterator[Any]:
        yield from ()


class TestErrors:
    @pytest.mark.parametrize(
        "use",
        [
            lambda i, data: i.self_influence(),
            lambda i, data: i.top(data, 0),
            lambda i, data: i.pairs(data),
            lambda i, data: i.measure(data),
            lambda i, data: i.scores(validation=data),
            lambda i, data: i.remove(0),
            lambda i, data: i.repair(0, 1),
            lambda i, data: i.damping_sweep(),
        ],
    )
    def test_not_fitted(self, trained: Trained, use: Callable[[Influence, Any], object]) -> None:
        with pytest.raises(RuntimeError, match=r'no curvature yet; `influence = influence.fit\("ekfac"\)`'):
            use(trained.influence, trained.test_set)

    @pytest.mark.parametrize(
        ("loss", "kind", "match"),
        [
            (None, TypeError, r"Sequential has no `training_step` to take the loss from; pass a function \(model"),
            (nn.CrossEntropyLoss, TypeError, "the loss is the class CrossEntropyLoss; expected"),
            ("cross_entropy", TypeError, "the loss is a str; expected"),
            (lambda out, y: F.cross_entropy(out, y), TaskError, r"with \(model, batch\).*`nn.CrossEntropyLoss\(\)`"),
            (lambda model, batch: model(batch[0]), TaskError, "loss"),
            (lambda model, batch: None, TaskError, "returned None instead of a loss"),
            (lambda model, batch: F.cross_entropy(model(batch["x"]), 0), TaskError, "can't be computed on a batch"),
        ],
    )  # fmt: skip
    def test_losses(self, trained: Trained, loss: Any, kind: type[Exception], match: str) -> None:
        with pytest.raises(kind, match=match):
            Influence(trained.net, loss, trained.train_set)

    def test_loss_that_mixes_examples(self, trained: Trained) -> None:
        with pytest.raises(VerificationError, match="depends on the other examples"):
            Influence(trained.net, lambda m, b: m(b[0]).softmax(1).mean(0).square().sum(), trained.train_set)

    def test_batches_of_another_kind(self, trained: Trained) -> None:
        x, y = trained.train_set.tensors
        with pytest.raises(TaskError, match=r"cross_entropy is applied to batches \(inputs, targets\).*a list of 3"):
            Influence(trained.net, F.cross_entropy, TensorDataset(x, y, y))

    @pytest.mark.parametrize(
        ("data", "match"),
        [
            (torch.zeros(3, 5), r"the data are a Tensor; expected a data set .* `TensorDataset\(inputs, targets\)`"),
            ((torch.zeros(3, 5), torch.zeros(3)), "the data are a tuple; expected a data set"),
            ((np.zeros((3, 5)), np.zeros(3)), "the data are a tuple; expected a data set"),
            (Stream(), "Stream is a stream: its examples have no index"),
            (3, "the data are a int; expected a data set"),
            (None, "the data are a NoneType; expected a data set"),
            ({"train": [], "test": []}, "the data are a dict; expected a data set"),
            (TensorDataset, "the data are the class TensorDataset; expected a data set"),
            (TensorDataset(torch.zeros(0, 5), torch.zeros(0)), "TensorDataset is empty"),
            (DataLoader(TensorDataset(torch.zeros(3, 5)), batch_size=None), "batch_size=None"),
        ],
    )
    def test_data(self, trained: Trained, fitted: Influence, data: Any, match: str) -> None:
        with pytest.raises(DataError, match=match):
            Influence(trained.net, F.cross_entropy, data)
        with pytest.raises(DataError, match=match):
            fitted.top(data, 0)

    @pytest.mark.parametrize(
        ("indices", "match"),
        [
            (6, r"the test set has no example \[6\]; expected indices among 6 from 0 to 5"),
            ([0, -1], r"no example \[-1\]"),
            ([], "there is no index of the test set; pass at least one, or None for all"),
            ([True, False], r"indices must be integers, got \[True, False\]; a mask becomes indices"),
            (torch.tensor([0.5]), r"indices must be integers, got \[0.5\]"),
            ("3", r"indices must be integers, got \['3'\]"),
        ],
    )
    def test_indices(self, trained: Trained, fitted: Influence, indices: Any, match: str) -> None:
        with pytest.raises(ValueError, match=match):
            fitted.top(trained.test_set, indices)

    def test_test_set_of_another_kind(self, fitted: Influence) -> None:
        with pytest.raises(QueryError, match="the training task can't be run on them"):
            fitted.top(TensorDataset(torch.zeros(4, 9).double(), torch.zeros(4).long()))

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"curvature": "kfak"}, "curvature='kfak'; expected one of 'ekfac', 'kfac'"),
            ({"fisher": "none"}, "fisher='none'; expected one of 'auto'"),
            ({"curvature": "ggn", "solver": "gmres"}, "solver='gmres'; expected one of 'auto', 'dense', 'cg'"),
            ({"curvature": "hessian", "solver": "nystrom"}, "needs a curvature without negative eigenvalues"),
            ({"damping": -1.0}, "damping=-1.0; expected a number >= 0"),
            ({"factor_examples": 0}, 'factor_examples=0; expected an integer >= 1, or "auto", None'),
            ({"factor_examples": "all"}, "factor_examples='all'; expected an integer >= 1"),
        ],
    )
    def test_fit(self, trained: Trained, options: dict[str, Any], match: str) -> None:
        with pytest.raises(ValueError, match=match):
            trained.influence.fit(**options)

    def test_model_and_layers(self, trained: Trained) -> None:
        with pytest.raises(TypeError, match="the model is a TensorDataset; expected a torch module"):
            Influence(trained.train_set, F.cross_entropy, trained.net)  # type: ignore[arg-type]
        with pytest.raises(LayerError, match="no parameter requires a gradient"):
            Influence(copy.deepcopy(trained.net).requires_grad_(False), F.cross_entropy, trained.train_set)
        with pytest.raises(
            TypeError, match="the model, CrossEntropyLoss, has no parameters; expected the trained model"
        ):
            Influence(nn.CrossEntropyLoss(), trained.net, trained.train_set)
        with pytest.raises(ValueError, match=r"the parameters \['0.weight', .* are on the meta device, without values"):
            Influence(copy.deepcopy(trained.net).to("meta"), F.cross_entropy, trained.train_set)
        wrong: Any
        for wrong in ([0], [trained.net[0]], [], 3):
            with pytest.raises(ValueError, match=r"layers=.*; expected None for everything, or names, glob patterns"):
                Influence(trained.net, F.cross_entropy, trained.train_set, layers=wrong)
        for wrong in (0, -1, 2.5, "8", True):
            with pytest.raises(ValueError, match=r"batch_size=.*; expected an integer >= 1, or None"):
                Influence(trained.net, F.cross_entropy, trained.train_set, batch_size=wrong)
        with pytest.raises(LayerError, match="`layers=` names"):
            Influence(trained.net, F.cross_entropy, trained.train_set, layers=["head"])
        with pytest.raises(ValueError, match="uncovered='skip'; expected one of 'report', 'exact'"):
            Influence(trained.net, F.cross_entropy, trained.train_set, uncovered="skip")  # type: ignore[arg-type]

    def test_damping_that_follows_from_no_training_is_said(self, trained: Trained) -> None:
        notes = trained.influence.fit("ggn").notes
        assert any("no optimizer step was seen" in note for note in notes)

    @pytest.mark.parametrize("k", [0, -1, 2.5, True, None, "3"])
    def test_number_of_proponents(self, fitted: Influence, trained: Trained, k: Any) -> None:
        with pytest.raises(ValueError, match=r"k=.*; expected an integer >= 1"):
            fitted.top(trained.test_set, 0, k)
        assert fitted.top(trained.test_set, 0, np.int64(2)).proponents.shape == (1, 2)  # type: ignore[arg-type]

    def test_history_that_is_none(self, trained: Trained) -> None:
        with pytest.raises(TypeError, match=r"history is a StepSizes; expected `StepSizes.history\(\)`"):
            trained.influence.fit("ggn", history=StepSizes(trained.net))  # type: ignore[arg-type]

    def test_sweep_of_what_has_no_damping(self, trained: Trained) -> None:
        with pytest.raises(ValueError, match="the identity has no damping; fit a curvature that has"):
            trained.influence.fit("identity").damping_sweep()

    def test_checkpoints(self, trained: Trained) -> None:
        first, second = Checkpoint.of(trained.net, 1), Checkpoint.of(trained.net, 2)
        wrong: Any
        for wrong, match in (
            ([], r"there is no checkpoint; pass those .* or a list of `Checkpoint.of\(model"),
            (first, "there is a Checkpoint, not a list of checkpoints"),
            (["last.ckpt"], "a checkpoint is a str; pass those that an audit has kept"),
            ([second, first], r"are of the steps \[2, 1\]; expected those of one run, in the order of training"),
        ):
            with pytest.raises(CheckpointError, match=match):
                trained.influence.along(wrong)
        with pytest.raises(CheckpointError, match=r"step_sizes=0.1; expected the sum of learning rates"):
            Checkpoint.of(trained.net, 1, step_sizes=0.1)  # type: ignore[arg-type]

    def test_step_sizes_that_are_missing(self, trained: Trained) -> None:
        """All of TracIn was zero without a word."""
        along = trained.influence.along([Checkpoint.of(trained.net, 1)])
        for use in (along.self_influence, lambda: along.tracin(trained.test_set)):
            with pytest.raises(CheckpointError, match="none of 1 checkpoints has step sizes"):
                use()

    def test_weights_that_have_changed(self, trained: Trained) -> None:
        net = copy.deepcopy(trained.net)
        influence = Influence(net, F.cross_entropy, trained.train_set).fit("kfac")
        with influence.remove(0).applied(net), pytest.raises(RuntimeError, match="weights have changed since"):
            influence.scores()
        before = influence.self_influence()
        with torch.no_grad():
            net[0].bias[0] += 1e-6
        for use in (influence.self_influence, lambda: influence.top(trained.test_set, 0), lambda: influence.remove(0)):
            with pytest.raises(RuntimeError, match="fit it again, or load the weights that are meant"):
                use()
        assert not torch.equal(influence.fit("kfac").self_influence(), before)

    def test_come_before_a_pass_over_the_data(self, trained: Trained) -> None:
        influence = trained.influence
        with pytest.raises(RuntimeError):
            influence.top(trained.test_set, 0)
        with pytest.raises(ValueError, match="has no example"):
            influence.along([Checkpoint.of(trained.net, 1)]).tracin(trained.test_set, 99)
        assert "training" not in vars(influence)


# ------------------------------------------------------------------------------------------------------------- on disk


class TestDirectory:
    @pytest.mark.parametrize("name", ["ekfac", "kfac", "diagonal", "identity", "block_ggn", "ggn"])
    def test_saved_and_loaded(self, trained: Trained, tmp_path: Path, name: Any) -> None:
        influence = Influence(trained.net, F.cross_entropy, trained.train_set, examples=range(2, N)).fit(name)
        directory = influence.save(tmp_path / "fitted")
        again = Influence.load(directory, trained.net, F.cross_entropy, trained.train_set)
        assert again.examples == influence.examples
        assert again.notes == influence.notes
        assert torch.equal(again.self_influence(), influence.self_influence())
        assert torch.equal(again.pairs(trained.test_set).scores, influence.pairs(trained.test_set).scores)
        assert influence.save(directory).name == "fitted-v1"

    def test_audit_of_a_run(self, tmp_path: Path) -> None:
        module = Classifier()
        audit = InfluenceAudit(dirpath=tmp_path / "influence")
        make_trainer(tmp_path, callbacks=[audit]).fit(module, DataLoader(vectors(), batch_size=4))
        influence = Influence.load(tmp_path / "influence", module, None, vectors(), batch_size=4)
        report = AuditReport.load(tmp_path / "influence")
        np.testing.assert_allclose(influence.self_influence(), report.columns["self_influence"], rtol=1e-5)
        assert influence.along(report.checkpoints()).tracin(vectors(), 0).scores.shape == (1, len(vectors()))

    def test_other_model_layers_or_weights(self, trained: Trained, tmp_path: Path) -> None:
        directory = trained.influence.fit("kfac").save(tmp_path / "fitted")
        load = partial(Influence.load, directory, loss=F.cross_entropy, train_set=trained.train_set)
        with pytest.raises(ValueError, match="the factors are those of .* the covered layers are"):
            load(trained.net, layers="2")
        other = copy.deepcopy(trained.net)
        with torch.no_grad():
            other[2].weight[0, 0] += 1
        with pytest.raises(ValueError, match="was fitted at other weights: load the checkpoint of that training"):
            load(other)
        with pytest.raises(StoreError, match="does not exist"):
            Influence.load(tmp_path / "nowhere", trained.net, F.cross_entropy, trained.train_set)

    def test_other_data(self, trained: Trained, tmp_path: Path) -> None:
        """As far as a few examples tell; what is appended is no other."""
        directory = trained.influence.fit("kfac").save(tmp_path / "fitted")
        (inputs, labels), load = trained.train_set.tensors, partial(Influence.load, directory, trained.net)
        with pytest.raises(ValueError, match="was fitted on other data: pass the training data of then, or fit"):
            load(F.cross_entropy, TensorDataset(inputs + 1, labels))
        more = TensorDataset(torch.cat([inputs, inputs + 1]), torch.cat([labels, labels]))
        assert len(load(F.cross_entropy, more).examples) == N
        assert len(load(F.cross_entropy, list(zip(inputs, labels, strict=True)), examples=range(3)).examples) == 3

    def test_products_are_not_saved(self, trained: Trained, tmp_path: Path) -> None:
        influence = trained.influence.fit("ggn", solver="cg")
        with pytest.raises(ValueError, match=r'nothing of it can be saved: fit it with `solver="dense"`'):
            influence.save(tmp_path / "fitted")
        assert not (tmp_path / "fitted").exists()


def test_everything_that_is_printed_is_short(trained: Trained, fitted: Influence, run: trajectory_cases.Run) -> None:
    ekfac = trained.influence.fit("ekfac", damping=0.5)
    coverage = "100.0% of 39 trainable parameters in 2 layers"
    model = f"Influence(Sequential, 20 training examples, {coverage}; "
    for thing, text in (
        (trained.influence, model + "not fitted)"),
        (ekfac, model + "ekfac of 2 layers with damping 0.5, fitted on 20 examples)"),
        (fitted.curvature, "ggn of 2 layers with damping 0.3, fitted on 20 examples"),
        (trained.influence.coverage, f"Coverage({coverage})"),
        (fitted.pairs(trained.test_set, [0, 1], by_layer=True), "PairwiseScores(2 queries x 20 examples, by 2 layers)"),
        (trained.influence.scores(4), "ExampleScores(1 examples: grad_norm_squared, finite, loss, predicted, label)"),
        (run.trained[0], "Checkpoint(step 4, 4 parameters, stands for 4 steps)"),
    ):
        assert repr(thing) == str(thing) == text
    top = repr(fitted.top(trained.test_set, [2, 4], 5)).splitlines()
    assert top[0] == "TopScores of 2 queries"
    assert re.fullmatch(r"  2: proponents \d+ \(\+\S+\), .*, \.\.\.; opponents \d+ \(-\S+\), .*, \.\.\.", top[1])
    assert len(repr(fitted.top(trained.train_set)).splitlines()) == 12
    for thing, start in (
        (fitted.measure(trained.test_set), "MeasurementScores(20 examples; measured "),
        (fitted.remove(3), "removal of 1 of 20 examples: 4 parameters move by "),
        (along(run, run.trained), "AlongTraining(3 checkpoints, steps 4 to 12)"),
        (trained.influence.chain(), "step "),
        (ekfac.damping_sweep(), "damping "),
    ):
        assert repr(thing).startswith(start)
        assert "tensor(" not in repr(thing)


def test_an_audits_directory_knows_its_data_and_buffers(tmp_path: Path) -> None:
    """Other examples gave other numbers without a word."""
    torch.manual_seed(0)
    model, data = Classifier().double(), vectors(30, dtype=torch.float64)
    model.net = nn.Sequential(nn.BatchNorm1d(data.tensors[0].shape[1], dtype=torch.float64), model.net)
    audit = InfluenceAudit()
    make_trainer(tmp_path, callbacks=[audit]).fit(model, DataLoader(data, batch_size=6))
    assert audit.has_report
    assert audit.report.directory is not None
    back = Influence.load(audit.report.directory, model, None, data)
    np.testing.assert_allclose(back.self_influence(), audit.report.columns["self_influence"], rtol=1e-9)
    with pytest.raises(ValueError, match="was fitted on other data"):
        Influence.load(audit.report.directory, model, None, vectors(30, seed=5, dtype=torch.float64))
    model.net[0].running_mean.add_(5)
    with pytest.raises(ValueError, match="was fitted at other weights"):
        Influence.load(audit.report.directory, model, None, data)


def test_the_decay_of_the_run_is_that_of_removal() -> None:
    """Ridge regression: without the term the step went elsewhere. What is left is of the order of the share removed."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(30, 3, generator=generator).double()
    data, decay = TensorDataset(x, (x.sum(1, keepdim=True) + 0.3)), 0.5
    net = nn.Linear(3, 1, bias=False).double()
    gram = 2 * x.T @ x / 30 + decay * torch.eye(3)
    with torch.no_grad():
        net.weight.copy_(torch.linalg.solve(gram, 2 * x.T @ data.tensors[1] / 30).T)
    sizes = StepSizes(net)
    sizes.record(torch.optim.SGD(net.parameters(), lr=1e6, weight_decay=decay))
    influence = Influence(net, nn.MSELoss(), data).fit("ggn", fisher="exact", damping=decay, history=sizes.history())
    kept = [k for k in range(30) if k != 4]
    own = 2 * x[kept].T @ x[kept] / 29 + decay * torch.eye(3)
    expected = torch.linalg.solve(own, 2 * x[kept].T @ data.tensors[1][kept] / 29).T
    way = torch.linalg.vector_norm(expected - net.weight.detach())
    errors = {}
    for title, settings in {"of the run": {}, "none": {"weight_decay": 0.0}}.items():
        with influence.remove([4], leverage=True, **settings).applied(net):
            errors[title] = float(torch.linalg.vector_norm(net.weight.detach() - expected) / way)
    assert errors["of the run"] < 1 / 29
    assert errors["none"] > 0.1
