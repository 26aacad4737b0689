"""Who may import whom, and what may appear where: the table of parts, held by reading the sources.

`ORDER` is the table. A part may import only from parts before it; modules of one part (a package) may import
each other. Imports for type checking count like any other.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

import lightning_influence

PACKAGE = "lightning_influence"
ROOT = Path(lightning_influence.__file__).parent

ORDER = (
    "columns",
    "torch_private",
    "reachable",
    "states",
    "snapshot",
    "isolation",
    "contents",
    "collation",
    "looks",
    "distributed",
    "precision",
    "layout",
    "example_noise",
    "checkpoints",
    "memory",
    "losses",
    "loss_scale",
    "terms",
    "task",
    "repeatable",
    "source",
    "answering",
    "tagging",
    "calibration",
    "patches",
    "rows",
    "calls",
    "reading",
    "watch",
    "trace",
    "layers",
    "coverage",
    "discover",
    "uses",
    "capture",
    "passes",
    "per_sample",
    "verify",
    "optimizers",
    "curvature",
    "tracin",
    "dynamics",
    "step_norms",
    "row_graph",
    "known_calls",
    "in_flight",
    "pacing",
    "neighbours",
    "scoring",
    "measurements",
    "queries",
    "score_matrix",
    "pairwise",
    "pair_sums",
    "unrolling",
    "zeroth_order",
    "diff_in",
    "dropout_masks",
    "query_pairs",
    "tracin_pairs",
    "influence",
    "relabel",
    "unlearning",
    "files",
    "values",
    "tables",
    "store",
    "ensemble",
    "acting",
    "audit",
    "metrics",
    "tensorboard",
    "callbacks",
    "cli",
)
MAY_IMPORT_LIGHTNING = {"callbacks", "cli"}
# Watching, but for dropout masks, which stand in for the call: a sub-network is no matter of looking on.
MAY_WATCH_FUNCTIONS = {"watch", "task", "calibration", "dropout_masks"}
MAY_COMMUNICATE = {"distributed"}
STANDS_ALONE = {"metrics"}

# TensorBoard loads the plugin in its own process, where importing torch or lightning takes seconds.
PLUGIN_MODULES = (f"{PACKAGE}.tensorboard.plugin", f"{PACKAGE}.tensorboard.loader")
NOT_IN_THE_PLUGIN = {
    "torch",
    "torchmetrics",
    "lightning",
    "lightning_fabric",
    "lightning_utilities",
    "accelerate",
}

PICKLES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
PICKLING_CALLS = {"torch.save", "torch.load", "torch.jit.save", "torch.jit.load"}
HOOK = re.compile(r"register_(\w+_)?hook")
COLLECTIVES = {
    "all_gather",
    "all_gather_object",
    "all_reduce",
    "broadcast_object_list",
    "gather_object",
    "reduce_boolean_decision",
    "reduce_scatter",
}


@dataclass(frozen=True)
class Module:
    """A source with the dotted name it would be imported by."""

    name: str
    source: str
    is_package: bool = False

    @property
    def part(self) -> str:
        """The line of the table that it belongs to; empty for the package's own `__init__`."""
        return self.name.removeprefix(PACKAGE).removeprefix(".").partition(".")[0]


@dataclass(frozen=True)
class Import:
    line: int
    target: str
    """The module, or `module.name` for `from module import name`."""

    def starts_with(self, *prefixes: str) -> bool:
        return any(f"{self.target}.".startswith(f"{prefix}.") for prefix in prefixes)


def imports_of(module: Module) -> Iterator[Import]:
    """Everything the module imports, wherever in it, with relative names resolved."""
    for node in ast.walk(ast.parse(module.source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(node.lineno, alias.name)
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(module, node)
            for alias in node.names:
                yield Import(node.lineno, f"{base}.{alias.name}")
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = node.func
            name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
            if name in {"import_module", "__import__"}:
                yield Import(node.lineno, str(node.args[0].value))


def _absolute(module: Module, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    up = node.level - 1 if module.is_package else node.level
    parents = module.name.split(".")[: len(module.name.split(".")) - up]
    return ".".join([*parents, *([node.module] if node.module else [])])


def attributes_of(module: Module) -> Iterator[tuple[int, str]]:
    """Every dotted use `a.b.c`, with import aliases resolved where `a` is one; else as `….c`."""
    tree = ast.parse(module.source)
    aliases: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            aliases |= {
                a.asname or a.name.partition(".")[0]: a.name if a.asname else a.name.partition(".")[0]
                for a in node.names
            }
        elif isinstance(node, ast.ImportFrom):
            aliases |= {a.asname or a.name: f"{_absolute(module, node)}.{a.name}" for a in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            names = [node.attr]
            value = node.value
            while isinstance(value, ast.Attribute):
                names.append(value.attr)
                value = value.value
            root = aliases.get(value.id, value.id) if isinstance(value, ast.Name) else "…"
            yield node.lineno, ".".join([root, *reversed(names)])


def faults_of(module: Module) -> list[str]:
    """What this module does that the table forbids, one sentence each."""
    part = module.part
    if part and part not in ORDER:
        return [
            f"{module.name}: the part {part!r} is not in the table. "
            f"Add it to ORDER in {Path(__file__).name}, after everything it imports."
        ]
    return [
        f"{module.name}:{line}: {fault}" for line, fault in (*_import_faults(module, part), *_use_faults(module, part))
    ]


def _import_faults(module: Module, part: str) -> Iterator[tuple[int, str]]:
    for item in imports_of(module):
        if item.starts_with(PACKAGE):
            if part:
                yield from ((item.line, fault) for fault in _order_faults(part, item.target))
        elif item.starts_with("pytorch_lightning"):
            yield item.line, "imports pytorch_lightning; only lightning.pytorch is supported"
        elif item.starts_with("lightning", "lightning_fabric") and part not in MAY_IMPORT_LIGHTNING:
            yield item.line, f"imports lightning; only {sorted(MAY_IMPORT_LIGHTNING)} may"
        elif item.starts_with("torch.distributed") and part not in MAY_COMMUNICATE:
            yield item.line, "imports torch.distributed; collectives belong into distributed.py"
        elif item.starts_with(*PICKLES) or item.starts_with(*PICKLING_CALLS):
            yield item.line, f"imports {item.target}; nothing may be pickled"
        elif HOOK.fullmatch(item.target.rpartition(".")[2]):
            yield item.line, f"imports {item.target}; no hooks on a user's model: watch its functions"
        elif item.target.endswith("TorchFunctionMode") and part not in MAY_WATCH_FUNCTIONS:
            yield item.line, f"imports {item.target}; function modes belong into watch.py"


def _order_faults(part: str, target: str) -> Iterator[str]:
    imported = target.removeprefix(PACKAGE).removeprefix(".").partition(".")[0]
    if imported == part:
        return
    if imported not in ORDER:
        yield f"imports {target}, which is no part of the table (re-exported names: import from their module)"
    elif part in STANDS_ALONE:
        yield f"imports {imported}, but {part} stands alone"
    elif ORDER.index(imported) > ORDER.index(part):
        yield f"imports {imported}, which comes after {part} in the table"


def _use_faults(module: Module, part: str) -> Iterator[tuple[int, str]]:
    for line, dotted in attributes_of(module):
        last = dotted.rpartition(".")[2]
        if HOOK.fullmatch(last):
            yield line, f"uses {last}; no hooks on a user's model: watch its functions"
        if last == "TorchFunctionMode" and part not in MAY_WATCH_FUNCTIONS:
            yield line, f"uses {dotted}; function modes belong into watch.py"
        if part not in MAY_COMMUNICATE and (dotted == "torch.distributed" or last in COLLECTIVES):
            yield line, f"uses {dotted}; collectives belong into distributed.py"
        if dotted in PICKLING_CALLS:
            yield line, f"uses {dotted}; nothing may be pickled"
    for node in ast.walk(ast.parse(module.source)):
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            yield node.value.lineno, "passes allow_pickle; nothing may be pickled"


def plugin_faults(modules: Mapping[str, Module]) -> list[str]:
    """Ways in which the plugin reaches torch or lightning, through whatever it imports of ours."""
    faults = []
    for start in PLUGIN_MODULES:
        reached = {start: start} if start in modules else {}
        waiting = list(reached)
        while waiting:
            name = waiting.pop()
            for needed in _loaded_by(modules[name], modules):
                if needed in modules and needed not in reached:
                    reached[needed] = f"{reached[name]} -> {needed}"
                    waiting.append(needed)
                elif needed.partition(".")[0] in NOT_IN_THE_PLUGIN or needed.startswith("safetensors.torch"):
                    faults.append(f"{reached[name]} -> {needed}")
    return faults


def _loaded_by(module: Module, modules: Mapping[str, Module]) -> Iterator[str]:
    """Modules that loading this one loads too: packages above it and what it imports when it runs."""
    for depth in range(1, module.name.count(".") + 1):
        yield ".".join(module.name.split(".")[:depth])
    running = Module(
        module.name, ast.unparse(_WithoutTypeChecking().visit(ast.parse(module.source))), module.is_package
    )
    for item in imports_of(running):
        yield (
            item.target if item.target in modules or not item.starts_with(PACKAGE) else item.target.rpartition(".")[0]
        )


class _WithoutTypeChecking(ast.NodeTransformer):
    def visit_If(self, node: ast.If) -> ast.AST:
        if ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}:
            return ast.If(ast.Constant(False), [ast.Pass()], node.orelse)
        return self.generic_visit(node)


def package_modules() -> dict[str, Module]:
    modules = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = [PACKAGE, *path.relative_to(ROOT).with_suffix("").parts]
        is_package = parts[-1] == "__init__"
        name = ".".join(parts[:-1] if is_package else parts)
        modules[name] = Module(name, path.read_text(encoding="utf-8"), is_package)
    return modules


def module(name: str, source: str, *, is_package: bool = False) -> Module:
    return Module(f"{PACKAGE}.{name}" if name else PACKAGE, source, is_package)


# --- the package ---


@pytest.mark.parametrize("name", sorted(package_modules()))
def test_module_keeps_to_the_table(name: str) -> None:
    assert faults_of(package_modules()[name]) == []


def test_plugin_reaches_neither_torch_nor_lightning() -> None:
    assert plugin_faults(package_modules()) == []


def test_importing_the_package_loads_nothing_heavy() -> None:
    source = """
import sys, lightning_influence
dir(lightning_influence), lightning_influence.__version__
print([name for name in ("torch", "lightning", "numpy", "tensorboard") if name in sys.modules])
"""
    loaded = subprocess.run([sys.executable, "-c", source], stdout=subprocess.PIPE, text=True, timeout=60, check=True)
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
    with pytest.raises(AttributeError, match="module 'lightning_influence' has no attribute 'Influence'"):
        _ = lightning_influence.Influence


# --- the checker itself, on made-up sources ---


@pytest.mark.parametrize(
    ("name", "source", "fault"),
    [
        ("novelty", "", "'novelty' is not in the table. Add it to ORDER"),
        ("novelty.inner", "", "'novelty' is not in the table"),
        ("layers", "from lightning_influence.capture import capture", "capture, which comes after layers"),
        ("layers", "from lightning_influence import capture", "capture, which comes after layers"),
        ("layers", "import lightning_influence.capture", "capture, which comes after layers"),
        ("layers", "from .capture import capture", "capture, which comes after layers"),
        ("layers", "from . import capture", "capture, which comes after layers"),
        ("curvature.ekfac", "from ..scoring import self_influence", "scoring, which comes after curvature"),
        ("curvature.ekfac", "from .. import scoring", "scoring, which comes after curvature"),
        ("store", "def f():\n    from lightning_influence.audit import x", "store:2: imports audit"),
        ("store", "if TYPE_CHECKING:\n    from lightning_influence.audit import x", "store:2: imports audit"),
        ("store", "importlib.import_module('lightning_influence.audit')", "imports audit, which comes after"),
        (
            "store",
            "from lightning_influence import AuditReport",
            "AuditReport, which is no part of the table",
        ),
        ("metrics", "from lightning_influence.losses import known_loss", "metrics stands alone"),
        ("task", "import lightning", "imports lightning; only ['callbacks', 'cli'] may"),
        ("task", "from lightning.pytorch import LightningModule", "imports lightning; only"),
        ("", "from lightning.pytorch import LightningModule", "imports lightning; only"),
        ("callbacks.audit", "import pytorch_lightning as pl", "imports pytorch_lightning"),
        ("callbacks.audit", "from pytorch_lightning.callbacks import Callback", "imports pytorch_lightning"),
        ("task", "layer.register_forward_hook(tap)", "uses register_forward_hook"),
        ("task", "layer.register_full_backward_hook(tap)", "uses register_full_backward_hook"),
        ("task", "layer.register_forward_pre_hook(tap)", "uses register_forward_pre_hook"),
        ("task", "model(x)[0].register_hook(tap)", "uses register_hook"),
        ("capture", "layer.register_forward_hook(tap)", "uses register_forward_hook"),
        ("task", "from torch.autograd.graph import register_multi_grad_hook", "no hooks on a user's model"),
        ("capture", "from torch.overrides import TorchFunctionMode", "function modes belong into watch.py"),
        (
            "capture",
            "import torch\nclass W(torch.overrides.TorchFunctionMode): ...",
            "function modes belong into watch",
        ),
        ("scoring", "import torch.distributed", "imports torch.distributed"),
        ("scoring", "import torch.distributed as dist", "imports torch.distributed"),
        ("scoring", "from torch import distributed", "imports torch.distributed"),
        ("scoring", "from torch.distributed import all_reduce", "imports torch.distributed"),
        ("scoring", "import torch\ntorch.distributed.barrier()", "scoring:2: uses torch.distributed;"),
        ("callbacks.audit", "trainer.strategy.all_gather(scores)", "uses trainer.strategy.all_gather"),
        ("store", "import pickle", "imports pickle; nothing may be pickled"),
        ("store", "from joblib import dump", "imports joblib.dump; nothing may be pickled"),
        ("store", "import torch\ntorch.save(x, path)", "store:2: uses torch.save"),
        ("store", "import torch as t\nt.load(path)", "store:2: uses torch.load"),
        ("store", "from torch import load", "imports torch.load"),
        ("store", "np.load(path, allow_pickle=True)", "passes allow_pickle"),
    ],
)
def test_checker_finds(name: str, source: str, fault: str) -> None:
    found = faults_of(module(name, source))
    assert len(found) == 1
    assert fault in found[0]


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("capture", "from lightning_influence.layers import LayerError\nfrom lightning_influence.watch import name_of"),
        ("watch", "from torch.overrides import TorchFunctionMode\nclass W(TorchFunctionMode): ..."),
        ("curvature.ekfac", "from lightning_influence.curvature.block import Block\nfrom . import kfac"),
        ("curvature.ekfac", "from lightning_influence import distributed\ndistributed.barrier()"),
        ("distributed", "import torch.distributed as dist\ndist.all_reduce(x)"),
        (
            "callbacks.audit",
            "from lightning.pytorch import Callback\nfrom lightning_influence.audit import x",
        ),
        ("cli", "import lightning\nfrom lightning_influence.callbacks import InfluenceAudit"),
        ("store", "import lightning_utilities, safetensors.torch\nmodel.load_state_dict(x)\njson.load(f)"),
        ("", "from lightning_influence.callbacks import InfluenceAudit"),
    ],
)
def test_checker_lets_pass(name: str, source: str) -> None:
    assert faults_of(module(name, source)) == []


def test_relative_imports_of_a_package_start_in_the_package() -> None:
    inside = module("curvature", "from .scoring import x", is_package=True)
    outside = module("curvature", "from ..scoring import x", is_package=True)
    assert faults_of(inside) == []
    assert "imports scoring, which comes after curvature" in faults_of(outside)[0]


@pytest.mark.parametrize(
    ("sources", "way"),
    [
        ({"tensorboard.plugin": "import torch"}, "tensorboard.plugin -> torch"),
        ({"tensorboard.loader": "def load():\n    import lightning.pytorch"}, "loader -> lightning.pytorch"),
        ({"tensorboard.plugin": "from safetensors.torch import load_file"}, "plugin -> safetensors.torch"),
        (
            {"tensorboard.plugin": "from lightning_influence import store", "store": "import torch"},
            "tensorboard.plugin -> lightning_influence.store -> torch",
        ),
        (
            {
                "tensorboard.plugin": "from ..store import read",
                "store": "from .losses import x",
                "losses": "import torch",
            },
            "tensorboard.plugin -> lightning_influence.store -> lightning_influence.losses -> torch",
        ),
        (
            {
                "tensorboard.plugin": "",
                "tensorboard": "from .summary import x",
                "tensorboard.summary": "import torch",
            },
            "-> torch",
        ),
        ({"tensorboard.plugin": "", "": "import torch"}, "plugin -> lightning_influence -> torch"),
    ],
)
def test_checker_follows_the_plugin(sources: dict[str, str], way: str) -> None:
    modules = [module(name, text, is_package=name in {"", "tensorboard"}) for name, text in sources.items()]
    faults = plugin_faults({item.name: item for item in modules})
    assert len(faults) == 1
    assert way in faults[0]


def test_checker_ignores_what_the_plugin_imports_for_type_checking() -> None:
    source = "if TYPE_CHECKING:\n    import torch\nimport numpy, safetensors.numpy"
    plugin = module("tensorboard.plugin", source)
    assert plugin_faults({plugin.name: plugin}) == []
