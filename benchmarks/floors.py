"""What the machine needs at the very least for a work: the parts that no method leaves out, in bare torch.

A floor takes turns with the contestants of a match, so that a target beyond it is seen to be out of reach on the
machine at hand. Only what is prepared, which is not timed, uses the library: which rows and columns of the covariances
are not zero (black pixels, dead units).
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from contextlib import closing

import torch
from networks import task
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_influence.passes import ExampleGradients

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


def live_moments(gradients: ExampleGradients) -> list[tuple[Tensor, Tensor]]:
    """Return each layer's sums of outer products of its inputs and of its output gradients, in float64.

    Rows and columns of zeros are left out: their eigenvectors are known, and their weights have no gradient.

    Args:
        gradients: Passes; every example is visited once, with sampled labels.

    Returns:
        ``[k, i, i]`` and ``[k, o, o]`` by layer.
    """
    sums: dict[str, list[Tensor]] = {}
    with closing(gradients.run(range(len(gradients.source)), "sampled", draw=1)) as batches:
        for batch in batches:
            for io in batch.layers():
                rows = [side.flatten(1, 2) for side in (io.x, io.gs[0])]
                added = [(side.transpose(1, 2) @ side).double() for side in rows]
                known = sums.get(io.name)
                sums[io.name] = added if known is None else [a + b for a, b in zip(known, added, strict=True)]
    return [(_live(inputs), _live(outputs)) for inputs, outputs in sums.values()]


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
