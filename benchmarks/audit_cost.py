"""What an audit costs, in plain training passes over the same data.

One pass is one forward and backward over all training examples in batches of 32, without an optimizer step. The audit
is all that happens after training, with the callback's defaults: factors (eigendecompositions included), scores of
every example, the damping sweep, and what neighbours say about labels. Passes and audits alternate in one process;
medians are printed, and their ratio, of wall time and of CPU time (which other work on the machine hardly touches).
Run ``make bench``.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from networks import NETWORKS, data, task, train
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import Influence
from lightning_influence.scores import influence_scores
from lightning_influence.training import disagreement, nearest_labels

STAGES = ("factors", "scores", "neighbours")


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


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=list(NETWORKS), metavar="network", help=", ".join(NETWORKS))
    parser.add_argument("--examples", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {arguments.examples} examples, "
        f"{arguments.rounds} rounds"
    )
    print(f"{'network':<12}{'pass':>10}{'audit':>10}{'passes':>10}{'of CPU':>10}   of which, in passes")
    for name in arguments.networks:
        print(measure(name, arguments.examples, arguments.rounds), flush=True)


if __name__ == "__main__":
    main()
