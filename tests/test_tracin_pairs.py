"""TracIn of pairs: sums over kept checkpoints against the dense reference, and the checkpoints on disk."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import reference as ref
import torch
import torch.nn.functional as F
from models import CLASSES, Classifier, loader, make_trainer, vectors
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_influence import AuditReport, Influence, InfluenceAudit, TracIn, tracin_scores
from lightning_influence.audit.store.store import AuditStore, StoreError
from lightning_influence.data.source import ExampleSource
from lightning_influence.gradients.discover import discover
from lightning_influence.gradients.passes import ExampleGradients
from lightning_influence.scores.examples import score_examples
from lightning_influence.training.checkpoints import Checkpoint, CheckpointError, one_too_many
from lightning_influence.training.optimizers import is_understood, preconditioners
from lightning_influence.training.step_sizes import block_step_sizes

EXACT: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-12}


def net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, groups=2), nn.Tanh(), nn.GroupNorm(2, 4), nn.ConvTranspose2d(4, 3, 2, bias=False),
        nn.Flatten(), nn.Linear(75, 4),
    ).double()  # fmt: skip


def examples(n: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 2, 6, 6, generator=generator, dtype=torch.float64)
    return TensorDataset(x, torch.randint(0, 4, (n,), generator=generator))


def task(module: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1])


def passes(module: nn.Module, data: TensorDataset) -> ExampleGradients:
    source = ExampleSource(data, batch_size=4)
    return ExampleGradients(module, task, source, discover(module, task, source))


def gradients_of(module: nn.Module, data: TensorDataset) -> dict[str, Tensor]:
    return ref.per_example_gradients(module, F.cross_entropy, *data.tensors)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.5),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
    "centered": lambda p: torch.optim.RMSprop(p, lr=0.01, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, lr_decay=0.2),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_what_an_optimizer_multiplies_gradients_with(kind: str) -> None:
    """Measured on torch's own: how far a gradient that stays as it is moves the weights."""
    layer = nn.Linear(3, 2, bias=False).double()
    optimizer = OPTIMIZERS[kind](layer.parameters())
    gradient = torch.tensor([[1.0, -2.0, 0.5], [0.1, 3.0, -1.0]], dtype=torch.float64)
    rate = 0.2 if kind == "sgd" else optimizer.param_groups[0]["lr"]
    if kind == "centered":  # of a gradient that stays, nothing is left to divide by: noise around it
        torch.manual_seed(0)
    for _ in range(40 if kind == "centered" else 200):
        noise = torch.randn_like(gradient) if kind == "centered" else 0
        layer.weight.grad = gradient + noise
        before = layer.weight.detach().clone()
        optimizer.step()
    moved = before * (1 - 0.01 * 0.1 * (kind == "adamw")) - layer.weight.detach()
    found = preconditioners([optimizer], layer).get("weight", torch.ones_like(gradient))
    torch.testing.assert_close(rate * found * layer.weight.grad, moved, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_scores_are_those_of_the_reference(kind: str) -> None:
    """Three checkpoints, with the rates of two parameter groups; the identity map in place of P is off by far."""
    module, data, asked = net(), examples(7, 0), examples(3, 1)
    optimizer = OPTIMIZERS[kind](
        [{"params": [p for p in module.parameters() if p.ndim > 1]},
         {"params": [p for p in module.parameters() if p.ndim == 1], "lr": 0.003}]
    )  # fmt: skip
    kept, expected = [], torch.zeros(3, 7, dtype=torch.float64)
    plain = expected.clone()
    for step in range(1, 4):
        optimizer.zero_grad()
        task(module, data.tensors).backward()
        optimizer.step()
        sizes = {name: 0.1 * step + 0.05 * p.ndim for name, p in module.named_parameters()}
        scales = preconditioners([optimizer], module)
        kept.append(Checkpoint.of(module, step, step_sizes=sizes, steps=1, preconditioner=scales))
        of_examples, of_queries = gradients_of(module, data), gradients_of(module, asked)
        for name, own in of_examples.items():
            scale = scales.get(name, torch.ones(()))
            expected += sizes[name] * (of_queries[name] * scale).flatten(1) @ own.flatten(1).T
            plain += sizes[name] * of_queries[name].flatten(1) @ own.flatten(1).T
    before = copy.deepcopy(module.state_dict())
    scores = tracin_scores(passes(module, data), range(7), passes(module, asked), range(3), kept, by_layer=True)
    torch.testing.assert_close(scores.scores, expected, **EXACT)
    assert scores.parts is not None
    torch.testing.assert_close(torch.stack(list(scores.parts.values())).sum(0), expected, **EXACT)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    if kind != "sgd":
        assert float((plain - expected).norm()) > 0.3 * float(expected.norm())


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_the_diagonal_is_self_influence(kind: str) -> None:
    module, data = net(), examples(6, 0)
    optimizer = OPTIMIZERS[kind](module.parameters())
    task(module, data.tensors).backward()
    optimizer.step()
    sizes, scales = {name: 0.5 for name, _ in module.named_parameters()}, preconditioners([optimizer], module)
    kept = [Checkpoint.of(module, 1, step_sizes=sizes, preconditioner=scales)]
    gradients = passes(module, data)
    scores = tracin_scores(gradients, range(6), gradients, range(6), kept)
    own = score_examples(
        gradients, range(6), step_sizes=block_step_sizes(gradients.coverage.blocks, sizes, module, scales)
    )
    torch.testing.assert_close(scores.scores.diagonal(), own.columns["tracin"], **EXACT)


def test_a_step_lowers_the_loss_of_a_query_by_its_score() -> None:
    """To first order, SGD on one example: half the rate leaves a quarter."""
    data, asked, left_over = examples(1, 0), examples(1, 1), []
    for rate in (2e-4, 1e-4):
        module = net()
        optimizer = torch.optim.SGD(module.parameters(), lr=rate)
        kept = [Checkpoint.of(module, 1, step_sizes=dict.fromkeys(dict(module.named_parameters()), rate))]
        scores = tracin_scores(passes(module, data), [0], passes(module, asked), [0], kept)
        before = float(task(module, asked.tensors))
        task(module, data.tensors).backward()
        optimizer.step()
        lowered = before - float(task(module, asked.tensors))
        assert lowered == pytest.approx(float(scores.scores), rel=0.05)
        left_over.append(abs(lowered - float(scores.scores)))
    assert left_over[1] == pytest.approx(left_over[0] / 4, rel=0.1)


class Stepping(torch.optim.Adam):
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


def test_an_optimizer_that_does_as_it_likes_is_not_understood() -> None:
    parameters = [nn.Parameter(torch.ones(2))]
    assert is_understood(torch.optim.AdamW(parameters))
    assert is_understood(type("Named", (torch.optim.AdamW,), {})(parameters))
    assert not is_understood(Stepping(parameters))
    assert not is_understood(torch.optim.LBFGS(parameters))


# ------------------------------------------------------------------------------------------------ kept checkpoints


def train(path: Path, tracin: TracIn, optimizer: Any = None, epochs: int = 6, **trainer: Any) -> Any:
    torch.manual_seed(2)
    audit = InfluenceAudit(curvature="identity", tracin=tracin, dirpath=path / "audit")
    model = Classifier(optimizer).double()
    made = make_trainer(path, callbacks=[audit], max_epochs=epochs, **trainer)
    resumed = trainer.pop("resumed", None)
    made.fit(model, loader(vectors(dtype=torch.float64), shuffle=True), ckpt_path=resumed)
    assert audit.has_report
    return audit.report, model, made


def adam(module: nn.Module) -> Any:
    return torch.optim.Adam(module.parameters(), lr=0.01)


@pytest.mark.parametrize("mode", ["epoch", "step"])
@pytest.mark.parametrize("optimizer", [None, adam])
def test_a_run_keeps_checkpoints_whose_scores_are_its_tracin(optimizer: Any, mode: Any, tmp_path: Path) -> None:
    report, model, _ = train(tmp_path, TracIn(mode=mode), optimizer, epochs=3)
    report = AuditReport.load(report.directory)
    assert [checkpoint.step for checkpoint in report.checkpoints()] == [5, 10, 15]
    assert [checkpoint.steps for checkpoint in report.checkpoints()[1:]] == [5, 5]
    assert {checkpoint.optimizer for checkpoint in report.checkpoints()} == {"SGD" if optimizer is None else "Adam"}
    gradients = ExampleGradients(
        model, lambda module, batch: F.cross_entropy(module(batch[0]), batch[1]),
        ExampleSource(vectors(dtype=torch.float64), batch_size=5), passes_coverage(model),
    )  # fmt: skip
    scores = tracin_scores(gradients, range(22), gradients, range(22), report.checkpoints())
    if mode == "epoch":
        torch.testing.assert_close(scores.scores.diagonal(), torch.from_numpy(report.columns["tracin"]), **EXACT)
    assert bool((scores.scores.diagonal() > 0).all())


def test_source_follows_the_steps_of_adam_that_a_run_has_kept(tmp_path: Path) -> None:
    """It was refused; with plain steps in their place scores would be others."""
    report, model, _ = train(tmp_path, TracIn(), adam, epochs=3)
    influence = Influence(model, nn.CrossEntropyLoss(), vectors(dtype=torch.float64), batch_size=5)
    kept = report.checkpoints()
    found = influence.along(kept).source(vectors(dtype=torch.float64), [0, 1], segments=2).scores
    plain = [replace(checkpoint, preconditioner={}, optimizer="") for checkpoint in kept]
    other = influence.along(plain).source(vectors(dtype=torch.float64), [0, 1], segments=2).scores
    assert bool(found.isfinite().all())
    assert float(F.cosine_similarity(found.flatten(), other.flatten(), dim=0)) < 0.99
    assert (found - other).norm() > 0.5 * found.norm()


def passes_coverage(model: nn.Module) -> Any:
    source = ExampleSource(vectors(dtype=torch.float64), batch_size=5)
    return discover(model, lambda module, batch: F.cross_entropy(module(batch[0]), batch[1]), source)


def test_a_budget_keeps_a_spread_of_checkpoints_that_stand_for_all_steps(tmp_path: Path) -> None:
    report, _, _ = train(tmp_path, TracIn(keep_checkpoints=4), epochs=16)
    kept = list(report.checkpoints())
    steps = [checkpoint.step for checkpoint in kept]
    assert len(steps) == 4
    assert steps[-1] == 80
    gaps = [after - before for before, after in zip([0, *steps], steps, strict=False)]
    assert max(gaps) <= 2 * min(gaps)
    assert sum(checkpoint.steps for checkpoint in kept) == 80
    for name in ("net.1.weight", "net.3.bias"):
        assert sum(checkpoint.step_sizes[name] for checkpoint in kept) == pytest.approx(80 * 0.1)


def test_a_budget_of_bytes(tmp_path: Path) -> None:
    one = Checkpoint.of(Classifier().double(), 1).bytes
    report, _, _ = train(tmp_path / "some", TracIn(keep_bytes=3 * one + 4000), epochs=6)
    files = list((tmp_path / "some" / "audit" / "checkpoints").iterdir())
    assert sum(file.stat().st_size for file in files) <= 3 * one + 4000
    assert 1 <= len(report.checkpoints()) < 6
    report, _, _ = train(tmp_path / "none", TracIn(keep_bytes=one - 1), epochs=2)
    assert not report.checkpoints()
    assert [note for note in report.manifest["notes"] if "no checkpoints were kept" in note]
    report, _, _ = train(tmp_path / "unwanted", TracIn(keep_checkpoints=0), epochs=2)
    assert not (tmp_path / "unwanted" / "audit" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("steps", "place"), [([5, 10], 0), ([5, 10, 15], 0), ([10, 15, 20], 1), ([10, 20, 30, 35], 2), ([1, 100], 0)]
)
def test_the_closest_neighbours_lose_what_is_between_them(steps: list[int], place: int) -> None:
    assert one_too_many(steps) == place


def stored(path: Path, count: int = 2) -> AuditStore:
    store = AuditStore.create(path)
    for step in range(1, count + 1):
        store.checkpoints().write(
            Checkpoint.of(net(), 10 * step, step_sizes={"0.weight": 0.5}, steps=10, optimizer="SGD")
        )
    return store


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    scales = {"0.weight": torch.rand(3, 2)}
    sizes = {"0.weight": 0.1 + 0.2, "0.bias": 1e-300}
    written = Checkpoint.of(module, 7, step_sizes=sizes, steps=3, preconditioner=scales, optimizer="Adam")
    store = AuditStore.create(tmp_path / "audit")
    store.checkpoints().write(written)
    read = store.checkpoints().read(7)
    assert (read.step, read.steps, read.step_sizes, read.optimizer) == (7, 3, sizes, "Adam")
    for part in ("parameters", "buffers", "preconditioner"):
        one, other = getattr(written, part), getattr(read, part)
        assert one.keys() == other.keys()
        assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_what_a_killed_writer_has_left_counts_once(tmp_path: Path) -> None:
    """The later one has taken over the steps of the first, whose file is still there."""
    store = stored(tmp_path / "audit", 3)
    store.checkpoints().write(store.checkpoints().read(20).standing_for(store.checkpoints().read(10)))
    assert store.checkpoints().steps() == [10, 20, 30]
    assert [(c.step, c.steps, c.step_sizes["0.weight"]) for c in store.checkpoints()] == [(20, 20, 1.0), (30, 10, 0.5)]


def test_files_that_can_not_be_read(tmp_path: Path) -> None:
    store = stored(tmp_path / "audit")
    with pytest.raises(StoreError, match=r"No checkpoint of step 15 .* stored are \[10, 20\]"):
        store.checkpoints().read(15)
    (tmp_path / "audit" / "checkpoints" / "step-00000010.safetensors").write_bytes(b"nothing")
    with pytest.raises(StoreError, match=r"step-00000010.safetensors cannot be read"):
        store.checkpoints().read(10)
    store.write_factors("layer", {"a": torch.ones(1)})
    (tmp_path / "audit" / "factors" / "layer.safetensors").rename(
        tmp_path / "audit" / "checkpoints" / "step-00000020.safetensors"
    )
    with pytest.raises(StoreError, match=r"it holds no checkpoint"):
        store.checkpoints().read(20)
    with pytest.raises(StoreError, match="not on disk"):
        AuditReport({}).checkpoints()


def test_checkpoints_of_something_else_are_refused() -> None:
    module, data = net(), examples(3, 0)
    gradients = passes(module, data)
    of_sgd, of_adam = Checkpoint.of(module, 1, optimizer="SGD"), Checkpoint.of(module, 2, optimizer="Adam")
    for checkpoints, message in (
        ([], r"there is no checkpoint; pass those .*keep_checkpoints"),
        ([of_sgd, of_adam], r"different optimizers \(step 1 with SGD, step 2 with Adam\)"),
        ([of_sgd, of_sgd], r"of the steps \[1, 1\]; expected those of one run, in the order of training, each once"),
        ([Checkpoint.of(nn.Linear(CLASSES, 2), 1)], "belongs to another model"),
    ):
        with pytest.raises(CheckpointError, match=message):
            tracin_scores(gradients, range(3), gradients, range(3), checkpoints)


def test_an_unknown_optimizer_counts_as_plain_steps_and_is_named(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="not known how Stepping turns gradients into steps") as warned:
        report, _, _ = train(tmp_path, TracIn(), lambda m: Stepping(m.parameters(), lr=0.01), epochs=2)
    assert len([w for w in warned if "Stepping" in str(w.message)]) == 1
    assert [note for note in report.manifest["notes"] if "Stepping" in note]
    assert not report.checkpoints()[0].preconditioner
