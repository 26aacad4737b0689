"""What is noted of a training run so that it can be run again: its steps, and its state at some of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from torch import Tensor

Streams: TypeAlias = "Mapping[str, Any]"
"""States of random streams by name: ``"torch"``, ``"numpy"``, ``"python"``, ``"cuda:0"``, ..."""


class ReplayError(ValueError):
    """A run that can't be replayed; the message says why and the way out."""


@dataclass(frozen=True, eq=False)
class BatchRecord:
    """One batch of training.

    Attributes:
        indices: Dataset indices of its examples, in their order.
        number: ``batch_idx`` that ``training_step`` got.
        epoch: ``current_epoch``.
        before_fetch: Random streams before the batch was fetched; None if it was fetched elsewhere (by workers).
        before_step: Random streams before the batch was moved to the device and ``training_step`` ran. States are
            shared by all the batches before which a stream stood there.
        checksum: Of the batch as it was fetched.
        loss: What was differentiated: the loss, divided by ``Recipe.accumulation``; None if there was none, and so no
            backward pass. Its bits are those of the loss.
        drawn: Dataset indices as the sampler drew them, where collating moves or drops some.
        kept: The batch itself, where it can't be fetched again.
    """

    indices: Sequence[int]
    number: int
    epoch: int
    before_fetch: Streams | None
    before_step: Streams
    checksum: int
    loss: float | None
    drawn: Sequence[int] | None = None
    kept: Any = None


@dataclass(frozen=True, eq=False)
class StepRecord:
    """One optimizer step.

    Attributes:
        batches: Those whose gradients were added up, one or more.
        groups: The optimizer's parameter groups as the step used them, scalars only (``lr``, ``momentum``, ``betas``).
        training: Names of the modules in training mode.
    """

    batches: Sequence[BatchRecord]
    groups: Sequence[Mapping[str, Any]]
    training: frozenset[str]


@dataclass(frozen=True, eq=False)
class RunState:
    """Everything that a step changes.

    Attributes:
        step: Number of optimizer steps before it.
        parameters: Trainable parameters by name.
        buffers: Buffers by name (running statistics of batch norms, counters).
        optimizer: Parameter name to the optimizer's state of it (``momentum_buffer``; ``step``, ``exp_avg``, ...).
    """

    step: int
    parameters: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor] = field(default_factory=dict)
    optimizer: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Recipe:
    """What is the same at every step.

    Attributes:
        optimizer: Name of the optimizer's class in ``torch.optim``.
        members: Names of the parameters of each of its groups.
        clip: Value of gradient clipping, or None.
        clip_by: ``"norm"`` or ``"value"``.
        precision: As the trainer names it (``"32-true"``, ``"bf16-mixed"``).
        accumulation: Divides the loss of each batch.
        examples: Number of training examples, N.
        environment: What else the last bit depends on: versions, device, number of threads.
    """

    optimizer: str
    members: Sequence[Sequence[str]]
    clip: float | None
    clip_by: str
    precision: str
    accumulation: int
    examples: int
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class TrainingRecord:
    """A recorded run.

    Attributes:
        recipe: What is the same at every step.
        steps: Its steps, K of them.
        states: State before some steps (0, ⌈√K⌉, 2⌈√K⌉, ...) and after the last, by step; may lie on a disk.
    """

    recipe: Recipe
    steps: Sequence[StepRecord]
    states: Mapping[int, RunState]


@dataclass(frozen=True, eq=False)
class StepInput:
    """A step about to be taken, with everything it takes: what ``Rerun.segment`` yields, and the backward consumes.

    Attributes:
        state: Before the step, on the device, detached.
        record: Of the step.
        batches: Of the step, on the device.
        streams: Random streams before each batch's ``training_step``, see ``streams.write``.
    """

    state: RunState
    record: StepRecord
    batches: Sequence[Any]
    streams: Sequence[Streams]
