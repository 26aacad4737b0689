"""Runs functions of test modules in processes of their own.

They are forks of one server, which has imported torch, Lightning and this package once: a process that starts afresh
takes seconds for that. What a function is given is pickled, and nothing is inherited from the process that asks.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from which_lightning import PACKAGE

# Where a "spawn" would do, this is as good: a start method of `multiprocessing`.
METHOD = "forkserver"
multiprocessing.set_forkserver_preload([PACKAGE, "lightning_influence.callbacks", "torch.testing", "pytest"])
# The server inherits the environment, and a fork of a process with a pool of threads would hang.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def together(function: Callable[..., None], *arguments: Any, processes: int = 2, patience: float = 300) -> None:
    """Call ``function(rank, *arguments)`` in several processes at once; raise what one of them raises."""
    running = torch.multiprocessing.start_processes(
        function, args=arguments, nprocs=processes, join=False, start_method=METHOD
    )
    deadline = time.monotonic() + patience
    try:
        while not running.join(timeout=1):
            assert time.monotonic() < deadline, f"no end after {patience} s"
    finally:
        for process in running.processes:
            if process.is_alive():
                process.kill()


def as_ranks(function: Callable[[Path], None], directory: Path, patience: float) -> Path:
    """Call ``function(directory)`` in the two processes of a ``Trainer``; fail with what they have printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    try:
        together(_as_rank, function, str(directory), port, patience=patience)
    except BaseException as error:
        said = "\n".join(path.read_text()[-6000:] for path in sorted(directory.glob("output*.txt")))
        raise AssertionError(f"{error}\n{said}") from error
    return directory


def _as_rank(rank: int, function: Callable[[Path], None], directory: str, port: int) -> None:
    for name in [name for name in os.environ if name.startswith(("PL_", "SLURM_"))]:
        del os.environ[name]
    # What Lightning gives to the processes that it starts.
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0"}
    os.environ |= {"LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    output = os.open(f"{directory}/output{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(output, stream.fileno())
    function(Path(directory))
