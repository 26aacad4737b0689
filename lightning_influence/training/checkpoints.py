"""Checkpoints of a training run: the weights at some steps, and what the optimizer did to get from one to the next.

Only what training changes is kept: trainable parameters, and buffers such as the running statistics of batch norms,
without which the weights of a checkpoint would be evaluated with the statistics of the last one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from lightning_influence.core.errors import check_count, is_number
from lightning_influence.core.torch_private import eager_name
from lightning_influence.core.weights import parameters_of, places_of, swapped
from lightning_influence.training.optimizers import KINDS


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
            this one stands for; 0 for parameters that no optimizer moved. For a loss that is the sum over the examples
            of a batch, as many times that: the rate of the mean that makes the same steps.
        steps: Number of those steps.
        preconditioner: Parameter name to what an adaptive optimizer multiplies its gradient with, elementwise
            (``1 / (√v̂ + ε)`` for Adam); empty for plain gradient steps.
        optimizer: Name of the optimizer, or of several, with commas; empty if unknown.
    """

    step: int
    parameters: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor] = field(default_factory=dict)
    step_sizes: Mapping[str, float] = field(default_factory=dict)
    steps: int = 0
    preconditioner: Mapping[str, Tensor] = field(default_factory=dict)
    optimizer: str = ""

    @classmethod
    def of(
        cls,
        module: nn.Module,
        step: int,
        *,
        step_sizes: Mapping[str, float] | None = None,
        steps: int = 0,
        preconditioner: Mapping[str, Tensor] | None = None,
        optimizer: str = "",
    ) -> Checkpoint:
        """Return a checkpoint of the module as it is, on the host.

        Args:
            module: The model.
            step: Number of optimizer steps so far.
            step_sizes: See the attributes.
            steps: See the attributes.
            preconditioner: See the attributes.
            optimizer: See the attributes.

        Raises:
            CheckpointError, ValueError, TypeError: If one of them is something else.
        """
        parameters = parameters_of(module)
        check_count("step", step, least=0)
        check_count("steps", steps, least=0)
        _check_by_name(
            "step_sizes",
            step_sizes,
            "the sum of learning rates of every parameter by its name, as `StepSizes.take()` returns it",
            lambda name, value: name in parameters and is_number(value),
        )
        _check_by_name(
            "preconditioner",
            preconditioner,
            "tensors shaped like the parameters, by their names",
            lambda name, value: (
                isinstance(value, Tensor) and name in parameters and value.shape == parameters[name].shape
            ),
        )
        if not isinstance(optimizer, str):
            raise CheckpointError(f"optimizer is a {type(optimizer).__name__}; expected its name, such as 'SGD'.")
        kept = dict(module.state_dict(keep_vars=True))
        return cls(
            step,
            {name: _copied(p) for name, p in parameters.items() if p.requires_grad},
            {eager_name(name): _copied(b) for name, b in module.named_buffers() if name in kept},
            dict(step_sizes or {}),
            steps,
            {name: _copied(value) for name, value in (preconditioner or {}).items()},
            optimizer,
        )

    def __repr__(self) -> str:
        stands = f", stands for {self.steps:,} steps{f' of {self.optimizer}' if self.optimizer else ''}"
        return f"Checkpoint(step {self.step:,}, {len(self.parameters)} parameters{stands if self.steps else ''})"

    def standing_for(self, earlier: Checkpoint) -> Checkpoint:
        """Return the checkpoint that stands for the steps of an earlier one, too, which is dropped."""
        names = {**earlier.step_sizes, **self.step_sizes}
        sizes = {name: earlier.step_sizes.get(name, 0.0) + self.step_sizes.get(name, 0.0) for name in names}
        return replace(self, step_sizes=sizes, steps=earlier.steps + self.steps)

    def outline(self) -> Checkpoint:
        """Return the checkpoint without its tensors."""
        return Checkpoint(parameters={}, **self.described())

    def described(self) -> dict[str, Any]:
        """Return what it stands for, in primitives."""
        return {name: copy(getattr(self, name)) for name in ("step", "step_sizes", "steps", "optimizer")}

    @property
    def bytes(self) -> int:
        """Memory that its tensors take."""
        tensors = [*self.parameters.values(), *self.buffers.values(), *self.preconditioner.values()]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    @property
    def is_plain(self) -> bool:
        """Whether its steps were multiples of the gradient, as far as is told."""
        return not self.preconditioner and self.optimizer in ("", "SGD")

    @property
    def is_understood(self) -> bool:
        """Whether it is told what every gradient was multiplied with, if by anything."""
        names = {name for name, size in self.step_sizes.items() if size}
        known = {"", *KINDS}.issuperset(self.optimizer.split(", "))
        return self.preconditioner.keys() >= names or (known and bool(self.preconditioner or self.is_plain))

    def check(self, module: nn.Module) -> None:
        """Raise ``CheckpointError`` if the module is not the one that this is a checkpoint of."""
        places = places_of(module)
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
        missing = [name for name, p in parameters_of(module).items() if p.requires_grad and name not in self.parameters]
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
        with swapped(places_of(module), {**self.parameters, **self.buffers}):
            yield


def _check_by_name(argument: str, given: object, expected: str, good: Callable[[str, Any], bool]) -> None:
    """Raise ``CheckpointError`` unless this is None, or a mapping all of whose entries are good."""
    entries = given if isinstance(given, Mapping) else {} if given is None else {argument: given}
    odd = {name: value for name, value in entries.items() if entries is not given or not good(name, value)}
    if odd:
        name, value = next(iter(odd.items()))
        what = f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise CheckpointError(f"{argument}{f'[{name!r}]' if entries is given else ''}={what}; expected {expected}.")


_WHENCE = (
    "pass those that an audit has kept, `report.checkpoints()` after `InfluenceAudit(tracin=TracIn(keep_checkpoints="
    "10))`, or a list of `Checkpoint.of(model, step, ...)`"
)


def check_together(checkpoints: Sequence[Checkpoint], module: nn.Module) -> None:
    """Raise ``CheckpointError`` unless the checkpoints are those of one run of this model, in order.

    Args:
        checkpoints: The checkpoints.
        module: The model.
    """
    if isinstance(checkpoints, Mapping) or not hasattr(checkpoints, "__len__") or not len(checkpoints):
        none = getattr(checkpoints, "__len__", None) and not len(checkpoints)
        what = "no checkpoint" if none else f"a {type(checkpoints).__name__}, not a list of checkpoints"
        raise CheckpointError(f"there is {what}; {_WHENCE}.")
    # Of checkpoints on a disk, names and shapes are enough.
    every: list[Checkpoint] = list(getattr(checkpoints, "outlines", checkpoints))
    for checkpoint in every:
        if not isinstance(checkpoint, Checkpoint):
            raise CheckpointError(f"a checkpoint is a {type(checkpoint).__name__}; {_WHENCE}.")
        checkpoint.check(module)
    steps = [each.step for each in every]
    if any(after <= before for before, after in pairwise(steps)):
        raise CheckpointError(
            f"the checkpoints are of the steps {steps}; expected those of one run, in the order of training, each once."
        )
    if len(names := {each.optimizer: each.step for each in every}) > 1:
        listed = ", ".join(f"step {step} with {name or 'an unknown one'}" for name, step in names.items())
        raise CheckpointError(
            f"the checkpoints were taken with different optimizers ({listed}): they are of different runs. Pass those "
            "of one run."
        )
    if len({frozenset(each.parameters) for each in every}) > 1:
        raise CheckpointError("some checkpoints have parameters that others have not; expected those of one run.")


def check_step_sizes(checkpoints: Sequence[Checkpoint]) -> None:
    """Raise ``CheckpointError`` if no checkpoint has step sizes: all of TracIn would be zero."""
    if not any(any(checkpoint.step_sizes.values()) for checkpoint in getattr(checkpoints, "outlines", checkpoints)):
        raise CheckpointError(
            f"none of {len(checkpoints)} checkpoints has step sizes, which TracIn weighs gradients with; take them "
            "with `step_sizes=`, see `StepSizes`."
        )


def steps_taken(checkpoints: Sequence[Checkpoint], module: nn.Module, *, adaptive: bool = False) -> list[Checkpoint]:
    """Return the checkpoints of a run that stand for steps, for methods that follow these.

    Args:
        checkpoints: The checkpoints.
        module: The model.
        adaptive: Whether the method follows steps that are multiples of the gradient elementwise only (Adam's).

    Raises:
        CheckpointError: As ``check_together``, or if the steps are unknown, or of another kind.
    """
    check_together(checkpoints, module)
    moved = [c for c in checkpoints if c.steps and any(c.step_sizes.values())]
    if odd := [c.step for c in moved if not (c.is_plain or (adaptive and c.is_understood))]:
        kind = "an unknown optimizer" if adaptive else "an adaptive optimizer or an unknown one"
        whose = "SGD, Adam and their kin, whose scales the checkpoints hold" if adaptive else "SGD"
        raise CheckpointError(
            f"the checkpoints of the steps {odd[:5]} are of {kind}, whose steps may not be multiples of the gradient; "
            f"this method is for {whose}. Use TracIn, or leave out `preconditioner` and `optimizer` to treat the steps "
            "as plain ones."
        )
    if not moved:
        raise CheckpointError(
            f"none of {len(checkpoints)} checkpoints knows the steps it stands for; take them with `step_sizes=` and "
            "`steps=`, see `StepSizes`."
        )
    return moved


def one_too_many(steps: Sequence[int]) -> int:
    """Return the place of the checkpoint to drop, so that those that are left are spread evenly over the training.

    It is the one whose neighbours are closest to each other; the start of training counts as a neighbour, and the last
    checkpoint stays.

    Args:
        steps: Of the checkpoints, two at least, in order.
    """
    before = [0, *steps]
    gaps = [steps[place + 1] - before[place] for place in range(len(steps) - 1)]
    return gaps.index(min(gaps))


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)
