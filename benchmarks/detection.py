"""How well wrong labels are found, how many are proposed, and what acting on it does: a grid beside cleanlab.

make detection

Cells of data, network, optimizer, length and label noise (``detection_cells.py``) are trained over three seeds, with
the audit, and in five folds for cleanlab. Every result is kept in ``.detection`` as soon as it is there, so a run that
was stopped goes on where it was. Two thirds of the cells are what defaults may be chosen on; the others are reported
apart.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import detection_table
from detection_cells import CELLS, CLEANLAB, RECIPE, SEEDS, Cell, held_out
from detection_table import OURS, PEER

ROOT = Path(__file__).parent.parent
CACHE = ROOT / ".detection"
# Seconds of a thread that 1,000 examples take in an epoch, roughly: for what remains.
_COSTS = {"mlp": 0.03, "cnn": 0.17, "resnet": 0.25}


@dataclass(frozen=True)
class Job:
    """One half of a run of a cell: the audit (``lightning-influence``) or the five folds (``cleanlab``)."""

    cell: Cell
    seed: int
    package: str

    @property
    def path(self) -> Path:
        """Where the result is kept: elsewhere for other settings and another release."""
        release = CLEANLAB if self.package == PEER else importlib.metadata.version(OURS)
        settings = [asdict(self.cell), RECIPE, release]
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
        return CACHE / self.package / f"{self.cell.name}_{self.seed}_{digest}.json"

    @property
    def cost(self) -> float:
        """Seconds that it takes, roughly."""
        size = {"digits": 1500, "cancer": 569, "wine": 178}.get(self.cell.data, self.cell.examples)
        plain = _COSTS[self.cell.net] * size / 1000 * self.cell.epochs
        return 4 * plain + 0.5 if self.package == PEER else 3 * plain + 3


def work(job: Job, record: Path | None) -> tuple[dict[str, Any], float]:
    """Do a job and keep its result."""
    import numpy as np
    import torch
    from detection_runs import audited, out_of_sample
    from detection_scores import of_audit, of_cleanlab

    torch.set_num_threads(1)
    start = time.process_time()  # of one thread, so that a busy machine does not count
    job.path.parent.mkdir(parents=True, exist_ok=True)
    if job.package == OURS:
        arrays = None if record is None else record / f"{job.cell.name}_{job.seed}.npz"
        data, report, train = audited(job.cell, job.seed, arrays)
        result = of_audit(report, data, train)
    else:
        predicted = job.path.with_suffix(".npy")  # what takes long: how it is judged may change
        if not predicted.exists():
            np.save(predicted, out_of_sample(job.cell, job.seed))
        result = of_cleanlab(np.load(predicted), job.cell, job.seed)
    seconds = time.process_time() - start
    part = job.path.with_suffix(".part")
    part.write_text(json.dumps({**result, "seconds": seconds}))
    part.replace(job.path)
    return result, seconds


def jobs(cells: Sequence[Cell], seeds: Sequence[int], packages: Sequence[str]) -> Iterator[Job]:
    """Yield all jobs, seed after seed, so that there is a bit of everything early on."""
    for seed in seeds:
        for cell in cells:
            yield from (Job(cell, seed, package) for package in packages)


def run(waiting: Sequence[Job], workers: int, record: Path | None) -> int:
    """Do jobs in processes of a thread each; return how many have failed."""
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that are started now
    start, done, failed = time.perf_counter(), 0.0, 0
    total = sum(job.cost for job in waiting)
    with ProcessPoolExecutor(workers, get_context("spawn"), initializer=_end_with_parent) as pool:
        futures: dict[Future[Any], Job] = {pool.submit(work, job, record): job for job in waiting}
        try:
            for number, future in enumerate(as_completed(futures), 1):
                job = futures[future]
                done += job.cost
                minutes = (time.perf_counter() - start) / 60 * (total - done) / done
                try:
                    result, seconds = future.result()
                    said = f"{seconds:6.1f} s, {result['n']:5d} proposed, F1 {result['f1']:.2f}"
                except Exception as error:  # the other cells are not lost to it
                    failed += 1
                    said = f"failed: {type(error).__name__}: {error}"
                print(
                    f"{number}/{len(waiting)} {job.cell.name} seed {job.seed}, {job.package}: {said}; "
                    f"{minutes:.0f} min left",
                    flush=True,
                )
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            sys.exit("stopped; the same command goes on from here.")
    return failed


def _end_with_parent() -> None:
    """Let a worker whose parent was killed not wait for jobs for ever."""

    def watch() -> None:
        parent = parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def results(cells: Sequence[Cell], seeds: Sequence[int]) -> dict[tuple[str, int, str], dict[str, Any]]:
    """Return what is there, by name of the cell, seed and package."""
    kept = {(job.cell.name, job.seed, job.package): job.path for job in jobs(cells, seeds, [OURS, PEER])}
    return {key: json.loads(path.read_text()) for key, path in kept.items() if path.exists()}


def main() -> None:
    """Run what has no result yet, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", metavar="PATTERN", help="names of cells, such as 'mnist-*-pair*'")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--fresh", action="store_true", help="run the audits again (cleanlab's part is kept)")
    parser.add_argument("--ours", action="store_true", help="leave cleanlab's part as it is")
    parser.add_argument("--table", action="store_true", help="only write the tables of what is there")
    parser.add_argument("--list", action="store_true", help="only list the cells")
    parser.add_argument("--record", type=Path, metavar="DIR", help="also keep the evidence of every audit, as .npz")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results" / "detection.md")
    arguments = parser.parse_args()
    chosen = [cell for cell in CELLS if fnmatch(cell.name, arguments.only)]
    if not chosen:
        parser.error(f"no cell is named like {arguments.only!r}; --list names them all.")
    if arguments.list:
        apart = held_out()
        print(*(f"{cell.name:40}{'held out' if cell.name in apart else 'chosen on'}" for cell in chosen), sep="\n")
        return
    if not (arguments.table or arguments.ours) and importlib.util.find_spec(PEER) is None:
        parser.error("cleanlab is not installed: `make detection` does that; --ours does without.")
    failed = 0
    if not arguments.table:
        packages = [OURS] if arguments.ours else [OURS, PEER]
        every = list(jobs(chosen, arguments.seeds, packages))
        if arguments.fresh:
            for job in every:
                if job.package == OURS:
                    job.path.unlink(missing_ok=True)
        waiting = [job for job in every if not job.path.exists()]
        print(f"{len(waiting)} of {len(every)} parts of runs are to be done", flush=True)
        failed = run(waiting, arguments.workers, arguments.record)
    arguments.out.write_text(detection_table.page(results(CELLS, SEEDS)))
    print(f"wrote {arguments.out}")
    if failed:
        sys.exit(f"{failed} parts have failed; the same command tries them again.")


if __name__ == "__main__":
    main()
