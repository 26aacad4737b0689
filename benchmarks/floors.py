"""What the machine needs at the very least for a work: the parts that no method leaves out, in bare torch.

A floor takes turns with the contestants of a match, so that a target beyond it is seen to be out of reach on the
machine at hand. Of the algebra of examples, the multiplications of its cheapest exact form are counted, and taken to be
as fast as those of one large product. Only what is prepared, which is not timed, uses the library: shapes, and which
rows and columns of the covariances are not zero (black pixels, dead units).
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass

import torch
from networks import task
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_influence.gradients import ExampleGradients

# Examples whose scores are multiplied at once: enough for a matrix product to be as fast as it gets.
BLOCK = 256


class BarePass:
    """A forward pass, and a backward pass as far as the first layer's output, without gradients of weights.

    Args:
        net: The network; a copy is taken.
        kinds: Types of layers; the first one of them in the network is where the backward pass ends.
        batch_size: Examples in a batch.
    """

    def __init__(self, net: nn.Module, kinds: tuple[type[nn.Module], ...], batch_size: int) -> None:
        self._net = copy.deepcopy(net).requires_grad_(False)
        self._batch_size = batch_size
        self._start: Tensor | None = None
        next(module for module in self._net.modules() if isinstance(module, kinds)).register_forward_hook(self._reached)

    def _reached(self, module: nn.Module, args: object, output: Tensor) -> None:
        self._start = output.requires_grad_()

    def __call__(self, data: TensorDataset) -> None:
        """Visit all examples once."""
        for batch in zip(*(tensor.split(self._batch_size) for tensor in data.tensors), strict=True):
            loss = task(self._net, batch)
            assert self._start is not None
            # The gradients of all later outputs are on the way.
            torch.autograd.grad(loss, self._start)


@dataclass(frozen=True)
class Layer:
    """What the algebra of a layer is made of.

    Attributes:
        inputs: Sum of outer products of its inputs, ``[k, i, i]`` in float64, without rows and columns of zeros.
        outputs: The same of its output gradients, ``[k, o, o]``.
        positions: ``s``, that share its weights.
        kernel: Of a convolution.
    """

    inputs: Tensor
    outputs: Tensor
    positions: int
    kernel: tuple[int, ...] = ()

    @property
    def moments(self) -> tuple[Tensor, Tensor]:
        """Both sums."""
        return self.inputs, self.outputs

    @property
    def weights(self) -> int:
        """Number of weights."""
        return len(self.inputs) * self.inputs.shape[-1] * self.outputs.shape[-1]

    def formed(self) -> float:
        """Return the multiplications that form an example's gradient: none where it is one outer product."""
        return self.positions * self.weights if self.positions > 1 else 0.0

    def covariances(self) -> float:
        """Return the multiplications of an example's outer products, which are symmetric.

        Two places of a kernel have the same products as any other two that lie as far apart.
        """
        k, s, i, o = len(self.inputs), self.positions, self.inputs.shape[-1], self.outputs.shape[-1]
        places = math.prod(self.kernel)
        apart = math.prod(2 * size - 1 for size in self.kernel)
        return k * s * ((i / places) ** 2 * apart / 2 + o**2 / 2)

    def rotated(self) -> float:
        """Return the multiplications of an example's gradient in the eigenbasis: rows are turned, or what they form."""
        k, s, i, o = len(self.inputs), self.positions, self.inputs.shape[-1], self.outputs.shape[-1]
        return k * (min(s, o) * i**2 + min(s, i) * o**2 + s * i * o)


def live_layers(gradients: ExampleGradients) -> list[Layer]:
    """Return the layers, with what all examples say of them.

    Rows and columns of zeros are left out: their eigenvectors are known, and their weights have no gradient.

    Args:
        gradients: Passes; every example is visited once, with sampled labels.
    """
    sums: dict[str, list[Tensor]] = {}
    shapes: dict[str, tuple[int, tuple[int, ...]]] = {}
    with closing(gradients.run(range(len(gradients.source)), "sampled", draw=1)) as batches:
        for batch in batches:
            for io in batch.layers():
                rows = [side.flatten(1, 2) for side in (io.x, io.gs[0])]
                added = [(side.transpose(1, 2) @ side).double() for side in rows]
                known = sums.get(io.name)
                sums[io.name] = added if known is None else [a + b for a, b in zip(known, added, strict=True)]
                weight = next(iter(gradients.coverage.blocks[io.name].parameters.values()))
                shapes[io.name] = io.x.shape[2], tuple(weight.shape[2:])
    return [Layer(_live(inputs), _live(outputs), *shapes[name]) for name, (inputs, outputs) in sums.items()]


def multiplications_a_second(size: int = 1536, repetitions: int = 3) -> float:
    """Return how fast float32 matrices are multiplied where that is fastest, in one large product."""
    matrix = torch.randn(size, size)
    return size**3 / min(timed(lambda: matrix @ matrix) for _ in range(repetitions))


def _live(moment: Tensor) -> Tensor:
    (live,) = (moment != 0).any(-1).any(0).nonzero(as_tuple=True)
    return moment[:, live][:, :, live]


def eigendecompositions(matrices: Sequence[Tensor]) -> None:
    """Decompose symmetric matrices, one after the other."""
    for matrix in matrices:
        torch.linalg.eigh(matrix)


class Products:
    """The multiplications of per-example gradients, as they lie in memory, with those of queries, in float32.

    Args:
        weights: Number of weights of each layer.
        queries: Number of queries.
    """

    def __init__(self, weights: Sequence[int], queries: int) -> None:
        # One block of numbers stands for all: only the products are timed.
        self._factors = [(torch.randn(BLOCK, size), torch.randn(size, queries)) for size in weights]

    def __call__(self, examples: int) -> None:
        """Multiply for so many examples."""
        for block, queries in self._factors:
            for start in range(0, examples, BLOCK):
                torch.mm(block[: examples - start], queries)


def timed(work: Callable[[], None]) -> float:
    """Return the seconds that a work takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
