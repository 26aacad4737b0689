"""TracIn in flight: ``η ‖g‖²`` of every example at the step that trains on it, from the training pass itself.

While ``training_step`` runs, the tap that listens for the loss also sees the calls with covered parameters; their
outputs' places in the graph get a hook that reads the gradient as training's own backward pass comes by. Nothing is
changed: no output is replaced, no gradient is returned, no pass is added. Where all there is to measure are linear maps
with a row per example, one after the other, the graph of the batch is soon read in place of its calls being watched
(``row_graph``); a batch whose graph then is another one is not measured. As training uses them, gradients are those of
the batch loss; times the number of examples they are those of the examples' own losses, whose mean the batch loss is
(weighted as this batch has weighted them). Gradient clipping comes later and does not count. Where a batch norm takes
the statistics of the batch, an example's part in the gradient of the batch stands for its gradient.

A parameter is seen where it is passed to a function that is understood, as it is; what is computed from parameters
first (transposed or reparametrised weights, position embeddings that are looked up) is not, nor is what only the
backward pass computes (reentrant activation checkpointing) or a compiled graph. ``Flight.missing`` names what was not
seen.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import GradientEdge

from lightning_influence.core.precision import working
from lightning_influence.core.torch_private import visible_attention
from lightning_influence.gradients.block_rows import Output, Source, Use, check_batch, modified
from lightning_influence.gradients.coverage import Coverage
from lightning_influence.gradients.trace import TracedUse
from lightning_influence.layers.blocks import LayerError, ParameterBlock
from lightning_influence.layers.call import Call, Layouts
from lightning_influence.layers.linear import LinearCall
from lightning_influence.layers.registry import IN_PLACE, read_call
from lightning_influence.layers.repeated import RepeatedCall
from lightning_influence.layers.site import NotUnderstoodError, Site
from lightning_influence.objective.tap import TrainingTap
from lightning_influence.training.flight.known_calls import Reading, Row, is_of_rows, told_by_arguments
from lightning_influence.training.flight.reliance import Reliance
from lightning_influence.training.flight.row_graph import RowGraph
from lightning_influence.training.flight.step_norms import Group, StepNorms
from lightning_influence.training.tracin import Increments

_Function = Callable[..., Any]


@dataclass(eq=False)
class Visit:
    """What one training pass said about the examples of its batch.

    Attributes:
        indices: Dataset indices, ``n`` of them.
        scale: What the gradients of the backward pass are multiplied with, to be those of the examples' own losses.
        squares: Parameter group to ``Σ gᵀ P g`` over its parameters, ``[n]``, not yet scaled.
        complete: False if an optimizer had no state yet to tell ``P`` from.
    """

    indices: Sequence[int]
    scale: float
    squares: dict[Group, Tensor] = field(default_factory=dict)
    complete: bool = True
    _lengths: list[tuple[Group | None, Group | None, Tensor, Tensor]] = field(default_factory=list)

    def add(self, group: Group, squares: Tensor) -> None:
        """Add squares ``[n]``, which are not used any more."""
        self.squares[group] = self.squares[group].add_(squares) if group in self.squares else squares

    def add_lengths(self, of_weight: Group | None, of_bias: Group | None, x: Tensor, g: Tensor) -> None:
        """Add a plain step of a linear map with a row per example, by the lengths of its rows.

        Args:
            of_weight: Group of its weight, None if it does not move.
            of_bias: Group of its bias, likewise.
            x: Lengths of the inputs, ``[n]``.
            g: Lengths of the output gradients, ``[n]``.
        """
        self._lengths.append((of_weight, of_bias, x, g))

    def increments(self, rates: Mapping[Group, float]) -> Increments:
        """Return ``Σ η gᵀ P g`` of every example, to be added up later.

        Args:
            rates: Parameter group to learning rate, see ``optimizers.rates``.
        """
        of = {group: rate * self.scale**2 for group, rate in rates.items()}
        return Increments(
            len(self.indices),
            [(squares, of[group]) for group, squares in self.squares.items()],
            [
                (x, g, 0.0 if weight is None else of[weight], 0.0 if bias is None else of[bias])
                for weight, bias, x, g in self._lengths
            ],
        )


class Flight:
    """Reads per-example gradient norms off training's own forward and backward passes.

    Args:
        coverage: The blocks to measure, traced.
        optimizers: Those of the run.

    Attributes:
        unseen: Block name to why it is not measured; more may turn out during training, see ``missing``.
    """

    def __init__(self, coverage: Coverage, optimizers: Sequence[Any]) -> None:
        self.coverage = coverage
        self._norms = StepNorms(optimizers)
        self.unseen: dict[str, str] = {}
        self._layouts: dict[tuple[int, _Function], Layouts] = {}
        self._owners: dict[int, tuple[str, Tensor, ParameterBlock]] = {}
        for name, block in coverage.blocks.items():
            if reason := self._plan(block):
                self.unseen[name] = reason
        self._functions = {function for _, function in self._layouts}
        self._reached: set[str] = set()
        self._readings: dict[tuple[int, _Function], Reading] = {}
        self._rows: dict[int, Reading] = {}  # those of linear maps, by their weights
        self._uses: dict[str, list[Use | Row]] = {}
        self._open: dict[str, int] = {}
        self._waiting: list[list[Output]] = []  # outputs whose gradients are still to come, each alone
        self._graph: RowGraph[Reading] | None = None
        self._reliance = Reliance()
        self._watched = True  # the running batch, by a tap
        self._n = 0
        self._visit: Visit | None = None
        self._error: Exception | None = None
        self._tap = _FlightTap(self)

    def _plan(self, block: ParameterBlock) -> str | None:
        """Note where the block's parameters will be met; return why they can't be, if so."""
        if block.name in self.coverage.one_by_one:
            return "its gradients have no closed form"
        planned: dict[tuple[int, _Function], Layouts] = {}
        for name, parameter in block.parameters.items():
            uses = [use for use in self.coverage.trace.uses(parameter) if use.kind != "penalty"]
            if not uses:
                return f"{name} was not seen in the trace of the model"
            for use in uses:
                if not _is_direct(use, parameter):
                    return f"{name} is not used as it is, or by a function that is run once more for every example"
                if planned.setdefault((id(parameter), use.function), use.layouts) != use.layouts:
                    return f"{name} is used on tensors that hold the examples in different places"
        self._layouts |= planned
        self._owners |= {id(parameter): (name, parameter, block) for name, parameter in block.parameters.items()}
        return None

    @property
    def missing(self) -> dict[str, str]:
        """Block name to why nothing is known of it, after the first batches."""
        silent = self.coverage.blocks.keys() - self.unseen.keys() - self._reached
        return self.unseen | dict.fromkeys(sorted(silent), "no gradient came by in the training pass")

    @property
    def share(self) -> float:
        """Share of the trainable parameters that was measured."""
        covered = [b for name, b in self.coverage.blocks.items() if name in self._reached]
        count = sum(p.numel() for block in covered for p in block.parameters.values())
        return count / max(1, self.coverage.total_parameters)

    # ------------------------------------------------------------ forward pass

    @property
    def needs_tap(self) -> bool:
        """Whether the calls of the next batch have to be watched: not if its graph is relied upon."""
        return self._reliance.needs_watching

    def tap(self, n: int) -> TrainingTap:
        """Return a loss tap that watches the calls of one forward pass, too.

        Args:
            n: Number of examples in the batch.
        """
        self.clear()
        self._n, self._watched = n, True
        return self._tap

    def without_tap(self, n: int) -> None:
        """Get ready for a forward pass that nothing watches.

        Args:
            n: Number of examples in the batch.
        """
        self.clear()
        self._n, self._watched = n, False

    def clear(self) -> None:
        """Forget the last batch; hooks that are still in its graph do nothing any more, and hold nothing."""
        for use in chain.from_iterable(self._uses.values()):
            if isinstance(use, Row):
                use.let_go()
        self._uses.clear()
        for place in self._waiting:
            place.clear()
        self._uses, self._open, self._waiting, self._visit, self._error = {}, {}, [], None, None

    def see(self, func: _Function, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Look at a finished call of one of the functions."""
        if func is F.linear and not kwargs and self._see_row(args, output):
            return
        passed = [value for value in (*args, *kwargs.values()) if id(value) in self._owners]
        if not passed or not torch.is_grad_enabled() or not output.requires_grad or self._error is not None:
            return
        place = (id(passed[0]), func)
        layouts = self._layouts.get(place)
        if layouts is None:  # a penalty
            return
        try:
            known = self._readings.get(place)
            if known is not None and known.is_of(args, kwargs, passed, output):
                self._watch(known, replace(known.call, input=args[0].detach()), output)
            else:
                site = Site(func, args, kwargs, passed, output)
                call = read_call(site)
                assert call is not None
                reading = Reading.of(site, call, layouts, self._owners)
                if told_by_arguments(site):
                    self._readings[place] = reading
                    if is_of_rows(reading):
                        self._rows[id(passed[0])] = reading
                self._watch(reading, call, output)
        except NotUnderstoodError as error:
            for parameter in passed:
                self.unseen[self._owners[id(parameter)][2].name] = f"it is used {error}"
        except Exception as error:  # reported by `finish`: training goes on
            self._error = error

    def _see_row(self, args: tuple[Any, ...], output: Tensor) -> bool:
        """Look at a call of a linear map that was met before; tell whether it is one with a row per example."""
        reading, x = self._rows.get(id(args[1])) if len(args) > 1 else None, args[0]
        if reading is None or x.ndim != 2 or len(x) != self._n or not output.requires_grad or output._base is not None:
            return False
        same = len(args) == len(reading.rest) + 1 and all(map(operator.is_, args[1:], reading.rest))
        if not same or output.dtype is not reading.dtype or id(x) in self._owners or self._error is not None:
            return False
        self._watch_row(reading, x.detach(), output.grad_fn, output.output_nr)
        return True

    def _watch_row(self, reading: Reading, x: Tensor, node: Any, number: int = 0) -> None:
        row = Row(reading, x, Output(GradientEdge(node, number)))
        (name,) = reading.blocks
        self._uses.setdefault(name, []).append(row)
        self._open[name] = self._open.get(name, 0) + 1
        node.register_prehook(partial(self._read_row, row, self._uses))

    def _read_row(self, row: Row, uses: dict[str, list[Use | Row]], gradients: tuple[Tensor | None, ...]) -> None:
        if self._visit is None or uses is not self._uses or self._error is not None or not row.held:
            return
        gradient = gradients[row.output.edge.output_nr]
        if gradient is None or row.gradient is not None:
            return
        try:
            with torch.no_grad():  # as for `create_graph`
                row.gradient = gradient.detach()
                (name,) = row.reading.blocks
                self._open[name] -= 1
                if not self._open[name]:
                    self._measure(name)
        except Exception as error:  # an exception would end the backward pass, and training with it
            self._error = error

    def _watch(self, reading: Reading, call: Call, output: Tensor) -> None:
        place, versions = Output.of(output), tuple([tensor._version for tensor in call.inputs])
        for name, roles in reading.blocks.items():
            self._uses.setdefault(name, []).append(Use(call, reading.layouts, place, versions, roles))
            self._open[name] = self._open.get(name, 0) + 1
        number, uses, waiting = place.edge.output_nr, self._uses, [place]
        self._waiting.append(waiting)

        def read(gradients: tuple[Tensor | None, ...]) -> None:
            # Only in the backward pass of training: `training_step` may have run others before.
            if self._visit is not None and uses is self._uses and gradients[number] is not None and waiting:
                # The graph holds this hook, which would hold the gradient until all of the pass is over.
                self._arrived(reading.blocks, waiting.pop(), gradients[number])

        place.edge.node.register_prehook(read)

    # ----------------------------------------------------------- backward pass

    def start(self, indices: Sequence[int], scale: float, loss: Tensor) -> None:
        """Get ready for the backward pass of the batch.

        Args:
            indices: Dataset indices of its examples.
            scale: ``n`` over what the loss was multiplied with since ``training_step`` returned it (an accumulation's
                ``1/k``, a gradient scaler's factor).
            loss: What the backward pass starts from.
        """
        if self._watched:
            self._compare(loss)
        elif not self._read_graph(loss):
            self._reliance.failed()
            return
        self._norms.start()
        self._visit = Visit(list(indices), scale)

    def _compare(self, loss: Tensor) -> None:
        """Find out whether the graph tells what was seen."""
        if self._reliance.given_up:
            return
        seen: dict[Any, Row] = {}
        for uses in self._uses.values():
            for use in uses:
                if not isinstance(use, Row):
                    self._reliance.compared(False)
                    return
                seen[use.output.edge.node] = use
        if self._graph is not None:
            told = self._graph.follow(loss, self._n) or []
            found = {node: seen[node].is_of(reading, x) for reading, x, node in told if node in seen}
            agrees = len(told) == len(found) == len(seen) > 0 and all(found.values())
            self._reliance.compared(agrees)
            if agrees:
                return
        self._graph = RowGraph.of(loss, {node: row.reading for node, row in seen.items()})
        if self._graph is None:
            self._reliance.compared(False)

    def _read_graph(self, loss: Tensor) -> bool:
        """Watch the linear maps of a batch by its graph; tell whether it is the one that is known."""
        told = None if self._graph is None else self._graph.follow(loss, self._n)
        for reading, x, node in told or ():
            self._watch_row(reading, x.detach(), node)
        return told is not None

    def _arrived(self, blocks: Iterable[str], place: Output, gradient: Tensor | None) -> None:
        if self._error is not None:
            return
        try:
            with torch.no_grad():
                place.add(gradient)
                for name in blocks:
                    self._open[name] -= 1
                    if not self._open[name]:
                        self._measure(name)
        except Exception as error:  # an exception would end the backward pass, and training with it
            self._error = error

    def _measure(self, name: str) -> None:
        """Add the squares of one block, all of whose uses have their gradients."""
        found = self._uses.pop(name)
        try:
            if self._visit is not None and name not in self.unseen:
                self._measure_uses(self._visit, name, found)
        finally:
            for use in found:
                if isinstance(use, Row):
                    use.let_go()

    def _measure_uses(self, visit: Visit, name: str, found: Sequence[Use | Row]) -> None:
        if len(found) == 1 and isinstance(found[0], Row):
            self._measure_row(visit, name, found[0])
            return
        told = [use.use(use.reading.blocks[name]) if isinstance(use, Row) else use for use in found]
        uses = [use for use in told if use.output.reached]
        if not uses:
            return
        self._reached.add(name)
        for use in uses:
            check_batch(name, use, self._n)
            if use.changed:
                raise LayerError(modified(name))
        rows = _single_rows(uses[0], self._n) if len(uses) == 1 else None
        if rows is not None:
            self._add_rows(visit, name, uses[0].call, uses[0].roles, *rows)
            return
        self._add(visit, self._norms.of_uses(self.coverage.blocks[name], uses, self._n))

    def _measure_row(self, visit: Visit, name: str, row: Row) -> None:
        if row.gradient is None:
            return
        self._reached.add(name)
        if row.x._version != row.version:
            raise LayerError(modified(name))
        x, g = working(row.x), working(row.gradient)
        self._add_rows(visit, name, row.reading.call, row.reading.blocks[name], x, g)

    def _add(self, visit: Visit, found: Iterable[tuple[Tensor, Tensor]]) -> None:
        for parameter, squares in found:
            if (group := self._norms.group(parameter)) is not None:
                visit.add(group, squares)

    def _add_rows(self, visit: Visit, name: str, call: Call, roles: Mapping[str, Source], x: Tensor, g: Tensor) -> None:
        """Add ``gᵀ P g`` of a linear map with a row per example, for plain steps by the lengths of the rows."""
        groups = self._norms.plain_rows(name, roles)
        if groups is not None:
            visit.add_lengths(*groups, torch.linalg.vector_norm(x, dim=1), torch.linalg.vector_norm(g, dim=1))
            return
        assert isinstance(call, LinearCall)
        self._add(visit, self._norms.of_rows(call, roles, x, g))

    def finish(self) -> Visit | None:
        """Return what the backward pass has told, None if there was none.

        Raises:
            Exception: Whatever went wrong within the pass.
        """
        visit, error = self._visit, self._error
        if visit is not None and error is None and self._uses:
            with torch.no_grad():
                for name in list(self._uses):  # some output of the block was not used
                    self._measure(name)
            error = self._error
        if visit is not None:
            visit.complete = self._norms.complete
        self.clear()
        if error is not None:
            raise error
        return visit

    def stepped(self) -> None:
        """Forget what the optimizers' state said: a step has changed it."""
        self._norms.stepped()


class _FlightTap(TrainingTap):
    """A loss tap that tells a flight of the calls with covered parameters."""

    def __init__(self, flight: Flight) -> None:
        super().__init__()
        self._flight = flight
        self._functions = flight._functions

    def __torch_function__(
        self, func: _Function, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the call unchanged and take note of it."""
        if func in self._functions:
            output = func(*args, **(kwargs or {}))
            if self._listening:
                self._flight.see(func, args, kwargs or {}, output)
            return output
        if func is F.multi_head_attention_forward:
            with self:  # its linear maps are the layers
                return visible_attention(*args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)


def _is_direct(use: TracedUse, parameter: Tensor) -> bool:
    """Tell whether a call takes the parameter itself, and keeps what it needs."""
    if use.kind != "batched" or use.call is None or issubclass(use.call, RepeatedCall) or use.function in IN_PLACE:
        return False
    roles = [role for role, owners in use.roles.items() if id(parameter) in owners]
    views = [use.views.get(role) for role in roles]
    rows = len(parameter) if parameter.ndim else 1
    return all(v is not None and not v.transposed and (v.start, v.rows) == (0, rows) for v in views)


def _single_rows(use: Use, n: int) -> tuple[Tensor, Tensor] | None:
    """Return inputs ``[n, i]`` and output gradients ``[n, o]`` of a linear map with a row per example."""
    call, (gradient,) = use.call, use.output.gradients
    if type(call) is not LinearCall or call.input.ndim != 2 or gradient is None or len(call.input) != n:
        return None
    return working(call.input), working(gradient)
