"""Tables on their way into files and back: parquet with checksums, and candidates for people and spreadsheets."""

from __future__ import annotations

import codecs
import csv
import io
import json
import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO
from zlib import crc32

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import ArrayLike, NDArray

from lightning_influence.audit.columns import COLUMNS, candidate_rows, column_of
from lightning_influence.audit.store.atomic import check_readable
from lightning_influence.core.memory import available_bytes

_CHECKSUM = "lightning_influence.crc32"
_ENTRY_BYTES = 8
# Spreadsheets run cells that start with these as formulas (OWASP "CSV injection"); the wide forms count in
# Japanese and Chinese locales.
_ROWS = 2**10
_FORMULA_STARTS = tuple("=+-@\t\r\n\uff1d\uff0b\uff0d\uff20")
# Ids that they take for numbers or dates, and write back as others: 0042, 1e5, 2024-01-02, MARCH1 (a gene).
_MONTHS = (
    "jan(uary)?|feb(ruary)?|mar(ch)?|apr(il)?|may|june?|july?|aug(ust)?|sept?(ember)?|oct(ober)?|nov(ember)?|"
    "dec(ember)?"
)
_TURNED = re.compile(rf"-?\d[\d\s.,:/-]*(e[+-]?\d+)?|[\d\s./-]*({_MONTHS})[\d\s./-]*|true|false", re.IGNORECASE)
_STAYS = re.compile(r"0|-?[1-9]\d{0,14}")  # an integer that all of them hold


def write_table(
    handle: BinaryIO, columns: Mapping[str, ArrayLike], meanings: Mapping[str, str], about: Mapping[str, str]
) -> None:
    """Write columns as parquet.

    Args:
        handle: The file.
        columns: Name to values ``[n]``.
        meanings: Column name to what is stored with it.
        about: What is stored with the table.
    """
    arrays = {name: _plain(np.asarray(values)) for name, values in columns.items()}
    stored = {name: _arrow(values) for name, values in arrays.items()}
    fields = [
        pa.field(name, column.type, metadata={"description": meanings[name]} if meanings.get(name) else None)
        for name, column in stored.items()
    ]
    table = pa.Table.from_arrays(list(stored.values()), schema=pa.schema(fields))
    table = table.replace_schema_metadata({**about, _CHECKSUM: str(_checksum(arrays))})
    # Dictionaries of numbers that are all different take a column's memory again, and most of the time.
    pq.write_table(table, handle, write_page_checksum=True, use_dictionary=False)


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
    arrays = _arrays(table)
    # Pages have checksums of their own; names, types and numbers of rows have not.
    if (table.schema.metadata or {}).get(_CHECKSUM.encode()) not in (None, str(_checksum(arrays)).encode()):
        raise ValueError("its columns do not have the checksum that they were written with")
    return arrays


def candidates_csv(columns: Mapping[str, ArrayLike], label_names: Sequence[str] | None = None) -> bytes:
    """Return the candidates as CSV; see ``AuditStore.write_candidates``."""
    arrays = {name: np.asarray(values) for name, values in columns.items()}
    rows = candidate_rows(arrays)
    written = io.BytesIO()
    with io.TextIOWrapper(written, encoding="utf-8", errors="backslashreplace", newline="") as text:
        writer = csv.writer(text, lineterminator="\r\n")
        writer.writerow(map(_cell, _cells(arrays, rows[:0], label_names)))
        for start in range(0, len(rows), _ROWS):  # as texts, they are many times larger
            writer.writerows(zip(*_cells(arrays, rows[start : start + _ROWS], label_names).values(), strict=True))
        text.flush()
        content = written.getvalue()
    # Without a byte order mark, Excel takes anything but ASCII for another encoding.
    return content if content.isascii() else codecs.BOM_UTF8 + content


def _cells(
    arrays: Mapping[str, NDArray[Any]], rows: NDArray[np.int64], label_names: Sequence[str] | None
) -> dict[str, list[str]]:
    """Return columns of some rows as texts."""
    # For a person to fill in, see `review`.
    answers = ("decision", "new_label") if "label" in arrays else ("decision",)
    cells: dict[str, list[str]] = {name: [""] * len(rows) for name in answers}
    for name in dict.fromkeys((*(known for known in COLUMNS if known in arrays), *arrays)):
        if name == "candidate":
            continue
        values = arrays[name][rows].tolist()
        cells[name] = [(_id_cell if name == "id" else _cell)(value) for value in values]
        if label_names is not None and "names" in column_of(name).shown:
            named = dict(enumerate(label_names))
            cells[f"{name}_name"] = [_cell(named.get(label, "")) for label in values]
    return cells


def _cell(value: Any) -> str:
    """Return a value as text that no spreadsheet runs as a formula."""
    if isinstance(value, str):
        # Spreadsheets drop blanks, control characters and byte order marks before they look for a formula.
        seen = next((place for place, char in enumerate(value) if unicodedata.category(char)[0] not in "CZ"), 0)
        return f"'{value}" if value.startswith(_FORMULA_STARTS) or value[seen:].startswith(_FORMULA_STARTS) else value
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.6g}"
    return str(value)


def _id_cell(value: Any) -> str:
    """Return an id as a text that comes back from a spreadsheet as it is."""
    text = _cell(value)
    return f"'{text}" if _TURNED.fullmatch(text.strip()) and not _STAYS.fullmatch(text) else text


def _plain(values: NDArray[Any]) -> NDArray[Any]:
    """Return a column as it will be read back."""
    if values.ndim == 1 and values.dtype.isnative and values.dtype.kind in "biufO":
        return np.ascontiguousarray(values)
    return np.array(pa.array(values).to_numpy(zero_copy_only=False))  # refuses what is no column


def _arrow(values: NDArray[Any]) -> pa.Array:
    """Return a column for a file; numbers are not copied, and pandas is not imported, as ``pa.array`` would."""
    kind, n = values.dtype.kind, len(values)
    if kind == "b":
        return pa.Array.from_buffers(pa.bool_(), n, [None, pa.py_buffer(np.packbits(values, bitorder="little"))])
    if kind != "O":
        return pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), n, [None, pa.py_buffer(values)])
    if not all(isinstance(value, str) for value in values):
        return pa.array(values)
    text, ends = bytearray(), np.zeros(n + 1, np.int64)
    for place, value in enumerate(values, 1):
        text += value.encode()
        ends[place] = len(text)
    return pa.Array.from_buffers(pa.large_string(), n, [None, pa.py_buffer(ends), pa.py_buffer(text)])


def _arrays(table: pa.Table) -> dict[str, NDArray[Any]]:
    return {name: np.array(table[name].to_numpy()) for name in table.column_names}


def _checksum(arrays: Mapping[str, NDArray[Any]]) -> int:
    """Return a number that tells columns apart: their names, types and bits."""
    result = 0
    for name, array in arrays.items():
        text = array.dtype == object
        content = json.dumps(array.tolist()).encode() if text else np.ascontiguousarray(array).tobytes()
        about = f"{name!r} {'text' if text else array.dtype.str} {len(array)}".encode(errors="backslashreplace")
        result = crc32(content, crc32(about, result))
    return result
