"""Patches of convolutions: how they are laid out, and what is computed from that layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_influence.core.layout import BatchLayout
from lightning_influence.layers.call import Layouts
from lightning_influence.layers.convolution import ConvolutionCall, patches
from lightning_influence.layers.rows import rotate, second_moment

EXACT: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12}

# Padded images, then what the patches are.
CASES: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "3 x 3": ((5, 4, 9, 8), {"kernel": (3, 3)}),
    "without a bias": ((5, 4, 9, 8), {"kernel": (3, 3), "ones": False}),
    "not square": ((5, 4, 9, 8), {"kernel": (4, 2)}),
    "one column": ((5, 4, 9, 8), {"kernel": (3, 1)}),
    "groups": ((5, 6, 9, 8), {"kernel": (3, 3), "groups": 3}),
    "depthwise": ((5, 3, 9, 8), {"kernel": (3, 3), "groups": 3}),
    "stride along the rows": ((5, 4, 9, 8), {"kernel": (3, 3), "stride": (1, 2)}),
    "dilation": ((5, 4, 11, 9), {"kernel": (3, 2), "dilation": (2, 3)}),
    "reversed": ((5, 4, 9, 8), {"kernel": (3, 2), "flipped": True}),
    "one dimension": ((5, 4, 9), {"kernel": (3,), "stride": (2,)}),
    "three dimensions": ((5, 2, 8, 4, 5), {"kernel": (2, 3, 2)}),
    "as many rows as the kernel": ((5, 4, 5, 8), {"kernel": (3, 3)}),
    "many inputs": ((5, 40, 5, 5), {"kernel": (3, 3)}),
}


def case(name: str) -> tuple[Tensor, dict[str, Any]]:
    shape, changes = CASES[name]
    d = len(changes["kernel"])
    options = {"stride": (1,) * d, "dilation": (1,) * d, "groups": 1, "ones": True, "flipped": False, **changes}
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64), options


def laid_out(name: str) -> Tensor:
    """``[k, n, s, i]``."""
    images, options = case(name)
    rows = patches(images, **options)
    return rows.unflatten(2, (len(images), -1)).permute(0, 2, 3, 1)


def dense(name: str) -> Tensor:
    """``[k, n, s, i]``, entry by entry of the kernel."""
    images, options = case(name)
    kernel, stride, dilation = options["kernel"], options["stride"], options["dilation"]
    sizes = zip(images.shape[2:], kernel, stride, dilation, strict=True)
    outputs = [(size - far * (width - 1) - 1) // step + 1 for size, width, step, far in sizes]
    columns = []
    for entry in (torch.zeros(kernel) == 0).nonzero().tolist():
        places = [size - 1 - a for size, a in zip(kernel, entry, strict=True)] if options["flipped"] else entry
        starts = [place * step for place, step in zip(places, dilation, strict=True)]
        window = tuple(
            slice(start, start + (out - 1) * step + 1, step)
            for start, out, step in zip(starts, outputs, stride, strict=True)
        )
        columns.append(images[(slice(None), slice(None), *window)].flatten(2))  # n c s
    stacked = torch.stack(columns, 2).unflatten(1, (options["groups"], -1)).flatten(2, 3)  # n k i s
    if options["ones"]:
        stacked = F.pad(stacked, (0, 0, 0, 1), value=1.0)
    return stacked.permute(1, 0, 3, 2)


@pytest.mark.parametrize("name", CASES)
class TestPatches:
    def test_laid_out(self, name: str) -> None:
        assert torch.equal(laid_out(name), dense(name))

    def test_moments_and_rotations_of_the_layout(self, name: str) -> None:
        """Laid out with the examples beside the positions, and cut into batches."""
        rows, expected = laid_out(name), dense(name)
        basis = torch.linalg.qr(torch.randn(rows.shape[0], rows.shape[3], rows.shape[3], dtype=torch.float64))[0]
        for part in (slice(None), slice(1, 3), slice(0, 1)):
            some, wanted = rows[:, part], expected[:, part]
            torch.testing.assert_close(second_moment(some), torch.einsum("knsi,knsj->kij", wanted, wanted), **EXACT)
            torch.testing.assert_close(second_moment(some, diagonal=True), wanted.square().sum((1, 2)), **EXACT)
            torch.testing.assert_close(rotate(some, basis), wanted @ basis.unsqueeze(1), **EXACT)


def test_by_example() -> None:
    """Examples that share the first dimension with time, time first."""
    images = torch.randn(3 * 2, 4, 5, 5)
    call = ConvolutionCall(images, {"weight": torch.zeros(1)}, (3, 3), (1, 1), ((0, 0), (0, 0)), (1, 1))
    rows = call.activations(2, Layouts(BatchLayout(0, "minor")))
    unfolded = F.unfold(images, 3).transpose(1, 2)  # [n·m, s, i]
    ordered = unfolded.view(3, 2, 9, -1).transpose(0, 1).reshape(1, 2, 27, -1)
    torch.testing.assert_close(rows, ordered)
