"""Passes over the data: every example's gradients, in a fixed order, whatever the training loader does.

``ExampleGradients`` runs the task on the examples of a source under capture. Results do not depend on batch size,
number of workers or processes: labels are sampled from streams that belong to the example.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from lightning_influence import distributed
from lightning_influence.capture import Capture, LayerIO
from lightning_influence.isolation import (
    seed_everything,
    untouched,
)
from lightning_influence.layers import Coverage
from lightning_influence.source import ExampleSource
from lightning_influence.task import BatchLoss, Task, TaskError, evaluate

Labels = Literal["true", "sampled", "exact"]
_T = TypeVar("_T")


class Progress(Protocol):
    """Shows how far a long pass is: called with a title and the number of examples."""

    def __call__(self, title: str, examples: int) -> AbstractContextManager[Callable[[int], None]]:
        """Return a context whose value is called after each batch, with its number of examples."""
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
        return self.capture.layers(self.loss.n, None if bool(self.finite.all()) else self.finite)


class ExampleGradients:
    """Runs a task over examples of a source and captures their gradients.

    Args:
        module: The model.
        task: Its loss.
        source: The examples.
        coverage: The layers to capture.
        to_device: Moves a batch to the module's device; by default tensors in nested containers are moved.
        seed: Seed of the sampled labels.
        progress: Shows how far a pass is.
        forward_context: Wraps every forward pass (a Trainer's precision).
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
    ) -> None:
        self.module = module
        self.task = task
        self.source = source
        self.coverage = coverage
        self.seed = seed
        self.references: dict[int, float] | None = None
        self._to_device = to_device or self._move
        self._progress = progress or _silent
        self._forward_context = forward_context

    @property
    def device(self) -> torch.device:
        """Device of the module."""
        return next(iter(self.module.parameters())).device

    def like(self, other: ExampleGradients) -> ExampleGradients:
        """Take over the loss scale of other passes (validation data are weighed as the training data are)."""
        self.references = other.references
        return self

    def run(
        self,
        indices: Sequence[int],
        labels: Labels = "true",
        *,
        draw: int = 0,
        title: str = "",
        everywhere: bool = False,
        whole: bool = False,
        own_scale: bool = False,
        references: Mapping[int, float] | None = None,
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
            own_scale: Scale losses that depend on their batch as the batch has it, see ``calibrate``.
            references: Scale them by these references instead of the calibrated ones.
            step_seed: Seed of what ``training_step`` itself draws.

        Yields:
            One batch at a time; it is valid until the next one is asked for.

        Raises:
            TaskError: If labels other than the true ones are asked for and the loss was not tapped.
        """
        own = list(indices) if everywhere else distributed.share(indices)
        # Many draws hold many output gradients at a time: those passes keep to the size that training has room for.
        size = self.source.batch_size if labels == "exact" else self.source.pass_batch_size
        size = len(own) if whole else size
        if not own_scale and references is None:
            references = self.references or {}
        with (
            untouched(self.module),
            Capture(self.coverage) as capture,
            (self._progress if title else _silent)(title, len(own)) as advance,
        ):
            for batch_indices, batch in self.source.batches(own, size):
                loss = self._forward(capture, batch, len(batch_indices), references, step_seed)
                self._backward(capture, loss, labels, batch_indices, draw)
                n = len(batch_indices)
                finite = capture.finite(n)
                if loss.values is not None:
                    finite = finite & torch.isfinite(loss.values).to(finite.device)
                yield BatchGradients(batch_indices, loss, finite, capture)
                capture.clear()
                advance(len(batch_indices))

    def losses(self, indices: Sequence[int], *, title: str = "") -> Generator[tuple[list[int], BatchLoss], None, None]:
        """Visit this process's share of the examples, forward only."""
        own = distributed.share(indices)
        with (
            untouched(self.module),
            Capture(self.coverage) as capture,
            (self._progress if title else _silent)(title, len(own)) as advance,
        ):
            for batch_indices, batch in self.source.batches(own):
                yield batch_indices, self._forward(capture, batch, len(batch_indices), None)
                advance(len(batch_indices))

    def calibrate(self, indices: Sequence[int]) -> None:
        """Fix the scale of losses that depend on the batch they are computed in.

        With class weights or ``ignore_index`` a mean is over weights, not examples, and a sum grows with the batch:
        the same example would get other gradients in other batches. Afterwards every batch is scaled as if its
        weights had the mean of all ``indices``. For other losses this returns after one batch, and at once if the
        scale is known (``references``).
        """
        if self.references is not None:
            return
        totals: dict[int, float] = {}
        count = 0
        with closing(self.losses(indices, title="loss scale")) as batches:
            for batch_indices, loss in batches:
                if not count and not any(term.call.scale_varies(loss.n) for term in loss.terms):
                    # Every process sees the same kind of calls, so all of them leave here.
                    self.references = {}
                    return
                count += len(batch_indices)
                for k, term in enumerate(loss.terms):
                    sums = term.call.reduction == "sum"
                    value = float(self.source.batch_size) if sums else term.call.batch_reference(loss.n)
                    totals[k] = totals.get(k, 0.0) + value * len(batch_indices)
        numbers = [float(count), *(totals[k] for k in sorted(totals))]
        (reduced,) = distributed.sum_across_processes([torch.tensor(numbers, dtype=torch.float64, device=self.device)])
        self.references = {k: float(reduced[1 + k] / reduced[0]) for k in sorted(totals)}

    def verification_gradients(self, batch: Any, n: int) -> dict[str, dict[str, Tensor]]:
        """Return autograd's gradient of the batch loss for every covered parameter: block, parameter -> tensor."""
        with untouched(self.module):
            owners = [
                (name, parameter, getattr(operation.module, parameter))
                for name, operation in self.coverage.operations.items()
                for parameter in operation.parameter_names
            ]
            for _, _, tensor in owners:
                tensor.requires_grad_(True)
            seed_everything(0)
            with self._forward_context():
                loss = evaluate(self.task, self.module, self._to_device(batch), n)
            tensors = [tensor for _, _, tensor in owners]
            found = torch.autograd.grad(loss.loss, tensors, allow_unused=True)
        result: dict[str, dict[str, Tensor]] = {}
        for (name, parameter, tensor), gradient in zip(owners, found, strict=True):
            result.setdefault(name, {})[parameter] = torch.zeros_like(tensor) if gradient is None else gradient
        return result

    def _forward(
        self, capture: Capture, batch: Any, n: int, references: Mapping[int, float] | None, step_seed: int = 0
    ) -> BatchLoss:
        # A step that draws random numbers itself must not depend on how many were drawn before.
        seed_everything(step_seed)
        with capture.forward(), self._forward_context():
            return evaluate(self.task, self.module, self._to_device(batch), n, references)

    def _backward(self, capture: Capture, loss: BatchLoss, labels: Labels, indices: list[int], draw: int) -> None:
        if labels == "true":
            capture.backward(*loss.true_outputs())
            return
        if not loss.terms:
            raise TaskError(
                "labels can't be sampled from the model: no known loss call was seen (F.cross_entropy, F.nll_loss, "
                'F.binary_cross_entropy_with_logits, F.mse_loss). Use `fisher="empirical"`.'
            )
        if labels == "sampled":
            capture.backward(*loss.sampled_outputs(_ExampleNoise(self.seed, draw, indices)))
            return
        draws = loss.exact_draws()
        if draws is None:
            raise TaskError(
                "the expectation over labels has no closed form for this loss (it makes several decisions per "
                'example); use `fisher="sampled"`.'
            )
        for number, (outputs, gradients) in enumerate(loss.exact_outputs()):
            capture.backward(outputs, gradients, last=number == draws - 1)

    def _move(self, batch: Any) -> Any:
        return _moved(batch, self.device)


class _ExampleNoise:
    """Uniform numbers that belong to the example: the same in every batch, on every device and process."""

    def __init__(self, seed: int, draw: int, indices: Sequence[int]) -> None:
        self.seed, self.draw, self.indices = seed, draw, indices
        self._calls = 0

    def __call__(self, shape: tuple[int, ...]) -> Tensor:
        rows = []
        for index in self.indices:
            # A counter-based generator gives random access to the stream of (draw, example, call).
            stream = np.random.Philox(key=[self.seed, self.draw], counter=[0, 0, index, self._calls])
            rows.append(np.random.Generator(stream).random(shape))
        self._calls += 1
        return torch.from_numpy(np.stack(rows)).clamp_(1e-16, 1 - 1e-16)


class _silent(nullcontext[Callable[[int], None]]):
    """Progress that shows nothing."""

    def __init__(self, title: str, examples: int) -> None:
        super().__init__(lambda done: None)


def _moved(batch: _T, device: torch.device) -> _T:
    moved: Any = batch
    if isinstance(batch, Tensor):
        moved = batch.to(device)
    elif isinstance(batch, Mapping):
        moved = {key: _moved(value, device) for key, value in batch.items()}
    elif isinstance(batch, tuple) and hasattr(batch, "_fields"):
        moved = type(batch)(*(_moved(value, device) for value in batch))
    elif isinstance(batch, (list, tuple)):
        moved = type(batch)(_moved(value, device) for value in batch)
    return cast("_T", moved)
