"""Recorded runs for tests: a plain loop in float64, and the steps of it as the backward takes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lightning_influence.replay.backward import Segment, example_derivatives
from lightning_influence.replay.differentiable_calls import DifferentiableCalls
from lightning_influence.replay.record import BatchRecord, Recipe, RunState, StepInput, StepRecord, TrainingRecord
from lightning_influence.replay.step import Cotangents, StepDerivative
from lightning_influence.replay.weighting import Weighting

Loss = Callable[[nn.Module, Any], Tensor]
Steps: TypeAlias = "list[StepInput]"


def batches_of(steps: int, size: int, among: int, accumulation: int = 1) -> list[list[list[int]]]:
    """Return batches of random examples, with replacement."""
    draw = torch.Generator().manual_seed(3)
    return [
        [torch.randint(0, among, (size,), generator=draw).tolist() for _ in range(accumulation)] for _ in range(steps)
    ]


@dataclass
class PlainRun:
    """Trains a model by a plain loop; examples count with their weights.

    Attributes:
        make: Makes the model.
        optimizer: Makes its optimizer.
        losses: ``(module, batch) -> [n]``, the examples' own losses.
        data: Tensors ``[N, ...]``.
        batches: Of every step, the indices of one or more batches.
        query: ``module -> number``, in eval mode.
    """

    make: Callable[[], nn.Module]
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    losses: Loss
    data: Sequence[Tensor]
    batches: Sequence[Sequence[Sequence[int]]]
    query: Callable[[nn.Module], Tensor]
    clip: float | None = None
    clip_by: str = "norm"
    schedule: Callable[[int], float] = lambda step: 1.0
    penalty: Callable[[nn.Module], Tensor] | None = None
    states: dict[int, RunState] = field(default_factory=dict)

    @property
    def size(self) -> int:
        return len(self.data[0])

    def train(self, weights: Tensor | None = None, inputs: Steps | None = None) -> nn.Module:
        """Train; note the steps, if a list for them is given."""
        torch.manual_seed(0)
        module = self.make().double().train()
        optimizer = self.optimizer(module)
        rates = [group["lr"] for group in optimizer.param_groups]
        names = {id(p): name for name, p in module.named_parameters()}
        weights = torch.ones(self.size, dtype=torch.float64) if weights is None else weights
        for step, batches in enumerate(self.batches):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * self.schedule(step)
            groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
            state = _state(step, module, optimizer, names)
            optimizer.zero_grad()
            streams, moved, noted = [], [], []
            for number, indices in enumerate(batches):
                streams.append({"torch": torch.get_rng_state()})
                moved.append([part[list(indices)] for part in self.data])
                values = self.losses(module, moved[-1])
                loss = (values * weights[list(indices)]).mean() / len(batches)
                if self.penalty is not None:
                    loss = loss + self.penalty(module)
                loss.backward()
                noted.append(BatchRecord(indices, number, 0, None, streams[-1], 0, float(loss.detach())))
            if self.clip is not None and self.clip_by == "norm":
                nn.utils.clip_grad_norm_(module.parameters(), self.clip)
            elif self.clip is not None:
                nn.utils.clip_grad_value_(module.parameters(), self.clip)
            optimizer.step()
            if inputs is not None:
                inputs.append(StepInput(state, StepRecord(noted, groups, frozenset()), moved, streams))
        if inputs is not None:
            self.states = {0: inputs[0].state, len(inputs): _state(len(inputs), module, optimizer, names)}
            self.states |= {step: inputs[step].state for step in range(0, len(inputs), 5)}
        return module

    def recipe(self) -> Recipe:
        """Return what is the same at every step."""
        module = self.make()
        optimizer = self.optimizer(module)
        names = {id(p): name for name, p in module.named_parameters()}
        members = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
        accumulation = len(self.batches[0])
        return Recipe(type(optimizer).__name__, members, self.clip, self.clip_by, "64-true", accumulation, self.size)

    def backward_of(
        self, module: nn.Module, inputs: Steps, task: Loss | None = None, way: Weighting | None = None
    ) -> tuple[StepDerivative, Segment, TrainingRecord]:
        """Return what it takes to go back through the run."""
        record = TrainingRecord(self.recipe(), [step.record for step in inputs], self.states)
        derivative = StepDerivative(
            module,
            task or self.losses,
            record,
            way or Weighting({}, single=True),
            stand=lambda step, batch: torch.set_rng_state(step.streams[batch]["torch"]),
        )

        def segment(start: int, stop: int) -> Iterator[StepInput]:
            yield from inputs[start:stop]

        return derivative, segment, record

    def replayed(
        self,
        task: Loss | None = None,
        way: Weighting | None = None,
        *,
        optimizer: str | None = None,
        **settings: Any,
    ) -> Tensor:
        """Return the derivative of the query by every example's weight, ``[1, N]``."""
        inputs: Steps = []
        module = self.train(inputs=inputs)
        derivative, segment, record = self.backward_of(module, inputs, task, way)
        if optimizer is not None:
            record = replace(record, recipe=replace(record.recipe, optimizer=optimizer))
            derivative.recipe = record.recipe
        end = self.end(module, derivative)
        module.train()
        return example_derivatives(derivative, record, segment, end, **settings)[1]

    def end(self, module: nn.Module, derivative: StepDerivative) -> Cotangents:
        """Return the derivative of the query by the final state."""
        module.eval()
        with DifferentiableCalls(derivative.statistics) as calls:
            value = self.query(module)
        wanted = [*derivative.parameters, *calls.leaves.values()]
        found = torch.autograd.grad(value, wanted, allow_unused=True)
        parts = [torch.zeros_like(p) if g is None else g for p, g in zip(wanted, found, strict=True)]
        k = len(derivative.parameters)
        flat = torch.cat([part.reshape(-1) for part in parts[:k]]).unsqueeze(0)
        statistics = {name: part.unsqueeze(0) for name, part in zip(calls.leaves, parts[k:], strict=True)}
        return Cotangents(flat, {}, statistics)

    def value(self, weights: Tensor) -> float:
        """Return the query after training with weights."""
        module = self.train(weights).eval()
        with torch.no_grad():
            return float(self.query(module))

    def differences(self, examples: Sequence[int], h: float = 1e-4) -> Tensor:
        """Return the same derivative by central differences of fourth order, ``[len(examples)]``."""
        found = []
        for example in examples:
            values = {}
            for k in (-2, -1, 1, 2):
                weights = torch.ones(self.size, dtype=torch.float64)
                weights[example] += k * h
                values[k] = self.value(weights)
            found.append((8 * (values[1] - values[-1]) - (values[2] - values[-2])) / (12 * h))
        return torch.tensor(found, dtype=torch.float64)


def _state(step: int, module: nn.Module, optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> RunState:
    def kept(value: Any) -> Any:
        return value.detach().clone() if isinstance(value, Tensor) else value

    return RunState(
        step,
        {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad},
        {name: b.detach().clone() for name, b in module.named_buffers()},
        {names[id(p)]: {k: kept(v) for k, v in of.items()} for p, of in optimizer.state.items()},
    )
