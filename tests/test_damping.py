"""Which damping a run gets: rules, the optimizer's history, and what the callback makes of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import reference as ref
import torch
import torch.nn.functional as F
from models import Classifier, Validated, loader, make_trainer, vectors
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from tracing import covered
from which_lightning import MisconfigurationException

from lightning_influence import Influence, InfluenceAudit, TracIn
from lightning_influence.audit.report import AuditReport
from lightning_influence.core import memory
from lightning_influence.curvature import LADDER
from lightning_influence.curvature.damping import choose_damping
from lightning_influence.training.optimizers import preconditioners
from lightning_influence.training.step_sizes import OptimizerHistory, StepSizes

SGD = OptimizerHistory({"0.weight": 8.0, "0.bias": 2.0, "2.weight": 4.0, "2.bias": 4.0}, {"0.weight": 0.5}, (), 10)


def blocks() -> Any:
    return covered(nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2)), torch.randn(4, 3)).blocks


class TestRule:
    def test_a_number_is_taken_as_it_is(self) -> None:
        choice = choose_damping(0.25, "relative", blocks(), SGD)
        assert (choice.absolute, choice.rule, choice.notes) == (0.25, "absolute", ())

    def test_trainer_is_the_mean_of_one_over_the_step_sizes_plus_weight_decay(self) -> None:
        choice = choose_damping("trainer", "relative", blocks(), SGD)
        first = (6 / 8.0 + 2 / 2.0) / 8
        assert choice.absolute == pytest.approx({"0": first + 0.5 * 6 / 8, "2": 0.25})
        assert choice.rule == "trainer"
        assert choice.source == "1 / sum of the step sizes of 10 steps, plus the L2 weight decay"

    @pytest.mark.parametrize("default", ["relative", "trainer"])
    def test_auto_is_the_default_of_the_curvature(self, default: Any) -> None:
        assert choose_damping("auto", default, blocks(), SGD).rule == default

    def test_kronecker_blocks_are_bounded_and_the_exact_ones_follow_the_trainer(self) -> None:
        assert {name: rung.damping for name, rung in LADDER.items()} == {
            **dict.fromkeys(["identity", "diagonal"], "relative"),
            **dict.fromkeys(["kfac", "ekfac"], "bounded"),
            **dict.fromkeys(["block_ggn", "ggn", "hessian"], "trainer"),
        }

    def test_relative_leaves_the_scale_to_the_curvature(self) -> None:
        choice = choose_damping("relative", "trainer", blocks(), SGD)
        assert (choice.absolute, choice.rule, choice.notes) == (None, "relative", ())

    def test_a_layer_that_never_moved_gets_the_mean_of_the_others(self) -> None:
        history = OptimizerHistory({"0.weight": 4.0, "0.bias": 4.0}, {}, (), 10)
        assert choose_damping("trainer", "relative", blocks(), history).absolute == {"0": 0.25, "2": 0.25}

    def test_a_bias_that_never_moved_has_no_part_in_its_layer(self) -> None:
        history = OptimizerHistory({"0.weight": 4.0, "2.weight": 2.0, "2.bias": 2.0}, {}, (), 10)
        assert choose_damping("trainer", "relative", blocks(), history).absolute == {"0": 0.25, "2": 0.5}

    @pytest.mark.parametrize(
        ("history", "reason"),
        [
            (None, "no optimizer step was seen"),
            (OptimizerHistory({}, {}, (), 0), "no optimizer step was seen"),
            (
                OptimizerHistory({"0.weight": 1.0}, {}, ("LARS",), 5),
                "it is not known what LARS multiplied the gradients of 0.weight with",
            ),
            (OptimizerHistory({"0.weight": 1.0}, {}, ("Adam",), 5, {"0.weight": 0.0}), "no layer was moved"),
        ],
    )
    def test_without_known_steps_it_is_relative_and_says_so(self, history: Any, reason: str) -> None:
        choice = choose_damping("trainer", "relative", blocks(), history)
        assert (choice.absolute, choice.rule) == (None, "relative")
        assert reason in choice.notes[0]

    @pytest.mark.parametrize("wrong", [-1.0, math.nan, math.inf, True, "large"])
    def test_anything_else_is_refused(self, wrong: Any) -> None:
        with pytest.raises(ValueError, match='expected a number >= 0, "relative", "trainer" or "auto"'):
            choose_damping(wrong, "relative", blocks(), SGD)


def test_steps_of_other_layers_tell_nothing_of_these() -> None:
    """They were divided by none."""
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)).double()
    sizes, optimizer = StepSizes(net), torch.optim.SGD(net[1].parameters(), lr=0.1)
    data = TensorDataset(torch.randn(12, 3).double(), torch.arange(12) % 2)
    sizes.record(optimizer)
    influence = Influence(net, nn.CrossEntropyLoss(), data, layers=["0"])
    fitted = influence.fit(damping="trainer", history=sizes.history())
    assert any("no optimizer step was seen" in note for note in fitted.notes)


@pytest.mark.parametrize("wrong", [10**400, np.array([0.1, 0.2]), True, "big"])
def test_dampings_that_are_none(wrong: Any) -> None:
    with pytest.raises(ValueError, match="expected a number >= 0"):
        choose_damping(wrong, "relative", {}, None)


class TestHistory:
    def stepped(self, make: Callable[[list[nn.Parameter]], Any], steps: int = 3) -> OptimizerHistory:
        layer = nn.Linear(2, 1)
        optimizer, sizes = make(list(layer.parameters())), StepSizes(layer)
        for _ in range(steps):
            sizes.record(optimizer)
        sizes.take()
        return sizes.history()

    def test_totals_outlive_the_checkpoints(self) -> None:
        history = self.stepped(lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.75))
        assert history.step_sizes == pytest.approx({"weight": 6.0, "bias": 6.0})
        assert (history.steps, history.adaptive) == (3, ())

    def test_adam_moves_by_what_its_state_says(self) -> None:
        """Two checkpoints and a rest: 4, 2 and 1 steps; entries that no step has moved have no part in the mean."""
        layer = nn.Linear(2, 1)
        weight, bias = layer.weight, layer.bias
        optimizer = torch.optim.Adam(layer.parameters(), lr=0.5, betas=(0.9, 0.0), eps=0.0)
        sizes = StepSizes(layer)
        for steps, squares in ((4, [[4.0, 16.0]]), (2, [[0.0, 64.0]]), (1, [[1.0, 1.0]])):
            for _ in range(steps):
                sizes.record(optimizer)
            state = {"step": torch.tensor(5.0), "exp_avg": torch.zeros(1, 2)}
            optimizer.state[weight] = {**state, "exp_avg_sq": torch.tensor(squares)}
            optimizer.state[bias] = {**state, "exp_avg_sq": torch.zeros(1)}
            scales = preconditioners([optimizer], layer)
            if steps > 1:
                assert sizes.take(scales) == {"weight": 0.5 * steps, "bias": 0.5 * steps}
        history = sizes.history(scales)
        # The means of 1/P are 3, 8 and 1.
        assert history.moved == pytest.approx({"weight": 2.0 / 3 + 1.0 / 8 + 0.5, "bias": 0.0})
        assert history.step_sizes == {"weight": 3.5, "bias": 3.5}
        again = StepSizes(layer)
        again.load_state_dict(sizes.state_dict())
        assert again.history(scales) == history

    def test_steps_without_a_known_scale_count_as_the_others(self) -> None:
        layer = nn.Linear(2, 1, bias=False)
        optimizer, sizes = torch.optim.Adam(layer.parameters(), lr=1.0), StepSizes(layer)
        sizes.record(optimizer)
        sizes.take()
        assert sizes.history().moved == {}
        for _ in range(3):
            sizes.record(optimizer)
        assert sizes.history({"weight": torch.full((1, 2), 0.5)}).moved == pytest.approx({"weight": 2.0})

    def test_plain_steps_beside_adaptive_ones(self) -> None:
        net, sizes = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1), nn.Linear(1, 1)), None
        sizes = StepSizes(net)
        sizes.record(torch.optim.SGD(net[0].parameters(), lr=0.5))
        sizes.record(torch.optim.Adam(net[1].parameters(), lr=0.5))
        sizes.record(torch.optim.Rprop(net[2].parameters(), lr=0.5))
        scales = {"1.weight": torch.full((1, 2), 4.0)}
        assert sizes.history().moved == {"0.weight": 0.5, "0.bias": 0.5}
        assert sizes.history(scales).moved == {"0.weight": 0.5, "0.bias": 0.5, "1.weight": 2.0, "1.bias": 0.0}

    @pytest.mark.parametrize(
        ("make", "decay", "adaptive"),
        [
            (lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.01), 0.01, ()),
            (lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.01), 0.01, ("Adam",)),
            (lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.01), 0.0, ("AdamW",)),
            (lambda p: torch.optim.NAdam(p, lr=0.1, weight_decay=0.01), 0.01, ("NAdam",)),
            (
                lambda p: torch.optim.NAdam(p, lr=0.1, weight_decay=0.01, decoupled_weight_decay=True),
                0.0,
                ("NAdam",),
            ),
            (lambda p: torch.optim.Rprop(p, lr=0.1), 0.0, ("Rprop",)),
        ],
    )
    def test_only_an_l2_term_is_curvature(self, make: Any, decay: float, adaptive: tuple[str, ...]) -> None:
        history = self.stepped(make)
        assert history.weight_decay["weight"] == decay
        assert history.adaptive == adaptive

    def test_it_survives_a_checkpoint(self) -> None:
        layer = nn.Linear(2, 1)
        first, second = StepSizes(layer), StepSizes(layer)
        optimizer = torch.optim.Adam(layer.parameters(), lr=0.1, weight_decay=0.01)
        first.record(optimizer)
        second.load_state_dict(first.state_dict())
        second.record(optimizer)
        first.record(optimizer)
        assert second.history() == first.history()


# -------------------------------------------------------------------------------------------------- the callback


def fit(audit: InfluenceAudit, directory: Path, model: Any = None) -> AuditReport:
    torch.manual_seed(0)
    trainer = make_trainer(directory, callbacks=[audit])
    trainer.fit(model or Validated(), loader(vectors()), loader(vectors(6, 2)))
    assert audit.has_report
    return audit.report


def sgd(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.5, weight_decay=0.03)


@pytest.mark.parametrize("solver", ["auto", "nystrom"])
def test_ggn_with_the_damping_of_the_run(tmp_path: Path, solver: Any) -> None:
    """22 examples in batches of 5, two epochs: 10 steps of 0.1 / (1 - 0.5), and an L2 term."""
    model = Validated(sgd)
    report = fit(InfluenceAudit(curvature="ggn", solver=solver), tmp_path, model)
    damping = 1 / (10 * 0.2) + 0.03
    described = report.manifest["curvature"]
    assert described["damping_rule"] == "trainer"
    assert described["damping"] == pytest.approx({"net.1": damping, "net.3": damping})

    data, queries = vectors(), vectors(6, 2)
    x, y = data.tensors
    model = model.double()

    def rows(inputs: Tensor, labels: Tensor) -> Tensor:
        task = lambda module, batch: F.cross_entropy(module(batch[0]), batch[1])  # noqa: E731
        batches = [(inputs[n : n + 1].double(), labels[n : n + 1]) for n in range(len(inputs))]
        return ref.flatten_gradients(ref.gradients_alone(model, task, batches))

    matrix = ref.ggn_dense(model, x.double(), "cross_entropy")
    matrix = matrix + damping * torch.eye(len(matrix), dtype=torch.float64)
    g, q = rows(x, y), rows(*queries.tensors).mean(0)
    expected = -(g @ torch.linalg.solve(matrix, q))
    torch.testing.assert_close(torch.from_numpy(report.columns["harm"]), expected, rtol=1e-3, atol=1e-5)
    own = (g * torch.linalg.solve(matrix, g.T).T).sum(1)
    found = torch.from_numpy(report.columns["self_influence"])
    if solver == "auto":
        torch.testing.assert_close(found, own, rtol=1e-4, atol=0)
        assert not [note for note in report.manifest["notes"] if "self_influence" in note]
    else:
        (solve,) = described["solves"]
        assert solve["converged"] == solve["systems"] == 1
        assert solve["residual"] < 1e-4
        assert any("self_influence is that of EK-FAC" in note for note in report.manifest["notes"])


@pytest.mark.parametrize("tracin", [None, TracIn(keep_checkpoints=0), TracIn()])
def test_adam_has_a_trainer_damping_from_its_state(tmp_path: Path, tracin: TracIn | None) -> None:
    """It was 0.1 of the mean eigenvalue, whatever Adam had done, and an LDS of .09 in the place of .26."""
    kept: list[torch.optim.Adam] = []

    def make(module: nn.Module) -> torch.optim.Optimizer:
        # The second moment is that of the epoch's last gradient, at weights that hardly move: P is always the same.
        kept.append(torch.optim.Adam(module.parameters(), lr=1e-9, betas=(0.9, 0.0), weight_decay=0.03))
        return kept[0]

    model = Validated(make)
    report = fit(InfluenceAudit(curvature="ggn", tracin=tracin), tmp_path, model)
    described = report.manifest["curvature"]
    assert described["damping_rule"] == "trainer"
    assert described["damping_from"] == (
        "1 / sum of the step sizes of 10 steps times what Adam multiplied gradients with, plus the L2 weight decay"
    )
    scales = preconditioners(kept, model)
    for layer in ("net.1", "net.3"):
        inverse = torch.cat([(1 / scales[f"{layer}.{part}"]).flatten() for part in ("weight", "bias")])
        assert described["damping"][layer] == pytest.approx(float(inverse.mean()) / (10 * 1e-9) + 0.03, rel=1e-3)
    assert not any("damping" in note for note in report.manifest["notes"])


def test_an_optimizer_that_is_not_understood_has_no_trainer_damping_and_the_report_says_so(tmp_path: Path) -> None:
    model = Validated(lambda module: torch.optim.Rprop(module.parameters(), lr=0.01))
    report = fit(InfluenceAudit(curvature="ggn"), tmp_path, model)
    assert report.manifest["curvature"]["damping_rule"] == "relative"
    assert any("not known what Rprop multiplied the gradients of" in n for n in report.manifest["notes"])
    assert "self_influence" in report.columns


class TestBounded:
    """Only a few examples carry the Fisher of a network that has separated its data."""

    def fitted(self, hard: int, curvature: Any, damping: Any = "auto", examples: int = 40) -> Any:
        """Examples of which all but ``hard`` have a gradient of nothing."""
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(30, 30, bias=False), nn.Tanh(), nn.Linear(30, 2)).double()
        data = TensorDataset(torch.randn(examples, 30).double(), torch.arange(examples) % 2)
        data.tensors[0][hard:] *= 1e-4
        influence = Influence(net, nn.CrossEntropyLoss(), data, layers=["0"])
        fitted = influence.fit(curvature, fisher="exact", factor_examples=None, damping=damping)
        (block,), (damping,) = fitted.curvature.blocks.values(), fitted.curvature.dampings.values()
        return block, damping

    @pytest.mark.parametrize("curvature", ["kfac", "ekfac"])
    def test_no_more_dimensions_than_the_data_span(self, curvature: Any) -> None:
        block, damping = self.fitted(4, curvature)
        lam = block.eigenvalues
        dimensions, before = (float((lam / (lam + value)).sum()) for value in (damping, block.damping()))
        # Four examples at most, with one direction of a softmax over two classes, and as much again.
        assert before > 8 >= dimensions > 2
        assert self.fitted(4, curvature, "relative")[1] == block.damping() < damping

    @pytest.mark.parametrize("curvature", ["kfac", "ekfac", "diagonal"])
    def test_data_that_span_the_block_leave_it_relative(self, curvature: Any) -> None:
        block, damping = self.fitted(600, curvature, examples=600)
        assert damping == block.damping()


def test_an_indefinite_hessian_leaves_the_rest_of_the_audit(tmp_path: Path) -> None:
    report = fit(InfluenceAudit(curvature="hessian", damping=1e-6), tmp_path, Validated(sgd))
    assert report.manifest["status"] == "complete"
    (note,) = [note for note in report.manifest["notes"] if "no self_influence" in note]
    assert "or use the GGN" in note
    assert {"tracin", "el2n", "grad_norm_squared", "rank"} <= set(report.columns)
    assert not {"self_influence", "harm"} & set(report.columns)
    assert "self_influence" not in str(report).split("coverage")[0]


@pytest.mark.parametrize("curvature", LADDER)
def test_every_rung_from_one_argument(tmp_path: Path, curvature: Any) -> None:
    damping: Any = 3.0 if curvature == "hessian" else "auto"
    report = fit(InfluenceAudit(curvature=curvature, damping=damping), tmp_path, Validated(sgd))
    assert (report.columns["self_influence"] > 0).all()
    assert len(set(report.columns["harm"])) == 22
    assert report.manifest["curvature"]["name"] == curvature
    swept = curvature in ("diagonal", "kfac", "ekfac", "block_ggn")
    assert ("damping_sweep" in report.manifest) == swept
    assert ("rank correlation of self_influence" in str(report)) == swept
    if swept:
        assert report.manifest["damping_sweep"]["stability"][2] == pytest.approx(1)
        assert report.manifest["damping_sweep"]["examples"] == 22
        shares = report.manifest["layer_shares"]
        assert sum(shares.values()) == pytest.approx(1)
        assert min(shares.values()) > 0


def test_a_curvature_that_can_not_be_had_is_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Classifier(loss=lambda logits, batch: (logits.softmax(1)[:, 0] - 1).square().mean())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(MisconfigurationException, match="the GGN needs a loss made of known calls"):
        fit(InfluenceAudit(curvature="ggn"), tmp_path, model)
    monkeypatch.setattr("lightning_influence.curvature.registry.available_bytes", lambda device: 1000)
    with pytest.raises(MisconfigurationException, match="curvature='ekfac' needs .* available"):
        fit(InfluenceAudit(), tmp_path, model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"curvature": "newton"}, "curvature='newton'; expected one of"),
        (
            {"solver": "sgd"},
            "solver='sgd'; expected one of 'auto', 'dense', 'cg', 'nystrom', 'pcg', 'woodbury', 'lissa'",
        ),
        ({"damping": 0.0}, '"trainer"'),
        ({"damping": "none"}, '"trainer"'),
    ],
)
def test_wrong_arguments(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InfluenceAudit(**arguments)


# ---------------------------------------------------------------------------------------------------------- memory


class TestMemory:
    def test_this_machine_has_some(self) -> None:
        found = memory.available_bytes(torch.device("cpu"))
        assert found is None or found > 2**20

    def test_an_unknown_amount_is_enough(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "none")
        monkeypatch.setattr(memory, "_CGROUP", tmp_path / "none")
        assert memory.available_bytes(torch.device("cpu")) is None
        assert memory.fits(1e18, torch.device("cpu"))

    def test_the_smaller_of_host_and_container_counts(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    5000 kB\n")
        monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
        monkeypatch.setattr(memory, "_CGROUP", tmp_path)
        (tmp_path / "memory.max").write_text("max\n")
        assert memory.available_bytes(torch.device("cpu")) == 5000 * 1024
        (tmp_path / "memory.max").write_text("4000000\n")
        (tmp_path / "memory.current").write_text("3000000\n")
        (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 500000\n")
        assert memory.available_bytes(torch.device("cpu")) == 1_500_000
        assert not memory.fits(1.6e6, torch.device("cpu"))

    def test_what_the_allocator_of_an_accelerator_has_cached_is_free(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """After training PyTorch holds nearly all of the device, most of it for nothing."""
        told = {"mem_get_info": (1_000, 80_000), "memory_reserved": 70_000, "memory_allocated": 20_000}
        backend = SimpleNamespace(**{name: lambda device, found=found: found for name, found in told.items()})
        monkeypatch.setattr(torch, "get_device_module", lambda device: backend)
        assert memory.available_bytes(torch.device("xpu")) == 51_000
        assert memory.fits(50_000, torch.device("xpu"))
        assert not memory.fits(52_000, torch.device("xpu"))

    def test_an_accelerator_that_tells_nothing_is_named_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch, "get_device_module", lambda device: SimpleNamespace())
        memory._say_unknown.cache_clear()
        with pytest.warns(UserWarning, match="mps does not tell how much memory it has left") as caught:
            unknown = [memory.available_bytes(torch.device("mps")) for _ in range(2)]
        assert (unknown, len(caught)) == ([None, None], 1)
        assert memory.fits(1e18, torch.device("mps"))

    @pytest.mark.parametrize(("size", "text"), [(12, "12 bytes"), (2_000, "2 kB"), (3.4e6, "3.4 MB"), (5e10, "50 GB")])
    def test_sizes_for_readers(self, size: float, text: str) -> None:
        assert memory.readable(size) == text


def test_a_decomposition_that_fails_names_the_layer_and_leaves_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    eigh = torch.linalg.eigh

    def fails_for_the_second(matrix: Tensor) -> Any:
        if matrix.shape[-1] == 7:  # inputs of net.3, its bias included
            raise torch.linalg.LinAlgError("no convergence")
        return eigh(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", fails_for_the_second)
    report = fit(InfluenceAudit(), tmp_path, Validated(sgd))
    (note,) = [note for note in report.manifest["notes"] if "no self_influence" in note]
    assert "the curvature of 'net.3' can't be decomposed: no convergence for 7 rows" in note
    assert 'Leave it out by `layers=`, or use `curvature="diagonal"`' in note
    assert "tracin" in report.columns
