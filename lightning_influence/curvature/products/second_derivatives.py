"""Gradients of chosen parameters that can be differentiated once more.

Index legend: ``q`` vectors sent back at a time, ``p`` parameters.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_influence.core.isolation import untouched
from lightning_influence.core.memory import is_out_of_memory
from lightning_influence.curvature.products.flat import FlatParameters
from lightning_influence.gradients.passes import ExampleGradients
from lightning_influence.objective.terms import TaskError

# Share of a gradient that the check of second derivatives may miss: half precision rounds.
_TOLERANCE = 0.05
_WAY_OUT = (
    "Use a curvature made of first derivatives (`ekfac`), write the operation in terms of others that can, or choose "
    "`parameters` that come after it."
)
_NONE = ("derivative for", "once_differentiable", "double backward", "differentiate twice")


class SecondDerivatives:
    """Ways back through the graph of a batch, to the parameters and again.

    Attributes:
        vectorised: Whether several vectors go back at once; False from the first time on that this did not work.
    """

    def __init__(self, gradients: ExampleGradients, flat: FlatParameters) -> None:
        self.vectorised = True
        self._gradients = gradients
        self._flat = flat
        self._tensors = list(flat.parameters.values())
        # Also those that were not chosen: the loss of a batch may depend on none that were.
        chosen = set(map(id, self._tensors))
        self._trainable = [p for p in gradients.module.parameters() if p.requires_grad or id(p) in chosen]

    @contextmanager
    def possible(self) -> Iterator[None]:
        """Isolation, gradients of the parameters, and kernels that can be differentiated twice.

        Raises:
            TaskError: If an operation of the model can't.
        """
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
                if any(phrase in str(error) for phrase in _NONE):
                    raise TaskError(
                        "an operation of the model can't be differentiated twice, which the products of GGN and "
                        f"Hessian need ({error}). {_WAY_OUT}"
                    ) from error
                raise

    def gradient(self, outputs: Sequence[Tensor], starts: Sequence[Tensor], *, create_graph: bool = False) -> Tensor:
        """Return the vector-Jacobian product with the parameters, ``[p]``."""
        found = _back(outputs, self._tensors, starts, create_graph=create_graph)
        # Gradients of sparse embeddings are sparse.
        return torch.cat([tensor.to_dense().flatten().to(self._flat.dtype) for tensor in found])

    def gradients(self, outputs: Sequence[Tensor], starts: Sequence[Tensor]) -> Tensor:
        """Return vector-Jacobian products with the parameters for starts ``[q, *output.shape]``, ``[q, p]``."""
        found = self.pull_back(outputs, self._tensors, starts)
        return torch.cat([tensor.to_dense().reshape(len(tensor), -1).to(self._flat.dtype) for tensor in found], 1)

    def pull_back(
        self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], vectors: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        """Return vector-Jacobian products: for vectors ``[q, *output.shape]``, ``[q, *input.shape]``."""

        def once(*rows: Tensor) -> tuple[Tensor, ...]:
            return _back(outputs, inputs, rows, retain_graph=True)

        q = len(vectors[0])
        if q > 1 and self.vectorised:
            try:
                found: tuple[Tensor, ...] = torch.func.vmap(once)(*vectors)
                return found
            except RuntimeError as error:
                if is_out_of_memory(error):
                    raise
                # Custom kernels, random recomputation: what can't be vectorised still works one by one. If the reason
                # is another, the same error comes up there.
                self.vectorised = False
        columns = zip(*(once(*(value[row] for value in vectors)) for row in range(q)), strict=True)
        return tuple(torch.stack(column) for column in columns)

    def verify(self, outputs: Sequence[Tensor], starts: Sequence[Tensor]) -> None:
        """Try whether the way back can itself be differentiated in what it starts with.

        It is linear in that, so its derivative in the direction of the start is the result itself. Custom kernels may
        cut the second way back, and autograd then takes the rest for the whole without a word.

        Raises:
            TaskError: If a part of a gradient is missing in its derivative.
        """
        starts = [start.detach().requires_grad_(True) for start in starts]
        gradients = _back(outputs, self._tensors, starts, create_graph=True)
        missing = []
        for name, gradient in zip(self._flat.parameters, gradients, strict=True):
            detached = gradient.detach().to(self._flat.dtype)
            largest = torch.linalg.vector_norm(detached, torch.inf)
            if not float(largest):
                continue
            size = largest * torch.linalg.vector_norm(detached / largest)  # squares of huge entries overflow
            found = 0.0
            if gradient.requires_grad:
                unit = (detached / size).to(gradient.dtype)
                parts = _back([gradient], starts, [unit], retain_graph=True)
                found = sum(float((part * at.detach()).sum() / size) for part, at in zip(parts, starts, strict=True))
            if not abs(found - 1) <= _TOLERANCE:
                missing.append(f"{name} ({found:.0%} found)")
        if missing:
            raise TaskError(
                "the gradients of these parameters can't be differentiated again, though autograd raises no "
                f"error: {', '.join(missing[:8])}. A custom `autograd.Function` or fused kernel in the model has a "
                f"backward that autograd can't follow. {_WAY_OUT}"
            )


def _back(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], starts: Sequence[Tensor], **options: bool
) -> tuple[Tensor, ...]:
    return torch.autograd.grad(outputs, inputs, starts, allow_unused=True, materialize_grads=True, **options)
