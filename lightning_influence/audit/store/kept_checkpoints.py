"""The checkpoints of an audit, on the disk until they are asked for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import overload

from torch import Tensor

from lightning_influence.audit.store.atomic import StoreError, reading, replacing
from lightning_influence.audit.store.tensors import SUFFIX, load_outline, load_tensors, packed_tensors
from lightning_influence.training.checkpoints import Checkpoint, one_too_many

# Parts of a checkpoint, which prefix the names of its tensors.
_PARTS = ("parameters", "buffers", "preconditioner")


class KeptCheckpoints(Sequence[Checkpoint]):
    """Checkpoints in order, each read when it is asked for.

    Args:
        directory: Their folder.
        outlines: Which of them; by default all.
    """

    def __init__(self, directory: Path, outlines: Sequence[Checkpoint] | None = None) -> None:
        self.directory = directory
        if outlines is not None:
            self.outlines = outlines

    @cached_property
    def outlines(self) -> Sequence[Checkpoint]:
        """The same with tensors on the device "meta": all but dtypes and values, at the price of the headers.

        Of a dropped checkpoint whose steps the next one has taken over, a killed writer may have left the file.
        """
        found: list[Checkpoint] = []
        for step in reversed(self.steps()):
            if not found or step <= found[-1].step - found[-1].steps:
                found.append(self.read(step, outline=True))
        return found[::-1]

    def __len__(self) -> int:
        return len(self.outlines)

    @overload
    def __getitem__(self, place: int) -> Checkpoint: ...
    @overload
    def __getitem__(self, place: slice) -> KeptCheckpoints: ...
    def __getitem__(self, place: int | slice) -> Checkpoint | KeptCheckpoints:
        if isinstance(place, slice):
            return KeptCheckpoints(self.directory, self.outlines[place])
        return self.read(self.outlines[place].step)

    def __repr__(self) -> str:
        return f"KeptCheckpoints(of the steps {[each.step for each in self.outlines]}, {str(self.directory)!r})"

    def steps(self) -> list[int]:
        """Return the steps of the stored checkpoints, in order, those included that a killed writer has left."""
        names = [file.stem for file in self.directory.glob(f"step-*{SUFFIX}")]
        return sorted(int(name.removeprefix("step-")) for name in names if name.removeprefix("step-").isdecimal())

    def write(self, checkpoint: Checkpoint) -> None:
        """Write one checkpoint of the training.

        Raises:
            StoreError: The file cannot be written.
        """
        tensors = {f"{part}/{name}": tensor for part in _PARTS for name, tensor in getattr(checkpoint, part).items()}
        about = {
            "step": str(checkpoint.step),
            "steps": str(checkpoint.steps),
            "step_sizes": json.dumps(dict(checkpoint.step_sizes)),
            "optimizer": checkpoint.optimizer,
        }
        data = packed_tensors(tensors, about)
        with replacing(self._path(checkpoint.step)) as handle:
            handle.write(data)

    def read(self, step: int, *, outline: bool = False) -> Checkpoint:
        """Read one checkpoint, tensors on the CPU.

        Args:
            step: Of the training.
            outline: Read the header only: tensors are on the device "meta".

        Raises:
            StoreError: There is none of this step (the message lists those that are) or its file is damaged.
        """
        path = self._path(step)
        if not path.is_file():
            raise StoreError(f"No checkpoint of step {step} in {self.directory}; stored are {self.steps()}.")
        with reading(path):
            tensors, about = load_outline(path) if outline else load_tensors(path)
            if missing := {"step_sizes", "steps", "optimizer"} - about.keys():
                raise ValueError(f"it holds no checkpoint, its metadata lack {sorted(missing)}")
            sizes = {name: float(size) for name, size in json.loads(about["step_sizes"]).items()}
            parts: dict[str, dict[str, Tensor]] = {part: {} for part in _PARTS}
            for key, tensor in tensors.items():
                part, _, name = key.partition("/")
                parts[part][name] = tensor
            return Checkpoint(step, step_sizes=sizes, steps=int(about["steps"]), optimizer=about["optimizer"], **parts)

    def keep(self, checkpoint: Checkpoint, count: int, size: int) -> bool:
        """Write a checkpoint, and drop others until the budget is kept; see ``one_too_many``.

        The step sizes of a dropped one are added to those of the next.

        Args:
            checkpoint: The latest of the run.
            count: Largest number of checkpoints.
            size: Largest number of bytes of all their files.

        Returns:
            Whether it was kept: not if it alone is over the budget.

        Raises:
            StoreError: A file cannot be written.
        """
        if not count or checkpoint.bytes > size:
            return False
        self.write(checkpoint)
        steps = self.steps()
        while len(steps) > 1 and (len(steps) > count or sum(self._path(s).stat().st_size for s in steps) > size):
            place = one_too_many(steps)
            dropped = self.read(steps[place], outline=True)
            following = self.read(steps[place + 1])
            # In this order: a writer killed in between leaves steps that are counted twice, see `outlines`.
            self.write(following.standing_for(dropped))
            with suppress(OSError):
                self._path(steps.pop(place)).unlink()
        return True

    def _path(self, step: int) -> Path:
        return self.directory / f"step-{step:08d}{SUFFIX}"
