"""Tables on their way into files and back: parquet with checksums, and candidates for people and spreadsheets."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from lightning_influence.audit.columns import COLUMN_DESCRIPTIONS
from lightning_influence.audit.store.atomic import check_readable
from lightning_influence.audit.store.encoding import Column, cell, checked
from lightning_influence.core.memory import available_bytes

_CHECKSUM = "lightning_influence.crc32"
_ENTRY_BYTES = 8
_CANDIDATE_ORDER = ("rank", "index", "label", "predicted", "suggested", "suspicion", *COLUMN_DESCRIPTIONS)
_LABEL_COLUMNS = ("label", "predicted", "suggested")


def table_of(columns: Mapping[str, Column], meanings: Mapping[str, str], about: Mapping[str, str]) -> pa.Table:
    """Return columns as a table for parquet; see ``AuditStore.write_scores``.

    Args:
        columns: Name to values ``[N]``.
        meanings: Column name to what is stored with it.
        about: What is stored with the table.
    """
    arrays = checked(columns)
    fields, data = [], []
    for name, array in arrays.items():
        data.append(pa.array(array, type=pa.string() if array.dtype == object else None))
        meaning = meanings.get(name)
        fields.append(pa.field(name, data[-1].type, metadata={"description": meaning} if meaning else None))
    told = {**about, _CHECKSUM: str(_checksum(arrays))}
    return pa.Table.from_arrays(data, schema=pa.schema(fields, metadata=told))


def read_table(path: Path) -> dict[str, NDArray[Any]]:
    """Read columns back; a file that is damaged, or no table, raises whatever pyarrow does, or ``ValueError``."""
    check_readable(path)
    # An open file, not its name: `read_table` opens that once for the schema and once for the data.
    with open(path, "rb") as handle:
        file = pq.ParquetFile(handle, page_checksum_verification=True)
        entries, room = file.metadata.num_rows * file.metadata.num_columns, available_bytes(torch.device("cpu"))
        if room is not None and _ENTRY_BYTES * entries > room:
            raise ValueError(f"it claims {entries:,} entries, more than fit into memory")
        table = file.read()
    arrays = {name: np.array(table[name].to_numpy()) for name in table.column_names}
    # Pages have checksums of their own; names, types and numbers of rows have not.
    checksum = (table.schema.metadata or {}).get(_CHECKSUM.encode())
    if len(arrays) < len(table.column_names) or checksum not in (None, str(_checksum(arrays)).encode()):
        raise ValueError("its columns do not have the checksum that they were written with")
    return arrays


def packed_candidates(
    columns: Mapping[str, Column], label_names: Sequence[str] | Mapping[int, str] | None = None
) -> bytes:
    """Return the candidates as CSV; see ``AuditStore.write_candidates``."""
    arrays = checked(columns)
    if missing := {"rank", "candidate"} - arrays.keys():
        raise ValueError(f"candidates need the columns rank and candidate; missing: {sorted(missing)}.")
    rows = np.flatnonzero(arrays.pop("candidate"))
    rows = rows[np.argsort(arrays["rank"][rows], kind="stable")]
    names = dict(label_names if isinstance(label_names, Mapping) else enumerate(label_names or ()))
    table: dict[str, Iterable[str]] = {}
    for name in dict.fromkeys((*(known for known in _CANDIDATE_ORDER if known in arrays), *arrays)):
        values = arrays[name][rows].tolist()
        table[name] = map(cell, values)
        if label_names is not None and name in _LABEL_COLUMNS and arrays[name].dtype.kind in "iu":
            if unnamed := set(values) - names.keys() - {-1}:
                raise ValueError(f"column {name!r}: `label_names` lacks the labels {sorted(unnamed)}.")
            table[f"{name}_name"] = [cell(names[label]) if label != -1 else "" for label in values]
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\r\n")
    writer.writerow(map(cell, table))
    writer.writerows(zip(*table.values(), strict=True))
    return text.getvalue().encode("utf-8", errors="backslashreplace")


def _checksum(arrays: Mapping[str, NDArray[Any]]) -> int:
    """Return a number that tells columns apart: their names, types and bits."""
    result = 0
    for name, array in arrays.items():
        text = array.dtype == object
        content = json.dumps(array.tolist()).encode() if text else np.ascontiguousarray(array).tobytes()
        about = f"{name!r} {'text' if text else array.dtype.str} {len(array)}".encode(errors="backslashreplace")
        result = crc32(content, crc32(about, result))
    return result
