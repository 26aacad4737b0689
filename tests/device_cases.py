"""What is run on the pretended device and on the CPU, in a process of its own, which never gets rid of that device.

Every case is a function of a device that returns arrays by name.
"""

from __future__ import annotations

import json
import logging
import tempfile
import traceback
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pretend_device
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from which_lightning import PACKAGE, Accelerator, SingleDeviceStrategy, pl

from lightning_influence import Influence, InfluenceAudit, Margin, Queries, TracIn, tracin_scores
from lightning_influence.audit.unlearning import Unlearner
from lightning_influence.core import precision
from lightning_influence.curvature import FactorExamples, fit
from lightning_influence.curvature.chain import curvature_chain
from lightning_influence.curvature.curvature import BlockCurvature
from lightning_influence.curvature.products.hessian import HessianProduct
from lightning_influence.curvature.solve.cg import cg
from lightning_influence.curvature.solve.lissa import lissa
from lightning_influence.curvature.solve.spectrum import smallest_eigenvalue
from lightning_influence.curvature.sweep import damping_sweep
from lightning_influence.data.source import ExampleSource
from lightning_influence.gradients.discover import discover
from lightning_influence.gradients.passes import ExampleGradients
from lightning_influence.scores.along.diff_in import diff_in_scores
from lightning_influence.scores.along.dropout_masks import ip_ensemble
from lightning_influence.scores.along.source import source_scores
from lightning_influence.scores.along.z0 import z0_scores
from lightning_influence.scores.examples import score_examples
from lightning_influence.scores.measurements import AdversarialLoss, DemographicParityGap, measurement_scores
from lightning_influence.scores.pairs import pairwise_scores, top_scores
from lightning_influence.training import optimizers
from lightning_influence.training.checkpoints import Checkpoint
from lightning_influence.training.flight import pace

Case = Callable[[torch.device], dict[str, Any]]
CURVATURES = ("identity", "diagonal", "kfac", "ekfac", "block_ggn", "ggn", "hessian")
BLOCKWISE = CURVATURES[:5]


class PretendAccelerator(Accelerator):
    """What Lightning asks of an accelerator."""

    def setup_device(self, device: torch.device) -> None:
        pass

    def teardown(self) -> None:
        pass

    def get_device_stats(self, device: Any) -> dict[str, Any]:
        return {}

    @staticmethod
    def parse_devices(devices: Any) -> Any:
        return devices

    @staticmethod
    def get_parallel_devices(devices: Any) -> Any:
        return [pretend_device.DEVICE]

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def name() -> str:
        return pretend_device.NAME


class Model(pl.LightningModule):
    """A network with a loss function, trained by an optimizer."""

    def __init__(self, net: nn.Module, loss: Callable[..., Tensor], optimizer: Callable[..., Any]) -> None:
        super().__init__()
        self.net, self.loss, self.optimizer = net, loss, optimizer
        self.register_buffer("weight", torch.tensor([0.5, 1.0, 2.0]))

    def training_step(self, batch: Any, index: int) -> Tensor:
        self.seen = batch[0].device
        return self.loss(self, *batch)

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("loss", self.loss(self, *batch))

    def configure_optimizers(self) -> Any:
        return self.optimizer(self.parameters())


class Transformer(nn.Module):
    """Tokens in, the next ones out."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 8)
        self.position = nn.Parameter(torch.randn(4, 8) / 4)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 7)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.position
        result: Tensor = self.head(self.norm(x + self.attention(x, x, x, need_weights=False)[0]))
        return result


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Dropout(0.2), nn.Linear(6, 3))


def cnn() -> nn.Module:
    pooled = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), *pooled)


def data(*shape: int, count: int = 16, seed: int = 1) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn((count, *shape), generator=generator)
    return TensorDataset(inputs, torch.randint(0, 3, (count,), generator=generator))


def texts() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    inputs, targets = (torch.randint(0, 7, (12, 4), generator=generator) for _ in range(2))
    targets[::3, 2:] = -100
    return TensorDataset(inputs, targets)


def entropy(model: Model, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model.net(x), y)


def weighted(model: Model, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model.net(x), y, weight=model.weight, label_smoothing=0.1)


def of_tokens(model: Model, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model.net(x).flatten(0, 1), y.flatten())


def of_kept_tokens(model: Model, x: Tensor, y: Tensor) -> Tensor:
    kept = y >= 0
    return F.cross_entropy(model.net(x)[kept], y[kept])


def binary(model: Model, x: Tensor, y: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(model.net(x)[:, 0], (y > 0).float())


def absolute(model: Model, x: Tensor, y: Tensor) -> Tensor:
    return F.l1_loss(model.net(x)[:, 0], y.float())


def gaussian(model: Model, x: Tensor, y: Tensor) -> Tensor:
    out = model.net(x)
    return F.gaussian_nll_loss(out[:, :2], y.unsqueeze(1).float().expand(-1, 2), F.softplus(out[:, 2:]) + 0.1)


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.01)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def audited(
    net: Callable[[], nn.Module] = mlp,
    loss: Callable[..., Tensor] = entropy,
    examples: Dataset[Any] | None = None,
    optimizer: Callable[..., Any] = sgd,
    **options: Any,
) -> Case:
    """Return a case that trains with the audit and returns the columns, and the scores of queries."""

    def case(device: torch.device) -> dict[str, Any]:
        torch.manual_seed(0)
        own = data(5) if examples is None else examples
        model, audit = Model(net(), loss, optimizer), InfluenceAudit(**{"verify": False, **options})
        where: dict[str, Any] = {"accelerator": "cpu"}
        if device.type != "cpu":
            accelerator = PretendAccelerator()
            where = {"strategy": SingleDeviceStrategy(device=device, accelerator=accelerator)}
        with tempfile.TemporaryDirectory() as root:
            trainer = pl.Trainer(
                max_epochs=2,
                default_root_dir=root,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                callbacks=[audit],
                **where,
            )
            shuffled = DataLoader(own, batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(3))
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                trainer.fit(model, shuffled, DataLoader(own, batch_size=8))
        if not audit.has_report:
            raise RuntimeError("\n".join(str(warning.message) for warning in caught))
        assert model.seen == device
        kept = {name: value.tolist() for name, value in audit.report.columns.items()}
        failed = [note for note in audit.report.manifest["notes"] if "failed" in note or "no self_influence" in note]
        assert not failed, failed
        if audit.report.pairs is not None:
            kept |= {
                f"pairs/{n}": [float(v) for v in values] for n, values in audit.report.pairs.items() if n == "score"
            }
        return kept

    return case


def passes(device: torch.device, net: Callable[[], nn.Module] = mlp, batch_size: int = 8) -> Any:
    torch.manual_seed(0)
    module = net().to(device)
    source = ExampleSource(data(5), batch_size=batch_size)

    def task(module: Any, batch: Any) -> Tensor:
        return F.cross_entropy(module(batch[0]), batch[1])

    return ExampleGradients(module, task, source, discover(module, task, source))


EVERY = FactorExamples(16, 16)


def solved(name: str, **options: Any) -> Case:
    """Return a case that scores pairs by one curvature."""

    def case(device: torch.device) -> dict[str, Any]:
        own = passes(device)
        curvature = fit(own, name, range(16), examples=EVERY, labels=("sampled", "sampled"), **options)
        found = pairwise_scores(own, range(16), curvature, own, [0, 3], normalise="cosine")
        best = top_scores(own, range(16), curvature, own, [0, 3], 3)
        scores = score_examples(own, range(16), curvature=curvature, features=True)
        kept = {"pairs": found.scores, "best": best.proponent_scores, **scores.columns}
        if isinstance(curvature, BlockCurvature) and name != "identity":
            kept["sweep"] = damping_sweep(own, range(16), curvature).self_influence
        if name in ("ekfac", "ggn"):
            leverage = name == "ggn"
            kept |= Unlearner(own, curvature, range(16)).newton_removal([1, 2], leverage=leverage).changes
        return kept

    return case


def solvers(device: torch.device) -> dict[str, Any]:
    product = HessianProduct(passes(device, lambda: nn.Linear(5, 3)), range(16), batch_size=16)
    g = torch.randn(2, product.flat.size, generator=torch.Generator().manual_seed(0)).to(device)
    smallest = smallest_eigenvalue(product, g, max_steps=5).value
    kept = {"cg": cg(product, g, 1.0).require(), "dense": product.to_dense()}
    kept["lissa"] = lissa(product.random_batches(8), g, 5.0, matvec=product, steps=6, tolerance=0.9).require()
    return {**kept, "smallest": smallest}


def trajectories(device: torch.device) -> dict[str, Any]:
    own = passes(device)
    checkpoints = []
    for step in range(3):
        rates = {name: 0.1 for name, _ in own.module.named_parameters()} if step else {}
        checkpoints.append(Checkpoint.of(own.module, step, step_sizes=rates, steps=int(step > 0)))
        with torch.no_grad():
            for parameter in own.module.parameters():
                parameter.mul_(0.9)
    pairs = own, range(16), own, [0, 3]
    return {
        "tracin": tracin_scores(*pairs, checkpoints[1:]).scores,
        "z0": z0_scores(*pairs, checkpoints).scores,
        "diff_in": diff_in_scores(*pairs, checkpoints, step=1.0).scores,
        "source": source_scores(*pairs, checkpoints[1:], labels=("true", "true"), segments=1, at="average").scores,
        "dropout": ip_ensemble(*pairs, masks=2).scores,
    }


def measured(device: torch.device) -> dict[str, Any]:
    own = passes(device)
    curvature = fit(own, "ekfac", range(16), examples=EVERY, labels=("true", "true"))
    gap = DemographicParityGap(group=torch.arange(16) % 2)

    def norm(module: Any, batch: Any) -> Tensor:
        return module(batch[0]).square().mean()

    each = {"margin": Margin(), "adversarial": AdversarialLoss(epsilon=0.1), "gap": gap, "custom": norm}
    kept: dict[str, Any] = {}
    for name, measurement in each.items():
        found = measurement_scores(own, range(16), curvature, own, list(range(16)), measurement)
        kept |= {name: found.scores, f"{name} itself": found.measured.value}
    return kept


def stepped(device: torch.device) -> dict[str, Any]:
    """What gradients are multiplied with, the count of steps on the device, as fused and capturable ones keep it."""
    scales = {}
    for kind, options in ((torch.optim.Adam, {"betas": (0.9, 0.999)}), (torch.optim.Adagrad, {"lr_decay": 0.5})):
        parameter = nn.Parameter(torch.ones(3))
        optimizer = kind([parameter], **options)
        for step in range(2):
            parameter.grad = torch.tensor([1.0, -2.0, 1e-3]) * (step + 1)
            optimizer.step()
        state = {name: value.to(device) for name, value in optimizer.state[parameter].items()}
        optimizer.state[parameter] = state
        with no_waiting():
            scales[kind.__name__] = optimizers.preconditioner(optimizer, optimizer.param_groups[0], parameter)
    return scales


@contextmanager
def no_waiting() -> Iterator[None]:
    """Let nothing be read from the device."""

    def refuse(tensor: Tensor) -> Any:
        raise RuntimeError("the host waits for the device")

    pretend_device.PretendTensor.__float__ = pretend_device.PretendTensor.item = refuse
    try:
        yield
    finally:
        del pretend_device.PretendTensor.__float__, pretend_device.PretendTensor.item


def deterministic(case: Case) -> Case:
    """Return the case under ``Trainer(deterministic=True)``."""

    def strict(device: torch.device) -> dict[str, Any]:
        torch.use_deterministic_algorithms(True)
        try:
            return case(device)
        finally:
            torch.use_deterministic_algorithms(False)

    return strict


def timed(device: torch.device) -> dict[str, Any]:
    """How often the audit waits for the device to time batches, of which there are 8: before it reads the clock."""
    waits: list[str] = []
    with patch.object(pace, "wait_for", lambda place: waits.append(place.type)):
        audited(tracin=TracIn("step", overhead=0.1))(device)
    return {"waits": waits.count(device.type)}


def chain(device: torch.device) -> dict[str, Any]:
    found = curvature_chain(passes(device, lambda: nn.Linear(5, 3)), range(16))
    return {"errors": [step.error for step in found.steps], **found.matrices}


def door(device: torch.device) -> dict[str, Any]:
    """Batches of the host, a model of the device."""
    torch.manual_seed(0)
    net, examples = mlp().to(device), data(5)
    influence = Influence(net, F.cross_entropy, DataLoader(examples, batch_size=4)).fit("kfac", fisher="empirical")
    top = influence.top(examples, [3, 1], 2)
    with tempfile.TemporaryDirectory() as directory:
        saved = influence.save(f"{directory}/fitted")
        again = Influence.load(saved, net, F.cross_entropy, examples)
    return {
        "self-influence": influence.self_influence(),
        "again": again.self_influence(),
        "top": top.proponent_scores,
        "repaired": influence.repair(0, 2).norm,
    }


CASES: dict[str, Case] = {
    "door": door,
    # Gradients are compared with autograd on the device, too, before the training of three models.
    "default": audited(verify=True),
    "step": audited(tracin="step"),
    "step, Adam": audited(tracin=TracIn("step", every_n_steps=2), optimizer=adam),
    "worst": audited(queries="worst"),
    "margin": audited(queries=Queries(measurement="margin")),
    "class weights": audited(loss=weighted),
    "cnn": audited(cnn, examples=data(2, 5, 5), verify=True),
    "cnn, step": audited(cnn, examples=data(2, 5, 5), tracin="step", optimizer=adam),
    # EK-FAC measures in a basis that is any one where two eigenvalues are nearly the same: K-FAC has one answer.
    "transformer": audited(Transformer, of_tokens, texts(), optimizer=adam, curvature="kfac", verify=True),
    "picked tokens, step": audited(Transformer, of_kept_tokens, texts(), tracin="step", curvature="kfac"),
    "binary": audited(loss=binary),
    "absolute": audited(loss=absolute),
    "gaussian": audited(loss=gaussian),
    "exact": audited(fisher="exact"),
    **{f"audit {name}": audited(curvature=name, queries="worst", damping=1.0) for name in CURVATURES},
    **{f"pairs {name}": solved(name) for name in CURVATURES if name != "hessian"},
    "pairs nystrom": solved("ggn", solver="nystrom", damping=1.0),
    "solvers": solvers,
    "trajectories": trajectories,
    "measured": measured,
    "chain": chain,
    "stepped": stepped,
    "timed": timed,
    "deterministic": deterministic(audited(queries="worst")),
    "deterministic, transformer": deterministic(audited(Transformer, of_tokens, texts(), curvature="kfac")),
    "deterministic, cnn": deterministic(audited(cnn, examples=data(2, 5, 5), tracin="step", optimizer=adam)),
    "deterministic, chain": deterministic(chain),
}


def plain(value: Any) -> Any:
    return value.detach().cpu().double().tolist() if isinstance(value, Tensor) else value


def outcome(case: Case, device: torch.device) -> dict[str, Any]:
    try:
        return {key: plain(value) for key, value in case(device).items()}
    except Exception:
        return {"error": traceback.format_exc()}


def strictness() -> dict[str, str]:
    """Return the errors of what no accelerator does, or of what this one was told not to do."""
    here, there = torch.ones(2), torch.ones(2, device=pretend_device.DEVICE)
    matrix = torch.eye(2, device=pretend_device.DEVICE)
    attempts: dict[str, Callable[[], Any]] = {
        "mixing": lambda: here + there,
        "in place": lambda: here.add_(there),
        "indexing": lambda: here[there.long()],
        "generator": lambda: torch.randn(2, device=pretend_device.DEVICE, generator=torch.Generator()),
        "numpy": there.numpy,
        "float64": there.double,
        "linalg": lambda: torch.linalg.eigh(matrix),
        "deterministic": lambda: deterministic(lambda device: matrix.cumsum(0))(pretend_device.DEVICE),
        "allowed": lambda: there * here[0] + there[here.long() - 1] + torch.linalg.vector_norm(there) + here.to(there),
    }
    errors = {}
    for name, attempt in attempts.items():
        try:
            attempt()
        except Exception as error:
            errors[name] = type(error).__name__
    return errors


def waits() -> dict[str, float]:
    """Return how often the host waits for the device, for every batch of a pass."""

    def per_batch(passes: int, run: Callable[[int], Any]) -> float:
        counts = []
        for size in (8, 8, 16):  # the first time scales are measured
            pretend_device.WAITS.count = 0
            run(size)
            counts.append(pretend_device.WAITS.count)
        return (counts[2] - counts[1]) / (4 * passes)

    own = passes(pretend_device.DEVICE, batch_size=2)
    fitted = fit(own, "ekfac", range(16), examples=EVERY, labels=("sampled", "sampled"))
    assert isinstance(fitted, BlockCurvature)

    def fitting(size: int) -> None:
        fit(own, "ekfac", range(size), examples=FactorExamples(size, size), labels=("sampled", "sampled"))

    return {
        "fitting": per_batch(2, fitting),
        "scoring": per_batch(1, lambda size: score_examples(own, range(size), curvature=fitted, features=True)),
        "sweep": per_batch(1, lambda size: damping_sweep(own, range(size), fitted)),
    }


def run(with_float64: Collection[str]) -> str:
    """Run all cases, and those named with float64 on the device, too; return JSON."""
    logging.getLogger(PACKAGE).setLevel(logging.ERROR)
    outcomes = {}
    for name, case in CASES.items():
        outcomes[name] = {"cpu": outcome(case, torch.device("cpu"))}
        for float64 in (True, False):
            if float64 and name not in with_float64:
                continue
            pretend_device.LIMITS.float64 = pretend_device.LIMITS.linalg = float64
            precision._has_float64.cache_clear()
            outcomes[name]["float64" if float64 else "no float64"] = outcome(case, pretend_device.DEVICE)
    checked = strictness()
    pretend_device.LIMITS.float64 = pretend_device.LIMITS.linalg = True
    precision._has_float64.cache_clear()
    return json.dumps({"strictness": checked, "waits": waits(), **outcomes})
