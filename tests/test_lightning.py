"""``lightning`` and ``pytorch_lightning``: one callback for both, whatever is imported first, and mixes of them."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import CLASSES, FEATURES, QUIET, loader, vectors
from own_processes import METHOD
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from which_lightning import PACKAGE

import lightning_influence
from lightning_influence import AuditReport, InfluenceAudit
from lightning_influence.callbacks import bridge, lightning
from lightning_influence.callbacks.display import progress_of

PACKAGES = ("lightning.pytorch", "pytorch_lightning")
OTHER = next(package for package in PACKAGES if package != PACKAGE)
TESTS = Path(__file__).parent


def kind_of(package: str) -> Any:
    """A small classifier with a validation step, of a package."""

    class Model(import_module(package).LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(3)
            self.net = nn.Sequential(nn.Linear(FEATURES, 6), nn.Tanh(), nn.Linear(6, CLASSES))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.log("loss", loss := F.cross_entropy(self.net(batch[0]), batch[1]))
            return loss

        validation_step = training_step

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    return Model


def model_of(package: str) -> Any:
    return kind_of(package)()


def trainer_of(package: str, directory: Path, audit: Any, **arguments: Any) -> Any:
    pl = import_module(package)
    settings = {"max_epochs": 2, "enable_checkpointing": False, "default_root_dir": directory, "callbacks": audit}
    if "logger" not in arguments:
        settings["logger"] = pl.loggers.TensorBoardLogger(directory, name="tb")
    return pl.Trainer(**{**QUIET, "num_sanity_val_steps": 0, "log_every_n_steps": 1, **settings, **arguments})


def fit(package: str, directory: Path, audit: InfluenceAudit | None = None, **arguments: Any) -> tuple[Any, Any]:
    """Train and audit with a package; the callback is handed over alone, which only a real ``Callback`` can be."""
    audit = audit or InfluenceAudit()
    trainer = trainer_of(package, directory, audit, **arguments)
    trainer.fit(model_of(package), loader(vectors()), loader(vectors(7, 2)))
    return trainer, audit


# ------------------------------------------------------------------------------------------------------------ imports

OURS = "from lightning_influence import InfluenceAudit as Audit; audit = Audit()"
CLASS = "from lightning_influence.callbacks import InfluenceAudit as Audit"
NEW, OLD = "import lightning.pytorch as new", "import pytorch_lightning as old"
CHECK = """
import lightning.pytorch as new, pytorch_lightning as old
from lightning_influence.callbacks.lightning import MisconfigurationException as Ours
from lightning.pytorch.utilities.exceptions import MisconfigurationException as NewError
from pytorch_lightning.utilities.exceptions import MisconfigurationException as OldError
early = globals().get("audit", Audit())
for package in (new, old):
    assert issubclass(Audit, package.Callback) and isinstance(Audit(), package.Callback)
    assert isinstance(early, package.Callback), package
    found = [kind for kind in package.Callback.__subclasses__() if issubclass(Audit, kind)]
    assert len(found) == 1, found
    assert package.Trainer(callbacks=early, logger=False, enable_checkpointing=False).callbacks[0] is early
for kind in (NewError, OldError):
    assert issubclass(Ours, kind)
"""


# What is loaded, and what the class is a callback of; a second package would take over the log messages of the first.
LOADED = """
import sys
print([name for name in ("lightning", "pytorch_lightning") if name in sys.modules])
if "Audit" in globals():
    print([kind.__module__.split(".")[0] for kind in Audit.__mro__ if kind.__name__ == "Callback"])
"""


ORDERS = [(OURS, NEW, OLD), (OURS, OLD), (CLASS, OLD, NEW), (NEW, OURS, OLD), (OLD, OURS)]
# What both packages need takes longest to import: once for all orders, which are tried in forks.
FORKS = """
import os, sys, torchmetrics, torch._dynamo, torch.distributed.fsdp
for place in range(1, len(sys.argv), 2):
    source, output = sys.argv[place : place + 2]
    if not os.fork():
        for stream, file in ((1, output), (2, output + ".err")):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), stream)
        exec(source, {"__name__": "__main__"})
        print("done", flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What is printed by order."""
    folder = tmp_path_factory.mktemp("orders")
    sources = ["\n".join(line for statement in order for line in (statement, LOADED)) + CHECK for order in ORDERS]
    outputs = [folder / f"{number}.txt" for number in range(len(ORDERS))]
    command = [sys.executable, "-W", "ignore", "-c", FORKS]
    for source, output in zip(sources, outputs, strict=True):
        command += [source, str(output)]
    subprocess.run(command, check=True, timeout=300)
    for output in outputs:
        assert output.read_text().endswith("done\n"), Path(f"{output}.err").read_text()[-3000:]
    return [output.read_text().removesuffix("done\n") for output in outputs]


@pytest.mark.parametrize("tried", range(len(ORDERS)))
def test_the_callback_is_one_of_every_package_whatever_comes_first(tried: int, said: list[str]) -> None:
    order = ORDERS[tried]
    # Nothing is imported but what the user imports, and that at once.
    expected, so_far = [], set()
    for number, statement in enumerate(order):
        so_far |= {"lightning"} if statement == NEW else {"pytorch_lightning"} if statement == OLD else set()
        ours_is_there = {OURS, CLASS} & set(order[: number + 1])
        expected += [str(sorted(so_far))] * (2 if ours_is_there else 1)
    assert said[tried].splitlines() == expected


def test_the_main_tests_under_the_other_package(tmp_path: Path) -> None:
    """Errors, resuming, indices and loggers; ``LIGHTNING_PACKAGE=pytorch_lightning`` runs all tests in this way."""
    if os.environ.get("LIGHTNING_PACKAGE"):
        pytest.skip("these are the tests under the other package")
    chosen = {
        "test_callback_errors.py": "stream or manual or unwritable or averaging",
        "test_callback_resume.py": "after_a_crash or same_trainer",
        "test_batch_indices.py": "Peeks",
        "test_callback_untouched.py": "bitwise and (plain or accumulation or mixed) and not flight",
        "test_nothing_lost.py": "logger or bars",
    }
    words = " or ".join(f"({Path(file).stem} and ({words}))" for file, words in chosen.items())
    check = "import sys\ndef pytest_sessionfinish(session): print('loaded:', 'lightning' in sys.modules)\n"
    (tmp_path / "check.py").write_text(check, encoding="utf-8")
    environment = {n: v for n, v in os.environ.items() if not n.startswith(("PYTEST_", "COV_"))}
    root = Path(lightning_influence.__file__).parent.parent
    environment |= {"LIGHTNING_PACKAGE": OTHER, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(root)])}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "check", "-p", "no:cacheprovider", "-k", words]
    command += [str(TESTS / file) for file in chosen]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=580)
    assert run.returncode == 0, run.stdout[-5000:]
    assert "loaded: False" in run.stdout
    assert " passed" in run.stdout


# ------------------------------------------------------------------------------------------ the same with both packages


def events_of(directory: str) -> dict[str, list[str]]:
    tags = EventAccumulator(directory).Reload().Tags()
    return {kind: sorted(tags[kind]) for kind in ("scalars", "histograms", "images", "tensors")}


def test_tables_and_pictures_are_those_of_the_other_package(tmp_path: Path) -> None:
    """By ``isinstance`` with one package's logger, the other's got no histograms, candidates and queries."""
    found = {}
    for package in PACKAGES:
        audit = InfluenceAudit(queries="worst", known_noise=[1, 5], describe=lambda example: f"label {example[1]}")
        trainer, _ = fit(package, tmp_path / package, audit)
        assert Path(audit.report.directory) == Path(trainer.log_dir) / "influence"
        found[package] = audit.report, events_of(trainer.log_dir)
    (new, new_events), (old, old_events) = (found[package] for package in PACKAGES)
    assert new_events == old_events
    assert any("self_influence" in tag for tag in [*new_events["histograms"], *new_events["tensors"]])
    assert any("quer" in tag for tag in new_events["tensors"])
    assert new.columns.keys() == old.columns.keys() >= {"self_influence", "harm", "tracin", "label"}
    for name in new.columns:
        np.testing.assert_array_equal(new.columns[name], old.columns[name], err_msg=name)
    for name in new.pairs:
        np.testing.assert_array_equal(new.pairs[name], old.pairs[name], err_msg=name)
    assert new.manifest["notes"] == old.manifest["notes"]


@pytest.mark.parametrize("package", PACKAGES)
def test_the_manifest_tells_whose_trainer_it_was(package: str, tmp_path: Path) -> None:
    _, audit = fit(package, tmp_path)
    name, *_ = package.split(".")
    versions = AuditReport.load(audit.report.directory).manifest["versions"]
    assert set(versions) == {"python", "lightning-influence", "torch", name.replace("_", "-")}
    assert versions[name.replace("_", "-")] == import_module(name).__version__


@pytest.mark.parametrize("package", PACKAGES)
def test_passes_take_no_part_in_mixed_precision(package: str, tmp_path: Path) -> None:
    """Taken for another precision plugin, bfloat16 would round the gradients of every pass."""

    def noted(module: Any, batch: Any) -> Tensor:
        assert not torch.is_autocast_enabled("cpu")
        return F.cross_entropy(module.net(batch[0]), batch[1])

    _, audit = fit(package, tmp_path, InfluenceAudit(task=noted), precision="bf16-mixed")
    assert audit.has_report


@pytest.mark.parametrize("package", PACKAGES)
def test_a_dry_run_writes_nothing(package: str, tmp_path: Path) -> None:
    trainer, audit = fit(package, tmp_path, fast_dev_run=True)
    assert audit.has_report
    assert bridge.real_loggers(trainer) == []
    assert list(tmp_path.rglob("influence*")) == []


@pytest.mark.parametrize("package", PACKAGES)
def test_what_cannot_be_audited_is_refused_as_each_package_does(package: str, tmp_path: Path) -> None:
    model = model_of(package)
    model.automatic_optimization = False
    for catching in PACKAGES:
        error = import_module(f"{catching}.utilities.exceptions").MisconfigurationException
        with pytest.raises(error, match="manual optimization"):
            trainer_of(package, tmp_path, InfluenceAudit()).fit(model, loader(vectors()))


@pytest.mark.parametrize("package", PACKAGES)
def test_strategies(package: str) -> None:
    strategies = import_module(f"{package}.strategies")
    for whole in (strategies.SingleDeviceStrategy(), strategies.DDPStrategy()):
        bridge.check_strategy(SimpleNamespace(strategy=whole, world_size=1))
        # TPUs, whose processes torch.distributed does not know; or a group that is not the trainer's.
        with pytest.raises(lightning.MisconfigurationException, match="4 processes, and torch.distributed knows of 1"):
            bridge.check_strategy(SimpleNamespace(strategy=whole, world_size=4))
    ways_out = {
        strategies.FSDPStrategy: "FSDP2, `ModelParallelStrategy.*ckpt_path=",
        strategies.DeepSpeedStrategy: "ckpt_path=",
    }
    for split, way_out in ways_out.items():
        with pytest.raises(lightning.MisconfigurationException, match=f"does not support {split.__name__}.*{way_out}"):
            bridge.check_strategy(SimpleNamespace(strategy=object.__new__(split), world_size=1))


@pytest.mark.parametrize("package", PACKAGES)
def test_averaging_after_the_audit_is_warned_of(package: str, tmp_path: Path) -> None:
    averaging = import_module(package).callbacks.StochasticWeightAveraging(swa_lrs=0.01)
    trainer = trainer_of(package, tmp_path, [InfluenceAudit(), averaging], max_epochs=1)
    with pytest.warns(UserWarning, match="StochasticWeightAveraging comes after InfluenceAudit"):
        trainer.fit(model_of(package), loader(vectors()))


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("bar", ["RichProgressBar", "TQDMProgressBar"])
def test_progress_bars(bar: str, package: str, tmp_path: Path) -> None:
    shown = getattr(import_module(package).callbacks, bar)()
    trainer = trainer_of(package, tmp_path, [InfluenceAudit(), shown], enable_progress_bar=True, max_epochs=1)
    trainer.fit(model_of(package), loader(vectors()))
    assert lightning.is_a(trainer.progress_bar_callback, bar)
    assert progress_of(trainer) is not None


@pytest.mark.parametrize("package", PACKAGES)
def test_resuming_with_the_other_package(package: str, tmp_path: Path) -> None:
    """Checkpoints are the same files: one package's run may be another's to go on with."""
    other = next(each for each in PACKAGES if each != package)
    trainer, _ = fit(package, tmp_path / "first")
    trainer.save_checkpoint(tmp_path / "kept.ckpt")
    audit = InfluenceAudit()
    again = trainer_of(other, tmp_path / "second", audit, max_epochs=3)
    again.fit(model_of(other), loader(vectors()), ckpt_path=tmp_path / "kept.ckpt")
    assert set(audit.report.columns["times_seen"].tolist()) == {3}


def test_copies_and_pickles() -> None:
    for same in (copy.deepcopy(InfluenceAudit()), pickle.loads(pickle.dumps(InfluenceAudit()))):
        assert all(isinstance(same, import_module(package).Callback) for package in PACKAGES)
        assert same.state_key == InfluenceAudit().state_key


@pytest.mark.parametrize("package", PACKAGES)
def test_from_the_command_line(package: str, tmp_path: Path) -> None:
    pytest.importorskip("jsonargparse", exc_type=ImportError)
    cli = import_module(f"{package}.cli")
    config = tmp_path / "config.yaml"
    config.write_text(
        """
trainer:
  accelerator: cpu
  logger: false
  callbacks:
    - class_path: lightning_influence.InfluenceAudit
      init_args: {curvature: kfac, tracin: null, layers: [net]}
""",
        encoding="utf-8",
    )
    made = cli.LightningCLI(kind_of(package), run=False, args=["--config", str(config)], save_config_callback=None)
    (audit,) = (each for each in made.trainer.callbacks if isinstance(each, InfluenceAudit))
    assert audit.arguments.curvature == "kfac"


# --------------------------------------------------------------------------------------------------------------- mixes


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("kind", ["TensorBoardLogger", "CSVLogger"])
def test_a_logger_of_the_other_package(kind: str, package: str, tmp_path: Path) -> None:
    """Lightning takes it; but ``trainer.log_dir`` is then not the run's folder, where the audit belongs."""
    other = next(each for each in PACKAGES if each != package)
    logger = getattr(import_module(other).loggers, kind)(tmp_path, name="logs")
    _, audit = fit(package, tmp_path, logger=logger)
    assert Path(audit.report.directory) == Path(logger.log_dir) / "influence"
    if kind == "TensorBoardLogger":
        events = events_of(logger.log_dir)
        assert any("self_influence" in tag for tag in [*events["histograms"], *events["tensors"]])
        assert "influence/coverage" in events["scalars"]


@pytest.mark.parametrize("package", PACKAGES)
def test_a_module_of_the_other_package_is_for_lightning_to_refuse(package: str, tmp_path: Path) -> None:
    other = next(each for each in PACKAGES if each != package)
    with pytest.raises(TypeError, match="single import style|must be a `LightningModule`"):
        trainer_of(package, tmp_path, InfluenceAudit()).fit(model_of(other), loader(vectors()))


# -------------------------------------------------------------------------------------------------- several processes


def read_report(directory: Path) -> AuditReport:
    (manifest,) = directory.rglob("manifest.json")
    report = AuditReport.load(manifest.parent)
    assert report.status == "complete"
    assert report.columns["index"].tolist() == list(range(22))
    assert OTHER.partition(".")[0].replace("_", "-") in report.manifest["versions"]
    return report


@pytest.mark.slow
def test_two_processes_of_the_other_package(tmp_path: Path) -> None:
    environment = {n: v for n, v in os.environ.items() if not n.startswith(("PL_", "SLURM_", "LOCAL_RANK"))}
    root = Path(lightning_influence.__file__).parent.parent
    environment |= {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "LIGHTNING_PACKAGE": OTHER}
    command = [sys.executable, "-W", "ignore", __file__, str(tmp_path)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert run.returncode == 0, run.stderr[-5000:]
    assert "this is rank 1" in run.stdout
    read_report(tmp_path)


@pytest.mark.slow
def test_processes_that_the_other_package_starts_leave_their_report(tmp_path: Path) -> None:
    """As ``ddp_spawn`` does, which pickles the model."""
    audit, strategy = InfluenceAudit(), import_module(OTHER).strategies.DDPStrategy(start_method=METHOD)
    trainer = trainer_of(OTHER, tmp_path, audit, devices=2, strategy=strategy)
    trainer.fit(sys.modules[__name__].Spawned(), loader(vectors()), loader(vectors(7, 2)))
    assert audit.report.columns.keys() == read_report(tmp_path).columns.keys()


def __getattr__(name: str) -> Any:
    """Where the class of a model that is pickled is found; the other package is only loaded for it."""
    if name != "Spawned":
        raise AttributeError(name)
    kind = globals()[name] = kind_of(OTHER)
    kind.__qualname__ = name
    return kind


if __name__ == "__main__":
    mine = InfluenceAudit()
    distributed = trainer_of(PACKAGE, Path(sys.argv[1]), mine, devices=2, strategy="ddp")
    distributed.fit(model_of(PACKAGE), loader(vectors()), loader(vectors(7, 2)))
    try:
        print(f"a report of {len(mine.report.columns['index'])} examples")
    except RuntimeError as reason:
        print(reason)
