"""Convolutions as linear maps of patches."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from lightning_influence.core.precision import working
from lightning_influence.layers.call import Call, Layouts, MatrixCall
from lightning_influence.layers.registry import reads
from lightning_influence.layers.site import Site


@dataclass(frozen=True, eq=False)
class ConvolutionCall(MatrixCall):
    """``F.conv1d`` to ``F.conv3d`` and their transposes.

    Attributes:
        kernel: Size of the kernel, per spatial dimension.
        stride: Per spatial dimension.
        padding: Before and after, per spatial dimension; negative amounts crop.
        dilation: Per spatial dimension.
        groups: Number of groups.
        transposed: Whether this is a transposed convolution: one of the input with ``stride - 1`` zeros between its
            pixels, by the flipped kernel, with stride 1.
    """

    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[tuple[int, int], ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    transposed: bool = False

    title = "a convolution"

    @property
    def form(self) -> str:
        """As the weight of a convolution or a transposed one."""
        return "transposed convolution" if self.transposed else "convolution"

    def activations(self, n: int, layouts: Layouts) -> Tensor:
        """``[n·m, c, ...] -> [groups, n, s, i]``: one row per output position."""
        return self.captured(n, layouts)

    def captured(self, n: int, layouts: Layouts, *, ones: bool = False) -> Tensor:
        """``[n·m, c, ...] -> [groups, n, s, i (+ 1)]``: one row per output position."""
        images = self._padded(layouts.input.by_example(working(self.input), n).flatten(0, 1))
        stride = (1,) * len(self.stride) if self.transposed else self.stride
        rows = patches(images, self.kernel, stride, self.dilation, self.groups, flipped=self.transposed, ones=ones)
        return rows.view(*rows.shape[:2], n, -1).permute(0, 2, 3, 1)

    def output_gradients(self, gradient: Tensor, n: int, layouts: Layouts) -> Tensor:
        """``[n·m, c, ...] -> [groups, n, s, o]``."""
        rows = layouts.output.by_example(gradient, n)
        grouped = rows.reshape(n, rows.shape[1], self.groups, rows.shape[2] // self.groups, -1)
        if rows.shape[1] == 1:
            return grouped[:, 0].permute(1, 0, 3, 2)
        return grouped.permute(2, 0, 1, 4, 3).flatten(2, 3)

    def _padded(self, images: Tensor) -> Tensor:
        if self.transposed and any(step > 1 for step in self.stride):
            spread = tuple((size - 1) * step + 1 for size, step in zip(images.shape[2:], self.stride, strict=True))
            apart = images.new_zeros((*images.shape[:2], *spread))
            every = tuple(slice(None, None, step) for step in (1, 1, *self.stride))
            apart[every] = images
            images = apart
        sides = [side for pair in reversed(self.padding) for side in pair]
        return F.pad(images, sides) if any(sides) else images


def patches(
    images: Tensor,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
    *,
    flipped: bool = False,
    ones: bool = False,
) -> Tensor:
    """Return what the kernel sees at every output position, inputs first: moments and rotations are one product each.

    Args:
        images: ``[n, groups·c, ...]``, padded.
        kernel: Size of the kernel, per spatial dimension.
        stride: Per spatial dimension.
        dilation: Per spatial dimension.
        groups: Number of groups.
        flipped: Whether the kernel is laid over the image in reverse (transposed convolutions).
        ones: Whether a last input, always 1, stands for the bias.

    Returns:
        ``[groups, i, n·s]``, the inputs ``i`` being channels, then kernel positions.
    """
    (of_n, of_c, *of_pixels), d, channels = images.stride(), len(kernel), images.shape[1] // groups
    sizes = zip(images.shape[2:], kernel, stride, dilation, strict=True)
    out = [(size - far * (width - 1) - 1) // step + 1 for size, width, step, far in sizes]
    # All patches as one strided view, copied straight beside the bias: F.unfold and a concatenation take 3 to 20 times
    # as long.
    view = images.as_strided(
        (groups, channels, *kernel, len(images), *out),
        (
            of_c * channels,
            of_c,
            *(pixel * far for pixel, far in zip(of_pixels, dilation, strict=True)),
            of_n,
            *(pixel * step for pixel, step in zip(of_pixels, stride, strict=True)),
        ),
        images.storage_offset(),
    )
    if flipped:
        view = view.flip(tuple(range(2, 2 + d)))
    inputs = channels * math.prod(kernel)
    rows = images.new_empty((groups, inputs + ones, len(images) * math.prod(out)))
    rows[:, :inputs].view(view.shape).copy_(view)
    if ones:
        rows[:, -1] = 1
    return rows


@reads(F.conv1d, F.conv2d, F.conv3d)
def _read_convolution(site: Site) -> Call:
    a = site.bind("input weight bias stride padding dilation groups")
    roles = site.roles(a, "a convolution", weight="weight", bias="bias")
    d = a["weight"].ndim - 2
    stride, dilation = _per_axis(a["stride"], 1, d), _per_axis(a["dilation"], 1, d)
    kernel = a["weight"].shape[2:]
    if a["padding"] == "same":
        totals = [dilation[axis] * (kernel[axis] - 1) for axis in range(d)]
        padding = tuple((total // 2, total - total // 2) for total in totals)
    elif a["padding"] == "valid":
        padding = ((0, 0),) * d
    else:
        padding = tuple((side, side) for side in _per_axis(a["padding"], 0, d))
    return ConvolutionCall(a["input"].detach(), roles, tuple(kernel), stride, padding, dilation, a["groups"] or 1)


@reads(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
def _read_transposed_convolution(site: Site) -> Call:
    a = site.bind("input weight bias stride padding output_padding groups dilation")
    roles = site.roles(a, "a transposed convolution", weight="weight", bias="bias")
    d = a["weight"].ndim - 2
    stride, dilation = _per_axis(a["stride"], 1, d), _per_axis(a["dilation"], 1, d)
    cut, extra = _per_axis(a["padding"], 0, d), _per_axis(a["output_padding"], 0, d)
    kernel = a["weight"].shape[2:]
    reach = [dilation[axis] * (kernel[axis] - 1) for axis in range(d)]
    padding = tuple((reach[axis] - cut[axis], reach[axis] - cut[axis] + extra[axis]) for axis in range(d))
    groups = a["groups"] or 1
    return ConvolutionCall(a["input"].detach(), roles, tuple(kernel), stride, padding, dilation, groups, True)


def _per_axis(value: Any, default: int, d: int) -> tuple[int, ...]:
    if value is None:
        return (default,) * d
    if isinstance(value, int):
        return (value,) * d
    values = tuple(int(v) for v in value)
    return values if len(values) == d else values * d
