"""What recording adds to the time of a training step: training dynamics, and TracIn in flight.

Networks of ``networks.py`` train under a Lightning Trainer in batches of 32. A few batches without recording, a few
with the training dynamics alone, and a few with TracIn in flight, too, follow each other in one training run, so that
all three meet the machine in the same state. The first of each few are not timed: a batch that holds more memory than
the next one leaves it a heap that has to grow again. Medians of the time from one batch to the next are compared; to
those with recording their share of what is computed for many batches at once is added. The clock is CPU time with one
thread by default, which other work on the machine disturbs less; ``--wall`` takes the time of day and all threads. Run
``python benchmarks/in_flight.py``.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
import networks
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import InfluenceAudit, TracIn
from lightning_influence.training.flight.pace import IN_A_ROW, SETTLING, Pace

_WARM_UP = 12
BATCH = 32
WAYS = ("nothing", "dynamics", "in flight")
BUDGET = 0.1


class Module(pl.LightningModule):
    """Cross-entropy."""

    def __init__(self, net: nn.Module, optimizer: str) -> None:
        super().__init__()
        self.net, self.optimizer = net, optimizer

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the mean loss."""
        return networks.task(self.net, batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return SGD with momentum, or Adam."""
        if self.optimizer == "adam":
            return torch.optim.Adam(self.parameters(), lr=1e-3)
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


class Alternating(InfluenceAudit):
    """Records batches in turn in different ways; only what it adds to a step.

    Args:
        clock: Returns seconds.
        tracin: How TracIn is computed in flight.
        ways: Of ``WAYS``, to take in turn.
    """

    def __init__(self, clock: Callable[[], float], tracin: TracIn, ways: Sequence[str] = WAYS) -> None:
        super().__init__(tracin=tracin, curvature="identity", verify=False)
        self.clock, self.ways = clock, ways
        # Batches in flight by whether they were measured: not all are, with a budget.
        self.steps: dict[tuple[str, bool], list[float]] = {(way, due): [] for way in ways for due in (True, False)}
        self.batches = 0
        self.flushed = 0.0

    @property
    def pace(self) -> Pace:
        """Which batches are measured in flight."""
        assert self._recording is not None
        return self._recording.pace

    @property
    def way(self) -> str:
        """How the running batch is recorded."""
        return self.ways[(self.batches - 1) // IN_A_ROW % len(self.ways)]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Set up, and time what is computed for many batches at once."""
        super().on_train_start(trainer, pl_module)
        recording = self._recording
        assert recording is not None
        assert self._run is not None
        self.in_flight, self.measured = self._run.listener.flight, False
        flush = recording.dynamics.flush

        def timed() -> None:
            start = self.clock()
            flush()
            self.flushed += self.clock() - start

        recording.dynamics.flush = timed  # type: ignore[method-assign]

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note the time, and set up what this batch is recorded with."""
        now = self.clock()
        settled = (self.batches - 1) % IN_A_ROW >= SETTLING
        if self.batches > _WARM_UP and settled and batch_idx and not self.pace.timing:
            due = self.in_flight is None or self.way != "in flight" or self.measured
            self.steps[self.way, due].append(now - self.before)
        self.batches += 1
        self.before = self.clock()
        assert self._run is not None
        listener = self._run.listener
        listener.flight = self.in_flight if self.way == "in flight" else None
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self.measured = listener.batch is not None and listener.batch.measured
        if self.way == "nothing":
            listener.stop()

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        """Record it if this batch is recorded."""
        if self.way != "nothing":
            super().on_before_optimizer_step(trainer, pl_module, optimizer)

    def on_train_epoch_end(self, *_: Any) -> None:
        """Do nothing."""

    def on_train_end(self, *_: Any) -> None:
        """Compute what waits."""
        assert self._recording is not None
        self._recording.dynamics.flush()

    def seconds(self) -> dict[str, float]:
        """Return the time of a step by the way it is recorded."""
        recorded = self.batches * (1 - 1 / len(self.ways))
        found = {}
        for way in self.ways:
            measured, others = (self.steps[way, due] for due in (True, False))
            found[way] = statistics.median(measured)
            if others:  # of `every` batches one is measured
                every = self.pace.every
                found[way] = (found[way] + (every - 1) * statistics.median(others)) / every
            found[way] += 0.0 if way == "nothing" else self.flushed / recorded
        return found


def _train(audit: Alternating, make: Callable[[], nn.Module], data: TensorDataset, optimizer: str, steps: int) -> None:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as directory:
        trainer = pl.Trainer(
            max_steps=steps, callbacks=[audit], logger=False, accelerator="cpu", default_root_dir=directory,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(Module(make(), optimizer), DataLoader(data, BATCH, shuffle=True))


def measure(
    make: Callable[[], nn.Module], data: TensorDataset, optimizer: str, steps: int, clock: Callable[[], float]
) -> tuple[float, float, float]:
    """Train for a while, a third of the steps in each of the three ways, a few at a time.

    Returns:
        The seconds of a plain step, and what the dynamics, and TracIn in flight on top, add, as shares of it.
    """
    audit = Alternating(clock, TracIn(mode="step"))
    _train(audit, make, data, optimizer, steps)
    plain, dynamics, flight = audit.seconds().values()
    return plain, dynamics / plain - 1, flight / plain - 1


def measure_paced(
    make: Callable[[], nn.Module],
    data: TensorDataset,
    optimizer: str,
    steps: int,
    clock: Callable[[], float],
    overhead: float,
) -> tuple[float, float, int]:
    """Train for a while with a budget, half of the steps plain.

    Returns:
        The seconds of a plain step, what recording adds to it, as a share, and of how many steps one was measured.

    Raises:
        RuntimeError: If there were too few steps to choose the pace.
    """
    audit = Alternating(clock, TracIn(mode="step", overhead=overhead), ("nothing", "in flight"))
    _train(audit, make, data, optimizer, steps)
    if audit.pace.timing or not audit.steps["in flight", True]:
        raise RuntimeError(f"{steps} steps are too few to choose a pace and time it; expected some 300.")
    plain, flight = audit.seconds().values()
    return plain, flight / plain - 1, audit.pace.every


def bare_norms(net: nn.Module, data: TensorDataset, clock: Callable[[], float], repetitions: int = 60) -> float:
    """Return the seconds of what TracIn takes of a step at the very least, in bare torch.

    For each linear map what its inputs and output gradients have to be read for in this step: their lengths where there
    is a row of them per example, else every example's squared norm in the fastest form. Nothing else: no biases, no
    convolutions, no norms, no sums over layers.

    Args:
        net: The network.
        data: A batch of it gives the shapes; the rows are random.
        clock: Returns seconds.
        repetitions: The median is of so many.
    """
    rows: list[tuple[Tensor, Tensor]] = []

    def note(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        (x,), n = args, len(output)
        rows.append((torch.randn(n, x[0].numel() // x.shape[-1], x.shape[-1]), torch.randn_like(output)))

    hooks = [module.register_forward_hook(note) for module in net.modules() if isinstance(module, nn.Linear)]
    with torch.no_grad():
        networks.task(net, data[:BATCH])
    for hook in hooks:
        hook.remove()
    rows = [(x, g.view(len(x), x.shape[1], -1)) for x, g in rows]
    return sum(min(_median(form, x, g, clock, repetitions) for form in _forms(x)) for x, g in rows)


def _forms(x: Tensor) -> list[Callable[[Tensor, Tensor], object]]:
    """Return the ways to the squared norms."""

    def lengths(x: Tensor, g: Tensor) -> object:
        return torch.linalg.vector_norm(x[:, 0], dim=1), torch.linalg.vector_norm(g[:, 0], dim=1)

    def formed(x: Tensor, g: Tensor) -> object:
        return torch.bmm(g.transpose(1, 2), x).square_().sum((1, 2))

    def pairs(x: Tensor, g: Tensor) -> object:
        return torch.bmm(x, x.transpose(1, 2)).mul_(torch.bmm(g, g.transpose(1, 2))).sum((1, 2))

    def halves(x: Tensor, g: Tensor) -> object:
        """Pairs are symmetric: three quarters of them tell."""
        half = x.shape[1] // 2
        (x_first, x_second), (g_first, g_second) = ((t[:, :half], t[:, half:]) for t in (x, g))
        left = torch.bmm(x, x_first.transpose(1, 2)).mul_(torch.bmm(g, g_first.transpose(1, 2)))
        right = torch.bmm(x_second, x_second.transpose(1, 2)).mul_(torch.bmm(g_second, g_second.transpose(1, 2)))
        return left[:, :half].sum((1, 2)) + 2 * left[:, half:].sum((1, 2)) + right.sum((1, 2))

    return [lengths] if x.shape[1] == 1 else [formed, pairs, halves]


def _median(
    form: Callable[[Tensor, Tensor], object], x: Tensor, g: Tensor, clock: Callable[[], float], repetitions: int
) -> float:
    found = []
    with torch.no_grad():
        for _ in range(repetitions):
            start = clock()
            form(x, g)
            found.append(clock() - start)
    return statistics.median(found)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600, help="of the MLP; the others take half of them")
    parser.add_argument("--wall", action="store_true", help="time of day and all threads instead of CPU time")
    parser.add_argument("--only", default="", help="names of networks, separated by commas")
    parser.add_argument("--optimizers", default="sgd,adam")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    clock = time.perf_counter if arguments.wall else time.process_time
    if not arguments.wall:
        torch.set_num_threads(1)
    kind = "wall" if arguments.wall else "CPU"
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {kind} time")
    columns = f"{'dynamics':>11}{'+ in flight':>13}{'in flight alone':>17}{f'budget {BUDGET:.0%}':>13}"
    print(f"{'network':<13}{'optimizer':<11}{'step':>10}{columns}")
    for name in arguments.only.split(",") if arguments.only else ("mlp", "cnn", "transformer"):
        make, data = networks.NETWORKS[name], networks.data(name, 2000)
        steps = arguments.steps if name == "mlp" else arguments.steps // 2
        for optimizer in arguments.optimizers.split(","):
            plain, dynamics, both = measure(make, data, optimizer, steps, clock)
            _, share, every = measure_paced(make, data, optimizer, steps, clock, BUDGET)
            cells = f"{dynamics:>11.1%}{both:>13.1%}{both - dynamics:>17.1%}{share:>13.1%} (1 of {every})"
            print(f"{name:<13}{optimizer:<11}{1e3 * plain:>7.2f} ms{cells}", flush=True)


if __name__ == "__main__":
    main()
