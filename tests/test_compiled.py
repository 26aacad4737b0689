"""Steps that ``torch.compile`` has a hand in: compiled as without the audit, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import Classifier, loader, make_trainer, vectors
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.data import TensorDataset
from which_lightning import Callback, MisconfigurationException, pl

from lightning_influence import Checkpoint, Influence, InfluenceAudit, StepSizes


def doubled(x: Tensor) -> Tensor:
    return 2 * x + 0.1 * x.sin()


class Compiles(Classifier):
    """A classifier with dropout of which ``what`` is compiled by ``backend``."""

    def __init__(self, what: str, backend: Any) -> None:
        super().__init__()
        self.what, self.dropout = what, torch.nn.Dropout(0.3)
        self.compiled = torch.compile(doubled, backend=backend) if what == "function" else doubled
        self.local = (lambda: torch.compile(doubled, backend=backend)) if what == "within the step" else None
        if what == "submodule":
            self.dropout = torch.compile(self.dropout, backend=backend)
        if what == "submodule in place":
            self.dropout.compile(backend=backend)
        if what == "method":
            self.whole = torch.compile(self.loss, backend=backend)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.dropout(self(x)), y)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        if self.what == "method":
            return self.whole(x, y)
        function = self.compiled if self.local is None else self.local()
        return F.cross_entropy(self.dropout(function(self(x))), y)


COMPILED = {
    "submodule": "dropout",
    "submodule in place": "dropout",
    "function": "compiled",
    "method": "whole",
    "model": "training_step",
    "within the step": "something that it calls",
}


def compiled_training(
    what: str, directory: Path, audits: list[Callback], backend: str = "eager"
) -> tuple[dict[str, Tensor], int, int]:
    """Return the weights, and how many frames were compiled and graphs broken."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    counter = CompileCounterWithBackend(backend)
    pl.seed_everything(7, verbose=False)
    model = Compiles(what, counter)
    trainer = make_trainer(directory / str(len(audits)), callbacks=list(audits), max_epochs=2)
    trainer.fit(torch.compile(model, backend=counter) if what == "model" else model, loader(vectors(), shuffle=True))
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    return weights, counter.frame_count, sum(torch._dynamo.utils.counters["graph_break"].values())


def assert_same(one: tuple[dict[str, Tensor], int, int], other: tuple[dict[str, Tensor], int, int]) -> None:
    assert all(torch.equal(value, other[0][name]) for name, value in one[0].items())
    assert one[1:] == other[1:]


@pytest.mark.parametrize("what", COMPILED)
def test_a_compiled_step_is_compiled_as_often_and_no_other(what: str, tmp_path: Path) -> None:
    """Watched by a mode, it was compiled anew whenever the watching began or ended."""
    audit = InfluenceAudit(curvature="diagonal")
    without, with_audit = (compiled_training(what, tmp_path, audits) for audits in ([], [audit]))
    assert_same(without, with_audit)
    assert audit.has_report
    assert audit.report.status == "complete"
    assert "loss_mean" in audit.report.columns


def test_a_loss_within_what_is_compiled_leaves_no_dynamics(tmp_path: Path) -> None:
    audit = InfluenceAudit(curvature="diagonal")
    compiled_training("method", tmp_path, [audit], "aot_eager")
    assert audit.has_report
    assert "loss_mean" not in audit.report.columns
    assert any("no known loss call outside of what is compiled" in note for note in audit.report.manifest["notes"])


@pytest.mark.parametrize("what", ["submodule in place", "method", "model", "within the step"])
def test_in_flight_a_compiled_step_is_refused(what: str, tmp_path: Path) -> None:
    """It made 19 graph breaks of 1, and other weights."""
    with pytest.raises(MisconfigurationException, match=rf"is compiled \(.*{COMPILED[what]}.*Pass `tracin=\"epoch\"`"):
        compiled_training(what, tmp_path, [InfluenceAudit(tracin="step")])


def test_what_is_kept_from_compiling_may_be_measured_in_flight(tmp_path: Path) -> None:
    class Disabled(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.function = torch.compiler.disable(doubled)

    audit = InfluenceAudit(tracin="step", curvature="diagonal")
    make_trainer(tmp_path, callbacks=[audit]).fit(Disabled(), loader(vectors()))
    assert audit.has_report
    assert audit.report.status == "complete"


class Half(torch.nn.Module):
    """Two layers, of which the first may be compiled: its parameters have other names then."""

    def __init__(self, compiled: bool) -> None:
        super().__init__()
        self.body = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh()).double()
        self.head = torch.nn.Linear(4, 2).double()
        if compiled:
            self.body = torch.compile(self.body, backend="eager")

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(x))
        return out


def test_names_of_compiled_parts_are_those_of_the_model_without() -> None:
    """SOURCE took no step for them, the trainer damping doubled, others failed or covered nothing of them."""
    found: list[dict[str, Tensor]] = []
    x = torch.randn(24, 3, generator=torch.Generator().manual_seed(0)).double()
    data = TensorDataset(x, (x.sum(1) > 0).long())
    for compiled in (False, True):
        torch.manual_seed(0)
        net = Half(compiled)
        optimizer, sizes, checkpoints = torch.optim.SGD(net.parameters(), lr=0.1), StepSizes(net), []
        for epoch in range(3):
            for _ in range(4):
                optimizer.zero_grad()
                F.cross_entropy(net(x), data.tensors[1]).backward()
                sizes.record(optimizer)
                optimizer.step()
            steps = sizes.steps
            checkpoints.append(Checkpoint.of(net, 4 * epoch + 4, step_sizes=sizes.take(), steps=steps, optimizer="SGD"))
        influence = Influence(net, torch.nn.CrossEntropyLoss(), data)
        along = influence.along(checkpoints)
        products = influence.fit("ggn", solver="cg", history=sizes.history())
        dense = influence.fit("ggn", history=sizes.history())
        with dense.remove([3]).applied(net):
            removed = F.cross_entropy(net(x), data.tensors[1]).detach()
        found.append(
            {
                "tracin": along.tracin(data, [0, 1]).scores,
                "source": along.source(data, [0, 1], factor_examples=None, fisher="empirical").scores,
                "diff_in": along.diff_in(data, [0, 1]).scores,
                "damping": torch.tensor(list(dense.curvature.dampings.values())),
                "cg": products.pairs(data, [0, 1]).scores,
                "dense": dense.pairs(data, [0, 1]).scores,
                "removed": removed,
            }
        )
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected, rtol=1e-6, atol=1e-9, msg=name)
