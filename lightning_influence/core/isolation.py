"""Leaving no trace: everything an extra pass over the data can touch is put back.

An audit re-runs the user's own ``training_step`` in the middle of a training run. The guards here make that invisible:
random streams, train/eval modes, ``requires_grad`` flags, and whatever the step moves itself (a teacher's weights, a
memory bank, a meter, a counter in a closure) are the same objects with the same values afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from lightning_influence.core.random_streams import isolated_rng
from lightning_influence.core.reachable import Found, Walk
from lightning_influence.core.snapshot import Snapshot
from lightning_influence.core.torch_private import eagerly

# Containers of data sets with more items are not looked into.
LONGEST_OF_DATA = 1_000


@contextmanager
def unchanged(*data: object) -> Iterator[Snapshot]:
    """Leave all that a data set and its helpers reach as it is found; random streams of the process are not theirs."""
    walk = Walk([(type(part).__name__, part) for part in data], LONGEST_OF_DATA)
    snapshot = Snapshot(walk, data=True)
    try:
        yield snapshot
    finally:
        snapshot.restore()


@contextmanager
def left_alone(*data: object) -> Iterator[None]:
    """Leave the random streams, and all that a data set and its helpers reach, as they are found."""
    with isolated_rng(), unchanged(*data):
        yield


# Of passes that are under way, the innermost last; and what passes over a model have found to change.
_under_way: list[Snapshot] = []
_changed: WeakKeyDictionary[nn.Module, dict[str, None]] = WeakKeyDictionary()


@contextmanager
def untouched(module: nn.Module, *others: object) -> Iterator[None]:
    """Run an extra pass over ``module``: eval mode, frozen parameters, and everything put back at the end.

    Gradients are enabled inside (activations may require them); ``.grad`` of the parameters is never written. All that
    the module reaches is compared with what it was, and put back in place: weights, buffers, attributes, containers and
    objects within, closures, class attributes, and the globals that the user's functions name. What was found changed
    is told by ``changes_in``.

    Args:
        module: The user's model, on its device.
        *others: What else the pass runs (a task).

    Yields:
        Nothing; the guards are active inside the ``with`` block.

    Raises:
        StateError: If something has changed that can't be put back.
    """
    reached = list(Walk([("", module), *((getattr(other, "__name__", "task"), other) for other in others)]))
    with ExitStack() as guards:
        guards.enter_context(isolated_rng())
        for kind, flag in ((nn.Module, "training"), (nn.Parameter, "requires_grad")):
            guards.enter_context(_turned_off([one.value for one in reached if isinstance(one.value, kind)], flag))
        guards.enter_context(kept(module, reached))
        guards.enter_context(torch.inference_mode(False))
        guards.enter_context(torch.enable_grad())
        # Hooks and probes need the eager modules; a compiled forward would not call them.
        guards.enter_context(eagerly())
        yield


def rewind() -> None:
    """Put back what the batches of the innermost pass change; call at the start of each."""
    if _under_way:
        _under_way[-1].rewind()


def changes_in(module: nn.Module) -> list[str]:
    """Return the paths of what extra passes over a model have found changed and put back."""
    return list(_changed.get(module, ()))


@contextmanager
def kept(module: nn.Module, reached: list[Found]) -> Iterator[None]:
    """Put back what was reached, and let ``changes_in`` tell what of it had changed."""
    snapshot = Snapshot(reached)
    _under_way.append(snapshot)
    try:
        yield
    finally:
        _under_way.remove(snapshot)
        try:
            snapshot.restore()
        finally:
            if snapshot.changed:
                _changed.setdefault(module, {}).update(snapshot.changed)


def hidden_parameters(root: nn.Module) -> list[nn.Parameter]:
    """Return the trainable parameters that plain attributes hide from ``root.parameters()``, of modules or loose."""
    known = {id(p) for p in root.parameters()}
    everywhere = [found.value for found in Walk([("", root)]) if isinstance(found.value, nn.Parameter)]
    return [p for p in everywhere if id(p) not in known and p.requires_grad]


@contextmanager
def _turned_off(things: list[Any], flag: str) -> Iterator[None]:
    """Put every module in eval mode, or freeze every parameter; each gets what it had (a frozen BatchNorm) back."""
    before = [(thing, getattr(thing, flag)) for thing in things]
    try:
        # The attribute instead of .eval(): a LightningModule may override train()/eval() with side effects.
        for thing in things:
            setattr(thing, flag, False)
        yield
    finally:
        for thing, value in before:
            setattr(thing, flag, value)
