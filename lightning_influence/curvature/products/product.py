"""Products with the curvature of all parameters, without ever forming it: what GGN and Hessian have in common.

Both act on one flat vector of all (chosen) parameters. Nothing is approximated, no blocks and no Kronecker factors, and
no layer has to be understood. The price is a pass over the data for every product, and a model that can be
differentiated twice.

Index legend: ``q`` vectors multiplied at a time, ``p`` parameters, ``n`` examples of a batch.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_influence.core import distributed
from lightning_influence.core.containers import map_tensors
from lightning_influence.core.isolation import untouched
from lightning_influence.core.memory import is_out_of_memory
from lightning_influence.core.precision import largest_norm
from lightning_influence.curvature.products.flat import FlatParameters
from lightning_influence.curvature.solve.spectrum import Matvec
from lightning_influence.gradients.passes import ExampleGradients
from lightning_influence.objective.terms import BatchLoss, TaskError

# Batches are kept in memory if all of them together take no more than this.
_HOLD = 2**28
# What the graph of a batch keeps alive, times the vectors that are sent through it together, may take so much.
_ROOM = 2**28
_MOST_VECTORS = 256
# A dense float64 matrix of so many parameters takes 1.2 GB, and solving with it as much again.
_LARGEST_DENSE = 12_000

# Share of a gradient that the check of second derivatives may miss: half precision rounds.
_TOLERANCE = 0.05
_WAY_OUT = (
    "Use a curvature made of first derivatives (`ekfac`), write the operation in terms of others that can, or choose "
    "`parameters` that come after it."
)
_NO_SECOND_DERIVATIVE = ("derivative for", "once_differentiable", "double backward", "differentiate twice")


class CurvatureProduct(ABC):
    """Multiplies vectors ``[q, p]`` by the curvature of the mean loss over a set of examples.

    Making one is a pass over the examples, which looks for non-finite ones and computes the mean gradient. Every
    product is another pass, under ``isolation.untouched``: in eval mode, and random numbers of the step the same in
    every product. Processes share the examples. The batch size makes no difference beyond rounding.

    Batches are held from the first pass on, as they were loaded, if they consist of tensors in lists, tuples and dicts
    and all of this process's together take at most ``hold_bytes``; else the data set is read for every product.

    Args:
        gradients: Supplies model, task, examples, device and loss scale. Its coverage does not matter here.
        indices: Dataset indices of the examples.
        parameters: Names of the parameters; by default all that are trainable.
        batch_size: Examples in a batch; by default that of the source's passes.
        hold_bytes: Memory that held batches may take.
        chunk: Vectors sent through the graph of a batch together; by default so many that they take about 256 MB.

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
        hold_bytes: int = _HOLD,
        chunk: int | None = None,
    ) -> None:
        for name, value, least in (("batch_size", batch_size, 1), ("chunk", chunk, 1), ("hold_bytes", hold_bytes, 0)):
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}; expected at least {least}.")
        self.flat = FlatParameters.of(gradients.module, parameters)
        self._gradients = gradients
        # Also those that were not chosen: the loss of a batch may depend on none that were.
        chosen = {id(parameter) for parameter in self.flat.parameters.values()}
        self._trainable = [p for p in gradients.module.parameters() if p.requires_grad or id(p) in chosen]
        self._batch_size = batch_size or gradients.source.pass_batch_size
        self._hold_bytes = hold_bytes
        self._chunk = chunk
        self._vectorised = True
        self._stored: list[tuple[int, Any]] | None = None
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
        self._verify()

    @property
    def held(self) -> bool:
        """Whether the batches are kept between products."""
        return self._stored is not None

    def __call__(self, v: Tensor) -> Tensor:
        """Multiply: ``[q, p] -> [q, p]`` or ``[p] -> [p]``; the same on every process.

        Raises:
            ValueError: If the shape is another, or a product of a finite vector is not finite.
            TaskError: If an operation of the model can't be differentiated twice.
        """
        return self._product(v, self._batches(), self.examples)

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
                yield self._of([self._indices[position] for position in order[start : start + size]])

    def to_dense(self, *, limit: int = _LARGEST_DENSE) -> Tensor:
        """Return the matrix ``[p, p]``, made symmetric; one pass over the data, ``p`` vectors through each batch.

        Raises:
            ValueError: If there are more than ``limit`` parameters.
        """
        p = self.flat.size
        if p > limit:
            raise ValueError(
                f"a dense matrix of {p} parameters takes {p * p * 8 / 1e9:.1f} GB in float64; solve with `cg`, choose "
                f"fewer `parameters`, or raise `limit`, now {limit}."
            )
        matrix = self(torch.eye(p, dtype=self.flat.dtype, device=self.flat.device))
        return (matrix + matrix.T) / 2

    @abstractmethod
    def _check(self, loss: BatchLoss) -> None:
        """Raise if the curvature is not defined for this loss."""

    @abstractmethod
    def _outputs(self, loss: BatchLoss) -> tuple[list[Tensor], list[Tensor]]:
        """Return the tensors that gradients start from, and what to start with (any numbers where any will do)."""

    @abstractmethod
    def _linearise(self, loss: BatchLoss) -> Callable[[Tensor], Tensor]:
        """Return the product ``[q, p] -> [q, p]`` for one batch, summed over its examples."""

    def _of(self, indices: list[int]) -> Matvec:
        def product(v: Tensor) -> Tensor:
            own = distributed.share(indices)
            return self._product(v, ((len(found), batch) for found, batch in self._load(own)), len(indices))

        return product

    def _product(self, v: Tensor, batches: Iterator[tuple[int, Any]], examples: int) -> Tensor:
        p = self.flat.size
        if v.ndim not in (1, 2) or v.shape[-1] != p:
            raise ValueError(f"vectors have the shape {tuple(v.shape)}; expected [q, {p}] or [{p}].")
        vectors = v.detach().to(self.flat.device, self.flat.dtype).reshape(-1, p)
        total = torch.zeros_like(vectors)
        if len(vectors):
            with self._pass():
                for n, batch in batches:
                    multiply = self._linearise(self._evaluate(batch, n))
                    for start in range(0, len(vectors), self._chunk or _MOST_VECTORS):
                        part = slice(start, start + (self._chunk or _MOST_VECTORS))
                        total[part] += multiply(vectors[part])
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

    def _batches(self) -> Iterator[tuple[int, Any]]:
        """Yield this process's batches; a step may change what it is given."""
        if self._stored is not None:
            yield from ((n, map_tensors(torch.clone, batch)) for n, batch in self._stored)
        else:
            yield from ((len(indices), batch) for indices, batch in self._load(self._own))

    def _load(self, indices: Sequence[int]) -> Iterator[tuple[list[int], Any]]:
        return self._gradients.source.batches(indices, self._batch_size)

    def _evaluate(self, batch: Any, n: int) -> BatchLoss:
        # Seeded alike in every product, or a step with random numbers would make another matrix every time.
        return self._gradients.forward(batch, n)

    @contextmanager
    def _pass(self) -> Iterator[None]:
        """Isolation, gradients of the chosen parameters, and kernels that can be differentiated twice."""
        module = self._gradients.module
        with ExitStack() as guards:
            guards.enter_context(untouched(module, self._gradients.task))
            guards.enter_context(sdpa_kernel(SDPBackend.MATH))
            if any(isinstance(part, nn.RNNBase) for part in module.modules()):
                guards.enter_context(torch.backends.cudnn.flags(enabled=False))
            guards.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", message="There is a performance drop because we have not yet implemented")
            for parameter in self._trainable:
                parameter.requires_grad_(True)
            try:
                yield
            except RuntimeError as error:
                if any(phrase in str(error) for phrase in _NO_SECOND_DERIVATIVE):
                    raise TaskError(
                        "an operation of the model can't be differentiated twice, which the products of GGN and "
                        f"Hessian need ({error}). {_WAY_OUT}"
                    ) from error
                raise

    def _look(self, own: list[int]) -> tuple[Tensor, list[int], bool]:
        """Keep this process's batches if they fit.

        Returns:
            The sum of the gradients, the non-finite examples, and whether a sum is non-finite without any of these.
        """
        total = torch.zeros(self.flat.size, dtype=self.flat.dtype, device=self.flat.device)
        stored: list[tuple[int, Any]] = []
        left = self._hold_bytes
        suspicious: list[int] = []
        with self._pass():
            for found, batch in self._load(own):
                size = _bytes(batch)
                left = -1 if size is None else left - size
                if left >= 0:
                    stored.append((len(found), map_tensors(torch.clone, batch)))
                else:
                    stored.clear()
                gradient = self._summed_gradient(batch, len(found))
                if gradient is None:
                    suspicious += found
                else:
                    total += gradient
        if not suspicious:
            self._stored = stored if left >= 0 else None
            return total, [], False
        bad = [index for index in suspicious if not self._is_finite(index)]
        if not bad:
            return total, [], True
        excluded = set(bad)
        total, more, overflow = self._look([index for index in own if index not in excluded])
        return total, bad + more, overflow

    def _verify(self) -> None:
        """Try on one batch whether the way back can itself be differentiated in what it starts with.

        It is linear in that, so its derivative in the direction of the start is the result itself. Custom kernels may
        cut the second way back, and autograd then takes the rest for the whole without a word.

        Raises:
            TaskError: If a part of a gradient is missing in its derivative.
        """
        with self._pass():
            for n, batch in islice(self._batches(), 1):
                outputs, starts = self._outputs(self._evaluate(batch, n))
                starts = [start.detach().requires_grad_(True) for start in starts]
                tensors = list(self.flat.parameters.values())
                gradients = torch.autograd.grad(
                    outputs, tensors, starts, create_graph=True, allow_unused=True, materialize_grads=True
                )
                missing = {}
                for name, gradient in zip(self.flat.parameters, gradients, strict=True):
                    size = torch.linalg.vector_norm(gradient.detach(), dtype=self.flat.dtype)
                    if not float(size):
                        continue
                    found = 0.0
                    if gradient.requires_grad:
                        unit = (gradient.detach() / size).to(gradient.dtype)
                        parts = torch.autograd.grad(
                            gradient, starts, unit, retain_graph=True, allow_unused=True, materialize_grads=True
                        )
                        pairs = zip(parts, starts, strict=True)
                        found = sum(float((part * start.detach()).sum() / size) for part, start in pairs)
                    if not abs(found - 1) <= _TOLERANCE:
                        missing[name] = found
                if missing:
                    listed = ", ".join(f"{name} ({share:.0%} found)" for name, share in list(missing.items())[:8])
                    raise TaskError(
                        "the gradients of these parameters can't be differentiated again, though autograd raises no "
                        f"error: {listed}. A custom `autograd.Function` or fused kernel in the model has a backward "
                        "that autograd can't follow. " + _WAY_OUT
                    )

    def _is_finite(self, index: int) -> bool:
        with self._pass():
            # Two copies: steps that squeeze their batch, or take its statistics, can't run a single example.
            return all(self._summed_gradient(batch, len(found)) is not None for found, batch in self._load([index] * 2))

    def _summed_gradient(self, batch: Any, n: int) -> Tensor | None:
        """Return the gradient of the batch, summed over its examples, or None if it or a loss is non-finite."""
        with ExitStack() as counting:
            saved = None if self._chunk else counting.enter_context(_saved_bytes(self.flat))
            loss = self._evaluate(batch, n)
        if saved is not None:
            # Twice, because the way back through the way back holds about as much again.
            self._chunk = max(1, min(_MOST_VECTORS, _ROOM // max(2 * sum(saved.values()), 1)))
        self._check(loss)
        tensors = list(self.flat.parameters.values())
        outputs, weights = objective(loss)
        gradient = self._line(torch.autograd.grad(outputs, tensors, weights, allow_unused=True, materialize_grads=True))
        finite = gradient.norm() <= largest_norm(gradient.dtype)  # a product squares it
        if loss.values is not None:
            finite = finite & torch.isfinite(loss.values).all()
        return gradient if bool(finite) else None

    def _line(self, tensors: Sequence[Tensor], batched: int = 0) -> Tensor:
        """Put gradients in line, ``[p]``, or ``[q, p]`` if ``batched`` is 1."""
        # Gradients of sparse embeddings are sparse.
        rows = [tensor.to_dense().reshape(*tensor.shape[:batched], -1).to(self.flat.dtype) for tensor in tensors]
        return torch.cat(rows, batched)

    def _pull_back(
        self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], vectors: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        """Return vector-Jacobian products: for vectors ``[q, *output.shape]``, ``[q, *input.shape]``."""

        def once(*rows: Tensor) -> tuple[Tensor, ...]:
            return torch.autograd.grad(
                outputs, inputs, rows, retain_graph=True, allow_unused=True, materialize_grads=True
            )

        q = len(vectors[0])
        if q > 1 and self._vectorised:
            try:
                found: tuple[Tensor, ...] = torch.func.vmap(once)(*vectors)
                return found
            except RuntimeError as error:
                if is_out_of_memory(error):
                    raise
                # Custom kernels, random recomputation: what can't be vectorised still works one by one. If the reason
                # is another, the same error comes up there.
                self._vectorised = False
        columns = zip(*(once(*(value[row] for value in vectors)) for row in range(q)), strict=True)
        return tuple(torch.stack(column) for column in columns)


def objective(loss: BatchLoss) -> tuple[list[Tensor], list[Tensor]]:
    """Return tensors and weights whose inner product is the sum over the batch of every example's own loss.

    The batch loss itself where the scale is right as it is: the derivative of a term's coefficient then counts too.
    """
    if all(term.correction(loss.n) == 1 for term in loss.terms):
        return [loss.loss], [torch.full_like(loss.loss, float(loss.n))]
    return loss.true_outputs()


@contextmanager
def _saved_bytes(flat: FlatParameters) -> Iterator[dict[int, int]]:
    """Count what operations save for the way back, by storage, without the parameters."""
    sizes: dict[int, int] = {}
    known = {parameter.untyped_storage().data_ptr() for parameter in flat.parameters.values()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
        # The tensor itself would make a cycle with the operation that it comes from.
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield sizes


def _bytes(batch: Any) -> int | None:
    """Return the size of a batch of tensors in plain containers, None for anything that might not be copied well."""
    if type(batch) is Tensor:
        return batch.numel() * batch.element_size() if batch.layout == torch.strided else None
    if batch is None or isinstance(batch, (str, bytes, int, float)):
        return 0
    plain = type(batch) in (dict, list, tuple) or (isinstance(batch, tuple) and hasattr(batch, "_fields"))
    if not plain:
        return None
    parts = [_bytes(value) for value in (batch.values() if isinstance(batch, dict) else batch)]
    return None if None in parts else sum(part or 0 for part in parts)
