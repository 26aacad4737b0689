"""Noting a training run while it runs, whoever drives it."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_influence.core.memory import readable
from lightning_influence.core.torch_private import eager_name
from lightning_influence.data.contents import copied
from lightning_influence.replay.checksum import checksum
from lightning_influence.replay.kept_states import KeptStates, bytes_of, state_of
from lightning_influence.replay.recipes import check_optimizer, environment_of, type_of
from lightning_influence.replay.record import (
    BatchRecord,
    Recipe,
    ReplayError,
    StepRecord,
    Streams,
    TrainingRecord,
)
from lightning_influence.replay.streams import StreamReader

# Losses on a device that wait for being read, together.
_READ_EVERY = 64
# Of a batch: objects, not what they hold.
_BATCH_BYTES = 500


class Recorder:
    """Notes the steps of a run, and its state before some of them; nothing of the run is changed.

    To be told of each batch: ``fetching`` before it is fetched, ``fetched`` after, ``begin`` before the step runs on
    it, ``differentiated`` before the backward pass and ``ended`` at its end; and of each optimizer step, ``stepping``,
    before it is taken. What can't be recorded ends the recording, not the training: ``why`` tells.

    Args:
        module: The model.
        optimizer: The one that trains it, of ``torch.optim``.
        examples: Number of training examples.
        accumulation: What the loss of each batch is divided by: the number of batches of a step.
        clip: Value of gradient clipping, or None.
        clip_by: ``"norm"`` or ``"value"``.
        precision: As Lightning names it.
        keep_batches: Whether to keep the batches, as they can't be fetched again.
        max_bytes: Of memory that records may take; states are kept further apart, then recording ends.
        states: Where states are kept.

    Raises:
        ReplayError: If such a run can't be replayed.

    Example:
        >>> recorder = Recorder(model, optimizer, examples=len(dataset))
        >>> for number, indices in enumerate(order):
        ...     before = recorder.fetching()
        ...     batch = fetch(indices)
        ...     recorder.fetched(batch, indices, before)
        ...     recorder.begin(number, epoch=0)
        ...     optimizer.zero_grad()
        ...     loss = model.training_step(batch, number)
        ...     recorder.differentiated(loss)
        ...     loss.backward()
        ...     recorder.stepping()
        ...     optimizer.step()
        ...     recorder.ended()
        >>> record = recorder.finish()
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        examples: int,
        accumulation: int = 1,
        clip: float | None = None,
        clip_by: str = "norm",
        precision: str = "32-true",
        keep_batches: bool = False,
        max_bytes: int = 2**31,
        states: KeptStates | None = None,
    ) -> None:
        members = check_optimizer(module, optimizer)
        self.recipe = Recipe(
            optimizer=type_of(optimizer) or "",
            members=members,
            clip=clip,
            clip_by=clip_by,
            precision=precision,
            accumulation=accumulation,
            examples=examples,
            environment=environment_of(module),
        )
        self.why = ""
        self.keep_batches = keep_batches
        self.max_bytes = max_bytes
        self.fetching = StreamReader()
        self._module, self._optimizer = module, optimizer
        self._modules, self._parameters = list(module.modules()), list(module.parameters())
        self._as_began = self._standing()
        self.states = KeptStates() if states is None else states
        self._record_bytes = 0
        self._seen_streams: dict[str, Any] = {}
        self._steps: list[StepRecord] = []
        self._batches: list[BatchRecord] = []  # of the step to come
        self._pending: BatchRecord | None = None  # fetched
        self._current: BatchRecord | None = None  # begun
        self._loss: Tensor | None = None
        self._losses: list[tuple[int, int, Tensor]] = []  # step, batch of it: to be read
        self._groups: list[dict[str, Any]] = []
        self._training: frozenset[str] = frozenset()
        self._modes: list[bool] = []

    # ----------------------------------------------------------------- events

    def fetched(
        self,
        batch: Any,
        indices: Sequence[int],
        before_fetch: Streams | None,
        drawn: Sequence[int] | None = None,
    ) -> None:
        """Note a batch as it was fetched, before it is moved to the device.

        Args:
            batch: The batch.
            indices: Dataset indices of its examples, in their order.
            before_fetch: What ``fetching`` has returned before.
            drawn: As the sampler drew them, if they are not the same.
        """
        if self.why:
            return
        before_step = self.fetching()
        self._count_streams(before_fetch, before_step)
        kept = copied(batch) if self.keep_batches else None
        self._record_bytes += _BATCH_BYTES + 8 * len(indices) + bytes_of(kept)
        own = None if drawn is None or list(drawn) == list(indices) else array("q", drawn)
        self._pending = BatchRecord(
            array("q", indices), -1, -1, before_fetch, before_step, checksum(batch), None, drawn=own, kept=kept
        )

    def begin(self, number: int, epoch: int) -> None:
        """Note that the step runs on the batch that was fetched last.

        Args:
            number: ``batch_idx``.
            epoch: ``current_epoch``.
        """
        if self.why:
            return
        pending, self._pending, self._loss = self._pending, None, None
        if pending is None:
            self.stop(f"it is not known which examples batch {number} of epoch {epoch} holds")
            return
        if not self._batches:
            self._begin_step()
        self._current = replace(pending, number=number, epoch=epoch)

    def differentiated(self, loss: Tensor) -> None:
        """Note the loss of the batch, as its backward pass begins."""
        if self._current is not None:
            if self._loss is not None:
                self.stop("there were two backward passes for one batch")
                return
            self._loss = loss.detach()

    def stepping(self) -> None:
        """Note that the optimizer is about to take a step."""
        if self.why or self._current is None:
            return
        self._end_batch()
        if self._standing() != self._as_began:
            self.stop(f"before step {len(self._steps)}, parameters were frozen, thawed, or given to the optimizer")
            return
        groups = [_scalars(group) for group in self._optimizer.param_groups]
        self._groups = self._groups if groups == self._groups else groups
        self._steps.append(StepRecord(tuple(self._batches), self._groups, self._training))
        self._batches = []

    def ended(self) -> None:
        """Note that training is done with the batch."""
        if not self.why and self._current is not None:
            self._end_batch()
            if len(self._batches) > self.recipe.accumulation:
                self.stop(f"no optimizer step has followed {len(self._batches)} batches")

    def finish(self) -> TrainingRecord:
        """Return the record of the run, which has ended.

        Raises:
            ReplayError: If it is not complete.
        """
        if not self.why and self._batches:
            self.stop(f"training ended before the step that {len(self._batches)} batches were accumulated for")
        if not self.why and not self._steps:
            self.stop("no step was taken")
        if not self.why:
            self.states.keep(state_of(self._module, self._optimizer, len(self._steps)))
            self._read_losses()
        if self.why:
            raise ReplayError(f"this run was not recorded as a whole: {self.why}.")
        return TrainingRecord(self.recipe, self._steps, self.states)

    def stop(self, why: str) -> None:
        """Record nothing more, and let go of what there is."""
        if self.why:
            return
        self.why = why
        self._steps, self._batches, self._losses = [], [], []
        self._pending = self._current = self._loss = None
        self.states.clear()
        self._record_bytes = 0
        self.fetching = StreamReader()

    @property
    def accumulated(self) -> int:
        """Number of batches whose step is still to come."""
        return len(self._batches)

    @property
    def bytes(self) -> int:
        """Memory that the records take, states included."""
        return self._record_bytes + self.states.bytes

    # ---------------------------------------------------------------- details

    def _begin_step(self) -> None:
        modes = [module.training for module in self._modules]
        if modes != self._modes:
            self._modes = modes
            named = self._module.named_modules()
            self._training = frozenset(eager_name(name) for name, module in named if module.training)
        step = len(self._steps)
        if not step % self.states.interval and step not in self.states:
            self.states.keep(state_of(self._module, self._optimizer, step))

    def _end_batch(self) -> None:
        assert self._current is not None
        if self._loss is not None:
            self._losses.append((len(self._steps), len(self._batches), self._loss))
        self._batches.append(self._current)
        self._current = self._loss = None
        # Not of the step that is still growing.
        if len(self._losses) >= _READ_EVERY + self.recipe.accumulation:
            self._read_losses()
        while self.bytes > self.max_bytes and self.states.thin():
            pass
        if self.bytes > self.max_bytes:
            self.stop(
                f"after {len(self._steps)} steps its record has {readable(self.bytes)}, more than the "
                f"{readable(self.max_bytes)} of `max_bytes=`"
            )

    def _standing(self) -> tuple[list[int], list[bool]]:
        """Return what is one for all steps: the parameters that the optimizer has, and those that have gradients."""
        held = [id(parameter) for group in self._optimizer.param_groups for parameter in group["params"]]
        return held, [parameter.requires_grad for parameter in self._parameters]

    def _read_losses(self) -> None:
        """Read the losses of complete steps, waiting for the device once."""
        done = [each for each in self._losses if each[0] < len(self._steps)]
        self._losses = self._losses[len(done) :]
        if not done:
            return
        read = torch.stack([loss.reshape(()).double() for *_, loss in done]).tolist()
        for (step, place, _), loss in zip(done, read, strict=True):
            own = self._steps[step]
            batches = list(own.batches)
            batches[place] = replace(batches[place], loss=loss)
            self._steps[step] = replace(own, batches=tuple(batches))

    def _count_streams(self, *noted: Streams | None) -> None:
        for streams in noted:
            for name, state in (streams or {}).items():
                if self._seen_streams.get(name) is not state:
                    self._seen_streams[name] = state
                    self._record_bytes += bytes_of(state)


def _scalars(group: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name not in ("params", "param_names")}
