"""What a training in processes of its own (``ddp_spawn``, ``ddp_notebook``) leaves to the one that started them.

Those get a copy of the callback, of which nothing comes back; no hook is called in the process that waits for them.
"""

from __future__ import annotations

import json
import os
import tempfile
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from lightning_influence.audit.report import AuditReport
from lightning_influence.audit.store.store import StoreError


class FromChild:
    """A note in a file that nobody else knows the name of, from copies in other processes to the one it was made in."""

    def __init__(self) -> None:
        self._file = Path(tempfile.gettempdir()) / f"lightning-influence-{uuid4().hex}.json"
        self._process = os.getpid()
        weakref.finalize(self, _removed, self._file, self._process)  # at the end of the process, too

    def __deepcopy__(self, memo: dict[int, Any]) -> FromChild:
        return FromChild()  # a copy is told of its own trainings

    def leave(self, report: AuditReport | None, why: str) -> None:
        """Tell where a report lies, or why there is none; nothing, in the process that would read it."""
        if os.getpid() == self._process:
            return
        directory = None if report is None else report.directory
        if report is not None and directory is None:
            why = "it was written to no directory, and the processes that had it are gone"
        with suppress(OSError):  # a full disk: training has ended well all the same
            part = self._file.with_suffix(f".{os.getpid()}")
            with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
                json.dump({"directory": directory and os.path.abspath(directory), "why": why}, file)
            part.replace(self._file)

    def forget(self) -> None:
        """Tell nothing of a training before the one that begins."""
        with suppress(OSError):
            self._file.unlink()

    def taken(self) -> tuple[AuditReport | None, str] | None:
        """Return the report of the last training elsewhere, or why there is none, once; None if there was no other."""
        if os.getpid() != self._process:  # what it has is its own
            return None
        try:
            told = json.loads(self._file.read_text(encoding="utf-8"))
            self._file.unlink()
        except (OSError, ValueError):
            return None
        if told["directory"] is None:
            return None, told["why"]
        try:
            return AuditReport.load(told["directory"]), ""
        except StoreError as error:
            return None, f"training ran in processes of its own, and what they wrote can't be read: {error}"


def _removed(file: Path, process: int) -> None:
    """Remove a note that nobody has read; not in a fork, whose copy of the callback goes before the note is read."""
    if os.getpid() == process:
        with suppress(OSError):
            file.unlink()
