"""Runs a test file once more, as several processes of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import lightning_influence


def run_file(file: str, directory: Path, patience: float) -> Path:
    """Run a file as a program with a directory for what it writes; fail with its output unless it ends well in time."""
    root = Path(lightning_influence.__file__).parent.parent
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PL_", "SLURM_"))}
    environment |= {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
    with open(directory / "output.txt", "w") as output:
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", file, str(directory)],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # to end the process that it starts along with it
        )
        try:
            code = process.wait(patience)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    said = (directory / "output.txt").read_text()
    assert code is not None, f"no end after {patience} s:\n{said[-4000:]}"
    assert code == 0, said[-6000:]
    return directory
