"""Patches of a convolution: its activations, laid out only where their values are needed.

The second moment of overlapping patches needs no patches. Two entries of a kernel that are ``δ`` rows apart meet the
same pairs of image rows wherever they stand in the kernel, up to a few rows at the border: a 3 x 3 kernel takes three
sums of products in place of nine, and a third of the memory.

Index legend: ``k`` groups, ``n`` examples, ``m`` images of an example, ``s`` output positions, ``c`` channels of a
group, ``i`` inputs (channels, then kernel positions), ``y`` rows of an image, ``r`` inputs of a kernel row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import TypeAlias

import torch
from torch import Tensor

# Fewer inputs make products too small to be worth more than one.
_LEAST_INPUTS = 128
# Multiplications of a matrix product that take as long as moving a number.
_MOVED = 40


@dataclass(frozen=True, eq=False)
class Patches:
    """Activations ``[k, n, s, i]`` of a convolution.

    Attributes:
        images: ``[n·m, k·c, ...]``, padded.
        n: Number of examples.
        kernel: Size of the kernel, per spatial dimension.
        stride: Per spatial dimension.
        dilation: Per spatial dimension.
        groups: Number of groups.
        flipped: Whether the kernel is laid over the image in reverse (transposed convolutions).
        ones: Whether a last input, always 1, stands for the bias.
        margin: Rows of zeros before and after, along the first spatial dimension.
    """

    images: Tensor
    n: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1
    flipped: bool = False
    ones: bool = False
    margin: tuple[int, int] = (0, 0)

    @property
    def outputs(self) -> tuple[int, ...]:
        """Number of output positions, per spatial dimension."""
        sizes = zip(self.images.shape[2:], self.kernel, self.stride, self.dilation, strict=True)
        return tuple((size - dilation * (kernel - 1) - 1) // stride + 1 for size, kernel, stride, dilation in sizes)

    @property
    def channels(self) -> int:
        """Channels of a group."""
        return self.images.shape[1] // self.groups

    @property
    def inputs(self) -> int:
        """Inputs of a group, without the 1."""
        return self.channels * math.prod(self.kernel)

    @property
    def shape(self) -> torch.Size:
        """``[k, n, s, i]``."""
        positions = len(self.images) // max(self.n, 1) * math.prod(self.outputs)
        return torch.Size((self.groups, self.n, positions, self.inputs + self.ones))

    @property
    def dtype(self) -> torch.dtype:
        """Of the images."""
        return self.images.dtype

    @property
    def device(self) -> torch.device:
        """Of the images."""
        return self.images.device

    def laid_out(self) -> Tensor:
        """Return ``[k, n, s, i]``, in memory ``[k, i, n, s]``: moments and rotations are one matrix product each."""
        k, d, out, count = self.groups, len(self.kernel), self.outputs, len(self.images)
        rows = self.images.new_empty((k, self.inputs + self.ones, count, math.prod(out)))
        # All patches as one strided view, copied straight beside the bias: F.unfold and a concatenation take 3 to
        # 20 times as long. Channels are the slow index, so a group's inputs are contiguous.
        patches = self._windows(range(d)).permute(1, 2, *range(3, 3 + d), 0, *range(3 + d, 3 + 2 * d))
        if self.flipped:
            patches = patches.flip(tuple(range(2, 2 + d)))
        rows[:, : self.inputs].view(patches.shape).copy_(patches)
        if self.ones:
            rows[:, -1] = 1
        return rows.view(k, rows.shape[1], self.n, self.shape[2]).permute(0, 2, 3, 1)

    def of_examples(self, start: int, stop: int) -> Patches:
        """Return the patches of some examples, which have one image each."""
        images = self.images[start:stop]
        return self if len(images) == len(self.images) else replace(self, images=images, n=len(images))

    def cost(self) -> float:
        """Return what laying out an example takes, in multiplications of a matrix product."""
        return _MOVED * math.prod(self.shape[2:]) * self.groups

    def gram_cost(self) -> float:
        """Return what ``gram`` takes for an example, in multiplications of a matrix product."""
        pixels, positions = math.prod(self.images.shape[2:]), self.shape[2]
        if len(self.images) != self.n:  # positions of different images have no pixels in common
            return math.inf
        return self.groups * (pixels**2 * self.channels + _MOVED * math.prod(self.kernel) * positions**2)

    def gram(self) -> Tensor:
        """Return ``x_s · x_t`` of all positions of an example, ``[k, n, s, s]``, for one image each.

        Pixels are multiplied once, and not at every place of the kernel that they are seen at: the products of pixels
        that lie as the places of two windows do are added up.
        """
        k, n, out = self.groups, self.n, self.outputs
        pixels = self.images.reshape(n, k, self.channels, -1).transpose(0, 1)
        # knca, kncb -> knab
        products = (pixels.mT @ pixels).view(k, n, *self.images.shape[2:], *self.images.shape[2:])
        total = products.new_full((k, n, *out, *out), 1.0 if self.ones else 0.0)
        for place in product(*map(range, self.kernel)):
            steps = zip(place, self.stride, self.dilation, out, strict=True)
            seen = tuple(slice(at * far, at * far + (count - 1) * step + 1, step) for at, step, far, count in steps)
            total += products[(slice(None), slice(None), *seen, *seen)]
        return total.view(k, n, self.shape[2], self.shape[2])

    def second_moment(self) -> Tensor | None:
        """Return ``Σ_ns x xᵀ``, ``[k, i, i]``, from the images; None where that is no cheaper than from the patches."""
        if len(self.kernel) < 2 or self.kernel[0] < 2 or self.stride[0] != 1 or self.outputs[0] < self.kernel[0]:
            return None
        if self.inputs < _LEAST_INPUTS:
            return None
        k, c, (kernel, *others), d = self.groups, self.channels, self.kernel, len(self.kernel)
        rows = self._kernel_rows()
        width = rows.shape[2]
        blocks = rows.new_empty((k, kernel, width, kernel, width))
        for apart in range(kernel):
            for first, products in enumerate(self._products(rows, apart)):
                blocks[:, first, :, first + apart] = products
                if apart:
                    blocks[:, first + apart, :, first] = products.mT
        # The kernel's rows go behind the channels.
        order = (0, 2, 1, *range(3, 2 + d), 3 + d, 2 + d, *range(4 + d, 3 + 2 * d))
        moment = blocks.view(k, kernel, c, *others, kernel, c, *others).permute(order)
        if self.flipped:
            moment = moment.flip((*range(2, 2 + d), *range(3 + d, 3 + 2 * d)))
        if not self.ones:
            return moment.reshape(k, self.inputs, self.inputs)
        result = rows.new_empty((k, self.inputs + 1, self.inputs + 1))
        result[:, :-1, :-1].view(moment.shape).copy_(moment)
        sums = rows.sum(-1)
        column = torch.stack([sums[self._seen(entry)].sum(0) for entry in range(kernel)], 1)
        column = column.view(k, kernel, c, *others).transpose(1, 2)
        column = column.flip(tuple(range(2, 2 + d))) if self.flipped else column
        result[:, :-1, -1] = result[:, -1, :-1] = column.reshape(k, self.inputs)
        result[:, -1, -1] = len(self.images) * math.prod(self.outputs)
        return result

    def _seen(self, entry: int) -> slice:
        """Return the rows of the image that a row of the kernel passes over."""
        start = self.dilation[0] * entry
        return slice(start, start + self.outputs[0])

    def _kernel_rows(self) -> Tensor:
        """Return for every row of the image what a row of the kernel sees there, ``[y, k, r, n·m·(other outputs)]``."""
        d = len(self.kernel)
        windows = self._windows(range(1, d))  # n k c (kernel) y (outputs)
        y = 3 + d - 1
        windows = windows.permute(y, 1, 2, *range(3, y), 0, *range(y + 1, y + d))
        return windows.reshape(len(windows), self.groups, self.channels * math.prod(self.kernel[1:]), -1)

    def _products(self, rows: Tensor, apart: int) -> list[Tensor]:
        """Return ``Σ_y rows_y rows_{y + δ}ᵀ`` over what two rows of the kernel pass over, for every first one.

        Args:
            rows: See ``_kernel_rows``.
            apart: How many kernel rows the second is below the first.
        """
        step, out = self.dilation[0], self.outputs[0]
        count = self.kernel[0] - apart
        # What all first rows pass over is added up once; with a large dilation there is nothing of that kind.
        start = step * (count - 1)
        stop = max(start, out)
        common = rows.new_zeros((rows.shape[1], rows.shape[2], rows.shape[2]))
        self._add(common, rows, start, stop, step * apart)
        found = []
        for entry in range(count):
            seen, total = self._seen(entry), common.clone()
            self._add(total, rows, seen.start, min(start, seen.stop), step * apart)
            self._add(total, rows, max(stop, seen.start), seen.stop, step * apart)
            found.append(total)
        return found

    def _add(self, total: Tensor, rows: Tensor, start: int, stop: int, apart: int) -> None:
        """Add ``Σ_y rows_y rows_{y + apart}ᵀ`` to ``[k, r, r]``, for ``start <= y < stop``."""
        before, after = self.margin
        start, stop = max(start, before), min(stop, len(rows) - after - apart)
        if start >= stop:
            return
        left, right = rows[start:stop], rows[start + apart : stop + apart].mT
        if len(total) == 1:
            total[0].addbmm_(left[:, 0], right[:, 0])
        else:
            total += (left @ right).sum(0)

    def _windows(self, axes: Sequence[int]) -> Tensor:
        """Return a view ``[n·m, k, c, *kernel, *sizes]``: windows along some spatial axes, the others as they are."""
        of_n, of_c, *of_pixels = self.images.stride()
        out = self.outputs
        sizes = [out[a] if a in axes else size for a, size in enumerate(self.images.shape[2:])]
        steps = [step * self.stride[a] if a in axes else step for a, step in enumerate(of_pixels)]
        return self.images.as_strided(
            (len(self.images), self.groups, self.channels, *(self.kernel[a] for a in axes), *sizes),
            (of_n, of_c * self.channels, of_c, *(of_pixels[a] * self.dilation[a] for a in axes), *steps),
            self.images.storage_offset(),
        )


Activations: TypeAlias = "Tensor | Patches"


def laid_out(activations: Sequence[Activations]) -> list[Tensor]:
    """Return activations ``[k, n, s, i]`` with all patches laid out."""
    return [each.laid_out() if isinstance(each, Patches) else each for each in activations]
