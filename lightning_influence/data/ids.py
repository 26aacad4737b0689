"""Ids that a stream gives its examples: read from a batch, and numbered in the order in which they first come."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from hashlib import blake2b
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_influence.core.errors import told
from lightning_influence.data.collation import DataError
from lightning_influence.data.rows import described, sizes_of

SampleId: TypeAlias = "str | int | Callable[[Any], Any]"
"""Name or place of the column of a batch that holds each example's id, or a function from batch to ids."""

Id: TypeAlias = "int | str"

_NAMED = 5
# New ids wait until they are an eighth of all: to sort them in takes time for all that there are.
_WAITING = 2_048


def check_sample_id(given: object) -> None:
    """Raise ``ValueError`` for what can't say how examples are called."""
    if given is None or callable(given) or (isinstance(given, (str, int)) and not isinstance(given, bool)):
        return
    raise ValueError(
        f"sample_id={given!r}; expected the name of the column of a batch that holds each example's id, its place in a "
        'batch that is a tuple, or a function from batch to ids: sample_id=lambda batch: batch["key"].'
    )


def plain_id(value: Any) -> Id | None:
    """Return an integer, or a text that can be stored; None for a missing value of whatever library."""
    if isinstance(value, (Tensor, np.integer, np.floating)):
        value = value.item()
    elif hasattr(value, "as_py"):  # pyarrow
        value = value.as_py()
    if isinstance(value, float):
        value = None if math.isnan(value) else int(value) if value.is_integer() else value
    if value is None or type(value).__name__ in ("NAType", "NaTType"):
        return None
    if isinstance(value, int) and not isinstance(value, bool):
        return int(value)
    # File names need not be Unicode; files of tables are.
    text = value.decode(errors="backslashreplace") if isinstance(value, bytes) else str(value)
    return text.encode(errors="backslashreplace").decode() or None


def ids_in(batch: Any, sample_id: SampleId) -> list[Id]:
    """Return the id of each example of a batch.

    Raises:
        DataError: If there are none, too many or too few, or some are missing.
    """
    name = getattr(sample_id, "__name__", type(sample_id).__name__) if callable(sample_id) else repr(sample_id)
    with told(partial(_refusal, batch, name)):
        found = sample_id(batch) if callable(sample_id) else _column(batch, sample_id)
    if isinstance(found, (Tensor, np.ndarray)) and found.ndim > 1:
        raise DataError(
            f"sample_id={name} gives a table of shape {tuple(found.shape)}; expected one id for each example of the "
            "batch: integers or texts."
        )
    single = isinstance(found, (str, bytes, Mapping)) or not hasattr(found, "__iter__") or getattr(found, "ndim", 1) < 1
    # Of accelerators, not one at a time.
    values: list[Any] = [found] if single else found.tolist() if isinstance(found, Tensor) else list(found)
    if columns := [
        value for value in values if isinstance(value, (Tensor, np.ndarray)) and value.ndim and len(value) > 1
    ]:
        raise DataError(
            f"sample_id={name} gives {len(columns)} columns ({described(columns[0])}, ...); expected one id for each "
            "example of the batch: integers or texts. A function from batch to ids can put several into one text."
        )
    ids = [plain_id(value) for value in values]
    sizes = sizes_of(batch)
    if len(ids) not in sizes and not (len(ids) == 1 and not sizes):
        usual = max(sizes, key=lambda size: (sizes[size], size), default=0)
        raise DataError(
            f"sample_id={name} gives {len(ids)} ids for a batch of {usual} examples ({described(batch)}); expected one "
            "for each."
        )
    if missing := [place for place, value in enumerate(ids) if value is None]:
        raise DataError(
            f"sample_id={name} gives no id (None, NaN or an empty text) for {len(missing)} of the {len(ids)} examples "
            f"of a batch, at the places {missing[:_NAMED]}; expected one for each."
        )
    return [value for value in ids if value is not None]


def _column(batch: Any, key: str | int) -> Any:
    if isinstance(key, str) and not isinstance(batch, Mapping):
        return getattr(batch, key)
    return batch[key]


def _refusal(batch: Any, name: str, words: str) -> DataError:
    return DataError(
        f"sample_id={name} can't read the ids of a batch ({words}), which is {described(batch)}. Expected the name of "
        'its column of ids, or a function from batch to ids, such as sample_id=lambda batch: batch["key"]; the data '
        "set has to hand out something that names each example (a key, a file and line, a row number)."
    )


class IdBook:
    """Numbers ids in the order in which they first come.

    What it takes for an id is its text and 20 bytes: streams are long.
    """

    def __init__(self) -> None:
        self._text, self._ends = bytearray(), array("q", [0])
        self._whole = True  # whether all ids are integers that fit into columns of integers
        self._hashes, self._places = np.empty(0, np.uint64), np.empty(0, np.uint32)
        self._waiting: dict[bytes, int] = {}

    def __len__(self) -> int:
        """Return the number of ids."""
        return len(self._ends) - 1

    def __getitem__(self, at: Sequence[int] | NDArray[np.integer[Any]]) -> NDArray[Any]:
        """Return the ids of some numbers: integers if all of the book are, else texts."""
        found = [self._key(place).decode() for place in np.asarray(at).tolist()]
        return np.asarray(list(map(int, found)), np.int64) if self._whole else np.asarray(found, dtype=object)

    def add(self, ids: Iterable[Id]) -> list[int]:
        """Return the numbers of ids, new ones for those that are new."""
        return [self._number(value, new=True) for value in ids]

    def find(self, ids: Iterable[Id]) -> list[int]:
        """Return the numbers of ids, -1 for those that are not known."""
        return [self._number(value, new=False) for value in ids]

    def _number(self, value: Id, *, new: bool) -> int:
        key = str(value).encode()
        number = self._waiting.get(key, -1)
        if number < 0 and len(self._hashes):
            number = self._sorted_in(key)
        if number < 0 and new:
            number = self._waiting[key] = len(self)
            self._text += key
            self._ends.append(len(self._text))
            self._whole = self._whole and isinstance(value, int) and -(2**63) <= value < 2**63
            if len(self._waiting) >= max(_WAITING, len(self) // 8):
                self._sort_in()
        return number

    def _key(self, place: int) -> bytes:
        return bytes(self._text[self._ends[place] : self._ends[place + 1]])

    def _sorted_in(self, key: bytes) -> int:
        own = _hash(key)
        place = int(np.searchsorted(self._hashes, own))
        while place < len(self._hashes) and self._hashes[place] == own:
            if self._key(int(self._places[place])) == key:  # few ids have a hash in common
                return int(self._places[place])
            place += 1
        return -1

    def _sort_in(self) -> None:
        hashes = np.concatenate([self._hashes, np.array([_hash(key) for key in self._waiting], np.uint64)])
        places = np.concatenate([self._places, np.array(list(self._waiting.values()), np.uint32)])
        order = np.argsort(hashes, kind="stable")
        self._hashes, self._places, self._waiting = hashes[order], places[order], {}

    def ids(self) -> list[Id]:
        """Return all ids."""
        found: list[Id] = self[np.arange(len(self))].tolist()
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and primitives, for a Lightning checkpoint: of an id its text, and one byte if that is short.

        Lists of texts would take many times as much while they are stored.
        """
        sizes = np.diff(np.frombuffer(self._ends, np.int64))
        kind = np.uint8 if sizes.max(initial=0) < 256 else np.int64
        text = np.array(self._text, np.uint8)  # a copy
        return {"text": torch.from_numpy(text), "sizes": torch.from_numpy(sizes.astype(kind)), "whole": self._whole}

    def load_state_dict(self, state: Mapping[str, Any] | Sequence[Id]) -> None:
        """Go on from a checkpoint; those of earlier versions hold a list of the ids."""
        for value in _stored(state) if isinstance(state, Mapping) else state:
            self._number(value, new=True)


def _stored(state: Mapping[str, Any]) -> Iterator[Id]:
    text, end = state["text"].numpy(), 0
    for size in state["sizes"].tolist():
        start, end = end, end + size
        value = text[start:end].tobytes().decode()
        yield int(value) if state["whole"] else value


def _hash(key: bytes) -> np.uint64:
    return np.uint64(int.from_bytes(blake2b(key, digest_size=8).digest(), "little"))
