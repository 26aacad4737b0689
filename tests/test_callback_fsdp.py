"""Two processes between which FSDP2 splits the model give the audit of one process that has it whole."""

from __future__ import annotations

import json
import os
import runpy
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import Numbered, Validated, Witness, images, loader, make_trainer, vectors
from own_processes import as_ranks, together
from test_callback_distributed import PER_PROCESS, SIZE, GlobalBatches, report_below
from torch import Tensor, nn
from torch.utils.data import SubsetRandomSampler
from which_lightning import ModelCheckpoint, ModelParallelStrategy, pl

from lightning_influence import AuditReport, InfluenceAudit, Queries
from lightning_influence.callbacks.checkpoint_files import CheckpointFileError

PATIENCE, EPOCHS = 600, 3


class Net(nn.Module):
    """Tied and frozen layers, a norm of the outermost group, a recurrent layer, and a method that is a forward one."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 6)
        self.again, self.once_more = nn.Linear(6, 6), nn.Linear(6, 6)
        self.once_more.weight = self.again.weight
        self.norm = nn.LayerNorm(6)
        self.frozen = nn.Linear(6, 4).requires_grad_(False)
        self.steps = nn.RNN(4, 5, batch_first=True)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.once_more(torch.tanh(self.again(self.first(x))))
        return self.logits(self.frozen(self.norm(x)))

    def logits(self, x: Tensor) -> Tensor:
        return self.head(self.steps(torch.stack([x, x.flip(1)], 1))[1][0])


class Split(Validated):
    """A model that is split where there is something to split it over.

    Args:
        policy: Of mixed precision.
    """

    def __init__(self, optimizer: Callable[[nn.Module], Any] | None = None, **policy: Any) -> None:
        super().__init__(optimizer or (lambda module: torch.optim.SGD(trainable(module), lr=0.5)))
        self.net, self.policy = Net(), policy
        self.double()

    def configure_model(self) -> None:
        split(self, **self.policy)


class Normed(Split):
    """With statistics of its batches."""

    def __init__(self, split: bool = True) -> None:
        super().__init__()
        self.net.norm, self.split = nn.BatchNorm1d(6), split
        self.double()

    def configure_model(self) -> None:
        if self.split:
            super().configure_model()


class SplitWitness(Witness):
    def configure_model(self) -> None:
        split(self)


def split(module: Any, **policy: Any) -> None:
    if module.device_mesh is None or hasattr(module.net, "unshard"):
        return
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    net = module.net
    settings = {"mesh": module.device_mesh["data_parallel"], "mp_policy": MixedPrecisionPolicy(**policy)}
    if isinstance(net, Net):
        fully_shard([net.again, net.once_more], **settings)
        for part in (net.steps, net.head):
            fully_shard(part, **settings)
        register_fsdp_forward_method(net, "logits")
    else:
        for part in net:
            if isinstance(part, (nn.Linear, nn.BatchNorm2d)):
                fully_shard(part, **settings)
    fully_shard(net, **settings)


def trainable(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


@dataclass
class Scenario:
    """One training run."""

    audit: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    optimizer: Callable[[nn.Module], Any] | None = None
    shuffle: bool = False
    resume: bool = False
    one_file: bool = False
    ddp: bool = False
    examples: tuple[int, ...] = ()
    policy: dict[str, Any] = field(default_factory=dict)


SCENARIOS = {
    # Gradients are compared with autograd in this one and in those below; that is the same in all the others.
    "default": Scenario(audit={"verify": True}),
    "adam": Scenario(
        audit={"queries": Queries(count=3, top=4)},
        optimizer=lambda module: torch.optim.AdamW(trainable(module), lr=0.02),
        shuffle=True,
    ),
    "accumulated, clipped": Scenario(
        audit={"curvature": "kfac", "fisher": "empirical"},
        trainer={"accumulate_grad_batches": 2, "gradient_clip_val": 0.5},
    ),
    "products": Scenario(audit={"curvature": "ggn", "tracin": None}),
    "resumed": Scenario(
        audit={"curvature": "identity"},
        optimizer=lambda module: torch.optim.Adam(trainable(module), lr=0.02),
        resume=True,
    ),
    "best": Scenario(audit={"curvature": "identity", "weights": "best"}, one_file=True),
    "few": Scenario(audit={"curvature": "diagonal"}, examples=(3,)),
}
STATES: dict[str, Callable[[], Split]] = {
    "statistics": Normed,
    "halves": lambda: Split(param_dtype=torch.bfloat16),
    "ddp": lambda: Normed(split=False),
}
# What two processes and one do not have in common, as padded batches count twice.
TWICE = {"times_seen", "forgetting", "epochs_wrong"}


def train(scenario: Scenario, devices: int, directory: Path, *, model: Any = None, **audit: Any) -> tuple[Any, Any]:
    data, queries = vectors(SIZE, dtype=torch.float64), vectors(7, 2, dtype=torch.float64)

    def fit(epochs: int, folder: str, ckpt_path: str | None = None) -> tuple[Any, Any]:
        torch.manual_seed(3)
        own = model or Split(scenario.optimizer, **scenario.policy)
        if scenario.examples:
            batches = loader(data, PER_PROCESS, sampler=SubsetRandomSampler(list(scenario.examples)))
        elif devices == 1:
            batches = loader(data, batch_sampler=GlobalBatches(scenario.shuffle))
        elif scenario.shuffle:
            batches = loader(data, PER_PROCESS, shuffle=True)
        else:
            rank = int(os.environ.get("LOCAL_RANK", "0"))
            in_order = torch.utils.data.DistributedSampler(data, devices, rank, shuffle=False)
            batches = loader(data, PER_PROCESS, sampler=in_order)
        keeper = ModelCheckpoint(
            dirpath=directory / folder / "kept", filename="{step}", save_top_k=-1, monitor="val_loss", mode="max"
        )
        strategy: Any = "ddp" if scenario.ddp else "auto"
        if devices > 1 and not scenario.ddp:
            strategy = ModelParallelStrategy(2, 1, save_distributed_checkpoint=not scenario.one_file)
        trainer = make_trainer(
            directory / folder,
            max_epochs=epochs,
            devices=devices,
            strategy=strategy,
            callbacks=[
                InfluenceAudit(**{"tracin": "epoch", "verify": model is not None, **scenario.audit, **audit}),
                keeper,
            ],
            enable_checkpointing=True,
            **scenario.trainer,
        )
        trainer.fit(own, batches, loader(queries, 3), ckpt_path=ckpt_path)
        return trainer, own

    if scenario.resume:
        first, _ = fit(EPOCHS - 1, "first")
        return fit(EPOCHS, "run", str(directory / "first" / "kept" / f"step={first.global_step}.ckpt"))
    return fit(EPOCHS, "run")


def weights(model: nn.Module) -> Tensor:
    """All parameters, as one vector; to be asked for by all processes."""
    whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    return torch.cat([p.detach().flatten() for p in whole])


def witnessed(directory: Path, audited: bool) -> dict[str, Any]:
    """What a network that notes everything has noted, and become, on this process."""
    pl.seed_everything(5, verbose=False)
    model = SplitWitness("adam")
    trainer = make_trainer(
        directory,
        devices=2,
        strategy=ModelParallelStrategy(2, 1),
        callbacks=[InfluenceAudit()] if audited else [],
        max_epochs=3,
    )
    data = Numbered(images(SIZE))
    trainer.fit(model, loader(data, PER_PROCESS, shuffle=True), loader(Numbered(images(7, 2)), 3))
    states = [s for o in trainer.optimizers for s in o.state.values()]
    return {
        "weights": weights(model),
        "buffers": [buffer.clone() for buffer in model.buffers()],
        "states": [v.full_tensor() if hasattr(v, "full_tensor") else v for s in states for v in s.values()],
        "random": torch.rand(4),
        "noted": [model.order, model.inputs, model.epoch_losses, sorted(trainer.logged_metrics)],
        "metrics": [float(value) for value in trainer.logged_metrics.values()],
        "modes": model.modes_in_stack,
        "hooks": {
            name: [len(getattr(m, t)) for t in ("_forward_hooks", "_forward_pre_hooks")]
            for name, m in model.named_modules()
        },
    }


def refusal(directory: Path, model: Any = None, **audit: Any) -> str:
    """What is said of a run that can't be audited."""
    return error_of(train, Scenario(), 2, directory / "refused", model=model or Split(), **audit)


def error_of(function: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """What it raises."""
    try:
        function(*args, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


class HalfSplit(Split):
    def configure_model(self) -> None:
        from torch.distributed.fsdp import fully_shard

        fully_shard(self.net.head, mesh=self.device_mesh["data_parallel"])


def main(directory: Path) -> None:
    """Run everything in this process group."""
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    told: dict[str, Any] = {}
    for name, scenario in SCENARIOS.items():
        _, model = train(scenario, 2, directory / name)
        torch.save(weights(model), directory / name / f"weights{rank}.pt")

    # Each process has statistics of its own; and a step in half precision.
    for name, make in STATES.items():
        torch.manual_seed(3)
        model = make()
        # DDP gives all the buffers of rank zero when it evaluates, so not at the end.
        ddp = {"ddp": True, "trainer": {"check_val_every_n_epoch": 2}} if name == "ddp" else {}
        trainer, _ = train(Scenario(one_file=True, **ddp), 2, directory / name, model=model)
        trainer.save_checkpoint(directory / f"{name}.ckpt")
        told[name] = [float(buffer.double().sum()) for buffer in model.buffers()]
        if name == "statistics":
            told["later"] = error_of(trainer.callbacks[0].influence)
            told["audit"] = error_of(trainer.callbacks[0].audit, model, trainer=trainer)
    seen = {audited: witnessed(directory / f"witness{audited}", audited) for audited in (True, False)}
    told["untouched"] = [name for name in seen[True] if not same(seen[True][name], seen[False][name])]
    told["in flight"] = refusal(directory, tracin="step")
    told["half"] = refusal(directory, model=HalfSplit())
    told["best"] = refusal(directory, weights="best")
    told["record"] = refusal(directory, record=True)
    (directory / f"told{rank}.json").write_text(json.dumps(told))


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return as_ranks(main, tmp_path_factory.mktemp("fsdp"), PATIENCE)


def told_by(directory: Path, rank: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / f"told{rank}.json").read_text())
    return found


def assert_same(there: AuditReport, here: AuditReport, without: set[str] | None = None) -> None:
    assert set(there.columns) == set(here.columns) >= {"loss_mean", "self_influence", "harm", "suspicion"}
    assert there.columns["index"].tolist() == here.columns["index"].tolist()
    for column in sorted(set(there.columns) - (without or set())):
        np.testing.assert_allclose(
            there.columns[column], here.columns[column], rtol=1e-5, atol=1e-7, equal_nan=True, err_msg=column
        )


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENARIOS)
def test_a_split_model_has_the_audit_of_the_whole_one(name: str, two_processes: Path, tmp_path: Path) -> None:
    scenario = SCENARIOS[name]
    there = report_below(two_processes / name)
    _, model = train(scenario, 1, tmp_path)
    here = report_below(tmp_path)
    for rank in range(2):
        trained = torch.load(two_processes / name / f"weights{rank}.pt")
        torch.testing.assert_close(trained, weights(model), rtol=1e-9, atol=1e-11)
    assert there.status == here.status == "complete"
    assert there.manifest["notes"] == here.manifest["notes"]
    assert there.manifest["tracin_steps"] == here.manifest["tracin_steps"]
    if scenario.audit.get("weights") == "best":
        assert there.manifest["audited_weights"]["step"] == here.manifest["audited_weights"]["step"] < 3 * EPOCHS
    # Two processes see a padding example at once: there is no order of its visits to forget in.
    assert_same(there, here, TWICE if scenario.examples or scenario.shuffle else {"forgetting"})
    assert there.columns["index"].tolist() == list(scenario.examples or range(SIZE))
    assert there.candidates.tolist() == here.candidates.tolist()
    assert (there.pairs is None) == (here.pairs is None) == ("queries" not in scenario.audit)
    if there.pairs is not None and here.pairs is not None:
        assert set(there.pairs) == set(here.pairs)
        for column, values in here.pairs.items():
            if values.dtype.kind == "f":
                np.testing.assert_allclose(there.pairs[column], values, rtol=1e-6, err_msg=column)
            else:
                assert there.pairs[column].tolist() == values.tolist(), column


@pytest.mark.slow
@pytest.mark.parametrize("name", STATES)
def test_it_is_the_audit_of_the_checkpoint(name: str, two_processes: Path) -> None:
    """With the buffers of rank zero, in the precision of the shards."""
    there = report_below(two_processes / name)
    audit = InfluenceAudit(dirpath=two_processes / f"{name} again")
    data, queries = vectors(SIZE, dtype=torch.float64), vectors(7, 2, dtype=torch.float64)
    path = two_processes / f"{name}.ckpt"
    here = audit.audit(STATES[name](), loader(data, PER_PROCESS), ckpt_path=path, val_dataloaders=loader(queries, 3))
    assert_same(there, here)
    if name != "halves":
        assert told_by(two_processes)[name] != told_by(two_processes, 1)[name], "it makes no difference whose they are"
    assert audit.influence("kfac").examples


def _run_as_module(_: int, command: list[str]) -> None:
    """What ``python -m NAME ...`` does."""
    option, name, *sys.argv[1:] = command
    assert option == "-m"
    runpy.run_module(name, run_name="__main__", alter_sys=True)


@pytest.mark.slow
def test_a_distributed_checkpoint_is_put_together(two_processes: Path) -> None:
    data, queries = vectors(SIZE, dtype=torch.float64), vectors(7, 2, dtype=torch.float64)
    (path,) = (two_processes / "adam" / "run" / "kept").glob("step=9.ckpt")
    audit = InfluenceAudit(dirpath=two_processes / "put together")
    with pytest.raises(CheckpointFileError, match="a part from each process") as refused:
        audit.audit(Split(), loader(data, PER_PROCESS), ckpt_path=path)
    command = str(refused.value).partition("`python ")[2].partition("`")[0]
    together(_run_as_module, command.split(), processes=1)
    whole = f"{path}.consolidated"
    model = Split(SCENARIOS["adam"].optimizer)
    here = audit.audit(model, loader(data, PER_PROCESS), ckpt_path=whole, val_dataloaders=loader(queries, 3))
    assert_same(report_below(two_processes / "adam"), here)
    # Without the state of its optimizer, TracIn does not know how far the last epoch has moved the weights.
    model = Split(lambda module: torch.optim.AdamW([{"params": [p]} for p in trainable(module)]))
    other = InfluenceAudit(dirpath=two_processes / "others").audit(model, loader(data, PER_PROCESS), ckpt_path=whole)
    assert any("tracin takes the last 3 steps of AdamW for plain ones" in note for note in other.manifest["notes"])


@pytest.mark.slow
@pytest.mark.parametrize("rank", range(2))
def test_training_is_bitwise_the_same(rank: int, two_processes: Path) -> None:
    assert told_by(two_processes, rank)["untouched"] == []


@pytest.mark.slow
@pytest.mark.parametrize("rank", range(2))
def test_what_is_refused(rank: int, two_processes: Path) -> None:
    told = told_by(two_processes, rank)
    assert "MisconfigurationException: TracIn in flight" in told["in flight"]
    assert 'Pass `tracin="epoch"`' in told["in flight"]
    assert "each process has its own net.first.weight" in told["half"]
    assert "can't be replayed: 2 processes" in told["record"]
    assert "save_distributed_checkpoint=False" in told["best"]
    assert "RuntimeError: after training with FSDP2" in told["later"]
    assert "would split the model once more" in told["audit"]
    assert all("ckpt_path=" in told[name] for name in ("later", "audit"))
