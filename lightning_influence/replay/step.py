"""One step of training as a function of weights, optimizer state, running statistics and the examples' weights.

Its derivative is taken backwards: from cotangents after the step to those before it. The step has two halves. The
optimizer (clipping, momentum, ...) works entry by entry on vectors; the gradient of the loss is differentiated once
more, by weights and by the examples' weights.

Index legend: ``q`` queries, ``p`` entries of all parameters, ``n`` examples of a batch.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_influence.core.memory import is_out_of_memory
from lightning_influence.core.precision import wide
from lightning_influence.core.weights import parameters_of, places_of, write
from lightning_influence.objective.scale import NoLossError
from lightning_influence.objective.task import Task
from lightning_influence.replay.detached import DetachedValues
from lightning_influence.replay.differentiable_calls import DifferentiableCalls, statistics_of
from lightning_influence.replay.optimizers import clipped, rule_of, slots_of
from lightning_influence.replay.record import ReplayError, RunState, StepInput, TrainingRecord
from lightning_influence.replay.weighting import Weighting

# How far the step as differentiated may be from the one that was taken, as a share of its length; the rounding of the
# weights comes on top. Something that is not differentiated (a hook that scales gradients) is far more.
_CLOSE = 1e-2

CONSTANT = "this counts as constant, though it may move with the weights: "
"""How notes begin on what is not followed."""


@dataclass(eq=False)
class Cotangents:
    """Derivatives of ``q`` numbers by the state at some step.

    Attributes:
        parameters: ``[q, p]``.
        slots: By the optimizer's state of each name, ``[q, p]``.
        statistics: By running statistics, ``[q, ...]`` each.
    """

    parameters: Tensor
    slots: dict[str, Tensor] = field(default_factory=dict)
    statistics: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        """Return the number of queries."""
        return len(self.parameters)


@dataclass(frozen=True)
class _Stretch:
    """Neighbouring entries that the optimizer steps alike."""

    start: int
    stop: int
    group: int
    before: int | None  # steps that it has made with them; None if it leaves them alone


class StepDerivative:
    """Takes the derivative of steps of a run; the model is in training mode, and isolated by who calls.

    Args:
        module: The model. Its weights and buffers are written.
        task: Its loss.
        record: Of the run.
        weighting: How the examples are weighted.
        stand: Called with a step and the number of a batch in it, before that: puts random streams, modes and what else
            the task asks for where they were.
        forward_context: Wraps every forward pass (a Trainer's precision).

    Raises:
        ReplayError: If the steps can't be differentiated.
    """

    def __init__(
        self,
        module: nn.Module,
        task: Task,
        record: TrainingRecord,
        weighting: Weighting,
        *,
        stand: Callable[[StepInput, int], None],
        forward_context: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.module, self._task, self.recipe, self.weighting = module, task, record.recipe, weighting
        self._stand, self._context = stand, forward_context
        recipe, known = record.recipe, parameters_of(module)
        known = {name: parameter for name, parameter in known.items() if name in record.states[0].parameters}
        self.names = [name for group in recipe.members for name in group if name in known]
        self._groups = [number for number, group in enumerate(recipe.members) for name in group if name in known]
        self.parameters = [known[name] for name in self.names]
        self.sizes = [parameter.numel() for parameter in self.parameters]
        self.statistics = statistics_of(module)
        self._places = places_of(module)
        self.unfollowed = ""  # why detached values count as constants
        self._lost = False
        _check_buffers(record, self.statistics)

    @property
    def constants(self) -> list[str]:
        """What has counted as a constant in the steps so far, though it may move with the weights."""
        found = {
            f"what the step detaches from the graph, as it can't be followed ({self.unfollowed})": self.unfollowed,
            "numbers that the step reads (`.item()`, `float()`), where they come back into the loss": self._lost,
        }
        return [CONSTANT + what for what, met in found.items() if met]

    def load(self, state: RunState) -> None:
        """Write a state into the model."""
        write(self._places, state.parameters)
        write(self._places, state.buffers)

    def pull(
        self, step: StepInput, after: Cotangents, reached: Mapping[str, Tensor] | None = None
    ) -> tuple[Cotangents, list[Tensor]]:
        """Return the cotangents before a step, and for each batch the derivative by the weights of its examples.

        Args:
            step: The step.
            after: Cotangents after it.
            reached: Parameters after it, to compare with.

        Returns:
            Cotangents, and ``[q, n]`` for each batch.

        Raises:
            ReplayError: If something is not finite, or the step was not what is differentiated here.
        """
        detached = None if self.unfollowed else DetachedValues(self.module)
        try:
            found = self._pulled(step, after, reached, detached)
        except (ReplayError, RuntimeError) as error:
            if detached is None or not detached.met or is_out_of_memory(error):
                raise
            found = self._pulled(step, after, reached, None)
            self.unfollowed = str(error).partition("\n")[0]
        self._lost |= detached is not None and detached.lost
        return found

    def _pulled(
        self,
        step: StepInput,
        after: Cotangents,
        reached: Mapping[str, Tensor] | None,
        detached: DetachedValues | None,
    ) -> tuple[Cotangents, list[Tensor]]:
        number = step.state.step
        self.load(step.state)
        calls, like = DifferentiableCalls(self.statistics), self.parameters[0]
        weights = [
            torch.ones(len(batch.indices), dtype=like.dtype, device=like.device, requires_grad=True)
            for batch in step.record.batches
        ]
        found: list[Tensor | None] = [None] * len(self.parameters)
        for place, (batch, own) in enumerate(zip(step.batches, weights, strict=True)):
            self._stand(step, place)
            with self._context(), detached or nullcontext(), calls:
                if step.record.batches[place].loss is None:
                    with suppress(NoLossError):  # statistics have still been moved
                        self._task(self.module, batch)
                    continue
                loss, logits = self.weighting.loss(self._task, self.module, batch, own)
            parts = self.weighting.gradient(loss / self.recipe.accumulation, logits, own, self.parameters)
            found = [_added(old, new) for old, new in zip(found, parts, strict=True)]
        gradient = torch.cat(
            [
                torch.zeros_like(p).view(-1) if g is None else g.detach().reshape(-1)
                for p, g in zip(self.parameters, found, strict=True)
            ]
        )
        if not bool(gradient.isfinite().all()):
            raise ReplayError(f"the gradient of step {number} is not finite: nothing can be traced back through it.")
        before, slope = self._through_optimizer(step, after, gradient, [g is not None for g in found], reached)
        try:
            by_examples = self._through_gradient(found, slope, calls, weights, before, after, detached)
        except RuntimeError as error:
            if "not implemented" not in str(error):
                raise
            raise ReplayError(
                f"the model computes something that torch can't differentiate twice ({error}), which a replay takes; "
                "the influence at the end does not (`report.queries`)."
            ) from error
        self._check(number, slope, gradient.detach(), by_examples)
        return before, by_examples

    def _through_optimizer(
        self,
        step: StepInput,
        after: Cotangents,
        gradient: Tensor,
        used: Sequence[bool],
        reached: Mapping[str, Tensor] | None,
    ) -> tuple[Cotangents, Tensor]:
        """Return the cotangents before the optimizer, and that of the gradient ``[q, p]``."""
        recipe, state = self.recipe, step.state.optimizer
        gradient = gradient.requires_grad_(True)
        used_gradient = clipped(gradient, recipe.clip, recipe.clip_by) if recipe.clip else gradient
        p = torch.cat([parameter.detach().reshape(-1) for parameter in self.parameters])
        moved, inputs, outputs, starts, filed = p.clone(), list[Tensor](), list[Tensor](), list[Tensor](), []
        before = Cotangents(after.parameters.clone(), {name: part.clone() for name, part in after.slots.items()})
        for stretch in self._stretches(state, used):
            if stretch.before is None:
                continue
            own, group = slice(stretch.start, stretch.stop), step.record.groups[stretch.group]
            rule, names = rule_of(recipe.optimizer, group), slots_of(recipe.optimizer, group)
            weights = p[own].clone().requires_grad_(True)
            slots = {name: _slot(self.parameters, self.names, state, name, own).requires_grad_(True) for name in names}
            new, new_slots = rule(weights, used_gradient[own], slots, group, stretch.before)
            moved[own] = new.detach()
            for name in names:
                before.slots.setdefault(name, torch.zeros_like(after.parameters))
            inputs += [weights, *slots.values()]
            filed += [(before.parameters, own), *((before.slots[name], own) for name in slots)]
            outputs += [new, *new_slots.values()]
            starts += [after.parameters[:, own]]
            starts += [before.slots[name][:, own].clone() for name in new_slots]
        if reached is not None:
            end = torch.cat([reached[name].reshape(-1) for name in self.names])
            _check_end(step.state.step, p, moved, end)
        *parts, slope = _pulled(outputs, [*inputs, gradient], starts)
        for (place, own), part in zip(filed, parts, strict=True):
            place[:, own] = 0 if part is None else part
        return before, torch.zeros_like(after.parameters) if slope is None else slope

    def _through_gradient(
        self,
        found: Sequence[Tensor | None],
        slope: Tensor,
        calls: DifferentiableCalls,
        weights: Sequence[Tensor],
        before: Cotangents,
        after: Cotangents,
        detached: DetachedValues | None,
    ) -> list[Tensor]:
        """Add what goes through the gradient and the statistics; return the derivative by the examples' weights."""
        outputs, starts = list[Tensor](), list[Tensor]()
        for g, part, parameter in zip(found, slope.split(self.sizes, 1), self.parameters, strict=True):
            if g is not None and g.requires_grad:
                outputs.append(g)
                starts.append(part.view(-1, *parameter.shape))
        for name, now in calls.now.items():
            if name in after.statistics:
                outputs.append(now)
                starts.append(after.statistics[name])
        inputs = [*self.parameters, *calls.leaves.values()]
        if detached is not None and detached.met:
            detached.follow = True
            found_parts = _pulled(outputs, inputs, starts, retain_graph=True)
            # What an example's part of the loss is multiplied with is no part of what it is detached from.
            detached.follow = False
            parts = iter([*found_parts, *_pulled(outputs, weights, starts)])
        else:
            parts = iter(_pulled(outputs, [*inputs, *weights], starts))
        start = 0
        for size in self.sizes:
            part = next(parts)
            if part is not None:
                before.parameters[:, start : start + size] += part.reshape(len(after), size)
            start += size
        for name, leaf in calls.leaves.items():
            part = next(parts)
            before.statistics[name] = leaf.new_zeros((len(after), *leaf.shape)) if part is None else part
        return [
            own.new_zeros((len(after), len(own))) if part is None else part
            for own, part in zip(weights, parts, strict=True)
        ]

    def _stretches(self, state: Mapping[str, Mapping[str, Any]], used: Sequence[bool]) -> Iterator[_Stretch]:
        current: _Stretch | None = None
        start = 0
        for name, group, size, has in zip(self.names, self._groups, self.sizes, used, strict=True):
            before = _steps_made(state.get(name, {})) if has else None
            if current is not None and (current.group, current.before) == (group, before):
                current = _Stretch(current.start, start + size, group, before)
            else:
                if current is not None:
                    yield current
                current = _Stretch(start, start + size, group, before)
            start += size
        if current is not None:
            yield current

    def _check(self, number: int, slope: Tensor, gradient: Tensor, by_examples: Sequence[Tensor]) -> None:
        """Raise unless the examples' parts make up the whole gradient."""
        if self.weighting.penalty:
            return
        parts, along, g = (wide(each) for each in (torch.cat([part[0] for part in by_examples]), slope[0], gradient))
        # Where an optimizer divides by next to nothing, what it multiplies is rounding.
        share, rounding = (1e-3, 1e-5) if self.recipe.precision in PRECISE else (5e-2, 1e-2)
        allowed = share * (parts.abs().sum() + (along * g).abs().sum()) + rounding * along.norm() * g.norm()
        if bool((parts.sum() - along @ g).abs() > allowed):
            raise ReplayError(
                f"at step {number} the losses of the examples are not the whole loss that was trained on: a part of it "
                "belongs to no example alone. Pass a `task=` (`loss=` of `Influence`) that returns one loss per "
                "example."
            )


PRECISE = ("32-true", "64-true", "32", "64")
"""As trainers name them."""


def _check_end(number: int, p: Tensor, moved: Tensor, end: Tensor) -> None:
    """Raise unless a step that was differentiated has ended where it was taken to."""
    rounding = 8 * torch.finfo(p.dtype).eps * float(p.norm())
    if float((moved - end).norm()) > _CLOSE * float((end - p).norm()) + rounding:
        raise ReplayError(
            f"step {number} ended elsewhere than the step that would be differentiated: something moves weights or "
            "gradients that the optimizer's settings, gradient clipping and accumulation do not tell (a "
            "`task=` that comes to another loss than the one trained on, a hook, an overridden `optimizer_step` or "
            "`on_before_optimizer_step`, other random numbers, a penalty beside a loss that is written by hand)."
        )


def _check_buffers(record: TrainingRecord, statistics: Mapping[str, Tensor]) -> None:
    first, last = record.states[0].buffers, record.states[len(record.steps)].buffers
    moved = [
        name
        for name, value in first.items()
        if value.is_floating_point() and name not in statistics and not torch.equal(value, last[name])
    ]
    if moved:
        raise ReplayError(
            f"the buffers {', '.join(moved[:4])} have changed in training, and what weights and examples have done to "
            "them is not known: only the running statistics of batch and instance norms are differentiated. What no "
            "output depends on (a mean that is logged) can be a plain attribute of the model."
        )


def _slot(
    parameters: Sequence[Tensor], names: Sequence[str], state: Mapping[str, Mapping[str, Any]], name: str, own: slice
) -> Tensor:
    """Return a part of the optimizer's state, zeros where there is none yet."""
    parts, start = [], 0
    for parameter, of in zip(parameters, names, strict=True):
        if own.start <= start < own.stop:
            kept = state.get(of, {}).get(name)
            parts.append((torch.zeros_like(parameter) if kept is None else kept).detach().reshape(-1))
        start += parameter.numel()
    return torch.cat(parts)


def _added(old: Tensor | None, new: Tensor | None) -> Tensor | None:
    return new if old is None else old if new is None else old + new


def _steps_made(state: Mapping[str, Any]) -> int:
    if "step" in state:
        return int(state["step"])
    return 0 if state.get("momentum_buffer") is None else 1


def _pulled(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], starts: Sequence[Tensor], *, retain_graph: bool = False
) -> list[Tensor | None]:
    """Return the products of cotangents ``[q, ...]`` with the derivative of outputs by inputs, ``[q, ...]`` each."""
    if not outputs:
        return [None] * len(inputs)
    q = len(starts[0])
    if q > 1:
        # Measured: 32 at a time cost 25 to 50 plain steps, one by one 60 to 80; forward over reverse is no faster.
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("error", message=".*batching rule.*")
                return list(
                    torch.autograd.grad(
                        outputs, inputs, starts, retain_graph=True, allow_unused=True, is_grads_batched=True
                    )
                )
        except (RuntimeError, UserWarning) as error:
            if is_out_of_memory(error):
                raise
    rows = [
        torch.autograd.grad(
            outputs,
            inputs,
            [start[k] for start in starts],
            retain_graph=retain_graph or k + 1 < q,
            allow_unused=True,
        )
        for k in range(q)
    ]
    return [
        None if column[0] is None else torch.stack([part for part in column if part is not None])
        for column in zip(*rows, strict=True)
    ]
