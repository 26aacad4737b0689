"""What a report says of the training run itself, as it was recorded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_influence.audit.store.atomic import StoreError
from lightning_influence.audit.store.kept_run import KeptRun
from lightning_influence.replay.record import TrainingRecord


class Replayed:
    """The training run behind a report."""

    manifest: Mapping[str, Any]
    directory: Path | None

    def training_record(self) -> TrainingRecord:
        """Return the training run as it was recorded (``InfluenceAudit(record=True)``), with its states on the disk.

        Raises:
            StoreError: If there is none, or a file of it is damaged.
        """
        kept = None if self.directory is None else KeptRun.beside(self.directory)
        if kept is None or not kept.exists:
            told = (note for note in self.manifest.get("notes", ()) if "replayed" in note or "record of the" in note)
            why = next(told, "it was not recorded, see `InfluenceAudit(record=True)`")
            raise StoreError(f"there is no record of the training in {self.directory}: {why}.")
        return kept.read()
