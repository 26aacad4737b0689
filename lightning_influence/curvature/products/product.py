"""Products with the curvature of all parameters, without ever forming it: what GGN and Hessian have in common.

Both act on one flat vector of all (chosen) parameters. Nothing is approximated, no blocks and no Kronecker factors, and
no layer has to be understood. The price is a pass over the data for every product, and a model that can be
differentiated twice.

Index legend: ``q`` vectors multiplied at a time, ``p`` parameters, ``n`` examples of a batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_influence.core import distributed
from lightning_influence.core.errors import told
from lightning_influence.core.precision import largest_norm
from lightning_influence.curvature.products.flat import FlatParameters
from lightning_influence.curvature.products.held_batches import bytes_of, copied, saved_bytes
from lightning_influence.curvature.products.second_derivatives import SecondDerivatives
from lightning_influence.curvature.solve.spectrum import Matvec
from lightning_influence.gradients.answering import refusal
from lightning_influence.gradients.attempts import Attempt, in_halves
from lightning_influence.gradients.passes import ExampleGradients
from lightning_influence.objective.terms import BatchLoss

# Batches are kept in memory if all of them together take no more than this.
_HOLD = 2**28
# What the graph of a batch keeps alive, times the vectors that are sent through it together, may take so much.
_ROOM = 2**28
_MOST_VECTORS = 256


class CurvatureProduct(ABC):
    """Multiplies vectors ``[q, p]`` by the curvature of the mean loss over a set of examples.

    Making one is a pass over the examples, which looks for non-finite ones and computes the mean gradient. Every
    product is another pass, under ``isolation.untouched``: in eval mode, and random numbers of the step the same in
    every product. Processes share the examples. The batch size makes no difference beyond rounding.

    Batches are held from the first pass on, as they were loaded, if they consist of tensors in lists, tuples and dicts
    and all of this process's together take at most 256 MB; else the data set is read for every product.

    Args:
        gradients: Supplies model, task, examples, device and loss scale. Its coverage does not matter here.
        indices: Dataset indices of the examples.
        parameters: Names of the parameters; by default all that are trainable.
        batch_size: Examples in a batch; by default that of the source's passes.

    Attributes:
        flat: The parameters.
        semidefinite: Whether no eigenvalue can be negative.
        examples: Number of examples, over all processes, that count.
        left_out: Dataset indices of examples with a non-finite loss or gradient, which do not.
        gradient: Mean gradient ``[p]`` over the examples: zero at a minimum without weight decay.
        held: Whether the batches are held.

    Raises:
        TaskError: If the loss is not one that this curvature is defined for.
        ValueError: If an argument is out of range or no example counts.
    """

    semidefinite: ClassVar[bool]

    def __init__(
        self,
        gradients: ExampleGradients,
        indices: Sequence[int],
        *,
        parameters: Iterable[str] | None = None,
        batch_size: int | None = None,
    ) -> None:
        self.flat = FlatParameters.of(gradients.module, parameters)
        self._gradients = gradients
        self._twice = SecondDerivatives(gradients, self.flat)
        self._batch_size = batch_size or gradients.source.pass_batch_size
        self._chunk: int | None = None  # vectors sent through the graph of a batch together, once that is known
        _ = gradients.scale  # measured before anything is frozen
        total, bad, overflow = self._look(distributed.share(indices))
        if distributed.any_process(overflow):
            raise ValueError(
                "the gradient of a batch is non-finite though that of each of its examples is finite: it overflows. "
                "Compute in float64, or with a smaller `batch_size`."
            )
        own = torch.tensor(bad, dtype=torch.int64, device=self.flat.device)
        self.left_out: list[int] = distributed.gather_by_index(own, {})[0].tolist()
        excluded = set(self.left_out)
        self._indices = [index for index in indices if index not in excluded]
        self._own = [index for index in distributed.share(indices) if index not in excluded]
        self.examples = len(self._indices)
        (total,) = distributed.sum_across_processes([total])
        if not self.examples:
            raise ValueError("no example counts: all losses or gradients are non-finite, or there are no examples.")
        self.gradient = total / self.examples
        with self._twice.possible():
            attempt, done = Attempt(), False
            for found, batch in self._fitting(self._batches(), attempt):
                with attempt:
                    self._twice.verify(*self._outputs(gradients.forward(batch, len(found))))
                    done = True
                if done:
                    break

    @property
    def held(self) -> bool:
        """Whether the batches are kept between products."""
        return self._kept is not None

    def __call__(self, v: Tensor) -> Tensor:
        """Multiply: ``[q, p] -> [q, p]`` or ``[p] -> [p]``; the same on every process.

        Raises:
            ValueError: If the shape is another, or a product of a finite vector is not finite.
            TaskError: If an operation of the model can't be differentiated twice.
        """
        return self._product(v, self._batches, self.examples)

    def random_batches(self, size: int, *, seed: int = 0) -> Iterator[Matvec]:
        """Yield, without end, the curvature of random batches, for ``solvers.lissa``.

        Every epoch takes the examples in a new order and leaves out the last few that do not fill a batch. The
        processes share each batch.

        Raises:
            ValueError: If ``size`` is not between 1 and the number of examples.
        """
        if not 1 <= size <= self.examples:
            raise ValueError(f"size is {size}; expected 1 to {self.examples}, the number of examples.")
        generator = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(self.examples, generator=generator).tolist()
            for start in range(0, self.examples - size + 1, size):
                own = distributed.share([self._indices[position] for position in order[start : start + size]])
                yield partial(self._product, batches=partial(self._loaded, own), examples=size)

    def to_dense(self) -> Tensor:
        """Return the matrix ``[p, p]``, made symmetric; one pass over the data, ``p`` vectors through each batch."""
        matrix = self(torch.eye(self.flat.size, dtype=self.flat.dtype, device=self.flat.device))
        return (matrix + matrix.T) / 2

    def _check(self, loss: BatchLoss) -> None:  # noqa: B027 - any loss will do unless a curvature says otherwise
        """Raise if the curvature is not defined for this loss."""

    @abstractmethod
    def _outputs(self, loss: BatchLoss) -> tuple[list[Tensor], list[Tensor]]:
        """Return the tensors that gradients start from, and what to start with (any numbers where any will do)."""

    @abstractmethod
    def _linearise(self, loss: BatchLoss) -> Callable[[Tensor], Tensor]:
        """Return the product ``[q, p] -> [q, p]`` for one batch, summed over its examples."""

    def _product(self, v: Tensor, batches: Callable[[], Iterable[tuple[list[int], Any]]], examples: int) -> Tensor:
        p, chunk = self.flat.size, self._chunk or _MOST_VECTORS
        if v.ndim not in (1, 2) or v.shape[-1] != p:
            raise ValueError(f"vectors have the shape {tuple(v.shape)}; expected [q, {p}] or [{p}].")
        vectors = v.detach().to(self.flat.device, self.flat.dtype).reshape(-1, p)
        total = torch.zeros_like(vectors)
        if len(vectors):
            with self._twice.possible():
                attempt = Attempt()
                for found, batch in self._fitting(batches(), attempt):
                    with attempt:
                        # Seeded alike every time, or a step with random numbers would make another matrix each time.
                        multiply = self._linearise(self._gradients.forward(batch, len(found)))
                        for start in range(0, len(vectors), chunk):
                            if start not in attempt.through:
                                part = multiply(vectors[start : start + chunk])
                                attempt.once(start, partial(total[start : start + chunk].add_, part))
        (total,) = distributed.sum_across_processes([total])
        result = total / examples
        # Not for vectors that are non-finite themselves: those come from a solver, which knows what to do.
        if bool((torch.isfinite(vectors).all(1) & ~torch.isfinite(result).all(1)).any()):
            raise ValueError(
                "a product with the curvature is non-finite though all losses and gradients are finite: second "
                "derivatives have a pole (a square root or norm at 0), or the vector is too large for "
                f"{self.flat.dtype}. Compute in float64, or choose other `parameters`."
            )
        return result.reshape(v.shape).to(v.device, v.dtype)

    def _batches(self) -> Iterable[tuple[list[int], Any]]:
        """Return this process's batches with their examples."""
        if self._kept is None:
            return self._loaded(self._own)
        return ((found, copied(batch)) for found, batch in self._kept)  # a step may change what it is given

    def _loaded(self, indices: Sequence[int]) -> Iterator[tuple[list[int], Any]]:
        return self._gradients.source.batches(indices, self._batch_size)

    def _fitting(self, batches: Iterable[tuple[list[int], Any]], attempt: Attempt) -> Iterator[tuple[list[int], Any]]:
        return in_halves(self._gradients.source, batches, attempt, self._gradients.source.room.most)

    def _look(self, own: list[int]) -> tuple[Tensor, list[int], bool]:
        """Keep this process's batches if they fit.

        Returns:
            The sum of the gradients, the non-finite examples, and whether a sum is non-finite without any of these.
        """
        total = torch.zeros(self.flat.size, dtype=self.flat.dtype, device=self.flat.device)
        self._kept: list[tuple[list[int], Any]] | None = []
        room: float = _HOLD
        suspicious: list[int] = []
        attempt = Attempt()
        with self._twice.possible():
            for found, batch in self._fitting(self._loaded(own), attempt):
                room -= bytes_of(batch)
                held = copied(batch) if self._kept is not None and room >= 0 else None  # a step may change it
                with attempt, told(partial(refusal, self._gradients.source, found, self._forward)):
                    gradient = self._summed_gradient(batch, len(found))
                if attempt.again:
                    room += bytes_of(batch)
                    continue
                if self._kept is None or held is None:
                    self._kept = None
                else:
                    self._kept.append((found, held))
                if gradient is None:
                    suspicious += found
                else:
                    total += gradient
            # Two copies: steps that squeeze their batch, or take its statistics, can't run a single example.
            bad = [
                index
                for index in suspicious
                if any(self._summed_gradient(batch, 2) is None for _, batch in self._loaded([index] * 2))
            ]
        if not bad:
            return total, [], bool(suspicious)
        excluded = set(bad)
        total, more, overflow = self._look([index for index in own if index not in excluded])
        return total, bad + more, overflow

    def _forward(self, batch: Any, found: Sequence[int]) -> BatchLoss:
        return self._gradients.forward(batch, len(found))

    def _summed_gradient(self, batch: Any, n: int) -> Tensor | None:
        """Return the gradient of the batch, summed over its examples, or None if it or a loss is non-finite."""
        if self._chunk:
            loss = self._gradients.forward(batch, n)
        else:
            with saved_bytes(self.flat.parameters.values()) as saved:
                loss = self._gradients.forward(batch, n)
            # Twice, because the way back through the way back holds about as much again.
            self._chunk = max(1, min(_MOST_VECTORS, _ROOM // max(2 * sum(saved.values()), 1)))
        self._check(loss)
        gradient = self._twice.gradient(*objective(loss))
        finite = gradient.norm() <= largest_norm(gradient.dtype)  # a product squares it
        if loss.values is not None:
            finite = finite & torch.isfinite(loss.values).all()
        return gradient if bool(finite) else None


def objective(loss: BatchLoss) -> tuple[list[Tensor], list[Tensor]]:
    """Return tensors and weights whose inner product is the sum over the batch of every example's own loss.

    The batch loss itself where the scale is right as it is: the derivative of a term's coefficient then counts too.
    """
    if all(term.correction(loss.n) == 1 for term in loss.terms):
        return [loss.loss], [torch.full_like(loss.loss, float(loss.n))]
    return loss.true_outputs()
