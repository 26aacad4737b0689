"""Checkpoints of a training run: the weights at some steps, and what the optimizer did to get from one to the next.

Only what training changes is kept: trainable parameters, and buffers such as the running statistics of batch norms,
without which the weights of a checkpoint would be evaluated with the statistics of the last one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


class CheckpointError(ValueError):
    """A checkpoint that does not fit the model or the optimizer; the message says which part and the way out."""


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The weights after some optimizer steps.

    Attributes:
        step: Number of optimizer steps of the run when it was taken.
        parameters: Trainable parameters by name, as in ``named_parameters()``.
        buffers: Buffers by name that are part of the model's state.
        step_sizes: Parameter name to ``Σ_t η_t / (1 - momentum)`` over the steps since the checkpoint before, which
            this one stands for; 0 for parameters that no optimizer moved.
        steps: Number of those steps.
        preconditioner: Parameter name to what an adaptive optimizer multiplies its gradient with, elementwise
            (``1 / (√v̂ + ε)`` for Adam); empty for plain gradient steps.
    """

    step: int
    parameters: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor] = field(default_factory=dict)
    step_sizes: Mapping[str, float] = field(default_factory=dict)
    steps: int = 0
    preconditioner: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        module: nn.Module,
        step: int,
        *,
        step_sizes: Mapping[str, float] | None = None,
        steps: int = 0,
        preconditioner: Mapping[str, Tensor] | None = None,
    ) -> Checkpoint:
        """Return a checkpoint of the module as it is, on the host.

        Args:
            module: The model.
            step: Number of optimizer steps so far.
            step_sizes: See the attributes.
            steps: See the attributes.
            preconditioner: See the attributes.
        """
        kept = dict(module.state_dict(keep_vars=True))
        return cls(
            step,
            {name: _copied(p) for name, p in module.named_parameters() if p.requires_grad},
            {name: _copied(b) for name, b in module.named_buffers() if name in kept},
            dict(step_sizes or {}),
            steps,
            {name: _copied(value) for name, value in (preconditioner or {}).items()},
        )

    @property
    def bytes(self) -> int:
        """Memory that its tensors take."""
        tensors = [*self.parameters.values(), *self.buffers.values(), *self.preconditioner.values()]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def check(self, module: nn.Module) -> None:
        """Raise ``CheckpointError`` if the module is not the one that this is a checkpoint of."""
        places = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        for name, value in {**self.parameters, **self.buffers}.items():
            if name not in places:
                raise CheckpointError(
                    f"the checkpoint of step {self.step} holds {name!r}, which {type(module).__name__} has not; it "
                    "belongs to another model. Pass the model that was trained."
                )
            if places[name].shape != value.shape:
                raise CheckpointError(
                    f"{name!r} has the shape {list(value.shape)} in the checkpoint of step {self.step} and "
                    f"{list(places[name].shape)} in {type(module).__name__}; pass the model that was trained."
                )
        missing = [name for name, p in module.named_parameters() if p.requires_grad and name not in self.parameters]
        if missing:
            raise CheckpointError(
                f"the checkpoint of step {self.step} lacks the trainable parameters {missing[:5]}; it belongs to "
                "another model, or they were thawed later. Freeze them, or take checkpoints of the whole model."
            )

    @contextmanager
    def loaded(self, module: nn.Module) -> Iterator[None]:
        """Put the checkpoint's weights into the module within a ``with`` block; afterwards every bit is as it was.

        Raises:
            CheckpointError: If the module is not the one that this is a checkpoint of.
        """
        self.check(module)
        places = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        values = {**self.parameters, **self.buffers}
        before = {name: places[name].detach().clone() for name in values}
        try:
            _write(places, values)
            yield
        finally:
            _write(places, before)


def _write(places: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, value in values.items():
            places[name].copy_(value)


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)
