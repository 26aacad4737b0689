"""What the trace of a model has shown: how its parameters meet the batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from lightning_influence.core.layout import BatchLayout
from lightning_influence.core.torch_private import base_of
from lightning_influence.layers.call import Call, Layouts
from lightning_influence.objective.own_part import OwnRows, own_part
from lightning_influence.objective.scale import TermKey
from lightning_influence.objective.terms import BatchLoss, TermForm

UseKind = Literal["batched", "shared", "penalty", "unknown"]


@dataclass(frozen=True)
class View:
    """Which part of a parameter a tensor is.

    Attributes:
        start: First row.
        rows: Number of rows.
        transposed: Whether rows and columns are exchanged.
    """

    start: int
    rows: int
    transposed: bool = False


def view_of(tensor: Tensor, parameter: Tensor) -> View | None:
    """Tell which rows of a parameter a tensor is, or that it is its transpose; None if it is something else."""
    rows = len(parameter) if parameter.ndim else 1
    if tensor is parameter:
        return View(0, rows)
    if base_of(tensor) is not parameter or not parameter.ndim:
        return None
    offset = tensor.storage_offset() - parameter.storage_offset()
    if tensor.ndim == parameter.ndim == 2 and not offset and tensor.stride() == parameter.stride()[::-1]:
        if tensor.shape == parameter.shape[::-1]:
            return View(0, rows, transposed=True)
        return None
    if tensor.shape[1:] != parameter.shape[1:] or tensor.stride() != parameter.stride():
        return None
    start, rest = divmod(int(offset), int(parameter.stride(0)))
    return None if rest else View(start, len(tensor))


@dataclass(frozen=True)
class TracedUse:
    """One call in which a parameter, or what was made from it, took part.

    Attributes:
        kind: ``"batched"``: it met the batch. ``"shared"``: something was made from it without the batch.
            ``"penalty"``: it went into a number of the whole batch without an example. ``"unknown"``: it met the batch
            in a way that is not understood.
        function: The torch function.
        layouts: Where the examples are, for ``"batched"``.
        call: What the call does, for ``"batched"``.
        form: How the matrix lies in its parameter, see ``MatrixBlock``.
        groups: Number of groups of a convolution.
        roles: Role to the ids of the parameters that the tensor in it was made from.
        views: Role to the part of the parameter that it is; None if it was made from it by more than a view.
        arguments: For a function that is run once more for every example: where they are in its tensors.
        repeated_size: Scalars of the gradient that such a function has for every example.
        ndim: Number of dimensions of the output.
        reason: Why it is not understood, or has to be run once more.
        activations: Stands for the activations of a matrix: the same object for the same ones, None if it is not known.
    """

    kind: UseKind
    function: Callable[..., Any]
    layouts: Layouts = Layouts()
    call: type[Call] | None = None
    form: str = "linear"
    groups: int = 1
    roles: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    views: Mapping[str, View | None] = field(default_factory=dict)
    arguments: tuple[BatchLayout | None, ...] = ()
    repeated_size: int = field(default=0, compare=False)  # lengths differ between batches
    ndim: int = 0
    reason: str = ""
    activations: object = field(default=None, compare=False)

    def fits(self, output: Tensor, n: int | None) -> bool:
        """Tell whether an output for ``n`` examples (None: unknown) can be that of this use."""
        if output.ndim != self.ndim:
            return False
        return n is None or self.kind != "batched" or self.layouts.output.fits(output.shape, n)


@dataclass(eq=False)
class Trace:
    """What the trace of a model has shown.

    Attributes:
        paths: Id of a parameter to the sequences of its uses that were seen: a model may take different paths through
            its layers in different batches.
        parameters: The traced parameters (kept alive, as ids are theirs).
        without_gradients: Ids of parameters that were used where gradients are off.
        ambiguous: Whether the values left open in which order rows of examples lie.
        forms: Where the examples of each term of the loss are, see ``discover.term_forms``.
        formless: Terms of the loss that tracing has told nothing about.
        own: Terms that are about the examples, and with which of their rows, where others are about those of other
            loaders, or may come to be; None if all are, and part of them is no known loss.
        left_out: Whether passes have met another part of the loss, that is no known loss.
        outside: Shapes of trainable parameters that took part but are in no module, and the functions that used them.
        steps: Id of a parameter of a recurrent layer to the number of steps that the layer is run in.
        failure: Why there is no trace: all gradients have to be computed one example at a time then.
    """

    paths: dict[int, list[list[TracedUse]]] = field(default_factory=dict)
    parameters: Sequence[Tensor] = ()
    without_gradients: set[int] = field(default_factory=set)
    ambiguous: bool = False
    forms: Mapping[TermKey, TermForm] = field(default_factory=dict)
    formless: set[TermKey] = field(default_factory=set)
    own: dict[TermKey, OwnRows] | None = None
    left_out: bool = False
    outside: list[str] = field(default_factory=list)
    steps: Mapping[int, int] = field(default_factory=dict)
    failure: str | None = None

    @property
    def sums(self) -> bool:
        """Whether the loss is known to be nothing but sums over the examples."""
        return bool(self.forms) and all(form.sums for form in self.forms.values())

    def uses(self, parameter: Tensor) -> list[TracedUse]:
        """Return the uses of a parameter on all paths."""
        return [use for path in self.paths.get(id(parameter), []) for use in path]

    def own_part(self, loss: BatchLoss) -> BatchLoss:
        """Return the part of a loss that is about the examples."""
        if self.own is None:
            return loss
        self.left_out |= loss.remainder
        return own_part(loss, self.own)

    def add(self, other: Trace) -> None:
        """Add the paths of another trace of the same model."""
        if self.own is None and other.own is not None:  # by now the loss is about other loaders, too
            self.own = dict.fromkeys(self.forms, "all")
        self.forms = {**other.forms, **self.forms}
        if self.own is not None:
            self.own |= other.own or {}
        self.steps = {**other.steps, **self.steps}
        for key, paths in other.paths.items():
            known = self.paths.setdefault(key, [])
            known.extend(path for path in paths if path not in known)


class PathFinder:
    """Finds the uses of parameters on the traced paths, as a forward pass goes along.

    Args:
        trace: The trace.
        n: Number of examples in the batch, which helps to tell paths apart; None if unknown.
    """

    def __init__(self, trace: Trace, n: int | None) -> None:
        self._trace, self._n = trace, n
        # Id of a parameter to the number of its uses so far and the traced paths that began like this.
        self._places: dict[int, tuple[int, list[list[TracedUse]]]] = {}

    def next_use(self, function: Callable[..., Any], parameter: Tensor, output: Tensor) -> TracedUse | None:
        """Return what the trace says of the next use of a parameter; None if no path goes on like this."""
        key = id(parameter)
        number, paths = self._places.get(key, (0, self._trace.paths.get(key, [])))
        following = [
            (path, use)
            for path in paths
            if (use := _use_at(path, number, function)) is not None and use.fits(output, self._n)
        ]
        if any(use.kind == "batched" for _, use in following):
            # An output that has the examples where a batched use has them was not made without them.
            following = [(path, use) for path, use in following if use.kind != "shared"]
        if not following or any(use != following[0][1] for _, use in following):
            return None
        self._places[key] = number + 1, [path for path, _ in following]
        return following[0][1]


def _use_at(path: list[TracedUse], number: int, function: Callable[..., Any]) -> TracedUse | None:
    """Return the use at a place of a path if it is by this function."""
    if number < len(path):
        return path[number] if path[number].function == function else None
    # A loop that runs longer than in the trace: more of the same, if all of the same kind are alike.
    same = [use for use in path if use.function == function]
    return same[0] if same and path[-1].function == function and all(use == same[0] for use in same) else None
