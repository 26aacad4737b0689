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

from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from lightning_influence.core.torch_private import visible_attention
from lightning_influence.gradients.coverage import Coverage
from lightning_influence.gradients.trace import TracedUse
from lightning_influence.layers.blocks import ParameterBlock
from lightning_influence.layers.call import Layouts
from lightning_influence.layers.registry import IN_PLACE
from lightning_influence.layers.repeated import RepeatedCall
from lightning_influence.objective.tap import TrainingTap
from lightning_influence.training.flight.step_norms import StepNorms
from lightning_influence.training.flight.visit import Visit

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
