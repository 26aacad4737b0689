"""Event files with audits, and the real TensorBoard on them."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lightning.pytorch.loggers import TensorBoardLogger
from page_data import picture, report_of

from lightning_influence.audit.report import AuditReport
from lightning_influence.loggers.exhibits import Page
from lightning_influence.loggers.writers import show
from lightning_influence.page.document import files


def write_blobs(run: Path, tag: str, blobs: Sequence[bytes], step: int = 9) -> None:
    """Write a page into an event file of its own."""
    logger = TensorBoardLogger(run, name="", version="")
    show(logger, Page(tag, blobs), step)
    logger.experiment.close()


def write_page(run: Path, report: AuditReport, tag: str = "audit/influence", step: int = 9, epochs: int = 5) -> None:
    """Write an audit, with pictures of its candidates, as the callback does."""
    pictures = {int(index): picture(int(index)) for index in report.candidates}
    queries = {(0, query): picture(query) for query in (0, 10, 20)}
    made = files(report, name=run.name, pictures=pictures, query_pictures=queries, epochs=(epochs, 5))
    write_blobs(run, tag, list(made.values()), step)


def write_runs(root: Path) -> dict[str, AuditReport]:
    """Write two finished audits and one that goes on; return them by run."""
    found = {
        "digits": report_of(200, labels={"verdict": "told", "noise_rate": 0.1}),
        "again": report_of(200, seed=1, created="2026-01-01"),
        "going_on": report_of(100, status="recording", created="2025-12-31"),
    }
    write_page(root / "digits", found["digits"])
    write_page(root / "again", found["again"])
    for epoch in range(2):
        write_page(root / "going_on", found["going_on"], "recording/influence", step=10 * epoch, epochs=epoch + 1)
    return found


@contextmanager
def tensorboard(logdir: Path, *options: str) -> Iterator[str]:
    """Run the real program on a free port; yield its address."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logdir), "--port", "0", "--host", "127.0.0.1"]
    with subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True) as running:
        assert running.stderr is not None
        said = []
        try:
            for line in running.stderr:
                said.append(line)
                if found := re.search(r"http://127\.0\.0\.1:\d+/", line):
                    # Else it waits as soon as the pipe is full.
                    threading.Thread(target=running.stderr.read, daemon=True).start()
                    yield found[0]
                    return
            raise AssertionError("".join(said))
        finally:
            running.kill()
