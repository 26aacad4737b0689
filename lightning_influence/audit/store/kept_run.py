"""A recorded training run: its steps, its states and, where they can't be fetched again, its batches."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_influence.audit.store.atomic import StoreError, reading, replacing
from lightning_influence.audit.store.tensors import SUFFIX, load_tensors, packed_tensors
from lightning_influence.replay import files
from lightning_influence.replay.kept_states import bytes_of
from lightning_influence.replay.record import RunState, TrainingRecord

# Batches of one file take more than this at most by one.
_FILE_BYTES = 2**26


@dataclass(frozen=True)
class KeptRun:
    """The folder of a record, which is also where states are put that are too large for the memory.

    Args:
        directory: The folder.
    """

    directory: Path

    @classmethod
    def beside(cls, audit: Path) -> KeptRun:
        """Return the record that lies in the directory of an audit."""
        return cls(audit / "training")

    @property
    def exists(self) -> bool:
        """Whether there is a whole record."""
        return self._steps.is_file()

    def put(self, state: RunState) -> None:
        """Write a state.

        Raises:
            StoreError: The file cannot be written.
        """
        self._write(self._state(state.step), files.packed_state(state))

    def get(self, step: int) -> RunState:
        """Read a state.

        Raises:
            StoreError: It is missing or damaged.
        """
        with reading(self._state(step)):
            return files.restored_state(load_tensors(self._state(step)))

    def drop(self, step: int) -> None:
        """Remove a state, if it is there."""
        with suppress(OSError):
            self._state(step).unlink(missing_ok=True)

    def write(self, record: TrainingRecord) -> None:
        """Write a record; the steps last: without them there is none.

        Raises:
            StoreError: A file cannot be written.
            ValueError: As ``packed_batches``.
        """
        for step, state in record.states.items():
            if not self._state(step).is_file():
                self.put(state)
        kept: dict[int, Any] = {}
        count = 0
        batches = [batch.kept for step in record.steps for batch in step.batches]
        for number, batch in enumerate(batches):
            if batch is not None:
                kept[number] = batch
            if kept and (number == len(batches) - 1 or bytes_of(kept) > _FILE_BYTES):
                self._write(self.directory / f"batches-{count:05d}{SUFFIX}", files.packed_batches(kept))
                kept, count = {}, count + 1
        tensors, text = files.packed_steps(record)
        self._write(self._steps, (tensors, text | {"files_of_batches": str(count)}))

    def read(self) -> TrainingRecord:
        """Read the record; its states are read when they are asked for.

        Raises:
            StoreError: It is missing or damaged.
        """
        with reading(self._steps):
            tensors, text = load_tensors(self._steps)
            states = _States(self, json.loads(text["states"]))
            record = files.restored_steps((tensors, text), states)
            count = int(text["files_of_batches"])
        if missing := [step for step in states if not self._state(step).is_file()]:
            raise StoreError(f"{self.directory} lacks the states of the steps {missing[:5]}; train again to replay.")
        batches: dict[int, Any] = {}
        for number in range(count):
            path = self.directory / f"batches-{number:05d}{SUFFIX}"
            with reading(path):
                batches |= files.restored_batches(load_tensors(path))
        return files.with_batches(record, batches) if batches else record

    @property
    def _steps(self) -> Path:
        return self.directory / f"steps{SUFFIX}"

    def _state(self, step: int) -> Path:
        return self.directory / f"state-{step:08d}{SUFFIX}"

    def _write(self, path: Path, packed: files.Packed) -> None:
        data = packed_tensors(*packed)
        with replacing(path) as handle:
            handle.write(data)


class _States(Mapping[int, RunState]):
    """States on a disk."""

    def __init__(self, run: KeptRun, steps: list[int]) -> None:
        self._run, self._steps = run, steps

    def __getitem__(self, step: int) -> RunState:
        if step not in self._steps:
            raise KeyError(step)
        return self._run.get(step)

    def __iter__(self) -> Iterator[int]:
        return iter(self._steps)

    def __len__(self) -> int:
        return len(self._steps)
