"""What the training pass of one batch says about the gradients of its examples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import reduce
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_influence.core.precision import wide
from lightning_influence.core.torch_private import versions
from lightning_influence.gradients.block_rows import Output, Source, Use, check_batch, modified
from lightning_influence.layers.blocks import LayerError
from lightning_influence.layers.call import Call, Layouts
from lightning_influence.layers.registry import read_call
from lightning_influence.layers.site import NotUnderstoodError, Site
from lightning_influence.training.flight.step_norms import Group, NotSteppedError

if TYPE_CHECKING:
    from lightning_influence.training.flight.flight import Flight


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
            for parameter, squares in flight.norms.of_uses(flight.coverage.blocks[name], uses, self.n):
                if (group := flight.norms.group(parameter)) is not None:
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
