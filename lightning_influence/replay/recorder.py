"""Noting a training run while it runs, whoever drives it."""

from __future__ import annotations

import math
import zlib
from array import array
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_influence.core.containers import leaves
from lightning_influence.core.torch_private import eager_name
from lightning_influence.core.weights import parameters_of
from lightning_influence.data.contents import copied
from lightning_influence.replay.record import (
    BatchRecord,
    Recipe,
    ReplayError,
    RunState,
    StepRecord,
    Streams,
    TrainingRecord,
)
from lightning_influence.replay.streams import StreamReader

OPTIMIZERS = ("SGD", "Adam", "AdamW", "RMSprop")
"""Whose steps can be replayed."""

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
        steps: Number of steps to come, if that is known.
        keep_batches: Whether to keep the batches, as they can't be fetched again.
        max_bytes: Of memory that records may take; states are kept further apart, then recording ends.
        states: Where states are kept, by step.

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
        steps: int | None = None,
        keep_batches: bool = False,
        max_bytes: int = 2**31,
        states: MutableMapping[int, RunState] | None = None,
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
        self.interval = 1 if steps is None else max(1, math.ceil(math.sqrt(steps)))
        self._module, self._optimizer = module, optimizer
        self._names = {id(p): name for name, p in parameters_of(module).items()}
        self._trained = {name: p for name, p in parameters_of(module).items() if p.requires_grad}
        self._states: MutableMapping[int, RunState] = {} if states is None else states
        self._state_bytes = 0
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
        groups = [_scalars(group) for group in self._optimizer.param_groups]
        if self._is_another_recipe(groups):
            return
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
            self._keep_state()
            self._read_losses()
        if self.why:
            raise ReplayError(f"this run was not recorded as a whole: {self.why}.")
        return TrainingRecord(self.recipe, self._steps, self._states)

    def stop(self, why: str) -> None:
        """Record nothing more, and let go of what there is."""
        if self.why:
            return
        self.why = why
        self._steps, self._batches, self._losses = [], [], []
        self._pending = self._current = self._loss = None
        self._states.clear()
        self._state_bytes = self._record_bytes = 0
        self.fetching = StreamReader()

    @property
    def bytes(self) -> int:
        """Memory that the records take, states included."""
        return self._record_bytes + self._state_bytes

    # ---------------------------------------------------------------- details

    def _begin_step(self) -> None:
        modes = [module.training for module in self._module.modules()]
        if modes != self._modes:
            self._modes = modes
            named = self._module.named_modules()
            self._training = frozenset(eager_name(name) for name, module in named if module.training)
        if not len(self._steps) % self.interval:
            self._keep_state()

    def _end_batch(self) -> None:
        assert self._current is not None
        if self._loss is not None:
            self._losses.append((len(self._steps), len(self._batches), self._loss))
        self._batches.append(self._current)
        self._current = self._loss = None
        # Not of the step that is still growing.
        if len(self._losses) >= _READ_EVERY + self.recipe.accumulation:
            self._read_losses()
        if self.bytes > self.max_bytes:
            self.thin()
        if self.bytes > self.max_bytes:
            self.stop(
                f"after {len(self._steps)} steps its record took {self.bytes / 2**20:,.0f} MB, more than the "
                f"{self.max_bytes / 2**20:,.0f} MB that it may"
            )

    def _is_another_recipe(self, groups: list[dict[str, Any]]) -> bool:
        """Stop if the step is not one of those that the recipe is about."""
        step = len(self._steps)
        members = [[self._names.get(id(p)) for p in group["params"]] for group in self._optimizer.param_groups]
        if members != self.recipe.members:
            self.stop(f"the optimizer has had other parameters since step {step}")
        elif self._trained.keys() != {n for n, p in parameters_of(self._module).items() if p.requires_grad}:
            self.stop(f"parameters were frozen or thawed before step {step}")
        elif any(isinstance(value, Tensor) for group in groups for value in group.values()):
            self.stop("the optimizer's settings are tensors")
        return bool(self.why)

    def _keep_state(self) -> None:
        step = len(self._steps)
        if step in self._states:
            return
        with torch.no_grad():
            state = RunState(
                step,
                {name: _copy(p) for name, p in self._trained.items()},
                {eager_name(name): _copy(buffer) for name, buffer in self._module.named_buffers()},
                {
                    self._names[id(p)]: {key: _copy(value) for key, value in own.items()}
                    for p, own in self._optimizer.state.items()
                },
            )
        self._states[step] = state
        self._state_bytes += bytes_of_state(state)
        if len(self._states) > 2 * self.interval + 2:
            self.thin()

    def thin(self) -> None:
        """Keep every second state."""
        steps = sorted(self._states)
        if len(steps) < 3:
            return
        self.interval *= 2
        for step in steps:
            if step % self.interval and step != steps[-1]:
                self._state_bytes -= bytes_of_state(self._states.pop(step))

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


def type_of(optimizer: Any) -> str | None:
    """Return the name of the class in ``torch.optim`` whose steps an optimizer takes, None for all but four."""
    kind = type(optimizer)
    return kind.__name__ if kind in [getattr(torch.optim, name) for name in OPTIMIZERS] else None


def check_optimizer(module: nn.Module, optimizer: Any) -> list[list[str]]:
    """Return the names of the parameters of an optimizer's groups.

    Raises:
        ReplayError: If its steps can't be replayed.
    """
    if type_of(optimizer) is None:
        kind = type(optimizer)
        raise ReplayError(f"the optimizer is {kind.__module__}.{kind.__qualname__}; expected {', '.join(OPTIMIZERS)}.")
    names = {id(p): name for name, p in parameters_of(module).items()}
    for number, group in enumerate(optimizer.param_groups):
        for name in ("amsgrad", "maximize", "capturable", "differentiable", "centered"):
            if group.get(name):
                raise ReplayError(
                    f"{type(optimizer).__name__} has {name}=True in group {number}; replay knows its steps without."
                )
        if isinstance(group["lr"], Tensor):
            raise ReplayError("the learning rate is a tensor; expected a number.")
        if any(id(p) not in names for p in group["params"]):
            raise ReplayError(
                f"{type(optimizer).__name__} holds parameters that {type(module).__name__} does not list "
                "(`named_parameters`): they have no name to be noted under."
            )
    if optimizer.state:
        raise ReplayError("the optimizer has taken steps before: recording has to begin before the first.")
    return [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]


def environment_of(module: nn.Module) -> dict[str, str]:
    """Return what the last bit of a step depends on beside the step itself."""
    place = next(module.parameters(), torch.empty(0)).device
    name = torch.cuda.get_device_name(place) if place.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    return {
        "torch": str(torch.__version__),
        "device": f"{place.type} ({name})",
        "threads": str(torch.get_num_threads()),
    }


def checksum(batch: Any) -> int:
    """Return what tells a batch from others, in a tenth of the time that a CRC takes; of objects, their kind alone."""
    result = 0
    for path, leaf in leaves(batch):
        found = leaf if isinstance(leaf, Tensor) else torch.from_numpy(leaf) if _is_numbers(leaf) else None
        if found is None or found.layout != torch.strided or found.is_nested or found.is_quantized:
            plain = isinstance(leaf, (str, bytes, int, float, complex, bool, type(None)))
            told = repr(leaf) if plain else type(leaf).__name__
            own = zlib.crc32(told.encode(errors="surrogatepass"))
        else:
            own = _sum_of(found.detach())
        result = (result * 1_000_003 + own + len(path)) % 2**32
    return result


def _is_numbers(leaf: Any) -> bool:
    return isinstance(leaf, np.ndarray) and leaf.dtype.kind in "biuf" and leaf.dtype.isnative and leaf.flags.writeable


_WEIGHTS: dict[tuple[torch.device, int], Tensor] = {}


def _sum_of(tensor: Tensor) -> int:
    """Return a weighted sum of a tensor's bits, as integers: their order counts."""
    tensor = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor.resolve_neg()
    line = tensor.contiguous().reshape(-1).view(torch.uint8)
    whole = line.numel() // 4
    result = zlib.crc32(bytes(line[4 * whole :].tolist())) if line.numel() % 4 else 0
    if whole:
        words = line[: 4 * whole]
        words = (words.clone() if words.storage_offset() % 4 else words).view(torch.int32)
        weights = _weights(line.device, whole)
        on_host = line.device.type == "cpu"
        result += int(torch.dot(words, weights)) if on_host else int((words * weights).sum())
    return result % 2**32


def _weights(device: torch.device, size: int) -> Tensor:
    """Return odd numbers, of which the largest vector asked for so far is kept."""
    known = _WEIGHTS.get((device, 0))
    if known is None or known.numel() < size:
        known = _WEIGHTS[device, 0] = torch.arange(1, 2 * size, 2, dtype=torch.int32, device=device)
    return known[:size]


def bytes_of(node: Any) -> int:
    """Return the memory that tensors and arrays in nested containers take."""
    sizes = (leaf.nbytes for _, leaf in leaves(node) if isinstance(leaf, (Tensor, np.ndarray)))
    return int(sum(sizes))


def bytes_of_state(state: RunState) -> int:
    """Return the memory that a state takes."""
    return bytes_of([dict(state.parameters), dict(state.buffers), dict(state.optimizer)])


def _copy(value: Any) -> Any:
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value


def _scalars(group: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name not in ("params", "param_names")}
