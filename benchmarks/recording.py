"""What recording a run costs (``InfluenceAudit(record=True)``), in shares of a training step.

Steps with and without the recorder take turns in one process, each on a copy of the network of its own; the median of
the ratios of neighbours is printed, of wall time and of CPU time. The CNN has two convolutions on images of 32 x 32 in
batches of 32, dropout and AdamW: batches and the step both draw random numbers, which is the dearest case. Run
``make recording``.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_influence.replay.kept_states import KeptStates
from lightning_influence.replay.recorder import Recorder

NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 10)), (32, 64)),
    "cnn": (
        lambda: nn.Sequential(
            *(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Dropout(0.1), nn.Linear(32 * 8 * 8, 10)),
        ),
        (32, 3, 32, 32),
    ),
}


class Trained:
    """A network that takes steps."""

    def __init__(self, network: nn.Module, steps: int, *, record: bool) -> None:
        self.network = network
        self.optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
        self.recorder = Recorder(network, self.optimizer, examples=50_000, states=KeptStates(steps)) if record else None
        self.number = 0

    def step(self, images: Tensor, labels: Tensor, indices: list[int]) -> tuple[float, float]:
        """Take a step; return its seconds, of wall and of CPU."""
        recorder = self.recorder
        begun, used = time.perf_counter(), time.process_time()
        before = None if recorder is None else recorder.fetching()
        batch: Any = (images + 0.1 * torch.randn(images.shape), labels)
        if recorder is not None:
            recorder.fetched(batch, indices, before)
            recorder.begin(self.number, 0)
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.network(batch[0]), batch[1])
        if recorder is not None:
            recorder.differentiated(loss)
        loss.backward()
        if recorder is not None:
            recorder.stepping()
        self.optimizer.step()
        if recorder is not None:
            recorder.ended()
        self.number += 1
        return time.perf_counter() - begun, time.process_time() - used


def measure(name: str, steps: int) -> str:
    """Return a line of the table."""
    torch.manual_seed(0)
    make, shape = NETWORKS[name]
    network = make()
    plain, recorded = Trained(copy.deepcopy(network), steps, record=False), Trained(network, steps, record=True)
    images, labels = torch.randn(shape), torch.randint(10, shape[:1])
    wall, cpu, one = [], [], []
    for number in range(steps):
        indices = list(range(number, number + shape[0]))
        pair = [each.step(images, labels, indices) for each in (plain, recorded)[:: 1 if number % 2 else -1]]
        (a, b) = pair if number % 2 else pair[::-1]
        one.append(a[0])
        wall.append((a[0], b[0]))
        cpu.append((a[1], b[1]))
    assert recorded.recorder is not None
    size = recorded.recorder.bytes / steps

    def over(times: list[tuple[float, float]]) -> tuple[float, float]:
        between = statistics.median(b - a for a, b in times) / statistics.median(a for a, _ in times)
        return between, sum(b for _, b in times) / sum(a for a, _ in times) - 1

    (typical, whole), (typical_cpu, whole_cpu) = over(wall), over(cpu)
    return (
        f"{name:<8}{1e3 * statistics.median(one):>10.2f} ms{typical:>10.1%}{whole:>10.1%}"
        f"{typical_cpu:>10.1%}{whole_cpu:>10.1%}{size / 1e3:>10.1f} kB"
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=list(NETWORKS), metavar="network", help=", ".join(NETWORKS))
    parser.add_argument("--steps", type=int, default=400)
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {arguments.steps} steps")
    print(f"{'network':<8}{'step':>13}{'typical':>10}{'all':>10}{'CPU':>10}{'CPU, all':>10}{'a step':>13}")
    for name in arguments.networks:
        print(measure(name, arguments.steps), flush=True)


if __name__ == "__main__":
    main()
