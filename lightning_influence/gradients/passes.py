"""Passes over the data: every example's gradients, in a fixed order, whatever the training loader does.

``ExampleGradients`` runs the task on the examples of a source under capture. Results do not depend on batch size,
number of workers or processes: labels are sampled from streams that belong to the example.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from lightning_influence.core import distributed
from lightning_influence.core.containers import _moved
from lightning_influence.core.isolation import rewind, seed_everything, untouched
from lightning_influence.core.precision import working
from lightning_influence.data.source import ExampleSource
from lightning_influence.gradients.answering import answered
from lightning_influence.gradients.calibration import measured_scale
from lightning_influence.gradients.capture import Capture, LayerIO
from lightning_influence.gradients.coverage import Coverage
from lightning_influence.gradients.discover import trace_model
from lightning_influence.gradients.noise import ExampleNoise
from lightning_influence.layers.blocks import LayerError, NewPathError
from lightning_influence.objective.losses import known_losses
from lightning_influence.objective.scale import LossScale, NoLossError
from lightning_influence.objective.task import Task, TaskError, run_tapped
from lightning_influence.objective.terms import BatchLoss, understand

Labels = Literal["true", "sampled", "exact"]
NO_EXACT_LABELS = (
    "the expectation over labels has no closed form for this loss (it makes several decisions per example); use "
    '`fisher="sampled"`.'
)
_COPIES = 2


class Progress(Protocol):
    """Shows how far a long pass is: called with a title and the number of examples."""

    def __call__(self, title: str, examples: int) -> AbstractContextManager[Callable[[int], None]]:
        """Return a context whose value is called after each batch, with its number of examples."""
        ...


class Quantity(Protocol):
    """What is differentiated of every example in place of its loss, see ``ExampleGradients.measuring``."""

    def altered(self, batch: Any, run: Callable[[Any], BatchLoss]) -> Any:
        """Return the batch to evaluate; ``run`` evaluates the task on a batch, and nothing of it is captured.

        Args:
            batch: On the module's device; not to be changed in place.
            run: As ``ExampleGradients.forward``, for batches with as many examples.
        """
        ...

    def outputs(self, loss: BatchLoss) -> tuple[list[Tensor], list[Tensor]]:
        """Return tensors and gradients to run backward from, for the sum over the examples."""
        ...


@dataclass(frozen=True, eq=False)
class BatchGradients:
    """Per-example gradients of one batch, as activations and output gradients.

    Attributes:
        indices: Dataset indices of the examples, ``n`` of them.
        loss: Loss and tapped calls of the batch.
        finite: ``[n]`` bool: loss, activations and output gradients are all finite. The layers of the others hold
            zeros.
        capture: The capture, valid until the next batch.
    """

    indices: list[int]
    loss: BatchLoss
    finite: Tensor
    capture: Capture

    @property
    def counted(self) -> int:
        """Number of examples with finite gradients."""
        return int(self.finite.sum())

    def layers(self) -> Iterator[LayerIO]:
        """Yield each layer's activations and output gradients, laid out one at a time."""
        return self.capture.layers(self.loss.n, self._kept)

    def drained(self) -> Iterator[LayerIO]:
        """Yield the same, once: each layer's memory is free when the next one is asked for."""
        return self.capture.layers(self.loss.n, self._kept, drain=True)

    @property
    def _kept(self) -> Tensor | None:
        return None if bool(self.finite.all()) else self.finite


@dataclass(eq=False)
class _Scale:
    """A loss scale, measured when it is first needed; shared by passes that are made from each other."""

    measure: Callable[[], LossScale] | None
    value: LossScale | None = None

    def __call__(self) -> LossScale | None:
        if self.measure is not None:
            self.value, self.measure = self.measure(), None
        return self.value


class ExampleGradients:
    """Runs a task over examples of a source and captures their gradients.

    Passes do not change: what they are to do otherwise is done by others, made from them (``like``, ``on``, ...). Their
    loss scale is measured over all examples of the source when it is first needed, unless ``calibrate`` has measured
    it, or it is given. Queries are weighed as the training data are: whoever scores them takes ``like(training)``.

    Args:
        module: The model.
        task: Its loss.
        source: The examples.
        coverage: The layers to capture.
        to_device: Moves a batch to the module's device; by default tensors in nested containers are moved.
        seed: Seed of the sampled labels.
        progress: Shows how far a pass is.
        forward_context: Wraps every forward pass (a Trainer's precision).
        scale: The loss scale, if it is known.
    """

    def __init__(
        self,
        module: nn.Module,
        task: Task,
        source: ExampleSource,
        coverage: Coverage,
        *,
        to_device: Callable[[Any], Any] | None = None,
        seed: int = 0,
        progress: Progress | None = None,
        forward_context: Callable[[], AbstractContextManager[Any]] = nullcontext,
        scale: LossScale | None = None,
    ) -> None:
        self.module = module
        self.task = task
        self.source = source
        self.coverage = coverage
        self.seed = seed
        self.quantity: Quantity | None = None
        self._to_device = to_device or self._move
        self._progress = progress or _silent
        self._forward_context = forward_context
        measure = partial(self._measured, range(len(source)))
        self._scale = _Scale(measure if scale is None else None, scale)

    @property
    def scale(self) -> LossScale | None:
        """How the terms of the loss are weighed; None where every batch is on its own, see ``with_scale``.

        Raises:
            ScaleError: If it has to be measured, and terms can't be told apart.
        """
        return self._scale()

    @property
    def references(self) -> dict[str, float]:
        """The numbers of the loss scale, by the terms' names."""
        return {str(key): value for key, value in (self.scale or {}).items()}

    @property
    def device(self) -> torch.device:
        """Device of the module."""
        return next(iter(self.module.parameters())).device

    def calibrate(self, indices: Sequence[int], *, of_mean: bool | None = None) -> ExampleGradients:
        """Return the same passes with the loss scale of these examples; if theirs is known already, themselves.

        With class weights or ``ignore_index`` a mean is over weights, not examples, and a sum grows with the batch:
        the same example would get other gradients in other batches, see ``loss_scale``. All examples are visited,
        forward only, in batches as training has them: what one of them holds, others need not.

        Args:
            indices: Dataset indices.
            of_mean: See ``ScaleTally.scale``; by default as the terms are.
        """
        return self if self._scale.measure is None else self.with_scale(self._measured(indices, of_mean))

    def _measured(self, indices: Sequence[int], of_mean: bool | None = None) -> LossScale:
        return measured_scale(self.with_scale(None).losses, self.source, indices, of_mean)

    def like(self, other: ExampleGradients) -> ExampleGradients:
        """Return the same passes with the loss scale of others (queries are weighed as the training data are)."""
        return self.with_scale(other.scale)

    def with_scale(self, scale: LossScale | None) -> ExampleGradients:
        """Return the same passes with another loss scale; None weighs every batch such that its loss is its mean."""
        changed = copy.copy(self)
        changed._scale = _Scale(None, scale)
        return changed

    def on(self, source: ExampleSource) -> ExampleGradients:
        """Return the same passes over other examples."""
        other = copy.copy(self)
        other.source = source
        return other

    def within(self, context: Callable[[], AbstractContextManager[Any]]) -> ExampleGradients:
        """Return the same passes with every forward pass in a further context, entered anew for each."""
        outer = self._forward_context

        @contextmanager
        def both() -> Iterator[None]:
            with outer(), context():
                yield

        other = copy.copy(self)
        other._forward_context = both
        return other

    def measuring(self, quantity: Quantity | None) -> ExampleGradients:
        """Return the same passes whose gradients are those of another quantity than the loss."""
        other = copy.copy(self)
        other.quantity = quantity
        return other

    def run(
        self,
        indices: Sequence[int],
        labels: Labels = "true",
        *,
        draw: int = 0,
        title: str = "",
        everywhere: bool = False,
        whole: bool = False,
        step_seed: int = 0,
    ) -> Generator[BatchGradients, None, None]:
        """Visit this process's share of the examples, in order.

        Close the iterator (``contextlib.closing``) rather than drop it: the model is frozen until then.

        Args:
            indices: Dataset indices.
            labels: ``"true"`` for the gradients of every example's own loss; ``"sampled"`` for one draw of labels from
                the model's own predictions; ``"exact"`` for as many draws as make the expectation over labels exact.
            draw: Number of the draw: different numbers give independent labels.
            title: Text of the progress bar; none without.
            everywhere: Visit all the examples on every process instead of a share.
            whole: Take all examples as one batch.
            step_seed: Seed of what ``training_step`` itself draws.

        Yields:
            One batch at a time; it is valid until the next one is asked for.

        Raises:
            TaskError: If labels other than the true ones are asked for and the loss was not tapped.
        """
        own = list(indices) if everywhere else distributed.share(indices)
        # Many draws hold many output gradients at a time: those passes keep to the size that training has room for.
        size = self.source.pass_batch_size
        if labels == "exact":
            size = min(size, self.source.batch_size)
        size = len(own) if whole else size
        self._scale()  # before anything is frozen
        with (
            untouched(self.module, self.task),
            Capture(self.coverage) as capture,
            (self._progress if title else _silent)(title, len(own)) as advance,
        ):

            def forward(batch: Any, batch_indices: list[int]) -> BatchLoss:
                try:
                    return self._traced_forward(capture, batch, batch_indices, step_seed)
                except NoLossError:
                    capture.clear()
                    raise

            for batch_indices, loss in answered(self.source, own, size, forward, apart=not whole):
                self._backward(capture, loss, labels, batch_indices, draw)
                # A copy of an example weighs as the example does in its batch.
                self.with_scale(loss.scale)._add_one_by_one(capture, batch_indices, labels, draw)
                n = len(batch_indices)
                finite = capture.finite(n)
                if loss.values is not None:
                    finite = finite & torch.isfinite(loss.values).to(finite.device)
                yield BatchGradients(batch_indices, loss, finite, capture)
                capture.clear()
                advance(len(batch_indices))

    def losses(
        self,
        indices: Sequence[int],
        *,
        title: str = "",
        everywhere: bool = False,
        size: int | None = None,
        watch: AbstractContextManager[Any] | None = None,
    ) -> Generator[tuple[list[int], BatchLoss], None, None]:
        """Visit this process's share of the examples, forward only.

        Args:
            indices: Dataset indices.
            title: Text of the progress bar; none without.
            everywhere: Visit all the examples on every process instead of a share.
            size: Examples in a batch, by default as passes have them.
            watch: Context around every forward pass.
        """
        own = list(indices) if everywhere else distributed.share(indices)
        self._scale()

        def forward(batch: Any, batch_indices: list[int]) -> BatchLoss:
            loss = self.forward(batch, len(batch_indices), watch=watch)
            if self._met_new_terms(loss, batch_indices):
                loss = self.forward(batch, len(batch_indices), watch=watch)
            return loss

        with (
            untouched(self.module, self.task),
            Capture(self.coverage),
            (self._progress if title else _silent)(title, len(own)) as advance,
        ):
            for batch_indices, loss in answered(self.source, own, size, forward):
                yield batch_indices, loss
                advance(len(batch_indices))

    def forward(
        self, batch: Any, n: int, *, step_seed: int = 0, watch: AbstractContextManager[Any] | None = None
    ) -> BatchLoss:
        """Evaluate the task on one batch, the model as it is: callers isolate it (``isolation.untouched``).

        Args:
            batch: As the source yields it; it is moved to the module's device.
            n: Number of examples in it.
            step_seed: Seed of what ``training_step`` itself draws: not a matter of how many were drawn before.
            watch: Context around the forward pass.
        """
        rewind()
        seed_everything(step_seed)
        moved = self._to_device(batch)
        if self.quantity is not None:
            moved = self.quantity.altered(moved, lambda changed: self._evaluate(changed, n))
            rewind()
            seed_everything(step_seed)
        return self._evaluate(moved, n, watch)

    def _evaluate(self, batch: Any, n: int, watch: AbstractContextManager[Any] | None = None) -> BatchLoss:
        """Evaluate the task on a batch that has been moved."""
        with self._forward_context():
            with watch or nullcontext():
                loss, calls = run_tapped(self.task, self.module, batch)
            return understand(loss, calls, n, self.scale, self.coverage.trace.forms)

    def applied(self, function: Callable[[Any, Any], Any], batch: Any) -> Any:
        """Return ``function(module, batch)`` as a pass would run it; callers isolate the model, see ``forward``."""
        rewind()
        seed_everything(0)
        with self._forward_context():
            return function(self.module, self._to_device(batch))

    def verification_gradients(self, batch: Any, n: int) -> dict[str, dict[str, Tensor]]:
        """Return autograd's gradient of the batch loss for every covered parameter: block, parameter -> tensor."""
        with untouched(self.module, self.task):
            owners = [
                (block.name, name, parameter)
                for block in self.coverage.blocks.values()
                for name, parameter in block.parameters.items()
            ]
            for _, _, tensor in owners:
                tensor.requires_grad_(True)
            loss = self.with_scale(None).forward(batch, n)
            tensors = [tensor for _, _, tensor in owners]
            found = torch.autograd.grad(loss.loss, tensors, allow_unused=True)
        result: dict[str, dict[str, Tensor]] = {}
        for (block, name, tensor), gradient in zip(owners, found, strict=True):
            result.setdefault(block, {})[name] = _dense(gradient, tensor)
        return result

    def _traced_forward(
        self,
        capture: Capture,
        batch: Any,
        indices: list[int],
        step_seed: int,
    ) -> BatchLoss:
        """Run a captured forward pass; one that takes a new path through the model is traced first."""
        n = len(indices)
        for whole in (False, True):
            try:
                loss = self.forward(batch, n, step_seed=step_seed, watch=capture.forward(n))
            except NewPathError:
                # A few of the examples may take the same path as all of them, at a fraction of the memory.
                self._trace(indices, whole)
            else:
                if not self._met_new_terms(loss, indices):
                    return loss
        return self.forward(batch, n, step_seed=step_seed, watch=capture.forward(n))

    def _met_new_terms(self, loss: BatchLoss, indices: list[int]) -> bool:
        """Trace a batch whose loss has terms that no traced batch had; tell whether that has told more of them."""
        trace = self.coverage.trace
        new = {term.key for term in loss.seen} - trace.forms.keys() - trace.formless
        if not new or trace.failure is not None or not trace.forms:
            return False
        self._trace(indices, whole=True)
        trace.formless |= new - trace.forms.keys()
        return not new <= trace.formless

    def _trace(self, indices: list[int], whole: bool) -> None:
        trace = trace_model(
            self.module,
            self.task,
            self.source,
            indices=indices,
            whole=whole,
            to_device=self._to_device,
            forward_context=self._forward_context,
        )
        for block in self.coverage.blocks.values():
            for name, parameter in block.parameters.items():
                for use in trace.uses(parameter):
                    if use.kind == "unknown" and block.name not in self.coverage.one_by_one:
                        raise LayerError(
                            f"{name!r} is {use.reason}, in the batch of examples {indices[0]}, {indices[-1]} and those "
                            "between, though not in the first batch. Leave it out by `layers=`, or freeze it."
                        )
        self.coverage.trace.add(trace)

    def _add_one_by_one(
        self,
        capture: Capture,
        indices: list[int],
        labels: Labels,
        draw: int,
    ) -> None:
        """Compute the gradients of the parameters that have no rows by a forward and backward pass per example."""
        blocks = [self.coverage.blocks[name] for name in sorted(self.coverage.one_by_one)]
        owned = [(block.name, name, parameter) for block in blocks for name, parameter in block.parameters.items()]
        if not owned:
            return
        tensors = [parameter for _, _, parameter in owned]
        rows: list[list[list[Tensor]]] = []  # draw, parameter, example
        flags = [tensor.requires_grad for tensor in tensors]
        for tensor in tensors:
            tensor.requires_grad_(True)
        try:
            for index in indices:
                # Two copies: steps that `squeeze()` the batch away do not meet a batch of one.
                ((_, batch),) = self.source.batches([index] * _COPIES, _COPIES)
                loss = self.forward(batch, _COPIES)
                starts = list(self._starts(loss, labels, [index] * _COPIES, draw))
                for number, (outputs, gradients) in enumerate(starts):
                    last = number == len(starts) - 1
                    found = torch.autograd.grad(outputs, tensors, gradients, retain_graph=not last, allow_unused=True)
                    if len(rows) <= number:
                        rows.append([[] for _ in tensors])
                    for column, tensor, gradient in zip(rows[number], tensors, found, strict=True):
                        column.append(working(_dense(gradient, tensor) / _COPIES))
        finally:
            for tensor, flag in zip(tensors, flags, strict=True):
                tensor.requires_grad_(flag)
        for block in blocks:
            draws = [
                {
                    name: torch.stack(column)
                    for (owner, name, _), column in zip(owned, columns, strict=True)
                    if owner == block.name
                }
                for columns in rows
            ]
            capture.add_computed(block.name, draws)

    def _backward(self, capture: Capture, loss: BatchLoss, labels: Labels, indices: list[int], draw: int) -> None:
        draws = loss.exact_draws() if labels == "exact" else 1
        for number, (outputs, gradients) in enumerate(self._starts(loss, labels, indices, draw)):
            capture.backward(outputs, gradients, last=number + 1 == draws)

    def _starts(
        self, loss: BatchLoss, labels: Labels, indices: list[int], draw: int
    ) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
        """Yield tensors and gradients to run backward from, once per draw of labels."""
        if labels == "true":
            yield loss.true_outputs() if self.quantity is None else self.quantity.outputs(loss)
            return
        if not loss.terms:
            raise TaskError(
                f"labels can't be sampled from the model: no known loss call was seen ({known_losses()}). Use "
                '`fisher="empirical"`.'
            )
        if labels == "sampled":
            yield loss.sampled_outputs(ExampleNoise(self.seed, draw, indices))
            return
        if loss.exact_draws() is None:
            raise TaskError(NO_EXACT_LABELS)
        yield from loss.exact_outputs()

    def _move(self, batch: Any) -> Any:
        return _moved(batch, self.device)


class _silent(nullcontext[Callable[[int], None]]):
    """Progress that shows nothing."""

    def __init__(self, title: str, examples: int) -> None:
        super().__init__(lambda done: None)


def _dense(gradient: Tensor | None, like: Tensor) -> Tensor:
    if gradient is None:
        return torch.zeros_like(like)
    return gradient.to_dense() if gradient.layout != torch.strided else gradient
