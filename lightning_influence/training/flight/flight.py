"""TracIn in flight: ``η ‖g‖²`` of every example at the step that trains on it, from the training pass itself.

While ``training_step`` runs, the tap that listens for the loss also sees the calls with covered parameters; their
outputs' places in the graph get a hook that reads the gradient as training's own backward pass comes by (``Visit``).
Nothing is changed: no output is replaced, no gradient is returned, no pass is added. As training uses them, gradients
are those of the batch loss; times the number of examples they are those of the examples' own losses, whose mean the
batch loss is (weighted as this batch has weighted them). Gradient clipping comes later and does not count. Where a
batch norm takes the statistics of the batch, an example's part in the gradient of the batch stands for its gradient.

A parameter is seen where it is passed to a function that is understood, as it is; what is computed from parameters
first (transposed or reparametrised weights, position embeddings that are looked up) is not, nor is what only the
backward pass computes (reentrant activation checkpointing) or a compiled graph. ``Flight.missing`` names what was not
seen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_influence.core.precision import wide
from lightning_influence.core.torch_private import versions, visible_attention
from lightning_influence.gradients.block_rows import Output, Source, Use, check_batch, modified
from lightning_influence.gradients.coverage import Coverage
from lightning_influence.gradients.trace import TracedUse
from lightning_influence.layers.blocks import LayerError, ParameterBlock
from lightning_influence.layers.call import Call, Layouts
from lightning_influence.layers.registry import IN_PLACE, read_call
from lightning_influence.layers.repeated import RepeatedCall
from lightning_influence.layers.site import NotUnderstoodError, Site
from lightning_influence.objective.tap import TrainingTap
from lightning_influence.training.flight.step_norms import Group, NotSteppedError, StepNorms

_Function = Callable[..., Any]


class Flight:
    """Knows which calls of a training step have covered parameters, and what the optimizers make of their gradients.

    Args:
        coverage: The blocks to measure, traced.
        optimizers: Those of the run.

    Attributes:
        norms: Their groups and scales.
        owners: Id of a parameter to its name, itself, and its block.
        layouts: Id of a parameter and function to where the examples are in such a call.
        unseen: Block name to why it is not measured; more may turn out during training, see ``missing``.
        reached: Names of the blocks that were measured.
    """

    def __init__(self, coverage: Coverage, optimizers: Sequence[Any]) -> None:
        self.coverage = coverage
        self.norms = StepNorms(optimizers)
        self.owners: dict[int, tuple[str, Tensor, ParameterBlock]] = {}
        self.layouts: dict[tuple[int, _Function], Layouts] = {}
        self.unseen: dict[str, str] = {}
        self.reached: set[str] = set()
        for name, block in coverage.blocks.items():
            if reason := self._plan(block):
                self.unseen[name] = reason
        self._tap = FlightTap({function for _, function in self.layouts})

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
        self.layouts |= planned
        self.owners |= {id(parameter): (name, parameter, block) for name, parameter in block.parameters.items()}
        return None

    @property
    def missing(self) -> dict[str, str]:
        """Block name to why nothing is known of it, after the first batches."""
        silent = self.coverage.blocks.keys() - self.unseen.keys() - self.reached
        return self.unseen | dict.fromkeys(sorted(silent), "no gradient came by in the training pass")

    @property
    def share(self) -> float:
        """Share of the trainable parameters that was measured."""
        covered = [b for name, b in self.coverage.blocks.items() if name in self.reached]
        count = sum(p.numel() for block in covered for p in block.parameters.values())
        return count / max(1, self.coverage.total_parameters)

    def watch(self, n: int) -> tuple[Visit, FlightTap]:
        """Return what one batch is measured by, and the loss tap that tells it of the calls.

        Args:
            n: Number of examples in the batch.
        """
        self._tap.visit = visit = Visit(self, n)
        return visit, self._tap


class Visit:
    """Per-example gradient norms of one batch, read off training's own forward and backward pass.

    Args:
        flight: What is measured.
        n: Number of examples in the batch.

    Attributes:
        squares: Parameter group to ``Σ gᵀ P g`` over its parameters, ``[n]``, not yet scaled.
        complete: Whether the backward pass came by, and every optimizer had a state to tell ``P`` from.
    """

    def __init__(self, flight: Flight, n: int) -> None:
        self.flight, self.n = flight, n
        self.squares: dict[Group, Tensor] = {}
        self.complete = False
        self._scale: float | None = None  # None until the backward pass
        self._uses: dict[str, list[Use]] = {}
        self._open: dict[str, int] = {}  # block name to the number of gradients that are still to come
        self._waiting: dict[object, Output] = {}  # for them
        self._error: Exception | None = None

    def see(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Look at a finished call of one of the functions."""
        owners = self.flight.owners
        passed = [value for value in (*args, *kwargs.values()) if id(value) in owners]
        if not passed or not torch.is_grad_enabled() or not output.requires_grad or self._error is not None:
            return
        layouts = self.flight.layouts.get((id(passed[0]), func))
        if layouts is None:  # a penalty
            return
        try:
            call = read_call(Site(func, args, kwargs, passed, output))
            assert call is not None
            self._watch(call, layouts, output)
        except NotUnderstoodError as error:
            for parameter in passed:
                self.flight.unseen[owners[id(parameter)][2].name] = f"it is used {error}"
        except Exception as error:  # reported by `finish`: training goes on
            self._error = error

    def _watch(self, call: Call, layouts: Layouts, output: Tensor) -> None:
        place, before = Output.of(output), versions(call.inputs)
        blocks: dict[str, dict[str, Source]] = {}
        for role, tensor in call.parameters.items():
            name, parameter, block = self.flight.owners[id(tensor)]
            blocks.setdefault(block.name, {})[role] = Source(parameter, ((name, parameter),))
        for name, roles in blocks.items():
            self._uses.setdefault(name, []).append(Use(call, layouts, place, before, roles))
            self._open[name] = self._open.get(name, 0) + 1
        key, number, names = object(), place.edge.output_nr, list(blocks)
        self._waiting[key] = place

        def read(gradients: tuple[Tensor | None, ...]) -> None:
            # Only in the backward pass of training: `training_step` may have run others before. The graph holds this
            # hook, which would else hold the gradient until all of the pass is over, and the graph in turn.
            if self._scale is not None and gradients[number] is not None and key in self._waiting:
                self._arrived(names, self._waiting.pop(key), gradients[number])

        place.edge.node.register_prehook(read)

    def start(self, scale: float) -> None:
        """Get ready for the backward pass of the batch.

        Args:
            scale: What its gradients are multiplied with, to be those of the examples' own losses: ``n`` over what the
                loss was multiplied with since ``training_step`` returned it (an accumulation's ``1/k``, a gradient
                scaler's factor).
        """
        self._scale, self.complete = scale, True

    def _arrived(self, blocks: list[str], place: Output, gradient: Tensor | None) -> None:
        if self._error is not None:
            return
        try:
            with torch.no_grad():  # as for `create_graph`
                place.add(gradient)
                for name in blocks:
                    self._open[name] -= 1
                    if not self._open[name]:
                        self._measure(name)
        except Exception as error:  # an exception would end the backward pass, and training with it
            self._error = error

    def _measure(self, name: str) -> None:
        """Add the squares of one block, all of whose uses have their gradients."""
        flight, uses = self.flight, [use for use in self._uses.pop(name) if use.output.reached]
        if name in flight.unseen or not uses:
            return
        flight.reached.add(name)
        for use in uses:
            check_batch(name, use, self.n)
            if use.changed:
                raise LayerError(modified(name))
        try:
            for group, squares in flight.norms.of_uses(flight.coverage.blocks[name], uses, self.n):
                self.squares[group] = self.squares[group] + squares if group in self.squares else squares
        except NotSteppedError:
            self.complete = False

    def finish(self) -> None:
        """Take what the backward pass has told, and let go of the batch.

        Raises:
            Exception: Whatever went wrong within the pass.
        """
        try:
            if self._scale is not None and self._error is None:
                with torch.no_grad():
                    for name in list(self._uses):  # some output of the block was not used
                        self._measure(name)
            if self._error is not None:
                raise self._error
        finally:
            self.let_go()

    def let_go(self) -> None:
        """Forget the batch; hooks that are still in its graph do nothing any more, and hold nothing."""
        self._uses, self._open, self._waiting, self._error = {}, {}, {}, None

    def increments(self, rates: Mapping[Group, float]) -> Tensor:
        """Return ``Σ η gᵀ P g`` of every example, ``[n]``.

        Args:
            rates: Parameter group to learning rate, see ``optimizers.rate``.
        """
        assert self._scale is not None
        parts = [wide(squares) * (rates[group] * self._scale**2) for group, squares in self.squares.items()]
        return reduce(torch.add, parts) if parts else torch.zeros(self.n, dtype=torch.float64)


class FlightTap(TrainingTap):
    """A loss tap that also tells of the calls with covered parameters.

    Args:
        functions: Those that are called with them.

    Attributes:
        visit: Who is told.
    """

    def __init__(self, functions: set[_Function]) -> None:
        super().__init__()
        self._functions = functions
        self.visit: Visit | None = None

    def __torch_function__(
        self, func: _Function, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the call unchanged and take note of it."""
        if func in self._functions:
            output = func(*args, **(kwargs or {}))
            if self._listening and self.visit is not None:
                self.visit.see(func, args, kwargs or {}, output)
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
