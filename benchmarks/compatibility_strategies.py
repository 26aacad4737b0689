"""Strategies of one package of Lightning, each a training by two processes with and without the audit.

Run by ``compatibility.py``; a line of JSON for each strategy. With the name of one it is a process of that training.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
import subprocess
import sys
import tempfile
import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from compatibility_cells import BATCH, EPOCHS, N, model_of, rows
from compatibility_table import PACKAGES, STRATEGIES
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_influence import InfluenceAudit
from lightning_influence.callbacks import bridge

PATIENCE = 300.0
"""Seconds."""


def strategy_of(pl: Any, name: str) -> Any:
    """Return a strategy on CPUs; None of one that has to have others."""
    strategies = importlib.import_module(f"{pl.__name__}.strategies")
    if name in ("one device", "DDP"):
        return {"one device": "auto", "DDP": "ddp_find_unused_parameters_true"}[name]
    sizes = {"FSDP2": (2, 1), "tensor parallel": (1, 2)}.get(name)
    return None if sizes is None else strategies.ModelParallelStrategy(*sizes)


def split(module: Any) -> None:
    """Split a model over the processes, as ``configure_model`` does."""
    from torch.distributed.fsdp import fully_shard

    if module.device_mesh is not None:
        mesh = module.device_mesh["data_parallel"]
        for part in (module.net[0], module.net[2], module.net, module.number):
            fully_shard(part, mesh=mesh)


def fit(pl: Any, name: str, audit: InfluenceAudit | None) -> list[Tensor]:
    """Train once; return the weights."""
    model, data = model_of(pl, manual=False), TensorDataset(*rows(N))
    if name == "FSDP2":
        kind: Any = type("Split", (type(model),), {"configure_model": split})
        model.__class__ = kind
    devices = 1 if name == "one device" else 2
    # One process has in a batch what two have in theirs together.
    sampler = DistributedSampler(data, devices, int(os.environ.get("LOCAL_RANK", "0")), shuffle=False)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = pl.Trainer(
            max_epochs=EPOCHS,
            accelerator="cpu",
            devices=devices,
            strategy=strategy_of(pl, name),
            logger=False,
            callbacks=[] if audit is None else [audit],
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            default_root_dir=folder,
        )
        trainer.fit(model, DataLoader(data, 2 * BATCH // devices, sampler=sampler))
    return [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]  # type: ignore[operator]


def trained(pl: Any, name: str) -> dict[str, Any]:
    """Train with and without; return what became of it."""
    try:
        if strategy_of(pl, name) is None:
            kind = getattr(importlib.import_module(f"{pl.__name__}.strategies"), name)
            trainer: Any = SimpleNamespace(strategy=object.__new__(kind))
            bridge.check_strategy(trainer)
        audit = InfluenceAudit()
        weights = fit(pl, name, audit)
    except Exception as error:
        ours = type(error).__name__ == "MisconfigurationException" and "InfluenceAudit" in str(error)
        return {"outcome": "refused" if ours else "failed", "words": str(error)}
    same = all(map(torch.equal, weights, fit(pl, name, None)))
    if int(os.environ.get("LOCAL_RANK", "0")):
        return {}
    scores = audit.report.columns["self_influence"].tolist()
    return {"outcome": audit.report.status if same else "wrong: training differs", "scores": scores, "words": ""}


def judged(found: dict[str, Any], reference: list[float] | None) -> dict[str, Any]:
    """Compare with the scores of one process."""
    outcome, scores = found["outcome"], found.get("scores")
    if outcome == "complete":
        equal = reference is None or np.allclose(scores, reference, rtol=1e-5)
        outcome = "right" if equal else "wrong: scores differ"
    return {"outcome": outcome, "words": found["words"]}


def main() -> None:
    """Run all strategies of one package, or be a process of one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("package", choices=PACKAGES)
    parser.add_argument("strategy", nargs="?", choices=STRATEGIES)
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    if arguments.strategy is not None:
        print(json.dumps(trained(importlib.import_module(arguments.package), arguments.strategy)))
        return
    reference = None
    for name in STRATEGIES:
        command = [sys.executable, __file__, arguments.package, name]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=PATIENCE)
        found = next((json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"')), None)
        found = found or {"outcome": "failed", "words": f"it ended with {done.returncode}"}
        print(json.dumps({"strategy": name} | judged(found, reference)), flush=True)
        reference = found.get("scores", reference)


if __name__ == "__main__":
    main()
