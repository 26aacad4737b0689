"""A recorded run once more: all of it, to see that it ends in the same bits, or some steps of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from lightning_influence.core.isolation import unchanged
from lightning_influence.core.random_streams import isolated_rng
from lightning_influence.core.reachable import Walk
from lightning_influence.core.snapshot import Snapshot
from lightning_influence.core.torch_private import eager_name
from lightning_influence.core.weights import parameters_of, places_of, swapped
from lightning_influence.data.contents import copied
from lightning_influence.objective.scale import NoLossError
from lightning_influence.objective.task import Task, TrainingStepTask
from lightning_influence.replay import streams
from lightning_influence.replay.as_trained import as_trained, moved
from lightning_influence.replay.checksum import checksum
from lightning_influence.replay.recipes import environment_of
from lightning_influence.replay.record import (
    BatchRecord,
    Recipe,
    ReplayError,
    RunState,
    StepInput,
    StepRecord,
    TrainingRecord,
)

_DTYPES = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
_DEFAULTS = {"64-true": torch.float64, "bf16-true": torch.bfloat16, "16-true": torch.float16}


class Rerun:
    """Runs the steps of a record again: the same batches, random streams, modes, learning rates.

    The module serves as the place of the weights; it, the random streams and the data set are afterwards as they were.

    Args:
        record: The run.
        module: The model that was trained.
        task: Its loss; by default its ``training_step``, as the trainer called it.
        source: Where batches come from: an object with ``dataset`` and ``collate_fn`` (an ``ExampleSource``, a
            ``DataLoader``), or a function from a ``BatchRecord`` to the batch.
        to_device: Moves a batch to the module's device; by default as the trainer does, hooks of the module included.

    Raises:
        ReplayError: If the module is another one.
    """

    def __init__(
        self,
        record: TrainingRecord,
        module: nn.Module,
        task: Task | None = None,
        source: Any = None,
        *,
        to_device: Callable[[Any], Any] | None = None,
    ) -> None:
        self.record, self.module = record, module
        self.task = TrainingStepTask() if task is None else task
        self.to_device = to_device or partial(moved, module, record.recipe.precision)
        self._fetch: Callable[[BatchRecord], Any] = source if callable(source) else partial(fetched, source)
        self._data = () if callable(source) else (source.dataset, source.collate_fn)
        self._places, self._parameters = places_of(module), parameters_of(module)
        _check(record, self._places)

    def verify(self, advance: Callable[[int], None] = lambda steps: None) -> None:
        """Run the whole training again, in memory of its own; it must end in the same bits.

        Args:
            advance: Called after each step.

        Raises:
            ReplayError: If it does not; the message names the first step that differs, and what differs there.
        """
        steps = len(self.record.steps)
        for _ in self._run(0, steps, verify=advance):
            pass

    def segment(self, start: int, stop: int) -> list[StepInput]:
        """Return what some steps take, recomputed from the last state that was kept before them.

        Args:
            start: The first step.
            stop: The one after the last.

        Raises:
            ReplayError: If the steps do not come out as they were recorded.
        """
        return list(self._run(start, stop))

    @contextmanager
    def standing(self) -> Iterator[None]:
        """Let the module serve for steps of the run, one at a time, see ``stand``; afterwards it is as before."""
        with self._guarded(self.record.states[0]):
            yield

    def stand(self, step: StepInput, place: int) -> None:
        """Put modes, random streams and what the task asks for where they were before a batch of a step."""
        batch = step.record.batches[place]
        for name, module in self.module.named_modules():
            module.training = eager_name(name) in step.record.training
        if isinstance(self.task, TrainingStepTask):
            self.task.batch_idx = batch.number
        self._at = (batch.epoch, step.state.step)
        streams.write(step.streams[place])

    # ------------------------------------------------------------------ a run

    def _run(self, start: int, stop: int, verify: Callable[[int], None] | None = None) -> Iterator[StepInput]:
        """Run steps; yield what those from ``start`` on take, nothing if the run is only verified."""
        record = self.record
        first = max(step for step in record.states if step <= start)
        state = record.states[first]
        with self._guarded(state) as own:
            optimizer = optimizer_of(record.recipe, self._parameters)
            fused = any(group.get("fused") for group in record.steps[0].groups)
            put(optimizer, state, self._parameters, fused=fused)
            last = first  # that is known to be right
            for number in range(first, stop):
                step = record.steps[number]
                before = None if verify or number < start else self._state(number, own, optimizer)
                if number == stop - 1 and before is not None:
                    # Its end is of no interest.
                    met = [self.batch(number, each) for each in step.batches]
                else:
                    met = self._step(number, step, own, optimizer, last)
                if before is not None:
                    yield StepInput(before, step, [each for each, _ in met], [each for _, each in met])
                if verify and number + 1 in record.states:
                    self._compare(record.states[number + 1], own, optimizer, last)
                    last = number + 1
                if verify:
                    verify(1)

    @contextmanager
    def _guarded(self, state: RunState) -> Iterator[dict[str, nn.Parameter]]:
        """Let the module stand where the run stood; afterwards it, and all that it reaches, is as before."""
        module, record = self.module, self.record
        own = {name: self._parameters[name] for name in state.parameters}
        with ExitStack() as guards:
            guards.enter_context(isolated_rng())
            guards.enter_context(unchanged(*(each for each in self._data if each is not None)))
            guards.enter_context(_put_back(module, self.task))
            guards.enter_context(torch.inference_mode(False))
            guards.enter_context(torch.enable_grad())
            guards.enter_context(swapped(self._places, {**state.parameters, **state.buffers}))
            for name, parameter in self._parameters.items():
                parameter.requires_grad_(name in own)
            guards.enter_context(as_trained(module, lambda: self._at))
            self._at = (0, 0)
            with told_environment(record.recipe, module):
                yield own

    def _step(
        self,
        number: int,
        step: StepRecord,
        own: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        last: int,
    ) -> list[tuple[Any, Mapping[str, Any]]]:
        """Take a step; return its batches and the streams before each."""
        recipe = self.record.recipe
        met: list[tuple[Any, Mapping[str, Any]]] = []
        for name, module in self.module.named_modules():
            module.training = eager_name(name) in step.training
        for parameter in own.values():
            parameter.grad = None
        for place, batch in enumerate(step.batches):
            given, before = self.batch(number, batch)
            kept = copied(given)  # the step may write to it
            met.append((kept, before))
            if isinstance(self.task, TrainingStepTask):
                self.task.batch_idx = batch.number
            self._at = (batch.epoch, number)
            loss: Tensor | None = None
            with forward_context(recipe, self.module):
                if batch.loss is not None:
                    loss = self.task(self.module, given) / recipe.accumulation
                else:
                    self._lossless(given)
            if loss is not None:
                if not _same_number(now := float(loss.detach()), batch.loss):
                    raise ReplayError(_another_loss(number, place, step, now, last))
                loss.backward()
        clip(recipe, optimizer)
        for group, scalars in zip(optimizer.param_groups, step.groups, strict=True):
            group.update(scalars)
        optimizer.step()
        return met

    def _lossless(self, batch: Any) -> None:
        with suppress(NoLossError):
            self.task(self.module, batch)

    def batch(self, number: int, batch: BatchRecord) -> tuple[Any, Mapping[str, Any]]:
        """Return a batch of a step on the device, and the streams as the step finds them; call within ``standing``."""
        if batch.before_fetch is not None:
            streams.write(batch.before_fetch)
        found = self._fetch(batch) if batch.kept is None else copied(batch.kept)
        if checksum(found) != batch.checksum:
            raise ReplayError(
                f"step {number} was taken on another batch: the examples {[*map(int, batch.indices[:8])]} of batch "
                f"{batch.number} of epoch {batch.epoch} are not what they were in training. Their data have changed, "
                "or are drawn from a stream that was not noted (workers, the clock, a generator of the data set's "
                "own): `keep_batches=True` keeps the batches themselves."
            )
        streams.write(batch.before_step)
        given = self.to_device(found)
        return given, streams.StreamReader()()

    def _state(self, step: int, own: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> RunState:
        buffers = {name: _clone(self._places[name]) for name in self.record.states[0].buffers}
        moments = {
            name: {key: _clone(value) for key, value in optimizer.state[parameter].items()}
            for name, parameter in own.items()
            if optimizer.state.get(parameter)
        }
        return RunState(step, {name: _clone(parameter) for name, parameter in own.items()}, buffers, moments)

    def _compare(
        self, expected: RunState, own: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, last: int
    ) -> None:
        found = self._state(expected.step, own, optimizer)
        for what, then, now in (
            ("the weights", expected.parameters, found.parameters),
            ("the buffers", expected.buffers, found.buffers),
        ):
            names = [name for name, value in then.items() if not _same(value, now[name])]
            if names:
                raise ReplayError(_another_end(expected.step, f"{what} {', '.join(names[:4])}", last))
        for name, state in expected.optimizer.items():
            other = found.optimizer.get(name, {})
            if any(not _same(value, other.get(key)) for key, value in state.items()):
                raise ReplayError(_another_end(expected.step, f"the optimizer's state of {name}", last))


# -------------------------------------------------------------------------------------------------------------- parts


def fetched(source: Any, batch: BatchRecord) -> Any:
    """Return a batch, fetched as a ``DataLoader`` does."""
    drawn = [int(index) for index in (batch.indices if batch.drawn is None else batch.drawn)]
    together = getattr(source.dataset, "__getitems__", None)
    examples = together(drawn) if together else [source.dataset[index] for index in drawn]
    return (source.collate_fn or default_collate)(examples)


def optimizer_of(recipe: Recipe, parameters: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
    """Return the optimizer of a run, made anew."""
    groups = [{"params": [parameters[name] for name in names]} for names in recipe.members]
    made: torch.optim.Optimizer = getattr(torch.optim, recipe.optimizer)(groups, lr=0.0)
    return made


def put(
    optimizer: torch.optim.Optimizer, state: RunState, parameters: Mapping[str, nn.Parameter], *, fused: bool = False
) -> None:
    """Let an optimizer stand where it stood."""
    for name, own in state.optimizer.items():
        place, put_there = parameters[name].device, {}
        for key, value in own.items():
            # Counts of steps are on the host, but for those of fused optimizers.
            moves = isinstance(value, Tensor) and (value.ndim or fused)
            put_there[key] = value.detach().to(place, copy=True) if moves else _clone(value)
        optimizer.state[parameters[name]] = put_there


def clip(recipe: Recipe, optimizer: torch.optim.Optimizer) -> None:
    """Clip gradients as the trainer does."""
    if not recipe.clip:
        return
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if recipe.clip_by == "value":
        nn.utils.clip_grad_value_(parameters, clip_value=recipe.clip)
    else:
        nn.utils.clip_grad_norm_(parameters, recipe.clip)


def forward_context(recipe: Recipe, module: nn.Module) -> AbstractContextManager[Any]:
    """Return what the trainer puts around a forward pass, in the precision of a run."""
    if recipe.precision in _DTYPES:
        device = next(module.parameters(), torch.empty(0)).device.type
        return torch.autocast(device, dtype=_DTYPES[recipe.precision])
    return _default_dtype(_DEFAULTS[recipe.precision]) if recipe.precision in _DEFAULTS else nullcontext()


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def _put_back(module: nn.Module, task: Task) -> Iterator[None]:
    """Put back all that a step may change."""
    reached = list(Walk([("", module), ("task", task)]))
    modes = [(each.value, each.value.training) for each in reached if isinstance(each.value, nn.Module)]
    flags = [(p.value, p.value.requires_grad, p.value.grad) for p in reached if isinstance(p.value, nn.Parameter)]
    for parameter, *_ in flags:
        parameter.grad = None
    snapshot = Snapshot(reached)
    try:
        yield
    finally:
        for each, training in modes:
            each.training = training
        for parameter, flag, _ in flags:
            parameter.grad = None
            parameter.requires_grad_(flag)
        try:
            snapshot.restore()
        finally:
            for parameter, _, gradient in flags:
                parameter.grad = gradient


@contextmanager
def told_environment(recipe: Recipe, module: nn.Module) -> Iterator[None]:
    """Tell, with a run that comes out otherwise, what is not as it was."""
    try:
        yield
    except ReplayError as error:
        now = environment_of(module)
        other = [f"{key} {then}, now {now[key]}" for key, then in recipe.environment.items() if now.get(key) != then]
        if not other:
            raise
        raise ReplayError(f"{error} Beside that, the run was made with {'; '.join(other)}.") from error


def _check(record: TrainingRecord, places: Mapping[str, Tensor]) -> None:
    state = record.states[0]
    for name, value in {**state.parameters, **state.buffers}.items():
        if name not in places:
            raise ReplayError(f"the record holds {name!r}, which the module has not; pass the model that was trained.")
        if places[name].shape != value.shape or places[name].dtype != value.dtype:
            raise ReplayError(
                f"{name!r} is {value.dtype} of shape {list(value.shape)} in the record and {places[name].dtype} of "
                f"shape {list(places[name].shape)} in the module; pass the model that was trained."
            )


def _another_loss(number: int, place: int, step: StepRecord, loss: float, last: int) -> str:
    batch = step.batches[place]
    return (
        f"the run does not come out the same a second time: at step {number} (batch {batch.number} of epoch "
        f"{batch.epoch}) the loss was {batch.loss!r}, and is {loss!r} now, on the same batch. Up to step {last} all "
        f"was the same. {_HINT}"
    )


def _another_end(step: int, what: str, last: int) -> str:
    return (
        f"the run does not come out the same a second time: after step {step - 1} {what} differ, while all losses up "
        f"to there are the same; up to step {last} all was. {_HINT}"
    )


_HINT = (
    "What changes weights, gradients, modes or attributes of the model outside `training_step` and the optimizer "
    "(hooks, other callbacks, weights that were loaded or averaged) is not recorded, nor is state that is no parameter "
    "and no buffer, or an operation that is not deterministic (`Trainer(deterministic=True)`)."
)


def _clone(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _same(one: Any, other: Any) -> bool:
    """Tell whether two tensors have the same bits, or two other values are equal."""
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return bool(one == other) and type(one) is type(other)
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    here, there = (each.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for each in (one, other))
    return torch.equal(here, there)


def _same_number(one: float, other: float | None) -> bool:
    return one == other or (one != one and other is not None and other != other)
