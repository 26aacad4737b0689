"""The rooms of the house: who may import whom, what may appear where, and how large things may be."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest

import lightning_influence
from lightning_influence.core.origin import LIGHTNING

PACKAGE = "lightning_influence"
ROOT = Path(lightning_influence.__file__).parent

# A room imports only from rooms before it. The two of one place do not know each other.
ROOMS = (
    ("core",),
    ("data", "layers", "objective"),
    ("gradients",),
    ("training",),
    ("curvature",),
    ("scores",),
    ("replay",),
    ("index",),
    ("audit",),
    ("influence",),
    ("page",),
    ("view", "tensorboard_plugin"),
    ("loggers",),
    ("callbacks",),
    ("cli",),
    ("every_training",),
)
FLOOR = {room: number for number, rooms in enumerate(ROOMS) for room in rooms}
STANDS_ALONE = "metrics"

# Its own packages for type checkers alone: what the user has not imported is not loaded.
MAY_IMPORT_LIGHTNING = "callbacks.lightning"
MAY_COMMUNICATE = {"core.distributed", "core.meeting"}
# Watching, but for those that stand in for the call: dropout masks (a sub-network is no matter of looking on), and what
# torch does not differentiate twice.
MAY_WATCH_FUNCTIONS = {
    "gradients.follower",
    "gradients.precision_watch",
    "gradients.calibration",
    "objective.tap",
    "scores.along.dropout_masks",
    "replay.detached",
    "replay.differentiable_calls",
}

MOST_LINES, MOST_OF_A_CLASS = 400, 250
# What is larger still. Entries may go, and numbers may fall; none may be added.
TOO_LONG: dict[str, int] = {}
TOO_LARGE: dict[str, int] = {}

HOOK = re.compile(r"register_(\w+_)?hook")
PICKLES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
PICKLING_CALLS = {"torch.save", "torch.load", "torch.jit.save", "torch.jit.load"}
COLLECTIVES = {
    "all_gather",
    "all_gather_object",
    "all_reduce",
    "broadcast_object_list",
    "gather_object",
    "reduce_boolean_decision",
    "reduce_scatter",
}


def modules() -> dict[str, str]:
    """Dotted names below the package (``curvature.fit``), with their sources."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text(encoding="utf-8")
    return found


def room_of(name: str) -> str:
    return name.partition(".")[0]


@cache
def imports_of(source: str) -> tuple[tuple[int, str], ...]:
    """Line and dotted target of everything that is imported, wherever in the module."""
    found: list[tuple[int, str]] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
    return tuple(found)


def for_type_checkers(source: str) -> set[int]:
    """Lines that never run."""
    guarded = (n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.dump(n.test))
    return {line for node in guarded for child in node.body for line in range(child.lineno, child.end_lineno + 1)}


def uses_of(source: str) -> Iterator[tuple[int, str]]:
    """Line and dotted name of every attribute that is used."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            yield node.lineno, ast.unparse(node)


def starts_with(target: str, *prefixes: str) -> bool:
    return any(f"{target}.".startswith(f"{prefix}.") for prefix in prefixes)


def faults_of(name: str, source: str) -> list[str]:
    """What a module does that the house forbids, one sentence each."""
    room, faults = room_of(name), []
    if room not in {"", *FLOOR, STANDS_ALONE}:
        faults.append(f"{name}: there is no room {room!r}; what is in it belongs into one of {sorted(FLOOR)}")
    never = for_type_checkers(source)
    for line, target in imports_of(source):
        fault = _import_fault(name, room, target, runs=line not in never)
        faults += [f"{name}:{line}: {fault}"] if fault else []
    for line, dotted in uses_of(source):
        last = dotted.rpartition(".")[2]
        if HOOK.fullmatch(last):
            faults.append(f"{name}:{line}: uses {last}; no hooks on a user's model: watch its functions")
        if name not in MAY_COMMUNICATE and (dotted.startswith("torch.distributed") or last in COLLECTIVES):
            faults.append(f"{name}:{line}: uses {dotted}; collectives belong into core/distributed.py")
        if dotted in PICKLING_CALLS:
            faults.append(f"{name}:{line}: uses {dotted}; nothing may be pickled")
    if "allow_pickle" in source:
        faults.append(f"{name}: passes allow_pickle; nothing may be pickled")
    return faults


def _import_fault(name: str, room: str, target: str, *, runs: bool) -> str | None:
    if starts_with(target, PACKAGE):
        other = room_of(target.removeprefix(f"{PACKAGE}."))
        if room == STANDS_ALONE:
            return f"imports {target}, but {room} stands alone"
        above = room in FLOOR and other in FLOOR and other != room and FLOOR[other] >= FLOOR[room]
        return f"imports {target}; {room} may not know {other}" if above else None
    if starts_with(target, *LIGHTNING, "lightning_utilities") and name != MAY_IMPORT_LIGHTNING:
        return f"imports {target}; only {MAY_IMPORT_LIGHTNING} may"
    if starts_with(target, *LIGHTNING) and runs:
        return f"imports {target}; outside `if TYPE_CHECKING` that loads what the user may not have"
    if starts_with(target, "torch.distributed") and name not in MAY_COMMUNICATE:
        return f"imports {target}; collectives belong into core/distributed.py"
    if starts_with(target, *PICKLES, *PICKLING_CALLS):
        return f"imports {target}; nothing may be pickled"
    if HOOK.fullmatch(target.rpartition(".")[2]):
        return f"imports {target}; no hooks on a user's model: watch its functions"
    if target.endswith("TorchFunctionMode") and name not in MAY_WATCH_FUNCTIONS:
        return f"imports {target}; function modes belong into {sorted(MAY_WATCH_FUNCTIONS)}"
    return None


def classes_of(source: str) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef):
            yield node.name, (node.end_lineno or node.lineno) - node.lineno + 1


# ---------------------------------------------------------------------------------------------------- the house


@pytest.mark.parametrize("name", sorted(modules()))
def test_module_keeps_to_its_room(name: str) -> None:
    assert faults_of(name, modules()[name]) == []


def test_sizes() -> None:
    long = {name: lines for name, text in modules().items() if (lines := text.count("\n")) > MOST_LINES}
    large = {
        f"{name}.{kind}": lines
        for name, text in modules().items()
        for kind, lines in classes_of(text)
        if lines > MOST_OF_A_CLASS
    }
    for found, allowed in ((long, TOO_LONG), (large, TOO_LARGE)):
        assert {name for name in found if found[name] > allowed.get(name, 0)} == set()
        assert allowed.keys() <= found.keys(), "what is small enough by now goes from the list"


def test_importing_the_package_loads_nothing_heavy() -> None:
    source = """
import sys, lightning_influence
dir(lightning_influence), lightning_influence.__version__
print([name for name in ("torch", "lightning", "numpy", "tensorboard") if name in sys.modules])
"""
    loaded = subprocess.run([sys.executable, "-c", source], stdout=subprocess.PIPE, text=True, timeout=60, check=True)
    assert loaded.stdout.strip() == "[]"


def test_nothing_loads_lightning() -> None:
    source = f"""
import importlib, sys
for name in {[name for name in modules() if name]!r}:
    importlib.import_module("{PACKAGE}." + name)
print([name for name in {sorted(LIGHTNING)} if name in sys.modules])
"""
    loaded = subprocess.run([sys.executable, "-c", source], stdout=subprocess.PIPE, text=True, timeout=120, check=True)
    assert loaded.stdout.strip() == "[]"


def test_public_names_are_the_table_of_modules() -> None:
    assert sorted(lightning_influence.__all__) == sorted([*lightning_influence._MODULES, "__version__"])
    assert set(lightning_influence.__all__) <= set(dir(lightning_influence))


def test_type_checkers_see_what_is_loaded_lazily() -> None:
    source = ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8"))
    seen = {
        alias.name: node.module
        for node in ast.walk(source)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(PACKAGE)
        for alias in node.names
    }
    assert seen == lightning_influence._MODULES


@pytest.mark.parametrize("name", lightning_influence._MODULES)
def test_public_name_can_be_imported(name: str) -> None:
    assert getattr(lightning_influence, name).__name__ == name


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'lightning_influence' has no attribute 'Novelty'"):
        _ = lightning_influence.Novelty


# ------------------------------------------------------------------------------------------------------- what is public

# What a user who builds on a room needs is what it exports. `core` and `loggers` are nobody's to build on.
PUBLIC = {name: text for name, text in modules().items() if (ROOT / name.replace(".", "/") / "__init__.py").is_file()}
EXPORTS = sorted(
    (name, exported)
    for name in PUBLIC
    for exported in getattr(importlib.import_module(f"{PACKAGE}.{name}" if name else PACKAGE), "__all__", [])
)
CONSTANTS = {"__version__"}


def documented(source: str) -> set[str]:
    """Constants and aliases of a module that a string follows."""
    body = ast.parse(source).body
    return {
        name.id
        for node, after in pairwise(body)
        if isinstance(node, (ast.Assign, ast.AnnAssign))
        and isinstance(after, ast.Expr)
        and isinstance(after.value, ast.Constant)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        for name in ast.walk(target)
        if isinstance(name, ast.Name)
    }


def test_each_room_exports_something() -> None:
    silent = {"core", "loggers"} | {f"curvature.{name}" for name in ("blocks", "products", "solve")}
    assert set(PUBLIC) - {name for name, _ in EXPORTS} == silent | {"training.flight"}


@pytest.mark.parametrize(("room", "name"), EXPORTS)
def test_what_a_room_exports_is_there_and_explained(room: str, name: str) -> None:
    value = getattr(importlib.import_module(f"{PACKAGE}.{room}" if room else PACKAGE), name)
    if inspect.ismodule(value) or inspect.isfunction(value):
        assert value.__doc__
    elif inspect.isclass(value):
        # A data class without words of its own has its signature.
        assert value.__dict__.get("__doc__", "").strip()
        assert not value.__doc__.startswith(f"{name}(")
    elif name not in CONSTANTS:
        assert any(name in documented(text) for other, text in modules().items() if room_of(other) == room_of(room))


# --------------------------------------------------------------------------- the checker, on sources made for it


@pytest.mark.parametrize(
    ("name", "source", "fault"),
    [
        ("novelty.inner", "", "there is no room 'novelty'"),
        ("layers.rows", "from lightning_influence.gradients.capture import Capture", "layers may not know gradients"),
        ("layers.rows", "from lightning_influence.objective import terms", "layers may not know objective"),
        ("objective.terms", "from lightning_influence.layers.rows import Rows", "objective may not know layers"),
        ("audit.report", "def f():\n    from lightning_influence.callbacks import run", "audit.report:2: imports"),
        ("metrics", "from lightning_influence.core import memory", "metrics stands alone"),
        ("objective.task", "from lightning.pytorch import LightningModule", "only callbacks.lightning may"),
        ("callbacks.run", "if TYPE_CHECKING:\n    import pytorch_lightning", "only callbacks.lightning may"),
        ("callbacks.run", "from lightning_fabric.utilities import seed", "only callbacks.lightning may"),
        ("callbacks.run", "from lightning_utilities.core import rank_zero", "only callbacks.lightning may"),
        ("callbacks.lightning", "def f():\n    import pytorch_lightning", "callbacks.lightning:2: imports"),
        ("callbacks.lightning", "if TYPE_CHECKING: ...\nelse:\n    import lightning", "what the user may not have"),
        ("gradients.capture", "layer.register_forward_hook(tap)", "uses register_forward_hook"),
        ("gradients.capture", "from torch.autograd.graph import register_multi_grad_hook", "no hooks on a user's"),
        ("gradients.capture", "from torch.overrides import TorchFunctionMode", "function modes belong into"),
        ("scores.examples", "import torch.distributed as dist", "imports torch.distributed"),
        ("scores.examples", "from torch.distributed import all_reduce", "imports torch.distributed"),
        ("callbacks.run", "trainer.strategy.all_gather(scores)", "uses trainer.strategy.all_gather"),
        ("audit.report", "import pickle", "imports pickle; nothing may be pickled"),
        ("audit.report", "import torch\ntorch.save(x, path)", "audit.report:2: uses torch.save"),
        ("audit.report", "np.load(path, allow_pickle=True)", "passes allow_pickle"),
    ],
)
def test_checker_finds(name: str, source: str, fault: str) -> None:
    found = faults_of(name, source)
    assert len(found) == 1
    assert fault in found[0]


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("gradients.capture", "from lightning_influence.layers.blocks import LayerError"),
        ("gradients.follower", "from torch.overrides import TorchFunctionMode\nclass W(TorchFunctionMode): ..."),
        ("core.distributed", "import torch.distributed as dist\ndist.all_reduce(x)"),
        ("callbacks.run", "from lightning_influence.audit.report import x"),
        ("callbacks.lightning", "import lightning_utilities\nif TYPE_CHECKING:\n    from lightning.pytorch import x"),
        ("audit.store.store", "import safetensors.torch\nmodel.load_state_dict(x)\njson.load(f)"),
        ("", "from lightning_influence.callbacks import InfluenceAudit"),
    ],
)
def test_checker_lets_pass(name: str, source: str) -> None:
    assert faults_of(name, source) == []
