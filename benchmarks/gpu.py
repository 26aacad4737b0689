"""Everything that only a GPU can tell, in under 8 minutes: the CPU's numbers on it, its speed, launches, waits, memory.

1. An audit's columns on the CPU and on the device, in float32: ranks have to agree to .999, numbers to 1e-3 of the
   largest.
2. Passes in bfloat16 beside those in float32, on the device: how far ranks and numbers move.
3. ResNet-50, BERT-base and GPT-2 with random weights: seconds an example of training's forward and backward pass, of
   fitting and of scoring; kernels and host waits a batch; peak memory; and whether passes get by on less memory.

What takes too long is left out and named. ``--device cpu --small`` tries the script where there is no GPU; the numbers
tell nothing then. Run ``python benchmarks/gpu.py [--out results.json]``.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from kernels import Kernels
from large_networks import NETWORKS, Network, bert, resnet50, task
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_influence.core.precision import wait_for
from lightning_influence.curvature import Curvature, FactorExamples, fit
from lightning_influence.curvature.sweep import rank_correlation
from lightning_influence.data.source import ExampleSource
from lightning_influence.gradients.discover import discover
from lightning_influence.gradients.passes import ExampleGradients
from lightning_influence.gradients.verify import inspect, roomy_batch_size
from lightning_influence.scores.examples import score_examples
from lightning_influence.scores.measurements import mean_gradient

LEAST_RANK, LARGEST_ERROR = 0.999, 1e-3
COLUMNS = ("loss", "grad_norm_squared", "self_influence", "harm")


class Clock:
    """Tells whether there is time for one more part."""

    def __init__(self, seconds: float) -> None:
        self.end = time.perf_counter() + seconds
        self.left_out: list[str] = []

    def allows(self, what: str, seconds: float) -> bool:
        """Note what is left out."""
        if time.perf_counter() + seconds <= self.end:
            return True
        self.left_out.append(what)
        print(f"{what}: left out, the time is up")
        return False


def passes_of(
    model: nn.Module, data: TensorDataset, size: int, around: Callable[[], AbstractContextManager[Any]] = nullcontext
) -> ExampleGradients:
    """Return passes over data, as many examples at a time as there is room for."""
    source = ExampleSource(data, batch_size=size)
    coverage = discover(model, task, source, forward_context=around)
    passes = ExampleGradients(model, task, source, coverage, forward_context=around)
    inspection = inspect(passes, range(len(data)), verify=False)
    source.pass_batch_size = roomy_batch_size(inspection, source, passes.device)
    return passes.calibrate(range(len(data)))


def fitted(passes: ExampleGradients, count: int) -> Curvature:
    """Fit EK-FAC on the first examples."""
    every = FactorExamples(count, count)
    return fit(passes, "ekfac", range(count), examples=every, labels=("sampled", "sampled"))


def columns_of(passes: ExampleGradients, count: int) -> dict[str, Tensor]:
    """Return the columns of examples, on the host; every fourth is validation data, too."""
    curvature = fitted(passes, count)
    query = curvature.solve(mean_gradient(passes, range(0, count, 4)))
    found = score_examples(passes, range(count), curvature=curvature, query=query).columns
    return {name: found[name].cpu().double() for name in COLUMNS}


def agreement(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """Return rank correlations and the largest differences in units of the largest number, by column."""
    return {
        name: {
            "rank": rank_correlation(found[name], values),
            "error": float((found[name] - values).abs().max() / values.abs().max()),
        }
        for name, values in expected.items()
    }


def trained(make: Callable[[], nn.Module], data: TensorDataset, epochs: int) -> nn.Module:
    """Train a network a little, on the CPU: everything has a scale then."""
    torch.manual_seed(0)
    model = make()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(epochs):
        for start in range(0, len(data), 32):
            optimizer.zero_grad()
            task(model, data[start : start + 32]).backward()
            optimizer.step()
    return model.eval()


def separable(kind: str, count: int) -> TensorDataset:
    """Return images or texts with something to learn, one label in ten wrong."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(2, (count,), generator=generator)
    if kind == "images":
        inputs = torch.randn(count, 3, 32, 32, generator=generator) + labels[:, None, None, None] * 0.3
    else:
        inputs = torch.randint(50, (count, 16), generator=generator) + 25 * labels[:, None]
    wrong = torch.rand(count, generator=generator) < 0.1
    return TensorDataset(inputs, torch.where(wrong, 1 - labels, labels))


def compared(device: torch.device, small: bool, clock: Clock) -> dict[str, Any]:
    """Compare the device with the CPU, and bfloat16 with float32."""
    count, results = 128 if small else 512, {}
    nets = {
        "images": lambda: resnet50(4, 2, (1, 1)) if small else resnet50(8, 2, (1, 1, 1, 1)),
        "texts": lambda: bert(101, 16, 1, 2) if small else bert(101, 64, 4, 4),
    }
    for kind, make in nets.items():
        if not clock.allows(f"columns of {kind}", 30):
            continue
        data = separable(kind, count)
        model = trained(make, data, 2 if small else 4)
        half = partial(torch.autocast, device.type, torch.bfloat16)
        on_host = columns_of(passes_of(model, data, 32), count)
        model = model.to(device)
        there = columns_of(passes_of(model, data, 32), count)
        coarse = columns_of(passes_of(model, data, 32, half), count)
        results[kind] = {"device and CPU": agreement(there, on_host), "bfloat16 and float32": agreement(coarse, there)}
        for what, columns in results[kind].items():
            for name, found in columns.items():
                good = found["rank"] >= LEAST_RANK and found["error"] <= LARGEST_ERROR
                told = "" if what.startswith("bf") else ": good" if good else ": NOT GOOD"
                print(f"{kind}, {what}, {name}: rank {found['rank']:.5f}, error {found['error']:.1e}{told}", flush=True)
    return results


def peak(device: torch.device) -> float:
    """Return the most memory so far, in MB: of tensors on a GPU, of the process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def counted(device: torch.device, run: Callable[[], Any]) -> tuple[int, int]:
    """Return how many kernels and host waits something takes."""
    with Kernels() as kernels, warnings.catch_warnings(record=True) as waits:
        warnings.simplefilter("always")
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    return kernels.count, sum("synchron" in str(each.message) for each in waits)


def measured(device: torch.device, run: Callable[[int], Any], count: int, batches: int) -> dict[str, float]:
    """Return seconds and peak memory with ``count`` examples, and kernels and waits of each batch beyond half of them.

    Args:
        device: The device.
        run: Takes the number of examples.
        count: How many.
        batches: How many those are.
    """
    first, second = (counted(device, partial(run, part)) for part in (count // 2, count))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    wait_for(device)
    start = time.perf_counter()
    run(count)
    wait_for(device)
    kernels, waits = (2 * (two - one) / batches for one, two in zip(first, second, strict=True))
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak MB": peak(device), "kernels a batch": kernels, "waits a batch": waits}


def large(name: str, network: Network, device: torch.device, small: bool, clock: Clock) -> dict[str, Any]:
    """Measure one of the large networks."""
    torch.manual_seed(0)
    size = 4 if small else network.batch_size
    count = 4 * size if small else 8 * size
    data, model = network.data(count, small), network.make(small).to(device)
    passes = passes_of(model, data, size)
    own = min(passes.source.pass_batch_size, count // 4)  # two batches more, at least
    passes.source.pass_batch_size, batches = own, count // own

    def plain(examples: int) -> None:
        for start in range(0, examples, size):
            batch = [part.to(device) for part in data[start : start + size]]
            task(model, batch).backward()
            model.zero_grad()

    results: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters()), "pass batch": own}
    results["training's pass"] = measured(device, plain, count, count // size)
    kept: list[Curvature] = []

    def fitting(examples: int) -> None:
        kept[:] = [fitted(passes, examples)]

    if clock.allows(f"{name}: fitting", 60):
        results["fitting"] = measured(device, fitting, count, 2 * batches)
    if kept and clock.allows(f"{name}: scoring", 15):

        def scoring(examples: int) -> None:
            score_examples(passes, range(examples), curvature=kept[0], features=True)

        results["scoring"] = measured(device, scoring, count, batches)
    if device.type == "cuda" and clock.allows(f"{name}: short of memory", 15):
        results["short of memory"] = short(passes, count, device)
    for what, found in results.items():
        if isinstance(found, dict):
            told = ", ".join(f"{key} {value:.4g}" for key, value in found.items())
            print(f"{name}, {count} examples, {what}: {told}", flush=True)
    return results


def short(passes: ExampleGradients, count: int, device: torch.device) -> dict[str, float]:
    """Score gradients with half of the memory that they took: batches come in halves, the norms are the same."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    expected = score_examples(passes, range(count)).columns["grad_norm_squared"]
    taken, whole = torch.cuda.max_memory_allocated(device), torch.cuda.get_device_properties(device).total_memory
    held = torch.cuda.memory_allocated(device)
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(1.0, (held + (taken - held) / 2) / whole), device)
    try:
        found = score_examples(passes, range(count)).columns["grad_norm_squared"]
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
    size, most = passes.source.room.shrunk or (0, 0)
    return {"from": size, "to": most, "error": float(((found - expected).abs() / expected.abs()).max())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="narrow networks and few examples: tries the script")
    parser.add_argument("--seconds", type=float, default=450, help="after which no further part begins")
    parser.add_argument("--out", type=Path, help="JSON file for all numbers")
    asked = parser.parse_args()
    if asked.device == "cuda" and not torch.cuda.is_available():
        sys.exit("there is no GPU that torch can use; `--device cpu --small` tries the script without one.")
    device, clock, start = torch.device(asked.device), Clock(asked.seconds), time.perf_counter()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    print(f"{name}, torch {torch.__version__}")
    results: dict[str, Any] = {"device": name, "torch": torch.__version__}
    results["columns"] = compared(device, asked.small, clock)
    for title, network in NETWORKS.items():
        if clock.allows(title, 40):
            results[title] = large(title, network, device, asked.small, clock)
            if device.type == "cuda":
                torch.cuda.empty_cache()
    results |= {"left out": clock.left_out, "seconds": time.perf_counter() - start}
    print(f"{results['seconds']:.0f} s")
    if asked.out is not None:
        asked.out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
