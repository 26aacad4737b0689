"""A record as tensors and text, for files that nothing is pickled in; the files themselves are the store's."""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from lightning_influence.replay.record import BatchRecord, Recipe, RunState, StepRecord, Streams, TrainingRecord

Packed: TypeAlias = tuple[dict[str, Tensor], dict[str, str]]
"""Tensors by name, and text about them."""

_PLAIN = (str, int, float, bool, type(None))  # of JSON
_NONE = -1


# ---------------------------------------------------------------------------------------------------------------- steps


def packed_steps(record: TrainingRecord) -> Packed:
    """Return a record without its states and batches."""
    batches = [batch for step in record.steps for batch in step.batches]
    groups, training = _Table(id), _Table()
    tensors = {
        "steps/batches": _integers(len(step.batches) for step in record.steps),
        "steps/groups": _integers(groups.place(step.groups) for step in record.steps),
        "steps/training": _integers(training.place(step.training) for step in record.steps),
        "batches/examples": _integers(len(batch.indices) for batch in batches),
        "batches/indices": _integers(index for batch in batches for index in batch.indices),
        "batches/drawn_examples": _integers(_NONE if b.drawn is None else len(b.drawn) for b in batches),
        "batches/drawn": _integers(index for batch in batches for index in batch.drawn or ()),
        "batches/number": _integers(batch.number for batch in batches),
        "batches/epoch": _integers(batch.epoch for batch in batches),
        "batches/checksum": _integers(batch.checksum for batch in batches),
        "batches/has_loss": _integers(batch.loss is not None for batch in batches),
        "batches/loss": torch.tensor([batch.loss or 0.0 for batch in batches], dtype=torch.float64),
    }
    names = list(dict.fromkeys(name for batch in batches for name in batch.before_step))
    for name in names:
        states = _Table(id)
        for when in ("before_fetch", "before_step"):
            found = [(getattr(batch, when) or {}).get(name) for batch in batches]
            tensors[f"{when}/{name}"] = _integers(_NONE if s is None else states.place(s) for s in found)
        packed = [_packed_stream(name, state) for state in states.found]
        for part in packed[0] if packed else ():
            tensors[f"streams/{name}/{part}"] = torch.stack([each[part] for each in packed])
    text = {
        "recipe": json.dumps(asdict(record.recipe)),
        "groups": json.dumps([[dict(group) for group in each] for each in groups.found]),
        "training": json.dumps([sorted(names) for names in training.found]),
        "streams": json.dumps(names),
        "states": json.dumps(sorted(record.states)),
    }
    return tensors, text


def restored_steps(packed: Packed, states: Mapping[int, RunState]) -> TrainingRecord:
    """Return the record, see ``packed_steps``; what is no record raises ``ValueError`` or ``KeyError``."""
    tensors, text = packed
    numbers = {name: tensor.tolist() for name, tensor in tensors.items() if not name.startswith("streams/")}
    groups, training = json.loads(text["groups"]), [frozenset(names) for names in json.loads(text["training"])]
    for each in groups:
        for group in each:
            group.update({name: tuple(value) for name, value in group.items() if isinstance(value, list)})
    indices = _cut(numbers["batches/indices"], numbers["batches/examples"])
    drawn = _cut(numbers["batches/drawn"], numbers["batches/drawn_examples"])
    names = json.loads(text["streams"])
    streams = {name: _restored_streams(name, tensors) for name in names}

    def met(when: str, place: int) -> Streams | None:
        at = {name: numbers[f"{when}/{name}"][place] for name in names}
        return {name: streams[name][k] for name, k in at.items() if k != _NONE} or None

    batches = [
        BatchRecord(
            indices[k] or (),
            numbers["batches/number"][k],
            numbers["batches/epoch"][k],
            met("before_fetch", k),
            met("before_step", k) or {},
            numbers["batches/checksum"][k],
            numbers["batches/loss"][k] if numbers["batches/has_loss"][k] else None,
            drawn[k],
        )
        for k in range(len(indices))
    ]
    steps, taken = [], 0
    for count, group, modes in zip(*(numbers[f"steps/{n}"] for n in ("batches", "groups", "training")), strict=True):
        steps.append(StepRecord(tuple(batches[taken : taken + count]), groups[group], training[modes]))
        taken += count
    if taken != len(batches):
        raise ValueError(f"its {len(steps)} steps have {taken} batches, and it has {len(batches)}")
    return TrainingRecord(Recipe(**json.loads(text["recipe"])), steps, states)


class _Table:
    """Things that are met many times, each once.

    Args:
        key: Of a thing; by default itself.
    """

    def __init__(self, key: Callable[[Any], Any] = lambda thing: thing) -> None:
        self.found: list[Any] = []
        self._key, self._places = key, dict[Any, int]()

    def place(self, thing: Any) -> int:
        """Return where a thing is among those found, in a table that knows it by now."""
        key = self._key(thing)
        if key not in self._places:
            self._places[key] = len(self.found)
            self.found.append(thing)
        return self._places[key]


def _integers(values: Iterable[int]) -> Tensor:
    return torch.from_numpy(np.fromiter(values, np.int64))


def _cut(values: Sequence[int], lengths: Sequence[int]) -> list[Sequence[int] | None]:
    """Return rows of the given lengths, None for a negative one."""
    rows: list[Sequence[int] | None] = []
    taken = 0
    for length in lengths:
        rows.append(None if length < 0 else array("q", values[taken : taken + length]))
        taken += max(length, 0)
    if taken != len(values):
        raise ValueError(f"its batches have {taken} examples, and it has {len(values)}")
    return rows


# -------------------------------------------------------------------------------------------------------------- streams


def _packed_stream(name: str, state: Any) -> dict[str, Tensor]:
    if name == "numpy":
        _, words, place, has_gauss, gauss = state
    elif name == "python":
        version, words, gauss = state
        place, has_gauss, gauss = version, gauss is not None, gauss or 0.0
    else:
        return {"state": state.cpu()}
    about = torch.tensor([place, has_gauss], dtype=torch.int64)
    words = torch.from_numpy(np.asarray(words, np.uint32).view(np.int32))
    return {"state": words, "about": about, "gauss": torch.tensor(gauss, dtype=torch.float64)}


def _restored_streams(name: str, tensors: Mapping[str, Tensor]) -> list[Any]:
    states = tensors.get(f"streams/{name}/state")
    if states is None:
        return []
    if name not in ("numpy", "python"):
        return [state.clone() for state in states]  # a generator reads its state from memory that is aligned
    found: list[Any] = []
    about, numbers = tensors[f"streams/{name}/about"].tolist(), tensors[f"streams/{name}/gauss"].tolist()
    for words, (place, has_gauss), gauss in zip(states.numpy().view(np.uint32), about, numbers, strict=True):
        if name == "numpy":
            found.append(("MT19937", words, place, has_gauss, gauss))
        else:
            found.append((place, words, gauss if has_gauss else None))
    return found


# --------------------------------------------------------------------------------------------------------------- states


def packed_state(state: RunState) -> Packed:
    """Return a state."""
    tensors = {f"parameters/{name}": value for name, value in state.parameters.items()}
    tensors |= {f"buffers/{name}": value for name, value in state.buffers.items()}
    plain: dict[str, dict[str, Any]] = {}
    for place, (name, own) in enumerate(state.optimizer.items()):
        plain[name] = {key: value for key, value in own.items() if not isinstance(value, Tensor)}
        moments = {key: value for key, value in own.items() if isinstance(value, Tensor)}
        tensors |= {f"optimizer/{place}/{key}": value for key, value in moments.items()}
    # Files keep no order.
    return tensors, {"step": str(state.step), "optimizer": json.dumps(plain), "names": json.dumps(list(tensors))}


def restored_state(packed: Packed) -> RunState:
    """Return the state, see ``packed_state``."""
    tensors, text = packed
    optimizer: dict[str, dict[str, Any]] = json.loads(text["optimizer"])
    owners = list(optimizer.values())
    parts: dict[str, dict[str, Tensor]] = {"parameters": {}, "buffers": {}}
    for key in json.loads(text["names"]):
        part, _, name = key.partition("/")
        if part == "optimizer":
            place, _, name = name.partition("/")
            owners[int(place)][name] = tensors[key]
        else:
            parts[part][name] = tensors[key]
    return RunState(int(text["step"]), **parts, optimizer=optimizer)


# -------------------------------------------------------------------------------------------------------------- batches


def packed_batches(batches: Mapping[int, Any]) -> Packed:
    """Return batches by number.

    Raises:
        ValueError: If they are made of more than tensors, arrays, text and numbers in lists, tuples and dictionaries.
    """
    tensors: dict[str, Tensor] = {}
    outline = {str(number): _outlined(batch, tensors) for number, batch in batches.items()}
    return tensors, {"batches": json.dumps(outline)}


def restored_batches(packed: Packed) -> dict[int, Any]:
    """Return the batches, see ``packed_batches``."""
    tensors, text = packed
    return {int(number): _filled(outline, tensors) for number, outline in json.loads(text["batches"]).items()}


def with_batches(record: TrainingRecord, batches: Mapping[int, Any]) -> TrainingRecord:
    """Return a record whose batches are kept, as far as they are given, by number among all."""
    steps, number = [], 0
    for step in record.steps:
        own = []
        for batch in step.batches:
            own.append(replace(batch, kept=batches.get(number)))
            number += 1
        steps.append(replace(step, batches=tuple(own)))
    return replace(record, steps=steps)


def _outlined(node: Any, tensors: dict[str, Tensor]) -> Any:
    """Return the outline of nested containers in terms of JSON; the tensors go into a table."""
    name = str(len(tensors))
    if isinstance(node, Tensor):
        tensors[name] = node
        return {"tensor": name}
    if isinstance(node, np.ndarray) and node.dtype.kind in "biuf":
        tensors[name] = torch.from_numpy(np.array(node))
        return {"array": name}
    if type(node) in _PLAIN:
        return {"value": node}
    if type(node) in (list, tuple):
        return {type(node).__name__: [_outlined(item, tensors) for item in node]}
    if type(node) is dict and all(type(key) in _PLAIN for key in node):
        return {"dict": [[key, _outlined(item, tensors)] for key, item in node.items()]}
    raise ValueError(
        f"a batch holds a {type(node).__name__}; expected tensors, arrays, text and numbers in lists, tuples and "
        "dictionaries, of which files can be made"
    )


def _filled(outline: Any, tensors: Mapping[str, Tensor]) -> Any:
    ((kind, held),) = outline.items()
    if kind in ("tensor", "array"):
        return tensors[held] if kind == "tensor" else tensors[held].numpy()
    if kind == "value":
        return held
    if kind == "dict":
        return {key: _filled(item, tensors) for key, item in held}
    return {"list": list, "tuple": tuple}[kind](_filled(item, tensors) for item in held)
