"""Values on their way into files: columns as arrays, cells of a CSV file, terms of JSON."""

from __future__ import annotations

import math
import os
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Column: TypeAlias = "Tensor | NDArray[Any] | Sequence[Any]"
"""A number, boolean or string for each training example."""

# Spreadsheets run cells that start with these as formulas (OWASP "CSV injection"); the wide forms count in
# Japanese and Chinese locales.
_FORMULA_STARTS = tuple("=+-@\t\r\n\uff1d\uff0b\uff0d\uff20")


def checked(columns: Mapping[str, Column]) -> dict[str, NDArray[Any]]:
    """Columns as arrays `[N]`, text as dtype object."""
    if not columns:
        raise ValueError("no columns to write; expected at least one.")
    arrays = {name: _as_array(name, values) for name, values in columns.items()}
    if len({len(array) for array in arrays.values()}) > 1:
        lengths = ", ".join(f"{name} has {len(array)}" for name, array in arrays.items())
        raise ValueError(f"columns differ in length; expected one entry per training example: {lengths}.")
    return arrays


def _as_array(name: str, values: Column) -> NDArray[Any]:
    if isinstance(values, Tensor):
        tensor = values.detach().cpu()
        array: NDArray[Any] = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    elif isinstance(values, np.ndarray):
        array = values.astype(object) if values.dtype.kind == "U" else values
    else:
        # numpy would turn the numbers beside a string into strings
        array = np.array(values, dtype=object if any(isinstance(value, str) for value in values) else None)
    if array.ndim != 1:
        raise ValueError(f"column {name!r} has shape {list(array.shape)}; expected [N].")
    text = array.dtype == object and all(isinstance(value, str) for value in array)
    if array.dtype.kind not in "biuf" and not text:
        raise TypeError(f"column {name!r} has dtype {array.dtype}; expected numbers, booleans or strings.")
    return array


def cell(value: Any) -> str:
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


def jsonable(value: Any, where: str) -> Any:
    """`value` in terms of JSON; `where` is its path, for the error."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Tensor | np.ndarray | np.generic):
        return jsonable(value.tolist(), where)
    if isinstance(value, os.PathLike | torch.dtype | torch.device):
        return str(value)
    if isinstance(value, Mapping):
        if wrong := [key for key in value if not isinstance(key, str | int)]:
            raise TypeError(f"{where} has the key {wrong[0]!r}; expected strings or integers.")
        result = {str(key): jsonable(item, f"{where}[{key!r}]") for key, item in value.items()}
        if len(result) != len(value):
            raise ValueError(f"{where} has keys that become the same string: {list(value)}.")
        return result
    if isinstance(value, list | tuple):
        return [jsonable(item, f"{where}[{number}]") for number, item in enumerate(value)]
    raise TypeError(
        f"{where} is a {type(value).__name__}, which JSON cannot hold; expected numbers, strings, lists, "
        "mappings, tensors or arrays."
    )


_NUMBER = (int, float, type(None))  # JSON has no NaN: it is written as null
# What readers of a manifest rely upon: keys with "?" may be missing, and are any where there is only "*".
_MANIFEST: dict[str, Any] = {
    "status": str,
    "nonfinite": [int],
    "fingerprint": {"*": str},
    "ranked_by": [str],
    "coverage": {"summary": str},
    "seconds": {"*": _NUMBER},
    "damping_sweep": {"factors": [_NUMBER], "stability": [_NUMBER], "examples": int},
    "tracin_steps": [int],
    "notes": [str],
    "queries": {"title": str, "per_query": str, "value?": _NUMBER, "measurement?": str, "examples?": int},
    "detection": {"*": {"auroc": _NUMBER, "average_precision": _NUMBER, "recall_at": _NUMBER}},
}


def check_manifest(manifest: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` if an entry has another form than its readers rely upon."""
    for name, form in _MANIFEST.items():
        # Lists are iterated over whatever they hold; other entries are looked at if there is something in them.
        if manifest.get(name) or (isinstance(form, list) and name in manifest):
            _check_form(manifest[name], form, repr(name))


def _check_form(value: Any, form: Any, where: str) -> None:
    kind = dict if isinstance(form, dict) else list if isinstance(form, list) else form
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"its entry {where} is {str(value)[:40]!r}, which is not what an audit writes there")
    if isinstance(form, list):
        for item in value:
            _check_form(item, form[0], where)
    elif isinstance(form, dict):
        for key in value if "*" in form else form:
            name = key.removesuffix("?")
            if name in value:
                _check_form(value[name], form.get(key, form.get("*")), f"{where}: {name!r}")
            elif name == key:
                raise ValueError(f"its entry {where} lacks {name!r}")
