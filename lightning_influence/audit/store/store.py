"""The audit directory on disk: every file whole or absent, nothing pickled, nothing overwritten.

Layout of `<log_dir>/influence/`:

| file | content |
|---|---|
| `manifest.json` | schema version, status, arguments, coverage, timings |
| `scores.parquet` | one row per training example |
| `pairs.parquet` | one row per pair of a query and one of its strongest training examples, if there are queries |
| `candidates.csv` | the suspicious rows, worst first, for people and spreadsheets |
| `factors/<block>.safetensors` | the curvature factors of one parameter block |
| `checkpoints/step-<step>.safetensors` | weights and step sizes at one time of training |

A file is written under a temporary name beside its place, flushed to the disk and renamed, so a reader meets
the old file or the new one. One process writes an audit at a time (rank 0); any number may read.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import pyarrow.parquet as pq
from numpy.typing import NDArray
from torch import Tensor

from lightning_influence.audit.columns import COLUMN_DESCRIPTIONS, PAIR_DESCRIPTIONS
from lightning_influence.audit.store.atomic import (
    CHECKPOINTS,
    FACTORS,
    SUFFIX,
    StoreError,
    block_file_name,
    block_name_of,
    claim,
    load_outline,
    load_tensors,
    local_path,
    packed_tensors,
    replacing,
    whole,
)
from lightning_influence.audit.store.encoding import Column, jsonable
from lightning_influence.audit.store.tables import packed_candidates, read_table, table_of
from lightning_influence.training.checkpoints import Checkpoint, one_too_many

SCHEMA_VERSION = 1
STATUSES = ("recording", "interrupted", "complete")

_PAIRS = "pairs.parquet"
_MANIFEST, _SCORES, _CANDIDATES = "manifest.json", "scores.parquet", "candidates.csv"
# Parts of a checkpoint, which prefix the names of its tensors.
_PARTS = ("parameters", "buffers", "preconditioner")
_VERSION = "lightning_influence.schema_version"
# A manifest of a million layers has a tenth of this.
_LARGEST_MANIFEST = 2**28


@dataclass(frozen=True)
class AuditStore:
    """One audit directory; get it from `create` (new) or `open` (existing), which check it.

    Args:
        directory: Absolute path of the audit directory.
    """

    directory: Path

    @classmethod
    def create(cls, directory: str | os.PathLike[str]) -> AuditStore:
        """Makes a fresh audit directory with status "recording".

        Takes `directory` if it is new or an empty folder, else the first free one of `directory-v1`,
        `directory-v2`, ... Processes that ask for the same directory at the same time get different ones.

        Raises:
            StoreError: The place cannot be written (found out by writing the first manifest).
        """
        wanted = path = local_path(directory)
        try:
            os.makedirs(wanted.parent, exist_ok=True)
            for version in itertools.count(1):
                if claim(path):
                    break
                path = Path(f"{wanted}-v{version}")
            store = cls(path)
            try:
                store.write_manifest({"status": "recording"})
            except StoreError:
                with suppress(OSError):
                    (path / FACTORS).rmdir()
                raise
        except (OSError, StoreError) as error:
            raise StoreError(
                f"Cannot create an audit directory at {wanted}: tried to make {path} and write {_MANIFEST} "
                f"there: {error.__cause__ or error}. Pass `dirpath=` with a folder this process may write."
            ) from error
        return store

    @classmethod
    def open(cls, directory: str | os.PathLike[str]) -> AuditStore:
        """Opens an existing audit directory, finished or not (see `status`).

        Raises:
            StoreError: No directory, no manifest, a damaged one, or one of a newer schema version.
        """
        path = local_path(directory)
        if not path.is_dir():
            found = "is a file" if path.exists() else "does not exist"
            raise StoreError(f"{path} {found}; expected an audit directory holding {_MANIFEST}.")
        store = cls(path)
        with store._reading(path):
            names = sorted(entry.name for entry in path.iterdir())
        if _MANIFEST not in names:
            listing = ", ".join(names[:8]) + (" and more" if len(names) > 8 else "") or "nothing"
            raise StoreError(f"{path} holds no audit: expected {_MANIFEST}, found {listing}.")
        _ = store.manifest
        return store

    @property
    def manifest(self) -> dict[str, Any]:
        """The manifest as it is on disk now.

        Raises:
            StoreError: It is missing or damaged, or a newer version of this package wrote it.
        """
        path = self.directory / _MANIFEST
        with self._reading(path):
            content = json.loads(whole(path, _LARGEST_MANIFEST), parse_constant=_refused)
        data: dict[str, Any] = content if isinstance(content, dict) else {}
        version = data.get("schema_version")
        if type(version) is not int or version < 1:
            raise StoreError(f"{path} is not an audit's: expected a schema_version, found {version!r}.")
        if version > SCHEMA_VERSION:
            raise StoreError(
                f"{path} has schema version {version}; this package reads up to {SCHEMA_VERSION}: upgrade "
                "lightning-influence."
            )
        return data

    @property
    def status(self) -> str:
        """One of `STATUSES`; anything but "complete" means that files may be missing."""
        status = self.manifest.get("status")
        if status not in STATUSES:
            raise StoreError(f"{self.directory} has status {status!r}; expected one of {STATUSES}.")
        return str(status)

    def write_manifest(self, manifest: Mapping[str, Any]) -> None:
        """Replaces the manifest; `schema_version` is filled in, a missing `status` keeps the one on disk.

        Tensors and arrays become (nested) lists; paths, dtypes and devices strings; integer keys strings; NaN
        and infinities null, because JSON has no such numbers.

        Raises:
            TypeError: A value with no JSON form; the message says where it is.
            ValueError: An unknown `status`, or two keys that become the same string.
            StoreError: The file cannot be written.
        """
        status = manifest.get("status") or self.status
        if status not in STATUSES:
            raise ValueError(f"status is {status!r}; expected one of {STATUSES}.")
        data = jsonable({**manifest, "schema_version": SCHEMA_VERSION, "status": status}, "manifest")
        text = json.dumps(data, indent=2, allow_nan=False) + "\n"
        with replacing(self.directory / _MANIFEST) as handle:
            handle.write(text.encode("ascii"))

    def write_scores(self, columns: Mapping[str, Column]) -> None:
        """Writes `scores.parquet`, dtypes and bits kept (bfloat16, which parquet lacks, becomes float32).

        Args:
            columns: Name to values `[N]`: numbers, booleans or strings, one entry per training example. Known
                names are stored with their meaning (`COLUMN_DESCRIPTIONS`).

        Raises:
            ValueError: No columns, a column that is not one-dimensional, or columns of different lengths.
            TypeError: Values that are neither numbers, booleans nor strings.
            StoreError: The file cannot be written.
        """
        self._write_table(_SCORES, columns)

    def read_scores(self) -> dict[str, NDArray[Any]]:
        """Reads `scores.parquet`: name to a writable array `[N]` (strings as dtype object).

        Raises:
            StoreError: The file is missing or damaged.
        """
        return self._read_table(_SCORES)

    def write_pairs(self, columns: Mapping[str, Column]) -> None:
        """Writes `pairs.parquet`, see `columns.PAIR_DESCRIPTIONS`.

        Args:
            columns: As for `write_scores`, one entry per pair.

        Raises:
            ValueError: As for `write_scores`.
            TypeError: As for `write_scores`.
            StoreError: The file cannot be written.
        """
        self._write_table(_PAIRS, columns, PAIR_DESCRIPTIONS)

    def read_pairs(self) -> dict[str, NDArray[Any]] | None:
        """Reads `pairs.parquet`: name to a writable array; None if the audit has no queries.

        Raises:
            StoreError: The file is damaged.
        """
        return self._read_table(_PAIRS) if os.path.lexists(self.directory / _PAIRS) else None

    def write_candidates(
        self, columns: Mapping[str, Column], *, label_names: Sequence[str] | Mapping[int, str] | None = None
    ) -> None:
        """Writes `candidates.csv` (RFC 4180, UTF-8): the rows with `candidate` true, by `rank`.

        Floats have 6 significant digits; NaN is an empty cell. Text that a spreadsheet would run as a formula
        gets a leading apostrophe.

        Args:
            columns: As for `write_scores`; `rank` and `candidate` are needed.
            label_names: Class number to name. Adds `label_name`, `predicted_name` and `suggested_name` beside
                the numbers; empty for the unknown label -1.

        Raises:
            ValueError: As for `write_scores`; `rank` or `candidate` is missing; a label has no name.
            TypeError: As for `write_scores`.
            StoreError: The file cannot be written.
        """
        content = packed_candidates(columns, label_names)
        with replacing(self.directory / _CANDIDATES) as handle:
            handle.write(content)

    def write_factors(
        self, block_name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
    ) -> None:
        """Writes the tensors of one parameter block; any strides, device or sharing of storage will do.

        Args:
            block_name: Module path of the block, any text (`""` is the root module).
            tensors: Name to dense tensor, any shape, dtype kept.
            metadata: Text stored with the tensors.

        Raises:
            TypeError: Metadata that is not text.
            ValueError: A tensor that is sparse, complex128 or called `__metadata__`: safetensors has no such.
            StoreError: The file cannot be written.
        """
        if "__metadata__" in tensors:
            raise ValueError(f"block {block_name!r}: safetensors reserves the tensor name '__metadata__'.")
        data = packed_tensors(tensors, metadata or {})
        with replacing(self._factor_path(block_name)) as handle:
            handle.write(data)

    def read_factors(self, block_name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Reads back `(tensors, metadata)` of one block, tensors on the CPU.

        Raises:
            StoreError: The block is not stored (the message lists those that are) or its file is damaged.
        """
        path = self._factor_path(block_name)
        if not path.is_file():
            stored = self.factor_names()
            raise StoreError(f"No factors of block {block_name!r} in {path.parent}; stored are {stored}.")
        with self._reading(path):
            return load_tensors(path)

    def factor_names(self) -> list[str]:
        """The names of the stored blocks, sorted."""
        files = (self.directory / FACTORS).glob(f"*{SUFFIX}")
        names = {block_name_of(file.name): file.name for file in files}
        return sorted(name for name, file_name in names.items() if block_file_name(name) == file_name)

    def write_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Writes one checkpoint of the training.

        Raises:
            ValueError: As for `write_factors`.
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
        with replacing(self._checkpoint_path(checkpoint.step)) as handle:
            handle.write(data)

    def read_checkpoint(self, step: int, *, outline: bool = False) -> Checkpoint:
        """Reads one checkpoint, tensors on the CPU.

        Args:
            step: Of the training.
            outline: Read the header only: tensors are on the device "meta".

        Raises:
            StoreError: There is none of this step (the message lists those that are) or its file is damaged.
        """
        path = self._checkpoint_path(step)
        if not path.is_file():
            raise StoreError(f"No checkpoint of step {step} in {path.parent}; stored are {self.checkpoint_steps()}.")
        with self._reading(path):
            tensors, about = load_outline(path) if outline else load_tensors(path)
            if missing := {"step_sizes", "steps", "optimizer"} - about.keys():
                raise ValueError(f"it holds no checkpoint, its metadata lack {sorted(missing)}")
            sizes, steps = dict(json.loads(about["step_sizes"])), int(about["steps"])
            if not all(isinstance(size, (int, float)) for size in sizes.values()):
                raise ValueError("its step sizes are no numbers")
            parts: dict[str, dict[str, Tensor]] = {part: {} for part in _PARTS}
            for key, tensor in tensors.items():
                part, _, name = key.partition("/")
                parts[part][name] = tensor
            return Checkpoint(
                step, parts["parameters"], parts["buffers"], sizes, steps, parts["preconditioner"], about["optimizer"]
            )

    def checkpoint_steps(self) -> list[int]:
        """The steps of the stored checkpoints, in order."""
        names = [file.stem for file in (self.directory / CHECKPOINTS).glob(f"step-*{SUFFIX}")]
        return sorted(int(name.removeprefix("step-")) for name in names if name.removeprefix("step-").isdecimal())

    def keep_checkpoint(self, checkpoint: Checkpoint, count: int, size: int) -> bool:
        """Writes a checkpoint, and drops others until the budget is kept; see `one_too_many`.

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
        self.write_checkpoint(checkpoint)
        steps = self.checkpoint_steps()
        while len(steps) > 1 and (len(steps) > count or self._checkpoint_bytes(steps) > size):
            place = one_too_many(steps)
            dropped = self.read_checkpoint(steps[place], outline=True)
            following = self.read_checkpoint(steps[place + 1])
            # In this order: a writer killed in between leaves steps that are counted twice, see `checkpoints`.
            self.write_checkpoint(following.standing_for(dropped))
            with suppress(OSError):
                self._checkpoint_path(steps.pop(place)).unlink()
        return True

    def checkpoints(self) -> StoredCheckpoints:
        """The stored checkpoints, in order; each is read when it is asked for."""
        return StoredCheckpoints(self)

    def _checkpoint_bytes(self, steps: Sequence[int]) -> int:
        return sum(self._checkpoint_path(step).stat().st_size for step in steps)

    def _checkpoint_path(self, step: int) -> Path:
        return self.directory / CHECKPOINTS / f"step-{step:08d}{SUFFIX}"

    def _factor_path(self, block_name: str) -> Path:
        return self.directory / FACTORS / block_file_name(block_name)

    def _write_table(
        self, file_name: str, columns: Mapping[str, Column], meanings: Mapping[str, str] = COLUMN_DESCRIPTIONS
    ) -> None:
        table = table_of(columns, meanings, {_VERSION: str(SCHEMA_VERSION)})
        with replacing(self.directory / file_name) as handle:
            pq.write_table(table, handle, write_page_checksum=True)

    def _read_table(self, file_name: str) -> dict[str, NDArray[Any]]:
        path = self.directory / file_name
        with self._reading(path):
            return read_table(path)

    @contextmanager
    def _reading(self, path: Path) -> Iterator[None]:
        """Turns what the libraries raise for a missing or damaged file into `StoreError`."""
        try:
            yield
        except FileNotFoundError as error:
            status = f" (status of the audit: {self.status!r})" if path.name != _MANIFEST else ""
            raise StoreError(f"{path} does not exist{status}; finish the audit or run it again.") from error
        except StoreError:
            raise
        except Exception as error:  # a damaged file may raise anything
            raise StoreError(f"{path} cannot be read: {error}. Run the audit again.") from error


def _refused(constant: str) -> None:
    raise ValueError(f"{constant} is no number in JSON")


class StoredCheckpoints(Sequence[Checkpoint]):
    """Checkpoints that stay on the disk until they are asked for.

    Of a dropped checkpoint whose steps the next one has taken over, a killed writer may have left the file.

    Attributes:
        outlines: The same with tensors on the device "meta": names, shapes and all else, at the price of the headers.
    """

    def __init__(self, store: AuditStore, outlines: Sequence[Checkpoint] | None = None) -> None:
        self._store = store
        if outlines is None:
            found: list[Checkpoint] = []
            for step in reversed(store.checkpoint_steps()):
                if not found or step <= found[-1].step - found[-1].steps:
                    found.append(store.read_checkpoint(step, outline=True))
            outlines = found[::-1]
        self.outlines = outlines

    def __len__(self) -> int:
        return len(self.outlines)

    @overload
    def __getitem__(self, place: int) -> Checkpoint: ...
    @overload
    def __getitem__(self, place: slice) -> StoredCheckpoints: ...
    def __getitem__(self, place: int | slice) -> Checkpoint | StoredCheckpoints:
        if isinstance(place, slice):
            return StoredCheckpoints(self._store, self.outlines[place])
        return self._store.read_checkpoint(self.outlines[place].step)
