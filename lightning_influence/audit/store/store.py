"""The audit directory on disk: every file whole or absent, nothing pickled, nothing overwritten.

Layout of `<log_dir>/influence/`:

| file | content |
|---|---|
| `manifest.json` | schema version, status, arguments, coverage, timings |
| `scores.parquet` | one row per training example |
| `pairs.parquet` | one row per pair of a query and one of its strongest training examples, if there are queries |
| `candidates.csv` | the suspicious rows, worst first, for people and spreadsheets |
| `columns.md` | what the columns mean |
| `audit.json`, `pictures-<chunk>.json` | the same for the page, with pictures of those that are looked at |
| `curves/epoch-<epoch>.safetensors` | loss, margin and probability of each example in one epoch |
| `factors/<block>.safetensors` | the curvature factors of one parameter block |
| `checkpoints/step-<step>.safetensors` | weights and step sizes at one time of training |
| `training/*.safetensors` | the training run as it was recorded: its steps, states, and kept batches |

A file is written under a temporary name beside its place, flushed to the disk and renamed, so a reader meets
the old file or the new one. One process writes an audit at a time (rank 0); any number may read.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from lightning_influence.audit.columns import COLUMNS, meaning_in_pairs
from lightning_influence.audit.store.atomic import FACTORS, StoreError, claim, local_path, reading, replacing, whole
from lightning_influence.audit.store.kept_checkpoints import KeptCheckpoints
from lightning_influence.audit.store.kept_curves import KeptCurves
from lightning_influence.audit.store.tables import candidates_csv, read_table, write_table
from lightning_influence.audit.store.tensors import (
    SUFFIX,
    block_file_name,
    block_name_of,
    load_tensors,
    packed_tensors,
)

SCHEMA_VERSION = 1
STATUSES = ("recording", "interrupted", "complete")

_PAIRS, PAGE = "pairs.parquet", "audit.json"
_MANIFEST, _SCORES, _CANDIDATES, _GLOSSARY = "manifest.json", "scores.parquet", "candidates.csv", "columns.md"
_CHECKPOINTS, _CURVES = "checkpoints", "curves"
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
        """Opens an existing audit directory, finished or not (see `status`), or the only one inside a run's directory.

        Raises:
            StoreError: No directory, no manifest, a damaged one, or one of a newer schema version; several audits.
        """
        path = local_path(directory)
        if not path.is_dir():
            found = "is a file" if path.exists() else "does not exist"
            raise StoreError(f"{path} {found}; expected an audit directory holding {_MANIFEST}.")
        store = cls(path)
        with reading(path):
            names = sorted(entry.name for entry in path.iterdir())
        if _MANIFEST not in names:
            inside = _audits_inside(path)
            if len(inside) == 1:
                return cls.open(inside[0])
            if inside:
                listing = ", ".join(str(each.relative_to(path)) for each in inside[:8])
                raise StoreError(f"{path} has {len(inside)} audits inside it: {listing}. Pass the path of one of them.")
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
        with reading(path):
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
            TypeError: A value with no JSON form.
            ValueError: An unknown `status`.
            StoreError: The file cannot be written.
        """
        status = manifest.get("status") or self.status
        if status not in STATUSES:
            raise ValueError(f"status is {status!r}; expected one of {STATUSES}.")
        data = jsonable({**manifest, "schema_version": SCHEMA_VERSION, "status": status})
        text = json.dumps(data, indent=2, allow_nan=False) + "\n"
        with replacing(self.directory / _MANIFEST) as handle:
            handle.write(text.encode("ascii"))

    def write_scores(self, columns: Mapping[str, ArrayLike]) -> None:
        """Writes `scores.parquet`, dtypes and bits kept.

        Args:
            columns: Name to values `[N]`: numbers, booleans or strings, one entry per training example. Known
                names are stored with their meaning (`columns.COLUMNS`).

        Raises:
            ValueError: A column that is not one-dimensional, or columns of different lengths.
            StoreError: The file cannot be written.
        """
        self._write_table(_SCORES, columns, {name: column.description for name, column in COLUMNS.items()})

    def read_scores(self) -> dict[str, NDArray[Any]]:
        """Reads `scores.parquet`: name to a writable array `[N]` (strings as dtype object).

        Raises:
            StoreError: The file is missing or damaged.
        """
        return self._read_table(_SCORES)

    def write_pairs(self, columns: Mapping[str, ArrayLike]) -> None:
        """Writes `pairs.parquet`, one entry per pair, see `columns.PAIR_DESCRIPTIONS` and `meaning_in_pairs`.

        Raises:
            ValueError: As for `write_scores`.
            StoreError: The file cannot be written.
        """
        self._write_table(_PAIRS, columns, {name: meaning_in_pairs(name) for name in columns})

    def read_pairs(self) -> dict[str, NDArray[Any]] | None:
        """Reads `pairs.parquet`: name to a writable array; None if the audit has no queries.

        Raises:
            StoreError: The file is damaged.
        """
        return self._read_table(_PAIRS) if os.path.lexists(self.directory / _PAIRS) else None

    def write_candidates(self, columns: Mapping[str, ArrayLike], label_names: Sequence[str] | None = None) -> None:
        """Writes `candidates.csv` (RFC 4180, UTF-8): the rows with `candidate` true, by `rank`.

        Its first columns, `decision` and `new_label`, are empty, for `AuditReport.apply_review` to read back. Floats
        have 6 significant digits; NaN is an empty cell. Text that a spreadsheet would run as a formula, and ids that
        it would take for numbers or dates (`0042`), get a leading apostrophe. Where there is more than ASCII, a byte
        order mark comes first (in Python, the encoding "utf-8-sig").

        Args:
            columns: As for `write_scores`; `rank` and `candidate` are needed.
            label_names: Name of each class. Adds `label_name`, `predicted_name` and `suggested_name` beside
                the numbers; empty for the unknown label -1 and classes without a name.

        Raises:
            StoreError: The file cannot be written.
        """
        self._write(_CANDIDATES, candidates_csv(columns, label_names))

    def write_glossary(self, text: str) -> None:
        """Writes `columns.md`, see `glossary.glossary`.

        Raises:
            StoreError: The file cannot be written.
        """
        self._write(_GLOSSARY, text.encode())

    def write_page(self, files: Mapping[str, bytes]) -> None:
        """Writes `audit.json` and the pictures that it names; if that fails, or there is none, an older one goes.

        Args:
            files: Name to content.

        Raises:
            StoreError: A file cannot be written.
        """
        done = False
        try:
            for name in sorted(files, key=lambda name: name == PAGE):  # it names the others
                self._write(name, files[name])
            done = PAGE in files
        finally:
            if not done:
                with suppress(OSError):
                    (self.directory / PAGE).unlink(missing_ok=True)

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
            StoreError: The file cannot be written.
        """
        data = packed_tensors(tensors, metadata or {})
        with replacing(self.directory / FACTORS / block_file_name(block_name)) as handle:
            handle.write(data)

    def factors(self) -> dict[str, tuple[dict[str, Tensor], dict[str, str]]]:
        """Reads the stored blocks: name to tensors, on the CPU, and metadata, sorted; empty if there is none.

        Raises:
            StoreError: A file is damaged.
        """
        found = {}
        for path in (self.directory / FACTORS).glob(f"*{SUFFIX}"):
            name = block_name_of(path.name)
            if block_file_name(name) == path.name:
                with reading(path):
                    found[name] = load_tensors(path)
        return dict(sorted(found.items()))

    @property
    def curves(self) -> KeptCurves:
        """The stored curves."""
        return KeptCurves(self.directory / _CURVES)

    def checkpoints(self) -> KeptCheckpoints:
        """The stored checkpoints, in order; each is read when it is asked for."""
        return KeptCheckpoints(self.directory / _CHECKPOINTS)

    def _write(self, file_name: str, content: bytes) -> None:
        with replacing(self.directory / file_name) as handle:
            handle.write(content)

    def _write_table(self, file_name: str, columns: Mapping[str, ArrayLike], meanings: Mapping[str, str]) -> None:
        with replacing(self.directory / file_name) as handle:
            write_table(handle, columns, meanings, {_VERSION: str(SCHEMA_VERSION)})

    def _read_table(self, file_name: str) -> dict[str, NDArray[Any]]:
        path = self.directory / file_name
        with reading(path, "" if path.exists() else f" (status of the audit: {self.status!r})"):
            return read_table(path)


def jsonable(value: Any) -> Any:
    """`value` in terms of JSON, see `AuditStore.write_manifest`."""
    return json.loads(json.dumps(value, default=_plain), parse_constant=lambda word: None)


def _audits_inside(path: Path) -> list[Path]:
    """Return the audits in a run's directory, or in that of several runs: those of the highest level with any."""
    for pattern in ("*", "*/*", "*/*/*"):
        folders = [file.parent for file in sorted(path.glob(f"{pattern}/{_MANIFEST}"))]
        if audits := [each for each in folders if each.name.startswith("influence") or (each / _SCORES).exists()]:
            return audits
    return []


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor | np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, os.PathLike | torch.dtype | torch.device):
        return str(value)
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(
        f"{str(value)[:80]} is a {type(value).__name__}, which the manifest cannot hold; expected numbers, strings, "
        "lists, mappings, tensors or arrays."
    )


def _refused(constant: str) -> None:
    raise ValueError(f"{constant} is no number in JSON")
