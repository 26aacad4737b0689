"""Passes over the data: every example's gradients, in a fixed order, whatever the training loader does.

``ExampleGradients`` runs the task on the examples of a source under capture. Results do not depend on batch size,
number of workers or processes: labels are sampled from streams that belong to the example.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from lightning_influence.core import distributed
from lightning_influence.core.containers import mover
from lightning_influence.core.isolation import rewind, untouched
from lightning_influence.core.memory import trim
from lightning_influence.core.random_streams import seed_everything
from lightning_influence.data.source import ExampleSource
from lightning_influence.gradients.answering import answered
from lightning_influence.gradients.attempts import Attempt
from lightning_influence.gradients.calibration import measured_scale
from lightning_influence.gradients.capture import Capture, LayerIO
from lightning_influence.gradients.coverage import Coverage
from lightning_influence.gradients.discover import trace_model
from lightning_influence.gradients.new_paths import followed
from lightning_influence.gradients.plain_autograd import gradients_one_by_one
from lightning_influence.gradients.starts import starts, starts_of_copies
from lightning_influence.gradients.trace import Trace
from lightning_influence.objective.scale import LossScale
from lightning_influence.objective.task import Task, run_tapped
from lightning_influence.objective.terms import BatchLoss, understand

Labels = Literal["true", "sampled", "exact"]
"""Whose gradients: of the given labels, of a draw from the model, or of as many as make the expectation exact."""


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
        attempt: Within it memory may run out: the batch then comes again in halves.
    """

    indices: list[int]
    loss: BatchLoss
    finite: Tensor
    capture: Capture
    attempt: Attempt

    @cached_property  # the host waits for it
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
        return None if self.counted == len(self.finite) else self.finite


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
        self._whole = False  # see `of_whole_loss`
        self.to_device = to_device or mover(module)
        self._progress = progress or _silent
        self.forward_context = forward_context
        self._scale = _Scale(partial(self._measured, range(len(source))) if scale is None else None, scale)

    @property
    def scale(self) -> LossScale | None:
        """How the terms of the loss are weighed; None where every batch is on its own, see ``with_scale``.

        Raises:
            ScaleError: If it has to be measured, and terms can't be told apart.
        """
        return self._scale()

    @property
    def device(self) -> torch.device:
        """Device of the module."""
        return next(iter(self.module.parameters())).device

    def calibrate(self, indices: Sequence[int], *, of_mean: bool | None = None) -> ExampleGradients:
        """Return the same passes with the loss scale of these examples; if theirs is known already, themselves.

        With class weights or ``ignore_index`` a mean is over weights, not examples, and a sum grows with the batch:
        the same example would get other gradients in other batches, see ``objective.scale``. All examples are visited,
        forward only, in batches as training has them: what one of them holds, others need not.

        Args:
            indices: Dataset indices.
            of_mean: See ``ScaleTally.scale``; by default as the terms are.
        """
        return self if self._scale.measure is None else self.with_scale(self._measured(indices, of_mean))

    def _measured(self, indices: Sequence[int], of_mean: bool | None = None) -> LossScale:
        return measured_scale(self.with_scale(None).of_whole_loss().losses, self.source, indices, of_mean)

    def like(self, other: ExampleGradients) -> ExampleGradients:
        """Return the same passes with the loss scale of others (queries are weighed as the training data are)."""
        return self.with_scale(other.scale)

    def with_scale(self, scale: LossScale | None) -> ExampleGradients:
        """Return the same passes with another loss scale; None weighs every batch such that its loss is its mean."""
        return self._with(_scale=_Scale(None, scale))

    def on(self, source: ExampleSource) -> ExampleGradients:
        """Return the same passes over other examples, in the same company."""
        source.company = self.source.company
        return self._with(source=source)

    def within(self, context: Callable[[], AbstractContextManager[Any]]) -> ExampleGradients:
        """Return the same passes with every forward pass in a further context, entered anew for each."""

        @contextmanager
        def both() -> Iterator[None]:
            with self.forward_context(), context():
                yield

        return self._with(forward_context=both)

    def of_whole_loss(self) -> ExampleGradients:
        """Return the same passes with all that training minimises, parts about other loaders' examples, too."""
        return self._with(_whole=True)

    def measuring(self, quantity: Quantity | None) -> ExampleGradients:
        """Return the same passes whose gradients are those of another quantity than the loss."""
        return self._with(quantity=quantity)

    def _with(self, **changes: Any) -> ExampleGradients:
        other = copy.copy(self)
        vars(other).update(changes)
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
        # Many draws hold many output gradients at a time: those passes keep to the size that training has room for.
        size = min(self.source.pass_batch_size, self.source.batch_size) if labels == "exact" else None
        capture, attempt = Capture(self.coverage), Attempt(apart=not whole)
        run = self.losses(
            indices,
            title=title,
            everywhere=everywhere,
            size=len(indices) if whole else size,
            watch=capture.forward,
            step_seed=step_seed,
            capture=capture,
            attempt=attempt,
        )
        with closing(run) as losses:
            for chosen, loss in losses:
                with attempt:
                    finite = _backward(self, capture, chosen, loss, labels, draw)
                if not attempt.again:
                    yield BatchGradients(chosen, loss, finite, capture, attempt)
                capture.clear()
                del loss

    def losses(
        self,
        indices: Sequence[int],
        *,
        title: str = "",
        everywhere: bool = False,
        size: int | None = None,
        watch: Callable[[int], AbstractContextManager[Any]] | None = None,
        step_seed: int = 0,
        capture: Capture | None = None,
        attempt: Attempt | None = None,
    ) -> Generator[tuple[list[int], BatchLoss], None, None]:
        """Visit this process's share of the examples, forward only.

        Args:
            indices: Dataset indices.
            title: Text of the progress bar; none without.
            everywhere: Visit all the examples on every process instead of a share.
            size: Examples in a batch, by default as passes have them.
            watch: Context around every forward pass, given the number of examples.
            step_seed: Seed of what ``training_step`` itself draws.
            capture: To be active meanwhile, by default one that nobody asks.
            attempt: Tells whether there was memory for what is done with the batches, which come in halves else.
        """
        own = list(indices) if everywhere else distributed.share(indices)
        self._scale()  # before anything is frozen

        def forward(batch: Any, chosen: list[int]) -> BatchLoss:
            def evaluate() -> BatchLoss:
                n = len(chosen)
                return self.forward(batch, n, step_seed=step_seed, watch=watch(n) if watch else None)

            return followed(self.coverage, evaluate, partial(_traced_again, self, chosen), chosen)

        progress = self._progress if title else _silent
        trim()  # what training has left
        with (
            ExitStack() as afterwards,
            untouched(self.module, self.task),
            capture or Capture(self.coverage),
            progress(title, len(own)) as advance,
        ):
            afterwards.callback(trim)
            attempt = attempt or Attempt()
            for chosen, loss in answered(self.source, own, size, forward, attempt):
                yield chosen, loss
                del loss
                if not attempt.again:
                    advance(len(chosen))

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
        moved = self.to_device(batch)
        if self.quantity is not None:
            moved = self.quantity.altered(moved, lambda changed: self._evaluate(changed, n))
            rewind()
            seed_everything(step_seed)
        return self._evaluate(moved, n, watch)

    def _evaluate(self, batch: Any, n: int, watch: AbstractContextManager[Any] | None = None) -> BatchLoss:
        """Evaluate the task on a batch that has been moved."""
        with self.forward_context():
            with watch or nullcontext():
                loss, calls = run_tapped(self.task, self.module, batch)
            found = understand(loss, calls, n, self.scale, self.coverage.trace.forms)
            return found if self._whole else self.coverage.trace.own_part(found)

    def applied(self, function: Callable[[Any, Any], Any], batch: Any) -> Any:
        """Return ``function(module, batch)`` as a pass would run it; callers isolate the model, see ``forward``."""
        rewind()
        seed_everything(0)
        with self.forward_context():
            return function(self.module, self.to_device(batch))


def _backward(
    passes: ExampleGradients, capture: Capture, chosen: list[int], loss: BatchLoss, labels: Labels, draw: int
) -> Tensor:
    """Run backward from every draw of labels; tell which examples have finite gradients, ``[n]``."""
    draws = loss.exact_draws() if labels == "exact" else 1
    for number, (outputs, gradients) in enumerate(starts(passes, loss, labels, chosen, draw)):
        capture.backward(outputs, gradients, last=number + 1 == draws)
    if passes.coverage.one_by_one:
        # A copy of an example weighs as the example does in its batch.
        of_copies = partial(starts_of_copies, passes=passes.with_scale(loss.scale), labels=labels, draw=draw)
        for name, found in gradients_one_by_one(passes.coverage, chosen, of_copies).items():
            capture.add_computed(name, found)
    finite = capture.finite(loss.n)
    return finite if loss.values is None else finite & torch.isfinite(loss.values).to(finite.device)


def _traced_again(passes: ExampleGradients, indices: Sequence[int], *, whole: bool) -> Trace:
    return trace_model(
        passes.module,
        passes.task,
        passes.source,
        indices=indices,
        whole=whole,
        to_device=passes.to_device,
        forward_context=passes.forward_context,
    )


def _silent(title: str, examples: int) -> AbstractContextManager[Callable[[int], None]]:
    return nullcontext(lambda done: None)
