"""What an audit costs, in plain training passes over the same data.

One pass is one forward and backward over all training examples in batches of 32, without an optimizer step. The audit
is all that happens after training, with the callback's defaults: factors (eigendecompositions included), scores of
every example, the damping sweep, and what neighbours say about labels. Passes and audits alternate in one process;
medians are printed, and their ratio, of wall time and of CPU time (which other work on the machine hardly touches).

Then whole trainings, with the callback and without, in turns: the demo's CNN on noisy digits, and the transformer. What
the callback adds does not grow with the epochs, but for the passes of TracIn that its budget has room for.
Run ``make cost``.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

import lightning as L
import torch
from networks import NETWORKS, data, task, train
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import AuditReport, Influence, InfluenceAudit
from lightning_influence.scores import influence_scores
from lightning_influence.training import disagreement, nearest_labels

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from digits import Digits, noisy_digits  # noqa: E402

STAGES = ("factors", "scores", "neighbours")
FITS = {"demo": 4000, "transformer": 500}


def plain_pass(module: nn.Module, examples: TensorDataset) -> None:
    """One forward and backward over the data."""
    module.train()
    for batch in DataLoader(examples, batch_size=32, shuffle=True):
        module.zero_grad()
        task(module, batch).backward()


def audit(module: nn.Module, examples: TensorDataset) -> dict[str, float]:
    """Fit factors and score every example, as the callback does; return the seconds of each stage."""
    influence = Influence(module, task, examples, batch_size=32)
    result = influence_scores(influence.training, influence.examples, influence.plan("ekfac"), features=True)
    start = time.perf_counter()
    assert result.scores.features is not None
    labels = result.scores.columns["label"]
    disagreement(nearest_labels(result.scores.features, labels), labels)
    return result.seconds | {"neighbours": time.perf_counter() - start}


def measure(name: str, examples: int, rounds: int) -> str:
    """Return a line of the table."""
    torch.manual_seed(0)
    module, digits = NETWORKS[name](), data(name, examples)
    train(module, data(name, min(examples, 1000)))
    audit(module, data(name, 64))
    passes, audits, cpu, stages = [], [], [], []
    for _ in range(rounds):
        start, used = time.perf_counter(), time.process_time()
        plain_pass(module, digits)
        between, used_between = time.perf_counter(), time.process_time()
        stages.append(audit(module, digits))
        passes.append(between - start)
        audits.append(time.perf_counter() - between)
        cpu.append((time.process_time() - used_between) / (used_between - used))
    one = statistics.median(passes)
    ratio = statistics.median(a / p for a, p in zip(audits, passes, strict=True))
    parts = ", ".join(f"{stage} {statistics.median(s[stage] for s in stages) / one:.2f}" for stage in STAGES)
    whole = statistics.median(audits)
    return f"{name:<12}{one:>8.2f} s{whole:>8.2f} s{ratio:>10.1f}{statistics.median(cpu):>10.1f}   {parts}"


class Trained(L.LightningModule):
    """The transformer, trained."""

    def __init__(self) -> None:
        super().__init__()
        self.net = NETWORKS["transformer"]()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return task(self.net, batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


def fit(name: str, epochs: int, examples: int, audit: InfluenceAudit | None) -> tuple[float, float]:
    """Return the seconds of one training, by the wall and of the CPU."""
    L.seed_everything(0, verbose=False)
    module, train_set, validation = Trained(), data(name, examples) if name != "demo" else None, None
    if train_set is None:
        noisy, clean, _ = noisy_digits(0.1, 0)
        module, train_set = Digits(), TensorDataset(*(tensor[:examples] for tensor in noisy.tensors))
        validation = DataLoader(clean, batch_size=256)
    with tempfile.TemporaryDirectory() as directory:
        trainer = L.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            default_root_dir=directory,
            callbacks=[] if audit is None else [audit],
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        start, used = time.perf_counter(), time.process_time()
        trainer.fit(module, DataLoader(train_set, batch_size=32, shuffle=True), validation)
        return time.perf_counter() - start, time.process_time() - used


def whole(name: str, epochs: int, examples: int, rounds: int) -> str:
    """Return a line of the table of whole trainings."""
    flipped = noisy_digits(0.1, 0)[2]
    known = flipped[flipped < examples] if name == "demo" else None
    walls, cpus, plain = [], [], []
    report: AuditReport | None = None
    for _ in range(rounds):
        audit = InfluenceAudit(known_noise=known)
        (wall, cpu), (more, used) = fit(name, epochs, examples, None), fit(name, epochs, examples, audit)
        plain.append(wall)
        walls.append(more / wall)
        cpus.append(used / cpu)
        report = audit.report
    assert report is not None
    passes, found = len(report.manifest["tracin_steps"]), report.manifest.get("detection", {})
    auroc = f"{found['suspicion']['auroc']:.4f}" if found else ""
    return (
        f"{name:<12}{epochs:>8}{statistics.median(plain):>8.1f} s{statistics.median(walls):>10.2f}"
        f"{statistics.median(cpus):>10.2f}{passes:>8}{auroc:>10}"
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=list(NETWORKS), metavar="network", help=", ".join(NETWORKS))
    parser.add_argument("--examples", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=int, nargs="*", default=[8, 30, 100], help="of whole trainings")
    parser.add_argument("--share", type=float, default=1.0, help="of the examples of whole trainings")
    arguments = parser.parse_args()
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {arguments.examples} examples, "
        f"{arguments.rounds} rounds"
    )
    print(f"{'network':<12}{'pass':>10}{'audit':>10}{'passes':>10}{'of CPU':>10}   of which, in passes")
    for name in arguments.networks:
        print(measure(name, arguments.examples, arguments.rounds), flush=True)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    print(f"\n{'training':<12}{'epochs':>8}{'plain':>10}{'ratio':>10}{'of CPU':>10}{'passes':>8}{'AUROC':>10}")
    for name, examples in FITS.items() if arguments.epochs else ():
        fit(name, 1, 64, InfluenceAudit())  # warms up
        for epochs in arguments.epochs:
            print(whole(name, epochs, round(examples * arguments.share), arguments.rounds), flush=True)


if __name__ == "__main__":
    main()
