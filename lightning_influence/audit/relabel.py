"""Data sets with other labels: where the label lies in an example, and a copy that has it replaced.

Labels are found by their values, not by a convention: the audit knows every example's label, and the label of a data
set is the one place in its examples that always holds it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sized
from itertools import chain, islice, zip_longest
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_influence.core.containers import Path, leaves
from lightning_influence.core.indices import integers
from lightning_influence.core.isolation import left_alone

# Enough examples that no other number (a group, an id) agrees with all their labels by chance.
_LOOKED_AT = 64
_USUAL_NAMES = ("label", "labels", "target", "targets", "y")


class LabelError(ValueError):
    """The labels of a data set can't be found or replaced; the message says why and the way out."""


def find_label(dataset: Any, labels: Mapping[int, int]) -> Path:
    """Return where the examples of a data set hold their labels.

    Args:
        dataset: Map-style data set of examples that are tuples, lists or mappings.
        labels: Dataset index to known label, for some of the examples; several classes among them.

    Raises:
        LabelError: If no place, or more than one, holds all those labels.
    """
    if len(set(labels.values())) < 2:
        raise LabelError(
            "all known labels are the same: that does not tell where labels lie; pass some of other classes."
        )
    paths: set[Path] | None = None
    for index, example in fetched(dataset, _spread(labels)):
        found = {path for path, value in example.items() if as_label(value) == labels[index]}
        paths = found if paths is None else paths & found
    if not paths:
        raise LabelError(
            f"no place in the examples of {type(dataset).__name__} holds the known labels as a number; relabel the "
            "data set yourself, for example with a `target_transform`."
        )
    if len(paths) > 1:
        usual = {path for path in paths if str(path[-1]).lower() in _USUAL_NAMES}
        if len(usual) != 1:
            raise LabelError(
                f"several places in the examples hold the known labels: {sorted(map(str, paths))}; expected one."
            )
        paths = usual
    return next(iter(paths))


def fetched(dataset: Any, indices: Iterable[int]) -> Iterator[tuple[int, dict[Path, Any]]]:
    """Yield examples, taken apart into path -> value; no random stream, the user's or the data set's, moves on."""
    with left_alone(dataset):
        for index in indices:
            yield index, dict(leaves(dataset[index]))


class Relabelled(Dataset[Any]):
    """A data set with some labels replaced; its examples are otherwise those of the original, fetched when asked for.

    Args:
        dataset: The original, left as it is.
        labels: Dataset index to new label.
        path: Where the label lies, see ``find_label``.

    Raises:
        LabelError: If an index is out of range, or a new label is no integer.
    """

    def __init__(self, dataset: Dataset[Any], labels: Mapping[int, int], path: Path) -> None:
        size = len(cast("Sized", dataset))
        outside = [index for index in integers(list(labels)) if not 0 <= index < size]
        if outside:
            raise LabelError(f"there are no examples {outside[:10]}; the data set has {size}.")
        odd = {index: label for index, label in labels.items() if not isinstance(_number(label), int)}
        if odd:
            raise LabelError(f"new labels must be integers, got {dict(list(odd.items())[:5])}.")
        self.dataset = dataset
        self.labels = {int(index): int(label) for index, label in labels.items()}
        self.path = path

    def __len__(self) -> int:
        return len(cast("Sized", self.dataset))

    def __repr__(self) -> str:
        of = type(self.dataset).__name__
        return f"Relabelled({of}, {len(self):,} examples, {len(self.labels):,} with another label)"

    def __getitem__(self, index: int) -> Any:
        example = self.dataset[index]
        position = int(index)
        if position < 0:
            position += len(self)
        return _replaced(example, self.path, self.labels[position]) if position in self.labels else example


def _spread(labels: Mapping[int, int]) -> list[int]:
    """Return some of the indices, every class among them."""
    by_class: dict[int, list[int]] = {}
    for index, label in labels.items():
        by_class.setdefault(label, []).append(index)
    in_turn = chain.from_iterable(zip_longest(*by_class.values()))
    return list(islice((index for index in in_turn if index is not None), _LOOKED_AT))


def as_label(value: Any) -> int | None:
    """Return a single whole number as an integer (targets of binary losses are floats), None for any other value."""
    number = _number(value)
    return int(number) if number is not None and number % 1 == 0 else None


def _number(value: Any) -> int | float | None:
    """Return a single number of whatever library, None for any other value; a truth value is no number."""
    try:
        plain = value.item() if hasattr(value, "item") else value
    except (RuntimeError, ValueError):  # more than one value
        return None
    return plain if isinstance(plain, (int, float)) and not isinstance(plain, bool) else None


def _replaced(example: Any, path: Path, label: int) -> Any:
    if not path:
        return torch.full_like(example, label) if isinstance(example, Tensor) else type(example)(label)
    key, rest = path[0], path[1:]
    if isinstance(example, MutableMapping):
        changed = copy.copy(example)
        changed[key] = _replaced(example[key], rest, label)
        return changed
    if isinstance(example, Mapping):
        return {**example, key: _replaced(example[key], rest, label)}
    items = [_replaced(item, rest, label) if place == key else item for place, item in enumerate(example)]
    return type(example)(*items) if hasattr(example, "_fields") else type(example)(items)
